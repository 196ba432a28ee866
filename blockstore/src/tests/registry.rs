//! Goal: what is asked of the registry costs the same however many disks there are, and nothing is decided by what was read before.
//! Method: device operations are counted; another host enters, makes and deletes behind the back of a store that has read
//! everything, also amid a creation.

use crate::crc::crc32c;
use crate::device::sim::{Fault, OpKind, SimDevice};
use crate::format::host::{HostRecord, HostState};
use crate::format::meta::VdiMeta;
use crate::format::pointer::Pointer;
use crate::format::vdi::{Origin, Owner, VdiHead, VdiState};
use crate::io::{Io, Patience};
use crate::slot::{Content, Slot, View};
use crate::testing::{
    MIB, cut_batch, open, sim, sim_without_caw, snapshots, store_with_disk, write,
};
use crate::types::{Birth, Gba, Generation, Lsn};
use crate::{Store, StoreErrorKind, WhenOffline};
use bytes::Bytes;
use std::sync::Arc;
use uuid::Uuid;

/// Another host, which does not wait for this one to leave.
struct Other {
    io: Io,
    store: Arc<Store>,
}

impl Other {
    fn of(sim: &SimDevice, store: &Arc<Store>) -> Self {
        let io = Io::new(sim.connect().device(), Patience::Forever);
        Self { io, store: Arc::clone(store) }
    }

    /// Its entry in the host table.
    async fn is(&self, state: HostState) {
        let records = &self.store.core.records;
        let first = self.store.superblock().geometry.host_slot(1);
        let view: View<HostRecord> =
            records.read(&self.io, Slot { first, paired: true }).await.expect("read");
        let host = HostRecord {
            uuid: Uuid::from_u128(7),
            state,
            generation: Generation(1),
            up_since_ms: 0,
            heartbeat_ms: 0,
            gc_epoch_acknowledged: 0,
            name: "other".to_owned(),
            address: String::new(),
        };
        let swap = records.swap(&self.io, &view, host).await.expect("swap");
        swap.done(|| "entry".to_owned()).expect("entered");
    }

    async fn places(&self) -> Vec<View<VdiHead>> {
        let first = Slot { first: self.store.superblock().geometry.vdi_slot(0), paired: true };
        let mut all: Vec<View<VdiHead>> =
            self.store.core.records.read_run(&self.io, first, 8).await.expect("registry");
        all.truncate(all.iter().take_while(|view| view.content != Content::Unused).count());
        all
    }

    async fn write(&self, view: &View<VdiHead>, head: VdiHead) {
        let swap = self.store.core.records.swap(&self.io, view, head).await.expect("swap");
        swap.done(|| "head".to_owned()).expect("written");
    }

    /// Makes a disk in the first place that was never used.
    async fn makes(&self, name: &str, origin: Option<Origin>) {
        let place = self.places().await.len() as u32;
        let g = &self.store.superblock().geometry;
        let head = VdiHead::new_disk(MIB);
        let meta = head.meta_block(name.to_owned(), Default::default());
        let block = Bytes::from(VdiMeta::encode(&meta));
        let gba = Gba(g.total_blocks() - 1 - u64::from(place));
        assert!(g.is_allocatable(gba));
        let meta = Pointer { gba, read_only: false, birth: Birth(0), crc: crc32c(&block) };
        self.io.write_durable(&[(gba, vec![block])]).await.expect("write");
        let slot = Slot { first: g.vdi_slot(place), paired: true };
        let view = self.store.core.records.read(&self.io, slot).await.expect("read");
        assert_eq!(view.content, Content::Unused);
        self.write(&view, VdiHead { meta, origin, ..head }).await;
    }

    /// Deletes the disk in a place.
    async fn deletes(&self, place: usize) {
        let view = self.places().await.swap_remove(place);
        let head = view.record().cloned().expect("a head");
        self.write(&view, head.buried()).await;
    }

    /// Deletes all snapshots of the disk in a place, which somebody has attached.
    async fn deletes_snapshots(&self, place: usize) {
        let view = self.places().await.swap_remove(place);
        let head = view.record().cloned().expect("a head");
        self.write(&view, VdiHead { snapshots: Default::default(), ..head }).await;
    }
}

