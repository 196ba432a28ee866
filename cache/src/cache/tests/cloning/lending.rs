//! Goal: without the store, a clone reads what its parent holds of the snapshot, and never what its parent was before or after;
//! nothing that is being read for it is used for anything else.
//! Method: as in the module above; the parent holds all that the store has.

use super::*;
use crate::AsOf;
use crate::format::slot::CloneOrigin;
use crate::link::Place;
use crate::vdi::{Loan, Wanted};

/// Blocks of which the store has at least some, and beyond them some that it has not.
const SEEN: u64 = BLOCKS + 100;

/// As [`parent`], and it knows all that the store has.
async fn informed_parent(cache: &Cache, seed: u64) -> Disk {
    let mut parent = Disk::new(cache, 1, seed).await;
    parent.change(120).await;
    let vdi = parent.guest.vdi.uuid;
    parent.until(cache.drain(vdi)).await.unwrap();
    parent.until(cache.hydrate(vdi, Some(vec![(Lba(0), SEEN)]))).await.unwrap();
    while cache.vdi_status(vdi).unwrap().hydrate.is_some_and(|hydrate| hydrate.running) {
        parent.guest.turn();
        pause().await;
    }
    parent.change(20).await;
    parent.until(cache.drain(vdi)).await.unwrap();
    parent.full.is_away.store(true, Ordering::Relaxed);
    parent.change(30).await;
    parent
}

/// The parent holds this block, whole, and it is what it was at the snapshot.
fn holds(parent: &Disk, snapshot: &Model, lba: u64) -> bool {
    parent.now.get(&lba) == snapshot.get(&lba)
        && matches!(parent.guest.attached.disk.index().get(Lba(lba)), Found::At { .. })
}

/// What a clone is answered for a block of which it holds nothing; none if it waits for the store.
async fn read(clone: &mut Disk, parent: &mut Disk, snapshot: &Model, lba: u64) -> Option<[u8; 8]> {
    let id = 1000 + lba;
    clone.guest.attached.ask(FromDisk::Fetch { id, lba: Lba(lba), blocks: 1 });
    for turn in 0..TURNS_MAX {
        if turn > 60 && !holds(parent, snapshot, lba) {
            return None;
        }
        parent.guest.turn();
        while let Some(message) = clone.guest.attached.link.try_recv() {
            match message {
                ToDisk::Fetched { id: of, result, keep } => {
                    assert_eq!((of, keep), (id, false), "nothing of it could be evicted");
                    let blocks = result.unwrap();
                    return Some(blocks[0].as_ref().map_or([0; 8], |block| sectors_of(block)));
                }
                other => clone.guest.attached.on_message(other),
            }
        }
        pause().await;
    }
    panic!("block {lba} is held, and not lent")
}

/// What the disk says to this.
fn told(disk: &mut AttachedDisk, message: ToDisk) -> Vec<FromDisk> {
    disk.on_message(message);
    let mut said = Vec::new();
    while run_once(disk, &mut said) {}
    said
}

fn is_evicted(said: &[FromDisk], segment: SegmentId) -> bool {
    said.iter()
        .any(|message| matches!(message, FromDisk::Evicted { segment: of } if *of == segment))
}

