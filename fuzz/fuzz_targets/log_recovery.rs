//! Recovery of a disk's log from segments of any content.
//!
//! The first byte chooses. Odd: the rest is a segment, given to each decoder as it is. Even: the rest is a script that
//! writes up to four segments with true checksums, each record and summary changed as the script says, and damages some;
//! then they are recovered. No log may panic. What is recovered must hang together: dense LSNs, every indexed block in a
//! segment that lives on.

#![no_main]

use ballast_fuzz::{Script, put_crc};
use blockstore::SnapshotLabel;
use blockstore::crc::{crc32c, crc32c_keyed};
use blockstore::types::{BLOCK_SIZE, Lba, Lsn};
use cache::disk::plan::SegmentId;
use cache::format::record::{
    ENTRIES_MAX, Entries, Kind, RecordHeader, WHOLE, push_descriptor, push_snapshot,
};
use cache::format::segment::SegmentHeader;
use cache::format::slot::SlotVdi;
use cache::format::summary::{Summary, blocks_for};
use cache::format::{Geometry, record};
use cache::index::{Content, PatchBase, PatchSource};
use cache::recovery::{Assembler, Found, Recovered, from_summary, scan};
use libfuzzer_sys::fuzz_target;
use std::collections::HashSet;
use uuid::Uuid;

const CACHE: Uuid = Uuid::from_u128(0xcac4e);
const VDI: Uuid = Uuid::from_u128(0x55);
const LOG: u128 = 0x66;
const SEQ: u64 = 11;
const NONCE: u64 = 0x0102_0304_0506_0708;
/// Where records and summaries have their checksum.
const CRC: usize = 8;
const SEGMENTS: u32 = 4;
/// Blocks written of a segment; the rest of it is of no interest.
const BLOCKS_MAX: usize = 32;

fn header(segment: u32, first_lsn: u64, epoch: u32) -> Option<SegmentHeader> {
    let header = SegmentHeader {
        cache: CACHE,
        vdi: VDI,
        log_id: LOG,
        seq: SEQ + u64::from(segment),
        nonce: NONCE ^ u64::from(segment),
        first_lsn: Lsn(first_lsn),
        segment: SegmentId(segment),
        epoch,
    };
    // Only headers that decode reach recovery.
    let mut block = [0; BLOCK_SIZE];
    header.encode_into(&mut block);
    SegmentHeader::decode(&block, CACHE, header.segment).ok()
}

fn check_found(found: &Found, header: &SegmentHeader, blocks: u32) {
    assert!(found.used_blocks >= 1 && found.used_blocks <= blocks);
    assert_eq!(found.first_lsn, header.first_lsn);
    let mut lsns = 0;
    for entry in Entries::new(&found.entries, found.used_blocks) {
        let entry = entry.expect("checked");
        lsns += entry.lsns();
        assert!(entry.blocks > 0);
        let _ = (entry.label(), entry.time_ms());
        if entry.kind.has_payload() {
            assert!(u32::from(entry.payload) + entry.blocks <= found.used_blocks);
        }
        for index in 0..entry.payload_blocks() {
            let _ = (entry.crc(index), entry.mask(index));
        }
    }
    assert_eq!(found.last_lsn.0 + 1, found.first_lsn.0 + lsns);
}

fn raw(script: &mut Script<'_>) {
    let Some(header) = header(0, script.number(8), script.byte().into()) else { return };
    let geometry = Geometry::for_size(16 << 20).expect("large enough");
    let bytes = script.rest();
    for entry in Entries::new(bytes, geometry.segment_blocks()).flatten() {
        assert!(entry.lba.plus(entry.blocks.into()) > entry.lba);
    }
    if let Ok((record, entries)) =
        RecordHeader::decode(&bytes[..bytes.len().min(BLOCK_SIZE)], SEQ, NONCE, 1)
    {
        assert_eq!(entries.len(), usize::from(record.entries_len));
    }
    let mut segment = vec![0; bytes.len().next_multiple_of(BLOCK_SIZE)];
    segment[..bytes.len()].copy_from_slice(bytes);
    if let Some(found) = from_summary(&segment, &header, &geometry) {
        check_found(&found, &header, geometry.segment_blocks());
    }
    if !segment.is_empty() {
        let blocks = (segment.len() / BLOCK_SIZE) as u32;
        check_found(&scan(&segment, &header), &header, blocks);
    }
}

