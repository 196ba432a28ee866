//! Bitmap pages, and extents' records, that the device lastingly does not read or write: bad sectors.
//!
//! Whoever meets one holds the lock of all pages, and commits that need blocks wait for that. So nobody waits for one: what can
//! be left undone there (unmapping, releasing, applying what a cycle found) is left undone, and claims look elsewhere. Nothing
//! depends on the page: memory is the truth, and what the device has of it instead, the former content or a torn one that reads as
//! all allocated, shows no block as free that is in use. What is free there is of no use until the device takes the page again.

use super::Pages;
use crate::alloc::Territory;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::io::{Io, Write};
use std::collections::BTreeMap;

/// A claim that was refused so often in a row meets a device that refuses everything, not bad sectors: it waits for that to end.
const REFUSALS_MAX: u32 = 8;

/// True if an error says something of the blocks in question, not of the device or the store as a whole.
pub(in crate::alloc) fn is_of_blocks(error: &StoreError) -> bool {
    matches!(error.kind, StoreErrorKind::Device | StoreErrorKind::NoSpace)
}

/// Pages that were not read or written. True for those that claims avoid; the others are tried once more.
#[derive(Debug, Default)]
pub(super) struct BadPages(BTreeMap<(u32, u32), bool>);

impl BadPages {
    /// Claims avoid a page from now on. Said once.
    pub(super) fn note(&mut self, (extent, page): (u32, u32), error: &StoreError) {
        if self.0.insert((extent, page), true).is_none() {
            tracing::warn!(
                extent, page, %error,
                "the device does not read or write a page of a bitmap, or its extent's record: what is free there is not used and \
                 not unmapped; see to the device"
            );
        }
    }

    /// The device has taken it.
    fn is_whole(&mut self, place: (u32, u32)) {
        if self.0.remove(&place).is_some() {
            tracing::info!(
                extent = place.0,
                page = place.1,
                "the device takes this page of a bitmap again"
            );
        }
    }

    pub(super) fn is_avoided(&self, place: (u32, u32)) -> bool {
        self.0.get(&place).is_some_and(|avoided| *avoided)
    }

    /// An extent with such a page is kept: who claims it next could not set it up.
    pub(super) fn has_any_of(&self, extent: u32) -> bool {
        self.0.range((extent, 0)..=(extent, u32::MAX)).next().is_some()
    }
}

/// A search for room that passes over bad pages.
#[derive(Debug)]
pub(super) struct Search {
    io: Io,
    refusals: u32,
    again: bool,
}

impl Search {
    /// `io` is what to go on with if the device refuses everything.
    pub(super) fn new(io: &Io) -> Self {
        Self { io: io.giving_up(), refusals: 0, again: false }
    }

    pub(super) fn io(&self) -> &Io {
        &self.io
    }

    /// True, once, if bad pages are all that is left: the device may take them by now.
    pub(super) fn begins_again(&mut self, bad: &mut BadPages) -> bool {
        let begins = !self.again && bad.0.values().any(|avoided| *avoided);
        self.again = true;
        bad.0.values_mut().for_each(|avoided| *avoided &= !begins);
        begins
    }

    /// True if something else is to be looked for instead.
    pub(super) fn is_refusal(&self, error: &StoreError) -> bool {
        is_of_blocks(error) && self.io.gives_up()
    }

    /// The device reads and writes elsewhere: what it refused are bad sectors, however many.
    pub(super) fn note_answer(&mut self) {
        self.refusals = 0;
    }

    pub(super) fn note_refusal(&mut self) {
        self.refusals += 1;
        if self.refusals > REFUSALS_MAX {
            self.io = self.io.insisting();
        }
    }
}

