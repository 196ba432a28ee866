//! Goal: bad sectors under bitmaps and extents' records keep nobody from blocks elsewhere, and a device that refuses everything is
//! neither taken for that nor for a full store. Nobody waits for either with the lock of the bitmaps.
//!
//! Method: as in `waiting.rs`; the simulated device refuses operations on single blocks, or on all, until it is told otherwise.

use super::waiting::{GIB, large, settle, take};
use super::*;
use crate::alloc::pages::LOADED_MAX;
use crate::alloc::unmap::UnmapOptions;
use crate::device::sim::OpKind;
use crate::format::bitmap::{BitmapKind, BitmapPage, PAGE_BITS};
use crate::slot::{Slot, Swap};
use crate::{FormatOptions, Store};
use bytes::Bytes;

/// In hours of the device's time: what waits for a bad sector waits for ever.
pub(super) async fn soon<T>(what: &str, done: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(3600), done).await.expect(what)
}

/// Extents of 2 GiB, with 17 pages of bitmap each.
async fn huge(size: u64, seed: u64) -> (SimDevice, Io, Arc<Allocator>) {
    let sim = SimDevice::new(size, seed);
    let format = FormatOptions { extent_size: Some(2 * GIB), ..FormatOptions::default() };
    Store::format(sim.device(), format).await.expect("format");
    let (io, allocator) = open(&sim, 1).await;
    (sim, io, allocator)
}

/// Makes all pages of an extent's bitmap bad.
pub(super) fn set_bitmap_bad(
    sim: &SimDevice,
    allocator: &Allocator,
    extent: u32,
    kinds: &[OpKind],
) {
    let g = &allocator.territory.geometry;
    let len = u64::from(g.bmap_pages()) * BLOCK_SIZE as u64;
    sim.set_bad(g.bmap_page(extent, 0).byte_offset(), len, kinds);
}

/// Data extents, in order.
fn of_data(allocator: &Allocator) -> Vec<u32> {
    let owned = allocator.owned.read();
    let data = owned.iter().filter(|(_, kind)| **kind == ExtentType::Data);
    let mut numbers: Vec<u32> = data.map(|(&number, _)| number).collect();
    numbers.sort_unstable();
    numbers
}

pub(super) async fn allocate(io: &Io, allocator: &Arc<Allocator>, blocks: u64) -> Result<Vec<Run>> {
    let kind = ExtentType::Data;
    soon("blocks", allocator.allocate(io, kind, blocks, Purpose::Normal)).await
}

/// The same allocator after a restart of the agent that let all that it had claimed go.
async fn reopen(
    sim: &SimDevice,
    io: &Io,
    allocator: &Allocator,
) -> (SimDevice, Io, Arc<Allocator>) {
    allocator.release_all(io).await.expect("close");
    io.device().flush().await.expect("flush");
    let sim = sim.connect();
    let (io, allocator) = open(&sim, 2).await;
    (sim, io, allocator)
}

fn assert_healthy(io: &Io) {
    let health = io.health();
    assert!(
        health.reachable && health.last_error.is_none(),
        "bad sectors are no outage: {health:?}"
    );
}

