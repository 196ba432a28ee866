//! Goal: on a leg whose start could not be noted nothing is acknowledged before it is. Method: simulated legs that refuse their
//! superblock, and a disk.

use super::*;

#[tokio::test(start_paused = true)]
async fn no_log_is_opened_before_the_start_is_noted() {
    let files = [0, 1].map(|_| tempfile::NamedTempFile::new().unwrap());
    let sims = [1, 2].map(|seed| SimDevice::new(CACHE_BYTES, seed));
    let named = |which: &[usize]| -> Vec<_> {
        which.iter().map(|n| (files[*n].path().into(), sims[*n].device())).collect()
    };
    let local = Local::make_legs(named(&[0, 1])).await.unwrap();
    let cache = Cache::on_local(options(files[0].path().into()), local).await.unwrap();
    cache.reserve(&vdi(1)).await.unwrap();
    for out in [0_u8, 1] {
        // Each is there on the other leg, in both copies, and is nothing but an attempt.
        sims[1 - usize::from(out)].inject(OpKind::Flush, 1, Fault::Io);
        cache.ground.local.leg_silent(out, None).await;
    }
    assert_eq!(cache.ground.local.members().len(), 2);
    drop(cache);
    let set_dropping = |kinds: &[OpKind]| sims[1].set_dropping(0, 2 * BLOCK_SIZE as u64, kinds);
    set_dropping(&[OpKind::Write]);
    let alone = Local::on_devices(named(&[1]), false).await.unwrap();
    let cache = Cache::on_local(options(files[1].path().into()), alone).await.unwrap();
    let free = cache.ground.pool.counts().free;
    let refused = cache.attach(&vdi(1), Arc::new(Store::default())).await.unwrap_err().to_string();
    assert!(refused.contains("start is noted"), "{refused}");
    cache.reserve(&vdi(2)).await.unwrap_err();
    assert_eq!(cache.ground.pool.counts().free, free);
    set_dropping(&[]);
    let attached = cache.attach(&vdi(1), Arc::new(Store::default())).await.unwrap();
    // What is acknowledged from here on is known to be there: the other leg does not win over it.
    let both = Local::on_devices(named(&[0, 1]), false).await;
    assert!(matches!(both, Err(CacheError::SplitLegs { .. })), "{both:?}");
    drop(attached);
}
