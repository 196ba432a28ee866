//! Sizes are exact: compared with sets of blocks from a full walk of every root, and with what deletions really free.

use crate::world::{MIB, World, cycle, head_of, open, settle, with_snapshot, write};
use blockstore::format::pointer::Pointer;
use blockstore::format::snapshot::Snapshot;
use blockstore::format::vdi::{SnapshotIndex, VdiHead, VdiState};
use blockstore::types::{Gba, Lsn};
use blockstore::{OpenOptions, SnapshotLabel, Store, StoreErrorKind, WhenOffline};
use gc::sizes::{Amount, DiskSizes, RootSizes, StoreSizes};
use gc::{Progress, SizeOptions, Sizes, sizes};
use rand::Rng;
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

const BLOCK: u64 = 4096;

async fn compute(store: &Arc<Store>) -> blockstore::Result<Sizes> {
    sizes(store, SizeOptions::default(), &Progress::default()).await
}

/// Blocks, and whether they are data.
type Blocks = BTreeMap<Gba, bool>;

/// All that a tree holds, by a walk that shares nothing with any other.
async fn tree(store: &Store, root: Pointer, height: u8) -> Blocks {
    let mut found = Blocks::new();
    let mut stack = vec![(root, height)];
    while let Some((pointer, level)) = stack.pop() {
        if pointer.is_sparse() {
            continue;
        }
        found.insert(pointer.gba, level == 0);
        if level > 0 {
            let node = store.reader().read_nodes(&[pointer]).await.expect("a node").remove(0);
            stack.extend(node.children().map(|(_, child)| (child, level - 1)));
        }
    }
    found
}

/// The blocks of a list of snapshots, and the snapshots.
async fn list(store: &Store, index: SnapshotIndex) -> (Blocks, Vec<Snapshot>) {
    let (mut found, mut snapshots) = (Blocks::new(), Vec::new());
    let mut level = vec![index.root];
    level.retain(|pointer| !pointer.is_sparse());
    for height in (1..=index.height).rev() {
        let mut below = Vec::new();
        for pointer in &level {
            found.insert(pointer.gba, false);
            if height > 1 {
                let node = store.reader().read_nodes(&[*pointer]).await.expect("a node").remove(0);
                below.extend(node.children().map(|(_, child)| child));
            }
        }
        if height == 1 {
            snapshots = store.reader().snapshots_of(&level).await.expect("snapshots");
        }
        level = below;
    }
    (found, snapshots)
}

struct Root {
    disk: Uuid,
    snapshot: Option<Lsn>,
    cloned: bool,
    blocks: Blocks,
}

fn amount<'a>(blocks: impl Iterator<Item = (&'a Gba, &'a bool)>) -> Amount {
    let mut amount = Amount::default();
    for (_, data) in blocks {
        *(if *data { &mut amount.data } else { &mut amount.metadata }) += BLOCK;
    }
    amount
}

