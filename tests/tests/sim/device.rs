//! A simulated device that takes its time, and notes what it is asked.
//!
//! Delays come before an operation (so that operations under way together overtake each other) and after it (late
//! replies), in milliseconds of the runtime's clock, from a seed of its own.

use crate::trace::Trace;
use async_trait::async_trait;
use blockstore::buf::AlignedBuf;
use blockstore::device::sim::{FaultRates, SimDevice};
use blockstore::device::{BlockDevice, CawOutcome, DeviceError, DeviceErrorKind, DeviceInfo};
use bytes::Bytes;
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Milliseconds: long enough for what is read to be changed, committed and forgotten before the reply.
const LATE_READ_MS: u64 = 4_000;
/// How long a discard takes at most, beside what all operations do.
const DISCARD_MS: u64 = 300;

/// A read that is tried three times gets through.
const ERRORS_MAX: u32 = 2;

/// How slow a device is. Shared with whoever changes it.
#[derive(Debug, Default)]
pub struct Pace {
    /// Of 100 operations, so many wait at all.
    pub share: AtomicU64,
    /// The longest wait, milliseconds.
    pub most_ms: AtomicU64,
    /// Of 1000 operations, so many come late, by up to `late_ms`.
    pub late: AtomicU64,
    /// Milliseconds.
    pub late_ms: AtomicU64,
    /// Of 1000 replies to reads, so many come later still, by up to [`LATE_READ_MS`].
    pub late_reads: AtomicU64,
    /// Of 1000 answers to guests' reads of the store, so many come as late. Commits, which read the store as well, do not.
    pub late_fetches: AtomicU64,
    /// Of 1000 flushes, so many fail, and with one of them the device for good: an agent that goes on with it could be told
    /// anything.
    pub breaks: AtomicU64,
    /// It did fail for good.
    pub broken: AtomicBool,
}

impl Pace {
    pub fn set(&self, share: u64, most_ms: u64) {
        self.share.store(share, Ordering::Relaxed);
        self.most_ms.store(most_ms, Ordering::Relaxed);
    }

    /// So many of 1000 operations come late, by up to so many milliseconds.
    pub fn set_late(&self, late: u64, late_ms: u64) {
        self.late.store(late, Ordering::Relaxed);
        self.late_ms.store(late_ms, Ordering::Relaxed);
    }
}

/// A session with a simulated device.
#[derive(Debug)]
pub struct Timed {
    name: u64,
    sim: SimDevice,
    /// Dies with it: the other leg of the same host.
    twin: Option<SimDevice>,
    pace: Arc<Pace>,
    rng: Mutex<SmallRng>,
    trace: Arc<Trace>,
    /// Where reads failed with a media error last, one after the other, if those are to pass: how often.
    passing: Option<Mutex<HashMap<u64, u32>>>,
}

impl Timed {
    pub fn new(name: u64, sim: SimDevice, pace: Arc<Pace>, seed: u64, trace: Arc<Trace>) -> Self {
        let rng = Mutex::new(SmallRng::seed_from_u64(seed));
        Self { name, sim, twin: None, pace, rng, trace, passing: None }
    }

    /// Its media errors pass: at one place there are at most [`ERRORS_MAX`] in a row. One that lasts is damage.
    pub fn with_passing_errors(self) -> Self {
        Self { passing: Some(Mutex::default()), ..self }
    }

    /// As the device reads, but for a media error that would last.
    async fn read_passing(&self, offset: u64, len: usize) -> Result<AlignedBuf, DeviceError> {
        loop {
            let result = self.sim.read(offset, len).await;
            let Some(passing) = &self.passing else { return result };
            let mut passing = passing.lock();
            if !matches!(&result, Err(error) if error.kind == DeviceErrorKind::Io) {
                passing.remove(&offset);
                return result;
            }
            let errors = passing.entry(offset).or_default();
            if *errors < ERRORS_MAX {
                *errors += 1;
                return result;
            }
        }
    }

    /// With another device of the same host.
    pub fn with_twin(self, twin: Option<SimDevice>) -> Self {
        Self { twin, ..self }
    }

    /// What is underneath.
    pub fn sim(&self) -> &SimDevice {
        &self.sim
    }

