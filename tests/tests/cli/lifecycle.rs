//! Attach, detach, restart, interrupted commands: every state is defined, and every promise of the runbook kept.

use super::{CONFLICT, Good, NOT_FOUND, Said, ballast, finish, spawn};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

#[test]
fn a_disk_comes_back_after_stop_and_after_kill_without_being_asked() {
    let mut good = Good::start();
    let control = format!("{}/control.sock", good.run_dir());
    good.rig.shut_down().unwrap();
    assert!(!Path::new(&control).exists(), "a clean stop leaves no socket");
    for round in 0..3 {
        good.rig.start().unwrap();
        good.client.reconnect(&mut good.rig).unwrap();
        good.works().unwrap();
        if round < 2 {
            good.client.runner.flush().unwrap();
            good.rig.kill().unwrap();
            assert!(
                Path::new(&control).exists(),
                "a kill leaves the socket, and the start replaces it"
            );
        }
    }
    good.assert_unharmed();
}

#[test]
fn detaching_takes_a_disk_away_with_all_its_data_in_the_store() {
    let mut good = Good::start();
    let attached = good.ask(&["vdi", "attach", "disk-1", "--json"]).json();
    let again = good.ask(&["vdi", "attach", "disk-1", "--json"]).json();
    assert_eq!(attached, again, "attaching what is attached changes nothing");
    good.ask(&["vdi", "detach", "disk-1"]).refused(CONFLICT, &["--force"]);
    good.works().unwrap();
    let acknowledged = good.client.runner.oracle().acknowledged();
    good.client.runner.oracle().set_committed(acknowledged);
    good.ask(&["vdi", "detach", "disk-1", "--force"]).done();
    assert!(!Path::new(attached["socket"].as_str().unwrap()).exists());
    let info = good.ask(&["vdi", "info", "disk-1", "--json"]).json();
    assert_eq!((&info["attached"], &info["socket"]), (&false.into(), &serde_json::Value::Null));
    assert!(info["committed_lsn"].as_u64().unwrap() > 0);
    good.client.check_store_image(&good.rig).unwrap();
    good.ask(&["vdi", "detach", "disk-1"]).refused(CONFLICT, &["not attached"]);
    good.ask(&["vdi", "attach", "disk-1"]).done();
    good.client.reconnect(&mut good.rig).unwrap();
    good.assert_unharmed();
}

#[test]
fn a_disk_that_cannot_come_back_does_not_stop_the_others() {
    let mut good = Good::start();
    good.ask(&["vdi", "create", "second", "--size", "16MiB"]).done();
    good.ask(&["vdi", "attach", "second"]).done();
    let in_the_way = format!("{}/second.sock", good.run_dir());
    good.rig.shut_down().unwrap();
    std::fs::write(&in_the_way, "precious").unwrap();
    good.rig.start().unwrap();
    good.client.reconnect(&mut good.rig).unwrap();
    good.works().unwrap();
    let info = good.ask(&["vdi", "info", "second", "--json"]).json();
    assert_eq!(info["state"], "failed", "{info}");
    assert!(info["last_error"].as_str().unwrap().contains(&in_the_way), "{info}");
    assert!(good.ask(&["status"]).done().contains("failed: "));
    good.ask(&["vdi", "attach", "second"]).refused(CONFLICT, &["'second'", &in_the_way]);
    good.ask(&["vdi", "delete", "second"]).refused(CONFLICT, &["attached"]);
    std::fs::remove_file(&in_the_way).unwrap();
    good.ask(&["vdi", "attach", "second"]).done();
    assert_eq!(good.ask(&["vdi", "info", "second", "--json"]).json()["state"], "running");
    good.ask(&["vdi", "detach", "second"]).done();
    good.assert_unharmed();
}

