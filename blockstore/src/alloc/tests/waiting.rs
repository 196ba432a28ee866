//! Goal: what waits to be used again (in quarantine, on the way back, being unmapped) is out of nobody's way, and nothing of it is
//! lost or given out early.
//!
//! Method: a store with large extents, of which only bitmaps and records are ever written.

use super::*;
use crate::alloc::unmap::UnmapOptions;
use crate::device::sim::SimOptions;
use crate::{FormatOptions, Store};
use std::collections::BTreeSet;

pub(super) const GIB: u64 = 1 << 30;

/// A store of extents of 128 MiB, each with one bitmap page.
pub(super) async fn large(
    size: u64,
    seed: u64,
    discard_yields_max: u32,
) -> (SimDevice, Io, Arc<Allocator>) {
    let options = SimOptions { discard_yields_max, ..SimOptions::new(size, seed) };
    let sim = SimDevice::with_options(options);
    let format = FormatOptions { extent_size: Some(128 * MIB), ..FormatOptions::default() };
    Store::format(sim.device(), format).await.expect("format");
    let (io, allocator) = open(&sim, 1).await;
    allocator.keep_unmapped(&io, true).await;
    (sim, io, allocator)
}

/// Allocates so many blocks of data, and as many as there are at most.
pub(super) async fn take(io: &Io, allocator: &Arc<Allocator>, mut blocks: u64) -> Vec<Gba> {
    let mut taken = Vec::new();
    let mut step = 8192;
    while blocks > 0 && step > 0 {
        let kind = ExtentType::Data;
        match allocator.allocate(io, kind, step.min(blocks), Purpose::Normal).await {
            Ok(runs) => {
                let runs: Vec<Gba> = runs.iter().flat_map(|run| run.iter()).collect();
                blocks -= runs.len() as u64;
                allocator.settle(&merge(runs.clone()));
                taken.extend(runs);
            }
            Err(error) => {
                assert_eq!(error.kind, StoreErrorKind::NoSpace, "{error}");
                step /= 2;
            }
        }
    }
    taken
}

/// Gives back all that the pool has too much of, as the task of the reclaimer does.
pub(super) async fn settle(io: &Io, allocator: &Arc<Allocator>) {
    while allocator.is_overfull() || allocator.pools.lock().returning.total() > 0 {
        allocator.housekeep(io).await.expect("housekeeping");
    }
}

/// Hundreds of thousands of single blocks that are freed beside a marking do not end it; when it is over they go back in parts, and
/// claims get in between; each is free then, once.
#[tokio::test(start_paused = true)]
async fn what_was_in_quarantine_goes_back_in_parts() {
    let (_, io, allocator) = large(10 * GIB, 1, 0).await;
    let blocks = take(&io, &allocator, 2_000_000).await;
    assert_eq!(blocks.len(), 2_000_000);
    allocator.release_all(&io).await.expect("released");
    allocator.begin_cycle(1).await.expect("begin");
    let (odd, even): (Vec<Gba>, Vec<Gba>) = blocks.into_iter().partition(|gba| gba.0 % 2 == 1);
    for some in odd.chunks(1000) {
        allocator.free(some.to_vec());
    }
    assert_eq!(allocator.quarantined(), odd.len() as u64);
    assert!(odd.len() > 990_000);
    allocator.check_cycle(1).expect("it goes on");
    allocator.end_quarantine(1).expect("it goes on");
    assert_eq!(allocator.quarantined(), 0);
    let going_back = allocator.pools.lock().returning.total();
    let kept = allocator.pools.lock().data.total();
    assert!(kept <= allocator.high_water() / 2, "all of it at once: {kept}");
    assert_eq!(going_back + kept, odd.len() as u64);
    // A cycle that is about to apply what it found is not disturbed.
    allocator.housekeep(&io).await.expect("housekeeping");
    assert_eq!(allocator.pools.lock().returning.total(), going_back);
    allocator.end_cycle(1);

    // Somebody claims while it goes back.
    let (of_task, io_of_task) = (Arc::clone(&allocator), io.clone());
    let housekeeping = tokio::spawn(async move { settle(&io_of_task, &of_task).await });
    let mut left = Vec::new();
    while !housekeeping.is_finished() {
        allocator.refill(&io, ExtentType::Data, 1, Claim::Roomy).await.expect("a claim");
        left.push(allocator.pools.lock().returning.total());
        tokio::task::yield_now().await;
    }
    housekeeping.await.expect("a task");
    let between = left.iter().filter(|left| (1..going_back).contains(*left)).count();
    assert!(between >= 3, "claims come in between: {left:?}");

    // All that is free can be had, and nothing that is in use.
    let even: BTreeSet<Gba> = even.into_iter().collect();
    let mut again = BTreeSet::new();
    for gba in take(&io, &allocator, u64::MAX).await {
        assert!(!even.contains(&gba) && again.insert(gba), "{gba} was in use");
    }
    assert!(odd.iter().all(|gba| again.contains(gba)), "blocks are lost");
}

