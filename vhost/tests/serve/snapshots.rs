//! Goal: with the real worker under load, a snapshot holds every write that was completed before it was asked for, none that
//! came after it was answered, and exactly those with a lower LSN. Method: one guest overwrites a block without pause, many
//! writes under way; another thread takes snapshots; the backing keeps the image at each.

use crate::guest::{DATA, Guest, OK};
use crate::rig::{BLOCK, Rig};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const MIB: u64 = 1 << 20;
const WRITES: u64 = 4000;
/// As many as the ring has room for.
const DEPTH: u64 = 10;

#[test]
fn snapshots_under_load_are_exact() {
    let rig = Rig::start(MIB, 64 * MIB);
    let mut guest = Guest::simple(&rig.socket());
    let (submitted, completed, over) =
        (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let snapshot = rig.snapshotter();
    let taken = std::thread::scope(|scope| {
        let taker = scope.spawn(|| {
            let mut taken = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let before = completed.load(Ordering::Relaxed);
                let lsn = snapshot().unwrap().lsn.0;
                taken.push((lsn, before, submitted.load(Ordering::Relaxed)));
            }
            taken
        });
        let finish = |guest: &mut Guest| {
            assert_eq!(guest.queues[0].next_used().2, OK);
            completed.fetch_add(1, Ordering::Relaxed);
        };
        for version in 1..=WRITES {
            if version > DEPTH {
                finish(&mut guest);
            }
            let buffer = DATA + version % DEPTH * BLOCK as u64;
            guest.poke(buffer, &version.to_le_bytes().repeat(BLOCK / 8));
            submitted.store(version, Ordering::Relaxed);
            guest.queues[0].submit(1, 0, &[(buffer, BLOCK as u32, false)]);
        }
        (0..DEPTH).for_each(|_| finish(&mut guest));
        over.store(true, Ordering::Relaxed);
        taker.join().unwrap()
    });
    assert!(!taken.is_empty());
    rig.drain();
    let cuts = rig.backing.cuts();
    assert_eq!(cuts.len(), taken.len());
    for (earlier, ((lsn, before, after), (cut, image))) in (0u64..).zip(taken.iter().zip(&cuts)) {
        assert_eq!(cut.0, *lsn);
        let version = image.get(&0).map_or(0, |block| {
            let version = &block[..8];
            assert!(block.chunks_exact(8).all(|part| part == version), "torn");
            u64::from_le_bytes(version.try_into().unwrap())
        });
        assert_eq!(version, lsn - 1 - earlier, "all writes with a lower LSN, and no others");
        assert!((*before..=*after).contains(&version), "{before} {version} {after}");
    }
}

#[test]
fn snapshots_are_taken_while_the_store_is_away() {
    let rig = Rig::start(MIB, 64 * MIB);
    rig.backing.plug(false);
    let mut guest = Guest::simple(&rig.socket());
    let snapshot = rig.snapshotter();
    for n in 1..=3u8 {
        assert_eq!(guest.write(0, &[n; BLOCK]), OK);
        let lsn = snapshot().unwrap().lsn.0;
        assert_eq!(lsn, 2 * u64::from(n));
        assert!(rig.lsns().1 >= lsn, "it is durable");
    }
    assert!(rig.backing.cuts().is_empty());
    rig.backing.plug(true);
    rig.drain();
    let first: Vec<u8> = rig.backing.cuts().iter().map(|(_, image)| image[&0][0]).collect();
    assert_eq!(first, [1, 2, 3]);
}
