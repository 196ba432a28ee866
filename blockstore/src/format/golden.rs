//! Goal: a change of the format is loud; garbage never panics. Method: fixed values against fixed
//! bytes; every flipped bit of a head; random bytes.
//!
//! If a test here fails, stores in the field can't be read any more: raise the version and keep
//! reading the old form, or take the change back.

use crate::crc::crc32c;
use crate::format::bitmap::{BitmapKind, BitmapPage};
use crate::format::extent::{ExtentHeader, ExtentRecord, ExtentType};
use crate::format::gc::{GcPhase, GcRecord};
use crate::format::geometry::Geometry;
use crate::format::head::{BODY_SIZE, Damage, Head, Record};
use crate::format::host::{HostRecord, HostState};
use crate::format::meta::VdiMeta;
use crate::format::pointer::Pointer;
use crate::format::superblock::Superblock;
use crate::format::vdi::{Owner, SnapshotIndex, VdiHead, VdiState};
use crate::policy::{Policy, WhenOffline};
use crate::types::{Birth, Gba, Generation, Lsn};
use proptest::prelude::*;
use uuid::Uuid;

const STORE: Uuid = Uuid::from_u128(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10);

fn superblock() -> Superblock {
    Superblock {
        format_version: 1,
        single_host: true,
        features_incompatible: 0,
        features_compatible: 0x11,
        created_ms: 0x0123_4567_89ab,
        device_size: 65 << 20,
        geometry: Geometry::plan(65 << 20, 1 << 20).expect("fits"),
        label: "lab".into(),
    }
}

fn gc() -> GcRecord {
    GcRecord {
        epoch: 5,
        phase: GcPhase::Mark,
        leader: Some(Uuid::from_u128(7)),
        leader_generation: Generation(9),
        progress_ms: 11,
    }
}

