//! The log that a clone begins with: sealed segments, written and flushed before anything says that they are a log.

use super::content::{Content, Piece, Window};
use crate::disk::Identity;
use crate::disk::plan::SegmentId;
use crate::error::CacheError;
use crate::format::record::{
    DESCRIPTOR_LEN, ENTRIES_MAX, HEADER_LEN, PAYLOAD_BLOCKS_MAX, RecordHeader, entry_len,
    push_descriptor,
};
use crate::format::segment::SegmentHeader;
use crate::format::summary::{Summary, blocks_for};
use crate::link::Grant;
use crate::log_open::Ground;
use blockstore::buf::AlignedBuf;
use blockstore::crc::crc32c;
use blockstore::io::now_ms;
use blockstore::types::{BLOCK_SIZE, Lba, Lsn};
use std::time::Duration;

/// For so long a segment is waited for that has to be evicted first, in steps of so long.
const ATTEMPTS: u32 = 500;
const ATTEMPT_AFTER: Duration = Duration::from_millis(20);

/// The segments of a log that nothing names yet; given back when dropped, unless they were kept.
#[derive(Debug)]
pub(crate) struct Written {
    ground: Ground,
    taken: Vec<SegmentId>,
    /// In the order of their sequence.
    pub headers: Vec<SegmentHeader>,
    /// The last LSN in it.
    pub last_lsn: Lsn,
}

impl Written {
    /// A slot names them now.
    pub fn keep(mut self) -> Vec<SegmentHeader> {
        self.taken.clear();
        std::mem::take(&mut self.headers)
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        for id in self.taken.drain(..) {
            self.ground.pool.release(id, false);
        }
    }
}

/// Writes a log that begins with `content`, durably.
///
/// # Errors
/// [`CacheError::NoSegments`]; the local device's; what was to be copied is not there any more.
pub(crate) async fn write(
    ground: &Ground,
    identity: Identity,
    mut content: Content,
) -> Result<Written, CacheError> {
    let written = Written {
        ground: ground.clone(),
        taken: Vec::new(),
        headers: Vec::new(),
        last_lsn: Lsn(0),
    };
    let mut writer = Writer { identity, written, open: None, summaries: Vec::new() };
    let mut window = Window::default();
    while let Some(piece) = content.next(&ground.local, &mut window).await? {
        writer.append(piece).await?;
    }
    writer.finish().await
}

struct Writer {
    identity: Identity,
    written: Written,
    open: Option<Open>,
    /// Of the segments that are full: to be written when these are flushed (rule L4).
    summaries: Vec<(Grant, Summary)>,
}

/// A segment being filled.
struct Open {
    grant: Grant,
    first_lsn: Lsn,
    image: AlignedBuf,
    used: u32,
    entries: Vec<u8>,
    record: Option<Record>,
}

/// The record that is being put together; its payload lies behind it.
struct Record {
    position: u32,
    first_lsn: Lsn,
    payload_blocks: u32,
    entries: Vec<u8>,
}

impl Open {
    /// Blocks of a piece that fit, without its payload one; whether they need another record. None: the segment is full.
    fn room(&self, blocks: u32, has_payload: bool) -> Option<(u32, bool)> {
        let total = (self.image.len() / BLOCK_SIZE) as u32;
        let fits = |payload: u32, anew: bool| {
            let used = self.used + u32::from(anew) + payload;
            used + blocks_for(self.entries.len() + entry_len(payload)) <= total
        };
        if !has_payload {
            let anew =
                self.record.as_ref().is_none_or(|r| r.entries.len() + DESCRIPTOR_LEN > ENTRIES_MAX);
            return fits(0, anew).then_some((blocks, anew));
        }
        if let Some(record) = &self.record {
            let of_entries =
                (ENTRIES_MAX - record.entries.len()).saturating_sub(DESCRIPTOR_LEN) / 4;
            let most = blocks.min(PAYLOAD_BLOCKS_MAX - record.payload_blocks);
            let most = most.min(of_entries as u32);
            if let Some(n) = (1..=most).rev().find(|n| fits(*n, false)) {
                return Some((n, false));
            }
        }
        let most = blocks.min(PAYLOAD_BLOCKS_MAX);
        (1..=most).rev().find(|n| fits(*n, true)).map(|n| (n, true))
    }

    fn close_record(&mut self) {
        let Some(record) = self.record.take() else { return };
        let header = RecordHeader {
            seq: self.grant.seq,
            first_lsn: record.first_lsn,
            flushed: Lsn(0),
            position: record.position as u16,
            payload_blocks: record.payload_blocks as u16,
            epoch: CLONE_EPOCH,
            entries_len: record.entries.len() as u16,
            time_ms: now_ms(),
        };
        debug_assert!(HEADER_LEN + record.entries.len() <= BLOCK_SIZE);
        let at = record.position as usize * BLOCK_SIZE;
        let block = &mut self.image[at..at + BLOCK_SIZE];
        header.encode_into(block, &record.entries, self.grant.nonce);
    }
}

