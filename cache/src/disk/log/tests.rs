//! Goal: INV-LOG-5: what is acknowledged is on every leg of the set that is durable, whatever fails when. Method: a disk on
//! two legs whose answers are given by hand. Random schedules with real recovery are in tests/log_crash.

mod cuts;
mod rations;
mod snapshots;

use crate::disk::plan::SegmentId;
use crate::disk::{Action, Disk, Identity, OpId, Progress, Staged, Start};
use crate::format::{Geometry, LegSet};
use crate::image::ImagePool;
use crate::index::Index;
use crate::link::{FromDisk, Grant, SealedSegment, ToDisk};
use blockstore::types::{BLOCK_SIZE, Lsn};
use std::sync::Arc;
use uuid::Uuid;

fn disk() -> Disk {
    let geometry = Geometry::for_size(16 << 20).unwrap();
    let grant = |n| Grant { id: SegmentId(n), seq: u64::from(n) + 1, nonce: 7, roomy: true };
    let start = Start {
        identity: Identity { cache: Uuid::nil(), vdi: Uuid::nil(), log_id: 1, epoch: 1 },
        geometry,
        size_bytes: 1 << 30,
        index: Index::default(),
        last_lsn: Lsn(0),
        committed: Lsn(0),
        sealed: Vec::new(),
        grants: vec![grant(0), grant(1)],
        images: ImagePool::new(geometry.segment_size as usize, 2),
        progress: Arc::new(Progress::default()),
    };
    Disk::on_legs(start, LegSet::first(2))
}

/// I/O that the disk wants, by leg, and what it says.
fn poll(disk: &mut Disk) -> ([Vec<OpId>; 2], Vec<FromDisk>) {
    let (mut actions, mut ops, mut said) = (Vec::new(), [Vec::new(), Vec::new()], Vec::new());
    disk.poll(&mut actions);
    for action in actions {
        match action {
            Action::Write { op, leg, .. } | Action::Flush { op, leg } => {
                ops[usize::from(leg)].push(op);
            }
            Action::Send(message) => said.push(message),
        }
    }
    (ops, said)
}

fn write(disk: &mut Disk, tag: u64) {
    let staged = disk.write(tag, tag * 8, BLOCK_SIZE, &mut |_, bytes| bytes.fill(tag as u8));
    assert_eq!(staged, Staged::All);
}

fn completed(disk: &mut Disk) -> Vec<(u64, bool)> {
    disk.completions().collect()
}

fn answer(disk: &mut Disk, ops: &[OpId], result: Result<(), i32>) {
    for op in ops {
        disk.io_done(*op, result);
    }
}

#[test]
fn a_write_and_a_flush_are_done_when_both_legs_have_done_them() {
    let mut disk = disk();
    write(&mut disk, 1);
    for tag in [1, 2] {
        let ([a, b], _) = poll(&mut disk);
        assert_eq!((a.len(), b.len()), (1, 1));
        answer(&mut disk, &b, Ok(()));
        assert_eq!(completed(&mut disk), [], "one leg is not enough");
        answer(&mut disk, &a, Ok(()));
        assert_eq!(completed(&mut disk), [(tag, true)]);
        disk.flush(tag + 1);
    }
    assert_eq!(disk.flushed_lsn(), Lsn(1));
}

#[test]
fn what_waits_for_a_failed_leg_waits_until_it_is_out() {
    let mut disk = disk();
    write(&mut disk, 1);
    let ([a, b], _) = poll(&mut disk);
    answer(&mut disk, &a, Ok(()));
    answer(&mut disk, &b, Err(libc::EIO));
    let (_, said) = poll(&mut disk);
    assert!(matches!(said[..], [FromDisk::LegFailed { leg: 1, .. }]), "{said:?}");
    assert_eq!(disk.readable_legs(), LegSet::FIRST);
    // More goes to the other leg alone, and waits as well.
    write(&mut disk, 2);
    disk.flush(3);
    let ([a, b], said) = poll(&mut disk);
    assert_eq!((a.len(), b.len(), said.len()), (1, 0, 0), "the failure is told once");
    answer(&mut disk, &a, Ok(()));
    assert_eq!(completed(&mut disk), [], "the set without it is not durable yet");
    assert!(!disk.is_quiet());
    disk.on_message(ToDisk::Legs { members: LegSet::FIRST });
    assert_eq!(completed(&mut disk), [(1, true), (2, true)]);
    let ([a, b], _) = poll(&mut disk);
    assert_eq!((a.len(), b.len()), (1, 0));
    answer(&mut disk, &a, Ok(()));
    assert_eq!(completed(&mut disk), [(3, true)]);
    assert!(disk.is_quiet());
}

