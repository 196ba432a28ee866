//! Goal: what a guest reads is what it wrote, whatever the shape of its requests and wherever the bytes lie.

use crate::guest::{DATA, Guest, IOERR, OK, UNSUPP, feature};
use crate::rig::{BLOCK, Rig};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::os::fd::AsRawFd;
use vhost::vhost_user::VhostUserFrontend;

const MIB: u64 = 1 << 20;

pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed).fill(&mut bytes[..]);
    bytes
}

/// Writes one marked block and gets it out of memory and into the store, so that reads find it on the cache device.
fn settled_block(rig: &Rig, guest: &mut Guest, sector: u64, seed: u64) -> Vec<u8> {
    let block = pattern(seed, BLOCK);
    assert_eq!(guest.write(sector, &block), OK);
    // Draining seals the segment that holds it.
    rig.drain();
    block
}

#[test]
fn written_data_is_read_back() {
    let rig = Rig::start(64 * MIB, 64 * MIB);
    let mut guest = Guest::simple(&rig.socket());
    let data = pattern(1, 3 * BLOCK);
    assert_eq!(guest.write(8, &data), OK);
    assert_eq!(guest.read(8, data.len()), Ok(data.clone()));
    assert_eq!(guest.flush(), OK);
    assert_eq!(guest.read(0, BLOCK), Ok(vec![0; BLOCK]));
    assert_eq!(guest.read(11, 512), Ok(data[3 * 512..4 * 512].to_vec()));
    let stats = rig.server().stats();
    assert_eq!((stats.reads, stats.writes, stats.flushes), (3, 1, 1));
    assert_eq!((stats.written_bytes, stats.connected), (data.len() as u64, true));
}

/// Splits `len` bytes into guest buffers at `at`; with gaps, and oddly aligned if `odd`.
fn scatter(rng: &mut StdRng, at: u64, len: usize, odd: bool) -> Vec<(u64, usize)> {
    let mut parts = vec![];
    let (mut at, mut left) = (at, len);
    let unit = if odd { 1 } else { 512 };
    while left > 0 {
        let most = if parts.len() == 6 { left } else { rng.random_range(1..=left) };
        let part = most.next_multiple_of(unit).min(left);
        parts.push((at, part));
        at += (part + unit * rng.random_range(0..3)).next_multiple_of(unit) as u64;
        left -= part;
    }
    parts
}

/// Method: random requests of every kind against a model of the disk. The cache is small and the flusher busy, so blocks
/// are found in memory, on the cache device, in the store, patched over each of these, and nowhere.
#[test]
fn random_requests_agree_with_a_model() {
    const DISK: usize = 8 << 20;
    let rig = Rig::start(DISK as u64, 32 * MIB);
    let mut guest = Guest::simple(&rig.socket());
    let mut model = vec![0u8; DISK];
    let seed = std::env::var("SEED").map_or(7, |seed| seed.parse().unwrap());
    let mut rng = StdRng::seed_from_u64(seed);
    for step in 0..2500 {
        let sectors =
            if rng.random_bool(0.8) { rng.random_range(1..64) } else { rng.random_range(1..2800) };
        let sector = rng.random_range(0..DISK / 512 - sectors);
        let (from, to) = (sector * 512, (sector + sectors) * 512);
        let odd = rng.random_bool(0.3);
        let parts = scatter(&mut rng, DATA + if odd { 3 } else { 0 }, to - from, odd);
        let buffers = |writable| {
            parts.iter().map(|&(at, len)| (at, len as u32, writable)).collect::<Vec<_>>()
        };
        match rng.random_range(0..100) {
            0..45 => {
                let data = pattern(step, to - from);
                let mut rest = &data[..];
                for &(at, len) in &parts {
                    guest.poke(at, &rest[..len]);
                    rest = &rest[len..];
                }
                assert_eq!(guest.request(1, sector as u64, &buffers(false)), OK);
                model[from..to].copy_from_slice(&data);
            }
            45..85 => {
                assert_eq!(guest.request(0, sector as u64, &buffers(true)), OK);
                let got: Vec<u8> =
                    parts.iter().flat_map(|&(at, len)| guest.peek(at, len)).collect();
                assert!(
                    got == model[from..to],
                    "seed {seed} step {step}: sectors {sector}+{sectors}"
                );
            }
            85..90 => {
                assert_eq!(guest.zero(13, sector as u64, sectors as u32), OK);
                model[from..to].fill(0);
            }
            90..95 => {
                assert_eq!(guest.zero(11, sector as u64, sectors as u32), OK);
                let (first, last) = (from.next_multiple_of(BLOCK), to / BLOCK * BLOCK);
                if first < last {
                    model[first..last].fill(0);
                }
            }
            95..98 => assert_eq!(guest.flush(), OK),
            _ => rig.drain(),
        }
    }
    assert_eq!(guest.read(0, DISK).map(|got| got == model), Ok(true));
    assert_eq!(rig.server().stats().failed, 0);
}

