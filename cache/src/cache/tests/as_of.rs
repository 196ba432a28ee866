//! Goal: a snapshot of what the disk was is exact, is made though the agent dies or the batch was drafted without it, and is
//! refused, not promised, where the store may have gone beyond it.
//! Method: as in the module above; each write is an LSN, and overwrites the same block with it.

use super::*;
use crate::{AsOf, SnapshotTaken};
use blockstore::SnapshotLabel;
use blockstore::io::now_ms;
use tokio::task::JoinHandle;

/// What overwrites itself.
const LBA: u64 = 7;

/// Asks while the worker turns.
async fn ask(cache: &Arc<Cache>, guest: &mut Guest, point: AsOf) -> Result<SnapshotTaken, String> {
    let (cache, vdi) = (Arc::clone(cache), guest.vdi.uuid);
    let label = SnapshotLabel::new("as of").unwrap();
    let asked = tokio::spawn(async move { cache.snapshot_as_of(vdi, point, label).await });
    for _ in 0..TURNS_MAX {
        if asked.is_finished() {
            return asked.await.unwrap().map_err(|error| error.to_string());
        }
        guest.turn();
        pause().await;
    }
    panic!("a snapshot is not answered");
}

async fn write(guest: &mut Guest, lsns: std::ops::RangeInclusive<u64>) {
    for lsn in lsns {
        guest.write(LBA..LBA + 1, lsn as u8).await;
    }
}

/// What was written is sent to the store, which is away: nothing more gets through. Returns the drain that waits.
async fn send(cache: &Arc<Cache>, guest: &mut Guest) -> JoinHandle<Result<Lsn, CacheError>> {
    let (cache, vdi) = (Arc::clone(cache), guest.vdi.uuid);
    let drain = tokio::spawn(async move { cache.drain(vdi).await });
    while !guest.store.one_waits.load(Ordering::Relaxed) {
        guest.turn();
        pause().await;
    }
    drain
}

fn pending(cache: &Cache, guest: &Guest) -> Vec<u64> {
    cache.pending_snapshots(guest.vdi.uuid).iter().map(|pending| pending.lsn.0).collect()
}

fn kept(store: &Store) -> Vec<(u64, u8)> {
    store.snapshots.lock().iter().map(|(lsn, image)| (lsn.0, image[&LBA])).collect()
}

/// The store comes back, and all of the log gets there.
async fn drain(cache: &Arc<Cache>, guest: &mut Guest) {
    guest.store.is_away.store(false, Ordering::Relaxed);
    guest.drain(cache).await;
}

#[tokio::test(start_paused = true)]
async fn it_is_made_by_the_commit_that_covers_it_though_that_was_drafted_before_or_the_agent_dies()
{
    for dies in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        // A batch is a segment, and made when a drain asks for it.
        let flush = FlushOptions { max_age_ms: 3_600_000, batch_bytes: 1, ..Default::default() };
        let path = dir.path().join("cache");
        let mut cache = Cache::open(CacheOptions { flush, ..options(path) }).await.unwrap();
        let mut guest = Guest::new(&cache, 1).await;
        write(&mut guest, 1..=3).await;
        guest.drain(&cache).await;
        guest.store.is_away.store(true, Ordering::Relaxed);
        for lsns in [4..=5, 6..=20] {
            write(&mut guest, lsns).await;
            // Seals a segment.
            ask(&cache, &mut guest, AsOf::Lsn(Lsn(u64::MAX))).await.unwrap_err();
        }
        // The first is sent, and the second drafted meanwhile.
        let drain_waits = send(&cache, &mut guest).await;
        for refused in [1, 3, 4, 5, 21, u64::MAX] {
            ask(&cache, &mut guest, AsOf::Lsn(Lsn(refused))).await.unwrap_err();
        }
        for lsn in [15, 10, 20, 15] {
            let taken = ask(&cache, &mut guest, AsOf::Lsn(Lsn(lsn))).await.unwrap();
            assert_eq!(taken.lsn, Lsn(lsn));
        }
        assert_eq!(pending(&cache, &guest), [10, 15, 20]);
        write(&mut guest, 21..=25).await;
        if dies {
            let Guest { vdi, store, attached, tag } = guest;
            drop(attached);
            cache.close().await;
            drop(cache);
            cache = open(&dir).await;
            let attached = cache.attach_alone(vdi.uuid).await.unwrap();
            guest = Guest { vdi, store, attached, tag };
            assert_eq!(pending(&cache, &guest), [10, 15, 20]);
            cache.join(guest.vdi.uuid, guest.store.clone()).await.unwrap();
        }
        drain(&cache, &mut guest).await;
        let _ = drain_waits.await;
        assert_eq!(kept(&guest.store), [(10, 10), (15, 15), (20, 20)], "it dies: {dies}");
        assert_eq!(pending(&cache, &guest), []);
        guest.leave(&cache).await;
    }
}

