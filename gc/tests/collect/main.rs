//! Goal: collection gives back all that no root reaches, and nothing else, whatever goes on meanwhile and wherever it is cut
//! off (P6; rules G1 to G5).
//! Method: random histories of disks, snapshots and clones beside cycles, compared block by block with models; each rule's
//! schedule by hand; death at every device operation of a workload that collects.

mod death;
mod rules;
mod scrub_sectors;
mod scrub_sharing;
mod scrubbing;
mod sectors;
mod sizing;
mod sweep;
mod unmapping;
mod windows;
mod world;

use rand::Rng;
use world::{MIB, World, cycle, cycle_in, with_snapshot, write};

/// Snapshots hold what was overwritten; once they are deleted, a cycle gives it back.
#[tokio::test(start_paused = true)]
async fn what_only_deleted_snapshots_held_comes_back() {
    let mut world = World::new(1).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let all = |version| (0..500).map(|lba| write(lba, version)).collect::<Vec<_>>();
    vdi.commit(with_snapshot(1, all(1))).await.expect("commit");
    vdi.commit(with_snapshot(2, all(2))).await.expect("commit");
    let nothing = cycle(&world.store).await.expect("cycle");
    assert_eq!((nothing.reclaimed.data, nothing.vdis), (0, 1), "all of it is reachable");
    world.store.delete_snapshots(&name, vec![blockstore::types::Lsn(1)]).await.expect("delete");
    let collected = cycle(&world.store).await.expect("cycle");
    // The first image's blocks, and its two leaves and root.
    assert_eq!((collected.reclaimed.data, collected.reclaimed.metadata), (500, 3));
    assert_eq!(collected.epoch, nothing.epoch + 1);
    let again = cycle(&world.store).await.expect("cycle");
    assert_eq!(again.reclaimed, blockstore::Reclaimed::default(), "nothing is given back twice");
}

async fn history(seed: u64, memory: u64) {
    let mut world = World::new(seed).await;
    world.create().await;
    for round in 0..12 {
        let count = world.rng.random_range(1..25);
        let store = world.store.clone();
        match world.rng.random_range(0..6) {
            // Steps go on while a cycle runs.
            0..=3 => {
                let (outcome, ()) = tokio::join!(cycle_in(&store, memory), world.steps(count));
                if let Err(error) = outcome {
                    assert_eq!(error.kind, blockstore::StoreErrorKind::NoSpace, "{error}");
                }
            }
            4 => world.steps(count).await,
            _ => {
                drop(store);
                let orderly = world.rng.random();
                world.reopen(orderly).await;
            }
        }
        world.verify(&format!("seed {seed}, round {round}")).await;
    }
    cycle_in(&world.store, memory).await.expect("cycle");
    world.store.reclaimed().await;
    world::settle().await;
    let report = world.verify(&format!("seed {seed}, after the last cycle")).await;
    let (data, metadata) = world.store.pooled();
    assert_eq!(report.blocks_leaked, data + metadata, "seed {seed}: garbage is left");
    world.delete_all().await;
    world.store.reclaimed().await;
    for _ in 0..2 {
        cycle_in(&world.store, memory).await.expect("cycle");
    }
    world.store.close().await.expect("close");
    world.store = world::open(&world.sim).await;
    let (data, metadata) = world.store.pooled();
    let report = world.verify("empty").await;
    assert_eq!(report.blocks_reachable, 0);
    assert_eq!(report.blocks_allocated, data + metadata, "seed {seed}: not all of it is free");
}

/// P6: whatever happened, a cycle leaves only what is reachable, and two cycles after everything was deleted, all is free.
#[tokio::test(start_paused = true)]
async fn only_what_is_reachable_stays() {
    for seed in 0..40 {
        history(seed, gc::MEMORY_DEFAULT).await;
    }
}

/// The same with memory for the bits of one extent: each cycle takes many passes, while disks, snapshots and clones come and go.
#[tokio::test(start_paused = true)]
async fn only_what_is_reachable_stays_when_marked_in_windows() {
    for seed in 0..40 {
        history(seed, 0).await;
    }
}

/// A store that is full of garbage frees itself while a commit waits for room.
#[tokio::test(start_paused = true)]
async fn a_commit_that_waits_for_room_gets_what_a_cycle_frees() {
    let mut world = World::new(7).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let mut lsn = 0;
    // Fills the store with snapshots of one block range, until no more than a batch is free.
    let full = loop {
        lsn += 1;
        let changes = (0..1000).map(|lba| write(lba, lsn)).collect();
        let commit = vdi.commit(with_snapshot(lsn, changes));
        let patience = std::time::Duration::from_secs(30);
        match tokio::time::timeout(patience, commit).await {
            Ok(done) => drop(done.expect("commit")),
            Err(_) => break lsn,
        }
    };
    assert!(full > 5 && full * 1000 * 4096 < 64 * MIB, "{full}");
    let held: Vec<_> = (1..full - 1).map(blockstore::types::Lsn).collect();
    world.store.delete_snapshots(&name, held).await.expect("deleting needs no room");
    let collected = cycle(&world.store).await.expect("cycle");
    assert!(collected.reclaimed.data >= (full - 2) * 1000, "{collected:?}");
    let changes = (0..1000).map(|lba| write(lba, full + 1)).collect();
    vdi.commit(with_snapshot(full + 1, changes)).await.expect("there is room");
}
