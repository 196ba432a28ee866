//! Snapshots of a cadence that requests are about: while one is brought to the store, and used there, thinning leaves it alone.
//!
//! However long that takes: as long as the request. And a little longer, since a command may be several requests, or be given again.

use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// So long after the last request about it a snapshot stays.
const LINGER: Duration = Duration::from_secs(30);

/// What is left alone, on all disks. As much as requests in [`LINGER`] are about.
#[derive(Debug, Default)]
pub(super) struct Sparing {
    /// By disk and LSN. Held for moments only.
    wanted: Mutex<BTreeMap<(Uuid, u64), Wanted>>,
}

#[derive(Debug)]
struct Wanted {
    requests: usize,
    /// When the last of them was over.
    since: Instant,
}

impl Wanted {
    fn is_spared(&self, now: Instant) -> bool {
        self.requests > 0 || now.saturating_duration_since(self.since) < LINGER
    }
}

/// A snapshot that a request is about. Dropped, that is over.
#[derive(Debug)]
#[must_use = "the snapshot is spared for as long as this is there"]
pub struct Spared {
    all: Arc<Sparing>,
    key: (Uuid, u64),
}

impl Drop for Spared {
    fn drop(&mut self) {
        self.all.end(self.key, Instant::now());
    }
}

impl Sparing {
    pub(super) fn spare(self: &Arc<Self>, vdi: Uuid, lsn: u64) -> Spared {
        let key = (vdi, lsn);
        let fresh = || Wanted { requests: 0, since: Instant::now() };
        self.wanted.lock().entry(key).or_insert_with(fresh).requests += 1;
        Spared { all: Arc::clone(self), key }
    }

    /// If it is spared already.
    pub(super) fn spare_again(self: &Arc<Self>, vdi: Uuid, lsn: u64) -> Option<Spared> {
        let key = (vdi, lsn);
        let mut all = self.wanted.lock();
        let wanted = all.get_mut(&key).filter(|wanted| wanted.is_spared(Instant::now()))?;
        wanted.requests += 1;
        Some(Spared { all: Arc::clone(self), key })
    }

    /// What is to be left alone of a disk.
    pub(super) fn of(&self, vdi: Uuid) -> BTreeSet<u64> {
        self.at(vdi, Instant::now())
    }

    fn at(&self, vdi: Uuid, now: Instant) -> BTreeSet<u64> {
        let all = self.wanted.lock();
        let spared = all.range((vdi, 0)..=(vdi, u64::MAX)).filter(|(_, one)| one.is_spared(now));
        spared.map(|((_, lsn), _)| *lsn).collect()
    }

    fn end(&self, key: (Uuid, u64), now: Instant) {
        let mut all = self.wanted.lock();
        if let Some(wanted) = all.get_mut(&key) {
            (wanted.requests, wanted.since) = (wanted.requests.saturating_sub(1), now);
        }
        all.retain(|_, wanted| wanted.is_spared(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_spared_until_the_last_request_about_it_is_over_and_a_little_longer() {
        let (all, vdi, other) =
            (Arc::new(Sparing::default()), Uuid::from_u128(1), Uuid::from_u128(2));
        let one = all.spare(vdi, 7);
        let two = all.spare(vdi, 7);
        let elsewhere = all.spare(other, 8);
        // However long it takes.
        let later = Instant::now() + 100 * LINGER;
        assert_eq!(all.at(vdi, later), [7].into());
        drop(one);
        assert_eq!(all.at(vdi, later), [7].into(), "the other request goes on");
        drop(two);
        assert_eq!(all.of(vdi), [7].into(), "there may be another request of the same command");
        assert_eq!(all.at(vdi, later), BTreeSet::new());
        let again = all.spare_again(vdi, 7).expect("not long ago");
        assert_eq!(all.at(vdi, later), [7].into());
        drop(again);
        assert!(all.spare_again(vdi, 9).is_none(), "nobody asked for it");
        // Nothing is left of those that were over long ago.
        all.end((other, 8), later);
        assert_eq!(all.wanted.lock().len(), 1);
        drop(elsewhere);
    }
}
