//! Log records: a header block that describes a batch, then its payload blocks.
//!
//! The entries of a header, one after the other, are also what the segment's summary is made of. An entry is a
//! 16-byte descriptor, for writes and fills followed by one CRC32C per block, for snapshots by the label, zero-padded to a
//! multiple of 4 bytes:
//!
//! ```text
//! 0..6    LBA (48 bit); of a snapshot or cut when it was asked for, milliseconds since 1970
//! 6       kind
//! 7       sectors of the first block that count (bit mask)
//! 8..12   blocks; of a snapshot 1; of a cut how many are kept
//! 12..14  first payload block, counted from the segment's start; of a snapshot the bytes of its label; of a cut behind what it is
//! 14      sectors of the last block that count (bit mask; equal to byte 7 for a single block)
//! 15      0
//! ```
//!
//! Writes, zeroes and snapshots take one LSN each, in the order of the entries; fills (blocks copied from the store), holes (ranges
//! that the store does not have) and cuts (a snapshot at the LSN before them) take none.
//! Header checksums are keyed with the segment's nonce (rule L3), payloads are covered by the entries' CRCs.

use super::FormatError;
use blockstore::SnapshotLabel;
use blockstore::crc::crc32c_keyed;
use blockstore::format::vdi::VDI_SIZE_MAX;
use blockstore::schedule::{Behind, Cadence, KEEP_MAX};
use blockstore::types::{BLOCK_SIZE, Lba, Lsn};

const MAGIC: [u8; 8] = *b"BLSTRECD";
const WHAT: &str = "record header";
/// Bytes of a header before its entries.
pub const HEADER_LEN: usize = 64;
/// Bytes of entries that a header can hold.
pub const ENTRIES_MAX: usize = BLOCK_SIZE - HEADER_LEN;
/// Bytes of a descriptor.
pub const DESCRIPTOR_LEN: usize = 16;
/// Most payload blocks in a record.
pub const PAYLOAD_BLOCKS_MAX: u32 = 256;
/// All eight sectors of a block.
pub const WHOLE: u8 = 0xff;
/// Most blocks that one zeroing entry covers; longer ones are split.
pub const ZERO_BLOCKS_MAX: u64 = u32::MAX as u64;
/// Latest time that a snapshot can carry, milliseconds since 1970.
pub const TIME_MS_MAX: u64 = (1 << 48) - 1;
/// First block that no disk has.
const LBA_END: u64 = VDI_SIZE_MAX / BLOCK_SIZE as u64;

/// What an entry does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A guest's write; has payload.
    Write,
    /// The range reads as zeros from here on (discard, write zeroes); no payload.
    Zero,
    /// Blocks copied from the store, to be read locally; has payload, takes no LSN.
    Fill,
    /// The store does not have the range: it reads as zeros unless something newer is known; no payload, takes no LSN.
    Hole,
    /// The disk as of this LSN is to be kept: all that has a lower one, and nothing else. Names no blocks.
    Snapshot,
    /// The disk as of the LSN of the entry before it is to be kept, that entry included, until so many newer cuts are there.
    /// Written with that entry, in one record. Names no blocks, takes no LSN.
    Cut,
}

impl Kind {
    /// Payload blocks and their checksums follow.
    #[must_use]
    pub const fn has_payload(self) -> bool {
        matches!(self, Self::Write | Self::Fill)
    }

    /// It has a place in the order of the guest's writes.
    #[must_use]
    pub const fn takes_lsn(self) -> bool {
        matches!(self, Self::Write | Self::Zero | Self::Snapshot)
    }
}

/// One entry, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// What it does.
    pub kind: Kind,
    /// First block; of a snapshot, which has none, 0.
    pub lba: Lba,
    /// How many blocks, at least 1.
    pub blocks: u32,
    /// First payload block in the segment; 0 without payload.
    pub payload: u16,
    /// Sectors of the first block that count.
    pub first_mask: u8,
    /// Sectors of the last block that count.
    pub last_mask: u8,
    time_ms: u64,
    /// Of a cut.
    cadence: Option<Cadence>,
    /// Checksums of the payload, or the label.
    behind: &'a [u8],
}

