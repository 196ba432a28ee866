//! Free blocks of own extents that the device is to be told of: found, claimed while that is under way, and given back.
//!
//! For each page it is known between which bits some were cleared since; at the start that is the whole page, as what an earlier
//! incarnation told is not known. Blocks are claimed as for an allocation: their bits are set, durably, before anything is
//! said to the device, so whatever holds for blocks that were given out holds for them (INV-ALLOC-1 and 2).

use super::{Extent, Pages, page_base};
use crate::alloc::Territory;
use crate::alloc::runs::Run;
use crate::error::{Result, StoreError};
use crate::format::bitmap::BitmapPage;
use crate::format::extent::ExtentType;
use crate::io::Io;
use crate::types::Gba;
use std::ops::Range;

/// What is worth a command.
#[derive(Clone, Copy, Debug)]
pub(in crate::alloc) struct Pieces {
    /// Blocks that the device gives back together.
    pub unit: u64,
    /// Where the first such piece begins, in blocks from the device's start.
    pub offset: u64,
    /// Least blocks of a run.
    pub run_min: u64,
    /// Most blocks of all runs of one claim.
    pub most: u64,
}

/// What a claim leaves to others.
#[derive(Clone, Copy, Debug)]
pub(in crate::alloc) struct Room {
    /// Free blocks in memory.
    pub pooled: u64,
    /// Free blocks, those included, that a commit may need at once.
    pub keep: u64,
}

/// What a claim found in a page.
#[derive(Debug, Default)]
pub(in crate::alloc) struct StaleFree {
    pub runs: Vec<Run>,
    /// The bit at which to go on; none: nothing is left in the page.
    pub next: Option<u64>,
}

impl Pieces {
    /// The part of a run that consists of whole pieces, if that is worth a command.
    fn whole(&self, run: Run) -> Option<Run> {
        let up =
            |gba: u64| gba + (self.unit - (gba + self.unit - self.offset) % self.unit) % self.unit;
        let down = |gba: u64| gba - (gba + self.unit - self.offset) % self.unit;
        let (start, end) = (up(run.start.0), run.start.0 + run.blocks);
        if start >= end {
            return None;
        }
        let blocks = down(end).checked_sub(start)?;
        (blocks > 0 && blocks >= self.run_min).then_some(Run { start: Gba(start), blocks })
    }

    /// A run of whole pieces, in steps of up to `most` blocks, or of one piece.
    pub(in crate::alloc) fn steps(self, run: Run, most: u64) -> impl Iterator<Item = Run> {
        let step = (most / self.unit).max(1) * self.unit;
        (0..run.blocks).step_by(step as usize).map(move |from| Run {
            start: run.start.plus(from),
            blocks: step.min(run.blocks - from),
        })
    }
}

impl Extent {
    /// Bits were cleared.
    pub(super) fn note_freed(&mut self, page: u32, first: u64, bits: u64) {
        if let Some(free) = self.free[page as usize].as_mut() {
            *free += bits;
        }
        self.note_stale(page, first, bits);
    }

    /// The device is to be told of bits.
    pub(super) fn note_stale(&mut self, page: u32, first: u64, bits: u64) {
        let stale = &mut self.stale[page as usize];
        *stale = match stale.is_empty() {
            true => first..first + bits,
            false => stale.start.min(first)..stale.end.max(first + bits),
        };
    }

    /// There may be free blocks that the device was not told of.
    pub(super) fn is_stale(&self) -> bool {
        self.stale.iter().any(|window| !window.is_empty())
    }
}

impl Pages {
    /// Whether extents are given up only after the device was told of them.
    pub(in crate::alloc) fn set_unmaps(&mut self, unmaps: bool) {
        self.unmaps = unmaps;
    }

    /// Extents with free blocks that the device was not told of: those that are all free, then by number.
    pub(in crate::alloc) fn stale_extents(&self, territory: &Territory) -> Vec<u32> {
        let stale = self.extents.iter().filter(|(_, extent)| extent.is_stale());
        let mut numbers: Vec<_> =
            stale.map(|(&number, e)| (!is_all_free(territory, e), number)).collect();
        numbers.sort_unstable();
        numbers.into_iter().map(|(_, number)| number).collect()
    }

    /// Pages of an extent that is still this host's; what it is for.
    pub(in crate::alloc) fn pages_of(&self, number: u32) -> Option<(u32, ExtentType)> {
        self.extents.get(&number).map(|extent| (extent.stale.len() as u32, extent.kind))
    }

    /// Free blocks of a kind, as far as is known.
    fn free_known(&self, kind: ExtentType) -> u64 {
        let of_kind = self.extents.iter().filter(|(_, extent)| extent.kind == kind);
        let pages = of_kind.flat_map(|(&number, extent)| {
            (0..).zip(&extent.free).map(move |(page, free)| ((number, page), *free))
        });
        let good = pages.filter(|(place, _)| !self.bad.is_avoided(*place));
        good.filter_map(|(_, free)| free).sum()
    }

