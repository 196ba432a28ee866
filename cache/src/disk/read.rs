//! Planning reads: where each block of a request lies right now.

use super::Disk;
use super::plan::{BlockSource, Overlay, PatchedBlock, Piece, ReadPlan, SegmentId};
use crate::index::{Found, PatchBase, PatchSource, Patched, Slot};
use blockstore::types::{BLOCK_SIZE, Lba, SECTORS_PER_BLOCK};

impl Disk {
    /// Plans a read of `sectors` sectors at `sector` into `plan` (cleared first) and pins what it names.
    pub fn read(&mut self, sector: u64, sectors: u64, plan: &mut ReadPlan) {
        plan.clear();
        let first = sector / SECTORS_PER_BLOCK;
        let end = (sector + sectors).div_ceil(SECTORS_PER_BLOCK);
        plan.lba = Lba(first);
        plan.blocks = (end - first) as u32;
        if let Some(recorder) = &mut self.recorder {
            recorder.read(plan.lba, end - first);
        }
        for block in 0..plan.blocks {
            let lba = Lba(first + u64::from(block));
            let mut crc = 0;
            // With no leg left the store is asked, which answers when it has everything.
            let found = if self.log.is_held() { Found::Absent } else { self.index.get(lba) };
            match found {
                Found::At { slot, crc: found } => {
                    crc = found;
                    let source = self.source(slot, found);
                    add_whole(plan, block, source);
                }
                Found::Zero => add_whole(plan, block, BlockSource::Zero),
                Found::Absent => add_whole(plan, block, BlockSource::Miss),
                Found::Patched(patched) => {
                    let patched = Box::new(self.patched_block(patched));
                    plan.pieces.push(Piece::Patched { block, patched });
                }
            }
            plan.crcs.push(crc);
        }
        self.pin(plan);
    }

    /// Gives back the pins of a plan whose local I/O is finished.
    pub fn release(&mut self, plan: &mut ReadPlan) {
        for id in plan.pins.drain(..) {
            self.unpin(id);
        }
    }

    pub(super) fn unpin(&mut self, id: SegmentId) {
        let Some(sealed) = self.sealed.get_mut(&id) else { return };
        sealed.pins -= 1;
        if sealed.pins == 0 && sealed.evicting {
            self.evicted(id);
        }
    }

    /// Pins each sealed segment that the plan reads from the device.
    fn pin(&mut self, plan: &mut ReadPlan) {
        let geometry = &self.geometry;
        let sealed = &mut self.sealed;
        let pins = &mut plan.pins;
        let mut pin = |offset: u64| {
            let id = geometry.segment_of(geometry.block_at(offset));
            // Runs are contiguous inside one segment: headers and summaries lie between segments' data.
            if let Some(sealed) = sealed.get_mut(&id) {
                sealed.pins += 1;
                pins.push(id);
            }
        };
        for piece in &plan.pieces {
            match piece {
                Piece::Local { offset, .. } => pin(*offset),
                Piece::Patched { patched, .. } => {
                    let overlays = patched.overlays.iter().map(|overlay| &overlay.source);
                    for source in overlays.chain([&patched.base]) {
                        if let BlockSource::Local { offset, .. } = source {
                            pin(*offset);
                        }
                    }
                }
                _ => {}
            }
        }
    }

    /// A block of a segment that is not sealed yet may still be on its way to the device: it is read from memory.
    fn source(&self, slot: Slot, crc: u32) -> BlockSource {
        let blocks = self.geometry.segment_blocks();
        for (id, image) in self.log.live_images() {
            let first = self.geometry.first_block(id);
            if slot >= first && slot - first < blocks {
                let start = (slot - first) as usize * BLOCK_SIZE;
                return BlockSource::Memory { image: std::sync::Arc::clone(image), start };
            }
        }
        BlockSource::Local { offset: self.geometry.block_offset(slot), crc }
    }

    fn patched_block(&self, patched: &Patched) -> PatchedBlock {
        let base = match patched.base() {
            PatchBase::At { slot, crc } => self.source(slot, crc),
            PatchBase::Zero => BlockSource::Zero,
            PatchBase::Store => BlockSource::Miss,
        };
        let overlays = patched.patches().iter().map(|patch| Overlay {
            source: match patch.source {
                PatchSource::At { slot, crc } => self.source(slot, crc),
                PatchSource::Zero => BlockSource::Zero,
            },
            sectors: patch.sectors,
        });
        PatchedBlock { base, overlays: overlays.collect() }
    }
}

/// Adds a whole block to the plan, joining it to the piece before where the two are one run.
fn add_whole(plan: &mut ReadPlan, block: u32, source: BlockSource) {
    const BLOCK: u64 = BLOCK_SIZE as u64;
    match (plan.pieces.last_mut(), &source) {
        (Some(Piece::Local { blocks, offset, .. }), BlockSource::Local { offset: next, .. })
            if *offset + u64::from(*blocks) * BLOCK == *next =>
        {
            *blocks += 1;
        }
        (
            Some(Piece::Memory { blocks, image, start, .. }),
            BlockSource::Memory { image: next, start: at },
        ) if std::sync::Arc::ptr_eq(image, next)
            && *start + *blocks as usize * BLOCK_SIZE == *at =>
        {
            *blocks += 1;
        }
        (Some(Piece::Zero { blocks, .. }), BlockSource::Zero)
        | (Some(Piece::Miss { blocks, .. }), BlockSource::Miss) => *blocks += 1,
        (_, source) => plan.pieces.push(match source {
            BlockSource::Local { offset, .. } => Piece::Local { block, blocks: 1, offset: *offset },
            BlockSource::Memory { image, start } => {
                Piece::Memory { block, blocks: 1, image: image.clone(), start: *start }
            }
            BlockSource::Zero => Piece::Zero { block, blocks: 1 },
            BlockSource::Miss => Piece::Miss { block, blocks: 1 },
        }),
    }
}
