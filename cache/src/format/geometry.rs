//! How a cache device is divided.

use crate::disk::plan::SegmentId;
use blockstore::types::BLOCK_SIZE;

/// Smallest segment, bytes.
pub const SEGMENT_SIZE_MIN: u64 = 1 << 20;
/// Largest segment, bytes.
pub const SEGMENT_SIZE_MAX: u64 = 16 << 20;
/// Smallest cache, bytes: room for the two segments of a few disks.
pub const CACHE_SIZE_MIN: u64 = 16 << 20;
/// Most virtual disks attached at once.
pub const SLOTS_MAX: u32 = 1024;

const BLOCK: u64 = BLOCK_SIZE as u64;
/// Blocks of the two superblock copies.
const SUPERBLOCK_BLOCKS: u64 = 2;

/// Where everything lies on a cache device. Derived once at creation and kept in the superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of the device that are used.
    pub size: u64,
    /// Bytes in a segment.
    pub segment_size: u64,
    /// How many segments.
    pub segments: u32,
    /// How many virtual disks can be attached.
    pub slots: u32,
    /// Byte offset of segment 0.
    pub data_start: u64,
}

impl Geometry {
    /// Divides a device of `size` bytes: segment = size / 1024 within 1 to 16 MiB, a power of two.
    #[must_use]
    pub fn for_size(size: u64) -> Option<Self> {
        if size < CACHE_SIZE_MIN {
            return None;
        }
        let wanted = (size / 1024).clamp(SEGMENT_SIZE_MIN, SEGMENT_SIZE_MAX);
        let segment_size = 1 << wanted.ilog2();
        let slots = u32::try_from(size / segment_size / 2).unwrap_or(SLOTS_MAX).clamp(1, SLOTS_MAX);
        let meta = (SUPERBLOCK_BLOCKS + 2 * u64::from(slots)) * BLOCK;
        let data_start = meta.next_multiple_of(SEGMENT_SIZE_MIN);
        let segments = u32::try_from((size - data_start) / segment_size).ok()?;
        Some(Self { size, segment_size, segments, slots, data_start })
    }

    /// True if the fields do not contradict each other: what is read from a device is not believed unchecked.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.segment_size.is_power_of_two()
            && (SEGMENT_SIZE_MIN..=SEGMENT_SIZE_MAX).contains(&self.segment_size)
            && self.slots >= 1
            && self.slots <= SLOTS_MAX
            && self.data_start.is_multiple_of(BLOCK)
            && self.data_start >= (SUPERBLOCK_BLOCKS + 2 * u64::from(self.slots)) * BLOCK
            && self.segments >= 2
            && u64::from(self.segments)
                .checked_mul(self.segment_size)
                .and_then(|data| data.checked_add(self.data_start))
                .is_some_and(|end| end <= self.size)
            && u64::from(self.segments) * u64::from(self.segment_blocks()) < u64::from(u32::MAX) - 1
    }

    /// Blocks in a segment.
    #[must_use]
    pub fn segment_blocks(&self) -> u32 {
        (self.segment_size / BLOCK) as u32
    }

    /// Byte offset of a segment.
    #[must_use]
    pub fn segment_offset(&self, id: SegmentId) -> u64 {
        self.data_start + u64::from(id.0) * self.segment_size
    }

    /// Byte offset of copy 0 or 1 of the superblock.
    #[must_use]
    pub fn superblock_offset(copy: u64) -> u64 {
        (copy & 1) * BLOCK
    }

    /// Byte offset of copy 0 or 1 of a VDI slot.
    #[must_use]
    pub fn slot_offset(slot: u32, copy: u64) -> u64 {
        (SUPERBLOCK_BLOCKS + 2 * u64::from(slot) + (copy & 1)) * BLOCK
    }

    /// Byte offset of a block, counted from the first block of segment 0.
    #[must_use]
    pub fn block_offset(&self, block: u32) -> u64 {
        self.data_start + u64::from(block) * BLOCK
    }

    /// The block at a byte offset inside the segments.
    #[must_use]
    pub fn block_at(&self, offset: u64) -> u32 {
        ((offset - self.data_start) / BLOCK) as u32
    }

    /// The segment that a block (counted as in [`Self::block_offset`]) lies in.
    #[must_use]
    pub fn segment_of(&self, block: u32) -> SegmentId {
        SegmentId(block / self.segment_blocks())
    }

    /// First block of a segment, counted as in [`Self::block_offset`].
    #[must_use]
    pub fn first_block(&self, id: SegmentId) -> u32 {
        id.0 * self.segment_blocks()
    }
}
