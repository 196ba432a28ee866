//! Lending blocks of the disk, as they were at a snapshot, to a clone of it that the store does not know of.
//!
//! What the index finds in a sealed segment is the block as it has been since it was put there, whether a guest wrote it or it was
//! fetched: any write, patch or zeroing since would have taken its place, and what replaced it leaves nothing behind that could be found
//! instead. All that is in a segment was put there before anything beyond its last LSN was staged. So if the segment ends at the
//! snapshot, or before it, the block is the snapshot's.

use super::Disk;
use super::plan::SegmentId;
use crate::index::Found;
use crate::link::{FromDisk, Place};
use blockstore::sabotage::{self, Bug};
use blockstore::types::{Lba, Lsn};
use smallvec::SmallVec;

impl Disk {
    /// Says where the blocks lie, and keeps the segments from being given up until [`Self::give_back`].
    pub(super) fn lend(&mut self, id: u64, lba: Lba, blocks: u32, lsn: Lsn) {
        let found = self.places(lba, blocks, lsn);
        let places = found.map(|(places, segments)| {
            for segment in &segments {
                if let Some(sealed) = self.sealed.get_mut(segment) {
                    sealed.pins += 1;
                }
            }
            self.loans.insert(id, segments);
            places
        });
        self.outbox.push(FromDisk::Lent { id, places });
    }

    /// Nobody reads what was lent any more.
    pub(super) fn give_back(&mut self, id: u64) {
        for segment in self.loans.remove(&id).into_iter().flatten() {
            self.unpin(segment);
        }
    }

    fn places(
        &self,
        lba: Lba,
        blocks: u32,
        lsn: Lsn,
    ) -> Option<(Vec<Place>, SmallVec<[SegmentId; 4]>)> {
        // With no leg left nothing can be read here.
        if self.log.is_held() || self.log.is_through() {
            return None;
        }
        let (mut places, mut segments) = (Vec::new(), SmallVec::new());
        for lba in (0..u64::from(blocks)).map(|n| lba.plus(n)) {
            let Found::At { slot, crc } = self.index.get(lba) else { return None };
            let segment = self.geometry.segment_of(slot);
            let sealed = self.sealed.get(&segment)?;
            if sealed.last_lsn > lsn && !sabotage::on(Bug::LendBeyondSnapshot) {
                return None;
            }
            places.push(Place { offset: self.geometry.block_offset(slot), crc });
            if !segments.contains(&segment) {
                segments.push(segment);
            }
        }
        Some((places, segments))
    }
}
