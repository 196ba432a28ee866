//! Hydrating: fetching a disk's committed image, or parts of it, into the local cache ahead of need.
//!
//! A task of its own, one per disk at most. It surveys first: what is not known locally, and which of that the store has;
//! ranges that it does not have are noted at once, as holes. Then it knows what is to be fetched, and whether that
//! fits. What it fetches goes through the disk's worker, chunk by chunk, and is kept as fills in the disk's own log.
//!
//! Everybody else comes first: one chunk is under way at a time, each is followed by a pause as long as it took, and it
//! waits while the ring is filling or has no segment to spare. Nothing is lost with it: it can be cut off anywhere and begun anew.

use super::task::VdiTask;
use crate::backing::Backing;
use crate::backing::deferred::Deferred;
use crate::link::{DiskSender, Fetched, FromDisk, Kept, ToDisk};
use crate::pool::Pool;
use crate::vdi::VdiStatus;
use blockstore::types::{BLOCK_SIZE, Lba};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// Blocks surveyed at once: 64 MiB.
const SURVEY_BLOCKS: u32 = 16_384;
/// Blocks fetched at once: 1 MiB.
const CHUNK_BLOCKS: u32 = 256;
/// Bytes per second at most.
const RATE_MAX: u64 = 128 << 20;
/// Share of the ring that may be dirty while something is fetched ahead of need.
const FILL_MAX: f64 = 0.5;
/// How long to wait before looking again whether there is room, at first and at most.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
const LOOK_AGAIN_MAX: Duration = Duration::from_secs(1);
/// How often a chunk is planned anew because the index changed under it, before it is left for another time.
const PLANS_MAX: u32 = 50;

/// Tells the questions of one hydration from those of another.
static QUESTIONS: AtomicU64 = AtomicU64::new(0);

/// How a hydration stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HydrateStatus {
    /// It goes on.
    pub running: bool,
    /// Bytes to be fetched; what was known at the start is not among them. None until the survey is over.
    pub total_bytes: Option<u64>,
    /// Bytes of them that are held.
    pub done_bytes: u64,
    /// What it waits for, in words.
    pub waits_for: Option<String>,
    /// Why it ended before everything was held.
    pub error: Option<String>,
}

/// Why a disk cannot be hydrated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HydrateError {
    /// It is under way already.
    #[error("it is being hydrated already")]
    Running,
    /// The cache is too small.
    #[error(
        "{wanted} bytes of it are not in the cache, which has room for {room} bytes beside what other disks need of it; use a larger cache, or hydrate only what it needs to boot (--boot-trace)"
    )]
    TooLarge { wanted: u64, room: u64 },
    /// Something else, in words.
    #[error("{0}")]
    Failed(String),
}

/// What there is to do, and with what.
#[derive(Debug)]
pub(super) struct Job {
    pub backing: Arc<Deferred>,
    pub pool: Arc<Pool>,
    pub sender: DiskSender,
    /// What the worker says to it.
    pub answers: mpsc::UnboundedReceiver<FromDisk>,
    pub status: Arc<Mutex<VdiStatus>>,
    /// What is kept must not lie in old segments, which are evicted first.
    pub fresh: bool,
    /// Bytes that may be fetched.
    pub room: u64,
    /// Sorted, disjoint.
    pub ranges: Vec<(Lba, u64)>,
    /// Number of the last question to the worker.
    pub asked: u64,
    /// Told how the survey ended.
    pub begun: oneshot::Sender<Result<HydrateStatus, HydrateError>>,
}

/// A hydration under way, as the disk's task sees it.
#[derive(Debug)]
pub(super) struct Hydration {
    task: tokio::task::JoinHandle<()>,
    answers: mpsc::UnboundedSender<FromDisk>,
    status: Arc<Mutex<VdiStatus>>,
}

impl Hydration {
    pub fn start(job: impl FnOnce(mpsc::UnboundedReceiver<FromDisk>) -> Job) -> Self {
        let (answers, from_disk) = mpsc::unbounded_channel();
        let job = job(from_disk);
        let status = Arc::clone(&job.status);
        status.lock().hydrate = Some(HydrateStatus { running: true, ..Default::default() });
        Self { task: tokio::spawn(job.run()), answers, status }
    }

