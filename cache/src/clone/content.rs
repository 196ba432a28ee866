//! What the log of a disk holds of it as it was at an LSN, beyond what the store has.

use crate::aside;
use crate::error::CacheError;
use crate::flusher::{apply, look_at_header, read_whole};
use crate::format::record::{Entries, Kind, WHOLE, ZERO_BLOCKS_MAX};
use crate::index::{self, Index, PatchBase, PatchSource, Patched, Slot};
use crate::local::Local;
use crate::vdi::Undrained;
use blockstore::buf::AlignedBuf;
use blockstore::crc::crc32c;
use blockstore::sabotage::{self, Bug};
use blockstore::types::{BLOCK_SIZE, Lba, Lsn, SECTOR_SIZE};
use uuid::Uuid;

/// Blocks that are read at once at most.
const READ_BLOCKS: u32 = 256;

/// Something to be written to the clone's log.
#[derive(Debug)]
pub(crate) struct Piece {
    /// Fills have whole blocks, writes some sectors of one, zeros none.
    pub kind: Kind,
    /// First block.
    pub lba: Lba,
    /// How many.
    pub blocks: u32,
    /// Sectors that count, of a single block.
    pub sectors: u8,
    /// The blocks' bytes.
    pub data: Vec<u8>,
}

/// See the module. Sorted by where it lies on the device, but for patched blocks.
#[derive(Debug, Default)]
pub(crate) struct Content {
    whole: Vec<(Slot, Lba, u32)>,
    patched: Vec<(Lba, Patched)>,
    zeros: Vec<(Lba, u64)>,
    /// Runs of blocks that the store does not have.
    holes: Vec<(Lba, u64)>,
}

impl Content {
    /// Of the disk `vdi` as of `lsn`, from its log, which reaches at least that far.
    ///
    /// # Errors
    /// The local device's; a segment that is damaged, or not part of the log any more.
    pub async fn as_of(
        local: &Local,
        vdi: Uuid,
        log: &Undrained,
        lsn: Lsn,
    ) -> Result<Self, CacheError> {
        let damaged = |segment: u32| CacheError::Flush {
            vdi,
            why: format!("segment {segment} of its log holds an entry that makes no sense"),
        };
        let geometry = local.geometry;
        let mut index = Index::default();
        for segment in log.segments.iter().take_while(|segment| segment.first_lsn <= lsn) {
            let header = look_at_header(local, vdi, segment.id, segment.seq).await?;
            let found = read_whole(local, vdi, &header, segment.last_lsn).await?;
            let first_slot = geometry.first_block(segment.id);
            let mut at = Lsn(segment.first_lsn.0 - 1);
            for entry in Entries::new(&found.entries, geometry.segment_blocks()) {
                let entry = entry.map_err(|_| damaged(segment.id.0))?;
                at = at.plus(entry.lsns());
                if at > lsn && !sabotage::on(Bug::CloneBeyondSnapshot) {
                    break;
                }
                if entry.kind.takes_lsn() && entry.kind != Kind::Snapshot && at > log.committed {
                    apply(&mut index, &entry, at, first_slot);
                }
            }
        }
        aside::run(move || Self::of(&index)).await.map_err(|error| CacheError::Flush {
            vdi,
            why: format!("finding out what its log holds: {error}"),
        })
    }

    fn of(index: &Index) -> Self {
        let mut content = Self::default();
        for (lba, found) in index.contents() {
            match found {
                index::Content::At { slot, crc } => content.whole.push((slot, lba, crc)),
                index::Content::Patched(patched) => content.patched.push((lba, patched.clone())),
                index::Content::Zero { blocks } => content.zeros.push((lba, blocks)),
            }
        }
        content.whole.sort_unstable();
        content
    }

    /// And these blocks the store does not have: known when the log was sealed, or since, with the store before the snapshot. None of them
    /// was changed between that and then.
    #[must_use]
    pub fn with_holes(self, holes: Vec<(Lba, u64)>) -> Self {
        Self { holes, ..self }
    }

    /// Blocks that it takes in a log, with what describes them, at most.
    #[must_use]
    pub fn log_blocks(&self) -> u64 {
        let blocks = (self.whole.len() + self.patched.len()) as u64;
        // Headers and summaries hold at least 200 entries of a block, or 250 of zeros.
        let ranges = (self.zeros.len() + self.holes.len()) as u64;
        blocks + 2 * (blocks / 200 + ranges / 200) + 4
    }

