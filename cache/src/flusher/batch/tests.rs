//! Goal: the parts of a batch, applied one after the other to the store's image, give the disk as it was at each snapshot
//! and at the end, whatever was written between; nothing at or below the committed LSN counts. Method: random entries in
//! hand-made segments against a model that keeps each image.

use super::{Asked, Draft, Source};
use crate::backing::Change;
use crate::disk::plan::SegmentId;
use crate::format::Geometry;
use crate::format::record::{Kind, WHOLE, push_cut, push_descriptor, push_snapshot};
use crate::pending::PendingSnapshot;
use blockstore::SnapshotLabel;
use blockstore::crc::crc32c;
use blockstore::schedule::{Behind, Cadence};
use blockstore::types::{BLOCK_SIZE, Lba, Lsn, SECTOR_SIZE};
use bytes::Bytes;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const BLOCKS: u64 = 7;
/// What a sector that does not count holds.
const GARBAGE: u8 = 0xee;

/// Who wrote each sector; 0 for zeros.
type Image = Vec<u8>;

#[derive(Clone, Copy, Debug)]
enum Op {
    Write {
        lba: u64,
        blocks: u32,
        masks: (u8, u8),
    },
    Zero {
        lba: u64,
        blocks: u32,
        masks: (u8, u8),
    },
    Fill {
        lba: u64,
    },
    Snapshot,
    /// Behind the operation before it, and kept beside so many newer ones less one.
    Cut {
        keep: u32,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let mask = || prop_oneof![2 => Just(WHOLE), 3 => 1..=WHOLE];
    let range = || {
        (0..BLOCKS, 1..4u32, mask(), mask()).prop_map(|(lba, blocks, first, last)| {
            let blocks = blocks.min((BLOCKS - lba) as u32);
            (lba, blocks, (first, if blocks == 1 { first } else { last }))
        })
    };
    prop_oneof![
        5 => range().prop_map(|(lba, blocks, masks)| Op::Write { lba, blocks, masks }),
        3 => range().prop_map(|(lba, blocks, masks)| Op::Zero { lba, blocks, masks }),
        1 => (0..BLOCKS).prop_map(|lba| Op::Fill { lba }),
        3 => Just(Op::Snapshot),
        4 => (1..6u32).prop_map(|keep| Op::Cut { keep }),
    ]
}

/// Sectors of the disk that an operation covers.
fn covered(lba: u64, blocks: u32, masks: (u8, u8)) -> Vec<usize> {
    let of = |n: u32| match n {
        0 => masks.0,
        n if n + 1 == blocks => masks.1,
        _ => WHOLE,
    };
    let sectors = (0..blocks).flat_map(|n| {
        (0..8).filter(move |s| of(n) & (1 << s) != 0).map(move |s| (lba as u32 + n) * 8 + s)
    });
    sectors.map(|sector| sector as usize).collect()
}

fn apply(image: &mut Image, op: Op, stamp: u8) {
    match op {
        Op::Write { lba, blocks, masks } => {
            covered(lba, blocks, masks).into_iter().for_each(|sector| image[sector] = stamp);
        }
        Op::Zero { lba, blocks, masks } => {
            covered(lba, blocks, masks).into_iter().for_each(|sector| image[sector] = 0);
        }
        Op::Fill { .. } | Op::Snapshot | Op::Cut { .. } => {}
    }
}

/// The segment that holds these operations.
fn source(id: u32, first_lsn: u64, ops: &[Op]) -> Source {
    let mut bytes = vec![0; BLOCK_SIZE];
    let mut entries = Vec::new();
    let mut lsn = first_lsn;
    for &op in ops {
        let position = (bytes.len() / BLOCK_SIZE) as u16;
        match op {
            Op::Write { lba, blocks, masks } => {
                push_descriptor(&mut entries, Kind::Write, Lba(lba), blocks, position, masks);
                let counts = covered(lba, blocks, masks);
                for block in lba as usize..lba as usize + blocks as usize {
                    let of = |s: usize| if counts.contains(&s) { lsn as u8 } else { GARBAGE };
                    let sectors = (block * 8..block * 8 + 8).map(|s| [of(s); SECTOR_SIZE]);
                    let block: Vec<u8> = sectors.flatten().collect();
                    entries.extend(crc32c(&block).to_le_bytes());
                    bytes.extend(block);
                }
            }
            Op::Zero { lba, blocks, masks } => {
                push_descriptor(&mut entries, Kind::Zero, Lba(lba), blocks, 0, masks);
            }
            Op::Fill { lba } => {
                let all = (WHOLE, WHOLE);
                push_descriptor(&mut entries, Kind::Fill, Lba(lba), 1, position, all);
                entries.extend(crc32c(&[GARBAGE; BLOCK_SIZE]).to_le_bytes());
                bytes.extend([GARBAGE; BLOCK_SIZE]);
                continue;
            }
            Op::Snapshot => push_snapshot(&mut entries, lsn * 10, &label(lsn)),
            Op::Cut { keep } => {
                let cadence = Cadence { behind: Behind::Write, keep };
                push_cut(&mut entries, (lsn - 1) * 10, cadence);
                continue;
            }
        }
        lsn += 1;
    }
    let (id, first_lsn) = (SegmentId(id), Lsn(first_lsn));
    Source { id, first_lsn, entries, bytes: bytes.into(), trusted: id.0 == 0 }
}

fn label(lsn: u64) -> SnapshotLabel {
    SnapshotLabel::new("x".repeat(lsn as usize % 6)).unwrap()
}

/// As the store would.
fn commit(image: &mut Image, changes: &[Change]) {
    let mut next = 0;
    for change in changes {
        let (lba, blocks) = match change {
            Change::Write { lba, crc, data } => {
                assert_eq!(crc32c(data), *crc);
                for (n, sector) in data.chunks_exact(SECTOR_SIZE).enumerate() {
                    assert!(sector.iter().all(|&byte| byte == sector[0] && byte != GARBAGE));
                    image[lba.0 as usize * 8 + n] = sector[0];
                }
                (lba.0, 1)
            }
            Change::Zero { lba, blocks } => {
                image[lba.0 as usize * 8..(lba.0 + blocks) as usize * 8].fill(0);
                (lba.0, *blocks)
            }
        };
        assert!(lba >= next, "changes are sorted and disjoint");
        next = lba + blocks;
    }
}

fn block(image: &Image, lba: Lba) -> Option<Bytes> {
    let sectors = &image[lba.0 as usize * 8..lba.0 as usize * 8 + 8];
    let is_hole = sectors.iter().all(|&stamp| stamp == 0);
    (!is_hole).then(|| sectors.iter().flat_map(|&stamp| [stamp; SECTOR_SIZE]).collect())
}

fn check(ops: &[Op], committed: u64, bounds: [usize; 2], asked: &BTreeSet<u64>, newer: u64) {
    let mut image = vec![0; BLOCKS as usize * 8];
    let mut images = BTreeMap::from([(0, image.clone())]);
    let (mut snapshots, mut cuts) = (Vec::new(), BTreeMap::new());
    let (mut lsn, mut first_lsns) = (0, Vec::new());
    for &op in ops {
        first_lsns.push(lsn + 1);
        if let Op::Cut { keep } = op
            && lsn > committed
        {
            // Two behind one operation are one.
            cuts.entry(lsn).or_insert(keep);
        }
        if matches!(op, Op::Fill { .. } | Op::Cut { .. }) {
            continue;
        }
        lsn += 1;
        apply(&mut image, op, lsn as u8);
        images.insert(lsn, image.clone());
        if (matches!(op, Op::Snapshot) || asked.contains(&lsn)) && lsn > committed {
            snapshots.push(lsn);
        }
    }
    first_lsns.push(lsn + 1);
    let newest_first = (newer..).zip(cuts.iter().rev());
    let kept: Vec<u64> = newest_first
        .filter(|(n, (_, keep))| *n < u64::from(**keep))
        .map(|(_, (lsn, _))| *lsn)
        .collect();
    let mut expected: BTreeSet<u64> = snapshots.iter().copied().collect();
    let made: Vec<u64> = kept.into_iter().rev().filter(|lsn| expected.insert(*lsn)).collect();
    let snapshots: Vec<u64> = expected.into_iter().collect();
    let committed = committed.min(lsn);
    let (from, to) = (bounds[0].min(bounds[1]), bounds[0].max(bounds[1]));
    let parts = [(0, from), (from, to), (to, ops.len())];
    let sources = parts.iter().enumerate();
    let sources: Vec<Source> =
        sources.map(|(n, &(a, b))| source(n as u32, first_lsns[a], &ops[a..b])).collect();
    let geometry = Geometry::for_size(16 << 20).unwrap();
    let cut = |&lsn| PendingSnapshot { lsn: Lsn(lsn), time_ms: lsn * 10, label: label(lsn) };
    let cuts: Vec<_> = asked.iter().map(cut).collect();
    let asked = Asked { cuts, newer };
    let mut draft = Draft::new(&geometry, Lsn(committed), &sources, &asked).unwrap();
    assert_eq!(draft.take_made().iter().map(|cut| cut.lsn.0).collect::<Vec<_>>(), made);
    let mut store = images[&committed].clone();
    let mut wanted = draft.wanted().to_vec();
    let bases: Vec<_> = wanted.iter().map(|lba| block(&store, *lba)).collect();
    wanted.sort_unstable();
    assert!(wanted.is_sorted_by(|a, b| a < b), "each block is read once");
    let batch = draft.finish(Lsn(lsn), &bases);
    assert_eq!(batch.cuts.iter().map(|cut| cut.lsn.0).collect::<Vec<_>>(), snapshots);
    for cut in &batch.cuts {
        commit(&mut store, &cut.changes);
        assert_eq!(store, images[&cut.lsn.0], "the disk at LSN {}", cut.lsn);
        let by_cadence = Cadence::label(Behind::Write, cut.lsn.0 * 10);
        let named = if made.contains(&cut.lsn.0) { by_cadence } else { label(cut.lsn.0) };
        assert_eq!((cut.time_ms, &cut.label), (cut.lsn.0 * 10, &named));
    }
    commit(&mut store, &batch.changes);
    assert_eq!(store, image, "the disk at the end");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn each_part_brings_the_store_to_its_snapshot(
        ops in prop::collection::vec(op(), 0..40),
        committed in 0..20u64,
        bounds in prop::array::uniform2(0..40usize),
        asked in prop::collection::btree_set(1..45u64, 0..5),
        newer in 0..4u64,
    ) {
        check(&ops, committed, bounds.map(|bound| bound.min(ops.len())), &asked, newer);
    }
}

#[test]
fn snapshots_without_writes_between_them_are_cuts_without_changes() {
    let many = 100_000;
    let mut ops = vec![Op::Write { lba: 1, blocks: 2, masks: (0x0f, WHOLE) }];
    ops.extend(vec![Op::Snapshot; many]);
    let geometry = Geometry::for_size(16 << 20).unwrap();
    let asked = Asked::default();
    let draft = Draft::new(&geometry, Lsn(0), &[source(0, 1, &ops)], &asked).unwrap();
    assert_eq!(draft.wanted(), [Lba(1)]);
    let batch = draft.finish(Lsn(many as u64 + 1), &[None]);
    assert_eq!((batch.cuts.len(), batch.changes.len()), (many, 0));
    let changed: usize = batch.cuts.iter().map(|cut| cut.changes.len()).sum();
    assert_eq!(changed, 2);
}

#[test]
fn of_a_flood_of_cuts_every_second_is_made_and_the_last() {
    let many = 2 * super::CUTS_MADE_MAX as u64 + 5;
    let ops: Vec<Op> = (0..many)
        .flat_map(|_| {
            [Op::Zero { lba: 1, blocks: 1, masks: (WHOLE, WHOLE) }, Op::Cut { keep: 100_000 }]
        })
        .collect();
    let geometry = Geometry::for_size(16 << 20).unwrap();
    let sources = [source(0, 1, &ops)];
    let mut draft = Draft::new(&geometry, Lsn(0), &sources, &Asked::default()).unwrap();
    let made: Vec<u64> = draft.take_made().iter().map(|cut| cut.lsn.0).collect();
    assert!(made.len() <= super::CUTS_MADE_MAX && made.len() >= super::CUTS_MADE_MAX / 2);
    assert_eq!(made.last(), Some(&many));
    assert!(made.windows(2).all(|pair| pair[1] - pair[0] == 3));
    let batch = draft.finish(Lsn(many), &[]);
    assert_eq!(batch.cuts.len(), made.len());
}
