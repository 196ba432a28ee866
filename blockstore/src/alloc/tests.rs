//! Goal: the allocator never gives a block out twice, whatever comes between: claims, frees, releases,
//! an orderly close, a crash (INV-ALLOC-1 to 4).
//!
//! Method: random steps against a set of the blocks in use; what is in use stays in use across a
//! crash, as the blocks of committed trees do.

mod bad;
mod thin;
mod waiting;

use super::*;
use crate::device::sim::SimDevice;
use crate::format::extent::ExtentType;
use crate::format::head::Head;
use crate::format::superblock::Superblock;
use crate::store::open::scan_extents;
use crate::testing::{HOST, MIB, format};
use crate::types::BLOCK_SIZE;
use proptest::prelude::*;
use std::collections::BTreeMap;

#[derive(Clone, Debug)]
enum Step {
    Allocate(bool, u64),
    /// Free the blocks at these positions of the used ones.
    Free(Vec<prop::sample::Index>),
    Housekeep,
    Close,
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (any::<bool>(), 1u64..120).prop_map(|(data, n)| Step::Allocate(data, n)),
        4 => prop::collection::vec(any::<prop::sample::Index>(), 1..80).prop_map(Step::Free),
        1 => Just(Step::Housekeep),
        1 => Just(Step::Close),
        1 => Just(Step::Crash),
    ]
}

async fn open(sim: &SimDevice, generation: u64) -> (Io, Arc<Allocator>) {
    open_with(sim, generation, Patience::Limited(Duration::from_millis(100))).await
}

async fn open_with(sim: &SimDevice, generation: u64, patience: Patience) -> (Io, Arc<Allocator>) {
    let io = Io::new(sim.device(), patience);
    let block = sim.peek(0, BLOCK_SIZE);
    let head: Head<Superblock> = Head::decode(&block, Gba(0)).expect("superblock");
    let territory = Territory {
        geometry: head.record.geometry.clone(),
        records: Records { store: head.store, single_host: false, logical_block: 512 },
        host: HOST,
        generation: Generation(generation),
    };
    let catalogue =
        scan_extents(&io, &territory.records, &territory.geometry).await.expect("catalogue");
    let allocator = Allocator::open(&io, territory, catalogue).await.expect("open");
    (io, Arc::new(allocator))
}

async fn run(steps: Vec<Step>, seed: u64) {
    let mut sim = SimDevice::new(8 * MIB, seed);
    format(&sim).await;
    let mut generation = 1;
    let (mut io, mut allocator) = open(&sim, generation).await;
    let mut used: BTreeMap<Gba, ExtentType> = BTreeMap::new();
    for step in steps {
        match step {
            Step::Allocate(data, blocks) => {
                let kind = if data { ExtentType::Data } else { ExtentType::Metadata };
                match allocator.allocate(&io, kind, blocks, Purpose::Normal).await {
                    Ok(runs) => {
                        assert_eq!(runs.iter().map(|r| r.blocks).sum::<u64>(), blocks);
                        for gba in runs.iter().flat_map(|r| r.iter()) {
                            assert!(allocator.territory.geometry.is_allocatable(gba), "{gba}");
                            assert_eq!(used.insert(gba, kind), None, "{gba} was in use");
                        }
                    }
                    Err(error) => assert_eq!(error.kind, StoreErrorKind::NoSpace, "{error}"),
                }
            }
            Step::Free(indexes) => {
                let mut freed = Vec::new();
                for index in indexes {
                    if !used.is_empty() {
                        let gba = *used.keys().nth(index.index(used.len())).expect("in range");
                        used.remove(&gba);
                        freed.push(gba);
                    }
                }
                allocator.free(freed);
            }
            Step::Housekeep => allocator.housekeep(&io).await.expect("housekeeping"),
            Step::Close | Step::Crash => {
                if matches!(step, Step::Close) {
                    allocator.release_all(&io).await.expect("close");
                }
                io.close();
                // A commit's barrier made the claims of what is in use durable before it was linked.
                sim.device().flush().await.expect("flush");
                sim.crash();
                sim = sim.connect();
                generation += 1;
                (io, allocator) = open(&sim, generation).await;
            }
        }
    }
    let kinds: BTreeMap<u32, ExtentType> = used.iter().fold(BTreeMap::new(), |mut map, (g, k)| {
        let extent = allocator.territory.geometry.extent_of(*g);
        assert_eq!(*map.entry(extent).or_insert(*k), *k, "data and metadata in extent {extent}");
        map
    });
    drop(kinds);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn no_block_is_given_out_twice(steps in prop::collection::vec(step(), 1..60), seed: u64) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("runtime");
        runtime.block_on(run(steps, seed));
    }
}

/// After an orderly close everything that is not in use can be allocated again: nothing leaks.
#[tokio::test(start_paused = true)]
async fn an_orderly_close_leaks_nothing() {
    let sim = SimDevice::new(8 * MIB, 1);
    format(&sim).await;
    let everything = async |generation| {
        let (io, allocator) = open(&sim, generation).await;
        let mut total = 0;
        let mut blocks = 64;
        while blocks > 0 {
            match allocator.allocate(&io, ExtentType::Data, blocks, Purpose::Normal).await {
                Ok(runs) => {
                    total += blocks;
                    allocator.put_back(&runs[..0]);
                    std::mem::forget(runs);
                }
                Err(_) => blocks /= 2,
            }
        }
        (io, allocator, total)
    };
    let (io, allocator, first) = everything(1).await;
    // Six extents of the eight hold data: one is the system's, one is for metadata.
    assert_eq!(first, 6 * 253);
    let all: Vec<Gba> = (512..2048).map(Gba).collect();
    let all = all.into_iter().filter(|g| allocator.territory.geometry.is_allocatable(*g));
    allocator.free(all.collect());
    allocator.release_all(&io).await.expect("close");
    let (_, _, second) = everything(2).await;
    assert_eq!(second, first);
}

/// C6: when normal allocations find nothing, work that gives space back still does.
#[tokio::test(start_paused = true)]
async fn a_reserve_of_metadata_is_kept_for_work_that_gives_space_back() {
    let sim = SimDevice::new(8 * MIB, 2);
    format(&sim).await;
    let (io, allocator) = open(&sim, 1).await;
    let take = async |purpose| allocator.allocate(&io, ExtentType::Metadata, 1, purpose).await;
    let mut taken = 0;
    while take(Purpose::Normal).await.is_ok() {
        taken += 1;
    }
    assert!(taken > 1000);
    for _ in 0..8 {
        take(Purpose::GivesBack).await.expect("the reserve");
    }
    assert_eq!(take(Purpose::GivesBack).await.expect_err("empty").kind, StoreErrorKind::NoSpace);
}

/// A claim that a crash cut off is finished by the next opening.
#[tokio::test(start_paused = true)]
async fn a_claim_is_finished_after_a_crash_at_any_point() {
    for n in 0..40 {
        let sim = SimDevice::new(8 * MIB, n);
        format(&sim).await;
        let session = sim.connect();
        session.crash_after(n);
        tokio::select! {
            biased;
            () = session.died() => {}
            () = async {
                let (io, allocator) = open(&session, 1).await;
                let kind = ExtentType::Data;
                allocator.allocate(&io, kind, 10, Purpose::Normal).await.expect("blocks");
            } => {}
        }
        session.crash();
        let (io, allocator) = open(&sim.connect(), 2).await;
        for kind in [ExtentType::Data, ExtentType::Metadata] {
            let runs = allocator.allocate(&io, kind, 300, Purpose::Normal).await;
            assert!(runs.is_ok(), "{n}: {runs:?}");
        }
    }
}
