//! Goal: a clone that is made without the store is exactly its snapshot, whatever its parent does next; all of it is there after a
//! death at any moment, or none; nothing of it is let go of before the store has it; and once the store has it, it is the clone's
//! image there that is right, too.
//! Method: as in the module above, but with sectors: random writes and zeroings, each disk beside a model; what is not held is
//! looked up in the image that the store will have of the snapshot. For deaths the cache lies on a simulated device.

mod lending;

use super::*;
use crate::format::slot::VdiSlot;
use crate::index::{Found, PatchBase, PatchSource};
use crate::{NewClone, SnapshotTaken};
use blockstore::format::vdi::Origin;
use blockstore::types::SECTOR_SIZE;
use blockstore::{Policy, SnapshotLabel};

/// Blocks that are written.
const BLOCKS: u64 = 400;

/// A disk's sectors, one byte each, by block.
type Model = BTreeMap<u64, [u8; 8]>;

/// The store: a whole image, and those of its snapshots.
#[derive(Debug, Default)]
struct Full {
    image: Mutex<(Lsn, Model)>,
    cuts: Mutex<BTreeMap<u64, Model>>,
    is_away: AtomicBool,
}

fn block_of(sectors: &[u8; 8]) -> Vec<u8> {
    sectors.iter().flat_map(|&byte| [byte; SECTOR_SIZE]).collect()
}

fn sectors_of(block: &[u8]) -> [u8; 8] {
    std::array::from_fn(|n| {
        let sector = &block[n * SECTOR_SIZE..(n + 1) * SECTOR_SIZE];
        assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector is whole");
        sector[0]
    })
}

#[async_trait]
impl Backing for Full {
    fn committed(&self) -> Lsn {
        self.image.lock().0
    }

    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        let image = self.image.lock();
        let block = |n| image.1.get(&n).map(|sectors| Bytes::from(block_of(sectors)));
        Ok((lba.0..lba.0 + u64::from(blocks)).map(block).collect())
    }

    async fn commit(&self, batch: Batch) -> Result<(), BackingError> {
        while self.is_away.load(Ordering::Relaxed) {
            pause().await;
        }
        let mut image = self.image.lock();
        let mut cuts = batch.cuts.iter().map(|cut| cut.lsn);
        for changes in batch.parts() {
            for change in changes {
                match change {
                    Change::Write { lba, data, .. } => {
                        image.1.insert(lba.0, sectors_of(data));
                    }
                    Change::Zero { lba, blocks } => {
                        image.1.retain(|n, _| !(lba.0..lba.0 + *blocks).contains(n));
                    }
                }
            }
            image.1.retain(|_, sectors| *sectors != [0; 8]);
            if let Some(lsn) = cuts.next() {
                self.cuts.lock().insert(lsn.0, image.1.clone());
            }
        }
        image.0 = batch.lsn;
        Ok(())
    }
}

/// A disk beside what it should be.
struct Disk {
    guest: Guest,
    full: Arc<Full>,
    now: Model,
    random: u64,
}

impl Disk {
    async fn new(cache: &Cache, n: u128, seed: u64) -> Self {
        let (vdi, full) = (vdi(n), Arc::new(Full::default()));
        cache.reserve(&vdi).await.unwrap();
        let attached = cache.attach(&vdi, full.clone()).await.unwrap();
        Self::with(vdi, attached, full, Model::new(), seed)
    }

    fn with(
        vdi: VdiIdentity,
        attached: AttachedDisk,
        full: Arc<Full>,
        now: Model,
        random: u64,
    ) -> Self {
        let guest = Guest { vdi, store: Arc::default(), attached, tag: 0 };
        Self { guest, full, now, random }
    }

