//! The parser against well-formed chains in every layout, and against chains that a hostile guest would write.
//!
//! Method: a small guest memory in which a chain is laid out by hand; the parser's verdict and every address that it
//! hands out are checked against what the chain said. Random chains must never make it panic or hand out memory
//! outside the guest's.

use super::*;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemoryMmap};

const MEMORY: usize = 0x40000;
/// A hole lies between the two regions.
const SECOND: u64 = 0x10_0000;
const TABLE: u64 = 0;
const INDIRECT: u64 = 0x1000;
const HEADER: u64 = 0x2000;
const STATUS: u64 = 0x3000;
const DATA: u64 = 0x8000;
const ENTRIES: u16 = 16;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const IN_TABLE: u16 = 4;

const LIMITS: Limits =
    Limits { capacity: 1 << 20, read_only: false, discard: true, write_zeroes: true };

struct Guest {
    memory: GuestMemoryMmap,
}

impl Guest {
    fn new() -> Self {
        let ranges = [(GuestAddress(0), MEMORY), (GuestAddress(SECOND), MEMORY)];
        Self { memory: GuestMemoryMmap::from_ranges(&ranges).unwrap() }
    }

    fn descriptor(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = table + 16 * u64::from(index);
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    fn header(&self, kind: u32, sector: u64) {
        self.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
    }

    /// Lays `buffers` (address, length, writable) out as one chain from descriptor 0 on.
    fn chain(&self, table: u64, buffers: &[(u64, u32, bool)]) {
        for (index, &(address, len, writable)) in (0u16..).zip(buffers) {
            let last = usize::from(index) + 1 == buffers.len();
            let flags = if writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.descriptor(table, index, address, len, flags, index + 1);
        }
    }

    fn parse_with(&self, limits: &Limits) -> (Verdict, Request) {
        let chain = Chain { table: GuestAddress(TABLE), entries: ENTRIES, head: 0 };
        let mut request = Request::default();
        let verdict = parse(&self.memory, chain, limits, &mut request);
        (verdict, request)
    }

    fn parse(&self) -> (Verdict, Request) {
        self.parse_with(&LIMITS)
    }

    fn host(&self, address: u64) -> *mut u8 {
        self.memory.get_host_address(GuestAddress(address)).unwrap()
    }

    fn owns(&self, ptr: *mut u8, len: usize) -> bool {
        [0, SECOND].iter().any(|&base| {
            let start = self.host(base).addr();
            ptr.addr() >= start && ptr.addr() + len <= start + MEMORY
        })
    }
}

fn data(request: &Request) -> Vec<(*mut u8, usize)> {
    request.data.iter().map(|piece| (piece.iov_base.cast(), piece.iov_len)).collect()
}

const IOERR_ANSWER: Verdict = Verdict::Answer(STATUS_IOERR);
const UNSUPP_ANSWER: Verdict = Verdict::Answer(STATUS_UNSUPP);

#[test]
fn a_plain_read_and_a_plain_write() {
    let guest = Guest::new();
    guest.header(0, 77);
    guest.chain(TABLE, &[(HEADER, 16, false), (DATA, 4096, true), (STATUS, 1, true)]);
    let (verdict, request) = guest.parse();
    assert_eq!(verdict, Verdict::Serve);
    assert_eq!((request.kind, request.sector, request.len), (Kind::Read, 77, 4096));
    assert_eq!(data(&request), [(guest.host(DATA), 4096)]);
    assert_eq!(request.status, guest.host(STATUS));

    guest.header(1, 8);
    guest.chain(
        TABLE,
        &[(HEADER, 16, false), (DATA, 512, false), (DATA + 4096, 1024, false), (STATUS, 1, true)],
    );
    let (verdict, request) = guest.parse();
    assert_eq!(verdict, Verdict::Serve);
    assert_eq!((request.kind, request.sector, request.len), (Kind::Write, 8, 1536));
    assert_eq!(data(&request), [(guest.host(DATA), 512), (guest.host(DATA + 4096), 1024)]);
}

#[test]
fn an_indirect_table_may_follow_direct_descriptors() {
    let guest = Guest::new();
    guest.header(0, 0);
    guest.chain(INDIRECT, &[(DATA, 512, true), (STATUS, 1, true)]);
    guest.descriptor(TABLE, 0, HEADER, 16, NEXT, 5);
    guest.descriptor(TABLE, 5, INDIRECT, 32, IN_TABLE, 0);
    let (verdict, request) = guest.parse();
    assert_eq!((verdict, request.len), (Verdict::Serve, 512));
}

#[test]
fn header_data_and_status_may_share_and_split_buffers() {
    let guest = Guest::new();
    guest.header(1, 3);
    // Header in three parts, the last of which runs on into the data.
    guest.memory.write_slice(&[9; 512], GuestAddress(HEADER + 16)).unwrap();
    guest.chain(
        TABLE,
        &[
            (HEADER, 5, false),
            (HEADER + 5, 0, false),
            (HEADER + 5, 3, false),
            (HEADER + 8, 8 + 512, false),
            (STATUS, 1, true),
        ],
    );
    let (verdict, request) = guest.parse();
    assert_eq!((verdict, request.sector), (Verdict::Serve, 3));
    assert_eq!(data(&request), [(guest.host(HEADER + 16), 512)]);
    // Status in the data's buffer.
    guest.header(0, 3);
    guest.chain(TABLE, &[(HEADER, 16, false), (DATA, 513, true)]);
    let (verdict, request) = guest.parse();
    assert_eq!((verdict, request.status), (Verdict::Serve, guest.host(DATA + 512)));
    assert_eq!(data(&request), [(guest.host(DATA), 512)]);
}

#[test]
fn transfers_must_be_whole_sectors_inside_the_disk() {
    let guest = Guest::new();
    let read = |sector, len| {
        guest.header(0, sector);
        guest.chain(TABLE, &[(HEADER, 16, false), (DATA, len, true), (STATUS, 1, true)]);
        guest.parse().0
    };
    assert_eq!(read(LIMITS.capacity - 8, 4096), Verdict::Serve);
    assert_eq!(read(LIMITS.capacity - 7, 4096), IOERR_ANSWER);
    assert_eq!(read(LIMITS.capacity, 512), IOERR_ANSWER);
    assert_eq!(read(u64::MAX, 512), IOERR_ANSWER);
    assert_eq!(read(u64::MAX - 7, 4096), IOERR_ANSWER);
    assert_eq!(read(0, 511), IOERR_ANSWER);
    assert_eq!(read(0, 0), IOERR_ANSWER);
}

#[test]
fn data_on_the_wrong_side_is_refused() {
    let guest = Guest::new();
    guest.header(0, 0);
    guest.chain(TABLE, &[(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, true)]);
    assert_eq!(guest.parse().0, IOERR_ANSWER, "a read into memory that may not be written");
    guest.header(1, 0);
    guest.chain(TABLE, &[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    assert_eq!(guest.parse().0, IOERR_ANSWER, "a write from memory that is for results");
    guest.chain(
        TABLE,
        &[(HEADER, 16, false), (DATA, 512, true), (DATA, 512, false), (STATUS, 1, true)],
    );
    assert_eq!(guest.parse().0, IOERR_ANSWER, "readable behind writable");
}

#[test]
fn without_a_status_byte_nothing_is_answered() {
    let guest = Guest::new();
    guest.header(1, 0);
    guest.chain(TABLE, &[(HEADER, 16, false), (DATA, 512, false)]);
    assert_eq!(guest.parse().0, Verdict::Unanswerable);
    guest.chain(TABLE, &[(HEADER, 16, false), (STATUS, 0, true)]);
    assert_eq!(guest.parse().0, Verdict::Unanswerable);
    guest.chain(TABLE, &[(HEADER, 16, false), (SECOND - 1, 1, true)]);
    let (verdict, request) = guest.parse();
    assert_eq!((verdict, request.status.is_null()), (Verdict::Unanswerable, true));
}

#[test]
fn buffers_outside_guest_memory_are_refused_with_a_status() {
    let guest = Guest::new();
    for (address, len) in [
        (MEMORY as u64, 512),
        (MEMORY as u64 - 1, 512),
        (DATA, u32::MAX),
        (u64::MAX, 512),
        (u64::MAX - 511, 512),
    ] {
        for (kind, writable) in [(0, true), (1, false)] {
            guest.header(kind, 0);
            guest.chain(TABLE, &[(HEADER, 16, false), (address, len, writable), (STATUS, 1, true)]);
            let (verdict, request) = guest.parse();
            assert_eq!(verdict, IOERR_ANSWER, "{address:#x} {len}");
            assert_eq!(request.status, guest.host(STATUS));
        }
    }
    guest.chain(TABLE, &[(MEMORY as u64, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    assert_eq!(guest.parse().0, IOERR_ANSWER, "a header outside");
    guest.chain(TABLE, &[(HEADER, 15, false), (STATUS, 1, true)]);
    assert_eq!(guest.parse().0, IOERR_ANSWER, "a header too short");
}

#[test]
fn malformed_chains_are_given_back_unanswered() {
    let guest = Guest::new();
    guest.header(0, 0);
    // A loop.
    guest.descriptor(TABLE, 0, HEADER, 16, NEXT, 1);
    guest.descriptor(TABLE, 1, STATUS, 1, NEXT | WRITE, 0);
    assert_eq!(guest.parse().0, Verdict::Unanswerable);
    // A link out of the table.
    guest.descriptor(TABLE, 1, STATUS, 1, NEXT | WRITE, ENTRIES);
    assert_eq!(guest.parse().0, Verdict::Unanswerable);
    // Bad indirect tables: empty, not of whole entries, with a successor, outside memory, nested.
    for (address, len, flags) in [
        (INDIRECT, 0, IN_TABLE),
        (INDIRECT, 17, IN_TABLE),
        (INDIRECT, 32, IN_TABLE | NEXT),
        (MEMORY as u64, 32, IN_TABLE),
        (u64::MAX - 15, 32, IN_TABLE),
    ] {
        guest.descriptor(TABLE, 0, address, len, flags, 1);
        assert_eq!(guest.parse().0, Verdict::Unanswerable, "{address:#x} {len} {flags}");
    }
    guest.descriptor(INDIRECT, 0, INDIRECT, 32, IN_TABLE, 0);
    guest.descriptor(TABLE, 0, INDIRECT, 32, IN_TABLE, 0);
    assert_eq!(guest.parse().0, Verdict::Unanswerable);
    let chain = Chain { table: GuestAddress(MEMORY as u64 - 8), entries: ENTRIES, head: 0 };
    assert_eq!(
        parse(&guest.memory, chain, &LIMITS, &mut Request::default()),
        Verdict::Unanswerable
    );
}

#[test]
fn a_long_indirect_chain_ends_at_the_limit() {
    let guest = Guest::new();
    let count = 2000u16;
    for index in 0..count {
        guest.descriptor(SECOND, index, DATA, 512, NEXT, index + 1);
    }
    guest.descriptor(SECOND, count, STATUS, 1, WRITE, 0);
    guest.descriptor(TABLE, 0, SECOND, u32::from(count + 1) * 16, IN_TABLE, 0);
    assert_eq!(guest.parse().0, Verdict::Unanswerable);
}

#[test]
fn flush_get_id_and_unknown_kinds() {
    let guest = Guest::new();
    guest.chain(TABLE, &[(HEADER, 16, false), (STATUS, 1, true)]);
    guest.header(4, u64::MAX);
    let (verdict, request) = guest.parse();
    assert_eq!((verdict, request.kind), (Verdict::Serve, Kind::Flush));
    for unknown in [2, 3, 5, 12, 14, 0x8000_0000, u32::MAX] {
        guest.header(unknown, 0);
        assert_eq!(guest.parse().0, UNSUPP_ANSWER, "type {unknown}");
    }
    guest.header(8, 0);
    assert_eq!(guest.parse().0, IOERR_ANSWER, "GET_ID without a buffer");
    guest.chain(TABLE, &[(HEADER, 16, false), (DATA, 20, true), (STATUS, 1, true)]);
    let (verdict, request) = guest.parse();
    assert_eq!((verdict, request.kind, request.len), (Verdict::Serve, Kind::GetId, 20));
}

#[test]
fn discards_and_zeroings_carry_checked_ranges() {
    let guest = Guest::new();
    let range = |index: u64, sector: u64, sectors: u32, flags: u32| {
        let at = DATA + 16 * index;
        guest.memory.write_obj(sector, GuestAddress(at)).unwrap();
        guest.memory.write_obj(sectors, GuestAddress(at + 8)).unwrap();
        guest.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
    };
    let parse = |kind, len| {
        guest.header(kind, 0);
        guest.chain(TABLE, &[(HEADER, 16, false), (DATA, len, false), (STATUS, 1, true)]);
        guest.parse()
    };
    range(0, 8, 16, 0);
    range(1, 100, 0, 0);
    range(2, LIMITS.capacity - 1, 1, 0);
    let (verdict, request) = parse(11, 48);
    assert_eq!((verdict, request.kind), (Verdict::Serve, Kind::Discard));
    let last = LIMITS.capacity - 1;
    assert_eq!(
        request.ranges,
        [ZeroRange { sector: 8, sectors: 16 }, ZeroRange { sector: last, sectors: 1 }]
    );
    for (sector, sectors) in [(LIMITS.capacity, 1), (u64::MAX, 1), (0, ZERO_SECTORS_MAX + 1)] {
        range(0, sector, sectors, 0);
        assert_eq!(parse(11, 16).0, IOERR_ANSWER, "{sector} {sectors}");
    }
    range(0, 0, 8, FLAG_UNMAP);
    assert_eq!(parse(11, 16).0, UNSUPP_ANSWER, "a discard cannot ask for unmap");
    assert_eq!(parse(13, 16).0, Verdict::Serve);
    range(0, 0, 8, 2);
    assert_eq!(parse(13, 16).0, UNSUPP_ANSWER);
    for len in [0, 15, 17, 16 * (ZERO_RANGES_MAX + 1)] {
        assert_eq!(parse(13, len).0, IOERR_ANSWER, "{len} bytes of ranges");
    }
    range(0, 0, 8, 0);
    guest.header(11, 0);
    let refused = Limits { discard: false, ..LIMITS };
    guest.chain(TABLE, &[(HEADER, 16, false), (DATA, 16, false), (STATUS, 1, true)]);
    assert_eq!(guest.parse_with(&refused).0, UNSUPP_ANSWER, "not negotiated");
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let guest = Guest::new();
    let limits = Limits { read_only: true, discard: false, write_zeroes: false, ..LIMITS };
    guest.header(1, 0);
    guest.chain(TABLE, &[(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, true)]);
    assert_eq!(guest.parse_with(&limits).0, IOERR_ANSWER);
}

#[test]
fn a_buffer_across_two_regions_becomes_two_pieces() {
    let ranges = [(GuestAddress(0), MEMORY), (GuestAddress(MEMORY as u64), MEMORY)];
    let guest = Guest { memory: GuestMemoryMmap::from_ranges(&ranges).unwrap() };
    guest.header(0, 0);
    let edge = MEMORY as u64 - 512;
    guest.chain(TABLE, &[(HEADER, 16, false), (edge, 1024, true), (STATUS, 1, true)]);
    let (verdict, request) = guest.parse();
    assert_eq!(verdict, Verdict::Serve);
    assert_eq!(data(&request), [(guest.host(edge), 512), (guest.host(MEMORY as u64), 512)]);
}

/// Addresses and lengths near everything that matters.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..MEMORY as u64,
        Just(HEADER),
        Just(STATUS),
        Just(MEMORY as u64 - 1),
        SECOND..SECOND + MEMORY as u64,
        any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![0..2048u32, Just(16), Just(1), Just(512), Just(4096), any::<u32>()]
}

proptest! {
    /// Any table, direct or indirect, with any content: no panic, and nothing outside the guest's memory is handed out.
    #[test]
    fn random_chains_never_leave_guest_memory(
        entries in prop::collection::vec((address(), length(), 0u16..8, 0u16..20), 1..ENTRIES as usize),
        inner in prop::collection::vec((address(), length(), 0u16..8, 0u16..20), 0..8),
        kind in prop_oneof![0u32..16, any::<u32>()],
        sector in prop_oneof![0u64..2048, any::<u64>()],
        head in 0u16..20,
    ) {
        let guest = Guest::new();
        for (index, &(address, len, flags, next)) in (0u16..).zip(&inner) {
            guest.descriptor(INDIRECT, index, address, len, flags, next);
        }
        for (index, &(address, len, flags, next)) in (0u16..).zip(&entries) {
            let address = if flags & IN_TABLE != 0 { INDIRECT } else { address };
            guest.descriptor(TABLE, index, address, len, flags, next);
        }
        guest.header(kind, sector);
        let chain = Chain { table: GuestAddress(TABLE), entries: ENTRIES, head };
        let mut request = Request::default();
        let verdict = parse(&guest.memory, chain, &LIMITS, &mut request);
        if verdict != Verdict::Unanswerable {
            prop_assert!(guest.owns(request.status, 1));
        }
        if verdict == Verdict::Serve {
            let total: usize = request.data.iter().map(|piece| piece.iov_len).sum();
            for piece in &request.data {
                prop_assert!(piece.iov_len > 0);
                prop_assert!(guest.owns(piece.iov_base.cast(), piece.iov_len));
            }
            if matches!(request.kind, Kind::Read | Kind::Write) {
                prop_assert_eq!(total, request.len);
                prop_assert!(request.sector + (request.len / 512) as u64 <= LIMITS.capacity);
            }
            for range in &request.ranges {
                prop_assert!(range.sector + range.sectors <= LIMITS.capacity && range.sectors > 0);
            }
        }
    }
}
