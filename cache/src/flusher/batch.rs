//! From sealed segments to one coalesced batch. Pure: payloads come in as bytes that were read before.
//!
//! Snapshots cut a batch into parts. What is overwritten within a part is left out, what is overwritten in a later one is
//! not. Of the snapshots that a schedule's cadence has cut only those cut it that their rule would keep once the log is in the store: to
//! make the others would be to delete them at once. Which these are the log alone says, so that a batch that is made again after a
//! crash has at most the cuts that it had, and never one with other content. A block of which a part has only some sectors becomes whole over what earlier parts made of it, or, if they did not
//! touch it, over the store's image: so each part can be applied to the result of the one before.

#[cfg(test)]
mod tests;

use crate::backing::{Batch, Change};
use crate::format::Geometry;
use crate::format::record::{Entries, Entry, Kind, WHOLE};
use crate::index::{
    Content, Found, Index, Patch, PatchBase, PatchSource, Patched, Slot, apply_zero,
};
use crate::pending::{LogCut, PendingSnapshot};
use blockstore::buf::AlignedBuf;
use blockstore::crc::crc32c;
use blockstore::sabotage::{self, Bug};
use blockstore::types::{BLOCK_SIZE, Lba, Lsn, SECTOR_SIZE};
use blockstore::{Cut, SnapshotLabel};
use bytes::Bytes;
use hashbrown::HashMap;

use crate::disk::plan::SegmentId;

/// A segment of the batch: what it holds and its bytes.
#[derive(Debug)]
pub struct Source {
    /// Which one.
    pub id: SegmentId,
    /// First LSN in it.
    pub first_lsn: Lsn,
    /// Its entries.
    pub entries: Vec<u8>,
    /// Its blocks from the first one on, as many as are in use.
    pub bytes: Bytes,
    /// The bytes never left memory, so their checksums need no second look.
    pub trusted: bool,
}

/// Most snapshots of a cadence in one batch: each costs the nodes from a leaf to the root, in memory too. Of more, as a flood of
/// discards may bring them, every second is made, or every third, and so on.
const CUTS_MADE_MAX: usize = 8192;

/// Snapshots that a batch is to have or may do without, besides those that people took in the log.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    /// Of what the log had gone beyond, in the order of their LSNs: those that lie in the batch are made.
    pub cuts: Vec<PendingSnapshot>,
    /// So many snapshots of a cadence are durable in the log behind the batch.
    pub newer: u64,
}

/// Why a batch could not be made. Nothing of it reached the store.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// An entry makes no sense although its summary's checksum holds.
    #[error("segment {segment} of the log holds an entry that makes no sense")]
    Entry { segment: u32 },
    /// A payload block does not match the checksum in its entry.
    #[error(
        "the log's only copy of block {lba} (segment {segment}, block {block}) is damaged: CRC32C expected {expected:#010x}, found {found:#010x}"
    )]
    Payload { lba: Lba, segment: u32, block: u32, expected: u32, found: u32 },
}

/// Sectors of a block (bit mask) and the block they come from at their place; none for zeros.
type Layer = (u8, Option<Bytes>);

/// A block that becomes whole over one of the store's: which of [`Draft::wanted`], and what lies over it.
type Merge = (Lba, usize, Vec<Layer>);

/// What changes up to a cut, or after the last.
#[derive(Debug, Default)]
struct Part {
    changes: Vec<Change>,
    merges: Vec<Merge>,
}

/// A batch but for the blocks whose base must first be read from the store.
#[derive(Debug, Default)]
pub struct Draft {
    /// Snapshots, each with what changes up to it; its own changes are not filled in yet.
    cuts: Vec<(Part, Cut)>,
    /// Those of them that a cadence has cut.
    made: Vec<LogCut>,
    last: Part,
    wanted: Vec<Lba>,
}

impl Draft {
    /// Coalesces the entries after `committed` of the segments, which are in log order, cut at the log's snapshots and at
    /// those that are asked for.
    pub fn new(
        geometry: &Geometry,
        committed: Lsn,
        sources: &[Source],
        asked: &Asked,
    ) -> Result<Self, BatchError> {
        let mut drafting = Drafting {
            geometry,
            by_segment: sources.iter().map(|s| (s.id, s)).collect(),
            places: HashMap::new(),
            part: Index::default(),
            before: None,
            draft: Self::default(),
        };
        let kept = kept_cuts(geometry, committed, sources, asked.newer)?;
        drafting.replay(committed, sources, &asked.cuts, &kept)?;
        drafting.draft.last = drafting.end_part()?;
        Ok(drafting.draft)
    }

    /// Its snapshots that a cadence has cut.
    pub fn take_made(&mut self) -> Vec<LogCut> {
        std::mem::take(&mut self.made)
    }

    /// Blocks of the store's image that are needed, each once.
    pub fn wanted(&self) -> &[Lba] {
        &self.wanted
    }

