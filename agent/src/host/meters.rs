//! What the counters of the disks say of the near future: rates, runway, drain time, and how much of what is read needs no
//! store. Pure: it is fed readings with their times.
//!
//! Rates are those of the last minute, reads are judged over the last ten. A counter that fell (the disk was attached
//! anew) starts its disk's history over. Memory: one reading per second and disk, at most [`READINGS_MAX`].

use crate::api::{Outlook, Readiness};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Between two readings.
pub const PERIOD: Duration = Duration::from_secs(1);
/// Readings kept of a disk: ten minutes.
const READINGS_MAX: usize = 600;
/// Over which rates are taken.
const RATE_WINDOW: Duration = Duration::from_secs(60);

/// The counters of a disk at one moment. All but `dirty` and `store_answers` only rise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// When.
    pub at: Instant,
    /// Bytes of log not committed.
    pub dirty: u64,
    /// Bytes of log committed ever.
    pub replayed: u64,
    /// Bytes that the guest wrote.
    pub written: u64,
    /// Bytes that the guest read.
    pub read: u64,
    /// Bytes of them that the store was asked for.
    pub fetched: u64,
    /// Commits could get through.
    pub store_answers: bool,
}

impl Reading {
    /// Bytes of log appended ever, up to a constant.
    fn appended(&self) -> u64 {
        self.replayed + self.dirty
    }

