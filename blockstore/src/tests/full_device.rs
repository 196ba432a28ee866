//! Goal: a thin device that is full while the store has free blocks keeps nobody from what gives space back: a control operation ends
//! with words, changes nothing and keeps nothing, and collection begins.
//!
//! Method: a simulated device that takes only what it has; each operation that needs a fresh block, on disks that are attached
//! and that are not.

use crate::device::BlockDevice;
use crate::testing::{
    MIB, Model, attach, batch, check_blocks, cut_batch, format, open, sim, sim_without_caw,
    snapshots, store_with_disk, write, zero,
};
use crate::types::{BLOCK_SIZE, Lsn};
use crate::{Change, PolicyChange, Result, SnapshotLabel, Store, StoreErrorKind, WhenOffline};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;

/// What an operator, or a schedule, may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ask {
    Delete,
    Label,
    Create,
    Clone,
    Grow,
    Policy,
    Rewind,
}

const OF_DETACHED: [Ask; 7] =
    [Ask::Delete, Ask::Label, Ask::Create, Ask::Clone, Ask::Grow, Ask::Policy, Ask::Rewind];

async fn ask(store: &Arc<Store>, ask: Ask) -> Result<()> {
    let label = || SnapshotLabel::new("other").expect("a label");
    match ask {
        Ask::Delete => store.delete_snapshots("d", vec![Lsn(1)]).await,
        Ask::Label => store.label_snapshot("d", Lsn(2), label()).await,
        Ask::Create => store.create_vdi("new", MIB).await.map(drop),
        Ask::Clone => store.clone_vdi("c", "d", Lsn(2), WhenOffline::default()).await.map(drop),
        Ask::Grow => store.resize_vdi("d", 1 << 40).await,
        Ask::Policy => {
            let when_offline = Some(WhenOffline::FailAfter(1000));
            let change = PolicyChange { when_offline, ..PolicyChange::default() };
            store.set_policy("d", change).await.map(drop)
        }
        Ask::Rewind => store.rewind_vdi("d", Lsn(2), Some(label())).await.map(drop),
    }
}

fn three_snapshots() -> Vec<(u64, Vec<Change>)> {
    let part = |lsn: u64| (lsn, (0..20).map(|lba| write(lba, lsn)).collect());
    (1..=4).map(part).collect()
}

/// It ends soon, with words, and is undone; then collection begins.
async fn assert_refused(store: &Arc<Store>, what: Ask) {
    let (in_flight, pooled) = (store.in_flight(), store.pooled());
    let error = ask(store, what).await.expect_err("there is no space for it");
    assert_eq!(error.kind, StoreErrorKind::NoSpace, "{what:?}: {error}");
    let words = error.to_string();
    assert!(words.contains("extend it") && words.contains("target is full"), "{what:?}: {words}");
    assert!(words.contains("VDI"), "on which object: {words}");
    let cycle = store.begin_collection().await.expect("nothing keeps the registry");
    cycle.roots().await.expect("nor afterwards");
    drop(cycle);
    assert_eq!(store.in_flight(), in_flight, "{what:?}: blocks stay in flight");
    let (data, metadata) = store.pooled();
    assert!(data >= pooled.0 && metadata >= pooled.1, "{what:?}: blocks are lost");
}

#[tokio::test(start_paused = true)]
async fn control_operations_end_on_a_full_device_and_collection_begins() {
    let sim = sim(64 * MIB, 1);
    let (store, vdi) = store_with_disk(&sim, 64 * MIB).await;
    vdi.commit(cut_batch(three_snapshots())).await.expect("commit");
    vdi.detach(Lsn(4)).await.expect("detach");
    drop(vdi);
    sim.set_full(true);
    for what in OF_DETACHED {
        assert_refused(&store, what).await;
    }
    assert_eq!(snapshots(&store, "d").await.len(), 3, "nothing was changed");
    let health = store.health();
    assert!(health.reachable && !health.lacks_space(), "nobody waits: {health:?}");
    sim.set_full(false);
    for what in OF_DETACHED {
        ask(&store, what).await.expect("there is space");
    }
    check_blocks(&store).await;
    assert_eq!(store.in_flight(), 0);
}

/// The same of a disk that is attached: it goes on when there is space.
#[tokio::test(start_paused = true)]
async fn snapshots_of_an_attached_disk_are_refused_on_a_full_device() {
    let sim = sim(64 * MIB, 2);
    let (store, vdi) = store_with_disk(&sim, 64 * MIB).await;
    vdi.commit(cut_batch(three_snapshots())).await.expect("commit");
    sim.set_full(true);
    for what in [Ask::Delete, Ask::Label] {
        assert_refused(&store, what).await;
    }
    // Beside a commit that waits for the device's space, its data or its nodes.
    let commit = |lsn, change| {
        let disk = Arc::clone(&vdi);
        tokio::spawn(async move { disk.commit(batch(lsn, vec![change])).await })
    };
    let waiting = commit(5, write(900, 5));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!waiting.is_finished());
    let health = store.health();
    assert!(health.lacks_space() && health.waiting_for_device_space > 0, "{health:?}");
    assert_eq!(health.waiting_for_space, 0, "unmapping goes on: {health:?}");
    store.begin_collection().await.expect("nothing keeps the registry");
    sim.set_full(false);
    waiting.await.expect("a task").expect("commit");
    for what in [Ask::Delete, Ask::Label] {
        ask(&store, what).await.expect("there is space");
    }
    vdi.commit(batch(6, vec![zero(0, 5)])).await.expect("commit");
    assert!(!store.health().lacks_space());
    let mut model = Model::default();
    for changes in [(0..20).map(|lba| write(lba, 4)).collect(), vec![write(900, 5)]] {
        let version = if changes.len() > 1 { 4 } else { 5 };
        model.apply(&changes, version);
    }
    model.apply(&[zero(0, 5)], 6);
    model.check(&store, "d").await;
    check_blocks(&store).await;
}

/// The registry's place is what the device has no space for. With compare-and-write, and with two places that are written in turn.
#[tokio::test(start_paused = true)]
async fn a_place_that_the_device_does_not_have_is_refused_and_costs_nothing() {
    for single_host in [false, true] {
        let sim = if single_host { sim_without_caw(16 * MIB, 3) } else { sim(16 * MIB, 3) };
        format(&sim).await;
        let store = open(&sim).await;
        store.create_vdi("d", MIB).await.expect("create");
        store.begin_collection().await.expect("a cycle");
        // All of it is there but the system extent.
        let written = sim.written_blocks();
        let first = store.superblock().geometry.extent_blocks;
        let (all, zero) = (sim.capacity() / BLOCK_SIZE as u64, Bytes::from(vec![0; BLOCK_SIZE]));
        for block in (first..all).filter(|block| written.binary_search(block).is_err()) {
            sim.write(block * BLOCK_SIZE as u64, vec![zero.clone()]).await.expect("a write");
        }
        sim.set_full(true);
        for _ in 0..3 {
            assert_refused(&store, Ask::Create).await;
        }
        attach(&store, "d").await.detach(Lsn(0)).await.expect("its own place is there");
        store.delete_vdi("d").await.expect("that needs no block");
        // Its place is there, too.
        ask(&store, Ask::Create).await.expect("create");
        sim.set_full(false);
        store.create_vdi("d", MIB).await.expect("create");
        check_blocks(&store).await;
        assert_eq!(store.in_flight(), 0);
    }
}
