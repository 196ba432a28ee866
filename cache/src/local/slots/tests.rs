//! Goal: a leg whose table cannot be read, or is behind, does not stay a member without it (rule L5); and what cannot be read of one
//! slot, or was torn there, keeps no other disk down.
//! Method: two simulated legs; one refuses reads at a start, then is the only one. Bad sectors and torn copies, on one leg or both.

use super::*;
use crate::format::slot::{CloneOrigin, SlotVdi};
use blockstore::device::sim::{FaultRates, OpKind, SimDevice};
use blockstore::format::vdi::Origin;
use blockstore::types::{Lsn, SECTOR_SIZE};
use uuid::Uuid;

async fn open(sims: &[SimDevice], degraded: bool) -> Local {
    let named = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
    Local::on_devices(named, degraded).await.unwrap()
}

fn named(sequence: u64) -> VdiSlot {
    VdiSlot { sequence, slot: 0, vdi: None, quarantined: None }
}

#[tokio::test(start_paused = true)]
async fn a_leg_whose_table_cannot_be_read_is_given_it() {
    let sims = [1, 2].map(|seed| SimDevice::new(16 << 20, seed));
    let devices = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
    drop(Local::make_legs(devices).await.unwrap());
    let local = open(&sims, false).await;
    local.write_slot(&named(4)).await.unwrap();
    local.write_slot(&named(5)).await.unwrap();
    let offset = Geometry::slot_offset(0, 5);
    // The first leg lost it, and has one of its own that was never acknowledged.
    sims[0].misplace(offset, &[0; BLOCK_SIZE]);
    let torn = named(6).encode();
    sims[0].misplace(Geometry::slot_offset(0, 6), torn.as_slice().try_into().expect("a block"));
    sims[0].set_rates(FaultRates { read_io: 1.0, ..FaultRates::default() });
    assert_eq!(local.read_slots().await.unwrap()[0], named(5));
    assert!(local.members().contains(0), "it takes writes");
    local.flush().await.unwrap();
    drop(local);
    sims[0].set_rates(FaultRates::default());
    let alone = open(&sims[..1], true).await;
    assert_eq!(alone.read_slots().await.unwrap()[0], named(5));
}

/// The older one, which is whole, is not written over what only the other leg has of the newer one.
#[tokio::test(start_paused = true)]
async fn a_damaged_copy_is_not_judged_while_a_leg_that_may_have_it_cannot_be_read() {
    let sims = [1, 2].map(|seed| SimDevice::new(16 << 20, seed));
    let devices = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
    let local = Local::make_legs(devices).await.unwrap();
    local.write_slot(&named(4)).await.unwrap();
    local.write_slot(&named(5)).await.unwrap();
    let of_another = VdiSlot { slot: 1, ..named(5) }.encode();
    let of_another = of_another.as_slice().try_into().expect("a block");
    sims[0].misplace(Geometry::slot_offset(0, 5), of_another);
    sims[1].set_rates(FaultRates { read_io: 1.0, ..FaultRates::default() });
    let refused = local.read_slots().await.unwrap_err();
    assert!(refused.to_string().contains("--degraded"), "{refused}");
    sims[1].set_rates(FaultRates::default());
    assert_eq!(local.read_slots().await.unwrap()[0], named(5));
    sims[1].set_rates(FaultRates { read_io: 1.0, ..FaultRates::default() });
    assert_eq!(local.read_slots().await.unwrap()[0], named(5), "the first leg was given it");
}

/// One sector of a leg's table is not all of it, and what is damaged elsewhere on the other leg has nothing to do with it.
#[tokio::test(start_paused = true)]
async fn a_bad_sector_in_a_table_concerns_its_own_slot_alone() {
    let sims = [1, 2].map(|seed| SimDevice::new(16 << 20, seed));
    let devices = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
    let local = Local::make_legs(devices).await.unwrap();
    let other = VdiSlot { slot: 1, ..named(7) };
    for slot in [named(4), named(5), VdiSlot { sequence: 6, ..other.clone() }, other.clone()] {
        local.write_slot(&slot).await.unwrap();
    }
    sims[0].misplace(Geometry::slot_offset(0, 4), &[7; BLOCK_SIZE]);
    let set_bad = |slot, kinds: &[OpKind]| {
        sims[1].set_bad(Geometry::slot_offset(slot, 0), 2 * BLOCK_SIZE as u64, kinds);
    };
    set_bad(1, &[OpKind::Read]);
    assert_eq!(local.read_slots().await.unwrap()[..2], [named(5), other]);
    assert_eq!(local.members().len(), 2);
    // The same slot: which of its copies is the newest is not known.
    sims[0].misplace(Geometry::slot_offset(0, 5), &[0; BLOCK_SIZE]);
    set_bad(1, &[]);
    set_bad(0, &[OpKind::Read]);
    local.read_slots().await.unwrap_err();
    set_bad(0, &[]);
    assert_eq!(local.read_slots().await.unwrap()[0], named(5));
}

