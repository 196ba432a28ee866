//! Goal: INV-LOG-9: a cut stands behind its whole write, or behind its batch, in the same record, at no cost but its bytes, and
//! however full header and segment are. Method: a disk on two legs; what the records hold is read where they lie in memory.

use super::*;
use crate::format::record::{Entries, Kind, RecordHeader};
use blockstore::schedule::{Behind, Cadence};

const WRITE: Cadence = Cadence { behind: Behind::Write, keep: 7 };
const BATCH: Cadence = Cadence { behind: Behind::Batch, keep: 7 };

/// Each entry of a record, with the LSN that it ends at.
type Record = Vec<(Kind, u64)>;

/// Does everything that the disk wants; the entries of each record, and how often the legs were flushed.
fn work(disk: &mut Disk) -> (Vec<Record>, usize, Vec<FromDisk>) {
    let (mut records, mut flushes, mut said) = (Vec::new(), 0, Vec::new());
    loop {
        let mut actions = Vec::new();
        disk.poll(&mut actions);
        if actions.is_empty() {
            return (records, flushes, said);
        }
        for action in actions {
            match action {
                Action::Write { op, leg, offset, image, start, len } => {
                    let block = (offset / BLOCK_SIZE as u64) as u32;
                    let inside = |n: u32| (start / BLOCK_SIZE) as u32 + n;
                    for n in 0..(len / BLOCK_SIZE) as u32 {
                        let bytes = image.bytes(start + n as usize * BLOCK_SIZE, BLOCK_SIZE);
                        let seq = if block < 512 { 1 } else { 2 };
                        let seqs = [seq, 3 - seq, 3, 4, 5, 6];
                        let record = seqs
                            .iter()
                            .find_map(|seq| RecordHeader::decode(bytes, *seq, 7, inside(n)).ok());
                        let Some((header, entries)) = record.filter(|_| leg == 0) else { continue };
                        let mut lsn = header.first_lsn.0 - 1;
                        let entries = Entries::new(entries, 256).map(|entry| {
                            let entry = entry.unwrap();
                            lsn += entry.lsns();
                            (entry.kind, lsn)
                        });
                        records.push(entries.collect());
                    }
                    disk.io_done(op, Ok(()));
                }
                Action::Flush { op, .. } => {
                    flushes += 1;
                    disk.io_done(op, Ok(()));
                }
                Action::Send(FromDisk::WantSegment | FromDisk::Opened { .. }) => {}
                Action::Send(message) => said.push(message),
            }
        }
    }
}

#[test]
fn a_snapshot_behind_each_write_is_in_its_record_and_costs_no_flush_and_no_lsn() {
    let mut disk = disk();
    write(&mut disk, 1);
    disk.on_message(ToDisk::Cadence(Some(WRITE)));
    write(&mut disk, 2);
    write(&mut disk, 3);
    assert_eq!(disk.zero(4, 0, 8, true), Staged::All);
    // It changes nothing: no block lies in it whole.
    assert_eq!(disk.zero(5, 1, 6, true), Staged::All);
    let (records, flushes, said) = work(&mut disk);
    use Kind::{Cut, Write, Zero};
    let second = vec![(Write, 2), (Cut, 2), (Write, 3), (Cut, 3), (Zero, 4), (Cut, 4)];
    assert_eq!((records, flushes, said.len()), (vec![vec![(Write, 1)], second], 0, 0));
    assert_eq!((disk.staged_lsn(), completed(&mut disk).len()), (Lsn(4), 5));
    disk.on_message(ToDisk::Cadence(None));
    write(&mut disk, 6);
    assert_eq!(work(&mut disk).0, [[(Write, 5)]]);
}

#[test]
fn behind_a_batch_there_is_one_and_none_behind_what_changes_nothing() {
    let mut disk = disk();
    disk.on_message(ToDisk::Cadence(Some(BATCH)));
    (1..=3).for_each(|tag| write(&mut disk, tag));
    use Kind::{Cut, Fill, Snapshot, Write};
    let expected = vec![(Write, 1), (Write, 2), (Write, 3), (Cut, 3)];
    assert_eq!(work(&mut disk).0, [expected]);
    disk.fill(blockstore::types::Lba(900), &[1; BLOCK_SIZE], disk.fill_ticket());
    assert_eq!(work(&mut disk).0, [[(Fill, 3)]]);
    // What somebody has just asked for is not cut once more.
    write(&mut disk, 4);
    disk.snapshot(1, 5, blockstore::SnapshotLabel::default());
    assert_eq!(work(&mut disk).0[0], [(Write, 4), (Snapshot, 5)]);
}

#[test]
fn a_write_that_is_split_is_in_its_snapshot_whole() {
    for rule in [WRITE, BATCH] {
        let mut disk = disk();
        disk.on_message(ToDisk::Cadence(Some(rule)));
        // More than a record holds, and than the segment: two segments of 256 blocks are there.
        let len = 300 * BLOCK_SIZE;
        assert_eq!(disk.write(1, 0, len, &mut |_, bytes| bytes.fill(1)), Staged::All);
        let last = disk.staged_lsn().0;
        assert!(last > 1, "it was split");
        let (records, ..) = work(&mut disk);
        let cuts: Vec<_> =
            records.concat().into_iter().filter(|(kind, _)| *kind == Kind::Cut).collect();
        assert_eq!(cuts, [(Kind::Cut, last)], "{rule:?}");
        assert_eq!(records.last().and_then(|record| record.last()), Some(&(Kind::Cut, last)));
    }
}

#[test]
fn there_is_room_for_each_however_small_the_entries_are() {
    for rule in [WRITE, BATCH] {
        let mut disk = disk();
        disk.on_message(ToDisk::Cadence(Some(rule)));
        let mut cuts = Vec::new();
        let (mut tag, mut next) = (0, 3u32);
        // Until three segments are full: zeroings alone fill headers, and make the summary long.
        while next < 5 {
            tag += 1;
            let wide = tag % 7 == 0;
            let staged = match wide {
                true => disk.write(tag, 80, BLOCK_SIZE, &mut |_, bytes| bytes.fill(1)),
                false => disk.zero(tag, 8 * (tag % 50), 8, false),
            };
            if staged != Staged::All {
                let grant =
                    Grant { id: SegmentId(next), seq: u64::from(next), nonce: 7, roomy: true };
                next += 1;
                disk.on_message(ToDisk::Segment(grant));
            }
            if tag % 1000 == 0 || staged != Staged::All {
                let (_, _, said) = work(&mut disk);
                for message in said {
                    let FromDisk::Sealed(sealed) = message else { continue };
                    cuts.extend(sealed.cuts.iter().map(|cut| cut.lsn.0));
                    if rule == WRITE {
                        let lsns: Vec<u64> = (sealed.first_lsn.0..=sealed.last_lsn.0).collect();
                        let told: Vec<u64> = sealed.cuts.iter().map(|cut| cut.lsn.0).collect();
                        assert_eq!(told, lsns, "one behind each");
                    } else {
                        assert_eq!(sealed.cuts.last().map(|cut| cut.lsn), Some(sealed.last_lsn));
                    }
                }
            }
        }
        assert!(cuts.len() > 20 && cuts.is_sorted_by(|a, b| a < b), "{rule:?}: {}", cuts.len());
    }
}
