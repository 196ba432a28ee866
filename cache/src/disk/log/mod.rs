//! The log of one disk: the open segment, batches under way, flushes, seals.
//!
//! A segment's life here: granted → open (records are appended) → closing (its last batch is under way, then a flush,
//! then its summary) → sealed, which the flusher is told. Segments close and seal in order of their sequence.
//!
//! Invariants:
//! * INV-LOG-1: LSNs are dense and given out in the order of records in the log.
//! * INV-LOG-2: a write is completed only after every batch up to its own is on the device (rule L1); a flush only after a
//!   device flush that started when all batches before it were written.
//! * INV-LOG-3: a summary is written only after a device flush that covers all records of its segment (rule L4).
//! * INV-LOG-4: an LSN is given out only when its record has its place, summary included (rule L10).
//! * INV-LOG-5: an operation is done when it is done on every member of the set of legs that is durable on the device
//!   (rule L5): a leg that fails keeps everything waiting until the set without it is; see `legs.rs`.
//! * INV-LOG-6: a leg that joins lacks only what is in segments that were sealed when [`FromDisk::LegJoined`] was said, and
//!   in those that are older.
//! * INV-LOG-7: with no leg left, a request is done when the store durably has it, and none is before it is known that the
//!   store has all that was done before (rule L6); see `through.rs`.
//! * INV-LOG-8: a snapshot is answered only when it is durable (rule C4); it holds what has a lower LSN; see `snapshots.rs`.
//! * INV-LOG-9: a cut stands in the record of the entry that it is behind, and holds that; see `cuts.rs`.

mod append;
mod cuts;
mod durable;
mod legs;
mod seal;
mod snapshots;
#[cfg(test)]
mod tests;
mod through;

pub use snapshots::SNAPSHOTS_WAITING_MAX;

use super::{Action, Identity, Tag};
use crate::disk::plan::SegmentId;
use crate::format::{Geometry, LegSet};
use crate::image::{ImagePool, SegmentImage};
use crate::link::{FromDisk, Grant};
use crate::pending::LogCut;
use blockstore::types::Lsn;
use hashbrown::HashMap;
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::sync::Arc;

/// Batches that may be under way at once; more requests gather in the next one meanwhile.
const BATCHES_MAX: usize = 4;
/// Full segments that may wait to be sealed.
const CLOSING_MAX: usize = 16;
/// A guest that flushes after at most so many writes, again and again, gets its flush started ahead.
const FLUSH_AHEAD_WRITES: u32 = 2;
/// How often it must have done so.
const FLUSH_AHEAD_AFTER: u32 = 4;

/// The segment that is appended to.
#[derive(Debug)]
struct Open {
    grant: Grant,
    image: Arc<SegmentImage>,
    first_lsn: Lsn,
    /// Next free block.
    position: u32,
    /// All entries so far: becomes the summary.
    entries: Vec<u8>,
    /// The cuts among them.
    cuts: Vec<LogCut>,
    /// The batch being gathered.
    gathering: Option<Gathering>,
    /// The segment header goes out with the first batch.
    header_due: bool,
}

/// A batch that still takes requests.
#[derive(Debug)]
struct Gathering {
    /// Block of its header.
    header: u32,
    first_lsn: Lsn,
    /// Where its entries start in those of the segment.
    entries_from: usize,
    payload_blocks: u32,
    tags: SmallVec<[Tag; 16]>,
}

/// A batch on its way to the device.
#[derive(Debug)]
struct Batch {
    op: u64,
    last_lsn: Lsn,
    written: bool,
    tags: SmallVec<[Tag; 16]>,
}

