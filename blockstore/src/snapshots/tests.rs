//! Goal: snapshots are listed, found, deleted and cloned by the page or one by one, whatever their number; what cannot be done
//! is refused with words and changes nothing.
//! Method: stores on the simulated device. That their content is right after any history is tested in `tests/model.rs`, after
//! crashes in `tests/crash.rs`.

use super::Page;
use crate::format::snapshot::SnapshotLabel;
use crate::testing::{
    LOG, MIB, Model, attach, batch, check_blocks, cut_batch, open, sim, snapshots, store_with_disk,
    write, zero,
};
use crate::types::Lsn;
use crate::{AttachOptions, Store, StoreErrorKind, Vdi, WhenOffline};
use std::sync::Arc;

/// Snapshots at these LSNs, with one written block before each.
async fn cut_at(vdi: &Vdi, lsns: impl Iterator<Item = u64>) {
    let mut parts: Vec<_> = lsns.map(|lsn| (lsn, vec![write(lsn % 256, lsn)])).collect();
    let last = parts.last().expect("a cut").0;
    parts.push((last, Vec::new()));
    vdi.commit(cut_batch(parts)).await.expect("commit");
}

async fn lsns(
    store: &Arc<Store>,
    newest_first: bool,
    beyond: Option<u64>,
    limit: usize,
) -> Vec<u64> {
    let page = Page { newest_first, beyond: beyond.map(Lsn), limit };
    let list = store.snapshots("d", page).await.expect("snapshots");
    list.iter().map(|snapshot| snapshot.lsn.0).collect()
}

#[tokio::test(start_paused = true)]
async fn thousands_are_listed_by_the_page_and_found_one_by_one() {
    let sim = sim(256 * MIB, 1);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    // Over a leaf, over a node, in steps that end at their bounds and beyond.
    let mut last = 0;
    for count in [1, 31, 1, 8000, 159, 1, 800] {
        cut_at(&vdi, (last + 1..=last + count).map(|n| n * 3)).await;
        last += count;
    }
    let all: Vec<u64> = (1..=last).map(|n| n * 3).collect();
    let mut found = Vec::new();
    while let more = lsns(&store, false, found.last().copied(), 1000).await
        && !more.is_empty()
    {
        found.extend(more);
    }
    assert!(found == all);
    let newest: Vec<u64> = all.iter().rev().take(50).copied().collect();
    assert_eq!(lsns(&store, true, None, 50).await, newest);
    // Beyond one that is not there: those before and after it.
    assert_eq!(lsns(&store, true, Some(100), 2).await, [99, 96]);
    assert_eq!(lsns(&store, false, Some(100), 2).await, [102, 105]);
    // Most are deleted: pages skip the holes.
    let gone: Vec<Lsn> = all.iter().filter(|lsn| *lsn % 1000 != 0).map(|lsn| Lsn(*lsn)).collect();
    store.delete_snapshots("d", gone).await.expect("delete");
    let left: Vec<u64> = all.iter().copied().filter(|lsn| lsn % 1000 == 0).collect();
    assert_eq!(lsns(&store, false, None, usize::MAX).await, left);
    assert_eq!(lsns(&store, true, Some(9000), usize::MAX).await, [6000, 3000]);
    assert_eq!(store.find_snapshot("d", "6000").await.expect("found").lsn, Lsn(6000));
    let absent = store.find_snapshot("d", "6003").await.unwrap_err();
    assert_eq!(absent.kind, StoreErrorKind::NotFound, "{absent}");
    assert_eq!(store.find_snapshot("d", "at 9000").await.expect("by label").lsn, Lsn(9000));
    let next = last * 3 + 1;
    cut_at(&vdi, [next].into_iter()).await;
    assert_eq!(lsns(&store, true, None, 1).await, [next]);
    check_blocks(&store).await;
}

