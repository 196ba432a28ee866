//! Rot: flipped bits, and blocks that hold what belongs elsewhere, or nothing.

use crate::legs::Condition;
use blockstore::device::sim::SimDevice;
use blockstore::types::BLOCK_SIZE;
use cache::disk::plan::SegmentId;
use cache::format::Geometry;
use cache::format::record::RecordHeader;
use cache::format::segment::SegmentHeader;
use cache::format::slot::VdiSlot;
use cache::format::summary::{self, Summary};
use rand::Rng;
use rand::rngs::SmallRng;
use std::sync::atomic::Ordering;
use uuid::Uuid;

/// Slots of a cache that are damaged: those that may be in use in a simulation, but for some of its clones'.
const SLOTS: u32 = 3;

/// Damages one block of a leg.
pub fn to_cache(sim: &SimDevice, condition: &Condition, rng: &mut SmallRng) {
    condition.harmed.store(true, Ordering::Relaxed);
    let geometry = Geometry::for_size(sim.capacity()).expect("a cache lies on it");
    let block = |sim: &SimDevice, rng: &mut SmallRng| {
        let mut offset = 0;
        for _ in 0..20 {
            offset = place(&geometry, rng);
            if sim.peek(offset, 64).iter().any(|byte| *byte != 0) {
                break;
            }
        }
        offset
    };
    let at = block(sim, rng);
    let other = block(sim, rng);
    to_block(sim, at, other, rng);
}

/// Damages one block of the store's device.
pub fn to_store(sim: &SimDevice, rng: &mut SmallRng) {
    let written = sim.written_blocks();
    if written.is_empty() {
        return;
    }
    let mut any = || written[rng.random_range(0..written.len())] * BLOCK_SIZE as u64;
    let (at, other) = (any(), any());
    to_block(sim, at, other, rng);
}

fn to_block(sim: &SimDevice, at: u64, other: u64, rng: &mut SmallRng) {
    match rng.random_range(0..4) {
        0 => {
            let content: [u8; BLOCK_SIZE] =
                sim.peek(other, BLOCK_SIZE).try_into().expect("a block");
            sim.misplace(at, &content);
        }
        1 => sim.misplace(at, &[0; BLOCK_SIZE]),
        _ => {
            for _ in 0..rng.random_range(1..4) {
                sim.corrupt(
                    at + rng.random_range(0..BLOCK_SIZE as u64),
                    1 << rng.random_range(0..8),
                );
            }
        }
    }
}

/// Where something of the cache stands: superblocks, slots, headers, records, summaries.
fn place(geometry: &Geometry, rng: &mut SmallRng) -> u64 {
    let segment = geometry.segment_offset(SegmentId(rng.random_range(0..geometry.segments)));
    let block = BLOCK_SIZE as u64;
    match rng.random_range(0..16) {
        0 => rng.random_range(0..2) * block,
        1 | 2 => Geometry::slot_offset(rng.random_range(0..SLOTS), rng.random_range(0..2)),
        3 => segment,
        4 | 5 => {
            let tail = u64::from(summary::blocks_max(geometry.segment_blocks()));
            segment + geometry.segment_size - rng.random_range(1..=tail) * block
        }
        6..11 => segment + rng.random_range(1..24) * block,
        _ => segment + rng.random_range(0..u64::from(geometry.segment_blocks())) * block,
    }
}

/// The highest LSN that a disk's log on the device itself says to be durable: by the header of any record, and by
/// any summary, and by its slot. Whatever else is damaged, no less may be opened.
pub fn stated(sim: &SimDevice, cache: Uuid, vdi: Uuid, log_id: u128) -> u64 {
    let geometry = Geometry::for_size(sim.capacity()).expect("a cache lies on it");
    let mut stated = noted(sim, vdi, log_id);
    for id in (0..geometry.segments).map(SegmentId) {
        let segment = sim.peek(geometry.segment_offset(id), geometry.segment_size as usize);
        let Ok(header) = SegmentHeader::decode(&segment[..BLOCK_SIZE], cache, id) else { continue };
        if header.vdi != vdi || header.log_id != log_id {
            continue;
        }
        for (position, block) in (0u32..).zip(segment.chunks_exact(BLOCK_SIZE)).skip(1) {
            if let Ok((record, _)) = RecordHeader::decode(block, header.seq, header.nonce, position)
            {
                stated = stated.max(record.flushed.0);
            }
        }
        if let Ok(summary) = Summary::decode(&segment, header.seq, header.nonce) {
            stated = stated.max(summary.flushed.0).max(summary.last_lsn.0);
        }
    }
    stated
}

/// What the newest copy of the log's slot says.
fn noted(sim: &SimDevice, vdi: Uuid, log_id: u128) -> u64 {
    let newest = |slot| {
        let copies = [0, 1].map(|n| sim.peek(Geometry::slot_offset(slot, n), BLOCK_SIZE));
        let valid = copies.iter().filter_map(|copy| VdiSlot::decode(copy, slot).ok());
        valid.max_by_key(|copy| copy.sequence)
    };
    let geometry = Geometry::for_size(sim.capacity()).expect("a cache lies on it");
    let records = (0..geometry.slots).filter_map(|slot| newest(slot)?.vdi);
    let own = records.filter(|record| record.uuid == vdi && record.log_id == log_id);
    own.map(|record| record.durable.0).max().unwrap_or(0)
}
