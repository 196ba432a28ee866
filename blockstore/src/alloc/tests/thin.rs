//! Goal: a thin device that is full, or bad sectors, under extents that are being claimed keep no start waiting, and cost a claim
//! little.
//!
//! Method: as in `bad.rs`; a simulated device that is full takes only what it has.

use super::bad::{allocate, set_bitmap_bad, soon};
use super::waiting::{GIB, large, settle, take};
use super::*;
use crate::alloc::unmap::UnmapOptions;
use crate::device::sim::OpKind;
use crate::slot::Slot;
use crate::{FormatOptions, Store};
use bytes::Bytes;

/// The extents that are nobody's.
fn unused(allocator: &Allocator) -> Vec<u32> {
    let owned = allocator.owned.read();
    let all = 1..allocator.territory.geometry.extent_count;
    all.filter(|number| !owned.contains_key(number)).collect()
}

/// Uses all up that this host has claimed, and no more.
async fn use_up(io: &Io, allocator: &Arc<Allocator>) -> Vec<Gba> {
    let mut blocks = take(io, allocator, 1000).await;
    while allocator.owned.read().len() < 3 {
        blocks.extend(take(io, allocator, 1000).await);
    }
    blocks
}

/// Died with an extent half claimed that the device does not take: the next start gives it back.
#[tokio::test(start_paused = true)]
async fn a_start_does_not_wait_for_an_extent_that_cannot_be_set_up() {
    let (sim, io, allocator) = large(GIB, 1, 0).await;
    use_up(&io, &allocator).await;
    let left = unused(&allocator);
    // The device has the places of their records: as they are if there are none.
    for number in &left {
        let record = vec![Bytes::from(vec![0; BLOCK_SIZE])];
        let place = allocator.territory.geometry.extent_slot(*number);
        io.write(place, record).await.expect("a write");
    }
    io.device().flush().await.expect("flush");
    for is_full in [false, true] {
        let mut unready = 0;
        for operations in 0.. {
            let sim = sim.fork(operations);
            let (io, allocator) = open(&sim, 2).await;
            if is_full {
                sim.set_full(true);
            } else {
                left.iter().for_each(|n| set_bitmap_bad(&sim, &allocator, *n, &[OpKind::Write]));
            }
            sim.crash_after(operations);
            soon("an end", allocator.allocate(&io, ExtentType::Data, 100_000, Purpose::Normal))
                .await
                .expect_err("there is no room");
            let is_over = !sim.is_dead();
            io.close();
            sim.crash();
            let sim = sim.connect();
            let g = &allocator.territory.geometry;
            let records = &allocator.territory.records;
            let io = Io::new(sim.device(), Patience::Forever);
            let mut half = Vec::new();
            for number in &left {
                let slot = Slot { first: g.extent_slot(*number), paired: false };
                let view = records.read::<ExtentRecord>(&io, slot).await.expect("a record");
                half.extend(
                    view.record()
                        .filter(|record| !record.ready && record.owner.is_some())
                        .map(|_| *number),
                );
            }
            unready += half.len();
            let opened = open_with(&sim, 3, Patience::Forever);
            let (io, allocator) = soon("a start", opened).await;
            // What a write that died put on a full device is space that it has.
            let is_own = |number: &u32| allocator.owned.read().contains_key(number);
            assert!(is_full || !half.iter().any(is_own), "{half:?}");
            // They are to be had once the device takes them.
            sim.set_full(false);
            left.iter().for_each(|n| set_bitmap_bad(&sim, &allocator, *n, &[]));
            let many = g.extent_blocks * (left.len() as u64 - 1);
            soon("blocks", allocator.allocate(&io, ExtentType::Data, many, Purpose::Normal))
                .await
                .expect("all are whole");
            if is_over {
                assert!(operations > 5, "{operations}");
                break;
            }
        }
        assert!(unready > 0, "none was half claimed");
    }
}

/// A host without an extent comes up on a thin device that is full, and goes on when that has space.
#[tokio::test(start_paused = true)]
async fn a_host_without_extents_comes_up_on_a_full_device() {
    let sim = SimDevice::new(GIB, 2);
    let format = FormatOptions { extent_size: Some(128 * MIB), ..FormatOptions::default() };
    Store::format(sim.device(), format).await.expect("format");
    sim.set_full(true);
    let (io, allocator) = soon("a start", open_with(&sim, 1, Patience::Forever)).await;
    assert_eq!(allocator.owned.read().len(), 0);
    let of_task = Arc::clone(&allocator);
    let waiting = tokio::spawn(async move {
        of_task.allocate(&io, ExtentType::Metadata, 10, Purpose::Normal).await
    });
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!waiting.is_finished());
    sim.set_full(false);
    soon("space", waiting).await.expect("a task").expect("blocks");
}