    /// The batch, given the store's content of the [`Self::wanted`] blocks, in their order (`None`: zeros).
    #[must_use]
    pub fn finish(self, lsn: Lsn, bases: &[Option<Bytes>]) -> Batch {
        assert_eq!(bases.len(), self.wanted.len(), "one base for each block that is wanted");
        let cuts = self.cuts.into_iter();
        let cuts = cuts.map(|(part, cut)| Cut { changes: part.finish(bases), ..cut });
        Batch { lsn, cuts: cuts.collect(), changes: self.last.finish(bases) }
    }
}

impl Part {
    /// All changes, in the order of their blocks.
    fn finish(mut self, bases: &[Option<Bytes>]) -> Vec<Change> {
        for (lba, base, layers) in &self.merges {
            self.changes.push(merged(*lba, bases[*base].as_ref(), layers));
        }
        self.changes.sort_unstable_by_key(|change| match change {
            Change::Write { lba, .. } | Change::Zero { lba, .. } => *lba,
        });
        self.changes
    }
}

/// A draft being made.
struct Drafting<'a> {
    geometry: &'a Geometry,
    by_segment: HashMap<SegmentId, &'a Source>,
    /// Where in the draft's wanted blocks each of them is.
    places: HashMap<Lba, usize>,
    /// What was replayed since the last cut.
    part: Index,
    /// Everything that was replayed, once there was a cut behind changes.
    before: Option<Index>,
    draft: Draft,
}

impl Drafting<'_> {
    /// Replays the segments' entries after `committed`, part by part.
    fn replay(
        &mut self,
        committed: Lsn,
        sources: &[Source],
        cuts: &[PendingSnapshot],
        kept: &[LogCut],
    ) -> Result<(), BatchError> {
        let mut kept = kept.iter().peekable();
        let mut cuts = cuts.iter().skip_while(|cut| cut.lsn <= committed).peekable();
        for source in sources {
            let first_slot = self.geometry.first_block(source.id);
            let blocks_held = (source.bytes.len() / BLOCK_SIZE) as u32;
            let mut lsn = Lsn(source.first_lsn.0 - 1);
            for entry in Entries::new(&source.entries, blocks_held) {
                let entry = entry.map_err(|_| BatchError::Entry { segment: source.id.0 })?;
                lsn = lsn.plus(entry.lsns());
                if entry.kind == Kind::Cut {
                    if let Some(cut) = kept.next_if(|cut| cut.lsn == lsn) {
                        self.cut_by_cadence(*cut)?;
                    }
                    continue;
                }
                if !entry.kind.takes_lsn() || lsn <= committed {
                    continue;
                }
                let asked = cuts.next_if(|cut| cut.lsn == lsn);
                if entry.kind == Kind::Snapshot {
                    self.cut(lsn, entry.time_ms(), entry.label())?;
                    continue;
                }
                apply(&mut self.part, &entry, lsn, first_slot);
                if let Some(before) = &mut self.before {
                    apply(before, &entry, lsn, first_slot);
                }
                if let Some(asked) = asked {
                    self.cut(lsn, asked.time_ms, asked.label.clone())?;
                }
            }
        }
        Ok(())
    }

    fn cut_by_cadence(&mut self, cut: LogCut) -> Result<(), BatchError> {
        if self.draft.cuts.last().is_some_and(|(_, last)| last.lsn >= cut.lsn) {
            // Somebody asked for the same.
            return Ok(());
        }
        let PendingSnapshot { lsn, time_ms, label } = cut.named();
        self.draft.made.push(cut);
        self.cut(lsn, time_ms, label)
    }

    fn cut(&mut self, lsn: Lsn, time_ms: u64, label: SnapshotLabel) -> Result<(), BatchError> {
        let part = self.end_part()?;
        let cut = Cut { changes: Vec::new(), lsn, time_ms, label };
        self.draft.cuts.push((part, cut));
        Ok(())
    }

    /// Turns what was replayed since the last cut into changes; the next part begins.
    fn end_part(&mut self) -> Result<Part, BatchError> {
        let mut part = Part::default();
        if self.part.is_empty() {
            return Ok(part);
        }
        let index = std::mem::take(&mut self.part);
        for (lba, content) in index.contents() {
            match content {
                Content::Zero { blocks } => part.changes.push(Change::Zero { lba, blocks }),
                Content::At { slot, crc } => {
                    let data = self.fetch(lba, slot, crc)?;
                    part.changes.push(Change::Write { lba, crc, data });
                }
                Content::Patched(patched) => {
                    // With what earlier parts have of the block below it.
                    let whole = match self.before.as_ref().map(|before| before.get(lba)) {
                        Some(Found::Patched(whole))
                            if patched.base() == PatchBase::Store
                                && !sabotage::on(Bug::ForgetEarlierPart) =>
                        {
                            whole
                        }
                        _ => patched,
                    };
                    let layers = self.layers(lba, whole)?;
                    match whole.base() {
                        PatchBase::Zero => part.changes.push(merged(lba, None, &layers)),
                        PatchBase::At { slot, crc } => {
                            let base = self.fetch(lba, slot, crc)?;
                            part.changes.push(merged(lba, Some(&base), &layers));
                        }
                        PatchBase::Store => {
                            let wanted = &mut self.draft.wanted;
                            let base = *self.places.entry(lba).or_insert_with(|| {
                                wanted.push(lba);
                                wanted.len() - 1
                            });
                            part.merges.push((lba, base, layers));
                        }
                    }
                }
            }
        }
        self.before.get_or_insert(index);
        Ok(part)
    }

    fn layers(&self, lba: Lba, patched: &Patched) -> Result<Vec<Layer>, BatchError> {
        let patches = patched.patches();
        let left_out = usize::from(sabotage::on(Bug::ForgetPatch) && patches.len() > 1);
        let layer = |patch: &Patch| {
            let bytes = match patch.source {
                PatchSource::At { slot, crc } => Some(self.fetch(lba, slot, crc)?),
                PatchSource::Zero => None,
            };
            Ok((patch.sectors, bytes))
        };
        patches[..patches.len() - left_out].iter().map(layer).collect()
    }

    /// A payload block, checked.
    fn fetch(&self, lba: Lba, slot: Slot, expected: u32) -> Result<Bytes, BatchError> {
        let id = self.geometry.segment_of(slot);
        let block = slot - self.geometry.first_block(id);
        let source = self.by_segment[&id];
        let at = block as usize * BLOCK_SIZE;
        let bytes = source.bytes.slice(at..at + BLOCK_SIZE);
        if !source.trusted {
            let found = crc32c(&bytes);
            if found != expected {
                let segment = id.0;
                return Err(BatchError::Payload { lba, segment, block, expected, found });
            }
        }
        Ok(bytes)
    }
}

