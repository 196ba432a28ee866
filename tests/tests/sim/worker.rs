//! A disk's worker and its guest: does with `cache::disk::Disk` on simulated devices what `vhost`'s worker does with it on
//! io_uring, and checks every answer that the guest gets.
//!
//! [`guest`] is what the guest does, [`reads`] how its reads are put together; here is what becomes of its changes, and the end.

mod guest;
mod reads;

pub use guest::Habits;
pub use reads::Fetch;

use self::guest::{DEPTH, Request};
use crate::model::Model;
use crate::parting::Exit;
use crate::reading::{Arrived, Reading};
use blockstore::device::Device;
use blockstore::device::sim::SimDevice;
use cache::disk::{Action, AttachedDisk, OpId, Tag};
use cache::format::LegSet;
use cache::link::{FromDisk, ToDisk};
use futures_util::StreamExt;
use futures_util::future::{FutureExt, LocalBoxFuture};
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tokio::time::Instant;

/// Longest time between two looks at the link.
const IDLE_MAX: Duration = Duration::from_millis(500);
/// Longest that a flush may take: what the log waits for, a few times, while legs are as slow as they may be.
const FLUSH_MAX: Duration = Duration::from_secs(60);

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
    /// Its guest is one of those that must be satisfied before the life ends.
    pub counts: bool,
    /// How it may end before its life does.
    pub exit: Option<Rc<Exit>>,
    /// It did.
    has_left: bool,
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
            counts: true,
            exit: None,
            has_left: false,
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

    /// Its disk is given back if it left before its life ends; else it stays as it is.
    pub fn leave(self) -> Option<Self> {
        if !self.has_left {
            return Some(self);
        }
        self.exit?.leave(self.attached);
        None
    }

    /// The guest has not asked for everything yet.
    fn wants(&self) -> bool {
        if self.exit.as_ref().is_some_and(|exit| exit.guest_is_gone()) {
            return false;
        }
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
        if self.exit.as_ref().is_some_and(|exit| exit.is_asked()) {
            self.has_left = self.is_answered() && self.is_sealed();
            return self.has_left;
        }
        if self.wants() {
            // Unless another's log has failed.
            return !self.to_the_end && self.orders.wanting.get() == 0;
        }
        if !self.to_the_end {
            // Serves on until no guest wants anything; what is under way then stays under way.
            if self.counts && !std::mem::replace(&mut self.satisfied, true) {
                self.orders.wanting.update(|wanting| wanting.saturating_sub(1));
            }
            return self.orders.wanting.get() == 0;
        }
        self.model.lock().guest_is_done = self.is_answered();
        self.orders.stop.get() && self.is_answered() && self.is_sealed()
    }

    /// Nothing is under way any more, and its log is sealed.
    fn is_sealed(&mut self) -> bool {
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
                ToDisk::Fetched { id, result, keep } => self.fetched(id, result.ok(), keep),
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
}