    /// Marks free blocks of a page, from bit `from` on, that the device was not told of, durably. Leaves room for commits, `keep`
    /// blocks at least and as many as it takes where no extent is left, of which `pooled` are known to the caller: nobody is to wait
    /// for room because of this.
    ///
    /// # Errors
    /// The device's, also if it does not take this page or its extent's record: at once, since claims wait for this.
    pub(in crate::alloc) async fn claim_stale(
        &mut self,
        io: &Io,
        territory: &Territory,
        (number, page): (u32, u32),
        from: u64,
        mut pieces: Pieces,
        Room { pooled, keep }: Room,
    ) -> Result<StaleFree> {
        let (nothing, io) = (StaleFree::default(), &io.giving_up());
        let Some(extent) = self.extents.get_mut(&number) else { return Ok(nothing) };
        let (kind, window) = (extent.kind, extent.stale[page as usize].clone());
        if window.is_empty() {
            return Ok(nothing);
        }
        self.load_to_look(io, territory, (number, page)).await?;
        let in_extents = self.free_known(kind) + pooled;
        let g = &territory.geometry;
        // A thin device that is full has no space for any of them.
        let unused = if self.is_thin_full { 0 } else { self.unused_for(kind) };
        let unused = unused * (g.extent_blocks - g.extent_overhead());
        pieces.most = pieces.most.min((in_extents + unused).saturating_sub(keep));
        if unused == 0 {
            pieces.most = pieces.most.min(in_extents / 2);
        }
        if pieces.most < pieces.run_min.max(pieces.unit) {
            self.trim();
            return Ok(nothing);
        }
        let Some(content) = self.loaded.get(&(number, page)) else { return Ok(nothing) };
        let limit = territory.geometry.page_bits(page);
        let base = page_base(territory, number, page);
        let found = find(content, base, &window, from, limit, &pieces);
        if !found.runs.is_empty() {
            self.load_to_change(io, territory, (number, page)).await?;
        }
        let Some(extent) = self.extents.get_mut(&number) else { return Ok(nothing) };
        extent.stale[page as usize] = found.next.map_or(0..0, |next| next..window.end);
        if found.runs.is_empty() {
            self.trim();
            return Ok(found);
        }
        self.set_bits(territory, (number, page), &found.runs, true);
        let written = self.write_pages(io, territory, &[(number, page)], true).await;
        if let Err(error) = written.and_then(all_written) {
            self.unmark(territory, &found.runs);
            return Err(error);
        }
        self.trim();
        Ok(found)
    }

    /// Clears the bits of what was claimed in a page; not flushed, since a loss only leaks. Of `untold` the device is yet to be told.
    ///
    /// # Errors
    /// As [`claim_stale`](Self::claim_stale). If the page was read, its blocks are free all the same.
    pub(in crate::alloc) async fn give_back(
        &mut self,
        io: &Io,
        territory: &Territory,
        (number, page): (u32, u32),
        runs: &[Run],
        untold: &[Run],
    ) -> Result<()> {
        let io = &io.giving_up();
        self.load_to_look(io, territory, (number, page)).await?;
        self.set_bits(territory, (number, page), runs, false);
        if let Some(extent) = self.extents.get_mut(&number) {
            let base = page_base(territory, number, page);
            for run in untold {
                extent.note_stale(page, run.start.0 - base.0, run.blocks);
            }
        }
        all_written(self.write_pages(io, territory, &[(number, page)], false).await?)?;
        self.trim();
        Ok(())
    }

    fn set_bits(&mut self, territory: &Territory, place: (u32, u32), runs: &[Run], value: bool) {
        let Some(content) = self.loaded.get_mut(&place) else { return };
        let base = page_base(territory, place.0, place.1);
        for gba in runs.iter().flat_map(|run| run.iter()) {
            debug_assert_ne!(content.get(gba.0 - base.0), value);
            content.set(gba.0 - base.0, value);
        }
        let free = content.clear_bits(territory.geometry.page_bits(place.1));
        if let Some(extent) = self.extents.get_mut(&place.0) {
            extent.free[place.1 as usize] = Some(free);
        }
    }

    /// The device was told of all that is free in an extent, or nothing more will be said of it now (`all`): if it is all free, it is given
    /// up.
    pub(in crate::alloc) async fn end_unmapping(
        &mut self,
        io: &Io,
        territory: &Territory,
        number: u32,
        all: bool,
    ) -> Result<()> {
        let Some(kind) = self.extents.get(&number).map(|extent| extent.kind) else { return Ok(()) };
        // One that is kept all the same is the next pass's.
        let is_kept = self.is_last(kind) || self.bad.has_any_of(number);
        if let Some(extent) = self.extents.get_mut(&number)
            && all
            && !is_kept
            && is_all_free(territory, extent)
        {
            extent.stale.fill(0..0);
        }
        self.give_up_if_empty(&io.giving_up(), territory, kind, number).await
    }

