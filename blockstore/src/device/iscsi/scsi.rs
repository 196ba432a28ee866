//! SCSI as bytes: command descriptor blocks, sense data, capacity, vital product data, persistent
//! reservations. Pure: builds and parses, does no I/O. Sources: SPC-4 and SBC-3, section in each comment.
//!
//! Every parser takes bytes from the wire: short or odd input yields `None`, never a panic.

/// A 6, 10 or 16 byte command descriptor block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cdb {
    bytes: [u8; 16],
    len: usize,
}

impl Cdb {
    /// The bytes to send.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn new<const N: usize>(head: [u8; N]) -> Self {
        let mut bytes = [0; 16];
        bytes[..N].copy_from_slice(&head);
        Self { bytes, len: N }
    }

    fn long(opcode: u8, lba: u64, blocks: u32) -> Self {
        let mut cdb = [0; 16];
        cdb[0] = opcode;
        cdb[2..10].copy_from_slice(&lba.to_be_bytes());
        cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
        Self::new(cdb)
    }
}

/// TEST UNIT READY (SPC-4 6.47).
pub fn test_unit_ready() -> Cdb {
    Cdb::new([0; 6])
}

/// READ (16) (SBC-3 5.11).
pub fn read16(lba: u64, blocks: u32) -> Cdb {
    Cdb::long(0x88, lba, blocks)
}

/// WRITE (16) (SBC-3 5.34).
pub fn write16(lba: u64, blocks: u32) -> Cdb {
    Cdb::long(0x8a, lba, blocks)
}

/// SYNCHRONIZE CACHE (16) of the whole medium (SBC-3 5.29).
pub fn synchronize_cache16() -> Cdb {
    Cdb::long(0x91, 0, 0)
}

/// COMPARE AND WRITE of one block; data-out is the expected block, then the new one (SBC-3 5.2).
pub fn compare_and_write(lba: u64) -> Cdb {
    let mut cdb = [0; 16];
    cdb[0] = 0x89;
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[13] = 1;
    Cdb::new(cdb)
}

/// UNMAP with a parameter list of `list_len` bytes (SBC-3 5.30).
pub fn unmap(list_len: u16) -> Cdb {
    let mut cdb = [0; 10];
    cdb[0] = 0x42;
    cdb[7..9].copy_from_slice(&list_len.to_be_bytes());
    Cdb::new(cdb)
}

/// The parameter list of [`unmap`]: one descriptor per (first block, number of blocks).
pub fn unmap_list(ranges: &[(u64, u32)]) -> Vec<u8> {
    let descriptors = ranges.len() * 16;
    let mut list = Vec::with_capacity(8 + descriptors);
    let len = u16::try_from(6 + descriptors).expect("callers pass a few ranges");
    list.extend_from_slice(&len.to_be_bytes());
    list.extend_from_slice(&(len - 6).to_be_bytes());
    list.extend_from_slice(&[0; 4]);
    for (lba, blocks) in ranges {
        list.extend_from_slice(&lba.to_be_bytes());
        list.extend_from_slice(&blocks.to_be_bytes());
        list.extend_from_slice(&[0; 4]);
    }
    list
}

/// Bytes asked for by [`read_capacity16`].
pub const CAPACITY_LEN: usize = 32;

/// READ CAPACITY (16) (SBC-3 5.16).
pub fn read_capacity16() -> Cdb {
    let mut cdb = [0; 16];
    cdb[0] = 0x9e;
    cdb[1] = 0x10;
    cdb[13] = CAPACITY_LEN as u8;
    Cdb::new(cdb)
}

/// Bytes asked for by [`inquiry_vpd`].
pub const VPD_LEN: usize = 252;

/// INQUIRY of one vital product data page (SPC-4 6.6).
pub fn inquiry_vpd(page: u8) -> Cdb {
    Cdb::new([0x12, 1, page, 0, VPD_LEN as u8, 0])
}

/// What READ CAPACITY (16) tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Logical blocks of the device.
    pub blocks: u64,
    /// Bytes of a logical block.
    pub block_len: u32,
}

impl Capacity {
    /// Parses the answer.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let last = u64::from_be_bytes(bytes.get(..8)?.try_into().ok()?);
        let block_len = u32::from_be_bytes(bytes.get(8..12)?.try_into().ok()?);
        Some(Self { blocks: last.checked_add(1)?, block_len })
    }
}