#[test]
fn a_leg_that_another_disk_found_failed_is_waited_for_no_more() {
    let mut disk = disk();
    write(&mut disk, 1);
    let ([a, b], _) = poll(&mut disk);
    answer(&mut disk, &a, Ok(()));
    disk.on_message(ToDisk::Legs { members: LegSet::FIRST });
    assert_eq!(completed(&mut disk), [(1, true)]);
    // Its answer comes late, or never.
    answer(&mut disk, &b, Err(libc::EIO));
    let (ops, said) = poll(&mut disk);
    assert!(ops.iter().all(Vec::is_empty) && said.is_empty() && disk.is_quiet());
}

/// A disk whose last leg failed amid a write, and what it handed over.
fn without_legs(last: Option<i32>) -> (Disk, Vec<SealedSegment>) {
    let mut disk = disk();
    write(&mut disk, 1);
    let ([a, b], _) = poll(&mut disk);
    answer(&mut disk, &b, Err(libc::EIO));
    match last {
        Some(errno) => answer(&mut disk, &a, Err(errno)),
        // The others could not be written to either.
        None => {
            disk.on_message(ToDisk::Legs { members: LegSet::NONE });
            answer(&mut disk, &a, Ok(()));
        }
    }
    let (ops, said) = poll(&mut disk);
    assert!(ops.iter().all(Vec::is_empty));
    let handed = said.into_iter().find_map(|said| match said {
        FromDisk::NoLegLeft { tail, .. } => Some(tail),
        _ => None,
    });
    (disk, handed.expect("the asynchronous side is told"))
}

#[test]
fn with_no_leg_left_requests_wait_until_it_is_known_what_the_store_has() {
    for last in [Some(libc::EIO), None] {
        let (mut disk, tail) = without_legs(last);
        assert_eq!(tail.len(), 1);
        assert_eq!((tail[0].first_lsn, tail[0].last_lsn), (Lsn(1), Lsn(1)));
        disk.flush(2);
        assert_eq!(disk.write(3, 8, 4096, &mut |_, dst| dst.fill(3)), Staged::Part(0));
        assert_eq!(completed(&mut disk), []);
        assert!(!disk.is_quiet());
        disk.on_message(ToDisk::GiveUp { reason: "lost".into() });
        assert_eq!(completed(&mut disk), [(1, false), (2, false)]);
        assert_eq!(disk.write(3, 8, 4096, &mut |_, dst| dst.fill(3)), Staged::Failed);
        assert!(disk.is_quiet());
    }
}

fn join(disk: &mut Disk, leg: u8, id: u64) {
    let file = Arc::new(std::fs::File::open("/dev/null").unwrap());
    disk.on_message(ToDisk::LegJoins { leg, id, file });
}

/// Carries out all that the disk wants until it wants nothing; what it said.
fn run(disk: &mut Disk) -> (usize, Vec<FromDisk>) {
    let (mut on_the_other, mut all) = (0, Vec::new());
    loop {
        let ([a, b], said) = poll(disk);
        all.extend(said);
        if a.is_empty() && b.is_empty() {
            return (on_the_other, all);
        }
        on_the_other += b.len();
        answer(disk, &a, Ok(()));
        answer(disk, &b, Ok(()));
    }
}

fn has_joined(said: &[FromDisk]) -> bool {
    said.iter().any(|said| matches!(said, FromDisk::LegJoined { id: 5 }))
}