    /// Its pieces, one after the other; none at the end.
    ///
    /// # Errors
    /// The local device's; a block that is damaged, or there no more.
    pub async fn next(
        &mut self,
        local: &Local,
        window: &mut Window,
    ) -> Result<Option<Piece>, CacheError> {
        for (kind, ranges) in [(Kind::Hole, &mut self.holes), (Kind::Zero, &mut self.zeros)] {
            let Some((lba, blocks)) = ranges.pop() else { continue };
            let now = blocks.min(ZERO_BLOCKS_MAX);
            if blocks > now {
                ranges.push((Lba(lba.0 + now), blocks - now));
            }
            let blocks = now as u32;
            let piece = Piece { kind, lba, blocks, sectors: WHOLE, data: Vec::new() };
            return Ok(Some(piece));
        }
        if let Some((lba, patched)) = self.patched.pop() {
            return merged(local, lba, &patched).await.map(Some);
        }
        window.next(local, &self.whole).await
    }
}

/// Whole blocks, read a run at a time.
#[derive(Debug, Default)]
pub(crate) struct Window {
    /// The next of the list that is not handed out.
    at: usize,
    /// What was read: the first slot and the bytes from there on.
    first: Slot,
    bytes: Option<AlignedBuf>,
}

impl Window {
    async fn next(
        &mut self,
        local: &Local,
        whole: &[(Slot, Lba, u32)],
    ) -> Result<Option<Piece>, CacheError> {
        let Some(&(slot, lba, _)) = whole.get(self.at) else { return Ok(None) };
        let held = self.bytes.as_ref().map_or(0, |bytes| (bytes.len() / BLOCK_SIZE) as u32);
        if !(self.first..self.first + held).contains(&slot) {
            let end = slot + READ_BLOCKS;
            let segment = local.geometry.segment_of(slot);
            let reached = whole[self.at..].iter().map(|(slot, ..)| *slot);
            let last = reached
                .take_while(|next| *next < end && local.geometry.segment_of(*next) == segment)
                .last();
            let blocks = last.map_or(1, |last| last - slot + 1);
            let offset = local.geometry.block_offset(slot);
            let len = blocks as usize * BLOCK_SIZE;
            self.bytes = Some(local.look(offset, len, |_| true).await?);
            self.first = slot;
        }
        let bytes = self.bytes.as_ref().expect("it was read");
        let until = self.first + (bytes.len() / BLOCK_SIZE) as u32;
        let mut data = Vec::new();
        let mut blocks = 0;
        // A run on the device and on the disk alike.
        while let Some(&(next, next_lba, crc)) = whole.get(self.at)
            && (next, next_lba.0) == (slot + blocks, lba.0 + u64::from(blocks))
            && next < until
        {
            let at = (next - self.first) as usize * BLOCK_SIZE;
            let block = &bytes[at..at + BLOCK_SIZE];
            if crc32c(block) == crc {
                data.extend_from_slice(block);
            } else {
                data.extend_from_slice(&read_block(local, next, crc).await?);
            }
            self.at += 1;
            blocks += 1;
        }
        Ok(Some(Piece { kind: Kind::Fill, lba, blocks, sectors: WHOLE, data }))
    }
}

/// A block of the log, checked, from whichever leg has it.
async fn read_block(local: &Local, slot: Slot, crc: u32) -> Result<AlignedBuf, CacheError> {
    let is_good = |bytes: &[u8]| crc32c(bytes) == crc;
    let bytes = local.look(local.geometry.block_offset(slot), BLOCK_SIZE, is_good).await?;
    if is_good(&bytes) {
        return Ok(bytes);
    }
    Err(CacheError::LogChanged {
        path: local.path.clone(),
        segment: local.geometry.segment_of(slot).0,
    })
}

/// A block with what lies over it; without its base, if only the store has that.
async fn merged(local: &Local, lba: Lba, patched: &Patched) -> Result<Piece, CacheError> {
    let mut sectors = 0;
    let mut data = match patched.base() {
        PatchBase::At { slot, crc } => {
            sectors = WHOLE;
            read_block(local, slot, crc).await?.to_vec()
        }
        PatchBase::Zero => {
            sectors = WHOLE;
            vec![0; BLOCK_SIZE]
        }
        PatchBase::Store => vec![0; BLOCK_SIZE],
    };
    for patch in patched.patches() {
        sectors |= patch.sectors;
        let layer = match patch.source {
            PatchSource::At { slot, crc } => Some(read_block(local, slot, crc).await?),
            PatchSource::Zero => None,
        };
        for sector in (0..8).filter(|n| patch.sectors & (1 << n) != 0) {
            let range = sector * SECTOR_SIZE..(sector + 1) * SECTOR_SIZE;
            match &layer {
                Some(layer) => data[range.clone()].copy_from_slice(&layer[range]),
                None => data[range].fill(0),
            }
        }
    }
    let kind = if sectors == WHOLE { Kind::Fill } else { Kind::Write };
    Ok(Piece { kind, lba, blocks: 1, sectors, data })
}
