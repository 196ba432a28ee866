//! Blocks that go back to the BMap, some pages at a time, and extents that are given up when all of theirs have.

use super::{Pages, by_page, place};
use crate::alloc::Territory;
use crate::alloc::runs::Run;
use crate::error::{Result, StoreErrorKind};
use crate::format::extent::{ExtentRecord, ExtentType};
use crate::io::Io;
use crate::slot::Swap;
use std::collections::BTreeMap;
use std::ops::Range;

impl Pages {
    /// Clears the bits of blocks of a few pages; not flushed, since a loss only leaks. Extents that are all free then are given up.
    /// What lies in pages that the device does not read leaks; in those that it does not write, too, if it stays so.
    ///
    /// # Errors
    /// `Closing`, and what concerns the store as a whole: the blocks leak until they are collected.
    pub(in crate::alloc) async fn release(
        &mut self,
        io: &Io,
        territory: &Territory,
        kind: ExtentType,
        runs: Vec<Run>,
    ) -> Result<()> {
        let io = &io.giving_up();
        let mut pages: BTreeMap<(u32, u32), Vec<Range<u64>>> = BTreeMap::new();
        for (place, bits) in runs.iter().flat_map(|run| by_page(territory, *run)) {
            pages.entry(place).or_default().push(bits);
        }
        let mut changed: Vec<(u32, u32)> = Vec::new();
        for (place, all) in pages {
            if let Err(error) = self.load_to_change(io, territory, place).await {
                if error.kind == StoreErrorKind::Closing {
                    return Err(error);
                }
                tracing::warn!(extent = place.0, page = place.1, %error, "blocks leak until they are collected");
                continue;
            }
            all.into_iter().for_each(|bits| self.unmark_bits(place, bits));
            changed.push(place);
        }
        self.write_pages(io, territory, &changed, false).await?;
        let mut touched: Vec<u32> = runs.iter().map(|run| place(territory, run.start).0).collect();
        touched.dedup();
        for extent in touched {
            match self.give_up_if_empty(io, territory, kind, extent).await {
                Err(error) if error.is_of_blocks() => {
                    tracing::warn!(extent, %error, "this extent is free, and of no use until the next start");
                }
                outcome => outcome?,
            }
        }
        self.trim();
        Ok(())
    }

    /// Clears the bits of runs whose pages are loaded.
    pub(super) fn unmark(&mut self, territory: &Territory, runs: &[Run]) {
        for (place, bits) in runs.iter().flat_map(|run| by_page(territory, *run)) {
            self.unmark_bits(place, bits);
        }
    }

    fn unmark_bits(&mut self, place: (u32, u32), bits: Range<u64>) {
        let Some(content) = self.loaded.get_mut(&place) else { return };
        let (first, count) = (bits.start, bits.end - bits.start);
        bits.for_each(|bit| content.set(bit, false));
        if let Some(owned) = self.extents.get_mut(&place.0) {
            owned.note_freed(place.1, first, count);
        }
    }

    /// There is one extent of a kind, or none: it is kept.
    pub(super) fn is_last(&self, kind: ExtentType) -> bool {
        self.extents.values().filter(|e| e.kind == kind).count() < 2
    }

    /// Returns an extent to the unused ones when all its blocks are free; one of each type is kept.
    pub(super) async fn give_up_if_empty(
        &mut self,
        io: &Io,
        territory: &Territory,
        kind: ExtentType,
        number: u32,
    ) -> Result<()> {
        let is_last = self.is_last(kind);
        let Some(extent) = self.extents.get(&number) else { return Ok(()) };
        let known: Option<u64> = extent.free.iter().copied().sum();
        let all = territory.geometry.extent_blocks - territory.geometry.extent_overhead();
        if is_last
            || known != Some(all)
            || (self.unmaps && extent.is_stale())
            || self.bad.has_any_of(number)
        {
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
}