    fn next(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.random >> 33) % below
    }

    /// So many random writes and zeroings.
    async fn change(&mut self, times: u64) {
        for _ in 0..times {
            let (sector, kind) = (self.next(BLOCKS * 8), self.next(8));
            let sectors = 1 + if kind < 3 { self.next(7) } else { self.next(40) };
            let (byte, discard) = (1 + self.next(255) as u8, kind == 0);
            for turn in 0.. {
                let disk = &mut self.guest.attached.disk;
                let staged = match kind {
                    0 | 7 => disk.zero(1, sector, sectors, discard),
                    _ => disk.write(1, sector, sectors as usize * SECTOR_SIZE, &mut |_, dst| {
                        dst.fill(byte)
                    }),
                };
                if staged == Staged::All {
                    break;
                }
                assert!(turn < TURNS_MAX, "a writer waits for ever");
                self.guest.turn();
                pause().await;
            }
            let (mut from, mut to) = (sector, sector + sectors);
            if discard {
                (from, to) = (from.next_multiple_of(8), to / 8 * 8);
            }
            for sector in from..to {
                let byte = if matches!(kind, 0 | 7) { 0 } else { byte };
                self.now.entry(sector / 8).or_default()[(sector % 8) as usize] = byte;
            }
            self.guest.turn();
        }
        self.now.retain(|_, sectors| *sectors != [0; 8]);
    }

    /// The worker turns until this is done.
    async fn until<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        for _ in 0..TURNS_MAX {
            self.guest.turn();
            tokio::select! {
                biased;
                done = &mut work => return done,
                () = pause() => {}
            }
        }
        panic!("it does not end");
    }

    async fn snapshot(&mut self, cache: &Cache) -> SnapshotTaken {
        let vdi = self.guest.vdi.uuid;
        self.until(cache.snapshot(vdi, SnapshotLabel::default())).await.unwrap()
    }

    async fn clone_of(&mut self, cache: &Cache, n: u128, lsn: Lsn) -> Result<(), CacheError> {
        let new = new_clone(n, self.guest.vdi.uuid, lsn);
        self.until(cache.clone_pending(&new)).await
    }

    /// All that the disk gives, with `base` for what is not held; and the blocks that are not held.
    async fn content(&self, cache: &Cache, base: &Model) -> (Model, Vec<u64>) {
        let local = &cache.ground.local;
        let read = async |slot: u32, crc: u32| {
            let bytes = local.read(local.geometry.block_offset(slot), BLOCK_SIZE).await.unwrap();
            assert_eq!(blockstore::crc::crc32c(&bytes), crc);
            sectors_of(&bytes)
        };
        let (mut found, mut absent) = (Model::new(), Vec::new());
        for lba in 0..BLOCKS + 10 {
            let below = base.get(&lba).copied().unwrap_or_default();
            let sectors = match self.guest.attached.disk.index().get(Lba(lba)) {
                Found::At { slot, crc } => read(slot, crc).await,
                Found::Zero => [0; 8],
                Found::Absent => {
                    absent.push(lba);
                    below
                }
                Found::Patched(patched) => {
                    let mut sectors = match patched.base() {
                        PatchBase::At { slot, crc } => read(slot, crc).await,
                        PatchBase::Zero => [0; 8],
                        PatchBase::Store => below,
                    };
                    for patch in patched.patches() {
                        let layer = match patch.source {
                            PatchSource::At { slot, crc } => read(slot, crc).await,
                            PatchSource::Zero => [0; 8],
                        };
                        for n in (0..8).filter(|n| patch.sectors & (1 << n) != 0) {
                            sectors[n] = layer[n];
                        }
                    }
                    sectors
                }
            };
            if sectors != [0; 8] {
                found.insert(lba, sectors);
            }
        }
        (found, absent)
    }
}

fn new_clone(n: u128, parent: Uuid, lsn: Lsn) -> NewClone {
    NewClone { disk: vdi(n), origin: Origin { vdi: parent, lsn }, policy: Policy::default() }
}

/// A parent of which something is in the store and the rest is not; the store is away.
async fn parent(cache: &Cache, seed: u64) -> (Disk, Model) {
    let mut parent = Disk::new(cache, 1, seed).await;
    parent.change(150).await;
    let vdi = parent.guest.vdi.uuid;
    parent.until(cache.drain(vdi)).await.unwrap();
    parent.full.is_away.store(true, Ordering::Relaxed);
    let in_store = parent.now.clone();
    parent.change(150).await;
    (parent, in_store)
}

