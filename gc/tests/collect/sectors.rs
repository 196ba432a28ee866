//! Bad sectors under bitmaps, extents' records and heads: whoever meets one, nothing waits for it while there is room elsewhere, and
//! nothing in use is hurt.

use crate::world::{MIB, World, cycle, head_of, open, read, settle, unmap, with_snapshot, write};
use blockstore::device::sim::{OpKind, SimDevice};
use blockstore::format::extent::ExtentType;
use blockstore::format::vdi::VdiHead;
use blockstore::slot::View;
use blockstore::types::{Gba, Lba, Lsn};
use blockstore::{AttachOptions, Batch, Change, StoreErrorKind, Unmapped};
use std::time::Duration;

/// What fails where.
#[derive(Clone, Copy, Debug)]
enum Sector {
    BitmapWrites,
    BitmapReads,
    Bitmap,
    RecordWrites,
    RecordReads,
}

/// What keeps an extent from being unmapped.
const SECTORS: [Sector; 4] =
    [Sector::BitmapWrites, Sector::BitmapReads, Sector::Bitmap, Sector::RecordWrites];

/// Makes a sector of an extent bad.
fn set_bad(world: &World, extent: u32, sector: Sector) {
    let g = world.store.superblock().geometry.clone();
    let bad = |block: Gba, kinds: &[OpKind]| world.sim.set_bad(block.byte_offset(), 4096, kinds);
    match sector {
        Sector::BitmapWrites => bad(g.bmap_page(extent, 0), &[OpKind::Write]),
        Sector::BitmapReads => bad(g.bmap_page(extent, 0), &[OpKind::Read]),
        Sector::Bitmap => bad(g.bmap_page(extent, 0), &[OpKind::Read, OpKind::Write]),
        Sector::RecordWrites => bad(g.extent_slot(extent), &[OpKind::CompareAndWrite]),
        Sector::RecordReads => bad(g.extent_slot(extent), &[OpKind::Read]),
    }
}

fn heal(world: &World, extent: u32) {
    let g = &world.store.superblock().geometry;
    for block in [g.bmap_page(extent, 0), g.extent_slot(extent)] {
        world.sim.set_bad(block.byte_offset(), 4096, &[]);
    }
}

/// In hours of the device's time: what waits for a bad sector waits for ever.
async fn soon<T>(what: &str, done: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(3600), done).await.expect(what)
}

/// A store with a disk in extents of which much is free, just opened: nothing is known of any bitmap. Its extents of data.
async fn with_free_space(seed: u64) -> (World, String, Vec<u32>) {
    let mut world = World::on(SimDevice::new(48 * MIB, seed), seed, true).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let changes = (0..3000).map(|lba| write(lba, 1)).collect();
    vdi.commit(Batch::new(Lsn(1), changes)).await.expect("commit");
    // Of each extent something stays, so none is given up.
    let zeros = (0..30).map(|n| Change::Zero { lba: Lba(n * 100 + 20), blocks: 80 }).collect();
    vdi.commit(Batch::new(Lsn(2), zeros)).await.expect("commit");
    let disk = world.disks.get_mut(&name).expect("disk");
    disk.content = (0..3000).filter(|lba| lba % 100 < 20).map(|lba| (lba, 1)).collect();
    disk.lsn = 2;
    world.reopen(true).await;
    let extents = world.store.scan_extents().await.expect("the catalogue");
    let is_data = |number: &u32| {
        let record = extents[*number as usize].record();
        record.is_some_and(|r| r.kind == ExtentType::Data && r.owner.is_some())
    };
    let data: Vec<u32> = (0..extents.len() as u32).filter(is_data).collect();
    assert!(data.len() > 8, "{data:?}");
    (world, name, data)
}

