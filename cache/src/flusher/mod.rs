//! Replays sealed segments to the store: batch (pure), pace (pure), and the reading between them.

mod batch;
mod pace;

pub(crate) use batch::apply;
pub use batch::{Asked, BatchError, Draft, Source};
pub use pace::{FlushOptions, Situation, pause_after, should_start};

use crate::aside;
use crate::backing::{Backing, BackingError};
use crate::disk::plan::SegmentId;
use crate::error::CacheError;
use crate::format::record::{Entries, Kind};
use crate::format::segment::SegmentHeader;
use crate::format::summary::Summary;
use crate::image::SegmentImage;
use crate::local::Local;
use crate::pending::LogCut;
use crate::recovery::Found;
use blockstore::types::{BLOCK_SIZE, Lba, Lsn};
use futures_util::{StreamExt, TryStreamExt};
use std::sync::Arc;
use std::time::Instant;
use uuid::Uuid;

/// Segments read at once.
const READ_AHEAD: usize = 8;

/// A sealed segment to be replayed.
#[derive(Clone, Debug)]
pub struct Replay {
    /// Which one.
    pub id: SegmentId,
    /// Its sequence number.
    pub seq: u64,
    /// First LSN in it.
    pub first_lsn: Lsn,
    /// Last LSN in it.
    pub last_lsn: Lsn,
    /// Blocks in use by header and records.
    pub used_blocks: u32,
    /// Its bytes, if they are still in memory.
    pub image: Option<Arc<SegmentImage>>,
}

