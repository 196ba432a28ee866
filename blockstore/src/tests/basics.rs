//! Goal: what the store's public functions promise, without faults. Method: one scenario each.

use crate::testing::{
    HOST, LOG, MIB, Model, attach, batch, format, host, open, sim, sim_without_caw,
    store_with_disk, write, zero,
};
use crate::types::{Lba, Lsn};
use crate::{
    AttachOptions, FormatOptions, OpenOptions, PolicyChange, Schedule, Store, StoreErrorKind,
    WhenOffline,
};
use uuid::Uuid;

#[tokio::test]
async fn committed_data_is_read_back_and_survives_reopening() {
    for sim in [sim(64 * MIB, 1), sim_without_caw(64 * MIB, 1)] {
        let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
        let mut model = Model::default();
        let first = vec![write(0, 1), write(1, 1), write(700, 1), write(4095, 1)];
        model.apply(&first, 1);
        let done = vdi.commit(batch(4, first)).await.expect("commit");
        assert_eq!(done.pointers, {
            let all = vdi.resolve(Lba(0), 4096).await.expect("resolve");
            vec![all[0], all[1], all[700], all[4095]]
        });
        let second = vec![write(1, 2), zero(600, 200)];
        model.apply(&second, 2);
        vdi.commit(batch(6, second)).await.expect("commit");
        model.check_read(&vdi, 0, 4096).await;
        model.check(&store, "d").await;
        assert_eq!(vdi.committed().lsn, Lsn(6));
        store.close().await.expect("close");
        drop((vdi, store));

        let store = open(&sim).await;
        model.check(&store, "d").await;
        let vdi = attach(&store, "d").await;
        assert_eq!(vdi.committed().lsn, Lsn(6));
        model.check_read(&vdi, 0, 4096).await;
        vdi.detach(Lsn(6)).await.expect("detach");
        assert!(store.lookup_vdi("d").await.expect("lookup").owner.is_none());
    }
}

#[tokio::test]
async fn a_second_host_is_told_who_uses_the_store() {
    let sim = sim(64 * MIB, 2);
    format(&sim).await;
    let store = open(&sim).await;
    let other = Uuid::from_u128(7);
    let error = Store::open(sim.connect().device(), host(other)).await.expect_err("in use");
    assert_eq!(error.kind, StoreErrorKind::InUse);
    assert!(error.to_string().contains("host-a11ce"), "{error}");
    assert!(error.to_string().contains(&HOST.to_string()), "{error}");
    let options = OpenOptions { take_over_host: Some(HOST), ..host(other) };
    let second = Store::open(sim.connect().device(), options).await.expect("taken over");
    let error = store.heartbeat().await.expect_err("lost");
    assert_eq!(error.kind, StoreErrorKind::NotOwner);
    second.close().await.expect("close");
    open(&sim.connect()).await.close().await.expect("clean handover");
}

#[tokio::test]
async fn attaching_and_detaching_follow_the_log() {
    let sim = sim(64 * MIB, 3);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    vdi.commit(batch(3, vec![write(1, 1)])).await.expect("commit");
    let uuid = vdi.uuid();
    let error = store.attach(uuid, AttachOptions { log_id: LOG }).await.expect_err("attached");
    assert_eq!(error.kind, StoreErrorKind::InUse);
    let error = store.delete_vdi("d").await.expect_err("attached");
    assert!(error.to_string().contains("host-a11ce"), "{error}");
    drop(vdi);

    let other_log = AttachOptions { log_id: Uuid::from_u128(8) };
    let error = store.attach(uuid, other_log).await.expect_err("other log");
    assert!(error.to_string().contains("--accept-loss"), "{error}");
    let vdi = attach(&store, "d").await;
    assert_eq!(vdi.committed().attachment.0, 2);
    let error = vdi.detach(Lsn(9)).await.expect_err("not drained");
    assert!(error.to_string().contains("drain"), "{error}");
    vdi.detach(Lsn(3)).await.expect("detach");
    let error = vdi.commit(batch(4, vec![])).await.expect_err("detached");
    assert_eq!(error.kind, StoreErrorKind::NotOwner);

    let other_log = AttachOptions { log_id: Uuid::from_u128(8) };
    let vdi = store.attach(uuid, other_log).await.expect("a new log after a detach");
    vdi.detach(Lsn(3)).await.expect("detach");
    store.delete_vdi("d").await.expect("delete");
    assert_eq!(store.lookup_vdi("d").await.expect_err("gone").kind, StoreErrorKind::NotFound);
    assert!(store.list_vdis().await.expect("list").is_empty());
}

