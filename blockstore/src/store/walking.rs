//! Looking at all that disks and snapshots hold while this host uses the store, for as long as that takes.
//!
//! A walk stands on the same ground as the marking of a cycle: what this host frees meanwhile stays in quarantine, so no
//! block that a root reached when it was read is used again, and one mark per block says all there is to say of it. Unlike a cycle it
//! writes nothing, and ends in nothing. There is one walk or one cycle at a time.

use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::vdi::VdiHead;
use crate::slot::View;
use crate::store::Store;
use crate::tree::Reader;
use crate::types::Gba;
use roaring::RoaringTreemap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Walks of this process. Their numbers are no cycle's: that half of the epochs is never reached.
static WALKS: AtomicU64 = AtomicU64::new(FIRST_WALK);
pub(crate) const FIRST_WALK: u64 = 1 << 63;

/// A walk under way. Dropped, it is over.
#[derive(Debug)]
pub struct Walk {
    store: Arc<Store>,
    number: u64,
}

impl Store {
    /// Begins a walk. Not for stores that are open read-only: those see what other processes free.
    ///
    /// # Errors
    /// `InUse` if a cycle of collection, or another walk, is under way; `ReadOnly`.
    pub async fn begin_walk(self: &Arc<Self>) -> Result<Walk> {
        let allocator = self.core.allocator()?;
        let number = WALKS.fetch_add(1, Ordering::Relaxed);
        allocator.begin_cycle(number).await?;
        Ok(Walk { store: Arc::clone(self), number })
    }

    /// True if blocks may be freed by this process, so that [`begin_walk`](Self::begin_walk) is needed and possible.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.core.writer.is_some()
    }
}

impl Drop for Walk {
    fn drop(&mut self) {
        if let Ok(allocator) = self.store.core.allocator() {
            allocator.end_cycle(self.number);
        }
    }
}

impl Walk {
    /// The registry as it is now, while no disk is made or deleted.
    ///
    /// # Errors
    /// The device's.
    pub async fn heads(&self) -> Result<Vec<(u32, View<VdiHead>)>> {
        self.store.change(|store| async move { store.scan_vdis().await }).await
    }

    /// Reads checked nodes; gives up when the device does not answer.
    #[must_use]
    pub fn reader(&self) -> Reader {
        self.store.reader()
    }

    /// Makes sure that no block that was reached has been used again.
    ///
    /// # Errors
    /// `NoSpace` if this host needed what it had in quarantine.
    pub fn check(&self) -> Result<()> {
        self.store.core.allocator()?.check_cycle(self.number).map_err(|_| {
            StoreError::new(
                StoreErrorKind::NoSpace,
                self.store.url(),
                "the sizes were not computed: the space that was freed meanwhile was needed at once, or was too much to \
                 set aside; ask again later",
            )
        })
    }

    /// Of blocks that are allocated and were not reached, those that this host neither had in hand when the walk began (claimed,
    /// or for a commit under way) nor claimed or freed since: what collection would give back.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn count_garbage(&self, unreached: impl Iterator<Item = Gba>) -> Result<u64> {
        let found: RoaringTreemap = unreached.map(|gba| gba.0).collect();
        let garbage = self.store.core.allocator()?.untouched(self.number, found).len();
        self.check().map(|()| garbage)
    }
}