/// A disk on leg 0 alone whose open segment has a record.
fn disk_with_a_record() -> Disk {
    let mut disk = disk();
    disk.on_message(ToDisk::Legs { members: LegSet::FIRST });
    write(&mut disk, 1);
    assert_eq!(run(&mut disk).0, 0);
    assert_eq!(completed(&mut disk), [(1, true)]);
    disk
}

#[test]
fn a_leg_has_joined_when_what_it_lacks_is_sealed() {
    let mut disk = disk_with_a_record();
    write(&mut disk, 2);
    let ([before, _], _) = poll(&mut disk);
    join(&mut disk, 1, 5);
    write(&mut disk, 3);
    let ([a, b], said) = poll(&mut disk);
    assert!(
        !b.is_empty() && !has_joined(&said),
        "new records go to both, in a segment of their own"
    );
    answer(&mut disk, &a, Ok(()));
    answer(&mut disk, &b, Ok(()));
    assert!(!has_joined(&run(&mut disk).1), "a record is on its way to the first leg alone");
    answer(&mut disk, &before, Ok(()));
    let (_, said) = run(&mut disk);
    let sealed = said.iter().position(|said| matches!(said, FromDisk::Sealed(s) if s.seq == 1));
    let joined = said.iter().position(|said| matches!(said, FromDisk::LegJoined { .. }));
    assert!(sealed.is_some() && sealed < joined, "{said:?}");
    assert_eq!(disk.readable_legs(), LegSet::FIRST, "it is not read");
}

#[test]
fn a_leg_joins_a_disk_without_an_open_segment_at_once() {
    let mut disk = disk();
    disk.on_message(ToDisk::Legs { members: LegSet::FIRST });
    join(&mut disk, 1, 5);
    assert!(has_joined(&run(&mut disk).1));
}

#[test]
fn a_joining_leg_is_waited_for_until_it_is_given_up() {
    let mut disk = disk_with_a_record();
    join(&mut disk, 1, 5);
    run(&mut disk);
    write(&mut disk, 2);
    let ([a, b], _) = poll(&mut disk);
    answer(&mut disk, &a, Ok(()));
    assert_eq!(completed(&mut disk), [], "it may be a member by now");
    answer(&mut disk, &b, Err(libc::EIO));
    let (_, said) = poll(&mut disk);
    assert!(matches!(said[..], [FromDisk::LegFailed { leg: 1, .. }]), "{said:?}");
    assert_eq!(completed(&mut disk), []);
    disk.on_message(ToDisk::Legs { members: LegSet::FIRST });
    assert_eq!(completed(&mut disk), [(2, true)], "the guest sees no error");
    write(&mut disk, 3);
    assert_eq!(run(&mut disk).0, 0);
}

#[test]
fn a_joining_leg_does_not_take_the_place_of_the_last_member() {
    let mut disk = disk_with_a_record();
    join(&mut disk, 1, 5);
    write(&mut disk, 2);
    let ([a, _], _) = poll(&mut disk);
    answer(&mut disk, &a, Err(libc::EIO));
    let (_, said) = poll(&mut disk);
    assert!(said.iter().any(|said| matches!(said, FromDisk::NoLegLeft { .. })), "{said:?}");
    assert_eq!(completed(&mut disk), [], "it is not known yet whether the store can have it");
}

#[test]
fn a_promoted_leg_alone_may_take_over() {
    let mut disk = disk_with_a_record();
    join(&mut disk, 1, 5);
    run(&mut disk);
    write(&mut disk, 2);
    let ([a, b], _) = poll(&mut disk);
    disk.on_message(ToDisk::Legs { members: LegSet::first(2) });
    assert_eq!(disk.readable_legs(), LegSet::first(2));
    answer(&mut disk, &a, Err(libc::EIO));
    disk.on_message(ToDisk::Legs { members: LegSet::NONE.with(1) });
    assert_eq!(completed(&mut disk), [], "begun on both, and not done on the one that is left");
    answer(&mut disk, &b, Ok(()));
    assert_eq!(completed(&mut disk), [(2, true)]);
}