#[test]
fn odd_names_live_a_whole_life() {
    let mut good = Good::start();
    let long = "n".repeat(255);
    for name in ["a b", "Jörg's 100% disk", "control", "x;rm -rf ~", "日本", long.as_str()] {
        good.ask(&["vdi", "create", name, "--size", "16MiB"]).done();
        let attached = good.ask(&["vdi", "attach", name, "--json"]).json();
        assert_eq!(attached["name"], name);
        let socket = Path::new(attached["socket"].as_str().unwrap()).to_owned();
        assert_eq!(socket.parent().unwrap().to_str().unwrap(), good.run_dir());
        UnixStream::connect(&socket).unwrap();
        let uuid = attached["uuid"].as_str().unwrap();
        assert_eq!(good.ask(&["vdi", "info", uuid, "--json"]).json()["name"], name, "by UUID");
        good.ask(&["vdi", "resize", name, "--size", "32MiB"]).done();
        // The connection above may still be counted.
        good.ask(&["vdi", "detach", name, "--force"]).done();
        assert_eq!(good.ask(&["vdi", "info", name, "--json"]).json()["size"], 32 << 20);
        good.ask(&["vdi", "delete", name]).done();
    }
    good.assert_unharmed();
}

/// Goal: requests that cross each other end in a defined state, whatever their order.
#[test]
fn crossing_requests_leave_a_defined_state() {
    let mut good = Good::start();
    good.ask(&["vdi", "create", "busy", "--size", "16MiB"]).done();
    let run_dir = good.run_dir();
    let requests: Vec<_> = (0..24)
        .map(|n| {
            let action = ["attach", "detach", "info", "attach"][n % 4];
            spawn(&run_dir, &["vdi", action, "busy"])
        })
        .collect();
    for request in requests {
        let said = finish(request);
        // Done, or refused because of the state of the moment.
        assert!(matches!(said.code, Some(0 | 6 | 7)), "{said:#?}");
    }
    good.ask(&["vdi", "attach", "busy"]).done();
    assert_eq!(good.ask(&["vdi", "info", "busy", "--json"]).json()["state"], "running");
    good.ask(&["vdi", "detach", "busy"]).done();
    good.ask(&["vdi", "delete", "busy"]).done();
    good.assert_unharmed();
}

/// Goal: Ctrl-C of a command leaves the daemon's work whole.
/// Method: send the command's request and hang up at once, or a moment later; the disk must settle by itself.
#[test]
fn interrupted_commands_are_carried_to_their_end_or_never_began() {
    let mut good = Good::start();
    let socket = format!("{}/control.sock", good.run_dir());
    good.ask(&["vdi", "create", "cut", "--size", "16MiB"]).done();
    for round in 0..40 {
        for action in ["attach", "detach"] {
            let mut stream = UnixStream::connect(&socket).unwrap();
            let request = format!("POST /v1/vdis/cut/{action} HTTP/1.1\r\nhost: x\r\n\r\n");
            stream.write_all(request.as_bytes()).unwrap();
            std::thread::sleep(Duration::from_micros(round * 100));
            drop(stream);
            settled(&mut good);
        }
        // Whatever took hold is followed by what is asked for now.
        good.ask(&["vdi", "attach", "cut"]).done();
        good.ask(&["vdi", "detach", "cut"]).done();
    }
    good.ask(&["vdi", "delete", "cut"]).done();
    good.assert_unharmed();
}

