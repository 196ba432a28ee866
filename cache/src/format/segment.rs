//! A segment's first block: whose log it belongs to and what keys its records.
//!
//! ```text
//! block 0        segment header
//! block 1 …      records: header block, payload blocks
//! …              unused
//! last blocks    summary, once sealed
//! ```

use super::{FormatError, VERSION, open_block, seal_block};
use crate::disk::plan::SegmentId;
use blockstore::types::{BLOCK_SIZE, Lsn};
use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const MAGIC: [u8; 8] = *b"BLSTSEGM";
const WHAT: &str = "segment header";
/// No disk lives long enough for more.
const FIRST_LSN_MAX: u64 = 1 << 63;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    crc: U32,
    version: U32,
    cache: [u8; 16],
    vdi: [u8; 16],
    log_id: [u8; 16],
    seq: U64,
    nonce: U64,
    first_lsn: U64,
    segment: U32,
    epoch: U32,
    reserved: [u8; BLOCK_SIZE - 96],
}
const _: () = assert!(size_of::<Raw>() == BLOCK_SIZE);

/// A validated segment header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The cache it was written in.
    pub cache: Uuid,
    /// The disk.
    pub vdi: Uuid,
    /// The disk's log.
    pub log_id: u128,
    /// Never used by another segment of this cache.
    pub seq: u64,
    /// Keys the checksums of the segment's records and summary.
    pub nonce: u64,
    /// LSN of the first record.
    pub first_lsn: Lsn,
    /// Own place.
    pub segment: SegmentId,
    /// Recovery epoch of the log it was opened in.
    pub epoch: u32,
}

impl SegmentHeader {
    /// Writes it into `block` (4096 bytes).
    pub fn encode_into(&self, block: &mut [u8]) {
        let raw = Raw {
            magic: MAGIC,
            crc: U32::ZERO,
            version: VERSION.into(),
            cache: self.cache.into_bytes(),
            vdi: self.vdi.into_bytes(),
            log_id: self.log_id.to_le_bytes(),
            seq: self.seq.into(),
            nonce: self.nonce.into(),
            first_lsn: self.first_lsn.0.into(),
            segment: self.segment.0.into(),
            epoch: self.epoch.into(),
            reserved: [0; BLOCK_SIZE - 96],
        };
        block.copy_from_slice(raw.as_bytes());
        seal_block(block);
    }

    /// Reads and checks the block at the start of segment `segment` of cache `cache`.
    pub fn decode(block: &[u8], cache: Uuid, segment: SegmentId) -> Result<Self, FormatError> {
        open_block(block, MAGIC, WHAT)?;
        let raw = Raw::ref_from_bytes(block).map_err(|_| FormatError::Absent(WHAT))?;
        if raw.segment.get() != segment.0 {
            return Err(FormatError::Invalid {
                what: WHAT,
                why: "it was written for another place",
            });
        }
        if Uuid::from_bytes(raw.cache) != cache {
            return Err(FormatError::Invalid { what: WHAT, why: "it belongs to another cache" });
        }
        // Arithmetic on LSNs relies on both ends of this range.
        let first_lsn = raw.first_lsn.get();
        if first_lsn == 0 || first_lsn > FIRST_LSN_MAX {
            return Err(FormatError::Invalid { what: WHAT, why: "its first LSN is impossible" });
        }
        Ok(Self {
            cache,
            vdi: Uuid::from_bytes(raw.vdi),
            log_id: u128::from_le_bytes(raw.log_id),
            seq: raw.seq.get(),
            nonce: raw.nonce.get(),
            first_lsn: Lsn(first_lsn),
            segment,
            epoch: raw.epoch.get(),
        })
    }
}
