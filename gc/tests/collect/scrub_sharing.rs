//! A scrub passes over what a clone shares with its source only if it has read that: not where the list of the source's snapshots is
//! damaged, nor if the source's record could not be read when its turn came.

use crate::scrubbing::{full, rot};
use crate::world::{MIB, World, head_of, with_snapshot, write};
use blockstore::device::sim::OpKind;
use blockstore::format::geometry::Geometry;
use blockstore::types::{Gba, Lba, Lsn};
use blockstore::{Store, Vdi, WhenOffline};
use gc::scrub::{Part, Saved};
use gc::{ScrubOptions, ScrubProgress, Scrubbed, scrub};
use std::sync::Arc;
use std::time::Duration;

/// Slow enough for something to happen between two reads.
const RATE: u64 = 256 << 10;

async fn at(vdi: &Vdi, lba: u64) -> Gba {
    vdi.resolve(Lba(lba), 1).await.expect("resolve")[0].gba
}

fn blocks(found: &Scrubbed, part: Part) -> Vec<u64> {
    found.damage.iter().filter(|d| d.part == part).filter_map(|d| d.block).collect()
}

/// A pass until it has come so far; what the next one goes on with, or what it found.
async fn pass_until(
    store: &Arc<Store>,
    saved: Saved,
    reached: impl Fn(&Saved) -> bool,
) -> (Saved, Option<Scrubbed>) {
    let progress = Arc::new(ScrubProgress::from(saved));
    let (store, watched) = (store.clone(), Arc::clone(&progress));
    let options = ScrubOptions { rate: Some(RATE) };
    let pass = tokio::spawn(async move { scrub(&store, options, &watched).await });
    while !pass.is_finished() && !reached(&progress.saved()) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let found = match pass.is_finished() {
        true => Some(pass.await.expect("no panic").expect("scrub")),
        false => {
            pass.abort();
            None
        }
    };
    let text = serde_json::to_string(&progress.kept()).expect("JSON");
    (serde_json::from_str(&text).expect("as it was"), found)
}

fn is_at(disk: &Vdi) -> impl Fn(&Saved) -> bool {
    let uuid = disk.uuid();
    move |saved| saved.position.as_ref().is_some_and(|position| position.disk == uuid)
}

/// A leaf of the list rots; snapshots in leaves before it, clones of them, and what only those hold are read all the same. To find an
/// early snapshot by its LSN, the fourth leaf of five is not read: a clone of it can be compared with it.
#[tokio::test(start_paused = true)]
async fn snapshots_behind_a_damaged_leaf_of_the_list_are_read() {
    let mut world = World::new(1).await;
    let name = world.create().await;
    let (vdi, store) = (world.disks[&name].vdi.clone(), world.store.clone());
    let (mut cloned, mut alone) = (Gba(0), Gba(0));
    for lsn in 1..=160 {
        // Each holds alone what the next one overwrites.
        let batch = with_snapshot(lsn, vec![write(5, lsn), write(300 + lsn % 2, lsn)]);
        vdi.commit(batch).await.expect("commit");
        match lsn {
            10 => cloned = at(&vdi, 5).await,
            20 => alone = at(&vdi, 300).await,
            _ => {}
        }
    }
    vdi.commit(with_snapshot(161, vec![write(5, 161), write(300, 161), write(301, 161)]))
        .await
        .expect("commit");
    store.clone_vdi("clone", &name, Lsn(10), WhenOffline::default()).await.expect("clone");
    let sound = full(&store).await;
    assert_eq!((sound.damaged(), sound.unverified, sound.snapshots), (0, 0, 161), "{sound:#?}");

    let head = head_of(&store, vdi.uuid()).await;
    let nodes = store.reader().read_nodes(&[head.snapshots.root]).await.expect("list");
    let leaf = nodes[0].get(3);
    for gba in [leaf.gba, cloned, alone] {
        rot(&world.sim, gba);
    }
    let found = full(&store).await;
    assert_eq!(blocks(&found, Part::SnapshotList), [leaf.gba.0], "{found:#?}");
    let mut data = blocks(&found, Part::Data);
    data.sort_unstable();
    data.dedup();
    let mut rotten = [cloned.0, alone.0];
    rotten.sort_unstable();
    assert_eq!(data, rotten, "{found:#?}");
    assert_eq!((found.snapshots, found.unverified), (161 - 32, 1), "{found:#?}");
    let words = found.unverified_last.as_deref().unwrap_or_default();
    assert!(words.contains("in places 96 to 127") && words.contains(&name), "{words}");

    rot(&world.sim, leaf.gba);
    let found = full(&store).await;
    assert_eq!((found.snapshots, found.unverified), (161, 0), "{found:#?}");
}