#[test]
fn the_late_answer_of_a_leg_that_is_out_is_not_taken_for_its_successors() {
    let mut disk = disk();
    write(&mut disk, 1);
    let ([a, late], _) = poll(&mut disk);
    disk.on_message(ToDisk::Legs { members: LegSet::FIRST });
    join(&mut disk, 1, 5);
    answer(&mut disk, &late, Err(libc::EIO));
    answer(&mut disk, &a, Ok(()));
    assert_eq!(completed(&mut disk), [(1, true)], "the new leg owes nothing for it");
    let (_, said) = run(&mut disk);
    assert!(has_joined(&said) && !said.iter().any(|s| matches!(s, FromDisk::LegFailed { .. })));
}

#[test]
fn in_write_through_requests_are_done_when_the_store_has_them() {
    let (mut disk, _) = without_legs(Some(libc::EIO));
    disk.flush(2);
    disk.on_message(ToDisk::WriteThrough { lsn: Lsn(1) });
    assert_eq!(completed(&mut disk), [(1, true), (2, true)]);
    for tag in 3..6 {
        write(&mut disk, tag);
    }
    disk.flush(6);
    let (ops, said) = poll(&mut disk);
    assert!(ops.iter().all(Vec::is_empty), "nothing goes to the device");
    let handed = |said: &[FromDisk]| -> Vec<(Lsn, Lsn)> {
        let sealed = said.iter().filter_map(|said| match said {
            FromDisk::Sealed(sealed) => Some((sealed.first_lsn, sealed.last_lsn)),
            _ => None,
        });
        sealed.collect()
    };
    assert_eq!(handed(&said), [(Lsn(2), Lsn(4))]);
    // What comes meanwhile waits for its turn.
    write(&mut disk, 7);
    assert_eq!(handed(&poll(&mut disk).1), []);
    assert_eq!(completed(&mut disk), []);
    disk.on_message(ToDisk::Committed { lsn: Lsn(4) });
    assert_eq!(completed(&mut disk).len(), 4, "three writes and their flush");
    assert_eq!(handed(&poll(&mut disk).1), [(Lsn(5), Lsn(5))]);
    assert!(!disk.is_quiet());
    disk.on_message(ToDisk::Committed { lsn: Lsn(5) });
    assert_eq!(completed(&mut disk), [(7, true)]);
    poll(&mut disk);
    assert!(disk.is_quiet());
    let mut plan = crate::disk::plan::ReadPlan::default();
    disk.read(0, 8, &mut plan);
    let is_miss =
        |piece: &crate::disk::plan::Piece| matches!(piece, crate::disk::plan::Piece::Miss { .. });
    assert!(plan.pieces.iter().all(is_miss), "the store is asked: {plan:?}");
}

#[test]
fn what_waits_for_a_leg_that_does_not_answer_waits_until_it_is_out() {
    let mut disk = disk();
    let silent = LegSet::NONE.with(1);
    write(&mut disk, 1);
    let ([a, late], _) = poll(&mut disk);
    answer(&mut disk, &a, Ok(()));
    for _ in 0..2 {
        disk.legs_silent(silent);
        let (_, said) = poll(&mut disk);
        assert!(matches!(said[..], [FromDisk::LegSilent { leg: 1, joining: None }]), "{said:?}");
        assert_eq!((disk.readable_legs(), disk.silent_legs()), (LegSet::FIRST, silent));
        assert_eq!(completed(&mut disk), [], "the set without it is not durable yet");
    }
    // It is written on: the other may be put out in its place.
    write(&mut disk, 2);
    disk.flush(3);
    let ([a, more], _) = poll(&mut disk);
    assert_eq!((a.len(), more.len()), (1, 1));
    answer(&mut disk, &a, Ok(()));
    disk.on_message(ToDisk::Legs { members: LegSet::FIRST });
    assert_eq!(completed(&mut disk), [(1, true), (2, true)]);
    assert!(late.iter().chain(&more).all(|op| !disk.wants(*op)));
    // Its answers come late, or never.
    answer(&mut disk, &late, Err(libc::EIO));
    answer(&mut disk, &more, Ok(()));
    let (_, said) = run(&mut disk);
    assert!(said.is_empty(), "{said:?}");
    assert_eq!(completed(&mut disk), [(3, true)]);
    assert!(disk.is_quiet());
}

