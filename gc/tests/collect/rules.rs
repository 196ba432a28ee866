//! Each rule's schedule, by hand.

use crate::world::{World, cycle, head_of, open, read, stamp, with_snapshot, write};
use blockstore::device::sim::{Fault, OpKind, Reach};
use blockstore::format::vdi::{VdiHead, VdiState};
use blockstore::types::{Gba, Lba, Lsn};
use blockstore::{Batch, Change, Committed, Result, StoreErrorKind, Swept, Vdi, WhenOffline};
use gc::{CheckOptions, CollectOptions, Progress, check, collect};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

async fn pause() {
    tokio::time::sleep(Duration::from_millis(50)).await;
}

/// The marks of one block, 64 at a time.
fn only(block: Gba) -> impl Fn(Gba) -> u64 {
    move |first| if block.0 / 64 == first.0 / 64 { 1 << (block.0 % 64) } else { 0 }
}

/// G1: blocks that were written for a head that is not durable when the cycle begins, and is when it ends.
#[tokio::test(start_paused = true)]
async fn what_is_in_flight_is_not_collected() {
    let mut world = World::new(21).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let changes = (0..300).map(|lba| write(lba, 1)).collect();
    let prepared = vdi.prepare(Batch::new(Lsn(1), changes)).await.expect("prepare");
    cycle(&world.store).await.expect("cycle");
    vdi.publish(prepared).await.expect("publish");
    // Were they collected, these would be given the same blocks.
    let changes = (1000..3000).map(|lba| write(lba, 2)).collect();
    vdi.commit(Batch::new(Lsn(2), changes)).await.expect("commit");
    let content = (0..300).map(|lba| (lba, 1)).chain((1000..3000).map(|lba| (lba, 2))).collect();
    let disk = world.disks.get_mut(&name).expect("disk");
    disk.content = content;
    world.verify("in flight").await;
}

/// G1: what was free when the cycle began and is in use when it ends; no root that was read reaches it.
#[tokio::test(start_paused = true)]
async fn what_was_allocated_meanwhile_is_not_collected() {
    let mut world = World::new(22).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    vdi.commit(Batch::new(Lsn(1), vec![write(0, 1)])).await.expect("commit");
    let cycle = world.store.begin_collection().await.expect("begin");
    cycle.roots().await.expect("roots");
    let changes = (0..3000).map(|lba| write(lba, 2)).collect();
    vdi.commit(Batch::new(Lsn(2), changes)).await.expect("commit");
    // As if marking had found nothing but the disk's name: all else was touched, also what the second commit freed.
    let name_block = head_of(&world.store, vdi.uuid()).await.meta.gba;
    let sweep = cycle.sweep(0..u32::MAX, only(name_block), Duration::from_secs(60));
    let swept = sweep.await.expect("sweep");
    assert_eq!(swept, Swept::default());
    let disk = world.disks.get_mut(&name).expect("disk");
    disk.content = (0..3000).map(|lba| (lba, 2)).collect();
    world.verify("touched").await;
}

/// What is reachable by an old root only is not given back while that root is read.
#[tokio::test(start_paused = true)]
async fn what_is_still_read_is_not_collected() {
    let mut world = World::new(23).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let all = |version| (0..500).map(|lba| write(lba, version)).collect::<Vec<_>>();
    vdi.commit(with_snapshot(1, all(1))).await.expect("commit");
    // A read of the first image that has begun, and goes on when it is polled.
    let mut reading = Box::pin(vdi.read(Lba(0), 500));
    tokio::select! {
        biased;
        _ = &mut reading => panic!("the device answers later"),
        () = std::future::ready(()) => {}
    }
    vdi.commit(Batch::new(Lsn(2), all(2))).await.expect("commit");
    world.store.delete_snapshots(&name, vec![Lsn(1)]).await.expect("delete");
    let options = CollectOptions { patience: Duration::from_secs(5), ..CollectOptions::default() };
    let outcome = collect(&world.store, options, &Progress::default()).await;
    // Were they free, these would be given the blocks that are being read.
    let more = (1000..4000).map(|lba| write(lba, 3)).collect();
    vdi.commit(Batch::new(Lsn(3), more)).await.expect("commit");
    let blocks = reading.await.expect("the image as it was");
    for (lba, block) in (0..).zip(blocks) {
        assert_eq!(block.expect("data"), stamp(lba, 1));
    }
    assert_eq!(outcome.expect_err("readers").kind, StoreErrorKind::InUse);
    assert!(cycle(&world.store).await.expect("cycle").reclaimed.data >= 500);
}

