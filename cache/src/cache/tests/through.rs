//! Goal: with no leg left, a disk whose acknowledged writes all reach the store goes on without an error, and its old log is
//! never taken for it again; one that lost any stops (rule L6).
//! Method: the worker's file of the cache takes no writes, the asynchronous side's may still be written, or neither.

use super::*;
use crate::format::slot::LeftBehind;
use crate::link::FetchError;
use crate::witness::Witness;
use blockstore::device::DeviceErrorKind;
use blockstore::device::sim::FaultRates;

/// A store that is somebody else's by now.
#[derive(Debug)]
struct Foreign;

#[async_trait]
impl Backing for Foreign {
    fn committed(&self) -> Lsn {
        Lsn(0)
    }

    async fn read(&self, _: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        Ok(vec![None; blocks as usize])
    }

    async fn commit(&self, _: Batch) -> Result<(), BackingError> {
        Err(BackingError::NotOwner("taken over".into()))
    }
}

#[derive(Debug, Default)]
struct Memory(Mutex<BTreeMap<u128, LeftBehind>>);

impl Witness for Memory {
    fn note(&self, log_id: u128, behind: &LeftBehind) -> std::io::Result<()> {
        self.0.lock().insert(log_id, *behind);
        Ok(())
    }

    fn find(&self, log_id: u128) -> std::io::Result<Option<LeftBehind>> {
        Ok(self.0.lock().get(&log_id).copied())
    }

    fn forget(&self, log_id: u128) {
        self.0.lock().remove(&log_id);
    }
}

impl Guest {
    /// From now on nothing can be written to the cache's device.
    pub(super) fn lose_the_device(&mut self, dir: &TempDir) {
        let file = Arc::new(File::open(dir.path().join("cache")).unwrap());
        self.attached.legs.iter_mut().for_each(|leg| *leg = Arc::clone(&file));
    }

    /// Turns until as many requests have completed; each must have gone well.
    async fn completes(&mut self, requests: usize) {
        let mut done = 0;
        for _ in 0..TURNS_MAX {
            while let Some(message) = self.attached.link.try_recv() {
                if !matches!(message, ToDisk::Fetched { .. }) {
                    self.attached.disk.on_message(message);
                }
            }
            let mut messages = Vec::new();
            while run_once(&mut self.attached, &mut messages) {}
            messages.into_iter().for_each(|message| self.attached.link.send(message));
            for (tag, ok) in self.attached.disk.completions() {
                assert!(ok, "request {tag} failed");
                done += 1;
            }
            if done >= requests {
                return;
            }
            pause().await;
        }
        panic!("only {done} of {requests} requests completed");
    }

    /// Turns until this fetch is answered.
    async fn fetched(&mut self, wanted: u64) -> Result<Vec<Option<Bytes>>, FetchError> {
        for _ in 0..TURNS_MAX {
            while let Some(message) = self.attached.link.try_recv() {
                match message {
                    ToDisk::Fetched { id, result, .. } if id == wanted => return result,
                    other => self.attached.on_message(other),
                }
            }
            let mut messages = Vec::new();
            run_once(&mut self.attached, &mut messages);
            messages.into_iter().for_each(|message| self.attached.link.send(message));
            pause().await;
        }
        panic!("the fetch is never answered");
    }