/// A copy that was made good does not take the place of the newest one: that is not written over next.
#[tokio::test(start_paused = true)]
async fn the_only_good_copy_is_never_written_over() {
    let sims = [1, 2].map(|seed| SimDevice::new(16 << 20, seed));
    let devices = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
    let local = Local::make_legs(devices).await.unwrap();
    for sequence in 1..=5 {
        local.write_slot(&named(sequence)).await.unwrap();
    }
    // One place after the other rots.
    for place in [4, 5] {
        sims[0].misplace(Geometry::slot_offset(0, place), &[7; BLOCK_SIZE]);
        assert_eq!(local.read_slots().await.unwrap()[0], named(5));
    }
    sims[0].misplace(Geometry::slot_offset(0, 5), &[7; BLOCK_SIZE]);
    drop(local);
    let alone = open(&sims[..1], true).await;
    let next = alone.read_slots().await.unwrap().remove(0);
    let next = VdiSlot { sequence: next.sequence + 1, ..next };
    assert_eq!(Geometry::slot_offset(0, next.sequence), Geometry::slot_offset(0, 5));
}

#[tokio::test(start_paused = true)]
async fn a_slot_is_not_given_up_while_a_leg_that_may_have_it_cannot_be_read() {
    let sims = [1, 2].map(|seed| SimDevice::new(16 << 20, seed));
    let devices = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
    let local = Local::make_legs(devices).await.unwrap();
    local.write_slot(&named(5)).await.unwrap();
    for copy in [0, 1] {
        let of_another = VdiSlot { slot: 1, ..named(5) }.encode();
        let of_another = of_another.as_slice().try_into().expect("a block");
        sims[0].misplace(Geometry::slot_offset(0, copy), of_another);
    }
    sims[1].set_rates(FaultRates { read_io: 1.0, ..FaultRates::default() });
    let refused = local.read_slots().await.unwrap_err();
    assert!(matches!(refused, CacheError::Device(_)), "{refused}");
    assert_eq!(local.members().len(), 2);
    sims[1].set_rates(FaultRates::default());
    assert_eq!(local.read_slots().await.unwrap()[0], named(5));
    sims[1].set_rates(FaultRates { read_io: 1.0, ..FaultRates::default() });
    assert_eq!(local.read_slots().await.unwrap()[0], named(5), "the first leg was given it");
}

#[tokio::test(start_paused = true)]
async fn a_leg_that_takes_no_table_is_out() {
    let sims = [1, 2].map(|seed| SimDevice::new(16 << 20, seed));
    let devices = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
    let local = Local::make_legs(devices).await.unwrap();
    sims[0].set_rates(FaultRates { read_io: 1.0, write_io: 1.0, ..FaultRates::default() });
    local.read_slots().await.unwrap();
    assert!(!local.members().contains(0));
}

/// A slot of a clone, whose last sector is not zeros.
fn of_a_clone(slot: u32, sequence: u64) -> VdiSlot {
    let vdi = SlotVdi {
        uuid: Uuid::from_u128(7),
        log_id: 8,
        name: "clone".into(),
        size_bytes: 1 << 30,
        committed: Lsn(0),
        evicted_below: 4,
        sequence_seen: 12,
        epoch: 1,
        first_lsn: Lsn(90),
        durable: Lsn(89),
        alone_from: Some(Lsn(0)),
        cuts: Vec::new(),
        origin: Some(CloneOrigin {
            snapshot: Origin { vdi: Uuid::from_u128(6), lsn: Lsn(5) },
            time_ms: 1,
        }),
        has_cuts: false,
        policy: Default::default(),
        left_behind: None,
        boot_trace: Vec::new(),
    };
    VdiSlot { sequence, slot, vdi: Some(vdi), quarantined: None }
}

