//! Operations on the legs, and what happens when one fails.
//!
//! A leg on which a write or flush failed is used no more. What was under way on it stays undone, and so unacknowledged,
//! until the asynchronous side says that the set of members without it is durable on the others. If no member is left,
//! see `through.rs`.
//!
//! A leg that does not answer at all is only suspected: the driver says so, and the asynchronous side is asked to put it out.
//! Until it is out, nothing that waits for it is done, and what is written goes to it as well, so that it lacks nothing should it
//! come back, or should another disk have found the other leg silent first. The last leg is waited for however long it takes.
//!
//! A leg that is joining is written like a member and waited for like one, so that it lacks nothing when it becomes one;
//! but it is not read, and it does not count as a leg that is left. If it fails, what waits for it waits until the
//! asynchronous side has given it up, which takes no I/O unless it was about to be made a member.

use super::{Joining, Log, Op, Work};
use crate::disk::plan::SegmentId;
use crate::disk::{Action, OpId};
use crate::format::LegSet;
use crate::format::legs::LEGS_MAX;
use crate::image::SegmentImage;
use crate::link::FromDisk;
use blockstore::sabotage::{self, Bug};
use std::ops::Range;
use std::sync::Arc;

impl Log {
    /// Legs that can be read from: they hold everything and nothing failed on them.
    pub fn readable(&self) -> LegSet {
        let sound = self.members.minus(self.failing).minus(self.silent);
        // With no sound leg left, data that is there may still be read: checksums judge it.
        if sound.is_empty() { self.members } else { sound }
    }

    /// Legs that are written.
    pub fn written_legs(&self) -> LegSet {
        self.joining.map_or(self.members, |joining| self.members.with(joining.leg))
    }

    /// The operation's name on one leg.
    pub(super) fn op_id(op: u64, leg: u8) -> OpId {
        OpId(op * LEGS_MAX as u64 + u64::from(leg))
    }

    /// Starts an operation on all legs that are written; the caller asks those of the returned legs.
    pub(super) fn begin(&mut self, work: Work) -> (u64, LegSet) {
        let op = self.next_op;
        self.next_op += 1;
        let missing = self.written_legs();
        let asked = missing.minus(self.failing);
        self.ops.insert(op, Op { work, missing, asked });
        (op, asked)
    }

    /// Writes a range of a segment's image to its place.
    pub(super) fn write(
        &mut self,
        work: Work,
        segment: SegmentId,
        image: &Arc<SegmentImage>,
        range: Range<usize>,
    ) -> u64 {
        let (op, legs) = self.begin(work);
        let offset = self.geometry.segment_offset(segment) + range.start as u64;
        self.writes.extend(legs.iter().map(|leg| Action::Write {
            op: Self::op_id(op, leg),
            leg,
            offset,
            image: Arc::clone(image),
            start: range.start,
            len: range.len(),
        }));
        op
    }

    /// A leg answered; `Err` carries the errno.
    pub fn io_done(&mut self, id: OpId, result: Result<(), i32>) {
        let (op, leg) = (id.0 / LEGS_MAX as u64, (id.0 % LEGS_MAX as u64) as u8);
        let this = LegSet::NONE.with(leg);
        // An operation that was done without a leg, which was put out meanwhile, is not known any more.
        // Nor is the answer of one that was put out, whose number another leg may have by now.
        let Some(pending) = self.ops.get_mut(&op).filter(|op| op.asked.contains(leg)) else {
            return;
        };
        pending.asked = pending.asked.minus(this);
        let work = pending.work;
        match result {
            Ok(()) if sabotage::on(Bug::OneLegIsEnough) => pending.missing = LegSet::NONE,
            Ok(()) => pending.missing = pending.missing.minus(this),
            Err(errno) => {
                let what = match work {
                    Work::Batch => "writing a record",
                    Work::Flush => "flushing",
                    Work::Summary { .. } => "writing a summary",
                };
                self.leg_failed(leg, what, errno);
            }
        }
        self.finish_op(op);
    }

    /// Whether the answer of this operation still matters.
    pub fn wants(&self, id: OpId) -> bool {
        let (op, leg) = (id.0 / LEGS_MAX as u64, (id.0 % LEGS_MAX as u64) as u8);
        self.ops.get(&op).is_some_and(|op| op.asked.contains(leg))
    }