    /// The device fails under writes that are staged, and more come.
    async fn goes_on_without_the_device(&mut self, cache: &Cache, dir: &TempDir) {
        self.write(0..700, 1).await;
        self.drain(cache).await;
        self.write(700..1500, 2).await;
        self.lose_the_device(dir);
        let staged = (1500..1510).filter(|&lba| self.stage(lba, 3) == Staged::All).count();
        self.tag += 1;
        self.attached.disk.flush(self.tag);
        self.completes(staged + 1).await;
        assert_eq!(
            stored(&self.store, 0..1510),
            [vec![Some(1); 700], vec![Some(2); 800], vec![Some(3); 10]].concat()
        );
        for round in 0..5u8 {
            for lba in 0..20 {
                assert_eq!(self.stage(lba, 10 + round), Staged::All);
            }
            self.tag += 1;
            self.attached.disk.flush(self.tag);
            self.completes(21).await;
            assert_eq!(stored(&self.store, 0..20), vec![Some(10 + round); 20]);
        }
        let status = cache.vdi_status(self.vdi.uuid).unwrap();
        assert!(status.write_through && status.state != Phase::Failed, "{status:?}");
        assert_eq!(status.committed_lsn, self.attached.disk.staged_lsn().0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_disk_goes_on_in_write_through_and_its_slot_says_so() {
    for spoilt in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(&dir).await;
        let mut guest = Guest::new(&cache, 1).await;
        guest.goes_on_without_the_device(&cache, &dir).await;
        cache.reopen(guest.vdi.uuid).await.expect_err("what is on the device is behind");
        let Guest { vdi, store, attached, .. } = guest;
        cache.release(vdi.uuid, attached).await.unwrap();
        cache.drain(vdi.uuid).await.unwrap();
        // Longer than it takes until a disk that has its log says how far that is durable.
        tokio::time::sleep(Duration::from_secs(30)).await;
        let slots = cache.ground.local.read_slots().await.unwrap();
        let record = slots.iter().find_map(|slot| slot.vdi.as_ref()).unwrap();
        let known = record.left_behind.unwrap();
        assert!(record.durable >= Lsn(700) && record.durable <= known.flushed, "{record:?}");
        assert!(known.staged < store.committed());
        cache.close().await;
        if spoilt {
            // The log ends before what the slot knows: the store has it.
            super::durable::spoil_all_segments(&cache, &dir.path().join("cache"));
        }
        drop(cache);
        // The device is there again: the log does not count, and is not opened without the store.
        let cache = open(&dir).await;
        assert!(!cache.attached().await[0].was_served);
        cache.attach_alone(vdi.uuid).await.unwrap_err();
        let before = store.committed();
        let attached = cache.attach(&vdi, store.clone()).await.unwrap();
        assert_eq!(attached.disk.staged_lsn(), before);
        let mut guest = Guest { vdi, store, attached, tag: 0 };
        guest.write(0..10, 77).await;
        guest.drain(&cache).await;
        assert_eq!(stored(&guest.store, 0..20), [vec![Some(77); 10], vec![Some(14); 10]].concat());
        guest.leave(&cache).await;
        assert_empty(&cache);
    }
}

#[tokio::test(start_paused = true)]
async fn a_log_that_was_left_behind_on_a_dead_device_is_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let witness = Arc::new(Memory::default());
    let path = dir.path().join("cache");
    let (store, vdi) = {
        let cache = open(&dir).await;
        cache.set_witness(witness.clone());
        let mut guest = Guest::new(&cache, 1).await;
        guest.write(0..100, 1).await;
        guest.drain(&cache).await;
        let before = std::fs::read(&path).unwrap();
        guest.goes_on_without_the_device(&cache, &dir).await;
        let Guest { vdi, store, attached, .. } = guest;
        cache.release(vdi.uuid, attached).await.unwrap();
        cache.close().await;
        // Nothing of what came after reached the device.
        std::fs::write(&path, before).unwrap();
        (store, vdi)
    };
    let cache = open(&dir).await;
    cache.set_witness(witness.clone());
    assert!(!cache.attached().await[0].was_served, "not to be opened without the store");
    cache.attach_alone(vdi.uuid).await.unwrap_err();
    let attached = cache.attach(&vdi, store.clone()).await.unwrap();
    assert_eq!(attached.disk.staged_lsn(), store.committed());
    assert!(witness.0.lock().is_empty(), "it is in use again");
    let mut guest = Guest { vdi, store, attached, tag: 0 };
    guest.write(0..10, 77).await;
    guest.drain(&cache).await;
    guest.leave(&cache).await;
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn a_disk_leaves_in_write_through() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    guest.goes_on_without_the_device(&cache, &dir).await;
    guest.leave(&cache).await;
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn a_read_that_meets_a_dead_cache_first_is_answered_from_the_store() {
    // What is in the log can be read by the asynchronous side still; nothing can be written.
    let file = tempfile::NamedTempFile::new().unwrap();
    let sim = SimDevice::new(CACHE_BYTES, 1);
    let local = Local::make_on(file.path(), sim.device()).await.unwrap();
    let cache = Cache::on_local(options(file.path().into()), local).await.unwrap();
    let witness = Arc::new(Memory::default());
    cache.set_witness(witness.clone());
    let mut guest = Guest::new(&cache, 1).await;
    assert_eq!(guest.stage(5, 7), Staged::All);
    let said = |attached: &mut AttachedDisk, id| {
        attached.link.send(FromDisk::Unreadable { id, lba: Lba(5) });
    };
    // While it takes writes, the read fails and nothing else.
    said(&mut guest.attached, 77);
    assert!(guest.fetched(77).await.is_err());
    assert!(witness.0.lock().is_empty());
    for skip in 0..8 {
        sim.inject(OpKind::Write, skip, Fault::Io);
    }
    said(&mut guest.attached, 78);
    let blocks = guest.fetched(78).await.unwrap();
    assert_eq!(blocks[0].as_ref().map(|block| block[0]), Some(7));
    assert_eq!(witness.0.lock().len(), 1);
    assert!(cache.vdi_status(guest.vdi.uuid).unwrap().write_through);
}

/// A disk whose worker can write, on a cache device that the asynchronous side reaches through a simulation.
async fn on_a_simulation(witness: &Arc<Memory>) -> (Arc<Cache>, SimDevice, Guest) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let sim = SimDevice::new(CACHE_BYTES, 1);
    let local = Local::make_on(file.path(), sim.device()).await.unwrap();
    // What is replayed comes from memory.
    let options = CacheOptions { image_bytes: 64 << 20, ..options(file.path().into()) };
    let cache = Cache::on_local(options, local).await.unwrap();
    cache.set_witness(witness.clone());
    let guest = Guest::new(&cache, 1).await;
    (cache, sim, guest)
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_waits_for_a_segment_finds_out_that_the_device_takes_no_slots() {
    let witness = Arc::new(Memory::default());
    let (cache, sim, mut guest) = on_a_simulation(&witness).await;
    sim.set_rates(FaultRates { write_io: 1.0, ..FaultRates::default() });
    // More than the ring has. Its own writes succeed all the time, but nothing of it ever turns clean.
    guest.write(0..4500, 7).await;
    guest.drain(&cache).await;
    assert!(stored(&guest.store, 0..4500) == vec![Some(7); 4500], "something did not reach it");
    let status = cache.vdi_status(guest.vdi.uuid).unwrap();
    assert!(status.write_through && status.state != Phase::Failed, "{status:?}");
    let noted = *witness.0.lock().values().next().expect("it is known that the log is behind");
    assert!(noted.flushed <= noted.staged && noted.staged < Lsn(4500), "{noted:?}");
    guest.leave(&cache).await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_finds_out_that_the_device_takes_no_slots() {
    let witness = Arc::new(Memory::default());
    let (cache, sim, mut guest) = on_a_simulation(&witness).await;
    guest.write(0..10, 7).await;
    sim.set_rates(FaultRates { write_io: 1.0, ..FaultRates::default() });
    guest.drain(&cache).await;
    assert_eq!(stored(&guest.store, 0..10), vec![Some(7); 10]);
    assert!(cache.vdi_status(guest.vdi.uuid).unwrap().write_through);
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_lost_its_legs_while_it_was_alone_gets_to_its_store() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, store) = left_behind(&dir).await;
    let vdi = vdi(1);
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store: Arc::clone(&store), attached, tag: 0 };
    guest.write(400..410, 3).await;
    guest.lose_the_device(&dir);
    assert!((410..420).all(|lba| guest.stage(lba, 4) == Staged::All));
    guest.tag += 1;
    guest.attached.disk.flush(guest.tag);
    guest.turn_until(|guest| cache.vdi_status(guest.vdi.uuid).unwrap().write_through).await;
    assert_eq!(store.committed(), Lsn(300));
    cache.join(guest.vdi.uuid, store.clone()).await.unwrap();
    guest.drain(&cache).await;
    let expected = [vec![Some(2); 100], vec![Some(3); 10], vec![Some(4); 10]].concat();
    assert_eq!(stored(&store, 300..420), expected);
}

/// Otherwise what a commit makes of the store would look like another log's after a crash.
#[tokio::test(start_paused = true)]
async fn nothing_is_committed_before_the_slot_says_that_the_store_has_joined() {
    let witness = Arc::new(Memory::default());
    let (cache, sim, guest) = on_a_simulation(&witness).await;
    let (vdi, store) = (guest.vdi.clone(), Arc::clone(&guest.store));
    drop((guest, cache));
    let file = tempfile::NamedTempFile::new().unwrap();
    let local = Local::on_device(file.path(), sim.device()).await.unwrap();
    let options = CacheOptions { image_bytes: 64 << 20, ..options(file.path().into()) };
    let cache = Cache::on_local(options, local).await.unwrap();
    cache.set_witness(witness.clone());
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store: Arc::clone(&store), attached, tag: 0 };
    let alone_from = async || {
        let slot = cache.ground.local.read_slots().await.unwrap().swap_remove(0);
        slot.vdi.unwrap().alone_from
    };
    assert_eq!(alone_from().await, Some(Lsn(0)));
    sim.set_rates(FaultRates { write_io: 1.0, ..FaultRates::default() });
    cache.join(guest.vdi.uuid, store.clone()).await.unwrap();
    guest.write(0..10, 7).await;
    let began = tokio::time::Instant::now();
    while began.elapsed() < Duration::from_millis(1000) {
        guest.turn();
        pause().await;
    }
    assert_eq!((store.committed(), alone_from().await), (Lsn(0), Some(Lsn(0))));
    sim.set_rates(FaultRates::default());
    guest.drain(&cache).await;
    assert_eq!((store.committed(), alone_from().await), (Lsn(10), None));
    assert!(!cache.vdi_status(guest.vdi.uuid).unwrap().write_through);
    guest.leave(&cache).await;
}

