//! Patient device I/O: retries what an outage breaks, and tells how things stand.
//!
//! Invariants:
//! * A write that failed is issued again with the same bytes to the same blocks, never elsewhere. Who gives up instead
//!   ([`Io::giving_up`]) can do with what was there, what was meant, or a part of it.
//! * After a failed flush, or when the device's epoch rose, everything that the flush was to cover is
//!   written again before the next one: a flush that succeeds later proves nothing about writes that
//!   a target's restart dropped (rule C1).
//! * The outcome of a compare-and-write that failed is unknown: it is resolved by reading, in `slot`.

mod attempts;

pub use attempts::{Attempts, Errors};

use crate::buf::AlignedBuf;
use crate::device::{BlockDevice, Device};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::sabotage::{self, Bug};
use crate::types::{BLOCK_SIZE, Gba};
use bytes::Bytes;
use parking_lot::Mutex;
use serde::Serialize;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// Requests that one operation keeps under way at once.
const IN_FLIGHT_MAX: usize = 8;

/// Milliseconds since 1970.
#[must_use]
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// How the store's device does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Health {
    /// The last operation was answered.
    pub reachable: bool,
    /// Since when `reachable` has had its value, milliseconds since 1970.
    pub since_ms: u64,
    /// The error that is being retried, or the last one that was.
    pub last_error: Option<String>,
    /// When that was, milliseconds since 1970.
    pub last_error_ms: Option<u64>,
    /// Operations that wait for free space in the store now.
    pub waiting_for_space: u32,
    /// Operations that wait now because the device, a thin one, has no space for blocks that are free in the store.
    pub waiting_for_device_space: u32,
    /// Times that a commit was written again because the device may have lost it.
    pub rewrites: u64,
}

impl Health {
    /// Somebody waits for space: a cycle of collection, and the unmapping after it, may find some.
    #[must_use]
    pub fn lacks_space(&self) -> bool {
        self.waiting_for_space > 0 || self.waiting_for_device_space > 0
    }
}

/// How long an operation keeps trying.
#[derive(Clone, Copy, Debug)]
pub enum Patience {
    /// Until the store closes.
    Forever,
    /// This long. Only for reads: a write of which the caller stopped waiting may land at any later
    /// time, so writes in place are issued by tasks that nobody stops.
    Limited(Duration),
}

/// The device, its health, and a caller's patience. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Io {
    device: Device,
    shared: Arc<Shared>,
    patience: Patience,
    on_refusal: OnRefusal,
}

/// What becomes of a write or a compare-and-write that the device refuses lastingly, as opposed to an outage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnRefusal {
    /// It is tried again.
    Retry,
    /// The same, but if what a thin device lacks is space, only for a moment.
    EndIfFull,
    /// It ends at once, and so does a read.
    End,
}

#[derive(Debug)]
struct Shared {
    health: Mutex<Health>,
    closing: watch::Sender<bool>,
}

/// What to write where: pieces go one after the other from the address on.
pub type Write = (Gba, Vec<Bytes>);

impl Io {
    /// Wraps a device.
    #[must_use]
    pub fn new(device: Device, patience: Patience) -> Self {
        let health = Health { reachable: true, since_ms: now_ms(), ..Health::default() };
        let shared = Shared { health: Mutex::new(health), closing: watch::channel(false).0 };
        Self { device, shared: Arc::new(shared), patience, on_refusal: OnRefusal::Retry }
    }

    /// The same device with another patience.
    #[must_use]
    pub fn with_patience(&self, patience: Patience) -> Self {
        Self { patience, ..self.clone() }
    }

    /// The same device for work that can be left undone, where what must not wait would wait for it: an error that concerns the
    /// blocks in question (a bad sector; no space for them on a thin device) ends a read, a write or a compare-and-write at once,
    /// and says nothing of the device's health. Outages are waited out, and flushes repeated, as ever.
    #[must_use]
    pub fn giving_up(&self) -> Self {
        Self { on_refusal: OnRefusal::End, ..self.clone() }
    }

    /// The same device for who holds what others need to give space back (the registry, a disk): that a thin device has no space for
    /// blocks never written ends a write or a compare-and-write after a moment. All else is retried as ever.
    ///
    /// A write that ended so will not land later, and an earlier attempt at it neither.
    #[must_use]
    pub fn unless_full(&self) -> Self {
        Self { on_refusal: OnRefusal::EndIfFull, ..self.clone() }
    }

    /// Which errors end a write or a compare-and-write.
    pub(crate) fn errors_of_changes(&self) -> Errors {
        match self.on_refusal {
            OnRefusal::Retry => Errors::AllAreRetried,
            OnRefusal::EndIfFull => Errors::FullIsFinal,
            OnRefusal::End => Errors::LastingAreFinal,
        }
    }

    /// How long operations keep trying.
    #[must_use]
    pub fn patience(&self) -> Patience {
        self.patience
    }

    /// The device underneath.
    #[must_use]
    pub fn device(&self) -> &dyn BlockDevice {
        self.device.as_ref()
    }

