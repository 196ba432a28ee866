//! Goal: every structure reads back as written, its bytes never change unnoticed, and no bytes whatever panic.
//! Method: round trips, one golden block each, and property tests over arbitrary and over mutated bytes.

use super::record::{Entries, Kind, RecordHeader, WHOLE, push_cut, push_descriptor, push_snapshot};
use super::segment::SegmentHeader;
use super::slot::{LeftBehind, SlotVdi, VdiSlot};
use super::summary::{Summary, blocks_for};
use super::superblock::Machine;
use super::superblock::Superblock;
use super::{FormatError, Geometry, LegSet, Membership};
use crate::disk::plan::SegmentId;
use crate::pending::PendingSnapshot;
use blockstore::crc::crc32c;
use blockstore::schedule::{Behind, Cadence};
use blockstore::types::{BLOCK_SIZE, Lba, Lsn};
use blockstore::{SnapshotLabel, WhenOffline};
use proptest::prelude::*;
use uuid::Uuid;

const CACHE: Uuid = Uuid::from_u128(0xcace);

fn superblock() -> Superblock {
    Superblock {
        sequence: 5,
        cache: CACHE,
        host: Uuid::from_u128(1),
        machine: None,
        store: Some(Uuid::from_u128(2)),
        leg: Uuid::from_u128(3),
        membership: Membership::new(vec![Uuid::from_u128(3)]),
        geometry: Geometry::for_size(2 << 30).unwrap(),
    }
}

fn slot() -> VdiSlot {
    VdiSlot {
        quarantined: None,
        sequence: 9,
        slot: 3,
        vdi: Some(SlotVdi {
            uuid: Uuid::from_u128(7),
            log_id: 8,
            name: "wéb".into(),
            size_bytes: 1 << 40,
            committed: Lsn(100),
            evicted_below: 4,
            sequence_seen: 12,
            epoch: 2,
            first_lsn: Lsn(90),
            durable: Lsn(0),
            alone_from: None,
            cuts: Vec::new(),
            origin: None,
            has_cuts: false,
            policy: Default::default(),
            left_behind: None,
            boot_trace: Vec::new(),
        }),
    }
}

#[test]
fn a_slot_keeps_what_came_later_and_zero_is_the_former_behaviour() {
    let mut with = slot();
    let Some(vdi) = &mut with.vdi else { unreachable!() };
    vdi.policy.chosen.when_offline = WhenOffline::FailAfter(1500);
    vdi.policy.chosen.schedule = "every 10s keep 6, every 1h keep 24".parse().unwrap();
    vdi.policy.pinned = true;
    vdi.boot_trace = (0..400).map(|n| (Lba(n << 27), 1 + n)).collect();
    vdi.durable = Lsn(95);
    vdi.alone_from = Some(Lsn(0));
    let cut = |lsn, time_ms, label| PendingSnapshot {
        lsn: Lsn(lsn),
        time_ms,
        label: SnapshotLabel::new(label).unwrap(),
    };
    vdi.cuts = vec![cut(101, 1_790_000_000_123, "abc".to_owned()), cut(104, 0, "é".repeat(32))];
    let (former, block) = (slot().encode(), with.encode());
    assert_eq!(VdiSlot::decode(&block, 3), Ok(with));
    assert_eq!(block[112..116], 1500u32.to_le_bytes());
    assert_eq!(block[116..120], 1u32.to_le_bytes());
    assert_eq!(block[3584..3592], 95u64.to_le_bytes());
    assert_eq!(block[3592..3600], 1u64.to_le_bytes());
    assert_eq!(block[3600..3608], (10_000u64 << 24 | 6).to_le_bytes());
    assert_eq!(block[3608..3616], (3_600_000u64 << 24 | 24).to_le_bytes());
    assert_eq!(block[3664..3672], 101u64.to_le_bytes());
    assert_eq!(block[3672..3680], 1_790_000_000_123u64.to_le_bytes());
    assert_eq!(block[3680..3684], *b"abc\0");
    assert_eq!(block[3744..3752], 104u64.to_le_bytes());
    assert_eq!(block[3824..], [0; BLOCK_SIZE - 3824]);
    assert_eq!(former[112..120], [0; 8]);
    assert_eq!(former[376..], [0; BLOCK_SIZE - 376]);
    let mut behind = slot();
    let Some(vdi) = &mut behind.vdi else { unreachable!() };
    vdi.left_behind = Some(LeftBehind { epoch: vdi.epoch, flushed: Lsn(0), staged: Lsn(77) });
    let block = behind.encode();
    assert_eq!(block[BLOCK_SIZE - 16..BLOCK_SIZE - 8], 1u64.to_le_bytes());
    assert_eq!(block[BLOCK_SIZE - 8..], 77u64.to_le_bytes());
    assert_eq!(VdiSlot::decode(&block, 3), Ok(behind));
}