/// The epoch of what a clone begins with: that of a log that was never recovered.
pub(crate) const CLONE_EPOCH: u32 = 1;

impl Writer {
    async fn append(&mut self, piece: Piece) -> Result<(), CacheError> {
        let has_payload = piece.kind.has_payload();
        let mut done = 0;
        while done < piece.blocks {
            let left = piece.blocks - done;
            let room = self.open.as_ref().and_then(|open| open.room(left, has_payload));
            let Some((blocks, anew)) = room else {
                self.close().await?;
                self.open = Some(self.begin().await?);
                continue;
            };
            let Some(open) = &mut self.open else { unreachable!("it has room") };
            if anew {
                open.close_record();
                open.record = Some(Record {
                    position: open.used,
                    first_lsn: self.written.last_lsn.plus(1),
                    payload_blocks: 0,
                    entries: Vec::new(),
                });
                open.used += 1;
            }
            let Some(record) = &mut open.record else { unreachable!("it was begun") };
            let from = record.entries.len();
            let masks = (piece.sectors, piece.sectors);
            let lba = Lba(piece.lba.0 + u64::from(done));
            let payload = if has_payload { open.used as u16 } else { 0 };
            push_descriptor(&mut record.entries, piece.kind, lba, blocks, payload, masks);
            if has_payload {
                let bytes =
                    &piece.data[done as usize * BLOCK_SIZE..][..blocks as usize * BLOCK_SIZE];
                for block in bytes.chunks_exact(BLOCK_SIZE) {
                    record.entries.extend(crc32c(block).to_le_bytes());
                }
                let at = open.used as usize * BLOCK_SIZE;
                open.image[at..at + bytes.len()].copy_from_slice(bytes);
                open.used += blocks;
                record.payload_blocks += blocks;
            }
            open.entries.extend_from_slice(&record.entries[from..]);
            if piece.kind.takes_lsn() {
                self.written.last_lsn = self.written.last_lsn.plus(1);
            }
            done += blocks;
        }
        Ok(())
    }

    /// The next segment.
    async fn begin(&mut self) -> Result<Open, CacheError> {
        let Ground { local, pool, .. } = &self.written.ground;
        let mut granted = None;
        for _ in 0..ATTEMPTS {
            let no_room = |_| CacheError::NoSegments { free: pool.counts().free };
            granted = pool.grant_to_new(self.identity.vdi).map_err(no_room)?;
            if granted.is_some() {
                break;
            }
            tokio::time::sleep(ATTEMPT_AFTER).await;
        }
        let grant = granted.ok_or(CacheError::NoSegments { free: pool.counts().free })?;
        let mut image = AlignedBuf::zeroed(local.geometry.segment_size as usize);
        let first_lsn = self.written.last_lsn.plus(1);
        let header = SegmentHeader {
            cache: local.cache_uuid(),
            vdi: self.identity.vdi,
            log_id: self.identity.log_id,
            seq: grant.seq,
            nonce: grant.nonce,
            first_lsn,
            segment: grant.id,
            epoch: CLONE_EPOCH,
        };
        header.encode_into(&mut image[..BLOCK_SIZE]);
        self.written.taken.push(grant.id);
        self.written.headers.push(header);
        Ok(Open { grant, first_lsn, image, used: 1, entries: Vec::new(), record: None })
    }

    /// Writes the segment that is full.
    async fn close(&mut self) -> Result<(), CacheError> {
        let Some(mut open) = self.open.take() else { return Ok(()) };
        open.close_record();
        let local = &self.written.ground.local;
        let offset = local.geometry.segment_offset(open.grant.id);
        let used = &open.image[..open.used as usize * BLOCK_SIZE];
        local.write(offset, AlignedBuf::copy_of(used)).await?;
        let summary = Summary {
            seq: open.grant.seq,
            first_lsn: open.first_lsn,
            last_lsn: self.written.last_lsn,
            flushed: self.written.last_lsn,
            used_blocks: open.used,
            entries: open.entries,
        };
        self.summaries.push((open.grant, summary));
        Ok(())
    }

    async fn finish(mut self) -> Result<Written, CacheError> {
        self.close().await?;
        let local = &self.written.ground.local;
        local.flush().await?;
        for (grant, summary) in &self.summaries {
            let blocks = blocks_for(summary.entries.len());
            let mut bytes = AlignedBuf::zeroed(blocks as usize * BLOCK_SIZE);
            summary.encode_into(&mut bytes, grant.nonce);
            let end = local.geometry.segment_offset(grant.id) + local.geometry.segment_size;
            local.write(end - bytes.len() as u64, bytes).await?;
        }
        local.flush().await?;
        Ok(self.written)
    }
}
