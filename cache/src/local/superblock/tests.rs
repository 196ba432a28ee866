//! Goal: a superblock that cannot be read or written in one place, or for a moment, costs neither the cache nor what was
//! acknowledged on it. Method: simulated legs with bad sectors and faults, a simulated clock.

use super::*;
use crate::format::LegSet;
use blockstore::device::Device;
use blockstore::device::sim::{Fault, FaultRates, OpKind, Reach, SimDevice};
use std::path::PathBuf;

const PLACES: [u64; 2] = [0, BLOCK_SIZE as u64];
const PLACE_LEN: u64 = BLOCK_SIZE as u64;

fn named(sims: &[&SimDevice]) -> Vec<(PathBuf, Device)> {
    (0..).zip(sims).map(|(n, sim)| (format!("/leg{n}").into(), sim.device())).collect::<Vec<_>>()
}

async fn pair() -> (Local, [SimDevice; 2]) {
    let sims = [1, 2].map(|seed| SimDevice::new(16 << 20, seed));
    let local = Local::make_legs(named(&[&sims[0], &sims[1]])).await.unwrap();
    (local, sims)
}

/// A pair whose first leg is out, and what the second one's places held before.
async fn lone() -> ([SimDevice; 2], [Vec<u8>; 2]) {
    let (local, sims) = pair().await;
    let before = PLACES.map(|place| sims[1].peek(place, BLOCK_SIZE));
    local.leg_failed(0, None, "for the test").await;
    assert_eq!(local.members(), LegSet::NONE.with(1));
    (sims, before)
}

async fn open(sim: &SimDevice) -> Result<Local, CacheError> {
    Local::on_devices(named(&[sim]), false).await
}

fn found(sim: &SimDevice) -> Vec<Superblock> {
    PLACES
        .iter()
        .filter_map(|place| Superblock::decode(&sim.peek(*place, BLOCK_SIZE)).ok())
        .collect()
}

fn newest(sim: &SimDevice) -> Superblock {
    found(sim).into_iter().max_by_key(|superblock| superblock.sequence).unwrap()
}

/// Neither on a leg alone, nor beside one that was left behind, nor in a pair.
#[tokio::test(start_paused = true)]
async fn a_bad_sector_under_one_copy_does_not_take_the_other_along() {
    for place in PLACES {
        let (sims, _) = lone().await;
        sims[1].set_bad(place, PLACE_LEN, &[OpKind::Read]);
        for given in [&[&sims[1]][..], &[&sims[0], &sims[1]]] {
            let local = Local::on_devices(named(given), false).await.unwrap();
            assert_eq!(local.members(), LegSet::NONE.with(1));
        }
        assert_eq!(found(&sims[1]).len(), 2, "it is written anew");
        let (local, sims) = pair().await;
        drop(local);
        sims[1].set_bad(place, PLACE_LEN, &[OpKind::Read]);
        let local = Local::on_devices(named(&[&sims[0], &sims[1]]), false).await.unwrap();
        assert_eq!(local.members(), LegSet::first(2));
    }
    let (sims, _) = lone().await;
    sims[1].set_bad(0, 2 * PLACE_LEN, &[OpKind::Read]);
    let error = open(&sims[1]).await.unwrap_err();
    assert!(matches!(error, CacheError::Device(_)), "it may be a cache: {error}");
}

#[tokio::test(start_paused = true)]
async fn a_leg_with_a_bad_sector_under_a_copy_answers_for_one_that_hangs() {
    for place in PLACES {
        let (local, sims) = pair().await;
        sims[1].set_bad(place, PLACE_LEN, &[OpKind::Read]);
        sims[0].set_reach(Reach::Hanging);
        local.leg_silent(0, None).await;
        assert_eq!(local.members(), LegSet::NONE.with(1));
    }
}

