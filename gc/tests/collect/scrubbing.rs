//! A scrub finds rot in whatever can be reached, and nothing else: at rest in each structure by hand; beside random histories that
//! commit, clone, delete, collect and unmap, where blocks are used again under it; cut off at any moment and gone on with; with the
//! store away. What it should find is computed by walks that share nothing with it.

use crate::world::{MIB, World, cycle, head_of, settle, unmap, with_snapshot, write};
use blockstore::device::sim::{FaultRates, OpKind, SimDevice};
use blockstore::format::geometry::Geometry;
use blockstore::format::pointer::Pointer;
use blockstore::format::vdi::{SnapshotIndex, VdiState};
use blockstore::types::{Gba, Lsn};
use blockstore::{Store, WhenOffline};
use gc::scrub::{Damage, Part, Saved};
use gc::{ScrubOptions, ScrubProgress, Scrubbed, scrub};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// Byte of a block that rots.
const SPOT: u64 = 77;

pub fn rot(sim: &SimDevice, gba: Gba) {
    sim.corrupt(gba.byte_offset() + SPOT, 0x10);
}

pub async fn full(store: &Arc<Store>) -> Scrubbed {
    let progress = ScrubProgress::default();
    scrub(store, ScrubOptions::default(), &progress).await.expect("scrub")
}

/// The same write, whatever flags its pointers have.
type Key = (Gba, u64, u32);

fn key(pointer: Pointer) -> Key {
    (pointer.gba, pointer.birth.0, pointer.crc)
}

/// Everything that a root leads to, and whether it is data.
async fn reachable(store: &Store) -> BTreeMap<Key, bool> {
    let mut found = BTreeMap::new();
    let mut roots = Vec::new();
    for (_, view) in store.scan_vdis().await.expect("registry") {
        let Some(head) = view.record() else { continue };
        if !matches!(head.state, VdiState::Active | VdiState::Creating) {
            continue;
        }
        roots.push((head.root, head.height));
        found.insert(key(head.meta), false);
        let SnapshotIndex { root, height, .. } = head.snapshots;
        let mut stack = vec![(root, height)];
        while let Some((pointer, level)) = stack.pop().filter(|(p, _)| !p.is_sparse()) {
            found.insert(key(pointer), false);
            if level > 1 {
                let node = store.reader().read_nodes(&[pointer]).await.expect("node").remove(0);
                stack.extend(node.children().map(|(_, child)| (child, level - 1)));
                continue;
            }
            let list = store.reader().snapshots_of(&[pointer]).await.expect("list");
            roots.extend(list.into_iter().map(|snapshot| (snapshot.root, snapshot.height)));
        }
    }
    let mut stack = roots;
    while let Some((pointer, level)) = stack.pop() {
        if pointer.is_sparse() || found.insert(key(pointer), level == 0).is_some() || level == 0 {
            continue;
        }
        let node = store.reader().read_nodes(&[pointer]).await.expect("node").remove(0);
        stack.extend(node.children().map(|(_, child)| (child, level - 1)));
    }
    found
}

/// Exactly one thing is damaged; it is whole again afterwards.
async fn finds(world: &World, gba: Gba, spot: u64, part: Part, words: &str) -> Damage {
    world.sim.corrupt(gba.byte_offset() + spot, 0x10);
    let found = full(&world.store).await;
    world.sim.corrupt(gba.byte_offset() + spot, 0x10);
    assert_eq!(found.damage.len(), 1, "{part:?} at {gba}: {found:#?}");
    assert_eq!((found.unverified, found.damage_not_listed), (0, 0), "{part:?}: {found:#?}");
    let damage = found.damage[0].clone();
    assert_eq!(damage.part, part, "{damage:#?}");
    assert!(damage.what.contains(words) && !damage.advice.is_empty(), "{damage:#?}");
    if part != Part::Table {
        assert_eq!(damage.block, Some(gba.0), "{damage:#?}");
    }
    damage
}

