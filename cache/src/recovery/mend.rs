//! Making the legs of a mirrored cache equal where a crash or rot left them different.
//!
//! Before a disk is served, each of its segments has a header and, if it was sealed, a summary on every member, and the
//! records of those that were not sealed are the same on all (rule L5): whatever leg dies next, the other holds the log up
//! to the same end. The headers were read when the cache was opened: the leg that one was found on may be gone by now, and the
//! only one that is left may lack it. So it is with records and summaries: a leg that was read by recovery may be lost before
//! they are on the other, also while this goes on. What only it had is no part of the log then. To vouch for it all the same would
//! be to promise a guest what nobody can read; so the log is read again. Payloads of sealed segments are mended when they are
//! read: they were durable on all legs before the summary. A member that cannot be read here, or not in time, may lack anything: it
//! is written all of it, and is out if it does not take that.

#[cfg(test)]
mod tests;

use super::scan::scan_copies;
use super::{Live, Recovered, from_summary, read_tails};
use crate::error::CacheError;
use crate::format::legs::LegSet;
use crate::format::record::Entries;
use crate::format::segment::SegmentHeader;
use crate::format::summary;
use crate::local::Local;
use blockstore::buf::AlignedBuf;
use blockstore::crc::crc32c;
use blockstore::sabotage::{self, Bug};
use blockstore::types::BLOCK_SIZE;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};

/// Segments mended at once.
const AT_ONCE: usize = 8;
/// Bytes written at once to a leg that could not be read: few enough for a slow one to take them in time.
const WRITE_BYTES: usize = 1 << 20;

/// Makes all members hold the live segments of `recovered`. Durable with the next flush.
pub(super) fn mend<'a>(
    local: &'a Local,
    recovered: &'a Recovered,
) -> BoxFuture<'a, Result<(), CacheError>> {
    // Boxed, because the compiler cannot see by itself that the nested futures are `Send`.
    mend_all(local, recovered).boxed()
}

async fn mend_all(local: &Local, recovered: &Recovered) -> Result<(), CacheError> {
    // Not the members as they are now alone: the one that had a record may have been lost since.
    let one_copy = recovered.legs.or(local.members()).len() < 2;
    // By value, or the future could not go from thread to thread.
    let mut mended = futures_util::stream::iter(recovered.live.to_vec())
        .map(|live| async move { mend_one(local, &live, one_copy).await })
        .buffered(AT_ONCE);
    while let Some(result) = mended.next().await {
        result?;
    }
    Ok(())
}

/// With `one_copy`, records and summary were read from one leg and are on it.
async fn mend_one(local: &Local, live: &Live, one_copy: bool) -> Result<(), CacheError> {
    mend_header(local, &live.header).await?;
    match &live.unsealed {
        _ if one_copy => Ok(()),
        Some(entries) => mend_records(local, live, entries).await,
        None => mend_summary(local, live).await,
    }
}

async fn mend_header(local: &Local, header: &SegmentHeader) -> Result<(), CacheError> {
    let mut right = AlignedBuf::zeroed(BLOCK_SIZE);
    header.encode_into(&mut right);
    let offset = local.geometry.segment_offset(header.segment);
    let copies = local.read_each(offset, BLOCK_SIZE).await?;
    for (leg, block) in &copies {
        let found = SegmentHeader::decode(block, local.cache_uuid(), header.segment);
        if found.as_ref() != Ok(header) {
            local.repair(*leg, offset, AlignedBuf::copy_of(&right)).await?;
        }
    }
    write_unread(local, &copies, offset, &right).await
}

