//! Tells the device of free blocks (UNMAP, hole punching), so that a thin one gives their space back.
//!
//! To the store an unmapping is a write of nobody knows what. Blocks are claimed for it as for an allocation, their bits set
//! durably; no tree ever names them; they are given back, and not before, when the device has answered. So it is dangerous where a
//! write to fresh blocks would be, and there only:
//! * What is claimed was clear in this host's own BMap: it might as well have been given out and overwritten. Whatever may still be
//!   read, or reached by a head that may come back, is not clear there.
//! * While an unmapping is under way, nobody is given its blocks. If the device does not answer (its outcome is unknown), they stay
//!   claimed as long as this incarnation lives: that the session is over does not say that a target's worker has stopped. A write
//!   is sent again with the same bytes; this would meet other data. The same if the store is closed meanwhile, or the host dies: the bits stay set,
//!   the blocks leak until a cycle of collection of the next incarnation.
//! * Collection keeps its hands off them, as off all that is claimed (`cycle.rs`).
//!
//! Nothing rests on what the device does: unmapped blocks may read as zeros, as before, or as garbage.
//!
//! The claim holds the lock of the bitmaps, the unmapping does not: no allocation waits for the device here. At most [`BATCH_MAX`]
//! blocks are claimed, never those that a commit may need at once, and no more than stay free where no extent is left. Each
//! command is for [`STEP`] blocks: after each it is looked whether the store closes or somebody waits for room, and the rest is given
//! back then. An extent whose bitmap or record the device does not read or write is left out until the next pass (`pages/bad.rs`).

use crate::alloc::pages::{Pieces, Room};
use crate::alloc::runs::Run;
use crate::alloc::{Allocator, Purpose, add};
use crate::device::{DeviceError, DeviceErrorKind};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::io::Io;
use crate::sabotage::{self, Bug};
use crate::types::BLOCK_SIZE;
use parking_lot::Mutex;
use serde::Serialize;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;
use tokio::sync::{OwnedMutexGuard, watch};
use tokio::time::Instant;

/// Most blocks claimed at once: 64 MiB. Neither a command nor what a crash leaks is large.
const BATCH_MAX: u64 = 16_384;
/// Most blocks of one command: 16 MiB, or one piece of the device if that is more. So much is waited for before a batch is broken off.
const STEP: u64 = 4096;
/// Least blocks of a run that is worth a command: 1 MiB, less where extents are small.
const RUN_MIN: u64 = 256;
const RUN_MIN_SMALL: u64 = 16;
/// Unmappings that fail one after the other until a pass is given up.
const FAILURES_MAX: u32 = 4;
/// Unmappings of unknown outcome until this incarnation stops: each keeps its blocks, at most [`BATCH_MAX`], and costs guests a session.
const UNKNOWN_MAX: u32 = 4;
/// Longest rest for what the device took: an outage may have been in that.
const REST_MAX: Duration = Duration::from_secs(10);

/// How to unmap.
#[derive(Clone, Copy, Debug, Default)]
pub struct UnmapOptions {
    /// Most bytes unmapped in a second; none: as many as the device takes.
    pub rate: Option<u64>,
    /// Least blocks of a run; none: as the store's size has it.
    pub run_min: Option<u64>,
}

/// What became of unmapping since the store was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Unmapped {
    /// Blocks that the device was told of, and said yes.
    pub blocks: u64,
    /// Times that it was.
    pub runs: u64,
    /// Times that it refused, or that nobody knows what it did.
    pub failures: u64,
    /// What the last of those said.
    pub last_failure: Option<String>,
    /// The device cannot, or said that it cannot when it was asked to.
    pub unsupported: bool,
    /// Extents that the last pass left out, because the device did not read or write their bitmap or their record.
    pub extents_left_out: u64,
    /// What it said about the last of those.
    pub last_left_out: Option<String>,
}

/// State of an allocator's unmapping.
#[derive(Debug, Default)]
pub(super) struct Unmapping {
    done: Mutex<Unmapped>,
    /// One pass at a time. What a pass has begun holds it too, as that goes on when the pass is dropped.
    pass: Arc<tokio::sync::Mutex<()>>,
    /// The store is about to close.
    stopping: watch::Sender<bool>,
    /// Extents that were left out, and that was said.
    left_out: Mutex<BTreeSet<u32>>,
    /// The last unmapping failed, and that was said.
    failing: AtomicBool,
    /// How often nobody knows what became of one.
    unknown: AtomicU32,
}

