//! Sectors that a scrub meets and the device does not give: single ones and whole regions, with an error, or by dropping the session.
//! A pass comes to its end, asks for each a few times only, calls nothing damaged for which there was no answer, and no passing outage a
//! bad sector.

use crate::scrubbing::{full, rot};
use crate::world::{MIB, World, head_of, list, with_snapshot, write};
use blockstore::Vdi;
use blockstore::WhenOffline;
use blockstore::device::sim::{OpKind, SimDevice};
use blockstore::types::{Gba, Lba, Lsn};
use gc::scrub::Part;
use gc::{ScrubOptions, ScrubProgress, Scrubbed, scrub};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const READS: &[OpKind] = &[OpKind::Read];

/// Reads that touched a block.
fn asked_for(sim: &SimDevice, block: Gba) -> usize {
    let at = block.byte_offset();
    let touches = |offset: u64, len: u64| offset <= at && at < offset + len;
    let trace = sim.trace();
    trace.iter().filter(|e| e.kind == OpKind::Read && touches(e.offset, e.len)).count()
}

/// What a pass found, in less than an hour of the device's time.
async fn soon(what: &str, pass: impl Future<Output = Scrubbed>) -> Scrubbed {
    let hour = Duration::from_secs(3600);
    tokio::time::timeout(hour, pass).await.unwrap_or_else(|_| panic!("{what}: it does not end"))
}

fn said(found: &Scrubbed) -> &str {
    found.unverified_last.as_deref().unwrap_or_default()
}

/// A disk with five leaves of snapshots, and a clone of one in the fourth.
async fn listed(seed: u64) -> (World, Arc<Vdi>, Gba) {
    let mut world = World::new(seed).await;
    let name = world.create().await;
    let (vdi, store) = (world.disks[&name].vdi.clone(), world.store.clone());
    let all = (0..600).map(|lba| write(lba, 1)).collect();
    vdi.commit(with_snapshot(1, all)).await.expect("commit");
    for lsn in 2..=160 {
        let batch = with_snapshot(lsn, vec![write(5, lsn), write(300 + lsn % 2, lsn)]);
        vdi.commit(batch).await.expect("commit");
    }
    store.clone_vdi("clone", &name, Lsn(100), WhenOffline::default()).await.expect("clone");
    let head = head_of(&store, vdi.uuid()).await;
    let list = store.reader().read_nodes(&[head.snapshots.root]).await.expect("list");
    (world, vdi, list[0].get(3).gba)
}

/// To find a snapshot by its LSN, leaves all over the list are read.
#[tokio::test(start_paused = true)]
async fn a_leaf_of_a_list_that_does_not_answer_is_not_verified() {
    let (world, _, leaf) = listed(1).await;
    world.sim.set_dropping(leaf.byte_offset(), 4096, READS);
    let found = soon("a leaf", full(&world.store)).await;
    assert_eq!(found.damage, [], "{found:#?}");
    assert!(found.unverified > 0 && said(&found).contains("in places 96 to 127"), "{found:#?}");
    assert_eq!((found.disks, found.snapshots), (2, 160 - 32), "{found:#?}");
    world.sim.set_dropping(leaf.byte_offset(), 4096, &[]);
    let found = full(&world.store).await;
    assert_eq!((found.damaged(), found.unverified, found.snapshots), (0, 0, 160), "{found:#?}");
}