fn segment_header() -> SegmentHeader {
    SegmentHeader {
        cache: CACHE,
        vdi: Uuid::from_u128(7),
        log_id: 8,
        seq: 11,
        nonce: 0x1234_5678_9abc_def0,
        first_lsn: Lsn(101),
        segment: SegmentId(17),
        epoch: 2,
    }
}

fn entries() -> Vec<u8> {
    let mut bytes = Vec::new();
    push_descriptor(&mut bytes, Kind::Write, Lba(5), 2, 2, (WHOLE, 0x0f));
    bytes.extend([1u8, 0, 0, 0, 2, 0, 0, 0]);
    push_descriptor(&mut bytes, Kind::Zero, Lba(1 << 35), u32::MAX, 0, (WHOLE, WHOLE));
    bytes
}

fn record() -> (RecordHeader, [u8; BLOCK_SIZE]) {
    let header = RecordHeader {
        seq: 11,
        first_lsn: Lsn(101),
        flushed: Lsn(99),
        position: 1,
        payload_blocks: 2,
        epoch: 2,
        entries_len: entries().len() as u16,
        time_ms: 0,
    };
    let mut block = [0u8; BLOCK_SIZE];
    header.encode_into(&mut block, &entries(), 77);
    (header, block)
}

fn summary(entries: Vec<u8>) -> (Summary, Vec<u8>) {
    let summary = Summary {
        seq: 11,
        first_lsn: Lsn(101),
        last_lsn: Lsn(102),
        flushed: Lsn(102),
        used_blocks: 4,
        entries,
    };
    let mut bytes = vec![0u8; blocks_for(summary.entries.len()) as usize * BLOCK_SIZE];
    summary.encode_into(&mut bytes, 77);
    (summary, bytes)
}

#[test]
fn structures_read_back_as_written() {
    assert_eq!(Superblock::decode(&superblock().encode()), Ok(superblock()));
    assert_eq!(VdiSlot::decode(&slot().encode(), 3), Ok(slot()));
    let kept = slot().next_quarantined();
    assert_eq!((kept.sequence, &kept.vdi, &kept.quarantined), (10, &None, &slot().vdi));
    assert_eq!(VdiSlot::decode(&kept.encode(), 3), Ok(kept));
    let mut block = [0u8; BLOCK_SIZE];
    segment_header().encode_into(&mut block);
    assert_eq!(SegmentHeader::decode(&block, CACHE, SegmentId(17)), Ok(segment_header()));
    let (header, block) = record();
    assert_eq!(RecordHeader::decode(&block, 11, 77, 1), Ok((header, &entries()[..])));
    let decoded: Vec<_> = Entries::new(&entries(), 512)
        .map(Result::unwrap)
        .map(|e| (e.kind, e.lba, e.blocks))
        .collect();
    assert_eq!(decoded, [(Kind::Write, Lba(5), 2), (Kind::Zero, Lba(1 << 35), u32::MAX)]);
    for len in [0, 16, 4000, 9000] {
        let (expected, bytes) = summary(vec![7; len]);
        assert_eq!(Summary::decode(&bytes, 11, 77), Ok(expected));
    }
}

