//! Goal: an agent may die, be upgraded, or grow a disk under a running guest, which sees a pause and nothing else (P1
//! for what completed; no request lost, none served again after its completion).
//!
//! Method: a front end of our own keeps its ring and inflight region, checks every completion, and has the agent killed
//! at chosen moments (right after a kick, after the first completion of a batch, at random, while it recovers), by both
//! conventions for the base index. Then a Linux guest in QEMU runs a verifying load through kills and upgrades, another
//! one watches its disk grow.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tests::agent_rig::{AgentRig, StoreSpec};
use tests::guest::{Guest, GuestOptions};
use tests::tracked::{Convention, Tracked};

const MIB: u64 = 1 << 20;

/// An agent that serves one disk.
fn host(disk_bytes: u64) -> (AgentRig, PathBuf) {
    let mut rig = AgentRig::new(&StoreSpec::file(2 << 30), 256 << 20).expect("format");
    rig.start().expect("agent");
    let agent = rig.agent().expect("agent");
    agent.create("vm", disk_bytes).expect("create");
    let socket = agent.attach("vm").expect("attach");
    (rig, socket)
}

fn reconnect(rig: &mut AgentRig, guest: &mut Tracked, socket: &Path, convention: Convention) {
    rig.connect(|| guest.connect(socket, convention)).expect("reconnect");
}

/// Ends the agent in one of several ways while the guest goes on, until nobody serves it.
fn end_the_agent(round: u64, rig: &mut AgentRig, guest: &mut Tracked) {
    match round % 6 {
        // Taken, and not in the log yet.
        0 => {
            guest.submit_all().expect("submit");
            rig.kill().expect("kill -9");
        }
        // Some of a batch completed, the rest on its way.
        1 => {
            guest.run(1).expect("a first completion");
            rig.kill().expect("kill -9");
        }
        // An upgrade: the agent ends in order.
        2 => {
            rig.ask_to_stop().expect("SIGTERM");
            guest.run_until_cut_off().expect("until the end");
            rig.shut_down().expect("an end in order");
        }
        // While it ends in order.
        3 => {
            rig.ask_to_stop().expect("SIGTERM");
            rig.kill_in(Duration::from_millis(round % 40)).expect("kill -9");
            guest.run_until_cut_off().expect("until the end");
            rig.reap_stopping().expect("reap");
        }
        // Anywhere.
        _ => {
            rig.kill_in(Duration::from_micros(round * 1777 % 30_000)).expect("kill -9");
            guest.run_until_cut_off().expect("until the end");
            rig.reap().expect("reap");
        }
    }
}

fn a_guest_outlives_its_agents(convention: Convention, rounds: u64) {
    let (mut rig, socket) = host(16 * MIB);
    let mut guest = Tracked::new(42 + convention as u64).expect("guest");
    guest.connect(&socket, convention).expect("connect");
    for round in 0..rounds {
        guest.run(300).expect("served");
        end_the_agent(round, &mut rig, &mut guest);
        // The guest does not know, and goes on asking.
        guest.submit_all().expect("submit");
        if round % 5 == 4 {
            // Once more before it is back.
            rig.spawn().expect("spawn");
            rig.kill_in(Duration::from_millis(round * 7 % 60)).expect("kill -9");
            rig.reap().expect("reap");
        }
        rig.spawn().expect("start");
        reconnect(&mut rig, &mut guest, &socket, convention);
    }
    guest.verify_all().expect("every block holds what was written last");
    println!("{convention:?}: {} requests over {rounds} agents", guest.completed);
    rig.shut_down().expect("an end in order");
    rig.check_store().expect("a sound store");
}

#[test]
fn a_guest_whose_front_end_says_the_used_index_outlives_its_agents() {
    a_guest_outlives_its_agents(Convention::UsedIndex, 24);
}

#[test]
fn a_guest_whose_front_end_says_the_available_index_outlives_its_agents() {
    a_guest_outlives_its_agents(Convention::AvailableIndex, 24);
}

