//! Applying what a cycle of collection found: the extents' owner clears the bits of its own BMap.
//!
//! Some extents at a time: what is to be freed is looked up; their records get the epoch, with one flush for all; then the
//! BMaps are written. Cut off after the records, the blocks leak until the next cycle. An extent in which nothing is to be freed
//! is not written at all.

use super::{Pages, page_base};
use crate::alloc::Territory;
use crate::error::{Result, StoreError};
use crate::format::bitmap::{BitmapKind, BitmapPage, WORD_BITS};
use crate::format::extent::{ExtentRecord, ExtentType};
use crate::io::Io;
use crate::slot::{Swap, View};
use crate::types::BLOCK_SIZE;
use roaring::RoaringTreemap;

/// What is to be freed in an extent.
struct Found {
    number: u32,
    kind: ExtentType,
    view: View<ExtentRecord>,
    /// The record from now on.
    record: ExtentRecord,
    /// Blocks, by page.
    pages: Vec<(u32, RoaringTreemap)>,
}

impl Found {
    fn blocks(&self) -> u64 {
        self.pages.iter().map(|(_, free)| free.len()).sum()
    }
}

impl Pages {
    /// Frees what the reclaim bitmaps of own extents name, if they were made by cycle `epoch` for the extents as they are now and
    /// were not applied before (rule G2), and `untouched` lets it pass. How many blocks that were, for each.
    ///
    /// The BMaps are not flushed, since a loss only leaks: what is freed here no root reaches.
    pub(in crate::alloc) async fn apply(
        &mut self,
        io: &Io,
        territory: &Territory,
        numbers: &[u32],
        epoch: u64,
        untouched: &(dyn Fn(RoaringTreemap) -> RoaringTreemap + Sync),
    ) -> Vec<Result<u64>> {
        // Allocations wait for this: it does not insist on what the device refuses.
        let io = &io.giving_up();
        let mut outcomes = Vec::with_capacity(numbers.len());
        // What is freed where, with its place among the outcomes.
        let mut found = Vec::new();
        for (place, &number) in numbers.iter().enumerate() {
            outcomes.push(match self.find(io, territory, number, epoch, untouched).await {
                Ok(Some(extent)) => {
                    let blocks = extent.blocks();
                    found.push((place, extent));
                    Ok(blocks)
                }
                Ok(None) => Ok(0),
                Err(error) => Err(error),
            });
        }
        self.note_swept(io, territory, &mut found, &mut outcomes).await;
        let freed = self.clear(io, territory, &found).await;
        for (place, extent) in found {
            let given_up = match &freed {
                Ok(()) => self.give_up_if_empty(io, territory, extent.kind, extent.number).await,
                Err(error) => {
                    let context = format!("{}, bitmap of extent {}", io.url(), extent.number);
                    Err(StoreError::new(error.kind, context, error.to_string()))
                }
            };
            if let Err(error) = given_up {
                outcomes[place] = Err(error);
            }
        }
        if freed.is_ok() {
            self.trim();
        }
        outcomes
    }

    /// What is to be freed in an extent; none if that is nothing. The pages of its BMap are in memory then.
    async fn find(
        &mut self,
        io: &Io,
        territory: &Territory,
        number: u32,
        epoch: u64,
        untouched: &(dyn Fn(RoaringTreemap) -> RoaringTreemap + Sync),
    ) -> Result<Option<Found>> {
        let g = &territory.geometry;
        let Some(extent) = self.extents.get(&number) else { return Ok(None) };
        let (kind, view) = (extent.kind, extent.view.clone());
        let record = view.record().filter(|record| record.sweep_epoch < epoch).cloned();
        let Some(record) = record else { return Ok(None) };
        let made_for = (epoch, view.sequence(), record.owner_generation.0);
        let reclaim = io.read(g.reclaim_page(number, 0), u64::from(g.bmap_pages())).await?;
        let mut pages = Vec::new();
        let mut is_behind = false;
        for (page, block) in (0..).zip(reclaim.chunks_exact(BLOCK_SIZE)) {
            let (address, store) = (g.reclaim_page(number, page), territory.records.store);
            let reclaim = match BitmapPage::decode(block, BitmapKind::Reclaim, store, address) {
                Ok(reclaim) => reclaim,
                Err(damage) => {
                    tracing::warn!(extent = number, page, %damage, "damaged reclaim page: left to the next cycle");
                    continue;
                }
            };
            if (reclaim.gc_epoch, reclaim.extent_sequence, reclaim.owner_generation) != made_for {
                is_behind |= reclaim.gc_epoch == epoch && reclaim.extent_sequence > view.sequence();
                continue;
            }
            let words = || (0..g.page_bits(page)).step_by(WORD_BITS as usize);
            if words().all(|first| reclaim.word(first) == 0) {
                continue;
            }
            self.load_to_look(io, territory, (number, page)).await?;
            let Some(content) = self.loaded.get(&(number, page)) else { continue };
            let base = page_base(territory, number, page);
            let mut candidates = RoaringTreemap::new();
            for first in words() {
                let mut word = reclaim.word(first) & content.word(first);
                word &= g.allocatable_word(base.plus(first));
                while word != 0 {
                    candidates.insert(base.0 + first + u64::from(word.trailing_zeros()));
                    word &= word - 1;
                }
            }
            let free = untouched(candidates);
            if !free.is_empty() {
                pages.push((page, free));
            }
        }
        if is_behind {
            self.look_anew(io, territory, number, &view).await?;
            return Ok(None);
        }
        if pages.is_empty() {
            return Ok(None);
        }
        // This incarnation's generation is on the record before the first change of the BMap.
        let owner_generation = territory.generation;
        let record = ExtentRecord { sweep_epoch: epoch, owner_generation, ready: true, ..record };
        Ok(Some(Found { number, kind, view, record, pages }))
    }

