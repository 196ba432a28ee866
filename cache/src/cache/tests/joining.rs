//! Goal: disks that come up without the store join it where their logs ended, and no other.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_disk_attached_alone_commits_once_its_store_has_joined() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, store) = left_behind(&dir).await;
    let vdi = vdi(1);
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store: Arc::clone(&store), attached, tag: 0 };
    guest.write(400..500, 3).await;
    for _ in 0..1000 {
        guest.turn();
        pause().await;
    }
    assert_eq!(store.committed(), Lsn(300), "nothing goes to a store that was not compared");
    cache.verify(guest.vdi.uuid, store.committed()).await.unwrap();
    cache.join(guest.vdi.uuid, store.clone()).await.unwrap();
    guest.drain(&cache).await;
    assert_eq!(stored(&store, 300..400), vec![Some(2); 100]);
    assert_eq!(stored(&store, 400..500), vec![Some(3); 100]);
    guest.leave(&cache).await;
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn what_the_store_holds_already_is_not_committed_again() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, store) = left_behind(&dir).await;
    // The head was written, the slot was not.
    store.image.lock().0 = Lsn(350);
    let vdi = vdi(1);
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store: Arc::clone(&store), attached, tag: 0 };
    cache.join(guest.vdi.uuid, store.clone()).await.unwrap();
    guest.drain(&cache).await;
    assert_eq!(store.committed(), Lsn(400));
    assert_eq!(stored(&store, 300..350), vec![None; 50], "as the store said");
    assert_eq!(stored(&store, 350..400), vec![Some(2); 50]);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_does_not_fit_the_log_is_refused_until_one_does() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, store) = left_behind(&dir).await;
    let vdi = vdi(1);
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store: Arc::clone(&store), attached, tag: 0 };
    guest.write(400..410, 3).await;
    for (lsn, words) in [(299, "put back to an older state"), (401, "changed by another host")] {
        let error = cache.verify(guest.vdi.uuid, Lsn(lsn)).await.unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(&lsn.to_string()), "{error}");
        cache.drain(guest.vdi.uuid).await.unwrap_err();
    }
    let older = Arc::new(Store::default());
    cache.join(guest.vdi.uuid, older.clone()).await.unwrap_err();
    assert_eq!(older.committed(), Lsn(0));
    cache.join(guest.vdi.uuid, store.clone()).await.unwrap();
    guest.drain(&cache).await;
    assert_eq!(store.committed(), Lsn(410));
}

/// The log is a copy of before the last hundred writes, as after a cache was put back: what it is given then is another
/// history than the store's, however long it gets.
#[tokio::test(start_paused = true)]
async fn a_log_that_grew_alone_past_a_store_of_another_history_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, store) = left_behind(&dir).await;
    store.image.lock().0 = Lsn(500);
    let vdi = vdi(1);
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi: vdi.clone(), store: Arc::clone(&store), attached, tag: 0 };
    guest.write(400..600, 3).await;
    drop((guest, cache));
    let told = |error| match error {
        CacheError::LogIsOlder { log: Lsn(400), store: Lsn(500), .. } => {}
        error => panic!("{error}"),
    };
    let cache = open(&dir).await;
    told(cache.attach(&vdi, store.clone()).await.unwrap_err());
    // Nor after one more start without the store.
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    assert_eq!(attached.disk.staged_lsn(), Lsn(600));
    told(cache.join(vdi.uuid, store.clone()).await.unwrap_err());
    drop((attached, cache));
    let cache = open(&dir).await;
    // The store that it was written for is taken, and all starts after that.
    store.image.lock().0 = Lsn(400);
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi: vdi.clone(), store: Arc::clone(&store), attached, tag: 0 };
    cache.join(vdi.uuid, store.clone()).await.unwrap();
    guest.drain(&cache).await;
    assert_eq!(store.committed(), Lsn(600));
    drop((guest, cache));
    let cache = open(&dir).await;
    cache.attach(&vdi, store).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn disks_that_were_never_served_are_not_attached_alone() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    cache.reserve(&vdi(1)).await.unwrap();
    assert!(!cache.attached().await[0].was_served);
    cache.attach_alone(vdi(1).uuid).await.unwrap_err();
    cache.unreserve(vdi(1).uuid).await.unwrap();
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn several_disks_are_attached_at_once_and_each_once() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    for n in 1..4 {
        cache.reserve(&vdi(n)).await.unwrap();
    }
    let attach = |n| {
        let cache = Arc::clone(&cache);
        async move { cache.attach(&vdi(n), Arc::new(Store::default())).await }
    };
    let (a, b, c, twice) = tokio::join!(attach(1), attach(2), attach(3), attach(3));
    let _disks = [a.unwrap(), b.unwrap(), c.unwrap()];
    twice.unwrap_err();
}
