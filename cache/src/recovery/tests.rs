//! Goal: each case that recovery can meet is judged as documented. Method: segments made up by hand, one case a test. What
//! real crashes leave is in tests/log_crash.

use super::{AssembleError, Assembler, Found, Recovered, from_summary, scan};
use crate::disk::plan::SegmentId;
use crate::format::Geometry;
use crate::format::record::{Kind, RecordHeader, WHOLE, push_descriptor};
use crate::format::segment::SegmentHeader;
use crate::format::slot::SlotVdi;
use crate::format::summary::{Summary, blocks_for};
use crate::index::Found as Entry;
use blockstore::crc::crc32c;
use blockstore::types::{BLOCK_SIZE, Lba, Lsn};
use uuid::Uuid;

/// A segment: LSNs from first to last, one block each, LBA = LSN % 100.
#[derive(Clone, Copy)]
struct Seg {
    seq: u64,
    first: u64,
    last: u64,
    epoch: u32,
    sealed: bool,
    flushed: u64,
}

fn sealed(seq: u64, first: u64, last: u64) -> Seg {
    Seg { seq, first, last, epoch: 1, sealed: true, flushed: last }
}

fn unsealed(seq: u64, first: u64, last: u64, flushed: u64) -> Seg {
    Seg { seq, first, last, epoch: 1, sealed: false, flushed }
}

pub(super) fn slot(committed: u64) -> SlotVdi {
    SlotVdi {
        uuid: Uuid::nil(),
        log_id: 1,
        name: String::new(),
        size_bytes: 1 << 30,
        committed: Lsn(committed),
        evicted_below: 0,
        sequence_seen: 0,
        epoch: 1,
        first_lsn: Lsn(1),
        durable: Lsn(0),
        alone_from: None,
        cuts: Vec::new(),
        origin: None,
        has_cuts: false,
        policy: Default::default(),
        left_behind: None,
        boot_trace: Vec::new(),
    }
}

fn assemble(local: u64, store: u64, segments: &[Seg]) -> Result<Recovered, AssembleError> {
    assemble_slot(slot(local), store, segments)
}

/// As [`assemble`], where the slot knows that everything up to `durable` was.
fn assemble_noted(
    durable: u64,
    local: u64,
    store: u64,
    segments: &[Seg],
) -> Result<Recovered, AssembleError> {
    let slot = SlotVdi { durable: Lsn(durable), ..slot(local) };
    assemble_slot(slot, store, segments)
}

fn assemble_slot(slot: SlotVdi, store: u64, segments: &[Seg]) -> Result<Recovered, AssembleError> {
    let geometry = Geometry::for_size(64 << 20).unwrap();
    let mut assembler = Assembler::new(geometry, slot, Lsn(store))?;
    for seg in segments {
        let mut entries = Vec::new();
        for (n, lsn) in (seg.first..=seg.last).enumerate() {
            push_descriptor(
                &mut entries,
                Kind::Write,
                Lba(lsn % 100),
                1,
                2 + n as u16,
                (WHOLE, WHOLE),
            );
            entries.extend((lsn as u32).to_le_bytes());
        }
        let header = SegmentHeader {
            cache: Uuid::nil(),
            vdi: Uuid::nil(),
            log_id: 1,
            seq: seg.seq,
            nonce: 0,
            first_lsn: Lsn(seg.first),
            segment: SegmentId(seg.seq as u32),
            epoch: seg.epoch,
        };
        let found = Found {
            first_lsn: Lsn(seg.first),
            last_lsn: Lsn(seg.last),
            used_blocks: 20,
            flushed: Lsn(seg.flushed),
            entries,
            sealed: seg.sealed,
        };
        assembler.push(&header, &found)?;
    }
    assembler.finish()
}

fn ids(recovered: &Recovered) -> (Vec<u64>, Vec<u32>) {
    let live = recovered.live.iter().map(|live| live.header.seq).collect();
    (live, recovered.dead.iter().map(|id| id.0).collect())
}