/// Why a commit failed for good.
#[derive(Debug, thiserror::Error)]
pub enum FlushError {
    /// The local device.
    #[error(transparent)]
    Local(#[from] CacheError),
    /// The log's content.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// The store.
    #[error(transparent)]
    Backing(#[from] BackingError),
}

/// A batch that needs but the store: everything local was read and coalesced.
#[derive(Debug)]
pub struct Drafted {
    /// The cut.
    pub lsn: Lsn,
    draft: Draft,
}

/// A batch that the store has.
#[derive(Debug)]
pub struct Committed {
    /// What its durable image has reached.
    pub lsn: Lsn,
    /// Snapshots that a cadence had cut and that were made.
    pub made: Vec<LogCut>,
}

/// Reads and coalesces what comes after `committed` in `segments`, which follow each other without a gap (at least one).
/// Besides the snapshots that the log holds it makes those of `asked` that lie in it.
pub async fn draft(
    local: &Local,
    vdi: Uuid,
    committed: Lsn,
    segments: Vec<Replay>,
    asked: Asked,
) -> Result<Drafted, FlushError> {
    let started = Instant::now();
    let lsn = segments.last().map_or(committed, |segment| segment.last_lsn);
    let count = segments.len();
    let sources: Vec<Source> = futures_util::stream::iter(segments)
        .map(|segment| read_source(local, vdi, segment))
        .buffered(READ_AHEAD)
        .try_collect()
        .await?;
    let geometry = local.geometry;
    let read_ms = started.elapsed().as_millis() as u64;
    // Coalescing a large batch takes milliseconds of pure computing: not on the threads that serve everyone.
    let draft = aside::run(move || Draft::new(&geometry, committed, &sources, &asked))
        .await
        .map_err(|error| BackingError::Failed(format!("coalescing a batch: {error}")))??;
    let total_ms = started.elapsed().as_millis() as u64;
    tracing::debug!(%vdi, lsn = lsn.0, segments = count, read_ms, total_ms, "batch drafted");
    Ok(Drafted { lsn, draft })
}

/// Commits a draft to the store.
pub async fn commit(
    vdi: Uuid,
    backing: &dyn Backing,
    drafted: Drafted,
) -> Result<Committed, FlushError> {
    let started = Instant::now();
    let Drafted { lsn, mut draft } = drafted;
    let made = draft.take_made();
    let mut bases = Vec::new();
    for &lba in draft.wanted() {
        bases.extend(backing.read(lba, 1).await?);
    }
    let batch = draft.finish(lsn, &bases);
    let (changes, cuts) = (batch.changes.len(), batch.cuts.len());
    backing.commit(batch).await?;
    let ms = started.elapsed().as_millis() as u64;
    tracing::debug!(%vdi, lsn = lsn.0, changes, cuts, ms, "batch committed");
    Ok(Committed { lsn, made })
}

/// The blocks that a segment's entries name.
#[derive(Debug, Default)]
pub struct Named {
    /// Those with a place in it.
    pub lbas: Vec<Lba>,
    /// Ranges of zeros.
    pub zeros: Vec<(Lba, u32)>,
}

/// The blocks that a segment's entries name, for evicting it.
pub async fn lbas_of(
    local: &Local,
    vdi: Uuid,
    id: SegmentId,
    seq: u64,
    last_lsn: Lsn,
) -> Result<Named, CacheError> {
    let header = read_header(local, vdi, id, seq).await?;
    let found = read_whole(local, vdi, &header, last_lsn).await?;
    let mut named = Named::default();
    for entry in Entries::new(&found.entries, local.geometry.segment_blocks()).flatten() {
        if matches!(entry.kind, Kind::Snapshot | Kind::Cut) {
            continue;
        }
        if entry.payload_blocks() > 0 {
            named.lbas.extend((0..entry.blocks).map(|n| Lba(entry.lba.0 + u64::from(n))));
        } else {
            named.zeros.push((entry.lba, entry.blocks));
        }
    }
    Ok(named)
}

async fn read_source(local: &Local, vdi: Uuid, segment: Replay) -> Result<Source, FlushError> {
    let geometry = &local.geometry;
    let used = segment.used_blocks as usize * BLOCK_SIZE;
    if let Some(image) = &segment.image {
        let size = geometry.segment_size as usize;
        let header =
            SegmentHeader::decode(image.bytes(0, BLOCK_SIZE), local.cache_uuid(), segment.id);
        if let Ok(header) = header
            && let Ok(summary) = Summary::decode(image.bytes(0, size), header.seq, header.nonce)
        {
            return Ok(Source {
                id: segment.id,
                first_lsn: segment.first_lsn,
                entries: summary.entries,
                bytes: image.slice(0, used),
                trusted: true,
            });
        }
    }
    let header = read_header(local, vdi, segment.id, segment.seq).await?;
    let found = read_whole(local, vdi, &header, segment.last_lsn).await?;
    let bytes = crate::recovery::read_payloads(local, &header, segment.used_blocks, &found.entries);
    let bytes = bytes.await?.freeze();
    Ok(Source {
        id: segment.id,
        first_lsn: segment.first_lsn,
        entries: found.entries,
        bytes,
        trusted: false,
    })
}

/// What stands in a sealed segment that must reach up to `last_lsn`. If its summary is damaged and so is a record, the
/// records before it must not be taken for the whole.
pub(crate) async fn read_whole(
    local: &Local,
    vdi: Uuid,
    header: &SegmentHeader,
    last_lsn: Lsn,
) -> Result<Found, CacheError> {
    let found = crate::recovery::read_segment(local, header).await?;
    if found.last_lsn == last_lsn {
        return Ok(found);
    }
    Err(CacheError::Flush {
        vdi,
        why: format!(
            "segment {} of the log on {} is damaged: it should hold records up to LSN {last_lsn}, the good ones end at LSN {}",
            header.segment.0,
            local.path.display(),
            found.last_lsn
        ),
    })
}

/// The header of a segment of the log of `vdi`.
pub(crate) async fn read_header(
    local: &Local,
    vdi: Uuid,
    id: SegmentId,
    seq: u64,
) -> Result<SegmentHeader, CacheError> {
    let is_it = |block: &[u8]| decode_header(local, vdi, id, seq, block).is_ok();
    let block = local.read_good(local.geometry.segment_offset(id), BLOCK_SIZE, is_it).await?;
    decode_header(local, vdi, id, seq, &block)
}

/// As [`read_header`], for who is not in the way of the segment's eviction.
pub(crate) async fn look_at_header(
    local: &Local,
    vdi: Uuid,
    id: SegmentId,
    seq: u64,
) -> Result<SegmentHeader, CacheError> {
    let is_it = |block: &[u8]| decode_header(local, vdi, id, seq, block).is_ok();
    let block = local.look(local.geometry.segment_offset(id), BLOCK_SIZE, is_it).await?;
    decode_header(local, vdi, id, seq, &block)
}

fn decode_header(
    local: &Local,
    vdi: Uuid,
    id: SegmentId,
    seq: u64,
    block: &[u8],
) -> Result<SegmentHeader, CacheError> {
    let header = SegmentHeader::decode(block, local.cache_uuid(), id).ok();
    header.filter(|header| header.vdi == vdi && header.seq == seq).ok_or_else(|| {
        let path = local.path.display();
        CacheError::Flush {
            vdi,
            why: format!("the header of segment {} on {path} is damaged", id.0),
        }
    })
}
