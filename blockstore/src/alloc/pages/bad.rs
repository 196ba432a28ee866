//! Bitmap pages, and extents' records, that the device lastingly does not read or write: bad sectors.
//!
//! Whoever meets one holds the lock of all pages, and commits that need blocks wait for that. So nobody waits for one: what can
//! be left undone there (unmapping, releasing, applying what a cycle found) is left undone, and claims look elsewhere. Nothing
//! depends on the page: memory is the truth, and what the device has of it instead, the former content or a torn one that reads as
//! all allocated, shows no block as free that is in use. What is free there is of no use until the device takes the page again.
//!
//! A device that refuses everything is told from bad sectors by a page that it was not asked for: if it does not take that either, the
//! claim ends, and whoever needs it waits without the lock.

use super::Pages;
use crate::alloc::Territory;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::io::Io;
use std::collections::BTreeMap;

/// After so many refusals without a page that was written a claim looks whether the device takes anything.
const REFUSALS_MAX: u32 = 8;

/// Pages that were not read or written. True for those that claims avoid; the others are tried once more.
#[derive(Debug, Default)]
pub(super) struct BadPages {
    pages: BTreeMap<(u32, u32), bool>,
    /// The device took nothing at all when that was last looked at.
    all_refused: bool,
    /// How often that was looked at.
    probes: usize,
    /// Where claims go on with what they come back to.
    cursor: (u32, u32),
}

/// True if an error says something of the bitmap page or record in question, not of the device or the store as a whole.
pub(super) fn is_of_place(error: &StoreError) -> bool {
    error.is_of_blocks() || error.kind == StoreErrorKind::Damaged
}

impl BadPages {
    /// Claims avoid a page from now on. Said once.
    pub(super) fn note(&mut self, (extent, page): (u32, u32), error: &StoreError) {
        if self.pages.insert((extent, page), true).is_none() {
            tracing::warn!(
                extent, page, %error,
                "the device does not read or write a page of a bitmap, or its extent's record: what is free there is not used and \
                 not unmapped; see to the device"
            );
        }
    }

    /// The device has taken it.
    pub(super) fn is_whole(&mut self, place: (u32, u32)) {
        if self.pages.remove(&place).is_some() {
            tracing::info!(
                extent = place.0,
                page = place.1,
                "the device takes this page of a bitmap again"
            );
        }
        self.note_taken();
    }

    /// The device takes something: what it refused while it took nothing were no bad sectors, perhaps.
    fn note_taken(&mut self) {
        if std::mem::take(&mut self.all_refused) {
            self.pages.values_mut().for_each(|avoided| *avoided = false);
        }
    }

    /// Claims come back to some of what they avoided, in turn, since a page that is tried is tried with the lock; false if that is
    /// nothing.
    fn try_again(&mut self) -> bool {
        let avoided = |from: (u32, u32)| {
            self.pages.range(from..).filter(|(_, avoided)| **avoided).map(|(place, _)| *place)
        };
        let before = avoided((0, 0)).take_while(|place| *place < self.cursor);
        let next = avoided(self.cursor).chain(before).take(REFUSALS_MAX as usize);
        let next: Vec<(u32, u32)> = next.collect();
        for place in &next {
            self.pages.insert(*place, false);
            self.cursor = (place.0, place.1 + 1);
        }
        !next.is_empty()
    }

    pub(super) fn is_avoided(&self, place: (u32, u32)) -> bool {
        self.pages.get(&place).is_some_and(|avoided| *avoided)
    }

    /// An extent with such a page is kept: who claims it next could not set it up.
    pub(super) fn has_any_of(&self, extent: u32) -> bool {
        self.pages.range((extent, 0)..=(extent, u32::MAX)).next().is_some()
    }

    /// The device takes nothing, as far as is known.
    pub(super) fn are_all(&self) -> bool {
        self.all_refused
    }
}

/// A search for room that passes over bad pages.
#[derive(Debug)]
pub(super) struct Search {
    io: Io,
    /// Since a page was written.
    refusals: u32,
    /// The last of them, or one that says that a thin device has no space.
    refusal: Option<StoreError>,
    /// Some of what was refused before is tried once more.
    again: bool,
    /// Unused extents for which a thin device had no space.
    lacks_space: u32,
}

impl Search {
    pub(super) fn new(io: &Io) -> Self {
        Self { io: io.giving_up(), refusals: 0, refusal: None, again: false, lacks_space: 0 }
    }

    pub(super) fn io(&self) -> &Io {
        &self.io
    }

    /// True if bad pages are all that is left: the device may take some by now. Once, or again if it took all of those.
    pub(super) fn begins_again(&mut self, bad: &mut BadPages) -> bool {
        !std::mem::replace(&mut self.again, true) && bad.try_again()
    }

    /// The device writes pages elsewhere: what it refused are bad sectors, however many. That it reads, or takes a record, says
    /// nothing of what it refused.
    pub(super) fn note_answer(&mut self) {
        self.refusals = 0;
    }

