//! Written, flushed, acknowledged: what completes when, and when to flush the device.

use super::{FLUSH_AHEAD_AFTER, FLUSH_AHEAD_WRITES};
use super::{FlushUnderWay, Log, SummaryState, Work};
use crate::disk::{Action, Tag};
use blockstore::sabotage::{self, Bug};

impl Log {
    pub fn flush(&mut self, tag: Tag) {
        self.flush_follows = if (1..=FLUSH_AHEAD_WRITES).contains(&self.writes_since_flush) {
            self.flush_follows.saturating_add(1)
        } else {
            0
        };
        self.writes_since_flush = 0;
        if self.failure.is_some() {
            self.completions.push((tag, false));
        } else if self.through.is_some() {
            self.flush_through(tag);
        } else if self.flushed_lsn >= self.staged_lsn || sabotage::on(Bug::AckBeforeFlush) {
            self.completions.push((tag, true));
        } else {
            self.flush_waiters.push_back((self.staged_lsn, tag));
        }
    }

    /// Batches that are written without a gap count; their requests complete, or wait for a flush.
    pub(super) fn pop_written(&mut self) {
        if sabotage::on(Bug::AckAcrossGap) {
            self.batches.make_contiguous().sort_by_key(|batch| !batch.written);
        }
        while self.batches.front().is_some_and(|batch| batch.written) {
            let Some(batch) = self.batches.pop_front() else { break };
            self.written += 1;
            self.written_lsn = batch.last_lsn;
            for tag in batch.tags {
                if self.write_through || !self.through_waiters.is_empty() {
                    self.through_waiters.push_back((batch.last_lsn, tag));
                } else {
                    self.completions.push((tag, true));
                }
            }
        }
    }

    /// Completes what waited for the flush that just finished.
    pub(super) fn release_waiters(&mut self) {
        for waiters in [&mut self.through_waiters, &mut self.flush_waiters] {
            while waiters.front().is_some_and(|(lsn, _)| *lsn <= self.flushed_lsn) {
                self.completions.extend(waiters.pop_front().map(|(_, tag)| (tag, true)));
            }
        }
        self.answer_snapshots();
    }

    /// Starts a device flush if someone waits for one that could begin now. One at a time: whoever comes
    /// meanwhile shares the next.
    pub(super) fn start_flush(&mut self, actions: &mut Vec<Action>) {
        if self.flush_under_way.is_some() || !self.flush_wanted() {
            return;
        }
        self.flush_under_way = Some(FlushUnderWay { lsn: self.written_lsn, batch: self.written });
        let (op, legs) = self.begin(Work::Flush);
        actions.extend(legs.iter().map(|leg| Action::Flush { op: Self::op_id(op, leg), leg }));
    }

    fn flush_wanted(&self) -> bool {
        let for_guest = self.flush_waiters.front().is_some_and(|(lsn, _)| *lsn <= self.written_lsn);
        let for_seal = self.closing.iter().any(|closing| {
            closing.summary == SummaryState::Due
                && closing.last_batch <= self.written
                && closing.last_batch > self.flushed
        });
        for_guest
            || !self.through_waiters.is_empty()
            || self.snapshot_wants_flush()
            || for_seal
            || self.flush_ahead()
    }

    /// A guest that flushes after each write will flush again: start before it asks.
    fn flush_ahead(&self) -> bool {
        self.flush_follows >= FLUSH_AHEAD_AFTER
            && self.written_lsn > self.flushed_lsn
            && self.written_lsn == self.staged_lsn
    }

    /// The last leg failed: after a failed write or flush nothing about it is certain any more. Everything waits until it
    /// is known whether the store can take its place.
    pub(super) fn fail(&mut self, why: &str) {
        if self.failure.is_none() && self.through.is_none() {
            self.hold(why);
        }
    }
}
