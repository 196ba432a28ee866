//! Goal: nothing is lost, torn or mixed up under depth. Method: the `virtio-driver` crate as guest, two queues kept full
//! of writes, reads and flushes of random length over one disk; each request owns its blocks while it is under way, every
//! block carries its address and version, and each read is compared.

use crate::rig::{BLOCK, Rig};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::time::{Duration, Instant};
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};

const QUEUES: usize = 2;
const DEPTH: usize = 24;
const BLOCKS: usize = 2048;
const LONGEST: usize = 8;
const REQUESTS: usize = 20_000;
const WATCHDOG: Duration = Duration::from_secs(60);

/// Shared memory: `LONGEST` blocks for each request under way.
struct Buffers {
    _file: File,
    base: NonNull<u8>,
}

impl Buffers {
    const LEN: usize = QUEUES * DEPTH * LONGEST * BLOCK;

    fn new(transport: &mut VirtioBlkTransport) -> Self {
        // SAFETY: plain system calls; the descriptor is new and owned by nobody else.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"load".as_ptr(), 0)) };
        file.set_len(Self::LEN as u64).unwrap();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new shared mapping of a file of that length, never unmapped.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::LEN,
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        transport.map_mem_region(base as usize, Self::LEN, file.as_raw_fd(), 0).unwrap();
        Self { _file: file, base: NonNull::new(base.cast()).unwrap() }
    }

    fn of(&self, slot: usize) -> *mut u8 {
        // SAFETY: slots lie inside the mapping.
        unsafe { self.base.as_ptr().add(slot * LONGEST * BLOCK) }
    }

    fn bytes(&self, slot: usize, len: usize) -> &[u8] {
        // SAFETY: inside the mapping; the slot's request has ended, so the server does not write there.
        unsafe { std::slice::from_raw_parts(self.of(slot), len) }
    }

    fn bytes_mut(&mut self, slot: usize, len: usize) -> &mut [u8] {
        // SAFETY: as above, and nobody else has the slot.
        unsafe { std::slice::from_raw_parts_mut(self.of(slot), len) }
    }
}

#[derive(Clone, Copy, Debug)]
struct Busy {
    slot: usize,
    kind: Kind,
    first: usize,
    blocks: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
}

/// A block's content: its address and version all over; version 0 is a block never written.
fn stamp(into: &mut [u8], block: usize, version: u64) {
    let word = if version == 0 { 0 } else { (block as u64) << 40 | version };
    into.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&word.to_le_bytes()));
}

#[test]
fn deep_queues_keep_every_block_apart() {
    let rig = Rig::start((BLOCKS * BLOCK) as u64, 32 << 20);
    let mask = (VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX).bits()
        | 1 << 12
        | 1 << 9;
    let socket = rig.socket();
    let mut transport: Box<VirtioBlkTransport> =
        Box::new(VhostUser::new(socket.to_str().unwrap(), mask).unwrap());
    let mut queues: Vec<VirtioBlkQueue<'_, Busy>> =
        VirtioBlkQueue::setup_queues(&mut *transport, QUEUES, 128).unwrap();
    let mut buffers = Buffers::new(&mut *transport);
    let notifiers: Vec<_> =
        (0..QUEUES).map(|queue| transport.get_submission_notifier(queue)).collect();
    let mut free: Vec<usize> = (0..QUEUES * DEPTH).collect();
    let mut versions = vec![0u64; BLOCKS];
    let mut busy = vec![false; BLOCKS];
    let mut rng = StdRng::seed_from_u64(11);
    let mut expected = vec![0u8; LONGEST * BLOCK];
    let (mut submitted, mut done) = (0, 0);
    let mut last = Instant::now();
    while done < REQUESTS {
        let mut kicked = [false; QUEUES];
        while submitted < REQUESTS && !free.is_empty() {
            let (first, blocks) =
                (rng.random_range(0..BLOCKS - LONGEST), rng.random_range(1..=LONGEST));
            if busy[first..first + blocks].contains(&true) {
                continue;
            }
            let kind = match rng.random_range(0..10) {
                0..5 => Kind::Write,
                5..9 => Kind::Read,
                _ => Kind::Flush,
            };
            let slot = free.pop().unwrap();
            let queue = slot % QUEUES;
            let (at, len) = ((first * BLOCK) as u64, blocks * BLOCK);
            let request = Busy { slot, kind, first, blocks };
            let pointer = buffers.of(slot);
            let result = match kind {
                Kind::Write => {
                    for (n, into) in
                        buffers.bytes_mut(slot, len).chunks_exact_mut(BLOCK).enumerate()
                    {
                        versions[first + n] += 1;
                        stamp(into, first + n, versions[first + n]);
                    }
                    // SAFETY: the slot's memory is shared and stays until the request ends.
                    unsafe { queues[queue].write_raw(at, pointer, len, request) }
                }
                // SAFETY: as above.
                Kind::Read => unsafe { queues[queue].read_raw(at, pointer, len, request) },
                Kind::Flush => queues[queue].flush(request),
            };
            result.unwrap();
            if kind != Kind::Flush {
                busy[first..first + blocks].fill(true);
            }
            submitted += 1;
            kicked[queue] = true;
        }
        for (queue, _) in kicked.iter().enumerate().filter(|(_, kicked)| **kicked) {
            notifiers[queue].notify().unwrap();
        }
        for queue in &mut queues {
            let ended: Vec<_> = queue.completions().map(|c| (c.context, c.ret)).collect();
            for (request, status) in ended {
                assert_eq!(status, 0, "{request:?}");
                let Busy { slot, kind, first, blocks } = request;
                if kind == Kind::Read {
                    let len = blocks * BLOCK;
                    for (n, into) in expected[..len].chunks_exact_mut(BLOCK).enumerate() {
                        stamp(into, first + n, versions[first + n]);
                    }
                    assert!(buffers.bytes(slot, len) == &expected[..len], "{request:?}");
                }
                if kind != Kind::Flush {
                    busy[first..first + blocks].fill(false);
                }
                free.push(slot);
                done += 1;
                last = Instant::now();
            }
        }
        assert!(last.elapsed() < WATCHDOG, "{done} of {REQUESTS} done, {:?}", rig.server().stats());
        std::thread::yield_now();
    }
    let stats = rig.server().stats();
    assert_eq!((stats.reads + stats.writes + stats.flushes) as usize, REQUESTS);
    assert_eq!((stats.failed, stats.refused), (0, 0));
}