/// A whole bitmap that cannot be written, of an extent from which a claim would take first, and little room elsewhere: that is given
/// out, and then it is said that there is no more.
#[tokio::test(start_paused = true)]
async fn a_claim_takes_what_is_elsewhere_however_many_pages_are_bad() {
    let (sim, io, allocator) = huge(10 * GIB, 1).await;
    let blocks = take(&io, &allocator, u64::MAX).await;
    let data = of_data(&allocator);
    let (bad, good) = (data[0], *data.last().expect("extents"));
    let base = |extent| allocator.territory.geometry.extent_base(extent).0;
    // A claim would want all of it at once: 400 blocks of each page of the one, and 2000 of the other.
    let freed = |gba: &Gba| match allocator.territory.geometry.extent_of(*gba) {
        extent if extent == bad => {
            (gba.0 - base(bad)) % 32_000 > 31_600 || gba.0 - base(bad) > 523_800
        }
        extent if extent == good => gba.0 >= base(good) + 520_000 && gba.0 < base(good) + 522_000,
        _ => false,
    };
    let (freed, used): (Vec<Gba>, Vec<Gba>) = blocks.into_iter().partition(freed);
    allocator.free(freed.clone());
    let (sim, io, allocator) = reopen(&sim, &io, &allocator).await;
    set_bitmap_bad(&sim, &allocator, bad, &[OpKind::Write]);

    let runs = allocate(&io, &allocator, 300).await.expect("there is room");
    let given = runs.iter().flat_map(|run| run.iter());
    assert!(given.into_iter().all(|gba| allocator.territory.geometry.extent_of(gba) == good));
    // What is given back meanwhile lies in pages that are bad, too.
    allocator.free(used[..100_000].to_vec());
    soon("what is freed", settle(&io, &allocator)).await;
    let (of_task, io_of_task) = (Arc::clone(&allocator), io.clone());
    let rest = take(&io_of_task, &of_task, u64::MAX);
    let rest = soon("all that there is", rest).await.len() as u64;
    assert!(rest >= 1700, "{rest}");
    let error = allocate(&io, &allocator, 5000).await.expect_err("there is no more");
    assert_eq!(error.kind, StoreErrorKind::NoSpace, "{error}");
    assert!(error.to_string().contains("left out"), "some of it is free: {error}");
    assert_healthy(&io);

    // Once they are whole they are found so.
    set_bitmap_bad(&sim, &allocator, bad, &[]);
    allocate(&io, &allocator, 5000).await.expect("there is room");
    assert_healthy(&io);
}

/// Bad pages that a claim meets one after the other, each of which alone has what it wants: it goes on to unused extents.
#[tokio::test(start_paused = true)]
async fn bad_pages_in_a_row_are_not_taken_for_the_device() {
    let (sim, io, allocator) = huge(16 * GIB, 2).await;
    let mut blocks = Vec::new();
    while blocks.len() < 500_000 {
        let runs = allocate(&io, &allocator, LARGE - 1).await.expect("blocks");
        blocks.extend(runs.iter().flat_map(|run| run.iter()));
    }
    let bad = of_data(&allocator);
    assert_eq!(bad.len(), 1, "{bad:?}");
    // Their pages stay in memory.
    allocator.free(blocks.into_iter().filter(|gba| gba.0 % 2 == 0).collect());
    allocator.release_all(&io).await.expect("released");
    set_bitmap_bad(&sim, &allocator, bad[0], &[OpKind::Write]);
    allocate(&io, &allocator, 100).await.expect("there are extents");
    assert_eq!(of_data(&allocator).len(), 2, "of an unused one");
    assert_healthy(&io);
}

/// A device that takes reads, or compare-and-writes, too, and refuses all writes for a while: it is waited for, and said to be what
/// is waited for, however few extents there are. Nothing else waits meanwhile.
#[tokio::test(start_paused = true)]
async fn a_device_that_refuses_all_writes_is_no_full_store() {
    let refused = [
        &[OpKind::Write][..],
        &[OpKind::Write, OpKind::CompareAndWrite],
        &[OpKind::Write, OpKind::CompareAndWrite, OpKind::Read],
    ];
    for (seed, refused) in (3..).zip(refused) {
        let (sim, io, allocator) = large(GIB, seed, 0).await;
        let blocks = take(&io, &allocator, u64::MAX).await;
        assert!(of_data(&allocator).len() < 8, "as many refusals do not come together");
        allocator.free(blocks.iter().copied().filter(|gba| gba.0 % 3 == 0).collect());
        let (sim, io, allocator) = reopen(&sim, &io, &allocator).await;
        sim.set_bad(0, GIB, refused);

        let patient = io.with_patience(Patience::Forever);
        let (of_task, io_of_task) = (Arc::clone(&allocator), patient.clone());
        let waiting = tokio::spawn(async move {
            let kind = ExtentType::Data;
            of_task.allocate(&io_of_task, kind, 1000, Purpose::Normal).await
        });
        for _ in 0..600 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let health = io.health();
            assert_eq!(health.waiting_for_space, 0, "{refused:?}: the store is not full");
        }
        assert!(!waiting.is_finished());
        assert!(io.health().last_error.is_some_and(|error| error.contains("media error")));
        // Who does not wait for ever is told.
        let error = allocate(&io, &allocator, 1000).await.expect_err("nothing is taken");
        assert_eq!(error.kind, StoreErrorKind::Device, "{refused:?}: {error}");
        assert!(error.to_string().contains("see to it"), "{error}");
        // The lock is nobody's meanwhile.
        allocator.free(blocks.iter().copied().filter(|gba| gba.0 % 3 == 1).take(100).collect());
        soon("a cycle", allocator.begin_cycle(1)).await.expect("begin");
        allocator.end_cycle(1);

        sim.set_bad(0, GIB, &[]);
        let runs = soon("it goes on", waiting).await.expect("a task").expect("blocks");
        assert_eq!(runs.iter().map(|run| run.blocks).sum::<u64>(), 1000);
        // All of it can be had: nothing is bad.
        let rest = take(&io, &allocator, u64::MAX).await.len();
        assert!(rest as u64 + 1000 >= blocks.len() as u64 / 3, "{refused:?}: {rest}");
    }
}