#[tokio::test]
async fn names_are_unique_and_slots_are_used_again() {
    let sim = sim(64 * MIB, 4);
    format(&sim).await;
    let store = open(&sim).await;
    for name in ["a", "b", "c"] {
        store.create_vdi(name, MIB).await.expect("create");
    }
    let error = store.create_vdi("b", MIB).await.expect_err("taken");
    assert_eq!(error.kind, StoreErrorKind::AlreadyExists);
    store.create_vdi("B", MIB).await.expect("names are case-sensitive");
    store.delete_vdi("b").await.expect("delete");
    store.create_vdi("e", MIB).await.expect("create");
    let names: Vec<String> =
        store.list_vdis().await.expect("list").into_iter().map(|v| v.name).collect();
    assert_eq!(names, ["a", "e", "c", "B"]);
    for (name, size, kind) in [
        ("x/y", MIB, StoreErrorKind::Invalid),
        ("x", 0, StoreErrorKind::Invalid),
        ("x", 5000, StoreErrorKind::Invalid),
    ] {
        assert_eq!(store.create_vdi(name, size).await.expect_err("refused").kind, kind);
    }
}

#[tokio::test]
async fn formatting_spares_what_is_there() {
    let sim = sim(64 * MIB, 5);
    format(&sim).await;
    let again = || Store::format(sim.device(), FormatOptions::default());
    let error = again().await.expect_err("a store is there");
    assert_eq!(error.kind, StoreErrorKind::Foreign);
    assert!(error.to_string().contains("Ballast"), "{error}");
    let store = open(&sim).await;
    store.create_vdi("old", MIB).await.expect("create");
    drop(store);
    let force = FormatOptions { force: true, ..Default::default() };
    Store::format(sim.device(), force).await.expect("forced");
    assert!(open(&sim).await.list_vdis().await.expect("list").is_empty());
    let small = crate::testing::sim(2 * MIB, 5);
    let error = Store::format(small.device(), Default::default()).await.expect_err("small");
    assert!(error.to_string().contains("too few"), "{error}");
}

#[tokio::test]
async fn a_damaged_superblock_is_replaced_by_its_copy_and_a_wrong_device_is_refused() {
    let sim = sim(64 * MIB, 6);
    let error = Store::open(sim.device(), host(HOST)).await.expect_err("empty device");
    assert_eq!(error.kind, StoreErrorKind::NotAStore);
    format(&sim).await;
    sim.corrupt(100, 1);
    let store = open(&sim).await;
    store.create_vdi("d", MIB).await.expect("create");
    drop(store);
    sim.corrupt(MIB - 4096 + 100, 1);
    let error = Store::open(sim.device(), host(HOST)).await.expect_err("both damaged");
    assert_eq!(error.kind, StoreErrorKind::Damaged);
}

#[tokio::test]
async fn no_superblock_of_an_earlier_format_is_found() {
    let sim = sim(64 * MIB, 6);
    for extent_size in [8 * MIB, 2 * MIB, 4 * MIB] {
        let extent_size = Some(extent_size);
        let options = FormatOptions { extent_size, force: true, ..FormatOptions::default() };
        Store::format(sim.device(), options).await.expect("format");
    }
    sim.corrupt(100, 1);
    sim.corrupt(4 * MIB - 4096 + 100, 1);
    let error = Store::open(sim.device(), host(HOST)).await.expect_err("both are damaged");
    assert_eq!(error.kind, StoreErrorKind::Damaged, "{error}");
}