/// A clone that is made at any moment of a cycle keeps what it was made from, and so does its source.
#[tokio::test(start_paused = true)]
async fn a_clone_that_is_made_meanwhile_keeps_its_blocks() {
    for delay in 0..60 {
        let mut world = World::new(24).await;
        let name = world.create().await;
        let vdi = world.disks[&name].vdi.clone();
        let all = |version| (0..200).map(|lba| write(lba, version)).collect::<Vec<_>>();
        vdi.commit(with_snapshot(1, all(1))).await.expect("commit");
        vdi.commit(Batch::new(Lsn(2), all(2))).await.expect("commit");
        let (store, source) = (world.store.clone(), name.clone());
        let cloning = async move {
            for _ in 0..delay * 5 {
                tokio::task::yield_now().await;
            }
            let policy = WhenOffline::default();
            let first = store.clone_vdi("clone", &source, Lsn(1), policy).await.expect("clone");
            // Its own disk goes on without the snapshot: the clone alone holds the first image.
            let second = store.clone_vdi("other", &source, Lsn(1), policy).await.expect("clone");
            store.delete_vdi(&second.name).await.expect("delete");
            first
        };
        let (outcome, clone) = tokio::join!(cycle(&world.store), cloning);
        outcome.expect("cycle");
        vdi.commit(Batch::new(Lsn(3), (1000..4000).map(|lba| write(lba, 3)).collect()))
            .await
            .expect("commit");
        let head = head_of(&world.store, clone.uuid).await;
        let content = read(&world.store, &head).await;
        assert_eq!(content, (0..200).map(|lba| (lba, 1)).collect(), "delay {delay}");
    }
}

/// G2: what was found by a cycle that was not finished, or by another incarnation, is applied by nobody.
#[tokio::test(start_paused = true)]
async fn an_abandoned_cycle_frees_nothing() {
    let mut world = World::new(25).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let changes = (0..300).map(|lba| write(lba, 1)).collect();
    vdi.commit(Batch::new(Lsn(1), changes)).await.expect("commit");
    let disk = world.disks.get_mut(&name).expect("disk");
    (disk.content, disk.lsn) = ((0..300).map(|lba| (lba, 1)).collect(), 1);
    let cycle = world.store.begin_collection().await.expect("begin");
    let error = world.store.begin_collection().await.expect_err("one at a time");
    assert_eq!(error.kind, StoreErrorKind::InUse, "{error}");
    let epoch = cycle.epoch();
    drop(cycle);
    let cycle = world.store.begin_collection().await.expect("begin");
    assert_eq!(cycle.epoch(), epoch + 1);
    world.reopen(false).await;
    // The dead host's own cycle goes on, and reaches the device no more.
    let patience = Duration::from_secs(30);
    let sweep = tokio::time::timeout(patience, cycle.sweep(0..u32::MAX, |_| 0, patience));
    assert!(!matches!(sweep.await, Ok(Ok(_))));
    world.verify("abandoned").await;
}