/// Blocks of which two images differ.
fn changed(a: &Model, b: &Model) -> Vec<u64> {
    (0..BLOCKS + 10).filter(|lba| a.get(lba) != b.get(lba)).collect()
}

async fn reopened(cache: Arc<Cache>, dir: &TempDir, disks: Vec<Disk>) -> Arc<Cache> {
    drop(disks);
    cache.close().await;
    drop(cache);
    open(dir).await
}

#[tokio::test(start_paused = true)]
async fn a_clone_is_what_the_snapshot_was_whatever_its_parent_does_and_becomes_that_in_the_store() {
    for seed in 1..6 {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(&dir).await;
        let (mut parent, in_store) = parent(&cache, seed).await;
        let uuid = parent.guest.vdi.uuid;
        let mut made = Vec::new();
        for (n, again) in [(2, false), (3, false), (4, true)] {
            if !again {
                let lsn = parent.snapshot(&cache).await.lsn;
                made.push((n, lsn, parent.now.clone()));
                parent.change(60).await;
            } else {
                let (_, lsn, model) = made[0].clone();
                made.push((n, lsn, model));
            }
            parent.clone_of(&cache, n, made.last().unwrap().1).await.unwrap();
            parent.change(60).await;
        }
        // No other LSN than a snapshot's, and nothing that is there.
        for lsn in [Lsn(1), made[0].1.plus(1), Lsn(1 << 40)] {
            parent.clone_of(&cache, 9, lsn).await.unwrap_err();
        }
        let mut clones = Vec::new();
        for (n, lsn, model) in &made {
            let attached = cache.attach_alone(vdi(*n).uuid).await.unwrap();
            let clone = Disk::with(vdi(*n), attached, Arc::default(), model.clone(), seed + 7);
            let (content, absent) = clone.content(&cache, model).await;
            assert_eq!(changed(&content, model), Vec::<u64>::new(), "seed {seed}, clone {n}");
            // What the store has not is all here.
            for lba in changed(&in_store, model) {
                assert!(!absent.contains(&lba), "seed {seed}: block {lba} of clone {n} is nowhere");
            }
            let origin = cache.origin_of(vdi(*n).uuid).await.unwrap().snapshot;
            assert_eq!(origin, Origin { vdi: uuid, lsn: *lsn });
            clones.push(clone);
        }
        assert!(cache.waiting_clone_of(uuid).await.is_some());
        let mut first = clones.swap_remove(0);
        first.change(80).await;
        first.clone_of(&cache, 9, Lsn(1)).await.unwrap_err();
        first.guest.attached.disk.flush(1000);
        (0..20).for_each(|_| first.guest.turn());
        let written = first.now.clone();
        let (parent_now, full) = (parent.now.clone(), Arc::clone(&parent.full));
        clones.extend([parent, first]);
        let cache = reopened(cache, &dir, clones).await;
        assert_eq!(cache.attached().await.iter().filter(|found| found.origin.is_some()).count(), 3);
        let mut clones = Vec::new();
        for (n, lsn, model) in &made {
            let attached = cache.attach_alone(vdi(*n).uuid).await.unwrap();
            let now = if *n == 2 { &written } else { model };
            let clone = Disk::with(vdi(*n), attached, Arc::default(), now.clone(), seed + 9);
            let (content, _) = clone.content(&cache, model).await;
            assert_eq!(changed(&content, now), Vec::<u64>::new(), "seed {seed}, clone {n} again");
            clones.push((clone, *lsn));
        }
        // The store is back: the snapshots come first, then the clones begin as them.
        let attached = cache.attach_alone(uuid).await.unwrap();
        let mut parent = Disk::with(vdi(1), attached, full, parent_now, seed);
        parent.full.is_away.store(false, Ordering::Relaxed);
        cache.join(uuid, parent.full.clone()).await.unwrap();
        parent.until(cache.drain(uuid)).await.unwrap();
        assert!(parent.full.image.lock().1 == parent.now, "seed {seed}");
        for (mut clone, lsn) in clones {
            let vdi = clone.guest.vdi.uuid;
            clone.full.image.lock().1 = parent.full.cuts.lock()[&lsn.0].clone();
            clone.change(30).await;
            cache.join(vdi, clone.full.clone()).await.unwrap();
            assert_eq!(cache.origin_of(vdi).await, None);
            clone.change(30).await;
            clone.until(cache.drain(vdi)).await.unwrap();
            let image = clone.full.image.lock().1.clone();
            assert_eq!(changed(&image, &clone.now), Vec::<u64>::new(), "seed {seed}");
            clone.guest.leave(&cache).await;
        }
        assert_eq!(cache.waiting_clone_of(uuid).await, None);
        parent.guest.leave(&cache).await;
        assert_empty(&cache);
    }
}

