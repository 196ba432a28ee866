//! Goal: what may go wrong between a disk, its task and the pool costs no data and no segments.
//! Method: a real cache on a temporary file, disks driven by hand, the store in memory. The clock is tokio's and stands
//! still while anything can run.

mod as_of;
mod cloning;
mod cuts;
mod durable;
mod hydrate;
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

async fn open(dir: &TempDir) -> Arc<Cache> {
    Cache::open(options(dir.path().join("cache"))).await.unwrap()
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
async fn an_attach_that_fails_late_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let vdi = vdi(1);
    cache.reserve(&vdi).await.unwrap();
    let (slots, counts) =
        (cache.ground.local.read_slots().await.unwrap(), cache.ground.pool.counts());
    // The worker's own handle on the device cannot be opened.
    let (path, away) = (dir.path().join("cache"), dir.path().join("away"));
    std::fs::rename(&path, &away).unwrap();
    cache.attach(&vdi, Arc::new(Store::default())).await.unwrap_err();
    std::fs::rename(&away, &path).unwrap();
    assert_eq!(cache.ground.local.read_slots().await.unwrap(), slots);
    assert_eq!(cache.ground.pool.counts(), counts);
    let attached = cache.attach(&vdi, Arc::new(Store::default())).await.unwrap();
    cache.release(vdi.uuid, attached).await.unwrap();
    cache.detach(vdi.uuid).await.unwrap();
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn an_attach_whose_slot_cannot_be_written_gives_its_segments_back() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let sim = SimDevice::new(CACHE_BYTES, 1);
    let local = Local::make_on(file.path(), sim.device()).await.unwrap();
    let cache = Cache::on_local(options(file.path().into()), local).await.unwrap();
    let vdi = vdi(1);
    cache.reserve(&vdi).await.unwrap();
    let counts = cache.ground.pool.counts();
    sim.inject(OpKind::Write, 0, Fault::Io);
    cache.attach(&vdi, Arc::new(Store::default())).await.unwrap_err();
    assert_eq!(cache.ground.pool.counts(), counts);
    let _attached = cache.attach(&vdi, Arc::new(Store::default())).await.unwrap();
    assert_eq!(cache.ground.pool.counts().free, counts.free - 2);
}

/// The one before it is the only good copy.
#[tokio::test(start_paused = true)]
async fn a_second_copy_of_a_slot_that_fails_when_a_log_is_opened_is_written_to_the_same_place_again()
 {
    let file = tempfile::NamedTempFile::new().unwrap();
    let sim = SimDevice::new(CACHE_BYTES, 1);
    let local = Local::make_on(file.path(), sim.device()).await.unwrap();
    let cache = Cache::on_local(options(file.path().into()), local).await.unwrap();
    let mut vdi = vdi(1);
    cache.reserve(&vdi).await.unwrap();
    // It grew meanwhile, so that both copies are written: the second and the third of all, of which the third fails.
    vdi.size_bytes *= 2;
    let bad = Geometry::slot_offset(0, 3);
    sim.set_bad(bad, BLOCK_SIZE as u64, &[OpKind::Write]);
    let good = |sim: &SimDevice| sim.peek(Geometry::slot_offset(0, 2), BLOCK_SIZE);
    cache.attach(&vdi, Arc::new(Store::default())).await.unwrap_err();
    let first = good(&sim);
    let next = cache.inner.lock().await.slots[0].next(None).sequence;
    assert_eq!(Geometry::slot_offset(0, next), bad);
    cache.attach(&vdi, Arc::new(Store::default())).await.unwrap_err();
    assert_eq!(good(&sim), first);
    sim.set_bad(bad, BLOCK_SIZE as u64, &[]);
    let attached = cache.attach(&vdi, Arc::new(Store::default())).await.unwrap();
    assert_eq!(attached.disk.size_bytes(), vdi.size_bytes);
}

/// Two segments or none (rule L10): of fifteen, seven disks take two each.
#[tokio::test(start_paused = true)]
async fn a_disk_for_which_two_segments_are_not_left_is_refused_and_takes_none() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guests = Vec::new();
    for n in 1..=7 {
        guests.push(Guest::new(&cache, n).await);
    }
    let one_left = cache.ground.pool.counts();
    assert_eq!(one_left.free, 1);
    let words = cache.reserve(&vdi(8)).await.unwrap_err().to_string();
    assert!(words.contains("1 free, 2 needed") && words.contains("detach a disk"), "{words}");
    assert_eq!(cache.ground.pool.counts(), one_left);
    // The others go on, and so does this one once there is room.
    guests[0].write(0..10, 1).await;
    guests[0].drain(&cache).await;
    guests.remove(0).leave(&cache).await;
    Guest::new(&cache, 8).await;
}