async fn mend_summary(local: &Local, live: &Live) -> Result<(), CacheError> {
    let (geometry, header) = (&local.geometry, &live.header);
    let end = geometry.segment_offset(header.segment) + geometry.segment_size;
    let copies = read_tails(local, header).await?;
    let found = |bytes: &[u8]| from_summary(bytes, header, geometry);
    let good = copies.iter().find_map(|(_, bytes)| Some((found(bytes)?, bytes)));
    // Without it, the segment is one that was not sealed, and gets a new one.
    let (summary, bytes) = good.ok_or_else(|| changed(local, live))?;
    let len = summary::blocks_for(summary.entries.len()) as usize * BLOCK_SIZE;
    let from = bytes.len() - len;
    for (leg, copy) in &copies {
        if found(copy).is_none() {
            let summary = AlignedBuf::copy_of(&bytes[from..]);
            local.repair(*leg, end - len as u64, summary).await?;
        }
    }
    write_unread(local, &copies, end - len as u64, &bytes[from..]).await
}

async fn mend_records(local: &Local, live: &Live, entries: &[u8]) -> Result<(), CacheError> {
    if sabotage::on(Bug::SkipTailMend) {
        return Ok(());
    }
    let offset = local.geometry.segment_offset(live.header.segment);
    let used = live.used_blocks as usize * BLOCK_SIZE;
    let copies = local.read_each(offset, used).await?;
    let bytes: Vec<&[u8]> = copies.iter().map(|(_, bytes)| &bytes[..]).collect();
    let (found, good) = scan_copies(&bytes, &live.header);
    // Some records take no LSN.
    if found.last_lsn != live.last_lsn || found.entries != entries {
        return Err(changed(local, live));
    }
    // The header has been mended; good records stand one behind the other.
    let mut records = AlignedBuf::zeroed(used - BLOCK_SIZE);
    for good in good {
        let at = good.block as usize * BLOCK_SIZE;
        let right = &bytes[good.copy][at..at + BLOCK_SIZE];
        records[at - BLOCK_SIZE..at].copy_from_slice(right);
        for (leg, bytes) in &copies {
            if bytes[at..at + BLOCK_SIZE] != *right {
                local.repair(*leg, offset + at as u64, AlignedBuf::copy_of(right)).await?;
            }
        }
    }
    write_unread(local, &copies, offset + BLOCK_SIZE as u64, &records).await
}

/// Writes what is right to the members of which there is no copy.
async fn write_unread(
    local: &Local,
    copies: &[(u8, AlignedBuf)],
    offset: u64,
    right: &[u8],
) -> Result<(), CacheError> {
    let read = copies.iter().fold(LegSet::NONE, |read, (leg, _)| read.with(*leg));
    for leg in local.members().minus(read).iter() {
        for (part, at) in right.chunks(WRITE_BYTES).zip((offset..).step_by(WRITE_BYTES)) {
            local.repair(leg, at, AlignedBuf::copy_of(part)).await?;
        }
    }
    Ok(())
}

/// A leg was lost, or rotted, between reading the log and settling it.
fn changed(local: &Local, live: &Live) -> CacheError {
    CacheError::LogChanged { path: local.path.clone(), segment: live.header.segment.0 }
}

/// Reads the blocks in use of a sealed segment with these entries. A payload block that does not match its checksum is
/// taken from another leg that has it, and rewritten where it was bad. What is bad everywhere is returned as it is: the
/// reader compares checksums anyway.
pub async fn read_payloads(
    local: &Local,
    header: &SegmentHeader,
    used_blocks: u32,
    entries: &[u8],
) -> Result<AlignedBuf, CacheError> {
    let offset = local.geometry.segment_offset(header.segment);
    let mut bytes = local.read(offset, used_blocks as usize * BLOCK_SIZE).await?;
    if local.members().len() < 2 {
        return Ok(bytes);
    }
    for entry in Entries::new(entries, used_blocks).flatten() {
        for n in 0..entry.payload_blocks() {
            let at = (u32::from(entry.payload) + n) as usize * BLOCK_SIZE;
            let block = at..at + BLOCK_SIZE;
            if crc32c(&bytes[block.clone()]) == entry.crc(n) {
                continue;
            }
            let is_good = |bytes: &[u8]| crc32c(bytes) == entry.crc(n);
            let good = local.read_good(offset + at as u64, BLOCK_SIZE, is_good).await?;
            bytes[block].copy_from_slice(&good);
        }
    }
    Ok(bytes)
}
