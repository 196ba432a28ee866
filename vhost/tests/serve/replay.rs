//! Goal: with an inflight region a guest outlives its back end: every request is completed exactly once, whoever it is
//! that completes it. Method: requests are held up by unplugging the store, completed out of order, and cut off; then
//! the front end reconnects with the region it kept, by both conventions for the base index that front ends have.

use crate::data::pattern;
use crate::guest::{DATA, Guest, OK, RING};
use crate::rig::{BLOCK, Rig};
use std::fs::File;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

const MIB: u64 = 1 << 20;

fn rig() -> Rig {
    let rig = Rig::start(64 * MIB, 64 * MIB);
    for lba in 0..4 {
        rig.backing.put(lba, pattern(lba, BLOCK));
    }
    rig.backing.plug(false);
    rig
}

/// A guest whose ring is tracked from its start.
fn tracked(rig: &Rig) -> (Guest, VhostUserInflight, File) {
    let mut guest = Guest::negotiate(&rig.socket(), crate::guest::feature::USUAL).unwrap();
    let wanted = VhostUserInflight::new(0, 0, 1, RING);
    let (region, file) = guest.front_end.get_inflight_fd(&wanted).unwrap();
    guest.front_end.set_inflight_fd(&region, std::os::fd::AsRawFd::as_raw_fd(&file)).unwrap();
    guest.add_queue(0);
    guest.start_queue(0, 0);
    (guest, region, file)
}

/// Two reads that wait for the store around a write that does not.
fn held_up(rig: &Rig, guest: &mut Guest) -> (u16, u16) {
    let first = guest.queues[0].submit(0, 0, &[(DATA, 4096, true)]);
    guest.poke(DATA + 0x10000, &pattern(77, BLOCK));
    let write = guest.queues[0].submit(1, 800, &[(DATA + 0x10000, 4096, false)]);
    assert_eq!(guest.queues[0].next_used(), (write, 1, OK), "out of order");
    let second = guest.queues[0].submit(0, 8, &[(DATA + 0x1000, 4096, true)]);
    rig.wait_until("both are asked for", |rig| rig.server().stats().fetching == 2);
    (first, second)
}

fn finish(rig: &Rig, guest: &mut Guest, (first, second): (u16, u16)) {
    rig.wait_until("both are asked for again", |rig| rig.server().stats().in_flight == 2);
    rig.backing.plug(true);
    let mut done = [guest.queues[0].next_used(), guest.queues[0].next_used()];
    done.sort_unstable();
    let mut expected = [(first, 4097, OK), (second, 4097, OK)];
    expected.sort_unstable();
    assert_eq!(done, expected);
    assert_eq!(guest.peek(DATA, 2 * BLOCK), [pattern(0, BLOCK), pattern(1, BLOCK)].concat());
    assert_eq!(guest.read(800, BLOCK), Ok(pattern(77, BLOCK)));
    assert_eq!(guest.queues[0].try_used(), None);
}

#[test]
fn requests_survive_a_reconnect_that_says_the_used_index() {
    let rig = rig();
    let (mut guest, region, file) = tracked(&rig);
    let held = held_up(&rig, &mut guest);
    let used = guest.queues[0].used_index();
    let mut guest = guest.reconnect_tracked(&rig.socket(), &region, &file, used);
    finish(&rig, &mut guest, held);
}

#[test]
fn requests_survive_a_reconnect_that_says_the_available_index() {
    let rig = rig();
    let (mut guest, region, file) = tracked(&rig);
    let held = held_up(&rig, &mut guest);
    let mut guest = guest.reconnect_tracked(&rig.socket(), &region, &file, 3);
    finish(&rig, &mut guest, held);
}

#[test]
fn requests_survive_a_server_that_was_stopped_and_another_that_took_over() {
    let mut rig = rig();
    let (mut guest, region, file) = tracked(&rig);
    let held = held_up(&rig, &mut guest);
    let disk = rig.stop();
    // The guest goes on submitting while nobody serves it.
    guest.poke(DATA + 0x20000, &[5; 512]);
    guest.queues[0].submit(1, 1600, &[(DATA + 0x20000, 512, false)]);
    rig.serve(disk);
    let mut guest = guest.reconnect_tracked(&rig.socket(), &region, &file, 1);
    let write = guest.queues[0].next_used();
    assert_eq!((write.1, write.2), (1, OK));
    finish(&rig, &mut guest, held);
    assert_eq!(guest.read(1600, 512), Ok(vec![5; 512]));
}

/// A ring that was stopped properly leaves nothing to replay, and goes on where it was.
#[test]
fn a_ring_that_was_drained_replays_nothing() {
    let rig = rig();
    rig.backing.plug(true);
    let (mut guest, region, file) = tracked(&rig);
    assert_eq!(guest.read(0, BLOCK), Ok(pattern(0, BLOCK)));
    assert_eq!(guest.write(16, &[1; 512]), OK);
    assert_eq!(guest.front_end.get_vring_base(0).unwrap(), 2);
    let mut guest = guest.reconnect_tracked(&rig.socket(), &region, &file, 2);
    assert_eq!(guest.read(16, 512), Ok(vec![1; 512]));
    assert_eq!(guest.queues[0].try_used(), None);
    assert_eq!(rig.server().stats().reads, 2);
}

/// A guest that switched the write cache off goes on with a server that knows nothing but the region.
#[test]
fn the_write_cache_stays_off_across_servers() {
    let mut rig = rig();
    let (mut guest, region, file) = tracked(&rig);
    guest.set_write_cache(false);
    let disk = rig.stop();
    rig.serve(disk);
    let mut guest = guest.reconnect_tracked(&rig.socket(), &region, &file, 0);
    assert_eq!((rig.server().stats().write_through, guest.config(32, 1)), (true, vec![0]));
    assert_eq!(guest.write(0, &[1; 512]), OK);
}

#[test]
fn regions_that_do_not_fit_are_refused() {
    let rig = rig();
    let negotiate = || Guest::negotiate(&rig.socket(), crate::guest::feature::USUAL).unwrap();
    let too_many = VhostUserInflight::new(0, 0, 5, RING);
    assert!(negotiate().front_end.get_inflight_fd(&too_many).is_err());
    let file = tempfile::tempfile().unwrap();
    file.set_len(64).unwrap();
    let short = VhostUserInflight::new(64, 0, 1, RING);
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    assert!(negotiate().front_end.set_inflight_fd(&short, fd).is_err());
    let lie = VhostUserInflight::new(1 << 20, 0, 1, RING);
    assert!(negotiate().front_end.set_inflight_fd(&lie, fd).is_err());
}
