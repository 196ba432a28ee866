//! The worker: one thread that owns one disk's state, its rings and its io_uring, from start to stop, with or without a
//! front end.
//!
//! A turn of its loop: take completions; obey control messages; take messages of the cache's asynchronous side; take
//! requests from the rings; let the disk decide what to write and what is complete; publish; wait. It waits in one
//! place, `io_uring_enter`, for I/O and for eventfds polled by the ring. Nothing else in it blocks, and no lock is
//! taken. A leg of the cache that does not answer is dealt with in `legs.rs`.
//!
//! Crash behaviour: none of its state outlives the thread; what matters is in the disk's log. A panic ends this
//! disk's service only; the kernel's use of our memory is waited for before anything is freed.

mod control;
mod expire;
mod io;
mod legs;
mod read;
mod rings;
mod serve;
mod slab;
mod slots;
mod uring;
mod write;

pub(crate) use control::{DriverFeatures, Handle, Reply, Request, StartRing, gone};

use crate::config::ID_LEN;
use crate::dirty::DirtyLog;
use crate::memory::GuestMap;
use crate::request::Limits;
use crate::sigbus;
use crate::stats::{Counters, Shared};
use blockstore::turns::take_turns_of;
use cache::disk::{Action, AttachedDisk, OpId};
use cache::link::{FromDisk, ToDisk};
use control::Envelope;
use crossbeam_channel::{Receiver, Sender, bounded};
use io::{Fetch, Io, Operation};
use rings::Queues;
use serve::SWITCH_TAG;
use slots::Slots;
use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use uring::{Completion, Token, Uring};
use vmm_sys_util::eventfd::EventFd;
use write::Stalled;

/// A guest waits for each of its turns: shorter than those of threads that compute.
const TURN: Duration = Duration::from_micros(300);

/// What a worker is told at its start.
#[derive(Clone, Debug)]
pub(crate) struct WorkerOptions {
    /// Names the thread.
    pub name: String,
    pub queues: u16,
    pub read_only: bool,
    pub id: [u8; ID_LEN],
    /// How long to look for work before sleeping.
    pub poll: Duration,
}

/// A worker that was started.
#[derive(Debug)]
pub(crate) struct Started {
    pub handle: Handle,
    /// The thread's result is the disk, as far as it got.
    pub thread: JoinHandle<AttachedDisk>,
}

/// Starts a worker for `disk`, or gives it back. `alive` is closed when the worker ends.
pub(crate) fn spawn(
    options: WorkerOptions,
    disk: AttachedDisk,
    shared: Arc<Shared>,
    alive: UnixStream,
) -> Result<Started, Box<(std::io::Error, AttachedDisk)>> {
    let (handle, requests, wake) = match Handle::new() {
        Ok(ends) => ends,
        Err(error) => return Err(Box::new((error, disk))),
    };
    let (ready, started) = bounded(1);
    // The disk follows when there is a thread to take it: one that cannot be started takes all that it was given along.
    let (give, take) = bounded::<AttachedDisk>(1);
    let thread = std::thread::Builder::new().name(options.name.clone()).spawn(move || {
        let _alive = alive;
        if let Err(error) = take_turns_of(TURN) {
            tracing::debug!(disk = options.name, %error, "no shorter turns for the disk's worker");
        }
        let disk = take.recv().expect("the disk was sent before the sender went");
        // io_uring's single-issuer mode wants the ring made by the thread that uses it.
        let legs: Vec<_> = disk.legs.iter().map(AsRawFd::as_raw_fd).collect();
        let uring = if legs.is_empty() && !options.read_only {
            Err(std::io::Error::new(
                std::io::ErrorKind::InvalidInput,
                "the disk has no cache device",
            ))
        } else {
            Uring::new(&legs)
        };
        match uring {
            Ok(uring) => {
                let _ = ready.send(Ok(()));
                Worker::new(options, disk, uring, requests, wake, shared).run()
            }
            Err(error) => {
                let _ = ready.send(Err(error));
                disk
            }
        }
    });
    let thread = match thread {
        Ok(thread) => thread,
        Err(error) => return Err(Box::new((error, disk))),
    };
    give.send(disk).expect("the thread waits for the disk");
    match started.recv().unwrap_or_else(|_| Err(gone())) {
        Ok(()) => Ok(Started { handle, thread }),
        Err(error) => {
            let disk = thread.join().expect("a thread that refused its work ends in order");
            Err(Box::new((error, disk)))
        }
    }
}

