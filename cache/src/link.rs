//! Messages between a disk's worker and the cache's asynchronous side.
//!
//! Queues are bounded by construction: fetches by the guest's queue sizes, segment messages by the number
//! of segments, the rest by one outstanding message of a kind.

use crate::desk::Desk;
use crate::disk::plan::SegmentId;
use crate::disk::trace::Ranges;
use crate::format::LegSet;
use crate::image::SegmentImage;
use crate::pending::LogCut;
use blockstore::SnapshotLabel;
use blockstore::schedule::Cadence;
use blockstore::types::{Lba, Lsn};
use bytes::Bytes;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// From the asynchronous side to the worker.
#[derive(Debug)]
pub enum ToDisk {
    /// Answer to [`FromDisk::Fetch`]: one entry per block, `None` for zeros; every block was verified.
    /// The driver handles this one itself, and offers the blocks to `Disk::fill` if it is to `keep` them.
    Fetched { id: u64, result: Result<Vec<Option<Bytes>>, FetchError>, keep: bool },
    /// A segment for the disk to append to.
    Segment(Grant),
    /// How much guests may fill of the segment with this sequence number, which may not have been granted yet: its first
    /// `blocks` blocks, or all of it. Segments of which nothing was said are theirs whole.
    Ration { seq: u64, blocks: Option<u32> },
    /// The store's durable image reaches `lsn`; everything up to it may be dropped from the dirty state.
    Committed { lsn: Lsn },
    /// Forget these blocks where they still lie in `segment`, then answer [`FromDisk::Evicted`].
    /// Holes that the segment notes are forgotten, too: nothing would say so after a restart.
    Evict { segment: SegmentId, lbas: Vec<Lba>, holes: Vec<(Lba, u32)> },
    /// Go on in segments that are granted from now on: what is kept in older ones would be the first to be evicted.
    Freshen,
    /// Say which of these blocks are not known locally, with [`FromDisk::Planned`].
    Plan { id: u64, lba: Lba, blocks: u32 },
    /// Keep what was fetched after a [`FromDisk::Planned`] with this ticket, as far as nothing newer is known; answered with
    /// [`FromDisk::Kept`]. With `roomy`, segments are plentiful now.
    Keep { id: u64, ticket: u64, roomy: bool, pieces: Vec<Fetched> },
    /// Say where these blocks lie if they are what they were at `lsn`, with [`FromDisk::Lent`], and let nobody have these places
    /// until [`Self::GiveBack`].
    Lend { id: u64, lba: Lba, blocks: u32, lsn: Lsn },
    /// What was lent was read.
    GiveBack { id: u64 },
    /// Say which ranges the store is known not to have, with [`FromDisk::Holes`].
    TellHoles { id: u64 },
    /// Seal the open segment, so that all that was staged so far can be committed, then answer
    /// [`FromDisk::Rolled`].
    Roll { id: u64 },
    /// Take a snapshot of everything that was staged so far, then answer [`FromDisk::SnapshotTaken`]. At most
    /// [`crate::disk::SNAPSHOTS_WAITING_MAX`] are on their way.
    Snapshot { id: u64, time_ms: u64, label: SnapshotLabel },
    /// From now on snapshots are cut as this says; none: no more.
    Cadence(Option<Cadence>),
    /// The disk grew.
    Resized { bytes: u64 },
    /// From now on these legs, and no others, are the cache: it is written so on each of them. A leg that was joining is
    /// a member now, or given up.
    Legs { members: LegSet },
    /// Fail reads that have waited for the store at least so long, and writes that have waited for space and of which
    /// nothing was staged: the disk's policy wants it, and the store has been away for as long. Sent again and again
    /// while that is so; the driver handles it itself.
    FailWaiting { reads: Option<Duration>, writes: Option<Duration> },
    /// A leg is being filled that is to become a member: from now on it is written like one, and never read. Answered with
    /// [`FromDisk::LegJoined`]. The driver must use `file` for it.
    LegJoins { leg: u8, id: u64, file: Arc<File> },
    /// The store has everything up to `lsn`, which is all that was staged when the last leg failed: from now on it takes the
    /// legs' place.
    WriteThrough { lsn: Lsn },
    /// Not everything that was acknowledged reaches the store: the log has failed.
    GiveUp { reason: String },
    /// Sent about once a second: write down how far the log is flushed, if no later record says so (rule L4).
    Tick,
}

