//! Goal: of the snapshots that a schedule's cadence has cut those reach the store that it keeps, each exactly the disk as it was; they
//! are known in the log as soon as they are durable, after a restart without the store too; nothing of them grows without bound.
//! Method: as in the module above.

use super::*;
use crate::format::slot::SlotVdi;
use crate::{AsOf, Pressed};
use blockstore::{PolicyChange, Schedule, SnapshotLabel};

async fn set(cache: &Cache, guest: &mut Guest, rules: &str) {
    let schedule: Schedule = rules.parse().unwrap();
    let change = PolicyChange { schedule: Some(schedule), ..PolicyChange::default() };
    cache.set_policy(guest.vdi.uuid, change).await.unwrap();
    guest.turn();
}

fn pending(cache: &Cache, guest: &Guest) -> Vec<u64> {
    cache.pending_cuts(guest.vdi.uuid).iter().map(|cut| cut.lsn.0).collect()
}

/// As many writes of one block as there are numbers, one LSN each.
async fn overwrite(guest: &mut Guest, bytes: std::ops::Range<u64>) {
    for n in bytes {
        guest.write(7..8, n as u8).await;
    }
}

async fn record(cache: &Cache) -> SlotVdi {
    let slots = cache.ground.local.read_slots().await.unwrap();
    slots.into_iter().find_map(|slot| slot.vdi).unwrap()
}

fn assert_exact(store: &Store, lsns: &[u64]) {
    let expected: Vec<_> =
        lsns.iter().map(|lsn| (Lsn(*lsn), BTreeMap::from([(7, *lsn as u8)]))).collect();
    assert_eq!(*store.snapshots.lock(), expected);
}

#[tokio::test(start_paused = true)]
async fn the_newest_behind_each_write_reach_the_store_with_one_commit() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    guest.store.is_away.store(true, Ordering::Relaxed);
    set(&cache, &mut guest, "every write keep 5").await;
    overwrite(&mut guest, 1..101).await;
    guest.store.is_away.store(false, Ordering::Relaxed);
    guest.drain(&cache).await;
    // Those of a batch that went out before the rest was known are made as well.
    let made: Vec<u64> = guest.store.snapshots.lock().iter().map(|(lsn, _)| lsn.0).collect();
    assert!(made.ends_with(&[96, 97, 98, 99, 100]), "{made:?}");
    assert!(made.len() <= 10, "{made:?}");
    assert_exact(&guest.store, &made);
    let told = cache.take_made_cuts(guest.vdi.uuid);
    assert_eq!(told.cuts.iter().map(|(lsn, _)| lsn.0).collect::<Vec<_>>(), made);
    assert!(!told.incomplete && told.cuts.iter().all(|(_, time)| *time > 0));
    assert_eq!(cache.take_made_cuts(guest.vdi.uuid).cuts, []);
    pause().await;
    assert_eq!(pending(&cache, &guest), [0; 0]);
    assert_eq!(cache.vdi_status(guest.vdi.uuid).unwrap().cuts_pending, 0);
    guest.leave(&cache).await;
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn in_an_outage_only_those_are_known_that_are_kept_and_a_restart_finds_them_again() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    set(&cache, &mut guest, "every write keep 4, every 1h keep 2").await;
    let (vdi, store) = (guest.vdi.clone(), guest.store.clone());
    cache.release(vdi.uuid, guest.attached).await.unwrap();
    cache.close().await;
    drop(cache);
    let cache = open(&dir).await;
    assert!(record(&cache).await.has_cuts, "former versions refuse it");
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi: vdi.clone(), store: store.clone(), attached, tag: 0 };
    overwrite(&mut guest, 1..51).await;
    // Nothing is sealed with the store away, and nothing is told of what is not.
    assert_eq!(pending(&cache, &guest), [0; 0]);
    drop(guest);
    cache.close().await;
    drop(cache);
    // The host dies.
    let cache = open(&dir).await;
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store, attached, tag: 0 };
    assert_eq!(pending(&cache, &guest), [47, 48, 49, 50]);
    pause().await;
    let status = cache.vdi_status(guest.vdi.uuid).unwrap();
    assert_eq!((status.cuts_pending, status.snapshots_pending), (4, 0));
    overwrite(&mut guest, 51..101).await;
    // Whoever asks for one of them gets it, though it is kept no more by then: all that is newer is sealed first.
    let mine = SnapshotLabel::new("mine").unwrap();
    let asked = cache.snapshot_as_of(guest.vdi.uuid, AsOf::Lsn(Lsn(48)), mine);
    let mut asked = std::pin::pin!(asked);
    while cache.vdi_status(guest.vdi.uuid).unwrap().snapshots_waiting == 0 {
        guest.turn();
        assert!(futures_util::poll!(&mut asked).is_pending(), "it waits for the store");
        pause().await;
    }
    assert_eq!(pending(&cache, &guest), [97, 98, 99, 100]);
    cache.join(guest.vdi.uuid, guest.store.clone()).await.unwrap();
    assert_eq!(asked.await.unwrap().lsn, Lsn(48));
    guest.drain(&cache).await;
    assert_exact(&guest.store, &[48, 97, 98, 99, 100]);
    assert_eq!(cache.take_made_cuts(guest.vdi.uuid).cuts.len(), 4, "but for what is somebody's");
    guest.leave(&cache).await;
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn who_cannot_keep_up_has_less_cut_until_the_disk_is_opened_anew() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    set(&cache, &mut guest, "every write keep 50").await;
    let two_in_a_batch = |guest: &mut Guest, n: u8| {
        assert_eq!(guest.stage(7, n), Staged::All);
        assert_eq!(guest.stage(7, n + 1), Staged::All);
        guest.turn();
    };
    two_in_a_batch(&mut guest, 1);
    cache.press_cuts(guest.vdi.uuid, Pressed::Coarse).await.unwrap();
    guest.turn();
    two_in_a_batch(&mut guest, 3);
    cache.press_cuts(guest.vdi.uuid, Pressed::Stopped).await.unwrap();
    guest.turn();
    two_in_a_batch(&mut guest, 5);
    // A new rule does not end it.
    set(&cache, &mut guest, "every write keep 60").await;
    two_in_a_batch(&mut guest, 7);
    cache.press_cuts(guest.vdi.uuid, Pressed::Not).await.unwrap();
    guest.turn();
    two_in_a_batch(&mut guest, 9);
    guest.drain(&cache).await;
    assert_exact(&guest.store, &[1, 2, 4, 9, 10]);
    // What is in the log says what is cut, whatever the schedule is by then; the slot says so until the disk is opened anew.
    set(&cache, &mut guest, "none").await;
    assert!(record(&cache).await.has_cuts);
    two_in_a_batch(&mut guest, 11);
    guest.drain(&cache).await;
    assert_exact(&guest.store, &[1, 2, 4, 9, 10]);
    guest.leave(&cache).await;
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn in_write_through_they_come_with_the_commit_of_what_they_are_behind() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    set(&cache, &mut guest, "every write keep 100").await;
    overwrite(&mut guest, 1..4).await;
    guest.lose_the_device(&dir);
    overwrite(&mut guest, 4..8).await;
    guest.drain(&cache).await;
    assert_exact(&guest.store, &[1, 2, 3, 4, 5, 6, 7]);
}