    /// Its host dies after so many operations.
    pub fn crash_after(&self, operations: u64) {
        self.sim.crash_after(operations);
    }

    /// What a guest reads was read from the store: its answer may be late.
    pub async fn answer_fetch(&self) {
        let share = self.pace.late_fetches.load(Ordering::Relaxed);
        let ms = {
            let mut rng = self.rng.lock();
            let late = share > 0 && rng.random_range(0..1000) < share;
            if late { rng.random_range(1..=LATE_READ_MS) } else { 0 }
        };
        if ms > 0 {
            tokio::time::sleep(Duration::from_millis(ms)).await;
        }
    }

    async fn wait(&self) {
        let ms = {
            let mut rng = self.rng.lock();
            let late_ms = self.pace.late_ms.load(Ordering::Relaxed);
            let late = rng.random_range(0..1000) < self.pace.late.load(Ordering::Relaxed);
            let waits = rng.random_range(0..100) < self.pace.share.load(Ordering::Relaxed);
            let most = self.pace.most_ms.load(Ordering::Relaxed);
            if late && late_ms > 0 {
                rng.random_range(1..=late_ms)
            } else if waits && most > 0 {
                rng.random_range(1..=most)
            } else {
                0
            }
        };
        if ms > 0 {
            tokio::time::sleep(Duration::from_millis(ms)).await;
        }
    }

    fn note<T>(&self, what: u64, offset: u64, len: u64, result: &Result<T, DeviceError>) {
        if let Some(twin) = &self.twin
            && self.sim.is_dead()
            && !twin.is_dead()
        {
            twin.kill_host();
        }
        let outcome = result.as_ref().map_or_else(|error| 1 + error.kind as u64, |_| 0);
        self.trace.note([self.name * 8 + what, offset, len, outcome]);
    }
}

#[async_trait]
impl BlockDevice for Timed {
    fn info(&self) -> &DeviceInfo {
        self.sim.info()
    }

    async fn read(&self, offset: u64, len: usize) -> Result<AlignedBuf, DeviceError> {
        self.wait().await;
        let result = self.read_passing(offset, len).await;
        self.note(0, offset, len as u64, &result);
        let ms = {
            let mut rng = self.rng.lock();
            let late = rng.random_range(0..1000) < self.pace.late_reads.load(Ordering::Relaxed);
            if late { rng.random_range(1..=LATE_READ_MS) } else { 0 }
        };
        tokio::time::sleep(Duration::from_millis(ms)).await;
        self.wait().await;
        result
    }

    async fn write(&self, offset: u64, data: Vec<Bytes>) -> Result<(), DeviceError> {
        let len = data.iter().map(|piece| piece.len() as u64).sum();
        self.wait().await;
        let result = self.sim.write(offset, data).await;
        self.note(1, offset, len, &result);
        self.wait().await;
        result
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        self.wait().await;
        if self.rng.lock().random_range(0..1000) < self.pace.breaks.load(Ordering::Relaxed) {
            self.pace.broken.store(true, Ordering::Relaxed);
            self.sim.set_rates(FaultRates {
                write_io: 1.0,
                flush_io: 1.0,
                ..FaultRates::default()
            });
        }
        let mut result = self.sim.flush().await;
        // Nor does any flush succeed that was under way when the device broke.
        if result.is_ok() && self.pace.broken.load(Ordering::Relaxed) {
            result = self.sim.flush().await;
        }
        self.note(2, 0, 0, &result);
        self.wait().await;
        result
    }

    async fn compare_and_write(
        &self,
        offset: u64,
        expected: Bytes,
        new: Bytes,
    ) -> Result<CawOutcome, DeviceError> {
        self.wait().await;
        let result = self.sim.compare_and_write(offset, expected, new).await;
        let written = u64::from(matches!(result, Ok(CawOutcome::Written)));
        self.note(3, offset, written, &result);
        self.wait().await;
        result
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        self.wait().await;
        // Targets take long over one.
        let ms = self.rng.lock().random_range(0..=DISCARD_MS);
        tokio::time::sleep(Duration::from_millis(ms)).await;
        let result = self.sim.discard(offset, len).await;
        self.note(4, offset, len, &result);
        self.wait().await;
        result
    }

    fn epoch(&self) -> u64 {
        self.sim.epoch()
    }
}