    pub fn is_running(&self) -> bool {
        !self.task.is_finished()
    }

    /// Passes on what the worker said.
    pub fn answer(&self, message: FromDisk) {
        let _ = self.answers.send(message);
    }

    /// Ends it.
    pub fn abort(self, why: &str) {
        self.task.abort();
        let mut status = self.status.lock();
        if let Some(status) = status.hydrate.as_mut().filter(|status| status.running) {
            *status = HydrateStatus {
                running: false,
                waits_for: None,
                error: Some(why.into()),
                ..status.clone()
            };
        }
    }
}

impl VdiTask {
    /// Begins to hydrate, unless that goes on already.
    pub(super) fn hydrate(
        &mut self,
        ranges: Option<Vec<(Lba, u64)>>,
        begun: oneshot::Sender<Result<HydrateStatus, HydrateError>>,
    ) {
        let (_, clean) = self.p.segments.bytes(self.p.record.committed);
        let room = self.p.ground.pool.room_for_reading(self.p.vdi).saturating_sub(clean);
        self.hydrate_within(room, ranges, begun);
    }

    /// As [`Self::hydrate`], if that takes at most so many bytes.
    pub(super) fn hydrate_within(
        &mut self,
        room: u64,
        ranges: Option<Vec<(Lba, u64)>>,
        begun: oneshot::Sender<Result<HydrateStatus, HydrateError>>,
    ) {
        if self.hydration.as_ref().is_some_and(Hydration::is_running) {
            let _ = begun.send(Err(HydrateError::Running));
            return;
        }
        if self.released {
            let _ = begun.send(Err(HydrateError::Failed("it is not served now".into())));
            return;
        }
        let blocks = self.p.record.size_bytes.div_ceil(BLOCK_SIZE as u64);
        let mut ranges = ranges.unwrap_or_else(|| vec![(Lba(0), blocks)]);
        // The disk may be another one than when a trace was taken.
        ranges.retain(|(lba, len)| *len > 0 && lba.0 + len <= blocks);
        let job = |answers| Job {
            backing: Arc::clone(&self.p.backing),
            pool: Arc::clone(&self.p.ground.pool),
            sender: self.p.sender.clone(),
            answers,
            status: Arc::clone(&self.p.status),
            fresh: !self.p.record.policy.pinned,
            room,
            ranges,
            asked: QUESTIONS.fetch_add(1 << 32, Ordering::Relaxed),
            begun,
        };
        self.hydration = Some(Hydration::start(job));
    }

    /// The worker goes: what it was to answer, it will not.
    pub(super) fn end_hydration(&mut self) {
        if let Some(hydration) = self.hydration.take() {
            hydration.abort("the disk was not served for a moment: hydrate it once more");
        }
    }
}

impl Job {
    async fn run(mut self) {
        let begun = std::mem::replace(&mut self.begun, oneshot::channel().0);
        let surveyed = self.survey().await.and_then(|chunks| {
            let wanted = chunks.iter().map(|(_, stored)| u64::from(*stored)).sum::<u64>();
            let (wanted, room) = (wanted * BLOCK_SIZE as u64, self.room);
            if wanted > room {
                return Err(HydrateError::TooLarge { wanted, room });
            }
            self.note(|status| status.total_bytes = Some(wanted));
            Ok(chunks)
        });
        let result = match surveyed {
            Ok(chunks) => {
                let status = self.status.lock().hydrate.clone().unwrap_or_default();
                let _ = begun.send(Ok(status));
                self.fetch_all(chunks).await
            }
            Err(error) => {
                let _ = begun.send(Err(error.clone()));
                Err(error)
            }
        };
        self.note(|status| {
            status.running = false;
            status.waits_for = None;
            status.error = result.err().map(|error| error.to_string());
        });
    }

    fn note(&self, change: impl FnOnce(&mut HydrateStatus)) {
        change(self.status.lock().hydrate.get_or_insert_default());
    }

