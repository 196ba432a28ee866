//! One thread with one io_uring that carries out a file's reads, writes, flushes and discards.
//!
//! The thread owns a request with all its buffers from the moment it is submitted until the kernel
//! has reported on it; that the caller's future was dropped meanwhile changes nothing but where the
//! result goes. At most [`IN_FLIGHT_MAX`] requests exist at a time; further callers wait, in order.
//!
//! Requests in flight together are carried out in any order. A short read or write is continued.

use super::Shared;
use super::request::{Request, Step};
use crate::buf::AlignedBuf;
use crossbeam_channel::{Receiver, Sender, TryRecvError};
use io_uring::{IoUring, opcode, types};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Requests that one device has in flight.
pub(super) const IN_FLIGHT_MAX: usize = 128;
/// How long closing a device waits for what is still in flight. On a device that hangs, the thread
/// then ends by itself once the device answers.
pub(super) const CLOSE_WAIT: Duration = Duration::from_secs(2);
/// Marks the completion of the wake-up poll.
const WAKE: u64 = u64::MAX;

/// The caller's side.
#[derive(Debug)]
pub(super) struct Ring {
    /// None only while closing.
    jobs: Option<Sender<Job>>,
    permits: Arc<Semaphore>,
    wake: Arc<Wake>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

#[derive(Debug)]
struct Wake {
    event: EventFd,
    /// The thread is waiting in the kernel, or about to.
    sleeping: AtomicBool,
}

struct Job {
    request: Request,
    reply: oneshot::Sender<io::Result<AlignedBuf>>,
    /// Given back when the job has ended.
    _permit: OwnedSemaphorePermit,
}

impl Ring {
    /// Starts the thread. The file stays open until the thread ends.
    ///
    /// # Errors
    /// If the thread, its ring or its eventfd cannot be made.
    pub(super) fn start(shared: Arc<Shared>) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(0, flags)?;
        let wake = Arc::new(Wake { event, sleeping: AtomicBool::new(false) });
        let (jobs, queue) = crossbeam_channel::bounded(IN_FLIGHT_MAX);
        let (ending, ended) = crossbeam_channel::bounded(0);
        // One more entry than requests: the wake-up poll.
        let ring = IoUring::new((IN_FLIGHT_MAX + 1).next_power_of_two() as u32)?;
        let worker = Worker {
            ring,
            shared,
            queue,
            wake: Arc::clone(&wake),
            slots: Slots::new(),
            disconnected: false,
            poll_armed: false,
        };
        thread::Builder::new().name("ballast-file".to_owned()).spawn(move || {
            worker.run();
            drop(ending);
        })?;
        let permits = Arc::new(Semaphore::new(IN_FLIGHT_MAX));
        Ok(Self { jobs: Some(jobs), permits, wake, ended })
    }

    /// Carries out one request. Returns the data of a read, otherwise an empty buffer.
    pub(super) async fn submit(&self, request: Request) -> io::Result<AlignedBuf> {
        let gone = || io::Error::other("the device's I/O thread has ended");
        let permit = Arc::clone(&self.permits).acquire_owned().await.map_err(|_| gone())?;
        let (reply, result) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or_else(gone)?;
        // There is room: the channel is as long as there are permits.
        jobs.try_send(Job { request, reply, _permit: permit }).map_err(|_| gone())?;
        if self.wake.sleeping.swap(false, Ordering::SeqCst) {
            self.wake.ring_bell();
        }
        result.await.map_err(|_| gone())?
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.jobs = None;
        self.wake.ring_bell();
        // Disconnected or timed out: either way there is nothing more to do here.
        let _ = self.ended.recv_timeout(CLOSE_WAIT);
    }
}

impl Wake {
    fn ring_bell(&self) {
        // It fails only if the counter is about to overflow, and then the thread is awake anyway.
        let _ = self.event.write(1);
    }
}

