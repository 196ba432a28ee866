//! A disk's worker and its guest: does with `cache::disk::Disk` on simulated devices what `vhost`'s worker does with it on
//! io_uring, and checks every answer that the guest gets.

use crate::model::{Model, PER_BLOCK};
use crate::reading::{Arrived, Reading};
use blockstore::buf::AlignedBuf;
use blockstore::device::Device;
use blockstore::device::sim::SimDevice;
use blockstore::types::SECTOR_SIZE;
use cache::disk::{Action, AttachedDisk, OpId, Staged, Tag};
use cache::format::LegSet;
use cache::link::{FromDisk, ToDisk};
use futures_util::StreamExt;
use futures_util::future::{FutureExt, LocalBoxFuture};
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::SmallRng;
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// Requests that a guest has under way at once.
const DEPTH: usize = 24;
/// Longest time between two looks at the link.
const IDLE_MAX: Duration = Duration::from_millis(500);
/// Longest that a flush may take: what the log waits for, a few times, while legs are as slow as they may be.
const FLUSH_MAX: Duration = Duration::from_secs(60);

/// What a guest asks for.
#[derive(Clone, Debug)]
pub enum Request {
    Write { sector: u64, sectors: u64, stamp: u32 },
    Zero { sector: u64, sectors: u64, discard: bool },
    Flush,
    Read { sector: u64, sectors: u64 },
}

/// What the worker has started and waits for.
pub enum Finished {
    Io {
        op: OpId,
        result: Result<(), i32>,
    },
    Block {
        arrived: Arrived,
        /// Legs that did not answer in time.
        slow: LegSet,
    },
    /// A block that was read well from one leg was written over the bad copy on another.
    Repaired {
        arrived: Arrived,
        leg: u8,
        result: Result<(), i32>,
    },
}

/// Faults that a life may bring, and what they excuse.
#[derive(Clone, Copy, Debug, Default)]
pub struct Excuses {
    /// The guest may get errors for writes and flushes: the cache device fails.
    pub write_errors: bool,
    /// The guest may get errors for reads: data was damaged where no second copy exists.
    pub read_errors: bool,
}

/// How a guest behaves.
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    /// Longest pause between bursts, milliseconds.
    pub think_ms: u64,
    /// Requests in a burst at most.
    pub burst: u32,
    /// Of 100 requests: writes, zeroings, flushes; the rest reads.
    pub mix: [u32; 3],
    /// Sectors in a large write at most.
    pub large: u64,
    /// Of 20 writes and reads: those that are large, and those of less than a block. The others are of one block.
    pub larges: u32,
    pub parts: u32,
}

/// What all workers of a life share.
#[derive(Debug)]
pub struct Orders {
    /// The agent's sessions with the cache device: once they are dead, nobody gets any answer.
    pub hosts: Vec<SimDevice>,
    /// Requests so far, over all lives.
    pub requests: Arc<AtomicU64>,
    /// So many guests must be satisfied before the life ends, with whatever is under way.
    pub wanting: Cell<usize>,
    /// Guests ask for nothing more; workers end when all is answered.
    pub wind_down: Cell<bool>,
    /// With that, workers seal their logs and end.
    pub stop: Cell<bool>,
}

#[derive(Debug)]
struct Open {
    lsn: u64,
    flush: bool,
    since: Instant,
    /// Asked for with the write cache off: the switch that turned it off.
    through: Option<u32>,
}

/// See the module.
pub struct Worker {
    pub attached: AttachedDisk,
    pub model: Arc<Mutex<Model>>,
    legs: Vec<Device>,
    pub rng: SmallRng,
    habits: Habits,
    excuses: Excuses,
    orders: Rc<Orders>,
    /// Requests that the guest still has in this life.
    pub budget: u64,
    /// Reads of the whole disk that come first.
    verify: VecDeque<Request>,
    ios: FuturesUnordered<LocalBoxFuture<'static, Finished>>,
    /// Writes and flushes of the log among them: on which leg, since when.
    log_ios: BTreeMap<u64, (u8, Instant)>,
    /// Legs from which a read did not come in time since the last look.
    slow: LegSet,
    stalled: VecDeque<(Tag, Request)>,
    open: BTreeMap<Tag, Open>,
    reads: BTreeMap<u64, Reading>,
    /// Fetch id → (read, first block of the fetch in it, blocks, part of a patch).
    fetches: BTreeMap<u64, Fetch>,
    next: u64,
    /// The write cache is off since this switch.
    through: Option<u32>,
    switches: u32,
    next_burst: Instant,
    idle: Duration,
    pub log_failed: bool,
    /// The store has taken the place of the legs: a write can be read when it is done, not before.
    written_through: bool,
    rolled: bool,
    to_the_end: bool,
    satisfied: bool,
}