/// G5: a host that runs short takes back what it had in quarantine, which ends the cycle.
#[tokio::test(start_paused = true)]
async fn a_host_that_needs_its_quarantine_ends_the_cycle() {
    let mut world = World::new(26).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let cycle = world.store.begin_collection().await.expect("begin");
    // Each commit frees what the one before wrote; without the quarantine the store would hold them all.
    for lsn in 1..=30u64 {
        let changes = (0..1000).map(|lba| write(lba, lsn)).collect();
        vdi.commit(Batch::new(Lsn(lsn), changes)).await.expect("commit");
    }
    assert_eq!(cycle.check().expect_err("given up").kind, StoreErrorKind::NoSpace);
    let error =
        cycle.sweep(0..u32::MAX, |_| 0, Duration::from_secs(1)).await.expect_err("given up");
    assert_eq!(error.kind, StoreErrorKind::NoSpace, "{error}");
    let disk = world.disks.get_mut(&name).expect("disk");
    disk.content = (0..1000).map(|lba| (lba, 30)).collect();
    world.verify("withdrawn").await;
}

/// A handle that was kept over a detach shows what may have been collected since: nothing is cloned from that.
#[tokio::test(start_paused = true)]
async fn a_handle_of_before_a_detach_is_no_source() {
    let mut world = World::new(29).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let changes = (0..200).map(|lba| write(lba, 1)).collect();
    vdi.commit(with_snapshot(1, changes)).await.expect("commit");
    vdi.detach(Lsn(1)).await.expect("detach");
    world.store.delete_snapshots(&name, vec![Lsn(1)]).await.expect("delete");
    cycle(&world.store).await.expect("cycle");
    let policy = WhenOffline::default();
    let error = world.store.clone_vdi("clone", &name, Lsn(1), policy).await.expect_err("gone");
    assert_eq!(error.kind, StoreErrorKind::NotFound, "{error}");
    drop(vdi);
}

/// Ends a write of the head with an error, after its compare-and-write had this fate, and lets nobody read for a while.
async fn without_an_answer<T>(world: &World, fault: Fault, write: JoinHandle<Result<T>>) {
    let sim = &world.sim;
    let before = sim.counts().compare_and_writes;
    sim.inject(OpKind::CompareAndWrite, 0, fault);
    while sim.counts().compare_and_writes == before {
        tokio::task::yield_now().await;
    }
    for _ in 0..60 {
        sim.inject(OpKind::Read, 0, Fault::Io);
    }
    assert!(write.await.expect("a task").is_err(), "nobody knows");
    while world.store.scan_vdis().await.is_err() {}
}

/// A commit of which nothing is left to do but its nodes and its head. (Claims of extents are compare-and-writes, too.)
async fn prepared(vdi: &Arc<Vdi>, batch: Batch) -> JoinHandle<Result<Committed>> {
    let prepared = vdi.prepare(batch).await.expect("prepare");
    pause().await;
    let vdi = Arc::clone(vdi);
    tokio::spawn(async move { vdi.publish(prepared).await })
}

/// A head's write that landed, or did not, and was reported as failed: a cycle finds out, and what only the head that is not
/// there reached, or the one before, is collected once nobody reads it. The disk is idle all the while.
#[tokio::test(start_paused = true)]
async fn a_cycle_finds_out_what_became_of_an_uncertain_head() {
    for fault in [Fault::UnknownApplied, Fault::Unreachable] {
        let mut world = World::new(30).await;
        let name = world.create().await;
        let vdi = world.disks[&name].vdi.clone();
        let all = |version| (0..300).map(|lba| write(lba, version)).collect::<Vec<_>>();
        vdi.commit(with_snapshot(1, all(1))).await.expect("commit");
        vdi.commit(Batch::new(Lsn(2), all(2))).await.expect("commit");
        world.store.delete_snapshots(&name, vec![Lsn(1)]).await.expect("delete");
        let third = prepared(&vdi, Batch::new(Lsn(3), all(3))).await;
        without_an_answer(&world, fault, third).await;
        let reading = vdi.read(Lba(0), 300).await.expect("the former image");
        assert!(reading.into_iter().zip(0..).all(|(block, lba)| block == Some(stamp(lba, 2))));
        let landed = fault == Fault::UnknownApplied;
        let collected = cycle(&world.store).await.expect("it does not wait for the disk");
        assert!(collected.reclaimed.data >= 300, "{fault:?}: {collected:?}");
        let disk = world.disks.get_mut(&name).expect("disk");
        disk.content = (0..300).map(|lba| (lba, if landed { 3 } else { 2 })).collect();
        assert_eq!(vdi.committed().lsn, Lsn(if landed { 3 } else { 2 }));
        world.verify("found out").await;
        vdi.commit(Batch::new(Lsn(4), all(4))).await.expect("commit");
        let disk = world.disks.get_mut(&name).expect("disk");
        disk.content = (0..300).map(|lba| (lba, 4)).collect();
        cycle(&world.store).await.expect("cycle");
        world.verify("after the next commit").await;
    }
}

