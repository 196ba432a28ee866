//! Goal: an attach, or a growth, is durable before anybody acts on it, and one that fails takes nothing.

use super::*;

#[tokio::test(start_paused = true)]
async fn an_attach_that_fails_late_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let vdi = vdi(1);
    cache.reserve(&vdi).await.unwrap();
    let (slots, counts) =
        (cache.ground.local.read_slots().await.unwrap(), cache.ground.pool.counts());
    // The worker's own handle on the device cannot be opened.
    let (path, away) = (dir.path().join("cache"), dir.path().join("away"));
    std::fs::rename(&path, &away).unwrap();
    cache.attach(&vdi, Arc::new(Store::default())).await.unwrap_err();
    std::fs::rename(&away, &path).unwrap();
    assert_eq!(cache.ground.local.read_slots().await.unwrap(), slots);
    assert_eq!(cache.ground.pool.counts(), counts);
    let attached = cache.attach(&vdi, Arc::new(Store::default())).await.unwrap();
    cache.release(vdi.uuid, attached).await.unwrap();
    cache.detach(vdi.uuid).await.unwrap();
    assert_empty(&cache);
}

#[tokio::test(start_paused = true)]
async fn an_attach_whose_slot_cannot_be_written_gives_its_segments_back() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let sim = SimDevice::new(CACHE_BYTES, 1);
    let local = Local::make_on(file.path(), sim.device()).await.unwrap();
    let cache = Cache::on_local(options(file.path().into()), local).await.unwrap();
    let vdi = vdi(1);
    cache.reserve(&vdi).await.unwrap();
    let counts = cache.ground.pool.counts();
    sim.inject(OpKind::Write, 0, Fault::Io);
    cache.attach(&vdi, Arc::new(Store::default())).await.unwrap_err();
    assert_eq!(cache.ground.pool.counts(), counts);
    let _attached = cache.attach(&vdi, Arc::new(Store::default())).await.unwrap();
    assert_eq!(cache.ground.pool.counts().free, counts.free - 2);
}

/// The one before it is the only good copy.
#[tokio::test(start_paused = true)]
async fn a_second_copy_of_a_slot_that_fails_when_a_log_is_opened_is_written_to_the_same_place_again()
 {
    let file = tempfile::NamedTempFile::new().unwrap();
    let sim = SimDevice::new(CACHE_BYTES, 1);
    let local = Local::make_on(file.path(), sim.device()).await.unwrap();
    let cache = Cache::on_local(options(file.path().into()), local).await.unwrap();
    let mut vdi = vdi(1);
    cache.reserve(&vdi).await.unwrap();
    // It grew meanwhile, so that both copies are written: the second and the third of all, of which the third fails.
    vdi.size_bytes *= 2;
    let bad = Geometry::slot_offset(0, 3);
    sim.set_bad(bad, BLOCK_SIZE as u64, &[OpKind::Write]);
    let good = |sim: &SimDevice| sim.peek(Geometry::slot_offset(0, 2), BLOCK_SIZE);
    cache.attach(&vdi, Arc::new(Store::default())).await.unwrap_err();
    let first = good(&sim);
    let next = cache.inner.lock().await.slots[0].next(None).sequence;
    assert_eq!(Geometry::slot_offset(0, next), bad);
    cache.attach(&vdi, Arc::new(Store::default())).await.unwrap_err();
    assert_eq!(good(&sim), first);
    sim.set_bad(bad, BLOCK_SIZE as u64, &[]);
    let attached = cache.attach(&vdi, Arc::new(Store::default())).await.unwrap();
    assert_eq!(attached.disk.size_bytes(), vdi.size_bytes);
}

/// Two segments or none (rule L10): of fifteen, seven disks take two each.
#[tokio::test(start_paused = true)]
async fn a_disk_for_which_two_segments_are_not_left_is_refused_and_takes_none() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guests = Vec::new();
    for n in 1..=7 {
        guests.push(Guest::new(&cache, n).await);
    }
    let one_left = cache.ground.pool.counts();
    assert_eq!(one_left.free, 1);
    let words = cache.reserve(&vdi(8)).await.unwrap_err().to_string();
    assert!(words.contains("1 free, 2 needed") && words.contains("detach a disk"), "{words}");
    assert_eq!(cache.ground.pool.counts(), one_left);
    // The others go on, and so does this one once there is room.
    guests[0].write(0..10, 1).await;
    guests[0].drain(&cache).await;
    guests.remove(0).leave(&cache).await;
    Guest::new(&cache, 8).await;
}

#[tokio::test(start_paused = true)]
async fn a_growth_that_is_not_durable_is_not_told_to_the_guest_and_can_be_tried_again() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let sim = SimDevice::new(CACHE_BYTES, 1);
    let local = Local::make_on(file.path(), sim.device()).await.unwrap();
    let cache = Cache::on_local(options(file.path().into()), local).await.unwrap();
    let mut guest = Guest::new(&cache, 1).await;
    let (uuid, former) = (guest.vdi.uuid, guest.vdi.size_bytes);
    for fault in [OpKind::Write, OpKind::Flush] {
        sim.inject(fault, 0, Fault::Io);
        cache.resize(uuid, 2 * former).await.unwrap_err();
        guest.turn();
        assert_eq!(guest.attached.disk.size_bytes(), former, "{fault:?}");
    }
    cache.resize(uuid, 2 * former).await.unwrap();
    guest.turn();
    assert_eq!(guest.attached.disk.size_bytes(), 2 * former);
    // What a start without the store finds.
    let slots = cache.ground.local.read_slots().await.unwrap();
    assert!(slots.iter().any(|s| s.vdi.as_ref().is_some_and(|v| v.size_bytes == 2 * former)));
}

/// Whichever copy of its slot rots: what the guest was told is there at a start without the store, too.
#[tokio::test(start_paused = true)]
async fn a_disk_that_grew_does_not_shrink_when_a_copy_of_its_slot_rots() {
    for (copy, at_attach) in [(0, false), (1, false), (0, true), (1, true)] {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(&dir).await;
        let guest = Guest::new(&cache, 1).await;
        let (mut vdi, store) = (guest.vdi.clone(), Arc::clone(&guest.store));
        vdi.size_bytes *= 2;
        if !at_attach {
            cache.resize(vdi.uuid, vdi.size_bytes).await.unwrap();
        }
        drop((guest, cache));
        if at_attach {
            let cache = open(&dir).await;
            drop(cache.attach(&vdi, store).await.unwrap());
        }
        let file = File::options().write(true).open(dir.path().join("cache")).unwrap();
        file.write_all_at(&[0x5a; BLOCK_SIZE], Geometry::slot_offset(0, copy)).unwrap();
        let cache = open(&dir).await;
        let attached = cache.attach_alone(vdi.uuid).await.unwrap();
        assert_eq!(attached.disk.size_bytes(), vdi.size_bytes, "copy {copy}");
    }
}