#[derive(Clone, Copy, Debug)]
pub struct Fetch {
    pub read: u64,
    pub block: u32,
    pub blocks: u32,
    pub whole: bool,
    pub ticket: u64,
}

impl Worker {
    pub fn new(
        attached: AttachedDisk,
        model: Arc<Mutex<Model>>,
        legs: Vec<Device>,
        rng: SmallRng,
        (habits, excuses, orders): (Habits, Excuses, Rc<Orders>),
    ) -> Self {
        Self {
            attached,
            model,
            legs,
            rng,
            habits,
            excuses,
            orders,
            budget: 0,
            verify: VecDeque::new(),
            ios: FuturesUnordered::new(),
            log_ios: BTreeMap::new(),
            slow: LegSet::NONE,
            stalled: VecDeque::new(),
            open: BTreeMap::new(),
            reads: BTreeMap::new(),
            fetches: BTreeMap::new(),
            next: 1,
            through: None,
            switches: 0,
            next_burst: Instant::now(),
            idle: Duration::from_millis(1),
            log_failed: false,
            written_through: false,
            rolled: false,
            to_the_end: false,
            satisfied: false,
        }
    }

    /// The whole disk is read before anything else happens.
    pub fn verify_all(&mut self) {
        let sectors = self.model.lock().sectors();
        let mut sector = 0;
        while sector < sectors {
            let len = self.rng.random_range(1..=256.min(sectors - sector));
            self.verify.push_back(Request::Read { sector, sectors: len });
            sector += len;
        }
    }

    /// Serves its guest until the life's orders let it end, or its log failed.
    pub async fn run(mut self) -> Self {
        loop {
            let mut progress = self.messages();
            progress |= self.guest();
            self.drive();
            if let Some(words) = self.model.lock().broken.take() {
                panic!("{words}");
            }
            if self.is_over() {
                return self;
            }
            self.idle =
                if progress { Duration::from_millis(1) } else { (self.idle * 2).min(IDLE_MAX) };
            let until_burst = self.next_burst.saturating_duration_since(Instant::now());
            let guest_waits = self.wants() && self.under_way() < DEPTH;
            let pause = if guest_waits { self.idle.min(until_burst) } else { self.idle };
            tokio::select! {
                biased;
                Some(finished) = self.ios.next(), if !self.ios.is_empty() => {
                    self.idle = Duration::from_millis(1);
                    self.finished(finished);
                }
                () = tokio::time::sleep(pause.max(Duration::from_millis(1))) => {}
            }
        }
    }

    /// As [`run`](Self::run), but goes on after its guest is done, until told to stop.
    pub async fn run_to_the_end(mut self) -> Self {
        self.to_the_end = true;
        self.run().await
    }

    /// The guest has not asked for everything yet.
    fn wants(&self) -> bool {
        !self.verify.is_empty() || (self.budget > 0 && !self.orders.wind_down.get())
    }

    /// Requests of the guest without an answer.
    fn under_way(&self) -> usize {
        self.open.len() + self.reads.len() + self.stalled.len()
    }

    fn is_answered(&self) -> bool {
        self.under_way() == 0
    }