/// That a thin device has no space for one extent says enough of all others. What is written to already is found in the end.
#[tokio::test(start_paused = true)]
async fn a_claim_asks_a_full_device_for_few_extents() {
    let (sim, io, allocator) = large(26 * GIB, 3, 0).await;
    use_up(&io, &allocator).await;
    assert!(unused(&allocator).len() > 190);
    sim.set_full(true);
    for _ in 0..3 {
        let before = sim.counts();
        let error = allocate(&io, &allocator, 100_000).await.expect_err("it is full");
        assert_eq!(error.kind, StoreErrorKind::NoSpace, "{error}");
        assert!(error.to_string().contains("full"), "the device is: {error}");
        let swaps = sim.counts().compare_and_writes - before.compare_and_writes;
        assert!(swaps <= 8, "{swaps} compare-and-writes");
        assert!(sim.counts().total() - before.total() < 60);
    }
    // Of one extent all that setting up writes is there: it is in nobody's way that it is one of the last.
    let number = *unused(&allocator).last().expect("extents");
    let g = &allocator.territory.geometry;
    sim.set_full(false);
    let overhead = vec![Bytes::from(vec![0; BLOCK_SIZE]); g.extent_overhead() as usize];
    io.write(g.extent_base(number), overhead).await.expect("a write");
    // Its record, too: as it is if there is none.
    let record = vec![Bytes::from(vec![0; BLOCK_SIZE])];
    io.write(g.extent_slot(number), record).await.expect("a write");
    sim.set_full(true);
    let patient = io.with_patience(Patience::Forever);
    let missing = allocator.pooled().0 + 20_000;
    let runs = allocate(&patient, &allocator, missing).await.expect("blocks");
    assert!(runs.iter().any(|run| g.extent_of(run.start) == number));
    // And all when there is space again.
    sim.set_full(false);
    allocate(&patient, &allocator, 5_000_000).await.expect("blocks");
}

/// Takes all blocks for metadata that a device gives which is full from then on.
async fn use_up_metadata(sim: &SimDevice, io: &Io, allocator: &Arc<Allocator>) {
    sim.set_full(true);
    let mut step = 8192;
    while step > 0 {
        match allocator.allocate(io, ExtentType::Metadata, step, Purpose::GivesBack).await {
            Ok(runs) => allocator.settle(&runs),
            Err(error) => {
                assert_eq!(error.kind, StoreErrorKind::NoSpace, "{error}");
                step /= 2;
            }
        }
    }
}

/// Who waits for space on the device is helped by what is unmapped: it does not keep a pass from that. Nor does it ask the device for more with
/// each block that is freed.
#[tokio::test(start_paused = true)]
async fn free_blocks_are_unmapped_while_a_claim_waits_for_the_device() {
    let (sim, io, allocator) = large(2 * GIB, 4, 0).await;
    let blocks = take(&io, &allocator, 60_000).await;
    // No extent is all free, and could be given to metadata.
    let (used, freed): (Vec<Gba>, Vec<Gba>) =
        blocks.into_iter().partition(|gba| gba.0.is_multiple_of(500));
    allocator.free(freed);
    settle(&io, &allocator).await;
    use_up_metadata(&sim, &io, &allocator).await;
    let (of_task, patient) = (Arc::clone(&allocator), io.with_patience(Patience::Forever));
    let waiting = tokio::spawn(async move {
        of_task.allocate(&patient, ExtentType::Metadata, 10, Purpose::GivesBack).await
    });
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!waiting.is_finished());
    let health = io.health();
    assert_eq!((health.waiting_for_space, health.waiting_for_device_space), (0, 1), "{health:?}");
    assert!(health.last_error.is_some_and(|error| error.contains("full")));

    let before = sim.counts().compare_and_writes;
    for gba in &used[..50] {
        allocator.free(vec![*gba]);
        // All that is woken runs to its end meanwhile.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let swaps = sim.counts().compare_and_writes - before;
    assert!(swaps <= 4, "{swaps} compare-and-writes");
    allocator.unmap(&io, UnmapOptions::default()).await.expect("a pass");
    assert!(allocator.unmapped().blocks > 10_000, "{:?}", allocator.unmapped());
    assert!(!waiting.is_finished());
    sim.set_full(false);
    soon("space", waiting).await.expect("a task").expect("blocks");
    assert!(!io.health().lacks_space());
}

/// An extent that another kind wants, and that is kept as it is the last of its own, is still to be unmapped.
#[tokio::test(start_paused = true)]
async fn an_extent_that_is_not_given_up_after_all_is_unmapped() {
    let (sim, io, allocator) = large(2 * GIB, 5, 0).await;
    // Of each page of its bitmap something is known.
    let blocks = take(&io, &allocator, 10_000).await;
    assert_eq!(allocator.owned.read().values().filter(|k| **k == ExtentType::Data).count(), 1);
    allocator.free(blocks);
    allocator.release_all(&io).await.expect("released");
    use_up_metadata(&sim, &io, &allocator).await;
    allocator.unmap(&io, UnmapOptions::default()).await.expect("a pass");
    assert!(allocator.unmapped().blocks > 9000, "{:?}", allocator.unmapped());
}