#[test]
fn requests_out_of_range_fail_and_the_disk_goes_on() {
    let rig = Rig::start(MIB, 64 * MIB);
    let mut guest = Guest::simple(&rig.socket());
    let last = MIB / 512 - 1;
    assert_eq!(guest.write(last, &[1; 512]), OK);
    assert_eq!(guest.write(last, &[1; 1024]), IOERR);
    assert_eq!(guest.read(last + 1, 512), Err(IOERR));
    assert_eq!(guest.request(99, 0, &[]), UNSUPP);
    assert_eq!(guest.zero(11, last, 2), IOERR);
    assert_eq!(guest.read(last, 512), Ok(vec![1; 512]));
    assert_eq!(rig.server().stats().refused, 4);
}

#[test]
fn the_serial_number_is_told() {
    let rig = Rig::with_options(MIB, 64 * MIB, |options| {
        options.serial = "a-serial-number-that-is-long".into()
    });
    let mut guest = Guest::simple(&rig.socket());
    assert_eq!(guest.request(8, 0, &[(DATA, 20, true)]), OK);
    assert_eq!(guest.peek(DATA, 20), b"a-serial-number-that");
}

#[test]
fn a_read_only_disk_reads_and_refuses_to_write() {
    let rig = Rig::with_options(MIB, 64 * MIB, |options| options.read_only = true);
    rig.backing.put(1, vec![5; BLOCK]);
    let mut guest = Guest::simple(&rig.socket());
    assert_eq!(guest.read(8, BLOCK), Ok(vec![5; BLOCK]));
    assert_eq!(guest.write(8, &[1; 512]), IOERR);
    assert_eq!(guest.zero(13, 8, 8), UNSUPP);
}

/// Rule L9. Two buffers of one read share their guest memory, so that the first block's bytes are overwritten by the
/// second's before they can be checked: what a guest that writes to its buffer looks like.
#[test]
fn a_guest_that_spoils_its_own_buffer_is_no_corruption() {
    let mut rig = Rig::start(MIB, 64 * MIB);
    let mut guest = Guest::simple(&rig.socket());
    let blocks =
        [settled_block(&rig, &mut guest, 0, 1), settled_block(&rig, &mut guest, 8, 2)].concat();
    let disk = rig.stop();
    rig.serve(disk);
    let mut guest = guest.reconnect(&rig.socket(), &[2]);
    assert_eq!(guest.request(0, 0, &[(DATA, 4096, true), (DATA, 4096, true)]), OK);
    assert_eq!(guest.read(0, 2 * BLOCK), Ok(blocks));
    assert_eq!(rig.server().stats().failed, 0);
}

/// Rule L7: patches made while the store is away are laid over a base that arrives when it is back.
#[test]
fn a_patch_waits_for_its_base() {
    let rig = Rig::start(MIB, 64 * MIB);
    let base = pattern(3, BLOCK);
    rig.backing.put(2, base.clone());
    rig.backing.plug(false);
    let mut guest = Guest::simple(&rig.socket());
    assert_eq!(guest.write(18, &[9; 512]), OK);
    let head = guest.queues[0].submit(0, 16, &[(DATA, 4096, true)]);
    rig.wait_until("the base is asked for", |rig| rig.server().stats().fetching > 0);
    // Others are served meanwhile.
    assert_eq!(guest.queues[0].try_used(), None);
    let flush = guest.queues[0].submit(4, 0, &[]);
    assert_eq!(guest.queues[0].next_used(), (flush, 1, OK));
    rig.backing.plug(true);
    assert_eq!(guest.queues[0].next_used(), (head, 4097, OK));
    let mut expected = base;
    expected[1024..1536].fill(9);
    assert_eq!(guest.peek(DATA, BLOCK), expected);
}