/// The first of them writes as much as a segment takes; all of them go on meanwhile.
async fn fill_a_segment(mut disks: [&mut Disk; 3]) {
    for lba in 0..250 {
        for turn in 0.. {
            if disks[0].guest.stage(lba, 9) == Staged::All {
                break;
            }
            assert!(turn < TURNS_MAX, "a writer waits for ever");
            for disk in &mut disks {
                disk.guest.turn();
            }
            pause().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_of_a_clone_is_evicted_before_the_store_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    // Whole blocks only: nothing of the clone has an LSN that would wait to be committed.
    let mut parent = Disk::new(&cache, 1, 3).await;
    parent.full.is_away.store(true, Ordering::Relaxed);
    parent.guest.write(0..300, 7).await;
    parent.now.extend((0..300).map(|lba| (lba, [7; 8])));
    let lsn = parent.snapshot(&cache).await.lsn;
    let model = parent.now.clone();
    parent.clone_of(&cache, 2, lsn).await.unwrap();
    let clone = vdi(2).uuid;
    let attached = cache.attach_alone(clone).await.unwrap();
    let mut clone_disk = Disk::with(vdi(2), attached, Arc::default(), model.clone(), 1);
    // The parent is in the store, and another disk wants all the room that there is.
    parent.full.is_away.store(false, Ordering::Relaxed);
    let vdi_1 = parent.guest.vdi.uuid;
    parent.until(cache.drain(vdi_1)).await.unwrap();
    let mut other = Disk::new(&cache, 3, 5).await;
    for _ in 0..20 {
        fill_a_segment([&mut other, &mut parent, &mut clone_disk]).await;
    }
    assert!(parent.content(&cache, &Model::new()).await.1.len() > 300, "others gave way");
    let (content, _) = clone_disk.content(&cache, &model).await;
    assert_eq!(changed(&content, &model), Vec::<u64>::new());
    let held = |disk: &Disk| disk.guest.attached.disk.index().len();
    let before = held(&clone_disk);
    assert!(before > 50);
    clone_disk.full.image.lock().1 = parent.full.cuts.lock()[&lsn.0].clone();
    cache.join(clone, clone_disk.full.clone()).await.unwrap();
    clone_disk.until(cache.drain(clone)).await.unwrap();
    for round in 0.. {
        if held(&clone_disk) == 0 {
            break;
        }
        assert!(round < 100, "it never gives way");
        fill_a_segment([&mut other, &mut parent, &mut clone_disk]).await;
    }
    assert!(clone_disk.full.image.lock().1 == model);
}

#[tokio::test(start_paused = true)]
async fn a_clone_that_is_given_up_or_too_large_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let (mut parent, _) = parent(&cache, 4).await;
    let lsn = parent.snapshot(&cache).await.lsn;
    parent.clone_of(&cache, 2, lsn).await.unwrap();
    let clone = vdi(2).uuid;
    // A former program finds nothing in its slot that it could take for free.
    let copy = |copy| {
        let offset = crate::format::Geometry::slot_offset(1, copy);
        let mut version = [0; 4];
        let file = File::open(dir.path().join("cache")).unwrap();
        file.read_exact_at(&mut version, offset + 12).unwrap();
        u32::from_le_bytes(version)
    };
    assert_eq!([copy(0), copy(1)], [2, 2]);
    let counts = cache.ground.pool.counts();
    let attached = cache.attach_alone(clone).await.unwrap();
    cache.give_up_clone(clone).await.unwrap_err();
    cache.detach(clone).await.unwrap_err();
    cache.release(clone, attached).await.unwrap();
    cache.detach(clone).await.unwrap_err();
    cache.give_up_clone(clone).await.unwrap();
    assert!(cache.ground.pool.counts().free > counts.free);
    assert_eq!(cache.attached().await.len(), 1);
    // Of fifteen segments, the parent gets seven full ones.
    parent.guest.write(1000..1000 + 7 * 240, 5).await;
    let lsn = parent.snapshot(&cache).await.lsn;
    let counts = cache.ground.pool.counts();
    let error = parent.clone_of(&cache, 2, lsn).await.unwrap_err().to_string();
    assert!(error.contains("MiB can be had"), "{error}");
    assert_eq!(cache.ground.pool.counts().free, counts.free);
    assert_eq!(cache.attached().await.len(), 1);
}

/// Its name is taken in the store, and the slot that would say so cannot be written: it would wait for ever, and its guest with it.
#[tokio::test(start_paused = true)]
async fn a_clone_that_lost_its_legs_gets_to_the_store_under_another_name() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let (mut parent, _) = parent(&cache, 4).await;
    let lsn = parent.snapshot(&cache).await.lsn;
    let model = parent.now.clone();
    parent.clone_of(&cache, 2, lsn).await.unwrap();
    let clone = vdi(2).uuid;
    let attached = cache.attach_alone(clone).await.unwrap();
    let mut disk = Disk::with(vdi(2), attached, Arc::default(), model, 1);
    disk.change(20).await;
    disk.guest.lose_the_device(&dir);
    assert!((0..10).all(|lba| disk.guest.stage(lba, 4) == Staged::All));
    disk.now.extend((0..10).map(|lba| (lba, [4; 8])));
    disk.guest.tag += 1;
    disk.guest.attached.disk.flush(disk.guest.tag);
    disk.guest.turn_until(|_| cache.vdi_status(clone).unwrap().write_through).await;
    parent.full.is_away.store(false, Ordering::Relaxed);
    let uuid = parent.guest.vdi.uuid;
    parent.until(cache.drain(uuid)).await.unwrap();
    disk.full.image.lock().1 = parent.full.cuts.lock()[&lsn.0].clone();
    cache.rename(clone, "vdi-2-2").await.unwrap();
    // The slot names what it began as: whoever starts with it asks the store once more.
    assert!(cache.attached().await.iter().any(|found| found.origin.is_some()));
    cache.join(clone, disk.full.clone()).await.unwrap();
    disk.until(cache.drain(clone)).await.unwrap();
    let image = disk.full.image.lock().1.clone();
    assert_eq!(changed(&image, &disk.now), Vec::<u64>::new());
}