/// Written and verified in passes, one each time the host says so.
const VERIFYING_LOAD: &str = r#"
    disk=$(disk 0)
    result write-cache "$(cat /sys/block/${disk##*/}/queue/write_cache)"
    n=0
    while [ $n -lt 9 ]; do
        await next
        fio --name=pass --filename="$disk" --direct=1 --ioengine=libaio --iodepth=16 --bs=4k --rw=randwrite --size=12m \
            --randseed=$n --verify=crc32c --verify_backlog=64 --verify_fatal=1 --fsync=32 --eta=never --output=/tmp/fio \
            || { cat /tmp/fio; exit 11; }
        result pass $n
        n=$((n + 1))
    done
    if dmesg | grep -E 'I/O error|Buffer I/O|timeout'; then exit 13; fi
"#;

#[test]
fn a_linux_guest_sees_kills_and_upgrades_as_pauses() {
    let (mut rig, socket) = host(64 * MIB);
    let options = GuestOptions {
        disks: vec![socket],
        job: VERIFYING_LOAD.into(),
        cpus: 2,
        queues: 2,
        reconnect: Some(Duration::from_millis(100)),
        ..GuestOptions::default()
    };
    let mut guest = Guest::boot(&rig.dir().join("guest"), &options).expect("boot");
    assert_eq!(guest.wait_for("write-cache").expect("write cache"), "write back");
    for round in 0..9u64 {
        guest.say("next").expect("say");
        std::thread::sleep(Duration::from_millis(150 + round * 271 % 400));
        if round % 4 == 3 {
            rig.shut_down().expect("an end in order");
        } else {
            rig.kill().expect("kill -9");
        }
        std::thread::sleep(Duration::from_millis(round * 137 % 500));
        rig.start().expect("start");
        guest.wait_for("pass").expect("served again");
    }
    guest.finish().expect("no error, nothing lost, nothing stale");
}

/// Method: the guest sees the new size without a reboot, uses it, and still does after the agent was killed; a disk that
/// grew while QEMU was looking for a new agent is told as well.
#[test]
fn a_linux_guest_sees_its_disk_grow() {
    let (mut rig, socket) = host(64 * MIB);
    let job = r#"
        disk=$(disk 0)
        size() { cat "/sys/block/${disk##*/}/size"; }
        grown() { while [ "$(size)" -ne "$1" ]; do sleep 0.1; done; result size "$(size)"; }
        result size "$(size)"
        grown 196608
        dd if=/dev/urandom of=/tmp/data bs=1M count=1 2>/dev/null
        dd if=/tmp/data of="$disk" bs=1M seek=95 conv=fsync 2>/dev/null
        echo 3 >/proc/sys/vm/drop_caches
        result written 1
        grown 262144
        dd if="$disk" of=/tmp/back bs=1M skip=95 count=1 2>/dev/null
        cmp /tmp/data /tmp/back
        dd if=/tmp/data of="$disk" bs=1M seek=127 conv=fsync 2>/dev/null
        if dmesg | grep -E 'I/O error'; then exit 13; fi
    "#;
    let options = GuestOptions { disks: vec![socket], job: job.into(), ..GuestOptions::default() };
    let mut guest = Guest::boot(&rig.dir().join("guest"), &options).expect("boot");
    assert_eq!(guest.wait_for("size").expect("size"), (64 * MIB / 512).to_string());
    let resize = |rig: &AgentRig, size: &str| {
        rig.agent().expect("agent").control(&["vdi", "resize", "vm", "--size", size])
    };
    resize(&rig, "96MiB").expect("grow");
    assert_eq!(guest.wait_for("size").expect("size"), (96 * MIB / 512).to_string());
    guest.wait_for("written").expect("the new room is used");
    let refused = resize(&rig, "64MiB").expect_err("a disk does not shrink").to_string();
    assert!(refused.contains("shrink") || refused.contains("smaller"), "{refused}");
    rig.kill().expect("kill -9");
    rig.start().expect("start");
    resize(&rig, "128MiB").expect("grow again");
    assert_eq!(guest.wait_for("size").expect("size"), (128 * MIB / 512).to_string());
    guest.finish().expect("the guest");
}