/// Rot in the disk and in each snapshot: each second look needs the list, and the leaf is asked for no more often.
#[tokio::test(start_paused = true)]
async fn a_leaf_that_does_not_answer_is_asked_for_a_few_times_in_a_pass() {
    let (world, vdi, leaf) = listed(2).await;
    let found = vdi.resolve(Lba(100), 30).await.expect("resolve");
    let of_disk: Vec<Gba> = found.iter().map(|pointer| pointer.gba).collect();
    let mut rotten = of_disk.clone();
    let head = head_of(&world.store, vdi.uuid()).await;
    for (_, as_head) in list(&world.store, world.disks.keys().next().expect("a disk")).await {
        // What the next one overwrites, this one holds alone.
        let found = world.store.reader().resolve(&as_head(&head), Lba(5), 1).await;
        rotten.push(found.expect("resolve")[0].gba);
    }
    rotten.iter().for_each(|gba| rot(&world.sim, *gba));
    world.sim.set_dropping(leaf.byte_offset(), 4096, READS);
    let began = Instant::now();
    let found = soon("a leaf", full(&world.store)).await;
    let named: Vec<Gba> = found.damage.iter().filter_map(|d| Some(Gba(d.block?))).collect();
    assert!(named.iter().all(|gba| rotten.contains(gba)), "{found:#?}");
    assert!(of_disk.iter().all(|gba| named.contains(gba)), "{found:#?}");
    assert!(found.unverified > 0, "{found:#?}");
    let asked = asked_for(&world.sim, leaf);
    // The store asks ten times or so each time that it is asked to.
    assert!(asked < 700, "{asked} times");
    assert!(began.elapsed() < Duration::from_secs(600), "{:?}", began.elapsed());
}

/// Whatever it is that does not answer, nothing is called damaged, and the pass ends. What is asked for to find out about an outage is
/// among it.
#[tokio::test(start_paused = true)]
async fn no_sector_that_does_not_answer_keeps_a_pass_from_its_end() {
    let mut world = World::new(3).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let all = (0..300).map(|lba| write(lba, 1)).collect();
    vdi.commit(with_snapshot(1, all)).await.expect("commit");
    vdi.commit(with_snapshot(2, vec![write(7, 2)])).await.expect("commit");
    world.create().await;
    let head = head_of(&world.store, vdi.uuid()).await;
    let data = vdi.resolve(Lba(99), 1).await.expect("resolve")[0].gba;
    let g = world.store.superblock().geometry.clone();
    let [superblock, copy] = g.superblocks();
    for (what, block, words) in [
        ("superblock", superblock, "tables"),
        ("its copy", copy, "tables"),
        ("GC record", Gba(g.gc_start), "tables"),
        ("record of an extent", g.extent_slot(g.extent_of(data)), "tables"),
        ("first record", g.vdi_slot(0), "record in slot 0"),
        ("second record", g.vdi_slot(1), "record in slot 1"),
        ("name", head.meta.gba, "VDI 'unnamed'"),
        ("list", head.snapshots.root.gba, "its list"),
        ("map", head.root.gba, "bytes from offset 0"),
        ("data", data, "4096 bytes from offset 405504"),
    ] {
        world.sim.set_dropping(block.byte_offset(), 4096, READS);
        let found = soon(what, full(&world.store)).await;
        assert_eq!(found.damage, [], "{what}: {found:#?}");
        assert!((1..=3).contains(&found.unverified), "{what}: {found:#?}");
        assert!(said(&found).contains(words), "{what}: {found:#?}");
        world.sim.set_dropping(block.byte_offset(), 4096, &[]);
    }
    let found = full(&world.store).await;
    assert_eq!((found.damaged(), found.unverified, found.disks), (0, 0, 2), "{found:#?}");
}

/// A disk of 600 blocks, and 64 of them that lie in a row.
async fn region(seed: u64) -> (World, Vec<Gba>) {
    let mut world = World::new(seed).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let all = (0..600).map(|lba| write(lba, 1)).collect();
    vdi.commit(with_snapshot(1, all)).await.expect("commit");
    let found = vdi.resolve(Lba(100), 64).await.expect("resolve");
    let blocks: Vec<Gba> = found.iter().map(|pointer| pointer.gba).collect();
    assert!(blocks.windows(2).all(|pair| pair[1].0 == pair[0].0 + 1), "{blocks:?}");
    (world, blocks)
}