async fn made(legs: u64) -> (Vec<SimDevice>, Local) {
    let sims: Vec<_> = (1..=legs).map(|seed| SimDevice::new(64 << 20, seed)).collect();
    let devices = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
    let local = Local::make_legs(devices).await.unwrap();
    (sims, local)
}

/// As a power loss leaves it that comes when the first sectors of a copy are written.
fn tear(sim: &SimDevice, slot: &VdiSlot) {
    let mut torn = slot.encode();
    torn[BLOCK_SIZE - SECTOR_SIZE..].fill(0);
    assert_ne!(torn, slot.encode());
    sim.misplace(Geometry::slot_offset(slot.slot, slot.sequence), &torn);
}

fn set_bad(sim: &SimDevice, slot: u32, places: Range<u64>, kinds: &[OpKind]) {
    let len = (places.end - places.start) * BLOCK_SIZE as u64;
    sim.set_bad(Geometry::slot_offset(slot, places.start), len, kinds);
}

fn peek(sim: &SimDevice, slot: u32, place: u64) -> Vec<u8> {
    sim.peek(Geometry::slot_offset(slot, place), BLOCK_SIZE)
}

/// The slot is free again, and other disks are served.
#[tokio::test(start_paused = true)]
async fn a_first_write_that_was_torn_never_counted() {
    for legs in [1, 2] {
        let (sims, local) = made(legs).await;
        local.write_slot(&named(4)).await.unwrap();
        for sim in &sims {
            tear(sim, &of_a_clone(1, 1));
        }
        let slots = local.read_slots().await.unwrap();
        assert_eq!(slots[0], named(4));
        assert!(slots[1].is_free());
        // And is used again.
        let next = VdiSlot { sequence: slots[1].sequence + 1, ..of_a_clone(1, 0) };
        local.write_slot(&next).await.unwrap();
        assert_eq!(local.read_slots().await.unwrap()[1], next);
        // The second write is one behind a copy that counts.
        for sim in &sims {
            tear(sim, &of_a_clone(1, 2));
        }
        assert_eq!(local.read_slots().await.unwrap()[1], next);
    }
}

/// A disk whose log is open was there, so this is damage.
#[tokio::test(start_paused = true)]
async fn a_slot_that_was_in_use_is_never_taken_for_a_free_one() {
    for (first, second) in [(2, 1), (2, 3)] {
        let (sims, local) = made(1).await;
        tear(&sims[0], &of_a_clone(1, first));
        tear(&sims[0], &of_a_clone(1, second));
        let refused = local.read_slots().await.unwrap_err().to_string();
        assert!(refused.contains("slot 1"), "{refused}");
    }
    let (sims, local) = made(1).await;
    for sequence in 1..=5 {
        local.write_slot(&of_a_clone(1, sequence)).await.unwrap();
    }
    set_bad(&sims[0], 1, 0..2, &[OpKind::Read]);
    let refused = local.read_slots().await.unwrap_err().to_string();
    assert!(refused.contains("slot 1"), "{refused}");
    set_bad(&sims[0], 1, 0..2, &[]);
    assert_eq!(local.read_slots().await.unwrap()[1], of_a_clone(1, 5));
}

/// Each slot can be read on one leg: both legs have it then.
#[tokio::test(start_paused = true)]
async fn bad_sectors_in_the_tables_of_both_legs_are_made_good_from_each_other() {
    let (sims, local) = made(2).await;
    let slots = [named(5), of_a_clone(1, 7), of_a_clone(2, 6)];
    for slot in &slots {
        let before = VdiSlot { sequence: slot.sequence - 1, ..slot.clone() };
        local.write_slot(&before).await.unwrap();
        local.write_slot(slot).await.unwrap();
    }
    let lost = [0; BLOCK_SIZE];
    for (leg, slot) in [(0, 0), (1, 1)] {
        for place in 0..2 {
            sims[leg].misplace(Geometry::slot_offset(slot, place), &lost);
        }
        set_bad(&sims[leg], slot, 0..2, &[OpKind::Read]);
    }
    // Only the older copy was torn on the one, and there is a bad sector under the newest one of the other.
    tear(&sims[0], &of_a_clone(2, 5));
    sims[1].misplace(Geometry::slot_offset(2, 6), &lost);
    set_bad(&sims[1], 2, 0..1, &[OpKind::Read]);
    assert_eq!(local.read_slots().await.unwrap()[..3], slots);
    assert_eq!(local.members().len(), 2);
    for slot in &slots {
        for sim in &sims {
            assert_eq!(peek(sim, slot.slot, slot.sequence), slot.encode());
        }
    }
    assert_eq!(peek(&sims[0], 9, 0), [0; BLOCK_SIZE], "nothing else was");
    drop(local);
    for sim in &sims {
        let alone = [sim.fork(9)];
        assert_eq!(open(&alone, true).await.read_slots().await.unwrap()[..3], slots);
    }
}

