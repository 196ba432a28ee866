//! The state machine of one attached virtual disk: log, index, flushed and acknowledged LSNs.
//!
//! No I/O, clock or threads of its own. The driver (the worker in `vhost`, or a simulator) calls it like this:
//!
//! ```text
//! loop {
//!     for each finished local I/O:      disk.io_done(op, result)
//!     for each message from the link:   Fetched → driver; else disk.on_message(message)
//!     for each guest request:           disk.write / zero / flush / read
//!     disk.poll(&mut actions)           → submit Write and Flush actions, send Send actions over the link
//!     for (tag, ok) in disk.completions() → publish to the guest
//!     wait
//! }
//! ```
//!
//! Requests are staged into the open segment at once (the guest's data is copied, checksummed and given its LSN),
//! and `poll` decides when a batch of them goes out: group commit. Completions come in LSN order (rule L1).
//!
//! Where to read on: `log.rs` (segments, batches, flushes), `write.rs` (staging), `read.rs` (planning).

mod keep;
mod lend;
mod log;
pub mod plan;
mod read;
pub mod trace;
mod write;

use crate::format::{Geometry, LegSet};
use crate::image::{ImagePool, SegmentImage};
use crate::index::Index;
use crate::link::{FromDisk, Grant, Link, ToDisk};
use blockstore::SnapshotLabel;
use blockstore::sabotage::{self, Bug};
use blockstore::schedule::Cadence;
use blockstore::types::{BLOCK_SIZE, Lba, Lsn};
use hashbrown::HashMap;
use log::Log;
pub use log::SNAPSHOTS_WAITING_MAX;
use plan::SegmentId;
use smallvec::SmallVec;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use uuid::Uuid;

/// Counting the index's memory walks its regions: not at every poll.
const POLLS_PER_MEMORY_COUNT: u32 = 4096;

/// Looking up all of the boot trace takes a millisecond: not at every tick.
const TICKS_PER_TRACE_COUNT: u32 = 8;

/// The driver's name for a guest request; returned with its completion.
pub type Tag = u64;

/// Identifies a local I/O between its action and its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpId(pub u64);

/// What the driver must do. Writes and flushes may be carried out concurrently and finish in any order.
#[derive(Debug)]
pub enum Action {
    /// Write `len` bytes of `image` from byte `start` to byte `offset` of the cache device (O_DIRECT; all three are
    /// multiples of 4096), then call `io_done`.
    Write { op: OpId, leg: u8, offset: u64, image: Arc<SegmentImage>, start: usize, len: usize },
    /// fdatasync the leg, then call `io_done`.
    Flush { op: OpId, leg: u8 },
    /// Send over the link.
    Send(FromDisk),
}

/// Whether a request was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Staged {
    /// All of it; its tag will be completed.
    All,
    /// The first `n` bytes (a multiple of 512; possibly 0): no log space for the rest now. Call again for the rest
    /// (same tag) after a later `poll`/message; the tag is completed with the last part. Later requests need not wait.
    Part(usize),
    /// The disk's log has failed: answer with an I/O error.
    Failed,
}

/// What becomes of a block whose bytes did not match its checksum, even when read again into private memory (L9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadBlock {
    /// The local copy was forgotten; plan the read again, the store has the block.
    Refetch,
    /// The only copy is bad: fail the request with an I/O error (and say so in the log).
    Lost,
}

/// Whose log it is: goes into every segment header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cache.
    pub cache: Uuid,
    /// The disk.
    pub vdi: Uuid,
    /// The disk's log.
    pub log_id: u128,
    /// Recovery epoch (rule L3).
    pub epoch: u32,
}

/// What a disk starts from: nothing, or what recovery found.
#[derive(Debug)]
pub struct Start {
    /// Whose log it is.
    pub identity: Identity,
    /// Division of the cache device.
    pub geometry: Geometry,
    /// Bytes the guest sees.
    pub size_bytes: u64,
    /// Everything held locally.
    pub index: Index,
    /// Last LSN in the log; all of it is durable.
    pub last_lsn: Lsn,
    /// The store's image reaches this LSN.
    pub committed: Lsn,
    /// Sealed segments with the last LSN in each.
    pub sealed: Vec<(SegmentId, Lsn)>,
    /// Segments to append to.
    pub grants: Vec<Grant>,
    /// Memory for segments.
    pub images: Arc<ImagePool>,
    /// Where the disk says how far it is.
    pub progress: Arc<Progress>,
}

