//! Snapshots in the rig: taken at any moment, those that wait for room included; known to the model by their LSN.

use super::{Image, Rig};
use blockstore::SnapshotLabel;
use blockstore::types::Lsn;
use cache::backing::Batch;
use cache::recovery::Recovered;
use std::collections::{BTreeMap, VecDeque};

/// What the rig knows of its disk's snapshots.
#[derive(Debug, Default)]
pub struct Snapshots {
    /// Asked for, without a place in the log.
    waiting: VecDeque<u64>,
    /// Those with an LSN that are not answered.
    staged: BTreeMap<u64, u64>,
    /// All of this log, by LSN: the number that time and label are made of.
    taken: BTreeMap<u64, u64>,
    next: u64,
}

fn label(id: u64) -> SnapshotLabel {
    SnapshotLabel::new("s".repeat(id as usize % 9)).unwrap()
}

impl Rig {
    pub fn snapshot(&mut self) {
        let id = self.snapshots.next;
        self.snapshots.next += 1;
        self.snapshots.waiting.push_back(id);
        self.disk.snapshot(id, id + 5000, label(id));
        self.staged_snapshots(0);
    }

    /// Takes note of snapshots that got their place since the last look, before `parts` other records.
    pub fn staged_snapshots(&mut self, parts: u64) {
        let staged = self.disk.staged_lsn().0 - parts;
        while (self.log.len() as u64) < staged {
            let id = self.snapshots.waiting.pop_front().expect("nobody else takes LSNs");
            self.log.push(super::Done { sectors: 0..0, stamp: 0 });
            let lsn = self.log.len() as u64;
            self.snapshots.staged.insert(id, lsn);
            self.snapshots.taken.insert(lsn, id);
        }
        let waits = !self.snapshots.waiting.is_empty();
        assert!(!(waits && parts > 0), "nothing overtakes a snapshot");
    }

    pub fn snapshot_taken(&mut self, id: u64, result: Result<Lsn, String>) {
        let lsn = self.snapshots.staged.remove(&id).expect("it has a place, and is answered once");
        assert_eq!(result, Ok(Lsn(lsn)));
        // From now on it must survive.
        self.flushed = self.flushed.max(lsn);
    }

    /// Nothing waits any more.
    pub fn assert_snapshots_answered(&self) {
        assert!(self.snapshots.staged.is_empty(), "every snapshot with a place was answered");
    }

    /// The store has exactly these snapshots more, each as the disk was.
    pub fn check_cuts(&self, before: u64, lsn: u64, cuts: &BTreeMap<u64, Image>) {
        let of = |lsns: std::ops::RangeInclusive<u64>| {
            let mut all = self.kept_cuts(lsns.clone());
            all.extend(self.snapshots.taken.range(lsns).map(|(lsn, _)| *lsn));
            all.sort_unstable();
            all
        };
        let committed: Vec<u64> = cuts.range(before + 1..).map(|(lsn, _)| *lsn).collect();
        assert_eq!(committed, of(before + 1..=lsn), "P5: the snapshots of a batch");
        for (lsn, image) in cuts.range(before + 1..) {
            assert_eq!(*image, self.image_at(*lsn), "P5: the snapshot at LSN {lsn}");
        }
    }

    /// What recovery says of snapshots is what the log holds of them.
    pub fn check_recovered_snapshots(&mut self, recovered: &Recovered) {
        let (last, store) = (recovered.last_lsn.0, self.store.image.lock().unwrap().1);
        self.snapshots.taken.retain(|lsn, _| *lsn <= last);
        self.snapshots.waiting.clear();
        self.snapshots.staged.clear();
        let expected = self.snapshots.taken.range(store + 1..);
        let expected: Vec<_> = expected.map(|(lsn, id)| (*lsn, id + 5000, label(*id))).collect();
        let found = recovered.snapshots.iter();
        let found: Vec<_> = found.map(|s| (s.lsn.0, s.time_ms, s.label)).collect();
        assert_eq!(found, expected, "snapshots that the store does not have");
    }
}

/// The store's images at the cuts of a batch, as `apply` makes them.
pub fn images_at_cuts(
    batch: &Batch,
    image: &mut Image,
    apply: impl Fn(&mut Image, &[cache::backing::Change]),
) -> BTreeMap<u64, Image> {
    let mut images = BTreeMap::new();
    for cut in &batch.cuts {
        apply(image, &cut.changes);
        images.insert(cut.lsn.0, image.clone());
    }
    apply(image, &batch.changes);
    images
}
