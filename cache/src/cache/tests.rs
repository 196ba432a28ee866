//! Goal: what may go wrong between a disk, its task and the pool costs no data and no segments.
//! Method: a real cache on a temporary file, disks driven by hand, the store in memory. The clock is tokio's and stands
//! still while anything can run.

mod as_of;
mod attaching;
mod cloning;
mod cuts;
mod durable;
mod evicting;
mod hydrate;
mod joining;
mod legs;
mod replacing;
mod slowing;
mod snapshots;
mod through;

use crate::backing::{Backing, BackingError, Batch, Change};
use crate::disk::plan::SegmentId;
use crate::disk::{Action, AttachedDisk, Staged};
use crate::error::CacheError;
use crate::flusher::FlushOptions;
use crate::format::Geometry;
use crate::link::{FromDisk, ToDisk, WORKER_PANICKED};
use crate::local::Local;
use crate::release::run_once;
use crate::{Cache, CacheOptions, Phase, VdiIdentity};
use async_trait::async_trait;
use blockstore::device::DeviceErrorKind;
use blockstore::device::sim::{Fault, OpKind, SimDevice};
use blockstore::types::{BLOCK_SIZE, Lba, Lsn};
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use uuid::Uuid;

/// Room for fifteen segments of 1 MiB.
const CACHE_BYTES: u64 = 16 << 20;
/// More than any test needs.
const TURNS_MAX: u32 = 100_000;

/// The store: an image and the LSN that it stands at.
#[derive(Debug, Default)]
struct Store {
    image: Mutex<(Lsn, BTreeMap<u64, u8>)>,
    snapshots: Mutex<Vec<(Lsn, BTreeMap<u64, u8>)>>,
    commits: Mutex<u32>,
    /// Commits wait.
    is_away: AtomicBool,
    /// One does.
    one_waits: AtomicBool,
}

#[async_trait]
impl Backing for Store {
    fn committed(&self) -> Lsn {
        self.image.lock().0
    }

    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        let image = self.image.lock();
        let block = |n| image.1.get(&n).map(|&byte| Bytes::from(vec![byte; BLOCK_SIZE]));
        Ok((lba.0..lba.0 + u64::from(blocks)).map(block).collect())
    }

    async fn commit(&self, batch: Batch) -> Result<(), BackingError> {
        while self.is_away.load(Ordering::Relaxed) {
            self.one_waits.store(true, Ordering::Relaxed);
            pause().await;
        }
        let mut image = self.image.lock();
        let mut snapshots = batch.cuts.iter().map(|cut| cut.lsn);
        for changes in batch.parts() {
            for change in changes {
                let Change::Write { lba, data, .. } = change else { continue };
                image.1.insert(lba.0, data[0]);
            }
            if let Some(lsn) = snapshots.next() {
                self.snapshots.lock().push((lsn, image.1.clone()));
            }
        }
        *self.commits.lock() += 1;
        image.0 = batch.lsn;
        Ok(())
    }
}

fn options(path: PathBuf) -> CacheOptions {
    CacheOptions {
        path,
        create_size: Some(CACHE_BYTES),
        flush: FlushOptions { max_age_ms: 20, ..FlushOptions::default() },
        // Nothing stays in memory: what is replayed is read back.
        image_bytes: 0,
    }
}

/// Those who go down without a word have reads under way for a moment, and the device with them.
async fn open(dir: &TempDir) -> Arc<Cache> {
    for _ in 0..TURNS_MAX {
        match Cache::open(options(dir.path().join("cache"))).await {
            Err(CacheError::Device(error)) if error.kind == DeviceErrorKind::Reserved => {
                pause().await;
            }
            opened => return opened.unwrap(),
        }
    }
    panic!("somebody holds the cache");
}

fn vdi(n: u128) -> VdiIdentity {
    VdiIdentity { uuid: Uuid::from_u128(n), name: format!("disk-{n}"), size_bytes: 64 << 20 }
}

/// A disk and who drives it.
struct Guest {
    vdi: VdiIdentity,
    store: Arc<Store>,
    attached: AttachedDisk,
    tag: u64,
}

impl Guest {
    async fn new(cache: &Cache, n: u128) -> Self {
        let (vdi, store) = (vdi(n), Arc::new(Store::default()));
        cache.reserve(&vdi).await.unwrap();
        let attached = cache.attach(&vdi, store.clone()).await.unwrap();
        Self { vdi, store, attached, tag: 0 }
    }