    /// Finds out what is to be fetched: chunks, with the blocks that the store has and the disk does not hold. Notes what
    /// the store does not have.
    async fn survey(&mut self) -> Result<Vec<(Lba, u32)>, HydrateError> {
        let mut chunks: Vec<(Lba, u32)> = Vec::new();
        if self.fresh {
            self.sender.send(ToDisk::Freshen);
        }
        for (lba, blocks) in pieces(&self.ranges, SURVEY_BLOCKS) {
            for again in 0.. {
                let found = chunks.len();
                let (ticket, absent) = self.plan(lba, blocks).await?;
                let mut holes = Vec::new();
                for (lba, blocks) in absent {
                    self.note(|status| status.waits_for = Some("the store".into()));
                    let stored = self.backing.stored(lba, blocks).await.map_err(failed)?;
                    self.note(|status| status.waits_for = None);
                    for (start, len, is_stored) in runs(&stored) {
                        let lba = lba.plus(u64::from(start));
                        if is_stored {
                            add_chunks(&mut chunks, lba, len);
                        } else {
                            holes.push(Fetched::Hole { lba, blocks: len });
                        }
                    }
                }
                if holes.is_empty() || self.keep(ticket, holes).await? || again >= PLANS_MAX {
                    break;
                }
                chunks.truncate(found);
            }
        }
        Ok(chunks)
    }

    async fn fetch_all(&mut self, chunks: Vec<(Lba, u32)>) -> Result<(), HydrateError> {
        let mut left_out = 0;
        for (lba, stored) in chunks {
            self.wait_for_room().await;
            let started = Instant::now();
            if !self.fetch(lba).await? {
                left_out += u64::from(stored) * BLOCK_SIZE as u64;
            }
            let bytes = u64::from(stored) * BLOCK_SIZE as u64;
            self.note(|status| status.done_bytes += bytes);
            let at_rate = Duration::from_micros(bytes * 1_000_000 / RATE_MAX);
            tokio::time::sleep(started.elapsed().max(at_rate)).await;
        }
        if left_out == 0 {
            return Ok(());
        }
        let words = format!("{left_out} bytes kept changing meanwhile: hydrate it once more");
        Err(HydrateError::Failed(words))
    }

