//! Goal: a guest that writes near a full ring is slowed down, and not stopped again and again.

use super::*;

#[tokio::test(start_paused = true)]
async fn near_a_full_ring_single_writes_are_slowed_down_evenly() {
    let dir = tempfile::tempdir().unwrap();
    // Enough segments for a slope.
    let large =
        CacheOptions { create_size: Some(4 * CACHE_BYTES), ..options(dir.path().join("cache")) };
    Cache::open(large).await.unwrap().close().await;
    let (cache, store) = left_behind(&dir).await;
    let vdi = vdi(1);
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let mut guest = Guest { vdi, store: Arc::clone(&store), attached, tag: 0 };
    let (mut next, mut waits) = (400, vec![0]);
    // Until a write waits for longer than a segment is ever held back.
    while waits.last().is_some_and(|wait| *wait < 3000) {
        guest.turn();
        pause().await;
        if guest.stage(next, 9) == Staged::All {
            next += 1;
            waits.push(0);
            // The guest's own pace: half a second for a segment.
            tokio::time::sleep(Duration::from_millis(3)).await;
        } else if let Some(wait) = waits.last_mut() {
            *wait += 1;
        }
    }
    assert_eq!(cache.ground.pool.counts().free, 0, "nothing is left unused");
    waits.pop();
    let longest = waits.iter().max().copied().unwrap_or_default();
    assert!(waits.iter().sum::<u32>() > 500, "it was slowed down");
    assert!(longest < 150, "by {longest} ms at once, of up to two seconds for a segment");
    cache.join(guest.vdi.uuid, store.clone()).await.unwrap();
    guest.drain(&cache).await;
    assert_eq!(stored(&store, 400..next), vec![Some(9); (next - 400) as usize]);
}