/// A pass under way.
type Pass = Arc<OwnedMutexGuard<()>>;

/// Blocks claimed of one page.
#[derive(Debug)]
struct Batch {
    place: (u32, u32),
    runs: Vec<Run>,
    /// The bit at which to go on.
    next: Option<u64>,
}

/// How a batch ended.
#[derive(Debug)]
struct Ended {
    next: Option<u64>,
    blocks: u64,
    took: Duration,
    /// Unmappings of it that failed after the last that did not.
    failures: u32,
    /// At least one did not.
    some: bool,
}

/// What is known of an unmapping.
#[derive(Debug)]
enum Outcome {
    Done,
    /// The device refused: it will not land later.
    Failed(DeviceError),
    /// Whether it was carried out is unknown. A target may go on with it after the session that sent it is over, and slowly: what it is
    /// about is not given out in this life of the agent.
    Unknown(DeviceError),
}

impl Allocator {
    /// From now on extents that are all free are given up only after the device was told, in a [pass](Self::unmap); or no more.
    /// True if the device can be told.
    pub(crate) async fn keep_unmapped(&self, io: &Io, wanted: bool) -> bool {
        let can = io.device().info().discard && !self.unmapping.done.lock().unsupported;
        if wanted && !can {
            self.note_unsupported(io, "it has neither UNMAP nor a way to punch holes");
        }
        self.pages.lock().await.set_unmaps(wanted && can);
        can
    }

    /// What became of unmapping so far.
    #[must_use]
    pub fn unmapped(&self) -> Unmapped {
        self.unmapping.done.lock().clone()
    }

    /// Blocks that are claimed only for being unmapped.
    #[must_use]
    pub fn in_unmapping(&self) -> u64 {
        self.pools.lock().unmapping.len()
    }

    /// Ends the pass that is under way, and waits until what it has begun is over.
    pub(crate) async fn stop_unmapping(&self, io: &Io) {
        self.unmapping.stopping.send_replace(true);
        tokio::select! {
            biased;
            () = io.closed() => {}
            _ = self.unmapping.pass.lock() => {}
        }
    }