async fn overwrite(world: &mut World, name: &str, lsn: u64, blocks: std::ops::Range<u64>) {
    let vdi = world.disks[name].vdi.clone();
    let changes = blocks.clone().map(|lba| write(lba, lsn)).collect();
    soon("a commit", vdi.commit(Batch::new(Lsn(lsn), changes))).await.expect("commit");
    let disk = world.disks.get_mut(name).expect("disk");
    disk.content.extend(blocks.map(|lba| (lba, lsn)));
    disk.lsn = lsn;
}

async fn pass(world: &World) -> Unmapped {
    soon("a pass", unmap(&world.store)).await.expect("a pass")
}

/// A pass goes on with the next extent, says so, and holds up no commit; once the sector is whole, the next pass has all.
#[tokio::test(start_paused = true)]
async fn a_pass_leaves_out_a_bad_extent_and_holds_nobody_up() {
    for (seed, sector) in (0..).zip(SECTORS) {
        let (mut world, name, data) = with_free_space(seed).await;
        let bad = data[2];
        set_bad(&world, bad, sector);
        let store = world.store.clone();
        let passing = tokio::spawn(async move { soon("a pass", unmap(&store)).await });
        // Each of these needs claims.
        for lsn in 3..8 {
            overwrite(&mut world, &name, lsn, 3000..3800).await;
        }
        let unmapped = passing.await.expect("a task").expect("a pass");
        let again = pass(&world).await;
        for unmapped in [&unmapped, &again] {
            assert_eq!(unmapped.extents_left_out, 1, "{sector:?}: {unmapped:?}");
            let words = unmapped.last_left_out.as_ref().expect("words");
            assert!(words.contains("media error"), "{sector:?}: {words}");
        }
        assert!(again.blocks > 1000 && again.failures == 0, "{sector:?}: {again:?}");
        assert!(world.store.health().reachable, "{sector:?}: a bad sector is no outage");
        assert_eq!(world.store.in_unmapping(), 0);
        // The rest is told at once, and nothing of it was lost.
        heal(&world, bad);
        let whole = pass(&world).await;
        assert_eq!(whole.extents_left_out, 0, "{sector:?}: {whole:?}");
        assert!(whole.blocks >= again.blocks + 100, "{sector:?}: {again:?}, then {whole:?}");
        world.verify(&format!("{sector:?}")).await;
        cycle(&world.store).await.expect("cycle");
        settle().await;
        let report = world.verify(&format!("{sector:?}, collected")).await;
        let (of_data, of_metadata) = world.store.pooled();
        assert_eq!(report.blocks_leaked, of_data + of_metadata, "{sector:?}: blocks are lost");
    }
}

/// Commits that claim, what they free, a cycle that frees, and a close: each meets the sector first, and passes over it.
#[tokio::test(start_paused = true)]
async fn a_bad_extent_holds_nothing_up_whoever_meets_it_first() {
    for (seed, sector) in (0..).zip(SECTORS.into_iter().chain([Sector::RecordReads])) {
        for bad_index in [0, 3, usize::MAX] {
            let (mut world, name, data) = with_free_space(seed).await;
            let bad = data[bad_index.min(data.len() - 1)];
            let when = format!("{sector:?} of extent {bad}");
            set_bad(&world, bad, sector);
            for lsn in 3..6 {
                overwrite(&mut world, &name, lsn, 3000..4000).await;
            }
            // What was there before is freed: by the commit, and by a cycle once a snapshot that holds it is deleted.
            overwrite(&mut world, &name, 6, 0..1500).await;
            let vdi = world.disks[&name].vdi.clone();
            soon(&when, vdi.commit(with_snapshot(7, vec![write(0, 7)]))).await.expect("commit");
            world.disks.get_mut(&name).expect("disk").content.insert(0, 7);
            overwrite(&mut world, &name, 8, 0..4000).await;
            let store = world.store.clone();
            store.delete_snapshots(&name, vec![Lsn(7)]).await.expect("delete");
            let collected = soon(&when, cycle(&store)).await.expect(&when);
            if let Some(words) = collected.last_left_out {
                assert!(words.contains(&format!("extent {bad}:")), "{when}: {words}");
            }
            soon(&when, settle()).await;
            overwrite(&mut world, &name, 9, 0..1000).await;
            drop(store);
            soon(&when, world.store.close()).await.expect(&when);
            heal(&world, bad);
            world.reopen(false).await;
            world.verify(&when).await;
            for _ in 0..2 {
                cycle(&world.store).await.expect("cycle");
            }
            settle().await;
            let report = world.verify(&when).await;
            let (of_data, of_metadata) = world.store.pooled();
            assert_eq!(report.blocks_leaked, of_data + of_metadata, "{when}: blocks are lost");
        }
    }
}