#[test]
fn a_slow_leg_that_comes_back_goes_on_and_so_does_the_one_that_is_left() {
    for left in [LegSet::first(2), LegSet::NONE.with(1)] {
        let mut disk = disk();
        write(&mut disk, 1);
        let ([a, b], _) = poll(&mut disk);
        disk.legs_silent(LegSet::NONE.with(1));
        answer(&mut disk, &a, Ok(()));
        // Another disk waited for the other leg, which was put out; or nobody did.
        disk.on_message(ToDisk::Legs { members: left });
        assert_eq!(completed(&mut disk), []);
        answer(&mut disk, &b, Ok(()));
        assert_eq!(completed(&mut disk), [(1, true)]);
        disk.legs_silent(LegSet::NONE);
        assert_eq!(disk.readable_legs(), left);
        write(&mut disk, 2);
        run(&mut disk);
        assert_eq!(completed(&mut disk), [(2, true)]);
    }
}

#[test]
fn the_last_leg_is_waited_for_and_so_are_both() {
    let mut disk = disk();
    write(&mut disk, 1);
    let ([a, b], _) = poll(&mut disk);
    disk.legs_silent(LegSet::first(2));
    assert!(poll(&mut disk).1.is_empty(), "neither is known to be the one that hangs");
    disk.legs_silent(LegSet::NONE.with(1));
    assert!(poll(&mut disk).1.is_empty(), "the other may come back as well");
    disk.legs_silent(LegSet::NONE.with(1));
    assert_eq!(poll(&mut disk).1.len(), 1);
    disk.on_message(ToDisk::Legs { members: LegSet::FIRST });
    disk.legs_silent(LegSet::first(2));
    disk.legs_silent(LegSet::first(2));
    assert!(poll(&mut disk).1.is_empty());
    assert_eq!((disk.readable_legs(), disk.silent_legs()), (LegSet::FIRST, LegSet::NONE));
    answer(&mut disk, &b, Err(libc::EIO));
    assert_eq!(completed(&mut disk), []);
    answer(&mut disk, &a, Ok(()));
    assert_eq!(completed(&mut disk), [(1, true)]);
}

#[test]
fn with_no_leg_left_none_is_said_to_be_silent() {
    let mut disk = disk_with_a_record();
    join(&mut disk, 1, 5);
    run(&mut disk);
    write(&mut disk, 2);
    let ([a, _], _) = poll(&mut disk);
    answer(&mut disk, &a, Err(libc::EIO));
    let held = |said: &FromDisk| matches!(said, FromDisk::NoLegLeft { .. });
    assert!(poll(&mut disk).1.iter().any(held));
    // What the driver sees under way on the leg that was joining.
    for _ in 0..3 {
        disk.legs_silent(LegSet::NONE.with(1));
        let (_, said) = poll(&mut disk);
        assert!(said.is_empty(), "{said:?}");
        assert_eq!(disk.silent_legs(), LegSet::NONE);
        disk.on_message(ToDisk::WriteThrough { lsn: Lsn(2) });
    }
}

#[test]
fn a_joining_leg_that_does_not_answer_is_told_of_by_its_name() {
    let mut disk = disk_with_a_record();
    join(&mut disk, 1, 5);
    run(&mut disk);
    write(&mut disk, 2);
    let ([a, _], _) = poll(&mut disk);
    answer(&mut disk, &a, Ok(()));
    disk.legs_silent(LegSet::NONE.with(1));
    let (_, said) = poll(&mut disk);
    assert!(matches!(said[..], [FromDisk::LegSilent { leg: 1, joining: Some(5) }]), "{said:?}");
    disk.on_message(ToDisk::Legs { members: LegSet::FIRST });
    assert_eq!(completed(&mut disk), [(2, true)]);
}
