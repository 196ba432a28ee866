//! Snapshots in a disk's log that the store does not have yet. Pure.
//!
//! There may be as many as the log holds records, a million and more: 24 bytes each, and their labels one behind the other. Of
//! those that a schedule's cadence has cut only those are known that it would keep, at most
//! [`KEEP_MAX`](blockstore::schedule::KEEP_MAX): 24 bytes each.

use blockstore::SnapshotLabel;
use blockstore::sabotage::{self, Bug};
use blockstore::schedule::Cadence;
use blockstore::types::Lsn;
use std::collections::VecDeque;

/// A snapshot that is durable in the log, and not committed to the store yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingSnapshot {
    /// Its point in the guest's write order: its name.
    pub lsn: Lsn,
    /// When it was asked for, milliseconds since 1970.
    pub time_ms: u64,
    /// For people; may be empty.
    pub label: SnapshotLabel,
}

/// A snapshot that the cadence of a disk's schedule has cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogCut {
    /// Everything up to here is in it: its name.
    pub lsn: Lsn,
    /// When, milliseconds since 1970.
    pub time_ms: u64,
    /// The rule, which keeps so many of the newest.
    pub cadence: Cadence,
}

impl LogCut {
    /// As any other snapshot, with its label.
    #[must_use]
    pub fn named(&self) -> PendingSnapshot {
        let label = Cadence::label(self.cadence.behind, self.time_ms);
        PendingSnapshot { lsn: self.lsn, time_ms: self.time_ms, label }
    }
}

#[derive(Clone, Copy, Debug)]
struct Place {
    lsn: Lsn,
    time_ms: u64,
    /// Bytes of labels up to the end of its own, counted from the first that there ever was.
    labels: u64,
}

/// See the module. In the order of their LSNs.
#[derive(Clone, Debug, Default)]
pub struct PendingSnapshots {
    places: VecDeque<Place>,
    labels: VecDeque<u8>,
    /// Bytes of labels that are gone.
    gone: u64,
    /// Those of a cadence that are to be kept.
    cuts: VecDeque<LogCut>,
    /// The store has everything up to here.
    retired: Lsn,
}

impl PendingSnapshots {
    /// Adds the newest.
    pub fn push(&mut self, lsn: Lsn, time_ms: u64, label: &SnapshotLabel) {
        debug_assert!(self.places.back().is_none_or(|last| last.lsn < lsn));
        self.labels.extend(label.as_str().as_bytes());
        let labels = self.gone + self.labels.len() as u64;
        self.places.push_back(Place { lsn, time_ms, labels });
    }

    /// Adds the newest of those that a cadence has cut; older ones of which its rule keeps no more are forgotten.
    pub fn push_cut(&mut self, cut: LogCut) {
        debug_assert!(self.cuts.back().is_none_or(|last| last.lsn < cut.lsn));
        self.cuts.push_back(cut);
        while self.cuts.front().is_some_and(|first| self.cuts.len() > first.cadence.keep as usize) {
            self.cuts.pop_front();
        }
    }

    /// Those that a cadence has cut and keeps, oldest first.
    #[must_use]
    pub fn cuts(&self) -> &VecDeque<LogCut> {
        &self.cuts
    }

    /// Adds one that may lie before others. False if there is one at that LSN.
    pub fn insert(&mut self, snapshot: &PendingSnapshot) -> bool {
        let at = self.places.partition_point(|place| place.lsn < snapshot.lsn);
        if self.places.get(at).is_some_and(|place| place.lsn == snapshot.lsn) {
            return false;
        }
        // Asked for by people, a few at a time: all labels behind it move.
        let behind: Vec<PendingSnapshot> = self.iter().skip(at).collect();
        self.places.truncate(at);
        let labels = self.places.back().map_or(self.gone, |last| last.labels);
        self.labels.truncate((labels - self.gone) as usize);
        for next in std::iter::once(snapshot).chain(&behind) {
            self.push(next.lsn, next.time_ms, &next.label);
        }
        true
    }

    /// The store has everything up to `committed`.
    pub fn retire(&mut self, committed: Lsn) {
        self.retired = self.retired.max(committed);
        while let Some(first) = self.places.front().copied().filter(|first| first.lsn <= committed)
        {
            if !sabotage::on(Bug::PendingLabelsShift) {
                self.labels.drain(..(first.labels - self.gone) as usize);
            }
            self.gone = first.labels;
            self.places.pop_front();
        }
        let cut = self.cuts.partition_point(|cut| cut.lsn <= committed);
        self.cuts.drain(..cut);
        if self.cuts.is_empty() {
            self.cuts = VecDeque::new();
        }
        if self.places.is_empty() {
            // A backlog's memory is not kept once it is gone.
            let (cuts, retired) = (std::mem::take(&mut self.cuts), self.retired);
            *self = Self { cuts, retired, ..Self::default() };
        }
    }

