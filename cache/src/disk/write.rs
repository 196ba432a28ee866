//! Staging writes and zeroings: splitting at block bounds, copying, checksums, index.

use super::{Disk, Staged, Tag, image_offset};
use crate::format::record::{Kind, WHOLE, ZERO_BLOCKS_MAX};
use crate::index::{Patch, PatchSource};
use blockstore::crc::crc32c;
use blockstore::sabotage::{self, Bug};
use blockstore::types::{BLOCK_SIZE, Lba, SECTOR_SIZE, SECTORS_PER_BLOCK};
use smallvec::SmallVec;

impl Disk {
    /// Stages a guest write of `len` bytes (multiple of 512) at `sector`. `copy(offset, dst)` must fill
    /// `dst` with the request's bytes from `offset` on; it is called once for each byte.
    pub fn write(
        &mut self,
        tag: Tag,
        sector: u64,
        len: usize,
        copy: &mut dyn FnMut(usize, &mut [u8]),
    ) -> Staged {
        assert!(len.is_multiple_of(SECTOR_SIZE), "writes are whole sectors");
        if self.log.has_failed() {
            return Staged::Failed;
        }
        let end = sector + (len / SECTOR_SIZE) as u64;
        let mut at = sector;
        while at < end {
            let first = at / SECTORS_PER_BLOCK;
            let wanted = end.div_ceil(SECTORS_PER_BLOCK) - first;
            let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
            let Some(room) = self.log.room(wanted) else {
                self.log.after_request(false);
                return Staged::Part((at - sector) as usize * SECTOR_SIZE);
            };
            let upto = end.min((first + u64::from(room.blocks)) * SECTORS_PER_BLOCK);
            let masks = masks(at, upto);
            let crcs = self.copy_in(at, upto, room, (at - sector) as usize * SECTOR_SIZE, copy);
            let slot = self.log.first_block() + room.position;
            let lsn = self.log.push(Kind::Write, Lba(first), room.blocks, masks, room, &crcs);
            // In write-through it can be read when the store has it.
            let kept = if self.log.is_through() { &[][..] } else { &crcs[..] };
            for (index, &crc) in kept.iter().enumerate() {
                let lba = Lba(first + index as u64);
                let slot = slot + index as u32;
                let sectors = mask_of(index, crcs.len(), masks);
                if sectors == WHOLE {
                    self.index.insert(lba, slot, crc);
                } else {
                    let source = PatchSource::At { slot, crc };
                    self.index.patch(lba, lsn, Patch { source, sectors });
                }
            }
            at = upto;
            self.log.inside_request();
        }
        self.log.after_request(len > 0);
        self.log.note_write();
        self.finish_or_complete(tag, len > 0);
        Staged::All
    }

    /// Stages WRITE_ZEROES or DISCARD of `sectors` sectors: both read as zeros afterwards. Partial blocks of a
    /// discard (`discard` true) are left alone, those of a zeroing are zeroed.
    pub fn zero(&mut self, tag: Tag, sector: u64, sectors: u64, discard: bool) -> Staged {
        if self.log.has_failed() {
            return Staged::Failed;
        }
        let (mut at, mut end) = (sector, sector + sectors);
        if discard {
            at = at.next_multiple_of(SECTORS_PER_BLOCK);
            end = end / SECTORS_PER_BLOCK * SECTORS_PER_BLOCK;
        }
        let staged_any = at < end;
        while at < end {
            let Some(room) = self.log.room(0) else {
                self.log.after_request(false);
                return Staged::Part((at - sector) as usize * SECTOR_SIZE);
            };
            let first = at / SECTORS_PER_BLOCK;
            let upto = end.min((first + ZERO_BLOCKS_MAX) * SECTORS_PER_BLOCK);
            let blocks = upto.div_ceil(SECTORS_PER_BLOCK) - first;
            let masks = masks(at, upto);
            let lsn = self.log.push(Kind::Zero, Lba(first), blocks as u32, masks, room, &[]);
            if !self.log.is_through() {
                crate::index::apply_zero(&mut self.index, Lba(first), blocks, masks, lsn);
            }
            at = upto;
            self.log.inside_request();
        }
        self.log.after_request(staged_any);
        self.log.note_write();
        self.finish_or_complete(tag, staged_any);
        Staged::All
    }

    /// Offers a fetched, verified block for keeping; `planned` is the value of [`Self::fill_ticket`] from when the read
    /// was planned, so that a block overwritten since is not kept. Keeps it only where a segment is at hand: guest writes
    /// come first.
    pub fn fill(&mut self, lba: Lba, data: &[u8], planned: u64) {
        let stale = planned != self.removals && !sabotage::on(Bug::StaleFill);
        if stale || self.log.has_failed() || !self.log.has_spare() {
            return;
        }
        if !matches!(self.index.get(lba), crate::index::Found::Absent) {
            return;
        }
        let Some(room) = self.log.room(1) else { return };
        let image = self.log.image().expect("room was found in the open segment");
        // SAFETY: the log owns the segment and just found this room to be unused.
        let dst = unsafe { image.writable(image_offset(room.position), BLOCK_SIZE) };
        dst.copy_from_slice(data);
        let crc = crc32c(dst);
        let slot = self.log.first_block() + room.position;
        self.log.push(Kind::Fill, lba, 1, (WHOLE, WHOLE), room, &[crc]);
        self.index.insert(lba, slot, crc);
    }

    /// Rises whenever something left the index, see [`Self::fill`].
    #[must_use]
    pub fn fill_ticket(&self) -> u64 {
        self.removals
    }

    fn finish_or_complete(&mut self, tag: Tag, staged: bool) {
        if staged {
            self.log.finish(tag);
        } else {
            self.log.complete_now(tag, true);
        }
    }

    /// Copies sectors `at..upto` of the request into the room and returns the CRC of each block.
    fn copy_in(
        &self,
        at: u64,
        upto: u64,
        room: super::log::Room,
        offset: usize,
        copy: &mut dyn FnMut(usize, &mut [u8]),
    ) -> SmallVec<[u32; 32]> {
        let image = self.log.image().expect("room was found in the open segment");
        let len = image_offset(room.blocks);
        // SAFETY: the log owns the segment and just found this room to be unused.
        let dst = unsafe { image.writable(image_offset(room.position), len) };
        let head = (at % SECTORS_PER_BLOCK) as usize * SECTOR_SIZE;
        let bytes = (upto - at) as usize * SECTOR_SIZE;
        // Images are recycled: what the write does not cover must not carry another disk's bytes.
        dst[..head].fill(0);
        dst[head + bytes..].fill(0);
        copy(offset, &mut dst[head..head + bytes]);
        dst.chunks_exact(BLOCK_SIZE).map(crc32c).collect()
    }
}

/// Sectors that count in the first and in the last block of `at..upto`; the same for a single block.
fn masks(at: u64, upto: u64) -> (u8, u8) {
    let first = WHOLE << (at % SECTORS_PER_BLOCK);
    let tail = upto % SECTORS_PER_BLOCK;
    let last = if tail == 0 { WHOLE } else { (1 << tail) - 1 };
    if at / SECTORS_PER_BLOCK == (upto - 1) / SECTORS_PER_BLOCK {
        (first & last, first & last)
    } else {
        (first, last)
    }
}

/// Sectors that count in block `index` of `blocks`.
fn mask_of(index: usize, blocks: usize, masks: (u8, u8)) -> u8 {
    if index == 0 {
        masks.0
    } else if index + 1 == blocks {
        masks.1
    } else {
        WHOLE
    }
}