/// The same figures from sets; what only bitmaps and the allocator know is taken from `computed`.
async fn oracle(store: &Store, computed: &Sizes) -> Sizes {
    let heads: Vec<VdiHead> = store
        .scan_vdis()
        .await
        .expect("heads")
        .iter()
        .filter_map(|v| v.1.record().cloned())
        .collect();
    let heads: Vec<VdiHead> = heads
        .into_iter()
        .filter(|head| matches!(head.state, VdiState::Active | VdiState::Creating))
        .collect();
    let (mut roots, mut lists) = (Vec::new(), BTreeMap::new());
    for head in &heads {
        let blocks = tree(store, head.root, head.height).await;
        roots.push(Root { disk: head.uuid, snapshot: None, cloned: false, blocks });
        let (mut listed, snapshots) = list(store, head.snapshots).await;
        listed.insert(head.meta.gba, false);
        lists.insert(head.uuid, listed);
        for snapshot in snapshots {
            let blocks = tree(store, snapshot.root, snapshot.height).await;
            let origin = |other: &VdiHead| {
                other.origin.is_some_and(|o| o.vdi == head.uuid && o.lsn == snapshot.lsn)
            };
            let cloned = heads.iter().any(origin);
            roots.push(Root { disk: head.uuid, snapshot: Some(snapshot.lsn), cloned, blocks });
        }
    }
    let holders = |gba: &Gba| roots.iter().filter(|root| root.blocks.contains_key(gba)).count();
    let sizes_of = |root: &Root| RootSizes {
        referenced: amount(root.blocks.iter()),
        exclusive: amount(root.blocks.iter().filter(|(gba, _)| holders(gba) == 1)),
    };
    let union = |wanted: &dyn Fn(&Root) -> bool| -> Blocks {
        let wanted = roots.iter().filter(|root| wanted(root));
        wanted.flat_map(|root| root.blocks.iter().map(|(gba, data)| (*gba, *data))).collect()
    };
    let mut disks = Vec::new();
    for head in &heads {
        let own = union(&|root| root.disk == head.uuid);
        let others = union(&|root| root.disk != head.uuid);
        let stays = |root: &Root| root.snapshot.is_none() || root.cloned;
        let stays = union(&|root| root.disk == head.uuid && stays(root));
        let alone: Blocks = own.into_iter().filter(|(gba, _)| !others.contains_key(gba)).collect();
        let mut disk = DiskSizes {
            uuid: head.uuid,
            sizes: RootSizes::default(),
            snapshots_free: amount(alone.iter().filter(|(gba, _)| !stays.contains_key(gba))),
            deletion_frees: amount(alone.iter()),
            lists: amount(lists[&head.uuid].iter()),
            snapshots: Vec::new(),
        };
        disk.deletion_frees += disk.lists;
        for root in roots.iter().filter(|root| root.disk == head.uuid) {
            match root.snapshot {
                None => disk.sizes = sizes_of(root),
                Some(lsn) => disk.snapshots.push(gc::sizes::SnapshotSizes {
                    lsn,
                    cloned: root.cloned,
                    sizes: sizes_of(root),
                }),
            }
        }
        disks.push(disk);
    }
    let (all, present) = (union(&|_| true), union(&|root| root.snapshot.is_none()));
    let kept = union(&|root| root.cloned);
    let beside = |gba: &Gba| !present.contains_key(gba);
    let mut of_lists = Amount::default();
    for list in lists.values() {
        of_lists += amount(list.iter());
    }
    let with_lists = |mut amount: Amount| {
        amount += of_lists;
        amount
    };
    let store = StoreSizes {
        reachable: with_lists(amount(all.iter())),
        shared: amount(all.iter().filter(|(gba, _)| holders(gba) > 1)),
        exclusive: with_lists(amount(all.iter().filter(|(gba, _)| holders(gba) == 1))),
        present: with_lists(amount(present.iter())),
        snapshots: amount(all.iter().filter(|(gba, _)| beside(gba))),
        clone_sources: amount(kept.iter().filter(|(gba, _)| beside(gba))),
        provisioned: heads.iter().map(|head| head.size_bytes).sum(),
        ..computed.store
    };
    Sizes { store, disks, nodes: computed.nodes }
}

async fn exact(store: &Arc<Store>, when: &str) -> Sizes {
    let computed = compute(store).await.unwrap_or_else(|error| panic!("{when}: {error}"));
    let expected = oracle(store, &computed).await;
    for (found, expected) in computed.disks.iter().zip(&expected.disks) {
        assert_eq!(found, expected, "{when}: disk {}", expected.uuid);
    }
    assert_eq!(computed, expected, "{when}");
    let used = computed.store.used.total();
    let parts = [computed.store.reachable, computed.store.reclaimable, computed.store.in_hand];
    assert_eq!(parts.iter().map(|part| part.total()).sum::<u64>(), used, "{when}: it adds up");
    computed
}

/// Blocks in use, in bytes, when nothing is garbage: what is allocated and not in the pool.
async fn in_use(store: &Arc<Store>) -> Amount {
    for _ in 0..2 {
        store.reclaimed().await;
        cycle(store).await.expect("cycle");
    }
    settle().await;
    let (info, pooled) = (store.info().await.expect("info"), store.pooled());
    Amount {
        data: (info.data_blocks_allocated - pooled.0) * BLOCK,
        metadata: (info.metadata_blocks_allocated - pooled.1) * BLOCK,
    }
}

