//! Sealing: the summary of a full segment, and the news of it.

use super::{Closing, Log, SummaryState, Work};
use crate::disk::image_offset;
use crate::disk::plan::SegmentId;
use crate::format::summary::{self, Summary};
use crate::image::SegmentImage;
use crate::link::{FromDisk, SealedSegment};
use blockstore::sabotage::{self, Bug};
use std::ops::Range;
use std::sync::Arc;

impl Log {
    /// Writes summaries that may be written (INV-LOG-3) and tells of segments whose summary is there.
    pub(super) fn advance_closing(&mut self) {
        for index in 0..self.closing.len() {
            let closing = &self.closing[index];
            let covered =
                closing.last_batch <= self.flushed || sabotage::on(Bug::SummaryBeforeFlush);
            if closing.summary == SummaryState::Due && covered {
                self.write_summary(index);
            }
        }
        while self.closing.front().is_some_and(|c| c.summary == SummaryState::Written) {
            let Some(closing) = self.closing.pop_front() else { break };
            self.newly_sealed.push((closing.grant.id, closing.last_lsn));
            self.outbox.push(FromDisk::Sealed(SealedSegment {
                id: closing.grant.id,
                seq: closing.grant.seq,
                first_lsn: closing.first_lsn,
                last_lsn: closing.last_lsn,
                used_blocks: closing.used_blocks,
                cuts: closing.cuts,
                image: Some(closing.image),
            }));
        }
    }

    fn write_summary(&mut self, index: usize) {
        let range = self.summarize(index);
        let closing = &self.closing[index];
        let (image, grant) = (Arc::clone(&closing.image), closing.grant);
        self.write(Work::Summary { seq: grant.seq }, grant.id, &image, range);
    }

    /// Makes the summary of a full segment in its image; returns where.
    pub(super) fn summarize(&mut self, index: usize) -> Range<usize> {
        let closing: &mut Closing = &mut self.closing[index];
        let blocks = summary::blocks_for(closing.entries.len());
        let first = self.geometry.segment_blocks() - blocks;
        assert!(first >= closing.used_blocks, "room for the summary was kept free");
        let content = Summary {
            seq: closing.grant.seq,
            first_lsn: closing.first_lsn,
            last_lsn: closing.last_lsn,
            flushed: self.flushed_lsn,
            used_blocks: closing.used_blocks,
            entries: std::mem::take(&mut closing.entries),
        };
        let (start, len) = (image_offset(first), image_offset(blocks));
        let image = &closing.image;
        // SAFETY: this log owns the segment; blocks behind its records were not handed to anyone.
        content.encode_into(unsafe { image.writable(start, len) }, closing.grant.nonce);
        closing.summary = SummaryState::UnderWay;
        start..start + len
    }

    /// Answers those who waited for segments to be sealed.
    pub(super) fn answer_rolls(&mut self) {
        while let Some(roll) = self.rolls.front().copied() {
            let waiting = self.closing.front().is_some_and(|c| c.grant.seq <= roll.seq);
            if waiting && self.failure.is_none() && self.through.is_none() {
                break;
            }
            self.rolls.pop_front();
            self.outbox.push(FromDisk::Rolled { id: roll.id, lsn: roll.lsn });
        }
    }

    /// Asks for the next segment before the open one is full.
    pub(super) fn ask_for_segment(&mut self) {
        if self.spare.is_empty() && !self.want_sent {
            self.want_sent = true;
            self.outbox.push(FromDisk::WantSegment);
        }
    }

    /// The images of segments that are not sealed yet: reads of them are served from memory.
    pub fn live_images(&self) -> impl Iterator<Item = (SegmentId, &Arc<SegmentImage>)> {
        let open = self.open.as_ref().map(|open| (open.grant.id, &open.image));
        self.closing.iter().map(|closing| (closing.grant.id, &closing.image)).chain(open)
    }
}