/// A full segment on its way to be sealed.
#[derive(Debug)]
struct Closing {
    grant: Grant,
    image: Arc<SegmentImage>,
    first_lsn: Lsn,
    last_lsn: Lsn,
    used_blocks: u32,
    entries: Vec<u8>,
    cuts: Vec<LogCut>,
    /// Number of its last batch.
    last_batch: u64,
    summary: SummaryState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SummaryState {
    Due,
    UnderWay,
    Written,
}

/// What an operation is for.
#[derive(Clone, Copy, Debug)]
enum Work {
    Batch,
    Flush,
    Summary { seq: u64 },
}

/// A leg that is being filled: written like a member, but none yet.
#[derive(Clone, Copy, Debug)]
struct Joining {
    leg: u8,
    /// The driver's name for this attempt.
    id: u64,
    /// Segments up to this sequence number may have records that it lacks.
    before: u64,
    /// They are sealed, and that was said.
    told: bool,
}

/// An operation under way on one leg or more.
#[derive(Clone, Copy, Debug)]
struct Op {
    work: Work,
    /// Legs on which it is not done.
    missing: LegSet,
    /// Legs that were asked and have not answered.
    asked: LegSet,
}

/// A device flush under way and what it will make durable.
#[derive(Clone, Copy, Debug)]
struct FlushUnderWay {
    lsn: Lsn,
    batch: u64,
}

/// Someone waits for all segments up to `seq` to be sealed.
#[derive(Clone, Copy, Debug)]
struct Roll {
    id: u64,
    seq: u64,
    lsn: Lsn,
}

/// Place for an entry's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// First block in the segment.
    pub position: u32,
    /// How many blocks, at most as many as asked for.
    pub blocks: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Log {
    identity: Identity,
    geometry: Geometry,
    images: Arc<ImagePool>,
    open: Option<Open>,
    spare: VecDeque<Grant>,
    /// A segment of which guests may fill only so many blocks for now.
    ration: Option<(u64, u32)>,
    want_sent: bool,
    closing: VecDeque<Closing>,
    newly_sealed: Vec<(SegmentId, Lsn)>,
    batches: VecDeque<Batch>,
    /// Batches sent / written without a gap / durable, counted from the start.
    sent: u64,
    written: u64,
    flushed: u64,
    staged_lsn: Lsn,
    written_lsn: Lsn,
    flushed_lsn: Lsn,
    /// Newest flushed LSN that a header on the device states.
    noted_lsn: Lsn,
    flush_under_way: Option<FlushUnderWay>,
    flush_waiters: VecDeque<(Lsn, Tag)>,
    write_through: bool,
    through_waiters: VecDeque<(Lsn, Tag)>,
    writes_since_flush: u32,
    flush_follows: u32,
    marker_due: bool,
    rolls: VecDeque<Roll>,
    snapshots: snapshots::Snapshots,
    cuts: cuts::Cuts,
    /// Writes that `poll` has not handed out yet.
    writes: Vec<Action>,
    /// Legs in the durable set of members.
    members: LegSet,
    /// Legs on which something failed: not used any more, and about to be put out of the set.
    failing: LegSet,
    /// Legs that have not answered for too long while another has: not read, but written and waited for like any other
    /// until they are out.
    silent: LegSet,
    /// When that was looked at last, no leg had answered.
    all_silent: bool,
    joining: Option<Joining>,
    ops: HashMap<u64, Op>,
    next_op: u64,
    completions: Vec<(Tag, bool)>,
    /// No leg is left, and the store may take their place.
    through: Option<through::Through>,
    failure: Option<String>,
    failure_told: bool,
    outbox: Vec<FromDisk>,
}

impl Log {
    pub fn new(
        identity: Identity,
        geometry: Geometry,
        images: Arc<ImagePool>,
        last_lsn: Lsn,
        grants: Vec<Grant>,
        members: LegSet,
    ) -> Self {
        Self {
            identity,
            geometry,
            images,
            open: None,
            spare: grants.into(),
            ration: None,
            want_sent: false,
            closing: VecDeque::new(),
            newly_sealed: Vec::new(),
            batches: VecDeque::new(),
            sent: 0,
            written: 0,
            flushed: 0,
            staged_lsn: last_lsn,
            written_lsn: last_lsn,
            flushed_lsn: last_lsn,
            noted_lsn: last_lsn,
            flush_under_way: None,
            flush_waiters: VecDeque::new(),
            write_through: false,
            through_waiters: VecDeque::new(),
            writes_since_flush: 0,
            flush_follows: 0,
            marker_due: false,
            rolls: VecDeque::new(),
            snapshots: snapshots::Snapshots::default(),
            cuts: cuts::Cuts::default(),
            writes: Vec::new(),
            members,
            failing: LegSet::NONE,
            silent: LegSet::NONE,
            all_silent: false,
            joining: None,
            ops: HashMap::new(),
            next_op: 1,
            completions: Vec::new(),
            through: None,
            failure: None,
            failure_told: false,
            outbox: Vec::new(),
        }
    }

    pub fn staged_lsn(&self) -> Lsn {
        self.staged_lsn
    }

    pub fn flushed_lsn(&self) -> Lsn {
        self.flushed_lsn
    }

