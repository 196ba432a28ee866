//! Where things lie: extents, and the tables of the system extent.
//!
//! ```text
//! extent 0   superblock | GC record (2) | host table (2 each) | VDI registry (2 each) |
//!            extent catalogue (1 each) … | superblock copy
//! extent n   header | BMap pages | reclaim pages | blocks …
//! ```
//! All numbers are blocks unless said otherwise.

use crate::format::bitmap::{PAGE_BITS, WORD_BITS};
use crate::format::head::Damage;
use crate::types::{BLOCK_SHIFT, BLOCK_SIZE, Gba};

/// Smallest extent, bytes.
pub const EXTENT_SIZE_MIN: u64 = 1 << 20;
/// Largest extent, bytes.
pub const EXTENT_SIZE_MAX: u64 = 2 << 30;
/// A store needs the system extent, one for metadata and one for data, and one to spare.
pub const EXTENT_COUNT_MIN: u32 = 4;
/// How many extents the default extent size aims at, at least.
const EXTENTS_WANTED: u64 = 64;

/// Sizes and places of a store, as its superblock states them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks of an extent, a power of two.
    pub extent_blocks: u64,
    /// Extents, the system extent included.
    pub extent_count: u32,
    /// First block of the GC record's pair.
    pub gc_start: u64,
    /// First block of the host table.
    pub host_start: u64,
    /// Pairs of blocks in the host table.
    pub host_slots: u32,
    /// First block of the VDI registry.
    pub vdi_start: u64,
    /// Pairs of blocks in the VDI registry.
    pub vdi_slots: u32,
    /// First block of the extent catalogue.
    pub extent_start: u64,
    /// Blocks in the extent catalogue; at least `extent_count`, the rest is room to grow.
    pub extent_slots: u32,
}

impl Geometry {
    /// The extent size, in bytes, that a store of `size` bytes gets when nobody asks for another.
    #[must_use]
    pub fn default_extent_size(size: u64) -> u64 {
        let fit = (size / EXTENTS_WANTED).max(EXTENT_SIZE_MIN);
        let power = 1 << (63 - fit.leading_zeros());
        power.min(EXTENT_SIZE_MAX)
    }

    /// Lays out a store of `size` bytes in extents of `extent_size` bytes.
    ///
    /// # Errors
    /// Words that say why these sizes do not go together.
    pub fn plan(size: u64, extent_size: u64) -> Result<Self, String> {
        let extent_blocks = Self::blocks_of_extent_size(extent_size).ok_or_else(|| {
            format!(
                "extent size {extent_size} is not a power of two between {EXTENT_SIZE_MIN} and \
                 {EXTENT_SIZE_MAX} bytes"
            )
        })?;
        let count = size / extent_size;
        if count < u64::from(EXTENT_COUNT_MIN) {
            return Err(format!(
                "{size} bytes hold {count} extents of {extent_size} bytes, at least \
                 {EXTENT_COUNT_MIN} are needed: use a larger device or smaller extents"
            ));
        }
        let host_slots = (extent_blocks / 64).clamp(8, 128);
        let vdi_slots = (extent_blocks / 16).clamp(32, 8192);
        let gc_start = 1;
        let host_start = gc_start + 2;
        let vdi_start = host_start + 2 * host_slots;
        let extent_start = vdi_start + 2 * vdi_slots;
        let extent_slots = (extent_blocks - 1 - extent_start).min(1 << 20);
        if count > extent_slots {
            return Err(format!(
                "{count} extents are more than a system extent of {extent_size} bytes can list \
                 ({extent_slots}): use larger extents"
            ));
        }
        let geometry = Self {
            extent_blocks,
            extent_count: count as u32,
            gc_start,
            host_start,
            host_slots: host_slots as u32,
            vdi_start,
            vdi_slots: vdi_slots as u32,
            extent_start,
            extent_slots: extent_slots as u32,
        };
        geometry.check().map_err(|damage| format!("no layout fits these sizes: {damage}"))?;
        Ok(geometry)
    }