fn disk_of(sizes: &Sizes, uuid: Uuid) -> &DiskSizes {
    sizes.disks.iter().find(|disk| disk.uuid == uuid).expect("the disk")
}

/// Deletes something, and compares what that freed with what was foretold.
async fn delete_and_compare(world: &mut World, when: &str) {
    let before = in_use(&world.store).await;
    let foretold = exact(&world.store, when).await;
    assert_eq!(before, foretold.store.reachable, "{when}: what is in use is reachable");
    let index = world.rng.random_range(0..world.disks.len());
    let Some(name) = world.disks.keys().nth(index).cloned() else { return };
    let uuid = world.disks[&name].vdi.uuid();
    let disk = disk_of(&foretold, uuid);
    let free: Vec<_> = disk.snapshots.iter().filter(|snapshot| !snapshot.cloned).collect();
    let what = world.rng.random_range(0..3);
    if what == 0 && free.len() == disk.snapshots.len() {
        let gone = world.disks.remove(&name).expect("the disk");
        gone.vdi.detach(Lsn(gone.lsn)).await.expect("detach");
        world.store.delete_vdi_and_snapshots(&name).await.expect("delete");
        let freed = before - in_use(&world.store).await;
        assert_eq!(freed, disk.deletion_frees, "{when}: deleting disk {name}");
    } else if what == 1 && !free.is_empty() {
        let all: Vec<Lsn> = free.iter().map(|snapshot| snapshot.lsn).collect();
        world.store.delete_snapshots(&name, all).await.expect("delete");
        let kept: Vec<u64> = disk.snapshots.iter().filter(|s| s.cloned).map(|s| s.lsn.0).collect();
        let known = world.disks.get_mut(&name).expect("the disk");
        known.snapshots.retain(|lsn, _| kept.contains(lsn));
        let after = in_use(&world.store).await;
        let now = exact(&world.store, when).await;
        let mut freed = disk.snapshots_free;
        freed += disk.lists - disk_of(&now, uuid).lists;
        assert_eq!(before - after, freed, "{when}: deleting the snapshots of {name}");
    } else if !free.is_empty() {
        let snapshot = free[world.rng.random_range(0..free.len())];
        world.store.delete_snapshots(&name, vec![snapshot.lsn]).await.expect("delete");
        world.disks.get_mut(&name).expect("the disk").snapshots.remove(&snapshot.lsn.0);
        let after = in_use(&world.store).await;
        let now = exact(&world.store, when).await;
        let mut freed = snapshot.sizes.exclusive;
        freed += disk.lists - disk_of(&now, uuid).lists;
        assert_eq!(before - after, freed, "{when}: deleting {name}@{}", snapshot.lsn);
    }
}

/// Grows a disk, so that trees of several heights share nodes.
async fn grow(world: &mut World) {
    let index = world.rng.random_range(0..world.disks.len());
    let Some(name) = world.disks.keys().nth(index).cloned() else { return };
    world.store.resize_vdi(&name, 300 * MIB).await.expect("resize");
}

/// Takes a disk back to one of its snapshots; what it was stays as a snapshot.
async fn rewind(world: &mut World) {
    let index = world.rng.random_range(0..world.disks.len());
    let Some(name) = world.disks.keys().nth(index).cloned() else { return };
    let Some((&to, content)) = world.disks[&name].snapshots.iter().next() else { return };
    let content = content.clone();
    let mut disk = world.disks.remove(&name).expect("the disk");
    disk.vdi.detach(Lsn(disk.lsn)).await.expect("detach");
    let label = Some(SnapshotLabel::default());
    let rewound = world.store.rewind_vdi(&name, Lsn(to), label).await.expect("rewind");
    if let Some(kept) = rewound.kept {
        disk.snapshots.insert(kept.0, std::mem::take(&mut disk.content));
    }
    disk.content = content;
    disk.vdi = World::attach(&world.store, &name).await;
    disk.lsn = disk.vdi.committed().lsn.0;
    world.disks.insert(name, disk);
}