/// A simulated device with these bytes.
fn simulated(bytes: &[u8], seed: u64) -> SimDevice {
    let sim = SimDevice::new(CACHE_BYTES, seed);
    for (at, block) in bytes.chunks_exact(BLOCK_SIZE).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            sim.misplace((at * BLOCK_SIZE) as u64, block.try_into().unwrap());
        }
    }
    sim
}

/// The cache on it; workers write to the file.
async fn on_sim(path: &Path, sim: &SimDevice) -> Arc<Cache> {
    let local = Local::on_devices(vec![(path.into(), sim.device())], false).await.unwrap();
    Cache::on_local(options(path.into()), local).await.unwrap()
}

/// The copy in the other place is the only good one then. What cannot be freed either may be a clone at the next start: so it is one now.
#[tokio::test(start_paused = true)]
async fn a_slot_whose_writing_failed_is_freed_in_the_same_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache");
    let cache = open(&dir).await;
    let (mut disk, in_store) = parent(&cache, 5).await;
    let lsn = disk.snapshot(&cache).await.lsn;
    let (now, uuid) = (disk.now.clone(), disk.guest.vdi.uuid);
    drop(reopened(cache, &dir, vec![disk]).await);
    let sim = simulated(&std::fs::read(&path).unwrap(), 1);
    let cache = on_sim(&path, &sim).await;
    let attached = cache.attach_alone(uuid).await.unwrap();
    let mut parent = Disk::with(vdi(1), attached, Arc::default(), now.clone(), 1);
    // One slot was used before, the next one never.
    cache.reserve(&vdi(4)).await.unwrap();
    cache.unreserve(vdi(4).uuid).await.unwrap();
    let slots = cache.ground.local.read_slots().await.unwrap();
    let used = slots.iter().position(|slot| slot.is_free() && slot.sequence == 2).unwrap() as u32;
    let peek = |slot, copy| sim.peek(Geometry::slot_offset(slot, copy), BLOCK_SIZE);
    // The first of a clone's two writes fails, then the second one of another.
    for (n, slot, good) in [(2, used, 0), (3, used + 1, 1)] {
        let bad = Geometry::slot_offset(slot, good + 1);
        sim.set_bad(bad, BLOCK_SIZE as u64, &[OpKind::Write]);
        parent.clone_of(&cache, n, lsn).await.unwrap_err();
        let found = VdiSlot::decode(&peek(slot, good), slot).unwrap();
        assert_eq!((found.sequence, found.is_free()), (2 - good, good == 0));
        let next = cache.inner.lock().await.slots[slot as usize].next(None).sequence;
        assert_eq!(Geometry::slot_offset(slot, next), bad);
        assert!(cache.origin_of(vdi(n).uuid).await.is_some());
        sim.set_bad(bad, BLOCK_SIZE as u64, &[]);
        let attached = cache.attach_alone(vdi(n).uuid).await.unwrap();
        let clone = Disk::with(vdi(n), attached, Arc::default(), now.clone(), 1);
        assert_eq!(clone.content(&cache, &in_store).await.0, now);
    }
}

