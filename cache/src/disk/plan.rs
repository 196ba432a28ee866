//! What it takes to serve a read: pieces of a request and where each lies.

use crate::image::SegmentImage;
use blockstore::types::Lba;
use smallvec::SmallVec;
use std::sync::Arc;

/// Index of a segment on the cache device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId(pub u32);

/// Where the blocks of one read request are. Covers whole blocks: a request that starts or ends inside a block is
/// planned for the blocks around it. The segments that `Local` pieces name stay pinned until
/// [`Disk::release`](super::Disk::release).
#[derive(Debug, Default)]
pub struct ReadPlan {
    /// First block of the request.
    pub lba: Lba,
    /// Blocks of the request.
    pub blocks: u32,
    /// In order of their blocks, covering the request without gaps.
    pub pieces: SmallVec<[Piece; 4]>,
    /// CRC32C of each block of the request, by index; meaningful inside `Local` pieces only.
    pub crcs: SmallVec<[u32; 32]>,
    /// Segments pinned by this plan, with repetitions.
    pub(crate) pins: SmallVec<[SegmentId; 4]>,
}

/// A run of blocks of a request; `block` counts from the request's first.
#[derive(Debug)]
pub enum Piece {
    /// On the cache device, contiguous from byte `offset`. Verify each block against `ReadPlan::crcs`.
    Local { block: u32, blocks: u32, offset: u64 },
    /// In a segment image in memory, contiguous from byte `start`; copy it.
    Memory { block: u32, blocks: u32, image: Arc<SegmentImage>, start: usize },
    /// Reads as zeros.
    Zero { block: u32, blocks: u32 },
    /// Not held locally: fetch from the store with [`FromDisk::Fetch`](crate::link::FromDisk::Fetch).
    Miss { block: u32, blocks: u32 },
    /// One block made of a base and sector patches over it.
    Patched { block: u32, patched: Box<PatchedBlock> },
}

/// A block of which some sectors were overwritten since its base was.
#[derive(Clone, Debug)]
pub struct PatchedBlock {
    /// What lies under the patches.
    pub base: BlockSource,
    /// Oldest first; later ones win.
    pub overlays: SmallVec<[Overlay; 2]>,
}

/// Source of one whole block.
#[derive(Clone, Debug)]
pub enum BlockSource {
    /// On the cache device at byte `offset`, with CRC32C `crc`.
    Local { offset: u64, crc: u32 },
    /// In a segment image in memory.
    Memory { image: Arc<SegmentImage>, start: usize },
    /// Zeros.
    Zero,
    /// The store's committed image.
    Miss,
}

/// Sectors that replace those of the base.
#[derive(Clone, Debug)]
pub struct Overlay {
    /// Holds the sectors at their place inside the block; never `Zero` or `Miss` unless the sectors are zeroed
    /// (`Zero`).
    pub source: BlockSource,
    /// Bit n: sector n of the block comes from here.
    pub sectors: u8,
}

impl ReadPlan {
    /// Empties the plan for reuse. Its pins must have been released.
    pub fn clear(&mut self) {
        debug_assert!(self.pins.is_empty(), "a plan is released before it is reused");
        self.pieces.clear();
        self.crcs.clear();
        self.pins.clear();
    }
}
