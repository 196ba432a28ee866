use super::*;
use crate::format::geometry::EXTENT_SIZE_MIN;
use crate::types::{Birth, Generation};
use proptest::prelude::*;

const STORE: Uuid = Uuid::from_u128(0x5701e);

fn geometry() -> Geometry {
    Geometry::plan(8 << 20, EXTENT_SIZE_MIN).expect("fits")
}

fn at(block: &[u8], address: Gba, pointed: Option<(Role, Pointer)>) -> Described {
    let g = geometry();
    describe(block, address, Surroundings { store: STORE, geometry: &g }, pointed, None)
}

fn has(described: &Described, name: &str, value: &str) {
    let found = described.fields.iter().any(|(n, v)| *n == name && v == value);
    assert!(found, "{name}: {value} is not in {described:#?}");
}

#[test]
fn records_say_what_they_are_and_whether_they_are_whole() {
    let g = geometry();
    let record = ExtentRecord {
        kind: ExtentType::Data,
        ready: true,
        owner: Some(Uuid::from_u128(7)),
        owner_generation: Generation(9),
        sweep_epoch: 3,
    };
    let address = g.extent_slot(2);
    let mut block =
        Head { store: STORE, sequence: 8, record: record.clone() }.encode_block(address);
    let good = at(&block, address, None);
    assert_eq!((good.holds.as_str(), &good.verdict), ("an extent's record", &Verdict::Good));
    assert_eq!(good.lies_in, "the extent catalogue, record of extent 2");
    has(&good, "sequence", "8");
    has(&good, "type", "data");
    has(&good, "owner's generation", "9");
    // Of another store, at another place, and rotten.
    let foreign = Head { store: Uuid::from_u128(1), sequence: 8, record }.encode_block(address);
    let foreign = at(&foreign, address, None);
    assert!(foreign.is_damaged(), "{foreign:#?}");
    has(&foreign, "type", "data");
    assert!(at(&block, g.extent_slot(3), None).is_damaged());
    assert!(at(&block, g.host_slot(0), None).is_damaged());
    block[100] ^= 1;
    let rotten = at(&block, address, None);
    assert!(rotten.is_damaged() && !rotten.hex.is_empty(), "{rotten:#?}");
    assert_eq!(at(&[0; BLOCK_SIZE], address, None).verdict, Verdict::Unused);
}

#[test]
fn nodes_are_judged_by_who_points_at_them() {
    let g = geometry();
    let address = g.extent_base(2).plus(9);
    let mut node = Node::empty();
    let child =
        Pointer { gba: g.extent_base(3).plus(5), read_only: false, birth: Birth(4), crc: 1 };
    node.set(17, child);
    let pointer = Pointer { gba: address, read_only: false, birth: Birth(4), crc: node.crc() };
    let good = at(node.bytes(), address, Some((Role::Node(1), pointer)));
    assert_eq!(good.verdict, Verdict::Good);
    assert_eq!(good.entries.len(), 1);
    assert_eq!(good.entries[0].place, 17);
    assert!(good.entries[0].is.contains("birth 4"), "{good:#?}");
    let wrong = Pointer { crc: 0, ..pointer };
    assert!(at(node.bytes(), address, Some((Role::Node(1), wrong))).is_damaged());
    let alone = at(node.bytes(), address, None);
    assert_eq!(alone.verdict, Verdict::Unknown);
    assert!(alone.holds.contains("by its looks a node"), "{alone:#?}");
}

proptest! {
    /// Whatever stands on the device, wherever, and whoever is said to point at it.
    #[test]
    fn garbage_is_described_without_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..4200),
        address in prop_oneof![0u64..2200, any::<u64>()],
        role in 0..6u8,
        magic in any::<bool>(),
    ) {
        let mut bytes = bytes;
        if magic && bytes.len() > 8 {
            bytes[..8].copy_from_slice(&crate::format::head::MAGIC);
        }
        let pointer = Pointer { gba: Gba(address), read_only: false, birth: Birth(1), crc: 2 };
        let role = match role {
            0 => Some(Role::Name),
            1 => Some(Role::Node(1)),
            2 => Some(Role::SnapshotNode(2)),
            3 => Some(Role::SnapshotLeaf),
            4 => Some(Role::Data),
            _ => None,
        };
        let described = at(&bytes, Gba(address), role.map(|role| (role, pointer)));
        prop_assert!(!described.holds.is_empty());
        let _ = describe_alone(&bytes, Gba(address));
    }
}
