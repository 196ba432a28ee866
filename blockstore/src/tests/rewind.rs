//! Goal: a disk that goes back to a snapshot is exactly that, what it was before stays as a snapshot or is given up, nothing
//! of any snapshot is ever freed or overwritten afterwards (rule C4), and no log of before goes on (rule L6).
//! Method: a disk with snapshots on the simulated device, compared with a model per LSN; deaths at every operation.

use crate::format::vdi::VdiHead;
use crate::testing::{
    LOG, MIB, Model, attach, batch, check_blocks, cut_batch, open, sim, snapshots, store_with_disk,
    write, zero,
};
use crate::types::Lsn;
use crate::{AttachOptions, Rewound, SnapshotLabel, Store, StoreErrorKind, Vdi};
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

const NEXT: Uuid = Uuid::from_u128(0x20a);

/// What snapshots hold, by their LSNs.
type Cuts = BTreeMap<u64, Model>;

fn keep() -> Option<SnapshotLabel> {
    Some(SnapshotLabel::new("before").expect("label"))
}

async fn head(store: &Store) -> VdiHead {
    store.scan_vdis().await.expect("registry")[0].1.record().cloned().expect("a disk")
}

/// Commits `changes` as `lsn` with a snapshot after it.
async fn cut(vdi: &Vdi, model: &mut Model, cuts: &mut Cuts, lsn: u64) {
    let writes = (0..60).map(|n| write(lsn * 7 + n * 13, lsn));
    let changes: Vec<_> = [zero(0, lsn * 7)].into_iter().chain(writes).collect();
    model.apply(&changes, lsn);
    cuts.insert(lsn, model.clone());
    vdi.commit(cut_batch(vec![(lsn, changes), (lsn, vec![])])).await.expect("commit");
}

/// A detached disk with snapshots at 1 to 6, and writes after the last.
async fn detached_with_cuts(seed: u64) -> (crate::device::sim::SimDevice, Arc<Store>, Model, Cuts) {
    let sim = sim(64 * MIB, seed);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    let (mut model, mut cuts) = (Model::default(), Cuts::new());
    for lsn in 1..=6 {
        cut(&vdi, &mut model, &mut cuts, lsn).await;
    }
    let after: Vec<_> = (0..200).map(|lba| write(lba, 7)).collect();
    model.apply(&after, 7);
    vdi.commit(batch(7, after)).await.expect("commit");
    vdi.detach(Lsn(7)).await.expect("detach");
    (sim, store, model, cuts)
}

async fn check_cuts(store: &Store, cuts: &Cuts) {
    let head = head(store).await;
    let found = snapshots(store, "d").await;
    assert!(found.iter().map(|found| found.lsn.0).eq(cuts.keys().copied()), "{found:?}");
    for snapshot in &found {
        cuts[&snapshot.lsn.0].check_snapshot(store, &head, snapshot).await;
    }
    check_blocks(store).await;
}