#[test]
fn a_block_gone_bad_on_the_cache_device_is_had_from_the_store() {
    let mut rig = Rig::start(MIB, 64 * MIB);
    let mut guest = Guest::simple(&rig.socket());
    let block = settled_block(&rig, &mut guest, 8, 4);
    // Read with its neighbours, and a sector of it alone.
    assert_eq!(rig.corrupt(&block), 1);
    let disk = rig.stop();
    rig.serve(disk);
    let mut guest = guest.reconnect(&rig.socket(), &[1]);
    let mut expected = vec![0; 3 * BLOCK];
    expected[BLOCK..2 * BLOCK].copy_from_slice(&block);
    assert_eq!(guest.read(0, 3 * BLOCK), Ok(expected));
    assert_eq!(guest.read(9, 512), Ok(block[512..1024].to_vec()));
}

#[test]
fn a_bad_block_that_the_store_lacks_fails_its_request_only() {
    let rig = Rig::start(MIB, 64 * MIB);
    let mut guest = Guest::simple(&rig.socket());
    rig.backing.plug(false);
    let block = pattern(500, BLOCK);
    assert_eq!(guest.write(8, &block), OK);
    // Fill the segment, so that it is sealed and its memory given back.
    for n in 1..24 {
        assert_eq!(guest.write(16, &pattern(n, 900 << 10)), OK);
    }
    assert_eq!(rig.corrupt(&block), 1);
    assert_eq!(guest.read(8, BLOCK), Err(IOERR));
    assert_eq!(guest.read(16, BLOCK), Ok(pattern(23, BLOCK)));
    assert_eq!(rig.server().stats().failed, 1);
}

/// While the store is away the ring log fills up. Writes then wait, and everything else goes on.
#[test]
fn writes_wait_for_space_and_others_do_not() {
    let rig = Rig::start(64 * MIB, 16 * MIB);
    rig.backing.plug(false);
    let mut guest = Guest::simple(&rig.socket());
    let chunk = 256 << 10;
    let data = pattern(6, chunk);
    guest.poke(DATA, &data);
    let mut waiting = vec![];
    for n in 0.. {
        let head =
            guest.queues[0].submit(1, n * (chunk as u64 / 512), &[(DATA, chunk as u32, false)]);
        rig.wait_until("written or stalled", |rig| {
            guest.queues[0].try_used().is_some_and(|(done, _, status)| done == head && status == OK)
                || rig.server().stats().stalled > 0
        });
        if rig.server().stats().stalled > 0 {
            waiting.push(head);
            break;
        }
        assert!(n < 64, "16 MiB of log took {n} writes of 256 KiB");
    }
    let flush = guest.queues[0].submit(4, 0, &[]);
    assert_eq!(guest.queues[0].next_used(), (flush, 1, OK));
    let read = guest.queues[0].submit(0, 8, &[(DATA + 4 * MIB, 4096, true)]);
    assert_eq!(guest.queues[0].next_used(), (read, 4097, OK));
    assert_eq!(guest.peek(DATA + 4 * MIB, BLOCK), data[BLOCK..2 * BLOCK]);
    let second = guest.queues[0].submit(13, 0, &[]);
    assert_eq!(guest.queues[0].next_used(), (second, 1, IOERR), "no ranges");
    rig.backing.plug(true);
    assert_eq!(guest.queues[0].next_used(), (waiting[0], 1, OK));
    rig.drain();
    assert_eq!(rig.server().stats().stalled, 0);
}

#[test]
fn a_driver_that_cannot_flush_gets_durable_writes() {
    let rig = Rig::start(MIB, 64 * MIB);
    let guest = Guest::connect(&rig.socket(), 1, feature::USUAL & !feature::FLUSH);
    assert!(rig.server().stats().write_through);
    drop(guest);
    let mut guest = Guest::simple(&rig.socket());
    assert!(!rig.server().stats().write_through);
    assert_eq!(guest.config(32, 1), [1]);
    guest.set_write_cache(false);
    assert_eq!((rig.server().stats().write_through, guest.config(32, 1)), (true, vec![0]));
    assert_eq!(guest.write(0, &[1; 512]), OK);
    guest.set_write_cache(true);
    assert!(!rig.server().stats().write_through);
}

