//! What the sweep writes, and what becomes of it when the device fails.

use crate::world::{World, cycle, settle, with_snapshot, write};
use blockstore::device::sim::{Fault, OpKind};
use blockstore::types::Lsn;
use gc::{CheckOptions, check};

/// Blocks of garbage in [`with_garbage`], in 12 extents at least.
const GARBAGE: u64 = 3000;

/// A disk, and what only its deleted snapshot held.
async fn with_garbage(seed: u64) -> World {
    let mut world = World::new(seed).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    for lsn in 1..=2 {
        let all = (0..GARBAGE).map(|lba| write(lba, lsn)).collect();
        vdi.commit(with_snapshot(lsn, all)).await.expect("commit");
    }
    world.store.delete_snapshots(&name, vec![Lsn(1)]).await.expect("delete");
    let disk = world.disks.get_mut(&name).expect("disk");
    disk.content = (0..GARBAGE).map(|lba| (lba, 2)).collect();
    disk.snapshots.insert(2, disk.content.clone());
    world.store.reclaimed().await;
    settle().await;
    world
}

/// However many extents there are, and whether anything is freed in them: no flush for each, and no record is written of an
/// extent in which nothing was freed.
#[tokio::test(start_paused = true)]
async fn an_extent_costs_no_flush() {
    let world = with_garbage(41).await;
    let before = world.sim.counts();
    assert_eq!(cycle(&world.store).await.expect("cycle").reclaimed.data, GARBAGE);
    let between = world.sim.counts();
    assert!(between.compare_and_writes - before.compare_and_writes > 12, "an extent's record each");
    settle().await;
    let settled = world.sim.counts();
    cycle(&world.store).await.expect("cycle");
    let after = world.sim.counts();
    // The steps of the two records, the roots (twice), reclaim bitmaps, the extents' records; then what is empty is given up.
    assert!(between.flushes - before.flushes < 12 + 12, "{before:?} {between:?}");
    assert!(after.flushes - settled.flushes < 12, "{settled:?} {after:?}");
    assert!(after.compare_and_writes - settled.compare_and_writes < 12, "{settled:?} {after:?}");
    world.verify("swept").await;
}

/// A write, compare-and-write or flush that fails, of known or unknown outcome, anywhere in a cycle that frees: nothing that is
/// in use is freed, and the next cycle frees what this one has not.
#[tokio::test(start_paused = true)]
async fn a_fault_in_the_sweep_loses_nothing() {
    let mut met = 0;
    let faults = [Fault::Io, Fault::Unknown, Fault::UnknownApplied, Fault::Unreachable];
    for (kind, skips) in [(OpKind::CompareAndWrite, 24), (OpKind::Flush, 12), (OpKind::Write, 12)] {
        for (skip, fault) in (0..skips).zip(faults.into_iter().cycle()) {
            let world = with_garbage(skip).await;
            let counts = || match (kind, world.sim.counts()) {
                (OpKind::CompareAndWrite, counts) => counts.compare_and_writes,
                (OpKind::Flush, counts) => counts.flushes,
                (_, counts) => counts.writes,
            };
            let before = counts();
            world.sim.inject(kind, skip, fault);
            let first = cycle(&world.store).await;
            met += u32::from(counts() > before + skip);
            let when = format!("{kind:?} {skip}, {fault:?}: {first:?}");
            world.verify(&when).await;
            settle().await;
            cycle(&world.store).await.expect(&when);
            settle().await;
            let report = check(&world.store, CheckOptions::default()).await.expect("check");
            let (data, metadata) = world.store.pooled();
            assert_eq!(report.blocks_leaked, data + metadata, "{when}: garbage is left");
            world.store.close().await.expect(&when);
        }
    }
    assert!(met > 24, "{met} cycles were hit");
}
