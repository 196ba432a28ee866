//! Snapshots: the task's half. It passes them to the disk's worker, answers who asked for them, and knows which of those
//! that are durable in the log the store does not have yet.
//!
//! Whoever asks gets an answer: from the worker, or, if that is gone or its log has failed, an error that does not say that
//! there is no snapshot. One whose record became durable all the same is found by the next recovery.

use super::task::VdiTask;
use crate::disk::SNAPSHOTS_WAITING_MAX;
use crate::error::CacheError;
use crate::link::ToDisk;
use blockstore::SnapshotLabel;
use blockstore::io::now_ms;
use blockstore::types::Lsn;
use std::collections::BTreeMap;
use tokio::sync::oneshot;

/// A snapshot that is durable in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotTaken {
    /// Its point in the guest's write order: its name.
    pub lsn: Lsn,
    /// When it was asked for, milliseconds since 1970.
    pub time_ms: u64,
}

/// Where the answer goes.
pub(crate) type Reply = oneshot::Sender<Result<SnapshotTaken, CacheError>>;

#[derive(Debug)]
struct Asked {
    time_ms: u64,
    label: SnapshotLabel,
    reply: Reply,
}

/// Those that the worker was asked for.
#[derive(Debug, Default)]
pub(super) struct Snapshots {
    asked: BTreeMap<u64, Asked>,
    next: u64,
}

impl VdiTask {
    pub(super) fn snapshot(&mut self, label: SnapshotLabel, reply: Reply) {
        if let Err(why) = self.may_ask_snapshot() {
            let _ = reply.send(Err(CacheError::Snapshot { vdi: self.p.vdi, why }));
            return;
        }
        let (id, time_ms) = (self.snapshots.next, now_ms());
        self.snapshots.next += 1;
        let message = ToDisk::Snapshot { id, time_ms, label: label.clone() };
        self.snapshots.asked.insert(id, Asked { time_ms, label, reply });
        if !self.p.sender.send(message) {
            self.snapshot_taken(id, Err("the disk's worker is gone".into()));
        }
    }

    /// Why there can be no snapshot now.
    pub(super) fn may_ask_snapshot(&self) -> Result<(), String> {
        if let Some(why) = &self.log_failure {
            return Err(format!("its log has failed ({why})"));
        }
        if self.released {
            return Err("it is not served: start it again".into());
        }
        let waiting = self.snapshots.asked.len();
        if waiting >= SNAPSHOTS_WAITING_MAX {
            return Err(format!(
                "{waiting} snapshots of it wait to be durable in its log already: try again when the log goes on"
            ));
        }
        Ok(())
    }

    /// The worker's answer.
    pub(super) fn snapshot_taken(&mut self, id: u64, result: Result<Lsn, String>) {
        let Some(Asked { time_ms, label, reply }) = self.snapshots.asked.remove(&id) else {
            return;
        };
        let result = match result {
            Ok(lsn) => {
                if lsn > self.p.record.committed {
                    self.p.snapshots.lock().push(lsn, time_ms, &label);
                }
                Ok(SnapshotTaken { lsn, time_ms })
            }
            Err(why) => Err(CacheError::Snapshot { vdi: self.p.vdi, why }),
        };
        // Whoever asked may have gone; the snapshot is there.
        let _ = reply.send(result);
    }

    /// The worker will answer no more.
    pub(super) fn fail_snapshots(&mut self, why: &str) {
        let ids: Vec<u64> = self.snapshots.asked.keys().copied().collect();
        for id in ids {
            let why = format!(
                "{why}, before it was known to be durable: it may be there once the disk is served again"
            );
            self.snapshot_taken(id, Err(why));
        }
    }

    /// A worker that ended without a word answers no more, either.
    pub(super) fn tick_snapshots(&mut self) {
        if self.p.from_disk.is_closed() {
            self.fail_snapshots("the disk's worker is gone");
            self.fail_looks("the disk's worker is gone");
        }
    }

    /// Snapshots in the log that the store does not have, and those of a cadence.
    pub(super) fn count_pending_snapshots(&self) -> (u64, u64) {
        let mut pending = self.p.snapshots.lock();
        pending.retire(self.p.record.committed);
        (pending.len() as u64, pending.cuts().len() as u64)
    }
}