    /// Blocks of an extent of `bytes` bytes, if that is an allowed size.
    #[must_use]
    pub fn blocks_of_extent_size(bytes: u64) -> Option<u64> {
        let allowed =
            bytes.is_power_of_two() && (EXTENT_SIZE_MIN..=EXTENT_SIZE_MAX).contains(&bytes);
        allowed.then_some(bytes >> BLOCK_SHIFT)
    }

    /// Checks that the tables lie in the system extent, in order and apart.
    ///
    /// # Errors
    /// Names the field that does not fit.
    pub fn check(&self) -> Result<(), Damage> {
        let host_end = self.host_start.checked_add(2 * u64::from(self.host_slots));
        let vdi_end = self.vdi_start.checked_add(2 * u64::from(self.vdi_slots));
        let extent_end = self.extent_start.checked_add(u64::from(self.extent_slots));
        let ordered = |end: Option<u64>, next: u64| end.is_some_and(|end| end <= next);
        if self.gc_start < 1 || !ordered(self.gc_start.checked_add(2), self.host_start) {
            return Err(Damage::Field("gc_start"));
        }
        if self.host_slots == 0 || !ordered(host_end, self.vdi_start) {
            return Err(Damage::Field("host_slots"));
        }
        if self.vdi_slots == 0 || !ordered(vdi_end, self.extent_start) {
            return Err(Damage::Field("vdi_slots"));
        }
        if !ordered(extent_end, self.extent_blocks - 1) {
            return Err(Damage::Field("extent_slots"));
        }
        if self.extent_count < EXTENT_COUNT_MIN || self.extent_count > self.extent_slots {
            return Err(Damage::Field("extent_count"));
        }
        Ok(())
    }

    /// Bytes of an extent.
    #[must_use]
    pub fn extent_size(&self) -> u64 {
        self.extent_blocks << BLOCK_SHIFT
    }