    fn continues(&self, before: &Self) -> bool {
        self.replayed >= before.replayed
            && self.written >= before.written
            && self.read >= before.read
            && self.fetched >= before.fetched
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Meters {
    disks: BTreeMap<Uuid, Meter>,
}

#[derive(Debug, Default)]
struct Meter {
    readings: VecDeque<Reading>,
    /// Bytes per second that the store took when it was last at work.
    drain_rate: Option<u64>,
}

impl Meters {
    /// Takes the readings of all disks; those of others are forgotten.
    pub fn take(&mut self, readings: impl IntoIterator<Item = (Uuid, Reading)>) {
        let mut former = std::mem::take(&mut self.disks);
        for (disk, reading) in readings {
            let mut meter = former.remove(&disk).unwrap_or_default();
            meter.take(reading);
            self.disks.insert(disk, meter);
        }
    }

    /// The outlook of a disk with `dirty` bytes to commit, on a ring with room for `room` bytes that its writers have for
    /// themselves.
    #[must_use]
    pub fn outlook(&self, disk: Uuid, dirty: u64, room: u64) -> Outlook {
        let meter = self.disks.get(&disk);
        outlook(
            meter.map_or(0, Meter::write_rate),
            meter.and_then(|meter| meter.drain_rate),
            dirty,
            room,
        )
    }

    /// The outlook of the host: all disks fill one ring. The slowest disk decides when the drain ends.
    #[must_use]
    pub fn outlook_of_all(&self, dirty: &BTreeMap<Uuid, u64>, room: u64) -> Outlook {
        let write_rate = self.disks.values().map(Meter::write_rate).sum();
        let rates: Vec<u64> = self.disks.values().filter_map(|meter| meter.drain_rate).collect();
        let drain_rate = (!rates.is_empty()).then(|| rates.iter().sum());
        let mut all = outlook(write_rate, drain_rate, dirty.values().sum(), room);
        let etas = dirty
            .iter()
            .filter(|(_, dirty)| **dirty > 0)
            .map(|(disk, dirty)| self.outlook(*disk, *dirty, room).drain_eta_ms);
        all.drain_eta_ms =
            etas.collect::<Option<Vec<_>>>().map(|e| e.into_iter().max().unwrap_or(0));
        all
    }

    /// What a disk of `size` bytes, of which `held` are local, can do without the store.
    #[must_use]
    pub fn readiness(&self, disk: Uuid, held: u64, size: u64) -> Readiness {
        let local = self.disks.get(&disk).and_then(Meter::reads_local_share);
        let held_share = if size == 0 { 1.0 } else { (held as f64 / size as f64).min(1.0) };
        Readiness {
            held_bytes: held,
            held_share,
            recent_reads_local_share: local,
            ..Readiness::default()
        }
    }
}

fn outlook(write_rate: u64, drain_rate: Option<u64>, dirty: u64, room: u64) -> Outlook {
    let time = |bytes: u64, rate: u64| (rate > 0).then(|| bytes.saturating_mul(1000) / rate);
    Outlook {
        write_rate,
        drain_rate,
        runway_ms: time(room, write_rate),
        drain_eta_ms: if dirty == 0 { Some(0) } else { time(dirty, drain_rate.unwrap_or(0)) },
    }
}

impl Meter {
    fn take(&mut self, reading: Reading) {
        if self.readings.back().is_some_and(|last| !reading.continues(last)) {
            self.readings.clear();
        }
        if self.readings.len() == READINGS_MAX {
            self.readings.pop_front();
        }
        self.readings.push_back(reading);
        self.drain_rate = self.measured_drain_rate().or(self.drain_rate);
    }

    /// The newest reading, and the oldest one of the rates' window.
    fn window(&self) -> Option<(&Reading, &Reading)> {
        let last = self.readings.back()?;
        let first =
            self.readings.iter().find(|one| last.at.duration_since(one.at) <= RATE_WINDOW)?;
        (last.at > first.at).then_some((first, last))
    }

    /// Bytes per second that go into the log: by its segments, which count when they are full, or by the guest's writes,
    /// which know nothing of headers; the larger is nearer to the truth.
    fn write_rate(&self) -> u64 {
        let Some((first, last)) = self.window() else { return 0 };
        let by_log = last.appended().saturating_sub(first.appended());
        per_second(by_log.max(last.written - first.written), last.at - first.at)
    }

    /// Over the seconds of the window in which the store answered and there was something to commit.
    fn measured_drain_rate(&self) -> Option<u64> {
        let (first, last) = self.window()?;
        let (mut bytes, mut time) = (0, Duration::ZERO);
        let within = self.readings.iter().filter(|one| one.at >= first.at);
        for (one, next) in within.clone().zip(within.skip(1)) {
            if one.store_answers && next.store_answers && one.dirty > 0 {
                bytes += next.replayed - one.replayed;
                time += next.at - one.at;
            }
        }
        debug_assert!(last.at >= first.at);
        (bytes > 0 && time > Duration::ZERO).then(|| per_second(bytes, time))
    }

    fn reads_local_share(&self) -> Option<f64> {
        let (first, last) = (self.readings.front()?, self.readings.back()?);
        let read = last.read - first.read;
        let fetched = (last.fetched - first.fetched).min(read);
        (read > 0).then(|| 1.0 - fetched as f64 / read as f64)
    }
}

fn per_second(bytes: u64, time: Duration) -> u64 {
    (bytes as f64 / time.as_secs_f64()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Uuid = Uuid::from_u128(1);
    const MIB: u64 = 1 << 20;

    fn reading(start: Instant, second: u64) -> Reading {
        Reading {
            at: start + Duration::from_secs(second),
            dirty: 0,
            replayed: 0,
            written: 0,
            read: 0,
            fetched: 0,
            store_answers: true,
        }
    }

    #[test]
    fn runway_and_drain_time_follow_the_rates() {
        let (mut meters, start) = (Meters::default(), Instant::now());
        // Two MiB a second come in, one goes out.
        for second in 0..=100 {
            let (written, replayed) = (second * 2 * MIB, second * MIB);
            let dirty = 64 * MIB + second * MIB;
            let now = Reading { dirty, replayed, written, ..reading(start, second) };
            meters.take([(DISK, now)]);
        }
        let outlook = meters.outlook(DISK, 164 * MIB, 200 * MIB);
        assert_eq!((outlook.write_rate, outlook.drain_rate), (2 * MIB, Some(MIB)));
        assert_eq!((outlook.runway_ms, outlook.drain_eta_ms), (Some(100_000), Some(164_000)));
        let all = meters.outlook_of_all(&BTreeMap::from([(DISK, 164 * MIB)]), 200 * MIB);
        assert_eq!(all, outlook);
    }

    #[test]
    fn an_outage_does_not_spoil_what_is_known_of_the_store() {
        let (mut meters, start) = (Meters::default(), Instant::now());
        for second in 0..10 {
            let (replayed, dirty) = (second * MIB, 10 * MIB);
            meters.take([(DISK, Reading { dirty, replayed, ..reading(start, second) })]);
        }
        for second in 10..200 {
            let (replayed, dirty) = (9 * MIB, second * MIB);
            let store_answers = false;
            let now = Reading { dirty, replayed, store_answers, ..reading(start, second) };
            meters.take([(DISK, now)]);
        }
        let outlook = meters.outlook(DISK, 100 * MIB, MIB);
        assert_eq!((outlook.drain_rate, outlook.drain_eta_ms), (Some(MIB), Some(100_000)));
        assert_eq!(outlook.write_rate, MIB);
    }

    #[test]
    fn an_idle_disk_has_no_runway_and_nothing_to_drain() {
        let (mut meters, start) = (Meters::default(), Instant::now());
        assert_eq!(meters.outlook(DISK, 0, MIB).runway_ms, None);
        for second in 0..3 {
            meters.take([(DISK, reading(start, second))]);
        }
        let outlook = meters.outlook(DISK, 0, MIB);
        assert_eq!((outlook.write_rate, outlook.runway_ms), (0, None));
        assert_eq!(outlook.drain_eta_ms, Some(0));
        assert_eq!(meters.outlook(DISK, MIB, MIB).drain_eta_ms, None, "no rate is known");
    }

    #[test]
    fn readiness_is_what_is_held_and_what_reads_needed() {
        let (mut meters, start) = (Meters::default(), Instant::now());
        assert_eq!(meters.readiness(DISK, 0, 0).recent_reads_local_share, None);
        meters.take([(DISK, Reading { read: 10, fetched: 10, ..reading(start, 0) })]);
        meters.take([(DISK, Reading { read: 110, fetched: 35, ..reading(start, 1) })]);
        let readiness = meters.readiness(DISK, 25, 100);
        assert_eq!((readiness.held_bytes, readiness.held_share), (25, 0.25));
        assert_eq!(readiness.recent_reads_local_share, Some(0.75));
    }

    #[test]
    fn a_counter_that_falls_starts_over_and_memory_is_bounded() {
        let (mut meters, start) = (Meters::default(), Instant::now());
        meters.take([(DISK, Reading { written: 1000 * MIB, ..reading(start, 0) })]);
        meters.take([(DISK, reading(start, 1))]);
        assert_eq!(meters.outlook(DISK, 0, MIB).write_rate, 0);
        for second in 2..2000 {
            meters.take([(DISK, reading(start, second))]);
        }
        assert_eq!(meters.disks[&DISK].readings.len(), READINGS_MAX);
        meters.take([]);
        assert!(meters.disks.is_empty(), "a disk that left is forgotten");
    }
}