#[test]
fn a_whole_log_is_taken_as_it_is() {
    let recovered =
        assemble(0, 0, &[sealed(1, 1, 5), sealed(2, 6, 9), unsealed(3, 10, 12, 9)]).unwrap();
    assert_eq!(recovered.last_lsn, Lsn(12));
    assert_eq!(ids(&recovered), (vec![1, 2, 3], vec![]));
    assert!(recovered.live[2].unsealed.is_some(), "it needs a summary before the disk is served");
    assert!(matches!(recovered.index.get(Lba(7)), Entry::At { crc: 7, .. }));
}

#[test]
fn a_hole_above_everything_flushed_ends_the_log() {
    let recovered =
        assemble(0, 0, &[sealed(1, 1, 5), unsealed(2, 6, 8, 5), unsealed(3, 10, 12, 5)]).unwrap();
    assert_eq!(recovered.last_lsn, Lsn(8));
    assert_eq!(ids(&recovered), (vec![1, 2], vec![3]));
    assert!(matches!(recovered.index.get(Lba(10)), Entry::Absent));
}

#[test]
fn a_hole_below_something_flushed_is_corruption() {
    let error = assemble(0, 0, &[sealed(1, 1, 5), unsealed(2, 6, 8, 5), unsealed(3, 10, 12, 9)]);
    assert_eq!(error.unwrap_err(), AssembleError::Corrupt { from: Lsn(9), flushed: Lsn(9) });
    // A summary says the same: it is written after a flush of all before it.
    let error = assemble(0, 0, &[sealed(1, 1, 5), unsealed(2, 6, 8, 5), sealed(3, 10, 12)]);
    assert_eq!(error.unwrap_err(), AssembleError::Corrupt { from: Lsn(9), flushed: Lsn(12) });
    // The oldest uncommitted records gone altogether.
    let error = assemble(0, 0, &[sealed(2, 6, 9)]);
    assert_eq!(error.unwrap_err(), AssembleError::Corrupt { from: Lsn(1), flushed: Lsn(9) });
}

#[test]
fn a_gap_in_what_is_committed_drops_the_older_read_cache_only() {
    let recovered =
        assemble(12, 12, &[sealed(1, 1, 5), sealed(3, 10, 12), unsealed(4, 13, 14, 12)]).unwrap();
    assert_eq!(recovered.last_lsn, Lsn(14));
    assert_eq!(ids(&recovered), (vec![3, 4], vec![1]));
    assert!(
        matches!(recovered.index.get(Lba(3)), Entry::Absent),
        "an older copy must not come back"
    );
}

#[test]
fn records_of_an_older_epoch_beyond_its_end_are_dead() {
    let slot = SlotVdi {
        uuid: Uuid::nil(),
        log_id: 1,
        name: String::new(),
        size_bytes: 1 << 30,
        committed: Lsn(0),
        evicted_below: 0,
        sequence_seen: 0,
        epoch: 2,
        first_lsn: Lsn(10),
        durable: Lsn(0),
        alone_from: None,
        cuts: Vec::new(),
        origin: None,
        has_cuts: false,
        policy: Default::default(),
        left_behind: None,
        boot_trace: Vec::new(),
    };
    // Recovery ended the log at 9; 10 to 12 of the old epoch were left, 10 and 11 were written anew.
    let old = Seg { flushed: 5, sealed: false, ..sealed(2, 10, 12) };
    let new = Seg { epoch: 2, ..unsealed(3, 10, 11, 9) };
    let recovered = assemble_slot(slot, 0, &[sealed(1, 1, 9), old, new]).unwrap();
    assert_eq!(recovered.last_lsn, Lsn(11));
    assert_eq!(ids(&recovered), (vec![1, 3], vec![2]));
}

#[test]
fn a_store_or_a_log_that_went_back_is_refused() {
    let store = assemble(8, 7, &[sealed(1, 1, 9)]).unwrap_err();
    assert_eq!(store, AssembleError::StoreRolledBack { store: Lsn(7), log: Lsn(8) });
    let log = assemble(0, 20, &[sealed(1, 1, 9)]).unwrap_err();
    assert_eq!(log, AssembleError::LogRolledBack { store: Lsn(20), log: Lsn(9) });
}

