//! The summary at the end of a sealed segment: all entries of its records, so that recovery and the flusher
//! need not read the segment to know what is in it.
//!
//! It is written only after a flush that covers all records of the segment (rule L4), so a valid summary
//! vouches for the payloads. It fills the segment's last blocks, each with a header of its own.

use super::FormatError;
use blockstore::crc::crc32c_keyed;
use blockstore::types::{BLOCK_SIZE, Lsn};

const MAGIC: [u8; 8] = *b"BLSTSUMM";
const WHAT: &str = "segment summary";
const HEADER_LEN: usize = 64;
/// Bytes of entries in one summary block.
const ROOM: usize = BLOCK_SIZE - HEADER_LEN;

/// Blocks that a summary with so many bytes of entries takes.
#[must_use]
pub fn blocks_for(entries_len: usize) -> u32 {
    entries_len.div_ceil(ROOM).max(1) as u32
}

/// Blocks that a summary usually takes at most in a segment of so many blocks: each block as a single-block write. Where most
/// entries have no payload it is longer, see [`length`].
#[must_use]
pub fn blocks_max(segment_blocks: u32) -> u32 {
    (blocks_for(super::record::entry_len(1) * segment_blocks as usize)).min(segment_blocks - 1)
}

/// Blocks of the summary that ends `tail`, which need not hold all of it; none if there is no summary.
#[must_use]
pub fn length(tail: &[u8], nonce: u64) -> Option<u32> {
    let last = (tail.len() / BLOCK_SIZE).checked_sub(1)?;
    let (_, total, _) = check_block(block_of(tail, last), nonce).ok()?;
    Some(total as u32)
}

/// What a summary says of its segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The segment it was written in.
    pub seq: u64,
    /// First LSN.
    pub first_lsn: Lsn,
    /// Last LSN; `first_lsn - 1` if the segment holds no records with LSNs.
    pub last_lsn: Lsn,
    /// Everything up to here was durable when it was written.
    pub flushed: Lsn,
    /// Blocks in use by header and records.
    pub used_blocks: u32,
    /// The entries, see [`super::record::Entries`].
    pub entries: Vec<u8>,
}

impl Summary {
    /// Writes it into `out`, which must be [`blocks_for`] blocks long and lies at the segment's end.
    pub fn encode_into(&self, out: &mut [u8], nonce: u64) {
        let total = blocks_for(self.entries.len());
        assert_eq!(out.len(), total as usize * BLOCK_SIZE);
        for (index, block) in out.chunks_exact_mut(BLOCK_SIZE).enumerate() {
            let from = (index * ROOM).min(self.entries.len());
            let to = (from + ROOM).min(self.entries.len());
            let part = &self.entries[from..to];
            block[..8].copy_from_slice(&MAGIC);
            block[8..12].fill(0);
            block[12..14].copy_from_slice(&(index as u16).to_le_bytes());
            block[14..16].copy_from_slice(&(total as u16).to_le_bytes());
            block[16..24].copy_from_slice(&self.seq.to_le_bytes());
            block[24..32].copy_from_slice(&self.first_lsn.0.to_le_bytes());
            block[32..40].copy_from_slice(&self.last_lsn.0.to_le_bytes());
            block[40..48].copy_from_slice(&self.flushed.0.to_le_bytes());
            block[48..52].copy_from_slice(&self.used_blocks.to_le_bytes());
            block[52..56].copy_from_slice(&(part.len() as u32).to_le_bytes());
            block[56..HEADER_LEN].fill(0);
            block[HEADER_LEN..HEADER_LEN + part.len()].copy_from_slice(part);
            block[HEADER_LEN + part.len()..].fill(0);
            let crc = crc32c_keyed(nonce, block);
            block[8..12].copy_from_slice(&crc.to_le_bytes());
        }
    }

    /// Reads and checks the summary that ends `tail`, the last bytes of the segment (at least as long as
    /// the summary).
    pub fn decode(tail: &[u8], seq: u64, nonce: u64) -> Result<Self, FormatError> {
        let available = tail.len() / BLOCK_SIZE;
        let last = available.checked_sub(1).ok_or(FormatError::Absent(WHAT))?;
        let total = check_block(block_of(tail, last), nonce)?.1;
        if total == 0 || total > available {
            return Err(FormatError::Invalid { what: WHAT, why: "its length does not fit" });
        }
        let mut summary: Option<Self> = None;
        for (index, at) in (available - total..available).enumerate() {
            let block = block_of(tail, at);
            let (found_index, found_total, len) = check_block(block, nonce)?;
            if found_index != index || found_total != total || u64_at(block, 16) != seq {
                return Err(FormatError::Invalid {
                    what: WHAT,
                    why: "its blocks do not belong together",
                });
            }
            let part = &block[HEADER_LEN..HEADER_LEN + len];
            summary
                .get_or_insert_with(|| Self {
                    seq,
                    first_lsn: Lsn(u64_at(block, 24)),
                    last_lsn: Lsn(u64_at(block, 32)),
                    flushed: Lsn(u64_at(block, 40)),
                    used_blocks: u32_at(block, 48),
                    entries: Vec::with_capacity(total * ROOM),
                })
                .entries
                .extend_from_slice(part);
        }
        summary.ok_or(FormatError::Absent(WHAT))
    }
}

fn block_of(tail: &[u8], index: usize) -> &[u8] {
    &tail[index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE]
}

/// Checks one block; returns its index, the number of blocks and the bytes of entries in it.
fn check_block(block: &[u8], nonce: u64) -> Result<(usize, usize, usize), FormatError> {
    if block[..8] != MAGIC {
        return Err(FormatError::Absent(WHAT));
    }
    let expected = u32_at(block, 8);
    let mut copy = [0u8; BLOCK_SIZE];
    copy.copy_from_slice(block);
    copy[8..12].fill(0);
    let found = crc32c_keyed(nonce, &copy);
    if expected != found {
        return Err(FormatError::Checksum { what: WHAT, expected, found });
    }
    let len = u32_at(block, 52) as usize;
    if len > ROOM {
        return Err(FormatError::Invalid { what: WHAT, why: "its entries do not fit" });
    }
    let index = u16::from_le_bytes([block[12], block[13]]);
    let total = u16::from_le_bytes([block[14], block[15]]);
    Ok((usize::from(index), usize::from(total), len))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