struct Worker {
    // First, so that it is closed before the slots are dropped.
    ring: IoUring,
    shared: Arc<Shared>,
    queue: Receiver<Job>,
    wake: Arc<Wake>,
    slots: Slots,
    disconnected: bool,
    poll_armed: bool,
}

impl Worker {
    fn run(mut self) {
        loop {
            self.accept();
            if self.disconnected && self.slots.in_flight == 0 {
                return;
            }
            self.prepare();
            self.wake.sleeping.store(true, Ordering::SeqCst);
            let wait_for = usize::from(self.queue.is_empty());
            let submitted = self.ring.submit_and_wait(wait_for);
            self.wake.sleeping.store(false, Ordering::SeqCst);
            if let Err(e) = submitted
                && !matches!(e.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN))
            {
                tracing::error!("io_uring_enter failed, trying again: {e}");
                thread::sleep(Duration::from_millis(10));
            }
            self.reap();
        }
    }

    /// Takes over what callers have submitted.
    fn accept(&mut self) {
        loop {
            match self.queue.try_recv() {
                Ok(job) => self.slots.insert(job),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.disconnected = true;
                    return;
                }
            }
        }
    }

    /// Puts what is due into the submission queue.
    fn prepare(&mut self) {
        let mut submission = self.ring.submission();
        if !self.poll_armed {
            let event = types::Fd(self.wake.event.as_fd().as_raw_fd());
            let poll = opcode::PollAdd::new(event, libc::POLLIN as u32).build().user_data(WAKE);
            // SAFETY: a poll refers to no memory, and the eventfd lives as long as the ring.
            self.poll_armed = unsafe { submission.push(&poll) }.is_ok();
        }
        let fd = types::Fd(self.shared.file.as_raw_fd());
        while let Some(index) = self.slots.due.pop() {
            let Some(job) = &mut self.slots.jobs[index] else { continue };
            let entry = job.request.entry(fd).user_data(index as u64);
            // SAFETY: the entry points into buffers that the slot owns, and a slot is emptied only
            // when the kernel has reported on its entry.
            if unsafe { submission.push(&entry) }.is_err() {
                self.slots.due.push(index);
                return;
            }
        }
    }

    /// Handles what the kernel has reported.
    fn reap(&mut self) {
        let completions: Vec<(u64, i32)> =
            self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (user_data, result) in completions {
            if user_data == WAKE {
                self.poll_armed = false;
                // Would-block means that nobody rang since.
                let _ = self.wake.event.read();
            } else {
                self.slots.complete(user_data as usize, result, &self.shared);
            }
        }
    }
}

/// The jobs in flight. A job is removed only when the kernel no longer uses its buffers.
struct Slots {
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    /// Slots whose next step is to be submitted.
    due: Vec<usize>,
    in_flight: usize,
}

impl Slots {
    fn new() -> Self {
        Self { jobs: Vec::new(), free: Vec::new(), due: Vec::new(), in_flight: 0 }
    }

    fn insert(&mut self, job: Job) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() - 1
        });
        self.jobs[index] = Some(job);
        self.due.push(index);
        self.in_flight += 1;
    }

    fn complete(&mut self, index: usize, result: i32, shared: &Shared) {
        let Some(job) = self.jobs.get_mut(index).and_then(Option::as_mut) else {
            tracing::error!(index, "the kernel reported on a request that does not exist");
            return;
        };
        let outcome = match job.request.advance(result) {
            Step::Again => {
                self.due.push(index);
                return;
            }
            Step::Done => Ok(()),
            Step::Failed(e) => {
                shared.note_failure(&e, job.request.is_flush());
                Err(e)
            }
        };
        if let Some(job) = self.jobs[index].take() {
            // The caller may have lost interest.
            let _ = job.reply.send(outcome.map(|()| job.request.into_data()));
        }
        self.free.push(index);
        self.in_flight -= 1;
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        // Only a panic of the thread leads here with something in flight: the kernel may still use
        // those buffers, so they are never freed.
        for job in self.jobs.drain(..).flatten() {
            std::mem::forget(job.request);
        }
    }
}
