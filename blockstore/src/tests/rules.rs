//! Goal: the rules for commits (C1, C2, C3, L7) hold. Method: one scenario per rule, built so that
//! the image is wrong, or a wrong answer is given, if the rule is taken out.

use crate::device::sim::{Fault, OpKind, Reach, SimDevice};
use crate::format::head::Head;
use crate::format::vdi::{Owner, VdiHead};
use crate::testing::{
    HOST, MIB, Model, attach, batch, check_blocks, open, sim, stamp, store_with_disk, write, zero,
};
use crate::types::{Gba, Generation, Lba, Lsn};
use crate::{Change, Store, StoreErrorKind, Vdi};
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

fn many(version: u64) -> Vec<Change> {
    (0..300).map(|n| write(n * 13, version)).collect()
}

/// C1: the target restarts between a batch's first write and its flush, and loses what it held.
#[tokio::test(start_paused = true)]
async fn a_restart_before_the_barrier_makes_the_batch_be_written_again() {
    let mut lost = 0;
    for seed in 0..60 {
        let sim = sim(64 * MIB, seed);
        let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
        vdi.commit(batch(1, many(1))).await.expect("commit");
        let (before, flushes) = (sim.counts().writes, sim.counts().flushes);
        let disk = Arc::clone(&vdi);
        let commit = tokio::spawn(async move { disk.commit(batch(2, many(2))).await });
        while sim.counts().writes < before + seed % 12 + 1 || sim.unflushed_count() == 0 {
            tokio::task::yield_now().await;
            if commit.is_finished() {
                break;
            }
        }
        if sim.counts().flushes == flushes || !commit.is_finished() {
            lost += 1;
            sim.lose_session();
        }
        commit.await.expect("runs").expect("commit");
        sim.crash();
        drop((vdi, store));
        let store = open(&sim.connect()).await;
        let mut model = Model::default();
        model.apply(&many(2), 2);
        model.check(&store, "d").await;
        check_blocks(&store).await;
    }
    assert!(lost > 20, "the scenario was met {lost} times only");
}

/// C1, second half: a flush that fails proves nothing, not even when the next one succeeds.
#[tokio::test(start_paused = true)]
async fn a_failed_flush_makes_the_batch_be_written_again() {
    for (skip, seed) in (0..8u64).flat_map(|skip| (0..6).map(move |seed| (skip, seed))) {
        let sim = sim(64 * MIB, seed);
        let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
        sim.inject(OpKind::Flush, skip, Fault::Io);
        vdi.commit(batch(1, many(1))).await.expect("commit");
        vdi.commit(batch(2, many(2))).await.expect("commit");
        sim.crash();
        drop((vdi, store));
        let store = open(&sim.connect()).await;
        let mut model = Model::default();
        model.apply(&many(2), 2);
        model.check(&store, "d").await;
    }
}

/// C2: an unknown outcome of the head's compare-and-write, carried out or not.
#[tokio::test(start_paused = true)]
async fn a_head_of_unknown_outcome_is_settled_by_reading() {
    let faults = [Fault::Unreachable, Fault::Unknown, Fault::UnknownApplied, Fault::Io];
    for (fault, seed) in faults.into_iter().flat_map(|f| (0..8).map(move |seed| (f, seed))) {
        let sim = sim(64 * MIB, seed);
        let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
        let mut model = Model::default();
        for lsn in 1..4 {
            sim.inject(OpKind::CompareAndWrite, 0, fault);
            vdi.commit(batch(lsn, many(lsn))).await.expect("commit");
            model.apply(&many(lsn), lsn);
        }
        sim.crash();
        drop((vdi, store));
        let store = open(&sim.connect()).await;
        model.check(&store, "d").await;
        check_blocks(&store).await;
    }
}

/// Overwrites the disk's head as another incarnation, another host or a restored copy would.
async fn meddle(sim: &SimDevice, store: &Store, change: impl FnOnce(&mut Head<VdiHead>)) {
    let (slot, view) = store.scan_vdis().await.expect("registry").remove(0);
    let address = store.superblock().geometry.vdi_slot(slot);
    let mut head = Head {
        store: store.uuid(),
        sequence: view.sequence(),
        record: view.record().cloned().expect("a head"),
    };
    change(&mut head);
    let block = bytes::Bytes::copy_from_slice(&head.encode_block(address));
    sim.connect().device().write(address.byte_offset(), vec![block]).await.expect("write");
}