/// Tells the fetches of one worker from those of another over the same link.
static WORKERS: AtomicU32 = AtomicU32::new(0);

#[derive(Debug)]
struct Worker {
    options: WorkerOptions,
    attached: AttachedDisk,
    io: Io,
    queues: Queues,
    slots: Slots,
    stalled: Stalled,
    /// Fetches that wait for earlier ones to be answered.
    waiting: VecDeque<Fetch>,
    /// Blocks asked for and not answered.
    fetching: u64,
    /// High half of this worker's fetch ids.
    fetch_ids: u64,
    limits: Limits,
    map: Arc<GuestMap>,
    /// Where pages that are written are marked, while a front end wants that.
    log: Option<Arc<DirtyLog>>,
    requests: Receiver<Envelope>,
    wake: Arc<EventFd>,
    shared: Arc<Shared>,
    counters: Counters,
    control_ready: bool,
    link_ready: bool,
    /// `sigbus::faults` when last looked at.
    faults: u64,
    /// Something happened that may have made space in the log.
    progress: bool,
    /// No requests are taken; who waits for quiet.
    quiescing: Option<Option<Sender<Reply>>>,
    shutdown: bool,
    /// Who waits for the end of a session.
    ending: Vec<Sender<Reply>>,
    /// Who waits for a switch to write-through, in order.
    switched: VecDeque<Sender<Reply>>,
    // Reused from turn to turn.
    actions: Vec<Action>,
    fetches: Vec<Fetch>,
    ended: Vec<u32>,
}

impl Worker {
    fn new(
        options: WorkerOptions,
        attached: AttachedDisk,
        uring: Uring,
        requests: Receiver<Envelope>,
        wake: Arc<EventFd>,
        shared: Arc<Shared>,
    ) -> Self {
        let limits = Limits {
            capacity: attached.disk.size_bytes() / 512,
            read_only: options.read_only,
            discard: false,
            write_zeroes: false,
        };
        Self {
            io: Io::new(uring, attached.disk.readable_legs()),
            queues: Queues::new(options.queues),
            slots: Slots::default(),
            stalled: Stalled::default(),
            waiting: VecDeque::new(),
            fetching: 0,
            fetch_ids: u64::from(WORKERS.fetch_add(1, Ordering::Relaxed)) << 32,
            limits,
            map: Arc::default(),
            log: None,
            requests,
            wake,
            shared,
            counters: Counters::default(),
            control_ready: true,
            link_ready: true,
            faults: sigbus::faults(),
            progress: false,
            quiescing: None,
            shutdown: false,
            ending: Vec::new(),
            switched: VecDeque::new(),
            actions: Vec::new(),
            fetches: Vec::new(),
            ended: Vec::new(),
            options,
            attached,
        }
    }