/// Each block of a region by itself, at the pace of the first one, would keep a pass for days.
#[tokio::test(start_paused = true)]
async fn a_bad_region_is_gone_through_quickly() {
    let (world, blocks) = region(4).await;
    world.sim.set_bad(blocks[0].byte_offset(), 64 * 4096, READS);
    let began = Instant::now();
    let found = soon("a region", full(&world.store)).await;
    let named: Vec<u64> = found.damage.iter().filter_map(|damage| damage.block).collect();
    assert_eq!(named, blocks.iter().map(|gba| gba.0).collect::<Vec<_>>(), "{found:#?}");
    assert!(found.damage.iter().all(|damage| damage.part == Part::Data), "{found:#?}");
    assert_eq!((found.data_blocks, found.unverified), (600 - 64, 0), "{found:#?}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    // A batch, and a block in its midst: three times, by itself, and in its second look.
    let asked = asked_for(&world.sim, blocks[32]);
    assert!(asked <= 5, "{asked} times");
}

/// Where the session is dropped, most of a region is not asked for at all.
#[tokio::test(start_paused = true)]
async fn a_region_that_does_not_answer_costs_few_sessions() {
    let (world, blocks) = region(5).await;
    world.sim.set_dropping(blocks[0].byte_offset(), 64 * 4096, READS);
    let found = soon("a region", full(&world.store)).await;
    assert_eq!(found.damage, [], "{found:#?}");
    // Behind it, no more than what was to be read together.
    assert!((64..=256).contains(&found.unverified), "{found:#?}");
    assert_eq!(found.data_blocks + found.unverified, 600, "{found:#?}");
    let dropped = |entry: &&blockstore::device::sim::TraceEntry| entry.error.is_some();
    let sessions = world.sim.trace().iter().filter(dropped).count();
    assert!(sessions < 300, "{sessions} sessions");
}

/// A region that gives errors for some seconds is not damaged.
#[tokio::test(start_paused = true)]
async fn a_region_that_recovers_is_not_damaged() {
    for millis in [300, 900, 1400, 1900, 2400, 2900] {
        let (world, blocks) = region(6).await;
        world.sim.set_bad(blocks[0].byte_offset(), 64 * 4096, READS);
        let store = world.store.clone();
        let pass = tokio::spawn(async move { full(&store).await });
        tokio::time::sleep(Duration::from_millis(millis)).await;
        world.sim.set_bad(blocks[0].byte_offset(), 64 * 4096, &[]);
        let found = soon("a region", async { pass.await.expect("no panic") }).await;
        assert_eq!(found.damage, [], "{millis} ms: {found:#?}");
        assert_eq!((found.data_blocks, found.unverified), (600, 0), "{millis} ms: {found:#?}");
    }
}

/// A device that gives nothing but errors is waited for, as one that is away.
#[tokio::test(start_paused = true)]
async fn a_device_that_gives_only_errors_is_waited_for() {
    let (world, _) = region(7).await;
    let all = world.sim.capacity();
    // From its beginning, amid the tables and the registry, and amid the disk's blocks.
    for millis in [0, 2500, 5000] {
        let progress = Arc::new(ScrubProgress::default());
        let (store, watched) = (world.store.clone(), Arc::clone(&progress));
        let options = ScrubOptions { rate: Some(MIB / 8) };
        let until = Instant::now() + Duration::from_millis(millis);
        if millis == 0 {
            world.sim.set_bad(0, all, READS);
        }
        let pass =
            tokio::spawn(async move { scrub(&store, options, &watched).await.expect("scrub") });
        tokio::time::sleep_until(until).await;
        world.sim.set_bad(0, all, READS);
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert!(!pass.is_finished() && progress.waiting().is_some(), "{millis} ms");
        world.sim.set_bad(0, all, &[]);
        let found = soon("a pass", async { pass.await.expect("no panic") }).await;
        assert_eq!((found.damaged(), found.unverified), (0, 0), "{millis} ms: {found:#?}");
        assert_eq!(found.data_blocks, 600, "{millis} ms: {found:#?}");
        assert_eq!(progress.waiting(), None);
    }
}
