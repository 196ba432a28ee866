//! The loop, see the module above.

use super::admission::{Admission, Pressure};
use super::evict::Evictions;
use super::hydrate::{HydrateError, HydrateStatus, Hydration};
use super::offline::Offline;
use super::pin::{Lost, PinError};
use super::slope::Slope;
use super::state::{Phase, Segments, VdiStatus};
use super::through::Through;
use crate::backing::deferred::Deferred;
use crate::backing::{Backing, BackingError};
use crate::cache::attach::verified;
use crate::disk::plan::SegmentId;
use crate::disk::trace::Ranges;
use crate::disk::{AttachedDisk, Progress};
use crate::error::CacheError;
use crate::flusher::{self, Drafted, FlushError, FlushOptions, Situation};
use crate::format::segment::SegmentHeader;
use crate::format::slot::{SlotVdi, VdiSlot};
use crate::link::{DiskSender, FetchError, FromDisk, ToDisk, WORKER_PANICKED};
use crate::log_open::{Ground, OpenLog, belongs};
use crate::pool::PoolMessage;
use crate::release;
use blockstore::WhenOffline;
use blockstore::sabotage::{self, Bug};
use blockstore::types::{BLOCK_SIZE, Lba, Lsn};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
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
/// A commit that takes longer means that the store is away, or as good as that.
const STORE_SLOW_AFTER: Duration = Duration::from_secs(2);
/// After a commit failed for good, how long until it is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// What the local device refused is tried again after twice as long each time, up to this: each attempt reads the batch anew.
const RETRY_LOCAL_AFTER_MAX: Duration = Duration::from_secs(60);

/// What the cache asks of the task.
#[derive(Debug)]
pub(crate) enum Command {
    /// Commit all that was acknowledged before now.
    Drain(oneshot::Sender<Result<Lsn, CacheError>>),
    /// The worker is gone; here is the disk.
    Released { disk: Box<AttachedDisk>, reply: oneshot::Sender<Result<(), CacheError>> },
    /// Does the store, whose image is at this LSN, fit the log?
    Verify { store: Lsn, reply: oneshot::Sender<Result<(), CacheError>> },
    /// The store is there.
    Join { backing: Arc<dyn Backing>, reply: oneshot::Sender<Result<(), CacheError>> },
    /// The store cannot be used.
    Refuse { why: String, reply: oneshot::Sender<()> },
    /// The worker is gone, with the disk or without: make a new one.
    Reopen(oneshot::Sender<Result<AttachedDisk, CacheError>>),
    /// The disk grew.
    Resize { bytes: u64, reply: oneshot::Sender<Result<(), CacheError>> },
    /// What becomes of requests that cannot go on without the store.
    SetWhenOffline { policy: WhenOffline, reply: oneshot::Sender<Result<(), CacheError>> },
    /// Fetch these ranges into the cache ahead of need; all of the disk if none are given.
    Hydrate {
        ranges: Option<Vec<(Lba, u64)>>,
        reply: oneshot::Sender<Result<HydrateStatus, HydrateError>>,
    },
    /// Keep what is held of it, or do not.
    Pin { on: bool, reply: oneshot::Sender<Result<(), PinError>> },
    /// End; with `forget`, the drained disk leaves the cache. Answers with the slot as it was written last.
    Stop { forget: bool, reply: oneshot::Sender<Result<VdiSlot, CacheError>> },
}

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
}

struct Waiter {
    /// Known once the worker has sealed everything.
    lsn: Option<Lsn>,
    roll: u64,
    reply: oneshot::Sender<Result<Lsn, CacheError>>,
}

#[derive(Debug)]
struct CommitUnderWay {
    task: JoinHandle<Result<Lsn, FlushError>>,
    started: Instant,
    /// Bytes of log in it.
    bytes: u64,
}

/// A batch being read and coalesced.
#[derive(Debug)]
pub(super) struct Drafting {
    task: JoinHandle<Result<Drafted, FlushError>>,
    /// Where it ends.
    lsn: Lsn,
    /// Bytes of log in it.
    bytes: u64,
}

