//! Goal: INV-LOG-8: a snapshot is answered when it is durable, in the order of the log, and in any case. Method: as above.

use super::*;

fn snapshot(disk: &mut Disk, id: u64) {
    disk.on_message(ToDisk::Snapshot { id, time_ms: 5, label: Default::default() });
}

/// Answers to snapshots: the LSN, or none for an error.
fn taken(said: &[FromDisk]) -> Vec<(u64, Option<Lsn>)> {
    let taken = said.iter().filter_map(|said| match said {
        FromDisk::SnapshotTaken { id, result } => Some((*id, result.as_ref().ok().copied())),
        _ => None,
    });
    taken.collect()
}

#[test]
fn snapshots_share_the_flush_that_begins_after_their_records_were_written() {
    let mut disk = disk();
    write(&mut disk, 1);
    snapshot(&mut disk, 10);
    let (first, _) = poll(&mut disk);
    // Its record is written while the flush for the one before is under way.
    first.iter().for_each(|ops| answer(&mut disk, ops, Ok(())));
    let (flush, said) = poll(&mut disk);
    assert_eq!((flush[0].len(), flush[1].len(), taken(&said)), (1, 1, vec![]));
    snapshot(&mut disk, 11);
    snapshot(&mut disk, 12);
    write(&mut disk, 2);
    let (second, _) = poll(&mut disk);
    second.iter().for_each(|ops| answer(&mut disk, ops, Ok(())));
    answer(&mut disk, &flush[0], Ok(()));
    assert_eq!(taken(&poll(&mut disk).1), [], "one leg is not enough");
    answer(&mut disk, &flush[1], Ok(()));
    let (flush, said) = poll(&mut disk);
    assert_eq!(taken(&said), [(10, Some(Lsn(2)))], "the others came after that flush began");
    assert!(!disk.is_quiet());
    flush.iter().for_each(|ops| answer(&mut disk, ops, Ok(())));
    let (_, said) = poll(&mut disk);
    assert_eq!(taken(&said), [(11, Some(Lsn(3))), (12, Some(Lsn(4)))]);
    assert_eq!(disk.staged_lsn(), Lsn(5));
    assert_eq!(completed(&mut disk), [(1, true), (2, true)]);
    assert!(disk.is_quiet());
}

#[test]
fn with_no_leg_left_snapshots_wait_for_the_store_or_fail() {
    for lost in [false, true] {
        let (mut disk, _) = without_legs(Some(libc::EIO));
        snapshot(&mut disk, 10);
        assert_eq!(taken(&poll(&mut disk).1), []);
        if lost {
            disk.on_message(ToDisk::GiveUp { reason: "lost".into() });
            assert_eq!(taken(&poll(&mut disk).1), [(10, None)]);
            snapshot(&mut disk, 11);
            assert_eq!(taken(&poll(&mut disk).1), [(11, None)]);
            continue;
        }
        disk.on_message(ToDisk::WriteThrough { lsn: Lsn(1) });
        // There is room now; the snapshot comes first all the same.
        write(&mut disk, 2);
        let (_, said) = poll(&mut disk);
        assert_eq!(taken(&said), [], "it is in memory only");
        assert!(said.iter().any(|s| matches!(s, FromDisk::Sealed(s) if s.last_lsn == Lsn(3))));
        disk.on_message(ToDisk::Committed { lsn: Lsn(3) });
        assert_eq!(taken(&poll(&mut disk).1), [(10, Some(Lsn(2)))]);
        // Nobody else wants room.
        snapshot(&mut disk, 11);
        disk.on_message(ToDisk::Committed { lsn: Lsn(4) });
        assert_eq!(taken(&poll(&mut disk).1), [(11, Some(Lsn(4)))]);
        assert_eq!(completed(&mut disk), [(1, true), (2, true)]);
        assert!(disk.is_quiet());
    }
}

#[test]
fn more_snapshots_than_may_wait_are_refused_and_the_others_are_answered() {
    let mut disk = disk();
    let most = crate::disk::SNAPSHOTS_WAITING_MAX as u64;
    (0..=most).for_each(|id| snapshot(&mut disk, id));
    let (_, said) = run(&mut disk);
    let answers = taken(&said);
    assert_eq!(answers[0], (most, None));
    let expected: Vec<_> = (0..most).map(|id| (id, Some(Lsn(id + 1)))).collect();
    assert_eq!(answers[1..], expected);
}

#[test]
fn a_snapshot_that_waited_for_the_store_needs_no_other_request_to_go_on() {
    let (mut disk, _) = without_legs(Some(libc::EIO));
    snapshot(&mut disk, 10);
    disk.on_message(ToDisk::WriteThrough { lsn: Lsn(1) });
    let (_, said) = poll(&mut disk);
    assert!(said.iter().any(|s| matches!(s, FromDisk::Sealed(s) if s.last_lsn == Lsn(2))));
    disk.on_message(ToDisk::Committed { lsn: Lsn(2) });
    assert_eq!(taken(&poll(&mut disk).1), [(10, Some(Lsn(2)))]);
}
