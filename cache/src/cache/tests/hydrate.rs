//! Goal: after hydrating nothing of a disk needs the store, also after a restart, and nothing newer was overridden.

use super::*;
use crate::index::Found;
use crate::link::{Fetched, Kept};
use crate::{HydrateError, HydrateStatus};

const BLOCKS: u64 = (64 << 20) / BLOCK_SIZE as u64;

fn put(store: &Store, lbas: std::ops::Range<u64>, byte: u8) {
    store.image.lock().1.extend(lbas.map(|lba| (lba, byte)));
}

/// Hydrates to the end, under a worker that works.
async fn hydrate(cache: &Cache, guest: &mut Guest) -> Result<HydrateStatus, HydrateError> {
    let vdi = guest.vdi.uuid;
    let mut begun = std::pin::pin!(cache.hydrate(vdi, None));
    let begun = loop {
        guest.turn();
        tokio::select! {
            biased;
            begun = &mut begun => break begun?,
            () = pause() => {}
        }
    };
    for _ in 0..TURNS_MAX {
        guest.turn();
        pause().await;
        let status = cache.vdi_status(vdi).unwrap().hydrate.unwrap();
        if !status.running {
            assert_eq!(status.total_bytes, begun.total_bytes);
            return Ok(status);
        }
    }
    panic!("the hydration does not end");
}

/// What the index says of a block, in one letter.
fn known(guest: &Guest, lba: u64) -> char {
    match guest.attached.disk.index().get(Lba(lba)) {
        Found::At { .. } => 'b',
        Found::Zero => '0',
        Found::Patched(_) => 'p',
        Found::Absent => '-',
    }
}