    /// One turn of a worker's loop.
    fn turn(&mut self) {
        while let Some(message) = self.attached.link.try_recv() {
            if !matches!(message, ToDisk::Fetched { .. } | ToDisk::FailWaiting { .. }) {
                self.attached.on_message(message);
            }
        }
        let mut messages = Vec::new();
        while run_once(&mut self.attached, &mut messages) {}
        messages.into_iter().for_each(|message| self.attached.link.send(message));
        self.attached.disk.completions();
    }

    /// Turns until it is so, and some more.
    async fn turn_until(&mut self, is_so: impl Fn(&Self) -> bool) {
        let mut after = 0;
        for _ in 0..TURNS_MAX {
            self.turn();
            pause().await;
            after += u32::from(is_so(self));
            if after == 100 {
                return;
            }
        }
        panic!("what is waited for does not come");
    }

    fn stage(&mut self, lba: u64, byte: u8) -> Staged {
        self.tag += 1;
        self.attached.disk.write(self.tag, lba * 8, BLOCK_SIZE, &mut |_, dst| dst.fill(byte))
    }

    /// Writes blocks, one after the other, each as soon as there is room.
    async fn write(&mut self, lbas: std::ops::Range<u64>, byte: u8) {
        for lba in lbas {
            for turn in 0.. {
                if self.stage(lba, byte) == Staged::All {
                    break;
                }
                assert!(turn < TURNS_MAX, "a writer waits for ever");
                self.turn();
                pause().await;
            }
        }
        self.turn();
    }

    /// Runs until everything is committed.
    async fn drain(&mut self, cache: &Cache) {
        let mut drained = std::pin::pin!(cache.drain(self.vdi.uuid));
        for _ in 0..TURNS_MAX {
            self.turn();
            tokio::select! {
                biased;
                result = &mut drained => return assert!(result.unwrap() >= Lsn(1)),
                () = pause() => {}
            }
        }
        panic!("the drain does not end");
    }

    async fn leave(self, cache: &Cache) {
        cache.release(self.vdi.uuid, self.attached).await.unwrap();
        cache.drain(self.vdi.uuid).await.unwrap();
        cache.detach(self.vdi.uuid).await.unwrap();
    }
}

/// A turn's time. The devices are real and their time is too: the clock must not run away from them.
async fn pause() {
    std::thread::sleep(Duration::from_micros(100));
    tokio::time::sleep(Duration::from_millis(1)).await;
}

fn assert_empty(cache: &Cache) {
    let counts = cache.ground.pool.counts();
    assert_eq!((counts.free, counts.clean), (counts.segments, 0), "every segment is free");
}

#[tokio::test(start_paused = true)]
async fn a_segment_that_was_opened_before_the_last_was_sealed_is_committed_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    guest.write(0..1, 7).await;
    guest.attached.disk.on_message(ToDisk::Roll { id: 1000 });
    let mut sealed = Vec::new();
    while run_once(&mut guest.attached, &mut sealed) {}
    // The task hears of the next segment first.
    guest.write(1..2, 8).await;
    sealed.into_iter().for_each(|message| guest.attached.link.send(message));
    for turn in 0.. {
        if guest.store.committed() == Lsn(2) {
            break;
        }
        assert!(turn < TURNS_MAX, "an idle disk's last write is never committed");
        guest.turn();
        pause().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_sealed_segment_that_lost_records_is_not_replayed_up_to_the_damage() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    for lba in 0..8 {
        guest.write(lba..lba + 1, 7).await;
    }
    // Sealed on the device before the task hears of it, damaged before it replays it.
    guest.attached.disk.on_message(ToDisk::Roll { id: 1000 });
    let mut messages = Vec::new();
    while run_once(&mut guest.attached, &mut messages) {}
    let headers = cache.ground.local.read_headers().await.unwrap();
    let [header] = headers.as_slice() else { panic!("one segment was written: {headers:?}") };
    damage(&cache, &dir.path().join("cache"), header.segment);
    messages.into_iter().for_each(|message| guest.attached.link.send(message));
    let error = cache.drain(guest.vdi.uuid);
    let error = tokio::select! {
        result = error => result.unwrap_err(),
        () = drive(&mut guest) => unreachable!("a drive has no end"),
    };
    assert!(error.to_string().contains("is damaged"), "{error}");
    assert_eq!(guest.store.committed(), Lsn(0), "nothing was committed");
}

