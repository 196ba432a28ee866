//! Goal: the oracle finds the one cut that explains an image, and rejects images that have none.
//! Method: a tiny disk; images are composed by hand from the stamps of chosen requests.

use super::*;
use crate::client::stamp::{Found, Identity};

const ME: Identity = Identity { seed: 1, disk: 2 };
const SECTORS: u64 = 64;

/// An oracle and the images after each request.
struct World {
    oracle: Oracle,
    images: Vec<Vec<u8>>,
}

impl World {
    fn new() -> Self {
        let oracle = Oracle::new(ME, SECTORS, true);
        Self { oracle, images: vec![vec![0; SECTORS as usize * SECTOR]] }
    }

    fn submit(&mut self, kind: Mutation, sectors: Range<u64>) -> Sequence {
        let sequence = self.oracle.submit(kind, sectors.clone());
        let mut image = self.images.last().unwrap().clone();
        for sector in effect(kind, &sectors) {
            let at = sector as usize * SECTOR;
            match kind {
                Mutation::Write => ME.stamp(sector, sequence, &mut image[at..at + SECTOR]),
                _ => image[at..at + SECTOR].fill(0),
            }
        }
        self.images.push(image);
        sequence
    }

    fn write(&mut self, sectors: Range<u64>) -> Sequence {
        self.submit(Mutation::Write, sectors)
    }

    fn acknowledge(&mut self, up_to: Sequence) {
        for sequence in self.oracle.acknowledged() + 1..=up_to {
            self.oracle.acknowledge(sequence).unwrap();
        }
    }

    fn image(&self, after: Sequence) -> Vec<u8> {
        self.images[after as usize].clone()
    }
}

fn copy(from: &[u8], to: &mut [u8], sectors: Range<u64>) {
    let bytes = sectors.start as usize * SECTOR..sectors.end as usize * SECTOR;
    to[bytes.clone()].copy_from_slice(&from[bytes]);
}

fn kind(result: Result<Cut, Vec<Violation>>) -> Kind {
    result.unwrap_err()[0].kind
}

/// Eight writes over each other and side by side, four of them acknowledged.
fn world() -> World {
    let mut world = World::new();
    for n in 0..8 {
        world.write(4 * (n % 3)..4 * (n % 3) + 8);
    }
    world.acknowledge(4);
    world
}

#[test]
fn every_prefix_since_the_last_acknowledgement_is_right_and_no_earlier_one() {
    for cut in 0..=8 {
        let mut world = world();
        let result = world.oracle.recover(&world.image(cut), Loss::AgentDied);
        if cut >= 4 {
            assert_eq!(result, Ok(Cut { first: cut, last: cut, split: false }));
        } else {
            assert_eq!(kind(result), Kind::Lost, "cut {cut}");
        }
    }
}

#[test]
fn power_loss_may_take_what_was_not_flushed() {
    let mut world = World::new();
    world.write(0..8);
    world.write(8..16);
    world.acknowledge(1);
    let flush = world.oracle.submit_flush();
    world.acknowledge(2);
    world.oracle.acknowledge_flush(flush);
    assert_eq!(world.oracle.flushed(), 1, "a flush covers what completed before it was sent");
    assert_eq!(kind(world.oracle.recover(&world.image(0), Loss::PowerLost)), Kind::Lost);
    assert_eq!(kind(world.oracle.recover(&world.image(1), Loss::AgentDied)), Kind::Lost);
    assert_eq!(world.oracle.recover(&world.image(1), Loss::PowerLost).map(|cut| cut.last), Ok(1));
}

#[test]
fn write_through_makes_acknowledgement_durable() {
    let mut world = World::new();
    world.oracle.set_write_through(true);
    world.write(0..8);
    world.acknowledge(1);
    assert_eq!(kind(world.oracle.recover(&world.image(0), Loss::PowerLost)), Kind::Lost);
}

#[test]
fn a_gap_in_the_order_is_no_prefix() {
    let mut world = World::new();
    world.write(0..8);
    world.write(8..16);
    world.write(16..24);
    let mut image = world.image(1);
    copy(&world.image(3), &mut image, 16..24);
    let error = world.oracle.recover(&image, Loss::AgentDied).unwrap_err();
    assert_eq!(error[0].kind, Kind::NoPrefix);
    assert!(error[0].detail.contains("request 3") && error[0].detail.contains("request 2"));
}

#[test]
fn the_request_at_the_cut_may_show_block_by_block_but_not_in_part_of_one() {
    let mut world = World::new();
    world.write(0..24);
    world.write(4..20);
    let mut by_block = world.image(1);
    copy(&world.image(2), &mut by_block, 4..8);
    let cut = world.oracle.check_store(&by_block).unwrap();
    assert_eq!(cut, Cut { first: 2, last: 2, split: true });

    let mut in_part = world.image(1);
    copy(&world.image(2), &mut in_part, 4..6);
    assert_eq!(kind(world.oracle.check_store(&in_part)), Kind::NoPrefix);

    // What recovery found is the truth from then on.
    world.oracle.recover(&by_block, Loss::AgentDied).unwrap();
    assert!(world.oracle.recover(&world.image(2), Loss::AgentDied).is_err());
    world.oracle.recover(&by_block, Loss::PowerLost).unwrap();
}

#[test]
fn what_a_crash_took_must_not_come_back() {
    let mut world = World::new();
    world.write(0..8);
    world.write(0..8);
    world.write(8..16);
    world.acknowledge(1);
    world.oracle.recover(&world.image(1), Loss::AgentDied).unwrap();
    let fourth = world.oracle.submit(Mutation::Write, 24..32);
    assert_eq!(fourth, 4, "numbers are never reused");
    assert_eq!(kind(world.oracle.recover(&world.image(2), Loss::AgentDied)), Kind::Resurrected);
    world.oracle.recover(&world.image(1), Loss::AgentDied).unwrap();
}

