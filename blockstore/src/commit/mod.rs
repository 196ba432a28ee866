//! Commits: a batch of changes becomes the disk's next image, atomically and durably.
//!
//! Order of writes:
//! 1. data blocks, to fresh addresses (`prepare`; may overlap the previous commit's steps 2 to 5);
//! 2. nodes, to fresh addresses, from the leaves up;
//! 3. barrier: flush; if the device may have lost anything since the first write, 1 and 2 again with
//!    the same bytes to the same blocks (rule C1);
//! 4. the VDI head, by one compare-and-write; flush;
//! 5. only now: publish the new root to readers, retire what it replaced (rule C3).
//!
//! A crash before 4 leaves the former image and leaked blocks; after 4 the new image. In between the
//! compare-and-write decides which.

pub mod decide;
pub(crate) mod plan;
pub(crate) mod publish;

pub use crate::format::snapshot::SnapshotLabel;
use crate::types::{Lba, Lsn};
use bytes::Bytes;

/// Everything that changed between the committed LSN and `lsn`, overwrites coalesced.
#[derive(Debug)]
pub struct Batch {
    /// The cut: the batch covers the dense range from the committed LSN + 1 to this one.
    pub lsn: Lsn,
    /// Snapshots inside that range, in the order of their LSNs, each at a later one than that before.
    pub cuts: Vec<Cut>,
    /// What changed after the last cut. Sorted by LBA, disjoint.
    pub changes: Vec<Change>,
}

impl Batch {
    /// A batch without snapshots.
    #[must_use]
    pub const fn new(lsn: Lsn, changes: Vec<Change>) -> Self {
        Self { lsn, cuts: Vec::new(), changes }
    }

    /// What changes up to each cut, then what changes after the last: to be applied one after the other.
    pub fn parts(&self) -> impl Iterator<Item = &[Change]> {
        self.cuts.iter().map(|cut| &cut.changes[..]).chain([&self.changes[..]])
    }
}

/// A snapshot: the disk as of one point of the guest's write order, which is also its name.
#[derive(Debug)]
pub struct Cut {
    /// What changed since the cut before, or since the committed LSN. Sorted by LBA, disjoint.
    pub changes: Vec<Change>,
    /// The point.
    pub lsn: Lsn,
    /// When it was asked for, milliseconds since 1970.
    pub time_ms: u64,
    /// For people; may be empty.
    pub label: SnapshotLabel,
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

impl Change {
    /// First block.
    #[must_use]
    pub const fn first(&self) -> u64 {
        match self {
            Self::Write { lba, .. } | Self::Zero { lba, .. } => lba.0,
        }
    }

    /// The block after the last.
    #[must_use]
    pub const fn end(&self) -> u64 {
        match self {
            Self::Write { lba, .. } => lba.0 + 1,
            Self::Zero { lba, blocks } => lba.0.saturating_add(*blocks),
        }
    }
}

/// What a commit did.
#[derive(Clone, Debug, Default)]
pub struct Committed {
    /// The image is now that of this LSN.
    pub lsn: Lsn,
    /// Where the batch's `Write`s lie now, in their order.
    pub pointers: Vec<crate::format::pointer::Pointer>,
}