    /// Fetches what is not known of a chunk. False: it kept changing.
    async fn fetch(&mut self, lba: Lba) -> Result<bool, HydrateError> {
        let blocks = CHUNK_BLOCKS - (lba.0 % u64::from(CHUNK_BLOCKS)) as u32;
        for _ in 0..PLANS_MAX {
            let (ticket, absent) = self.plan(lba, blocks).await?;
            let mut pieces = Vec::new();
            for (lba, blocks) in self.within_ranges(&absent) {
                self.note(|status| status.waits_for = Some("the store".into()));
                let read = self.backing.read(lba, blocks).await.map_err(failed)?;
                self.note(|status| status.waits_for = None);
                let stored: Vec<bool> = read.iter().map(Option::is_some).collect();
                for (start, len, is_stored) in runs(&stored) {
                    let lba = lba.plus(u64::from(start));
                    let blocks = read[start as usize..(start + len) as usize].iter().flatten();
                    pieces.push(if is_stored {
                        Fetched::Data { lba, blocks: blocks.cloned().collect() }
                    } else {
                        Fetched::Hole { lba, blocks: len }
                    });
                }
            }
            if pieces.is_empty() || self.keep(ticket, pieces).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The parts of these runs that were asked for.
    fn within_ranges(&self, runs: &[(Lba, u32)]) -> Vec<(Lba, u32)> {
        let mut within = Vec::new();
        for (lba, blocks) in runs {
            let end = lba.0 + u64::from(*blocks);
            let from = self.ranges.partition_point(|(start, blocks)| start.0 + blocks <= lba.0);
            for (start, blocks) in self.ranges[from..].iter().take_while(|(s, _)| s.0 < end) {
                let (from, to) = (start.0.max(lba.0), (start.0 + blocks).min(end));
                within.push((Lba(from), (to - from) as u32));
            }
        }
        within
    }

    async fn plan(
        &mut self,
        lba: Lba,
        blocks: u32,
    ) -> Result<(u64, Vec<(Lba, u32)>), HydrateError> {
        self.asked += 1;
        self.sender.send(ToDisk::Plan { id: self.asked, lba, blocks });
        match self.answer().await {
            Some(FromDisk::Planned { ticket, absent, .. }) => Ok((ticket, absent)),
            _ => Err(HydrateError::Failed("the disk's worker is gone".into())),
        }
    }

    /// Has the worker keep what was fetched. False: it must be fetched again.
    async fn keep(&mut self, ticket: u64, pieces: Vec<Fetched>) -> Result<bool, HydrateError> {
        let mut pause = LOOK_AGAIN;
        loop {
            let (pieces, roomy) = (pieces.clone(), self.pool.has_room());
            self.asked += 1;
            self.sender.send(ToDisk::Keep { id: self.asked, ticket, roomy, pieces });
            match self.answer().await {
                Some(FromDisk::Kept { kept: Kept::All, .. }) => return Ok(true),
                Some(FromDisk::Kept { kept: Kept::Stale, .. }) => return Ok(false),
                Some(FromDisk::Kept { kept: Kept::NoRoom, .. }) => {
                    self.note(|status| status.waits_for = Some("room in the cache".into()));
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LOOK_AGAIN_MAX);
                    self.note(|status| status.waits_for = None);
                }
                Some(FromDisk::Kept { kept: Kept::Failed, .. }) => {
                    return Err(HydrateError::Failed(
                        "the disk's log has failed, and keeps nothing any more".into(),
                    ));
                }
                _ => return Err(HydrateError::Failed("the disk's worker is gone".into())),
            }
        }
    }

    /// What the worker says to the last question; answers to others, of a hydration before this one, are passed over.
    async fn answer(&mut self) -> Option<FromDisk> {
        loop {
            let message = self.answers.recv().await?;
            let (FromDisk::Planned { id, .. } | FromDisk::Kept { id, .. }) = message else {
                continue;
            };
            if id == self.asked {
                return Some(message);
            }
        }
    }

    /// Waits while the ring is needed for writes.
    async fn wait_for_room(&self) {
        while self.pool.counts().fill() > FILL_MAX {
            self.note(|status| status.waits_for = Some("room in the ring".into()));
            tokio::time::sleep(LOOK_AGAIN * 5).await;
        }
        self.note(|status| status.waits_for = None);
    }
}

fn failed(error: crate::backing::BackingError) -> HydrateError {
    HydrateError::Failed(error.to_string())
}

/// Cuts ranges at multiples of `step` blocks.
fn pieces(ranges: &[(Lba, u64)], step: u32) -> Vec<(Lba, u32)> {
    let mut pieces = Vec::new();
    for (lba, blocks) in ranges {
        let (mut at, end) = (lba.0, lba.0 + blocks);
        while at < end {
            let next = ((at / u64::from(step) + 1) * u64::from(step)).min(end);
            pieces.push((Lba(at), (next - at) as u32));
            at = next;
        }
    }
    pieces
}

/// Runs of equal values: where they start, how long they are, and the value.
fn runs(values: &[bool]) -> Vec<(u32, u32, bool)> {
    let mut runs: Vec<(u32, u32, bool)> = Vec::new();
    for (at, &value) in (0u32..).zip(values) {
        match runs.last_mut() {
            Some((_, len, last)) if *last == value => *len += 1,
            _ => runs.push((at, 1, value)),
        }
    }
    runs
}

/// Adds blocks to the chunks that they lie in. Each chunk is named by the first block of it that is wanted.
fn add_chunks(chunks: &mut Vec<(Lba, u32)>, lba: Lba, blocks: u32) {
    let chunk_of = |lba: Lba| lba.0 / u64::from(CHUNK_BLOCKS);
    for (lba, blocks) in pieces(&[(lba, u64::from(blocks))], CHUNK_BLOCKS) {
        match chunks.last_mut() {
            Some((last, stored)) if chunk_of(*last) == chunk_of(lba) => *stored += blocks,
            _ => chunks.push((lba, blocks)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_at_bounds() {
        assert_eq!(
            pieces(&[(Lba(250), 10), (Lba(512), 256)], 256),
            [(Lba(250), 6), (Lba(256), 4), (Lba(512), 256)]
        );
        assert_eq!(runs(&[true, true, false]), [(0, 2, true), (2, 1, false)]);
        assert!(runs(&[]).is_empty());
    }

    #[test]
    fn chunks_count_what_is_wanted_of_them() {
        let mut chunks = Vec::new();
        add_chunks(&mut chunks, Lba(10), 2);
        add_chunks(&mut chunks, Lba(100), 300);
        assert_eq!(chunks, [(Lba(10), 158), (Lba(256), 144)]);
    }
}
