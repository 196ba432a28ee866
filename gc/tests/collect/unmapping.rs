//! Free blocks of which the device is told: nothing that is in use is hurt, nothing is lost for good, whatever the device answers.
//!
//! The simulated device discards each block to zeros, to garbage, or not at all, and takes long over it.

use crate::world::{MIB, World, cycle, settle, unmap, with_snapshot, write};
use blockstore::device::sim::{Fault, FaultRates, OpKind, Reach, SimDevice, SimOptions};
use blockstore::types::Lsn;
use blockstore::{Batch, StoreErrorKind};
use rand::Rng;
use std::sync::Arc;
use std::time::Duration;

/// Random histories with passes beside steps and cycles, crashes, and a device that refuses some.
async fn history(seed: u64) {
    let mut world = World::on(SimDevice::new(48 * MIB, seed), seed, true).await;
    world.create().await;
    let mut told = 0;
    for round in 0..14 {
        let count = world.rng.random_range(1..25);
        let store = world.store.clone();
        if world.rng.random_bool(0.3) {
            let faults = [Fault::Io, Fault::NoSpace, Fault::Unknown, Fault::UnknownApplied];
            let fault = faults[world.rng.random_range(0..faults.len())];
            let skip = world.rng.random_range(0..6);
            world.sim.inject(OpKind::Discard, skip, fault);
        }
        let kind = world.rng.random_range(0..8);
        let collect = async {
            if kind != 3 {
                let outcome = cycle(&store).await;
                let is_short =
                    |error: &blockstore::StoreError| error.kind == StoreErrorKind::NoSpace;
                assert!(outcome.as_ref().err().is_none_or(is_short), "{outcome:?}");
            }
        };
        match kind {
            // A cycle and a pass at the same time, and both beside steps.
            0..=3 => {
                let passing = async {
                    unmap(&store).await.expect("a pass");
                    unmap(&store).await.expect("another")
                };
                let (unmapped, (), ()) = tokio::join!(passing, collect, world.steps(count));
                told = told.max(unmapped.blocks);
            }
            4 | 5 => {
                collect.await;
                let (unmapped, ()) = tokio::join!(unmap(&store), world.steps(count));
                told = told.max(unmapped.expect("a pass").blocks);
            }
            // A pass that nobody waits for, which a close or a death cuts off.
            6 => {
                let of_pass = store.clone();
                let passing = tokio::spawn(async move { unmap(&of_pass).await });
                world.steps(count.min(5)).await;
                let orderly = world.rng.random();
                world.reopen(orderly).await;
                passing.abort();
                drop(passing.await);
            }
            _ => {
                drop(collect);
                drop(store);
                let orderly = world.rng.random();
                world.reopen(orderly).await;
            }
        }
        world.verify(&format!("seed {seed}, round {round}")).await;
    }
    assert!(told > 0, "seed {seed}: the device was told of nothing");
    // Twice: a pass may have taken an extent up amid the last cycle.
    for _ in 0..2 {
        cycle(&world.store).await.expect("cycle");
    }
    unmap(&world.store).await.expect("a pass");
    world.store.reclaimed().await;
    settle().await;
    let report = world.verify(&format!("seed {seed}, after the last cycle")).await;
    let (data, metadata) = world.store.pooled();
    // What became of some is unknown: the next incarnation collects them.
    let aside = world.store.in_unmapping();
    assert_eq!(report.blocks_leaked, data + metadata + aside, "seed {seed}: blocks are lost");
}

#[tokio::test(start_paused = true)]
async fn what_is_in_use_stays_whatever_is_unmapped_beside_it() {
    for seed in 100..140 {
        history(seed).await;
    }
}

/// A device on which each discard takes very long.
fn slow(seed: u64) -> SimDevice {
    let options = SimOptions::new(48 * MIB, seed);
    SimDevice::with_options(SimOptions { discard_yields_max: 100_000, ..options })
}

/// A store with much that was written and is free, and what is left of the disk.
async fn with_free_space(sim: SimDevice, seed: u64) -> (World, String) {
    let mut world = World::on(sim, seed, true).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let changes = (0..3000).map(|lba| write(lba, 1)).collect();
    vdi.commit(Batch::new(Lsn(1), changes)).await.expect("commit");
    let zeros = blockstore::Change::Zero { lba: blockstore::types::Lba(100), blocks: 2900 };
    vdi.commit(Batch::new(Lsn(2), vec![zeros])).await.expect("commit");
    let disk = world.disks.get_mut(&name).expect("disk");
    (disk.content, disk.lsn) = ((0..100).map(|lba| (lba, 1)).collect(), 2);
    world.store.reclaimed().await;
    settle().await;
    (world, name)
}