/// Limits of VPD page B0 (SBC-3 6.5.3); 0 means "not told".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockLimits {
    /// Blocks of one READ or WRITE.
    pub transfer_max: u32,
    /// Blocks of one UNMAP.
    pub unmap_max: u32,
    /// Blocks that are given back together.
    pub unmap_granularity: u32,
    /// The first block of the first such piece, where told.
    pub unmap_alignment: u32,
}

impl BlockLimits {
    /// Parses the page; a page that is too short tells nothing.
    pub fn parse(page: &[u8]) -> Self {
        let field = |at: usize| {
            let bytes = page.get(at..at + 4)?;
            Some(u32::from_be_bytes(bytes.try_into().ok()?))
        };
        if page.get(1) != Some(&0xb0) {
            return Self::default();
        }
        // UGAVALID is the first bit of the field.
        let alignment = field(32).filter(|alignment| alignment >> 31 == 1);
        Self {
            transfer_max: field(8).unwrap_or(0),
            unmap_max: field(20).unwrap_or(0),
            unmap_granularity: field(28).unwrap_or(0),
            unmap_alignment: alignment.map_or(0, |alignment| alignment & 0x7fff_ffff),
        }
    }

    /// Granularity and alignment of UNMAP in bytes as the store can use them, of blocks of `unit` bytes: whole ones.
    pub fn unmap_pieces(&self, block_len: u32, unit: u64) -> (u64, u64) {
        let bytes = |blocks: u32| u64::from(blocks) * u64::from(block_len);
        let granularity = bytes(self.unmap_granularity);
        if granularity <= unit || !granularity.is_multiple_of(unit) {
            return (unit, 0);
        }
        let alignment = bytes(self.unmap_alignment) % granularity;
        (granularity, if alignment.is_multiple_of(unit) { alignment } else { 0 })
    }
}

/// Whether VPD page B2 says that UNMAP is there (LBPU, SBC-3 6.5.4); none: the target has no such page.
pub fn parse_unmap_supported(page: &[u8]) -> Option<bool> {
    (page.get(1) == Some(&0xb2)).then_some(())?;
    page.get(5).map(|flags| flags & 0x80 != 0)
}

/// The designators of VPD page 83 that name the logical unit itself, not the port or the target
/// device it is seen through (SPC-4 7.8.6); empty if there are none.
pub fn parse_identity(page: &[u8]) -> Vec<u8> {
    let mut identity = Vec::new();
    if page.len() < 4 || page[1] != 0x83 {
        return identity;
    }
    let len = usize::from(u16::from_be_bytes([page[2], page[3]]));
    let mut rest = &page[4..page.len().min(4 + len)];
    while let Some(&[_, flags, _, len]) = rest.first_chunk::<4>() {
        let end = 4 + usize::from(len);
        let Some(designator) = rest.get(..end) else { break };
        let association = flags >> 4 & 3;
        if association == 0 {
            identity.extend_from_slice(designator);
        }
        rest = &rest[end..];
    }
    identity
}

/// Sense key, additional code and qualifier of a CHECK CONDITION.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Sense {
    /// 0 to 15.
    pub key: u8,
    /// Additional sense code and its qualifier, e.g. 0x2900.
    pub code: u16,
}

pub const KEY_NOT_READY: u8 = 2;
pub const KEY_MEDIUM_ERROR: u8 = 3;
pub const KEY_HARDWARE_ERROR: u8 = 4;
pub const KEY_ILLEGAL_REQUEST: u8 = 5;
pub const KEY_UNIT_ATTENTION: u8 = 6;
pub const KEY_DATA_PROTECT: u8 = 7;
pub const KEY_ABORTED_COMMAND: u8 = 11;
pub const KEY_MISCOMPARE: u8 = 14;

