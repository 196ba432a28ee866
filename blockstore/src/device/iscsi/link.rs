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

/// What the session thread is asked to carry out.
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
    commands: mpsc::Sender<Command>,
    pub shared: Arc<Shared>,
}

/// Both ends.
pub fn pair() -> std::io::Result<(Link, mpsc::Receiver<Command>)> {
    let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
    let (epoch, closing) = (AtomicU64::new(1), AtomicBool::new(false));
    let (commands, receiver) = mpsc::channel(CHANNEL_DEPTH);
    Ok((Link { commands, shared: Arc::new(Shared { epoch, closing, wake }) }, receiver))
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
        self.commands.send(command).await.map_err(|_| closed())?;
        self.shared.wake();
        Ok(pending)
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