/// A close, or a death, while blocks go back: what is in use stays so, and the rest is free, or has its bit set and is collected.
#[tokio::test(start_paused = true)]
async fn a_close_or_a_death_on_the_way_back_frees_nothing_in_use() {
    for operations in (0..60).step_by(3) {
        let (sim, io, allocator) = large(2 * GIB, operations, 0).await;
        let blocks = take(&io, &allocator, 300_000).await;
        io.device().flush().await.expect("flush");
        allocator.begin_cycle(1).await.expect("begin");
        let (freed, used): (Vec<Gba>, Vec<Gba>) =
            blocks.into_iter().partition(|gba| gba.0 % 3 == 0);
        allocator.free(freed.clone());
        allocator.end_quarantine(1).expect("it goes on");
        allocator.end_cycle(1);
        sim.crash_after(operations);
        if operations % 2 == 0 {
            tokio::select! {
                biased;
                () = sim.died() => {}
                () = settle(&io, &allocator) => {}
            }
        } else {
            // An orderly close that is cut off.
            tokio::select! {
                biased;
                () = sim.died() => io.close(),
                closed = allocator.release_all(&io) => closed.expect("closed"),
            }
        }
        io.close();
        sim.crash();
        let (io, allocator) = open(&sim.connect(), 2).await;
        let used: BTreeSet<Gba> = used.into_iter().collect();
        let again = take(&io, &allocator, u64::MAX).await;
        assert!(again.iter().all(|gba| !used.contains(gba)), "{operations}: in use");
        // What is set for nothing a cycle finds: it is neither in use nor touched.
        allocator.begin_cycle(2).await.expect("begin");
        let again: BTreeSet<Gba> = again.into_iter().collect();
        let leaked = freed.iter().filter(|gba| !again.contains(gba)).map(|gba| gba.0).collect();
        assert_eq!(allocator.untouched(2, leaked), leaked_of(&freed, &again), "{operations}");
    }
}

fn leaked_of(freed: &[Gba], again: &BTreeSet<Gba>) -> RoaringTreemap {
    freed.iter().filter(|gba| !again.contains(gba)).map(|gba| gba.0).collect()
}

/// A cycle that begins while blocks are on the way back leaves them alone; and they are room for who finds no other.
#[tokio::test(start_paused = true)]
async fn what_is_on_the_way_back_is_touched_and_is_room() {
    let (_, io, allocator) = large(GIB, 3, 0).await;
    let blocks = take(&io, &allocator, u64::MAX).await;
    allocator.begin_cycle(1).await.expect("begin");
    let freed: Vec<Gba> = blocks.iter().copied().filter(|gba| gba.0 % 2 == 0).collect();
    allocator.free(freed.clone());
    allocator.end_quarantine(1).expect("it goes on");
    allocator.end_cycle(1);
    allocator.begin_cycle(2).await.expect("begin");
    let all = || freed.iter().map(|gba| gba.0).collect::<RoaringTreemap>();
    assert!(allocator.untouched(2, all()).is_empty(), "a cycle frees what goes back by itself");
    // Nobody has done the housekeeping.
    let again = take(&io, &allocator, 50_000).await;
    assert_eq!(again.len(), 50_000);
    assert!(again.iter().all(|gba| gba.0 % 2 == 0));
    allocator.check_cycle(2).expect("the cycle is not needed for it");
    // Freed twice: it is not given out twice.
    let going_back = allocator.pools.lock().returning.data.blocks().min().expect("some are left");
    let pooled = allocator.pools.lock().data.total();
    allocator.free(vec![Gba(going_back)]);
    assert_eq!(allocator.quarantined() + allocator.pools.lock().data.total(), pooled);
}

