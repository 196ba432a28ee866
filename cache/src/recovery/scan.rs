//! Reading an unsealed segment record by record, from one copy or from two that are the same but for what a crash or rot
//! took from either.

use crate::format::FormatError;
use crate::format::record::{Entries, RecordHeader};
use crate::format::segment::SegmentHeader;
use blockstore::crc::crc32c;
use blockstore::sabotage::{self, Bug};
use blockstore::types::{BLOCK_SIZE, Lsn};

/// What stands in a segment, however it was found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// LSN of the first entry that takes one.
    pub first_lsn: Lsn,
    /// Last LSN; `first_lsn - 1` if there is none.
    pub last_lsn: Lsn,
    /// Blocks in use by header and good records.
    pub used_blocks: u32,
    /// Everything up to here is known to have been durable when the segment was written.
    pub flushed: Lsn,
    /// Entries of the good records.
    pub entries: Vec<u8>,
    /// A summary vouches for it.
    pub sealed: bool,
}

/// A block of a good record, and the copy in which it is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Good {
    /// In the segment.
    pub block: u32,
    /// In the order that the copies were given in.
    pub copy: usize,
}

/// Takes the good records at the start of `segment` (all its bytes). The first that is absent, torn or fits not
/// ends them: it was never acknowledged, unless a flushed LSN found elsewhere says otherwise (rule L4, judged by the caller).
#[must_use]
pub fn scan(segment: &[u8], header: &SegmentHeader) -> Found {
    scan_copies(&[segment], header).0
}

/// As [`scan`], of copies of one length: each block is taken from whichever copy has it (rule L5). Tells which. Headers
/// behind the end, that of the record with which it ends among them, still say how far the log was flushed: what is bad below
/// that was not the end.
#[must_use]
pub fn scan_copies(copies: &[&[u8]], header: &SegmentHeader) -> (Found, Vec<Good>) {
    let shortest = copies.iter().map(|copy| copy.len()).min().unwrap_or(0);
    let blocks = (shortest / BLOCK_SIZE) as u32;
    let mut good = Vec::new();
    let mut found = Found {
        first_lsn: header.first_lsn,
        last_lsn: Lsn(header.first_lsn.0.saturating_sub(1)),
        used_blocks: 1,
        flushed: Lsn(0),
        entries: Vec::new(),
        sealed: false,
    };
    while found.used_blocks < blocks {
        let kept = good.len();
        let record = (0..copies.len()).find_map(|copy| {
            good.truncate(kept);
            read_record(copies, copy, blocks, header, &found, &mut good).ok()
        });
        let Some(record) = record else {
            good.truncate(kept);
            break;
        };
        found.last_lsn = found.last_lsn.plus(record.lsns);
        found.flushed = found.flushed.max(record.header.flushed);
        found.used_blocks += 1 + u32::from(record.header.payload_blocks);
        found.entries.extend_from_slice(record.entries);
    }
    for position in found.used_blocks..blocks {
        for copy in copies {
            let block = block_at(copy, position);
            if let Ok((record, _)) = RecordHeader::decode(block, header.seq, header.nonce, position)
            {
                found.flushed = found.flushed.max(record.flushed);
            }
        }
    }
    (found, good)
}

struct Record<'a> {
    header: RecordHeader,
    entries: &'a [u8],
    lsns: u64,
}

/// The next record, whose header is taken from one copy, and its payload from any.
fn read_record<'a>(
    copies: &[&'a [u8]],
    copy: usize,
    blocks: u32,
    header: &SegmentHeader,
    so_far: &Found,
    good: &mut Vec<Good>,
) -> Result<Record<'a>, FormatError> {
    let invalid = |why| FormatError::Invalid { what: "record", why };
    let position = so_far.used_blocks;
    let block = block_at(copies[copy], position);
    let (record, entries) = RecordHeader::decode(block, header.seq, header.nonce, position)?;
    if record.epoch != header.epoch || record.first_lsn != so_far.last_lsn.plus(1) {
        return Err(invalid("it does not continue the log"));
    }
    let payload_end = position + 1 + u32::from(record.payload_blocks);
    if payload_end > blocks {
        return Err(invalid("its payload lies outside the segment"));
    }
    good.push(Good { block: position, copy });
    let mut lsns = 0;
    let mut payload = position + 1;
    for entry in Entries::new(entries, blocks) {
        let entry = entry?;
        lsns += entry.lsns();
        if entry.payload_blocks() == 0 {
            continue;
        }
        if u32::from(entry.payload) != payload {
            return Err(invalid("its payload is not where it belongs"));
        }
        for index in 0..entry.payload_blocks() {
            if payload >= payload_end {
                return Err(invalid("its payload is longer than it says"));
            }
            let expected = entry.crc(index);
            let matches = |copy: &&[u8]| {
                sabotage::on(Bug::IgnorePayloadCrc) || crc32c(block_at(copy, payload)) == expected
            };
            let Some(copy) = copies.iter().position(matches) else {
                let found = crc32c(block_at(copies[copy], payload));
                return Err(FormatError::Checksum { what: "payload block", expected, found });
            };
            good.push(Good { block: payload, copy });
            payload += 1;
        }
    }
    Ok(Record { header: record, entries, lsns })
}

pub(super) fn block_at(segment: &[u8], block: u32) -> &[u8] {
    &segment[block as usize * BLOCK_SIZE..(block as usize + 1) * BLOCK_SIZE]
}