/// Writes a segment, block by block.
struct Writer {
    header: SegmentHeader,
    bytes: Vec<u8>,
    entries: Vec<u8>,
    next: u64,
}

impl Writer {
    fn blocks(&self) -> usize {
        self.bytes.len() / BLOCK_SIZE
    }

    /// Appends a record, valid unless the script changes it.
    fn record(&mut self, script: &mut Script<'_>) {
        let flags = script.byte();
        let position = self.blocks();
        let (mut entries, mut payload) = (Vec::new(), Vec::new());
        let mut lsns = 0;
        for _ in 0..=flags & 3 {
            let shape = script.byte();
            if shape >= 0xf8 {
                let text: String = (8..shape & 7 | 8).map(|n| (b'a' + n) as char).collect();
                let label = SnapshotLabel::new(text).expect("it is short");
                push_snapshot(&mut entries, script.number(6), &label);
                lsns += 1;
                continue;
            }
            let kind = [Kind::Write, Kind::Zero, Kind::Fill, Kind::Hole][usize::from(shape & 3)];
            let wide = shape & 4 != 0;
            let lba = Lba(if wide { script.number(6) } else { script.number(1) });
            let blocks = match kind {
                Kind::Zero | Kind::Hole if wide => script.number(4) as u32,
                _ => 1 + u32::from(shape >> 4 & 3),
            };
            let mut masks = (WHOLE, WHOLE);
            if shape & 8 != 0 {
                masks = (script.byte() | 1, script.byte() | 0x80);
            }
            let with_payload = if kind.has_payload() { blocks } else { 0 };
            if entries.len() + record::entry_len(with_payload) > ENTRIES_MAX {
                break;
            }
            let at = position + 1 + payload.len() / BLOCK_SIZE;
            push_descriptor(&mut entries, kind, lba, blocks, at as u16, masks);
            for _ in 0..with_payload {
                let block = [script.byte(); BLOCK_SIZE];
                entries.extend_from_slice(&crc32c(&block).to_le_bytes());
                payload.extend_from_slice(&block);
            }
            lsns += u64::from(kind.takes_lsn());
        }
        let record = RecordHeader {
            seq: self.header.seq,
            first_lsn: Lsn(self.next),
            flushed: Lsn(if flags & 4 != 0 { script.number(1) } else { 0 }),
            position: position as u16,
            payload_blocks: (payload.len() / BLOCK_SIZE) as u16,
            epoch: self.header.epoch,
            entries_len: entries.len() as u16,
            time_ms: u64::from(flags) * 1000,
        };
        let mut block = [0; BLOCK_SIZE];
        record.encode_into(&mut block, &entries, self.header.nonce);
        if flags & 8 != 0 {
            for _ in 0..=flags >> 4 {
                script.patch(&mut block);
            }
            put_crc(&mut block, CRC, |all| crc32c_keyed(self.header.nonce, all));
        }
        self.bytes.extend_from_slice(&block);
        self.bytes.extend_from_slice(&payload);
        self.entries.extend_from_slice(&entries);
        self.next += lsns;
    }

    /// The blocks at the segment's end.
    fn summary(&self, script: &mut Script<'_>, patches: u8) -> Vec<u8> {
        let summary = Summary {
            seq: self.header.seq,
            first_lsn: self.header.first_lsn,
            last_lsn: Lsn(self.next - 1),
            flushed: Lsn(self.next - 1),
            used_blocks: self.blocks() as u32,
            entries: self.entries.clone(),
        };
        let mut tail = vec![0; blocks_for(self.entries.len()) as usize * BLOCK_SIZE];
        summary.encode_into(&mut tail, self.header.nonce);
        if patches > 0 {
            for _ in 0..patches {
                script.patch(&mut tail);
            }
            for block in tail.chunks_exact_mut(BLOCK_SIZE) {
                put_crc(block, CRC, |all| crc32c_keyed(self.header.nonce, all));
            }
        }
        tail
    }
}