/// It stops for want of a note. What the store had then would be beyond where its slot says that the log went on alone.
#[tokio::test(start_paused = true)]
async fn a_disk_that_stops_before_its_slot_says_that_the_store_has_joined_commits_nothing() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let sim = SimDevice::new(CACHE_BYTES, 1);
    let options = || CacheOptions { image_bytes: 64 << 20, ..options(file.path().into()) };
    let local = Local::make_on(file.path(), sim.device()).await.unwrap();
    let cache = Cache::on_local(options(), local).await.unwrap();
    let guest = Guest::new(&cache, 1).await;
    let (vdi, store) = (guest.vdi.clone(), Arc::clone(&guest.store));
    drop((guest, cache));
    let local = Local::on_device(file.path(), sim.device()).await.unwrap();
    let cache = Cache::on_local(options(), local).await.unwrap();
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store: Arc::clone(&store), attached, tag: 0 };
    // More than a segment takes, so that there is something that could be committed.
    guest.write(0..600, 7).await;
    sim.set_rates(FaultRates { write_io: 1.0, ..FaultRates::default() });
    cache.join(guest.vdi.uuid, store.clone()).await.unwrap();
    guest
        .attached
        .disk
        .on_message(crate::link::ToDisk::Legs { members: crate::format::LegSet::NONE });
    let failed = |guest: &Guest| cache.vdi_status(guest.vdi.uuid).unwrap().state == Phase::Failed;
    guest.turn_until(failed).await;
    assert_eq!(store.committed(), Lsn(0));
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_waits_does_not_leave_a_device_that_refuses_its_slot_for_a_moment() {
    let witness = Arc::new(Memory::default());
    let (cache, sim, mut guest) = on_a_simulation(&witness).await;
    sim.set_rates(FaultRates { write_io: 1.0, ..FaultRates::default() });
    for _ in 0..TURNS_MAX {
        while guest.stage(guest.tag % 6000, 7) == Staged::All {}
        guest.turn();
        pause().await;
        if cache.ground.pool.counts().free == 0 {
            break;
        }
    }
    let began = tokio::time::Instant::now();
    while began.elapsed() < Duration::from_millis(1900) {
        guest.turn();
        pause().await;
    }
    sim.set_rates(FaultRates::default());
    guest.drain(&cache).await;
    assert!(!cache.vdi_status(guest.vdi.uuid).unwrap().write_through);
    assert!(witness.0.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_read_that_comes_with_the_failure_is_not_answered_before_it_is_known_what_was_lost() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    assert_eq!(guest.stage(5, 7), Staged::All);
    let mut actions = Vec::new();
    guest.attached.disk.poll(&mut actions);
    for action in actions {
        match action {
            Action::Write { op, .. } | Action::Flush { op, .. } => {
                guest.attached.disk.io_done(op, Err(libc::EIO));
            }
            Action::Send(message) => guest.attached.link.send(message),
        }
    }
    // In the same turn of the worker, which has said nothing of it yet.
    guest.attached.ask(FromDisk::Fetch { id: 77, lba: Lba(5), blocks: 1 });
    let blocks = guest.fetched(77).await.unwrap();
    assert_eq!(blocks[0].as_ref().map(|block| block[0]), Some(7));
}

/// Neither the device nor anybody else takes the note that the log is behind.
#[tokio::test(start_paused = true)]
async fn without_a_note_of_it_there_is_no_write_through() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let sim = SimDevice::new(CACHE_BYTES, 1);
    let local = Local::make_on(file.path(), sim.device()).await.unwrap();
    let cache = Cache::on_local(options(file.path().into()), local).await.unwrap();
    let mut guest = Guest::new(&cache, 1).await;
    assert_eq!(guest.stage(0, 7), Staged::All);
    for skip in 0..8 {
        sim.inject(OpKind::Write, skip, Fault::Io);
    }
    let mut actions = Vec::new();
    guest.attached.disk.poll(&mut actions);
    for action in actions {
        if let Action::Write { op, .. } | Action::Flush { op, .. } = action {
            guest.attached.disk.io_done(op, Err(libc::EIO));
        }
    }
    // The worker has not heard yet that the disk was given up: the store does not have what it asks for.
    let ask = |id| FromDisk::Fetch { id, lba: Lba(0), blocks: 1 };
    guest.attached.ask(ask(77));
    for _ in 0..20 {
        pause().await;
    }
    guest.attached.ask(ask(78));
    for id in [77, 78] {
        let error = guest.fetched(id).await.expect_err("an acknowledged write is not in the store");
        assert!(error.0.contains("takes no more writes"), "{error}");
    }
    stops(&cache, &mut guest).await;
    assert_eq!(
        stored(&guest.store, 0..1),
        vec![None],
        "the store is not ahead of a log of which nobody knows it"
    );
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_lost_acknowledged_writes_stops() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    guest.write(0..700, 1).await;
    // Sealed, and not in memory; then gone from the device as well.
    let file = File::options().write(true).open(dir.path().join("cache")).unwrap();
    file.write_all_at(&vec![0x5a; (CACHE_BYTES - (1 << 20)) as usize], 1 << 20).unwrap();
    guest.lose_the_device(&dir);
    assert_eq!(guest.stage(0, 9), Staged::All);
    stops(&cache, &mut guest).await;
    let why = cache.vdi_status(guest.vdi.uuid).unwrap().last_error.unwrap();
    assert!(why.contains("rollback disk-1 --accept-loss"), "{why}");
    assert_eq!(guest.store.committed(), Lsn(0), "nothing was committed beyond what was lost");
}

