//! Goal: a rollback ends an attachment and nothing else, and no log that was given up goes on (rules L6, C4).

use crate::testing::{HOST, LOG, MIB, Model, attach, batch, open, sim, store_with_disk, write};
use crate::types::Lsn;
use crate::{AttachOptions, LostLog, StoreErrorKind};
use std::sync::Arc;
use uuid::Uuid;

const LOST: LostLog = LostLog { host: HOST, log_id: Some(LOG) };
const NEXT: Uuid = Uuid::from_u128(0x20a);

#[tokio::test(start_paused = true)]
async fn a_rollback_keeps_the_image_and_raises_what_must_rise() {
    let sim = sim(64 * MIB, 1);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    vdi.commit(batch(7, vec![write(1, 1)])).await.expect("commit");
    let (uuid, before) = (vdi.uuid(), vdi.committed());
    let error = store.roll_back(uuid, LOST).await.expect_err("attached through this store");
    assert_eq!(error.kind, StoreErrorKind::InUse);
    drop(vdi);
    let others = [
        LostLog { host: Uuid::from_u128(9), ..LOST },
        LostLog { log_id: Some(NEXT), ..LOST },
        LostLog { log_id: None, ..LOST },
    ];
    for other in others {
        let error = store.roll_back(uuid, other).await.expect_err("not as it was judged");
        assert_eq!(error.kind, StoreErrorKind::InUse);
    }
    assert_eq!(store.roll_back(uuid, LOST).await.expect("rollback"), Lsn(7));
    let error = store.roll_back(uuid, LOST).await.expect_err("twice");
    assert_eq!(error.kind, StoreErrorKind::InUse);
    let info = store.lookup_vdi("d").await.expect("lookup");
    assert_eq!((info.owner, info.log_id, info.committed_lsn), (None, None, Lsn(7)));
    let mut model = Model::default();
    model.apply(&[write(1, 1)], 1);
    model.check(&store, "d").await;
    let vdi = store.attach(uuid, AttachOptions { log_id: NEXT }).await.expect("a new log");
    let after = vdi.committed();
    assert!(after.birth > before.birth && after.attachment > before.attachment);
    assert_eq!((after.lsn, after.root), (before.lsn, before.root));
}

#[tokio::test(start_paused = true)]
async fn a_log_that_was_given_up_never_goes_on() {
    let sim = sim(64 * MIB, 2);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    vdi.commit(batch(7, vec![write(1, 1)])).await.expect("commit");
    let uuid = vdi.uuid();
    let (old, new) = (AttachOptions { log_id: LOG }, AttachOptions { log_id: NEXT });
    // Drained and detached: a crash before the cache forgot the log is made good by going on.
    vdi.detach(Lsn(7)).await.expect("detach");
    drop(store.resume(uuid, old.clone()).await.expect("the log that was drained last"));
    store.roll_back(uuid, LOST).await.expect("rollback");
    let error = store.resume(uuid, old.clone()).await.expect_err("given up");
    assert!(error.to_string().contains("rolled back"), "{error}");
    let vdi = store.attach(uuid, new.clone()).await.expect("a new log");
    let error = store.resume(uuid, old.clone()).await.expect_err("another log has it");
    assert_eq!(error.kind, StoreErrorKind::InUse);
    vdi.detach(Lsn(7)).await.expect("detach");
    drop(vdi);
    let error = store.resume(uuid, old).await.expect_err("outdated");
    assert!(error.to_string().contains(&NEXT.to_string()), "{error}");
    drop(store.resume(uuid, new).await.expect("its own"));
}

/// A crash at any operation of a rollback leaves the disk attached as it was, or detached; with the same image.
#[tokio::test(start_paused = true)]
async fn a_crash_amid_a_rollback_leaves_it_made_or_not_made() {
    let (mut made, mut not_made) = (0, 0);
    for seed in 0..40 {
        let sim = sim(64 * MIB, seed);
        let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
        vdi.commit(batch(7, vec![write(1, 1)])).await.expect("commit");
        let uuid = vdi.uuid();
        drop(vdi);
        let rollback = {
            let store = Arc::clone(&store);
            tokio::spawn(async move { store.roll_back(uuid, LOST).await })
        };
        for _ in 0..seed * 2 {
            tokio::task::yield_now().await;
        }
        sim.crash();
        rollback.abort();
        drop(store);
        let store = open(&sim.connect()).await;
        let info = store.lookup_vdi("d").await.expect("lookup");
        let mut model = Model::default();
        model.apply(&[write(1, 1)], 1);
        model.check(&store, "d").await;
        if info.owner.is_some() {
            assert_eq!(info.log_id, Some(LOG));
            not_made += 1;
            drop(attach(&store, "d").await);
        } else {
            assert_eq!(info.log_id, None);
            made += 1;
        }
    }
    assert!(made > 0 && not_made > 0, "made {made}, not made {not_made}");
}