    /// The store has everything up to here, as far as was said.
    #[must_use]
    pub fn retired(&self) -> Lsn {
        self.retired
    }

    /// When the one at `lsn` was asked for, milliseconds since 1970.
    #[must_use]
    pub fn time_of(&self, lsn: Lsn) -> Option<u64> {
        let at = self.places.binary_search_by_key(&lsn, |place| place.lsn).ok()?;
        self.places.get(at).map(|place| place.time_ms)
    }

    /// The one at `lsn`.
    #[must_use]
    pub fn find(&self, lsn: Lsn) -> Option<PendingSnapshot> {
        let at = self.places.binary_search_by_key(&lsn, |place| place.lsn).ok()?;
        self.iter().nth(at)
    }

    /// How many, but for those of a cadence.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// None, but for those of a cadence.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// All of them but those of a cadence, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = PendingSnapshot> {
        let mut from = 0;
        self.places.iter().map(move |place| {
            let to = (place.labels - self.gone) as usize;
            let label: Vec<u8> = self.labels.range(from..to).copied().collect();
            from = to;
            let label = String::from_utf8(label).ok();
            let label = label.and_then(|label| SnapshotLabel::new(label).ok()).unwrap_or_default();
            PendingSnapshot { lsn: place.lsn, time_ms: place.time_ms, label }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_cuts_those_are_known_that_are_kept() {
        let cut = |lsn: u64, keep| LogCut {
            lsn: Lsn(lsn),
            time_ms: lsn,
            cadence: Cadence { behind: blockstore::schedule::Behind::Write, keep },
        };
        let lsns = |pending: &PendingSnapshots| -> Vec<u64> {
            pending.cuts().iter().map(|cut| cut.lsn.0).collect()
        };
        let mut pending = PendingSnapshots::default();
        (1..=9).for_each(|lsn| pending.push_cut(cut(lsn, 4)));
        assert_eq!(lsns(&pending), [6, 7, 8, 9]);
        pending.push_cut(cut(10, 6));
        assert_eq!(lsns(&pending), [7, 8, 9, 10], "the rule of its time counts for each");
        pending.push(Lsn(9), 9, &SnapshotLabel::default());
        pending.retire(Lsn(8));
        assert_eq!((lsns(&pending), pending.len()), (vec![9, 10], 1));
        pending.retire(Lsn(9));
        assert_eq!((lsns(&pending), pending.len()), (vec![10], 0));
        pending.retire(Lsn(10));
        assert_eq!(pending.cuts.capacity(), 0);
    }

    #[test]
    fn labels_stay_with_their_snapshots() {
        let of = |n: u64| PendingSnapshot {
            lsn: Lsn(n * 3),
            time_ms: 1_000 + n,
            label: SnapshotLabel::new("ü".repeat(n as usize % 4)).unwrap(),
        };
        let mut pending = PendingSnapshots::default();
        for round in 0..3 {
            let (from, to) = (round * 50, round * 50 + 70);
            for n in (from + 20).max(1)..to {
                let all = pending.iter().last().map_or(0, |last| last.lsn.0);
                let PendingSnapshot { lsn, time_ms, label } = of(n);
                if lsn.0 > all {
                    pending.push(lsn, time_ms, &label);
                }
            }
            pending.retire(Lsn((to - 20) * 3 + 1));
            let left: Vec<_> = pending.iter().collect();
            assert_eq!(left, (to - 19..to).map(of).collect::<Vec<_>>());
            assert_eq!(pending.len(), left.len());
        }
        for n in [3, 1, 9, 2, 9, 4] {
            let is_new = pending.iter().all(|known| known.lsn != of(n).lsn);
            assert_eq!(pending.insert(&of(n)), is_new, "{n}");
        }
        let early: Vec<_> = pending.iter().take(5).collect();
        assert_eq!(early, [1, 2, 3, 4, 9].map(of));
        pending.retire(Lsn(u64::MAX));
        assert!(pending.is_empty() && pending.labels.capacity() == 0);
    }
}
