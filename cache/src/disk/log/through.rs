//! No leg is left: what becomes of the log then (rule L6).
//!
//! *Held.* What is staged and not sealed is handed to the asynchronous side as it lies in memory, and nothing is completed,
//! staged or read locally until that has found out whether everything up to there reaches the store. If it does not, the
//! log has failed. *Written through.* If it does, the store has all that was ever acknowledged. From then on segments exist
//! in memory only: what gathers while one is being committed goes with the next, and a request completes, in LSN order,
//! when the store's image durably holds it. Nothing is kept locally, reads go to the store, and LSNs count on, so that a
//! log that turns up later is older than the store.
//!
//! Crash behaviour: held or not, nothing is acknowledged that the store does not have.

use super::{Closing, Log, SummaryState};
use crate::disk::Tag;
use crate::disk::plan::SegmentId;
use crate::link::{FromDisk, Grant, SealedSegment};
use blockstore::types::Lsn;
use std::collections::VecDeque;

/// Full segments in memory that may wait for the one that is being committed.
const WAITING_MAX: usize = 1;

/// See the module.
#[derive(Debug)]
pub(super) struct Through {
    /// The store has everything up to the moment at which the last leg failed.
    settled: bool,
    /// The store has everything up to here.
    committed: Lsn,
    /// Last LSN that the asynchronous side was given.
    handed: Lsn,
    /// Who waits for the store to have what, in LSN order.
    waiters: VecDeque<(Lsn, Tag)>,
    next_seq: u64,
}

impl Log {
    /// The last leg failed: everything waits until it is known whether the store can have all of it.
    pub(super) fn hold(&mut self, why: &str) {
        // What was gathering becomes a record in memory like the others.
        self.close_segment();
        let batches = self.batches.drain(..);
        let mut waiters: Vec<(Lsn, Tag)> = self.through_waiters.drain(..).collect();
        waiters.extend(batches.flat_map(|b| b.tags.into_iter().map(move |tag| (b.last_lsn, tag))));
        waiters.extend(self.flush_waiters.drain(..));
        // A stable sort: a write comes before the flush that waits for it.
        waiters.sort_by_key(|(lsn, _)| *lsn);
        (self.flush_under_way, self.ration) = (None, None);
        self.writes.clear();
        self.ops.clear();
        let next_seq = self.closing.back().map_or(0, |closing| closing.grant.seq);
        let next_seq = self.spare.iter().map(|grant| grant.seq).fold(next_seq, u64::max) + 1;
        self.through = Some(Through {
            settled: false,
            committed: Lsn(0),
            handed: self.staged_lsn,
            waiters: waiters.into(),
            next_seq,
        });
        let mut tail = Vec::new();
        for index in 0..self.closing.len() {
            self.finish_image(index);
            tail.push(in_memory(&self.closing[index]));
        }
        tail.retain(|segment| segment.first_lsn <= segment.last_lsn);
        self.outbox.push(FromDisk::NoLegLeft {
            reason: why.to_owned(),
            tail,
            flushed: self.flushed_lsn,
        });
    }

    /// The store has everything that was staged when the last leg failed.
    pub fn write_through_from(&mut self, committed: Lsn) {
        let Some(through) = &mut self.through else { return };
        through.settled = true;
        self.closing.clear();
        self.committed(committed);
    }

    /// Something of what was acknowledged does not reach the store: the log has failed.
    pub fn give_up(&mut self, why: &str) {
        let waiters = self.through.take().map(|through| through.waiters).unwrap_or_default();
        self.failure.get_or_insert(why.to_owned());
        // Whoever decided this knows.
        self.failure_told = true;
        self.completions.extend(waiters.into_iter().map(|(_, tag)| (tag, false)));
        // Read from memory still, like what was sealed is from the device; never written.
        let open = self.open.as_mut().and_then(|open| open.gathering.take());
        self.completions.extend(open.into_iter().flat_map(|g| g.tags).map(|tag| (tag, false)));
        self.fail_snapshots(why);
    }

    /// The store's image reaches this LSN.
    pub fn committed(&mut self, lsn: Lsn) {
        let Some(through) = &mut self.through else { return };
        through.committed = through.committed.max(lsn);
        if through.settled {
            self.flushed_lsn = self.flushed_lsn.max(lsn);
        }
        while through.settled && through.waiters.front().is_some_and(|(at, _)| *at <= lsn) {
            self.completions.extend(through.waiters.pop_front().map(|(_, tag)| (tag, true)));
        }
        self.answer_snapshots();
    }

    /// No leg is left, and the log has not failed.
    pub fn is_through(&self) -> bool {
        self.through.is_some()
    }

    /// Nothing can be told of the disk's content for now but by whoever sorts out what the last leg left.
    pub fn is_held(&self) -> bool {
        self.through.as_ref().is_some_and(|through| !through.settled)
    }

    /// A flush in write-through: what was staged before it must be in the store.
    pub(super) fn flush_through(&mut self, tag: Tag) {
        let staged = self.staged_lsn;
        let Some(through) = &mut self.through else { return };
        if through.settled && through.committed >= staged {
            self.completions.push((tag, true));
        } else {
            // Those of records that still gather have no later LSN.
            through.waiters.push_back((staged, tag));
        }
    }

    /// The tags of a record that is complete in memory wait for the store.
    pub(super) fn wait_for_store(&mut self, tags: impl IntoIterator<Item = Tag>) {
        let staged = self.staged_lsn;
        if let Some(through) = &mut self.through {
            through.waiters.extend(tags.into_iter().map(|tag| (staged, tag)));
        }
    }

    /// A place to stage in: no segment of the device, which is gone.
    pub(super) fn memory_grant(&mut self) -> Option<Grant> {
        let waiting = self.closing.len();
        let through = self.through.as_mut()?;
        if !through.settled || waiting > WAITING_MAX {
            return None;
        }
        let seq = through.next_seq;
        through.next_seq += 1;
        Some(Grant { id: SegmentId(0), seq, nonce: seq, roomy: false })
    }

    /// Hands the next segment to the asynchronous side, if it has none.
    pub(super) fn advance_through(&mut self) {
        let Some(through) = &self.through else { return };
        if !through.settled || through.handed > through.committed {
            return;
        }
        if self.closing.is_empty() && self.open.as_ref().is_some_and(|o| !o.entries.is_empty()) {
            self.close_segment();
        }
        if self.closing.is_empty() {
            return;
        }
        self.finish_image(0);
        let Some(closing) = self.closing.pop_front() else { return };
        if let Some(through) = &mut self.through {
            through.handed = closing.last_lsn;
        }
        self.outbox.push(FromDisk::Sealed(in_memory(&closing)));
    }

    /// Nothing waits for the store.
    pub(super) fn is_through_quiet(&self) -> bool {
        let staged = self.staged_lsn;
        let done = |through: &Through| through.settled && through.committed >= staged;
        self.through.as_ref().is_none_or(|through| done(through) && through.waiters.is_empty())
    }

    /// Puts the summary into the image of a segment that will not be written: whoever replays it finds there what it holds.
    fn finish_image(&mut self, index: usize) {
        if self.closing[index].summary == SummaryState::Due {
            self.summarize(index);
        }
    }
}

fn in_memory(closing: &Closing) -> SealedSegment {
    SealedSegment {
        id: closing.grant.id,
        seq: closing.grant.seq,
        first_lsn: closing.first_lsn,
        last_lsn: closing.last_lsn,
        used_blocks: closing.used_blocks,
        cuts: closing.cuts.clone(),
        image: Some(closing.image.clone()),
    }
}
