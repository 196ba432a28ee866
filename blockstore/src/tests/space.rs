//! Goal: a full store stalls commits, harms nothing, says so, and goes on when space is freed; what is
//! deleted or discarded is really free again. Method: small stores on the simulated device.

use crate::testing::{
    LOG, MIB, Model, attach, batch, check_blocks, format, open, sim, store_with_disk, write, zero,
};
use crate::types::Lsn;
use crate::{AttachOptions, Change, StoreErrorKind};
use std::sync::Arc;
use std::time::Duration;

fn run(first: u64, blocks: u64, version: u64) -> Vec<Change> {
    (first..first + blocks).map(|lba| write(lba, version)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_full_store_stalls_and_recovers_when_a_disk_is_deleted() {
    let sim = sim(16 * MIB, 1);
    let (store, vdi) = store_with_disk(&sim, 64 * MIB).await;
    store.create_vdi("ballast", 64 * MIB).await.expect("create");
    let ballast = attach(&store, "ballast").await;
    ballast.commit(batch(1, run(0, 1000, 1))).await.expect("commit");
    ballast.detach(Lsn(1)).await.expect("detach");
    drop(ballast);

    let mut model = Model::default();
    model.apply(&run(0, 2000, 1), 1);
    vdi.commit(batch(1, run(0, 2000, 1))).await.expect("commit");
    let disk = Arc::clone(&vdi);
    let commit = tokio::spawn(async move { disk.commit(batch(2, run(2000, 1000, 2))).await });
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!commit.is_finished(), "there is no space for it");
    assert_eq!(store.health().waiting_for_space, 1);
    assert!(store.health().reachable);
    model.check_read(&vdi, 0, 3000).await;
    let error = store.create_vdi("x", 1 << 40).await;
    assert!(error.is_ok(), "names still fit: {error:?}");

    store.delete_vdi("ballast").await.expect("delete");
    commit.await.expect("runs").expect("commit");
    model.apply(&run(2000, 1000, 2), 2);
    assert_eq!(store.health().waiting_for_space, 0);
    model.check(&store, "d").await;
    check_blocks(&store).await;
}

#[tokio::test(start_paused = true)]
async fn a_full_store_recovers_by_a_discard() {
    let sim = sim(16 * MIB, 2);
    let (store, vdi) = store_with_disk(&sim, 64 * MIB).await;
    let mut lsn = 0;
    let mut model = Model::default();
    // Fill it to the brim.
    for (first, blocks) in (0..).map(|n| (n * 100, 100)).take(60) {
        let disk = Arc::clone(&vdi);
        lsn += 1;
        let version = lsn;
        let commit =
            tokio::spawn(
                async move { disk.commit(batch(version, run(first, blocks, version))).await },
            );
        tokio::time::sleep(Duration::from_secs(30)).await;
        if !commit.is_finished() {
            // Given up before it was published: nothing of it is visible, its claim is not lost.
            commit.abort();
            break;
        }
        commit.await.expect("runs").expect("commit");
        model.apply(&run(first, blocks, lsn), lsn);
    }
    assert!((25..60).contains(&lsn), "{lsn}");
    vdi.commit(batch(lsn, vec![zero(0, 8000)])).await.expect("a discard needs no free data blocks");
    store.reclaimed().await;
    vdi.commit(batch(lsn + 1, run(0, 2000, 99))).await.expect("there is space again");
    let mut model = Model::default();
    model.apply(&run(0, 2000, 99), 99);
    model.check(&store, "d").await;
    check_blocks(&store).await;
}

#[tokio::test(start_paused = true)]
async fn writing_and_deleting_for_ever_leaks_nothing() {
    let sim = sim(16 * MIB, 3);
    format(&sim).await;
    let store = open(&sim).await;
    for round in 1..40u64 {
        let info = store.create_vdi("d", 64 * MIB).await.expect("create");
        let vdi = store.attach(info.uuid, AttachOptions { log_id: LOG }).await.expect("attach");
        for lsn in 1..5 {
            vdi.commit(batch(lsn, run(lsn * 100, 500, round))).await.expect("commit");
        }
        vdi.detach(Lsn(4)).await.expect("detach");
        drop(vdi);
        store.delete_vdi("d").await.expect("delete");
        store.reclaimed().await;
    }
    store.close().await.expect("close");
    let store = open(&sim).await;
    assert!(check_blocks(&store).await.is_empty());
    let info = store.info().await.expect("info");
    let usable = 253 * 15;
    assert!(info.blocks_free > usable - 64, "{info:?}");
}

/// The device itself is full (a thin-provisioned target): the same, seen from the device.
#[tokio::test(start_paused = true)]
async fn a_full_target_stalls_and_recovers() {
    let sim = sim(64 * MIB, 4);
    let (store, vdi) = store_with_disk(&sim, 64 * MIB).await;
    vdi.commit(batch(1, run(0, 10, 1))).await.expect("commit");
    sim.set_full(true);
    let disk = Arc::clone(&vdi);
    let commit = tokio::spawn(async move { disk.commit(batch(2, run(0, 2000, 2))).await });
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!commit.is_finished());
    let health = store.health();
    assert!(health.last_error.is_some_and(|e| e.contains("full")));
    assert!(health.waiting_for_device_space > 0, "a cycle is due, and it is said");
    assert_eq!(health.waiting_for_space, 0, "the store has some: nothing is kept from unmapping");
    sim.set_full(false);
    commit.await.expect("runs").expect("commit");
    assert!(!store.health().lacks_space());
    let mut model = Model::default();
    model.apply(&run(0, 2000, 2), 2);
    model.check(&store, "d").await;
}

#[tokio::test(start_paused = true)]
async fn the_registry_can_be_full() {
    let sim = sim(16 * MIB, 5);
    format(&sim).await;
    let store = open(&sim).await;
    let slots = store.superblock().geometry.vdi_slots;
    for n in 0..slots {
        store.create_vdi(&format!("d{n}"), MIB).await.expect("create");
    }
    let error = store.create_vdi("one too many", MIB).await.expect_err("full");
    assert_eq!(error.kind, StoreErrorKind::NoSpace);
    store.delete_vdi("d3").await.expect("delete");
    store.create_vdi("one too many", MIB).await.expect("a place is free");
    assert_eq!(store.list_vdis().await.expect("list").len(), slots as usize);
}
