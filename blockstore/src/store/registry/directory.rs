//! What this process saw last in the registry's places, so that not each question reads all of it.
//!
//! Names and origins only, nothing that commits change. A directory is used in two ways:
//! * as a *hint* where a disk is: the place is read, and what it holds then is what counts;
//! * as if it were read just now, if it is *proved*: see [`Stamp`].
//!
//! It is replaced by each reading of the whole registry that no change of this process overlapped, follows every
//! change of this process, and is forgotten when one ends with an error: what the registry holds then is not known.
//! One entry per place that was ever used, of some hundred bytes: the registry's size bounds it.

use crate::format::pointer::Pointer;
use crate::format::vdi::Origin;
use crate::policy::Policy;
use crate::types::{Gba, Lsn};
use parking_lot::Mutex;
use std::sync::Arc;
use uuid::Uuid;

/// A disk in its place, or one that is being made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) struct Entry {
    pub uuid: Uuid,
    /// It is a disk, not one that is being made.
    pub active: bool,
    /// The snapshot that it began as.
    pub origin: Option<Origin>,
    /// The block that gave name and policy; none if it is damaged. Blocks are immutable under one pointer.
    pub meta: Option<Pointer>,
    pub name: String,
    pub policy: Policy,
}

/// What a place held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) enum Place {
    /// A deleted disk: it may be used again.
    Buried,
    /// A disk.
    Taken(Entry),
    /// A record that fails its checks: whose it is, is not known.
    Damaged,
}

impl Place {
    fn entry(&self) -> Option<&Entry> {
        match self {
            Self::Taken(entry) => Some(entry),
            Self::Buried | Self::Damaged => None,
        }
    }
}

/// Who else could have changed the registry: nobody, as long as it is the same.
///
/// Whoever changes the registry has entered the host table before, and is shown there as up until its last change is
/// done. So if the table was read before the registry, and once more since, and shows the same both times, with this very host
/// up and nobody else, then nobody else was there in between: what was read then, and followed this host's own
/// changes, is what a reading of everything would show now. A host that enters after the second look finds what this one had
/// written before it. The device's epoch says that the target did not forget, meanwhile, what was read but was not durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store) struct Stamp {
    /// The device's, before anything was read.
    pub epoch: u64,
    /// Places of the host table but the own one, and their records' sequence numbers; the first that is unused is among them.
    pub others: Vec<(Gba, u64)>,
}

/// The places that were ever used, by number.
#[derive(Clone, Debug, Default)]
pub(in crate::store) struct Directory {
    pub places: Vec<Place>,
    /// As of before the reading; none if others were up.
    pub stamp: Option<Stamp>,
    /// The device's epoch before the reading.
    pub epoch: u64,
}

impl Directory {
    fn entries(&self) -> impl Iterator<Item = (u32, &Entry)> {
        (0..).zip(&self.places).filter_map(|(number, place)| Some((number, place.entry()?)))
    }

    /// The disk with this name, else the one with this UUID.
    pub fn find(&self, name: &str, uuid: Option<Uuid>) -> Option<(u32, &Entry)> {
        let disks = || self.entries().filter(|(_, entry)| entry.active);
        let by_name = disks().find(|(_, entry)| entry.name == name);
        by_name.or_else(|| disks().find(|(_, entry)| Some(entry.uuid) == uuid))
    }

    /// Who has a name, other than `own`.
    pub fn holder(&self, name: &str, own: Option<Uuid>) -> Option<&Entry> {
        let mut entries = self.entries().map(|(_, entry)| entry);
        entries.find(|entry| entry.name == name && Some(entry.uuid) != own)
    }

    /// Disks that are being made, or whose making was cut off.
    pub fn in_creation(&self) -> impl Iterator<Item = (u32, &Entry)> {
        self.entries().filter(|(_, entry)| !entry.active)
    }

    /// The disks that began as snapshots of a disk, and those that are being made of one.
    pub fn clones_of(&self, vdi: Uuid) -> impl Iterator<Item = (Lsn, &Entry)> {
        self.entries().filter_map(move |(_, entry)| {
            let origin = entry.origin.filter(|origin| origin.vdi == vdi)?;
            Some((origin.lsn, entry))
        })
    }

    /// What a disk began as, if there is one of this UUID.
    pub fn origin_of(&self, vdi: Uuid) -> Option<Option<Origin>> {
        let mut disks = self.entries().map(|(_, entry)| entry).filter(|entry| entry.active);
        disks.find(|entry| entry.uuid == vdi).map(|entry| entry.origin)
    }

