//! Goal: a snapshot holds exactly what was staged before it, is answered when it is durable, with the store away too, and is
//! answered in any case; what the store does not have is known, after a restart too; the store gets many with one commit.
//! Method: as in the module above; the store in memory keeps its image at each cut, and counts its commits.

use super::*;
use crate::disk::SNAPSHOTS_WAITING_MAX;
use crate::{CacheError, SnapshotTaken};
use blockstore::SnapshotLabel;
use futures_util::FutureExt;
use std::pin::Pin;

type Asked = Pin<Box<dyn Future<Output = Result<SnapshotTaken, CacheError>>>>;

/// Asks for a snapshot; the worker has the message when this returns.
async fn ask(cache: &Arc<Cache>, guest: &Guest, label: &str) -> Asked {
    let (cache, vdi) = (Arc::clone(cache), guest.vdi.uuid);
    let label = SnapshotLabel::new(label).unwrap();
    let mut asked: Asked = Box::pin(async move { cache.snapshot(vdi, label).await });
    for _ in 0..3 {
        assert!(futures_util::poll!(&mut asked).is_pending());
        pause().await;
    }
    asked
}

/// The worker turns until there is an answer.
async fn answer(guest: &mut Guest, asked: Asked) -> Result<SnapshotTaken, CacheError> {
    let mut asked = asked;
    for _ in 0..TURNS_MAX {
        guest.turn();
        tokio::select! {
            biased;
            result = &mut asked => return result,
            () = pause() => {}
        }
    }
    panic!("a snapshot is not answered");
}

fn lsns(store: &Store) -> Vec<u64> {
    store.snapshots.lock().iter().map(|(lsn, _)| lsn.0).collect()
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_at_every_write_is_exact_and_all_share_one_commit() {
    const WRITES: u64 = 32;
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    let mut asked = Vec::new();
    for n in 1..=WRITES {
        // None of these is answered yet, and all overwrite each other.
        assert_eq!(guest.stage(7, n as u8), Staged::All);
        asked.push(ask(&cache, &guest, &format!("write {n}")).await);
        while let Some(message) = guest.attached.link.try_recv() {
            guest.attached.on_message(message);
        }
    }
    assert_eq!(guest.stage(7, 99), Staged::All);
    for (n, asked) in (1..).zip(asked) {
        assert_eq!(answer(&mut guest, asked).await.unwrap().lsn, Lsn(2 * n));
    }
    guest.drain(&cache).await;
    let expected: Vec<_> =
        (1..=WRITES).map(|n| (Lsn(2 * n), BTreeMap::from([(7, n as u8)]))).collect();
    assert_eq!(*guest.store.snapshots.lock(), expected);
    assert_eq!(*guest.store.commits.lock(), 1, "one head write for all");
    assert_eq!(guest.store.image.lock().1[&7], 99);
    assert_eq!(cache.vdi_status(guest.vdi.uuid).unwrap().snapshots_pending, 0);
    guest.leave(&cache).await;
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn snapshots_that_the_store_lacks_are_known_after_a_restart_too() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let guest = Guest::new(&cache, 1).await;
    let (vdi, store) = (guest.vdi.clone(), guest.store.clone());
    guest.leave(&cache).await;
    cache.reserve(&vdi).await.unwrap();
    let attached = cache.attach(&vdi, store.clone()).await.unwrap();
    cache.release(vdi.uuid, attached).await.unwrap();
    cache.close().await;
    drop(cache);
    // The store is away.
    let cache = open(&dir).await;
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi: vdi.clone(), store: store.clone(), attached, tag: 0 };
    let mut taken = Vec::new();
    for n in 1..4 {
        guest.write(n..n + 1, n as u8).await;
        let asked = ask(&cache, &guest, &"x".repeat(n as usize)).await;
        taken.push(answer(&mut guest, asked).await.unwrap());
    }
    let pending = cache.pending_snapshots(vdi.uuid);
    let named: Vec<_> = pending.iter().map(|p| (p.lsn, p.time_ms)).collect();
    assert_eq!(named, taken.iter().map(|t| (t.lsn, t.time_ms)).collect::<Vec<_>>());
    assert_eq!(pending[2].label.as_str(), "xxx");
    pause().await;
    assert_eq!(cache.vdi_status(vdi.uuid).unwrap().snapshots_pending, 3);
    // The host dies: what was not sealed is found record by record.
    drop(guest);
    cache.close().await;
    drop(cache);
    let cache = open(&dir).await;
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi: vdi.clone(), store, attached, tag: 0 };
    assert_eq!(cache.pending_snapshots(vdi.uuid), pending);
    cache.join(vdi.uuid, guest.store.clone()).await.unwrap();
    guest.drain(&cache).await;
    assert_eq!(lsns(&guest.store), taken.iter().map(|t| t.lsn.0).collect::<Vec<_>>());
    assert_eq!(guest.store.snapshots.lock()[1].1, BTreeMap::from([(1, 1), (2, 2)]));
    assert_eq!(cache.pending_snapshots(vdi.uuid), []);
    guest.leave(&cache).await;
}