    pub fn has_failed(&self) -> bool {
        self.failure.is_some()
    }

    pub fn set_write_through(&mut self, on: bool) {
        self.write_through = on;
    }

    pub fn grant(&mut self, grant: Grant) {
        self.want_sent = false;
        self.spare.push_back(grant);
        self.stage_snapshots();
    }

    /// How much guests may fill of a segment, which may not be here yet; none: all of it.
    pub fn ration(&mut self, seq: u64, blocks: Option<u32>) {
        // Segments in memory have sequence numbers of their own.
        self.ration = blocks.filter(|_| self.through.is_none()).map(|blocks| (seq, blocks));
    }

    /// Lets the open segment be sealed, if anything is in it.
    pub fn close_written(&mut self) {
        if self.open.as_ref().is_some_and(|open| !open.entries.is_empty()) {
            self.close_segment();
        }
    }

    pub fn roll(&mut self, id: u64) {
        self.close_written();
        let seq = self.closing.back().map_or(0, |closing| closing.grant.seq);
        self.rolls.push_back(Roll { id, seq, lsn: self.staged_lsn });
    }

    pub fn tick(&mut self) {
        self.marker_due = self.through.is_none() && self.flushed_lsn > self.noted_lsn;
    }

    /// The operation is done on every member.
    fn done(&mut self, op: u64, work: Work) {
        match work {
            Work::Batch => {
                if let Some(batch) = self.batches.iter_mut().find(|batch| batch.op == op) {
                    batch.written = true;
                }
                self.pop_written();
            }
            Work::Flush => {
                if let Some(done) = self.flush_under_way.take() {
                    self.flushed = done.batch;
                    self.flushed_lsn = self.flushed_lsn.max(done.lsn);
                    self.release_waiters();
                }
            }
            Work::Summary { seq } => {
                if let Some(closing) = self.closing.iter_mut().find(|c| c.grant.seq == seq) {
                    closing.summary = SummaryState::Written;
                }
            }
        }
    }

    pub fn poll(&mut self, actions: &mut Vec<Action>) {
        if self.snapshots_wait() {
            self.stage_snapshots();
        }
        if self.through.is_some() {
            self.advance_through();
        } else if self.failure.is_none() {
            if self.marker_due {
                self.stage_marker();
            }
            self.send_gathered();
            self.start_flush(actions);
            self.advance_closing();
            if self.snapshots_wait() && self.stage_snapshots() {
                // A full segment was sealed, so that another could be opened.
                self.send_gathered();
            }
            self.ask_for_segment();
        }
        self.answer_rolls();
        self.answer_join();
        actions.append(&mut self.writes);
        actions.extend(self.outbox.drain(..).map(Action::Send));
    }

    fn send_gathered(&mut self) {
        let gathered = self.open.as_ref().is_some_and(|open| open.gathering.is_some());
        if gathered && self.batches.len() < BATCHES_MAX {
            self.send_batch();
        }
    }

    /// What there is to be said, in its order.
    pub fn said(&mut self) -> std::vec::Drain<'_, FromDisk> {
        self.outbox.drain(..)
    }

    pub fn newly_sealed(&mut self) -> std::vec::Drain<'_, (SegmentId, Lsn)> {
        self.newly_sealed.drain(..)
    }

    pub fn completions(&mut self) -> std::vec::Drain<'_, (Tag, bool)> {
        self.completions.drain(..)
    }

    pub fn is_quiet(&self) -> bool {
        let gathering = self.open.as_ref().is_some_and(|open| open.gathering.is_some());
        self.ops.is_empty()
            && self.rolls.is_empty()
            && self.completions.is_empty()
            && self.outbox.is_empty()
            && self.writes.is_empty()
            && self.is_through_quiet()
            && (self.failure.is_some()
                || (!gathering
                    && self.closing.is_empty()
                    && self.flush_waiters.is_empty()
                    && self.are_snapshots_durable()))
    }

    pub fn take_unused_grants(&mut self) -> Vec<Grant> {
        let mut grants: Vec<Grant> = self.spare.drain(..).collect();
        if self.through.is_some() {
            // What is open then is no segment of the device.
            return grants;
        }
        if self.open.as_ref().is_some_and(|open| open.entries.is_empty() && open.header_due) {
            grants.extend(self.open.take().map(|open| open.grant));
        }
        grants
    }
}
