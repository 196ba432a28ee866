//! BMap pages and extent records of this host: claims and releases.
//!
//! A page is changed in memory, then written whole; memory is the truth, since nobody else writes
//! it. Order of a new extent: record (owner, not ready), flush; header and empty bitmaps, flush;
//! record (ready), flush. A crash in between leaves an unready extent, whose owner starts again.

mod apply;
mod unmap;

use crate::alloc::Territory;
use crate::alloc::runs::Run;
use crate::error::Result;
use crate::format::bitmap::{BitmapKind, BitmapPage, PAGE_BITS};
use crate::format::extent::{ExtentHeader, ExtentRecord, ExtentType};
use crate::format::head::Head;
use crate::io::{Io, Write};
use crate::sabotage::{self, Bug};
use crate::slot::{Content, Slot, Swap, View};
use crate::types::{BLOCK_SIZE, Gba};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::ops::Range;

pub(super) use unmap::Pieces;

/// Pages kept in memory between operations.
const LOADED_MAX: usize = 64;
/// Pages of unknown content that one search for room reads.
const LOOKED_AT_MAX: usize = 48;
/// Unused extents are plentiful if they are at least one in so many.
const UNUSED_PLENTY: usize = 4;

#[derive(Debug)]
pub(super) struct Pages {
    extents: BTreeMap<u32, Extent>,
    loaded: BTreeMap<(u32, u32), BitmapPage>,
    /// What the catalogue said of each extent when it was last looked at.
    catalogue: Vec<ExtentType>,
    /// Where the search for free blocks goes on, so that a disk's blocks lie in order.
    data_cursor: (u32, u32),
    metadata_cursor: (u32, u32),
    /// The device is told of free blocks: an extent is given up only after that.
    unmaps: bool,
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
    /// here may be our own.
    fn keep_up(&mut self, territory: &Territory, swap: &Swap<ExtentRecord>) {
        let (Swap::Done(view) | Swap::Lost(view)) = swap;
        if view.record().is_some_and(|record| record.owner == Some(territory.host)) {
            self.view = view.clone();
        }
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
            unmaps: false,
        };
        for (number, view) in (0..).zip(catalogue) {
            let kind = match &view.content {
                Content::Unused => ExtentType::Unused,
                Content::Valid(head) => head.record.kind,
                // Neither ours nor free for the taking.
                Content::Damaged(damage) => {
                    tracing::error!(extent = number, %damage, "damaged extent record");
                    ExtentType::System
                }
            };
            pages.catalogue.push(kind);
            if view.record().is_some_and(|r| r.owner == Some(territory.host)) {
                pages.adopt(territory, number, kind, view.clone());
            }
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

    /// Sets up extents whose claim a crash cut off.
    pub(super) async fn finish_claims(&mut self, io: &Io, territory: &Territory) -> Result<()> {
        let unready: Vec<u32> = self
            .extents
            .iter()
            .filter(|(_, e)| e.view.record().is_some_and(|r| !r.ready))
            .map(|(&number, _)| number)
            .collect();
        for number in unready {
            self.set_up(io, territory, number).await?;
        }
        Ok(())
    }

    /// Marks at least `wanted` free blocks of `kind` as allocated, durably; fewer if there are no
    /// more.
    pub(super) async fn claim(
        &mut self,
        io: &Io,
        territory: &Territory,
        kind: ExtentType,
        wanted: u64,
    ) -> Result<Vec<Run>> {
        let mut claimed: Vec<Run> = Vec::new();
        let mut changed: Vec<(u32, u32)> = Vec::new();
        let mut total = 0;
        let outcome = async {
            while total < wanted {
                let Some((extent, page)) = self.next_page(io, territory, kind).await? else {
                    if self.claim_extent(io, territory, kind).await? {
                        continue;
                    }
                    break;
                };
                self.take_up(io, territory, extent).await?;
                let runs = self.mark(territory, extent, page, wanted - total, 1);
                total += runs.iter().map(|run| run.blocks).sum::<u64>();
                claimed.extend(runs);
                changed.push((extent, page));
                if changed.len() >= LOADED_MAX {
                    io.write_durable(&self.encode(territory, &changed)).await?;
                    changed.clear();
                    self.trim();
                }
            }
            if sabotage::on(Bug::ClaimUnwritten) {
                return Ok(());
            }
            io.write_durable(&self.encode(territory, &changed)).await
        }
        .await;
        if let Err(error) = outcome {
            // Not given out: memory says free again, and the next write of the page says so too.
            self.unmark(territory, &claimed);
            return Err(error);
        }
        self.trim();
        Ok(claimed)
    }

    /// Marks up to `wanted` free blocks that lie in runs of at least `run_min`, durably: from the emptiest pages, then from
    /// unused extents while those are plentiful. For allocations that should lie together; fewer blocks, or none, if there are
    /// no such runs.
    pub(super) async fn claim_roomy(
        &mut self,
        io: &Io,
        territory: &Territory,
        kind: ExtentType,
        wanted: u64,
        run_min: u64,
    ) -> Result<Vec<Run>> {
        let mut claimed: Vec<Run> = Vec::new();
        let mut changed: Vec<(u32, u32)> = Vec::new();
        let mut total = 0;
        let outcome = async {
            if self.unused_are_plenty() && !self.has_room_for(territory, kind, wanted) {
                self.claim_extent(io, territory, kind).await?;
            }
            for (extent, page) in self.pages_by_room(kind) {
                if total >= wanted || changed.len() >= LOADED_MAX / 2 {
                    break;
                }
                self.load(io, territory, extent, page).await?;
                let runs = self.mark(territory, extent, page, wanted - total, run_min);
                if runs.is_empty() {
                    self.loaded.remove(&(extent, page));
                    continue;
                }
                self.take_up(io, territory, extent).await?;
                total += runs.iter().map(|run| run.blocks).sum::<u64>();
                claimed.extend(runs);
                changed.push((extent, page));
            }
            if sabotage::on(Bug::ClaimUnwritten) {
                return Ok(());
            }
            io.write_durable(&self.encode(territory, &changed)).await
        }
        .await;
        if let Err(error) = outcome {
            self.unmark(territory, &claimed);
            return Err(error);
        }
        self.trim();
        Ok(claimed)
    }

    /// Enough extents are unused to take one more only to keep blocks together.
    fn unused_are_plenty(&self) -> bool {
        let unused = self.catalogue.iter().filter(|k| **k == ExtentType::Unused).count();
        unused * UNUSED_PLENTY >= self.catalogue.len()
    }

    /// Some page of a kind is mostly empty, as far as is known.
    fn has_room_for(&self, territory: &Territory, kind: ExtentType, wanted: u64) -> bool {
        let of_kind = self.extents.values().filter(|e| e.kind == kind);
        let mut pages = of_kind.flat_map(|e| (0..).zip(&e.free));
        pages.any(|(page, free)| {
            let bits = territory.geometry.page_bits(page);
            free.is_none_or(|free| free >= wanted.min(bits) && free * 4 >= bits * 3)
        })
    }

    /// Pages of a kind that may have room, emptiest first; those never looked at count as empty.
    fn pages_by_room(&self, kind: ExtentType) -> Vec<(u32, u32)> {
        let of_kind = self.extents.iter().filter(|(_, e)| e.kind == kind);
        let mut pages: Vec<(u64, (u32, u32))> = of_kind
            .flat_map(|(&number, e)| {
                let free = (0..).zip(&e.free);
                free.map(move |(page, free)| (free.unwrap_or(PAGE_BITS), (number, page)))
            })
            .filter(|(free, _)| *free > 0)
            .collect();
        pages.sort_by_key(|(free, place)| (std::cmp::Reverse(*free), *place));
        pages.into_iter().take(LOOKED_AT_MAX).map(|(_, place)| place).collect()
    }

    /// The next page with a clear bit, from the cursor on.
    async fn next_page(
        &mut self,
        io: &Io,
        territory: &Territory,
        kind: ExtentType,
    ) -> Result<Option<(u32, u32)>> {
        let cursor = if kind == ExtentType::Data { self.data_cursor } else { self.metadata_cursor };
        let candidates: Vec<(u32, u32)> = {
            let all = || {
                self.extents.iter().filter(|(_, e)| e.kind == kind).flat_map(|(&number, e)| {
                    let known_full = |p: &u32| e.free[*p as usize] != Some(0);
                    (0..e.free.len() as u32).filter(known_full).map(move |p| (number, p))
                })
            };
            let ahead = all().filter(|place| *place >= cursor);
            ahead.chain(all().filter(|place| *place < cursor)).collect()
        };
        for (extent, page) in candidates {
            self.load(io, territory, extent, page).await?;
            let known = self.extents.get(&extent).and_then(|e| e.free[page as usize]);
            if known == Some(0) {
                self.loaded.remove(&(extent, page));
            } else if known.is_some() {
                if kind == ExtentType::Data {
                    self.data_cursor = (extent, page);
                } else {
                    self.metadata_cursor = (extent, page);
                }
                return Ok(Some((extent, page)));
            }
        }
        Ok(None)
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

    /// Sets up to `wanted` clear bits of a loaded page, in runs of at least `run_min`.
    fn mark(
        &mut self,
        territory: &Territory,
        extent: u32,
        page: u32,
        wanted: u64,
        run_min: u64,
    ) -> Vec<Run> {
        let limit = territory.geometry.page_bits(page);
        let base = page_base(territory, extent, page);
        let mut runs = Vec::new();
        let (mut from, mut missing) = (0, wanted);
        let Some(content) = self.loaded.get_mut(&(extent, page)) else { return runs };
        while missing > 0 {
            let Some((first, len)) = content.next_clear_run(from, limit) else { break };
            from = first + len;
            if len < run_min {
                continue;
            }
            let blocks = len.min(missing);
            for bit in first..first + blocks {
                content.set(bit, true);
            }
            runs.push(Run { start: base.plus(first), blocks });
            missing -= blocks;
        }
        if let Some(owned) = self.extents.get_mut(&extent) {
            owned.free[page as usize] = Some(content.clear_bits(limit));
        }
        runs
    }

    /// Clears the bits of runs whose pages are loaded.
    fn unmark(&mut self, territory: &Territory, runs: &[Run]) {
        for run in runs {
            for gba in run.iter() {
                let (extent, page, bit) = place(territory, gba);
                if let Some(content) = self.loaded.get_mut(&(extent, page)) {
                    content.set(bit, false);
                    if let Some(owned) = self.extents.get_mut(&extent) {
                        owned.note_freed(page, bit);
                    }
                }
            }
        }
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

    /// Clears the bits of blocks that were in the pool; not flushed, since a loss only leaks. Extents
    /// that are all free then are given up.
    pub(super) async fn release(
        &mut self,
        io: &Io,
        territory: &Territory,
        kind: ExtentType,
        mut runs: Vec<Run>,
    ) -> Result<()> {
        runs.sort_unstable();
        let mut changed: Vec<(u32, u32)> = Vec::new();
        for run in &runs {
            // A run may span pages of one extent.
            let (extent, first, _) = place(territory, run.start);
            let (_, last, _) = place(territory, run.start.plus(run.blocks - 1));
            for page in first..=last {
                if changed.last() != Some(&(extent, page)) {
                    self.load(io, territory, extent, page).await?;
                    self.take_up(io, territory, extent).await?;
                    changed.push((extent, page));
                }
            }
            self.unmark(territory, &[*run]);
            // Bounds the pages in memory when fragments are spread over a large store.
            if changed.len() >= LOADED_MAX {
                let writes = self.encode(territory, &changed);
                io.write_all(&writes).await?;
                changed.clear();
                self.trim();
            }
        }
        let writes = self.encode(territory, &changed);
        io.write_all(&writes).await?;
        let mut touched: Vec<u32> = runs.iter().map(|r| place(territory, r.start).0).collect();
        touched.dedup();
        for extent in touched {
            self.give_up_if_empty(io, territory, kind, extent).await?;
        }
        self.trim();
        Ok(())
    }

    /// Returns an extent to the unused ones when all its blocks are free; one of each type is kept.
    async fn give_up_if_empty(
        &mut self,
        io: &Io,
        territory: &Territory,
        kind: ExtentType,
        number: u32,
    ) -> Result<()> {
        let same_kind = self.extents.values().filter(|e| e.kind == kind).count();
        let Some(extent) = self.extents.get(&number) else { return Ok(()) };
        let known: Option<u64> = extent.free.iter().copied().sum();
        let all = territory.geometry.extent_blocks - territory.geometry.extent_overhead();
        if same_kind < 2 || known != Some(all) || (self.unmaps && extent.is_stale()) {
            return Ok(());
        }
        let unused = ExtentRecord {
            sweep_epoch: extent.view.record().map_or(0, |r| r.sweep_epoch),
            ..ExtentRecord::unused()
        };
        // Bits were cleared before, so nothing in the pool lies here. If it is not known what becomes of the record, nothing is
        // given out of the extent any more: others may find it unused.
        let view = extent.view.clone();
        self.extents.remove(&number);
        self.loaded.retain(|(extent, _), _| *extent != number);
        if let Swap::Done(_) = territory.records.swap(io, &view, unused).await? {
            self.catalogue[number as usize] = ExtentType::Unused;
        }
        Ok(())
    }

    /// Puts this incarnation's generation on an extent's record before the first change of its BMap.
    async fn take_up(&mut self, io: &Io, territory: &Territory, number: u32) -> Result<()> {
        let Some(extent) = self.extents.get_mut(&number) else { return Ok(()) };
        if extent.taken_up {
            return Ok(());
        }
        let Some(record) = extent.view.record().cloned() else { return Ok(()) };
        let record = ExtentRecord { owner_generation: territory.generation, ready: true, ..record };
        let swap = territory.records.swap(io, &extent.view, record).await?;
        extent.keep_up(territory, &swap);
        swap.done(|| format!("{}, extent {number}", io.url()))?;
        extent.taken_up = true;
        Ok(())
    }

    /// Takes an unused extent; false if there is none to be had for this type.
    async fn claim_extent(
        &mut self,
        io: &Io,
        territory: &Territory,
        kind: ExtentType,
    ) -> Result<bool> {
        loop {
            let unused: Vec<u32> = (0..)
                .zip(&self.catalogue)
                .filter(|(_, k)| **k == ExtentType::Unused)
                .map(|(number, _)| number)
                .collect();
            let kept = if kind == ExtentType::Data { self.kept_for_metadata() } else { 0 };
            let Some(&number) = unused.first().filter(|_| unused.len() as u64 > kept) else {
                // One that only waits for the device to be told is needed now.
                if self.give_up_unmapped(io, territory, kind).await? {
                    continue;
                }
                return Ok(false);
            };
            let slot = Slot { first: territory.geometry.extent_slot(number), paired: false };
            let view: View<ExtentRecord> = territory.records.read(io, slot).await?;
            let free = match &view.content {
                Content::Unused => true,
                Content::Valid(head) => head.record.kind == ExtentType::Unused,
                Content::Damaged(_) => false,
            };
            if !free {
                self.catalogue[number as usize] =
                    view.record().map_or(ExtentType::System, |record| record.kind);
                continue;
            }
            let record = ExtentRecord {
                kind,
                ready: false,
                owner: Some(territory.host),
                owner_generation: territory.generation,
                sweep_epoch: view.record().map_or(0, |r| r.sweep_epoch),
            };
            self.catalogue[number as usize] = kind;
            if let Swap::Done(view) = territory.records.swap(io, &view, record).await? {
                self.adopt(territory, number, kind, view);
                if let Some(extent) = self.extents.get_mut(&number) {
                    // What former owners left is theirs to tell, or nobody's.
                    extent.stale.fill(0..0);
                }
                self.set_up(io, territory, number).await?;
                return Ok(true);
            }
        }
    }

    /// Unused extents that data must leave for the nodes that will map it.
    fn kept_for_metadata(&self) -> u64 {
        let wanted = (self.catalogue.len() as u64).div_ceil(64);
        let have = self.catalogue.iter().filter(|k| **k == ExtentType::Metadata).count() as u64;
        wanted.saturating_sub(have)
    }

    /// Writes an extent's header and empty bitmaps, then declares it ready.
    async fn set_up(&mut self, io: &Io, territory: &Territory, number: u32) -> Result<()> {
        let Some(extent) = self.extents.get_mut(&number) else { return Ok(()) };
        io.write_durable(&fresh_extent(territory, number, extent.kind)).await?;
        let Some(record) = extent.view.record().cloned() else { return Ok(()) };
        let record = ExtentRecord { ready: true, owner_generation: territory.generation, ..record };
        let swap = territory.records.swap(io, &extent.view, record).await?;
        extent.view = swap.done(|| format!("{}, extent {number}", io.url()))?;
        extent.taken_up = true;
        Ok(())
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

/// Everything an empty extent starts with.
fn fresh_extent(territory: &Territory, number: u32, kind: ExtentType) -> Vec<Write> {
    let g = &territory.geometry;
    let header = ExtentHeader::of(g, number, kind);
    let base = g.extent_base(number);
    let head = Head { store: territory.records.store, sequence: 1, record: header };
    let mut block = Bytes::copy_from_slice(&head.encode_block(base));
    debug_assert_eq!(block.len(), BLOCK_SIZE);
    let mut pieces = vec![block.split_off(0)];
    for page in 0..g.bmap_pages() {
        let content = BitmapPage::fresh(g, page).with_sequence(1);
        pieces.extend(page_write(territory, number, page, &content, BitmapKind::Allocation).1);
    }
    for page in 0..g.bmap_pages() {
        let content = BitmapPage::clear().with_sequence(1);
        pieces.extend(page_write(territory, number, page, &content, BitmapKind::Reclaim).1);
    }
    vec![(base, pieces)]
}