/// All of this host's extents have bad bitmaps, and of the unused ones some cannot be set up: those are given back, and one that can is
/// taken.
#[tokio::test(start_paused = true)]
async fn an_unused_extent_that_cannot_be_set_up_is_passed_over() {
    let (sim, io, allocator) = large(2 * GIB, 9, 0).await;
    let blocks = take(&io, &allocator, 1000).await;
    let g = allocator.territory.geometry.clone();
    let own: Vec<u32> = allocator.owned.read().keys().copied().collect();
    assert_eq!(own.len(), 2, "{own:?}");
    allocator.free(blocks);
    allocator.release_all(&io).await.expect("released");
    let unused: Vec<u32> = (1..g.extent_count).filter(|number| !own.contains(number)).collect();
    let (bad, good) = unused.split_at(unused.len() - 1);
    assert!(bad.len() > 9, "{bad:?}");
    for extent in own.iter().chain(bad) {
        set_bitmap_bad(&sim, &allocator, *extent, &[OpKind::Write]);
    }
    let patient = io.with_patience(Patience::Forever);
    let runs = allocate(&patient, &allocator, 100).await.expect("there is one");
    assert_eq!(g.extent_of(runs[0].start), good[0]);
    for extent in bad {
        let slot = Slot { first: g.extent_slot(*extent), paired: false };
        let view = allocator.territory.records.read::<ExtentRecord>(&io, slot).await.expect("it");
        assert!(view.record().is_none_or(|record| record.owner.is_none()), "{extent}: {view:?}");
    }
    // Whole again, they are used like all others.
    for extent in own.iter().chain(bad) {
        set_bitmap_bad(&sim, &allocator, *extent, &[]);
    }
    let most = g.extent_blocks * u64::from(g.extent_count - 3);
    assert!(take(&io, &allocator, u64::MAX).await.len() as u64 > most);
}

/// What is kept for metadata is an extent that can be had.
#[tokio::test(start_paused = true)]
async fn a_bad_extent_is_not_what_data_leaves_for_metadata() {
    let (sim, io, allocator) = large(9 * GIB, 6, 0).await;
    let extents = allocator.territory.geometry.extent_count;
    assert!(extents > 64, "one more for metadata is to be kept");
    let slot = allocator.territory.geometry.extent_slot(extents - 2);
    sim.set_bad(slot.byte_offset(), BLOCK_SIZE as u64, &[OpKind::CompareAndWrite]);
    take(&io, &allocator, u64::MAX).await;
    assert_eq!(of_data(&allocator).len() as u32, extents - 4, "all but these two");
    let kind = ExtentType::Metadata;
    let more = allocator.territory.geometry.extent_blocks + 100;
    allocator.allocate(&io, kind, more, Purpose::Normal).await.expect("it was kept");
}

