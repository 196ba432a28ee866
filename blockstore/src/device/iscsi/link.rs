//! The way between callers on any runtime and the one thread that owns the session: a bounded channel,
//! an eventfd that wakes the thread, and one oneshot per command.

use super::outcome::{Class, Failure};
use super::scsi::Cdb;
use crate::buf::AlignedBuf;
use crate::device::DeviceErrorKind;
use bytes::Bytes;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::{mpsc, oneshot};

/// Commands in the channel at most; a caller beyond that waits in `send`.
const CHANNEL_DEPTH: usize = 128;

/// What the session thread is asked for.
#[derive(Debug)]
pub enum Request {
    Command(Command),
    /// To prove that the target reinstates sessions; the answer is whether it does.
    Proof(oneshot::Sender<Result<bool, String>>),
}

/// A command to carry out.
#[derive(Debug)]
pub struct Command {
    pub class: Class,
    pub cdb: Cdb,
    /// Data to send.
    pub out: Vec<Bytes>,
    /// Bytes to receive.
    pub in_len: usize,
    pub reply: oneshot::Sender<Result<Reply, Failure>>,
}

/// A command that was carried out.
#[derive(Debug, Default)]
pub struct Reply {
    /// Data received.
    pub data: Option<AlignedBuf>,
    /// Bytes of `in_len` or `out` that were not transferred.
    pub missing: usize,
    /// A compare-and-write found something else.
    pub miscompare: bool,
}

/// State that both sides see.
#[derive(Debug)]
pub struct Shared {
    /// See `BlockDevice::epoch`.
    pub epoch: AtomicU64,
    /// The device was dropped.
    pub closing: AtomicBool,
    wake: EventFd,
}

impl Shared {
    /// The eventfd to poll.
    pub fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    /// Ends or prevents the thread's next sleep.
    pub fn wake(&self) {
        // It fails only when the counter is full: then the thread is awake already.
        let _ = self.wake.write(1);
    }
}

/// The callers' end.
#[derive(Debug)]
pub struct Link {
    requests: mpsc::Sender<Request>,
    pub shared: Arc<Shared>,
}

/// Both ends.
pub fn pair() -> std::io::Result<(Link, mpsc::Receiver<Request>)> {
    let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
    let shared = Shared { epoch: AtomicU64::new(1), closing: AtomicBool::new(false), wake };
    let (requests, receiver) = mpsc::channel(CHANNEL_DEPTH);
    Ok((Link { requests, shared: Arc::new(shared) }, receiver))
}

/// The outcome of a command that was sent.
pub type Pending = oneshot::Receiver<Result<Reply, Failure>>;

impl Link {
    /// Queues a command; waits while the channel is full.
    pub async fn send(
        &self,
        class: Class,
        cdb: Cdb,
        out: Vec<Bytes>,
        in_len: usize,
    ) -> Result<Pending, Failure> {
        let (reply, pending) = oneshot::channel();
        let command = Command { class, cdb, out, in_len, reply };
        self.request(Request::Command(command)).await?;
        Ok(pending)
    }

    /// Queues the proof that the target reinstates sessions.
    pub async fn prove(&self) -> Result<oneshot::Receiver<Result<bool, String>>, Failure> {
        let (reply, pending) = oneshot::channel();
        self.request(Request::Proof(reply)).await?;
        Ok(pending)
    }

    async fn request(&self, request: Request) -> Result<(), Failure> {
        self.requests.send(request).await.map_err(|_| closed())?;
        self.shared.wake();
        Ok(())
    }

    /// Queues a command and waits for its outcome.
    pub async fn call(
        &self,
        class: Class,
        cdb: Cdb,
        out: Vec<Bytes>,
        in_len: usize,
    ) -> Result<Reply, Failure> {
        outcome(self.send(class, cdb, out, in_len).await?).await
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        self.shared.wake();
    }
}

/// Waits for the outcome of a command.
pub async fn outcome(pending: Pending) -> Result<Reply, Failure> {
    pending.await.unwrap_or_else(|_| Err(closed()))
}

fn closed() -> Failure {
    Failure::new(DeviceErrorKind::Unreachable, "the session was closed")
}
