//! Requests under way: one slot each, kept for reuse with all its buffers.

use super::read::ReadState;
use crate::dirty::DirtyLog;
use crate::memory::GuestMap;
use crate::request::{Kind, Request, STATUS_OK};
use cache::disk::Tag;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A request under way.
#[derive(Debug, Default)]
pub(super) struct Slot {
    /// Tells uses of the slot apart.
    generation: u32,
    in_use: bool,
    /// The session that it came from has ended: nothing of it reaches a guest any more.
    pub orphan: bool,
    /// Index of the ring.
    pub queue: u16,
    /// The chain's head.
    pub head: u16,
    /// Keeps the guest's buffers mapped.
    pub map: Option<Arc<GuestMap>>,
    pub request: Request,
    /// Worst status so far.
    pub status: u8,
    /// Since when it has waited for space or for the store, from the first time on.
    pub waits_since: Option<Instant>,
    pub write: WriteState,
    pub read: ReadState,
}

/// How far a write or zeroing has come.
#[derive(Debug, Default)]
pub(super) struct WriteState {
    /// Range of a zeroing that is being staged.
    pub range: usize,
    /// Bytes of the request, or of that range, that were staged.
    pub staged: usize,
    /// Everything was staged, or staging was given up.
    pub all_staged: bool,
    /// Completions that the disk still owes.
    pub owed: u32,
    /// It waits in the queue of stalled writes.
    pub stalled: bool,
}

impl WriteState {
    /// No part of it has an LSN.
    pub(super) fn nothing_staged(&self) -> bool {
        (self.range, self.staged, self.owed) == (0, 0, 0)
    }
}

impl Slot {
    /// It begins to wait, or goes on waiting.
    pub(super) fn waits(&mut self) {
        self.waits_since.get_or_insert_with(Instant::now);
    }

    /// It has waited at least so long by `now`.
    pub(super) fn has_waited(&self, longer_than: Duration, now: Instant) -> bool {
        self.waits_since.is_some_and(|since| now.saturating_duration_since(since) >= longer_than)
    }

    /// Bytes that the device wrote to the chain: data, if it is all there, and the status.
    pub(super) fn written(&self, status: u8) -> u32 {
        let data = match self.request.kind {
            Kind::Read | Kind::GetId if status == STATUS_OK => self.request.len,
            _ => 0,
        };
        u32::try_from(data).unwrap_or(u32::MAX - 1).saturating_add(1)
    }

    /// Marks what this request wrote to guest memory: its status, and all of a read's buffers, for one that failed may
    /// have filled any part of them.
    pub(super) fn mark_dirty(&self, log: &DirtyLog) {
        let Some(map) = &self.map else { return };
        let mark = |host: *const u8, len: usize| {
            if let Some(address) = map.guest_address(host) {
                log.mark(address, len as u64);
            }
        };
        mark(self.request.status, 1);
        if matches!(self.request.kind, Kind::Read | Kind::GetId) {
            self.request.data.iter().for_each(|piece| mark(piece.iov_base.cast(), piece.iov_len));
        }
    }
}

/// All slots of a worker. As many are in use as rings have entries, plus orphans, which end with their local I/O.
#[derive(Debug, Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

impl Slots {
    /// A slot for a new request.
    pub(super) fn start(&mut self, queue: u16, head: u16, map: &Arc<GuestMap>) -> u32 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 requests")
        });
        let slot = &mut self.slots[index as usize];
        slot.in_use = true;
        slot.orphan = false;
        slot.queue = queue;
        slot.head = head;
        slot.map = Some(Arc::clone(map));
        slot.status = STATUS_OK;
        slot.waits_since = None;
        slot.write = WriteState::default();
        index
    }

    /// Ends the request in slot `index`. Its tag finds nothing from now on.
    pub(super) fn end(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        debug_assert!(slot.in_use, "a slot ends once");
        slot.in_use = false;
        slot.generation = slot.generation.wrapping_add(1);
        slot.map = None;
        self.free.push(index);
    }

    /// The disk's and the kernel's name for the request in slot `index`.
    pub(super) fn tag(&self, index: u32) -> Tag {
        u64::from(self.slots[index as usize].generation) << 32 | u64::from(index)
    }

    /// The slot of a request that is still under way.
    pub(super) fn find(&self, tag: Tag) -> Option<u32> {
        let index = (tag & u64::from(u32::MAX)) as u32;
        let slot = self.slots.get(index as usize)?;
        (slot.in_use && u64::from(slot.generation) == tag >> 32).then_some(index)
    }

    /// Indexes of the requests under way.
    pub(super) fn in_use(&self) -> impl Iterator<Item = u32> + '_ {
        (0u32..).zip(&self.slots).filter(|(_, slot)| slot.in_use).map(|(index, _)| index)
    }

    /// Local reads for a session that has ended are under way.
    pub(super) fn any_orphan_read(&self) -> bool {
        self.slots.iter().any(|slot| slot.in_use && slot.orphan && slot.read.local > 0)
    }

    pub(super) fn at(&mut self, index: u32) -> &mut Slot {
        &mut self.slots[index as usize]
    }
}
