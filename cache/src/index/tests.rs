//! Goal: the index agrees with a plain model under any sequence of operations, and stays within its memory.
//! Method: property tests against a map from block to newest state.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

#[derive(Clone, Debug)]
enum Op {
    Insert(u64),
    Fill(u64),
    Zero(u64, u64),
    Patch(u64, u8),
    Commit(u64),
    Hole(u64, u64),
    Evict,
}

#[derive(Clone, Debug, PartialEq)]
enum Model {
    At(Slot),
    Zero(u64),
    Hole,
    Patched { base: PatchBase, sectors: [Option<Slot>; 8], lsn: u64 },
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let lba = prop_oneof![0u64..40, 1000u64..1060, 5_000_000u64..5_000_003];
    let op = prop_oneof![
        6 => lba.clone().prop_map(Op::Insert),
        2 => lba.clone().prop_map(Op::Fill),
        2 => (lba.clone(), 1u64..3000).prop_map(|(l, n)| Op::Zero(l, n)),
        4 => (lba, 1u8..255).prop_map(|(l, m)| Op::Patch(l, m)),
        1 => (0u64..400).prop_map(Op::Commit),
        1 => (prop_oneof![0u64..40, 1000u64..1060], 1u64..3000).prop_map(|(l, n)| Op::Hole(l, n)),
        1 => Just(Op::Evict),
    ];
    prop::collection::vec(op, 1..300)
}

/// Slots per "segment" in this test.
const SEGMENT: u32 = 50;

proptest! {
    #[test]
    fn agrees_with_a_model(ops in ops()) {
        let mut index = Index::default();
        let mut model: BTreeMap<u64, Model> = BTreeMap::new();
        let (mut slot, mut lsn, mut committed, mut evicted) = (0u32, 0u64, 0u64, 0u32);
        let mut touched: Vec<u64> = Vec::new();
        // slot → lsn, to evict only what is committed
        let mut lsn_of_slot: Vec<u64> = Vec::new();
        for op in ops {
            match op {
                Op::Insert(lba) => {
                    lsn += 1;
                    index.insert(Lba(lba), slot, slot);
                    model.insert(lba, Model::At(slot));
                    lsn_of_slot.push(lsn);
                    slot += 1;
                    touched.push(lba);
                }
                Op::Fill(lba) => {
                    let kept = index.fill(Lba(lba), slot, slot);
                    prop_assert_eq!(kept, !model.contains_key(&lba));
                    if kept { model.insert(lba, Model::At(slot)); }
                    lsn_of_slot.push(lsn);
                    slot += 1;
                    touched.push(lba);
                }
                Op::Zero(lba, blocks) => {
                    lsn += 1;
                    index.zero(Lba(lba), blocks, Lsn(lsn));
                    // The model keeps only blocks that are ever asked for.
                    for l in (lba..lba + blocks).filter(|l| *l < 1100 || *l > 4_999_990) {
                        model.insert(l, Model::Zero(lsn));
                    }
                }
                Op::Patch(lba, sectors) => {
                    lsn += 1;
                    let patch = Patch { source: PatchSource::At { slot, crc: slot }, sectors };
                    index.patch(Lba(lba), Lsn(lsn), patch);
                    let (base, mut by_sector) = match model.get(&lba) {
                        None => (PatchBase::Store, [None; 8]),
                        Some(Model::At(s)) => (PatchBase::At { slot: *s, crc: *s }, [None; 8]),
                        Some(Model::Zero(_) | Model::Hole) => (PatchBase::Zero, [None; 8]),
                        Some(Model::Patched { base, sectors, .. }) => (*base, *sectors),
                    };
                    for (n, place) in by_sector.iter_mut().enumerate() {
                        if sectors & (1 << n) != 0 { *place = Some(slot); }
                    }
                    model.insert(lba, Model::Patched { base, sectors: by_sector, lsn });
                    lsn_of_slot.push(lsn);
                    slot += 1;
                    touched.push(lba);
                }
                Op::Commit(to) => {
                    committed = committed.max(to.min(lsn));
                    index.committed(Lsn(committed));
                    model.retain(|_, m| match m {
                        Model::Patched { lsn, .. } => *lsn > committed,
                        Model::At(_) | Model::Zero(_) | Model::Hole => true,
                    });
                    for m in model.values_mut() {
                        if matches!(m, Model::Zero(at) if *at <= committed) { *m = Model::Hole; }
                    }
                }
                Op::Hole(lba, blocks) => {
                    index.hole(Lba(lba), blocks);
                    for l in (lba..lba + blocks).filter(|l| *l < 1100) {
                        model.entry(l).or_insert(Model::Hole);
                    }
                }
                Op::Evict => {
                    // First in, first out, and only what is committed as a whole.
                    let range = evicted * SEGMENT..(evicted + 1) * SEGMENT;
                    if range.end > slot || lsn_of_slot[range.end as usize - 1] > committed { continue; }
                    evicted += 1;
                    for lba in &touched { index.evict(Lba(*lba), &range); }
                    model.retain(|_, m| match m {
                        Model::At(s) => !range.contains(s),
                        Model::Zero(_) | Model::Hole => true,
                        Model::Patched { base, sectors, .. } => {
                            if matches!(base, PatchBase::At { slot, .. } if range.contains(slot)) { *base = PatchBase::Store; }
                            for place in sectors.iter_mut() {
                                if place.is_some_and(|s| range.contains(&s)) { *place = None; *base = PatchBase::Store; }
                            }
                            *base != PatchBase::Store || sectors.iter().any(Option::is_some)
                        }
                    });
                }
            }
            for lba in (0..45).chain(1000..1065).chain(4_999_999..5_000_004) {
                let found = index.get(Lba(lba));
                let known = index.absent(Lba(lba), 1).is_empty();
                prop_assert_eq!(known, found != Found::Absent);
                match (model.get(&lba), found) {
                    (None, Found::Absent) | (Some(Model::Zero(_) | Model::Hole), Found::Zero) => {}
                    (Some(Model::At(s)), Found::At { slot, crc }) => prop_assert!(slot == *s && crc == *s),
                    (Some(Model::Patched { base, sectors, .. }), Found::Patched(p)) => {
                        prop_assert_eq!(p.base(), *base);
                        let mut seen = [None; 8];
                        for patch in p.patches() {
                            for (n, place) in seen.iter_mut().enumerate() {
                                if patch.sectors & (1 << n) != 0 {
                                    let PatchSource::At { slot, .. } = patch.source else { panic!() };
                                    *place = Some(slot);
                                }
                            }
                        }
                        prop_assert_eq!(seen, *sectors);
                    }
                    (m, f) => prop_assert!(false, "block {}: model {:?}, index {:?}", lba, m, f),
                }
            }
        }
    }
}

#[test]
fn a_gibibyte_of_random_blocks_takes_less_than_three_mebibytes() {
    // Disks of 1 to 64 GiB of which one GiB is held, in random places.
    for (disk_gib, most) in [(1u64, 12.0), (2, 12.0), (4, 12.0), (16, 12.0), (64, 14.0)] {
        let mut index = Index::default();
        let blocks = disk_gib << 18;
        let mut lba = 12345u64;
        for slot in 0..1u32 << 18 {
            // An odd multiplier walks through all blocks of a power of two in scattered order.
            lba =
                lba.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407)
                    % blocks;
            index.insert(Lba(lba), slot, slot);
        }
        let per_block = index.memory() as f64 / index.len() as f64;
        assert!(per_block <= most, "{disk_gib} GiB disk: {per_block:.1} bytes per block");
    }
}