/// The first leg knows the set that the other one was started with as an attempt that failed, and must not win by that.
#[tokio::test(start_paused = true)]
async fn a_start_that_is_noted_late_is_not_taken_for_an_attempt() {
    let (local, sims) = pair().await;
    for out in [0_u8, 1] {
        // It is written in both places of the other leg, and nobody knows whether durably.
        sims[1 - usize::from(out)].inject(OpKind::Flush, 1, Fault::Io);
        local.leg_silent(out, None).await;
    }
    assert_eq!(local.members().len(), 2);
    drop(local);
    sims[1].set_dropping(0, 2 * PLACE_LEN, &[OpKind::Write]);
    let alone = open(&sims[1]).await.unwrap();
    let refused = alone.note_members().await.unwrap_err().to_string();
    assert!(refused.contains("copy all of it"), "{refused}");
    sims[1].set_dropping(0, 2 * PLACE_LEN, &[]);
    alone.rewrite_superblock(|superblock| superblock.store = Some(superblock.cache)).await.unwrap();
    let ids: Vec<_> = found(&sims[1]).iter().map(|found| found.membership.id).collect();
    assert_eq!(ids, [alone.superblock().await.membership.id; 2], "both copies");
    drop(alone);
    let both = Local::on_devices(named(&[&sims[0], &sims[1]]), false).await;
    assert!(matches!(both, Err(CacheError::SplitLegs { .. })), "{both:?}");
}

/// What was served under is in the other place, which rots: what is left is void to the first leg, and must not excuse the second.
#[tokio::test(start_paused = true)]
async fn an_attempt_in_a_place_that_takes_no_writes_excuses_no_leg() {
    let mut tried = 0;
    for place in PLACES {
        let (local, sims) = pair().await;
        for out in [0_u8, 1] {
            sims[1 - usize::from(out)].inject(OpKind::Flush, 1, Fault::Io);
            local.leg_silent(out, None).await;
        }
        drop(local);
        let attempt = Superblock::decode(&sims[1].peek(place, BLOCK_SIZE)).unwrap().membership;
        if attempt.members != LegSet::NONE.with(1) {
            continue;
        }
        tried += 1;
        sims[1].set_dropping(place, PLACE_LEN, &[OpKind::Write]);
        let alone = open(&sims[1]).await.unwrap();
        alone.note_members().await.unwrap();
        drop(alone);
        sims[1].misplace(PLACE_LEN - place, &[7; BLOCK_SIZE]);
        let both = Local::on_devices(named(&[&sims[0], &sims[1]]), false).await;
        assert!(matches!(both, Err(CacheError::SplitLegs { .. })), "{both:?}");
    }
    assert!(tried > 0);
}

#[tokio::test(start_paused = true)]
async fn a_lone_leg_goes_on_with_one_place_that_takes_writes() {
    for place in PLACES {
        for is_torn in [false, true] {
            let (sims, _) = lone().await;
            match is_torn {
                false => sims[1].set_dropping(place, PLACE_LEN, &[OpKind::Write]),
                true => sims[1].set_bad(place, PLACE_LEN, &[OpKind::Write]),
            }
            for _ in 0..3 {
                let former = newest(&sims[1]).membership;
                let local = open(&sims[1]).await.unwrap();
                local.note_members().await.unwrap();
                let (set, noted) =
                    (local.superblock().await.membership, newest(&sims[1]).membership);
                assert!(set == noted && set.id != former.id, "{set:?}, {noted:?}, {former:?}");
                let store = Some(uuid::Uuid::new_v4());
                local.rewrite_superblock(|superblock| superblock.store = store).await.unwrap();
                assert_eq!(newest(&sims[1]).store, store);
            }
            let both = Local::on_devices(named(&[&sims[0], &sims[1]]), false).await.unwrap();
            assert_eq!(both.members(), LegSet::NONE.with(1));
        }
    }
}

/// Where there never was another leg, there is nothing to note.
#[tokio::test(start_paused = true)]
async fn a_damaged_place_that_takes_no_writes_does_not_keep_a_cache_of_one_leg_down() {
    for place in PLACES {
        let sim = SimDevice::new(16 << 20, 1);
        drop(Local::make_legs(named(&[&sim])).await.unwrap());
        sim.misplace(place, &[7; BLOCK_SIZE]);
        sim.set_dropping(place, PLACE_LEN, &[OpKind::Write]);
        let local = open(&sim).await.unwrap();
        local.note_members().await.unwrap();
    }
}

/// Should the newer copy rot, the older would bring the other leg back.
#[tokio::test(start_paused = true)]
async fn a_lone_leg_is_refused_while_a_copy_that_names_the_other_cannot_be_replaced() {
    for n in [0, 1] {
        let (sims, before) = lone().await;
        sims[1].misplace(PLACES[n], before[n].as_slice().try_into().unwrap());
        sims[1].set_dropping(PLACES[n], PLACE_LEN, &[OpKind::Write]);
        let refused = open(&sims[1]).await.unwrap_err();
        assert!(matches!(refused, CacheError::Device(_)), "{refused}");
        sims[1].set_dropping(PLACES[n], PLACE_LEN, &[]);
        drop(open(&sims[1]).await.unwrap());
        let members = found(&sims[1]).into_iter().map(|found| found.membership.members);
        assert_eq!(members.collect::<Vec<_>>(), [LegSet::NONE.with(1); 2]);
    }
}

