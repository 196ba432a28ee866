//! Goal: a disk whose policy is to fail requests fails those, and only those, that waited out the deadline while the store
//! was away all the time; nothing of them is left when the store answers late. Method: a store that is unplugged, and that says that
//! it is away or does not.

use super::data::pattern;
use super::guest::{DATA, Guest, IOERR, OK};
use super::rig::{BLOCK, Rig};
use blockstore::WhenOffline;
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// Shorter than what an operator can set, so that tests are quick.
const SOON: WhenOffline = WhenOffline::FailAfter(300);
const LATE: WhenOffline = WhenOffline::FailAfter(3_600_000);

fn failed(rig: &Rig) -> (u64, u64) {
    let stats = rig.server().stats();
    (stats.failed_by_policy, stats.failed)
}

/// Long enough for several deadlines to be noticed.
fn wait_several_deadlines() {
    std::thread::sleep(Duration::from_millis(1500));
}

#[test]
fn reads_that_waited_too_long_fail_and_a_late_answer_harms_nobody() {
    let mut rig = Rig::start(MIB, 64 * MIB);
    (0..8).for_each(|lba| rig.backing.put(lba, pattern(lba, BLOCK)));
    rig.when_offline(SOON);
    let mut guest = Guest::simple(&rig.socket());
    // One read also waits for a base under a patch.
    let patch = pattern(100, 512);
    assert_eq!(guest.write(3 * 8 + 2, &patch), OK);
    rig.backing.plug(false);
    rig.backing.say_away(Some(1));
    assert_eq!(guest.read(0, 8 * BLOCK), Err(IOERR));
    assert_eq!(guest.read(3 * 8, BLOCK), Err(IOERR));
    assert_eq!(failed(&rig), (2, 0));
    // Everything that needs no store goes on.
    assert_eq!(guest.write(64, &pattern(9, BLOCK)), OK);
    assert_eq!(guest.flush(), OK);
    assert_eq!(guest.read(64, BLOCK), Ok(pattern(9, BLOCK)));
    // Late answers meet a request in the slot that was theirs.
    let head = guest.queues[0].submit(0, 5 * 8, &[(DATA, BLOCK as u32, true)]);
    rig.wait_until("asked for", |rig| rig.server().stats().in_flight == 1);
    rig.backing.say_away(None);
    rig.backing.plug(true);
    assert_eq!(guest.queues[0].next_used(), (head, BLOCK as u32 + 1, OK));
    assert_eq!(guest.peek(DATA, BLOCK), pattern(5, BLOCK));
    let mut patched = pattern(3, BLOCK);
    patched[1024..1536].copy_from_slice(&patch);
    assert_eq!(guest.read(3 * 8, BLOCK), Ok(patched));
    assert_eq!(guest.read(0, BLOCK), Ok(pattern(0, BLOCK)));
    rig.wait_until("nothing is under way", |rig| {
        let stats = rig.server().stats();
        (stats.in_flight, stats.fetching) == (0, 0)
    });
    assert_eq!(failed(&rig), (2, 0));
    drop(guest);
    assert!(rig.stop().disk.is_quiet());
}

#[test]
fn a_store_that_is_slow_or_back_in_time_or_a_disk_that_stalls_fails_nothing() {
    for (policy, away) in [(SOON, None), (LATE, Some(1)), (WhenOffline::Stall, Some(1))] {
        let rig = Rig::start(MIB, 64 * MIB);
        rig.backing.put(0, pattern(1, BLOCK));
        rig.when_offline(policy);
        rig.backing.plug(false);
        rig.backing.say_away(away);
        let mut guest = Guest::simple(&rig.socket());
        let head = guest.queues[0].submit(0, 0, &[(DATA, BLOCK as u32, true)]);
        rig.wait_until("asked for", |rig| rig.server().stats().fetching == 1);
        wait_several_deadlines();
        rig.backing.say_away(None);
        rig.backing.plug(true);
        assert_eq!(guest.queues[0].next_used(), (head, BLOCK as u32 + 1, OK), "{policy} {away:?}");
        assert_eq!(guest.peek(DATA, BLOCK), pattern(1, BLOCK));
        assert_eq!(failed(&rig), (0, 0));
    }
}

/// The ring is full, and writes wait for ever; then the policy is changed under them. What has an LSN in part goes on waiting.
#[test]
fn writes_that_found_no_space_fail_once_the_policy_says_so() {
    const CHUNK: usize = 256 << 10;
    let rig = Rig::start(64 * MIB, 16 * MIB);
    rig.backing.plug(false);
    rig.backing.say_away(Some(1));
    let mut guest = Guest::simple(&rig.socket());
    guest.poke(DATA, &pattern(6, CHUNK));
    let sector_of = |n: u64| n * (CHUNK as u64 / 512);
    let mut waiting = Vec::new();
    for n in 0..80 {
        let head = guest.queues[0].submit(1, sector_of(n), &[(DATA, CHUNK as u32, false)]);
        let mut used = false;
        rig.wait_until("written, or there is no room", |rig| {
            used = used || guest.queues[0].try_used().is_some_and(|done| done == (head, 1, OK));
            used || rig.is_full() && rig.server().stats().stalled > waiting.len() as u64
        });
        if !used {
            waiting.push((head, n));
        }
        if waiting.len() == 4 {
            break;
        }
    }
    assert_eq!(waiting.len(), 4, "the ring is never full");
    wait_several_deadlines();
    assert_eq!(failed(&rig), (0, 0), "they wait for ever");
    rig.when_offline(SOON);
    rig.wait_until("failed", |rig| failed(rig).0 > 0 && rig.server().stats().stalled <= 1);
    // Heads are used again: each is looked up before another request is made.
    let mut ended = Vec::new();
    let mut collect = |guest: &mut Guest, waiting: &mut Vec<(u16, u64)>| {
        while let Some((head, _, status)) = guest.queues[0].try_used() {
            let at = waiting.iter().position(|(waits, _)| *waits == head).expect("one of them");
            ended.push((waiting.remove(at).1, status));
        }
    };
    collect(&mut guest, &mut waiting);
    assert_eq!(guest.flush(), OK, "a flush goes on");
    rig.backing.say_away(None);
    rig.backing.plug(true);
    rig.wait_until("nothing waits", |rig| rig.server().stats().in_flight == 0);
    collect(&mut guest, &mut waiting);
    assert!(waiting.is_empty());
    rig.drain();
    let failures = ended.iter().filter(|(_, status)| *status == IOERR).count() as u64;
    assert_eq!(failed(&rig), (failures, 0));
    assert!(failures >= 3, "only one may have been staged in part: {ended:?}");
    for (n, status) in ended {
        // Nothing of what failed was staged.
        let expected = if status == OK { pattern(6, CHUNK) } else { vec![0; CHUNK] };
        assert_eq!(guest.read(sector_of(n), CHUNK), Ok(expected), "request {n}");
    }
}
