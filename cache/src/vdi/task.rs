//! The loop: what the worker, the pool, the cache and the clock tell the task, and what it keeps. What it does about them is
//! in the modules beside this one.

use super::admission::Admission;
use super::as_of::AsOf;
use super::command::Command;
use super::commit::{CommitUnderWay, Drafting, joined};
use super::cuts::{MadeCuts, Pressed};
use super::drain::Waiter;
use super::evict::Evictions;
use super::hydrate::Hydration;
use super::lend::Loans;
use super::offline::Offline;
use super::pin::Lost;
use super::ration::Ration;
use super::slope::Slope;
use super::state::{Phase, Segments, VdiStatus};
use super::through::Through;
use crate::backing::Backing;
use crate::backing::deferred::Deferred;
use crate::desk::{Closing, Desk};
use crate::disk::Progress;
use crate::disk::plan::SegmentId;
use crate::error::CacheError;
use crate::flusher::FlushOptions;
use crate::format::slot::{SlotVdi, VdiSlot};
use crate::link::{DiskSender, FetchError, FromDisk, ToDisk, WORKER_PANICKED};
use crate::log_open::Ground;
use crate::pool::PoolMessage;
use blockstore::types::{BLOCK_SIZE, Lba, Lsn};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use uuid::Uuid;

/// How often ages are looked at and markers written.
const TICK: Duration = Duration::from_millis(250);
/// Ticks between two marker requests.
const TICKS_PER_MARKER: u32 = 4;
/// Ticks between two looks at whether the slot should say how far the log reaches, while nothing is committed.
const TICKS_PER_NOTE: u32 = 40;
/// How long a commit under way may still take when the task stops.
const FINISH_WITHIN: Duration = Duration::from_secs(2);
/// After a commit failed for good, how long until it is tried again.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(5);

/// What a task starts with.
#[derive(Debug)]
pub(crate) struct VdiTaskParts {
    pub vdi: Uuid,
    pub ground: Ground,
    pub backing: Arc<Deferred>,
    pub options: FlushOptions,
    /// Bytes of images kept over all disks, and how many may be.
    pub images_held: Arc<AtomicUsize>,
    pub images_max: usize,
    pub slot: VdiSlot,
    pub record: SlotVdi,
    /// Where the log ended when it was attached: a store that is further had another log.
    pub recovered: Lsn,
    pub segments: Segments,
    pub sender: DiskSender,
    pub from_disk: mpsc::UnboundedReceiver<FromDisk>,
    pub from_pool: mpsc::UnboundedReceiver<PoolMessage>,
    pub status: Arc<Mutex<VdiStatus>>,
    pub progress: Arc<Progress>,
    /// For snapshots.
    pub desk: Arc<Desk>,
    /// Those of a cadence that commits have made.
    pub made: Arc<Mutex<MadeCuts>>,
}

pub(crate) struct VdiTask {
    pub(super) p: VdiTaskParts,
    commands: mpsc::Receiver<Command>,
    pub(super) commit: Option<CommitUnderWay>,
    /// The batch after the one under way.
    pub(super) drafting: Option<Drafting>,
    pub(super) not_before: Instant,
    pub(super) retry_after: Duration,
    /// The segment that is open, and when its first record went out.
    pub(super) open_since: Option<(SegmentId, Instant)>,
    pub(super) roll_under_way: Option<u64>,
    pub(super) next_roll: u64,
    pub(super) waiters: Vec<Waiter>,
    pub(super) evictions: Evictions,
    pub(super) starving: bool,
    pub(super) admission: Admission,
    pub(super) slope: Slope,
    /// The newest segment, if a writer that is slowed down has it in parts.
    pub(super) ration: Option<Ration>,
    /// When there is more of it.
    pub(super) feed_at: Option<Instant>,
    pub(super) started: Instant,
    /// The slot on the device does not say yet what was committed: nothing may turn clean (rule L2).
    pub(super) checkpoint_due: bool,
    /// The slot does not say yet that the store has joined: nothing is committed before it does, unless no leg is left.
    pub(super) join_unnoted: bool,
    /// The worker is gone: nothing can be rolled or evicted.
    pub(super) released: bool,
    ticks: u32,
    /// The last commit failed; it is tried again.
    pub(super) failure: Option<String>,
    /// The log takes no more writes. Cleared only by recovery, and only if the local device is not to blame.
    pub(super) log_failure: Option<String>,
    pub(super) offline: Offline,
    pub(super) device_failed: bool,
    /// How often in a row the device refused the slot of a disk that waits.
    pub(super) refusals: u32,
    /// No leg is left: the store takes their place, or is about to.
    pub(super) through: Option<Through>,
    /// Reads that wait for the worker to hand over what it has in memory.
    pub(super) unreadable: Vec<(u64, Lba, u32)>,
    pub(super) hydration: Option<Hydration>,
    pub(super) lost: Lost,
    pub(super) as_of: AsOf,
    pub(super) loans: Loans,
    pub(super) pressed: Pressed,
    /// The last LSN of any batch that was sent to the store, whatever became of it.
    pub(super) sent: Lsn,
    /// Last LSN given out, once released.
    pub(super) last_staged: Lsn,
}