/// How far a disk is, for others to read; brought up to date by every [`Disk::poll`].
#[derive(Debug, Default)]
pub struct Progress {
    /// Last LSN given out.
    pub staged: AtomicU64,
    /// Everything up to this LSN is durable in the log.
    pub flushed: AtomicU64,
    /// Bytes that the index takes.
    pub index_bytes: AtomicU64,
    /// Blocks that read the same without the store: held, or known to be zeros.
    pub held_blocks: AtomicU64,
    /// Blocks that are known to be zeros.
    pub zero_blocks: AtomicU64,
    /// Blocks of the boot trace, and those of them that are not known locally.
    pub trace_blocks: AtomicU64,
    pub trace_missing: AtomicU64,
}

/// What the index refers to on the device: a sealed segment.
#[derive(Debug)]
struct Sealed {
    last_lsn: Lsn,
    pins: u32,
    evicting: bool,
}

/// One attached virtual disk.
#[derive(Debug)]
pub struct Disk {
    geometry: Geometry,
    size_bytes: u64,
    index: Index,
    log: Log,
    committed: Lsn,
    sealed: HashMap<SegmentId, Sealed>,
    /// Counts removals from the index, see [`Disk::fill_ticket`].
    removals: u64,
    /// Segments of which something was lent, once for each loan.
    loans: HashMap<u64, SmallVec<[SegmentId; 4]>>,
    outbox: Vec<FromDisk>,
    progress: Arc<Progress>,
    polls: u32,
    /// What the guest reads while it boots.
    recorder: Option<trace::Recorder>,
    /// What it read when it last booted.
    boot_trace: trace::Ranges,
    ticks: u32,
}

impl Disk {
    /// A disk that goes on where `start` ends, on a cache of one leg.
    #[must_use]
    pub fn new(start: Start) -> Self {
        Self::on_legs(start, LegSet::FIRST)
    }

    /// A disk that goes on where `start` ends; its log is written to all of `members` together.
    #[must_use]
    pub fn on_legs(start: Start, members: LegSet) -> Self {
        let sealed = start
            .sealed
            .into_iter()
            .map(|(id, last_lsn)| (id, Sealed { last_lsn, pins: 0, evicting: false }))
            .collect();
        Self {
            log: Log::new(
                start.identity,
                start.geometry,
                start.images,
                start.last_lsn,
                start.grants,
                members,
            ),
            geometry: start.geometry,
            size_bytes: start.size_bytes,
            index: start.index,
            committed: start.committed,
            sealed,
            removals: 0,
            loans: HashMap::new(),
            outbox: Vec::new(),
            progress: start.progress,
            polls: 0,
            recorder: None,
            boot_trace: trace::Ranges::new(),
            ticks: 0,
        }
    }

    /// Bytes the guest sees.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Last LSN given out.
    #[must_use]
    pub fn staged_lsn(&self) -> Lsn {
        self.log.staged_lsn()
    }

    /// Everything up to here is durable in the log.
    #[must_use]
    pub fn flushed_lsn(&self) -> Lsn {
        self.log.flushed_lsn()
    }

    /// The index, for statistics.
    #[must_use]
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Completes `tag` when everything staged before is durable in the log.
    pub fn flush(&mut self, tag: Tag) {
        self.log.flush(tag);
    }

    /// Takes a snapshot: the disk as of everything that was staged before, and nothing that is staged from here on.
    /// Answered with [`FromDisk::SnapshotTaken`] when it is durable, as a flush is. `time_ms` is since 1970.
    pub fn snapshot(&mut self, id: u64, time_ms: u64, label: SnapshotLabel) {
        self.log.snapshot(id, time_ms, label);
    }

    /// Snapshots that have no place in the log yet are answered with this error.
    pub fn refuse_snapshots(&mut self, why: &str) {
        self.log.refuse_snapshots(why);
    }