/// Begins a pass, and returns when the device has a discard of it to do.
async fn begin(world: &World) -> tokio::task::JoinHandle<blockstore::Result<blockstore::Unmapped>> {
    let (store, before) = (world.store.clone(), world.sim.counts().discards);
    let passing = tokio::spawn(async move { unmap(&store).await });
    while world.sim.counts().discards == before {
        tokio::task::yield_now().await;
    }
    passing
}

/// A block is given out again only when the device has answered: commits beside a long unmapping go elsewhere, and what they
/// wrote is there when it is over.
#[tokio::test(start_paused = true)]
async fn nothing_is_given_out_while_it_is_being_unmapped() {
    for seed in 0..6 {
        let (mut world, name) = with_free_space(slow(seed), seed).await;
        let passing = begin(&world).await;
        assert!(world.store.in_unmapping() > 0);
        let vdi = world.disks[&name].vdi.clone();
        for lsn in 3..9 {
            let changes = (1000..1500).map(|lba| write(lba, lsn)).collect();
            vdi.commit(Batch::new(Lsn(lsn), changes)).await.expect("commit");
        }
        let unmapped = passing.await.expect("a task").expect("a pass");
        assert!(unmapped.blocks > 0 && unmapped.failures == 0, "{unmapped:?}");
        let disk = world.disks.get_mut(&name).expect("disk");
        disk.content.extend((1000..1500).map(|lba| (lba, 8)));
        world.verify(&format!("seed {seed}")).await;
        assert_eq!(world.store.in_unmapping(), 0);
    }
}

/// Collection finds blocks that are being unmapped unreachable, and must not free them, whether they were claimed before its
/// cycle began or later.
#[tokio::test(start_paused = true)]
async fn collection_does_not_free_what_is_being_unmapped() {
    for (seed, before) in (0..8).flat_map(|seed| [(seed, true), (seed, false)]) {
        let (mut world, name) = with_free_space(slow(seed), seed).await;
        let (collection, passing) = if before {
            let passing = begin(&world).await;
            (world.store.begin_collection().await.expect("begin"), passing)
        } else {
            // The extents are taken up, so that the pass does not raise their sequence.
            let collection = world.store.begin_collection().await.expect("begin");
            (collection, begin(&world).await)
        };
        let held = world.store.in_unmapping();
        assert!(held > 0);
        let roots = collection.roots().await.expect("roots");
        assert_eq!(roots.len(), 1);
        drop(roots);
        drop(collection);
        // A whole cycle, with the unmapping under way all the while.
        cycle(&world.store).await.expect("cycle");
        if world.store.in_unmapping() == 0 {
            continue;
        }
        let vdi = world.disks[&name].vdi.clone();
        let changes = (1000..4000).map(|lba| write(lba, 3)).collect();
        vdi.commit(Batch::new(Lsn(3), changes)).await.expect("commit");
        passing.await.expect("a task").expect("a pass");
        let disk = world.disks.get_mut(&name).expect("disk");
        disk.content.extend((1000..4000).map(|lba| (lba, 3)));
        world.verify(&format!("seed {seed}, before: {before}")).await;
    }
}

/// An outage in the middle of an unmapping: its blocks stay claimed, and nothing waits for them.
#[tokio::test(start_paused = true)]
async fn an_unmapping_of_unknown_outcome_keeps_its_blocks_until_the_next_incarnation_collects_them()
{
    for seed in 0..6 {
        let (mut world, name) = with_free_space(slow(seed), seed).await;
        let passing = begin(&world).await;
        world.sim.set_reach(Reach::Failing);
        tokio::time::sleep(Duration::from_secs(100)).await;
        assert!(world.store.in_unmapping() > 0, "nobody knows what became of it");
        world.sim.set_reach(Reach::Up);
        let unmapped = passing.await.expect("a task").expect("a pass");
        assert!(unmapped.failures > 0 && unmapped.last_failure.is_some(), "{unmapped:?}");
        // The target may go on with it for long after it has answered something else.
        let aside = world.store.in_unmapping();
        assert!(aside > 0);
        let vdi = world.disks[&name].vdi.clone();
        let changes = (1000..4000).map(|lba| write(lba, 3)).collect();
        vdi.commit(Batch::new(Lsn(3), changes)).await.expect("commit");
        let disk = world.disks.get_mut(&name).expect("disk");
        disk.content.extend((1000..4000).map(|lba| (lba, 3)));
        let report = world.verify("after an outage").await;
        let (data, metadata) = world.store.pooled();
        assert_eq!(report.blocks_leaked, data + metadata + aside, "blocks are lost");
        world.reopen(false).await;
        cycle(&world.store).await.expect("cycle");
        let report = world.verify("after another start").await;
        let (data, metadata) = world.store.pooled();
        assert_eq!(report.blocks_leaked, data + metadata, "blocks are lost for good");
    }
}