    /// Tells the device of the free blocks of this host's extents that it was not told of. Blocks in the pool are left
    /// out: they are used next. Ends early when the store is short of space or unmapping keeps failing; what is left is the next pass's.
    ///
    /// Dropped, it ends after what it has begun.
    ///
    /// # Errors
    /// `Closing`, those of bitmaps and records. That the device refuses is none.
    pub(crate) async fn unmap(self: &Arc<Self>, io: &Io, options: UnmapOptions) -> Result<()> {
        let pass: Pass = Arc::new(Arc::clone(&self.unmapping.pass).lock_owned().await);
        if !self.keep_unmapped(io, true).await {
            return Ok(());
        }
        let extents = self.pages.lock().await.stale_extents(&self.territory);
        self.unmapping.done.lock().extents_left_out = 0;
        let mut failures = 0;
        for extent in extents {
            if self.is_hindered(io) {
                break;
            }
            match self.unmap_extent(io, &pass, extent, options, &mut failures).await {
                Err(error) if error.kind == StoreErrorKind::Closing => return Err(error),
                // One bad extent does not keep the others from being unmapped.
                Err(error) => self.note_left_out(io, extent, &error),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// An extent's part of a pass. `failures` is how many unmappings have failed one after the other.
    async fn unmap_extent(
        self: &Arc<Self>,
        io: &Io,
        pass: &Pass,
        extent: u32,
        options: UnmapOptions,
        failures: &mut u32,
    ) -> Result<()> {
        let gives_up =
            |failures| failures >= FAILURES_MAX || self.unmapping.done.lock().unsupported;
        let Some((pages, _)) = self.pages.lock().await.pages_of(extent) else { return Ok(()) };
        for page in 0..pages {
            let mut from = Some(0);
            while let Some(at) = from.filter(|_| !gives_up(*failures)) {
                let ended = self.unmap_some(io, pass, (extent, page), at, options).await?;
                *failures = if ended.some { ended.failures } else { *failures + ended.failures };
                from = ended.next;
                self.rest(io, &ended, options).await?;
                if self.is_hindered(io) {
                    return Ok(());
                }
            }
        }
        self.end_unmapping(io, pass, extent, gives_up(*failures)).await
    }

    /// Nothing more is to be begun now.
    fn is_hindered(&self, io: &Io) -> bool {
        *self.unmapping.stopping.borrow() || io.health().waiting_for_space > 0
    }

    /// Guests' requests go to the same device: it gets as long a rest as it took, or as the rate wants.
    async fn rest(&self, io: &Io, ended: &Ended, options: UnmapOptions) -> Result<()> {
        let bytes = (ended.blocks * BLOCK_SIZE as u64) as f64;
        let by_rate = options.rate.map_or(0.0, |rate| bytes / rate.max(1) as f64);
        let pause = Duration::from_secs_f64(by_rate).max(ended.took.min(REST_MAX));
        let mut stopping = self.unmapping.stopping.subscribe();
        tokio::select! {
            biased;
            () = io.closed() => Err(io.closing_error()),
            _ = stopping.wait_for(|stopping| *stopping) => Ok(()),
            () = tokio::time::sleep(pause) => Ok(()),
        }
    }

    /// Unmaps some free blocks of a page, from bit `from` on. In a task that nobody stops: blocks are given back only when the
    /// outcome is known.
    async fn unmap_some(
        self: &Arc<Self>,
        io: &Io,
        pass: &Pass,
        place: (u32, u32),
        from: u64,
        options: UnmapOptions,
    ) -> Result<Ended> {
        let (this, io_of_task, pass) = (Arc::clone(self), io.clone(), Arc::clone(pass));
        let task = tokio::spawn(async move {
            let _pass = pass;
            let pieces = this.pieces(&io_of_task, options);
            let batch = this.claim_batch(&io_of_task, place, from, pieces).await?;
            this.unmap_batch(&io_of_task, batch, pieces).await
        });
        io.await_task(task).await
    }

    async fn claim_batch(
        &self,
        io: &Io,
        place: (u32, u32),
        from: u64,
        pieces: Pieces,
    ) -> Result<Batch> {
        let mut pages = tokio::select! {
            biased;
            () = io.closed() => return Err(io.closing_error()),
            pages = self.pages.lock() => pages,
        };
        let mut batch = Batch { place, runs: Vec::new(), next: None };
        let Some((_, kind)) = pages.pages_of(place.0) else { return Ok(batch) };
        let pooled = self.pools.lock().of(kind).total();
        let keep = self.high_water() + self.reserve(kind, Purpose::Normal);
        let room = Room { pooled, keep };
        let found = pages.claim_stale(io, &self.territory, place, from, pieces, room).await?;
        (batch.runs, batch.next) = (found.runs, found.next);
        let mut pools = self.pools.lock();
        for run in &batch.runs {
            pools.unmapping.insert_range(run.start.0..run.start.0 + run.blocks);
            if let Some(cycle) = &mut pools.cycle {
                cycle.touch(*run);
            }
            if sabotage::on(Bug::GiveOutUnmapping) {
                add(pools.of(kind), *run);
            }
        }
        Ok(batch)
    }

    /// What is worth a command.
    fn pieces(&self, io: &Io, options: UnmapOptions) -> Pieces {
        let info = io.device().info();
        let block = BLOCK_SIZE as u64;
        let of_size = self.territory.geometry.extent_blocks / 64;
        Pieces {
            unit: (info.discard_granularity / block).max(1),
            offset: info.discard_alignment / block,
            run_min: options.run_min.unwrap_or(of_size.clamp(RUN_MIN_SMALL, RUN_MIN)).max(1),
            most: BATCH_MAX,
        }
    }

    async fn unmap_batch(&self, io: &Io, batch: Batch, pieces: Pieces) -> Result<Ended> {
        let began = Instant::now();
        let mut ended =
            Ended { next: batch.next, blocks: 0, took: Duration::ZERO, failures: 0, some: false };
        let (mut untold, mut over) = (Vec::new(), Vec::new());
        for run in batch.runs.iter().flat_map(|run| pieces.steps(*run, STEP)) {
            over.push(run);
            if ended.failures >= FAILURES_MAX
                || self.unmapping.done.lock().unsupported
                || self.is_hindered(io)
            {
                untold.push(run);
                continue;
            }
            match discard(io, run).await? {
                Outcome::Done => {
                    ended.blocks += run.blocks;
                    (ended.failures, ended.some) = (0, true);
                    self.note_done(io, run);
                }
                Outcome::Failed(error) => {
                    ended.failures += 1;
                    self.note_failure(io, &error);
                    untold.push(run);
                }
                Outcome::Unknown(error) => {
                    over.pop();
                    // The session was lost over it, and guests waited: not again soon.
                    ended.failures = FAILURES_MAX;
                    self.note_failure(io, &error);
                    if self.unmapping.unknown.fetch_add(1, Ordering::Relaxed) + 1 >= UNKNOWN_MAX {
                        self.note_unsupported(
                            io,
                            &format!("it has not answered {UNKNOWN_MAX} times"),
                        );
                    }
                }
            }
        }
        ended.took = began.elapsed();
        if !over.is_empty() && !sabotage::on(Bug::GiveOutUnmapping) {
            self.give_back(io, batch.place, &over, &untold).await?;
        }
        Ok(ended)
    }

    /// The device has answered: these blocks are free again, and those of them that it was not told of wait for the next pass.
    async fn give_back(
        &self,
        io: &Io,
        place: (u32, u32),
        over: &[Run],
        untold: &[Run],
    ) -> Result<()> {
        let mut pages = tokio::select! {
            biased;
            () = io.closed() => return Err(io.closing_error()),
            pages = self.pages.lock() => pages,
        };
        {
            let mut pools = self.pools.lock();
            for run in over {
                pools.unmapping.remove_range(run.start.0..run.start.0 + run.blocks);
            }
        }
        let outcome = pages.give_back(io, &self.territory, place, over, untold).await;
        self.freed.notify_waiters();
        outcome
    }

    /// An extent was gone through: if it is all free, it is nobody's now.
    async fn end_unmapping(
        self: &Arc<Self>,
        io: &Io,
        pass: &Pass,
        extent: u32,
        failed: bool,
    ) -> Result<()> {
        // A record is written in place: see `refill`.
        let (this, io_of_task, pass) = (Arc::clone(self), io.clone(), Arc::clone(pass));
        let task = tokio::spawn(async move {
            let _pass = pass;
            let mut pages = this.pages.lock().await;
            let outcome = pages.end_unmapping(&io_of_task, &this.territory, extent, failed).await;
            this.refresh_owned(&pages);
            this.freed.notify_waiters();
            outcome
        });
        io.await_task(task).await
    }

    fn note_done(&self, io: &Io, run: Run) {
        let mut done = self.unmapping.done.lock();
        done.blocks += run.blocks;
        done.runs += 1;
        if self.unmapping.failing.swap(false, Ordering::Relaxed) {
            tracing::info!(store = io.url(), "the device unmaps free blocks again");
        }
    }

    fn note_failure(&self, io: &Io, error: &DeviceError) {
        if error.kind == DeviceErrorKind::Unsupported {
            self.note_unsupported(io, &error.to_string());
        }
        let mut done = self.unmapping.done.lock();
        done.failures += 1;
        done.last_failure = Some(error.to_string());
        if error.kind != DeviceErrorKind::Unsupported
            && !self.unmapping.failing.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(
                store = io.url(), %error,
                "the device could not be told of free blocks; nothing is lost, their space stays taken there until it can"
            );
        }
    }

    /// Said once for each extent.
    fn note_left_out(&self, io: &Io, extent: u32, error: &StoreError) {
        if self.unmapping.left_out.lock().insert(extent) {
            tracing::warn!(
                store = io.url(), extent, %error,
                "what is free in this extent is not unmapped, since the device does not read or write what describes it; the next pass \
                 tries again"
            );
        }
        let mut done = self.unmapping.done.lock();
        done.extents_left_out += 1;
        done.last_left_out = Some(error.to_string());
    }

    /// Said once.
    fn note_unsupported(&self, io: &Io, why: &str) {
        let mut done = self.unmapping.done.lock();
        if !done.unsupported {
            done.unsupported = true;
            tracing::info!(
                store = io.url(),
                "free blocks are not unmapped: the device does not support it ({why}); their space stays taken there and is used \
                 again by this store"
            );
        }
    }
}

/// Tells the device of a run.
///
/// # Errors
/// `Closing`: it may land later.
async fn discard(io: &Io, run: Run) -> Result<Outcome> {
    let (offset, len) = (run.start.byte_offset(), run.blocks * BLOCK_SIZE as u64);
    let outcome = tokio::select! {
        biased;
        () = io.closed() => return Err(io.closing_error()),
        outcome = io.device().discard(offset, len) => outcome,
    };
    match outcome {
        Ok(()) => Ok(Outcome::Done),
        Err(error) if error.kind == DeviceErrorKind::Unreachable => Ok(Outcome::Unknown(error)),
        Err(error) => Ok(Outcome::Failed(error)),
    }
}