#[tokio::test]
async fn disks_grow_but_do_not_shrink() {
    let sim = sim(64 * MIB, 7);
    let (store, vdi) = store_with_disk(&sim, MIB).await;
    let mut model = Model::default();
    let mut lsn = 0;
    for size in [MIB, 16 * MIB, 1 << 30, 1 << 40, 256 << 40] {
        vdi.resize(size).await.expect("grow");
        lsn += 1;
        let last = size / 4096 - 1;
        let changes = vec![write(lsn, lsn), write(last, lsn)];
        model.apply(&changes, lsn);
        vdi.commit(batch(lsn, changes)).await.expect("commit");
        model.check(&store, "d").await;
        model.check_read(&vdi, last, 1).await;
    }
    let error = vdi.resize(MIB).await.expect_err("shrink");
    assert!(error.to_string().contains("shrinking"), "{error}");
    vdi.detach(Lsn(lsn)).await.expect("detach");
    assert_eq!(store.lookup_vdi("d").await.expect("lookup").size_bytes, 256 << 40);
    store.create_vdi("e", MIB).await.expect("create");
    store.resize_vdi("e", 32 * MIB).await.expect("grow a detached disk");
    assert_eq!(store.lookup_vdi("e").await.expect("lookup").height, 2);
}

#[tokio::test]
async fn discarding_the_largest_disk_is_quick_and_frees_its_blocks() {
    let sim = sim(64 * MIB, 8);
    let (store, vdi) = store_with_disk(&sim, 256 << 40).await;
    let blocks = (256u64 << 40) / 4096;
    let before = store.info().await.expect("info");
    let changes = (0..500).map(|n| write(n * (blocks / 500), 1)).collect();
    vdi.commit(batch(1, changes)).await.expect("commit");
    let reads = sim.counts().reads;
    vdi.commit(batch(2, vec![zero(0, blocks)])).await.expect("discard");
    assert!(sim.counts().reads - reads < 10, "a discard of everything reads no nodes");
    assert!(vdi.committed().root.is_sparse());
    store.reclaimed().await;
    Model::default().check(&store, "d").await;
    store.close().await.expect("close");
    let store = open(&sim).await;
    let after = store.info().await.expect("info");
    drop(store.close().await);
    let used = |info: &crate::StoreInfo| info.metadata_blocks_allocated;
    assert!(used(&after) <= used(&before) + 16, "{after:?}");
    assert!(after.data_blocks_allocated <= 16, "{after:?}");
}

#[tokio::test]
async fn malformed_batches_are_refused_and_harm_nothing() {
    let sim = sim(64 * MIB, 9);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    for changes in [
        vec![write(5, 1), write(4, 1)],
        vec![write(5, 1), write(5, 1)],
        vec![zero(3, 4), write(6, 1)],
        vec![zero(3, 0)],
        vec![write(4096, 1)],
        vec![zero(4000, u64::MAX)],
    ] {
        let error = vdi.commit(batch(1, changes)).await.expect_err("refused");
        assert_eq!(error.kind, StoreErrorKind::Invalid);
    }
    vdi.commit(batch(5, vec![write(0, 5)])).await.expect("commit");
    let error = vdi.commit(batch(4, vec![])).await.expect_err("backwards");
    assert_eq!(error.kind, StoreErrorKind::Invalid);
    vdi.commit(batch(5, vec![])).await.expect("the same image again");
    assert!(vdi.read(Lba(4095), 2).await.is_err());
    assert!(vdi.read(Lba(u64::MAX), 2).await.is_err());
    drop(store);
}