/// A disk that overwrote all that a snapshot held which is gone now, just opened: garbage in many extents. The first of these that is
/// collected, and its bitmaps: (that of the owner, that of the leader).
async fn with_garbage(seed: u64) -> (World, u32, [Gba; 2]) {
    let (mut world, name, data) = with_free_space(seed).await;
    let vdi = world.disks[&name].vdi.clone();
    let all = |version| (0..3000).map(|lba| write(lba, version)).collect::<Vec<_>>();
    vdi.commit(with_snapshot(3, all(3))).await.expect("commit");
    overwrite(&mut world, &name, 4, 0..3000).await;
    world.store.delete_snapshots(&name, vec![Lsn(3)]).await.expect("delete");
    world.reopen(true).await;
    let g = &world.store.superblock().geometry;
    let bitmaps = [g.bmap_page(data[1], 0), g.reclaim_page(data[1], 0)];
    (world, data[1], bitmaps)
}

/// A cycle over garbage, with one bitmap bad, the owner's or the leader's. All other extents are collected, nobody is told of an outage,
/// and the next cycle has the rest once the sector is whole.
async fn cycle_past(bitmap: usize, kind: OpKind) {
    let (world, bad, bitmaps) = with_garbage(20).await;
    let when = format!("{kind:?} of bitmap {bitmap} of extent {bad}");
    let before = world.verify(&when).await.blocks_leaked;
    world.sim.set_bad(bitmaps[bitmap].byte_offset(), 4096, &[kind]);
    let collected = soon(&when, cycle(&world.store)).await.expect(&when);
    assert!(collected.reclaimed.data > 2000, "{when}: {collected:?}");
    // It names the extent and the sector.
    assert_eq!(collected.extents_left_out, 1, "{when}");
    let words = collected.last_left_out.expect("words");
    assert!(words.contains(&format!("extent {bad}:")) && words.contains("media error"), "{words}");
    world.store.space().await.expect("how much is free elsewhere");
    let health = world.store.health();
    assert!(health.reachable && health.last_error.is_none(), "{when}: {health:?}");
    world.sim.set_bad(bitmaps[bitmap].byte_offset(), 4096, &[]);
    settle().await;
    let left = world.verify(&when).await.blocks_leaked;
    assert!(before > left + 2000, "{when}: {before} blocks, then {left}");
    let again = cycle(&world.store).await.expect("cycle");
    assert!(again.reclaimed.data > 50, "{when}: {again:?}");
    settle().await;
    let report = world.verify(&when).await;
    let (of_data, of_metadata) = world.store.pooled();
    assert_eq!(report.blocks_leaked, of_data + of_metadata, "{when}: blocks are lost");
}

/// Step 3 leaves out an extent whose reclaim bitmap cannot be written.
#[tokio::test(start_paused = true)]
async fn a_cycle_leaves_out_an_extent_whose_reclaim_bitmap_cannot_be_written() {
    cycle_past(1, OpKind::Write).await;
}

/// Step 4 leaves out an extent of which either bitmap cannot be read.
#[tokio::test(start_paused = true)]
async fn a_cycle_leaves_out_an_extent_whose_bitmaps_cannot_be_read() {
    cycle_past(1, OpKind::Read).await;
    cycle_past(0, OpKind::Read).await;
}