    fn is_over(&mut self) -> bool {
        if self.log_failed {
            self.orders.wanting.set(0);
            return true;
        }
        if self.wants() {
            // Unless another's log has failed.
            return !self.to_the_end && self.orders.wanting.get() == 0;
        }
        if !self.to_the_end {
            // Serves on until no guest wants anything; what is under way then stays under way.
            if !std::mem::replace(&mut self.satisfied, true) {
                self.orders.wanting.update(|wanting| wanting.saturating_sub(1));
            }
            return self.orders.wanting.get() == 0;
        }
        self.model.lock().guest_is_done = self.is_answered();
        if !self.orders.stop.get() || !self.is_answered() {
            return false;
        }
        if !self.rolled {
            self.rolled = true;
            self.attached.disk.on_message(ToDisk::Roll { id: 0 });
            return false;
        }
        // A leg that is out may never answer.
        let disk = &self.attached.disk;
        let given_up = self.log_ios.keys().filter(|op| !disk.wants(OpId(**op))).count();
        self.ios.len() == given_up && disk.is_quiet()
    }

    /// What `vhost`'s worker does once a second about legs that do not answer.
    fn look_at_legs(&mut self) {
        let (disk, timeout) = (&mut self.attached.disk, self.attached.leg_timeout);
        let mut overdue = std::mem::take(&mut self.slow);
        for (op, (leg, since)) in &self.log_ios {
            if since.elapsed() > timeout && disk.wants(OpId(*op)) {
                overdue = overdue.with(*leg);
            }
        }
        disk.legs_silent(overdue);
    }

    fn messages(&mut self) -> bool {
        let mut any = false;
        while let Some(message) = self.attached.link.try_recv() {
            any = true;
            match message {
                ToDisk::Fetched { id, result } => {
                    let Some(fetch) = self.fetches.remove(&id) else { continue };
                    let blocks = result.ok();
                    if let (Some(blocks), true) = (&blocks, fetch.whole)
                        && let Some(reading) = self.reads.get(&fetch.read)
                    {
                        for (lba, block) in (reading.lba(fetch.block)..).zip(blocks) {
                            if let Some(block) = block {
                                let lba = blockstore::types::Lba(lba);
                                self.attached.disk.fill(lba, block, fetch.ticket);
                            }
                        }
                    }
                    if let Some(reading) = self.reads.get_mut(&fetch.read) {
                        reading.fetched(&fetch, blocks);
                        self.advance_read(fetch.read);
                    }
                }
                other => {
                    self.written_through |= matches!(other, ToDisk::WriteThrough { .. });
                    if matches!(other, ToDisk::Tick) {
                        self.look_at_legs();
                    }
                    // What is kept now is to be sealed, too: whoever takes the disk back would do that on a real file.
                    self.rolled &= !matches!(other, ToDisk::Keep { .. });
                    self.attached.disk.on_message(other);
                    self.note_cuts();
                }
            }
        }
        any
    }

    fn guest(&mut self) -> bool {
        let bytes = self.attached.disk.size_bytes();
        if bytes > self.model.lock().sectors() * SECTOR_SIZE as u64 {
            self.model.lock().grow(bytes);
        }
        if Instant::now() < self.next_burst {
            return false;
        }
        let mut any = false;
        for _ in 0..self.rng.random_range(1..=self.habits.burst) {
            if !self.wants() || self.under_way() >= DEPTH {
                break;
            }
            any = true;
            let request = match self.verify.pop_front() {
                Some(read) => read,
                None => {
                    self.budget -= 1;
                    self.imagine()
                }
            };
            self.submit(request);
        }
        let think = match self.rng.random_range(0..1000) {
            0 => self.rng.random_range(0..5000),
            1..300 => self.rng.random_range(0..=self.habits.think_ms),
            _ => 0,
        };
        self.next_burst = Instant::now() + Duration::from_millis(think);
        any
    }

