//! BMap pages and extent records of this host: claims and releases.
//!
//! A page is changed in memory, then written whole; memory is the truth, since nobody else writes
//! it. Order of a new extent: record (owner, not ready), flush; header and empty bitmaps, flush;
//! record (ready), flush. A crash in between leaves an unready extent, whose owner starts again.

mod apply;
mod bad;
mod release;
mod unmap;

use crate::alloc::Territory;
use crate::alloc::runs::Run;
use crate::error::{Result, StoreError};
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

pub(super) use unmap::{Pieces, Room};

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
    /// Pages that the device did not read or write (`bad.rs`).
    bad: bad::BadPages,
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
            bad: bad::BadPages::default(),
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
    /// more. Pages that the device does not read or write are avoided while there are others.
    pub(super) async fn claim(
        &mut self,
        io: &Io,
        territory: &Territory,
        kind: ExtentType,
        wanted: u64,
    ) -> Result<Vec<Run>> {
        let mut claimed: Vec<Run> = Vec::new();
        let outcome = self.claim_all(io, territory, kind, wanted, &mut claimed).await;
        if let Err(error) = outcome {
            // Not given out: memory says free again, and the next write of the page says so too.
            self.unmark(territory, &claimed);
            return Err(error);
        }
        self.trim();
        Ok(claimed)
    }

    async fn claim_all(
        &mut self,
        io: &Io,
        territory: &Territory,
        kind: ExtentType,
        wanted: u64,
        claimed: &mut Vec<Run>,
    ) -> Result<()> {
        let mut bad = bad::Search::new(io);
        let mut changed: Vec<(u32, u32)> = Vec::new();
        let mut total = 0;
        loop {
            let is_enough = total >= wanted;
            if is_enough || changed.len() >= LOADED_MAX {
                total -= self.write_claims(&mut bad, territory, &changed, claimed).await?;
                changed.clear();
                self.trim();
                if is_enough && total >= wanted {
                    return Ok(());
                }
                continue;
            }
            if let Some(place) = self.next_page(&mut bad, territory, kind).await? {
                let runs = self.mark(territory, place.0, place.1, wanted - total, 1);
                total += runs.iter().map(|run| run.blocks).sum::<u64>();
                claimed.extend(runs);
                changed.push(place);
            } else if !self.claim_extent(&mut bad, territory, kind).await? {
                total -= self.write_claims(&mut bad, territory, &changed, claimed).await?;
                changed.clear();
                if total >= wanted || !bad.begins_again(&mut self.bad) {
                    return Ok(());
                }
            }
        }
    }

    /// Makes claims in some pages durable. What lies in pages that the device does not take is given up; so many blocks.
    async fn write_claims(
        &mut self,
        bad: &mut bad::Search,
        territory: &Territory,
        changed: &[(u32, u32)],
        claimed: &mut Vec<Run>,
    ) -> Result<u64> {
        if sabotage::on(Bug::ClaimUnwritten) {
            return Ok(0);
        }
        let refused = self.write_pages(bad.io(), territory, changed, true).await?;
        if refused.len() < changed.len() {
            bad.note_answer();
        }
        refused.iter().for_each(|_| bad.note_refusal());
        // A claim's run lies in one page.
        let is_refused = |run: &Run| {
            let (extent, page, _) = place(territory, run.start);
            refused.iter().any(|(place, _)| *place == (extent, page))
        };
        let (lost, kept): (Vec<Run>, Vec<Run>) =
            std::mem::take(claimed).into_iter().partition(is_refused);
        *claimed = kept;
        self.unmark(territory, &lost);
        Ok(lost.iter().map(|run| run.blocks).sum())
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
        let mut bad = bad::Search::new(io);
        let outcome = async {
            if self.unused_are_plenty() && !self.has_room_for(territory, kind, wanted) {
                self.claim_extent(&mut bad, territory, kind).await?;
            }
            for (extent, page) in self.pages_by_room(kind) {
                if total >= wanted || changed.len() >= LOADED_MAX / 2 {
                    break;
                }
                // The extent's record may have been refused a moment ago, and with it all of its pages.
                if self.bad.is_avoided((extent, page))
                    || !self.load_or_avoid(&mut bad, territory, (extent, page)).await?
                {
                    continue;
                }
                let runs = self.mark(territory, extent, page, wanted - total, run_min);
                if runs.is_empty() {
                    self.loaded.remove(&(extent, page));
                    continue;
                }
                let blocks = runs.iter().map(|run| run.blocks).sum::<u64>();
                let marked = claimed.len();
                claimed.extend(runs);
                if self.take_up_or_avoid(&mut bad, territory, extent).await? {
                    total += blocks;
                    changed.push((extent, page));
                } else {
                    self.unmark(territory, &claimed.split_off(marked));
                }
            }
            self.write_claims(&mut bad, territory, &changed, &mut claimed).await
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
        let of_kind = self.extents.iter().filter(|(_, e)| e.kind == kind);
        let pages = of_kind.flat_map(|(&number, e)| {
            (0..).zip(&e.free).map(move |(page, free)| ((number, page), free))
        });
        let mut good = pages.filter(|(place, _)| !self.bad.is_avoided(*place));
        good.any(|((_, page), free)| {
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
            .filter(|(free, place)| *free > 0 && !self.bad.is_avoided(*place))
            .collect();
        pages.sort_by_key(|(free, place)| (std::cmp::Reverse(*free), *place));
        pages.into_iter().take(LOOKED_AT_MAX).map(|(_, place)| place).collect()
    }

    /// The next page with a clear bit, from the cursor on, in an extent whose record says that it may be changed.
    async fn next_page(
        &mut self,
        bad: &mut bad::Search,
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
            if self.bad.is_avoided((extent, page))
                || !self.load_or_avoid(bad, territory, (extent, page)).await?
            {
                continue;
            }
            let known = self.extents.get(&extent).and_then(|e| e.free[page as usize]);
            if known == Some(0) {
                self.loaded.remove(&(extent, page));
            } else if known.is_some() && self.take_up_or_avoid(bad, territory, extent).await? {
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
        bad: &mut bad::Search,
        territory: &Territory,
        kind: ExtentType,
    ) -> Result<bool> {
        loop {
            let Some(number) = self.next_unused(kind) else {
                // One that only waits for the device to be told is needed now.
                if self.give_up_unmapped(bad.io(), territory, kind).await? {
                    continue;
                }
                return Ok(false);
            };
            let slot = Slot { first: territory.geometry.extent_slot(number), paired: false };
            let view: View<ExtentRecord> = match territory.records.read(bad.io(), slot).await {
                Err(error) if bad::is_of_blocks(&error) => {
                    self.avoid(bad, number, &error);
                    continue;
                }
                view => view?,
            };
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
            let swap = match territory.records.swap(bad.io(), &view, record).await {
                // If it was carried out after all, the next start finds it.
                Err(error) if bad.is_refusal(&error) => {
                    self.avoid(bad, number, &error);
                    continue;
                }
                swap => swap?,
            };
            self.catalogue[number as usize] = kind;
            if let Swap::Done(view) = swap {
                self.adopt(territory, number, kind, view);
                if let Some(extent) = self.extents.get_mut(&number) {
                    // What former owners left is theirs to tell, or nobody's.
                    extent.stale.fill(0..0);
                }
                self.set_up(&bad.io().insisting(), territory, number).await?;
                return Ok(true);
            }
        }
    }

    /// An unused extent whose record cannot be read or written is passed over.
    fn avoid(&mut self, bad: &mut bad::Search, number: u32, error: &StoreError) {
        bad.note_refusal();
        self.bad.note((number, 0), error);
    }

    /// Unused extents that a kind may take.
    fn unused_for(&self, kind: ExtentType) -> u64 {
        let unused = self.catalogue.iter().filter(|k| **k == ExtentType::Unused).count() as u64;
        let kept = if kind == ExtentType::Data { self.kept_for_metadata() } else { 0 };
        unused.saturating_sub(kept)
    }

    /// The first of them.
    fn next_unused(&self, kind: ExtentType) -> Option<u32> {
        let numbers = (0..).zip(&self.catalogue);
        let mut unused =
            numbers.filter(|(_, k)| **k == ExtentType::Unused).map(|(number, _)| number);
        unused
            .find(|number| !self.bad.is_avoided((*number, 0)))
            .filter(|_| self.unused_for(kind) > 0)
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