    fn run(mut self) -> AttachedDisk {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.serve()));
        if outcome.is_err() {
            // The panic's message was printed by the panic hook.
            tracing::error!(
                disk = self.options.name,
                "the disk's worker panicked: this disk is not served any more; stop and attach it again"
            );
            self.shared.worker_failed.store(true, Ordering::Relaxed);
            let reason = "the worker panicked".to_string();
            self.attached.link.send(FromDisk::Failed { reason });
        }
        // Guest memory and buffers are freed below: the kernel must be done with them.
        self.io.drain();
        let Self { io, attached, .. } = self;
        if io.is_haunted() {
            tracing::warn!(
                disk = self.options.name,
                "a leg that was put out has not answered yet: the memory of what it was asked is kept"
            );
            std::mem::forget(io);
        }
        attached
    }

    fn serve(&mut self) {
        self.io.uring.poll(self.wake.as_raw_fd(), Token::Control);
        self.io.uring.poll(self.attached.link.wake_fd(), Token::Link);
        while !self.shutdown {
            self.take_completions();
            if std::mem::take(&mut self.control_ready) {
                self.take_control();
            }
            if std::mem::take(&mut self.link_ready) {
                self.take_messages();
            }
            self.io.readable = self.attached.disk.readable_legs();
            let more = self.take_requests();
            self.drive();
            // Before the guest sees its completions, so that whoever saw them finds them counted.
            self.publish_counters();
            self.queues.publish(&mut self.io.uring);
            self.answer_quiesce();
            self.answer_end();
            self.rest(more);
        }
    }

    /// Submits, and waits unless there is something to do.
    fn rest(&mut self, more: bool) {
        if more || self.control_ready || self.link_ready || self.shutdown {
            self.io.uring.submit();
            return;
        }
        if self.quiescing.is_some() {
            self.io.uring.wait();
            return;
        }
        if !self.options.poll.is_zero() && self.look_for_work() {
            return;
        }
        if self.queues.want_kicks() {
            self.io.uring.submit();
        } else {
            self.io.uring.wait();
        }
        self.queues.refuse_kicks();
    }

    /// Looks for completions and requests for a while without sleeping; true if there are any.
    fn look_for_work(&mut self) -> bool {
        self.io.uring.submit();
        let until = Instant::now() + self.options.poll;
        loop {
            if self.io.uring.is_ready() || self.queues.has_requests() {
                self.io.uring.submit();
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            std::hint::spin_loop();
        }
    }

    fn take_completions(&mut self) {
        while let Some(completion) = self.io.uring.next() {
            match completion.token {
                Token::Operation(index) => self.operation_done(index, completion.result),
                Token::Control => {
                    self.control_ready = true;
                    if !completion.more {
                        self.io.uring.poll(self.wake.as_raw_fd(), Token::Control);
                    }
                }
                Token::Link => {
                    self.link_ready = true;
                    if !completion.more {
                        self.io.uring.poll(self.attached.link.wake_fd(), Token::Link);
                    }
                }
                Token::Kick { queue, arming } => self.kicked(queue, arming, completion),
                Token::Nobody => {}
            }
        }
    }

    /// Rings are looked at in each turn anyway; a kick only ends the wait.
    fn kicked(&mut self, queue: u16, arming: u32, completion: Completion) {
        if completion.result < 0 && completion.result != -libc::ECANCELED {
            tracing::warn!(queue, errno = -completion.result, "cannot poll a kick eventfd");
        } else if !completion.more && completion.result >= 0 {
            self.queues.rearm(queue, arming, &mut self.io.uring);
        }
    }

    fn operation_done(&mut self, index: u32, result: i32) {
        let Some(operation) = self.io.ended(index) else { return };
        match operation {
            Operation::Write { op, leg, offset, image, start, len, done } => {
                // Not if the leg is out: its place has another's file by now.
                let wanted = self.attached.disk.wants(op);
                let again = matches!(-result, libc::EINTR | libc::EAGAIN);
                let written = usize::try_from(result).unwrap_or(0);
                // Direct I/O goes on at a block's start.
                let now_done = if done + written >= len { len } else { (done + written) & !4095 };
                if now_done == len {
                    self.local_done(op, Ok(()));
                } else if wanted && (again || now_done > done) {
                    let done = now_done;
                    self.io.write(Operation::Write { op, leg, offset, image, start, len, done });
                } else {
                    self.local_done(op, Err(if result < 0 { -result } else { libc::EIO }));
                }
            }
            Operation::Flush { op, leg } => match -result {
                libc::EINTR | libc::EAGAIN if self.attached.disk.wants(op) => {
                    self.io.flush(op, leg)
                }
                errno if errno > 0 => self.local_done(op, Err(errno)),
                _ => self.local_done(op, Ok(())),
            },
            other => self.read_done(other, result),
        }
    }

    fn local_done(&mut self, op: OpId, result: Result<(), i32>) {
        if let Err(errno) = result {
            tracing::error!(disk = self.options.name, errno, "local write or flush failed");
        }
        self.attached.disk.io_done(op, result);
        self.progress = true;
    }

    fn take_messages(&mut self) {
        while let Some(message) = self.attached.link.try_recv() {
            self.progress = true;
            match message {
                ToDisk::Fetched { id, result, keep } => self.fetched(id, result, keep),
                ToDisk::FailWaiting { reads, writes } => self.fail_waiting(reads, writes),
                message => {
                    if matches!(message, ToDisk::Tick) {
                        self.look_at_legs();
                    }
                    let resized = matches!(message, ToDisk::Resized { .. });
                    let legs = matches!(message, ToDisk::Legs { .. } | ToDisk::LegJoins { .. });
                    if legs {
                        // What is queued names files by numbers that are about to change.
                        self.io.uring.submit();
                    }
                    let before = self.attached.disk.written_legs();
                    self.attached.on_message(message);
                    if resized {
                        self.resized();
                    }
                    if legs {
                        self.legs_changed();
                        self.legs_are_out(before.minus(self.attached.disk.written_legs()));
                    }
                }
            }
        }
    }

    /// The disk's files are not those that the ring has any more.
    fn legs_changed(&mut self) {
        for (leg, file) in (0u8..).zip(&self.attached.legs) {
            if let Err(error) = self.io.uring.set_file(usize::from(leg), file.as_raw_fd()) {
                let name = &self.options.name;
                tracing::error!(disk = name, leg, %error, "a leg's file cannot be used");
                self.attached.disk.leg_unusable(leg, error.raw_os_error().unwrap_or(libc::EIO));
            }
        }
        self.io.readable = self.attached.disk.readable_legs();
    }

    fn resized(&mut self) {
        let size = self.attached.disk.size_bytes();
        self.limits.capacity = size / 512;
        self.shared.size.store(size, Ordering::Relaxed);
        self.shared.front_ends.config_changed();
    }

    fn take_control(&mut self) {
        while let Ok(Envelope { request, reply }) = self.requests.try_recv() {
            let done = match request {
                Request::Memory(map) => {
                    self.queues.remap(&map);
                    self.map = map;
                    Ok(None)
                }
                Request::Features(features) => {
                    self.limits.discard = features.discard;
                    self.limits.write_zeroes = features.write_zeroes;
                    Ok(None)
                }
                Request::Log(log) => {
                    self.queues.set_log(log.as_ref());
                    self.log = log;
                    Ok(None)
                }
                Request::Start(start) => {
                    // A driver that begins anew, not a front end that reconnected.
                    if (start.queue, start.next_avail) == (0, 0) {
                        self.attached.disk.begin_boot_trace();
                    }
                    let (map, log) = (&self.map, self.log.as_ref());
                    self.queues.start(start, map, log, &mut self.io.uring).map(|()| None)
                }
                Request::Stop { queue } => {
                    self.queues.stop(queue, reply);
                    continue;
                }
                Request::Call { queue, call } => {
                    self.queues.set_call(queue, call);
                    Ok(None)
                }
                Request::Enable { queue, enabled } => {
                    self.queues.set_enabled(queue, enabled);
                    Ok(None)
                }
                Request::WriteThrough(on) => {
                    self.attached.disk.set_write_through(on);
                    if !self.shared.write_through.swap(on, Ordering::Relaxed) && on {
                        // What completed before must be durable as well from now on: the guest will send no flush.
                        self.switched.push_back(reply);
                        self.attached.disk.flush(SWITCH_TAG);
                        continue;
                    }
                    Ok(None)
                }
                Request::EndSession => {
                    self.end_session();
                    self.ending.push(reply);
                    continue;
                }
                Request::Quiesce => {
                    self.quiescing = Some(Some(reply));
                    continue;
                }
                Request::Shutdown => {
                    self.shutdown = true;
                    Ok(None)
                }
                #[cfg(test)]
                Request::Panic => panic!("as a test asked for"),
            };
            let _ = reply.send(done);
        }
    }

    fn answer_quiesce(&mut self) {
        let Some(waiting) = &mut self.quiescing else { return };
        if self.io.awaited() == 0
            && self.attached.disk.is_quiet()
            && let Some(reply) = waiting.take()
        {
            let _ = reply.send(Ok(None));
        }
    }

    /// A read on its way into memory of a session that ended must not arrive during the next, when the guest may have
    /// other things there.
    fn answer_end(&mut self) {
        if self.ending.is_empty() || self.slots.any_orphan_read() {
            return;
        }
        for reply in self.ending.drain(..) {
            let _ = reply.send(Ok(None));
        }
    }

    fn publish_counters(&mut self) {
        let faults = sigbus::faults();
        if faults != std::mem::replace(&mut self.faults, faults) {
            tracing::warn!(
                disk = self.options.name,
                "a front end pulled shared memory away: its guest reads zeros there"
            );
        }
        self.counters.stalled = self.stalled.len() as u64;
        self.counters.fetching = (self.waiting.len() as u64) + self.fetching;
        self.counters.interrupts = self.queues.interrupts;
        self.shared.publish(&self.counters);
    }
}
