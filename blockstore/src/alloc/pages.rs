//! BMap pages and extent records of this host: claims and releases.
//!
//! A page is changed in memory, then written whole; memory is the truth, since nobody else writes
//! it.

mod apply;
mod bad;
mod claim;
mod release;
mod unmap;
mod unread;
mod unused;

use crate::alloc::Territory;
use crate::alloc::runs::Run;
use crate::error::Result;
use crate::format::bitmap::{BitmapKind, BitmapPage, PAGE_BITS};
use crate::format::extent::{ExtentRecord, ExtentType};
use crate::io::{Io, Write};
use crate::slot::{Swap, View};
use crate::types::Gba;
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use tokio::time::Instant;

pub(super) use unmap::{Pieces, Room};

/// Pages kept in memory between operations.
pub(super) const LOADED_MAX: usize = 64;

#[derive(Debug)]
pub(super) struct Pages {
    extents: BTreeMap<u32, Extent>,
    loaded: BTreeMap<(u32, u32), BitmapPage>,
    /// What the catalogue said of each extent when it was last looked at.
    catalogue: Vec<ExtentType>,
    /// Where the search for free blocks goes on, so that a disk's blocks lie in order.
    data_cursor: (u32, u32),
    metadata_cursor: (u32, u32),
    /// Where the search for an unused extent goes on after one for which a thin device had no space.
    unused_cursor: u32,
    /// It had none for the last one that was to be set up.
    is_thin_full: bool,
    /// When it was asked for one last, and what it said.
    thin_asked: Option<(Instant, String)>,
    /// The device is told of free blocks: an extent is given up only after that.
    unmaps: bool,
    /// Pages that the device did not read or write (`bad.rs`).
    bad: bad::BadPages,
    /// Extents whose record the device did not read (`unread.rs`).
    unread: BTreeSet<u32>,
}

#[derive(Debug)]
struct Extent {
    kind: ExtentType,
    view: View<ExtentRecord>,
    /// The record carries this incarnation's generation.
    taken_up: bool,
    /// Clear bits of each page, where known.
    free: Vec<Option<u64>>,
    /// Bits of each page between which some were cleared since the device was told; empty: none.
    stale: Vec<Range<u64>>,
}

impl Extent {
    /// Goes on from what the record is now: after a write of it that was thought to have failed, a later one than is known
    /// here may be our own. True if it is, and the change is to be tried again on top of that.
    fn keep_up(&mut self, territory: &Territory, swap: &Swap<ExtentRecord>) -> bool {
        let (Swap::Done(view) | Swap::Lost(view)) = swap;
        let is_own = view.record().is_some_and(|record| {
            record.owner == Some(territory.host) && record.owner_generation <= territory.generation
        });
        if is_own {
            self.view = view.clone();
        }
        is_own && matches!(swap, Swap::Lost(_))
    }
}

impl Pages {
    pub(super) fn new(territory: &Territory, catalogue: &[View<ExtentRecord>]) -> Self {
        let mut pages = Self {
            extents: BTreeMap::new(),
            loaded: BTreeMap::new(),
            catalogue: Vec::with_capacity(catalogue.len()),
            data_cursor: (0, 0),
            metadata_cursor: (0, 0),
            unused_cursor: 0,
            is_thin_full: false,
            thin_asked: None,
            unmaps: false,
            bad: bad::BadPages::default(),
            unread: BTreeSet::new(),
        };
        for (number, view) in (0..).zip(catalogue) {
            pages.catalogue.push(ExtentType::System);
            pages.learn(territory, number, view);
        }
        pages
    }

    fn adopt(
        &mut self,
        territory: &Territory,
        number: u32,
        kind: ExtentType,
        view: View<ExtentRecord>,
    ) {
        let free = vec![None; territory.geometry.bmap_pages() as usize];
        // What was told before this incarnation is not known.
        let stale = vec![0..PAGE_BITS; free.len()];
        let taken_up =
            view.record().is_some_and(|r| r.ready && r.owner_generation == territory.generation);
        self.extents.insert(number, Extent { kind, view, taken_up, free, stale });
    }