fn host() -> HostRecord {
    HostRecord {
        uuid: Uuid::from_u128(7),
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
    ExtentRecord {
        kind: ExtentType::Data,
        ready: true,
        owner: Some(Uuid::from_u128(7)),
        owner_generation: Generation(9),
        sweep_epoch: 3,
    }
}

fn extent_header() -> ExtentHeader {
    ExtentHeader {
        extent: 3,
        kind: ExtentType::Metadata,
        extent_blocks: 256,
        first_block: 3,
        bmap_pages: 1,
    }
}

fn pointer(gba: u64) -> Pointer {
    Pointer { gba: Gba(gba), read_only: false, birth: Birth(3), crc: 0xdead_beef }
}

fn vdi() -> VdiHead {
    VdiHead {
        uuid: Uuid::from_u128(0x55),
        state: VdiState::Active,
        owner: Some(Owner { host: Uuid::from_u128(7), generation: Generation(9) }),
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
        last_log: Some(Uuid::from_u128(0xaa)),
    }
}

fn encode<T: Record>(record: &T) -> [u8; 512] {
    Head { store: STORE, sequence: 0x0807, record: record.clone() }.encode(Gba(0x21))
}

#[test]
fn the_common_part_of_a_head() {
    let bytes = encode(&gc());
    assert_eq!(&bytes[..8], b"BALLAST\x01");
    assert_eq!(bytes[8..16], [1, 0, 2, 0, 0, 0, 0, 0], "version, kind, reserved");
    assert_eq!(bytes[16..24], [0x21, 0, 0, 0, 0, 0, 0, 0], "address");
    assert_eq!(bytes[24..32], [7, 8, 0, 0, 0, 0, 0, 0], "sequence");
    assert_eq!(&bytes[32..48], STORE.as_bytes());
    assert_eq!(bytes[508..], crc32c(&bytes[..508]).to_le_bytes());
}

#[test]
fn fields_of_a_vdi_head_lie_where_the_document_says() {
    let bytes = encode(&vdi());
    let body = &bytes[48..508];
    let word = |offset: usize| u64::from_le_bytes(body[offset..offset + 8].try_into().expect("8"));
    assert_eq!(body[15], 0x55, "uuid");
    assert_eq!(body[16..24], [2, 0, 0, 0, 2, 0, 0, 0], "state, height");
    assert_eq!(body[39], 7, "owner");
    let words = [40, 48, 56, 64, 72, 96, 104, 160, 168].map(word);
    assert_eq!(words, [9, 2, 0x77, 16 << 20, 0x1234, 3, 1, 0x88, 0x99]);
    assert_eq!(body[95], 0x66, "log id");
    assert_eq!(body[191], 0xaa, "last log");
    assert_eq!(&body[112..128], &pointer(300).encode(), "root");
    assert_eq!(&body[128..144], &[0; 16], "snapshot log");
    assert_eq!(&body[144..160], &pointer(301).encode(), "name block");
    assert!(body[192..].iter().all(|&b| b == 0));
}

/// One checksum per structure stands for all its bytes. (Of a head, those before its own checksum: a
/// CRC over data and its CRC is a constant.)
#[test]
fn golden_checksums() {
    let mut page = BitmapPage::clear().with_sequence(6);
    page.gc_epoch = 1;
    page.extent_sequence = 2;
    page.owner_generation = 3;
    page.set(35, true);
    let meta = VdiMeta {
        uuid: Uuid::from_u128(0x55),
        name: "Диск".into(),
        policy: Policy::default(),
        created_ms: 9,
    };
    let found = [
        ("superblock", crc32c(&encode(&superblock())[..508])),
        ("gc", crc32c(&encode(&gc())[..508])),
        ("host", crc32c(&encode(&host())[..508])),
        ("extent", crc32c(&encode(&extent())[..508])),
        ("extent header", crc32c(&encode(&extent_header())[..508])),
        ("vdi", crc32c(&encode(&vdi())[..508])),
        ("bmap", crc32c(&page.encode(BitmapKind::Allocation, STORE, Gba(0x21)))),
        ("reclaim", crc32c(&page.encode(BitmapKind::Reclaim, STORE, Gba(0x21)))),
        ("name block", crc32c(&meta.encode())),
    ];
    let golden = GOLDEN;
    assert_eq!(found, golden, "{found:#x?}");
    assert_eq!(VdiMeta::decode(&meta.encode()), Ok(meta.clone()));
    let schedule = "every 10s keep 6, every 1h keep 24".parse().expect("a schedule");
    let policy = Policy { when_offline: WhenOffline::FailAfter(1500), schedule };
    let chosen = VdiMeta { policy, ..meta };
    let bytes = chosen.encode();
    let word = |offset: usize| u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("8"));
    assert_eq!(bytes[12..16], 1500u32.to_le_bytes());
    assert_eq!([word(296), word(304)], [10_000 << 24 | 6, 3_600_000 << 24 | 24]);
    assert!(bytes[312..].iter().all(|&b| b == 0));
    assert_eq!(VdiMeta::decode(&bytes), Ok(chosen));
}

fn survives<T: Record>(record: T) {
    let bytes = encode(&record);
    let decoded: Head<T> = Head::decode(&bytes, Gba(0x21)).expect("decodes");
    assert_eq!(decoded.record, record);
    assert_eq!(decoded.sequence, 0x0807);
    assert!(decoded.clone().of_store(STORE).is_ok());
    assert!(matches!(decoded.of_store(Uuid::nil()), Err(Damage::Store(_))));
    assert_eq!(Head::<T>::decode(&bytes, Gba(0x22)), Err(Damage::Address(0x21)));
    assert_eq!(Head::<T>::decode(&bytes[..511], Gba(0x21)), Err(Damage::Short));
    for byte in 0..512 {
        let mut bad = bytes;
        bad[byte] ^= 1 << (byte % 8);
        assert!(Head::<T>::decode(&bad, Gba(0x21)).is_err(), "flipped bit in byte {byte}");
    }
}

#[test]
fn records_survive_and_any_flipped_bit_is_noticed() {
    survives(superblock());
    survives(gc());
    survives(host());
    survives(extent());
    survives(extent_header());
    survives(vdi());
    assert!(Head::<GcRecord>::decode(&encode(&vdi()), Gba(0x21)).is_err());
}