async fn history(seed: u64) {
    let mut world = World::new(seed).await;
    world.create().await;
    for round in 0..8 {
        let when = format!("seed {seed}, round {round}");
        let count = world.rng.random_range(1..25);
        world.steps(count).await;
        if world.disks.is_empty() {
            world.create().await;
        }
        match world.rng.random_range(0..8) {
            0 => {
                let orderly = world.rng.random();
                world.reopen(orderly).await;
            }
            1 => grow(&mut world).await,
            2 | 3 => rewind(&mut world).await,
            _ => {}
        }
        world.store.reclaimed().await;
        let found = exact(&world.store, &when).await;
        let reclaimed = cycle(&world.store).await.expect("cycle").reclaimed;
        let garbage = (found.store.reclaimable.data, found.store.reclaimable.metadata);
        assert_eq!(
            (reclaimed.data * BLOCK, reclaimed.metadata * BLOCK),
            garbage,
            "{when}: what a cycle gives back"
        );
        delete_and_compare(&mut world, &when).await;
        world.verify(&when).await;
    }
}

#[tokio::test(start_paused = true)]
async fn figures_are_those_of_full_walks_and_deletions_free_what_they_say() {
    for seed in 0..40 {
        history(seed).await;
    }
}

/// Writes, snapshots and deletions go on while sizes are computed: the walk finds no node that was used again. It may be given up if
/// the space in quarantine is needed, and says so.
#[tokio::test(start_paused = true)]
async fn what_is_walked_is_not_used_again_meanwhile() {
    let mut computed = 0;
    for seed in 100..130 {
        let mut world = World::new(seed).await;
        world.create().await;
        world.steps(40).await;
        for round in 0..4 {
            let store = world.store.clone();
            let (outcome, ()) = tokio::join!(compute(&store), world.steps(12));
            match outcome {
                Ok(sizes) => {
                    let in_parts = sizes.store.present.total() + sizes.store.snapshots.total();
                    assert_eq!(in_parts, sizes.store.reachable.total());
                    computed += 1;
                }
                Err(error) => assert_eq!(error.kind, StoreErrorKind::NoSpace, "{error}"),
            }
            world.verify(&format!("seed {seed}, round {round}")).await;
        }
    }
    assert!(computed > 60, "{computed}");
}

/// A disk with a snapshot and a clone of it.
async fn with_clone(seed: u64) -> (World, String) {
    let mut world = World::new(seed).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let first = (0..600).map(|lba| write(lba, 1)).collect();
    vdi.commit(with_snapshot(1, first)).await.expect("commit");
    let second = (0..10).map(|lba| write(lba, 2)).collect();
    vdi.commit(with_snapshot(2, second)).await.expect("commit");
    let policy = WhenOffline::default();
    world.store.clone_vdi("clone", &name, Lsn(1), policy).await.expect("clone");
    (world, name)
}

/// Figures that can be followed by hand.
#[tokio::test(start_paused = true)]
async fn a_snapshot_a_clone_and_what_they_share() {
    let (world, name) = with_clone(41).await;
    let sizes = exact(&world.store, "by hand").await;
    let disk = disk_of(&sizes, world.disks[&name].vdi.uuid());
    let blocks =
        |data: u64, metadata: u64| Amount { data: data * BLOCK, metadata: metadata * BLOCK };
    // A root and three leaves over 600 blocks. The second state shares all but ten blocks, a leaf and the root.
    assert_eq!(disk.sizes.referenced, blocks(600, 4));
    assert_eq!(disk.sizes.exclusive, blocks(0, 0), "the second snapshot is the disk as it is");
    assert_eq!(disk.snapshots[1].sizes.referenced, blocks(600, 4));
    assert_eq!(disk.snapshots[0].sizes.exclusive, blocks(0, 0), "the clone has it all");
    assert_eq!((disk.snapshots[0].cloned, disk.snapshots[1].cloned), (true, false));
    // The rewritten blocks, their leaf, the root; its name and the list of its snapshots.
    assert_eq!(disk.deletion_frees, blocks(10, 4));
    assert_eq!(sizes.store.shared, blocks(610, 6));
    assert_eq!(sizes.store.clone_sources, blocks(0, 0), "the clone, as it is, has it as well");
    assert_eq!(sizes.store.provisioned, 2 * 16 * MIB);
}