/// Writes a segment and finds out what is in it, as recovery does. Returns the LSN that should come next, too.
fn segment(script: &mut Script<'_>, geometry: &Geometry, header: SegmentHeader) -> (u64, Found) {
    let flags = script.byte();
    let next = header.first_lsn.0;
    let mut writer = Writer { header, bytes: vec![0; BLOCK_SIZE], entries: Vec::new(), next };
    for _ in 0..flags & 7 {
        if writer.blocks() < BLOCKS_MAX && !script.is_over() {
            writer.record(script);
        }
    }
    let mut found = None;
    if flags & 8 != 0 {
        let tail = writer.summary(script, flags >> 6);
        found = from_summary(&tail, &writer.header, geometry);
    }
    if flags & 16 != 0 {
        // Damage behind the back of all checksums: it may end the log, no more.
        script.patch(&mut writer.bytes);
    }
    writer.bytes.extend_from_slice(&[0; BLOCK_SIZE]);
    let found = found.unwrap_or_else(|| scan(&writer.bytes, &writer.header));
    check_found(&found, &writer.header, geometry.segment_blocks());
    (writer.next, found)
}

fn check_recovered(recovered: &Recovered, geometry: &Geometry, store: Lsn) {
    let live: HashSet<SegmentId> = recovered.live.iter().map(|live| live.header.segment).collect();
    assert_eq!(live.len(), recovered.live.len());
    assert!(recovered.dead.iter().all(|dead| !live.contains(dead)));
    for pair in recovered.live.windows(2) {
        assert!(pair[0].header.seq < pair[1].header.seq);
        assert_eq!(pair[0].last_lsn.plus(1), pair[1].header.first_lsn, "LSNs are not dense");
    }
    if let (Some(first), Some(last)) = (recovered.live.first(), recovered.live.last()) {
        assert!(first.header.first_lsn <= store.plus(1), "uncommitted LSNs are missing");
        assert_eq!(last.last_lsn, recovered.last_lsn);
    }
    assert!(recovered.last_lsn >= store);
    let mut snapshot = store;
    for pending in recovered.snapshots.iter() {
        assert!(pending.lsn > snapshot && pending.lsn <= recovered.last_lsn);
        snapshot = pending.lsn;
    }
    let check = |slot: u32| {
        assert!(slot < geometry.segments * geometry.segment_blocks());
        let id = geometry.segment_of(slot);
        let live =
            recovered.live.iter().find(|live| live.header.segment == id).expect("segment is alive");
        let place = slot - geometry.first_block(id);
        assert!(place >= 1 && place < live.used_blocks);
    };
    for (_, content) in recovered.index.contents() {
        match content {
            Content::At { slot, .. } => check(slot),
            Content::Zero { blocks } => assert!(blocks > 0),
            Content::Patched(patched) => {
                if let PatchBase::At { slot, .. } = patched.base() {
                    check(slot);
                }
                assert!((1..=8).contains(&patched.patches().len()));
                for patch in patched.patches() {
                    assert_ne!(patch.sectors, 0);
                    if let PatchSource::At { slot, .. } = patch.source {
                        check(slot);
                    }
                }
            }
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let script = &mut Script::new(input);
    let choice = script.byte();
    if choice & 1 != 0 {
        return raw(script);
    }
    let geometry = Geometry::for_size(16 << 20).expect("large enough");
    let epoch = u32::from(choice >> 1 & 1);
    let store = Lsn(script.number(1));
    let slot = SlotVdi {
        uuid: VDI,
        log_id: LOG,
        name: "disk".into(),
        size_bytes: 1 << 30,
        committed: Lsn(script.number(1)),
        evicted_below: 0,
        sequence_seen: SEQ + u64::from(SEGMENTS),
        epoch,
        first_lsn: Lsn(script.number(1)),
        durable: Lsn(0),
        alone_from: None,
        cuts: Vec::new(),
        origin: None,
        has_cuts: false,
        policy: Default::default(),
        left_behind: None,
        boot_trace: Vec::new(),
    };
    let Ok(mut assembler) = Assembler::new(geometry, slot, store) else { return };
    let mut next = store.0 + 1;
    for id in 0..SEGMENTS {
        if script.is_over() {
            break;
        }
        let start = script.byte();
        let first = match start & 3 {
            0 | 1 => next,
            2 => next.saturating_add_signed((start as i8 >> 3).into()),
            _ => script.number(8),
        };
        let epoch = epoch.saturating_sub(u32::from(start >> 2 & 1));
        let Some(header) = header(id, first, epoch) else { return };
        let (end, found) = segment(script, &geometry, header.clone());
        next = end;
        if assembler.push(&header, &found).is_err() {
            return;
        }
    }
    if let Ok(recovered) = assembler.finish() {
        check_recovered(&recovered, &geometry, store);
    }
});
