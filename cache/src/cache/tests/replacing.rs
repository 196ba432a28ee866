//! Goal: a new leg that becomes a member has everything, whatever disks do meanwhile; one that cannot be flushed is never named.
//! Method: the store takes nothing, so that the log alone has the data; afterwards the new leg alone is replayed to
//! an empty store. Crashes at any step are in tests/log_crash.

use super::*;
use crate::leg_filler::LegFiller;
use crate::local::Terms;
use crate::pool::Pool;
use crate::{CacheError, ReplacementState};
use blockstore::device::sim::FaultRates;

/// A store that does not answer.
#[derive(Debug)]
struct Away;

#[async_trait]
impl Backing for Away {
    fn committed(&self) -> Lsn {
        Lsn(0)
    }

    async fn read(&self, _: Lba, _: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        std::future::pending().await
    }

    async fn commit(&self, _: Batch) -> Result<(), BackingError> {
        std::future::pending().await
    }
}

pub(super) async fn guest_without_store(cache: &Cache, n: u128) -> Guest {
    let (vdi, store) = (vdi(n), Arc::new(Store::default()));
    cache.reserve(&vdi).await.unwrap();
    let attached = cache.attach(&vdi, Arc::new(Away)).await.unwrap();
    Guest { vdi, store, attached, tag: 0 }
}

fn copied(cache: &Cache) -> (ReplacementState, u64) {
    let now = cache.replacement().unwrap();
    (now.state, now.bytes_done)
}

/// The guest goes on until so many bytes are copied.
async fn until_copied(cache: &Cache, guest: &mut Guest, bytes: u64) {
    for _ in 0..TURNS_MAX {
        guest.turn();
        if copied(cache).1 >= bytes {
            return;
        }
        pause().await;
    }
    panic!("the copy does not go on: {:?}", cache.replacement());
}

/// What the leg at `path` alone makes of an empty store.
async fn replayed(path: &Path, n: u128) -> BTreeMap<u64, u8> {
    let cache = Cache::open_legs(
        options(path.into()),
        &[path.into()],
        &Terms { degraded: true, machine: None },
    )
    .await
    .unwrap();
    let mut guest = Guest::new(&cache, n).await;
    guest.drain(&cache).await;
    let image = guest.store.image.lock().1.clone();
    cache.close().await;
    image
}

/// In real time: a leg that does not answer while another does is given up after a while.
#[tokio::test]
async fn a_new_leg_has_what_was_written_before_and_meanwhile_although_a_worker_dies() {
    let dir = tempfile::tempdir().unwrap();
    let new = dir.path().join("new");
    let cache = open(&dir).await;
    let mut guest = guest_without_store(&cache, 1).await;
    let mut idle = guest_without_store(&cache, 2).await;
    idle.write(0..3, 9).await;
    // One segment and a part of the next.
    guest.write(0..300, 1).await;
    cache.replace_leg(&new, 16 << 20).await.unwrap();
    assert!(cache.replace_leg(&new, 0).await.is_err(), "one at a time");
    idle.turn();
    until_copied(&cache, &mut guest, 1 << 20).await;
    guest.write(200..400, 2).await;
    // Its worker dies with a write on the way that reached the first leg alone.
    assert_eq!(guest.stage(500, 3), Staged::All);
    let mut actions = Vec::new();
    guest.attached.disk.poll(&mut actions);
    for action in actions {
        if let Action::Write { leg: 0, offset, image, start, len, .. } = action {
            guest.attached.legs[0].write_all_at(image.bytes(start, len), offset).unwrap();
        }
    }
    guest.attached = cache.reopen(guest.vdi.uuid).await.unwrap();
    guest.write(390..450, 4).await;
    // A third disk comes amid the copy, the second goes to rest.
    let mut late = guest_without_store(&cache, 3).await;
    late.write(7..9, 5).await;
    cache.release(idle.vdi.uuid, idle.attached).await.unwrap();
    for _ in 0..TURNS_MAX {
        guest.turn();
        late.turn();
        if copied(&cache).0 != ReplacementState::Copying {
            break;
        }
        pause().await;
    }
    let done = cache.replacement().unwrap();
    assert_eq!((done.state, done.why), (ReplacementState::Done, None));
    assert_eq!(cache.legs().iter().filter(|leg| leg.member).count(), 2);
    guest.write(450..460, 6).await;
    cache.close().await;
    drop((guest, late, cache));
    std::fs::remove_file(dir.path().join("cache")).unwrap();
    let bytes = |from: u64, to: u64, byte: u8| (from..to).map(move |lba| (lba, byte));
    let image = replayed(&new, 1).await;
    let expected = bytes(0, 200, 1).chain(bytes(200, 390, 2)).chain(bytes(390, 450, 4));
    let expected = expected.chain(bytes(450, 460, 6)).chain([(500, 3)]);
    assert_eq!(image, expected.collect());
    assert_eq!(replayed(&new, 2).await, bytes(0, 3, 9).collect());
    assert_eq!(replayed(&new, 3).await, bytes(7, 9, 5).collect());
}

/// In real time: what ends a copy is waited for with a limit.
#[tokio::test]
async fn a_replacement_that_is_given_up_leaves_the_disks_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let new = dir.path().join("new");
    let cache = open(&dir).await;
    let mut guest = guest_without_store(&cache, 1).await;
    guest.write(0..300, 1).await;
    cache.replace_leg(&new, 1 << 20).await.unwrap();
    until_copied(&cache, &mut guest, 1 << 20).await;
    assert!(cache.cancel_replacement().await);
    assert!(!cache.cancel_replacement().await, "there is none any more");
    assert_eq!(copied(&cache).0, ReplacementState::Failed);
    guest.write(0..50, 2).await;
    assert!(Local::open(&new, crate::local::Mode::ReadOnly).await.is_err(), "it is unfinished");
    // Again, and to the end: the same file may be filled anew at once.
    for turn in 0.. {
        match cache.replace_leg(&new, 0).await {
            Ok(_) => break,
            // The worker has not heard yet, and so keeps it open.
            Err(error) => assert!(turn < 10, "{error}"),
        }
        guest.turn();
    }
    until_copied(&cache, &mut guest, 15 << 20).await;
    cache.close().await;
}

#[tokio::test(start_paused = true)]
async fn a_leg_that_cannot_be_flushed_is_never_named_a_member() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (good, new) = (SimDevice::new(CACHE_BYTES, 1), SimDevice::new(CACHE_BYTES, 2));
    let local = Arc::new(Local::make_on(file.path(), good.device()).await.unwrap());
    let before = local.superblock().await;
    let pool = Arc::new(Pool::new(local.geometry, Vec::new(), 1));
    local.blank_new_leg(&new.device()).await.unwrap();
    pool.begin_filling(1, std::iter::empty());
    let given_up = local.begin_joining(1, file.path(), new.device()).await.unwrap();
    new.set_rates(FaultRates { flush_io: 1.0, ..FaultRates::default() });
    let filler = LegFiller::new(Arc::clone(&local), pool, Arc::default(), (1, given_up), 0);
    filler.run().await.unwrap_err();
    assert_eq!(local.superblock().await, before);
    drop((filler, local));
    // Alone, without a word of the operator's.
    let device = good.connect().device();
    Local::on_device(file.path(), device).await.unwrap();
    let refused = Local::on_device(file.path(), new.connect().device()).await;
    assert!(matches!(refused, Err(CacheError::Unfinished { .. })), "{refused:?}");
}
