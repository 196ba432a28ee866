//! Keeping what was fetched from the store ahead of need: blocks as fills, ranges that the store does not have as holes.
//!
//! What is kept is never newer than what a guest wrote (rule L7): only blocks of which nothing is known are taken, and
//! only if nothing left the index since they were planned, which is before they were fetched. It takes room only where a
//! segment is to spare: guest writes come first.

use super::{Disk, image_offset};
use crate::format::record::{Kind, PAYLOAD_BLOCKS_MAX, WHOLE};
use crate::index::Found;
use crate::link::{Fetched, FromDisk, Kept};
use blockstore::crc::crc32c;
use blockstore::sabotage::{self, Bug};
use blockstore::types::{BLOCK_SIZE, Lba};
use bytes::Bytes;
use smallvec::SmallVec;

impl Disk {
    /// Seals what is open and gives back what is to spare.
    pub(super) fn freshen(&mut self) {
        if self.log.is_through() {
            return;
        }
        self.log.close_written();
        for grant in self.log.take_unused_grants() {
            self.outbox.push(FromDisk::Unused { segment: grant.id });
        }
    }

    /// Answers which blocks are not known.
    pub(super) fn plan_keep(&mut self, id: u64, lba: Lba, blocks: u32) {
        let absent = self.index.absent(lba, u64::from(blocks)).into_iter();
        // Parts of a range whose length is 32 bits wide.
        let absent = absent.map(|(start, end)| (Lba(start), (end - start) as u32)).collect();
        let ticket = self.fill_ticket();
        self.outbox.push(FromDisk::Planned { id, ticket, absent });
    }

    /// Keeps pieces of the store's image that were fetched after `planned` was taken.
    pub(super) fn keep(&mut self, planned: u64, roomy: bool, pieces: &[Fetched]) -> Kept {
        // In write-through nothing is held locally: what the store gets would not be seen here.
        if self.log.has_failed() || self.log.is_through() {
            return Kept::Failed;
        }
        if planned != self.fill_ticket() && !sabotage::on(Bug::StaleKeep) {
            return Kept::Stale;
        }
        for piece in pieces {
            let kept = match piece {
                Fetched::Data { lba, blocks } => self.keep_data(*lba, blocks, roomy),
                Fetched::Hole { lba, blocks } => self.keep_hole(*lba, *blocks, roomy),
            };
            if kept.is_none() {
                return Kept::NoRoom;
            }
        }
        Kept::All
    }

    fn may_keep(&self, roomy: bool) -> Option<()> {
        (self.log.has_spare() || roomy && self.log.has_spare_at_all()).then_some(())
    }

    fn keep_data(&mut self, lba: Lba, blocks: &[Bytes], roomy: bool) -> Option<()> {
        let mut at = 0;
        while at < blocks.len() {
            let absent = |n: usize| {
                matches!(self.index.get(lba.plus(n as u64)), Found::Absent)
                    && blocks[n].len() == BLOCK_SIZE
            };
            let most = blocks.len().min(at + PAYLOAD_BLOCKS_MAX as usize);
            let run = (at..most).take_while(|n| absent(*n)).count();
            if run == 0 {
                at += 1;
                continue;
            }
            self.may_keep(roomy)?;
            let room = self.log.room(run as u32)?;
            let kept = &blocks[at..at + room.blocks as usize];
            let image = self.log.image().expect("room was found in the open segment");
            let len = image_offset(room.blocks);
            // SAFETY: the log owns the segment and just found this room to be unused.
            let dst = unsafe { image.writable(image_offset(room.position), len) };
            let mut crcs: SmallVec<[u32; 32]> = SmallVec::new();
            for (dst, block) in dst.chunks_exact_mut(BLOCK_SIZE).zip(kept) {
                dst.copy_from_slice(block);
                crcs.push(crc32c(dst));
            }
            let (first, slot) = (lba.plus(at as u64), self.log.first_block() + room.position);
            self.log.push(Kind::Fill, first, room.blocks, (WHOLE, WHOLE), room, &crcs);
            for (n, crc) in (0u32..).zip(crcs) {
                self.index.insert(first.plus(u64::from(n)), slot + n, crc);
            }
            at += room.blocks as usize;
        }
        Some(())
    }

    fn keep_hole(&mut self, lba: Lba, blocks: u32, roomy: bool) -> Option<()> {
        for (start, end) in self.index.absent(lba, u64::from(blocks)) {
            self.may_keep(roomy)?;
            let room = self.log.room(0)?;
            let blocks = (end - start) as u32;
            self.log.push(Kind::Hole, Lba(start), blocks, (WHOLE, WHOLE), room, &[]);
            self.index.hole(Lba(start), u64::from(blocks));
        }
        Some(())
    }
}
