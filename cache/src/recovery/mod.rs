//! Recovery of one disk's log: read its segments, decide (pure, in `scan` and `assemble`), make the decision durable.
//!
//! Before the disk is served (rule L3): segments without summary get one that lists exactly the live records, dead
//! segments are wiped, the device is flushed, then the slot records the new epoch and its first LSN. A crash at any of
//! these steps leaves a log that recovers to the same end, since nothing new was appended yet.
//!
//! On two legs the log is the union of both (rule L5): what one has, the other is given before the disk is served
//! (`mend.rs`).

mod assemble;
mod mend;
mod scan;
pub(crate) mod sent;
#[cfg(test)]
mod tests;

pub use assemble::{AssembleError, Assembler, Live, Recovered};
pub use mend::read_payloads;
pub use scan::{Found, scan};

use crate::error::CacheError;
use crate::format::segment::SegmentHeader;
use crate::format::slot::SlotVdi;
use crate::format::summary::{self, Summary};
use crate::format::{Geometry, record};
use crate::local::Local;
use blockstore::buf::AlignedBuf;
use blockstore::sabotage::{self, Bug};
use blockstore::types::{BLOCK_SIZE, Lsn};
use futures_util::StreamExt;

/// Segments read ahead of the one being put together.
const READ_AHEAD: usize = 16;

/// Reads the segments that `headers` name (in order of sequence) and puts the log of `slot` together; `store` is the LSN
/// of the store's image. Changes nothing.
pub async fn recover(
    local: &Local,
    slot: &SlotVdi,
    store: Lsn,
    headers: &[SegmentHeader],
) -> Result<Recovered, CacheError> {
    let refuse = |why: AssembleError| {
        let (name, vdi) = (slot.name.clone(), slot.uuid);
        match why {
            AssembleError::LogRolledBack { store, log } => {
                CacheError::LogIsOlder { name, vdi, store, log }
            }
            why => CacheError::Log { name, vdi, why: why.to_string() },
        }
    };
    let legs = local.members();
    let mut assembler = Assembler::new(local.geometry, slot.clone(), store).map_err(refuse)?;
    // By value, or the future could not go from thread to thread.
    let mut found = futures_util::stream::iter(headers.to_vec())
        .map(|header| async move {
            let found = match read_segment(local, &header).await {
                Err(_) if sabotage::on(Bug::ErrorEndsLog) => Ok(scan::scan_copies(&[], &header).0),
                found => found,
            };
            (header, found)
        })
        .buffered(READ_AHEAD);
    while let Some((header, found)) = found.next().await {
        assembler.push(&header, &found?).map_err(refuse)?;
    }
    let recovered = assembler.finish().map_err(refuse)?;
    Ok(Recovered { legs, ..recovered })
}

/// Finds out what stands in a segment: by its summary on any leg, else record by record on all of them. A read error on
/// all legs is an error, never the end of the log.
pub async fn read_segment(local: &Local, header: &SegmentHeader) -> Result<Found, CacheError> {
    let geometry = &local.geometry;
    let offset = geometry.segment_offset(header.segment);
    let tails = read_tails(local, header).await?;
    let sealed = tails.iter().find_map(|(_, bytes)| from_summary(bytes, header, geometry));
    if let Some(found) = sealed {
        return Ok(found);
    }
    if sabotage::on(Bug::SkipScan) {
        return Ok(scan::scan_copies(&[], header).0);
    }
    let segments = local.read_each(offset, geometry.segment_size as usize).await?;
    let copies: Vec<&[u8]> = segments.iter().map(|(_, bytes)| &bytes[..]).collect();
    Ok(scan::scan_copies(&copies, header).0)
}

/// The end of a segment on each leg, with all of its summary if there is one.
async fn read_tails(
    local: &Local,
    header: &SegmentHeader,
) -> Result<Vec<(u8, AlignedBuf)>, CacheError> {
    let geometry = &local.geometry;
    let end = geometry.segment_offset(header.segment) + geometry.segment_size;
    let usual = summary::blocks_max(geometry.segment_blocks());
    let len = |blocks: u32| blocks as usize * BLOCK_SIZE;
    let tails = local.read_each(end - len(usual) as u64, len(usual)).await?;
    let lengths = tails.iter().filter_map(|(_, tail)| summary::length(tail, header.nonce));
    match lengths.filter(|length| *length < geometry.segment_blocks()).max() {
        Some(longer) if longer > usual => {
            local.read_each(end - len(longer) as u64, len(longer)).await
        }
        _ => Ok(tails),
    }
}

/// What the summary in `tail` (the last bytes of a segment) says, if there is a valid one that does not contradict itself.
#[must_use]
pub fn from_summary(tail: &[u8], header: &SegmentHeader, geometry: &Geometry) -> Option<Found> {
    let summary = Summary::decode(tail, header.seq, header.nonce).ok()?;
    is_consistent(&summary, header, geometry).then_some(Found {
        first_lsn: summary.first_lsn,
        last_lsn: summary.last_lsn,
        used_blocks: summary.used_blocks,
        flushed: summary.flushed,
        entries: summary.entries,
        sealed: true,
    })
}

/// A summary whose entries decode, lie in the blocks that it says are used, and add up to its LSNs.
fn is_consistent(summary: &Summary, header: &SegmentHeader, geometry: &Geometry) -> bool {
    let mut lsns = 0;
    if !(1..=geometry.segment_blocks()).contains(&summary.used_blocks) {
        return false;
    }
    for entry in record::Entries::new(&summary.entries, summary.used_blocks) {
        let Ok(entry) = entry else { return false };
        lsns += entry.lsns();
    }
    let next = summary.last_lsn.0.checked_add(1);
    summary.first_lsn == header.first_lsn && next == summary.first_lsn.0.checked_add(lsns)
}

/// Makes what recovery decided durable, see the module. Afterwards the slot (with the new epoch) may be written.
///
/// # Errors
/// [`CacheError::LogChanged`] if a leg is gone that alone had some of it: then the log is to be read again.
pub async fn settle(local: &Local, recovered: &Recovered) -> Result<(), CacheError> {
    let geometry = &local.geometry;
    mend::mend(local, recovered).await?;
    for live in &recovered.live {
        let Some(entries) = &live.unsealed else { continue };
        let blocks = summary::blocks_for(entries.len());
        let summary = Summary {
            seq: live.header.seq,
            first_lsn: live.header.first_lsn,
            last_lsn: live.last_lsn,
            flushed: live.last_lsn,
            used_blocks: live.used_blocks,
            entries: entries.clone(),
        };
        let mut bytes = AlignedBuf::zeroed(blocks as usize * BLOCK_SIZE);
        summary.encode_into(&mut bytes, live.header.nonce);
        // Records first, then the summary that vouches for them (rule L4).
        local.flush().await?;
        let offset = geometry.segment_offset(live.header.segment) + geometry.segment_size;
        let offset = offset - bytes.len() as u64;
        local.write(offset, bytes).await?;
    }
    for id in &recovered.dead {
        if sabotage::on(Bug::KeepDeadRecords) {
            continue;
        }
        local.write(geometry.segment_offset(*id), AlignedBuf::zeroed(BLOCK_SIZE)).await?;
    }
    local.flush().await
}