/// A power loss after each number of operations while a clone is made.
#[tokio::test(start_paused = true)]
async fn a_death_while_a_clone_is_made_leaves_all_of_it_or_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache");
    let cache = open(&dir).await;
    let (mut disk, in_store) = parent(&cache, 5).await;
    let lsn = disk.snapshot(&cache).await.lsn;
    let (model, uuid) = (disk.now.clone(), disk.guest.vdi.uuid);
    let _later = disk.change(60).await;
    disk.snapshot(&cache).await;
    let parent_now = disk.now.clone();
    drop(reopened(cache, &dir, vec![disk]).await);
    let bytes = std::fs::read(&path).unwrap();
    let mut outcomes = [0, 0];
    let mut operations = 0;
    // What is lost of what was not flushed differs from try to try.
    for seed in 0.. {
        let is_last_try = seed % 4 == 3;
        let sim = simulated(&bytes, seed);
        let cache = on_sim(&path, &sim).await;
        let attached = cache.attach_alone(uuid).await.unwrap();
        let mut parent = Disk::with(vdi(1), attached, Arc::default(), parent_now.clone(), 1);
        sim.crash_after(operations);
        let made = parent.clone_of(&cache, 2, lsn).await;
        let died = sim.is_dead();
        assert_eq!(made.is_err(), died, "{made:?}");
        sim.crash();
        drop((parent, cache));
        let cache = on_sim(&path, &sim.connect()).await;
        let attached = cache.attach_alone(uuid).await.unwrap();
        let parent = Disk::with(vdi(1), attached, Arc::default(), Model::new(), 1);
        let (content, _) = parent.content(&cache, &in_store).await;
        assert_eq!(changed(&content, &parent_now), Vec::<u64>::new(), "operation {operations}");
        let found = cache.attached().await.iter().any(|found| found.vdi == vdi(2).uuid);
        outcomes[usize::from(found)] += 1;
        if found {
            let attached = cache.attach_alone(vdi(2).uuid).await.unwrap();
            let clone = Disk::with(vdi(2), attached, Arc::default(), Model::new(), 1);
            let (content, absent) = clone.content(&cache, &model).await;
            assert_eq!(changed(&content, &model), Vec::<u64>::new(), "operation {operations}");
            assert!(changed(&in_store, &model).iter().all(|lba| !absent.contains(lba)));
        } else {
            assert!(died, "it was answered");
            assert!(cache.ground.pool.owned(vdi(2).uuid).is_empty());
        }
        if !died {
            break;
        }
        operations += u64::from(is_last_try);
    }
    assert!(outcomes[0] > 3 && outcomes[1] > 1, "{outcomes:?}");
}
