//! Unused extents: which of them may be taken, and how one becomes this host's.
//!
//! Order of writes: record (owner, not ready), flush; header and empty bitmaps, flush; record (ready), flush. A crash in between
//! leaves an unready extent, whose owner starts again.

use super::bad::{Search, is_of_place};
use super::{Pages, page_write};
use crate::alloc::Territory;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::bitmap::{BitmapKind, BitmapPage};
use crate::format::extent::{ExtentHeader, ExtentRecord, ExtentType};
use crate::format::head::Head;
use crate::io::{Io, Write};
use crate::slot::{Content, Slot, Swap, View};
use crate::types::BLOCK_SIZE;
use bytes::Bytes;
use tokio::time::Instant;

/// Unused extents are plentiful if they are at least one in so many.
const UNUSED_PLENTY: usize = 4;

impl Pages {
    /// Sets up extents whose claim a crash cut off. Those that the device does not take are given back: a start waits for none.
    ///
    /// # Errors
    /// `Closing`, and what concerns the store as a whole.
    pub(in crate::alloc) async fn finish_claims(
        &mut self,
        io: &Io,
        territory: &Territory,
    ) -> Result<()> {
        let unready: Vec<u32> = self
            .extents
            .iter()
            .filter(|(_, e)| e.view.record().is_some_and(|r| !r.ready))
            .map(|(&number, _)| number)
            .collect();
        let io = &io.giving_up();
        for number in unready {
            match self.set_up(io, territory, number).await {
                Err(error) if error.is_of_blocks() => {
                    tracing::warn!(
                        extent = number, %error,
                        "an extent that was being claimed cannot be set up: it is given back"
                    );
                    self.give_back_unready(io, territory, number).await?;
                    if error.kind != StoreErrorKind::NoSpace {
                        self.bad.note((number, 0), &error);
                    }
                }
                outcome => outcome?,
            }
        }
        Ok(())
    }

    /// Takes an unused extent; false if there is none to be had for this type, or too much was refused. One that cannot be set up is
    /// given back. If a thin device has no space for one, it has none for the others: after that only one is tried that was in use.
    pub(super) async fn claim_extent(
        &mut self,
        bad: &mut Search,
        territory: &Territory,
        kind: ExtentType,
    ) -> Result<bool> {
        loop {
            let number = match bad.lacks_space() {
                0 => self.next_unused(kind),
                1 => None,
                _ => return Ok(false),
            };
            let number = match number {
                Some(number) => number,
                // One that only waits for the device to be told is needed now.
                None => match self.give_up_unmapped(bad.io(), territory, kind).await? {
                    None => return Ok(false),
                    Some(number) if bad.lacks_space() > 0 && self.unused_for(kind) > 0 => number,
                    Some(_) if bad.lacks_space() > 0 => return Ok(false),
                    Some(_) => continue,
                },
            };
            let slot = Slot { first: territory.geometry.extent_slot(number), paired: false };
            let view: View<ExtentRecord> = match territory.records.read(bad.io(), slot).await {
                Err(error) if error.is_of_blocks() => {
                    if self.avoid(bad, number, error) {
                        return Ok(false);
                    }
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
                Err(error) if is_of_place(&error) => {
                    if self.avoid(bad, number, error) {
                        return Ok(false);
                    }
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
                match self.set_up(bad.io(), territory, number).await {
                    Err(error) if is_of_place(&error) => {
                        self.give_back_unready(bad.io(), territory, number).await?;
                        if self.avoid(bad, number, error) {
                            return Ok(false);
                        }
                    }
                    Err(error) => {
                        // It is not ready: the next start sees to it.
                        self.extents.remove(&number);
                        return Err(error);
                    }
                    Ok(()) => {
                        bad.note_answer();
                        self.is_thin_full = false;
                        self.bad.is_whole((number, 0));
                        return Ok(true);
                    }
                }
            }
        }
    }

    /// An extent that was not set up is unused again. If that is refused, too, the next start finds it.
    async fn give_back_unready(
        &mut self,
        io: &Io,
        territory: &Territory,
        number: u32,
    ) -> Result<()> {
        let Some(extent) = self.extents.remove(&number) else { return Ok(()) };
        let sweep_epoch = extent.view.record().map_or(0, |record| record.sweep_epoch);
        let unused = ExtentRecord { sweep_epoch, ..ExtentRecord::unused() };
        match territory.records.swap(io, &extent.view, unused).await {
            Ok(Swap::Done(_)) => self.catalogue[number as usize] = ExtentType::Unused,
            Ok(Swap::Lost(_)) => {}
            Err(error) if is_of_place(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// An unused extent that cannot be taken is passed over. True if that is enough for now.
    fn avoid(&mut self, bad: &mut Search, number: u32, error: StoreError) -> bool {
        if error.kind == StoreErrorKind::NoSpace {
            // Nothing is wrong with it. The next claim tries another one, for which there may be space already.
            self.unused_cursor = number + 1;
            self.is_thin_full = true;
            self.thin_asked = Some((Instant::now(), error.message.clone()));
            bad.note_lack_of_space();
        } else {
            self.bad.note((number, 0), &error);
        }
        bad.note_refusal(error);
        bad.has_many_refusals()
    }

    /// Enough extents are unused to take one more only to keep blocks together.
    pub(super) fn unused_are_plenty(&self) -> bool {
        self.unused_for(ExtentType::Metadata) as usize * UNUSED_PLENTY >= self.catalogue.len()
    }

    /// Unused extents that a kind may take, but for bad ones.
    pub(super) fn unused_for(&self, kind: ExtentType) -> u64 {
        let unused = self.unused().filter(|number| !self.bad.has_any_of(*number)).count() as u64;
        let kept = if kind == ExtentType::Data { self.kept_for_metadata() } else { 0 };
        unused.saturating_sub(kept)
    }

    /// The first of them; if there is none, one that was bad and is to be tried once more, unless that might be what data must leave.
    fn next_unused(&self, kind: ExtentType) -> Option<u32> {
        if self.unused_for(kind) > 0 {
            return self.first(self.unused().filter(|number| !self.bad.has_any_of(*number)));
        }
        let usable = || self.unused().filter(|number| !self.bad.is_avoided((*number, 0)));
        let kept = if kind == ExtentType::Data { self.kept_for_metadata() } else { 0 };
        let doubtful = usable().filter(|number| self.bad.has_any_of(*number));
        self.first(doubtful).filter(|_| usable().count() as u64 > kept)
    }

    /// From the cursor on, around.
    fn first(&self, mut numbers: impl Iterator<Item = u32>) -> Option<u32> {
        let first = numbers.next()?;
        if first >= self.unused_cursor {
            return Some(first);
        }
        numbers.find(|number| *number >= self.unused_cursor).or(Some(first))
    }

    fn unused(&self) -> impl Iterator<Item = u32> + '_ {
        let numbers = (0..).zip(&self.catalogue);
        numbers.filter(|(_, kind)| **kind == ExtentType::Unused).map(|(number, _)| number)
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
