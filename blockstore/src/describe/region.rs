//! What a block's place in the store says of it.

use crate::format::geometry::Geometry;
use crate::types::Gba;
use std::fmt;

/// Where a block lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// One of the two superblocks, 0 being the first.
    Superblock(u8),
    /// The GC record's pair.
    Gc(u8),
    /// The pair of a place in the host table.
    Host(u32, u8),
    /// The pair of a slot of the VDI registry.
    Vdi(u32, u8),
    /// The record of an extent in the catalogue.
    Catalogue(u32),
    /// The system extent, between its tables.
    Spare,
    /// The first block of an extent.
    ExtentHeader(u32),
    /// Extent and page of an allocation bitmap.
    Bitmap(u32, u32),
    /// Extent and page of a reclaim bitmap.
    Reclaim(u32, u32),
    /// Extent, and block of it: data, or what maps it.
    Block(u32, u64),
    /// Behind the last extent.
    Beyond,
}

impl Region {
    /// Where a block lies in a store of this geometry.
    #[must_use]
    pub fn of(g: &Geometry, gba: Gba) -> Self {
        let (block, extent) = (gba.0, gba.0 / g.extent_blocks);
        let Some(extent) = u32::try_from(extent).ok().filter(|extent| *extent < g.extent_count)
        else {
            return Self::Beyond;
        };
        if extent > 0 {
            return Self::in_extent(g, extent, block % g.extent_blocks);
        }
        let within = |start: u64, blocks: u64| (start..start + blocks).contains(&block);
        let pair = |start: u64| (((block - start) / 2) as u32, ((block - start) % 2) as u8);
        if let Some(copy) = g.superblocks().iter().position(|at| *at == gba) {
            Self::Superblock(copy as u8)
        } else if within(g.gc_start, 2) {
            Self::Gc(pair(g.gc_start).1)
        } else if within(g.host_start, 2 * u64::from(g.host_slots)) {
            let (slot, copy) = pair(g.host_start);
            Self::Host(slot, copy)
        } else if within(g.vdi_start, 2 * u64::from(g.vdi_slots)) {
            let (slot, copy) = pair(g.vdi_start);
            Self::Vdi(slot, copy)
        } else if within(g.extent_start, u64::from(g.extent_slots)) {
            Self::Catalogue((block - g.extent_start) as u32)
        } else {
            Self::Spare
        }
    }

    fn in_extent(g: &Geometry, extent: u32, block: u64) -> Self {
        let pages = u64::from(g.bmap_pages());
        match block {
            0 => Self::ExtentHeader(extent),
            page if page <= pages => Self::Bitmap(extent, (page - 1) as u32),
            page if page <= 2 * pages => Self::Reclaim(extent, (page - 1 - pages) as u32),
            block => Self::Block(extent, block),
        }
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let copy = |copy: u8| if copy == 0 { "first" } else { "second" };
        match *self {
            Self::Superblock(n) => write!(f, "the {} superblock", copy(n)),
            Self::Gc(n) => write!(f, "the GC record, {} block", copy(n)),
            Self::Host(slot, n) => write!(f, "the host table, place {slot}, {} block", copy(n)),
            Self::Vdi(slot, n) => write!(f, "the VDI registry, slot {slot}, {} block", copy(n)),
            Self::Catalogue(extent) => write!(f, "the extent catalogue, record of extent {extent}"),
            Self::Spare => write!(f, "the system extent, where nothing is"),
            Self::ExtentHeader(extent) => write!(f, "extent {extent}, its header"),
            Self::Bitmap(extent, page) => {
                write!(f, "extent {extent}, page {page} of its allocation bitmap")
            }
            Self::Reclaim(extent, page) => {
                write!(f, "extent {extent}, page {page} of its reclaim bitmap")
            }
            Self::Block(extent, block) => write!(f, "extent {extent}, block {block} of it"),
            Self::Beyond => write!(f, "behind the store's last extent"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every block of a small store is in exactly the region that its structure's address says.
    #[test]
    fn regions_are_where_the_structures_are() {
        let g = Geometry::plan(8 << 20, 1 << 20).expect("fits");
        let is = |gba, region| assert_eq!(Region::of(&g, gba), region);
        is(Gba(0), Region::Superblock(0));
        is(g.superblocks()[1], Region::Superblock(1));
        is(Gba(g.gc_start + 1), Region::Gc(1));
        for slot in 0..g.host_slots {
            is(g.host_slot(slot), Region::Host(slot, 0));
        }
        for slot in 0..g.vdi_slots {
            is(g.vdi_slot(slot).plus(1), Region::Vdi(slot, 1));
        }
        is(g.extent_slot(7), Region::Catalogue(7));
        is(g.extent_base(3), Region::ExtentHeader(3));
        is(g.bmap_page(3, 0), Region::Bitmap(3, 0));
        is(g.reclaim_page(3, 0), Region::Reclaim(3, 0));
        is(g.extent_base(3).plus(3), Region::Block(3, 3));
        is(Gba(g.total_blocks()), Region::Beyond);
        is(Gba(u64::MAX), Region::Beyond);
        for block in 0..g.total_blocks() {
            let gba = Gba(block);
            let is_block = matches!(Region::of(&g, gba), Region::Block(..));
            assert_eq!(is_block, g.is_allocatable(gba), "{block}");
        }
    }
}
