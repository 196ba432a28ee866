//! Claims: free blocks are marked as allocated, page by page, before any of them is given out (INV-ALLOC-1).

use super::bad::Search;
use super::{LOADED_MAX, Pages, page_base, place};
use crate::alloc::runs::Run;
use crate::alloc::{SPACE_POLL, Territory};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::bitmap::PAGE_BITS;
use crate::format::extent::ExtentType;
use crate::io::Io;
use crate::sabotage::{self, Bug};

/// Pages of unknown content that one search for room reads.
const LOOKED_AT_MAX: usize = 48;

/// What a claim found.
#[derive(Debug)]
pub(in crate::alloc) struct Claimed {
    pub runs: Vec<Run>,
    /// What the device said of what it refused: that it has no space, if so, or what it said last.
    pub refusal: Option<StoreError>,
    /// It takes nothing at the moment.
    pub is_refused: bool,
}

impl Pages {
    /// Marks about `wanted` free blocks of `kind` as allocated, durably; fewer if there are no more. Pages that the device does
    /// not read or write are avoided, unless there are fewer than `least` blocks elsewhere.
    pub(in crate::alloc) async fn claim(
        &mut self,
        io: &Io,
        territory: &Territory,
        kind: ExtentType,
        least: u64,
        wanted: u64,
    ) -> Result<Claimed> {
        let mut bad = Search::new(io);
        // Only who needs a block asks a thin device that is full for more, and not over and over: each block that is freed wakes all who
        // wait, and to ask takes several writes.
        let asked = self.thin_asked.as_ref().filter(|_| self.is_thin_full);
        let said = asked.filter(|(at, _)| at.elapsed() < SPACE_POLL).map(|(_, said)| said.clone());
        if self.is_thin_full && (least == 0 || said.is_some()) {
            bad.note_lack_of_space();
        }
        let mut runs: Vec<Run> = Vec::new();
        let outcome = self.claim_all(&mut bad, territory, kind, least, wanted, &mut runs).await;
        if let Err(error) = outcome {
            // Not given out: memory says free again, and the next write of the page says so too.
            self.unmark(territory, &runs);
            return Err(error);
        }
        self.trim();
        let is_refused = bad.has_refusals() && self.bad.are_all();
        // What was not asked anew would be said again, and says more than a bad page.
        let full = said.filter(|_| self.is_thin_full);
        let full = full.map(|said| StoreError::new(StoreErrorKind::NoSpace, io.url(), said));
        Ok(Claimed { runs, is_refused, refusal: full.or(bad.into_refusal()) })
    }

    async fn claim_all(
        &mut self,
        bad: &mut Search,
        territory: &Territory,
        kind: ExtentType,
        least: u64,
        wanted: u64,
        claimed: &mut Vec<Run>,
    ) -> Result<()> {
        if self.bad.are_all()
            && self.are_all_refused(bad, territory).await?
            && !self.claim_extent(bad, territory, kind).await?
            // If nothing could be tried, it is to be searched for.
            && bad.has_refusals()
        {
            return Ok(());
        }
        if kind == ExtentType::Data && self.extents.values().all(|e| e.kind == ExtentType::Data) {
            // A start on a full thin device found no room for one: metadata comes first.
            self.claim_extent(bad, territory, ExtentType::Metadata).await?;
        }
        let mut changed: Vec<(u32, u32)> = Vec::new();
        let mut total = 0;
        loop {
            let is_enough = total >= wanted;
            if is_enough || changed.len() >= LOADED_MAX {
                total -= self.write_claims(bad, territory, &changed, claimed).await?;
                changed.clear();
                self.trim();
                if is_enough && total >= wanted {
                    return Ok(());
                }
                continue;
            }
            if let Some(place) = self.next_page(bad, territory, kind).await? {
                let runs = self.mark(territory, place.0, place.1, wanted - total, 1);
                total += runs.iter().map(|run| run.blocks).sum::<u64>();
                claimed.extend(runs);
                changed.push(place);
                continue;
            }
            // No unused extent is taken for what is no more than a device that refuses everything for a while.
            if !bad.has_refusals() && self.claim_extent(bad, territory, kind).await? {
                continue;
            }
            let mut is_doubtful = bad.has_refusals();
            total -= self.write_claims(bad, territory, &changed, claimed).await?;
            changed.clear();
            is_doubtful |= bad.has_refusals();
            if total >= wanted {
                return Ok(());
            }
            // It may be that all own extents have bad sectors: an unused one is tried then.
            if bad.has_refusals()
                && self.are_all_refused(bad, territory).await?
                && !self.claim_extent(bad, territory, kind).await?
            {
                return Ok(());
            }
            // After refusals there may be pages that were not looked at.
            if !is_doubtful && (total >= least || !bad.begins_again(&mut self.bad)) {
                return Ok(());
            }
        }
    }

    /// Makes claims in some pages durable. What lies in pages that the device does not take is given up; so many blocks.
    async fn write_claims(
        &mut self,
        bad: &mut Search,
        territory: &Territory,
        changed: &[(u32, u32)],
        claimed: &mut Vec<Run>,
    ) -> Result<u64> {
        if sabotage::on(Bug::ClaimUnwritten) {
            return Ok(0);
        }
        let was_bad = self.was_any_bad(changed);
        let refused = self.write_pages(&bad.io().clone(), territory, changed, true).await?;
        if was_bad && refused.is_empty() {
            bad.note_mended();
        }
        let is_answered = refused.len() < changed.len();
        let mut places = Vec::with_capacity(refused.len());
        for (place, error) in refused {
            places.push(place);
            bad.note_refusal(error);
        }
        // In this order: what was refused beside what was written are bad sectors.
        if is_answered {
            bad.note_answer();
        }
        // A claim's run lies in one page.
        let is_refused = |run: &Run| {
            let (extent, page, _) = place(territory, run.start);
            places.contains(&(extent, page))
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
    pub(in crate::alloc) async fn claim_roomy(
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
        let mut bad = Search::new(io);
        if self.bad.are_all() {
            return Ok(claimed);
        }
        let outcome = async {
            if !self.is_thin_full
                && self.unused_are_plenty()
                && !self.has_room_for(territory, kind, wanted)
            {
                self.claim_extent(&mut bad, territory, kind).await?;
            }
            for (extent, page) in self.pages_by_room(kind) {
                if total >= wanted || changed.len() >= LOADED_MAX / 2 || bad.has_many_refusals() {
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
        bad: &mut Search,
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
            if bad.has_many_refusals() {
                return Ok(None);
            }
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
}