fn assert_all_known(guest: &Guest, stored: &[std::ops::Range<u64>]) {
    for lba in 0..BLOCKS {
        let expected = if stored.iter().any(|range| range.contains(&lba)) { 'b' } else { '0' };
        assert_eq!(known(guest, lba), expected, "block {lba}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_hydrated_disk_needs_no_store_before_and_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    put(&guest.store, 100..1400, 3);
    put(&guest.store, 9000..9001, 4);
    guest.write(1390..1500, 5).await;
    let status = hydrate(&cache, &mut guest).await.unwrap();
    assert_eq!((status.total_bytes, status.done_bytes), (Some(1291 * 4096), 1291 * 4096));
    assert_eq!(status.error, None);
    let stored = [100..1500, 9000..9001];
    assert_all_known(&guest, &stored);
    // Written to, the holes are none any more.
    guest.write(5000..5001, 6).await;
    guest.drain(&cache).await;
    let status = hydrate(&cache, &mut guest).await.unwrap();
    assert_eq!(status.total_bytes, Some(0), "nothing is left to fetch");
    let stored = [100..1500, 9000..9001, 5000..5001];
    let Guest { vdi, store, attached, tag } = guest;
    cache.release(vdi.uuid, attached).await.unwrap();
    cache.close().await;
    drop(cache);
    let cache = open(&dir).await;
    let attached = cache.attach_alone(vdi.uuid).await.unwrap();
    let guest = Guest { vdi, store, attached, tag };
    assert_all_known(&guest, &stored);
}

#[tokio::test(start_paused = true)]
async fn what_does_not_fit_is_refused_before_it_begins() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    put(&guest.store, 0..4000, 3);
    let error = hydrate(&cache, &mut guest).await.unwrap_err();
    let HydrateError::TooLarge { wanted, room } = &error else { panic!("{error}") };
    assert_eq!(*wanted, 4000 * 4096);
    assert!(*room < 15 << 20 && *room > 8 << 20, "{room}");
    assert!(error.to_string().contains("larger cache"), "{error}");
    assert_eq!(known(&guest, 0), '-', "nothing was fetched");
    assert_eq!(known(&guest, 5000), '0', "what it learned stays");
}

/// What was fetched before a write, and comes after it, is not kept: not as a block, and not as a hole, whether the write
/// is still there or was committed and evicted.
#[tokio::test(start_paused = true)]
async fn nothing_newer_is_overridden() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    let turn = |guest: &mut Guest, message: ToDisk| {
        guest.attached.disk.on_message(message);
        let mut messages = Vec::new();
        while run_once(&mut guest.attached, &mut messages) {}
        let (said, others): (Vec<_>, Vec<_>) = messages.into_iter().partition(|message| {
            matches!(message, FromDisk::Planned { .. } | FromDisk::Kept { .. })
        });
        others.into_iter().for_each(|message| guest.attached.link.send(message));
        guest.attached.disk.completions();
        said.into_iter().next().expect("an answer")
    };
    let plan = |guest: &mut Guest| {
        let plan = ToDisk::Plan { id: 1, lba: Lba(0), blocks: 16 };
        let FromDisk::Planned { ticket, absent, .. } = turn(guest, plan) else { panic!() };
        (ticket, absent)
    };
    let pieces = || {
        let block = Bytes::from(vec![9; BLOCK_SIZE]);
        vec![
            Fetched::Data { lba: Lba(0), blocks: vec![block; 8] },
            Fetched::Hole { lba: Lba(8), blocks: 8 },
        ]
    };
    let keep = |guest: &mut Guest, ticket| {
        let keep = ToDisk::Keep { id: 2, ticket, roomy: true, pieces: pieces() };
        let FromDisk::Kept { kept, .. } = turn(guest, keep) else { panic!() };
        kept
    };
    let (ticket, absent) = plan(&mut guest);
    assert_eq!(absent, [(Lba(0), 16)]);
    assert_eq!(guest.stage(3, 7), Staged::All);
    assert_eq!(guest.stage(12, 7), Staged::All);
    let place = |guest: &Guest, lba| match guest.attached.disk.index().get(Lba(lba)) {
        Found::At { slot, crc } => (slot, crc),
        other => panic!("{other:?}"),
    };
    let (three, twelve) = (place(&guest, 3), place(&guest, 12));
    assert_eq!(keep(&mut guest, ticket), Kept::All);
    assert_eq!((place(&guest, 3), place(&guest, 12)), (three, twelve));
    let picture: String = (0..16).map(|lba| known(&guest, lba)).collect();
    assert_eq!(picture, "bbbbbbbb0000b000");
    assert!(plan(&mut guest).1.is_empty());

    // All of it is written, committed and evicted after the next plan.
    let mut other = Guest::new(&cache, 2).await;
    let (ticket, _) = plan(&mut guest);
    guest.write(0..16, 8).await;
    guest.drain(&cache).await;
    for round in 0..3u64 {
        other.write(0..3000, round as u8).await;
        other.drain(&cache).await;
        guest.turn();
    }
    for _ in 0..100 {
        guest.turn();
        pause().await;
    }
    let picture: String = (0..16).map(|lba| known(&guest, lba)).collect();
    assert_eq!(picture, "----------------", "evicted, and no hole came back");
    assert_eq!(keep(&mut guest, ticket), Kept::Stale);
    assert_eq!(known(&guest, 0), '-');
    let Guest { vdi, store, attached, tag: _ } = guest;
    cache.release(vdi.uuid, attached).await.unwrap();
    assert_eq!(stored(&store, 0..16), vec![Some(8); 16]);
}

/// What a segment's eviction takes out of the index is not shown as held a moment longer: an operator, or a test, that
/// sees the segment given back and everything held may cut the store off right then.
#[tokio::test(start_paused = true)]
async fn what_leaves_is_not_shown_as_held() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(&dir).await;
    let mut guest = Guest::new(&cache, 1).await;
    guest.write(0..600, 8).await;
    guest.drain(&cache).await;
    guest.attached.on_message(ToDisk::Tick);
    let held = || cache.vdi_status(Uuid::from_u128(1)).unwrap().held_bytes;
    assert_eq!(held(), 600 * BLOCK_SIZE as u64);
    let lbas = (0..8).map(Lba).collect();
    guest.attached.on_message(ToDisk::Evict { segment: SegmentId(0), lbas, holes: Vec::new() });
    assert_eq!(known(&guest, 0), '-');
    assert_eq!(held(), 592 * BLOCK_SIZE as u64);
}