/// A leaf of the list cannot be read in the source's turn, and can in its clone's, which hangs on a snapshot of that leaf.
#[tokio::test(start_paused = true)]
async fn a_clone_of_a_snapshot_that_was_passed_over_is_read() {
    let mut world = World::new(6).await;
    let name = world.create().await;
    let (vdi, store) = (world.disks[&name].vdi.clone(), world.store.clone());
    let mut shared = Gba(0);
    for lsn in 1..=70 {
        vdi.commit(with_snapshot(lsn, vec![write(5, lsn)])).await.expect("commit");
        if lsn == 50 {
            shared = at(&vdi, 5).await;
        }
    }
    store.clone_vdi("clone", &name, Lsn(50), WhenOffline::default()).await.expect("clone");
    let clone = World::attach(&store, "clone").await;
    let head = head_of(&store, vdi.uuid()).await;
    let nodes = store.reader().read_nodes(&[head.snapshots.root]).await.expect("list");
    let leaf = nodes[0].get(1).gba;
    rot(&world.sim, leaf);
    rot(&world.sim, shared);
    let (saved, _) = pass_until(&store, Saved::default(), is_at(&clone)).await;
    assert_eq!(blocks(&saved.scrubbed, Part::Data), [0; 0], "{:#?}", saved.scrubbed);
    rot(&world.sim, leaf);
    let found = pass_until(&store, saved, |_| false).await.1.expect("it came to its end");
    assert_eq!(blocks(&found, Part::Data), [shared.0], "{found:#?}");
    assert_eq!(blocks(&found, Part::SnapshotList), [leaf.0], "{found:#?}");
}

/// A disk that comes first, a source with a snapshot, and a clone of that.
struct Family {
    world: World,
    slots: Vec<Gba>,
    source: Arc<Vdi>,
    clone: Arc<Vdi>,
    /// What only the snapshot and the clone hold.
    shared: Gba,
}

async fn family(seed: u64) -> Family {
    let mut world = World::new(seed).await;
    let mut disks = Vec::new();
    for _ in 0..2 {
        let name = world.create().await;
        let vdi = world.disks[&name].vdi.clone();
        let all = (0..400).map(|lba| write(lba, 1)).collect();
        vdi.commit(with_snapshot(1, all)).await.expect("commit");
        disks.push((name, vdi));
    }
    let (name, source) = disks.remove(1);
    let shared = at(&source, 33).await;
    let all = (0..400).map(|lba| write(lba, 2)).collect();
    source.commit(with_snapshot(2, all)).await.expect("commit");
    let store = world.store.clone();
    store.clone_vdi("clone", &name, Lsn(1), WhenOffline::default()).await.expect("clone");
    let clone = World::attach(&store, "clone").await;
    clone.commit(with_snapshot(1, vec![write(7, 9)])).await.expect("commit");
    let g: Geometry = store.superblock().geometry.clone();
    let slots = (0..3).map(|slot| g.vdi_slot(slot)).collect();
    Family { world, slots, source, clone, shared }
}

impl Family {
    fn set_bad(&self, slot: usize, kinds: &[OpKind]) {
        self.world.sim.set_bad(self.slots[slot].byte_offset(), 4096, kinds);
    }