#[test]
fn bytes_on_the_device_do_not_change_unnoticed() {
    let mut header = [0u8; BLOCK_SIZE];
    segment_header().encode_into(&mut header);
    let golden = [
        crc32c(&superblock().encode()),
        crc32c(&slot().encode()),
        crc32c(&header),
        crc32c(&record().1),
        crc32c(&summary(entries()).1),
    ];
    // A difference here is a change of the format: raise the version and keep reading the former one.
    assert_eq!(golden, GOLDEN, "{golden:#010x?}");
}

#[test]
fn snapshots_stand_between_other_entries() {
    let label = |text: &str| SnapshotLabel::new(text).unwrap();
    let mut bytes = entries();
    let longest = "é".repeat(32);
    let all = [(0, ""), (1_700_000_000_123, "nightly"), (u64::MAX, "eins"), (7, &longest)];
    for (time_ms, text) in all {
        push_snapshot(&mut bytes, time_ms, &label(text));
    }
    bytes.extend(entries());
    let decoded: Vec<_> = Entries::new(&bytes, 512).map(Result::unwrap).collect();
    assert_eq!(decoded.len(), 8);
    for ((time_ms, text), entry) in all.iter().zip(&decoded[2..6]) {
        assert_eq!((entry.kind, entry.lsns(), entry.payload_blocks()), (Kind::Snapshot, 1, 0));
        assert_eq!((entry.time_ms(), entry.label()), ((*time_ms).min((1 << 48) - 1), label(text)));
    }
    assert_eq!(crc32c(&bytes), GOLDEN_SNAPSHOTS, "{:#010x}", crc32c(&bytes));
}

#[test]
fn snapshots_with_unsound_labels_are_refused() {
    let mut good = Vec::new();
    push_snapshot(&mut good, 7, &SnapshotLabel::new("nightly").unwrap());
    let decode = |bytes: &[u8]| Entries::new(bytes, 512).next().expect("one").map(drop);
    assert_eq!(decode(&good), Ok(()));
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        decode(&bytes)
    };
    for (at, byte, why) in [
        (16, b'\n', "a control character"),
        (16, 0xff, "not UTF-8"),
        (23, 1, "padding"),
        (12, 6, "a letter in the padding"),
        (12, 9, "cut off"),
        (13, 1, "longer than labels are"),
        (7, 1, "sectors"),
        (8, 2, "blocks"),
        (15, 1, "reserved"),
    ] {
        assert!(with(at, byte).is_err(), "{why}");
    }
    assert!(decode(&good[..20]).is_err());
    let mut long = Vec::new();
    push_descriptor(&mut long, Kind::Snapshot, Lba(7), 1, 65, (WHOLE, WHOLE));
    long.extend([b'x'; 68]);
    assert!(decode(&long).is_err(), "65 bytes");
}

#[test]
fn a_structure_elsewhere_or_under_another_key_is_not_accepted() {
    let (_, block) = record();
    assert!(matches!(RecordHeader::decode(&block, 11, 78, 1), Err(FormatError::Checksum { .. })));
    assert!(matches!(RecordHeader::decode(&block, 12, 77, 1), Err(FormatError::Invalid { .. })));
    assert!(matches!(RecordHeader::decode(&block, 11, 77, 2), Err(FormatError::Invalid { .. })));
    assert!(VdiSlot::decode(&slot().encode(), 4).is_err());
    let mut block = [0u8; BLOCK_SIZE];
    segment_header().encode_into(&mut block);
    assert!(SegmentHeader::decode(&block, CACHE, SegmentId(18)).is_err());
    assert!(SegmentHeader::decode(&block, Uuid::nil(), SegmentId(17)).is_err());
    let (_, bytes) = summary(entries());
    assert!(Summary::decode(&bytes, 12, 77).is_err());
    assert!(Summary::decode(&bytes, 11, 78).is_err());
}

