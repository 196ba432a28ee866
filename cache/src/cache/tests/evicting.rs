//! Goal: a disk that cannot give segments back for a while, or leaves meanwhile, takes none from the others for good.

use super::*;

#[tokio::test(start_paused = true)]
async fn a_worker_that_is_silent_does_not_stop_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut silent = Guest::new(&cache, 1).await;
    silent.write(0..1500, 1).await;
    silent.drain(&cache).await;
    // Wants more than is free; what the silent one holds would do.
    let mut busy = Guest::new(&cache, 2).await;
    for round in 0..3 {
        busy.write(0..3000, round).await;
    }
    busy.drain(&cache).await;
    // It was only slow: what it gives back late is counted once, and nothing is lost to the pool.
    for _ in 0..2 {
        for _ in 0..100 {
            silent.turn();
            pause().await;
        }
        tokio::time::sleep(Duration::from_secs(6)).await;
    }
    assert!(cache.ground.pool.counts().used() <= 4, "all but what the disks write to can be had");
    silent.leave(&cache).await;
    busy.leave(&cache).await;
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn segments_whose_list_could_not_be_read_are_evicted_later() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, path) = (open(&dir).await, dir.path().join("cache"));
    let mut reader = Guest::new(&cache, 1).await;
    reader.write(0..2500, 1).await;
    reader.drain(&cache).await;
    let mut writer = Guest::new(&cache, 2).await;
    let good = std::fs::read(&path).unwrap();
    let held = cache.ground.pool.owned(reader.vdi.uuid);
    held.iter().for_each(|id| damage(&cache, &path, *id));
    // It makes do with what is free and its own, in turn.
    writer.write(0..6000, 2).await;
    assert!(held.len() > 5 && cache.ground.pool.owned(reader.vdi.uuid) == held);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    for id in held {
        let geometry = &cache.ground.local.geometry;
        let (at, len) = (geometry.segment_offset(id) as usize, geometry.segment_size as usize);
        file.write_all_at(&good[at..at + len], at as u64).unwrap();
    }
    let rounds = async {
        tokio::time::sleep(Duration::from_secs(6)).await;
        for _ in 0..60 {
            writer.write(0..500, 3).await;
        }
    };
    tokio::select! {
        () = rounds => {}
        () = drive(&mut reader) => unreachable!("it never ends"),
    }
    assert!(cache.ground.pool.owned(reader.vdi.uuid).len() <= 2, "what is written to stays");
    writer.drain(&cache).await;
    reader.leave(&cache).await;
    writer.leave(&cache).await;
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_leaves_amid_evictions_leaves_no_debt() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut leaving = Guest::new(&cache, 1).await;
    leaving.write(0..1500, 1).await;
    leaving.drain(&cache).await;
    let mut staying = Guest::new(&cache, 2).await;
    staying.write(0..2000, 2).await;
    assert!(cache.ground.pool.counts().clean > 0, "evictions are asked for and not answered");
    leaving.leave(&cache).await;
    staying.write(0..6000, 3).await;
    staying.drain(&cache).await;
    staying.leave(&cache).await;
    assert_empty(&cache);
}