#[tokio::test(start_paused = true)]
async fn rot_is_found_in_each_structure_and_named() {
    let mut world = World::new(1).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let store = world.store.clone();
    let some = |from: u64, version| (from..from + 300).map(|lba| write(lba, version)).collect();
    vdi.commit(with_snapshot(1, some(0, 1))).await.expect("commit");
    vdi.commit(with_snapshot(2, some(200, 2))).await.expect("commit");
    let origin = &name;
    store.clone_vdi("clone", origin, Lsn(1), WhenOffline::default()).await.expect("clone");
    let clone = World::attach(&store, "clone").await;
    clone.commit(with_snapshot(1, vec![write(7, 9)])).await.expect("commit");
    vdi.commit(with_snapshot(3, vec![write(210, 3)])).await.expect("commit");

    let sound = full(&store).await;
    assert_eq!((sound.damaged(), sound.unverified, sound.replaced), (0, 0, 0), "{sound:#?}");
    let all = reachable(&store).await;
    let data = all.values().filter(|data| **data).count() as u64;
    assert_eq!(sound.data_blocks, data, "each block is read once, however many share it");
    assert_eq!(sound.metadata_blocks, all.len() as u64 - data);
    assert_eq!((sound.disks, sound.snapshots), (2, 4));

    let g: Geometry = store.superblock().geometry.clone();
    for superblock in g.superblocks() {
        finds(&world, superblock, 100, Part::Table, "superblock").await;
    }
    finds(&world, Gba(g.gc_start), 100, Part::Table, "GC record").await;
    finds(&world, g.host_slot(0), 100, Part::Table, "host record").await;
    let block = vdi.resolve(blockstore::types::Lba(210), 1).await.expect("resolve")[0];
    let extent = g.extent_of(block.gba);
    finds(&world, g.extent_slot(extent), 100, Part::Table, "record of extent").await;
    finds(&world, g.extent_base(extent), 100, Part::Table, "header of extent").await;

    let head = head_of(&store, vdi.uuid()).await;
    let named = |damage: &Damage, snapshot, offset: u64, bytes: u64| {
        assert_eq!(damage.vdi, Some(vdi.uuid()), "{damage:#?}");
        assert_eq!(damage.name.as_ref(), Some(&name), "{damage:#?}");
        assert_eq!(damage.snapshot, snapshot, "{damage:#?}");
        assert_eq!((damage.offset, damage.bytes), (Some(offset), Some(bytes)), "{damage:#?}");
    };
    let name_block = finds(&world, head.meta.gba, SPOT, Part::Name, "name block").await;
    assert_eq!((name_block.vdi, name_block.name), (Some(vdi.uuid()), None));
    let damage = finds(&world, block.gba, SPOT, Part::Data, "damaged on the device").await;
    named(&damage, None, 210 * 4096, 4096);
    // What a snapshot alone holds, and what it shares with the clone: named by the disk that comes first.
    let snapshots = crate::world::list(&store, &name).await;
    let of = |lsn: u64| snapshots.iter().find(|(other, _)| *other == lsn).expect("one").1(&head);
    let reader = store.reader();
    for (lsn, lba) in [(1, 250), (2, 210)] {
        let at = reader.resolve(&of(lsn), blockstore::types::Lba(lba), 1).await.expect("way")[0];
        let damage = finds(&world, at.gba, SPOT, Part::Data, "damaged on the device").await;
        named(&damage, Some(lsn), lba * 4096, 4096);
    }
    let leaf = reader.read_nodes(&[of(1).root]).await.expect("root")[0].get(1);
    let damage = finds(&world, leaf.gba, SPOT, Part::Map, "damaged on the device").await;
    named(&damage, Some(1), 256 * 4096, 256 * 4096);
    let damage = finds(&world, of(2).root.gba, SPOT, Part::Map, "damaged on the device").await;
    named(&damage, Some(2), 0, 16 * MIB);
    let own = clone.resolve(blockstore::types::Lba(7), 1).await.expect("resolve")[0];
    let damage = finds(&world, own.gba, SPOT, Part::Data, "damaged on the device").await;
    assert_eq!((damage.name.as_deref(), damage.offset), (Some("clone"), Some(7 * 4096)));

    // What hides other things: they are not verified, and that is told.
    rot(&world.sim, head.snapshots.root.gba);
    let found = full(&store).await;
    rot(&world.sim, head.snapshots.root.gba);
    assert_eq!(found.damage.len(), 1, "{found:#?}");
    assert_eq!(found.damage[0].part, Part::SnapshotList);
    assert_eq!(found.unverified, 1, "{found:#?}");
    let slot = g.vdi_slot(0);
    world.sim.corrupt(slot.byte_offset() + SPOT, 0x10);
    let found = full(&store).await;
    world.sim.corrupt(slot.byte_offset() + SPOT, 0x10);
    let parts: Vec<Part> = found.damage.iter().map(|damage| damage.part).collect();
    assert_eq!(parts, [Part::Record], "{found:#?}");
    assert_eq!(full(&store).await.damage, [], "all is whole again");
}