#[tokio::test(start_paused = true)]
async fn a_growth_that_is_not_durable_is_not_told_to_the_guest_and_can_be_tried_again() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let sim = SimDevice::new(CACHE_BYTES, 1);
    let local = Local::make_on(file.path(), sim.device()).await.unwrap();
    let cache = Cache::on_local(options(file.path().into()), local).await.unwrap();
    let mut guest = Guest::new(&cache, 1).await;
    let (uuid, former) = (guest.vdi.uuid, guest.vdi.size_bytes);
    for fault in [OpKind::Write, OpKind::Flush] {
        sim.inject(fault, 0, Fault::Io);
        cache.resize(uuid, 2 * former).await.unwrap_err();
        guest.turn();
        assert_eq!(guest.attached.disk.size_bytes(), former, "{fault:?}");
    }
    cache.resize(uuid, 2 * former).await.unwrap();
    guest.turn();
    assert_eq!(guest.attached.disk.size_bytes(), 2 * former);
    // What a start without the store finds.
    let slots = cache.ground.local.read_slots().await.unwrap();
    assert!(slots.iter().any(|s| s.vdi.as_ref().is_some_and(|v| v.size_bytes == 2 * former)));
}

/// Whichever copy of its slot rots: what the guest was told is there at a start without the store, too.
#[tokio::test(start_paused = true)]
async fn a_disk_that_grew_does_not_shrink_when_a_copy_of_its_slot_rots() {
    for (copy, at_attach) in [(0, false), (1, false), (0, true), (1, true)] {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(&dir).await;
        let guest = Guest::new(&cache, 1).await;
        let (mut vdi, store) = (guest.vdi.clone(), Arc::clone(&guest.store));
        vdi.size_bytes *= 2;
        if !at_attach {
            cache.resize(vdi.uuid, vdi.size_bytes).await.unwrap();
        }
        drop((guest, cache));
        if at_attach {
            let cache = open(&dir).await;
            drop(cache.attach(&vdi, store).await.unwrap());
        }
        let file = File::options().write(true).open(dir.path().join("cache")).unwrap();
        file.write_all_at(&[0x5a; BLOCK_SIZE], Geometry::slot_offset(0, copy)).unwrap();
        let cache = open(&dir).await;
        let attached = cache.attach_alone(vdi.uuid).await.unwrap();
        assert_eq!(attached.disk.size_bytes(), vdi.size_bytes, "copy {copy}");
    }
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

#[tokio::test(start_paused = true)]
async fn a_worker_that_is_silent_does_not_stop_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut silent = Guest::new(&cache, 1).await;
    silent.write(0..1500, 1).await;
    silent.drain(&cache).await;
    // Wants more than is free; what the silent one holds would do.
    let mut busy = Guest::new(&cache, 2).await;
    for round in 0..3 {
        busy.write(0..3000, round).await;
    }
    busy.drain(&cache).await;
    // It was only slow: what it gives back late is counted once, and nothing is lost to the pool.
    for _ in 0..2 {
        for _ in 0..100 {
            silent.turn();
            pause().await;
        }
        tokio::time::sleep(Duration::from_secs(6)).await;
    }
    assert!(cache.ground.pool.counts().used() <= 4, "all but what the disks write to can be had");
    silent.leave(&cache).await;
    busy.leave(&cache).await;
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn segments_whose_list_could_not_be_read_are_evicted_later() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, path) = (open(&dir).await, dir.path().join("cache"));
    let mut reader = Guest::new(&cache, 1).await;
    reader.write(0..2500, 1).await;
    reader.drain(&cache).await;
    let mut writer = Guest::new(&cache, 2).await;
    let good = std::fs::read(&path).unwrap();
    let held = cache.ground.pool.owned(reader.vdi.uuid);
    held.iter().for_each(|id| damage(&cache, &path, *id));
    // It makes do with what is free and its own, in turn.
    writer.write(0..6000, 2).await;
    assert!(held.len() > 5 && cache.ground.pool.owned(reader.vdi.uuid) == held);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    for id in held {
        let geometry = &cache.ground.local.geometry;
        let (at, len) = (geometry.segment_offset(id) as usize, geometry.segment_size as usize);
        file.write_all_at(&good[at..at + len], at as u64).unwrap();
    }
    let rounds = async {
        tokio::time::sleep(Duration::from_secs(6)).await;
        for _ in 0..60 {
            writer.write(0..500, 3).await;
        }
    };
    tokio::select! {
        () = rounds => {}
        () = drive(&mut reader) => unreachable!("it never ends"),
    }
    assert!(cache.ground.pool.owned(reader.vdi.uuid).len() <= 2, "what is written to stays");
    writer.drain(&cache).await;
    reader.leave(&cache).await;
    writer.leave(&cache).await;
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_leaves_amid_evictions_leaves_no_debt() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut leaving = Guest::new(&cache, 1).await;
    leaving.write(0..1500, 1).await;
    leaving.drain(&cache).await;
    let mut staying = Guest::new(&cache, 2).await;
    staying.write(0..2000, 2).await;
    assert!(cache.ground.pool.counts().clean > 0, "evictions are asked for and not answered");
    leaving.leave(&cache).await;
    staying.write(0..6000, 3).await;
    staying.drain(&cache).await;
    staying.leave(&cache).await;
    assert_empty(&cache);
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
async fn a_disk_attached_alone_commits_once_its_store_has_joined() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, store) = left_behind(&dir).await;
    let vdi = vdi(1);
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store: Arc::clone(&store), attached, tag: 0 };
    guest.write(400..500, 3).await;
    for _ in 0..1000 {
        guest.turn();
        pause().await;
    }
    assert_eq!(store.committed(), Lsn(300), "nothing goes to a store that was not compared");
    cache.verify(guest.vdi.uuid, store.committed()).await.unwrap();
    cache.join(guest.vdi.uuid, store.clone()).await.unwrap();
    guest.drain(&cache).await;
    assert_eq!(stored(&store, 300..400), vec![Some(2); 100]);
    assert_eq!(stored(&store, 400..500), vec![Some(3); 100]);
    guest.leave(&cache).await;
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn what_the_store_holds_already_is_not_committed_again() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, store) = left_behind(&dir).await;
    // The head was written, the slot was not.
    store.image.lock().0 = Lsn(350);
    let vdi = vdi(1);
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store: Arc::clone(&store), attached, tag: 0 };
    cache.join(guest.vdi.uuid, store.clone()).await.unwrap();
    guest.drain(&cache).await;
    assert_eq!(store.committed(), Lsn(400));
    assert_eq!(stored(&store, 300..350), vec![None; 50], "as the store said");
    assert_eq!(stored(&store, 350..400), vec![Some(2); 50]);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_does_not_fit_the_log_is_refused_until_one_does() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, store) = left_behind(&dir).await;
    let vdi = vdi(1);
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store: Arc::clone(&store), attached, tag: 0 };
    guest.write(400..410, 3).await;
    for (lsn, words) in [(299, "put back to an older state"), (401, "changed by another host")] {
        let error = cache.verify(guest.vdi.uuid, Lsn(lsn)).await.unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(&lsn.to_string()), "{error}");
        cache.drain(guest.vdi.uuid).await.unwrap_err();
    }
    let older = Arc::new(Store::default());
    cache.join(guest.vdi.uuid, older.clone()).await.unwrap_err();
    assert_eq!(older.committed(), Lsn(0));
    cache.join(guest.vdi.uuid, store.clone()).await.unwrap();
    guest.drain(&cache).await;
    assert_eq!(store.committed(), Lsn(410));
}