/// What completed while the write cache was on must be durable once it was switched off: the driver counts on that from
/// then on, and sends no flush.
#[test]
fn switching_the_write_cache_off_makes_durable_what_was_written_before() {
    let rig = Rig::with_flusher(MIB, 64 * MIB, 3_600_000, |_| ());
    let mut guest = Guest::simple(&rig.socket());
    assert_eq!(guest.write(0, &[1; 512]), OK);
    let (written, durable) = rig.lsns();
    assert!(durable < written, "nothing asked for durability yet: {durable} of {written}");
    guest.set_write_cache(false);
    assert_eq!(rig.lsns(), (written, written));
}

#[test]
fn the_configuration_is_told_byte_for_byte() {
    let rig = Rig::start(5 * MIB, 64 * MIB);
    let mut guest = Guest::simple(&rig.socket());
    assert_eq!(guest.config(0, 8), (5 * MIB / 512).to_le_bytes());
    assert_eq!(guest.config(0, 57).len(), 57);
    assert_eq!(guest.config(34, 2), 4u16.to_le_bytes());
    assert_eq!(guest.config(60, 196), vec![0; 196]);
}

#[test]
fn a_polling_worker_serves_and_sleeps_as_well() {
    let rig = Rig::with_options(MIB, 64 * MIB, |options| options.poll_us = 200);
    let mut guest = Guest::simple(&rig.socket());
    for n in 0..50 {
        assert_eq!(guest.write(8 * n, &pattern(n, BLOCK)), OK);
        assert_eq!(guest.flush(), OK);
        assert_eq!(guest.read(8 * n, BLOCK), Ok(pattern(n, BLOCK)));
    }
}

#[test]
fn all_queues_serve_the_same_disk() {
    let rig = Rig::start(MIB, 64 * MIB);
    let mut guest = Guest::connect(&rig.socket(), 4, feature::USUAL);
    for index in 0..4u64 {
        let data = pattern(index, BLOCK);
        guest.poke(DATA, &data);
        let head = guest.queues[index as usize].submit(1, 8 * index, &[(DATA, 4096, false)]);
        assert_eq!(guest.queues[index as usize].next_used(), (head, 1, OK));
        let other = (index as usize + 1) % 4;
        let head = guest.queues[other].submit(0, 8 * index, &[(DATA + 8192, 4096, true)]);
        assert_eq!(guest.queues[other].next_used(), (head, 4097, OK));
        assert_eq!(guest.peek(DATA + 8192, BLOCK), data);
    }
}

/// A read waits for the store while the front end takes its memory away: the data still goes where it was wanted, and
/// the new table serves new requests.
#[test]
fn memory_that_is_taken_away_stays_until_its_requests_end() {
    let rig = Rig::start(MIB, 64 * MIB);
    rig.backing.put(0, pattern(8, BLOCK));
    rig.backing.plug(false);
    let mut guest = Guest::simple(&rig.socket());
    let plugged = crate::guest::Memory::new(64 << 20, 1 << 20);
    guest.front_end.add_mem_region(&plugged.info()).unwrap();
    let head = guest.queues[0].submit(0, 0, &[(64 << 20, 4096, true)]);
    rig.wait_until("the block is asked for", |rig| rig.server().stats().fetching > 0);
    guest.front_end.remove_mem_region(&plugged.info()).unwrap();
    let refused = guest.queues[0].submit(0, 0, &[(64 << 20, 4096, true)]);
    assert_eq!(guest.queues[0].next_used(), (refused, 1, IOERR));
    rig.backing.plug(true);
    assert_eq!(guest.queues[0].next_used(), (head, 4097, OK));
    let mut got = vec![0; BLOCK];
    vm_memory::Bytes::read_slice(&*plugged.map, &mut got, vm_memory::GuestAddress(64 << 20))
        .unwrap();
    assert_eq!(got, pattern(8, BLOCK));
    assert!(guest.queues[0].kick.as_raw_fd() >= 0);
}