impl Entry<'_> {
    /// One that has neither blocks nor a rule, nor anything behind it.
    fn of_no_blocks(kind: Kind, time_ms: u64) -> Self {
        Self {
            kind,
            lba: Lba(0),
            blocks: 1,
            payload: 0,
            first_mask: WHOLE,
            last_mask: WHOLE,
            time_ms,
            cadence: None,
            behind: &[],
        }
    }

    /// CRC32C of payload block `index` (of writes and fills).
    #[must_use]
    pub fn crc(&self, index: u32) -> u32 {
        let at = index as usize * 4;
        u32::from_le_bytes(self.behind[at..at + 4].try_into().expect("four bytes"))
    }

    /// When it was asked for, milliseconds since 1970 (of snapshots and cuts).
    #[must_use]
    pub fn time_ms(&self) -> u64 {
        self.time_ms
    }

    /// The rule that had it made (of cuts).
    #[must_use]
    pub fn cadence(&self) -> Option<Cadence> {
        self.cadence
    }

    /// Its label (of snapshots; else empty).
    #[must_use]
    pub fn label(&self) -> SnapshotLabel {
        let label = if self.kind == Kind::Snapshot { self.behind } else { &[] };
        label_of(label).unwrap_or_default()
    }

    /// Sectors of block `index` of the entry that count.
    #[must_use]
    pub fn mask(&self, index: u32) -> u8 {
        if index == 0 {
            self.first_mask
        } else if index + 1 == self.blocks {
            self.last_mask
        } else {
            WHOLE
        }
    }

    /// Payload blocks behind the entry.
    #[must_use]
    pub fn payload_blocks(&self) -> u32 {
        if self.kind.has_payload() { self.blocks } else { 0 }
    }

    /// LSNs that the entry takes.
    #[must_use]
    pub fn lsns(&self) -> u64 {
        u64::from(self.kind.takes_lsn())
    }

    /// Bytes that it takes.
    fn len(&self) -> usize {
        match self.kind {
            Kind::Snapshot => snapshot_len(self.behind.len()),
            _ => entry_len(self.payload_blocks()),
        }
    }
}

/// Bytes that an entry with `payload_blocks` CRCs takes.
#[must_use]
pub fn entry_len(payload_blocks: u32) -> usize {
    DESCRIPTOR_LEN + 4 * payload_blocks as usize
}

/// Bytes that a snapshot's entry with so many bytes of label takes.
#[must_use]
pub const fn snapshot_len(label_len: usize) -> usize {
    DESCRIPTOR_LEN + label_len.next_multiple_of(4)
}

/// Bytes that a cut's entry takes.
pub const CUT_LEN: usize = DESCRIPTOR_LEN;

/// Appends a cut's entry, behind the one that it is of.
pub fn push_cut(out: &mut Vec<u8>, time_ms: u64, cadence: Cadence) {
    let time = Lba(time_ms.min(TIME_MS_MAX));
    let behind = cadence.behind.to_bits() as u16;
    push_descriptor(out, Kind::Cut, time, cadence.keep, behind, (WHOLE, WHOLE));
}

/// Appends a snapshot's entry.
pub fn push_snapshot(out: &mut Vec<u8>, time_ms: u64, label: &SnapshotLabel) {
    let end = out.len() + snapshot_len(label.as_str().len());
    let time = Lba(time_ms.min(TIME_MS_MAX));
    let label = label.as_str().as_bytes();
    push_descriptor(out, Kind::Snapshot, time, 1, label.len() as u16, (WHOLE, WHOLE));
    out.extend_from_slice(label);
    out.resize(end, 0);
}

/// Appends a descriptor; for writes and fills the caller appends `blocks` CRCs behind it.
pub fn push_descriptor(
    out: &mut Vec<u8>,
    kind: Kind,
    lba: Lba,
    blocks: u32,
    payload: u16,
    masks: (u8, u8),
) {
    let code = match kind {
        Kind::Write => 1,
        Kind::Zero => 2,
        Kind::Fill => 3,
        Kind::Hole => 4,
        Kind::Snapshot => 5,
        Kind::Cut => 6,
    };
    out.extend_from_slice(&lba.0.to_le_bytes()[..6]);
    out.push(code);
    out.push(masks.0);
    out.extend_from_slice(&blocks.to_le_bytes());
    out.extend_from_slice(&payload.to_le_bytes());
    out.push(masks.1);
    out.push(0);
}

