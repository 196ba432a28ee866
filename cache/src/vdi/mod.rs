//! The task that looks after one attached disk: its segments, commits, checkpoints, evictions, drains.
//!
//! It owns the asynchronous side's state of the disk and is the only one that talks to the disk's worker, its slot on
//! the cache device and the pool on its behalf. Order of things after a commit (rules L2, C3):
//! store's head durable → slot with the committed LSN durable → worker told → segments clean → evictable.
//! An evicted segment is free only once the slot that names it dead is durable.
//!
//! Where to read on: `task.rs` (the loop), `command.rs` (what the cache asks), `commit.rs`, `slot.rs`, `drain.rs` (who waits),
//! `feed.rs` (segments for the worker), `evict.rs`, `through.rs` (no leg is left), `hydrate.rs` and `pin.rs`.

mod admission;
mod as_of;
mod command;
mod commit;
mod cuts;
mod drain;
mod evict;
mod feed;
mod hydrate;
mod lend;
mod offline;
mod pin;
mod ration;
mod slope;
mod slot;
mod state;
mod task;
mod through;

pub(crate) use as_of::Undrained;
pub(crate) use command::{Command, Leave};
pub use cuts::{MadeCuts, Pressed};
pub use hydrate::{HydrateError, HydrateStatus};
pub(crate) use lend::{Loan, Wanted};
pub use pin::PinError;
pub use state::{Phase, VdiStatus};
pub(crate) use state::{Segment, Segments};
pub(crate) use task::{VdiTask, VdiTaskParts};

use crate::backing::Backing;
use crate::desk::{Desk, SnapshotTaken};
use crate::disk::{AttachedDisk, Progress};
use crate::error::CacheError;
use crate::format::slot::VdiSlot;
use crate::pending::PendingSnapshot;
use blockstore::types::{Lba, Lsn};
use blockstore::{Policy, PolicyChange};
use hashbrown::HashMap;
use parking_lot::Mutex;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};

/// Commands that may wait for a disk's task.
const COMMANDS_MAX: usize = 64;

/// The disks that are attached, by their UUID.
pub(crate) type Attached = Mutex<HashMap<uuid::Uuid, Arc<VdiHandle>>>;

/// The cache's handle on a disk's task.
#[derive(Debug)]
pub(crate) struct VdiHandle {
    pub name: String,
    pub status: Arc<Mutex<VdiStatus>>,
    pub progress: Arc<Progress>,
    pub desk: Arc<Desk>,
    pub made: Arc<Mutex<MadeCuts>>,
    commands: mpsc::Sender<Command>,
    task: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

impl VdiHandle {
    pub fn spawn(name: String, progress: Arc<Progress>, parts: VdiTaskParts) -> Self {
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        let status = Arc::clone(&parts.status);
        let (desk, made) = (Arc::clone(&parts.desk), Arc::clone(&parts.made));
        let task = Mutex::new(Some(tokio::spawn(VdiTask::new(parts, receiver).run())));
        Self { name, status, progress, desk, made, commands, task }
    }

    pub async fn drain(&self, vdi: uuid::Uuid) -> Result<Lsn, CacheError> {
        self.ask(vdi, Command::Drain).await?
    }

    pub async fn released(&self, vdi: uuid::Uuid, disk: AttachedDisk) -> Result<(), CacheError> {
        self.ask(vdi, |reply| Command::Released { disk: Box::new(disk), reply }).await?
    }

    pub async fn verify(&self, vdi: uuid::Uuid, store: Lsn) -> Result<(), CacheError> {
        self.ask(vdi, |reply| Command::Verify { store, reply }).await?
    }

    pub async fn join(&self, vdi: uuid::Uuid, backing: Arc<dyn Backing>) -> Result<(), CacheError> {
        self.ask(vdi, |reply| Command::Join { backing, reply }).await?
    }

    pub async fn refuse(&self, vdi: uuid::Uuid, why: &str) -> Result<(), CacheError> {
        self.ask(vdi, |reply| Command::Refuse { why: why.to_owned(), reply }).await
    }

    pub async fn reopen(&self, vdi: uuid::Uuid) -> Result<AttachedDisk, CacheError> {
        self.ask(vdi, Command::Reopen).await?
    }

    pub async fn resize(&self, vdi: uuid::Uuid, bytes: u64) -> Result<(), CacheError> {
        self.ask(vdi, |reply| Command::Resize { bytes, reply }).await?
    }

    pub async fn rename(&self, vdi: uuid::Uuid, name: &str) -> Result<(), CacheError> {
        self.ask(vdi, |reply| Command::Rename { name: name.to_owned(), reply }).await?
    }

    pub async fn set_policy(
        &self,
        vdi: uuid::Uuid,
        change: PolicyChange,
    ) -> Result<Policy, CacheError> {
        self.ask(vdi, |reply| Command::SetPolicy { change, reply }).await?
    }

    pub async fn pin(&self, vdi: uuid::Uuid, on: bool) -> Result<(), PinError> {
        let asked = self.ask(vdi, |reply| Command::Pin { on, reply }).await;
        asked.map_err(|error| PinError::Failed(error.to_string()))?
    }

    pub async fn undrained(&self, vdi: uuid::Uuid, for_cut: bool) -> Result<Undrained, CacheError> {
        self.ask(vdi, |reply| Command::Undrained { for_cut, reply }).await?
    }

    pub async fn lend(&self, vdi: uuid::Uuid, wanted: Wanted) -> Result<Loan, CacheError> {
        self.ask(vdi, |reply| Command::Lend { wanted, reply }).await
    }

    pub async fn holes(&self, vdi: uuid::Uuid) -> Result<Vec<(Lba, u64)>, CacheError> {
        self.ask(vdi, Command::Holes).await
    }

    pub async fn cut(
        &self,
        vdi: uuid::Uuid,
        cut: PendingSnapshot,
    ) -> Result<SnapshotTaken, CacheError> {
        self.ask(vdi, |reply| Command::Cut { cut, reply }).await?
    }

    pub async fn press(&self, vdi: uuid::Uuid, pressed: Pressed) -> Result<(), CacheError> {
        self.ask(vdi, |reply| Command::Press { pressed, reply }).await
    }

    pub async fn hydrate(
        &self,
        vdi: uuid::Uuid,
        ranges: Option<Vec<(Lba, u64)>>,
    ) -> Result<HydrateStatus, HydrateError> {
        let asked = self.ask(vdi, |reply| Command::Hydrate { ranges, reply }).await;
        asked.map_err(|_| HydrateError::Failed("it went out of service".into()))?
    }

    /// Stops the task between two steps; what is not committed stays in the log. Returns the slot as it was written last.
    pub async fn stop(&self, vdi: uuid::Uuid, leave: Leave) -> Result<VdiSlot, CacheError> {
        let slot = self.ask(vdi, |reply| Command::Stop { leave, reply }).await??;
        let task = self.task.lock().take();
        if let Some(task) = task
            && let Err(error) = task.await
        {
            tracing::error!(vdi = %self.name, %error, "the task that looks after a disk panicked");
        }
        Ok(slot)
    }

    async fn ask<T>(
        &self,
        vdi: uuid::Uuid,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, CacheError> {
        let (reply, answer) = oneshot::channel();
        let gone = |_| CacheError::NotAttached { vdi };
        self.commands.send(command(reply)).await.map_err(|_| CacheError::NotAttached { vdi })?;
        answer.await.map_err(gone)
    }
}
