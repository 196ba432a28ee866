//! Where snapshots of a disk's log are asked for and answered.
//!
//! Whoever asks reaches the disk's worker directly, and is answered by it: the disk's task, which may be waiting for the device or the
//! store, or computing, has no part in it. It only says when there can be none, and when nobody answers any more.
//!
//! Whoever asks gets an answer: from the worker, or, if that is gone or its log has failed, an error that does not say that
//! there is no snapshot. One whose record became durable all the same is found by the next recovery.
//!
//! The worker holds no lock for longer than it takes to add something: [`Desk::pending`], which may look through a million snapshots,
//! holds none that it wants, nor one that who asks for a snapshot does.

use crate::disk::SNAPSHOTS_WAITING_MAX;
use crate::error::CacheError;
use crate::link::{DiskSender, ToDisk};
use crate::pending::{PendingSnapshot, PendingSnapshots};
use blockstore::SnapshotLabel;
use blockstore::io::now_ms;
use blockstore::types::Lsn;
use parking_lot::{Mutex, MutexGuard};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use tokio::sync::oneshot;
use uuid::Uuid;

/// Why there are no snapshots of a disk that was released.
pub(crate) const NOT_SERVED: &str = "it is not served: start it again";

/// A snapshot that is durable in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotTaken {
    /// Its point in the guest's write order: its name.
    pub lsn: Lsn,
    /// When it was asked for, milliseconds since 1970.
    pub time_ms: u64,
}

/// Where an answer goes that somebody waits for.
pub(crate) type Reply = oneshot::Sender<Result<SnapshotTaken, CacheError>>;

/// What is done with the answer to who asked for a snapshot: as a rule by the disk's worker, which it must neither hold up nor end.
pub type OnTaken = Box<dyn FnOnce(Result<SnapshotTaken, CacheError>) + Send>;

/// See the module.
#[derive(Debug)]
pub(crate) struct Desk {
    vdi: Uuid,
    waiting: Mutex<Waiting>,
    /// Snapshots that are durable in the log and not in the store yet, but for `fresh` ones.
    known: Mutex<PendingSnapshots>,
    /// Those that were answered since somebody looked.
    fresh: Mutex<Vec<PendingSnapshot>>,
}

#[derive(Debug)]
struct Waiting {
    worker: DiskSender,
    /// By the number that the worker knows them by.
    asked: BTreeMap<u64, Asked>,
    next: u64,
    /// Why there can be none now.
    closed: Option<String>,
}

struct Asked {
    time_ms: u64,
    label: SnapshotLabel,
    then: OnTaken,
}

impl fmt::Debug for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { time_ms, label, .. } = self;
        f.debug_struct("Asked")
            .field("time_ms", time_ms)
            .field("label", label)
            .finish_non_exhaustive()
    }
}

impl Desk {
    pub fn new(vdi: Uuid, worker: DiskSender, known: PendingSnapshots) -> Self {
        let waiting = Waiting { worker, asked: BTreeMap::new(), next: 0, closed: None };
        let (waiting, known) = (Mutex::new(waiting), Mutex::new(known));
        Self { vdi, waiting, known, fresh: Mutex::default() }
    }

    /// Asks for a snapshot of all that was answered before the call.
    ///
    /// # Errors
    /// [`CacheError::Snapshot`].
    pub async fn snapshot(&self, label: SnapshotLabel) -> Result<SnapshotTaken, CacheError> {
        let (reply, answer) = oneshot::channel();
        self.snapshot_then(label, Box::new(move |taken| drop(reply.send(taken))));
        answer.await.unwrap_or(Err(CacheError::NotAttached { vdi: self.vdi }))
    }

    /// Likewise, and has `then` done with the answer, now or later.
    pub fn snapshot_then(&self, label: SnapshotLabel, then: OnTaken) {
        let time_ms = now_ms();
        let (id, worker) = {
            let mut waiting = self.waiting.lock();
            if let Err(why) = waiting.may_ask() {
                drop(waiting);
                return then(Err(CacheError::Snapshot { vdi: self.vdi, why }));
            }
            let id = waiting.next;
            waiting.next += 1;
            waiting.asked.insert(id, Asked { time_ms, label: label.clone(), then });
            (id, waiting.worker.clone())
        };
        if !worker.send(ToDisk::Snapshot { id, time_ms, label }) {
            self.taken(id, Err("the disk's worker is gone".into()));
        }
    }

    /// Why there can be no snapshot now.
    pub fn may_ask(&self) -> Result<(), String> {
        self.waiting.lock().may_ask()
    }

    /// The worker's answer.
    pub fn taken(&self, id: u64, result: Result<Lsn, String>) {
        let Some(Asked { time_ms, label, then }) = self.waiting.lock().asked.remove(&id) else {
            return;
        };
        let result = match result {
            Ok(lsn) => {
                self.fresh.lock().push(PendingSnapshot { lsn, time_ms, label });
                Ok(SnapshotTaken { lsn, time_ms })
            }
            Err(why) => Err(CacheError::Snapshot { vdi: self.vdi, why }),
        };
        then(result);
    }

    /// Snapshots that are durable in the log and not in the store yet: all that were answered, and more as the store goes on.
    pub fn pending(&self) -> MutexGuard<'_, PendingSnapshots> {
        let mut known = self.known.lock();
        let mut fresh = std::mem::take(&mut *self.fresh.lock());
        // In the store before anybody looked.
        fresh.retain(|snapshot| snapshot.lsn > known.retired());
        for PendingSnapshot { lsn, time_ms, label } in fresh {
            known.push(lsn, time_ms, &label);
        }
        known
    }

    /// Nobody answers those who wait any more.
    pub fn fail(&self, why: &str) {
        let asked = std::mem::take(&mut self.waiting.lock().asked);
        self.refuse(asked, why);
    }

    fn refuse(&self, asked: BTreeMap<u64, Asked>, why: &str) {
        for Asked { then, .. } in asked.into_values() {
            let why = format!(
                "{why}, before it was known to be durable: it may be there once the disk is served again"
            );
            then(Err(CacheError::Snapshot { vdi: self.vdi, why }));
        }
    }

    /// There are none from here on, for the first reason that was given.
    pub fn close(&self, why: &str) {
        self.waiting.lock().closed.get_or_insert_with(|| why.to_owned());
    }

    /// Another worker is about to serve the disk, whose log was recovered.
    pub fn reopen(&self, worker: DiskSender, known: PendingSnapshots) {
        *self.pending() = known;
        let asked = {
            let mut waiting = self.waiting.lock();
            (waiting.worker, waiting.closed) = (worker, None);
            std::mem::take(&mut waiting.asked)
        };
        self.refuse(asked, "the disk's worker was replaced");
    }
}

/// The end of the task that looks after a disk, also by a panic: nobody else says that a worker is gone.
#[derive(Debug)]
pub(crate) struct Closing(pub Arc<Desk>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close(NOT_SERVED);
        self.0.fail("the disk went out of service");
    }
}

impl Waiting {
    fn may_ask(&self) -> Result<(), String> {
        if let Some(why) = &self.closed {
            return Err(why.clone());
        }
        let waiting = self.asked.len();
        if waiting >= SNAPSHOTS_WAITING_MAX {
            return Err(format!(
                "{waiting} snapshots of it wait to be durable in its log already: try again when the log goes on"
            ));
        }
        Ok(())
    }
}
