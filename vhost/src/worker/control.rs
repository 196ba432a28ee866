//! What the session and the server ask of a worker. Each request is answered once it has taken effect.

use crate::dirty::DirtyLog;
use crate::memory::GuestMap;
use crate::ring::{InflightRegion, Layout};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::fs::File;
use std::io;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// A request to the worker.
#[derive(Debug)]
pub(crate) enum Request {
    /// Use this memory from now on, for running rings too.
    Memory(Arc<GuestMap>),
    /// What the driver may ask for.
    Features(DriverFeatures),
    /// Mark the guest's pages that are written from now on here, or nowhere.
    Log(Option<Arc<DirtyLog>>),
    /// Serve a ring.
    Start(StartRing),
    /// Stop taking requests from a ring and answer when none of its requests is under way: with its next available
    /// index, or `None` if the ring does not run.
    Stop { queue: u16 },
    /// The ring's interrupt eventfd; a new one is signalled at once.
    Call { queue: u16, call: Option<File> },
    /// Take requests from the ring, or leave them.
    Enable { queue: u16, enabled: bool },
    /// Writes complete when durable.
    WriteThrough(bool),
    /// The front end is gone: forget its rings and requests. Answered when nothing reaches into its memory any more.
    EndSession,
    /// Take no more requests from any ring; answer when nothing local is under way.
    Quiesce,
    /// End the thread. Only after [`Request::Quiesce`].
    Shutdown,
    /// Panics, to show what a panic costs.
    #[cfg(test)]
    Panic,
}

/// Features that matter on the path of a request.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DriverFeatures {
    pub discard: bool,
    pub write_zeroes: bool,
}

/// A ring to serve.
#[derive(Debug)]
pub(crate) struct StartRing {
    pub queue: u16,
    pub layout: Layout,
    /// Available index to go on at.
    pub next_avail: u16,
    pub event_idx: bool,
    pub kick: File,
    pub call: Option<File>,
    pub enabled: bool,
    pub inflight: Option<Arc<InflightRegion>>,
}

/// A request and the way back.
#[derive(Debug)]
pub(crate) struct Envelope {
    pub request: Request,
    pub reply: Sender<Reply>,
}

/// The answer to a request. Only `Stop` says more than that it was done.
pub(crate) type Reply = io::Result<Option<u16>>;

/// Sends requests to one worker.
#[derive(Clone, Debug)]
pub(crate) struct Handle {
    sender: Sender<Envelope>,
    wake: Arc<EventFd>,
}

impl Handle {
    /// A handle and the ends for the worker. At most one request per session and server is under way, hence the bound.
    pub(crate) fn new() -> io::Result<(Self, Receiver<Envelope>, Arc<EventFd>)> {
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let (sender, receiver) = bounded(16);
        Ok((Self { sender, wake: Arc::clone(&wake) }, receiver, wake))
    }

    /// Sends a request; the answer comes over the returned channel, which closes without one if the worker is gone.
    pub(crate) fn send(&self, request: Request) -> Receiver<Reply> {
        let (reply, answer) = bounded(1);
        if self.sender.send(Envelope { request, reply }).is_ok() {
            // A full counter (EAGAIN) wakes as well.
            let _ = self.wake.write(1);
        }
        answer
    }

    /// Sends a request and waits for the answer.
    pub(crate) fn call(&self, request: Request) -> Reply {
        self.send(request).recv().unwrap_or_else(|_| Err(gone()))
    }
}

/// The worker has ended, after a panic or because the disk is being stopped.
pub(crate) fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the disk's worker has ended")
}
