//! From a chain in a ring to its completion: the requests' way through the worker.

use super::Worker;
use super::io::{Fetch, Operation};
use super::read::{self, Context};
use super::slots::Slot;
use super::write::{self, Outcome};
use crate::memory::Cursor;
use crate::request::{self, Kind, STATUS_IOERR, STATUS_OK, Verdict};
use bytes::Bytes;
use cache::disk::{Action, Tag};
use cache::link::{FetchError, FromDisk};
use std::sync::Arc;

/// Requests taken per turn of the loop, before their I/O is started.
const TAKE_MAX: u32 = 128;
/// Bytes of writes taken per turn.
const TAKE_BYTES_MAX: usize = 2 << 20;
/// Bytes of writes that are sent to the device while more are copied.
const SEND_BYTES: usize = 128 << 10;
/// Blocks asked of the store and not answered: 32 MiB. More fetches wait in the worker.
const FETCHING_MAX: u64 = 8192;

/// Names the flush that a switch to write-through waits for; no slot has this tag.
pub(super) const SWITCH_TAG: Tag = Tag::MAX;

impl Worker {
    /// Takes what the guest added to its rings; true if there may be more.
    pub(super) fn take_requests(&mut self) -> bool {
        if self.quiescing.is_some() {
            return false;
        }
        let (mut taken, mut bytes, mut gathered) = (0, 0, 0);
        for queue in 0..self.queues.len() {
            while let Some((chain, map)) = self.queues.pop(queue) {
                let index = self.slots.start(queue, chain.head, &map);
                let slot = self.slots.at(index);
                let verdict = request::parse(map.memory(), chain, &self.limits, &mut slot.request);
                self.counters.in_flight += 1;
                match verdict {
                    Verdict::Serve => {
                        let copied = self.begin(index);
                        bytes += copied;
                        gathered += copied;
                    }
                    Verdict::Answer(status) => {
                        self.counters.refused += 1;
                        self.answer(index, status);
                    }
                    Verdict::Unanswerable => {
                        self.counters.refused += 1;
                        self.give_back(index, 0);
                    }
                }
                taken += 1;
                if gathered >= SEND_BYTES {
                    gathered = 0;
                    self.drive();
                    self.io.uring.submit();
                } else {
                    self.io.uring.submit_early();
                }
                if taken >= TAKE_MAX || bytes >= TAKE_BYTES_MAX {
                    return true;
                }
            }
        }
        false
    }

    /// Starts a valid request; returns the bytes of guest data that it made us copy.
    fn begin(&mut self, index: u32) -> usize {
        let tag = self.slots.tag(index);
        let slot = self.slots.at(index);
        match slot.request.kind {
            Kind::Read => {
                self.counters.reads += 1;
                self.counters.read_bytes += slot.request.len as u64;
                self.with_read(index, |slot, context| read::start(slot, tag, context));
                0
            }
            Kind::Write => {
                let len = slot.request.len;
                self.counters.writes += 1;
                self.counters.written_bytes += len as u64;
                self.stage(index);
                len
            }
            Kind::Discard | Kind::WriteZeroes => {
                self.counters.zeroings += 1;
                self.stage(index);
                0
            }
            Kind::Flush => {
                self.counters.flushes += 1;
                slot.write.owed = 1;
                slot.write.all_staged = true;
                self.attached.disk.flush(tag);
                0
            }
            Kind::GetId => {
                let len = slot.request.len.min(self.options.id.len());
                slot.request.len = len;
                let mut cursor = Cursor::new(&slot.request.data, 0);
                // SAFETY: the slot holds the guest's memory map.
                unsafe { cursor.copy_to_guest(&self.options.id[..len]) };
                self.finish(index, STATUS_OK);
                0
            }
        }
    }

    fn stage(&mut self, index: u32) {
        let tag = self.slots.tag(index);
        // Behind those that wait already, so that nobody waits for ever.
        let outcome = if self.stalled.is_empty() {
            write::stage(self.slots.at(index), tag, &mut self.attached.disk)
        } else {
            Outcome::Stalled
        };
        match outcome {
            Outcome::Staged => {}
            Outcome::Stalled => self.stalled.push(index, &mut self.slots),
            Outcome::Finished => {
                let status = self.slots.at(index).status;
                self.finish(index, status);
            }
        }
    }