impl Sense {
    /// Parses the data segment of a SCSI response: two bytes of length, then fixed (70h, 71h) or
    /// descriptor (72h, 73h) format. Some targets send a CHECK CONDITION without sense: `None`.
    pub fn parse(segment: &[u8]) -> Option<Self> {
        let told = usize::from(u16::from_be_bytes(segment.get(..2)?.try_into().ok()?));
        let sense = &segment[2..segment.len().min(2 + told)];
        let code = |at: usize| Some(u16::from_be_bytes(sense.get(at..at + 2)?.try_into().ok()?));
        match sense.first()? & 0x7f {
            0x70 | 0x71 => Some(Self { key: sense.get(2)? & 0x0f, code: code(12).unwrap_or(0) }),
            0x72 | 0x73 => Some(Self { key: sense.get(1)? & 0x0f, code: code(2).unwrap_or(0) }),
            _ => None,
        }
    }
}

impl std::fmt::Display for Sense {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let key = match self.key {
            KEY_NOT_READY => "not ready",
            KEY_MEDIUM_ERROR => "medium error",
            KEY_HARDWARE_ERROR => "hardware error",
            KEY_ILLEGAL_REQUEST => "illegal request",
            KEY_UNIT_ATTENTION => "unit attention",
            KEY_DATA_PROTECT => "data protect",
            KEY_ABORTED_COMMAND => "aborted command",
            KEY_MISCOMPARE => "miscompare",
            _ => "sense key",
        };
        write!(f, "{key} {:X}/{:02X}/{:02X}", self.key, self.code >> 8, self.code & 0xff)
    }
}

impl std::fmt::Debug for Sense {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sense({self})")
    }
}

/// Service actions of PERSISTENT RESERVE OUT that are used (SPC-4 6.16).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReserveAction {
    /// Registers a key for this session, whatever was registered before. Key 0 unregisters.
    RegisterAndIgnore = 6,
    /// Takes the reservation.
    Reserve = 1,
    /// Gives the reservation back.
    Release = 2,
    /// Takes the reservation from the key named.
    Preempt = 4,
}

/// Write Exclusive: anyone may read, only the holder may write.
pub const RESERVATION_TYPE: u8 = 1;
/// Bytes of the parameter list of [`reserve_out`].
pub const RESERVE_LIST_LEN: usize = 24;

/// PERSISTENT RESERVE OUT; data-out is a [`reserve_list`].
pub fn reserve_out(action: ReserveAction) -> Cdb {
    let mut cdb = [0; 10];
    cdb[0] = 0x5f;
    cdb[1] = action as u8;
    cdb[2] = if action == ReserveAction::RegisterAndIgnore { 0 } else { RESERVATION_TYPE };
    cdb[8] = RESERVE_LIST_LEN as u8;
    Cdb::new(cdb)
}

/// The parameter list: the key registered for this session, and the action's own key.
pub fn reserve_list(key: u64, action_key: u64) -> Vec<u8> {
    let mut list = vec![0; RESERVE_LIST_LEN];
    list[..8].copy_from_slice(&key.to_be_bytes());
    list[8..16].copy_from_slice(&action_key.to_be_bytes());
    list
}

/// Bytes asked for by [`read_reservation`].
pub const RESERVATION_LEN: usize = 24;

/// PERSISTENT RESERVE IN, READ RESERVATION (SPC-4 6.15.3).
pub fn read_reservation() -> Cdb {
    let mut cdb = [0; 10];
    cdb[0] = 0x5e;
    cdb[1] = 1;
    cdb[8] = RESERVATION_LEN as u8;
    Cdb::new(cdb)
}

