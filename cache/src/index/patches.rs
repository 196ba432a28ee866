//! Blocks of which only some sectors were written.
//!
//! A patch never waits for the store: it is kept beside whatever lies under it until a commit merged the two, or a whole
//! write replaced both.

use super::Slot;
use blockstore::types::Lsn;
use smallvec::SmallVec;
use std::ops::Range;

/// What lies under the patches of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchBase {
    /// A whole block on the cache device.
    At { slot: Slot, crc: u32 },
    /// Zeros.
    Zero,
    /// The store's image.
    Store,
}

/// Where the sectors of a patch come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchSource {
    /// A block on the cache device that holds them at their place.
    At { slot: Slot, crc: u32 },
    /// They are zeros.
    Zero,
}

/// Some sectors of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Their bytes.
    pub source: PatchSource,
    /// Which (bit n: sector n).
    pub sectors: u8,
}

/// A patched block: at most eight patches, none hidden entirely by later ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patched {
    base: PatchBase,
    patches: SmallVec<[Patch; 1]>,
    last_lsn: Lsn,
}

impl Patched {
    /// No patch yet.
    #[must_use]
    pub fn new(base: PatchBase) -> Self {
        Self { base, patches: SmallVec::new(), last_lsn: Lsn(0) }
    }

    /// What lies under the patches.
    #[must_use]
    pub fn base(&self) -> PatchBase {
        self.base
    }

    /// Oldest first; each counts only where no later one does.
    #[must_use]
    pub fn patches(&self) -> &[Patch] {
        &self.patches
    }

    /// LSN of the newest.
    #[must_use]
    pub fn last_lsn(&self) -> Lsn {
        self.last_lsn
    }

    /// Lays a patch over the rest.
    pub fn push(&mut self, lsn: Lsn, patch: Patch) {
        for old in &mut self.patches {
            old.sectors &= !patch.sectors;
        }
        self.patches.retain(|old| old.sectors != 0);
        self.patches.push(patch);
        self.last_lsn = self.last_lsn.max(lsn);
    }

    /// Slots in `range` go away; everything in them is committed, so the store stands in for it.
    pub fn evict(&mut self, range: &Range<Slot>) {
        if matches!(self.base, PatchBase::At { slot, .. } if range.contains(&slot)) {
            self.base = PatchBase::Store;
        }
        let before = self.patches.len();
        self.patches.retain(
            |patch| !matches!(patch.source, PatchSource::At { slot, .. } if range.contains(&slot)),
        );
        if self.patches.len() != before {
            // The evicted patch is in the store, over whatever the base was.
            self.base = PatchBase::Store;
        }
    }

    /// Nothing local is left.
    #[must_use]
    pub fn is_plain_store(&self) -> bool {
        self.patches.is_empty() && self.base == PatchBase::Store
    }
}