/// The record of an extent of data, of one of metadata, and of one that is unused, that the device does not read: cycles collect elsewhere, it
/// is known how much is free, the store opens, its disks go on. Nothing of the extent is given out or freed; once it can be read,
/// cycles of the same agent have what is garbage there.
#[tokio::test(start_paused = true)]
async fn a_record_that_cannot_be_read_keeps_the_store_from_nothing() {
    for (seed, kind) in (30..).zip([ExtentType::Data, ExtentType::Metadata, ExtentType::Unused]) {
        let (mut world, data, _) = with_garbage(seed).await;
        let name = world.disks.keys().next().expect("a disk").clone();
        let extents = world.store.scan_extents().await.expect("the catalogue");
        let bad = match kind {
            ExtentType::Data => data,
            // The first has the disk's own nodes.
            ExtentType::Metadata => (0..)
                .zip(&extents)
                .find(|(_, view)| view.record().is_some_and(|r| r.kind == ExtentType::Metadata))
                .map_or(0, |(number, _)| number),
            _ => extents.len() as u32 - 1,
        };
        let found = extents[bad as usize].record().map_or(ExtentType::Unused, |r| r.kind);
        assert_eq!(found, kind, "extent {bad}");
        let when = format!("{kind:?}, extent {bad}");
        set_bad(&world, bad, Sector::RecordReads);

        let collected = soon(&when, cycle(&world.store)).await.expect(&when);
        assert!(collected.reclaimed.data > 2000, "{when}: {collected:?}");
        let words = collected.last_left_out.expect("words");
        assert!(words.contains(&format!("extent {bad}:")), "{when}: {words}");
        assert_eq!(collected.extents_left_out, 1, "{when}");
        pass(&world).await;
        let free = world.store.space().await.expect("how much is free").free;
        assert!(free > 2000, "{when}: {free}");
        let problems = world.store.info().await.expect("what there is").problems;
        assert!(
            problems.len() == 1 && problems[0].contains(&format!("extent {bad} ")),
            "{problems:?}"
        );

        for (lsn, orderly) in [(5, true), (6, false)] {
            soon(&when, world.reopen(orderly)).await;
            overwrite(&mut world, &name, lsn, 500 * lsn..500 * lsn + 1000).await;
            soon(&when, cycle(&world.store)).await.expect(&when);
        }
        let health = world.store.health();
        assert!(health.reachable && health.last_error.is_none(), "{when}: {health:?}");
        let head = head_of(&world.store, world.disks[&name].vdi.uuid()).await;
        assert_eq!(read(&world.store, &head).await, world.disks[&name].content, "{when}");

        heal(&world, bad);
        world.verify(&when).await;
        for lsn in [7, 8] {
            cycle(&world.store).await.expect(&when);
            overwrite(&mut world, &name, lsn, 0..2500).await;
        }
        for _ in 0..2 {
            cycle(&world.store).await.expect(&when);
        }
        settle().await;
        let report = world.verify(&when).await;
        let (of_data, of_metadata) = world.store.pooled();
        assert_eq!(report.blocks_leaked, of_data + of_metadata, "{when}: blocks are lost");
    }
}