/// The same while the store is full of garbage, and the disk's next commit waits for the room that the cycle is to give.
#[tokio::test(start_paused = true)]
async fn an_uncertain_disk_that_waits_for_room_gets_it() {
    let mut world = World::new(31).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let all = |version| (0..1000).map(|lba| write(lba, version)).collect::<Vec<_>>();
    vdi.commit(with_snapshot(1, all(1))).await.expect("commit");
    let second = prepared(&vdi, with_snapshot(2, all(2))).await;
    without_an_answer(&world, Fault::Unreachable, second).await;
    // Another disk fills the store.
    let other = world.create().await;
    let filler = world.disks[&other].vdi.clone();
    let mut lsn = 0;
    loop {
        lsn += 1;
        let filling = filler.commit(with_snapshot(lsn, all(lsn)));
        if tokio::time::timeout(Duration::from_secs(30), filling).await.is_err() {
            break;
        }
    }
    let waiting = Arc::clone(&vdi);
    let waiting = tokio::spawn(async move { waiting.commit(with_snapshot(2, all(2))).await });
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(!waiting.is_finished(), "there is no room");
    let garbage = (1..lsn - 1).map(Lsn).collect();
    world.store.delete_snapshots(&other, garbage).await.expect("deleting needs no room");
    let collected = cycle(&world.store).await.expect("it does not wait for the disk");
    assert!(collected.reclaimed.data >= 1000, "{collected:?}");
    waiting.await.expect("a task").expect("there is room");
}

/// While the device says nothing of the head, what only the former root reaches is not collected.
#[tokio::test(start_paused = true)]
async fn what_an_uncertain_head_replaced_is_not_collected() {
    let mut world = World::new(32).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let all = |version| (0..300).map(|lba| write(lba, version)).collect::<Vec<_>>();
    vdi.commit(Batch::new(Lsn(1), all(1))).await.expect("commit");
    let cycle_begun = world.store.begin_collection().await.expect("begin");
    let second = prepared(&vdi, Batch::new(Lsn(2), all(2))).await;
    without_an_answer(&world, Fault::UnknownApplied, second).await;
    let roots = cycle_begun.roots().await.expect("roots");
    assert_eq!(roots[0].record().map(|head| head.committed), Some(Lsn(2)), "it landed");
    // As if marking had found nothing: the former image is what only the former root reaches.
    let name_block = head_of(&world.store, vdi.uuid()).await.meta.gba;
    let place = roots[0].slot.first.byte_offset() + 100;
    world.sim.corrupt(place, 1);
    let sweep = cycle_begun.sweep(0..u32::MAX, only(name_block), Duration::from_secs(5));
    assert_eq!(sweep.await.expect_err("uncertain").kind, StoreErrorKind::InUse);
    world.sim.corrupt(place, 1);
    let blocks = vdi.read(Lba(0), 300).await.expect("the former image");
    assert!(blocks.into_iter().zip(0..).all(|(block, lba)| block == Some(stamp(lba, 1))));
}

