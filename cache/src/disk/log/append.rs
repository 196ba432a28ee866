//! Appending: room in the open segment, batches, their headers.

use super::{
    Batch, CLOSING_MAX, Closing, FLUSH_AHEAD_WRITES, Gathering, Log, Open, Room, SummaryState, Work,
};
use crate::disk::{Tag, image_offset};
use crate::format::record::{
    DESCRIPTOR_LEN, ENTRIES_MAX, Kind, PAYLOAD_BLOCKS_MAX, RecordHeader, entry_len, push_descriptor,
};
use crate::format::segment::SegmentHeader;
use crate::format::summary;
use crate::image::SegmentImage;
use crate::link::FromDisk;
use blockstore::io::now_ms;
use blockstore::types::{BLOCK_SIZE, Lba, Lsn};
use smallvec::SmallVec;
use std::sync::Arc;

/// Blocks of headers before a segment's first entry: its own and that of its first batch.
const HEADERS: u32 = 2;

impl Log {
    /// Counts a guest write for the flush-ahead heuristic.
    pub fn note_write(&mut self) {
        self.writes_since_flush = self.writes_since_flush.saturating_add(1);
        if self.writes_since_flush > FLUSH_AHEAD_WRITES {
            self.flush_follows = 0;
        }
    }

    /// Finds room for an entry with up to `wanted` payload blocks (0 for none); opens batches and segments as needed.
    /// None if there is no segment to go on in, no more of the open one is to be filled for now, or snapshots that were asked
    /// for before wait for a segment.
    pub fn room(&mut self, wanted: u32) -> Option<Room> {
        if self.snapshots_wait() && !self.stage_snapshots() {
            return None;
        }
        self.room_for(DESCRIPTOR_LEN, wanted, true)
    }

    /// As [`Self::room`], for an entry that takes `bytes` bytes without its checksums, within what guests may fill or not.
    pub(super) fn room_for(
        &mut self,
        bytes: usize,
        wanted: u32,
        is_rationed: bool,
    ) -> Option<Room> {
        let bytes = bytes + self.cuts.reserve();
        let entry_len = |blocks: u32| bytes + entry_len(blocks) - DESCRIPTOR_LEN;
        loop {
            if self.open.is_none() {
                // One that guests may not use yet is not opened: an open segment has entries.
                let next = self.spare.front().map(|grant| grant.seq);
                if is_rationed && self.allowed(next) <= HEADERS {
                    return None;
                }
                self.open_next()?;
            }
            let segment_blocks = self.geometry.segment_blocks();
            let open = self.open.as_ref()?;
            let (header, batch_entries, batch_payload) = match &open.gathering {
                Some(g) => (0, open.entries.len() - g.entries_from, g.payload_blocks),
                None => (1, 0, 0),
            };
            let entries_room = ENTRIES_MAX.saturating_sub(batch_entries);
            if entries_room < entry_len(wanted.min(1)) || batch_payload >= PAYLOAD_BLOCKS_MAX {
                self.send_batch();
                continue;
            }
            let by_entries = ((entries_room - entry_len(0)) / 4) as u32;
            let blocks = wanted.min(by_entries).min(PAYLOAD_BLOCKS_MAX - batch_payload);
            let summary = summary::blocks_for(open.entries.len() + entry_len(blocks));
            let free = segment_blocks.saturating_sub(open.position + header + summary);
            let blocks = blocks.min(free);
            let fits = open.position + header + summary <= segment_blocks;
            if !fits || (wanted > 0 && blocks == 0) {
                self.close_segment();
                continue;
            }
            let mut blocks = blocks;
            if is_rationed {
                let allowed = self.allowed(Some(open.grant.seq));
                blocks = blocks.min(allowed.checked_sub(open.position + header)?);
                if wanted > 0 && blocks == 0 {
                    return None;
                }
            }
            if open.gathering.is_none() {
                self.start_batch();
            }
            return Some(Room { position: self.open.as_ref()?.position, blocks });
        }
    }

    /// How much of a segment guests may fill.
    fn allowed(&self, seq: Option<u64>) -> u32 {
        let ration = self.ration.filter(|(rationed, _)| Some(*rationed) == seq);
        ration.map_or(u32::MAX, |(_, blocks)| blocks)
    }

    /// A whole segment is at hand beside the open one, and there are plenty more.
    pub fn has_spare(&self) -> bool {
        self.through.is_none() && self.spare.front().is_some_and(|grant| grant.roomy)
    }

    /// A whole segment is at hand beside the open one.
    pub fn has_spare_at_all(&self) -> bool {
        !self.spare.is_empty()
    }

    /// The image of the open segment.
    pub fn image(&self) -> Option<&Arc<SegmentImage>> {
        self.open.as_ref().map(|open| &open.image)
    }

    /// First block of the open segment on the device.
    pub fn first_block(&self) -> u32 {
        self.open.as_ref().map_or(0, |open| self.geometry.first_block(open.grant.id))
    }