/// Goal: an agent that is killed amid a change of the registry, at any point of it, comes back with the change made or not
/// made; never with a disk that can be neither attached nor detached (rule L6).
/// Method: kill -9 at a growing delay after the request; then ask for everything again.
#[test]
fn a_kill_amid_a_change_leaves_it_made_or_not_made() {
    let mut good = Good::start();
    let socket = format!("{}/control.sock", good.run_dir());
    let steps = [
        ("POST /v1/vdis", r#"{"name":"cut","size":16777216}"#),
        ("POST /v1/vdis/cut/attach", ""),
        ("POST /v1/vdis/cut/resize", r#"{"size":33554432}"#),
        ("POST /v1/vdis/cut/detach", ""),
        ("POST /v1/vdis/cut/delete", ""),
    ];
    for round in 0..30 {
        let (line, body) = steps[round as usize % steps.len()];
        let mut stream = UnixStream::connect(&socket).unwrap();
        let length = body.len();
        let head = format!("{line} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        std::thread::sleep(Duration::from_micros(round * 97));
        good.rig.kill().unwrap();
        good.rig.check_store().unwrap();
        good.rig.start().unwrap();
        // Made or not made: the next step must be possible after making sure of this one.
        let again: &[&str] = match round as usize % steps.len() {
            0 => &["vdi", "create", "cut", "--size", "16MiB"],
            1 => &["vdi", "attach", "cut"],
            2 => &["vdi", "resize", "cut", "--size", "32MiB"],
            3 => &["vdi", "detach", "cut"],
            _ => &["vdi", "delete", "cut"],
        };
        let said = good.ask(again);
        assert!(matches!(said.code, Some(0 | NOT_FOUND | CONFLICT)), "{again:?}: {said:#?}");
        let list = good.ask(&["vdi", "list", "--json"]).json();
        let left = list.as_array().unwrap().iter().find(|vdi| vdi["name"] == "cut");
        let left = left.map(|vdi| (vdi["attached"] == true, vdi["size"].as_u64().unwrap() >> 20));
        let expected =
            [Some((false, 16)), Some((true, 16)), Some((true, 32)), Some((false, 32)), None];
        assert_eq!(left, expected[round as usize % steps.len()], "round {round}: {list}");
    }
    good.client.reconnect(&mut good.rig).unwrap();
    good.assert_unharmed();
}

#[track_caller]
fn settled(good: &mut Good) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let info = good.ask(&["vdi", "info", "cut", "--json"]).json();
        if info["state"] == "running" || info["state"] == "detached" {
            return;
        }
        assert!(Instant::now() < deadline, "left half-way: {info}");
    }
}

#[test]
fn drain_and_status_tell_the_same_story() {
    let mut good = Good::start();
    let drained = good.ask(&["cache", "drain", "--json"]).json();
    assert_eq!(drained["drained"][0]["name"], "disk-1");
    assert!(drained["seconds"].is_number());
    let info = good.ask(&["vdi", "info", "disk-1", "--json"]).json();
    assert!(
        info["committed_lsn"].as_u64() >= drained["drained"][0]["lsn"].as_u64(),
        "{info} {drained}"
    );
    let status = good.ask(&["status", "--json"]).json();
    assert_eq!(
        (&status["store"]["reachable"], &status["store"]["down_since"]),
        (&true.into(), &().into())
    );
    for key in ["capacity", "dirty_bytes", "clean_bytes", "free_bytes", "fill"] {
        assert!(status["cache"][key].is_number(), "{key}: {status}");
    }
    assert_eq!(status["vdis"][0]["name"], "disk-1");
    assert_eq!(status["vdis"][0]["front_end_connected"], true);
    let one: Said = good.ask(&["cache", "drain", "disk-1", "--json"]);
    assert_eq!(one.json()["drained"].as_array().unwrap().len(), 1);
    good.assert_unharmed();
}

#[test]
fn a_hangup_is_ignored() {
    let mut good = Good::start();
    let pid = Pid::from_raw(good.rig.agent().unwrap().process().pid() as i32);
    kill(pid, Signal::SIGHUP).unwrap();
    good.works().unwrap();
    good.assert_unharmed();
}

#[test]
fn an_export_does_not_overwrite() {
    let mut good = Good::start();
    good.rig.agent().unwrap().drain().unwrap();
    let (store, out) = (good.store(), good.rig.dir().join("out"));
    let out = out.to_str().unwrap();
    std::fs::write(out, "precious").unwrap();
    ballast(["store", "export", &store, "disk-1", out])
        .refused(CONFLICT, &[out, "exists", "--force"]);
    assert_eq!(std::fs::read_to_string(out).unwrap(), "precious");
    let folder = good.rig.dir().to_str().unwrap().to_owned();
    ballast(["store", "export", &store, "disk-1", &folder]).refused(CONFLICT, &["regular file"]);
    ballast(["store", "export", &store, "disk-1", out, "--force"]).done();
    assert_eq!(std::fs::metadata(out).unwrap().len(), 32 << 20);
    good.assert_unharmed();
}