/// A store that has read its registry, with a detached disk "d" that has a snapshot at LSN 1.
async fn known(sim: &SimDevice) -> (Arc<Store>, Other) {
    let (store, vdi) = store_with_disk(sim, 16 * MIB).await;
    let cuts = vec![(1, vec![write(0, 1)]), (2, vec![write(0, 2)])];
    vdi.commit(cut_batch(cuts)).await.expect("commit");
    vdi.detach(Lsn(2)).await.expect("detach");
    clone(&store, "first").await.expect("clone");
    let other = Other::of(sim, &store);
    (store, other)
}

async fn clone(store: &Arc<Store>, name: &str) -> crate::Result<crate::VdiInfo> {
    store.clone_vdi(name, "d", Lsn(1), WhenOffline::default()).await
}

/// Begins to make a clone, and stops where its place is taken and nothing was looked at since.
async fn amid_a_clone(
    sim: &SimDevice,
    store: &Arc<Store>,
) -> tokio::task::JoinHandle<crate::Result<crate::VdiInfo>> {
    let (before, store) = (sim.counts().flushes, Arc::clone(store));
    // The first flush is that of the name's block; the second is tried again after a pause.
    sim.inject(OpKind::Flush, 1, Fault::Unreachable);
    let cloning = tokio::spawn(async move { clone(&store, "n").await });
    while sim.counts().flushes < before + 2 {
        tokio::task::yield_now().await;
    }
    cloning
}

async fn names(store: &Store) -> Vec<String> {
    let list = store.list_vdis().await.expect("list");
    let mut names: Vec<_> = list.into_iter().map(|info| info.name).collect();
    names.sort_unstable();
    names
}

/// One clone writes its block of name and policy, its head twice, and reads what it decides by; not the other disks.
#[tokio::test(start_paused = true)]
async fn the_cost_of_a_clone_does_not_grow_with_the_number_of_disks() {
    for sim in [sim(256 * MIB, 1), sim_without_caw(256 * MIB, 1)] {
        let (store, _) = known(&sim).await;
        let mut costs = Vec::new();
        for number in 0..60 {
            let before = sim.counts();
            clone(&store, &format!("c{number}")).await.expect("clone");
            let after = sim.counts();
            costs.push((after.reads - before.reads, after.bytes_read - before.bytes_read));
        }
        assert!(costs[50] <= costs[1], "{costs:?}");
        assert!(costs[50].0 <= 10 && costs[50].1 <= 128 << 10, "{:?}", costs[50]);
        let before = sim.counts().reads;
        store.lookup_vdi("c33").await.expect("lookup");
        assert_eq!(sim.counts().reads - before, 1);
        assert_eq!(names(&store).await.len(), 62);
        // What was made so is what the next process finds.
        store.close().await.expect("close");
        assert_eq!(names(&*open(&sim.connect()).await).await.len(), 62);
    }
}

/// Deletions and creations in turn, beside a model: places are used again, and names come free.
#[tokio::test(start_paused = true)]
async fn what_is_known_follows_what_is_done() {
    let sim = sim(256 * MIB, 2);
    let (store, _) = known(&sim).await;
    let mut expected = vec!["d".to_owned(), "first".to_owned()];
    for number in 0..60 {
        let name = format!("n{}", number % 7);
        let (error, count) = (clone(&store, &name).await, expected.len());
        match error {
            Ok(_) => expected.push(name),
            Err(error) => {
                assert_eq!(error.kind, StoreErrorKind::AlreadyExists, "{error}");
                assert!(expected.contains(&name));
                store.delete_vdi(&name).await.expect("delete");
                expected.retain(|other| *other != name);
            }
        }
        assert_ne!(expected.len(), count);
        expected.sort_unstable();
        let looked_up = store.lookup_vdi(&format!("n{}", number % 7)).await;
        assert_eq!(looked_up.is_ok(), expected.contains(&format!("n{}", number % 7)));
        assert_eq!(names(&store).await, expected);
    }
    assert!(store.scan_vdis().await.expect("registry").len() <= 9, "places are used again");
}