/// Single blocks rot in a store with a random past: whatever a root leads to is found, alone.
#[tokio::test(start_paused = true)]
async fn any_block_that_can_be_reached_is_verified() {
    for seed in 100..112 {
        let mut world = World::new(seed).await;
        world.create().await;
        world.steps(60).await;
        let all: Vec<(Key, bool)> = reachable(&world.store).await.into_iter().collect();
        let sound = full(&world.store).await;
        assert_eq!((sound.damaged(), sound.unverified), (0, 0), "seed {seed}: {sound:#?}");
        for _ in 0..12 {
            let Some(((gba, ..), data)) = all.choose(&mut world.rng).copied() else { break };
            rot(&world.sim, gba);
            let found = full(&world.store).await;
            rot(&world.sim, gba);
            // It may be named by several that share it.
            let blocks: BTreeSet<_> = found.damage.iter().map(|damage| damage.block).collect();
            assert_eq!(blocks, [Some(gba.0)].into(), "seed {seed}, data {data}: {found:#?}");
        }
    }
}

/// A scrub that is slow, and cut off now and then, until it is through.
async fn slow(store: Arc<Store>, seed: u64) -> Scrubbed {
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let options = ScrubOptions { rate: Some(3 * MIB) };
    let mut saved = Saved::default();
    loop {
        let progress = ScrubProgress::from(saved);
        let patience = Duration::from_millis(match seed % 2 {
            0 => u64::MAX / 2,
            _ => rng.random_range(20..3000),
        });
        if let Ok(ended) = tokio::time::timeout(patience, scrub(&store, options, &progress)).await {
            return ended.expect("scrub");
        }
        // As a restart of the agent leaves it.
        let text = serde_json::to_string(&progress.kept()).expect("JSON");
        saved = serde_json::from_str(&text).expect("as it was");
    }
}

async fn busy(seed: u64) {
    let mut world = World::new(seed).await;
    for _ in 0..3 {
        world.create().await;
    }
    world.steps(50).await;
    let before = reachable(&world.store).await;
    let data: Vec<Key> = before.iter().filter(|(_, data)| **data).map(|(key, _)| *key).collect();
    let rotten: BTreeSet<Key> = data.choose_multiple(&mut world.rng, 12).copied().collect();
    for (gba, ..) in &rotten {
        rot(&world.sim, *gba);
    }
    let mut scrubbing = tokio::spawn(slow(world.store.clone(), seed));
    let mut held: BTreeSet<Key> = rotten.clone();
    let found = loop {
        let pause = Duration::from_millis(world.rng.random_range(1..60));
        if let Ok(found) = tokio::time::timeout(pause, &mut scrubbing).await {
            break found.expect("no panic");
        }
        match world.rng.random_range(0..40) {
            0 => drop(cycle(&world.store).await),
            1 => drop(unmap(&world.store).await),
            _ => world.steps(1).await,
        }
        if world.rng.random_bool(0.02) {
            settle().await;
        }
    };
    let after = reachable(&world.store).await;
    held.retain(|key| after.contains_key(key));
    let named: BTreeSet<Gba> =
        found.damage.iter().filter_map(|damage| Some(Gba(damage.block?))).collect();
    let all: BTreeSet<Gba> = rotten.iter().map(|(gba, ..)| *gba).collect();
    let missed: Vec<_> = held.iter().filter(|(gba, ..)| !named.contains(gba)).collect();
    assert!(missed.is_empty(), "seed {seed}: missed {missed:?}: {found:#?}");
    let false_alarms: Vec<_> =
        found.damage.iter().filter(|d| !d.block.is_some_and(|b| all.contains(&Gba(b)))).collect();
    assert!(false_alarms.is_empty(), "seed {seed}: {false_alarms:#?}");
    assert_eq!(found.unverified, 0, "seed {seed}: {found:#?}");
    for damage in &found.damage {
        assert_eq!(damage.part, Part::Data, "seed {seed}: {damage:#?}");
    }
}