/// The snapshots of a cadence that the batch is to have, in the order of their LSNs: those that their rules still keep when all that is
/// in the log, `newer` of them behind the batch, is in the store.
fn kept_cuts(
    geometry: &Geometry,
    committed: Lsn,
    sources: &[Source],
    newer: u64,
) -> Result<Vec<LogCut>, BatchError> {
    let mut cuts: Vec<LogCut> = Vec::new();
    for source in sources {
        let mut lsn = Lsn(source.first_lsn.0 - 1);
        for entry in Entries::new(&source.entries, geometry.segment_blocks()) {
            let entry = entry.map_err(|_| BatchError::Entry { segment: source.id.0 })?;
            lsn = lsn.plus(entry.lsns());
            let is_new = lsn > committed && cuts.last().is_none_or(|last| last.lsn < lsn);
            if let Some(cadence) = entry.cadence().filter(|_| is_new) {
                cuts.push(LogCut { lsn, time_ms: entry.time_ms(), cadence });
            }
        }
    }
    let count = cuts.len() as u64;
    let beyond = (1..).map(|n| newer + count - n);
    let mut kept: Vec<LogCut> = cuts
        .into_iter()
        .zip(beyond)
        .filter(|(cut, newer)| *newer < u64::from(cut.cadence.keep))
        .map(|(cut, _)| cut)
        .collect();
    let step = kept.len().div_ceil(CUTS_MADE_MAX).max(1);
    let phase = kept.len().wrapping_sub(1) % step;
    let mut at = 0;
    kept.retain(|_| {
        let stays = at % step == phase;
        at += 1;
        stays
    });
    Ok(kept)
}

/// Applies a write or a zeroing of the segment whose first block is at `first_slot`.
pub(crate) fn apply(index: &mut Index, entry: &Entry<'_>, lsn: Lsn, first_slot: Slot) {
    if entry.kind == Kind::Zero {
        let masks = (entry.first_mask, entry.last_mask);
        apply_zero(index, entry.lba, u64::from(entry.blocks), masks, lsn);
        return;
    }
    for n in 0..entry.blocks {
        let lba = Lba(entry.lba.0 + u64::from(n));
        let (slot, crc) = (first_slot + u32::from(entry.payload) + n, entry.crc(n));
        match entry.mask(n) {
            WHOLE => index.insert(lba, slot, crc),
            sectors => {
                let source = PatchSource::At { slot, crc };
                index.patch(lba, lsn, Patch { source, sectors });
            }
        }
    }
}

/// A block made of a base (zeros if none) and layers of sectors over it (zeros where a layer has no bytes).
fn merged(lba: Lba, base: Option<&Bytes>, layers: &[Layer]) -> Change {
    let mut block = match base {
        Some(base) => AlignedBuf::copy_of(base),
        None => AlignedBuf::zeroed(BLOCK_SIZE),
    };
    for (sectors, bytes) in layers {
        for sector in (0..8).filter(|n| sectors & (1 << n) != 0) {
            let range = sector * SECTOR_SIZE..(sector + 1) * SECTOR_SIZE;
            match bytes {
                Some(bytes) => block[range.clone()].copy_from_slice(&bytes[range]),
                None => block[range].fill(0),
            }
        }
    }
    let crc = crc32c(&block);
    Change::Write { lba, crc, data: block.freeze() }
}