/// A head that a cycle read, of a write that got no answer, and that the target forgot then: the former one counts again, and
/// what the cycle missed is reachable.
#[tokio::test(start_paused = true)]
async fn a_cycle_that_read_a_head_which_the_target_forgot_is_given_up() {
    let mut forgotten = 0;
    for (seed, commits) in (0..40).flat_map(|seed| [(seed, false), (seed, true)]) {
        let mut world = World::new(seed).await;
        let name = world.create().await;
        let vdi = world.disks[&name].vdi.clone();
        let changes = (0..300).map(|lba| write(lba, 1)).collect();
        vdi.commit(Batch::new(Lsn(1), changes)).await.expect("commit");
        let cycle = world.store.begin_collection().await.expect("begin");
        let nothing = Batch::new(Lsn(2), vec![Change::Zero { lba: Lba(0), blocks: 4096 }]);
        let second = prepared(&vdi, nothing).await;
        let before = world.sim.counts().compare_and_writes;
        world.sim.inject(OpKind::CompareAndWrite, 0, Fault::UnknownApplied);
        while world.sim.counts().compare_and_writes == before {
            tokio::task::yield_now().await;
        }
        // The registry can be read once. A flush that failed says nothing of what it was to cover, nor does a later one.
        for _ in 0..60 {
            world.sim.inject(OpKind::Read, 1, Fault::Io);
        }
        world.sim.inject(OpKind::Flush, 0, Fault::Io);
        let Ok(roots) = cycle.roots().await else { continue };
        let found = roots[0].record().cloned().expect("a head");
        let outcome = second.await.expect("a task");
        while world.store.scan_vdis().await.is_err() {}
        world.sim.lose_session();
        let is_back = head_of(&world.store, vdi.uuid()).await.committed == Lsn(1);
        if outcome.is_ok() || !is_back || found.committed != Lsn(2) {
            continue;
        }
        forgotten += 1;
        if commits {
            vdi.commit(Batch::new(Lsn(3), vec![write(1000, 3)])).await.expect("commit");
        }
        // What the head that was read reaches: its name, and no block of the disk.
        assert!(found.root.is_sparse());
        let _ = cycle.sweep(0..u32::MAX, only(found.meta.gba), Duration::from_secs(60)).await;
        let report = check(&world.store, CheckOptions { data: true }).await.expect("check");
        assert!(report.is_sound(), "seed {seed}: {report:#?}");
        assert_eq!(vdi.committed().lsn, Lsn(if commits { 3 } else { 1 }));
        vdi.commit(Batch::new(Lsn(4), (2000..3500).map(|lba| write(lba, 4)).collect()))
            .await
            .expect("commit");
        let blocks = vdi.read(Lba(0), 300).await.expect("whole");
        assert!(blocks.into_iter().zip(0..).all(|(block, lba)| block == Some(stamp(lba, 1))));
    }
    assert!(forgotten > 10, "forgotten {forgotten} times only");
}

/// Damage in a tree stops collection, and says whose tree it is.
#[tokio::test(start_paused = true)]
async fn nothing_is_collected_from_a_damaged_store() {
    let mut world = World::new(27).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let changes = (0..600).map(|lba| write(lba, 1)).collect();
    vdi.commit(with_snapshot(1, changes)).await.expect("commit");
    let root = vdi.committed().root;
    world.sim.corrupt(root.gba.byte_offset() + 77, 0x10);
    let error = cycle(&world.store).await.expect_err("damaged");
    assert_eq!(error.kind, StoreErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains(&vdi.uuid().to_string()), "{error}");
    world.sim.corrupt(root.gba.byte_offset() + 77, 0x10);
    cycle(&world.store).await.expect("whole again");
}