#[tokio::test(start_paused = true)]
async fn whoever_asks_gets_an_answer_though_the_worker_dies_or_stops() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let guest = Guest::new(&cache, 1).await;
    // Without a word.
    let asked = ask(&cache, &guest, "").await;
    let Guest { vdi, store, attached, mut tag } = guest;
    drop(attached);
    let error = asked.await.unwrap_err();
    assert!(matches!(error, CacheError::Snapshot { .. }), "{error}");
    assert!(cache.snapshot(vdi.uuid, SnapshotLabel::default()).await.is_err(), "nobody is there");
    // With its record in the log, and a panic.
    let attached = cache.reopen(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store, attached, tag };
    let asked = ask(&cache, &guest, "found").await;
    while let Some(message) = guest.attached.link.try_recv() {
        guest.attached.on_message(message);
    }
    let mut unsaid = Vec::new();
    while run_once(&mut guest.attached, &mut unsaid) {}
    guest.attached.link.send(FromDisk::Failed { reason: WORKER_PANICKED.into() });
    asked.await.unwrap_err();
    let Guest { vdi, store, attached, tag: before } = guest;
    drop(attached);
    tag = before;
    let attached = cache.reopen(vdi.uuid).await.unwrap();
    let guest = Guest { vdi, store, attached, tag };
    let pending = cache.pending_snapshots(guest.vdi.uuid);
    assert_eq!(pending.iter().map(|p| p.label.as_str()).collect::<Vec<_>>(), ["found"]);
    // Released with one that has a record and one that has none.
    let mut guest = guest;
    assert_eq!(guest.stage(1, 1), Staged::All);
    let staged = ask(&cache, &guest, "").await;
    while let Some(message) = guest.attached.link.try_recv() {
        guest.attached.on_message(message);
    }
    let unheard = ask(&cache, &guest, "").await;
    let Guest { vdi, store, attached, .. } = guest;
    cache.release(vdi.uuid, attached).await.unwrap();
    let lsn = staged.await.unwrap().lsn;
    unheard.await.unwrap_err();
    cache.snapshot(vdi.uuid, SnapshotLabel::default()).await.unwrap_err();
    cache.drain(vdi.uuid).await.unwrap();
    assert_eq!(lsns(&store).last(), Some(&lsn.0));
    assert_eq!(store.committed(), lsn, "nothing was staged behind what was sealed");
    cache.detach(vdi.uuid).await.unwrap();
    assert_empty(&cache);
    cache.snapshot(vdi.uuid, SnapshotLabel::default()).await.unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn with_the_ring_full_snapshots_wait_in_their_order_and_too_many_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let guest = Guest::new(&cache, 1).await;
    let (vdi, store) = (guest.vdi.clone(), guest.store.clone());
    cache.release(vdi.uuid, guest.attached).await.unwrap();
    cache.close().await;
    drop(cache);
    let cache = open(&dir).await;
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store, attached, tag: 0 };
    let mut lba = 0;
    let mut full = 0;
    while full < 5000 {
        let staged = guest.stage(lba % 8000, 1) == Staged::All;
        full = if staged { 0 } else { full + 1 };
        lba += u64::from(staged);
        guest.turn();
        if !staged {
            pause().await;
        }
    }
    let mut asked = Vec::new();
    for _ in 0..SNAPSHOTS_WAITING_MAX {
        let (cache, vdi) = (Arc::clone(&cache), guest.vdi.uuid);
        let label = SnapshotLabel::default();
        asked.push(tokio::spawn(async move { cache.snapshot(vdi, label).await }));
    }
    for _ in 0..200 {
        guest.turn();
        pause().await;
    }
    assert!(asked.iter().all(|asked| !asked.is_finished()), "they wait for room");
    let error = cache.snapshot(guest.vdi.uuid, SnapshotLabel::default()).await.unwrap_err();
    assert!(error.to_string().contains("wait to be durable"), "{error}");
    assert_eq!(guest.stage(9000, 2), Staged::Part(0), "nothing overtakes them");
    cache.join(guest.vdi.uuid, guest.store.clone()).await.unwrap();
    let mut lsns_taken = Vec::new();
    for asked in asked {
        let asked: Asked = Box::pin(async { asked.await.unwrap() });
        lsns_taken.push(answer(&mut guest, asked).await.unwrap().lsn.0);
    }
    lsns_taken.sort_unstable();
    assert_eq!(lsns_taken, (lba + 1..=lba + SNAPSHOTS_WAITING_MAX as u64).collect::<Vec<_>>());
    guest.write(9000..9001, 2).await;
    guest.drain(&cache).await;
    assert_eq!(lsns(&guest.store), lsns_taken);
    assert!(guest.store.snapshots.lock().iter().all(|(_, image)| !image.contains_key(&9000)));
    guest.leave(&cache).await;
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn in_write_through_a_snapshot_is_answered_when_the_store_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    guest.write(0..3, 1).await;
    guest.lose_the_device(&dir);
    // In the log's memory when the device fails, and after.
    assert_eq!(guest.stage(3, 1), Staged::All);
    for n in 1..3 {
        let asked = ask(&cache, &guest, "").await;
        let lsn = answer(&mut guest, asked).await.unwrap().lsn;
        assert!(guest.store.committed() >= lsn);
        assert_eq!(lsns(&guest.store).len(), n);
        assert_eq!(guest.store.snapshots.lock()[n - 1].1.len(), 3 + n);
        guest.write(3 + n as u64..4 + n as u64, 2).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_segment_of_nothing_but_snapshots_is_read_by_its_summary() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    // Far more entries than a segment of single-block writes has.
    for n in 0..2000 {
        let label = SnapshotLabel::new("l".repeat(60)).unwrap();
        guest.attached.disk.snapshot(n + 1_000_000, n, label);
        if n % 500 == 0 {
            guest.turn();
        }
    }
    guest.turn();
    let headers = cache.ground.local.read_headers().await.unwrap();
    guest.drain(&cache).await;
    assert_eq!(lsns(&guest.store), (1..=2000).collect::<Vec<_>>());
    let found = crate::recovery::read_segment(&cache.ground.local, &headers[0]).await.unwrap();
    assert!(found.sealed && found.entries.len() > 3 * BLOCK_SIZE);
    guest.leave(&cache).await;
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_needs_nobody_but_the_worker() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    let vdi = guest.vdi.uuid;
    assert_eq!(guest.stage(7, 1), Staged::All);
    let mut asked = std::pin::pin!(cache.snapshot(vdi, SnapshotLabel::default()));
    assert!(asked.as_mut().now_or_never().is_none());
    // All is done by this thread: the disk's task has no turn in between.
    guest.turn();
    let taken = asked.as_mut().now_or_never().expect("the disk's task is not waited for");
    assert_eq!(taken.unwrap().lsn, Lsn(2));
    // Nor is it known any later, though somebody looks through all that there are.
    assert_eq!(cache.vdi_status(vdi).unwrap().snapshots_pending, 1);
    assert_eq!(cache.pending_snapshots(vdi)[0].lsn, Lsn(2));
    let handle = cache.handle(vdi).unwrap();
    {
        let looking = handle.desk.pending();
        let mut asked = std::pin::pin!(cache.snapshot(vdi, SnapshotLabel::default()));
        assert!(asked.as_mut().now_or_never().is_none());
        guest.turn();
        assert!(asked.as_mut().now_or_never().is_some());
        assert_eq!(looking.len(), 1);
    }
    assert_eq!(handle.desk.pending().len(), 2);
    guest.drain(&cache).await;
    guest.leave(&cache).await;
    assert_empty(&cache);
}