/// The disk's requests end with errors, and go on doing so.
async fn stops(cache: &Cache, guest: &mut Guest) {
    for _ in 0..TURNS_MAX {
        guest.turn();
        if guest.stage(1, 9) == Staged::Failed {
            break;
        }
        pause().await;
    }
    assert_eq!(guest.stage(1, 9), Staged::Failed, "it never stopped");
    guest.turn();
    pause().await;
    assert_eq!(cache.vdi_status(guest.vdi.uuid).unwrap().state, Phase::Failed);
    cache.drain(guest.vdi.uuid).await.unwrap_err();
    cache.reopen(guest.vdi.uuid).await.unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn a_log_that_did_not_reach_the_store_is_never_taken_for_drained() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let vdi = vdi(1);
    cache.reserve(&vdi).await.unwrap();
    let attached = cache.attach(&vdi, Arc::new(Foreign)).await.unwrap();
    let mut guest = Guest { vdi, store: Arc::default(), attached, tag: 0 };
    assert_eq!(guest.stage(0, 7), Staged::All);
    guest.lose_the_device(&dir);
    stops(&cache, &mut guest).await;
    let uuid = guest.vdi.uuid;
    cache.release(uuid, guest.attached).await.unwrap_err();
    cache.drain(uuid).await.unwrap_err();
    cache.detach(uuid).await.unwrap_err();
    assert_eq!(cache.attached().await.len(), 1, "the log is kept");
    assert!(cache.ground.local.read_slots().await.unwrap().iter().any(|slot| slot.vdi.is_some()));
}