#[tokio::test(start_paused = true)]
async fn what_may_be_torn_is_written_again_and_not_the_good_copy() {
    let (sims, _) = lone().await;
    let local = open(&sims[1]).await.unwrap();
    let next = Geometry::superblock_offset(local.superblock().await.sequence + 1);
    let sound = PLACES.into_iter().find(|place| *place != next).unwrap();
    let before = sims[1].peek(sound, BLOCK_SIZE);
    // What became of it is not known.
    sims[1].set_bad(next, PLACE_LEN, &[OpKind::Read]);
    sims[1].set_rates(FaultRates { write_io: 1.0, ..FaultRates::default() });
    for _ in 0..3 {
        local.rewrite_superblock(|superblock| superblock.store = None).await.unwrap_err();
    }
    let trace = sims[1].trace();
    let failed = trace.iter().filter(|entry| entry.kind == OpKind::Write && entry.error.is_some());
    let places: Vec<_> = failed.map(|entry| entry.offset).collect();
    assert!(places.len() > 3 && places.iter().all(|place| *place == next), "{places:?}");
    assert_eq!(sims[1].peek(sound, BLOCK_SIZE), before);
    sims[1].set_rates(FaultRates::default());
    local.rewrite_superblock(|superblock| superblock.store = None).await.unwrap();
    assert_eq!(found(&sims[1]).len(), 2);
}

/// So is what names a new leg: a copy of it that may have got through must not be newer, nor the good one be torn as well.
#[tokio::test(start_paused = true)]
async fn a_new_leg_is_named_beyond_what_failed() {
    let (sims, _) = lone().await;
    let local = open(&sims[1]).await.unwrap();
    sims[1].set_dropping(0, 2 * PLACE_LEN, &[OpKind::Write]);
    for _ in 0..2 {
        local.rewrite_superblock(|superblock| superblock.store = None).await.unwrap_err();
    }
    sims[1].set_dropping(0, 2 * PLACE_LEN, &[]);
    let attempted = local.attempted.lock().sequence;
    let new = SimDevice::new(16 << 20, 3);
    local.replace_on(&new.device(), &|_, _| ()).await.unwrap();
    assert_eq!(newest(&sims[1]).sequence, newest(&new).sequence);
    let oldest = found(&sims[1]).iter().map(|found| found.sequence).min().unwrap();
    assert_eq!(oldest, attempted + 2, "beyond it, and in its place");
    let both = Local::on_devices(named(&[&new, &sims[1]]), false).await.unwrap();
    assert_eq!(both.members(), LegSet::first(2));
}

#[tokio::test(start_paused = true)]
async fn a_survivor_that_refuses_the_note_for_a_moment_is_not_given_up() {
    for (kind, left) in [(OpKind::Write, LegSet::NONE.with(1)), (OpKind::Flush, LegSet::NONE)] {
        let (local, sims) = pair().await;
        sims[1].inject(kind, 0, Fault::Io);
        local.leg_failed(0, None, "for the test").await;
        // A flush that failed may have taken something of the log along.
        assert_eq!(local.members(), left, "{kind:?}");
        if kind == OpKind::Write {
            drop(open(&sims[1]).await.expect("it knows that it is alone"));
        }
    }
    // Not for ever.
    let (local, sims) = pair().await;
    sims[1].set_rates(FaultRates { write_io: 1.0, ..FaultRates::default() });
    local.leg_failed(0, None, "for the test").await;
    assert_eq!(local.members(), LegSet::NONE);
}

/// No log is open that could lack what was lost. While nothing is durable, though, the good copy is left alone.
#[tokio::test(start_paused = true)]
async fn a_flush_that_fails_at_a_start_is_tried_again_in_one_place() {
    let (sims, _) = lone().await;
    sims[1].inject(OpKind::Flush, 0, Fault::Io);
    let local = open(&sims[1]).await.unwrap();
    assert!(!local.attempted.lock().is_unnoted);
    drop(local);
    let good = newest(&sims[1]);
    sims[1].set_rates(FaultRates { flush_io: 1.0, ..FaultRates::default() });
    let local = open(&sims[1]).await.unwrap();
    local.note_members().await.unwrap_err();
    assert!(found(&sims[1]).contains(&good), "it is not written over");
}