#[tokio::test(start_paused = true)]
async fn an_empty_snapshot_costs_less_than_two_blocks_and_a_deletion_gives_the_list_back() {
    let sim = sim(64 * MIB, 2);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    vdi.commit(batch(1, vec![write(0, 1)])).await.expect("commit");
    let before = check_blocks(&store).await.len();
    for lsn in 2..=1001 {
        vdi.commit(cut_batch(vec![(lsn, vec![]), (lsn, vec![])])).await.expect("commit");
    }
    let blocks = check_blocks(&store).await.len() - before;
    assert!(blocks <= 1000 / 32 + 2, "{blocks} blocks for 1000 empty snapshots");
    store.delete_snapshots("d", (2..=1001).map(Lsn).collect()).await.expect("delete");
    assert_eq!(check_blocks(&store).await.len(), before);
    assert_eq!(lsns(&store, true, None, 1).await, [0; 0]);
}

#[tokio::test(start_paused = true)]
async fn clones_are_disks_of_their_own_and_hold_their_source() {
    let sim = sim(64 * MIB, 3);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    let mut source = Model::default();
    let first: Vec<_> = (0..600).map(|lba| write(lba, 1)).collect();
    source.apply(&first, 1);
    vdi.commit(cut_batch(vec![(1, first), (1, vec![])])).await.expect("commit");
    let golden = source.clone();
    let change = vec![write(3, 2), zero(100, 50)];
    source.apply(&change, 2);
    vdi.commit(batch(2, change)).await.expect("commit");

    let policy = WhenOffline::default();
    let info = store.clone_vdi("c", "d", Lsn(1), policy).await.expect("clone");
    assert_eq!((info.size_bytes, info.snapshots), (16 * MIB, 0));
    let clone = attach(&store, "c").await;
    let mut model = golden.clone();
    model.check(&store, "c").await;
    // It writes, is cut, and cloned in turn; nothing of the others changes.
    let change = vec![zero(0, 2), write(3, 7), write(4000, 7)];
    model.apply(&change, 7);
    clone.commit(cut_batch(vec![(7, change), (7, vec![])])).await.expect("commit");
    store.clone_vdi("cc", "c", Lsn(7), policy).await.expect("clone");
    for lsn in 8..30 {
        let change: Vec<_> = (0..300).map(|lba| write(lba, lsn)).collect();
        clone.commit(batch(lsn, change)).await.expect("commit");
    }
    model.check(&store, "cc").await;
    source.check(&store, "d").await;
    let head = store.scan_vdis().await.expect("registry")[0].1.record().cloned().expect("disk");
    golden.check_snapshot(&store, &head, &snapshots(&store, "d").await[0]).await;
    check_blocks(&store).await;

    // What a clone hangs on stays.
    let refused = store.delete_snapshots("d", vec![Lsn(1)]).await.unwrap_err();
    assert_eq!(refused.kind, StoreErrorKind::InUse, "{refused}");
    assert!(refused.to_string().contains("VDI 'c' was cloned from its snapshot 1"), "{refused}");
    vdi.detach(Lsn(2)).await.expect("detach");
    for delete in [store.delete_vdi("d").await, store.delete_vdi_and_snapshots("d").await] {
        assert_eq!(delete.unwrap_err().kind, StoreErrorKind::InUse);
    }
    clone.detach(Lsn(29)).await.expect("detach");
    store.delete_vdi("cc").await.expect("delete");
    let refused = store.delete_vdi("c").await.unwrap_err();
    assert!(refused.to_string().contains("--with-snapshots"), "{refused}");
    store.delete_vdi_and_snapshots("c").await.expect("delete");
    store.reclaimed().await;
    source.check(&store, "d").await;
    golden.check_snapshot(&store, &head, &snapshots(&store, "d").await[0]).await;
    store.delete_snapshots("d", vec![Lsn(1)]).await.expect("delete, detached");
    source.check(&store, "d").await;
    store.delete_vdi("d").await.expect("delete");
    assert!(check_blocks(&store).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn thinning_takes_what_a_schedule_made_and_no_clone_hangs_on() {
    let sim = sim(64 * MIB, 5);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    cut_at(&vdi, 1..=100).await;
    let auto = SnapshotLabel::new("auto 10s 2026-11-22T08:00:00.000Z").expect("label");
    let odd = || (1..=100).filter(|lsn| lsn % 2 == 1).map(Lsn);
    for lsn in odd() {
        store.label_snapshot("d", lsn, auto.clone()).await.expect("label");
    }
    store.clone_vdi("c", "d", Lsn(51), WhenOffline::default()).await.expect("clone");
    let theirs = SnapshotLabel::new("auto, but ours").expect("label");
    store.label_snapshot("d", Lsn(77), theirs).await.expect("label");
    store.delete_snapshots("d", vec![Lsn(13)]).await.expect("delete");
    let (uuid, before) = (vdi.uuid(), vdi.committed().birth);
    let all: Vec<Lsn> = (0..=200).map(Lsn).collect();
    let thinned = store.thin_snapshots(uuid, all.clone()).await.expect("thin");
    let kept = [13, 51, 77].map(Lsn);
    assert!(thinned.deleted.iter().copied().eq(odd().filter(|lsn| !kept.contains(lsn))));
    assert_eq!(thinned.held, [Lsn(51)]);
    let left: Vec<u64> = (1..=100).filter(|lsn| lsn % 2 == 0 || [51, 77].contains(lsn)).collect();
    assert_eq!(lsns(&store, false, None, 1000).await, left);
    // Nothing to do is nothing done; without its clone the rest goes, of a detached disk, too.
    assert_eq!(vdi.committed().birth, before.plus(1));
    let again = store.thin_snapshots(uuid, all.clone()).await.expect("thin");
    assert!(again.deleted.is_empty());
    assert_eq!(vdi.committed().birth, before.plus(1));
    store.delete_vdi("c").await.expect("delete");
    vdi.detach(Lsn(100)).await.expect("detach");
    let rest = store.thin_snapshots(uuid, all).await.expect("thin");
    assert_eq!((rest.deleted, rest.held), (vec![Lsn(51)], vec![]));
    check_blocks(&store).await;
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_done_is_refused_and_changes_nothing() {
    let sim = sim(64 * MIB, 4);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    cut_at(&vdi, [5, 9].into_iter()).await;
    let policy = WhenOffline::default();
    let absent = store.delete_snapshots("d", vec![Lsn(5), Lsn(6)]).await.unwrap_err();
    assert_eq!(absent.kind, StoreErrorKind::NotFound, "{absent}");
    let absent = store.clone_vdi("c", "d", Lsn(6), policy).await.unwrap_err();
    assert_eq!(absent.kind, StoreErrorKind::NotFound, "{absent}");
    let absent = store.clone_vdi("c", "nobody", Lsn(5), policy).await.unwrap_err();
    assert_eq!(absent.kind, StoreErrorKind::NotFound, "{absent}");
    let taken = store.clone_vdi("d", "d", Lsn(5), policy).await.unwrap_err();
    assert_eq!(taken.kind, StoreErrorKind::AlreadyExists, "{taken}");
    let invalid = store.clone_vdi("a/b", "d", Lsn(5), policy).await.unwrap_err();
    assert_eq!(invalid.kind, StoreErrorKind::Invalid, "{invalid}");
    assert_eq!(lsns(&store, false, None, 10).await, [5, 9]);
    assert_eq!(store.list_vdis().await.expect("list").len(), 1);
    // Cuts out of order, or beyond the batch.
    for parts in [vec![(12, vec![]), (11, vec![])], vec![(12, vec![]), (12, vec![]), (13, vec![])]]
    {
        let refused = vdi.commit(cut_batch(parts)).await.unwrap_err();
        assert_eq!(refused.kind, StoreErrorKind::Invalid, "{refused}");
    }
    let label = SnapshotLabel::new("before the move").expect("label");
    store.label_snapshot("d", Lsn(9), label.clone()).await.expect("label");
    assert_eq!(store.find_snapshot("d", label.as_str()).await.expect("found").lsn, Lsn(9));
    assert_eq!(
        vdi.snapshots(Page { newest_first: true, beyond: None, limit: 9 })
            .await
            .expect("list")
            .len(),
        2
    );
}

/// A head that has, or ever had, snapshots or an origin is refused by programs that would lose them.
#[tokio::test(start_paused = true)]
async fn only_heads_without_snapshots_have_the_former_version() {
    let sim = sim(64 * MIB, 6);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    let version = async |slot: u32| {
        let address = store.superblock().geometry.vdi_slot(slot);
        let block = sim.device().read(address.byte_offset(), 4096).await.expect("read");
        u16::from_le_bytes([block[8], block[9]])
    };
    assert_eq!(version(0).await, 1);
    cut_at(&vdi, [5].into_iter()).await;
    store.clone_vdi("c", "d", Lsn(5), WhenOffline::default()).await.expect("clone");
    assert_eq!((version(0).await, version(1).await), (2, 2));
    store.delete_vdi("c").await.expect("delete");
    store.delete_snapshots("d", vec![Lsn(5)]).await.expect("delete");
    assert_eq!((version(0).await, version(1).await), (2, 1));
}

/// An empty name is none, though most snapshots have no label.
#[tokio::test(start_paused = true)]
async fn no_snapshot_is_found_by_an_empty_name_and_none_is_chosen_of_two() {
    let sim = sim(64 * MIB, 7);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    cut_at(&vdi, [5, 9].into_iter()).await;
    for lsn in [5, 9] {
        store.label_snapshot("d", Lsn(lsn), SnapshotLabel::default()).await.expect("label");
    }
    assert_eq!(store.find_snapshot("d", "").await.unwrap_err().kind, StoreErrorKind::NotFound);
    for lsn in [5, 9] {
        let label = SnapshotLabel::new("nightly").expect("label");
        store.label_snapshot("d", Lsn(lsn), label).await.expect("label");
    }
    assert_eq!(store.find_snapshot("d", "nightly").await.expect("newest").lsn, Lsn(9));
    let several = store.find_only_snapshot("d", "nightly").await.unwrap_err();
    assert!(several.to_string().contains("snapshots 9 and 5 both"), "{several}");
}

/// A batch that was committed in part before a crash: its first snapshots are there and are not made again.
#[tokio::test(start_paused = true)]
async fn a_batch_that_is_replayed_repeats_no_snapshot() {
    let sim = sim(64 * MIB, 5);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    let part = |lsn: u64| (lsn, vec![write(lsn, lsn), write(200, lsn)]);
    vdi.commit(cut_batch(vec![part(1), part(2), part(3)])).await.expect("commit");
    vdi.commit(cut_batch(vec![part(1), part(2), part(4), part(6)])).await.expect("replay");
    assert_eq!(lsns(&store, false, None, 9).await, [1, 2, 4]);
    let mut model = Model::default();
    for lsn in [1, 2, 3, 4, 6] {
        model.apply(&part(lsn).1, lsn);
    }
    let mut expected = model.clone();
    expected.0.retain(|lba, _| *lba == 200 || *lba <= 4);
    expected.0.insert(200, 4);
    let head = store.scan_vdis().await.expect("registry")[0].1.record().cloned().expect("disk");
    expected.check_snapshot(&store, &head, &snapshots(&store, "d").await[2]).await;
    model.check(&store, "d").await;
    check_blocks(&store).await;
    drop((vdi, store));
    let store = open(&sim).await;
    let uuid = store.lookup_vdi("d").await.expect("lookup").uuid;
    store.attach(uuid, AttachOptions { log_id: LOG }).await.expect("attach");
    assert_eq!(lsns(&store, true, None, 9).await, [4, 2, 1]);
}