#[test]
fn numbers_that_no_log_holds_are_refused_though_the_checksum_is_right() {
    let decode = |kind, lba, blocks, payload| {
        let mut bytes = Vec::new();
        push_descriptor(&mut bytes, kind, Lba(lba), blocks, payload, (WHOLE, WHOLE));
        bytes.resize(bytes.len() + 4, 0);
        Entries::new(&bytes, 256).next().expect("one").map(|entry| entry.lba)
    };
    let end = 1 << 36;
    assert_eq!(decode(Kind::Write, end - 1, 1, 255), Ok(Lba(end - 1)));
    assert!(decode(Kind::Write, end, 1, 1).is_err(), "beyond every disk");
    assert!(decode(Kind::Zero, end - 1, 2, 0).is_err(), "ends beyond every disk");
    assert!(decode(Kind::Zero, (1 << 48) - 1, u32::MAX, 0).is_err());
    assert!(decode(Kind::Write, 0, 1, 256).is_err(), "beyond the segment");
    assert!(decode(Kind::Write, 0, u32::MAX, 1).is_err(), "the sum does not wrap");
    for (first_lsn, good) in [(0, false), (1, true), (1 << 63, true), (u64::MAX, false)] {
        let mut block = [0u8; BLOCK_SIZE];
        SegmentHeader { first_lsn: Lsn(first_lsn), ..segment_header() }.encode_into(&mut block);
        let decoded = SegmentHeader::decode(&block, CACHE, SegmentId(17));
        assert_eq!(decoded.is_ok(), good, "first LSN {first_lsn}");
    }
}

#[test]
fn a_superblock_names_its_machine_and_zero_is_none() {
    let of = |name: &str| {
        let machine = Some(Machine { id: Uuid::from_u128(11), name: name.into() });
        Superblock::decode(&Superblock { machine, ..superblock() }.encode()).unwrap().machine
    };
    assert_eq!(
        of("bell").map(|machine| (machine.id.as_u128(), machine.name)),
        Some((11, "bell".into()))
    );
    assert_eq!(
        of(&"ü".repeat(40)).map(|machine| machine.name),
        Some("ü".repeat(32)),
        "cut at a character"
    );
    assert_eq!(Superblock::decode(&superblock().encode()).unwrap().machine, None);
}

#[test]
fn a_superblock_says_which_legs_hold_everything() {
    let legs = vec![Uuid::from_u128(3), Uuid::from_u128(4)];
    let both = Membership { id: Uuid::from_u128(5), ..Membership::new(legs) };
    let of = |leg: u128, membership: &Membership| Superblock {
        leg: Uuid::from_u128(leg),
        membership: membership.clone(),
        ..superblock()
    };
    let alone = both.without(LegSet::FIRST).unwrap();
    assert_eq!((alone.events, alone.members), (1, LegSet::NONE.with(1)));
    assert_ne!(alone.id, both.id);
    assert!(alone.without(LegSet::NONE.with(1)).is_none(), "one leg must be left");
    for good in [of(3, &both), of(4, &both), of(4, &alone)] {
        assert_eq!(Superblock::decode(&good.encode()), Ok(good));
    }
    assert_eq!(crc32c(&of(4, &both).encode()), GOLDEN_MIRRORED);
    // A leg that is no member never says so; one that is not in its own list is none of the cache's.
    let twice = Membership { legs: vec![Uuid::from_u128(3); 2], ..both.clone() };
    let nobody = Membership { members: LegSet::NONE, ..both.clone() };
    for bad in [of(3, &alone), of(9, &both), of(3, &twice), of(3, &nobody)] {
        assert!(Superblock::decode(&bad.encode()).is_err(), "{bad:?}");
    }
}