/// Spoils the summary, and the record in the middle, of a segment.
fn damage(cache: &Cache, path: &Path, segment: SegmentId) {
    let (geometry, block) = (&cache.ground.local.geometry, BLOCK_SIZE as u64);
    let start = geometry.segment_offset(segment);
    let file = std::fs::File::options().write(true).open(path).unwrap();
    let spoilt = [0x5a; BLOCK_SIZE];
    file.write_all_at(&spoilt, start + geometry.segment_size - block).unwrap();
    // Header, then records of two blocks each.
    file.write_all_at(&spoilt, start + block * 7).unwrap();
    file.sync_all().unwrap();
}

async fn drive(guest: &mut Guest) {
    loop {
        guest.turn();
        pause().await;
    }
}

/// What the store holds of the blocks.
fn stored(store: &Store, lbas: std::ops::Range<u64>) -> Vec<Option<u8>> {
    let image = store.image.lock();
    lbas.map(|lba| image.1.get(&lba).copied()).collect()
}

/// A disk with some blocks in the store and some only in its log, after the agent's death.
async fn left_behind(dir: &TempDir) -> (Arc<Cache>, Arc<Store>) {
    let cache = open(dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    guest.write(0..300, 1).await;
    guest.drain(&cache).await;
    guest.write(300..400, 2).await;
    let store =
        Arc::new(Store { image: Mutex::new(store_as_of(&guest.store)), ..Store::default() });
    drop(guest);
    cache.close().await;
    drop(cache);
    (open(dir).await, store)
}

/// A copy, so that a commit under way does not reach it.
fn store_as_of(store: &Store) -> (Lsn, BTreeMap<u64, u8>) {
    store.image.lock().clone()
}

#[tokio::test(start_paused = true)]
async fn a_disk_whose_worker_died_is_opened_again_with_all_that_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    guest.write(0..1500, 1).await;
    guest.drain(&cache).await;
    guest.write(1500..1600, 2).await;
    // The worker dies while it is asked to let go of segments.
    let mut other = Guest::new(&cache, 2).await;
    other.write(0..2000, 4).await;
    guest.attached.link.send(FromDisk::Failed { reason: WORKER_PANICKED.into() });
    let Guest { vdi, store, attached, tag } = guest;
    drop(attached);
    pause().await;
    assert_eq!(cache.vdi_status(vdi.uuid).unwrap().state, Phase::Failed);
    let attached = cache.reopen(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store, attached, tag };
    guest.write(1600..1700, 3).await;
    guest.drain(&cache).await;
    assert_eq!(stored(&guest.store, 1500..1600), vec![Some(2); 100]);
    assert_eq!(stored(&guest.store, 1600..1700), vec![Some(3); 100]);
    assert_ne!(cache.vdi_status(guest.vdi.uuid).unwrap().state, Phase::Failed);
    other.write(0..3000, 5).await;
    other.drain(&cache).await;
    for _ in 0..100 {
        guest.turn();
        pause().await;
    }
    guest.leave(&cache).await;
    other.leave(&cache).await;
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn a_log_that_the_device_failed_is_not_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let guest = Guest::new(&cache, 1).await;
    guest.attached.link.send(FromDisk::Failed { reason: "the device failed".into() });
    pause().await;
    cache.reopen(guest.vdi.uuid).await.unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_was_released_can_be_served_again() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    guest.write(0..100, 1).await;
    let Guest { vdi, store, attached, tag } = guest;
    cache.release(vdi.uuid, attached).await.unwrap();
    let attached = cache.reopen(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store, attached, tag };
    guest.write(100..200, 2).await;
    guest.drain(&cache).await;
    assert_eq!(stored(&guest.store, 0..100), vec![Some(1); 100]);
    assert_eq!(stored(&guest.store, 100..200), vec![Some(2); 100]);
    guest.leave(&cache).await;
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn the_whole_ring_is_filled_while_the_store_is_away_and_drained_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, store) = left_behind(&dir).await;
    let vdi = vdi(1);
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store: Arc::clone(&store), attached, tag: 0 };
    let (mut next, mut idle) = (400, 0);
    // Until it waits for longer than any slowing down lasts.
    while idle < 10_000 {
        let staged = guest.stage(next, 9) == Staged::All;
        (next, idle) = if staged { (next + 1, 0) } else { (next, idle + 1) };
        if !staged {
            guest.turn();
            pause().await;
        }
    }
    assert_eq!(cache.ground.pool.counts().free, 0, "nothing is left unused");
    cache.join(guest.vdi.uuid, store.clone()).await.unwrap();
    guest.write(next..next + 1, 9).await;
    guest.drain(&cache).await;
    assert_eq!(stored(&store, 400..next), vec![Some(9); (next - 400) as usize]);
}