/// What only a cycle gives back is unmapped, too.
#[tokio::test(start_paused = true)]
async fn what_a_cycle_gave_back_is_unmapped() {
    let (mut world, name) = with_free_space(SimDevice::new(64 * MIB, 9), 9).await;
    unmap(&world.store).await.expect("a pass");
    let vdi = world.disks[&name].vdi.clone();
    let changes = |stamp| (0..2000).map(|lba| write(lba, stamp)).collect::<Vec<_>>();
    vdi.commit(with_snapshot(11, changes(11))).await.expect("commit");
    vdi.commit(Batch::new(Lsn(12), changes(12))).await.expect("commit");
    world.disks.get_mut(&name).expect("disk").content.extend((0..2000).map(|lba| (lba, 12)));
    world.store.reclaimed().await;
    unmap(&world.store).await.expect("a pass");
    world.store.delete_snapshots(&vdi.uuid().to_string(), vec![Lsn(11)]).await.expect("deletion");
    let before = unmap(&world.store).await.expect("a pass").blocks;
    let collected = cycle(&world.store).await.expect("cycle");
    assert!(collected.reclaimed.data >= 2000, "{collected:?}");
    let told = unmap(&world.store).await.expect("a pass").blocks - before;
    assert!(told >= 1500, "{told} of {collected:?}");
    world.verify("unmapped").await;
}

/// A close does not wait for ever for a device that does not answer, nor does it give back what may still be unmapped: that
/// leaks until the next cycle.
#[tokio::test(start_paused = true)]
async fn a_close_amid_an_unmapping_gives_nothing_back_too_early() {
    for seed in 0..6 {
        let (mut world, name) = with_free_space(slow(seed), seed).await;
        let passing = begin(&world).await;
        let held = world.store.in_unmapping();
        world.sim.set_reach(Reach::Hanging);
        world.store.close().await.expect_err("no answer");
        assert_eq!(
            passing.await.expect("a task").expect_err("closed").kind,
            StoreErrorKind::Closing
        );
        world.reopen(false).await;
        let report = world.verify("after a close").await;
        let (data, metadata) = world.store.pooled();
        assert!(report.blocks_leaked >= held + data + metadata, "{held} of {report:?}");
        cycle(&world.store).await.expect("cycle");
        let disk = &world.disks[&name];
        assert_eq!(disk.content.len(), 100);
        let report = world.verify("after a cycle").await;
        let (data, metadata) = world.store.pooled();
        assert_eq!(report.blocks_leaked, data + metadata, "blocks are lost");
    }
}

/// Refusals are counted, the last is told, and no block is lost by them; a device that cannot is asked once, or never.
#[tokio::test(start_paused = true)]
async fn a_device_that_refuses_costs_nothing() {
    let (world, name) = with_free_space(SimDevice::new(48 * MIB, 1), 1).await;
    for _ in 0..100 {
        world.sim.inject(OpKind::Discard, 0, Fault::Io);
    }
    let refused = unmap(&world.store).await.expect("a pass");
    assert_eq!((refused.blocks, refused.failures), (0, 4), "it is not asked over and over");
    assert!(refused.last_failure.as_ref().is_some_and(|words| words.contains("media error")));
    assert!(world.store.health().reachable, "the store does not suffer");
    let again = unmap(&world.store).await.expect("a pass");
    assert!(again.failures > refused.failures, "what it was not told of is tried again: {again:?}");
    world.sim.set_rates(FaultRates::default());
    while world.store.unmapped().blocks == 0 {
        unmap(&world.store).await.expect("a pass");
    }
    let vdi = world.disks[&name].vdi.clone();
    vdi.commit(Batch::new(Lsn(3), vec![write(0, 1)])).await.expect("commit");
    let report = world.verify("after refusals").await;
    let (data, metadata) = world.store.pooled();
    assert_eq!(report.blocks_leaked, data + metadata);

    let options = SimOptions { discard: false, ..SimOptions::new(48 * MIB, 2) };
    let (world, _) = with_free_space(SimDevice::with_options(options), 2).await;
    let never = unmap(&world.store).await.expect("a pass");
    assert!(never.unsupported && (never.runs, never.failures) == (0, 0), "{never:?}");
    assert_eq!(world.sim.counts().discards, 0);
}