/// The key of the present holder in the answer to [`read_reservation`]; `None` if nobody holds it.
pub fn parse_reservation(bytes: &[u8]) -> Option<u64> {
    let additional = u32::from_be_bytes(bytes.get(4..8)?.try_into().ok()?);
    if additional < 16 {
        return None;
    }
    Some(u64::from_be_bytes(bytes.get(8..16)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn command_blocks_are_those_of_the_standard() {
        assert_eq!(
            read16(0x0102_0304_0506_0708, 0x0a0b_0c0d).as_bytes(),
            [0x88, 0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 0, 0]
        );
        assert_eq!(write16(1, 2).as_bytes()[..2], [0x8a, 0]);
        assert_eq!(
            compare_and_write(5).as_bytes(),
            [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0]
        );
        assert_eq!(unmap(24).as_bytes(), [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]);
        assert_eq!(inquiry_vpd(0xb0).as_bytes(), [0x12, 1, 0xb0, 0, 252, 0]);
        assert_eq!(test_unit_ready().as_bytes(), [0; 6]);
        assert_eq!(
            reserve_out(ReserveAction::Reserve).as_bytes(),
            [0x5f, 1, 1, 0, 0, 0, 0, 0, 24, 0]
        );
        assert_eq!(
            unmap_list(&[(7, 9)]),
            [0, 22, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 9, 0, 0, 0, 0]
        );
    }

    #[test]
    fn sense_is_found_in_both_formats_and_missed_where_there_is_none() {
        let fixed = [0, 18, 0x70, 0, 6, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x29, 2, 0, 0, 0, 0];
        assert_eq!(Sense::parse(&fixed), Some(Sense { key: 6, code: 0x2902 }));
        let descriptor = [0, 8, 0x72, 14, 0x1d, 0, 0, 0, 0, 0];
        assert_eq!(Sense::parse(&descriptor), Some(Sense { key: 14, code: 0x1d00 }));
        assert_eq!(Sense::parse(&[]), None);
        assert_eq!(Sense::parse(&[0, 0]), None);
        assert_eq!(Sense::parse(&[0, 18, 0x70]), None);
        assert_eq!(Sense { key: 5, code: 0x2000 }.to_string(), "illegal request 5/20/00");
    }

    #[test]
    fn a_reservation_without_a_holder_is_told_from_one_with() {
        let mut answer = [0; 24];
        assert_eq!(parse_reservation(&answer), None);
        answer[7] = 16;
        answer[15] = 42;
        assert_eq!(parse_reservation(&answer), Some(42));
    }

    #[test]
    fn pieces_of_an_unmap_are_whole_blocks_of_the_store() {
        let mut page = [0; 64];
        page[1] = 0xb0;
        assert_eq!(BlockLimits::parse(&page).unmap_pieces(512, 4096), (4096, 0), "not told");
        page[30] = 8;
        page[32..36].copy_from_slice(&[0x80, 0, 0, 8 * 3]);
        assert_eq!(BlockLimits::parse(&page).unmap_pieces(512, 4096), (1 << 20, 3 * 4096));
        page[32] = 0;
        assert_eq!(BlockLimits::parse(&page).unmap_pieces(512, 4096), (1 << 20, 0), "not valid");
        assert_eq!(BlockLimits::parse(&page[..34]).unmap_pieces(512, 4096), (1 << 20, 0));
        page[31] = 1;
        assert_eq!(BlockLimits::parse(&page).unmap_pieces(512, 4096), (4096, 0), "odd");
    }

    #[test]
    fn a_target_may_deny_unmap_affirm_it_or_say_nothing() {
        assert_eq!(parse_unmap_supported(&[0, 0xb2, 0, 4, 0, 0x80]), Some(true));
        assert_eq!(parse_unmap_supported(&[0, 0xb2, 0, 4, 0, 0x60]), Some(false));
        assert_eq!(parse_unmap_supported(&[0, 0xb2, 0, 0]), None);
        assert_eq!(parse_unmap_supported(&[0, 0x83, 0, 4, 0, 0x80]), None);
        assert_eq!(parse_unmap_supported(&[]), None);
    }

    #[test]
    fn a_capacity_that_overflows_is_refused() {
        assert_eq!(Capacity::parse(&[0xff; 32]), None);
        let mut answer = [0; 32];
        answer[7] = 9;
        answer[10] = 2;
        assert_eq!(Capacity::parse(&answer), Some(Capacity { blocks: 10, block_len: 512 }));
    }

    #[test]
    fn only_designators_of_the_logical_unit_make_its_identity() {
        let page = [0, 0x83, 0, 11, 1, 0, 0, 2, 7, 8, 1, 0x14, 0, 1, 9];
        assert_eq!(parse_identity(&page), [1, 0, 0, 2, 7, 8]);
        assert!(parse_identity(&page[..9]).is_empty());
    }

    proptest! {
        #[test]
        fn parsers_survive_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Sense::parse(&bytes);
            let _ = Capacity::parse(&bytes);
            let _ = BlockLimits::parse(&bytes).unmap_pieces(512, 4096);
            let _ = parse_unmap_supported(&bytes);
            let _ = parse_reservation(&bytes);
            let _ = parse_identity(&bytes);
        }
    }
}
