//! From sealed segments to one coalesced batch. Pure: payloads come in as bytes that were read before.

use crate::backing::{Batch, Change};
use crate::format::Geometry;
use crate::format::record::{Entries, Kind, WHOLE};
use crate::index::{Content, Index, Patch, PatchBase, PatchSource, Slot, apply_zero};
use blockstore::buf::AlignedBuf;
use blockstore::crc::crc32c;
use blockstore::sabotage::{self, Bug};
use blockstore::types::{BLOCK_SIZE, Lba, Lsn, SECTOR_SIZE};
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

/// A batch but for the blocks whose base must first be read from the store.
#[derive(Debug)]
pub struct Draft {
    changes: Vec<Change>,
    /// Patches over blocks of the store's image, by LBA.
    merges: Vec<(Lba, Vec<Layer>)>,
}

impl Draft {
    /// Coalesces the entries after `committed` of the segments, which are in log order.
    pub fn new(
        geometry: &Geometry,
        committed: Lsn,
        sources: &[Source],
    ) -> Result<Self, BatchError> {
        let index = coalesce(geometry, committed, sources)?;
        let by_segment: HashMap<SegmentId, &Source> = sources.iter().map(|s| (s.id, s)).collect();
        let fetch = |lba: Lba, slot: Slot, expected: u32| {
            let id = geometry.segment_of(slot);
            let block = slot - geometry.first_block(id);
            let source = by_segment[&id];
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
        };
        let mut draft = Self { changes: Vec::new(), merges: Vec::new() };
        for (lba, content) in index.contents() {
            match content {
                Content::Zero { blocks } => draft.changes.push(Change::Zero { lba, blocks }),
                Content::At { slot, crc } => {
                    let data = fetch(lba, slot, crc)?;
                    draft.changes.push(Change::Write { lba, crc, data });
                }
                Content::Patched(patched) => {
                    let mut layers = Vec::new();
                    let patches = patched.patches();
                    let left_out = usize::from(sabotage::on(Bug::ForgetPatch) && patches.len() > 1);
                    for patch in &patches[..patches.len() - left_out] {
                        let bytes = match patch.source {
                            PatchSource::At { slot, crc } => Some(fetch(lba, slot, crc)?),
                            PatchSource::Zero => None,
                        };
                        layers.push((patch.sectors, bytes));
                    }
                    match patched.base() {
                        PatchBase::Store => draft.merges.push((lba, layers)),
                        PatchBase::Zero => draft.changes.push(merged(lba, None, &layers)),
                        PatchBase::At { slot, crc } => {
                            let base = fetch(lba, slot, crc)?;
                            draft.changes.push(merged(lba, Some(&base), &layers));
                        }
                    }
                }
            }
        }
        Ok(draft)
    }

    /// Blocks whose base is the store's image.
    pub fn wanted(&self) -> impl Iterator<Item = Lba> {
        self.merges.iter().map(|(lba, _)| *lba)
    }

    /// The batch, given the store's content of the [`Self::wanted`] blocks, in their order (`None`: zeros).
    #[must_use]
    pub fn finish(mut self, lsn: Lsn, bases: &[Option<Bytes>]) -> Batch {
        assert_eq!(bases.len(), self.merges.len(), "one base for each block that wants one");
        for ((lba, layers), base) in self.merges.iter().zip(bases) {
            self.changes.push(merged(*lba, base.as_ref(), layers));
        }
        self.changes.sort_unstable_by_key(|change| match change {
            Change::Write { lba, .. } | Change::Zero { lba, .. } => *lba,
        });
        Batch::new(lsn, self.changes)
    }
}

/// Replays the segments' entries after `committed` into an index of their own.
fn coalesce(geometry: &Geometry, committed: Lsn, sources: &[Source]) -> Result<Index, BatchError> {
    let mut index = Index::default();
    for source in sources {
        let first_slot = geometry.first_block(source.id);
        let blocks_held = (source.bytes.len() / BLOCK_SIZE) as u32;
        let mut lsn = Lsn(source.first_lsn.0 - 1);
        for entry in Entries::new(&source.entries, blocks_held) {
            let entry = entry.map_err(|_| BatchError::Entry { segment: source.id.0 })?;
            lsn = lsn.plus(entry.lsns());
            if !entry.kind.takes_lsn() || lsn <= committed {
                continue;
            }
            if entry.kind == Kind::Zero {
                let masks = (entry.first_mask, entry.last_mask);
                apply_zero(&mut index, entry.lba, u64::from(entry.blocks), masks, lsn);
                continue;
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
    }
    Ok(index)
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