    fn imagine(&mut self) -> Request {
        let total = self.model.lock().sectors();
        let rng = &mut self.rng;
        let Habits { larges, parts, .. } = self.habits;
        let length = |rng: &mut SmallRng, large: u64| match rng.random_range(0..20) {
            kind if kind < larges => rng.random_range(1..=large),
            kind if kind < larges + parts => rng.random_range(1..PER_BLOCK),
            _ => PER_BLOCK,
        };
        let place = |rng: &mut SmallRng, len: u64| {
            let at = rng.random_range(0..=total - len);
            if len == PER_BLOCK { at / PER_BLOCK * PER_BLOCK } else { at }
        };
        let [writes, zeros, flushes] = self.habits.mix;
        let kind = rng.random_range(0..100);
        if kind < writes {
            let sectors = length(rng, self.habits.large.min(total));
            let sector = place(rng, sectors);
            Request::Write { sector, sectors, stamp: self.model.lock().stamp() }
        } else if kind < writes + zeros {
            let sectors = rng.random_range(1..=200.min(total));
            let sector = rng.random_range(0..=total - sectors);
            Request::Zero { sector, sectors, discard: rng.random() }
        } else if kind < writes + zeros + flushes {
            Request::Flush
        } else {
            let sectors = length(rng, 128.min(total));
            Request::Read { sector: place(rng, sectors), sectors }
        }
    }

    fn submit(&mut self, request: Request) {
        self.orders.requests.fetch_add(1, Ordering::Relaxed);
        let tag = self.next;
        self.next += 1;
        if self.rng.random_range(0..500) == 0 {
            self.switches += 1;
            self.through = self.through.is_none().then_some(self.switches);
            self.attached.disk.set_write_through(self.through.is_some());
        }
        match request {
            Request::Read { sector, sectors } => {
                let model = self.model.lock();
                let sure = if self.written_through { model.acked } else { model.last_lsn() };
                let before = model.at(sure, sector..sector + sectors);
                let reading = Reading::new(tag, sector, sectors, before, sure);
                drop(model);
                self.reads.insert(tag, reading);
                self.plan_read(tag);
            }
            Request::Flush => {
                let lsn = self.model.lock().last_lsn();
                self.open
                    .insert(tag, Open { lsn, flush: true, since: Instant::now(), through: None });
                self.attached.disk.flush(tag);
            }
            other if self.stalled.is_empty() => self.stage(tag, other),
            other => self.stalled.push_back((tag, other)),
        }
    }

    /// Stages a change, or lets the rest of it wait for space.
    fn stage(&mut self, tag: Tag, request: Request) {
        match request {
            Request::Write { sector, sectors, stamp } => {
                let before = self.attached.disk.staged_lsn().0;
                let mut model = self.model.lock();
                let mut parts = Vec::new();
                let len = sectors as usize * SECTOR_SIZE;
                let staged = self.attached.disk.write(tag, sector, len, &mut |at, into| {
                    let first = sector + (at / SECTOR_SIZE) as u64;
                    parts.push(first..first + (into.len() / SECTOR_SIZE) as u64);
                    for (at, out) in (first..).zip(into.chunks_exact_mut(SECTOR_SIZE)) {
                        model.fill_sector(stamp, at, out);
                    }
                });
                // Snapshots that waited for room came first.
                let staged_now = self.attached.disk.staged_lsn().0 - before;
                (parts.len() as u64..staged_now).for_each(|_| model.push_cut());
                for part in parts {
                    model.push(part, stamp);
                }
                drop(model);
                match staged {
                    Staged::Part(bytes) => {
                        let done = (bytes / SECTOR_SIZE) as u64;
                        let (sector, sectors) = (sector + done, sectors - done);
                        self.stalled.push_front((tag, Request::Write { sector, sectors, stamp }));
                    }
                    staged => self.staged(tag, staged, true),
                }
            }
            Request::Zero { sector, sectors, discard } => {
                let before = self.attached.disk.staged_lsn().0;
                let staged = self.attached.disk.zero(tag, sector, sectors, discard);
                let staged_now = self.attached.disk.staged_lsn().0 - before;
                let (from, to) = if discard {
                    (sector.next_multiple_of(PER_BLOCK), (sector + sectors) / PER_BLOCK * PER_BLOCK)
                } else {
                    (sector, sector + sectors)
                };
                let own = u64::from(staged == Staged::All && from < to);
                (own..staged_now).for_each(|_| self.model.lock().push_cut());
                match staged {
                    Staged::Part(_) => self.stalled.push_front((tag, request)),
                    staged => {
                        if staged == Staged::All && from < to {
                            self.model.lock().push(from..to, 0);
                        }
                        self.staged(tag, staged, from < to);
                    }
                }
            }
            Request::Flush | Request::Read { .. } => unreachable!("only changes are staged"),
        }
    }