#[tokio::test(start_paused = true)]
async fn a_cycle_and_a_walk_wait_for_each_other() {
    let (world, _) = with_clone(42).await;
    let walk = world.store.begin_walk().await.expect("a walk");
    let refused = cycle(&world.store).await.expect_err("a walk is under way");
    assert!(
        refused.kind == StoreErrorKind::InUse && refused.to_string().contains("sizes"),
        "{refused}"
    );
    drop(walk);
    let cycle_under_way = world.store.begin_collection().await.expect("a cycle");
    let refused = compute(&world.store).await.expect_err("a cycle is under way");
    assert!(
        refused.kind == StoreErrorKind::InUse && refused.to_string().contains("cycle"),
        "{refused}"
    );
    drop(cycle_under_way);
    compute(&world.store).await.expect("nothing is under way");
}

/// Dropped at any moment, it leaves nothing behind that would keep the next from beginning, and wrote nothing.
#[tokio::test(start_paused = true)]
async fn it_can_be_given_up_at_any_moment() {
    let (world, _) = with_clone(43).await;
    let before = world.sim.written_blocks();
    let mut polls = 0;
    loop {
        let mut computing = Box::pin(compute(&world.store));
        let mut done = false;
        for _ in 0..polls {
            tokio::select! {
                biased;
                outcome = &mut computing => {
                    outcome.expect("sizes");
                    done = true;
                    break;
                }
                () = tokio::task::yield_now() => {}
            }
        }
        drop(computing);
        if done {
            break;
        }
        polls += 1;
        if polls > 200 {
            // The device takes its time: let that pass, too.
            settle().await;
            compute(&world.store).await.expect("sizes");
            break;
        }
    }
    assert_eq!(world.sim.written_blocks(), before);
}

#[tokio::test(start_paused = true)]
async fn damage_is_named_by_its_block() {
    let (world, name) = with_clone(44).await;
    let head = head_of(&world.store, world.disks[&name].vdi.uuid()).await;
    world.store.close().await.expect("close");
    let places = [head.root, head.snapshots.root];
    for (sim, pointer) in places.map(|pointer| (world.sim.connect(), pointer)) {
        sim.corrupt(pointer.gba.byte_offset() + 9, 1);
        for writable in [true, false] {
            let store = match writable {
                true => open(&sim).await,
                false => Store::open(sim.device(), OpenOptions::read_only()).await.expect("open"),
            };
            let error = compute(&store).await.expect_err("damage");
            assert_eq!(error.kind, StoreErrorKind::Corrupt, "{error}");
            let (words, block) = (error.to_string(), format!("block {}", pointer.gba));
            assert!(words.contains(&block) && words.contains(&head.uuid.to_string()), "{words}");
            store.close().await.expect("close");
        }
        sim.corrupt(pointer.gba.byte_offset() + 9, 1);
    }
    let sim = world.sim.connect();
    let store = Store::open(sim.device(), OpenOptions::read_only()).await.expect("open");
    let slot = store.superblock().geometry.vdi_slot(0).byte_offset();
    sim.corrupt(slot + 60, 1);
    let error = compute(&store).await.expect_err("damage");
    assert!(
        error.kind == StoreErrorKind::Damaged && error.to_string().contains("slot 0"),
        "{error}"
    );
}

/// Read beside another process, figures of a store that changes meanwhile are not given out.
#[tokio::test(start_paused = true)]
async fn beside_another_process_a_change_is_noticed() {
    let (world, name) = with_clone(45).await;
    let reading =
        Store::open(world.sim.connect().device(), OpenOptions::read_only()).await.expect("open");
    let own = exact(&world.store, "own").await;
    let looked = compute(&reading).await.expect("nothing changes");
    assert_eq!((&looked.disks, looked.store.reachable), (&own.disks, own.store.reachable));
    let vdi = world.disks[&name].vdi.clone();
    let commits = async {
        let mut lsn = 3;
        loop {
            vdi.commit(with_snapshot(lsn, vec![write(lsn % 900, lsn)])).await.expect("commit");
            lsn += 1;
        }
    };
    let error = tokio::select! {
        outcome = compute(&reading) => outcome.expect_err("it changes all the time"),
        () = commits => unreachable!(),
    };
    assert!(
        error.kind == StoreErrorKind::Changed && error.to_string().contains("vdi tree"),
        "{error}"
    );
}