/// As [`open`], once whatever the former cache was still reading has ended.
async fn open_again(dir: &TempDir) -> Arc<Cache> {
    for _ in 0..TURNS_MAX {
        match Cache::open(options(dir.path().join("cache"))).await {
            Err(crate::CacheError::Device(error)) if error.kind == DeviceErrorKind::Reserved => {}
            opened => return opened.unwrap(),
        }
        pause().await;
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("the former cache never ends");
}

/// A cache that failed under a disk, and came back as it was when it had `written` blocks, all of them flushed, and the store
/// the first `committed` of them; and what the note says to have been flushed, if there is one.
#[derive(Clone, Copy)]
struct Found {
    written: u64,
    committed: u64,
    promised: Option<u64>,
    note_of_epoch: u32,
}

impl Found {
    async fn opened(self) -> (Result<Guest, crate::CacheError>, Arc<Cache>, TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let (witness, store) = (Arc::new(Memory::default()), Arc::new(Store::default()));
        let vdi = vdi(1);
        {
            let cache = open(&dir).await;
            cache.reserve(&vdi).await.unwrap();
            let attached = cache.attach(&vdi, Arc::new(Foreign)).await.unwrap();
            let mut guest = Guest { vdi: vdi.clone(), store: store.clone(), attached, tag: 0 };
            guest.write(0..self.written, 1).await;
            let Guest { attached, .. } = guest;
            cache.release(vdi.uuid, attached).await.unwrap();
            cache.close().await;
            let log_id = cache.attached().await[0].log_id;
            if let Some(promised) = self.promised {
                let flushed = Lsn(promised);
                let behind =
                    LeftBehind { epoch: self.note_of_epoch, flushed, staged: Lsn(promised + 5) };
                witness.note(log_id, &behind).unwrap();
            }
        }
        *store.image.lock() =
            (Lsn(self.committed), (0..self.committed).map(|block| (block, 1)).collect());
        let cache = open_again(&dir).await;
        cache.set_witness(witness.clone());
        let is_known = self.promised.is_some() && self.note_of_epoch > 0;
        assert_eq!(cache.attached().await[0].was_served, !is_known, "is it served alone?");
        let headers = std::fs::read(dir.path().join("cache")).unwrap();
        let opened = cache.attach(&vdi, store.clone()).await;
        if opened.is_err() {
            assert!(std::fs::read(dir.path().join("cache")).unwrap() == headers, "it was written");
            assert_eq!(witness.0.lock().len(), usize::from(self.promised.is_some()));
        } else if is_known {
            assert!(witness.0.lock().is_empty(), "it is in use again");
        }
        let guest = opened.map(|attached| Guest { vdi, store, attached, tag: 0 });
        (guest, cache, dir)
    }
}

#[tokio::test(start_paused = true)]
async fn a_log_that_was_left_behind_opens_where_it_or_the_store_ends_and_never_below_what_was_promised()
 {
    let found = |written, committed, promised| Found {
        written,
        committed,
        promised: Some(promised),
        note_of_epoch: 1,
    };
    // The log is ahead, they are equal, the store is ahead; each with just what was promised.
    for (written, committed) in [(300, 100), (300, 300), (100, 300), (300, 0), (1, 2)] {
        let last = written.max(committed);
        let (guest, cache, dir) = found(written, committed, last).opened().await;
        let mut guest = guest.unwrap();
        assert_eq!(guest.attached.disk.staged_lsn(), Lsn(last));
        guest.write(0..10, 77).await;
        guest.drain(&cache).await;
        let blocks = last.max(10);
        let expected: Vec<_> = (0..blocks).map(|n| Some(if n < 10 { 77 } else { 1 })).collect();
        assert_eq!(stored(&guest.store, 0..blocks), expected);
        // It is a log like any other again.
        let Guest { vdi, attached, .. } = guest;
        cache.release(vdi.uuid, attached).await.unwrap();
        cache.drain(vdi.uuid).await.unwrap();
        cache.close().await;
        drop(cache);
        let cache = open_again(&dir).await;
        assert!(cache.attached().await[0].was_served);
        assert_eq!(cache.attach_alone(vdi.uuid).await.unwrap().disk.staged_lsn(), Lsn(last + 10));
    }
    for (written, committed) in [(300, 100), (300, 300), (100, 300)] {
        let (guest, ..) = found(written, committed, 301).opened().await;
        let why = guest.map(|_| ()).unwrap_err().to_string();
        assert!(why.contains("up to LSN 301 was written durably"), "{why}");
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_note_of_its_epoch_a_log_that_is_behind_is_refused() {
    for promised in [None, Some(100)] {
        let found = Found { written: 100, committed: 300, promised, note_of_epoch: 0 };
        let (guest, ..) = found.opened().await;
        let error = guest.map(|_| ()).unwrap_err();
        assert!(matches!(error, crate::CacheError::LogIsOlder { .. }), "{error}");
    }
}

/// A store that watches who knows how far it is.
#[derive(Debug)]
struct Watching {
    store: Arc<Store>,
    witness: Arc<Memory>,
    /// No more may be committed than this without a note.
    limit: Lsn,
    commits: Mutex<Vec<(Lsn, bool)>>,
}

#[async_trait]
impl Backing for Watching {
    fn committed(&self) -> Lsn {
        self.store.committed()
    }

    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        self.store.read(lba, blocks).await
    }

    async fn commit(&self, batch: Batch) -> Result<(), BackingError> {
        let is_noted = !self.witness.0.lock().is_empty();
        assert!(is_noted || batch.lsn <= self.limit, "the store gets ahead and nobody knows");
        self.commits.lock().push((batch.lsn, is_noted));
        self.store.commit(batch).await
    }
}

#[tokio::test(start_paused = true)]
async fn nothing_that_the_log_may_not_have_is_committed_before_that_is_noted() {
    let dir = tempfile::tempdir().unwrap();
    let (witness, store) = (Arc::new(Memory::default()), Arc::new(Store::default()));
    let cache = open(&dir).await;
    cache.set_witness(witness.clone());
    let vdi = vdi(1);
    cache.reserve(&vdi).await.unwrap();
    let watching = Arc::new(Watching {
        store: store.clone(),
        witness: witness.clone(),
        limit: Lsn(100),
        commits: Mutex::default(),
    });
    let attached = cache.attach(&vdi, watching.clone()).await.unwrap();
    let mut guest = Guest { vdi, store, attached, tag: 0 };
    guest.write(0..100, 1).await;
    guest.drain(&cache).await;
    guest.lose_the_device(&dir);
    let staged = (100..110).filter(|&lba| guest.stage(lba, 3) == Staged::All).count();
    guest.completes(staged).await;
    assert_eq!(guest.store.committed(), Lsn(110));
    assert!(watching.commits.lock().contains(&(Lsn(110), true)));
    let noted = *witness.0.lock().values().next().unwrap();
    assert_eq!((noted.epoch, noted.flushed, noted.staged), (1, Lsn(100), Lsn(110)));
    let slot = cache.ground.local.read_slots().await.unwrap().swap_remove(0);
    assert_eq!(slot.vdi.unwrap().left_behind, Some(noted), "the asynchronous side can write still");
}

#[tokio::test(start_paused = true)]
async fn a_segment_with_far_more_entries_than_blocks_reaches_the_store_from_memory() {
    const ZEROS: u64 = 1000;
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    guest.lose_the_device(&dir);
    assert_eq!(guest.stage(0, 1), Staged::All);
    guest.completes(1).await;
    for lba in 0..ZEROS {
        guest.tag += 1;
        assert_eq!(guest.attached.disk.zero(guest.tag, lba * 16, 8, false), Staged::All);
    }
    guest.completes(ZEROS as usize).await;
    assert_eq!(guest.store.committed(), Lsn(ZEROS + 1));
}