/// Unique names: whoever else is up, or was, may have taken one.
#[tokio::test(start_paused = true)]
async fn a_name_that_another_host_took_meanwhile_is_refused() {
    for leaves in [false, true] {
        let sim = sim(256 * MIB, 3);
        let (store, other) = known(&sim).await;
        other.is(HostState::Up).await;
        other.makes("n", None).await;
        if leaves {
            other.is(HostState::Down).await;
        }
        let error = clone(&store, "n").await.expect_err("taken");
        assert_eq!(error.kind, StoreErrorKind::AlreadyExists, "{error}");
        let error = store.create_vdi("n", MIB).await.expect_err("taken");
        assert_eq!(error.kind, StoreErrorKind::AlreadyExists, "{error}");
        assert_eq!(names(&store).await, ["d", "first", "n"]);
        store.lookup_vdi("n").await.expect("found");
        clone(&store, "m").await.expect("another name");
        assert_eq!(names(&store).await, ["d", "first", "m", "n"]);
    }
}

/// The same, while the place of the own disk is being taken: two hosts take one name at the same moment.
#[tokio::test(start_paused = true)]
async fn a_name_that_another_host_takes_at_the_same_moment_is_refused() {
    let sim = sim(256 * MIB, 4);
    let (store, other) = known(&sim).await;
    other.is(HostState::Up).await;
    let cloning = amid_a_clone(&sim, &store).await;
    assert_eq!(other.places().await.len(), 3);
    other.makes("n", None).await;
    let outcome = cloning.await.expect("a task");
    assert_eq!(outcome.expect_err("taken").kind, StoreErrorKind::AlreadyExists);
    assert_eq!(names(&store).await, ["d", "first", "n"]);
    let own = other.places().await.remove(2);
    assert_eq!(own.record().map(|head| head.state), Some(VdiState::Tombstone));
}

/// What another host deleted is not there, and its place is not what it was.
#[tokio::test(start_paused = true)]
async fn what_another_host_deleted_is_not_found() {
    let sim = sim(256 * MIB, 5);
    let (store, other) = known(&sim).await;
    other.deletes(1).await;
    let error = store.lookup_vdi("first").await.expect_err("gone");
    assert_eq!(error.kind, StoreErrorKind::NotFound, "{error}");
    clone(&store, "first").await.expect("its name is free");
    other.deletes(0).await;
    let error = clone(&store, "n").await.expect_err("gone");
    assert_eq!(error.kind, StoreErrorKind::NotFound, "{error}");
    assert_eq!(names(&store).await, ["first"]);
}

/// Rule G3: a source that goes, or loses the snapshot, after the clone's place was taken.
#[tokio::test(start_paused = true)]
async fn a_source_that_goes_while_it_is_cloned_ends_the_clone() {
    for loses_all in [false, true] {
        let sim = sim(256 * MIB, 6);
        let (store, other) = known(&sim).await;
        let cloning = amid_a_clone(&sim, &store).await;
        match loses_all {
            true => other.deletes(0).await,
            false => other.deletes_snapshots(0).await,
        }
        let error = cloning.await.expect("a task").expect_err("gone");
        assert_eq!(error.kind, StoreErrorKind::NotFound, "{error}");
        assert!(!names(&store).await.contains(&"n".to_owned()));
        let own = other.places().await.remove(2);
        assert_eq!(own.record().map(|head| head.state), Some(VdiState::Tombstone));
    }
}

