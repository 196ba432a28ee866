//! Goal: front ends come, misbehave and go; the disk stays.

use crate::data::pattern;
use crate::guest::{DATA, Guest, IOERR, NEXT, OK, RING, WRITE, feature};
use crate::rig::{BLOCK, Rig};
use ballast_vhost::{DiskServer, ServerError, ServerOptions};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use vhost::VhostBackend;
use vmm_sys_util::eventfd::EventFd;

const MIB: u64 = 1 << 20;

#[test]
fn sessions_follow_one_another() {
    let rig = Rig::start(MIB, 64 * MIB);
    for round in 0..5 {
        let mut guest = Guest::simple(&rig.socket());
        if round > 0 {
            assert_eq!(guest.read(8, BLOCK), Ok(pattern(round - 1, BLOCK)));
        }
        assert_eq!(guest.write(8, &pattern(round, BLOCK)), OK);
        // Not even a last flush: the guest is simply gone.
    }
    assert_eq!(rig.server().stats().sessions, 5);
}

#[test]
fn more_front_ends_than_a_migration_needs_are_turned_away_and_the_first_not_disturbed() {
    let rig = Rig::start(MIB, 64 * MIB);
    let mut first = Guest::simple(&rig.socket());
    let others: Vec<_> = (0..3).map(|_| UnixStream::connect(rig.socket()).unwrap()).collect();
    let mut last = UnixStream::connect(rig.socket()).unwrap();
    assert_eq!(last.read(&mut [0; 16]).unwrap(), 0, "closed at once");
    assert_eq!(first.write(0, &[3; 512]), OK);
    assert!(first.is_connected());
    drop(others);
}

/// A front end that only connects, and one that sends rubbish, must not keep others out.
#[test]
fn rubbish_ends_the_session_and_nothing_else() {
    let rig = Rig::start(MIB, 64 * MIB);
    for rubbish in [&[0u8; 12][..], &[0xff; 64], b"GET / HTTP/1.1\r\n\r\n"] {
        let mut stream = UnixStream::connect(rig.socket()).unwrap();
        stream.write_all(rubbish).unwrap();
        let mut answer = vec![];
        // Whatever is answered, the connection is closed; a reset counts.
        let _ = stream.read_to_end(&mut answer);
    }
    drop(UnixStream::connect(rig.socket()).unwrap());
    let mut guest = Guest::simple(&rig.socket());
    assert_eq!(guest.write(0, &[3; 512]), OK);
}

#[test]
fn ring_descriptions_that_cannot_be_are_refused() {
    let rig = Rig::start(MIB, 64 * MIB);
    let negotiate = || Guest::negotiate(&rig.socket(), feature::USUAL).unwrap();
    assert!(negotiate().front_end.set_vring_num(0, 3).is_err(), "no power of two");
    assert!(negotiate().front_end.set_vring_num(0, 2048).is_err(), "too large");
    assert!(negotiate().front_end.set_vring_num(4, 8).is_err(), "no such queue");
    assert!(negotiate().front_end.set_features(1 << 40).is_err(), "a feature never offered");
    // A kick that is no eventfd could wake the worker without end.
    let zero = File::open("/dev/zero").unwrap();
    // SAFETY: the descriptor is handed over and used as a bare descriptor only.
    let fake = unsafe {
        <EventFd as std::os::fd::FromRawFd>::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(zero))
    };
    assert!(negotiate().front_end.set_vring_kick(0, &fake).is_err());
    // A ring outside of guest memory.
    let mut guest = negotiate();
    guest.add_queue(0);
    let config = vhost::VringConfigData {
        queue_max_size: RING,
        queue_size: RING,
        flags: 0,
        desc_table_addr: 0x1000,
        used_ring_addr: 0x2000,
        avail_ring_addr: 0x3000,
        log_addr: None,
    };
    let kick = EventFd::new(0).unwrap();
    guest.front_end.set_vring_num(0, RING).unwrap();
    guest.front_end.set_vring_addr(0, &config).unwrap();
    assert!(guest.front_end.set_vring_kick(0, &kick).is_err());
    drop(guest);
    let mut guest = Guest::simple(&rig.socket());
    assert_eq!(guest.write(0, &[1; 512]), OK);
}