/// A head of this host's that the device does not write: the store opens, the other disks go on, and nothing holds the registry. Its disk is
/// not attached, and no cycle begins, until somebody could raise it (rule C2).
#[tokio::test(start_paused = true)]
async fn a_head_that_is_not_written_keeps_its_own_disk_from_the_store() {
    for (seed, collects_first) in [(40, true), (41, false)] {
        let mut world = World::on(SimDevice::new(48 * MIB, seed), seed, false).await;
        let (bad, good) = (world.create().await, world.create().await);
        for name in [&bad, &good] {
            overwrite(&mut world, name, 1, 0..300).await;
        }
        let uuid = world.disks[&bad].vdi.uuid();
        let registry = world.store.scan_vdis().await.expect("the registry");
        let is_bad = |view: &&View<VdiHead>| view.record().is_some_and(|head| head.uuid == uuid);
        let head = registry.iter().map(|(_, view)| view).find(is_bad).expect("a head").slot.first;
        let generation = head_of(&world.store, uuid).await.owner.expect("an owner").generation;
        world.sim.set_bad(head.byte_offset(), 4096, &[OpKind::CompareAndWrite]);
        world.sim.kill_host();
        world.sim = world.sim.connect();
        world.store = soon("the opening", open(&world.sim)).await;
        assert!(world.store.is_unraised(uuid));
        let other = soon("an attach", World::attach(&world.store, &good)).await;
        assert!(!world.store.is_unraised(other.uuid()));
        world.disks.get_mut(&good).expect("disk").vdi = other;
        overwrite(&mut world, &good, 2, 0..600).await;

        let epoch = world.store.gc_record().await.expect("the record").epoch;
        for _ in 0..2 {
            let attach = world.store.attach(uuid, AttachOptions { log_id: uuid });
            let error = soon("an attach", attach).await.expect_err("no head");
            assert_eq!(error.kind, StoreErrorKind::Unreachable, "{error}");
            assert!(error.to_string().contains("media error"), "{error}");
            let error = soon("a cycle", cycle(&world.store)).await.expect_err("no cycle");
            assert!(error.to_string().contains("nothing is collected"), "{error}");
        }
        assert_eq!(
            world.store.gc_record().await.expect("the record").epoch,
            epoch,
            "a cycle began"
        );
        soon("a new disk", world.create()).await;
        let health = world.store.health();
        assert!(health.reachable && health.last_error.is_none(), "{health:?}");
        // Read wrongly, it is not raised either: what is there may come to light again.
        world.sim.corrupt(head.byte_offset() + 64, 1);
        soon("a cycle", cycle(&world.store)).await.expect_err("no cycle");
        world.sim.corrupt(head.byte_offset() + 64, 1);
        assert!(world.store.is_unraised(uuid));

        world.sim.set_bad(head.byte_offset(), 4096, &[]);
        if collects_first {
            cycle(&world.store).await.expect("cycle");
            let raised = head_of(&world.store, uuid).await.owner.expect("an owner").generation;
            assert!(raised > generation && !world.store.is_unraised(uuid));
        }
        world.disks.get_mut(&bad).expect("disk").vdi = World::attach(&world.store, &bad).await;
        assert!(!world.store.is_unraised(uuid));
        overwrite(&mut world, &bad, 2, 100..400).await;
        cycle(&world.store).await.expect("cycle");
        world.verify("raised").await;
    }
}

/// A device that takes no writes at all for a while is waited for, as ever: its sectors are not bad.
#[tokio::test(start_paused = true)]
async fn a_device_that_refuses_everything_is_waited_for() {
    let (mut world, name, _) = with_free_space(9).await;
    let all = world.sim.capacity();
    world.sim.set_bad(0, all, &[OpKind::Write, OpKind::CompareAndWrite]);
    let vdi = world.disks[&name].vdi.clone();
    let changes = (3000..4000).map(|lba| write(lba, 3)).collect();
    let commit = tokio::spawn(async move { vdi.commit(Batch::new(Lsn(3), changes)).await });
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!(!commit.is_finished());
    assert_eq!(world.store.health().waiting_for_space, 0, "that is not what it waits for");
    world.sim.set_bad(0, all, &[]);
    soon("the commit", commit).await.expect("a task").expect("commit");
    let disk = world.disks.get_mut(&name).expect("disk");
    disk.content.extend((3000..4000).map(|lba| (lba, 3)));
    disk.lsn = 3;
    pass(&world).await;
    overwrite(&mut world, &name, 4, 0..4000).await;
    world.verify("whole again").await;
}