/// Blocks are freed and used again all the while: no false alarm; what rotted before and is still there afterwards was found.
#[tokio::test(start_paused = true)]
async fn beside_commits_deletions_and_collection_only_damage_is_damage() {
    for seed in 0..32 {
        busy(seed).await;
    }
}

/// A disk of which all snapshots are younger than a scrub takes, as a schedule leaves it.
#[tokio::test(start_paused = true)]
async fn snapshots_that_come_and_go_do_not_keep_it_from_its_end() {
    let mut world = World::new(3).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let all = |version| (0..900).map(|lba| write(lba, version)).collect::<Vec<_>>();
    vdi.commit(with_snapshot(1, all(1))).await.expect("commit");
    let store = world.store.clone();
    let options = ScrubOptions { rate: Some(MIB / 4) };
    let progress = Arc::new(ScrubProgress::default());
    let watched = Arc::clone(&progress);
    let scrubbing =
        tokio::spawn(async move { scrub(&store, options, &watched).await.expect("scrub") });
    let mut lsn = 2;
    while !scrubbing.is_finished() {
        vdi.commit(with_snapshot(lsn, vec![write(lsn % 900, lsn)])).await.expect("commit");
        world.store.delete_snapshots(&name, vec![Lsn(lsn - 1)]).await.expect("delete");
        lsn += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(lsn < 2000, "it does not come to its end: {:#?}", progress.saved());
    }
    let found = scrubbing.await.expect("no panic");
    assert_eq!((found.damaged(), found.unverified), (0, 0), "{found:#?}");
    assert!(found.data_blocks + found.replaced >= 900, "{found:#?}");
    assert!(found.data_blocks < 1800, "nothing is read over and over: {found:#?}");
}

/// While the store is away it waits, says so, and goes on where it was.
#[tokio::test(start_paused = true)]
async fn it_waits_while_the_store_is_away() {
    let mut world = World::new(5).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let all = (0..900).map(|lba| write(lba, 1)).collect::<Vec<_>>();
    vdi.commit(with_snapshot(1, all)).await.expect("commit");
    let sound = full(&world.store).await;
    let progress = Arc::new(ScrubProgress::default());
    let (store, watched) = (world.store.clone(), Arc::clone(&progress));
    let options = ScrubOptions { rate: Some(MIB / 16) };
    let scrubbing =
        tokio::spawn(async move { scrub(&store, options, &watched).await.expect("scrub") });
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(700)).await;
        world.sim.set_reachable(false);
        tokio::time::sleep(Duration::from_secs(300)).await;
        assert!(!scrubbing.is_finished() && progress.waiting().is_some());
        world.sim.set_reachable(true);
        tokio::time::sleep(Duration::from_secs(11)).await;
        assert_eq!(progress.waiting(), None);
    }
    let found = scrubbing.await.expect("no panic");
    assert_eq!((found.damaged(), found.unverified, found.replaced), (0, 0, 0), "{found:#?}");
    assert_eq!(
        (found.data_blocks, found.metadata_blocks),
        (sound.data_blocks, sound.metadata_blocks)
    );
}

