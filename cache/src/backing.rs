//! What the cache needs of the store behind it.

use async_trait::async_trait;
use blockstore::types::{Lba, Lsn};
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
}

/// Everything that changed between the committed LSN and `lsn`, overwrites coalesced.
#[derive(Debug)]
pub struct Batch {
    /// The cut: the batch covers the dense range from the committed LSN + 1 to this one.
    pub lsn: Lsn,
    /// Sorted by LBA, disjoint.
    pub changes: Vec<Change>,
}

/// A change to one block or a run of blocks.
#[derive(Clone, Debug)]
pub enum Change {
    /// Replace one block.
    Write {
        /// Which block.
        lba: Lba,
        /// CRC32C of `data`.
        crc: u32,
        /// 4096 bytes at an address that is a multiple of 4096.
        data: Bytes,
    },
    /// Turn blocks into holes, which read as zeros.
    Zero {
        /// First block.
        lba: Lba,
        /// How many, at least 1.
        blocks: u64,
    },
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
