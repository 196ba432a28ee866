//! Which disks a pass has gone through, and how much of those that clones hang on. Kept across restarts with the position.
//!
//! A clone is compared with its source only if this says that the source's snapshot was read. What it does not know, or has no room for, was not:
//! a clone of that is read whole, which costs time and hides nothing.

use blockstore::types::Lsn;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Sources that are remembered. Clones of others are read whole.
const SOURCES_MAX: usize = 2048;
/// Gaps in the list of a disk's snapshots that are remembered. With more nothing is compared with any of them.
const GAPS_MAX: usize = 64;

/// Disks whose turn has been.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Passed {
    /// One bit for each slot of the registry.
    slots: Vec<u64>,
    sources: Vec<Source>,
}

/// A disk that clones hang on, and that was gone through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Source {
    pub(crate) vdi: Uuid,
    /// Snapshots up to here were there when its turn came.
    pub(crate) committed: Lsn,
    pub(crate) missed: Missed,
}

/// Snapshots of a disk that were not read, and of which that was told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Missed {
    /// Those between each two of these: a block of the list could not be had.
    gaps: Vec<(Lsn, Lsn)>,
    /// Others, too; it is not known which.
    others: bool,
}

impl Passed {
    pub(super) fn add(&mut self, slot: u32, source: Option<Source>) {
        let (word, bit) = (slot as usize / 64, slot % 64);
        if self.slots.len() <= word {
            self.slots.resize(word + 1, 0);
        }
        self.slots[word] |= 1 << bit;
        if let Some(source) = source
            && self.sources.len() < SOURCES_MAX
        {
            self.sources.push(source);
        }
    }

    pub(super) fn has(&self, slot: u32) -> bool {
        self.slots.get(slot as usize / 64).is_some_and(|word| word >> (slot % 64) & 1 == 1)
    }

    /// True if all that a snapshot holds was gone through.
    pub(super) fn has_read(&self, vdi: Uuid, snapshot: Lsn) -> bool {
        let source = self.sources.iter().find(|source| source.vdi == vdi);
        source.is_some_and(|source| snapshot <= source.committed && !source.missed.has(snapshot))
    }
}

impl Missed {
    pub(super) fn is_empty(&self) -> bool {
        self.gaps.is_empty() && !self.others
    }

    fn has(&self, snapshot: Lsn) -> bool {
        let within = |(older, younger): &(Lsn, Lsn)| *older < snapshot && snapshot < *younger;
        self.others || self.gaps.iter().any(within)
    }

    /// Whatever lies between two snapshots.
    pub(super) fn between(&mut self, older: Lsn, younger: Lsn) {
        match self.gaps.len() {
            GAPS_MAX.. => self.others = true,
            _ => self.gaps.push((older, younger)),
        }
    }

    /// Any of them.
    pub(super) fn some(&mut self) {
        self.others = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(vdi: u128, missed: Missed) -> Source {
        Source { vdi: Uuid::from_u128(vdi), committed: Lsn(100), missed }
    }

    #[test]
    fn only_what_is_known_to_have_been_read_was() {
        let (mut passed, mut missed) = (Passed::default(), Missed::default());
        assert!(missed.is_empty());
        missed.between(Lsn(10), Lsn(20));
        passed.add(70, Some(source(1, missed)));
        passed.add(3, None);
        let slots: Vec<u32> = (0..200).filter(|slot| passed.has(*slot)).collect();
        assert_eq!(slots, [3, 70]);
        let read = |lsn| passed.has_read(Uuid::from_u128(1), Lsn(lsn));
        assert!(read(10) && read(20) && read(100), "what the gap lies between was read");
        assert!(!read(11) && !read(19), "in the gap");
        assert!(!read(101), "made after the disk's turn");
        assert!(!passed.has_read(Uuid::from_u128(2), Lsn(10)));
        let text = serde_json::to_string(&passed).unwrap();
        assert_eq!(serde_json::from_str::<Passed>(&text).unwrap(), passed);
    }

    #[test]
    fn what_there_is_no_room_for_was_not_read() {
        let mut missed = Missed::default();
        (0..=GAPS_MAX as u64).for_each(|n| missed.between(Lsn(10 * n), Lsn(10 * n + 5)));
        assert!(missed.gaps.len() == GAPS_MAX && missed.has(Lsn(7)));
        let mut passed = Passed::default();
        for vdi in 0..=SOURCES_MAX as u32 {
            passed.add(vdi, Some(source(u128::from(vdi), Missed::default())));
        }
        assert_eq!(passed.sources.len(), SOURCES_MAX);
        assert!(!passed.has_read(Uuid::from_u128(SOURCES_MAX as u128), Lsn(1)));
    }
}