#[test]
fn zeros_leave_several_cuts_open_and_the_others_decide() {
    let mut world = World::new();
    world.submit(Mutation::Zero, 0..8);
    world.write(0..8);
    world.submit(Mutation::Zero, 0..8);
    world.write(8..16);
    let blank = world.oracle.check_store(&world.image(0)).unwrap();
    assert_eq!((blank.first, blank.last), (0, 3), "zero before, zero after");
    let last = world.oracle.check_store(&world.image(4)).unwrap();
    assert_eq!((last.first, last.last), (4, 4));
    let mut impossible = world.image(4);
    copy(&world.image(2), &mut impossible, 0..8);
    assert_eq!(kind(world.oracle.check_store(&impossible)), Kind::NoPrefix);
}

#[test]
fn discards_keep_the_edges() {
    let mut world = World::new();
    world.write(0..32);
    world.submit(Mutation::Discard, 3..27);
    world.submit(Mutation::Discard, 1..6);
    world.acknowledge(3);
    let image = world.image(3);
    assert_eq!(ME.read(7, &image[7 * SECTOR..8 * SECTOR]), Found::Stamp(1));
    assert_eq!(ME.read(8, &image[8 * SECTOR..9 * SECTOR]), Found::Zero);
    assert_eq!(ME.read(24, &image[24 * SECTOR..25 * SECTOR]), Found::Stamp(1));
    world.oracle.check_current(&image).unwrap();
    assert!(world.oracle.check_current(&world.image(1)).is_err());
}

#[test]
fn the_store_may_lag_behind_but_not_behind_a_drain() {
    let mut world = world();
    world.oracle.check_store(&world.image(2)).unwrap();
    world.oracle.set_committed(3);
    world.oracle.check_store(&world.image(3)).unwrap();
    world.oracle.check_store(&world.image(8)).unwrap();
    let error = world.oracle.check_store(&world.image(2)).unwrap_err();
    assert!(matches!(error[0].kind, Kind::Lost | Kind::Stale), "{error:?}");
    // Mixing two commits is no point in time.
    let mut mixed = world.image(6);
    copy(&world.image(8), &mut mixed, 4..12);
    assert_eq!(kind(world.oracle.check_store(&mixed)), Kind::NoPrefix);
}

#[test]
fn reads_see_the_last_acknowledged_value_or_a_newer_one() {
    let mut world = World::new();
    world.write(0..8);
    world.acknowledge(1);
    world.write(0..8);
    let ticket = world.oracle.submit_read(0..8);
    world.write(0..8);
    world.acknowledge(3);
    let read = |world: &World, after: Sequence| {
        let data = world.image(after)[..8 * SECTOR].to_vec();
        world.oracle.check_read(&ticket, &data).map_err(|violation| violation.kind)
    };
    assert_eq!(read(&world, 0), Err(Kind::Lost));
    for legal in 1..=3 {
        assert_eq!(read(&world, legal), Ok(()), "value of {legal}");
    }
    let late = world.oracle.submit_read(0..8);
    let data = world.image(2)[..8 * SECTOR].to_vec();
    assert_eq!(world.oracle.check_read(&late, &data).unwrap_err().kind, Kind::Lost);
}

#[test]
fn foreign_torn_and_moved_sectors_are_named() {
    let mut world = World::new();
    world.write(0..16);
    world.acknowledge(1);
    let good = world.image(1);
    let check = |world: &World, damage: &dyn Fn(&mut Vec<u8>)| {
        let mut image = good.clone();
        damage(&mut image);
        world.oracle.check_current(&image).unwrap_err()[0].kind
    };
    let other = Identity { disk: 9, ..ME };
    assert_eq!(check(&world, &|image| image[700] ^= 1), Kind::Torn);
    assert_eq!(check(&world, &|image| image.copy_within(0..SECTOR, SECTOR)), Kind::Misdirected);
    assert_eq!(check(&world, &|image| other.stamp(3, 1, &mut image[1536..2048])), Kind::Foreign);
    assert_eq!(check(&world, &|image| image[0..512].fill(7)), Kind::Garbage);
    assert_eq!(check(&world, &|image| ME.stamp(0, 5, &mut image[0..512])), Kind::Impossible);
    assert_eq!(check(&world, &|image| ME.stamp(40, 1, &mut image[20480..20992])), Kind::Impossible);
    assert_eq!(check(&world, &|image| image[0..512].fill(0)), Kind::Lost);
}

#[test]
fn completions_out_of_order_are_told() {
    let mut world = World::new();
    world.write(0..8);
    world.write(8..16);
    assert_eq!(world.oracle.acknowledge(2).unwrap_err().kind, Kind::OutOfOrder);
    let mut relaxed = Oracle::new(ME, SECTORS, false);
    relaxed.submit(Mutation::Write, 0..8);
    relaxed.submit(Mutation::Write, 8..16);
    relaxed.acknowledge(2).unwrap();
}

#[test]
fn a_discard_of_nothing_has_no_place_in_the_order() {
    let mut world = World::new();
    world.write(0..8);
    let void = world.submit(Mutation::Discard, 1..9);
    world.oracle.acknowledge(void).unwrap();
    assert_eq!(world.oracle.acknowledged(), 0, "nothing earlier is promised by it");
    world.oracle.check_store(&world.image(0)).unwrap();
    world.oracle.acknowledge(1).unwrap();
    let late = world.submit(Mutation::Discard, 1..9);
    let next = world.write(8..16);
    world.oracle.acknowledge(next).unwrap();
    world.oracle.acknowledge(late).unwrap();
    world.oracle.recover(&world.image(next), Loss::AgentDied).unwrap();
}
