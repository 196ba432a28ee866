//! Goal: a segment that is given in parts is filled in parts, loses nothing of itself by that, and holds up nothing but guests' writes.

use super::*;

/// Writes single blocks until one has to wait; how many did not.
fn fill(disk: &mut Disk, from: u64) -> u64 {
    (from..)
        .take_while(|n| {
            let staged = disk.write(*n, n * 8, BLOCK_SIZE, &mut |_, bytes| bytes.fill(1));
            if staged == Staged::All {
                run(disk);
            } else {
                assert_eq!(staged, Staged::Part(0));
            }
            staged == Staged::All
        })
        .count() as u64
}

fn ration(disk: &mut Disk, seq: u64, blocks: Option<u32>) {
    disk.on_message(ToDisk::Ration { seq, blocks });
}

/// A disk with segments 1 and 2, and how many single writes a segment takes.
fn with_second_segment_rationed(blocks: u32) -> (Disk, u64) {
    let mut alone = disk();
    ration(&mut alone, 2, Some(0));
    let whole = fill(&mut alone, 1);
    let mut disk = disk();
    ration(&mut disk, 2, Some(blocks));
    (disk, whole)
}

#[test]
fn writes_get_as_much_of_a_segment_as_was_said_and_the_rest_later() {
    let (mut disk, whole) = with_second_segment_rationed(0);
    let mut written = fill(&mut disk, 1);
    assert_eq!(written, whole, "the segment before is theirs whole");
    assert!(!run(&mut disk).1.iter().any(|said| matches!(said, FromDisk::Opened { .. })));
    let mut before = 0;
    for blocks in [16, 32, 128] {
        ration(&mut disk, 2, Some(blocks));
        let more = fill(&mut disk, written + 1);
        // Each write was a batch of its own here, with a header.
        assert_eq!(more, u64::from((blocks - before) / 2).saturating_sub(u64::from(before == 0)));
        (written, before) = (written + more, blocks);
    }
    ration(&mut disk, 2, None);
    written += fill(&mut disk, written + 1);
    assert_eq!(written, 2 * whole, "nothing of it is lost");
}

#[test]
fn a_large_write_goes_on_with_each_part() {
    let (mut disk, whole) = with_second_segment_rationed(16);
    fill(&mut disk, 1);
    ration(&mut disk, 2, Some(48));
    let len = 64 * BLOCK_SIZE;
    let mut done = 0;
    let mut stage = |disk: &mut Disk| {
        let sector = (whole + 100) * 8 + (done / 512) as u64;
        match disk.write(7000, sector, len - done, &mut |_, bytes| bytes.fill(2)) {
            Staged::Part(bytes) => done += bytes,
            staged => {
                assert_eq!(staged, Staged::All);
                done = len;
            }
        }
        run(disk);
        done
    };
    let first = stage(&mut disk);
    assert!(first > 0 && first < 48 * BLOCK_SIZE, "{first}");
    assert_eq!(stage(&mut disk), first);
    assert_eq!(completed(&mut disk).into_iter().find(|(tag, _)| *tag == 7000), None);
    ration(&mut disk, 2, None);
    assert_eq!(stage(&mut disk), len);
    assert_eq!(completed(&mut disk).last(), Some(&(7000, true)));
}

#[test]
fn snapshots_and_flushes_do_not_wait_for_the_next_part() {
    let (mut disk, _) = with_second_segment_rationed(0);
    let written = fill(&mut disk, 1);
    disk.flush(8000);
    disk.on_message(ToDisk::Snapshot { id: 5, time_ms: 0, label: Default::default() });
    let (_, said) = run(&mut disk);
    assert!(said.iter().any(|said| matches!(said, FromDisk::SnapshotTaken { id: 5, result: Ok(lsn) } if lsn.0 == written + 1)), "{said:?}");
    assert!(completed(&mut disk).contains(&(8000, true)));
    assert_eq!(fill(&mut disk, written + 1), 0, "writes do");
}

#[test]
fn what_was_said_of_a_segment_ends_with_the_last_leg() {
    let mut disk = disk();
    ration(&mut disk, 1, Some(0));
    assert_eq!(fill(&mut disk, 1), 0);
    disk.on_message(ToDisk::Legs { members: LegSet::NONE });
    disk.on_message(ToDisk::WriteThrough { lsn: Lsn(0) });
    // Segments in memory count from where those that were there end.
    ration(&mut disk, 3, Some(0));
    write(&mut disk, 1);
}