/// A part of the store's image, to be kept.
#[derive(Clone, Debug)]
pub enum Fetched {
    /// Blocks that are there, one after the other from `lba` on.
    Data { lba: Lba, blocks: Vec<Bytes> },
    /// Blocks that the store does not have.
    Hole { lba: Lba, blocks: u32 },
}

/// Where a block lies on the cache device, and the CRC32C of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub offset: u64,
    pub crc: u32,
}

/// What became of a [`ToDisk::Keep`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// All of it is known locally now.
    All,
    /// There is no room for the rest now: guest writes come first. Say it again later.
    NoRoom,
    /// Something left the index meanwhile, so that what was fetched may be outdated: plan again.
    Stale,
    /// The log has failed, or the store has taken its place.
    Failed,
}

/// A fetch that failed for good (transient trouble is retried by the asynchronous side).
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct FetchError(pub String);

/// A free segment handed to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Which one.
    pub id: SegmentId,
    /// Never used before by any segment of this cache.
    pub seq: u64,
    /// Keys the headers' checksums, so that nothing left in the segment or written by a guest passes for a record.
    pub nonce: u64,
    /// Segments are plentiful: the disk may keep fetched blocks in this one too.
    pub roomy: bool,
}

/// The reason of a [`FromDisk::Failed`] that is the worker's own failure, not the local device's: the log is sound and
/// can be opened again.
pub const WORKER_PANICKED: &str = "the worker panicked";

/// From the worker to the asynchronous side.
#[derive(Debug)]
pub enum FromDisk {
    /// Read blocks of the committed image. Sent by `AttachedDisk::ask`.
    Fetch { id: u64, lba: Lba, blocks: u32 },
    /// As [`Self::Fetch`], of blocks that may be in the log, which can tell nothing of them: no leg is left, and it is not
    /// known yet whether the store has everything. If it turns out that it has not, the fetch fails.
    FetchHeld { id: u64, lba: Lba, blocks: u32 },
    /// A block that the store does not have cannot be read from any leg. Answered with [`ToDisk::Fetched`]: with an error, or,
    /// if no leg takes writes either, from the store once that has everything.
    Unreadable { id: u64, lba: Lba },
    /// The disk will soon need another segment.
    WantSegment,
    /// The first record went into a segment: from now on the disk has something to commit.
    Opened { segment: SegmentId },
    /// A segment is complete on the device: records flushed, summary written.
    Sealed(SealedSegment),
    /// Everything staged before the request is sealed; `lsn` is the last of it.
    Rolled { id: u64, lsn: Lsn },
    /// The segment was granted and never used; the disk gives it back.
    Unused { segment: SegmentId },
    /// Reads use the segment that is to be evicted; [`FromDisk::Evicted`] follows when they are done, which may be a while.
    Pinned { segment: SegmentId },
    /// No index entry and no read refers to the segment any more.
    Evicted { segment: SegmentId },
    /// Answer to [`ToDisk::Plan`]: the runs of blocks of which nothing is known locally, as of `ticket`.
    Planned { id: u64, ticket: u64, absent: Vec<(Lba, u32)> },
    /// Answer to [`ToDisk::Keep`].
    Kept { id: u64, kept: Kept },
    /// Answer to [`ToDisk::Lend`]: where each of the blocks lies; none if one of them lies in no sealed segment that ends there or before.
    Lent { id: u64, places: Option<Vec<Place>> },
    /// Answer to [`ToDisk::TellHoles`]: runs of blocks.
    Holes { id: u64, holes: Vec<(Lba, u64)> },
    /// What the guest read while it booted.
    BootTrace { ranges: Ranges },
    /// Something failed on a leg, and another is left. What waits for the leg goes on with [`ToDisk::Legs`]. Of a leg that is
    /// joining it says as which.
    LegFailed { leg: u8, joining: Option<u64>, reason: String },
    /// A leg has not answered for longer than is waited for, and another has. Nothing about it is decided: it is written on,
    /// and waited for, until [`ToDisk::Legs`] says that it is out. Said again while that lasts.
    LegSilent { leg: u8, joining: Option<u64> },
    /// Answer to [`ToDisk::LegJoins`]: every segment of which something was written without the leg is sealed, and was told
    /// of with [`FromDisk::Sealed`] before.
    LegJoined { id: u64 },
    /// The last leg failed. `tail` is what was staged and not sealed, in memory, and `flushed` the LSN up to which the log
    /// was durable; nothing goes on before [`ToDisk::WriteThrough`] or [`ToDisk::GiveUp`] answers.
    NoLegLeft { reason: String, tail: Vec<SealedSegment>, flushed: Lsn },
    /// Answer to [`ToDisk::Snapshot`]: the LSN of its record, which is durable now; or why it is not known to be. They come
    /// in the order of their LSNs.
    SnapshotTaken { id: u64, result: Result<Lsn, String> },
    /// The log can no longer be written; the disk refuses writes.
    Failed { reason: String },
}