    /// The lowest place that may be used again, or the first that never was.
    pub fn free_place(&self) -> u32 {
        let buried = self.places.iter().position(|place| *place == Place::Buried);
        buried.unwrap_or(self.places.len()) as u32
    }

    /// What was seen of a disk whose head names this block.
    pub fn known(&self, number: u32, uuid: Uuid, meta: Pointer) -> Option<&Entry> {
        let entry = self.places.get(number as usize)?.entry()?;
        (entry.uuid == uuid && entry.meta == Some(meta)).then_some(entry)
    }
}

/// The latest directory.
#[derive(Debug, Default)]
pub(in crate::store) struct Latest(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    directory: Option<Arc<Directory>>,
    /// Rises with the end of each change of this process.
    turn: u64,
}

/// A reading of the registry that is under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    turn: u64,
}

impl Latest {
    pub(super) fn get(&self) -> Option<Arc<Directory>> {
        self.0.lock().directory.clone()
    }

    /// To be called before the first read of it.
    pub(super) fn begin(&self) -> Reading {
        Reading { turn: self.0.lock().turn }
    }

    /// Takes what was read. What a change of this process overlapped may be of before it, and is not taken.
    pub(super) fn end(&self, reading: Reading, directory: Directory) -> Arc<Directory> {
        let directory = Arc::new(directory);
        let mut state = self.0.lock();
        if state.turn == reading.turn {
            state.directory = Some(Arc::clone(&directory));
        }
        directory
    }

    /// A change of this process is durable.
    pub(super) fn note(&self, number: u32, place: Place) {
        let mut state = self.0.lock();
        state.turn += 1;
        let Some(directory) = &mut state.directory else { return };
        let places = &mut Arc::make_mut(directory).places;
        let number = number as usize;
        if number < places.len() {
            places[number] = place;
        } else if number == places.len() {
            places.push(place);
        } else {
            state.directory = None;
        }
    }

    /// A change of this process ended with an error, or was lost to another host: what is there must be read.
    pub(super) fn forget(&self) {
        let mut state = self.0.lock();
        state.turn += 1;
        state.directory = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Birth;

    fn entry(number: u128, name: &str) -> Entry {
        Entry {
            uuid: Uuid::from_u128(number),
            active: true,
            origin: None,
            meta: Some(Pointer {
                gba: Gba(number as u64),
                read_only: false,
                birth: Birth(0),
                crc: 7,
            }),
            name: name.to_owned(),
            policy: Policy::default(),
        }
    }

    fn of(places: Vec<Place>) -> Directory {
        Directory { places, ..Directory::default() }
    }

    #[test]
    fn a_name_counts_before_a_uuid_and_only_disks_are_found() {
        let making = Entry { active: false, ..entry(3, "making") };
        let named_like_one = entry(1, &Uuid::from_u128(2).to_string());
        let places = vec![entry(2, "b"), named_like_one, making].into_iter().map(Place::Taken);
        let directory = of(places.collect());
        let uuid = Uuid::from_u128(2);
        assert_eq!(directory.find(&uuid.to_string(), Some(uuid)).map(|found| found.0), Some(1));
        assert_eq!(directory.find("b", None).map(|found| found.0), Some(0));
        assert_eq!(directory.find("making", None), None);
        assert!(directory.holder("making", None).is_some(), "its name is taken all the same");
        assert!(directory.holder("b", Some(uuid)).is_none());
    }

    #[test]
    fn the_lowest_buried_place_is_used_first_and_a_damaged_one_never() {
        let taken = Place::Taken(entry(1, "a"));
        assert_eq!(of(vec![]).free_place(), 0);
        assert_eq!(of(vec![taken.clone(), Place::Damaged]).free_place(), 2);
        assert_eq!(of(vec![taken, Place::Damaged, Place::Buried, Place::Buried]).free_place(), 2);
    }

    #[test]
    fn a_reading_that_a_change_overlapped_is_not_kept() {
        let latest = Latest::default();
        let reading = latest.begin();
        latest.note(0, Place::Taken(entry(1, "a")));
        latest.end(reading, of(vec![]));
        assert!(latest.get().is_none(), "it may be of before the change");
        latest.end(latest.begin(), of(vec![Place::Taken(entry(1, "a"))]));
        latest.note(1, Place::Taken(entry(2, "b")));
        latest.note(0, Place::Buried);
        let now = latest.get().expect("known");
        assert_eq!(now.places, vec![Place::Buried, Place::Taken(entry(2, "b"))]);
        latest.note(7, Place::Buried);
        assert!(latest.get().is_none(), "what lies between is not known");
    }
}