    /// What was tried once more was taken: there may be more of that.
    pub(super) fn note_mended(&mut self) {
        self.again = false;
    }

    /// A thin device had no space for an unused extent.
    pub(super) fn note_lack_of_space(&mut self) {
        self.lacks_space += 1;
    }

    /// For how many unused extents it had none.
    pub(super) fn lacks_space(&self) -> u32 {
        self.lacks_space
    }

    pub(super) fn note_refusal(&mut self, error: StoreError) {
        self.refusals += 1;
        // That a thin device is full is what an operator can do something about.
        if self.refusal.as_ref().is_none_or(|known| known.kind != StoreErrorKind::NoSpace) {
            self.refusal = Some(error);
        }
    }

    /// Something was refused since a page was written.
    pub(super) fn has_refusals(&self) -> bool {
        self.refusals > 0
    }

    /// So much that it is to be looked at before anything else is tried.
    pub(super) fn has_many_refusals(&self) -> bool {
        self.refusals > REFUSALS_MAX
    }

    /// What the device said of what it refused: that it has no space, if so, or what it said last.
    pub(super) fn into_refusal(self) -> Option<StoreError> {
        self.refusal
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
        match self.load(&search.io, territory, place.0, place.1).await {
            Err(error) if error.is_of_blocks() => {
                self.bad.note(place, &error);
                search.note_refusal(error);
                Ok(false)
            }
            outcome => outcome.map(|()| true),
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
            Err(error) if is_of_place(&error) => {
                self.note_bad_extent(number, &error);
                search.note_refusal(error);
                Ok(false)
            }
            outcome => outcome.map(|()| true),
        }
    }

    /// Looks whether the device takes anything of what this host could ask of it: a page is written as it is. If so, what was refused so
    /// far are bad sectors. If not, another page is tried the next time: it may be one, too.
    pub(super) async fn are_all_refused(
        &mut self,
        search: &mut Search,
        territory: &Territory,
    ) -> Result<bool> {
        let taken = match self.page_to_try() {
            Some(place) => self.try_page(search, territory, place).await?,
            None => false,
        };
        if taken {
            search.note_answer();
        } else {
            self.bad.all_refused = true;
        }
        Ok(!taken)
    }

    async fn try_page(
        &mut self,
        search: &mut Search,
        territory: &Territory,
        place: (u32, u32),
    ) -> Result<bool> {
        if !self.load_or_avoid(search, territory, place).await?
            || !self.take_up_or_avoid(search, territory, place.0).await?
        {
            return Ok(false);
        }
        let io = search.io.clone();
        let refused = self.write_pages(&io, territory, &[place], false).await?.pop();
        let taken = refused.is_none();
        refused.into_iter().for_each(|(_, error)| search.note_refusal(error));
        Ok(taken)
    }

    /// Of extents of which nothing was refused if there are any, since bad sectors lie together; then those that were not refused
    /// themselves; of extents that were taken up, since a cycle under way would leave others out; and in memory. One after the other of
    /// those that are alike.
    fn page_to_try(&mut self) -> Option<(u32, u32)> {
        let mut best: Vec<(u32, u32)> = Vec::new();
        let mut rank_of_best = None;
        for (&number, extent) in &self.extents {
            let is_bad = self.bad.has_any_of(number);
            for page in 0..extent.free.len() as u32 {
                let place = (number, page);
                let rank = (
                    is_bad,
                    self.bad.pages.contains_key(&place),
                    !extent.taken_up,
                    !self.loaded.contains_key(&place),
                );
                if rank_of_best.is_none_or(|of_best| rank < of_best) {
                    (rank_of_best, best) = (Some(rank), vec![place]);
                } else if rank_of_best == Some(rank) {
                    best.push(place);
                }
            }
        }
        self.bad.probes += 1;
        let index = self.bad.probes.checked_rem(best.len())?;
        best.get(index).copied()
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
            && error.is_of_blocks()
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
            && is_of_place(error)
        {
            self.note_bad_extent(place.0, error);
        }
        taken_up
    }

    /// One of these pages was refused before.
    pub(super) fn was_any_bad(&self, places: &[(u32, u32)]) -> bool {
        places.iter().any(|place| self.bad.pages.contains_key(place))
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
        let places: Vec<(u32, u32)> = loaded.copied().collect();
        let writes = self.encode(territory, &places);
        let refused = io.write_taken(&writes, durably).await?;
        let mut taken = vec![true; places.len()];
        refused.iter().for_each(|(index, _)| taken[*index] = false);
        for (place, _) in places.iter().zip(taken).filter(|(_, taken)| *taken) {
            self.bad.is_whole(*place);
        }
        let refused = refused.into_iter().map(|(index, error)| (places[index], error));
        let refused: Vec<_> = refused.collect();
        refused.iter().for_each(|(place, error)| self.bad.note(*place, error));
        Ok(refused)
    }
}