    /// From here on a snapshot is cut behind every write, or every batch, if there is a rule that says so. That needs no answer: it is
    /// durable when what it is behind is.
    pub fn set_cadence(&mut self, cadence: Option<Cadence>) {
        self.log.set_cadence(cadence);
    }

    /// Write-through (guest switched the write cache off): writes complete when durable.
    pub fn set_write_through(&mut self, on: bool) {
        self.log.set_write_through(on);
    }

    /// The block that `lba` was planned at device byte `offset` is bad there.
    pub fn bad_block(&mut self, lba: Lba, offset: u64) -> BadBlock {
        if self.log.is_through() {
            return BadBlock::Refetch;
        }
        let slot = self.geometry.block_at(offset);
        let segment = self.geometry.segment_of(slot);
        match self.sealed.get(&segment) {
            Some(sealed) if sealed.last_lsn > self.committed => BadBlock::Lost,
            Some(_) => {
                let range = self.slots_of(segment);
                self.index.evict(lba, &range);
                self.note_removal();
                BadBlock::Refetch
            }
            // Not sealed: the open segment, which holds uncommitted records, unless the segment was evicted while
            // the read was under way, which its pin prevents.
            None => BadBlock::Lost,
        }
    }

    /// Legs of the cache device that hold everything: any of them can be read from.
    #[must_use]
    pub fn readable_legs(&self) -> LegSet {
        self.log.readable()
    }

    /// Whether the answer of this operation still matters: not once its leg was put out.
    #[must_use]
    pub fn wants(&self, op: OpId) -> bool {
        self.log.wants(op)
    }

    /// The driver has no way to write to this leg.
    pub fn leg_unusable(&mut self, leg: u8, errno: i32) {
        if self.log.written_legs().contains(leg) {
            self.log.leg_failed(leg, "opening it for the worker", errno);
        }
    }

    /// Legs that members and a leg that joins are written to together.
    #[must_use]
    pub fn written_legs(&self) -> LegSet {
        self.log.written_legs()
    }

    /// The driver's clock says that operations on these legs have been under way for longer than
    /// [`AttachedDisk::leg_timeout`], and none on the others. Call it with every [`ToDisk::Tick`]; a leg that is not named
    /// any more has come back.
    pub fn legs_silent(&mut self, overdue: LegSet) {
        self.log.legs_silent(overdue);
    }

    /// Of these, those without which reads are to be done: what was asked of them is to be asked of another leg.
    #[must_use]
    pub fn silent_legs(&self) -> LegSet {
        self.log.silent()
    }

    /// A damaged block could not be rewritten on this leg, though another has it.
    pub fn repair_failed(&mut self, leg: u8, errno: i32) {
        if self.log.readable().len() > 1 && !self.log.is_through() {
            self.log.leg_failed(leg, "rewriting a damaged block", errno);
        }
    }

    /// A local I/O finished; `Err` carries the errno.
    pub fn io_done(&mut self, op: OpId, result: Result<(), i32>) {
        self.log.io_done(op, result);
    }