    /// Names the device in messages.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.device.info().url
    }

    /// How the device does.
    #[must_use]
    pub fn health(&self) -> Health {
        self.shared.health.lock().clone()
    }

    /// Makes every operation, waiting or new, fail with `Closing`.
    pub fn close(&self) {
        self.shared.closing.send_replace(true);
    }

    /// True after [`close`](Self::close).
    #[must_use]
    pub fn is_closing(&self) -> bool {
        *self.shared.closing.borrow()
    }

    /// Resolves when the store closes.
    pub async fn closed(&self) {
        let mut receiver = self.shared.closing.subscribe();
        // An error means that the sender is gone, which it is not while `self` lives.
        let _ = receiver.wait_for(|closing| *closing).await;
    }

    /// Starts a series of attempts.
    #[must_use]
    pub fn attempts(&self) -> Attempts<'_> {
        Attempts::new(self)
    }

    /// Reads `blocks` blocks.
    ///
    /// # Errors
    /// `Closing`, `Unreachable` when patience ends, `Device` for lasting errors.
    pub async fn read(&self, gba: Gba, blocks: u64) -> Result<AlignedBuf> {
        let len = blocks as usize * BLOCK_SIZE;
        let mut attempts = self.attempts();
        loop {
            let operation = self.device.read(gba.byte_offset(), len);
            if let Some(buf) = attempts.once(operation, Errors::LastingAreFinal).await? {
                return Ok(buf);
            }
        }
    }

    /// Writes, without making it durable.
    ///
    /// # Errors
    /// As [`read`](Self::read); lasting errors of the device are retried like an outage, unless this [gives up](Self::giving_up), or
    /// [does if there is no space](Self::unless_full).
    pub async fn write(&self, gba: Gba, data: Vec<Bytes>) -> Result<()> {
        let mut attempts = self.attempts();
        loop {
            let operation = self.device.write(gba.byte_offset(), data.clone());
            if attempts.once(operation, self.errors_of_changes()).await?.is_some() {
                return Ok(());
            }
        }
    }

    /// Performs writes, several at once.
    ///
    /// # Errors
    /// As [`write`](Self::write). Some of the writes may have been performed.
    pub async fn write_all(&self, writes: &[Write]) -> Result<()> {
        if let [(gba, data)] = writes {
            return self.write(*gba, data.clone()).await;
        }
        let mut running: JoinSet<Result<()>> = JoinSet::new();
        let mut outcome = Ok(());
        for (gba, data) in writes {
            if running.len() >= IN_FLIGHT_MAX {
                outcome = join_one(&mut running).await;
            }
            if outcome.is_err() {
                break;
            }
            let (io, gba, data) = (self.clone(), *gba, data.clone());
            running.spawn(async move { io.write(gba, data).await });
        }
        // All of them end before this does: one that was left alone might land after a later write of the same block.
        while !running.is_empty() {
            outcome = outcome.and(join_one(&mut running).await);
        }
        outcome
    }

    /// Reads many runs of blocks, several at once; results in the order asked for.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn read_all(&self, runs: &[(Gba, u64)]) -> Result<Vec<Bytes>> {
        if let [(gba, blocks)] = runs {
            return Ok(vec![self.read(*gba, *blocks).await?.freeze()]);
        }
        let mut results = vec![Bytes::new(); runs.len()];
        let mut running: JoinSet<Result<(usize, AlignedBuf)>> = JoinSet::new();
        let mut next = 0;
        while next < runs.len() || !running.is_empty() {
            while next < runs.len() && running.len() < IN_FLIGHT_MAX {
                let (io, index, (gba, blocks)) = (self.clone(), next, runs[next]);
                running.spawn(async move { Ok((index, io.read(gba, blocks).await?)) });
                next += 1;
            }
            let (index, buf) = join_one(&mut running).await?;
            results[index] = buf.freeze();
        }
        Ok(results)
    }

    /// Writes and flushes, again from the start whenever the device may have lost something.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn write_durable(&self, writes: &[Write]) -> Result<()> {
        let mut attempts = self.attempts();
        loop {
            let epoch = self.device.epoch();
            self.write_all(writes).await?;
            if self.flush_since(epoch, &mut attempts).await? {
                return Ok(());
            }
        }
    }

    /// Writes, and flushes if asked to, as [`write_durable`](Self::write_durable) does, but for what the device lastingly refuses, which
    /// is returned, by its place in `writes`. All else is written. Nothing is refused unless this [gives up](Self::giving_up).
    ///
    /// # Errors
    /// What does not concern single blocks; a flush that is refused until patience ends, too.
    pub async fn write_taken(
        &self,
        writes: &[Write],
        durably: bool,
    ) -> Result<Vec<(usize, StoreError)>> {
        let mut left: Vec<(usize, Write)> = writes.iter().cloned().enumerate().collect();
        let mut refused = Vec::new();
        // What was refused slowly does not take from the patience with flushes.
        let mut attempts = None;
        loop {
            let epoch = self.device.epoch();
            let all: Vec<Write> = left.iter().map(|(_, write)| write.clone()).collect();
            if let Err(error) = self.write_all(&all).await {
                if !error.is_of_blocks() {
                    return Err(error);
                }
                // Which of them it was is found out one by one.
                let mut taken = Vec::new();
                for (index, write) in left {
                    match self.write_all(std::slice::from_ref(&write)).await {
                        Ok(()) => taken.push((index, write)),
                        Err(error) if error.is_of_blocks() => refused.push((index, error)),
                        Err(error) => return Err(error),
                    }
                }
                left = taken;
            }
            if !durably || left.is_empty() {
                return Ok(refused);
            }
            let attempts = attempts.get_or_insert_with(|| self.attempts());
            if self.flush_since(epoch, attempts).await? {
                return Ok(refused);
            }
        }
    }

    /// Flushes; false if what was written since `epoch` was taken may be lost and must be written
    /// again.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn flush_since(&self, epoch: u64, attempts: &mut Attempts<'_>) -> Result<bool> {
        let flushed = attempts.once(self.device.flush(), Errors::AllAreRetried).await?.is_some();
        let same = self.device.epoch() == epoch || sabotage::on(Bug::BarrierIgnoresEpoch);
        let kept = flushed && same;
        if !kept {
            self.shared.health.lock().rewrites += 1;
        }
        Ok(kept)
    }

    /// Notes that an operation waits for free space, until the guard is dropped.
    pub(crate) fn waiting_for(&self, space: Lacking) -> SpaceWaiter {
        *space.waiting(&mut self.shared.health.lock()) += 1;
        SpaceWaiter { shared: Arc::clone(&self.shared), space }
    }

    /// Waits, as long as this patience lasts, for a task that goes on by itself.
    ///
    /// # Errors
    /// The task's own, `Unreachable` when patience ends, `Closing`.
    pub(crate) async fn await_task<T>(&self, task: JoinHandle<Result<T>>) -> Result<T> {
        let ended = match self.patience {
            Patience::Forever => task.await,
            Patience::Limited(limit) => {
                tokio::time::timeout(limit, task).await.map_err(|_| self.no_answer(limit))?
            }
        };
        ended.unwrap_or_else(|_| Err(self.closing_error()))
    }

    fn no_answer(&self, limit: Duration) -> StoreError {
        StoreError::new(
            StoreErrorKind::Unreachable,
            self.url(),
            format!(
                "the device did not answer within {} s; check the path to it, then see whether the \
                 operation has taken effect",
                limit.as_secs_f32()
            ),
        )
    }

    fn note_success(&self) {
        let mut health = self.shared.health.lock();
        if !health.reachable {
            health.reachable = true;
            health.since_ms = now_ms();
            tracing::info!(device = self.url(), "the store's device answers again");
        }
    }

    /// A lack of space on the device is an error, and no outage.
    fn note_failure(&self, error: &dyn fmt::Display, lacks_space: bool) {
        let mut health = self.shared.health.lock();
        health.last_error = Some(error.to_string());
        health.last_error_ms = Some(now_ms());
        if health.reachable && !lacks_space {
            health.reachable = false;
            health.since_ms = now_ms();
            tracing::warn!(%error, "the store's device does not answer; retrying");
        }
    }

    /// Somebody waits because the device has no space for what is new.
    pub(crate) fn note_full(&self, error: &StoreError) {
        self.note_failure(error, true);
    }

    pub(crate) fn closing_error(&self) -> StoreError {
        StoreError::new(StoreErrorKind::Closing, self.url(), "the store is closing")
    }
}

