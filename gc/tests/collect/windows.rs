//! Marking in windows: with memory for the bits of a few extents, or of one, a cycle frees what it frees with plenty.

use crate::world::{World, cycle, cycle_in, open, settle, with_snapshot, write};
use blockstore::format::bitmap::BitmapKind;
use blockstore::types::Lsn;
use blockstore::{Batch, Store};
use gc::{CollectOptions, MEMORY_DEFAULT, Progress, collect};
use std::sync::Arc;
use std::time::Duration;

/// Bytes of bits of an extent of 1 MiB.
const EXTENT_BITS: u64 = 32;
/// What lists take at least; the rest is for bits.
const LISTS: u64 = 5 * 2 * 64 * 256 * 16;

/// All bitmaps of the store, as they are on the device.
async fn bitmaps(store: &Arc<Store>) -> Vec<Vec<u64>> {
    let g = store.reader().geometry().clone();
    let mut all = Vec::new();
    for extent in 1..g.extent_count {
        let pages = store.read_bitmap(BitmapKind::Allocation, extent).await.expect("a bitmap");
        let words = |page: &blockstore::format::bitmap::BitmapPage| {
            (0..g.extent_blocks).step_by(64).map(|first| page.word(first)).collect::<Vec<_>>()
        };
        all.push(pages.iter().flatten().flat_map(words).collect());
    }
    all
}

/// The same store, collected with memory for any number of extents: what is reached, what is freed, and the bitmaps are the
/// same, and the bits take no more than the memory, or than those of the metadata, twice, and of one extent.
#[tokio::test(start_paused = true)]
async fn windows_free_what_one_window_frees() {
    let mut passes_max = 0;
    for seed in 0..12 {
        let mut world = World::new(seed).await;
        for _ in 0..3 {
            world.create().await;
        }
        world.steps(120).await;
        world.store.reclaimed().await;
        world.store.close().await.expect("close");
        let mut expected = None;
        for extents in [None, Some(0), Some(1), Some(3), Some(5), Some(8), Some(13), Some(40)] {
            // The same bytes for each.
            let store = open(&world.sim.fork(7)).await;
            settle().await;
            let memory = extents.map_or(MEMORY_DEFAULT, |extents| LISTS + extents * EXTENT_BITS);
            let when = format!("seed {seed}, memory for {extents:?} extents");
            let collected = cycle_in(&store, memory).await.expect(&when);
            settle().await;
            let found = (collected.reclaimed, collected.blocks_reachable, bitmaps(&store).await);
            match &expected {
                None => {
                    assert_eq!(collected.passes, 1);
                    assert!(collected.reclaimed.data > 0, "{when}: no garbage");
                    expected = Some(found);
                }
                Some(expected) => assert!(*expected == found, "{when}: {collected:?}"),
            }
            if let Some(extents) = extents {
                let kinds = store.scan_extents().await.expect("the catalogue");
                let is_metadata = |kind| kind == blockstore::format::extent::ExtentType::Metadata;
                let records = kinds.iter().filter_map(|view| view.record());
                let metadata = records.filter(|record| is_metadata(record.kind)).count() as u64;
                let most = extents.max(2 * metadata + 1) * EXTENT_BITS;
                assert!(collected.bits_bytes <= most, "{when}: {collected:?}");
            }
            passes_max = passes_max.max(collected.passes);
            store.close().await.expect("close");
        }
    }
    assert!(passes_max > 5, "{passes_max}");
}

/// What is freed and written anew while later passes walk the trees of before.
#[tokio::test(start_paused = true)]
async fn later_passes_walk_what_the_first_walked() {
    let mut world = World::new(51).await;
    let name = world.create().await;
    let vdi = world.disks[&name].vdi.clone();
    let all = |version| (0..1500).map(|lba| write(lba, version)).collect::<Vec<_>>();
    vdi.commit(with_snapshot(1, all(1))).await.expect("commit");
    vdi.commit(Batch::new(Lsn(2), all(2))).await.expect("commit");
    world.store.delete_snapshots(&name, vec![Lsn(1)]).await.expect("delete");
    // Each pass reads some ten nodes, a tenth of a second each.
    let slow = CollectOptions { rate: Some(40 << 10), memory: 0, ..CollectOptions::default() };
    let progress = Progress::default();
    let store = world.store.clone();
    let overwrite = async {
        for lsn in 3..40 {
            vdi.commit(Batch::new(Lsn(lsn), all(lsn)[..300].to_vec())).await.expect("commit");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    };
    let (outcome, ()) = tokio::join!(collect(&store, slow, &progress), overwrite);
    let collected = outcome.expect("cycle");
    assert!(collected.passes >= 5, "{collected:?}");
    assert_eq!(collected.reclaimed.data, 1500, "{collected:?}");
    let disk = world.disks.get_mut(&name).expect("disk");
    disk.content = (0..1500).map(|lba| (lba, if lba < 300 { 39 } else { 2 })).collect();
    world.verify("after many passes").await;
    assert_eq!(cycle(&world.store).await.expect("cycle").passes, 1);
}