#[tokio::test(start_paused = true)]
async fn it_goes_back_and_forth_and_nothing_of_a_snapshot_is_lost() {
    let (_sim, store, before, mut cuts) = detached_with_cuts(1).await;
    let rewound = store.rewind_vdi("d", Lsn(3), keep()).await.expect("rollback");
    let size_bytes = 16 * MIB;
    assert_eq!(rewound, Rewound { committed: Lsn(9), kept: Some(Lsn(8)), size_bytes });
    cuts.insert(8, before.clone());
    cuts[&3].check(&store, "d").await;
    check_cuts(&store, &cuts).await;
    assert_eq!(store.find_snapshot("d", "before").await.expect("kept").lsn, Lsn(8));

    // It is written over and over: the snapshots that it goes back to are its own no more.
    let mut model = cuts[&3].clone();
    for round in 0..6 {
        let vdi = attach(&store, "d").await;
        let mut lsn = vdi.committed().lsn.0;
        for _ in 0..10 {
            lsn += 1;
            let changes: Vec<_> = (0..300).map(|lba| write(lba, lsn)).collect();
            model.apply(&changes, lsn);
            vdi.commit(batch(lsn, changes)).await.expect("commit");
        }
        vdi.detach(Lsn(lsn)).await.expect("detach");
        drop(vdi);
        store.reclaimed().await;
        model.check(&store, "d").await;
        check_cuts(&store, &cuts).await;
        let to = [8, 3, 6, 1, 8, 5][round];
        let rewound = store.rewind_vdi("d", Lsn(to), keep()).await.expect("rollback");
        cuts.insert(rewound.kept.expect("kept").0, model.clone());
        model = cuts[&to].clone();
        store.reclaimed().await;
        model.check(&store, "d").await;
        check_cuts(&store, &cuts).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_it_was_is_given_up_only_when_that_is_said() {
    let (_sim, store, _, cuts) = detached_with_cuts(2).await;
    let used = check_blocks(&store).await.len();
    let rewound = store.rewind_vdi("d", Lsn(2), None).await.expect("rollback");
    assert_eq!((rewound.committed, rewound.kept), (Lsn(8), None));
    store.reclaimed().await;
    cuts[&2].check(&store, "d").await;
    check_cuts(&store, &cuts).await;
    assert!(check_blocks(&store).await.len() + 200 <= used, "its own blocks are free");
}

#[tokio::test(start_paused = true)]
async fn its_size_goes_back_as_well() {
    let sim = sim(64 * MIB, 3);
    let (store, vdi) = store_with_disk(&sim, MIB).await;
    let (mut model, mut cuts) = (Model::default(), Cuts::new());
    for lba in [1, 200] {
        model.apply(&[write(lba, 1)], 1);
    }
    cuts.insert(1, model.clone());
    let first = vec![write(1, 1), write(200, 1)];
    vdi.commit(cut_batch(vec![(1, first), (1, vec![])])).await.expect("commit");
    // Taller by a level, and written where there was nothing.
    vdi.resize(64 * MIB).await.expect("grow");
    let far = vec![write(200, 2), write(16_000, 2)];
    model.apply(&far, 2);
    vdi.commit(batch(2, far)).await.expect("commit");
    vdi.detach(Lsn(2)).await.expect("detach");
    drop(vdi);
    let rewound = store.rewind_vdi("d", Lsn(1), keep()).await.expect("rollback");
    assert_eq!(rewound.size_bytes, MIB);
    cuts.insert(3, model.clone());
    assert_eq!(store.lookup_vdi("d").await.expect("lookup").size_bytes, MIB);
    cuts[&1].check(&store, "d").await;
    // What it grows into is empty.
    let vdi = attach(&store, "d").await;
    vdi.resize(64 * MIB).await.expect("grow");
    cuts[&1].check_read(&vdi, 15_990, 20).await;
    vdi.detach(Lsn(4)).await.expect("detach");
    drop(vdi);
    check_cuts(&store, &cuts).await;
    assert_eq!(store.rewind_vdi("d", Lsn(3), keep()).await.expect("back").size_bytes, 64 * MIB);
    model.check(&store, "d").await;
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_done_changes_nothing() {
    let (_sim, store, model, cuts) = detached_with_cuts(4).await;
    let before = head(&store).await;
    let absent = store.rewind_vdi("d", Lsn(7), keep()).await.unwrap_err();
    assert_eq!(absent.kind, StoreErrorKind::NotFound, "{absent}");
    let absent = store.rewind_vdi("x", Lsn(3), keep()).await.unwrap_err();
    assert_eq!(absent.kind, StoreErrorKind::NotFound, "{absent}");
    assert_eq!(head(&store).await, before);
    let vdi = attach(&store, "d").await;
    let attached = head(&store).await;
    let in_use = store.rewind_vdi("d", Lsn(3), keep()).await.unwrap_err();
    assert_eq!(in_use.kind, StoreErrorKind::InUse, "{in_use}");
    assert!(in_use.to_string().contains("detach it there, then roll it back"), "{in_use}");
    assert_eq!(head(&store).await, attached);
    drop(vdi);
    model.check(&store, "d").await;
    check_cuts(&store, &cuts).await;
}

/// A cache that comes back with the log that was drained before the rollback holds what the disk was, as clean: it must not
/// be read, nor a write be put on top of it.
#[tokio::test(start_paused = true)]
async fn the_log_that_was_drained_before_does_not_go_on() {
    let (_sim, store, ..) = detached_with_cuts(5).await;
    let uuid = head(&store).await.uuid;
    store.rewind_vdi("d", Lsn(3), keep()).await.expect("rollback");
    let old = AttachOptions { log_id: LOG };
    let error = store.resume(uuid, old).await.expect_err("of before");
    assert_eq!(error.kind, StoreErrorKind::InUse);
    assert!(error.to_string().contains("rolled back since"), "{error}");
    // Nor is any image of before at the LSN that it has now: a log that ends there is seen to be older.
    let info = store.lookup_vdi("d").await.expect("lookup");
    assert_eq!((info.owner, info.committed_lsn), (None, Lsn(9)));
    let vdi = store.attach(uuid, AttachOptions { log_id: NEXT }).await.expect("a new log");
    assert_eq!(vdi.committed().lsn, Lsn(9));
}

/// A death at any operation leaves the disk as it was, or rolled back with its former state kept.
#[tokio::test(start_paused = true)]
async fn a_death_amid_it_leaves_it_made_or_not_made() {
    let (mut made, mut not_made) = (0, 0);
    for n in 0.. {
        let (sim, store, before, mut cuts) = detached_with_cuts(100 + n).await;
        store.close().await.expect("close");
        drop(store);
        let session = sim.connect();
        let store = open(&session).await;
        session.crash_after(n);
        let died = tokio::select! {
            biased;
            () = session.died() => true,
            rewound = store.rewind_vdi("d", Lsn(3), keep()) => {
                rewound.expect("rollback");
                false
            }
        };
        if n % 2 == 0 {
            session.crash()
        } else {
            session.kill_host()
        }
        drop(store);
        let store = open(&sim.connect()).await;
        if store.lookup_vdi("d").await.expect("lookup").committed_lsn == Lsn(9) {
            cuts.insert(8, before);
            cuts[&3].check(&store, "d").await;
            made += 1;
        } else {
            assert!(died, "it was answered");
            before.check(&store, "d").await;
            not_made += 1;
        }
        check_cuts(&store, &cuts).await;
        if !died {
            break;
        }
    }
    assert!(made > 0 && not_made > 0, "made {made}, not made {not_made}");
}
