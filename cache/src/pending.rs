//! Snapshots in a disk's log that the store does not have yet. Pure.
//!
//! There may be as many as the log holds records, a million and more: 24 bytes each, and their labels one behind the other.

use blockstore::SnapshotLabel;
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
}

impl PendingSnapshots {
    /// Adds the newest.
    pub fn push(&mut self, lsn: Lsn, time_ms: u64, label: &SnapshotLabel) {
        debug_assert!(self.places.back().is_none_or(|last| last.lsn < lsn));
        self.labels.extend(label.as_str().as_bytes());
        let labels = self.gone + self.labels.len() as u64;
        self.places.push_back(Place { lsn, time_ms, labels });
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
        while let Some(first) = self.places.front().copied().filter(|first| first.lsn <= committed)
        {
            self.labels.drain(..(first.labels - self.gone) as usize);
            self.gone = first.labels;
            self.places.pop_front();
        }
        if self.places.is_empty() {
            // A backlog's memory is not kept once it is gone.
            *self = Self::default();
        }
    }

    /// The one at `lsn`.
    #[must_use]
    pub fn find(&self, lsn: Lsn) -> Option<PendingSnapshot> {
        let at = self.places.binary_search_by_key(&lsn, |place| place.lsn).ok()?;
        self.iter().nth(at)
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// None.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// All of them, oldest first.
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