/// Rewrites bytes of an encoded head and puts the checksum right.
fn forge(mut bytes: [u8; 512], offset: usize, value: &[u8]) -> [u8; 512] {
    bytes[offset..offset + value.len()].copy_from_slice(value);
    let crc = crc32c(&bytes[..508]);
    bytes[508..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn newer_versions_are_told_from_damage() {
    // A disk's head has version 2 once there are snapshots; all other records have 1.
    let newer = forge(encode(&vdi()), 8, &[3]);
    assert_eq!(Head::<VdiHead>::decode(&newer, Gba(0x21)), Err(Damage::Newer(3)));
    let newer = forge(encode(&host()), 8, &[2]);
    assert_eq!(Head::<HostRecord>::decode(&newer, Gba(0x21)), Err(Damage::Newer(2)));
    let newer = forge(encode(&superblock()), 48, &[2, 0]);
    assert_eq!(Head::<Superblock>::decode(&newer, Gba(0x21)), Err(Damage::Newer(2)));
    let feature = forge(encode(&superblock()), 48 + 8, &[1]);
    assert_eq!(Head::<Superblock>::decode(&feature, Gba(0x21)), Err(Damage::Newer(1)));
}

#[test]
fn impossible_values_are_refused_though_the_checksum_is_right() {
    for (offset, value, field) in [
        (48 + 16, &[9u8][..], "state"),
        (48 + 20, &[6], "height"),
        (48 + 20, &[1], "size"),
        (48 + 64, &[1], "size"),
        (48 + 64, &[0xff; 8], "size"),
        (48 + 104, &[4], "birth"),
        (48 + 72, &[0xff; 8], "committed_lsn"),
        (48 + 112 + 5, &[0x20], "pointer flags"),
    ] {
        let bytes = forge(encode(&vdi()), offset, value);
        assert_eq!(Head::<VdiHead>::decode(&bytes, Gba(0x21)), Err(Damage::Field(field)));
    }
}

proptest! {
    /// A valid checksum over random bodies: the hardest garbage there is.
    #[test]
    fn random_bodies_never_panic(body in prop::collection::vec(any::<u8>(), BODY_SIZE)) {
        let body: &[u8; BODY_SIZE] = body.as_slice().try_into().expect("size");
        let _ = Superblock::decode_body(body);
        let _ = GcRecord::decode_body(body);
        let _ = HostRecord::decode_body(body);
        let _ = ExtentRecord::decode_body(body);
        let _ = ExtentHeader::decode_body(body);
        let _ = VdiHead::decode_body(body);
    }

    /// One field of a good body is overwritten: most of the others still pass.
    #[test]
    fn nearly_good_bodies_never_panic(offset in 0usize..BODY_SIZE - 8, value: u64) {
        let forged = |mut body: [u8; BODY_SIZE]| {
            body[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
            body
        };
        if let Ok(superblock) = Superblock::decode_body(&forged(superblock().encode_body())) {
            let g = superblock.geometry;
            prop_assert!(g.extent_slot(g.extent_count - 1).0 < g.extent_blocks);
            prop_assert!(g.size_bytes() <= superblock.device_size);
        }
        if let Ok(head) = VdiHead::decode_body(&forged(vdi().encode_body())) {
            prop_assert!(head.blocks() <= crate::format::node::tree_span(head.height));
            prop_assert_eq!(VdiHead::decode_body(&head.encode_body()), Ok(head));
        }
        let _ = HostRecord::decode_body(&forged(host().encode_body()));
    }

    #[test]
    fn garbage_name_blocks_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
        let _ = VdiMeta::decode(&bytes);
    }
}

const GOLDEN: [(&str, u32); 9] = [
    ("superblock", 0xf62c_015a),
    ("gc", 0xca20_c662),
    ("host", 0xe07b_871c),
    ("extent", 0xa50f_8c04),
    ("extent header", 0x1fb3_554d),
    ("vdi", 0xb6d4_8a77),
    ("bmap", 0xc354_5b0a),
    ("reclaim", 0x57dc_faff),
    ("name block", 0x2b9e_b6e8),
];