    /// The leader saw a later record of an own extent than is known here: a change that was reported as failed had landed. The
    /// next cycle finds what is known from now on.
    async fn look_anew(
        &mut self,
        io: &Io,
        territory: &Territory,
        number: u32,
        known: &View<ExtentRecord>,
    ) -> Result<()> {
        let found: View<ExtentRecord> = territory.records.read(io, known.slot).await?;
        let (known, found_sequence) = (known.sequence(), found.sequence());
        let Some(extent) = self.extents.get_mut(&number) else { return Ok(()) };
        let is_own = extent.keep_up(territory, &Swap::Lost(found));
        tracing::warn!(
            extent = number,
            known,
            found = found_sequence,
            is_own,
            "the record of an extent changed unseen: what this cycle found there is left to the next one"
        );
        Ok(())
    }

    /// Puts the epoch on the records of extents in which something is to be freed: nothing of this cycle is applied to them a
    /// second time. Those for which that fails are left out.
    async fn note_swept(
        &mut self,
        io: &Io,
        territory: &Territory,
        found: &mut Vec<(usize, Found)>,
        outcomes: &mut [Result<u64>],
    ) {
        let changes = found.iter().map(|(_, extent)| (extent.view.clone(), extent.record.clone()));
        let swaps = territory.records.swap_all(io, &changes.collect::<Vec<_>>()).await;
        let mut swaps = swaps.into_iter();
        found.retain(|(place, found)| {
            let swap = swaps.next().unwrap_or_else(|| Err(io.closing_error()));
            let number = found.number;
            let noted = swap.and_then(|swap| {
                if let Some(extent) = self.extents.get_mut(&number) {
                    extent.keep_up(territory, &swap);
                }
                swap.done(|| format!("{}, extent {number}", io.url())).map(drop)
            });
            match noted {
                Ok(()) => {
                    if let Some(extent) = self.extents.get_mut(&number) {
                        extent.taken_up = true;
                    }
                    true
                }
                Err(error) => {
                    outcomes[*place] = Err(error);
                    false
                }
            }
        });
    }

    /// Clears the bits.
    async fn clear(
        &mut self,
        io: &Io,
        territory: &Territory,
        found: &[(usize, Found)],
    ) -> Result<()> {
        let mut changed = Vec::new();
        for (_, extent) in found {
            for (page, free) in &extent.pages {
                let place = (extent.number, *page);
                let base = page_base(territory, extent.number, *page);
                let Some(content) = self.loaded.get_mut(&place) else { continue };
                free.iter().for_each(|gba| content.set(gba - base.0, false));
                if let Some(owned) = self.extents.get_mut(&extent.number) {
                    if let Some(count) = owned.free[*page as usize].as_mut() {
                        *count += free.len();
                    }
                    if let (Some(first), Some(last)) = (free.min(), free.max()) {
                        owned.note_stale(*page, first - base.0, last - first + 1);
                    }
                }
                changed.push(place);
            }
        }
        // What the device does not take is noted; it is free all the same.
        self.write_pages(io, territory, &changed, false).await.map(drop)
    }
}