/// Iterates over entries; ends with an error at the first that makes no sense.
#[derive(Clone, Debug)]
pub struct Entries<'a> {
    rest: &'a [u8],
    segment_blocks: u32,
}

impl<'a> Entries<'a> {
    /// Entries in `bytes`, of a segment with so many blocks.
    #[must_use]
    pub fn new(bytes: &'a [u8], segment_blocks: u32) -> Self {
        Self { rest: bytes, segment_blocks }
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Entry<'a>, FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let entry = decode_entry(self.rest, self.segment_blocks);
        match &entry {
            Ok(entry) => self.rest = &self.rest[entry.len()..],
            Err(_) => self.rest = &[],
        }
        Some(entry)
    }
}

fn decode_entry(bytes: &[u8], segment_blocks: u32) -> Result<Entry<'_>, FormatError> {
    let invalid = |why| FormatError::Invalid { what: "log entry", why };
    if bytes.len() < DESCRIPTOR_LEN {
        return Err(invalid("it is cut off"));
    }
    let mut lba = [0u8; 8];
    lba[..6].copy_from_slice(&bytes[..6]);
    let kind = match bytes[6] {
        1 => Kind::Write,
        2 => Kind::Zero,
        3 => Kind::Fill,
        4 => Kind::Hole,
        5 => return decode_snapshot(bytes, u64::from_le_bytes(lba)),
        6 => return decode_cut(bytes, u64::from_le_bytes(lba)),
        _ => return Err(invalid("its kind is unknown")),
    };
    let blocks = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
    let payload = u16::from_le_bytes(bytes[12..14].try_into().expect("two bytes"));
    let (first_mask, last_mask) = (bytes[7], bytes[14]);
    if blocks == 0 || first_mask == 0 || last_mask == 0 {
        return Err(invalid("it covers nothing"));
    }
    let lba = u64::from_le_bytes(lba);
    if lba + u64::from(blocks) > LBA_END {
        return Err(invalid("it lies beyond the end of the largest disk"));
    }
    let mut behind: &[u8] = &[];
    if kind.has_payload() {
        let end = u64::from(payload) + u64::from(blocks);
        if payload == 0 || end > u64::from(segment_blocks) {
            return Err(invalid("its payload lies outside the segment"));
        }
        let len = blocks as usize * 4;
        if bytes.len() - DESCRIPTOR_LEN < len {
            return Err(invalid("its checksums are cut off"));
        }
        behind = &bytes[DESCRIPTOR_LEN..DESCRIPTOR_LEN + len];
    }
    let lba = Lba(lba);
    let (time_ms, cadence) = (0, None);
    Ok(Entry { kind, lba, blocks, payload, first_mask, last_mask, time_ms, cadence, behind })
}

/// Of `bytes`, which hold a whole descriptor with the kind of a cut.
fn decode_cut(bytes: &[u8], time_ms: u64) -> Result<Entry<'_>, FormatError> {
    let keep = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
    let behind = Behind::from_bits(u64::from(u16_at(bytes, 12)));
    let is_whole = bytes[7] == WHOLE && bytes[14..16] == [WHOLE, 0];
    let behind = behind.filter(|_| is_whole && (1..=KEEP_MAX).contains(&keep));
    let why = "it is a cut of no rule that there is";
    let behind = behind.ok_or(FormatError::Invalid { what: "log entry", why })?;
    let cadence = Some(Cadence { behind, keep });
    Ok(Entry { cadence, ..Entry::of_no_blocks(Kind::Cut, time_ms) })
}

/// Of `bytes`, which hold a whole descriptor with the kind of a snapshot.
fn decode_snapshot(bytes: &[u8], time_ms: u64) -> Result<Entry<'_>, FormatError> {
    let invalid = |why| FormatError::Invalid { what: "log entry", why };
    if bytes[7..12] != [WHOLE, 1, 0, 0, 0] || bytes[14..16] != [WHOLE, 0] {
        return Err(invalid("it is a snapshot and names blocks"));
    }
    let label_len = usize::from(u16_at(bytes, 12));
    let padded = bytes.get(DESCRIPTOR_LEN..snapshot_len(label_len));
    let padded = padded.ok_or_else(|| invalid("its label is cut off"))?;
    let (label, padding) = padded.split_at(label_len);
    if label_of(label).is_none() || padding.iter().any(|&byte| byte != 0) {
        return Err(invalid("its label makes no sense"));
    }
    Ok(Entry { behind: label, ..Entry::of_no_blocks(Kind::Snapshot, time_ms) })
}