/// A change of an extent's record that was reported as failed, and had landed: the next claim goes on from it.
#[tokio::test(start_paused = true)]
async fn an_own_record_that_changed_unseen_is_taken_up_at_once() {
    let (sim, io, allocator) = large(GIB, 7, 0).await;
    let blocks = take(&io, &allocator, 1000).await;
    let extent = of_data(&allocator)[0];
    allocator.free(blocks);
    let (sim, io, allocator) = reopen(&sim, &io, &allocator).await;
    let (territory, slot) = (
        &allocator.territory,
        Slot { first: allocator.territory.geometry.extent_slot(extent), paired: false },
    );
    let view = territory.records.read::<ExtentRecord>(&io, slot).await.expect("the record");
    let record = view.record().expect("an own one").clone();
    let landed = ExtentRecord { sweep_epoch: 5, owner_generation: Generation(2), ..record.clone() };
    let swap = territory.records.swap(&io, &view, landed).await.expect("a swap");
    let Swap::Done(view) = swap else { panic!("{swap:?}") };
    let runs = allocate(&io, &allocator, 10).await.expect("blocks");
    assert_eq!(territory.geometry.extent_of(runs[0].start), extent);
    // That of a later incarnation is not gone on from, however often that is tried: it has the extent now.
    allocator.release_all(&io).await.expect("close");
    let (io, other) = open(&sim.connect(), 3).await;
    let territory = &other.territory;
    let view = territory.records.read::<ExtentRecord>(&io, view.slot).await.expect("the record");
    let next = ExtentRecord { owner_generation: Generation(4), ..record };
    territory.records.swap(&io, &view, next).await.expect("a swap");
    for _ in 0..2 {
        let error = allocate(&io, &other, 10).await.expect_err("a later one has it");
        assert_eq!(error.kind, StoreErrorKind::InUse, "{error}");
    }
}

/// A pass over a full store, in which there is no room for it, keeps no more pages in memory than claims do.
#[tokio::test(start_paused = true)]
async fn a_pass_without_room_keeps_few_pages() {
    let (sim, io, allocator) = large(10 * GIB, 8, 0).await;
    let blocks = take(&io, &allocator, u64::MAX).await;
    allocator.free(blocks.iter().copied().filter(|gba| gba.0 % 32_768 == 20_000).collect());
    let (_sim, io, allocator) = reopen(&sim, &io, &allocator).await;
    assert!(of_data(&allocator).len() > LOADED_MAX);
    allocator.unmap(&io, UnmapOptions::default()).await.expect("a pass");
    let loaded = allocator.pages.lock().await.loaded_count();
    assert!(loaded <= LOADED_MAX, "{loaded}");
}

/// Many bad pages in a store without room elsewhere: a claim, which holds the lock, tries some of them again, in turn; the one that is
/// whole is found.
#[tokio::test(start_paused = true)]
async fn a_claim_tries_few_bad_pages_again() {
    let (sim, io, allocator) = huge(10 * GIB, 9).await;
    let blocks = take(&io, &allocator, u64::MAX).await;
    let g = allocator.territory.geometry.clone();
    // Some of each page.
    let freed = |gba: &Gba| gba.0 % g.extent_blocks % PAGE_BITS < 100;
    allocator.free(blocks.into_iter().filter(freed).collect());
    let (sim, io, allocator) = reopen(&sim, &io, &allocator).await;
    let data = of_data(&allocator);
    data.iter().for_each(|extent| set_bitmap_bad(&sim, &allocator, *extent, &[OpKind::Write]));
    let pages = data.len() as u64 * u64::from(g.bmap_pages());
    assert!(pages > 50, "{pages}");
    allocate(&io, &allocator, 10).await.expect_err("all are bad");
    for _ in 0..3 {
        let before = sim.counts().writes;
        let claim = Claim::Missing(Purpose::Normal);
        allocator.refill(&io, ExtentType::Data, 10, claim).await.expect("a claim");
        let writes = sim.counts().writes - before;
        assert!(writes < 24, "{writes} for {pages} pages");
    }
    // The last one is whole again.
    let last = *data.last().expect("extents");
    set_bitmap_bad(&sim, &allocator, last, &[]);
    let rest = g.bmap_page(last, 0).byte_offset();
    let len = u64::from(g.bmap_pages() - 2) * BLOCK_SIZE as u64;
    sim.set_bad(rest, len, &[OpKind::Write]);
    let patient = io.with_patience(Patience::Forever);
    let runs = allocate(&patient, &allocator, 10).await.expect("there is room");
    assert_eq!(g.extent_of(runs[0].start), last);
}