    pub(super) fn owned_extents(&self) -> impl Iterator<Item = (u32, ExtentType)> + '_ {
        self.extents.iter().map(|(&number, extent)| (number, extent.kind))
    }

    pub(super) fn owned_count(&self) -> usize {
        self.extents.len()
    }

    async fn load(&mut self, io: &Io, territory: &Territory, extent: u32, page: u32) -> Result<()> {
        if self.loaded.contains_key(&(extent, page)) {
            return Ok(());
        }
        let address = territory.geometry.bmap_page(extent, page);
        let store = territory.records.store;
        let bytes = io.read(address, 1).await?;
        let mut content = BitmapPage::decode(&bytes, BitmapKind::Allocation, store, address);
        if content.is_err() {
            // The fault may be on the way.
            let bytes = io.read(address, 1).await?;
            content = BitmapPage::decode(&bytes, BitmapKind::Allocation, store, address);
        }
        let content = content.unwrap_or_else(|damage| {
            tracing::warn!(extent, page, %damage, "damaged BMap page: its free blocks leak");
            BitmapPage::full()
        });
        let free = content.clear_bits(territory.geometry.page_bits(page));
        if let Some(owned) = self.extents.get_mut(&extent) {
            owned.free[page as usize] = Some(free);
        }
        self.loaded.insert((extent, page), content);
        Ok(())
    }

    fn encode(&mut self, territory: &Territory, changed: &[(u32, u32)]) -> Vec<Write> {
        let mut writes = Vec::with_capacity(changed.len());
        for &(extent, page) in changed {
            if let Some(content) = self.loaded.get_mut(&(extent, page)) {
                content.sequence += 1;
                writes.push(page_write(territory, extent, page, content, BitmapKind::Allocation));
            }
        }
        writes
    }

    /// Puts this incarnation's generation on an extent's record before the first change of its BMap.
    async fn take_up(&mut self, io: &Io, territory: &Territory, number: u32) -> Result<()> {
        let Some(extent) = self.extents.get_mut(&number) else { return Ok(()) };
        let mut again = true;
        while !extent.taken_up {
            let Some(record) = extent.view.record().cloned() else { return Ok(()) };
            let owner_generation = territory.generation;
            let record = ExtentRecord { owner_generation, ready: true, ..record };
            let swap = territory.records.swap(io, &extent.view, record).await?;
            if extent.keep_up(territory, &swap) && std::mem::take(&mut again) {
                continue;
            }
            swap.done(|| format!("{}, extent {number}", io.url()))?;
            extent.taken_up = true;
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn loaded_count(&self) -> usize {
        self.loaded.len()
    }

    /// Forgets pages beyond the limit, full ones first. Only when all changes were written.
    fn trim(&mut self) {
        if self.loaded.len() > LOADED_MAX {
            self.loaded.retain(|_, page| page.clear_bits(PAGE_BITS) > 0);
        }
        while self.loaded.len() > LOADED_MAX {
            let Some(&key) = self.loaded.keys().next() else { break };
            self.loaded.remove(&key);
        }
    }
}

/// Extent, page and bit of a block.
fn place(territory: &Territory, gba: Gba) -> (u32, u32, u64) {
    let within = gba.0 % territory.geometry.extent_blocks;
    (territory.geometry.extent_of(gba), (within / PAGE_BITS) as u32, within % PAGE_BITS)
}

/// A run's pages, and its bits in each. A run lies in one extent.
fn by_page(
    territory: &Territory,
    run: Run,
) -> impl Iterator<Item = ((u32, u32), Range<u64>)> + use<> {
    let (extent, first, bit) = place(territory, run.start);
    let end = bit + run.blocks;
    let pages = first..=first + ((end - 1) / PAGE_BITS) as u32;
    pages.zip(0..).map(move |(page, n): (u32, u64)| {
        let from = n * PAGE_BITS;
        ((extent, page), bit.max(from) - from..end.min(from + PAGE_BITS) - from)
    })
}

/// The block that the first bit of a page stands for.
fn page_base(territory: &Territory, extent: u32, page: u32) -> Gba {
    territory.geometry.extent_base(extent).plus(u64::from(page) * PAGE_BITS)
}

fn page_write(
    territory: &Territory,
    extent: u32,
    page: u32,
    content: &BitmapPage,
    kind: BitmapKind,
) -> Write {
    let address = match kind {
        BitmapKind::Allocation => territory.geometry.bmap_page(extent, page),
        BitmapKind::Reclaim => territory.geometry.reclaim_page(extent, page),
    };
    (address, vec![Bytes::from(content.encode(kind, territory.records.store, address))])
}
