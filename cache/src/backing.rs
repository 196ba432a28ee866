//! What the cache needs of the store behind it.

pub(crate) mod deferred;

use async_trait::async_trait;
use blockstore::types::{Lba, Lsn};
pub use blockstore::{Batch, Change};
use blockstore::{Policy, StoreError, StoreErrorKind, Vdi};
use bytes::Bytes;
use std::fmt;

/// One virtual disk of a store that takes ordered, atomic commits.
///
/// Implementations retry transient faults (unreachable, full) for ever, reporting them through their
/// own status; an error returned here is final for the call.
#[async_trait]
pub trait Backing: Send + Sync + fmt::Debug + 'static {
    /// LSN up to which the store's durable image of the disk reaches.
    fn committed(&self) -> Lsn;

    /// Reads whole blocks of the committed image; a hole reads as `None` (zeros). Every block was
    /// checked against the checksum its parent holds.
    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError>;

    /// Makes the disk's image exactly that of `batch.lsn`, atomically and durably; earlier state
    /// stays in force until then. Commits of one disk are never concurrent.
    async fn commit(&self, batch: Batch) -> Result<(), BackingError>;

    /// Which of these blocks the store has, one after the other: the others read as zeros.
    async fn stored(&self, lba: Lba, blocks: u32) -> Result<Vec<bool>, BackingError> {
        Ok(self.read(lba, blocks).await?.iter().map(Option::is_some).collect())
    }

    /// What was chosen for this disk, as the store notes it.
    fn policy(&self) -> Policy {
        Policy::default()
    }

    /// The outage that is going on, if one is: since when the store has not answered, in milliseconds since 1970. A store
    /// that is slow, full or cut off on purpose for a drill is not away.
    fn away_since_ms(&self) -> Option<u64> {
        None
    }
}

/// A final failure of a backing operation.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// A block did not match its checksum and no good copy exists. The read fails; the disk goes on.
    #[error("corrupt block: {0}")]
    Corrupt(String),
    /// The disk is no longer ours (taken over, or the store was rolled back): stop committing.
    #[error("lost ownership: {0}")]
    NotOwner(String),
    /// The store is shutting down.
    #[error("the store is closing")]
    Closing,
    /// Anything else that retrying cannot cure.
    #[error("{0}")]
    Failed(String),
}

#[async_trait]
impl Backing for Vdi {
    fn committed(&self) -> Lsn {
        Vdi::committed(self).lsn
    }

    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        Ok(Vdi::read(self, lba, blocks).await?)
    }

    async fn commit(&self, batch: Batch) -> Result<(), BackingError> {
        Vdi::commit(self, batch).await?;
        Ok(())
    }

    async fn stored(&self, lba: Lba, blocks: u32) -> Result<Vec<bool>, BackingError> {
        let pointers = Vdi::resolve(self, lba, blocks).await?;
        Ok(pointers.iter().map(|pointer| !pointer.is_sparse()).collect())
    }

    fn policy(&self) -> Policy {
        Vdi::policy(self)
    }

    fn away_since_ms(&self) -> Option<u64> {
        Vdi::away_since_ms(self)
    }
}

impl From<StoreError> for BackingError {
    fn from(error: StoreError) -> Self {
        match error.kind {
            StoreErrorKind::Corrupt => Self::Corrupt(error.to_string()),
            StoreErrorKind::NotOwner | StoreErrorKind::RolledBack => {
                Self::NotOwner(error.to_string())
            }
            StoreErrorKind::Closing => Self::Closing,
            _ => Self::Failed(error.to_string()),
        }
    }
}