/// Faults on the way are no damage: single bits that flip, operations that fail, sessions that end.
#[tokio::test(start_paused = true)]
async fn faults_on_the_way_are_no_damage() {
    for seed in 0..8 {
        let mut world = World::new(seed).await;
        world.create().await;
        world.steps(40).await;
        let (gba, ..) =
            *reachable(&world.store).await.iter().find(|(_, data)| **data).expect("a block").0;
        rot(&world.sim, gba);
        world.sim.set_rates(FaultRates {
            read_garbled: 0.02,
            read_io: 0.03,
            unreachable: 0.02,
            ..FaultRates::default()
        });
        let found = full(&world.store).await;
        world.sim.set_rates(FaultRates::default());
        let blocks: BTreeSet<_> = found.damage.iter().map(|damage| damage.block).collect();
        assert_eq!(blocks, [Some(gba.0)].into(), "seed {seed}: {found:#?}");
        assert_eq!(found.unverified, 0, "seed {seed}: {found:#?}");
    }
}

/// Sectors of tables and of the registry that cannot be read are damage, and hide nothing but what they lead to.
#[tokio::test(start_paused = true)]
async fn bad_sectors_of_tables_hide_no_other_damage() {
    let mut world = World::new(7).await;
    let mut blocks = Vec::new();
    for _ in 0..2 {
        let name = world.create().await;
        let vdi = world.disks[&name].vdi.clone();
        let all = (0..300).map(|lba| write(lba, 1)).collect();
        vdi.commit(with_snapshot(1, all)).await.expect("commit");
        blocks.push(vdi.resolve(blockstore::types::Lba(5), 1).await.expect("resolve")[0].gba);
    }
    let g: Geometry = world.store.superblock().geometry.clone();
    let extent = g.extent_of(blocks[1]);
    let bad = [g.vdi_slot(0), g.extent_slot(extent), g.superblocks()[1], blocks[1]];
    for block in bad {
        world.sim.set_bad(block.byte_offset(), 4096, &[OpKind::Read]);
    }
    rot(&world.sim, Gba(g.gc_start));
    let progress = Arc::new(ScrubProgress::default());
    let (store, watched) = (world.store.clone(), Arc::clone(&progress));
    let began = tokio::time::Instant::now();
    let pass = tokio::spawn(async move { scrub(&store, ScrubOptions::default(), &watched).await });
    while !pass.is_finished() {
        // Whoever asks meanwhile whether the store is there is told that it is.
        let health = world.store.health();
        assert!(health.reachable, "bad sectors are no outage: {health:?}");
        assert_eq!(progress.waiting(), None);
        assert!(began.elapsed() < Duration::from_secs(3600), "it comes to its end");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let found = pass.await.expect("no panic").expect("scrub");
    let has = |part, words: &str| {
        let said = |d: &&Damage| d.part == part && d.what.contains(words);
        assert_eq!(found.damage.iter().filter(said).count(), 1, "{words}: {found:#?}");
    };
    has(Part::Record, "slot 0");
    has(Part::Table, &format!("record of extent {extent}"));
    has(Part::Table, "superblock");
    has(Part::Table, "GC record");
    // Its disk's slot is the second one: the first, which tells an outage from a bad block, is bad itself.
    has(Part::Data, "media error");
    assert!(found.data_blocks >= 299, "{found:#?}");
    rot(&world.sim, Gba(g.gc_start));
    for block in bad {
        world.sim.set_bad(block.byte_offset(), 4096, &[]);
    }
    assert_eq!(full(&world.store).await.damage, [], "all is whole again");
}

/// A closed store ends it.
#[tokio::test(start_paused = true)]
async fn it_ends_when_the_store_closes() {
    let mut world = World::new(6).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let all = (0..900).map(|lba| write(lba, 1)).collect::<Vec<_>>();
    vdi.commit(with_snapshot(1, all)).await.expect("commit");
    let options = ScrubOptions { rate: Some(MIB) };
    let store = world.store.clone();
    let scrubbing =
        tokio::spawn(async move { scrub(&store, options, &ScrubProgress::default()).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    world.store.close().await.expect("close");
    let ended = scrubbing.await.expect("no panic").expect_err("it cannot go on");
    assert_eq!(ended.kind, blockstore::StoreErrorKind::Closing, "{ended}");
}
