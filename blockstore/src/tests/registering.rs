//! Goal: a clone that its host served before the store knew of it is made once, begins as its snapshot, and is that host's from
//! its first moment on. Method: a death at any operation, by power loss or not, then the same request again.

use crate::format::vdi::Origin;
use crate::testing::{MIB, cut_batch, open, sim, stamp, store_with_disk, write};
use crate::types::{Lba, Lsn};
use crate::{AttachOptions, RegisteredClone, StoreErrorKind, WhenOffline};
use uuid::Uuid;

const LOG: Uuid = Uuid::from_u128(0x106);

fn clone_of(vdi: Uuid) -> RegisteredClone {
    RegisteredClone {
        uuid: Uuid::from_u128(0xc10e),
        name: "c".to_owned(),
        origin: Origin { vdi, lsn: Lsn(1) },
        snapshot_ms: 1001,
        when_offline: WhenOffline::default(),
        log_id: LOG,
    }
}

#[tokio::test(start_paused = true)]
async fn it_is_made_once_whatever_dies_and_however_often_it_is_asked_for() {
    let mut outcomes = [0, 0];
    for n in 0.. {
        let sim = sim(64 * MIB, 100 + n);
        let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
        vdi.commit(cut_batch(vec![(1, vec![write(7, 1)]), (2, vec![write(7, 2)])]))
            .await
            .expect("cut");
        let clone = clone_of(vdi.uuid());
        drop(vdi);
        store.close().await.expect("close");
        drop(store);
        let session = sim.connect();
        let store = open(&session).await;
        session.crash_after(n);
        let died = tokio::select! {
            biased;
            () = session.died() => true,
            made = store.register_clone(clone.clone()) => {
                made.expect("made");
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
        let there = store.list_vdis().await.expect("list").len() - 1;
        assert!(there == 1 || died && there == 0, "after operation {n}");
        outcomes[there] += 1;
        for _ in 0..2 {
            store.register_clone(clone.clone()).await.expect("made");
        }
        let list = store.list_vdis().await.expect("list");
        assert_eq!(list.iter().filter(|vdi| vdi.uuid == clone.uuid).count(), 1);
        assert_eq!(list.len(), 2);
        // Nobody else gets it, and the log goes on.
        let other = AttachOptions { log_id: Uuid::from_u128(5) };
        let refused = store.attach(clone.uuid, other).await.unwrap_err();
        assert_eq!(refused.kind, StoreErrorKind::InUse, "{refused}");
        assert_eq!(store.delete_vdi("c").await.unwrap_err().kind, StoreErrorKind::InUse);
        let vdi = store.resume(clone.uuid, AttachOptions { log_id: LOG }).await.expect("resume");
        assert_eq!(vdi.committed().lsn, Lsn(0));
        assert_eq!(vdi.read(Lba(7), 1).await.expect("read"), [Some(stamp(7, 1))]);
        let refused = store.delete_snapshots("d", vec![Lsn(1)]).await.unwrap_err();
        assert!(refused.to_string().contains("cloned from its snapshot 1"), "{refused}");
        store.close().await.expect("close");
        if !died {
            break;
        }
    }
    assert!(outcomes[0] > 3 && outcomes[1] > 1, "{outcomes:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_not_what_was_asked_for_is_refused() {
    let sim = sim(64 * MIB, 9);
    let (store, vdi) = store_with_disk(&sim, 16 * MIB).await;
    let clone = clone_of(vdi.uuid());
    let kind =
        async |clone: &RegisteredClone| store.register_clone(clone.clone()).await.unwrap_err().kind;
    assert_eq!(kind(&clone).await, StoreErrorKind::NotFound, "the snapshot is not there yet");
    vdi.commit(cut_batch(vec![(1, vec![write(7, 1)]), (2, vec![])])).await.expect("cut");
    assert_eq!(
        kind(&RegisteredClone { name: "d".into(), ..clone.clone() }).await,
        StoreErrorKind::AlreadyExists
    );
    // The disk's log was given up, and its next one took a snapshot at the same LSN.
    let of_former_log = RegisteredClone { snapshot_ms: 1002, ..clone.clone() };
    assert_eq!(kind(&of_former_log).await, StoreErrorKind::Changed);
    store.register_clone(clone.clone()).await.expect("made");
    let other = Origin { lsn: Lsn(2), ..clone.origin };
    assert_eq!(
        kind(&RegisteredClone { origin: other, ..clone.clone() }).await,
        StoreErrorKind::Changed
    );
    // Under another name it is the same.
    store.register_clone(RegisteredClone { name: "e".into(), ..clone }).await.expect("there");
    assert_eq!(store.list_vdis().await.expect("list").len(), 2);
}
