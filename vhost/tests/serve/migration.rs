//! Goal: what a front end needs for live migration and for a disk that grows. Every page that we write is in the dirty
//! log; the target's front end may be there before the source's has let go; a change of size is told.
//!
//! Method for the log: random requests; after each, the marked pages must be exactly those that the request had to
//! write (read buffers, status byte, used ring), and every page of guest data that changed must be among them.

use crate::data::pattern;
use crate::guest::{DATA, Guest, MEMORY, OK, RING, feature};
use crate::rig::{BLOCK, Rig};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use vhost::VhostBackend;
use vhost::VhostUserDirtyLogRegion;
use vhost::vhost_user::VhostUserFrontend;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// The log as the front end has it.
struct Log {
    file: File,
}

impl Log {
    /// A log for all of a guest's memory, announced but not switched on.
    fn announce(guest: &Guest) -> Self {
        let file = tempfile::tempfile().unwrap();
        let len = MEMORY / PAGE / 8;
        file.set_len(len).unwrap();
        let region = VhostUserDirtyLogRegion {
            mmap_size: len,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        guest.front_end.set_log_base(0, Some(region)).unwrap();
        Self { file }
    }

    fn switch(guest: &Guest, on: bool) {
        let log = if on { feature::LOG_ALL } else { 0 };
        guest.front_end.set_features(guest.features & !feature::LOG_ALL | log).unwrap();
    }

    /// The marked pages; the marks are taken away.
    fn take(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; (MEMORY / PAGE / 8) as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        self.file.write_all_at(&vec![0; bytes.len()], 0).unwrap();
        let marked = |page: &u64| bytes[(page / 8) as usize] & 1 << (page % 8) != 0;
        (0..MEMORY / PAGE).filter(marked).collect()
    }
}

fn pages(address: u64, len: u64) -> impl Iterator<Item = u64> {
    address / PAGE..=(address + len - 1) / PAGE
}

#[test]
fn the_log_names_the_pages_that_were_written_and_no_others() {
    const DISK: u64 = 4 * MIB;
    let rig = Rig::start(DISK, 32 * MIB);
    let mut guest = Guest::simple(&rig.socket());
    let log = Log::announce(&guest);
    assert_eq!(guest.write(0, &pattern(1, MIB as usize)), OK);
    assert!(log.take().is_empty(), "not switched on yet");
    Log::switch(&guest, true);
    let mut rng = StdRng::seed_from_u64(11);
    let area = (MEMORY - DATA) as usize;
    for step in 0..600 {
        let (kind, len) = match rng.random_range(0..10) {
            0..6 => (0, 512 * rng.random_range(1..200u64)),
            6..8 => (1, 512 * rng.random_range(1..64u64)),
            8 => (8, 20),
            _ => (4, 0),
        };
        let sector = rng.random_range(0..(DISK - len.next_multiple_of(512)) / 512);
        let mut expected = BTreeSet::new();
        // Two buffers with a hole between them, one of them at an odd place now and then.
        let first = if len < 1024 { len } else { 512 * rng.random_range(1..len / 512) };
        let odd = if rng.random_bool(0.3) { 7 } else { 0 };
        let parts =
            [(DATA + 512 * rng.random_range(0..64) + odd, first), (DATA + MIB, len - first)];
        let mut buffers = vec![];
        for (at, len) in parts.into_iter().filter(|part| part.1 > 0) {
            buffers.push((at, len as u32, kind != 1));
            if kind != 1 {
                expected.extend(pages(at, len));
            }
        }
        let before = guest.peek(DATA, area);
        let head = guest.queues[0].submit(kind, sector, &buffers);
        assert_eq!(guest.queues[0].next_used().2, OK);
        let after = guest.peek(DATA, area);
        expected.insert(guest.queues[0].status_address(head) / PAGE);
        expected.insert(guest.queues[0].used_ring() / PAGE);
        // The used ring is marked when the completion can be seen already, and once more for the wish for kicks.
        let mut marked = BTreeSet::new();
        rig.wait_until("the used ring is marked", |_| {
            marked.append(&mut log.take());
            marked.contains(&(guest.queues[0].used_ring() / PAGE))
        });
        assert_eq!(marked, expected, "step {step}: request {kind} of {len} bytes at {parts:x?}");
        for (page, (a, b)) in before.chunks(4096).zip(after.chunks(4096)).enumerate() {
            let page = DATA / PAGE + page as u64;
            assert!(a == b || marked.contains(&page), "step {step}: page {page:#x} was written");
        }
        if rng.random_bool(0.02) {
            rig.drain();
        }
    }
    Log::switch(&guest, false);
    log.take();
    assert_eq!(guest.read(0, BLOCK).unwrap().len(), BLOCK);
    assert!(log.take().is_empty(), "switched off");
}

/// The front end resizes its log when the guest's memory grows, stops its rings and starts them again.
#[test]
fn another_log_takes_the_place_of_the_first_and_outlives_a_stop() {
    let rig = Rig::start(MIB, 64 * MIB);
    let mut guest = Guest::simple(&rig.socket());
    let first = Log::announce(&guest);
    Log::switch(&guest, true);
    assert_eq!(guest.read(0, BLOCK), Ok(vec![0; BLOCK]));
    assert!(first.take().contains(&(DATA / PAGE)));
    let second = Log::announce(&guest);
    first.take();
    assert_eq!(guest.read(0, BLOCK), Ok(vec![0; BLOCK]));
    assert!(first.take().is_empty() && second.take().contains(&(DATA / PAGE)));
    let base = guest.front_end.get_vring_base(0).unwrap();
    guest.start_queue(0, base as u16);
    assert_eq!(guest.read(0, BLOCK), Ok(vec![0; BLOCK]));
    assert!(second.take().contains(&(DATA / PAGE)));
    let short = tempfile::tempfile().unwrap();
    let region =
        VhostUserDirtyLogRegion { mmap_size: 4096, mmap_offset: 0, mmap_handle: short.as_raw_fd() };
    assert!(guest.front_end.set_log_base(0, Some(region)).is_err(), "a log beyond its file");
}

/// A live migration as the back end sees it. The target connects, asks and shares its memory while the source's guest
/// runs; its rings start when the source's have stopped; and should it come to nothing, the source goes on.
#[test]
fn the_target_of_a_migration_takes_over_when_the_source_has_stopped() {
    let rig = Rig::start(MIB, 64 * MIB);
    let mut source = Guest::simple(&rig.socket());
    assert_eq!(source.write(0, &pattern(1, BLOCK)), OK);
    let mut target = Guest::negotiate(&rig.socket(), source.features).unwrap();
    assert_eq!(target.config(0, 8), (MIB / 512).to_le_bytes());
    target.add_queue(0);
    assert_eq!(source.write(8, &pattern(2, BLOCK)), OK, "the target's presence disturbs nobody");
    let base = std::thread::scope(|scope| {
        // It may well be early.
        let early = scope.spawn(|| target.start_queue(0, 0));
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(source.write(16, &pattern(3, BLOCK)), OK);
        let base = source.front_end.get_vring_base(0).unwrap();
        early.join().unwrap();
        base
    });
    for n in 0..3 {
        assert_eq!(target.read(8 * n, BLOCK), Ok(pattern(n + 1, BLOCK)));
    }
    assert_eq!(target.write(0, &pattern(4, BLOCK)), OK);
    drop(target);
    source.start_queue(0, base as u16);
    assert_eq!(source.read(0, BLOCK), Ok(pattern(4, BLOCK)));
    assert_eq!(source.write(0, &pattern(5, BLOCK)), OK);
}

/// Two machines on one disk by mistake: the second is refused, and the first never notices.
#[test]
fn a_front_end_whose_rings_start_beside_anothers_is_cut_off() {
    let rig = Rig::start(MIB, 64 * MIB);
    let mut first = Guest::simple(&rig.socket());
    let mut second = Guest::negotiate(&rig.socket(), feature::USUAL).unwrap();
    second.add_queue(0);
    let queue = &second.queues[0];
    let config = vhost::VringConfigData {
        queue_max_size: RING,
        queue_size: RING,
        flags: 0,
        desc_table_addr: second.memory.user(0),
        used_ring_addr: second.memory.user(queue.used_ring()),
        avail_ring_addr: second.memory.user(0x1000),
        log_addr: None,
    };
    second.front_end.set_vring_num(0, RING).unwrap();
    second.front_end.set_vring_addr(0, &config).unwrap();
    assert!(second.front_end.set_vring_kick(0, &queue.kick).is_err());
    assert_eq!(first.write(0, &[1; 512]), OK);
    rig.wait_until("cut off", |_| !second.is_connected());
    assert!(first.is_connected());
}

#[test]
fn a_disk_that_grew_is_told_to_its_front_end() {
    let rig = Rig::start(MIB, 64 * MIB);
    let mut guest = Guest::negotiate(&rig.socket(), feature::USUAL).unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    guest.front_end.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    guest.add_queue(0);
    guest.start_queue(0, 0);
    let mut message = [0; 12];
    // Once at the start of the first ring: the disk may have grown while nobody served this front end.
    ours.read_exact(&mut message).unwrap();
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.read(MIB / 512, 512), Err(crate::guest::IOERR));
    rig.resize(2 * MIB);
    ours.read_exact(&mut message).unwrap();
    assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(guest.config(0, 8), (2 * MIB / 512).to_le_bytes());
    assert_eq!(guest.write(2 * MIB / 512 - 1, &[9; 512]), OK);
    assert_eq!(guest.read(2 * MIB / 512 - 1, 512), Ok(vec![9; 512]));
    ours.set_nonblocking(true).unwrap();
    assert!(ours.read(&mut message).is_err(), "told once");
}