    /// A message from the link (not `Fetched`, which the driver handles).
    pub fn on_message(&mut self, message: ToDisk) {
        match message {
            ToDisk::Fetched { .. } => debug_assert!(false, "the driver handles fetched blocks"),
            // About requests, which the driver has; one that has none any more passes it on.
            ToDisk::FailWaiting { .. } => {}
            ToDisk::Segment(grant) => self.log.grant(grant),
            ToDisk::Ration { seq, blocks } => self.log.ration(seq, blocks),
            ToDisk::Committed { lsn } => {
                self.committed = self.committed.max(lsn);
                if self.index.committed(lsn) {
                    self.note_removal();
                }
                self.log.committed(lsn);
            }
            ToDisk::Evict { segment, lbas, holes } => {
                for (lba, blocks) in holes {
                    self.index.forget_hole(lba, u64::from(blocks));
                }
                self.evict(segment, &lbas);
            }
            ToDisk::Freshen => self.freshen(),
            ToDisk::Plan { id, lba, blocks } => self.plan_keep(id, lba, blocks),
            ToDisk::Keep { id, ticket, roomy, pieces } => {
                let kept = self.keep(ticket, roomy, &pieces);
                self.outbox.push(FromDisk::Kept { id, kept });
            }
            ToDisk::Lend { id, lba, blocks, lsn } => self.lend(id, lba, blocks, lsn),
            ToDisk::GiveBack { id } => self.give_back(id),
            ToDisk::TellHoles { id } => {
                let holes = self.index.holes().collect();
                self.outbox.push(FromDisk::Holes { id, holes });
            }
            ToDisk::Roll { id } => self.log.roll(id),
            ToDisk::Resized { bytes } => self.size_bytes = self.size_bytes.max(bytes),
            ToDisk::Legs { members } => self.log.set_members(members),
            ToDisk::LegJoins { leg, id, .. } => self.log.join(leg, id),
            ToDisk::WriteThrough { lsn } => {
                // The store has everything: nothing is kept here any more.
                self.committed = self.committed.max(lsn);
                self.index = Index::default();
                self.note_removal();
                self.log.write_through_from(lsn);
            }
            ToDisk::Snapshot { id, time_ms, label } => self.snapshot(id, time_ms, label),
            ToDisk::Cadence(cadence) => self.set_cadence(cadence),
            ToDisk::GiveUp { reason } => self.log.give_up(&reason),
            ToDisk::Tick => {
                self.log.tick();
                self.tick();
            }
        }
    }

    /// The guest's driver has come up: what is read from now on goes into a new boot trace, unless one is being recorded
    /// (a guest's firmware comes up before its system does).
    pub fn begin_boot_trace(&mut self) {
        self.recorder.get_or_insert_default();
    }

    /// Nothing more is recorded. What was takes the place of the former boot trace.
    pub fn end_boot_trace(&mut self) {
        let Some(recorder) = self.recorder.take() else { return };
        let ranges = recorder.finish();
        if !ranges.is_empty() {
            self.boot_trace.clone_from(&ranges);
            self.outbox.push(FromDisk::BootTrace { ranges });
        }
    }

    /// What the guest read when it last booted, as it was kept.
    pub fn set_boot_trace(&mut self, ranges: trace::Ranges) {
        self.boot_trace = ranges;
    }

    fn count_held(&self) {
        let blocks = self.size_bytes.div_ceil(BLOCK_SIZE as u64);
        let known = self.index.known_blocks().min(blocks);
        self.progress.held_blocks.store(known, Ordering::Relaxed);
        let zeros = self.index.zero_blocks().min(blocks);
        self.progress.zero_blocks.store(zeros, Ordering::Relaxed);
    }

    /// Something left the index. What came may be counted a moment late; what left is not shown as held any more.
    fn note_removal(&mut self) {
        self.removals += 1;
        self.count_held();
    }

    /// About once a second.
    fn tick(&mut self) {
        self.count_held();
        if let Some(recorder) = &mut self.recorder {
            recorder.tick();
            if recorder.is_complete() {
                self.end_boot_trace();
            }
        }
        if self.ticks.is_multiple_of(TICKS_PER_TRACE_COUNT) {
            let parts = self.boot_trace.iter();
            let absent = parts.flat_map(|(lba, blocks)| self.index.absent(*lba, *blocks));
            let missing: u64 = absent.map(|(start, end)| end - start).sum();
            let all: u64 = self.boot_trace.iter().map(|(_, blocks)| blocks).sum();
            self.progress.trace_blocks.store(all, Ordering::Relaxed);
            self.progress.trace_missing.store(missing, Ordering::Relaxed);
        }
        self.ticks = self.ticks.wrapping_add(1);
    }

