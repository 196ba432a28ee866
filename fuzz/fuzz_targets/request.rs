//! Parsing a virtqueue's descriptor chain out of memory that a hostile guest filled.
//!
//! The input is the guest's memory itself: the first 16 KiB (descriptor table, indirect tables, headers), and the head's
//! index. Two regions with a hole between them give addresses that straddle, touch and miss memory. Whatever the verdict,
//! every address that the parser hands out must lie inside that memory.

#![no_main]

use ballast_vhost::request::{Chain, Kind, Limits, Request, Verdict, parse};
use libfuzzer_sys::fuzz_target;
use std::cell::RefCell;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const FIRST: usize = 64 << 10;
const SECOND: usize = 16 << 10;
const SECOND_AT: u64 = 96 << 10;

thread_local! {
    static GUEST: (GuestMemoryMmap, RefCell<Request>) = (
        GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), FIRST),
            (GuestAddress(SECOND_AT), SECOND),
        ])
        .expect("anonymous memory"),
        RefCell::default(),
    );
}

fn owns(memory: &GuestMemoryMmap, ptr: usize, len: usize) -> bool {
    [(0, FIRST), (SECOND_AT, SECOND)].iter().any(|&(base, size)| {
        let start = memory.get_host_address(GuestAddress(base)).expect("mapped").addr();
        ptr >= start && len <= size && ptr - start <= size - len
    })
}

fuzz_target!(|input: &[u8]| {
    let [shape, head, bytes @ ..] = input else { return };
    GUEST.with(|(memory, request)| {
        let request = &mut *request.borrow_mut();
        let blank = [0u8; 16 << 10];
        memory.write_slice(&blank, GuestAddress(0)).expect("mapped");
        let bytes = &bytes[..bytes.len().min(blank.len())];
        memory.write_slice(bytes, GuestAddress(0)).expect("mapped");
        let limits = Limits {
            capacity: 2048,
            read_only: shape & 1 != 0,
            discard: shape & 2 != 0,
            write_zeroes: shape & 4 != 0,
        };
        let entries = 1 << (shape >> 4 & 7);
        let chain = Chain { table: GuestAddress(0), entries, head: u16::from(*head) };
        let verdict = parse(memory, chain, &limits, request);
        if verdict != Verdict::Serve {
            return;
        }
        let mut total = 0;
        for piece in &request.data {
            assert!(owns(memory, piece.iov_base.addr(), piece.iov_len), "outside guest memory");
            total += piece.iov_len;
        }
        if matches!(request.kind, Kind::Read | Kind::Write) {
            assert_eq!(total, request.len);
            assert!(request.sector + (request.len / 512) as u64 <= limits.capacity);
            assert!(!limits.read_only || request.kind == Kind::Read);
        }
        for range in &request.ranges {
            assert!(range.sectors > 0 && range.sector + range.sectors <= limits.capacity);
        }
    });
});
