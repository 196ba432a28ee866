//! When what stands in a log was sent to its device: by the headers of its records.

use super::scan::block_at;
use crate::error::CacheError;
use crate::flusher::{Replay, look_at_header};
use crate::format::record::RecordHeader;
use crate::format::segment::SegmentHeader;
use crate::local::Local;
use blockstore::types::{BLOCK_SIZE, Lsn};
use uuid::Uuid;

/// A record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sent {
    /// Milliseconds since 1970; 0: it does not say.
    time_ms: u64,
    first_lsn: Lsn,
}

/// A point of a log: its last LSN, and when that was sent, milliseconds since 1970 (0: the log does not say).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// The last LSN that belongs to it.
    pub lsn: Lsn,
    /// When it was sent to the device.
    pub time_ms: u64,
}

/// The log of `vdi` as it was at `time_ms`: up to the last record that had been sent then. None if all of `segments`, which
/// follow each other, is later. A clock that jumped makes it one of the points at which it showed that time.
///
/// # Errors
/// The local device's; a segment that is damaged, or not part of the log any more.
pub async fn at_time(
    local: &Local,
    vdi: Uuid,
    segments: &[Replay],
    time_ms: u64,
) -> Result<Option<Point>, CacheError> {
    // The first segment that begins later.
    let (mut from, mut to) = (0, segments.len());
    while from < to {
        let middle = usize::midpoint(from, to);
        let header = look_at_header(local, vdi, segments[middle].id, segments[middle].seq).await?;
        if first_record(local, &header).await?.time_ms <= time_ms {
            from = middle + 1;
        } else {
            to = middle;
        }
    }
    let Some(segment) = from.checked_sub(1).map(|at| &segments[at]) else { return Ok(None) };
    let sent = records(local, vdi, segment).await?;
    let after = sent.partition_point(|record| record.time_ms <= time_ms);
    let last = sent.get(after).map_or(segment.last_lsn, |next| Lsn(next.first_lsn.0 - 1));
    let time_ms = after.checked_sub(1).map_or(0, |at| sent[at].time_ms);
    Ok(Some(Point { lsn: last, time_ms }))
}

/// The point of the log at `lsn`, which is in one of `segments`; none if it is in none.
///
/// # Errors
/// As [`at_time`].
pub async fn at_lsn(
    local: &Local,
    vdi: Uuid,
    segments: &[Replay],
    lsn: Lsn,
) -> Result<Option<Point>, CacheError> {
    let holds = |segment: &&Replay| (segment.first_lsn..=segment.last_lsn).contains(&lsn);
    let Some(segment) = segments.iter().find(holds) else { return Ok(None) };
    let sent = records(local, vdi, segment).await?;
    let after = sent.partition_point(|record| record.first_lsn <= lsn);
    let time_ms = after.checked_sub(1).map_or(0, |at| sent[at].time_ms);
    Ok(Some(Point { lsn, time_ms }))
}

async fn first_record(local: &Local, header: &SegmentHeader) -> Result<Sent, CacheError> {
    let decode = |block: &[u8]| {
        let decoded = RecordHeader::decode(block, header.seq, header.nonce, 1);
        decoded.ok().map(|(record, _)| record)
    };
    let offset = local.geometry.segment_offset(header.segment) + BLOCK_SIZE as u64;
    let block = local.look(offset, BLOCK_SIZE, |block| decode(block).is_some()).await?;
    let record = decode(&block).ok_or_else(|| damaged(local, header, 1))?;
    Ok(Sent { time_ms: record.time_ms, first_lsn: record.first_lsn })
}

/// All records of a sealed segment, in their order.
async fn records(local: &Local, vdi: Uuid, segment: &Replay) -> Result<Vec<Sent>, CacheError> {
    let header = look_at_header(local, vdi, segment.id, segment.seq).await?;
    let offset = local.geometry.segment_offset(segment.id);
    let copies = local.read_each(offset, segment.used_blocks as usize * BLOCK_SIZE).await?;
    let mut sent = Vec::new();
    let mut position = 1;
    while position < segment.used_blocks {
        let records = copies.iter().map(|(_, copy)| {
            RecordHeader::decode(block_at(copy, position), header.seq, header.nonce, position)
        });
        let record = records.flatten().next();
        let (record, _) = record.ok_or_else(|| damaged(local, &header, position))?;
        sent.push(Sent { time_ms: record.time_ms, first_lsn: record.first_lsn });
        position += 1 + u32::from(record.payload_blocks);
    }
    Ok(sent)
}

fn damaged(local: &Local, header: &SegmentHeader, position: u32) -> CacheError {
    CacheError::Flush {
        vdi: header.vdi,
        why: format!(
            "the header of the record at block {position} of segment {} on {} is damaged",
            header.segment.0,
            local.path.display()
        ),
    }
}