fn label_of(bytes: &[u8]) -> Option<SnapshotLabel> {
    SnapshotLabel::new(std::str::from_utf8(bytes).ok()?).ok()
}

/// The fixed part of a record's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// The segment it was written in.
    pub seq: u64,
    /// LSN of its first entry that takes one.
    pub first_lsn: Lsn,
    /// Everything up to here was durable when it was written (rule L4).
    pub flushed: Lsn,
    /// Own block, counted from the segment's start.
    pub position: u16,
    /// Payload blocks that follow.
    pub payload_blocks: u16,
    /// Recovery epoch.
    pub epoch: u32,
    /// Bytes of entries.
    pub entries_len: u16,
    /// When it was sent to the device, milliseconds since 1970; 0: by a version that did not say.
    pub time_ms: u64,
}

impl RecordHeader {
    /// Writes header and entries into `block` (4096 bytes), checksummed with `nonce`.
    pub fn encode_into(&self, block: &mut [u8], entries: &[u8], nonce: u64) {
        assert!(entries.len() <= ENTRIES_MAX && block.len() == BLOCK_SIZE);
        block[..8].copy_from_slice(&MAGIC);
        block[8..12].fill(0);
        block[12..16].copy_from_slice(&self.epoch.to_le_bytes());
        block[16..24].copy_from_slice(&self.seq.to_le_bytes());
        block[24..32].copy_from_slice(&self.first_lsn.0.to_le_bytes());
        block[32..40].copy_from_slice(&self.flushed.0.to_le_bytes());
        block[40..42].copy_from_slice(&self.position.to_le_bytes());
        block[42..44].copy_from_slice(&self.payload_blocks.to_le_bytes());
        block[44..46].copy_from_slice(&(entries.len() as u16).to_le_bytes());
        block[46..54].copy_from_slice(&self.time_ms.to_le_bytes());
        block[54..HEADER_LEN].fill(0);
        block[HEADER_LEN..HEADER_LEN + entries.len()].copy_from_slice(entries);
        block[HEADER_LEN + entries.len()..].fill(0);
        let crc = crc32c_keyed(nonce, block);
        block[8..12].copy_from_slice(&crc.to_le_bytes());
    }

    /// Reads and checks the header at block `position` of the segment with this sequence and nonce.
    /// Returns it with its entries.
    pub fn decode(
        block: &[u8],
        seq: u64,
        nonce: u64,
        position: u32,
    ) -> Result<(Self, &[u8]), FormatError> {
        if block.len() != BLOCK_SIZE || block[..8] != MAGIC {
            return Err(FormatError::Absent(WHAT));
        }
        let expected = u32_at(block, 8);
        let mut copy = [0u8; BLOCK_SIZE];
        copy.copy_from_slice(block);
        copy[8..12].fill(0);
        let found = crc32c_keyed(nonce, &copy);
        if expected != found {
            return Err(FormatError::Checksum { what: WHAT, expected, found });
        }
        let header = Self {
            epoch: u32_at(block, 12),
            seq: u64_at(block, 16),
            first_lsn: Lsn(u64_at(block, 24)),
            flushed: Lsn(u64_at(block, 32)),
            position: u16_at(block, 40),
            payload_blocks: u16_at(block, 42),
            entries_len: u16_at(block, 44),
            time_ms: u64_at(block, 46),
        };
        let invalid = |why| FormatError::Invalid { what: WHAT, why };
        if header.seq != seq || u32::from(header.position) != position {
            return Err(invalid("it was written for another place"));
        }
        let len = usize::from(header.entries_len);
        if len > ENTRIES_MAX {
            return Err(invalid("its entries do not fit"));
        }
        Ok((header, &block[HEADER_LEN..HEADER_LEN + len]))
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