    /// Collects what to do now.
    pub fn poll(&mut self, actions: &mut Vec<Action>) {
        self.log.poll(actions);
        for (id, last_lsn) in self.log.newly_sealed() {
            self.sealed.insert(id, Sealed { last_lsn, pins: 0, evicting: false });
        }
        actions.extend(self.outbox.drain(..).map(Action::Send));
        self.progress.staged.store(self.log.staged_lsn().0, Ordering::Relaxed);
        self.progress.flushed.store(self.log.flushed_lsn().0, Ordering::Relaxed);
        if self.polls.is_multiple_of(POLLS_PER_MEMORY_COUNT) {
            self.progress.index_bytes.store(self.index.memory() as u64, Ordering::Relaxed);
        }
        self.polls = self.polls.wrapping_add(1);
    }

    /// Finished requests, in the order to publish them; `false` means I/O error.
    pub fn completions(&mut self) -> std::vec::Drain<'_, (Tag, bool)> {
        self.log.completions()
    }

    /// No local I/O is under way and none is wanted.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.log.is_quiet() && self.outbox.is_empty()
    }

    /// Segments that were granted and hold nothing: given back when the disk is released.
    pub fn take_unused_grants(&mut self) -> Vec<Grant> {
        self.log.take_unused_grants()
    }

    fn evict(&mut self, segment: SegmentId, lbas: &[Lba]) {
        let range = self.slots_of(segment);
        for lba in lbas {
            self.index.evict(*lba, &range);
        }
        self.note_removal();
        match self.sealed.get_mut(&segment) {
            Some(sealed) if sealed.pins > 0 && !sabotage::on(Bug::IgnorePins) => {
                sealed.evicting = true;
                self.outbox.push(FromDisk::Pinned { segment });
            }
            _ => self.evicted(segment),
        }
    }

    fn evicted(&mut self, segment: SegmentId) {
        self.sealed.remove(&segment);
        self.outbox.push(FromDisk::Evicted { segment });
    }

    fn slots_of(&self, segment: SegmentId) -> std::ops::Range<u32> {
        let first = self.geometry.first_block(segment);
        first..first + self.geometry.segment_blocks()
    }
}

/// A disk as the cache hands it to a driver, and gets it back.
#[derive(Debug)]
pub struct AttachedDisk {
    /// The state machine.
    pub disk: Disk,
    /// The way to the asynchronous side.
    pub link: Link,
    /// The cache device: one file per leg, at its number, opened with O_DIRECT where the file system allows. In the place
    /// of a leg that is no member stands the file of one that is; nothing is read from or written to it there.
    pub legs: Vec<Arc<std::fs::File>>,
    /// For so long an operation on one leg is waited for while another leg answers, see [`Disk::legs_silent`].
    pub leg_timeout: Duration,
}

impl AttachedDisk {
    /// Asks the asynchronous side for blocks, after all that the log has said: a block that is planned as a miss because no
    /// leg is left must not be looked for in the store by one who has not heard of that.
    pub fn ask(&mut self, fetch: FromDisk) {
        for message in self.disk.log.said() {
            self.link.send(message);
        }
        self.link.send(match fetch {
            FromDisk::Fetch { id, lba, blocks } if self.disk.log.is_held() => {
                FromDisk::FetchHeld { id, lba, blocks }
            }
            other => other,
        });
    }

    /// Hands a message to the disk (not `Fetched`), and keeps [`Self::legs`] as it says: the file of a leg that joins takes
    /// its place, that of a leg that is gone is closed, so that it can be opened by whoever fills it anew.
    pub fn on_message(&mut self, message: ToDisk) {
        match &message {
            ToDisk::LegJoins { leg, file, .. } => {
                let at = usize::from(*leg);
                if at == self.legs.len() {
                    self.legs.push(Arc::clone(file));
                } else if let Some(place) = self.legs.get_mut(at) {
                    *place = Arc::clone(file);
                }
            }
            ToDisk::Legs { members } => {
                let kept = members.iter().find_map(|leg| self.legs.get(usize::from(leg)).cloned());
                for (leg, place) in (0u8..).zip(&mut self.legs) {
                    if let Some(kept) = kept.as_ref().filter(|_| !members.contains(leg)) {
                        *place = Arc::clone(kept);
                    }
                }
            }
            _ => {}
        }
        self.disk.on_message(message);
    }
}

/// Byte offset of a block inside a segment image.
const fn image_offset(block: u32) -> usize {
    block as usize * BLOCK_SIZE
}
