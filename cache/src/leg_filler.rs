//! Copies a cache that is in use to a new leg, segment by segment, and then has it made a member.
//!
//! What must be copied and when is decided by `pool/filling.rs`; what order makes it safe is told in `local/joining.rs`. Here
//! are the loop, the limit of its pace, and its progress. One chunk is under way at a time, so that the guests' own I/O
//! waits behind little.

use crate::disk::plan::SegmentId;
use crate::error::CacheError;
use crate::local::Local;
use crate::pool::{Next, Pool};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, RwLock};
use tokio::time::Instant;
use uuid::Uuid;

/// Bytes copied at a time.
const CHUNK: u64 = 1 << 20;

/// See the module.
#[derive(Debug)]
pub struct LegFiller {
    local: Arc<Local>,
    pool: Arc<Pool>,
    /// Held by whoever opens a log: recovery looks at all legs at its start, so the set must not grow under it.
    logs_opening: Arc<RwLock<()>>,
    id: u64,
    /// The leg is given up: waiting is over.
    given_up: Arc<Notify>,
    /// Bytes a second; zero: as fast as it goes.
    rate: u64,
    /// Bytes of the current segment that are there.
    within: AtomicU64,
}

impl LegFiller {
    /// For the leg that joins as `id`: [`Pool::begin_filling`] was told first, then [`Local::begin_joining`], which said where
    /// it is heard that the leg is given up.
    #[must_use]
    pub fn new(
        local: Arc<Local>,
        pool: Arc<Pool>,
        logs_opening: Arc<RwLock<()>>,
        (id, given_up): (u64, Arc<Notify>),
        rate: u64,
    ) -> Self {
        Self { local, pool, logs_opening, id, given_up, rate, within: AtomicU64::new(0) }
    }

    /// Bytes that are there and all bytes. What is there may grow less: a log that was opened anew is copied anew.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        let geometry = &self.local.geometry;
        let all = u64::from(geometry.segments) * geometry.segment_size;
        let lacking = u64::from(self.pool.lacking()) * geometry.segment_size;
        let within = self.within.load(Ordering::Relaxed);
        ((all.saturating_sub(lacking) + within).min(all), all)
    }

    /// Disks whose workers have not said yet what they write to the new leg.
    #[must_use]
    pub fn waits_for(&self) -> Option<Vec<Uuid>> {
        Some(self.pool.awaited()).filter(|vdis| !vdis.is_empty())
    }

    /// Runs until the leg is a member.
    ///
    /// # Errors
    /// Either leg's; the new one was given up. The cache goes on as it was.
    pub async fn run(&self) -> Result<(), CacheError> {
        let filled = self.fill().await;
        self.pool.end_filling();
        if let Err(error) = &filled {
            self.local.cancel_joining(self.id, &error.to_string()).await;
        }
        filled
    }

    async fn fill(&self) -> Result<(), CacheError> {
        let mut pace = Pace { rate: self.rate, next: Instant::now() };
        let geometry = self.local.geometry;
        let slots = crate::format::Geometry::slot_offset(0, 0);
        self.copy(slots, geometry.data_start - slots, false, &mut pace).await?;
        self.within.store(0, Ordering::Relaxed);
        loop {
            match self.pool.next_to_fill() {
                Next::Done => {
                    let _no_log_opens = self.logs_opening.write().await;
                    // A log may have been opened anew before.
                    if self.pool.is_filled() {
                        return self.local.promote(self.id).await;
                    }
                }
                Next::Wait => {
                    self.local.still_joining(self.id)?;
                    tokio::select! {
                        biased;
                        () = self.pool.disk_said_something() => {}
                        () = self.given_up.notified() => {}
                    }
                }
                Next::Copy(id) => self.segment(id, false, &mut pace).await?,
                Next::Blank(id) => self.segment(id, true, &mut pace).await?,
            }
        }
    }

    async fn segment(&self, id: SegmentId, blank: bool, pace: &mut Pace) -> Result<(), CacheError> {
        let geometry = &self.local.geometry;
        let offset = geometry.segment_offset(id);
        self.copy(offset, geometry.segment_size, blank, pace).await?;
        self.within.store(0, Ordering::Relaxed);
        self.pool.filled();
        Ok(())
    }

    async fn copy(
        &self,
        offset: u64,
        len: u64,
        blank: bool,
        pace: &mut Pace,
    ) -> Result<(), CacheError> {
        for at in (0..len).step_by(CHUNK as usize) {
            let chunk = CHUNK.min(len - at);
            tokio::select! {
                        biased;
                () = pace.wait_for(chunk) => {}
                () = self.given_up.notified() => {}
            }
            self.local.fill(self.id, offset + at, chunk as usize, blank).await?;
            self.within.store(at + chunk, Ordering::Relaxed);
        }
        Ok(())
    }
}

struct Pace {
    rate: u64,
    next: Instant,
}

impl Pace {
    /// Waits until so many bytes more may go. Time that was not used is not made up for.
    async fn wait_for(&mut self, bytes: u64) {
        if self.rate == 0 {
            return;
        }
        tokio::time::sleep_until(self.next).await;
        let takes = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        self.next = self.next.max(Instant::now()) + takes;
    }
}
