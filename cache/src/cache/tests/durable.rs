//! Goal: a log of which everything is damaged that says how far it reached is not taken for one that is empty, and write-through
//! moves nothing of what the slot says of the log. Method: the segments are overwritten, the slots are not.

use super::replacing::guest_without_store;
use super::*;

/// What the slot of the only disk says of its log.
async fn noted(cache: &Cache) -> Lsn {
    let slots = cache.ground.local.read_slots().await.unwrap();
    slots.iter().find_map(|slot| slot.vdi.as_ref()).expect("a disk has a slot").durable
}

/// Nothing in the cache but its superblock and its slots can be read any more.
pub(super) fn spoil_all_segments(cache: &Cache, path: &Path) {
    let start = cache.ground.local.geometry.segment_offset(SegmentId(0));
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&vec![0x5a; (CACHE_BYTES - start) as usize], start).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_log_whose_headers_are_all_damaged_is_not_taken_for_an_empty_one() {
    for flushed in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(&dir).await;
        let mut guest = guest_without_store(&cache, 1).await;
        guest.write(0..20, 1).await;
        if flushed {
            guest.attached.disk.flush(1000);
        }
        let before = noted(&cache).await;
        for turn in 0.. {
            if !flushed || noted(&cache).await == Lsn(20) {
                break;
            }
            assert!(turn < TURNS_MAX, "it is never noted");
            guest.turn();
            pause().await;
        }
        assert_eq!(before, Lsn(0));
        cache.close().await;
        spoil_all_segments(&cache, &dir.path().join("cache"));
        drop((guest, cache));
        let cache = open(&dir).await;
        let opened = cache.attach(&vdi(1), Arc::new(Store::default())).await;
        match flushed {
            true => {
                let error = opened.unwrap_err().to_string();
                assert!(error.contains("everything up to LSN 20 was written durably"), "{error}");
            }
            // Nothing was promised of it.
            false => assert_eq!(opened.unwrap().disk.staged_lsn(), Lsn(0)),
        }
    }
}