#[tokio::test(start_paused = true)]
async fn without_the_store_a_clone_reads_what_its_parent_holds_of_the_snapshot() {
    for seed in 1..4 {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(&dir).await;
        let mut parent = informed_parent(&cache, seed).await;
        let lsn = parent.snapshot(&cache).await.lsn;
        let model = parent.now.clone();
        parent.change(10).await;
        parent.clone_of(&cache, 2, lsn).await.unwrap();
        parent.change(10).await;
        let attached = cache.attach_alone(vdi(2).uuid).await.unwrap();
        let mut clone = Disk::with(vdi(2), attached, Arc::default(), model.clone(), seed);
        // What was written since is in a sealed segment, too.
        let vdi = parent.guest.vdi.uuid;
        let beyond = AsOf::Lsn(Lsn(u64::MAX));
        let sealed = cache.snapshot_as_of(vdi, beyond, SnapshotLabel::default());
        parent.until(sealed).await.unwrap_err();
        let (content, absent) = clone.content(&cache, &model).await;
        assert_eq!(changed(&content, &model), Vec::<u64>::new());
        let (mut lent, mut waits) = (0, 0);
        for lba in absent.clone() {
            assert!(lba < BLOCKS, "seed {seed}: block {lba} is known not to be there");
            match read(&mut clone, &mut parent, &model, lba).await {
                Some(sectors) => {
                    assert_eq!(
                        sectors,
                        model.get(&lba).copied().unwrap_or_default(),
                        "seed {seed}: block {lba}"
                    );
                    lent += 1;
                }
                None => waits += 1,
            }
        }
        assert!(lent > 20 && waits > 0, "seed {seed}: {lent} {waits}");
        let (_, absent_still) = clone.content(&cache, &model).await;
        assert_eq!(absent, absent_still);
        // What waits is answered when the store is there.
        parent.full.is_away.store(false, Ordering::Relaxed);
        parent.until(cache.drain(vdi)).await.unwrap();
        clone.full.image.lock().1 = parent.full.cuts.lock()[&lsn.0].clone();
        cache.join(clone.guest.vdi.uuid, clone.full.clone()).await.unwrap();
        // And what was lent was given back.
        for segment in cache.ground.pool.owned(vdi) {
            let evict = ToDisk::Evict { segment, lbas: Vec::new(), holes: Vec::new() };
            assert!(is_evicted(&told(&mut parent.guest.attached, evict), segment), "seed {seed}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_clone_reads_nothing_of_what_another_log_of_its_parent_has() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut parent = informed_parent(&cache, 1).await;
    let taken = parent.snapshot(&cache).await;
    let handle = cache.handle(parent.guest.vdi.uuid).unwrap();
    let snapshot = Origin { vdi: parent.guest.vdi.uuid, lsn: taken.lsn };
    let index = parent.guest.attached.disk.index();
    let held = |lba: &u64| matches!(index.get(Lba(*lba)), Found::At { .. });
    let lba = Lba((0..BLOCKS).find(held).unwrap());
    for (time_ms, lsn, is_lent) in [
        (taken.time_ms, taken.lsn, true),
        (taken.time_ms + 1, taken.lsn, false),
        (taken.time_ms, taken.lsn.plus(1), false),
    ] {
        let of = CloneOrigin { snapshot: Origin { lsn, ..snapshot }, time_ms };
        let wanted = Wanted { of, lba, blocks: 1 };
        let loan = parent.until(handle.lend(snapshot.vdi, wanted)).await.unwrap();
        assert_eq!(matches!(loan, Loan::Blocks(_)), is_lent, "{time_ms} {lsn}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_segment_of_which_something_is_lent_is_not_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut parent = informed_parent(&cache, 1).await;
    let lsn = parent.snapshot(&cache).await.lsn;
    let disk = &mut parent.guest.attached;
    let held: Vec<u64> = (0..BLOCKS)
        .filter(|lba| matches!(disk.disk.index().get(Lba(*lba)), Found::At { .. }))
        .collect();
    let lend = |id, lba| ToDisk::Lend { id, lba: Lba(lba), blocks: 1, lsn };
    let places = |said: Vec<FromDisk>| {
        said.into_iter().find_map(|message| match message {
            FromDisk::Lent { places, .. } => Some(places),
            _ => None,
        })
    };
    let found: Vec<Vec<Place>> =
        (7..9).map(|id| places(told(disk, lend(id, held[0]))).unwrap().unwrap()).collect();
    let geometry = &cache.ground.local.geometry;
    let segment = geometry.segment_of(geometry.block_at(found[0][0].offset));
    let lbas: Vec<Lba> = held.iter().map(|lba| Lba(*lba)).collect();
    let evict = ToDisk::Evict { segment, lbas, holes: Vec::new() };
    assert!(!is_evicted(&told(disk, evict), segment), "it is being read");
    assert_eq!(places(told(disk, lend(9, held[0]))), Some(None), "it is lent no more");
    assert!(
        !is_evicted(&told(disk, ToDisk::GiveBack { id: 7 }), segment),
        "it is being read still"
    );
    assert!(is_evicted(&told(disk, ToDisk::GiveBack { id: 8 }), segment));
    assert!(!is_evicted(&told(disk, ToDisk::GiveBack { id: 8 }), segment), "once");
}

#[tokio::test(start_paused = true)]
async fn a_clone_that_comes_up_first_waits_for_its_parent() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut parent = informed_parent(&cache, 1).await;
    let lsn = parent.snapshot(&cache).await.lsn;
    let model = parent.now.clone();
    parent.clone_of(&cache, 2, lsn).await.unwrap();
    let (parent_now, full) = (parent.now.clone(), Arc::clone(&parent.full));
    let cache = reopened(cache, &dir, vec![parent]).await;
    let attached = cache.attach_alone(vdi(2).uuid).await.unwrap();
    let mut clone = Disk::with(vdi(2), attached, Arc::default(), model.clone(), 1);
    let (_, absent) = clone.content(&cache, &model).await;
    for lba in &absent {
        clone.guest.attached.ask(FromDisk::Fetch { id: *lba, lba: Lba(*lba), blocks: 1 });
    }
    for _ in 0..2000 {
        pause().await;
    }
    let said = std::iter::from_fn(|| clone.guest.attached.link.try_recv());
    let answered = said.filter(|message| matches!(message, ToDisk::Fetched { .. })).count();
    assert_eq!(answered, 0, "nobody can know");
    let attached = cache.attach_alone(vdi(1).uuid).await.unwrap();
    let mut parent = Disk::with(vdi(1), attached, full, parent_now, 1);
    let mut answered = BTreeMap::new();
    for _ in 0..TURNS_MAX {
        parent.guest.turn();
        while let Some(message) = clone.guest.attached.link.try_recv() {
            let ToDisk::Fetched { id, result, .. } = message else { continue };
            answered.insert(id, sectors_of(result.unwrap()[0].as_ref().unwrap()));
        }
        let is_left = |lba: &u64| holds(&parent, &model, *lba) && !answered.contains_key(lba);
        if !absent.iter().any(is_left) {
            break;
        }
        pause().await;
    }
    assert!(answered.len() > 20, "{}", answered.len());
    assert!(answered.iter().all(|(lba, sectors)| *sectors == model[lba]));
    assert!(!absent.iter().any(|lba| holds(&parent, &model, *lba) && !answered.contains_key(lba)));
}