#[test]
fn an_empty_log_stands_where_the_store_does() {
    assert_eq!(assemble(20, 20, &[]).unwrap().last_lsn, Lsn(20));
    // Opened, but not even the first record made it.
    let opened = Seg { last: 20, ..unsealed(9, 21, 20, 20) };
    let recovered = assemble(20, 20, &[opened]).unwrap();
    assert_eq!((recovered.last_lsn, ids(&recovered).1), (Lsn(20), vec![9]));
}

#[test]
fn segments_that_contradict_each_other_are_refused() {
    let error = assemble(0, 0, &[sealed(1, 1, 5), sealed(2, 4, 9)]).unwrap_err();
    assert_eq!(error, AssembleError::Overlap { segment: 2, first: Lsn(4), end: Lsn(5) });
}

#[test]
fn a_summary_that_contradicts_itself_is_not_believed() {
    let header = SegmentHeader {
        cache: Uuid::nil(),
        vdi: Uuid::nil(),
        log_id: 1,
        seq: 3,
        nonce: 77,
        first_lsn: Lsn(10),
        segment: SegmentId(1),
        epoch: 1,
    };
    let geometry = Geometry::for_size(64 << 20).unwrap();
    let sealed = |first: u64, last: u64, used_blocks: u32| {
        let mut entries = Vec::new();
        push_descriptor(&mut entries, Kind::Write, Lba(5), 2, 2, (WHOLE, WHOLE));
        entries.extend([0; 8]);
        let (first_lsn, last_lsn) = (Lsn(first), Lsn(last));
        let summary =
            Summary { seq: 3, first_lsn, last_lsn, flushed: last_lsn, used_blocks, entries };
        let mut tail = vec![0; blocks_for(summary.entries.len()) as usize * BLOCK_SIZE];
        summary.encode_into(&mut tail, 77);
        from_summary(&tail, &header, &geometry)
    };
    assert!(sealed(10, 10, 4).is_some_and(|found| found.sealed && found.used_blocks == 4));
    assert!(sealed(10, 11, 4).is_none(), "more LSNs than entries");
    assert!(sealed(10, u64::MAX, 4).is_none());
    assert!(sealed(11, 11, 4).is_none(), "not the header's first LSN");
    assert!(sealed(10, 10, 3).is_none(), "payload in blocks that are not in use");
    assert!(sealed(10, 10, u32::MAX).is_none(), "more blocks than the segment has");
}

/// A segment of two records of one block each; the second says that the first is flushed.
pub(super) fn two_records() -> (SegmentHeader, Vec<u8>) {
    let header = SegmentHeader {
        cache: Uuid::nil(),
        vdi: Uuid::nil(),
        log_id: 1,
        seq: 7,
        nonce: 3,
        first_lsn: Lsn(1),
        segment: SegmentId(0),
        epoch: 1,
    };
    let mut segment = vec![0u8; 16 * BLOCK_SIZE];
    for (n, flushed) in [(0u16, 0), (1, 1)] {
        let lsns = (Lsn(1 + u64::from(n)), Lsn(flushed));
        write_of_zeros(&mut segment, &header, 1 + 2 * n, lsns, header.nonce);
    }
    (header, segment)
}

/// Puts the header of a record at a block of a segment: one write of the block behind it, which is of zeros. `lsns`: its own, and
/// what it says was flushed.
fn write_of_zeros(
    segment: &mut [u8],
    header: &SegmentHeader,
    position: u16,
    lsns: (Lsn, Lsn),
    nonce: u64,
) {
    let mut entries = Vec::new();
    push_descriptor(&mut entries, Kind::Write, Lba(5), 1, position + 1, (WHOLE, WHOLE));
    entries.extend(crc32c(&[0; BLOCK_SIZE]).to_le_bytes());
    let record = RecordHeader {
        seq: header.seq,
        first_lsn: lsns.0,
        flushed: lsns.1,
        position,
        payload_blocks: 1,
        epoch: header.epoch,
        entries_len: entries.len() as u16,
        time_ms: 0,
    };
    let at = usize::from(position) * BLOCK_SIZE;
    record.encode_into(&mut segment[at..at + BLOCK_SIZE], &entries, nonce);
}