pub(crate) struct VdiTask {
    pub(super) p: VdiTaskParts,
    commands: mpsc::Receiver<Command>,
    commit: Option<CommitUnderWay>,
    /// The batch after the one under way.
    pub(super) drafting: Option<Drafting>,
    pub(super) not_before: Instant,
    pub(super) retry_after: Duration,
    /// First record of the open segment.
    pub(super) open_since: Option<Instant>,
    roll_under_way: Option<u64>,
    next_roll: u64,
    waiters: Vec<Waiter>,
    pub(super) evictions: Evictions,
    pub(super) starving: bool,
    admission: Admission,
    slope: Slope,
    /// When a writer that is slowed down gets its next segment.
    pub(super) feed_at: Option<Instant>,
    started: Instant,
    /// The slot on the device does not say yet what was committed: nothing may turn clean (rule L2).
    pub(super) checkpoint_due: bool,
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
    /// Last LSN given out, once released.
    last_staged: Lsn,
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
            feed_at: None,
            started: Instant::now(),
            checkpoint_due: false,
            released: false,
            ticks: 0,
            failure: None,
            log_failure: None,
            offline: Offline::default(),
            hydration: None,
            lost: Lost::default(),
            device_failed: false,
            refusals: 0,
            through: None,
            unreadable: Vec::new(),
            last_staged: Lsn(0),
        }
    }

    pub async fn run(mut self) {
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

    async fn on_disk(&mut self, message: FromDisk) {
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
            FromDisk::Opened { .. } => self.open_since = Some(Instant::now()),
            FromDisk::Sealed(sealed) if self.through.is_some() => self.take_memory(sealed),
            FromDisk::NoLegLeft { reason, tail, flushed } => {
                self.no_leg_left(&reason, tail, flushed).await;
            }
            FromDisk::Sealed(sealed) => {
                self.open_since = None;
                let (held, most) = (&self.p.images_held, self.p.images_max);
                self.p.segments.push_sealed(sealed, Instant::now(), held, most);
                // Segments without uncommitted records are clean at once.
                self.offer_clean();
            }
            FromDisk::Rolled { id, lsn } => {
                self.roll_under_way = self.roll_under_way.filter(|roll| *roll != id);
                for waiter in self.waiters.iter_mut().filter(|waiter| waiter.roll == id) {
                    waiter.lsn = Some(lsn);
                }
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

    /// Returns true if the task ends.
    async fn command(&mut self, command: Command) -> bool {
        match command {
            Command::Drain(reply) => self.drain(reply),
            Command::Released { disk, reply } => {
                // What the worker said last comes before what its disk says now.
                while let Ok(message) = self.p.from_disk.try_recv() {
                    Box::pin(self.on_disk(message)).await;
                }
                let sealed = release::seal(*disk, &self.p.ground.local).await;
                self.released = true;
                self.end_hydration();
                self.starving = false;
                self.p.ground.pool.leave_queue(self.p.vdi);
                let result = match sealed {
                    Ok(sealed) => {
                        self.last_staged = sealed.last_lsn;
                        for message in sealed.messages {
                            Box::pin(self.on_disk(message)).await;
                        }
                        self.log_is_sound()
                    }
                    Err(source) => {
                        self.log_failed(format!("sealing the log: {source}"));
                        Err(CacheError::Local {
                            path: self.p.ground.local.path.clone(),
                            what: "sealing the log",
                            source,
                        })
                    }
                };
                self.finish_evictions().await;
                let _ = reply.send(result);
            }
            Command::Verify { store, reply } => {
                let _ = reply.send(self.verify(store).map(drop));
            }
            Command::Join { backing, reply } => {
                let _ = reply.send(self.join(backing).await);
            }
            Command::Refuse { why, reply } => {
                self.refuse(why);
                let _ = reply.send(());
            }
            Command::Reopen(reply) => {
                let _ = reply.send(self.reopen().await);
            }
            Command::Resize { bytes, reply } => {
                let _ = reply.send(self.resize(bytes).await);
            }
            Command::SetWhenOffline { policy, reply } => {
                let _ = reply.send(self.set_when_offline(policy).await);
            }
            Command::Pin { on, reply } => {
                let _ = reply.send(self.pin(on).await);
            }
            Command::Hydrate { ranges, reply } => self.hydrate(ranges, reply),
            Command::Stop { forget, reply } => {
                let result = if forget { self.forget().await } else { Ok(()) };
                let failed = result.is_err();
                let _ = reply.send(result.map(|()| self.p.slot.clone()));
                // A disk that cannot be forgotten yet stays looked after.
                return !failed;
            }
        }
        false
    }

    /// The guest learns of the size once it is durable here: what it then writes beyond the former one must be its disk's
    /// after a start without the store, too.
    async fn resize(&mut self, bytes: u64) -> Result<(), CacheError> {
        let former = std::mem::replace(&mut self.p.record.size_bytes, bytes);
        // With no leg left the store alone knows, and did before.
        if self.through.is_none()
            && let Err(error) = self.write_slot().await
        {
            self.p.record.size_bytes = former;
            return Err(error);
        }
        self.p.sender.send(ToDisk::Resized { bytes });
        Ok(())
    }

    /// The store's image is at this LSN: it fits the log, or is refused.
    fn verify(&mut self, store: Lsn) -> Result<Lsn, CacheError> {
        let verified = verified(&self.p.record, Some(self.p.recovered), store);
        if let Err(error) = &verified {
            self.refuse(error.to_string());
        }
        verified
    }

    /// What the store holds already need not be replayed; that is noted durably before anything relies on it.
    async fn join(&mut self, backing: Arc<dyn Backing>) -> Result<(), CacheError> {
        if !sabotage::on(Bug::ColdTrustsSlot) {
            self.p.record.committed = self.verify(backing.committed())?;
        }
        self.failure = None;
        self.p.backing.join(backing);
        self.not_before = Instant::now();
        self.checkpoint_due = true;
        self.checkpoint().await;
        tracing::info!(
            vdi = %self.p.record.name, committed = self.p.record.committed.0, "the store has joined"
        );
        Ok(())
    }

    fn refuse(&mut self, why: String) {
        tracing::error!(vdi = %self.p.record.name, %why, "the store cannot be used; the log is kept");
        self.fail_waiters(&why);
        self.p.backing.refuse(why.clone());
        self.give_up(&format!("the store cannot be used ({why})"));
        self.failure = Some(why);
    }

    /// Recovers the log as a start would, while commits go on. The old driver's end of the link is gone or about to be.
    async fn reopen(&mut self) -> Result<AttachedDisk, CacheError> {
        if let Some(through) = &self.through {
            // What is on the device is behind the store.
            return Err(CacheError::Flush { vdi: self.p.vdi, why: through.why.clone() });
        }
        if self.device_failed {
            self.log_is_sound()?;
        }
        self.end_hydration();
        self.abandon_evictions().await?;
        let logs_opening = Arc::clone(&self.p.ground.logs_opening);
        let _opening = logs_opening.read().await;
        // What the former worker did not say is in the log, or nowhere: a leg that is being filled gets all of it anew.
        self.p.ground.pool.await_disk(self.p.vdi);
        let open = self.open_log_again().await;
        if open.is_err() {
            self.p.ground.pool.disk_joined(self.p.vdi, None, None);
        }
        let (open, headers, owned) = open?;
        let OpenLog { slot, record, disk, sender, from_disk, segments, last_lsn } = open;
        (self.p.slot, self.p.record) = (slot, record);
        (self.p.sender, self.p.from_disk) = (sender, from_disk);
        self.p.segments.renew(segments);
        // Granted to the former driver and never written to.
        for id in owned.iter().filter(|id| headers.iter().all(|h| h.segment != **id)) {
            self.p.ground.pool.release(*id, false);
        }
        (self.released, self.starving) = (false, false);
        self.p.ground.pool.leave_queue(self.p.vdi);
        (self.open_since, self.roll_under_way) = (None, None);
        self.log_failure = None;
        self.unreadable.clear();
        for waiter in &mut self.waiters {
            waiter.lsn.get_or_insert(last_lsn);
        }
        self.offer_clean();
        Ok(disk)
    }

    /// The log, the headers that it was recovered from, and the segments that the disk had.
    async fn open_log_again(
        &self,
    ) -> Result<(OpenLog, Vec<SegmentHeader>, Vec<SegmentId>), CacheError> {
        let owned = self.p.ground.pool.owned(self.p.vdi);
        let mut headers = self.p.ground.local.read_headers().await?;
        headers.retain(|h| owned.contains(&h.segment) && belongs(h, &self.p.record));
        headers.sort_unstable_by_key(|header| header.seq);
        let progress = Arc::clone(&self.p.progress);
        let record = self.p.record.clone();
        let open = self.p.ground.open_log(&self.p.slot, record, &headers, progress).await?;
        Ok((open, headers, owned))
    }

    async fn tick(&mut self) {
        self.ticks += 1;
        if (self.released || self.device_failed)
            && self.p.ground.pool.awaited().contains(&self.p.vdi)
        {
            // No worker writes its segments any more.
            self.p.ground.pool.disk_joined(self.p.vdi, None, None);
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
        let aged = self.open_since.is_some_and(|since| since.elapsed() >= self.max_age());
        // With the store away a segment is filled before it is sealed: a trickle must not use up the ring.
        if aged && self.roll_under_way.is_none() && self.pressure().store_answers {
            self.roll();
        }
    }

    fn max_age(&self) -> Duration {
        Duration::from_millis(self.p.options.max_age_ms)
    }

    /// Asks the worker to seal what it has; returns the number that its answer will carry.
    fn roll(&mut self) -> u64 {
        let id = self.next_roll;
        self.next_roll += 1;
        self.roll_under_way = Some(id);
        self.p.sender.send(ToDisk::Roll { id });
        id
    }

    /// The log takes no more writes. Final: what is in it and not sealed waits for the next recovery.
    pub(super) fn log_failed(&mut self, reason: String) {
        tracing::error!(vdi = %self.p.record.name, %reason, "the log failed");
        self.fail_waiters(&reason);
        self.log_failure.get_or_insert(reason);
    }

    fn log_is_sound(&self) -> Result<(), CacheError> {
        match &self.log_failure {
            Some(why) => Err(CacheError::Flush { vdi: self.p.vdi, why: why.clone() }),
            None => Ok(()),
        }
    }

    fn drain(&mut self, reply: oneshot::Sender<Result<Lsn, CacheError>>) {
        let commits = self.failure.clone().map(|why| CacheError::Flush { vdi: self.p.vdi, why });
        if let Err(error) = self.log_is_sound().and(commits.map_or(Ok(()), Err)) {
            let _ = reply.send(Err(error));
            return;
        }
        let (roll, lsn) =
            if self.released { (0, Some(self.last_staged)) } else { (self.roll(), None) };
        self.waiters.push(Waiter { lsn, roll, reply });
        self.answer_waiters();
    }

    pub(super) fn answer_waiters(&mut self) {
        let committed = self.p.record.committed;
        let (done, waiting) = std::mem::take(&mut self.waiters)
            .into_iter()
            .partition(|waiter| waiter.lsn.is_some_and(|lsn| lsn <= committed));
        self.waiters = waiting;
        for waiter in done {
            let _: Result<_, _> = waiter.reply.send(Ok(committed));
        }
    }

    fn fail_waiters(&mut self, why: &str) {
        for waiter in self.waiters.drain(..) {
            let error = CacheError::Flush { vdi: self.p.vdi, why: why.into() };
            let _ = waiter.reply.send(Err(error));
        }
    }

    /// Passes a segment on to a worker that wants one, if there is one.
    pub(super) fn feed(&mut self) {
        self.feed_at = None;
        if !self.starving || self.released {
            return;
        }
        let pressure = self.pressure();
        let wait = self.slowed_by(pressure);
        if !wait.is_zero() {
            self.feed_at = Some(Instant::now() + wait);
        }
        if !wait.is_zero() || !self.admission.admit(pressure) {
            return self.p.ground.pool.leave_queue(self.p.vdi);
        }
        if let Some(grant) = self.p.ground.pool.grant(self.p.vdi) {
            self.starving = false;
            self.admission.granted();
            self.slope.granted(pressure.at);
            tracing::trace!(segment = grant.id.0, "granted");
            self.p.sender.send(ToDisk::Segment(grant));
        }
    }

    /// How long the disk has to wait for its next segment because the store is away.
    fn slowed_by(&mut self, now: Pressure) -> Duration {
        if now.store_answers {
            self.slope.end();
            return Duration::ZERO;
        }
        self.slope.wait(now.at, now.fill)
    }

    pub(super) fn pressure(&self) -> Pressure {
        let stuck = self.commit.as_ref().is_some_and(|c| c.started.elapsed() >= STORE_SLOW_AFTER);
        Pressure {
            fill: self.fill(),
            dirty_bytes: self.p.segments.bytes(self.p.record.committed).0,
            target_bytes: self.p.images_max as u64 / 4 * 3,
            store_answers: !stuck
                && self.failure.is_none()
                && self.p.backing.is_joined()
                && self.p.backing.away_since_ms().is_none(),
            at: self.started.elapsed(),
        }
    }

    pub(super) fn fetch(&self, id: u64, lba: Lba, blocks: u32) {
        self.p.status.lock().fetched_bytes += u64::from(blocks) * BLOCK_SIZE as u64;
        let (backing, sender) = (Arc::clone(&self.p.backing), self.p.sender.clone());
        let name = self.p.record.name.clone();
        // One task per fetch: as many as the guest's queues hold requests, not more.
        tokio::spawn(async move {
            let result = backing.read(lba, blocks).await.map_err(|error| {
                tracing::error!(vdi = %name, lba = lba.0, blocks, %error, "a read from the store failed");
                FetchError(error.to_string())
            });
            sender.send(ToDisk::Fetched { id, result });
        });
    }

    fn fill(&self) -> f64 {
        self.p.ground.pool.counts().fill()
    }

    fn is_urgent(&self) -> bool {
        self.through.is_some()
            || !self.waiters.is_empty()
            || self.starving
            || self.released
            || self.admission.is_held()
    }

    fn start_commit(&mut self) {
        let joined = self.p.backing.is_joined();
        if !joined || self.commit.is_some() || Instant::now() < self.not_before {
            return;
        }
        let committed = self.p.record.committed;
        let situation = Situation {
            oldest: self.p.segments.oldest_dirty(committed).map(|since| since.elapsed()),
            fill: self.fill(),
            urgent: self.is_urgent(),
        };
        if !flusher::should_start(&self.p.options, situation) {
            return;
        }
        let Some(ready) = self.drafting.take().or_else(|| self.start_draft(committed)) else {
            return;
        };
        let (vdi, backing) = (self.p.vdi, Arc::clone(&self.p.backing));
        let Drafting { task: draft, lsn, bytes } = ready;
        let task = tokio::spawn(async move {
            let drafted = draft.await.unwrap_or_else(|error| {
                Err(BackingError::Failed(format!("coalescing a batch: {error}")).into())
            })?;
            flusher::commit(vdi, &*backing, drafted).await
        });
        self.commit = Some(CommitUnderWay { task, started: Instant::now(), bytes });
        // While this one is on its way to the store, the next is read and coalesced.
        if situation.urgent || situation.fill >= self.p.options.start_fill {
            self.drafting = self.start_draft(lsn);
        }
    }

    /// Starts reading and coalescing what comes after `after`; none if nothing does.
    fn start_draft(&self, after: Lsn) -> Option<Drafting> {
        let batch = self.p.segments.batch(after, self.p.options.batch_bytes);
        let lsn = batch.last()?.last_lsn;
        let bytes = batch.iter().map(|s| u64::from(s.used_blocks) * BLOCK_SIZE as u64).sum();
        let (local, vdi) = (Arc::clone(&self.p.ground.local), self.p.vdi);
        let task = tokio::spawn(async move { flusher::draft(&local, vdi, after, batch).await });
        Some(Drafting { task, lsn, bytes })
    }

    async fn committed(&mut self, result: Result<Lsn, FlushError>) {
        let Some(CommitUnderWay { started, bytes, .. }) = self.commit.take() else { return };
        let lsn = match result {
            Ok(lsn) => lsn,
            Err(error) if self.is_final_without_legs(&error) => {
                let after = self.p.record.committed;
                let why = format!(
                    "what was acknowledged after LSN {after} cannot be brought to the store ({error})"
                );
                return self.give_up(&why);
            }
            Err(error) => return self.commit_failed(&error),
        };
        self.failure = None;
        self.retry_after = RETRY_AFTER;
        let before = self.p.segments.dirty_count(self.p.record.committed);
        self.p.record.committed = lsn;
        let after = self.p.segments.dirty_count(lsn);
        self.admission.committed((before - after) as u64);
        if self.through.is_some() {
            self.committed_without_legs();
        } else {
            self.checkpoint_due = true;
            self.checkpoint().await;
        }
        self.feed();
        {
            let mut status = self.p.status.lock();
            status.commits += 1;
            status.replayed_bytes += bytes;
        }
        let pause =
            flusher::pause_after(&self.p.options, started.elapsed(), self.fill(), self.is_urgent());
        self.not_before = Instant::now() + pause;
    }

    fn commit_failed(&mut self, error: &FlushError) {
        // The next batch continued this one.
        self.drafting = None;
        let why = error.to_string();
        let closing = matches!(error, FlushError::Backing(BackingError::Closing));
        if !closing {
            tracing::error!(vdi = %self.p.record.name, error = %why, "replay to the store failed; the log is kept");
        }
        self.fail_waiters(&why);
        self.note_error(&why);
        self.failure = Some(why);
        // The log stays as it is; what was transient after all gets another chance.
        self.not_before = Instant::now() + self.retry_after;
        self.retry_after = match error {
            FlushError::Backing(_) => RETRY_AFTER,
            FlushError::Local(_) | FlushError::Batch(_) => {
                (self.retry_after * 2).min(RETRY_LOCAL_AFTER_MAX)
            }
        };
    }

    /// Writes the slot, so that what was committed may turn clean.
    async fn checkpoint(&mut self) {
        if self.through.is_some() {
            return self.committed_without_legs();
        }
        if let Err(error) = self.write_slot().await {
            self.note_error(&error.to_string());
            return;
        }
        self.checkpoint_due = false;
        self.p.sender.send(ToDisk::Committed { lsn: self.p.record.committed });
        self.offer_clean();
        self.answer_waiters();
    }

    pub(super) fn offer_clean(&mut self) {
        if self.checkpoint_due || self.through.is_some() {
            return;
        }
        for (id, seq) in self.p.segments.newly_clean(self.p.record.committed) {
            self.p.ground.pool.offer_clean(self.p.vdi, id, seq);
        }
    }

    /// What the guest read while it booted is kept in the slot. Losing it costs comfort only.
    async fn keep_trace(&mut self, ranges: Ranges) {
        self.p.record.boot_trace = ranges;
        match self.write_slot().await {
            Ok(()) => self.p.status.lock().boot_trace.clone_from(&self.p.record.boot_trace),
            Err(error) => self.note_error(&error.to_string()),
        }
    }

    /// Up to where the log was flushed on all legs. Once a disk was in write-through, what is flushed is in the store only.
    fn durable(&self) -> Lsn {
        let noted = self.p.record.durable;
        match self.p.record.left_behind {
            Some(_) => noted,
            None => noted.max(Lsn(self.p.progress.flushed.load(Ordering::Relaxed))),
        }
    }

    /// Lets the slot say how far the log reaches, if it does not yet: a log that is found shorter is damaged. Not in
    /// write-through, where the slot is not written.
    async fn note_durable(&mut self) {
        if self.log_failure.is_none()
            && self.durable() > self.p.record.durable
            && let Err(error) = self.write_slot().await
        {
            self.note_error(&error.to_string());
        }
    }

    pub(super) async fn write_slot(&mut self) -> Result<(), CacheError> {
        if self.through.is_some() {
            // Nothing may rest on it any more: see `through.rs`.
            return Err(CacheError::Flush {
                vdi: self.p.vdi,
                why: "no leg of the cache is left".into(),
            });
        }
        self.p.record.sequence_seen =
            self.p.record.sequence_seen.max(self.p.ground.pool.next_seq());
        self.p.record.durable = self.durable();
        let mut slot = self.p.slot.clone();
        slot.sequence += 1;
        slot.vdi = Some(self.p.record.clone());
        // A write that failed may have torn its copy: the next one must go there again, not to the good one.
        self.p.ground.local.write_slot(&slot).await?;
        self.p.slot = slot;
        Ok(())
    }

    /// A drained disk leaves: its slot is freed first, then its segments.
    async fn forget(&mut self) -> Result<(), CacheError> {
        self.log_is_sound()?;
        let sealed = self.p.segments.last_lsn().unwrap_or(self.p.record.committed);
        let last = sealed.max(self.last_staged);
        if !self.released || last > self.p.record.committed {
            return Err(CacheError::Flush {
                vdi: self.p.vdi,
                why: format!(
                    "its log reaches LSN {last}, the store only LSN {}; drain it first",
                    self.p.record.committed
                ),
            });
        }
        let mut slot = self.p.slot.clone();
        slot.sequence += 1;
        slot.vdi = None;
        if let Err(error) = self.p.ground.local.write_slot(&slot).await {
            if self.through.is_none() {
                return Err(error);
            }
            // Should it be there again one day: the store's head says that this log was drained, so it is no danger.
            self.note_error(&error.to_string());
            self.p.ground.pool.unregister(self.p.vdi);
            return Ok(());
        }
        self.p.slot = slot;
        // Slot gone, so nothing here is anyone's: the pool must ask for no more evictions, and those it has asked for are
        // settled.
        self.p.ground.pool.unregister(self.p.vdi);
        self.refuse_evictions();
        self.free_all();
        if self.through.is_some() {
            // Those that were forgotten when they were committed.
            for id in self.p.ground.pool.owned(self.p.vdi) {
                self.p.ground.pool.release(id, false);
            }
        }
        Ok(())
    }

    pub(super) fn note_error(&self, error: &str) {
        tracing::warn!(vdi = %self.p.record.name, %error, "cache");
        self.p.status.lock().last_error = Some(error.into());
    }

    fn update_status(&self) {
        let committed = self.p.record.committed;
        let (dirty, clean) = self.p.segments.bytes(committed);
        let oldest = self.p.segments.oldest_dirty(committed).or(self.open_since);
        let mut status = self.p.status.lock();
        status.committed_lsn = committed.0;
        status.write_through = self.through.is_some();
        let last = self.p.segments.last_lsn().unwrap_or(committed).max(committed).0;
        status.last_lsn = status.last_lsn.max(last);
        status.flushed_lsn = status.flushed_lsn.max(last);
        status.when_offline = self.p.record.policy.when_offline;
        status.dirty_bytes = dirty;
        status.clean_bytes = clean;
        status.oldest_dirty_ms = oldest.map(|since| since.elapsed().as_millis() as u64);
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

/// The result of the commit under way; never if there is none.
async fn joined(commit: &mut Option<CommitUnderWay>) -> Result<Lsn, FlushError> {
    match commit {
        Some(commit) => match (&mut commit.task).await {
            Ok(result) => result,
            Err(error) => Err(BackingError::Failed(format!("the commit ended: {error}")).into()),
        },
        None => std::future::pending().await,
    }
}
