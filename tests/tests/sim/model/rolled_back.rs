//! A disk that becomes one of its snapshots again: one entry of its log, behind the snapshot of what it was, if that is kept.

use super::{Done, Model};
use blockstore::SnapshotLabel;
use blockstore::types::SECTOR_SIZE;
use std::sync::Arc;

/// A rollback that was asked for.
#[derive(Clone, Copy, Debug)]
pub struct Rollback {
    /// The snapshot.
    pub to: u64,
    /// What the disk was is kept as a snapshot.
    pub keeps: bool,
}

/// The label of what a disk was before.
pub fn kept_label() -> SnapshotLabel {
    SnapshotLabel::new("before a rollback").expect("a label")
}

impl Rollback {
    /// The LSN of a disk that was at this one.
    fn lsn(self, last: u64) -> u64 {
        last + u64::from(self.keeps) + 1
    }
}

impl Model {
    /// It was asked for, and nobody heard how that went.
    pub fn may_roll_back(&mut self, rollback: Rollback) {
        if rollback.keeps {
            self.labels.asked_at(self.last_lsn() + 1, &kept_label());
        }
        self.parted.rollback = Some(rollback);
    }

    /// It was done, and the disk is of so many bytes since.
    pub fn rolled_back(&mut self, lsn: u64, bytes: u64) {
        let disk = &self.name;
        let rollback = self.parted.rollback.take();
        let rollback = rollback.unwrap_or_else(|| panic!("P5, {disk}: rolled back unasked"));
        let expected = rollback.lsn(self.last_lsn());
        assert_eq!(lsn, expected, "P5, {disk}: a rollback has LSNs of its own");
        let image = self.image_at(rollback.to);
        if rollback.keeps {
            self.labels.changed(self.last_lsn() + 1, &kept_label());
            self.push_cut();
        }
        self.log.push(Done { sectors: 0..0, stamp: 0, becomes: Some(Arc::new(image)) });
        self.now = self.image_at(lsn);
        self.now.resize(bytes as usize / SECTOR_SIZE, 0);
        (self.acked, self.flushed) = (lsn, lsn);
        self.stored = (self.now.clone(), lsn);
        self.parted.was_rolled_back = true;
    }

    /// The store's image is at `lsn`: so one of which nobody heard was done, or it was not.
    pub fn settle_rollback(&mut self, lsn: u64, bytes: u64) {
        if self.parted.rollback.is_some() && lsn > self.last_lsn() {
            self.rolled_back(lsn, bytes);
        }
        self.no_rollback();
    }

    /// It was not done.
    pub fn no_rollback(&mut self) {
        if self.parted.rollback.take().is_some_and(|rollback| rollback.keeps) {
            self.labels.never(self.last_lsn() + 1);
        }
    }

    /// With a rollback done of which nobody heard, if the store's `lsn` says that it was.
    pub(super) fn after_rollback(&self, lsn: u64) -> Option<Self> {
        let rollback = self.parted.rollback.filter(|_| lsn > self.last_lsn())?;
        let mut after = self.clone();
        let bytes = self.now.len() * SECTOR_SIZE;
        after.rolled_back(rollback.lsn(self.last_lsn()), bytes as u64);
        Some(after)
    }

    /// How it is found in the store, whatever its name came to be there.
    pub fn in_store(&self) -> String {
        let uuid = self.uuid.filter(|_| self.is_provisional);
        uuid.map_or_else(|| self.name.clone(), |uuid| uuid.to_string())
    }
}
