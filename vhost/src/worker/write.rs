//! Serving writes, zeroings and flushes: staging them into the disk's log, as far as there is space.
//!
//! What finds no space waits, first come first served, and is tried again whenever something happened. The queue holds
//! at most the requests that fit the rings. Reads and flushes go on meanwhile.

use super::slots::{Slot, Slots};
use crate::memory::Cursor;
use crate::request::{Kind, STATUS_IOERR};
use blockstore::types::SECTOR_SIZE;
use cache::disk::{Disk, Staged, Tag};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How staging went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Everything is staged; the disk will complete it.
    Staged,
    /// There was space for some of it, or for nothing.
    Stalled,
    /// Nothing is owed by the disk: the request is finished with the status in its slot.
    Finished,
}

/// Stages what is left of the request.
pub(super) fn stage(slot: &mut Slot, tag: Tag, disk: &mut Disk) -> Outcome {
    let staged = match slot.request.kind {
        Kind::Write => stage_data(slot, tag, disk),
        _ => stage_ranges(slot, tag, disk),
    };
    if !staged {
        return Outcome::Stalled;
    }
    slot.write.all_staged = true;
    if slot.write.owed == 0 { Outcome::Finished } else { Outcome::Staged }
}

fn stage_data(slot: &mut Slot, tag: Tag, disk: &mut Disk) -> bool {
    let done = slot.write.staged;
    let sector = slot.request.sector + (done / SECTOR_SIZE) as u64;
    let mut cursor = Cursor::new(&slot.request.data, done);
    let mut at = 0;
    let mut copy = |offset: usize, into: &mut [u8]| {
        if offset != at {
            cursor = Cursor::new(&slot.request.data, done + offset);
        }
        // SAFETY: the slot holds the guest's memory map.
        unsafe { cursor.copy_from_guest(into) };
        at = offset + into.len();
    };
    match disk.write(tag, sector, slot.request.len - done, &mut copy) {
        Staged::All => slot.write.owed += 1,
        Staged::Part(bytes) => {
            slot.write.staged += bytes;
            return false;
        }
        Staged::Failed => slot.status = STATUS_IOERR,
    }
    true
}

fn stage_ranges(slot: &mut Slot, tag: Tag, disk: &mut Disk) -> bool {
    let discard = slot.request.kind == Kind::Discard;
    while let Some(range) = slot.request.ranges.get(slot.write.range) {
        let done = (slot.write.staged / SECTOR_SIZE) as u64;
        match disk.zero(tag, range.sector + done, range.sectors - done, discard) {
            Staged::All => {
                slot.write.owed += 1;
                slot.write.range += 1;
                slot.write.staged = 0;
            }
            Staged::Part(bytes) => {
                slot.write.staged += bytes;
                return false;
            }
            Staged::Failed => {
                slot.status = STATUS_IOERR;
                break;
            }
        }
    }
    true
}

/// Writes and zeroings that wait for space in the log.
#[derive(Debug, Default)]
pub(super) struct Stalled {
    queue: VecDeque<u32>,
}

impl Stalled {
    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Lets the request in slot `index` wait behind the others.
    pub(super) fn push(&mut self, index: u32, slots: &mut Slots) {
        let slot = slots.at(index);
        slot.write.stalled = true;
        slot.waits();
        self.queue.push_back(index);
    }

    /// Forgets all of them.
    pub(super) fn clear(&mut self) {
        self.queue.clear();
    }

    /// Takes out those that have waited at least so long by `now` and of which nothing was staged. What was given an LSN
    /// in part goes on waiting.
    pub(super) fn take_expired(
        &mut self,
        slots: &mut Slots,
        longer_than: Duration,
        now: Instant,
        expired: &mut Vec<u32>,
    ) {
        self.queue.retain(|&index| {
            let slot = slots.at(index);
            let expires = slot.write.nothing_staged() && slot.has_waited(longer_than, now);
            if expires {
                slot.write.stalled = false;
                expired.push(index);
            }
            !expires
        });
    }

    /// Tries them again, in order, until one does not fit; `finished` collects those that ended. True if anything was
    /// staged.
    pub(super) fn retry(
        &mut self,
        slots: &mut Slots,
        disk: &mut Disk,
        finished: &mut Vec<u32>,
    ) -> bool {
        let mut progress = false;
        while let Some(&index) = self.queue.front() {
            let tag = slots.tag(index);
            let slot = slots.at(index);
            let before = (slot.write.range, slot.write.staged);
            let outcome = stage(slot, tag, disk);
            if outcome == Outcome::Stalled {
                return progress || before != (slot.write.range, slot.write.staged);
            }
            progress = true;
            slot.write.stalled = false;
            self.queue.pop_front();
            if outcome == Outcome::Finished {
                finished.push(index);
            }
        }
        progress
    }
}