#[test]
fn a_broken_ring_stops_and_the_others_go_on() {
    let rig = Rig::start(MIB, 64 * MIB);
    let mut guest = Guest::connect(&rig.socket(), 2, feature::USUAL);
    guest.queues[1].set_avail(RING + 9);
    assert_eq!(guest.write(0, &[4; 512]), OK);
    // The broken one can be stopped, and starts anew.
    guest.front_end.get_vring_base(1).unwrap();
    drop(guest);
    let mut guest = Guest::simple(&rig.socket());
    assert_eq!(guest.read(0, 512), Ok(vec![4; 512]));
}

#[test]
fn hostile_chains_are_given_back_and_the_disk_goes_on() {
    let rig = Rig::start(MIB, 64 * MIB);
    let mut guest = Guest::simple(&rig.socket());
    let queue = &mut guest.queues[0];
    // A loop of two, a link out of the table, an address nowhere: all without a status byte that could be set.
    queue.descriptor(0, DATA, 16, NEXT, 1);
    queue.descriptor(1, DATA, 16, NEXT, 0);
    queue.expose(0);
    queue.descriptor(2, DATA, 16, NEXT, RING);
    queue.expose(2);
    queue.descriptor(3, u64::MAX - 7, 16, WRITE, 0);
    queue.expose(3);
    for _ in 0..200 {
        if queue.used_index() == 3 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(queue.used_index(), 3);
    let mut guest = guest.reconnect(&rig.socket(), &[3]);
    guest.queues[0].forget_used(3);
    assert_eq!(guest.write(0, &[1; 512]), OK);
    assert_eq!(guest.request(0, 0, &[(u64::MAX, 512, true)]), IOERR);
    assert_eq!(rig.server().stats().refused, 4);
}

/// GET_VRING_BASE is answered only when nothing of the ring is under way, with the index to go on at.
#[test]
fn stopping_a_ring_waits_for_its_requests() {
    let rig = Rig::start(MIB, 64 * MIB);
    rig.backing.put(0, pattern(1, BLOCK));
    rig.backing.plug(false);
    let mut guest = Guest::simple(&rig.socket());
    assert_eq!(guest.write(64, &[1; 512]), OK);
    let head = guest.queues[0].submit(0, 0, &[(DATA, 4096, true)]);
    rig.wait_until("the block is asked for", |rig| rig.server().stats().fetching > 0);
    let backing = std::sync::Arc::clone(&rig.backing);
    let (send, asked) = channel();
    let plug = std::thread::spawn(move || {
        asked.recv().unwrap();
        // Time for a wrong answer to come first.
        std::thread::sleep(std::time::Duration::from_millis(300));
        backing.plug(true);
    });
    send.send(()).unwrap();
    let base = guest.front_end.get_vring_base(0).unwrap();
    assert_eq!((base, guest.queues[0].used_index()), (2, 2), "answered before the read was");
    plug.join().unwrap();
    assert_eq!(guest.queues[0].try_used(), Some((head, 4097, OK)));
    // A request made while the ring is stopped is served when it starts again.
    guest.poke(DATA, &[7; 512]);
    let head = guest.queues[0].submit(1, 128, &[(DATA, 512, false)]);
    guest.start_queue(0, base as u16);
    assert_eq!(guest.queues[0].next_used(), (head, 1, OK));
}

/// The front end goes while a read waits for the store and a write for space. Both are forgotten, what they held of the
/// disk is given back, and the late answer of the store reaches nobody.
#[test]
fn a_front_end_may_go_with_requests_under_way() {
    let mut rig = Rig::start(64 * MIB, 16 * MIB);
    rig.backing.put(4096, pattern(1, BLOCK));
    rig.backing.plug(false);
    let mut guest = Guest::simple(&rig.socket());
    guest.poke(DATA, &pattern(2, 1 << 20));
    let mut n = 0;
    while rig.server().stats().stalled == 0 {
        let head = guest.queues[0].submit(1, n * 2048, &[(DATA, 1 << 20, false)]);
        n += 1;
        rig.wait_until("written or stalled", |rig| {
            guest.queues[0].try_used().is_some_and(|used| used.0 == head)
                || rig.server().stats().stalled > 0
        });
    }
    guest.queues[0].submit(0, 4096 * 8, &[(DATA, 4096, true)]);
    rig.wait_until("the block is asked for", |rig| rig.server().stats().fetching > 0);
    drop(guest);
    rig.wait_until("session over", |rig| !rig.server().stats().connected);
    rig.wait_until("forgotten", |rig| rig.server().stats().in_flight == 0);
    let mut guest = Guest::simple(&rig.socket());
    assert_eq!(guest.read(0, BLOCK), Ok(pattern(2, BLOCK)));
    rig.backing.plug(true);
    assert_eq!(guest.read(4096 * 8, BLOCK), Ok(pattern(1, BLOCK)));
    drop(guest);
    let disk = rig.stop();
    assert!(disk.disk.is_quiet());
    rig.serve(disk);
    let mut guest = Guest::simple(&rig.socket());
    assert_eq!(guest.read(0, BLOCK), Ok(pattern(2, BLOCK)));
}

/// A front end shortens the file behind its memory, under a running ring and under a read that waits for the store. The
/// process must live on.
#[test]
fn memory_pulled_away_harms_nobody_else() {
    let rig = Rig::start(MIB, 64 * MIB);
    rig.backing.put(0, pattern(1, BLOCK));
    rig.backing.plug(false);
    let mut guest = Guest::simple(&rig.socket());
    guest.queues[0].submit(0, 0, &[(DATA, 4096, true)]);
    rig.wait_until("the block is asked for", |rig| rig.server().stats().fetching > 0);
    // From here on the guest's memory may not be touched by this test either.
    guest.memory.shorten();
    guest.queues[0].kick.write(1).unwrap();
    rig.backing.plug(true);
    rig.wait_until("answered", |rig| rig.server().stats().in_flight == 0);
    drop(guest);
    let mut guest = Guest::simple(&rig.socket());
    assert_eq!(guest.read(0, BLOCK), Ok(pattern(1, BLOCK)));
}

#[test]
fn a_late_answer_to_a_former_server_reaches_nobody() {
    let mut rig = Rig::start(MIB, 64 * MIB);
    (0..2).for_each(|lba| rig.backing.put(lba, pattern(lba, BLOCK)));
    rig.backing.plug(false);
    let mut guest = Guest::simple(&rig.socket());
    guest.queues[0].submit(0, 0, &[(DATA, 4096, true)]);
    rig.wait_until("the first block is asked for", |rig| rig.server().stats().fetching > 0);
    let disk = rig.stop();
    rig.serve(disk);
    let mut guest = Guest::simple(&rig.socket());
    let head = guest.queues[0].submit(0, 8, &[(DATA, 4096, true)]);
    rig.wait_until("the second block is asked for", |rig| rig.server().stats().fetching > 0);
    rig.backing.plug(true);
    assert_eq!(guest.queues[0].next_used(), (head, 4097, OK));
    assert_eq!(guest.peek(DATA, BLOCK), pattern(1, BLOCK));
}

#[test]
fn stopping_removes_the_socket_and_ends_the_session() {
    let mut rig = Rig::start(MIB, 64 * MIB);
    let mut guest = Guest::simple(&rig.socket());
    assert_eq!(guest.write(0, &pattern(9, BLOCK)), OK);
    let disk = rig.stop();
    assert!(!rig.socket().exists());
    rig.wait_until("cut off", |_| !guest.is_connected());
    rig.serve(disk);
    let mut guest = guest.reconnect(&rig.socket(), &[1]);
    assert_eq!(guest.read(0, BLOCK), Ok(pattern(9, BLOCK)));
}

#[test]
fn front_ends_that_come_early_wait() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("early.sock");
    let listening = DiskServer::listen(ServerOptions::new(&path)).unwrap();
    let early = UnixStream::connect(&path).unwrap();
    drop(listening);
    drop(early);
    assert!(!path.exists());
}

#[test]
fn options_out_of_range_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |change: fn(&mut ServerOptions)| {
        let mut options = ServerOptions::new(dir.path().join("x.sock"));
        change(&mut options);
        match DiskServer::listen(options) {
            Err(ServerError::Options { message, .. }) => message,
            other => panic!("{other:?}"),
        }
    };
    assert!(refused(|o| o.queues = 0).contains("queues"));
    assert!(refused(|o| o.queues = 65).contains("queues"));
    assert!(refused(|o| o.queue_size_max = 100).contains("power of two"));
    assert!(refused(|o| o.mode = 0o4600).contains("mode"));
}