/// A segment that the flusher may replay.
#[derive(Clone, Debug)]
pub struct SealedSegment {
    /// Which one.
    pub id: SegmentId,
    /// Its sequence number.
    pub seq: u64,
    /// First LSN in it.
    pub first_lsn: Lsn,
    /// Last LSN in it; below `first_lsn` if it holds no records.
    pub last_lsn: Lsn,
    /// Blocks in use by header and records.
    pub used_blocks: u32,
    /// Snapshots that the schedule's cadence has cut in it.
    pub cuts: Vec<LogCut>,
    /// Its bytes, if they are still in memory.
    pub image: Option<Arc<SegmentImage>>,
}

/// The worker's end.
#[derive(Debug)]
pub struct Link {
    pub(crate) tx: tokio::sync::mpsc::UnboundedSender<FromDisk>,
    pub(crate) rx: crossbeam_channel::Receiver<ToDisk>,
    pub(crate) wake: Arc<EventFd>,
    /// Where those are who asked for snapshots.
    desk: Option<Arc<Desk>>,
}

/// The asynchronous side's end.
#[derive(Clone, Debug)]
pub struct DiskSender {
    tx: crossbeam_channel::Sender<ToDisk>,
    wake: Arc<EventFd>,
}

/// A connected pair of ends, and the receiver of what the worker says.
pub fn pair() -> std::io::Result<(Link, DiskSender, tokio::sync::mpsc::UnboundedReceiver<FromDisk>)>
{
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    let (to_disk, rx) = crossbeam_channel::unbounded();
    let (tx, from_disk) = tokio::sync::mpsc::unbounded_channel();
    let sender = DiskSender { tx: to_disk, wake: Arc::clone(&wake) };
    Ok((Link { tx, rx, wake, desk: None }, sender, from_disk))
}

impl Link {
    /// Readable when a message waits. Poll it, then call [`Self::clear_wake`], then receive until `None`.
    #[must_use]
    pub fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// Resets the wake-up.
    pub fn clear_wake(&self) {
        // An empty counter (EAGAIN) is what we want.
        let _ = self.wake.read();
    }

    /// The next message, if any.
    #[must_use]
    pub fn try_recv(&self) -> Option<ToDisk> {
        self.rx.try_recv().ok()
    }

    /// Snapshots are answered there, not by the disk's task.
    pub(crate) fn answer_at(&mut self, desk: Arc<Desk>) {
        self.desk = Some(desk);
    }

    /// Sends a message. Ignored once the other side is gone (the agent is stopping).
    pub fn send(&self, message: FromDisk) {
        match (message, &self.desk) {
            (FromDisk::SnapshotTaken { id, result }, Some(desk)) => desk.taken(id, result),
            (message, _) => drop(self.tx.send(message)),
        }
    }
}

impl DiskSender {
    /// Sends a message and wakes the worker. False, and nothing else, once the worker is gone.
    pub fn send(&self, message: ToDisk) -> bool {
        let sent = self.tx.send(message).is_ok();
        if sent {
            let _ = self.wake.write(1);
        }
        sent
    }
}