/// Of a slot that no disk was ever in it is told from the copy that can be read.
#[tokio::test(start_paused = true)]
async fn a_bad_sector_under_a_slot_of_the_only_leg_keeps_no_disk_down() {
    for place in 0..2 {
        let (sims, local) = made(1).await;
        local.write_slot(&of_a_clone(0, 4)).await.unwrap();
        local.write_slot(&of_a_clone(0, 5)).await.unwrap();
        set_bad(&sims[0], 3, place..place + 1, &[OpKind::Read]);
        let slots = local.read_slots().await.unwrap();
        assert!(slots[3].is_free());
        assert_eq!(slots[0], of_a_clone(0, 5));
        // As with any damage, the other copy of one that is in use counts.
        set_bad(&sims[0], 0, place..place + 1, &[OpKind::Read]);
        let other = if place == 1 { 4 } else { 5 };
        assert_eq!(local.read_slots().await.unwrap()[0], of_a_clone(0, other));
    }
}

/// However many bad sectors the leg has before it.
#[tokio::test(start_paused = true)]
async fn a_leg_is_asked_for_what_is_damaged_on_the_other() {
    let (sims, local) = made(2).await;
    let (slots, after) = (UNREAD_MAX as u32 + 2, UNREAD_MAX as u32 + 4);
    for slot in [0, after] {
        local.write_slot(&of_a_clone(slot, 4)).await.unwrap();
        local.write_slot(&of_a_clone(slot, 5)).await.unwrap();
    }
    (0..slots).for_each(|slot| set_bad(&sims[1], slot, 0..2, &[OpKind::Read]));
    tear(&sims[0], &of_a_clone(after, 5));
    let read = local.read_slots().await.unwrap();
    assert_eq!([&read[0], &read[after as usize]], [&of_a_clone(0, 5), &of_a_clone(after, 5)]);
    assert_eq!(local.members().len(), 2);
}

/// Nothing is rewritten before it is known that the cache can be opened, and no leg is put out while another lacks what it has.
#[tokio::test(start_paused = true)]
async fn a_table_is_judged_as_a_whole_before_anything_is_changed() {
    let (sims, local) = made(2).await;
    for slot in 0..3 {
        local.write_slot(&of_a_clone(slot, 4)).await.unwrap();
        local.write_slot(&of_a_clone(slot, 5)).await.unwrap();
    }
    tear(&sims[0], &of_a_clone(0, 5));
    let torn = peek(&sims[0], 0, 5);
    tear(&sims[0], &of_a_clone(2, 5));
    set_bad(&sims[1], 2, 0..2, &[OpKind::Read]);
    let refused = local.read_slots().await.unwrap_err().to_string();
    assert!(refused.contains("nothing was changed"), "{refused}");
    assert_eq!(peek(&sims[0], 0, 5), torn);
    // Now the first leg takes nothing, and has the only copy of a slot.
    sims[0].misplace(Geometry::slot_offset(2, 5), &of_a_clone(2, 5).encode());
    for place in 0..2 {
        sims[1].misplace(Geometry::slot_offset(2, place), &[0; BLOCK_SIZE]);
    }
    sims[0].set_rates(FaultRates { write_io: 1.0, ..FaultRates::default() });
    local.read_slots().await.unwrap();
    assert_eq!(local.members(), LegSet::NONE.with(1));
    let written = sims[1].trace().into_iter().filter(|done| done.kind == OpKind::Write);
    let written: Vec<u64> = written.map(|done| done.offset).collect();
    let last = |of: Range<u64>| written.iter().rposition(|offset| of.contains(offset));
    let superblock = last(0..Geometry::slot_offset(0, 0));
    assert!(last(Geometry::slot_offset(2, 0)..Geometry::slot_offset(3, 0)) < superblock);
    drop(local);
    set_bad(&sims[1], 2, 0..2, &[]);
    let alone = open(&sims[1..], false).await;
    let expected = [0, 1, 2].map(|slot| of_a_clone(slot, 5));
    assert_eq!(alone.read_slots().await.unwrap()[..3], expected);
}