/// Only free blocks of own extents are unmapped, in whole pieces of the device, and an extent that is all free is unmapped before it is
/// given up.
#[tokio::test(start_paused = true)]
async fn whole_pieces_are_unmapped_and_extents_before_they_are_given_up() {
    const PIECE: u64 = 64 << 10;
    let options = SimOptions { discard_granularity: PIECE, ..SimOptions::new(48 * MIB, 3) };
    let (mut world, _) = with_free_space(SimDevice::with_options(options), 3).await;
    let owned = async |world: &World| {
        let extents = world.store.scan_extents().await.expect("extents");
        extents.iter().filter(|view| view.record().is_some_and(|r| r.owner.is_some())).count()
    };
    let before = owned(&world).await;
    let unmapped = unmap(&world.store).await.expect("a pass");
    assert!(unmapped.blocks > 1000, "{unmapped:?}");
    let after = owned(&world).await;
    assert!(after < before, "extents are given up by the pass: {before}, then {after}");
    let trace = world.sim.trace();
    let discards: Vec<_> = trace.iter().filter(|entry| entry.kind == OpKind::Discard).collect();
    assert!(discards.iter().all(|d| d.offset % PIECE == 0 && d.len % PIECE == 0), "{discards:?}");
    world.verify("after a pass").await;
    // The device was told of everything, and is not told again.
    assert_eq!(unmap(&world.store).await.expect("a pass").runs, unmapped.runs);
    world.delete_all().await;
}

/// A real file gives its space back.
#[tokio::test]
async fn a_file_shrinks() {
    use blockstore::device::{self, OpenOptions};
    use blockstore::{FormatOptions, Store, UnmapOptions};
    use std::os::unix::fs::MetadataExt;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let create = OpenOptions { create_size: Some(64 * MIB), ..OpenOptions::default() };
    let file = device::open(&path.to_string_lossy(), &create).await.expect("a file");
    if !file.info().discard {
        return;
    }
    Store::format(Arc::clone(&file), FormatOptions::default()).await.expect("format");
    let options = blockstore::OpenOptions { unmap: true, ..crate::world::host() };
    let store = Store::open(file, options).await.expect("open");
    store.create_vdi("d", 32 * MIB).await.expect("create");
    let vdi = World::attach(&store, "d").await;
    let size = || std::fs::metadata(&path).expect("the file").blocks() * 512;
    let empty = size();
    let changes = (0..6000).map(|lba| write(lba, 1)).collect();
    vdi.commit(Batch::new(Lsn(1), changes)).await.expect("commit");
    let full = size();
    assert!(full >= empty + 6000 * 4096);
    vdi.detach(Lsn(1)).await.expect("detach");
    store.delete_vdi("d").await.expect("delete");
    store.reclaimed().await;
    cycle(&store).await.expect("cycle");
    let unmapped = store.unmap(UnmapOptions::default()).await.expect("a pass");
    assert!(full - size() >= 20 * MIB, "{} of {full}: {unmapped:?}", size());
    assert!(unmapped.failures == 0 && unmapped.blocks * 4096 >= 20 * MIB, "{unmapped:?}");
    store.close().await.expect("close");
    // What was unmapped is as good as before.
    let file = device::open(&path.to_string_lossy(), &OpenOptions::default()).await.expect("file");
    let store = Store::open(file, crate::world::host()).await.expect("open");
    store.create_vdi("e", 32 * MIB).await.expect("create");
    let vdi = World::attach(&store, "e").await;
    let changes = (0..6000).map(|lba| write(lba, 2)).collect();
    vdi.commit(Batch::new(Lsn(1), changes)).await.expect("commit");
    let report = gc::check(&store, gc::CheckOptions { data: true }).await.expect("check");
    assert!(report.is_sound(), "{report:#?}");
    store.close().await.expect("close");
}

/// The histories of above find a store that gives blocks out too early. (`make test` runs what is named so.)
#[cfg(feature = "sabotage")]
#[test]
fn a_deliberate_bug_that_gives_blocks_out_too_early_is_found() {
    use blockstore::sabotage::{Bug, set};
    let hurts = |seed, bug| {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        let runtime = runtime.expect("a runtime");
        set(bug);
        let outcome = std::panic::catch_unwind(|| runtime.block_on(history(seed)));
        set(None);
        outcome.is_err()
    };
    std::panic::set_hook(Box::new(|_| {}));
    let finds = |seed: &u64| hurts(*seed, Some(Bug::GiveOutUnmapping)) && !hurts(*seed, None);
    let found = (0..100).find(finds);
    drop(std::panic::take_hook());
    println!("GiveOutUnmapping: seed {found:?}");
    assert!(found.is_some(), "not found");
}
