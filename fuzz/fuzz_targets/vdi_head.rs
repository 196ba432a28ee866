//! Records of the shared store: VDI head and name block, superblock, hosts, extents, garbage collector, bitmap pages.
//!
//! The first byte chooses the record, and whether the rest is its bytes or patches to a valid one; of the latter the
//! checksum is right. What decodes must survive encoding, and keep what the rest of the program takes for granted.

#![no_main]

use ballast_fuzz::{Script, put_crc};
use blockstore::crc::crc32c;
use blockstore::format::bitmap::{BitmapKind, BitmapPage, PAGE_BITS};
use blockstore::format::extent::{ExtentHeader, ExtentRecord, ExtentType};
use blockstore::format::gc::{GcPhase, GcRecord};
use blockstore::format::geometry::Geometry;
use blockstore::format::head::{HEAD_SIZE, Head, Record};
use blockstore::format::host::{HostRecord, HostState};
use blockstore::format::meta::VdiMeta;
use blockstore::format::node::tree_span;
use blockstore::format::pointer::Pointer;
use blockstore::format::superblock::Superblock;
use blockstore::format::vdi::{Owner, SnapshotIndex, VdiHead, VdiState};
use blockstore::types::{Birth, Gba, Generation, Lsn};
use libfuzzer_sys::fuzz_target;
use uuid::Uuid;

const STORE: Uuid = Uuid::from_u128(0x5701e);
const SOMEBODY: Uuid = Uuid::from_u128(7);
const ADDRESS: Gba = Gba(33);
/// Where a head has its checksum.
const HEAD_CRC: usize = HEAD_SIZE - 4;
/// Where a bitmap page has its checksum, which covers all but itself.
const PAGE_CRC: usize = 92;

fn superblock() -> Superblock {
    Superblock {
        format_version: 1,
        single_host: true,
        features_incompatible: 0,
        features_compatible: 0,
        created_ms: 1,
        // Room for any number of extents: what limits them is the table.
        device_size: 1 << 60,
        geometry: Geometry::plan(65 << 20, 1 << 20).expect("fits"),
        label: "lab".into(),
    }
}

fn vdi() -> VdiHead {
    let pointer = |gba| Pointer { gba: Gba(gba), read_only: false, birth: Birth(3), crc: 9 };
    VdiHead {
        uuid: Uuid::from_u128(0x55),
        state: VdiState::Active,
        owner: Some(Owner { host: SOMEBODY, generation: Generation(9) }),
        attachment: Generation(2),
        attached_ms: 0x77,
        root: pointer(300),
        height: 2,
        size_bytes: 16 << 20,
        committed: Lsn(0x1234),
        log_id: Some(Uuid::from_u128(0x66)),
        birth: Birth(3),
        last_snapshot_birth: Birth(1),
        snapshots: SnapshotIndex::default(),
        origin: None,
        meta: pointer(301),
        created_ms: 0x88,
        committed_ms: 0x99,
        last_log: None,
    }
}

fn host() -> HostRecord {
    HostRecord {
        uuid: SOMEBODY,
        state: HostState::Up,
        generation: Generation(9),
        up_since_ms: 10,
        heartbeat_ms: 11,
        gc_epoch_acknowledged: 4,
        name: "host".into(),
        address: "10.0.0.1".into(),
    }
}

fn extent() -> ExtentRecord {
    let owner_generation = Generation(9);
    let owner = Some(SOMEBODY);
    ExtentRecord { kind: ExtentType::Data, ready: true, owner, owner_generation, sweep_epoch: 3 }
}

fn extent_header() -> ExtentHeader {
    let kind = ExtentType::Metadata;
    ExtentHeader { extent: 3, kind, extent_blocks: 256, first_block: 3, bmap_pages: 1 }
}

fn gc() -> GcRecord {
    GcRecord { phase: GcPhase::Mark, leader: Some(SOMEBODY), ..GcRecord::initial() }
}

/// A record from the script; what is returned has been decoded.
fn record<T: Record>(script: &mut Script<'_>, raw: bool, valid: T) -> Option<T> {
    let head = if raw {
        Head::<T>::decode(script.rest(), ADDRESS).ok()?
    } else {
        let mut bytes = Head { store: STORE, sequence: 8, record: valid }.encode(ADDRESS);
        script.patch_all(&mut bytes);
        put_crc(&mut bytes, HEAD_CRC, |all| crc32c(&all[..HEAD_CRC]));
        Head::<T>::decode(&bytes, ADDRESS).ok()?
    };
    let again = Head::<T>::decode(&head.encode_block(ADDRESS), ADDRESS);
    assert_eq!(again.as_ref(), Ok(&head));
    Some(head.record)
}