/// A snapshot on which another host hung a clone meanwhile is not deleted, nor thinned, nor is its disk.
#[tokio::test(start_paused = true)]
async fn a_clone_that_another_host_made_meanwhile_counts() {
    let sim = sim(256 * MIB, 7);
    let (store, other) = known(&sim).await;
    store.delete_vdi("first").await.expect("delete");
    let vdi = store.lookup_vdi("d").await.expect("lookup").uuid;
    other.is(HostState::Up).await;
    other.makes("theirs", Some(Origin { vdi, lsn: Lsn(1) })).await;
    let error = store.delete_snapshots("d", vec![Lsn(1)]).await.expect_err("cloned");
    assert_eq!(error.kind, StoreErrorKind::InUse, "{error}");
    assert!(error.to_string().contains("'theirs'"), "{error}");
    let error = store.delete_vdi_and_snapshots("d").await.expect_err("cloned");
    assert_eq!(error.kind, StoreErrorKind::InUse, "{error}");
    assert_eq!(store.thin_snapshots(vdi, vec![Lsn(1)]).await.expect("thin").held, [Lsn(1)]);
    assert_eq!(snapshots(&store, "d").await.len(), 1);
}

/// A place whose change ended with an error is read again: the disk may be there or not.
#[tokio::test(start_paused = true)]
async fn what_ended_with_an_error_is_looked_at_again() {
    for fault in [Fault::UnknownApplied, Fault::Unreachable] {
        let sim = sim(256 * MIB, 8);
        let (store, _) = known(&sim).await;
        sim.inject(OpKind::CompareAndWrite, 0, fault);
        let before = sim.counts().compare_and_writes;
        let deleting = Arc::clone(&store);
        let deleting = tokio::spawn(async move { deleting.delete_vdi("first").await });
        while sim.counts().compare_and_writes == before {
            tokio::task::yield_now().await;
        }
        for _ in 0..40 {
            sim.inject(OpKind::Read, 0, Fault::Io);
        }
        deleting.await.expect("a task").expect_err("nobody knows");
        while store.scan_vdis().await.is_err() {}
        let is_there = fault == Fault::Unreachable;
        assert_eq!(store.lookup_vdi("first").await.is_ok(), is_there);
        assert_eq!(clone(&store, "first").await.is_ok(), !is_there);
        assert_eq!(names(&store).await, ["d", "first"]);
    }
}

/// A disk in creation that nobody will finish, as an error leaves it, or a target that forgets what followed: neither its name
/// nor its source waits for the next start. One of another host does not go.
#[tokio::test(start_paused = true)]
async fn what_was_left_in_creation_is_buried_when_it_is_in_the_way() {
    for by_other in [false, true] {
        let sim = sim(256 * MIB, 9);
        let (store, other) = known(&sim).await;
        let written = other.places().await;
        let [_, view] = written.as_slice() else { panic!("a disk and its clone") };
        let head = view.record().expect("a disk").clone();
        let own = store.core.writer().expect("a writer");
        let host = if by_other { Uuid::from_u128(7) } else { own.host };
        let owner = Some(Owner { host, generation: own.generation });
        other.write(view, VdiHead { state: VdiState::Creating, owner, ..head }).await;
        // Reads all of it anew.
        names(&store).await;
        let deleted = store.delete_snapshots("d", vec![Lsn(1)]).await;
        assert_eq!(deleted.is_err(), by_other, "{deleted:?}");
        let made = store.create_vdi("first", MIB).await;
        assert_eq!(made.is_err(), by_other, "{made:?}");
    }
}

/// What was read but was not durable may be gone when the target restarts: a place behind it would be seen by nobody.
#[tokio::test(start_paused = true)]
async fn no_place_is_taken_behind_one_that_the_target_forgot() {
    let mut forgotten = 0;
    for seed in 0..30 {
        let sim = sim(256 * MIB, seed);
        let (store, other) = known(&sim).await;
        // Another host's disk that is not durable, in the third place.
        let slot = store.superblock().geometry.vdi_slot(2);
        let head = crate::format::head::Head {
            store: store.uuid(),
            sequence: 1,
            record: VdiHead::new_disk(MIB),
        };
        let block = Bytes::copy_from_slice(&head.encode_block(slot));
        sim.connect().device().write(slot.byte_offset(), vec![block]).await.expect("write");
        assert_eq!(names(&store).await.len(), 3);
        sim.lose_session();
        forgotten += u32::from(other.places().await.len() == 2);
        clone(&store, "n").await.expect("clone");
        assert!(names(&store).await.contains(&"n".to_owned()), "seed {seed}");
    }
    assert!(forgotten > 5, "forgotten {forgotten} times only");
}