    fn staged(&mut self, tag: Tag, staged: Staged, changes: bool) {
        let last = self.model.lock().last_lsn();
        assert_eq!(last, self.attached.disk.staged_lsn().0, "INV-LOG-1: one LSN for each part");
        // A discard of less than a block changes nothing and takes no LSN.
        let lsn = if changes { last } else { 0 };
        if staged == Staged::Failed {
            self.log_failed = true;
            self.excuse(self.excuses.write_errors, "a write failed");
        } else {
            let since = Instant::now();
            self.open.insert(tag, Open { lsn, flush: false, since, through: self.through });
        }
    }

    /// What was given an LSN, and not to a guest's change, is a snapshot.
    fn note_cuts(&mut self) {
        let mut model = self.model.lock();
        (model.last_lsn()..self.attached.disk.staged_lsn().0).for_each(|_| model.push_cut());
    }

    /// Lets the disk decide, does what it says, publishes what is complete.
    fn drive(&mut self) {
        loop {
            let mut actions = Vec::new();
            self.attached.disk.poll(&mut actions);
            self.note_cuts();
            let progress = !actions.is_empty();
            for action in actions {
                self.act(action);
            }
            self.complete();
            let waiting = self.stalled.len();
            while let Some((tag, request)) = self.stalled.pop_front() {
                let before = (self.stalled.len(), self.attached.disk.staged_lsn());
                self.stage(tag, request);
                if self.stalled.len() > before.0 {
                    break;
                }
            }
            if !progress && self.stalled.len() == waiting {
                return;
            }
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Write { op, leg, offset, image, start, len } => {
                self.log_ios.insert(op.0, (leg, Instant::now()));
                let leg = Arc::clone(&self.legs[usize::from(leg)]);
                let io = async move {
                    let result = leg.write(offset, vec![image.slice(start, len)]).await;
                    Finished::Io { op, result: result.map_err(|_| libc::EIO) }
                };
                self.ios.push(io.boxed_local());
            }
            Action::Flush { op, leg } => {
                self.log_ios.insert(op.0, (leg, Instant::now()));
                let leg = Arc::clone(&self.legs[usize::from(leg)]);
                let io = async move {
                    Finished::Io { op, result: leg.flush().await.map_err(|_| libc::EIO) }
                };
                self.ios.push(io.boxed_local());
            }
            Action::Send(message) => {
                if matches!(message, FromDisk::Failed { .. }) {
                    self.log_failed = true;
                    self.excuse(self.excuses.write_errors, "a log failed");
                }
                self.attached.link.send(message);
            }
        }
    }

    fn complete(&mut self) {
        let mut model = self.model.lock();
        let done: Vec<(Tag, bool)> = self.attached.disk.completions().collect();
        for (tag, ok) in done {
            let Some(Open { lsn, flush, since, through }) = self.open.remove(&tag) else {
                continue;
            };
            if !ok {
                self.log_failed = true;
                self.excuse(self.excuses.write_errors, "a write or a flush failed");
                continue;
            }
            if flush {
                // Whatever a leg does; what the store does matters only where no leg is left.
                let took = since.elapsed();
                let in_time = took <= FLUSH_MAX || self.written_through;
                assert!(in_time, "liveness: a flush took {took:?}");
                model.flushed = model.flushed.max(lsn);
                continue;
            }
            let older = self
                .open
                .values()
                .filter(|open| !open.flush && open.lsn > 0)
                .map(|open| open.lsn)
                .min();
            assert!(older.is_none_or(|older| older >= lsn), "L1: writes complete in LSN order");
            model.acked = model.acked.max(lsn);
            if through.is_some() && through == self.through {
                model.flushed = model.flushed.max(lsn);
            }
        }
    }

    /// Errors reach the guest for certain faults only.
    fn excuse(&self, excused: bool, what: &str) {
        let dead = || self.orders.hosts.iter().all(SimDevice::is_dead);
        assert!(excused || dead(), "{what} without a cause");
    }