    /// Lets the disk decide, does what it says, and completes what it says is complete.
    pub(super) fn drive(&mut self) {
        loop {
            self.poll_disk();
            let progressed = std::mem::take(&mut self.progress);
            if self.stalled.is_empty() || !progressed && self.io.awaited() > 0 {
                return;
            }
            let mut ended = std::mem::take(&mut self.ended);
            let staged = self.stalled.retry(&mut self.slots, &mut self.attached.disk, &mut ended);
            for index in ended.drain(..) {
                let status = self.slots.at(index).status;
                self.finish(index, status);
            }
            self.ended = ended;
            if !staged {
                return;
            }
        }
    }

    fn poll_disk(&mut self) {
        let mut actions = std::mem::take(&mut self.actions);
        self.attached.disk.poll(&mut actions);
        for action in actions.drain(..) {
            match action {
                Action::Write { op, leg, offset, image, start, len } => {
                    let done = 0;
                    self.io.write(Operation::Write { op, leg, offset, image, start, len, done });
                }
                Action::Flush { op, leg } => self.io.flush(op, leg),
                Action::Send(message) => self.attached.link.send(message),
            }
        }
        self.actions = actions;
        self.complete();
    }

    fn complete(&mut self) {
        let mut ended = std::mem::take(&mut self.ended);
        for (tag, ok) in self.attached.disk.completions() {
            if tag == SWITCH_TAG {
                self.switched.pop_front().map(|reply| reply.send(Ok(None)));
                continue;
            }
            let Some(index) = self.slots.find(tag) else { continue };
            let slot = self.slots.at(index);
            if !ok {
                slot.status = STATUS_IOERR;
            }
            slot.write.owed = slot.write.owed.saturating_sub(1);
            if slot.write.owed == 0 && slot.write.all_staged {
                ended.push(index);
            }
        }
        for index in ended.drain(..) {
            let status = self.slots.at(index).status;
            self.finish(index, status);
        }
        self.ended = ended;
    }

    /// A read of the cache device ended.
    pub(super) fn read_done(&mut self, operation: Operation, result: i32) {
        let tag = match &operation {
            Operation::Direct { tag, .. }
            | Operation::Bounce { tag, .. }
            | Operation::Block { tag, .. }
            | Operation::Repair { tag, .. } => *tag,
            other => {
                debug_assert!(false, "{other:?} is no read");
                return;
            }
        };
        let Some(index) = self.slots.find(tag) else {
            debug_assert!(false, "a request ends after its local I/O");
            return;
        };
        self.with_read(index, |slot, context| {
            match operation {
                Operation::Direct { run, arena, .. } => {
                    read::direct_done(slot, tag, run, &arena, result, context.io);
                }
                Operation::Bounce { run, buffer, .. } => {
                    read::bounce_done(slot, tag, run, buffer, result, context.io);
                }
                Operation::Block { read, buffer, .. } => {
                    read::block_done(slot, tag, read, buffer, result, context);
                }
                Operation::Repair { read, leg, buffer, .. } => {
                    read::repair_done(slot, read, leg, buffer, result, context);
                }
                _ => {}
            }
            read::advance(slot, tag, context)
        });
    }