    /// Gives up an extent of another kind that is all free, though the device was not told of it; none if there is none.
    pub(super) async fn give_up_unmapped(
        &mut self,
        io: &Io,
        territory: &Territory,
        wanted: ExtentType,
    ) -> Result<Option<u32>> {
        let is_idle = |e: &Extent| e.kind != wanted && e.is_stale() && is_all_free(territory, e);
        let idle = self.extents.iter().filter(|(_, extent)| is_idle(extent));
        let numbers: Vec<u32> = idle.map(|(&number, _)| number).collect();
        for number in numbers {
            match self.end_unmapping(io, territory, number, true).await {
                Err(error) if error.is_of_blocks() => {
                    tracing::warn!(extent = number, %error, "this extent is free, and of no use until the next start");
                    continue;
                }
                outcome => outcome?,
            }
            if !self.extents.contains_key(&number) {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }
}

fn all_written(mut refused: Vec<((u32, u32), StoreError)>) -> Result<()> {
    refused.pop().map_or(Ok(()), |(_, error)| Err(error))
}

fn is_all_free(territory: &Territory, extent: &Extent) -> bool {
    let known: Option<u64> = extent.free.iter().copied().sum();
    known == Some(territory.geometry.extent_blocks - territory.geometry.extent_overhead())
}

/// Runs of clear bits in and about a window, from bit `from` on, cut to whole pieces.
fn find(
    content: &BitmapPage,
    base: Gba,
    window: &Range<u64>,
    from: u64,
    limit: u64,
    pieces: &Pieces,
) -> StaleFree {
    // What was freed beside what was free already is worth a command together with some of that.
    let about = pieces.run_min.max(pieces.unit);
    let end = (window.end + about).min(limit);
    let mut at = window.start.saturating_sub(about).max(from);
    let mut found = StaleFree::default();
    let mut left = pieces.most;
    while let Some((first, len)) = content.next_clear_run(at, end) {
        let after = first + len;
        let Some(whole) = pieces.whole(Run { start: base.plus(first), blocks: len }) else {
            at = after;
            continue;
        };
        let cut = Run { start: whole.start, blocks: whole.blocks.min(left) };
        let Some(cut) = pieces.whole(cut) else {
            if found.runs.is_empty() {
                // More at once than may be claimed: never.
                at = after;
                continue;
            }
            found.next = Some(first);
            return found;
        };
        found.runs.push(cut);
        left -= cut.blocks;
        at = if cut == whole { after } else { cut.start.0 + cut.blocks - base.0 };
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECES: Pieces = Pieces { unit: 1, offset: 0, run_min: 8, most: 1000 };

    fn runs(found: &StaleFree) -> Vec<(u64, u64)> {
        found.runs.iter().map(|run| (run.start.0, run.blocks)).collect()
    }

    #[test]
    fn runs_are_cut_to_whole_pieces_of_the_device() {
        let pieces = Pieces { unit: 16, offset: 5, run_min: 1, ..PIECES };
        let whole = |start, blocks| {
            pieces.whole(Run { start: Gba(start), blocks }).map(|run| (run.start.0, run.blocks))
        };
        assert_eq!(whole(0, 100), Some((5, 80)));
        assert_eq!(whole(5, 16), Some((5, 16)));
        assert_eq!(whole(6, 30), None);
        assert_eq!(whole(21, 17), Some((21, 16)));
        assert_eq!(whole(0, 3), None);
        assert_eq!(Pieces { run_min: 32, ..pieces }.whole(Run { start: Gba(5), blocks: 31 }), None);
        let steps =
            |most| pieces.steps(Run { start: Gba(5), blocks: 80 }, most).collect::<Vec<_>>();
        let all = |steps: &[(u64, u64)]| -> Vec<Run> {
            steps.iter().map(|&(start, blocks)| Run { start: Gba(start), blocks }).collect()
        };
        assert_eq!(steps(40), all(&[(5, 32), (37, 32), (69, 16)]));
        assert_eq!(steps(3), all(&[(5, 16), (21, 16), (37, 16), (53, 16), (69, 16)]));
    }

    #[test]
    fn only_what_lies_about_the_window_is_found_and_nothing_twice() {
        let mut page = BitmapPage::clear();
        (0..100).for_each(|bit| page.set(bit, true));
        (300..310).for_each(|bit| page.set(bit, true));
        let base = Gba(1 << 20);
        let find = |window, from, pieces| find(&page, base, &window, from, 2000, &pieces);
        let found = find(0..2000, 0, PIECES);
        assert_eq!(runs(&found), [((1 << 20) + 100, 200), ((1 << 20) + 310, 800)]);
        assert_eq!(found.next, Some(1110), "no more at once");
        let rest = find(1110..2000, 1110, PIECES);
        assert_eq!(runs(&rest), [((1 << 20) + 1110, 890)]);
        assert_eq!(rest.next, None);
        // One block that was freed amid free ones, and one by itself.
        assert_eq!(runs(&find(500..501, 0, PIECES)), [((1 << 20) + 492, 17)]);
        assert!(find(50..51, 0, PIECES).runs.is_empty());
    }
}