/// Where there is no free space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lacking {
    /// In the store: whoever gives blocks back helps, and whoever claims some harms.
    InStore,
    /// On the device, which is thin: its space comes back when it is told of free blocks, or extended.
    OnDevice,
}

impl Lacking {
    fn waiting(self, health: &mut Health) -> &mut u32 {
        match self {
            Self::InStore => &mut health.waiting_for_space,
            Self::OnDevice => &mut health.waiting_for_device_space,
        }
    }
}

/// Lives while an operation waits for free space.
#[derive(Debug)]
pub(crate) struct SpaceWaiter {
    shared: Arc<Shared>,
    space: Lacking,
}

impl SpaceWaiter {
    /// What it waits for.
    pub(crate) fn space(&self) -> Lacking {
        self.space
    }
}

impl Drop for SpaceWaiter {
    fn drop(&mut self) {
        *self.space.waiting(&mut self.shared.health.lock()) -= 1;
    }
}

async fn join_one<T: 'static>(running: &mut JoinSet<Result<T>>) -> Result<T> {
    match running.join_next().await {
        Some(Ok(result)) => result,
        Some(Err(error)) => {
            Err(StoreError::new(StoreErrorKind::Closing, "device I/O", error.to_string()))
        }
        None => Err(StoreError::new(StoreErrorKind::Closing, "device I/O", "nothing under way")),
    }
}