    /// Bytes of all extents.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.total_blocks() * BLOCK_SIZE as u64
    }

    /// Blocks of all extents.
    #[must_use]
    pub fn total_blocks(&self) -> u64 {
        u64::from(self.extent_count) * self.extent_blocks
    }

    /// The two copies of the superblock.
    #[must_use]
    pub fn superblocks(&self) -> [Gba; 2] {
        [Gba(0), Gba(self.extent_blocks - 1)]
    }

    /// Where the copy of the superblock can be on a device of that many bytes, whatever the extent size: at the end of extent 0.
    pub fn copy_places(device_bytes: u64) -> impl Iterator<Item = Gba> {
        std::iter::successors(Some(EXTENT_SIZE_MIN), |extent| Some(extent * 2))
            .take_while(move |extent| *extent <= EXTENT_SIZE_MAX.min(device_bytes))
            .map(|extent| Gba((extent >> BLOCK_SHIFT) - 1))
    }

    /// First block of a host's pair.
    #[must_use]
    pub fn host_slot(&self, slot: u32) -> Gba {
        Gba(self.host_start + 2 * u64::from(slot))
    }

    /// First block of a VDI's pair.
    #[must_use]
    pub fn vdi_slot(&self, slot: u32) -> Gba {
        Gba(self.vdi_start + 2 * u64::from(slot))
    }

    /// An extent's block in the catalogue.
    #[must_use]
    pub fn extent_slot(&self, extent: u32) -> Gba {
        Gba(self.extent_start + u64::from(extent))
    }

    /// The extent a block lies in.
    #[must_use]
    pub fn extent_of(&self, gba: Gba) -> u32 {
        (gba.0 / self.extent_blocks) as u32
    }

    /// First block of an extent: its header.
    #[must_use]
    pub fn extent_base(&self, extent: u32) -> Gba {
        Gba(u64::from(extent) * self.extent_blocks)
    }

    /// Pages of an extent's BMap, and of its reclaim bitmap.
    #[must_use]
    pub fn bmap_pages(&self) -> u32 {
        self.extent_blocks.div_ceil(PAGE_BITS) as u32
    }

    /// A page of an extent's BMap.
    #[must_use]
    pub fn bmap_page(&self, extent: u32, page: u32) -> Gba {
        self.extent_base(extent).plus(1 + u64::from(page))
    }

    /// A page of an extent's reclaim bitmap.
    #[must_use]
    pub fn reclaim_page(&self, extent: u32, page: u32) -> Gba {
        self.bmap_page(extent, self.bmap_pages() + page)
    }

    /// Blocks at the start of an extent that its own structures take.
    #[must_use]
    pub fn extent_overhead(&self) -> u64 {
        1 + 2 * u64::from(self.bmap_pages())
    }

    /// Bits that a page of a bitmap of an extent holds; the last page may hold fewer.
    #[must_use]
    pub fn page_bits(&self, page: u32) -> u64 {
        (self.extent_blocks - u64::from(page) * PAGE_BITS).min(PAGE_BITS)
    }

    /// True if a pointer may name this block: in an extent other than the system's, after its bitmaps.
    #[must_use]
    #[inline]
    pub fn is_allocatable(&self, gba: Gba) -> bool {
        // Extents are a power of two of blocks long; collection asks this of each pointer there is, and a division takes long.
        debug_assert!(self.extent_blocks.is_power_of_two());
        gba.0 < self.total_blocks()
            && gba.0 >= self.extent_blocks
            && gba.0 & (self.extent_blocks - 1) >= self.extent_overhead()
    }

    /// Which of the [`WORD_BITS`] blocks from `first` on, a multiple of as many, are [allocatable](Self::is_allocatable); the
    /// first is the lowest bit.
    #[must_use]
    pub fn allocatable_word(&self, first: Gba) -> u64 {
        // An extent is a power of two of blocks, and at least 256: a word lies in one of them.
        if !(self.extent_blocks..self.total_blocks()).contains(&first.0) {
            return 0;
        }
        let within = first.0 & (self.extent_blocks - 1);
        match self.extent_overhead().saturating_sub(within) {
            overhead if overhead < WORD_BITS => !0 << overhead,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn default_extents_fit_the_store() {
        for (size, extent) in [
            (8u64 << 30, 128u64 << 20),
            (64 << 20, 1 << 20),
            (4 << 20, 1 << 20),
            (127 << 20, 1 << 20),
            (100 << 30, 1 << 30),
            (1 << 50, 2 << 30),
        ] {
            assert_eq!(Geometry::default_extent_size(size), extent, "{size}");
        }
    }

    #[test]
    fn odd_sizes_are_refused_with_words() {
        assert!(Geometry::plan(64 << 20, 3 << 20).unwrap_err().contains("power of two"));
        assert!(Geometry::plan(64 << 20, 4 << 30).unwrap_err().contains("power of two"));
        assert!(Geometry::plan(3 << 20, 1 << 20).unwrap_err().contains("larger device"));
        assert!(Geometry::plan(1 << 40, 1 << 20).unwrap_err().contains("larger extents"));
    }

    proptest! {
        #[test]
        fn default_layouts_hold_together(size in (4u64 << 20)..(200u64 << 40)) {
            let g = Geometry::plan(size, Geometry::default_extent_size(size)).expect("fits");
            prop_assert!(g.size_bytes() <= size);
            if size >= 64 << 20 {
                prop_assert!(g.extent_count >= 64);
            }
            prop_assert!(g.extent_slot(g.extent_slots - 1) < g.superblocks()[1]);
            prop_assert!(g.extent_overhead() < g.extent_blocks / 2);
            prop_assert!(!g.is_allocatable(Gba(0)));
            prop_assert!(!g.is_allocatable(g.reclaim_page(1, g.bmap_pages() - 1)));
            prop_assert!(g.is_allocatable(g.reclaim_page(1, g.bmap_pages() - 1).plus(1)));
            prop_assert!(!g.is_allocatable(Gba(g.total_blocks())));
            for first in (0..3 * g.extent_blocks).chain(g.total_blocks()..g.total_blocks() + 1).step_by(64) {
                let each = (0..64).map(|bit| u64::from(g.is_allocatable(Gba(first + bit))) << bit);
                prop_assert_eq!(g.allocatable_word(Gba(first)), each.sum::<u64>());
            }
        }
    }
}