    /// A pass that is cut off when a disk's turn has come.
    async fn to(&self, disk: &Vdi) -> Saved {
        pass_until(&self.world.store, Saved::default(), is_at(disk)).await.0
    }

    async fn to_its_end(&self, saved: Saved) -> Scrubbed {
        pass_until(&self.world.store, saved, |_| false).await.1.expect("it came to its end")
    }
}

/// The source's record gives errors in its turn, and none in the clone's.
#[tokio::test(start_paused = true)]
async fn a_source_that_was_lost_in_its_turn_hides_nothing_of_its_clones() {
    let family = family(2).await;
    rot(&family.world.sim, family.shared);
    let progress = Arc::new(ScrubProgress::default());
    let (store, watched) = (family.world.store.clone(), Arc::clone(&progress));
    let options = ScrubOptions { rate: Some(RATE) };
    let pass = tokio::spawn(async move { scrub(&store, options, &watched).await });
    let until = async |reached: &dyn Fn(&Saved) -> bool| {
        while !reached(&progress.saved()) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    until(&|saved| saved.position.is_some()).await;
    family.set_bad(1, &[OpKind::Read]);
    until(&|saved| saved.scrubbed.unverified > 0).await;
    family.set_bad(1, &[]);
    let found = pass.await.expect("no panic").expect("scrub");
    assert_eq!(blocks(&found, Part::Record), [family.slots[1].0], "{found:#?}");
    assert_eq!(blocks(&found, Part::Data), [family.shared.0], "{found:#?}");
    assert_eq!(found.disks, 3, "{found:#?}");
}

/// The source's record cannot be read when the order is made; cut off in its clone's turn, the next agent can read it.
#[tokio::test(start_paused = true)]
async fn a_source_that_can_be_read_only_after_a_restart_is_read() {
    let family = family(3).await;
    let own = at(&family.source, 33).await;
    for gba in [family.shared, own] {
        rot(&family.world.sim, gba);
    }
    family.set_bad(1, &[OpKind::Read]);
    let saved = family.to(&family.clone).await;
    family.set_bad(1, &[]);
    let found = family.to_its_end(saved).await;
    let data = blocks(&found, Part::Data);
    assert!(data.contains(&family.shared.0), "what the clone shares with it: {found:#?}");
    assert!(data.contains(&own.0), "what it holds itself: {found:#?}");
    assert_eq!(found.disks, 3, "{found:#?}");
}

/// The source's record cannot be read any more when the order is made anew: the clone's turn is to come, as before.
#[tokio::test(start_paused = true)]
async fn a_clone_is_read_though_its_source_is_lost_after_a_restart() {
    let family = family(4).await;
    let own = at(&family.clone, 7).await;
    rot(&family.world.sim, own);
    let saved = family.to(&family.clone).await;
    family.set_bad(1, &[OpKind::Read]);
    let found = family.to_its_end(saved).await;
    assert_eq!(blocks(&found, Part::Data), [own.0], "{found:#?}");
    assert_eq!(found.disks, 3, "{found:#?}");
}

/// What is shared is read once all the same, cut off or not.
#[tokio::test(start_paused = true)]
async fn what_a_clone_shares_is_read_once_also_after_a_restart() {
    let family = family(5).await;
    let once = full(&family.world.store).await;
    // 400 of the first disk, twice as many of the source, and the clone's own.
    assert_eq!((once.data_blocks, once.damaged()), (3 * 400 + 1, 0), "{once:#?}");
    let saved = family.to(&family.clone).await;
    let found = family.to_its_end(saved).await;
    assert_eq!((found.data_blocks, found.unverified), (once.data_blocks, 0), "{found:#?}");
    assert_eq!((found.disks, found.snapshots), (once.disks, once.snapshots), "{found:#?}");
    assert!(found.read_bytes < 16 * MIB, "{found:#?}");
}
