//! A disk's segments and what they add up to. Pure.

use super::hydrate::HydrateStatus;
use crate::disk::plan::SegmentId;
use crate::disk::trace::Ranges;
use crate::flusher::Replay;
use crate::format::slot::CloneOrigin;
use crate::image::SegmentImage;
use crate::link::SealedSegment;
use blockstore::Policy;
use blockstore::sabotage::{self, Bug};
use blockstore::types::{BLOCK_SIZE, Lsn};
use serde::Serialize;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::time::Instant;

/// What a disk is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Everything in the log is committed.
    #[default]
    Clean,
    /// Written data waits to be replayed.
    Dirty,
    /// A commit is under way.
    Flushing,
    /// The log or the replay failed for good; see `last_error`.
    Failed,
}

/// Status of one attached disk.
#[derive(Clone, Debug, Default, Serialize)]
pub struct VdiStatus {
    /// What it is doing.
    pub state: Phase,
    /// Last LSN known to be in sealed segments (the worker's own count may be ahead).
    pub last_lsn: u64,
    /// Everything up to here is known to be durable in the log.
    pub flushed_lsn: u64,
    /// The store's image is at this LSN.
    pub committed_lsn: u64,
    /// Bytes of log that are not committed.
    pub dirty_bytes: u64,
    /// Bytes of log that are committed and kept as read cache.
    pub clean_bytes: u64,
    /// Snapshots that are durable in the log and not in the store yet, but for those of a cadence.
    pub snapshots_pending: u64,
    /// Those that a cadence has cut, as far as it keeps them.
    pub cuts_pending: u64,
    /// Those asked for of what the disk was that wait for the store to say how far it is.
    pub snapshots_waiting: u64,
    /// Age of the oldest uncommitted data.
    pub oldest_dirty_ms: Option<u64>,
    /// Commits so far, and bytes of log in them.
    pub commits: u64,
    /// Bytes of log replayed so far.
    pub replayed_bytes: u64,
    /// Bytes that the store was asked for to answer reads.
    pub fetched_bytes: u64,
    /// Bytes of the disk whose place on the cache device is known: they can be read without the store.
    pub held_bytes: u64,
    /// Bytes of memory that the disk's index takes.
    pub index_bytes: u64,
    /// What was chosen for the disk.
    #[serde(skip)]
    pub policy: Policy,
    /// The cache has failed: writes are committed to the store before they are acknowledged.
    pub write_through: bool,
    /// It is a clone of this that the store does not know of yet.
    #[serde(skip)]
    pub origin: Option<CloneOrigin>,
    /// What is held of it is not evicted while anything else could be.
    pub pinned: bool,
    /// The hydration that goes on, or the last one since the disk was opened.
    pub hydrate: Option<HydrateStatus>,
    /// What the guest read when it last booted.
    #[serde(skip)]
    pub boot_trace: Ranges,
    /// Bytes of that, and bytes of it that are not known locally.
    pub boot_trace_bytes: u64,
    pub boot_trace_missing_bytes: u64,
    /// The last thing that went wrong.
    pub last_error: Option<String>,
}

/// A sealed segment of the disk.
#[derive(Debug)]
pub struct Segment {
    /// Which one.
    pub id: SegmentId,
    /// Its sequence number.
    pub seq: u64,
    /// First LSN in it.
    pub first_lsn: Lsn,
    /// Last LSN in it.
    pub last_lsn: Lsn,
    /// Blocks in use.
    pub used_blocks: u32,
    /// Snapshots that a cadence has cut in it.
    pub cuts: u32,
    /// Its bytes, while they are kept in memory for the flusher.
    pub image: Option<Retained>,
    /// When it was sealed (or recovered).
    pub since: Instant,
    /// The pool was told that it is clean.
    pub offered: bool,
}

/// A segment image kept for the flusher, counted against a budget that all disks share.
#[derive(Debug)]
pub struct Retained {
    image: Arc<SegmentImage>,
    held: Arc<AtomicUsize>,
}

impl Retained {
    /// Keeps the image if that leaves `held` within `most` bytes.
    fn new(image: Arc<SegmentImage>, held: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let len = image.len();
        let fits = |now: usize| (now.saturating_add(len) <= most).then_some(now + len);
        held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).ok()?;
        Some(Self { image, held: Arc::clone(held) })
    }
}

impl Drop for Retained {
    fn drop(&mut self) {
        self.held.fetch_sub(self.image.len(), Ordering::Relaxed);
    }
}

/// The disk's sealed segments, oldest first.
#[derive(Debug, Default)]
pub struct Segments {
    list: VecDeque<Segment>,
}

impl Segments {
    /// Adds the newest.
    pub fn push(&mut self, segment: Segment) {
        debug_assert!(self.list.back().is_none_or(|last| last.seq < segment.seq));
        self.list.push_back(segment);
    }