impl Pages {
    /// Reads a page, or notes that it is bad: false.
    pub(super) async fn load_or_avoid(
        &mut self,
        search: &mut Search,
        territory: &Territory,
        place: (u32, u32),
    ) -> Result<bool> {
        let was_loaded = self.loaded.contains_key(&place);
        match self.load(&search.io, territory, place.0, place.1).await {
            // A read that is insisted on is no less of a refusal.
            Err(error) if is_of_blocks(&error) => {
                search.note_refusal();
                self.bad.note(place, &error);
                Ok(false)
            }
            outcome => {
                outcome?;
                if !was_loaded {
                    search.note_answer();
                }
                Ok(true)
            }
        }
    }

    /// Takes an extent up, or notes that all of it is bad: false.
    pub(super) async fn take_up_or_avoid(
        &mut self,
        search: &mut Search,
        territory: &Territory,
        number: u32,
    ) -> Result<bool> {
        match self.take_up(&search.io, territory, number).await {
            Err(error) if search.is_refusal(&error) => {
                search.note_refusal();
                self.note_bad_extent(number, &error);
                Ok(false)
            }
            outcome => outcome.map(|()| true),
        }
    }

    /// Reads a page.
    ///
    /// # Errors
    /// As [`Io::read`]; that the page is bad is noted.
    pub(super) async fn load_to_look(
        &mut self,
        io: &Io,
        territory: &Territory,
        place: (u32, u32),
    ) -> Result<()> {
        let loaded = self.load(io, territory, place.0, place.1).await;
        if let Err(error) = &loaded
            && is_of_blocks(error)
        {
            self.bad.note(place, error);
        }
        loaded
    }

    /// Reads a page that is to be changed, and takes its extent up.
    ///
    /// # Errors
    /// As [`Io::read`] and [`Io::write`]; that the page, or the extent's record, is bad is noted.
    pub(super) async fn load_to_change(
        &mut self,
        io: &Io,
        territory: &Territory,
        place: (u32, u32),
    ) -> Result<()> {
        self.load_to_look(io, territory, place).await?;
        let taken_up = self.take_up(io, territory, place.0).await;
        if let Err(error) = &taken_up
            && is_of_blocks(error)
        {
            self.note_bad_extent(place.0, error);
        }
        taken_up
    }

    fn note_bad_extent(&mut self, number: u32, error: &StoreError) {
        let pages = self.extents.get(&number).map_or(0, |extent| extent.free.len() as u32);
        (0..pages).for_each(|page| self.bad.note((number, page), error));
    }

    /// Writes changed pages, durably if asked to. Those that the device does not take are noted and returned; all others are
    /// written. With an `io` that does not give up there are none.
    ///
    /// # Errors
    /// `Closing`, and what else does not concern single pages.
    pub(super) async fn write_pages(
        &mut self,
        io: &Io,
        territory: &Territory,
        changed: &[(u32, u32)],
        durably: bool,
    ) -> Result<Vec<((u32, u32), StoreError)>> {
        let loaded = changed.iter().filter(|place| self.loaded.contains_key(place));
        let mut places: Vec<(u32, u32)> = loaded.copied().collect();
        let mut writes = self.encode(territory, &places);
        let mut refused = Vec::new();
        let mut attempts = io.attempts();
        loop {
            let epoch = io.device().epoch();
            if let Err(error) = io.write_all(&writes).await {
                if !is_of_blocks(&error) {
                    return Err(error);
                }
                // Which of them it was is found out one by one.
                let mut taken: (Vec<(u32, u32)>, Vec<Write>) = Default::default();
                for (place, write) in places.into_iter().zip(writes) {
                    match io.write_all(std::slice::from_ref(&write)).await {
                        Ok(()) => taken.extend([(place, write)]),
                        Err(error) if is_of_blocks(&error) => {
                            self.bad.note(place, &error);
                            refused.push((place, error));
                        }
                        Err(error) => return Err(error),
                    }
                }
                (places, writes) = taken;
            }
            if !durably || writes.is_empty() || io.flush_since(epoch, &mut attempts).await? {
                places.into_iter().for_each(|place| self.bad.is_whole(place));
                return Ok(refused);
            }
        }
    }
}
