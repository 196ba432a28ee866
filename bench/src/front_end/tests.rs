//! Goal: the ring's index arithmetic and the request encoding are right without a back end.
//! Method: play the device by hand on the same memory.

use super::memory::SharedMemory;
use super::request::{Config, Request};
use super::ring::{Descriptor, Layout, SplitRing, crosses};

const SIZE: u16 = 4;

fn ring(event_idx: bool) -> (SharedMemory, SplitRing) {
    let memory = SharedMemory::new(4096).unwrap();
    let ring = SplitRing::new(Layout::new(0, SIZE), SIZE, event_idx);
    (memory, ring)
}

/// Plays the device: publishes `head` as used entry number `index`.
fn complete(memory: &SharedMemory, ring: &SplitRing, index: u16, head: u32) {
    let used = ring.layout().used;
    let entry = used + 4 + 8 * usize::from(index % SIZE);
    memory.write(entry, &head.to_le_bytes());
    memory.write(entry + 4, &1u32.to_le_bytes());
    memory.write(used + 2, &index.wrapping_add(1).to_le_bytes());
}

#[test]
fn a_chain_is_seen_only_after_publish() {
    let (memory, mut ring) = ring(false);
    let available = ring.layout().available;
    ring.push(&memory, 3);
    assert_eq!(memory.slice(available + 2, 2), 0u16.to_le_bytes());
    assert!(ring.publish(&memory), "without event index and flags a kick is due");
    assert_eq!(memory.slice(available + 2, 4), [1, 0, 3, 0]);
    assert!(!ring.publish(&memory), "nothing new, no kick");
}

#[test]
fn event_index_decides_kicks_and_the_indexes_wrap() {
    let (memory, mut ring) = ring(true);
    let event_at = ring.layout().used + 4 + 8 * usize::from(SIZE);
    let mut expected_used = 0u16;
    for round in 0..u32::from(u16::MAX) + 20 {
        let index = (round & 0xffff) as u16;
        // The device asks for a kick only at every other entry.
        let event = if index.is_multiple_of(2) { index } else { index.wrapping_add(1) };
        memory.write(event_at, &event.to_le_bytes());
        ring.push(&memory, index % SIZE);
        assert_eq!(ring.publish(&memory), index.is_multiple_of(2), "entry {index}");
        assert!(ring.arm(&memory), "nothing used yet");
        complete(&memory, &ring, expected_used, u32::from(index % SIZE));
        expected_used = expected_used.wrapping_add(1);
        assert!(!ring.arm(&memory), "a used entry forbids sleeping");
        assert_eq!(ring.pop(&memory), Some((u32::from(index % SIZE), 1)));
        assert_eq!(ring.pop(&memory), None);
    }
}

#[test]
fn need_event_matches_the_specification() {
    assert!(crosses(0, 1, 0));
    assert!(!crosses(1, 1, 0));
    assert!(crosses(65535, 0, 65535));
    assert!(crosses(5, 9, 3));
    assert!(!crosses(2, 9, 3));
}

#[test]
fn layout_keeps_alignment_and_order() {
    for size in [1u16, 2, 4, 64, 256, 1024] {
        let layout = Layout::new(8, size);
        assert_eq!(layout.descriptors % 16, 0);
        assert_eq!(layout.available % 2, 0);
        assert_eq!(layout.used % 4, 0);
        assert!(layout.descriptors + 16 * usize::from(size) <= layout.available);
        assert!(layout.available + 6 + 2 * usize::from(size) <= layout.used);
    }
}

#[test]
fn requests_encode_as_virtio_blk_says() {
    let write = Request::Write { sector: 0x1122, sectors: 8 };
    assert_eq!(write.header()[..4], [1, 0, 0, 0]);
    assert_eq!(write.header()[8..], 0x1122u64.to_le_bytes());
    assert_eq!(write.data(), (4096, false));
    let zeroes = Request::WriteZeroes { sector: 5, sectors: 7, unmap: true };
    assert_eq!(zeroes.header()[..4], [13, 0, 0, 0]);
    let segment = zeroes.segment().unwrap();
    assert_eq!(segment[..8], 5u64.to_le_bytes());
    assert_eq!(segment[8..], [7, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(Request::Flush.segment(), None);
}

#[test]
fn descriptors_and_configuration_decode_where_the_specification_puts_them() {
    let encoded = Descriptor { address: 1, len: 2, flags: 3, next: 4 }.encode();
    assert_eq!(encoded, [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 3, 0, 4, 0]);

    let mut space = [0u8; Config::BYTES];
    space[0..8].copy_from_slice(&0x8_0000u64.to_le_bytes());
    space[12] = 126;
    space[20..24].copy_from_slice(&512u32.to_le_bytes());
    space[32] = 1;
    space[34] = 2;
    space[36..40].copy_from_slice(&99u32.to_le_bytes());
    space[48..52].copy_from_slice(&98u32.to_le_bytes());
    let config = Config::decode(&space).unwrap();
    assert_eq!(config.capacity_sectors, 0x8_0000);
    assert_eq!((config.segments_max, config.block_bytes), (126, 512));
    assert!(config.write_cache);
    assert_eq!((config.queues, config.discard_sectors_max, config.zeroes_sectors_max), (2, 99, 98));
    assert!(Config::decode(&space[..40]).is_err());
}