    /// Something failed on a leg, which is not to be trusted any more.
    pub fn leg_failed(&mut self, leg: u8, what: &str, errno: i32) {
        if self.through.is_some() {
            return;
        }
        let error = std::io::Error::from_raw_os_error(errno);
        let why = format!("{what} on the cache device failed: {error}");
        let left = self.members.minus(self.failing).minus(LegSet::NONE.with(leg));
        if left.is_empty() {
            self.fail(&why);
        } else if self.written_legs().contains(leg) && !self.failing.contains(leg) {
            self.failing = self.failing.with(leg);
            let joining = self.joining.filter(|joining| joining.leg == leg).map(|j| j.id);
            self.outbox.push(FromDisk::LegFailed { leg, joining, reason: why });
        }
    }

    /// Operations on these legs have been under way for longer than is waited for; none on the others has.
    pub fn legs_silent(&mut self, overdue: LegSet) {
        if self.through.is_some() {
            // Nothing waits for a leg any more, and none of them can be put out.
            self.silent = LegSet::NONE;
            return;
        }
        let overdue = overdue.and(self.written_legs()).minus(self.failing);
        let left = self.members.minus(self.failing).minus(overdue);
        // Where all were silent a moment ago, those that are now may be about to come back as well.
        let all_were = std::mem::replace(&mut self.all_silent, left.is_empty());
        self.silent = if left.is_empty() || all_were { LegSet::NONE } else { overdue };
        if self.failure.is_some() {
            return;
        }
        for leg in self.silent.iter() {
            let joining = self.joining.filter(|joining| joining.leg == leg).map(|j| j.id);
            self.outbox.push(FromDisk::LegSilent { leg, joining });
        }
    }

    /// Legs that are not waited for any more by who can do without them.
    pub fn silent(&self) -> LegSet {
        self.silent
    }

    /// The set of members is durable: what was done on all of them is done. A leg that was joining is one of them, for every
    /// operation since it joined counts as done only when it is done there as well; or it is given up.
    pub fn set_members(&mut self, members: LegSet) {
        self.members = self.written_legs().and(members);
        self.joining = None;
        // Who is silent now is found out anew: a number that is free may be given to another leg.
        self.silent = self.silent.and(self.members);
        if self.members.minus(self.failing).is_empty() {
            self.fail("no leg of the cache is left");
        }
        if !self.members.is_empty() {
            // The number of a leg that is gone may be given to another, which must not be taken for it.
            self.failing = self.failing.and(self.members);
            for op in self.ops.values_mut() {
                op.missing = op.missing.and(self.members);
                op.asked = op.asked.and(self.members);
            }
        }
        self.finish_ops();
    }

    /// From now on the leg is written. What was written without it is sealed, so that it can be copied.
    pub fn join(&mut self, leg: u8, id: u64) {
        if self.members.contains(leg) || self.failure.is_some() || self.through.is_some() {
            debug_assert!(!self.members.contains(leg), "a member does not join");
            return;
        }
        if self.open.as_ref().is_some_and(|open| !open.header_due) {
            self.close_segment();
        }
        let before = self.closing.back().map_or(0, |closing| closing.grant.seq);
        self.joining = Some(Joining { leg, id, before, told: false });
    }

    /// Says that the leg has joined, once no segment is open of which it lacks a part.
    pub(super) fn answer_join(&mut self) {
        let oldest = self.closing.front().map(|closing| closing.grant.seq);
        if let Some(joining) = &mut self.joining
            && !joining.told
            && oldest.is_none_or(|oldest| oldest > joining.before)
        {
            joining.told = true;
            self.outbox.push(FromDisk::LegJoined { id: joining.id });
        }
    }

    fn finish_ops(&mut self) {
        let mut ops: Vec<u64> = self.ops.keys().copied().collect();
        ops.sort_unstable();
        for op in ops {
            self.finish_op(op);
        }
    }

    /// Ends an operation that is done on all legs that are written; after the log failed, one whose answers are all in.
    fn finish_op(&mut self, op: u64) {
        let failed = self.failure.is_some();
        let written = self.written_legs();
        let over = |op: &Op| match failed {
            false => op.missing.and(written).is_empty(),
            true => op.asked.is_empty(),
        };
        if self.ops.get(&op).is_some_and(over)
            && let Some(ended) = self.ops.remove(&op)
            && !failed
        {
            self.done(op, ended.work);
        }
    }
}