    /// Adds an entry at `room` (as found by [`Self::room`] just before) and returns its LSN (for a fill, the
    /// last one given out).
    pub fn push(
        &mut self,
        kind: Kind,
        lba: Lba,
        blocks: u32,
        masks: (u8, u8),
        room: Room,
        crcs: &[u32],
    ) -> Lsn {
        if kind.takes_lsn() {
            self.staged_lsn = self.staged_lsn.plus(1);
            self.cuts.note_change();
        }
        let open = self.open.as_mut().expect("room was found in the open segment");
        let payload = if !kind.has_payload() { 0 } else { room.position as u16 };
        push_descriptor(&mut open.entries, kind, lba, blocks, payload, masks);
        for crc in crcs {
            open.entries.extend_from_slice(&crc.to_le_bytes());
        }
        open.position += crcs.len() as u32;
        let gathering = open.gathering.as_mut().expect("room was found in a batch");
        gathering.payload_blocks += crcs.len() as u32;
        self.staged_lsn
    }

    /// The last entry pushed finishes request `tag`.
    pub fn finish(&mut self, tag: Tag) {
        if let Some(gathering) = self.open.as_mut().and_then(|open| open.gathering.as_mut()) {
            gathering.tags.push(tag);
        }
    }

    /// Completes a request that has nothing to write.
    pub fn complete_now(&mut self, tag: Tag, ok: bool) {
        self.completions.push((tag, ok));
    }

    /// Stages a record without entries, whose header says how far the log is flushed (rule L4).
    pub(super) fn stage_marker(&mut self) {
        // Only in a segment that is open anyway: an idle disk must not use up segments for markers.
        self.marker_due = false;
        let Some(open) = &self.open else { return };
        let segment_blocks = self.geometry.segment_blocks();
        let summary = summary::blocks_for(open.entries.len());
        if open.gathering.is_none() && open.position + 1 + summary <= segment_blocks {
            self.start_batch();
        }
    }

    /// Closes the batch that is being gathered and hands its write out.
    pub(super) fn send_batch(&mut self) {
        self.cut_behind_batch();
        let Some(open) = &mut self.open else { return };
        let Some(gathering) = open.gathering.take() else { return };
        let image = &open.image;
        let header = RecordHeader {
            seq: open.grant.seq,
            first_lsn: gathering.first_lsn,
            flushed: self.flushed_lsn,
            position: gathering.header as u16,
            payload_blocks: gathering.payload_blocks as u16,
            epoch: self.identity.epoch,
            entries_len: (open.entries.len() - gathering.entries_from) as u16,
            time_ms: now_ms(),
        };
        // SAFETY: this log owns the segment, and the header's block was not handed to anyone yet.
        let block = unsafe { image.writable(image_offset(gathering.header), BLOCK_SIZE) };
        header.encode_into(block, &open.entries[gathering.entries_from..], open.grant.nonce);
        self.noted_lsn = self.flushed_lsn;
        let mut from = gathering.header;
        if open.header_due {
            open.header_due = false;
            from = 0;
            let is_on_device = self.through.is_none();
            let header = SegmentHeader {
                cache: self.identity.cache,
                vdi: self.identity.vdi,
                log_id: self.identity.log_id,
                seq: open.grant.seq,
                nonce: open.grant.nonce,
                first_lsn: open.first_lsn,
                segment: open.grant.id,
                epoch: self.identity.epoch,
            };
            // SAFETY: as above; block 0 goes out with this batch for the first time.
            header.encode_into(unsafe { image.writable(0, BLOCK_SIZE) });
            if is_on_device {
                self.outbox.push(FromDisk::Opened { segment: open.grant.id });
            }
        }
        if self.through.is_some() {
            return self.wait_for_store(gathering.tags);
        }
        let (image, id) = (Arc::clone(image), open.grant.id);
        let range = image_offset(from)..image_offset(open.position);
        let op = self.write(Work::Batch, id, &image, range);
        self.sent += 1;
        self.batches.push_back(Batch {
            op,
            last_lsn: self.staged_lsn,
            written: false,
            tags: gathering.tags,
        });
    }

    /// Sends what is gathered and lets the open segment be sealed.
    pub(super) fn close_segment(&mut self) {
        self.send_batch();
        let Some(open) = self.open.take() else { return };
        self.closing.push_back(Closing {
            grant: open.grant,
            image: open.image,
            first_lsn: open.first_lsn,
            last_lsn: self.staged_lsn,
            used_blocks: open.position,
            entries: open.entries,
            cuts: open.cuts,
            last_batch: self.sent,
            summary: SummaryState::Due,
        });
    }

    fn open_next(&mut self) -> Option<()> {
        if self.closing.len() >= CLOSING_MAX {
            // The device's flushes do not keep up: no more memory for segments that wait for one.
            return None;
        }
        let grant = match self.through {
            Some(_) => self.memory_grant()?,
            None => self.spare.pop_front()?,
        };
        self.open = Some(Open {
            grant,
            image: self.images.take(),
            first_lsn: self.staged_lsn.plus(1),
            position: 1,
            entries: Vec::new(),
            cuts: Vec::new(),
            gathering: None,
            header_due: true,
        });
        Some(())
    }

    fn start_batch(&mut self) {
        let Some(open) = &mut self.open else { return };
        open.gathering = Some(Gathering {
            header: open.position,
            first_lsn: self.staged_lsn.plus(1),
            entries_from: open.entries.len(),
            payload_blocks: 0,
            tags: SmallVec::new(),
        });
        open.position += 1;
    }
}