#[test]
fn a_bad_record_below_what_a_later_one_says_was_flushed_is_not_the_end() {
    let (header, mut segment) = two_records();
    let whole = scan(&segment, &header);
    assert_eq!((whole.last_lsn, whole.flushed), (Lsn(2), Lsn(1)));
    segment[2 * BLOCK_SIZE] ^= 1;
    let cut = scan(&segment, &header);
    assert_eq!((cut.last_lsn, cut.flushed), (Lsn(0), Lsn(1)), "LSN 1 was flushed, and is bad");
}

/// A power loss tears the first record of a segment; the segment before it is damaged. That its end was flushed says the header
/// of the torn record alone.
#[test]
fn a_torn_record_says_what_was_flushed_before_it() {
    let (header, mut segment) = two_records();
    let (first, entries) =
        RecordHeader::decode(&segment[BLOCK_SIZE..2 * BLOCK_SIZE], header.seq, header.nonce, 1)
            .map(|(record, entries)| (record, entries.to_vec()))
            .unwrap();
    let header = SegmentHeader { first_lsn: Lsn(70), ..header };
    let first = RecordHeader { first_lsn: Lsn(70), flushed: Lsn(69), ..first };
    segment[2 * BLOCK_SIZE..].fill(0xff);
    first.encode_into(&mut segment[BLOCK_SIZE..2 * BLOCK_SIZE], &entries, header.nonce);
    let found = scan(&segment, &header);
    assert_eq!((found.last_lsn, found.flushed), (Lsn(69), Lsn(69)));
}

/// A guest knows its disk's log by heart: it writes blocks that look like the records which come next, and like markers that
/// say that more was flushed. They lie in a segment that is used again, just where the next record is looked for.
#[test]
fn what_a_guest_wrote_is_not_taken_for_a_record() {
    let (header, segment) = two_records();
    let honest = scan(&segment, &header);
    let forged = |nonce: u64| {
        let mut segment = segment.clone();
        for (position, lsn) in [(5, Lsn(3)), (7, Lsn(4))] {
            write_of_zeros(&mut segment, &header, position, (lsn, lsn), nonce);
        }
        scan(&segment, &header)
    };
    // All that it does not know is the nonce, which is drawn when the segment is taken into use.
    for nonce in [0, header.nonce - 1, header.nonce + 1, header.nonce.reverse_bits()] {
        assert_eq!(forged(nonce), honest, "nonce {nonce}");
    }
    assert_eq!(forged(header.nonce).last_lsn, Lsn(4), "with it, the blocks count");
}

#[test]
fn a_log_that_ends_below_what_the_slot_knows_is_damaged() {
    let corrupt = |from, flushed| AssembleError::Corrupt { from: Lsn(from), flushed: Lsn(flushed) };
    // Nothing is left of it, or not its end, or not its start.
    assert_eq!(assemble_noted(9, 0, 0, &[]).unwrap_err(), corrupt(1, 9));
    assert_eq!(assemble_noted(9, 3, 5, &[]).unwrap_err(), corrupt(6, 9));
    assert_eq!(assemble_noted(9, 0, 0, &[sealed(1, 1, 5)]).unwrap_err(), corrupt(6, 9));
    assert_eq!(assemble_noted(9, 0, 0, &[unsealed(1, 1, 8, 3)]).unwrap_err(), corrupt(9, 9));
    assert_eq!(assemble_noted(9, 0, 0, &[unsealed(2, 6, 9, 5)]).unwrap_err(), corrupt(1, 9));
    // All of it is there, or in the store; or the slot does not say.
    for (durable, store, segments, last) in [
        (9, 0, vec![sealed(1, 1, 5), unsealed(2, 6, 9, 5)], 9),
        (9, 0, vec![sealed(1, 1, 5), unsealed(2, 6, 12, 5)], 12),
        (9, 9, vec![], 9),
        (9, 12, vec![], 12),
        (9, 7, vec![sealed(3, 8, 9)], 9),
        (0, 0, vec![], 0),
    ] {
        let recovered = assemble_noted(durable, 0, store, &segments).unwrap();
        assert_eq!(recovered.last_lsn, Lsn(last), "{durable} {store}");
    }
}