impl VdiTask {
    pub fn new(parts: VdiTaskParts, commands: mpsc::Receiver<Command>) -> Self {
        Self {
            p: parts,
            commands,
            commit: None,
            drafting: None,
            not_before: Instant::now(),
            retry_after: RETRY_AFTER,
            open_since: None,
            roll_under_way: None,
            next_roll: 1,
            waiters: Vec::new(),
            evictions: Evictions::new(),
            starving: false,
            admission: Admission::default(),
            slope: Slope::default(),
            ration: None,
            feed_at: None,
            started: Instant::now(),
            checkpoint_due: false,
            join_unnoted: false,
            released: false,
            ticks: 0,
            failure: None,
            log_failure: None,
            offline: Offline::default(),
            hydration: None,
            lost: Lost::default(),
            as_of: AsOf::default(),
            loans: Loans::default(),
            pressed: Pressed::default(),
            sent: Lsn(0),
            device_failed: false,
            refusals: 0,
            through: None,
            unreadable: Vec::new(),
            last_staged: Lsn(0),
        }
    }

    pub async fn run(mut self) {
        let _closing = Closing(Arc::clone(&self.p.desk));
        self.offer_clean();
        self.p.ground.pool.came_up(self.p.vdi);
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.update_status();
            tokio::select! {
                biased;
                Some(message) = self.p.from_disk.recv() => self.on_disk(message).await,
                Some(message) = self.p.from_pool.recv() => self.on_pool(message).await,
                result = joined(&mut self.commit) => self.committed(result).await,
                command = self.commands.recv() => match command {
                    Some(command) => if self.command(command).await { break },
                    None => break,
                },
                () = reached(self.feed_at) => self.feed(),
                _ = tick.tick() => self.tick().await,
            }
            self.start_commit();
        }
        self.end_hydration();
        self.loans.end().await;
        if let Some(commit) = self.commit.take() {
            // A commit may be cut anywhere: the head changes atomically and the log is kept. But one that is about to
            // finish had better.
            let abort = commit.task.abort_handle();
            if tokio::time::timeout(FINISH_WITHIN, commit.task).await.is_err() {
                abort.abort();
            }
        }
        self.p.ground.pool.unregister(self.p.vdi);
    }

    pub(super) async fn on_disk(&mut self, message: FromDisk) {
        match message {
            FromDisk::FetchHeld { id, lba, blocks } => self.fetch_held(id, lba, blocks),
            FromDisk::Fetch { id, lba, blocks } => {
                if !self.hold_fetch(id, lba, blocks) {
                    self.fetch(id, lba, blocks);
                }
            }
            FromDisk::Unreadable { id, lba } => self.unreadable(id, lba).await,
            FromDisk::WantSegment => {
                self.starving = true;
                tracing::trace!(counts = ?self.p.ground.pool.counts(), pressure = ?self.pressure(), "segment wanted");
                self.feed();
            }
            FromDisk::Opened { segment } => self.open_since = Some((segment, Instant::now())),
            FromDisk::Sealed(sealed) if self.through.is_some() => self.take_memory(sealed),
            FromDisk::NoLegLeft { reason, tail, flushed } => {
                self.no_leg_left(&reason, tail, flushed).await;
            }
            FromDisk::Sealed(sealed) => {
                // The next one may have been opened before this one was sealed: it has an age of its own.
                self.open_since = self.open_since.filter(|(open, _)| *open != sealed.id);
                self.learn_cuts(&sealed);
                let seq = sealed.seq;
                let (held, most) = (&self.p.images_held, self.p.images_max);
                self.p.segments.push_sealed(sealed, Instant::now(), held, most);
                // Segments without uncommitted records are clean at once.
                self.offer_clean();
                self.ration_sealed(seq);
            }
            FromDisk::Rolled { id, lsn } => {
                self.roll_under_way = self.roll_under_way.filter(|roll| *roll != id);
                for waiter in self.waiters.iter_mut().filter(|waiter| waiter.roll == id) {
                    waiter.lsn = Some(lsn);
                }
                self.show_undrained(id);
                self.answer_waiters();
            }
            FromDisk::Unused { segment } => self.p.ground.pool.release(segment, false),
            FromDisk::Pinned { segment } => self.is_pinned(segment),
            FromDisk::Evicted { segment } => self.was_evicted(segment).await,
            // Disks hold back what waits for this leg until the others say durably that it is none.
            FromDisk::LegFailed { leg, joining, reason } => {
                self.p.ground.local.leg_failed(leg, joining, &reason).await
            }
            FromDisk::LegSilent { leg, joining } => {
                // Not waited for: the other leg may be as slow.
                let local = Arc::clone(&self.p.ground.local);
                tokio::spawn(async move { local.leg_silent(leg, joining).await });
            }
            // What is left of its log is in memory; see `tick`.
            FromDisk::LegJoined { .. } if self.through.is_some() => {}
            FromDisk::LegJoined { id } => {
                let mut sealed: Vec<_> = self.p.segments.ids().collect();
                sealed.extend(self.evictions.dead());
                self.p.ground.pool.disk_joined(self.p.vdi, Some(id), Some(&sealed));
            }
            FromDisk::BootTrace { ranges } => self.keep_trace(ranges).await,
            message @ (FromDisk::Planned { .. } | FromDisk::Kept { .. }) => {
                if let Some(hydration) = &self.hydration {
                    hydration.answer(message);
                }
            }
            FromDisk::Lent { id, places } => self.lent(id, places),
            FromDisk::Holes { id, holes } => self.loans.tell_holes(id, holes),
            FromDisk::SnapshotTaken { id, result } => self.p.desk.taken(id, result),
            FromDisk::Failed { reason } => {
                self.device_failed |= reason != WORKER_PANICKED;
                self.log_failed(reason);
            }
        }
    }

    async fn on_pool(&mut self, message: PoolMessage) {
        match message {
            PoolMessage::YourTurn => self.feed(),
            PoolMessage::Evict(_) if self.through.is_some() => {
                self.p.ground.pool.eviction_failed();
            }
            PoolMessage::Evict(id) => self.evict(id).await,
        }
    }

    async fn tick(&mut self) {
        self.ticks += 1;
        if (self.released || self.device_failed)
            && self.p.ground.pool.awaited().contains(&self.p.vdi)
        {
            // No worker writes its segments any more.
            self.p.ground.pool.disk_joined(self.p.vdi, None, None);
        }
        if self.p.from_disk.is_closed() {
            // It ended without a word.
            self.fail_asked("the disk's worker is gone");
        }
        if self.through.is_some() {
            return self.tick_offline();
        }
        self.tick_evictions().await;
        if self.checkpoint_due && self.ticks.is_multiple_of(TICKS_PER_MARKER) {
            self.checkpoint().await;
        }
        if self.ticks.is_multiple_of(TICKS_PER_NOTE) {
            self.note_durable().await;
        }
        if self.ticks.is_multiple_of(TICKS_PER_MARKER) && !self.released {
            self.p.sender.send(ToDisk::Tick);
            let waits = self.starving || !self.waiters.is_empty();
            self.probe_device(waits).await;
        }
        self.feed();
        self.tick_offline();
        self.tick_pin();
        let aged = self.open_since.is_some_and(|(_, since)| since.elapsed() >= self.max_age());
        // With the store away a segment is filled before it is sealed: a trickle must not use up the ring.
        if aged && self.roll_under_way.is_none() && self.pressure().store_answers {
            self.roll();
        }
    }

    fn max_age(&self) -> Duration {
        Duration::from_millis(self.p.options.max_age_ms)
    }

    /// The log takes no more writes. Final: what is in it and not sealed waits for the next recovery.
    pub(super) fn log_failed(&mut self, reason: String) {
        tracing::error!(vdi = %self.p.record.name, %reason, "the log failed");
        self.fail_waiters(&reason);
        self.p.desk.close(&format!("its log has failed ({reason})"));
        self.fail_asked(&reason);
        self.log_failure.get_or_insert(reason);
    }

    /// Who asked for a snapshot, or for a look at the log, gets no other answer.
    pub(super) fn fail_asked(&mut self, why: &str) {
        self.p.desk.fail(why);
        self.fail_looks(why);
        self.loans.worker_is_gone();
    }

    pub(super) fn log_is_sound(&self) -> Result<(), CacheError> {
        match &self.log_failure {
            Some(why) => Err(CacheError::Flush { vdi: self.p.vdi, why: why.clone() }),
            None => Ok(()),
        }
    }

    pub(super) fn fetch(&self, id: u64, lba: Lba, blocks: u32) {
        self.p.status.lock().fetched_bytes += u64::from(blocks) * BLOCK_SIZE as u64;
        let (backing, sender) = (Arc::clone(&self.p.backing), self.p.sender.clone());
        let name = self.p.record.name.clone();
        let lender = self.lender();
        // One task per fetch: as many as the guest's queues hold requests, not more.
        tokio::spawn(async move {
            let (read, keep) = match lender {
                Some(lender) => tokio::select! {
                    biased;
                    read = backing.read(lba, blocks) => (read, true),
                    // Nothing of a clone that waits for the store can be evicted: what another disk holds for it is not kept twice.
                    lent = lender.read(lba, blocks) => (Ok(lent), false),
                },
                None => (backing.read(lba, blocks).await, true),
            };
            let result = read.map_err(|error| {
                tracing::error!(vdi = %name, lba = lba.0, blocks, %error, "a read from the store failed");
                FetchError(error.to_string())
            });
            sender.send(ToDisk::Fetched { id, result, keep });
        });
    }

    pub(super) fn note_error(&self, error: &str) {
        tracing::warn!(vdi = %self.p.record.name, %error, "cache");
        self.p.status.lock().last_error = Some(error.into());
    }

    fn update_status(&self) {
        let committed = self.p.record.committed;
        let (dirty, clean) = self.p.segments.bytes(committed);
        let oldest = self.p.segments.oldest_dirty(committed);
        let oldest = oldest.or(self.open_since.map(|(_, since)| since));
        self.p.desk.pending().retire(committed);
        let mut status = self.p.status.lock();
        status.committed_lsn = committed.0;
        status.write_through = self.through.is_some();
        status.origin = self.p.record.origin;
        let last = self.p.segments.last_lsn().unwrap_or(committed).max(committed).0;
        status.last_lsn = status.last_lsn.max(last);
        status.flushed_lsn = status.flushed_lsn.max(last);
        status.policy = self.p.record.policy.chosen;
        status.dirty_bytes = dirty;
        status.clean_bytes = clean;
        status.oldest_dirty_ms = oldest.map(|since| since.elapsed().as_millis() as u64);
        status.snapshots_waiting = self.as_of.waiting() as u64;
        status.state = match () {
            () if self.failure.is_some() || self.log_failure.is_some() => Phase::Failed,
            () if self.commit.is_some() => Phase::Flushing,
            () if oldest.is_some() => Phase::Dirty,
            () => Phase::Clean,
        };
        let through = self.through.as_ref().map(|through| &through.why);
        if let Some(why) = self.log_failure.as_ref().or(self.failure.as_ref()).or(through) {
            status.last_error = Some(why.clone());
        }
    }
}

/// Resolves at that time; never without one.
async fn reached(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