/// The store goes away in the middle: the cycle ends with an error, and the next one starts over.
#[tokio::test(start_paused = true)]
async fn a_store_that_goes_away_ends_the_cycle() {
    let mut world = World::new(28).await;
    world.create().await;
    world.steps(40).await;
    let sim = world.sim.clone();
    let store = world.store.clone();
    let outage = async {
        for _ in 0..40 {
            tokio::task::yield_now().await;
        }
        sim.set_reach(Reach::Failing);
        tokio::time::sleep(Duration::from_secs(100)).await;
        sim.set_reach(Reach::Up);
    };
    let (outcome, ()) = tokio::join!(cycle(&store), outage);
    drop(outcome);
    pause().await;
    cycle(&world.store).await.expect("the next");
    world.verify("after an outage").await;
}

/// A deletion whose head landed in the target's cache, and was reported as failed: the roots are read without the disk, the target
/// restarts and forgets that head, and the cycle goes on. The disk is there again then, and so must be its blocks.
#[tokio::test(start_paused = true)]
async fn a_head_that_the_target_forgets_is_a_root_again() {
    for seed in 0..40 {
        let mut world = World::new(seed).await;
        let name = world.create().await;
        let vdi = world.disks[&name].vdi.clone();
        let changes = (0..300).map(|lba| write(lba, 1)).collect();
        vdi.commit(Batch::new(Lsn(1), changes)).await.expect("commit");
        vdi.detach(Lsn(1)).await.expect("detach");
        let cycle = world.store.begin_collection().await.expect("begin");
        let (sim, store) = (world.sim.clone(), world.store.clone());
        sim.inject(OpKind::CompareAndWrite, 0, Fault::UnknownApplied);
        let before = sim.counts().compare_and_writes;
        let deleting = tokio::spawn(async move { store.delete_vdi(&name).await });
        while sim.counts().compare_and_writes == before {
            tokio::task::yield_now().await;
        }
        for _ in 0..60 {
            sim.inject(OpKind::Read, 0, Fault::Io);
        }
        deleting.await.expect("a task").expect_err("nobody knows");
        while world.store.scan_vdis().await.is_err() {}
        let roots = cycle.roots().await.expect("roots");
        let is_root = |head: &VdiHead| head.state == VdiState::Active;
        assert!(!roots.iter().filter_map(|view| view.record()).any(is_root));
        sim.lose_session();
        // It may end with an error, too.
        let _ = cycle.sweep(0..u32::MAX, |_| 0, Duration::from_secs(60)).await;
        let report = check(&world.store, CheckOptions { data: true }).await.expect("check");
        assert!(report.is_sound(), "seed {seed}: {report:#?}");
    }
}

/// A deletion whose flush failed, and whose host died before it wrote again: reads show its head, and no later flush covers it.
/// What a cycle takes for deleted must stay deleted.
#[tokio::test(start_paused = true)]
async fn a_head_that_a_failed_flush_left_behind_is_made_durable_before_it_counts() {
    for (seed, operations) in (0..).zip((2..14).cycle().take(120)) {
        let mut world = World::new(seed).await;
        let name = world.create().await;
        let vdi = world.disks[&name].vdi.clone();
        let changes = (0..300).map(|lba| write(lba, 1)).collect();
        vdi.commit(Batch::new(Lsn(1), changes)).await.expect("commit");
        vdi.detach(Lsn(1)).await.expect("detach");
        let (sim, store) = (world.sim.clone(), world.store.clone());
        sim.inject(OpKind::Flush, 0, Fault::Io);
        sim.crash_after(operations);
        tokio::select! {
            biased;
            () = sim.died() => {}
            deleted = store.delete_vdi(&name) => { let _ = deleted; }
        }
        sim.kill_host();
        let next = sim.connect();
        let store = open(&next).await;
        cycle(&store).await.expect("a cycle");
        next.crash();
        let store = open(&sim.connect()).await;
        let report = check(&store, CheckOptions { data: true }).await.expect("check");
        assert!(report.is_sound(), "seed {seed}, {operations} operations: {report:#?}");
    }
}
