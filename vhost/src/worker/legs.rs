//! Legs of the cache that do not answer: which they are, and what becomes of what is under way on them.
//!
//! Once a second each operation's age is looked at. Reads from a leg that is too slow are done on another; writes and flushes
//! wait until the cache says durably that the leg is out, and then count as done without it. What the kernel still works on
//! keeps its memory until it answers, be it never: buffers of ours are kept with the operation. A read into guest memory cannot
//! be given up, since its late answer would overwrite what the guest has there by then; so those are made only where there
//! is one leg, which is waited for.

use super::Worker;
use super::io::{BlockRead, Io, Operation};
use super::read;
use cache::disk::{Disk, Tag};
use cache::format::LegSet;
use std::time::{Duration, Instant};

impl Worker {
    /// Which legs are too slow, and reads that can be had from another.
    pub(super) fn look_at_legs(&mut self) {
        let disk = &mut self.attached.disk;
        if disk.written_legs().len() < 2 {
            return;
        }
        let overdue = self.io.overdue(self.attached.leg_timeout, Instant::now());
        disk.legs_silent(overdue);
        let silent = disk.silent_legs();
        if !silent.is_empty() {
            tracing::warn!(
                disk = self.options.name,
                legs = silent.bits(),
                "a leg of the cache does not answer: what it was asked to read is read from the other"
            );
            self.io.readable = disk.readable_legs();
            self.read_elsewhere(silent);
        }
    }

    /// These legs are not written any more: nothing that is under way there matters.
    pub(super) fn legs_are_out(&mut self, out: LegSet) {
        self.read_elsewhere(out);
        for index in self.io.under_way_on(out) {
            if let Some((tag, read, content)) = self.io.give_up_repair(index)
                && let Some(slot) = self.slots.find(tag)
            {
                self.with_read(slot, |slot, context| {
                    read::block_good(slot, read, content, context.io);
                    read::advance(slot, tag, context)
                });
            }
            self.io.give_up_write(index, &self.attached.disk);
        }
    }

    /// Repeats what is being read from these legs on others, where that can have the data.
    fn read_elsewhere(&mut self, slow: LegSet) {
        for index in self.io.under_way_on(slow) {
            self.io.repeat_read(index, slow);
        }
    }
}

impl Io {
    /// Legs that have had an operation under way for longer than this.
    fn overdue(&self, longer_than: Duration, now: Instant) -> LegSet {
        self.under_way().fold(LegSet::NONE, |legs, (_, leg, since)| {
            let late = now.saturating_duration_since(since) > longer_than;
            if late { legs.with(leg) } else { legs }
        })
    }

    fn under_way_on(&self, legs: LegSet) -> Vec<u32> {
        let on = self.under_way().filter(|(_, leg, _)| legs.contains(*leg));
        on.map(|(index, ..)| index).collect()
    }

    /// Repeats a read into a buffer of ours on another leg than `slow` ones, if it is one.
    fn repeat_read(&mut self, index: u32, slow: LegSet) {
        let elsewhere = self.readable.minus(slow);
        let Some(first) = elsewhere.iter().next() else { return };
        match self.operations.get(index) {
            Some(Operation::Bounce { tag, run, .. }) => {
                let (tag, run) = (*tag, *run);
                self.give_up(index);
                self.read_bounced(tag, run, first);
            }
            Some(Operation::Block { tag, read, .. }) => {
                let (tag, read) = (*tag, *read);
                // The only leg that was not found bad is waited for.
                let Some(leg) = elsewhere.minus(read.bad).iter().next() else { return };
                self.give_up(index);
                let buffer = self.block_buffer();
                self.read_block(tag, BlockRead { leg, ..read }, buffer);
            }
            _ => {}
        }
    }

    /// Gives up the rewriting of a block, if that is what it is; with the block, which is good elsewhere.
    fn give_up_repair(
        &mut self,
        index: u32,
    ) -> Option<(Tag, BlockRead, blockstore::buf::AlignedBuf)> {
        let Some(Operation::Repair { tag, read, buffer, .. }) = self.operations.get(index) else {
            return None;
        };
        let given = (*tag, *read, blockstore::buf::AlignedBuf::copy_of(buffer));
        self.give_up(index);
        Some(given)
    }

    /// Gives up a write or a flush that the disk does not wait for any more.
    fn give_up_write(&mut self, index: u32, disk: &Disk) {
        if let Some(Operation::Write { op, .. } | Operation::Flush { op, .. }) =
            self.operations.get(index)
            && !disk.wants(*op)
        {
            self.give_up(index);
        }
    }
}