#[test]
fn geometries_fit_their_device() {
    assert!(Geometry::for_size((16 << 20) - 1).is_none());
    for size in [16 << 20, 17 << 20, 1 << 30, 2 << 30, 16 << 30, 1 << 40, 12 << 40] {
        let geometry = Geometry::for_size(size).unwrap();
        assert!(geometry.is_sound(), "{geometry:?}");
        assert!(geometry.slots <= geometry.segments, "{geometry:?}");
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..3 * BLOCK_SIZE)) {
        let _ = Superblock::decode(&bytes);
        let _ = VdiSlot::decode(&bytes, 0);
        let _ = SegmentHeader::decode(&bytes, CACHE, SegmentId(0));
        let _ = RecordHeader::decode(&bytes, 0, 0, 0);
        let _ = Summary::decode(&bytes, 0, 0);
        for entry in Entries::new(&bytes, 256).flatten() {
            for n in 0..entry.payload_blocks() {
                let _ = (entry.crc(n), entry.mask(n));
            }
            let _ = (entry.label(), entry.time_ms());
        }
    }

    #[test]
    fn a_single_changed_bit_is_noticed(bit in 0..BLOCK_SIZE * 8) {
        let flip = |block: &mut [u8]| block[bit / 8] ^= 1 << (bit % 8);
        let mut block = superblock().encode();
        flip(&mut block);
        prop_assert!(Superblock::decode(&block).is_err());
        let mut block = slot().encode();
        flip(&mut block);
        prop_assert!(VdiSlot::decode(&block, 3).is_err());
        let (_, mut block) = record();
        flip(&mut block);
        prop_assert!(RecordHeader::decode(&block, 11, 77, 1).is_err());
    }
}

const GOLDEN_SNAPSHOTS: u32 = 0x79a9_f527;
const GOLDEN_MIRRORED: u32 = 0x79fe_8632;
const GOLDEN: [u32; 5] = [0x5533_f898, 0x956b_1f81, 0x8bad_76c0, 0x742c_b702, 0x0768_b9d0];

#[test]
fn cuts_stand_between_other_entries_and_unsound_ones_are_refused() {
    let rule = Cadence { behind: Behind::Batch, keep: 99_999 };
    let mut bytes = entries();
    push_cut(&mut bytes, 1_700_000_000_123, rule);
    push_cut(&mut bytes, u64::MAX, Cadence { behind: Behind::Write, keep: 1 });
    bytes.extend(entries());
    let decoded: Vec<_> = Entries::new(&bytes, 512).map(Result::unwrap).collect();
    assert_eq!(decoded.len(), 6);
    let cut = &decoded[2];
    assert_eq!((cut.kind, cut.lsns(), cut.payload_blocks()), (Kind::Cut, 0, 0));
    assert_eq!((cut.time_ms(), cut.cadence()), (1_700_000_000_123, Some(rule)));
    assert!(decoded.iter().filter(|entry| entry.cadence().is_some()).count() == 2);
    let mut good = Vec::new();
    push_cut(&mut good, 0x0102_0304_0506, rule);
    assert_eq!(good, [6, 5, 4, 3, 2, 1, 6, 0xff, 0x9f, 0x86, 1, 0, 2, 0, 0xff, 0]);
    for (at, byte) in [(7, 1), (12, 0), (12, 3), (13, 1), (14, 7), (15, 1), (10, 2), (11, 1)] {
        let mut bytes = good.clone();
        bytes[at] = byte;
        assert!(Entries::new(&bytes, 512).next().expect("one").is_err(), "{at}");
    }
}

#[test]
fn former_versions_refuse_a_slot_whose_log_may_hold_cuts() {
    let plain = slot();
    let version = |slot: &VdiSlot| slot.encode()[12];
    assert_eq!(version(&plain), 1);
    let mut with = plain.clone();
    with.vdi.as_mut().expect("a disk").has_cuts = true;
    assert_eq!(version(&with), 2);
    assert_eq!(VdiSlot::decode(&with.encode(), with.slot).unwrap(), with);
    let mut ruled = plain;
    let vdi = ruled.vdi.as_mut().expect("a disk");
    vdi.policy.chosen.schedule = "every batch keep 3".parse().expect("a schedule");
    assert_eq!(version(&ruled), 2, "there may be one before the slot is written again");
    assert!(VdiSlot::decode(&ruled.encode(), ruled.slot).unwrap().vdi.expect("a disk").has_cuts);
}
