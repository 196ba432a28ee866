//! Goal: the image of a snapshot that is held reads as the disk was then, whatever becomes of the disk, and neither people nor
//! schedules nor the deletion of its disk take it away.
//! Method: a store on the simulated device; the disk is written on, rolled back, and all that can be deleted is.

use crate::format::snapshot::SnapshotLabel;
use crate::testing::{
    MIB, attach, batch, check_blocks, cut_batch, sim, stamp, store_with_disk, write, zero,
};
use crate::types::{Lba, Lsn};
use crate::{SnapshotImage, StoreErrorKind};

/// As the disk was at the cut.
async fn check(image: &SnapshotImage) {
    let read = image.read(Lba(0), 400).await.expect("read");
    for (lba, block) in (0..).zip(read) {
        assert_eq!(block, (lba < 300).then(|| stamp(lba, 1)), "block {lba}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_held_snapshot_stays_and_stays_the_same() {
    let sim = sim(64 * MIB, 31);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    let first = (0..300).map(|lba| write(lba, 1)).collect();
    vdi.commit(cut_batch(vec![(1, first), (2, vec![write(9, 2)]), (2, vec![])]))
        .await
        .expect("cut");
    let uuid = vdi.uuid();
    let image = store.open_snapshot(store.holds().hold(uuid, Lsn(1))).await.expect("open");
    assert_eq!((image.snapshot().lsn, image.snapshot().size_bytes), (Lsn(1), 16 * MIB));
    check(&image).await;
    for lsn in 3..20 {
        let change = (0..300).map(|lba| write(lba, lsn)).collect();
        vdi.commit(batch(lsn, change)).await.expect("commit");
    }
    vdi.commit(batch(20, vec![zero(0, 4096)])).await.expect("commit");
    check(&image).await;
    let past_its_end = image.read(Lba(4090), 10).await.unwrap_err();
    assert_eq!(past_its_end.kind, StoreErrorKind::Invalid, "{past_its_end}");

    // Neither by itself, nor with others, nor by a schedule.
    for list in [vec![Lsn(1)], vec![Lsn(1), Lsn(2)]] {
        let refused = store.delete_snapshots("d", list).await.unwrap_err();
        assert_eq!(refused.kind, StoreErrorKind::InUse, "{refused}");
        assert!(refused.to_string().contains("vdi detach d@1"), "{refused}");
    }
    let auto = SnapshotLabel::new("auto 10s 2026-11-22T08:00:00.000Z").expect("label");
    store.label_snapshot("d", Lsn(1), auto).await.expect("label");
    let thinned = store.thin_snapshots(uuid, vec![Lsn(1)]).await.expect("thin");
    assert_eq!((thinned.deleted, thinned.held), (vec![], vec![Lsn(1)]));
    store.delete_snapshots("d", vec![Lsn(2)]).await.expect("delete");
    vdi.detach(Lsn(20)).await.expect("detach");
    drop(vdi);
    let refused = store.delete_vdi_and_snapshots("d").await.unwrap_err();
    assert_eq!(refused.kind, StoreErrorKind::InUse, "{refused}");
    // Nor by a rollback, to it and with what came after given up.
    store.rewind_vdi("d", Lsn(1), None).await.expect("rollback");
    let vdi = attach(&store, "d").await;
    let lsn = vdi.committed().lsn.plus(1);
    vdi.commit(batch(lsn.0, vec![zero(0, 4096)])).await.expect("commit");
    store.reclaimed().await;
    check_blocks(&store).await;
    check(&image).await;

    // A second reader is as good as the first.
    let second = store.open_snapshot(store.holds().hold(uuid, Lsn(1))).await.expect("open");
    drop(image);
    store.delete_snapshots("d", vec![Lsn(1)]).await.unwrap_err();
    check(&second).await;
    drop(second);
    store.delete_snapshots("d", vec![Lsn(1)]).await.expect("delete");
    let gone = store.open_snapshot(store.holds().hold(uuid, Lsn(1))).await.unwrap_err();
    assert_eq!(gone.kind, StoreErrorKind::NotFound, "{gone}");
    vdi.detach(lsn).await.expect("detach");
    store.delete_vdi("d").await.expect("nothing is held by one that found nothing");
}

/// Whichever comes first: a reader that has the image keeps it, and one that comes too late has none.
#[tokio::test(start_paused = true)]
async fn a_deletion_and_a_reader_that_meet_agree_on_who_was_first() {
    let (mut read, mut deleted) = (0, 0);
    for delay in 0..60 {
        let sim = sim(64 * MIB, 100 + delay);
        let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
        let first = (0..300).map(|lba| write(lba, 1)).collect();
        vdi.commit(cut_batch(vec![(1, first), (1, vec![])])).await.expect("cut");
        let uuid = vdi.uuid();
        let reader = async {
            for _ in 0..delay {
                tokio::task::yield_now().await;
            }
            store.open_snapshot(store.holds().hold(uuid, Lsn(1))).await
        };
        let (gone, opened) = tokio::join!(store.delete_snapshots("d", vec![Lsn(1)]), reader);
        match (gone, opened) {
            (Err(refused), Ok(image)) => {
                assert_eq!(refused.kind, StoreErrorKind::InUse, "{refused}");
                vdi.commit(batch(2, vec![zero(0, 4096)])).await.expect("commit");
                check(&image).await;
                read += 1;
            }
            (Ok(()), Err(absent)) => {
                assert_eq!(absent.kind, StoreErrorKind::NotFound, "{absent}");
                deleted += 1;
            }
            other => panic!("after {delay}: {other:?}"),
        }
    }
    assert!(read > 0 && deleted > 0, "{read} read, {deleted} deleted: no race was tried");
}