#[tokio::test(start_paused = true)]
async fn after_a_start_without_the_store_it_waits_until_that_says_how_far_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    write(&mut guest, 1..=1).await;
    guest.drain(&cache).await;
    guest.store.is_away.store(true, Ordering::Relaxed);
    write(&mut guest, 2..=9).await;
    let Guest { vdi, store, attached, tag } = guest;
    cache.release(vdi.uuid, attached).await.unwrap();
    cache.close().await;
    drop(cache);
    let cache = open(&dir).await;
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store, attached, tag };
    let mut asked = Vec::new();
    for (lsn, waiting) in [(5, 1), (8, 2)] {
        let (whose, vdi) = (Arc::clone(&cache), guest.vdi.uuid);
        let point = AsOf::Lsn(Lsn(lsn));
        let taken = async move { whose.snapshot_as_of(vdi, point, SnapshotLabel::default()).await };
        asked.push(tokio::spawn(taken));
        while cache.vdi_status(vdi).unwrap().snapshots_waiting < waiting {
            assert!(asked.iter().all(|asked| !asked.is_finished()), "nobody knows yet");
            guest.turn();
            pause().await;
        }
    }
    // The former agent's last commit had arrived.
    *guest.store.image.lock() = (Lsn(5), BTreeMap::from([(LBA, 5)]));
    cache.join(guest.vdi.uuid, guest.store.clone()).await.unwrap();
    drain(&cache, &mut guest).await;
    let outcomes: Vec<_> = futures_util::future::join_all(asked).await;
    let outcomes: Vec<_> = outcomes.into_iter().map(|outcome| outcome.unwrap().is_ok()).collect();
    assert_eq!(outcomes, [false, true]);
    assert_eq!(kept(&guest.store), [(8, 8)]);
    guest.leave(&cache).await;
}

#[tokio::test(start_paused = true)]
async fn a_time_stands_for_the_last_write_that_was_sent_then() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    guest.store.is_away.store(true, Ordering::Relaxed);
    write(&mut guest, 1..=1).await;
    let drain_waits = send(&cache, &mut guest).await;
    let before = now_ms();
    let mut times = vec![before];
    for lsn in 2..=12 {
        std::thread::sleep(Duration::from_millis(3));
        write(&mut guest, lsn..=lsn).await;
        guest.turn();
        times.push(now_ms());
        if lsn % 4 == 0 {
            // Seals a segment.
            ask(&cache, &mut guest, AsOf::Lsn(Lsn(u64::MAX))).await.unwrap_err();
        }
    }
    ask(&cache, &mut guest, AsOf::Time(before)).await.unwrap_err();
    for lsn in [6, 8, 12] {
        let taken = ask(&cache, &mut guest, AsOf::Time(times[lsn - 1])).await;
        let taken = taken.unwrap();
        assert_eq!(taken.lsn, Lsn(lsn as u64));
        assert!(taken.time_ms <= times[lsn - 1] && taken.time_ms > times[lsn - 2]);
    }
    drain(&cache, &mut guest).await;
    drain_waits.await.unwrap().unwrap();
    assert_eq!(kept(&guest.store), [(6, 6), (8, 8), (12, 12)]);
    guest.leave(&cache).await;
}