/// The log is a copy of before the last hundred writes, as after a cache was put back: what it is given then is another
/// history than the store's, however long it gets.
#[tokio::test(start_paused = true)]
async fn a_log_that_grew_alone_past_a_store_of_another_history_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, store) = left_behind(&dir).await;
    store.image.lock().0 = Lsn(500);
    let vdi = vdi(1);
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi: vdi.clone(), store: Arc::clone(&store), attached, tag: 0 };
    guest.write(400..600, 3).await;
    drop((guest, cache));
    let told = |error| match error {
        CacheError::LogIsOlder { log: Lsn(400), store: Lsn(500), .. } => {}
        error => panic!("{error}"),
    };
    let cache = open(&dir).await;
    told(cache.attach(&vdi, store.clone()).await.unwrap_err());
    // Nor after one more start without the store.
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    assert_eq!(attached.disk.staged_lsn(), Lsn(600));
    told(cache.join(vdi.uuid, store.clone()).await.unwrap_err());
    drop((attached, cache));
    let cache = open(&dir).await;
    // The store that it was written for is taken, and all starts after that.
    store.image.lock().0 = Lsn(400);
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi: vdi.clone(), store: Arc::clone(&store), attached, tag: 0 };
    cache.join(vdi.uuid, store.clone()).await.unwrap();
    guest.drain(&cache).await;
    assert_eq!(store.committed(), Lsn(600));
    drop((guest, cache));
    let cache = open(&dir).await;
    cache.attach(&vdi, store).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn disks_that_were_never_served_are_not_attached_alone() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    cache.reserve(&vdi(1)).await.unwrap();
    assert!(!cache.attached().await[0].was_served);
    cache.attach_alone(vdi(1).uuid).await.unwrap_err();
    cache.unreserve(vdi(1).uuid).await.unwrap();
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn several_disks_are_attached_at_once_and_each_once() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    for n in 1..4 {
        cache.reserve(&vdi(n)).await.unwrap();
    }
    let attach = |n| {
        let cache = Arc::clone(&cache);
        async move { cache.attach(&vdi(n), Arc::new(Store::default())).await }
    };
    let (a, b, c, twice) = tokio::join!(attach(1), attach(2), attach(3), attach(3));
    let _disks = [a.unwrap(), b.unwrap(), c.unwrap()];
    twice.unwrap_err();
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
