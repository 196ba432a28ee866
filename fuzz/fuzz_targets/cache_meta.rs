//! Structures of one block on the cache device: superblock, VDI slot, segment header.
//!
//! The first byte chooses the structure, and whether the rest is its bytes or patches to a valid one; of the latter the
//! checksum is right. A geometry that decodes must keep every offset on the device.

#![no_main]

use ballast_fuzz::{Script, put_crc};
use blockstore::crc::crc32c;
use blockstore::types::{BLOCK_SIZE, Lsn};
use cache::disk::plan::SegmentId;
use cache::format::segment::SegmentHeader;
use cache::format::slot::{SlotVdi, VdiSlot};
use cache::format::superblock::Superblock;
use cache::format::{Geometry, Membership};
use libfuzzer_sys::fuzz_target;
use uuid::Uuid;

const CACHE: Uuid = Uuid::from_u128(0xcac4e);
const SLOT: u32 = 5;
const SEGMENT: SegmentId = SegmentId(3);
/// Where all of them have their checksum.
const CRC: usize = 8;
const BLOCK: u64 = BLOCK_SIZE as u64;

fn superblock() -> Superblock {
    Superblock {
        sequence: 4,
        cache: CACHE,
        host: Uuid::from_u128(7),
        machine: None,
        store: Some(Uuid::from_u128(8)),
        leg: Uuid::from_u128(9),
        membership: Membership::new(vec![Uuid::from_u128(9), Uuid::from_u128(10)]),
        geometry: Geometry::for_size(64 << 20).expect("large enough"),
    }
}

fn slot() -> VdiSlot {
    let vdi = SlotVdi {
        uuid: Uuid::from_u128(0x55),
        log_id: 0x66,
        name: "Диск".into(),
        size_bytes: 16 << 20,
        committed: Lsn(9),
        evicted_below: 2,
        sequence_seen: 7,
        epoch: 1,
        first_lsn: Lsn(5),
        durable: Lsn(0),
        alone_from: None,
        cuts: Vec::new(),
        origin: None,
        has_cuts: false,
        policy: Default::default(),
        left_behind: None,
        boot_trace: Vec::new(),
    };
    VdiSlot { sequence: 3, slot: SLOT, vdi: Some(vdi), quarantined: None }
}

fn segment_header() -> SegmentHeader {
    SegmentHeader {
        cache: CACHE,
        vdi: Uuid::from_u128(0x55),
        log_id: 0x66,
        seq: 11,
        nonce: 0x0102_0304_0506_0708,
        first_lsn: Lsn(10),
        segment: SEGMENT,
        epoch: 1,
    }
}

/// The block to decode.
fn block(script: &mut Script<'_>, raw: bool, valid: [u8; BLOCK_SIZE]) -> Vec<u8> {
    if raw {
        return script.rest().to_vec();
    }
    let mut block = valid.to_vec();
    script.patch_all(&mut block);
    put_crc(&mut block, CRC, crc32c);
    block
}

fn check_geometry(g: &Geometry) {
    let last = SegmentId(g.segments - 1);
    assert!(g.segment_offset(last) + g.segment_size <= g.size);
    assert!(Geometry::slot_offset(0, 0) > Geometry::superblock_offset(1));
    assert!(Geometry::slot_offset(g.slots - 1, 1) + BLOCK <= g.data_start);
    let block = g.first_block(last) + (g.segment_blocks() - 1);
    assert_eq!(g.segment_of(block), last);
    assert_eq!(g.block_at(g.block_offset(block)), block);
    assert_eq!(g.block_offset(g.first_block(last)), g.segment_offset(last));
    // Two values of a place stand for something else in the index.
    assert!(block < u32::MAX - 1);
}

fuzz_target!(|input: &[u8]| {
    let mut script = Script::new(input);
    let choice = script.byte();
    let raw = choice & 0x80 != 0;
    match choice & 0x7f {
        0 => {
            let block = block(&mut script, raw, superblock().encode());
            let Ok(superblock) = Superblock::decode(&block) else { return };
            check_geometry(&superblock.geometry);
            assert_eq!(Superblock::decode(&superblock.encode()), Ok(superblock));
        }
        1 => {
            let block = block(&mut script, raw, slot().encode());
            let Ok(mut slot) = VdiSlot::decode(&block, SLOT) else { return };
            let mut again = VdiSlot::decode(&slot.encode(), SLOT).expect("own encoding");
            // A name that is not UTF-8 is mended for messages, and cut when written again.
            for vdi in [&mut slot, &mut again].into_iter().filter_map(|slot| slot.vdi.as_mut()) {
                vdi.name.clear();
            }
            assert_eq!(again, slot);
        }
        _ => {
            let mut valid = [0; BLOCK_SIZE];
            segment_header().encode_into(&mut valid);
            let block = block(&mut script, raw, valid);
            let Ok(header) = SegmentHeader::decode(&block, CACHE, SEGMENT) else { return };
            header.encode_into(&mut valid);
            assert_eq!(SegmentHeader::decode(&valid, CACHE, SEGMENT), Ok(header));
        }
    }
});