#[tokio::test]
async fn a_read_only_opening_changes_nothing() {
    let sim = sim(64 * MIB, 10);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    vdi.commit(batch(1, vec![write(3, 1)])).await.expect("commit");
    let reader = sim.connect();
    let read_only = Store::open(reader.device(), OpenOptions::read_only()).await.expect("open");
    let mut model = Model::default();
    model.apply(&[write(3, 1)], 1);
    model.check(&read_only, "d").await;
    let info = read_only.info().await.expect("info");
    assert_eq!(
        info.vdis[0].owner.as_ref().and_then(|o| o.host_name.clone()).as_deref(),
        Some("host-a11ce")
    );
    let error = read_only.create_vdi("x", MIB).await.expect_err("read-only");
    assert_eq!(error.kind, StoreErrorKind::ReadOnly);
    let counts = reader.counts();
    assert_eq!((counts.writes, counts.compare_and_writes), (0, 0));
    drop(store);
}

#[tokio::test]
async fn a_disk_with_a_damaged_name_can_still_be_handled() {
    let sim = sim(64 * MIB, 11);
    format(&sim).await;
    let store = open(&sim).await;
    let info = store.create_vdi("a", MIB).await.expect("create");
    store.create_vdi("b", MIB).await.expect("create");
    let schedule: Schedule = "every 1h keep 24".parse().expect("a schedule");
    let change = PolicyChange { schedule: Some(schedule), ..PolicyChange::default() };
    store.set_policy("b", change).await.expect("set");
    let meta = store.read_vdi_slot(0).await.expect("slot").record().expect("head").meta;
    sim.corrupt(meta.gba.byte_offset() + 41, 1);
    // This process has read it; the next one finds it damaged.
    assert_eq!(store.lookup_vdi("a").await.expect("known").uuid, info.uuid);
    store.close().await.expect("close");
    let store = open(&sim.connect()).await;
    let names: Vec<String> =
        store.list_vdis().await.expect("list").into_iter().map(|v| v.name).collect();
    assert_eq!(names, [format!("unnamed-{}", info.uuid), "b".to_owned()]);
    // The other is whole, and keeps what was chosen for it when something else of it changes.
    let when_offline = Some(WhenOffline::FailAfter(1000));
    let change = PolicyChange { when_offline, ..PolicyChange::default() };
    assert_eq!(store.set_policy("b", change).await.expect("set").schedule, schedule);
    assert_eq!(attach(&store, "b").await.policy().schedule, schedule);
    store.delete_vdi(&info.uuid.to_string()).await.expect("delete");
    assert_eq!(store.lookup_vdi("b").await.expect("the other").schedule, schedule);
}

/// A second incarnation of the same host makes the first one's attachments void.
#[tokio::test]
async fn only_the_last_incarnation_of_a_host_commits() {
    let sim = sim(64 * MIB, 12);
    let (old_store, old) = store_with_disk(&sim, 16 * MIB).await;
    old.commit(batch(1, vec![write(1, 1)])).await.expect("commit");
    let store = open(&sim.connect()).await;
    let vdi = attach(&store, "d").await;
    vdi.commit(batch(2, vec![write(2, 2)])).await.expect("commit");
    let error = old.commit(batch(2, vec![write(1, 9)])).await.expect_err("void");
    assert_eq!(error.kind, StoreErrorKind::NotOwner);
    let mut model = Model::default();
    model.apply(&[write(1, 1)], 1);
    model.apply(&[write(2, 2)], 2);
    model.check(&store, "d").await;
    drop(old_store);
}

/// Larger than one scan of the registry, and the largest name.
#[tokio::test]
async fn many_disks_are_listed_in_few_reads() {
    let sim = sim(1 << 30, 13);
    format(&sim).await;
    let store = open(&sim).await;
    for n in 0..100 {
        store.create_vdi(&format!("{n:0>255}"), 1 << 40).await.expect("create");
    }
    let reads = sim.counts().reads;
    assert_eq!(store.list_vdis().await.expect("list").len(), 100);
    assert!(sim.counts().reads - reads < 20);
    assert_eq!(store.info().await.expect("info").vdis.len(), 100);
}