/// The memory of the quarantine has a limit, by bytes.
#[test]
fn a_quarantine_that_takes_too_much_memory_is_lifted() {
    let mut pools = Pools::default();
    let cycle = || Some(Cycle::new(7, RoaringTreemap::new()));
    pools.cycle = cycle();
    let mut blocks = 0;
    // One block in each 65,536: the most that a block can take.
    while !pools.is_quarantine_overfull() {
        let run = Run { start: Gba(blocks << 16), blocks: 1 };
        let quarantine = pools.cycle.as_mut().and_then(Cycle::quarantine).expect("a quarantine");
        quarantine.add(ExtentType::Data, run);
        blocks += 1;
        assert!(blocks < 4_000_000, "no end of it");
    }
    assert!(blocks > 500_000, "{blocks}");
    pools.give_up_cycle();
    assert_eq!(pools.returning.total(), blocks);
    // What still goes back counts.
    pools.cycle = cycle();
    assert!(pools.is_quarantine_overfull());
    let _ = pools.returning.data.take(blocks);
    assert!(!pools.is_quarantine_overfull());
}

/// Free space in large runs, of which nothing was told, and a pass over it that has begun.
async fn unmapping(
    size: u64,
    leave: Option<u64>,
) -> (SimDevice, Io, Arc<Allocator>, tokio::task::JoinHandle<Result<()>>) {
    let (sim, io, allocator) = large(size, 5, 20_000).await;
    let blocks = take(&io, &allocator, leave.map_or(60_000, |_| u64::MAX)).await;
    let freed = leave.map_or(blocks.len(), |leave| leave as usize);
    allocator.free(blocks[blocks.len() - freed..].to_vec());
    settle(&io, &allocator).await;
    let before = sim.counts().discards;
    let (of_task, io_of_task) = (Arc::clone(&allocator), io.clone());
    let passing =
        tokio::spawn(async move { of_task.unmap(&io_of_task, UnmapOptions::default()).await });
    while sim.counts().discards == before {
        assert!(!passing.is_finished(), "nothing to tell");
        tokio::task::yield_now().await;
    }
    (sim, io, allocator, passing)
}

/// A batch is broken off for a close, and for who waits for room: no command more is sent, and what was claimed is given back.
#[tokio::test(start_paused = true)]
async fn a_batch_is_broken_off_for_a_close_and_for_who_waits_for_room() {
    for closes in [true, false] {
        let (sim, io, allocator, passing) = unmapping(2 * GIB, None).await;
        let (begun, held) = (sim.counts().discards, allocator.in_unmapping());
        assert!(held > 8000, "{held}");
        let waiter = (!closes).then(|| io.waiting_for(Lacking::InStore));
        if closes {
            allocator.stop_unmapping(&io).await;
        } else {
            while !passing.is_finished() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        assert_eq!(allocator.in_unmapping(), 0, "all of it is given back");
        assert_eq!(sim.counts().discards, begun, "nothing more is begun");
        passing.await.expect("a task").expect("a pass");
        drop(waiter);
        let unmapped = allocator.unmapped();
        assert!(unmapped.blocks > 0 && unmapped.blocks < held, "{unmapped:?}");
        if !closes {
            // The rest is the next pass's.
            allocator.unmap(&io, UnmapOptions::default()).await.expect("a pass");
            assert!(allocator.unmapped().blocks > held, "{:?}", allocator.unmapped());
        }
    }
}

/// A close does not wait for the rest that the rate demands.
#[tokio::test(start_paused = true)]
async fn a_close_does_not_wait_for_the_rate() {
    let (_, io, allocator) = large(2 * GIB, 6, 0).await;
    let blocks = take(&io, &allocator, 60_000).await;
    allocator.free(blocks);
    settle(&io, &allocator).await;
    let (of_task, io_of_task) = (Arc::clone(&allocator), io.clone());
    let options = UnmapOptions { rate: Some(1024), run_min: None };
    let passing = tokio::spawn(async move { of_task.unmap(&io_of_task, options).await });
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!passing.is_finished() && allocator.unmapped().blocks > 0);
    let stopped = tokio::time::timeout(Duration::from_secs(1), allocator.stop_unmapping(&io));
    stopped.await.expect("at once");
}

/// Where no extent is left for data, though some are kept for metadata, a pass leaves what a commit may need at once.
#[tokio::test(start_paused = true)]
async fn a_pass_never_takes_the_last_free_blocks() {
    let probe = large(2 * GIB, 5, 0).await.2;
    let keep = probe.high_water();
    let (_, io, allocator, passing) = unmapping(2 * GIB, Some(keep + 3000)).await;
    assert!(allocator.in_unmapping() > 0 && allocator.in_unmapping() <= 3000);
    let kind = ExtentType::Data;
    let runs = allocator.allocate(&io, kind, keep, Purpose::Normal).await.expect("no waiting");
    assert!(allocator.in_unmapping() > 0, "it did not wait for the device");
    assert_eq!(runs.iter().map(|run| run.blocks).sum::<u64>(), keep);
    passing.await.expect("a task").expect("a pass");
}
