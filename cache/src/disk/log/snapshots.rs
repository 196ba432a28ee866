//! Snapshots: records that name a point of the guest's write order.
//!
//! A snapshot holds exactly what was staged before it, by its LSN. It is answered when it is durable in the log, as a flush
//! is: all that wait when a device flush begins share it. While there is no place in the log it waits, and what is staged
//! after it was asked for waits behind it. With no leg left it is answered when the store has it, as a write is.

use super::Log;
use crate::format::record::{push_snapshot, snapshot_len};
use crate::link::FromDisk;
use blockstore::SnapshotLabel;
use blockstore::sabotage::{self, Bug};
use blockstore::types::Lsn;
use std::collections::VecDeque;

/// Snapshots of a disk that may be asked for and not answered yet.
pub const SNAPSHOTS_WAITING_MAX: usize = 1024;

/// A snapshot without a place in the log.
#[derive(Debug)]
struct Asked {
    id: u64,
    time_ms: u64,
    label: SnapshotLabel,
}

/// Snapshots that are not answered yet.
#[derive(Debug, Default)]
pub(super) struct Snapshots {
    asked: VecDeque<Asked>,
    /// Those with a record that is not durable yet, in the order of their LSNs.
    staged: VecDeque<(Lsn, u64)>,
}

impl Log {
    /// Takes a snapshot of what was staged so far; [`FromDisk::SnapshotTaken`] answers.
    pub fn snapshot(&mut self, id: u64, time_ms: u64, label: SnapshotLabel) {
        let waiting = self.snapshots.asked.len() + self.snapshots.staged.len();
        if let Some(why) = &self.failure {
            let why = why.clone();
            self.answer_snapshot(id, Err(why));
        } else if waiting >= SNAPSHOTS_WAITING_MAX {
            let why = format!(
                "{waiting} snapshots of it wait to be durable in its log already: try again when the log goes on"
            );
            self.answer_snapshot(id, Err(why));
        } else {
            self.snapshots.asked.push_back(Asked { id, time_ms, label });
            self.stage_snapshots();
        }
    }

    /// Gives snapshots that wait their place. False if there is none for one of them.
    pub(super) fn stage_snapshots(&mut self) -> bool {
        while let Some(next) = self.snapshots.asked.front() {
            let len = snapshot_len(next.label.as_str().len());
            if self.room_for(len, 0, false).is_none() {
                return false;
            }
            let Some(Asked { id, time_ms, label }) = self.snapshots.asked.pop_front() else {
                break;
            };
            self.staged_lsn = self.staged_lsn.plus(1);
            let open = self.open.as_mut().expect("room was found in the open segment");
            push_snapshot(&mut open.entries, time_ms, &label);
            self.cuts.note_snapshot();
            if sabotage::on(Bug::AckBeforeFlush) || sabotage::on(Bug::AckSnapshotEarly) {
                self.answer_snapshot(id, Ok(self.staged_lsn));
            } else {
                self.snapshots.staged.push_back((self.staged_lsn, id));
            }
        }
        true
    }

    /// Some have no place yet.
    pub(super) fn snapshots_wait(&self) -> bool {
        !self.snapshots.asked.is_empty()
    }

    /// One has a record that is on the device and waits for a flush.
    pub(super) fn snapshot_wants_flush(&self) -> bool {
        self.snapshots.staged.front().is_some_and(|(lsn, _)| *lsn <= self.written_lsn)
    }

    /// Every snapshot that has a record is durable.
    pub(super) fn are_snapshots_durable(&self) -> bool {
        self.snapshots.staged.is_empty()
    }

    /// More is durable now.
    pub(super) fn answer_snapshots(&mut self) {
        let flushed = self.flushed_lsn;
        while self.snapshots.staged.front().is_some_and(|(lsn, _)| *lsn <= flushed) {
            let Some((lsn, id)) = self.snapshots.staged.pop_front() else { break };
            self.answer_snapshot(id, Ok(lsn));
        }
    }

    /// The log has failed: none that waits is known to be durable.
    pub(super) fn fail_snapshots(&mut self, why: &str) {
        for (_, id) in std::mem::take(&mut self.snapshots.staged) {
            self.answer_snapshot(id, Err(why.to_owned()));
        }
        self.refuse_snapshots(why);
    }

    /// Those without a place in the log get none.
    pub fn refuse_snapshots(&mut self, why: &str) {
        for asked in std::mem::take(&mut self.snapshots.asked) {
            self.answer_snapshot(asked.id, Err(why.to_owned()));
        }
    }

    fn answer_snapshot(&mut self, id: u64, result: Result<Lsn, String>) {
        self.outbox.push(FromDisk::SnapshotTaken { id, result });
    }
}