    /// Adds the newest, just sealed, keeping its image while all images kept (`held`) take at most `most` bytes.
    pub fn push_sealed(
        &mut self,
        sealed: SealedSegment,
        now: Instant,
        held: &Arc<AtomicUsize>,
        most: usize,
    ) {
        let image = sealed.image.and_then(|image| Retained::new(image, held, most));
        self.push(Segment {
            id: sealed.id,
            seq: sealed.seq,
            first_lsn: sealed.first_lsn,
            last_lsn: sealed.last_lsn,
            used_blocks: sealed.used_blocks,
            cuts: sealed.cuts.len() as u32,
            image,
            since: now,
            offered: false,
        });
    }

    /// Adds the newest, which is nowhere but in memory.
    pub fn push_in_memory(&mut self, sealed: SealedSegment, now: Instant, held: &Arc<AtomicUsize>) {
        self.push_sealed(sealed, now, held, usize::MAX);
    }

    /// Forgets segments that are wholly committed.
    pub fn forget_committed(&mut self, committed: Lsn) {
        self.list.retain(|segment| segment.last_lsn > committed);
    }

    /// Segments with something after `committed`, oldest first, up to `bytes_max` bytes of log (at least one).
    pub fn batch(&self, committed: Lsn, bytes_max: u64) -> Vec<Replay> {
        let mut bytes = 0;
        let mut batch = Vec::new();
        for segment in self.list.iter().filter(|s| s.last_lsn > committed) {
            bytes += u64::from(segment.used_blocks) * BLOCK_SIZE as u64;
            if bytes > bytes_max && !batch.is_empty() {
                break;
            }
            batch.push(Replay {
                id: segment.id,
                seq: segment.seq,
                first_lsn: segment.first_lsn,
                last_lsn: segment.last_lsn,
                used_blocks: segment.used_blocks,
                image: segment.image.as_ref().map(|kept| Arc::clone(&kept.image)),
            });
        }
        if sabotage::on(Bug::SkipSegment) && batch.len() > 1 {
            batch.remove(0);
        }
        batch
    }

    /// Snapshots that a cadence has cut after `lsn`, which ends a segment: all of them are durable.
    pub fn cuts_after(&self, lsn: Lsn) -> u64 {
        let newer = self.list.iter().rev().take_while(|segment| segment.last_lsn > lsn);
        newer.map(|segment| u64::from(segment.cuts)).sum()
    }

    /// Segments that are wholly committed and were not offered to the pool yet; drops their images.
    pub fn newly_clean(&mut self, committed: Lsn) -> Vec<(SegmentId, u64)> {
        let committed = if sabotage::on(Bug::ReclaimEarly) { Lsn(u64::MAX) } else { committed };
        let mut clean = Vec::new();
        for segment in self.list.iter_mut().take_while(|s| s.last_lsn <= committed) {
            segment.image = None;
            if !segment.offered {
                segment.offered = true;
                clean.push((segment.id, segment.seq));
            }
        }
        clean
    }

    /// A segment that was to be evicted stays; it may be offered again.
    pub fn keep(&mut self, id: SegmentId) {
        if let Some(segment) = self.list.iter_mut().find(|segment| segment.id == id) {
            segment.offered = false;
        }
    }

    /// As [`Self::keep`], all of them.
    pub fn keep_all(&mut self) {
        for segment in &mut self.list {
            segment.offered = false;
        }
    }

    /// Takes over what recovery found; what was known of a segment before still holds.
    pub fn renew(&mut self, recovered: Self) {
        let mut known = std::mem::replace(self, recovered).list;
        for segment in &mut self.list {
            if let Some(at) = known.iter().position(|k| k.id == segment.id && k.seq == segment.seq)
                && let Some(before) = known.swap_remove_back(at)
            {
                *segment = before;
            }
        }
    }

    /// Removes a segment; returns its sequence number.
    pub fn remove(&mut self, id: SegmentId) -> Option<u64> {
        let at = self.list.iter().position(|segment| segment.id == id)?;
        self.list.remove(at).map(|segment| segment.seq)
    }

    /// The segment by its place.
    pub fn get(&self, id: SegmentId) -> Option<&Segment> {
        self.list.iter().find(|segment| segment.id == id)
    }

    /// Places of all.
    pub fn ids(&self) -> impl Iterator<Item = SegmentId> {
        self.list.iter().map(|segment| segment.id)
    }

    /// When the oldest uncommitted segment was sealed.
    pub fn oldest_dirty(&self, committed: Lsn) -> Option<Instant> {
        self.list.iter().find(|s| s.last_lsn > committed).map(|s| s.since)
    }

    /// Bytes of log that are dirty, and clean.
    pub fn bytes(&self, committed: Lsn) -> (u64, u64) {
        self.list.iter().fold((0, 0), |(dirty, clean), segment| {
            let bytes = u64::from(segment.used_blocks) * BLOCK_SIZE as u64;
            if segment.last_lsn > committed {
                (dirty + bytes, clean)
            } else {
                (dirty, clean + bytes)
            }
        })
    }

    /// Segments with something after `committed`.
    pub fn dirty_count(&self, committed: Lsn) -> usize {
        self.list.iter().filter(|s| s.last_lsn > committed).count()
    }

    /// Last LSN in any of them.
    pub fn last_lsn(&self) -> Option<Lsn> {
        self.list.back().map(|segment| segment.last_lsn)
    }
}