    fn finished(&mut self, finished: Finished) {
        match finished {
            Finished::Io { op, result } => {
                self.log_ios.remove(&op.0);
                self.attached.disk.io_done(op, result);
            }
            Finished::Block { arrived, slow } => {
                self.slow = self.slow.or(slow);
                self.read_or_repair(arrived);
            }
            Finished::Repaired { arrived, leg, result } => {
                if let Err(errno) = result {
                    self.attached.disk.repair_failed(leg, errno);
                }
                self.arrived(arrived);
            }
        }
    }

    /// A block was read: a bad copy of it is rewritten first.
    fn read_or_repair(&mut self, arrived: Arrived) {
        let bad = arrived.bad.and(self.attached.disk.readable_legs()).iter().next();
        let (Some(data), Some(number)) = (&arrived.data, bad) else {
            return self.arrived(arrived);
        };
        let (leg, data) = (Arc::clone(&self.legs[usize::from(number)]), AlignedBuf::copy_of(data));
        let patience = self.attached.leg_timeout;
        let io = async move {
            let write = timeout(patience, leg.write(arrived.offset, vec![data.freeze()])).await;
            let result = write.map_or(Err(libc::ETIMEDOUT), |done| done.map_err(|_| libc::EIO));
            Finished::Repaired { arrived, leg: number, result }
        };
        self.ios.push(io.boxed_local());
    }

    fn arrived(&mut self, arrived: Arrived) {
        let id = arrived.read;
        if let Some(reading) = self.reads.get_mut(&id) {
            reading.arrived(arrived, &mut self.attached.disk);
            self.advance_read(id);
        }
    }

    fn plan_read(&mut self, id: u64) {
        let Some(mut reading) = self.reads.remove(&id) else { return };
        let wanted = reading.plan(&mut self.attached.disk);
        for local in wanted.local {
            let readable = self.attached.disk.readable_legs();
            let legs = readable.iter().map(|leg| (leg, Arc::clone(&self.legs[usize::from(leg)])));
            let legs: Vec<_> = legs.collect();
            let patience = if legs.len() > 1 { self.attached.leg_timeout } else { Duration::MAX };
            let io = async move {
                let (mut data, mut bad, mut slow) = (None, LegSet::NONE, LegSet::NONE);
                // Twice from the first leg, as a worker does that read into guest memory first.
                for (number, leg) in legs.iter().take(1).chain(&legs) {
                    if slow.contains(*number) {
                        continue;
                    }
                    let read = leg.read(local.offset, blockstore::types::BLOCK_SIZE);
                    let Ok(read) = timeout(patience, read).await else {
                        slow = slow.with(*number);
                        continue;
                    };
                    data =
                        read.ok().filter(|d: &AlignedBuf| blockstore::crc::crc32c(d) == local.crc);
                    if data.is_some() {
                        bad = bad.minus(LegSet::NONE.with(*number));
                        break;
                    }
                    bad = bad.with(*number);
                }
                Finished::Block { arrived: local.with(data, bad), slow }
            };
            self.ios.push(io.boxed_local());
        }
        for (block, blocks, whole) in wanted.missing {
            let fetch = self.next;
            self.next += 1;
            let ticket = reading.ticket;
            self.fetches.insert(fetch, Fetch { read: id, block, blocks, whole, ticket });
            let lba = blockstore::types::Lba(reading.lba(block));
            self.attached.ask(FromDisk::Fetch { id: fetch, lba, blocks });
        }
        self.reads.insert(id, reading);
        self.advance_read(id);
    }

    fn advance_read(&mut self, id: u64) {
        let Some(reading) = self.reads.get_mut(&id) else { return };
        reading.unpin(&mut self.attached.disk);
        if !reading.is_complete() {
            return;
        }
        if reading.again() {
            return self.plan_read(id);
        }
        let Some(reading) = self.reads.remove(&id) else { return };
        match reading.bytes() {
            Some(bytes) => {
                let model = self.model.lock();
                let checked =
                    model.check_read(reading.sector, &bytes, &reading.before, reading.since);
                if let Err(words) = checked {
                    panic!("{words}");
                }
            }
            None => self.excuse(self.excuses.read_errors, "a read failed"),
        }
    }
}