fn check_geometry(superblock: &Superblock) {
    let g = &superblock.geometry;
    let last = g.extent_count - 1;
    assert!(g.size_bytes() <= superblock.device_size);
    assert!(g.gc_start >= 1 && g.gc_start + 2 <= g.host_slot(0).0);
    assert!(g.host_slot(g.host_slots - 1).0 + 2 <= g.vdi_slot(0).0);
    assert!(g.vdi_slot(g.vdi_slots - 1).0 + 2 <= g.extent_slot(0).0);
    assert!(g.extent_slot(last) < g.superblocks()[1]);
    assert!(g.extent_overhead() < g.extent_blocks);
    assert_eq!(g.extent_of(g.extent_base(last)), last);
    let pages = g.bmap_pages();
    assert_eq!((0..pages).map(|page| g.page_bits(page)).sum::<u64>(), g.extent_blocks);
    assert!(!g.is_allocatable(g.reclaim_page(last, pages - 1)));
    assert!(g.is_allocatable(g.extent_base(last).plus(g.extent_blocks - 1)));
    assert!(!g.is_allocatable(Gba(g.total_blocks())) && !g.is_allocatable(Gba(0)));
}

fn page(script: &mut Script<'_>, raw: bool, kind: BitmapKind) {
    let limit = script.number(2);
    let decoded = if raw {
        BitmapPage::decode(script.rest(), kind, STORE, ADDRESS)
    } else {
        let mut bytes = BitmapPage::clear().with_sequence(1).encode(kind, STORE, ADDRESS);
        script.patch_all(&mut bytes);
        put_crc(&mut bytes, PAGE_CRC, |all| {
            crc32c(&[&all[..PAGE_CRC], &all[PAGE_CRC + 4..]].concat())
        });
        BitmapPage::decode(&bytes, kind, STORE, ADDRESS)
    };
    let Ok(page) = decoded else { return };
    let again = BitmapPage::decode(&page.encode(kind, STORE, ADDRESS), kind, STORE, ADDRESS);
    assert_eq!(again.as_ref(), Ok(&page));
    let (mut from, mut clear) = (0, 0);
    while let Some((first, len)) = page.next_clear_run(from, limit) {
        assert!(first >= from && len > 0 && first + len <= limit.min(PAGE_BITS));
        assert!(!page.get(first) && !page.get(first + len - 1));
        clear += len;
        from = first + len;
    }
    assert_eq!(clear, page.clear_bits(limit));
    assert!(page.get(PAGE_BITS));
}

fn name_block(script: &mut Script<'_>, raw: bool) {
    let uuid = SOMEBODY;
    let decoded = if raw {
        VdiMeta::decode(script.rest())
    } else {
        let meta =
            VdiMeta { uuid, name: "Диск".into(), policy: Default::default(), created_ms: 9 };
        let mut bytes = meta.encode();
        script.patch_all(&mut bytes);
        VdiMeta::decode(&bytes)
    };
    let Ok(meta) = decoded else { return };
    assert_eq!(VdiMeta::decode(&meta.encode()), Ok(meta));
}

fuzz_target!(|input: &[u8]| {
    let mut script = Script::new(input);
    let choice = script.byte();
    let raw = choice & 0x80 != 0;
    let script = &mut script;
    match choice & 0x7f {
        0 => {
            if let Some(head) = record(script, raw, vdi()) {
                assert!(head.size_bytes > 0 && head.blocks() <= tree_span(head.height));
                assert!(head.last_snapshot_birth <= head.birth);
            }
        }
        1 => {
            if let Some(superblock) = record(script, raw, superblock()) {
                check_geometry(&superblock);
            }
        }
        2 => drop(record(script, raw, host())),
        3 => drop(record(script, raw, extent())),
        4 => drop(record(script, raw, extent_header())),
        5 => drop(record(script, raw, gc())),
        6 => page(script, raw, BitmapKind::Allocation),
        7 => page(script, raw, BitmapKind::Reclaim),
        _ => name_block(script, raw),
    }
});