/// An own extent's record that rotted since the agent began: claims take blocks elsewhere.
#[tokio::test(start_paused = true)]
async fn an_own_record_that_rots_is_passed_over() {
    let (sim, io, allocator) = large(GIB, 10, 0).await;
    let blocks = take(&io, &allocator, 60_000).await;
    let data = of_data(&allocator);
    assert!(data.len() > 1, "{data:?}");
    let g = allocator.territory.geometry.clone();
    allocator.free(blocks.into_iter().filter(|gba| gba.0 % 2 == 0).collect());
    let (sim, io, allocator) = reopen(&sim, &io, &allocator).await;
    sim.corrupt(g.extent_slot(data[0]).byte_offset() + 40, 0x10);
    for _ in 0..2 {
        let runs = allocate(&io, &allocator, 6000).await.expect("there is room elsewhere");
        assert!(runs.iter().all(|run| g.extent_of(run.start) != data[0]), "{runs:?}");
    }
}

/// A change of an extent's record that was reported as failed, and had landed: the leader of a cycle has seen it, and this host looks
/// anew. The next cycle frees what is garbage there.
#[tokio::test(start_paused = true)]
async fn a_cycle_that_knows_a_later_record_has_it_looked_at() {
    let (_sim, io, allocator) = large(GIB, 11, 0).await;
    take(&io, &allocator, 1000).await;
    let extent = of_data(&allocator)[0];
    let g = allocator.territory.geometry.clone();
    let records = &allocator.territory.records;
    let slot = Slot { first: g.extent_slot(extent), paired: false };
    let view = records.read::<ExtentRecord>(&io, slot).await.expect("the record");
    let record = view.record().expect("an own one").clone();
    let swap = records.swap(&io, &view, record.clone()).await.expect("a swap");
    let Swap::Done(view) = swap else { panic!("{swap:?}") };
    let mut freed = Vec::new();
    for epoch in 1..=2 {
        allocator.begin_cycle(epoch).await.expect("begin");
        allocator.end_quarantine(epoch).expect("it goes on");
        let mut garbage = BitmapPage::clear().with_sequence(epoch);
        (0..g.page_bits(0)).for_each(|bit| garbage.set(bit, true));
        garbage.gc_epoch = epoch;
        garbage.extent_sequence = view.sequence();
        garbage.owner_generation = record.owner_generation.0;
        let address = g.reclaim_page(extent, 0);
        let page = garbage.encode(BitmapKind::Reclaim, records.store, address);
        io.write(address, vec![Bytes::from(page)]).await.expect("a write");
        let mut outcome = allocator.apply(&io, vec![extent], epoch).await.expect("applied");
        freed.push(outcome.remove(0).expect("an extent"));
        allocator.end_cycle(epoch);
    }
    assert_eq!(freed[0], 0, "it is not known for which record that was");
    assert!(freed[1] >= 1000, "{freed:?}");
}

/// What is freed needs no bitmap: who waits for a device that refuses these has it at once.
#[tokio::test(start_paused = true)]
async fn what_is_freed_is_had_at_once_from_a_device_that_refuses_all() {
    let (sim, io, allocator) = large(GIB, 12, 0).await;
    let blocks = take(&io, &allocator, u64::MAX).await;
    let (free, blocks): (Vec<Gba>, Vec<Gba>) = blocks.into_iter().partition(|gba| gba.0 % 3 == 0);
    allocator.free(free);
    allocator.release_all(&io).await.expect("released");
    sim.set_bad(0, GIB, &[OpKind::Write, OpKind::CompareAndWrite]);
    let patient = io.with_patience(Patience::Forever);
    let of_task = Arc::clone(&allocator);
    let waiting = tokio::spawn(async move {
        of_task.allocate(&patient, ExtentType::Data, 100, Purpose::Normal).await
    });
    // Its pauses are long by now.
    tokio::time::sleep(Duration::from_secs(602)).await;
    assert!(!waiting.is_finished());
    allocator.free(blocks[..50].to_vec());
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert!(!waiting.is_finished());
    allocator.free(blocks[50..100].to_vec());
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert!(waiting.is_finished(), "it listens to what is freed");
    waiting.await.expect("a task").expect("blocks");
}
