//! Operations on the legs, and what happens when one fails.
//!
//! A leg on which a write or flush failed is used no more. What was under way on it stays undone, and so unacknowledged,
//! until the asynchronous side says that the set of members without it is durable on the others. If no member is left,
//! the log has failed.

use super::{Log, Op, Work};
use crate::disk::plan::SegmentId;
use crate::disk::{Action, OpId};
use crate::format::LegSet;
use crate::format::legs::LEGS_MAX;
use crate::image::SegmentImage;
use crate::link::FromDisk;
use std::ops::Range;
use std::sync::Arc;

impl Log {
    /// Legs that can be read from: they hold everything and nothing failed on them.
    pub fn readable(&self) -> LegSet {
        let sound = self.members.minus(self.failing);
        // With no sound leg left, data that is there may still be read: checksums judge it.
        if sound.is_empty() { self.members } else { sound }
    }

    /// The operation's name on one leg.
    pub(super) fn op_id(op: u64, leg: u8) -> OpId {
        OpId(op * LEGS_MAX as u64 + u64::from(leg))
    }

    /// Starts an operation on all members; the caller asks those of the returned legs.
    pub(super) fn begin(&mut self, work: Work) -> (u64, LegSet) {
        let op = self.next_op;
        self.next_op += 1;
        let asked = self.members.minus(self.failing);
        self.ops.insert(op, Op { work, missing: self.members, asked });
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
        let Some(pending) = self.ops.get_mut(&op) else { return };
        pending.asked = pending.asked.minus(this);
        let work = pending.work;
        match result {
            Ok(()) => pending.missing = pending.missing.minus(this),
            Err(errno) if self.members.contains(leg) => {
                let what = match work {
                    Work::Batch => "writing a record",
                    Work::Flush => "flushing",
                    Work::Summary { .. } => "writing a summary",
                };
                self.leg_failed(leg, what, errno);
            }
            Err(_) => {}
        }
        self.finish_op(op);
    }

    /// Something failed on a leg, which is not to be trusted any more.
    pub fn leg_failed(&mut self, leg: u8, what: &str, errno: i32) {
        let error = std::io::Error::from_raw_os_error(errno);
        let why = format!("{what} on the cache device failed: {error}");
        let left = self.members.minus(self.failing).minus(LegSet::NONE.with(leg));
        if left.is_empty() {
            self.fail(&why);
        } else if self.members.contains(leg) && !self.failing.contains(leg) {
            self.failing = self.failing.with(leg);
            self.outbox.push(FromDisk::LegFailed { leg, reason: why });
        }
    }

    /// The set of members is durable: what was done on all of them is done.
    pub fn set_members(&mut self, members: LegSet) {
        self.members = self.members.and(members);
        if self.members.minus(self.failing).is_empty() {
            self.fail("no leg of the cache is left");
        }
        let mut ops: Vec<u64> = self.ops.keys().copied().collect();
        ops.sort_unstable();
        for op in ops {
            self.finish_op(op);
        }
    }

    /// Ends an operation that is done on all members; after the log failed, one whose answers are all in.
    fn finish_op(&mut self, op: u64) {
        let failed = self.failure.is_some();
        let over = |op: &Op| match failed {
            false => op.missing.and(self.members).is_empty(),
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