async fn committed_twice(sim: &SimDevice) -> (Arc<Store>, Arc<Vdi>) {
    let (store, vdi) = store_with_disk(sim, 16 * MIB).await;
    vdi.commit(batch(1, vec![write(1, 1)])).await.expect("commit");
    vdi.commit(batch(2, vec![write(2, 2)])).await.expect("commit");
    (store, vdi)
}

#[tokio::test(start_paused = true)]
async fn a_lost_disk_is_not_written_any_more() {
    let sim = sim(64 * MIB, 1);
    let (store, vdi) = committed_twice(&sim).await;
    let thief = Uuid::from_u128(0xbad);
    meddle(&sim, &store, |head| {
        head.sequence += 1;
        head.record.owner = Some(Owner { host: thief, generation: Generation(1) });
    })
    .await;
    let error = vdi.commit(batch(3, vec![write(3, 3)])).await.expect_err("lost");
    assert_eq!(error.kind, StoreErrorKind::NotOwner);
    assert!(error.to_string().contains(&thief.to_string()), "{error}");
    let writes = sim.counts().compare_and_writes;
    let error = vdi.detach(Lsn(2)).await.expect_err("lost for good");
    assert_eq!(error.kind, StoreErrorKind::NotOwner);
    assert_eq!(sim.counts().compare_and_writes, writes);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_went_back_in_time_is_refused() {
    let sim = sim(64 * MIB, 2);
    let (store, vdi) = committed_twice(&sim).await;
    meddle(&sim, &store, |head| {
        head.sequence -= 1;
        head.record.committed = Lsn(1);
    })
    .await;
    let error = vdi.commit(batch(3, vec![write(3, 3)])).await.expect_err("rolled back");
    assert_eq!(error.kind, StoreErrorKind::RolledBack);
    assert!(error.to_string().contains("older copy"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_late_head_of_our_own_is_adopted() {
    let sim = sim(64 * MIB, 3);
    let (store, vdi) = committed_twice(&sim).await;
    meddle(&sim, &store, |head| head.sequence += 1).await;
    vdi.commit(batch(3, vec![write(3, 3)])).await.expect("commit");
    let mut model = Model::default();
    for lsn in 1..4 {
        model.apply(&[write(lsn, lsn)], lsn);
    }
    model.check(&store, "d").await;
    check_blocks(&store).await;
}

/// C2: a host that comes back first raises its heads, so that a late command of its former life
/// finds another head than it expects.
#[tokio::test(start_paused = true)]
async fn reopening_raises_every_own_head() {
    let sim = sim(64 * MIB, 4);
    let (store, vdi) = committed_twice(&sim).await;
    let before = store.scan_vdis().await.expect("registry")[0].1.sequence();
    drop((vdi, store));
    sim.kill_host();
    let store = open(&sim.connect()).await;
    let view = store.scan_vdis().await.expect("registry").remove(0).1;
    assert!(view.sequence() > before);
    let owner = view.record().and_then(|head| head.owner).expect("still attached");
    assert_eq!(owner, Owner { host: HOST, generation: Generation(2) });
}

/// L7, C3: readers see one whole version, however much is committed and reused meanwhile.
#[tokio::test(start_paused = true)]
async fn readers_see_one_version_while_blocks_are_reused() {
    for seed in 0..3 {
        let sim = sim(16 * MIB, seed);
        let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
        let all = |version| (0..300).map(|lba| write(lba, version)).collect::<Vec<_>>();
        vdi.commit(batch(1, all(1))).await.expect("commit");
        let mut readers = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let vdi = Arc::clone(&vdi);
            readers.spawn(async move {
                while vdi.committed().lsn < Lsn(20) {
                    let least = vdi.committed().lsn.0;
                    let blocks = vdi.read(Lba(0), 300).await.expect("no block was reused");
                    let version = (least..=20)
                        .find(|v| blocks[0].as_deref() == Some(&stamp(0, *v)[..]))
                        .expect("a version at or after the one committed before the read");
                    for (lba, block) in (0..).zip(&blocks) {
                        assert_eq!(block.as_deref(), Some(&stamp(lba, version)[..]), "block {lba}");
                    }
                }
            });
        }
        for lsn in 2..=20 {
            vdi.commit(batch(lsn, all(lsn))).await.expect("commit");
        }
        while let Some(result) = readers.join_next().await {
            result.expect("reader");
        }
        drop(store);
    }
}

/// L7: an old version stays whole as long as somebody reads it, and is freed after.
#[tokio::test(start_paused = true)]
async fn a_version_that_is_read_is_not_reused_however_many_follow() {
    let sim = sim(64 * MIB, 11);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    let all = |version| (0..300).map(|lba| write(lba, version)).collect::<Vec<_>>();
    vdi.commit(batch(1, all(1))).await.expect("commit");
    let pinned = vdi.inner.root.load_full();
    for lsn in 2..=20 {
        vdi.commit(batch(lsn, all(lsn))).await.expect("commit");
    }
    let pointers = store.reader().resolve(&pinned.head, Lba(0), 300).await.expect("resolve");
    let blocks = store.reader().read_blocks(&pointers).await.expect("the old version is whole");
    assert!((0..).zip(&blocks).all(|(lba, block)| block == &stamp(lba, 1)));
    let held = store.pooled().0;
    drop(pinned);
    assert!(store.pooled().0 >= held + 19 * 300 - 300, "{held} {:?}", store.pooled());
    // Without a reader the same space is used over and over.
    for lsn in 21..=100 {
        vdi.commit(batch(lsn, all(lsn))).await.expect("commit");
    }
    check_blocks(&store).await;
}

/// P5, C4: what was born at or before the last snapshot is not freed when it is replaced.
#[tokio::test(start_paused = true)]
async fn blocks_that_a_snapshot_may_hold_are_left_to_gc() {
    let sim = sim(64 * MIB, 13);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    let all = |version| (0..300).map(|lba| write(lba, version)).collect::<Vec<_>>();
    vdi.commit(batch(1, all(1))).await.expect("commit");
    let snapshot = vdi.inner.root.load().head.clone();
    meddle(&sim, &store, |head| {
        head.sequence += 1;
        head.record.last_snapshot_birth = head.record.birth;
    })
    .await;
    for lsn in 2..=6 {
        vdi.commit(batch(lsn, all(lsn))).await.expect("commit");
    }
    vdi.commit(batch(7, vec![zero(0, 4096)])).await.expect("discard");
    store.reclaimed().await;
    for lsn in 8..=30 {
        vdi.commit(batch(lsn, all(lsn))).await.expect("commit");
    }
    vdi.detach(Lsn(30)).await.expect("detach");
    drop(vdi);
    store.delete_vdi("d").await.expect("delete");
    store.reclaimed().await;
    store.create_vdi("d", 16 * MIB).await.expect("create");
    attach(&store, "d").await.commit(batch(1, all(99))).await.expect("commit");
    let reader = store.reader();
    let pointers = reader.resolve(&snapshot, Lba(0), 300).await.expect("nodes are whole");
    let blocks = reader.read_blocks(&pointers).await.expect("data is whole");
    assert!((0..).zip(&blocks).all(|(lba, block)| block == &stamp(lba, 1)));
}

/// C5: without compare-and-write, an earlier head that lands late does not count.
#[tokio::test(start_paused = true)]
async fn a_late_plain_write_does_not_bring_an_old_head_back() {
    let sim = crate::testing::sim_without_caw(64 * MIB, 12);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    vdi.commit(batch(1, vec![write(1, 1)])).await.expect("commit");
    let sequence = store.scan_vdis().await.expect("registry")[0].1.sequence();
    let slot = store.superblock().geometry.vdi_slot(0);
    let place = slot.plus(sequence % 2).byte_offset();
    let head = sim.peek(place, 4096);
    vdi.commit(batch(2, vec![write(1, 2)])).await.expect("commit");
    assert_eq!(sim.peek(place, 4096), head, "the newest head but one stays until the next commit");
    sim.connect().device().write(place, vec![head.into()]).await.expect("write");
    assert_eq!(store.lookup_vdi("d").await.expect("lookup").committed_lsn, Lsn(2));
}

/// C3: what a commit replaces is not used again before the head that drops it is durable.
#[tokio::test(start_paused = true)]
async fn replaced_blocks_stay_whole_until_the_head_is_durable() {
    let sim = sim(64 * MIB, 5);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    vdi.commit(batch(1, many(1))).await.expect("commit");
    let old = vdi.resolve(Lba(0), 3900).await.expect("resolve");
    let old: Vec<_> = old.into_iter().filter(|p| !p.is_sparse()).collect();
    // The head cannot be written; other disks go on allocating.
    store.create_vdi("other", 16 * MIB).await.expect("create");
    let other = attach(&store, "other").await;
    for _ in 0..20 {
        sim.inject(OpKind::CompareAndWrite, 0, Fault::Unreachable);
    }
    let disk = Arc::clone(&vdi);
    let commit = tokio::spawn(async move { disk.commit(batch(2, many(2))).await });
    let data: Vec<Change> = (0..2000).map(|lba| write(lba, 9)).collect();
    let prepared = other.prepare(batch(1, data)).await.expect("prepare");
    if vdi.committed().lsn == Lsn(1) {
        store.reader().read_blocks(&old).await.expect("the old image is whole");
    }
    commit.await.expect("runs").expect("commit");
    drop(prepared);
}

/// An outage stalls commits and reads, loses nothing, leaks nothing, and ends by itself (P3).
#[tokio::test(start_paused = true)]
async fn an_outage_is_waited_out() {
    for reach in [Reach::Failing, Reach::Hanging] {
        let sim = sim(64 * MIB, 6);
        let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
        vdi.commit(batch(1, many(1))).await.expect("commit");
        let pooled = store.pooled();
        sim.set_reach(reach);
        let disk = Arc::clone(&vdi);
        let commit = tokio::spawn(async move { disk.commit(batch(2, many(2))).await });
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert!(!commit.is_finished());
        if reach == Reach::Failing {
            let health = store.health();
            assert!(!health.reachable && health.last_error.is_some(), "{health:?}");
        }
        let error = store.list_vdis().await.expect_err("control operations do not hang");
        assert_eq!(error.kind, StoreErrorKind::Unreachable, "{error}");
        sim.set_reach(Reach::Up);
        commit.await.expect("runs").expect("commit");
        assert!(store.health().reachable);
        let mut model = Model::default();
        model.apply(&many(2), 2);
        model.check(&store, "d").await;
        vdi.commit(batch(3, many(3))).await.expect("commit");
        let after = store.pooled();
        assert!(after.0 + 700 > pooled.0, "{pooled:?} {after:?}");
        check_blocks(&store).await;
    }
}

/// P7: a rotten block is reported with its address, never returned; a fault on the way is survived.
#[tokio::test(start_paused = true)]
async fn rot_is_reported_and_never_returned() {
    let sim = sim(64 * MIB, 7);
    let (store, vdi) = committed_twice(&sim).await;
    sim.inject(OpKind::Read, 0, Fault::Garbled);
    assert_eq!(vdi.read(Lba(1), 1).await.expect("read again")[0], Some(stamp(1, 1)));
    let pointer = vdi.resolve(Lba(2), 1).await.expect("resolve")[0];
    sim.corrupt(pointer.gba.byte_offset() + 77, 4);
    let error = vdi.read(Lba(1), 2).await.expect_err("rotten");
    assert_eq!(error.kind, StoreErrorKind::Corrupt);
    assert!(error.to_string().contains(&format!("block {}", pointer.gba)), "{error}");
    assert_eq!(vdi.read(Lba(1), 1).await.expect("the others go on")[0], Some(stamp(1, 1)));
    let root = vdi.committed().root;
    assert_ne!(root.gba, Gba(0));
    drop((vdi, store));
    sim.corrupt(root.gba.byte_offset(), 4);
    let store = open(&sim).await;
    let vdi = attach(&store, "d").await;
    assert_eq!(vdi.read(Lba(1), 1).await.expect_err("rotten").kind, StoreErrorKind::Corrupt);
}