    /// The store answered.
    pub(super) fn fetched(
        &mut self,
        id: u64,
        result: Result<Vec<Option<Bytes>>, FetchError>,
        keep: bool,
    ) {
        let index = (id & u64::from(u32::MAX)) as u32;
        let known = matches!(self.io.operations.get(index), Some(Operation::Fetch(_)));
        if id & !u64::from(u32::MAX) != self.fetch_ids || !known {
            // Asked for by a worker before this one.
            return;
        }
        let Some(Operation::Fetch(fetch)) = self.io.operations.remove(index) else { return };
        self.fetching -= u64::from(fetch.blocks);
        let blocks = result.as_deref().inspect_err(|error| {
            tracing::error!(
                disk = self.options.name, lba = %fetch.lba, blocks = fetch.blocks, %error,
                "blocks cannot be had from the store: the read fails"
            );
        });
        let blocks = blocks.ok().filter(|blocks| whole(blocks));
        if let (Some(blocks), None, true) = (blocks, fetch.patch, keep) {
            for (lba, block) in read::fetched_lbas(&fetch).zip(blocks) {
                if let Some(block) = block {
                    self.attached.disk.fill(lba, block, fetch.ticket);
                }
            }
        }
        if let Some(index) = self.slots.find(fetch.tag) {
            self.with_read(index, |slot, context| {
                read::fetch_done(slot, &fetch, blocks, context.io);
                read::advance(slot, fetch.tag, context)
            });
        }
        self.send_fetches();
    }

    /// Runs a step of a read, then sends the fetches that it asked for and finishes it if it is over.
    pub(super) fn with_read(
        &mut self,
        index: u32,
        step: impl FnOnce(&mut Slot, &mut Context<'_>) -> bool,
    ) {
        let mut context =
            Context { disk: &mut self.attached.disk, io: &mut self.io, fetches: &mut self.fetches };
        let slot = self.slots.at(index);
        let over = step(slot, &mut context);
        let status = slot.status;
        if !self.fetches.is_empty() {
            self.waiting.extend(self.fetches.drain(..));
            self.send_fetches();
        }
        if over {
            self.finish(index, status);
        }
    }

    fn send_fetches(&mut self) {
        while let Some(&fetch) = self.waiting.front() {
            if self.fetching > 0 && self.fetching + u64::from(fetch.blocks) > FETCHING_MAX {
                return;
            }
            self.waiting.pop_front();
            self.fetching += u64::from(fetch.blocks);
            let index = self.io.operations.insert(Operation::Fetch(fetch));
            let id = self.fetch_ids | u64::from(index);
            let Fetch { lba, blocks, unreadable, .. } = fetch;
            self.attached.ask(match unreadable {
                true => FromDisk::Unreadable { id, lba },
                false => FromDisk::Fetch { id, lba, blocks },
            });
        }
    }

    /// Ends a request that was served.
    fn finish(&mut self, index: u32, status: u8) {
        if status != STATUS_OK {
            self.counters.failed += 1;
        }
        self.answer(index, status);
    }

    /// Ends a request with a status.
    pub(super) fn answer(&mut self, index: u32, status: u8) {
        let slot = self.slots.at(index);
        let written = slot.written(status);
        if !slot.orphan {
            // SAFETY: the address was resolved in the memory map that the slot holds.
            unsafe { slot.request.status.write_volatile(status) };
            if let Some(log) = &self.log {
                slot.mark_dirty(log);
            }
        }
        self.give_back(index, written);
    }

    fn give_back(&mut self, index: u32, written: u32) {
        let slot = self.slots.at(index);
        if !slot.orphan {
            self.queues.push(slot.queue, slot.head, written);
        }
        self.slots.end(index);
        self.counters.in_flight -= 1;
    }

    /// The front end is gone. Requests that the kernel or the disk still works on become orphans; the others end here.
    pub(super) fn end_session(&mut self) {
        self.queues.abandon(&mut self.io.uring);
        self.attached.disk.end_boot_trace();
        self.stalled.clear();
        self.waiting.clear();
        self.map = Arc::default();
        self.log = None;
        let under_way: Vec<u32> = self.slots.in_use().collect();
        for index in under_way {
            let slot = self.slots.at(index);
            slot.orphan = true;
            slot.write.all_staged = true;
            let busy = match slot.request.kind {
                Kind::Read => slot.read.local > 0,
                _ => slot.write.owed > 0,
            };
            if !busy {
                if slot.request.kind == Kind::Read {
                    read::abandon(slot);
                }
                self.give_back(index, 0);
            }
        }
    }
}

/// Every block of an answer is whole.
fn whole(blocks: &[Option<Bytes>]) -> bool {
    blocks.iter().flatten().all(|block| block.len() == blockstore::types::BLOCK_SIZE)
}
