//! Wrong, damaged, foreign and busy stores and caches.

use super::{
    CONFLICT, FAILED, Good, NOT_FOUND, PROBLEMS, Said, Scratch, UNAVAILABLE, USAGE, ballast,
};
use bench::agent::find_binary;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

/// The five commands that read a store, and what each must say of one that is none.
#[track_caller]
fn every_reader_refuses(scratch: &Scratch, code: i32, words: &[&str]) {
    let (store, out) = (scratch.store(), scratch.path("out"));
    let before = scratch.content("store");
    ballast(["store", "info", &store]).refused(code, words);
    ballast(["store", "check", &store]).refused(code, words);
    ballast(["store", "export", &store, "disk", &out]).refused(code, words);
    scratch.agent("cache", &["--cache-size", "32MiB"]).refused(code, words);
    assert!(!std::path::Path::new(&out).exists(), "an export that failed left a file");
    assert!(scratch.content("store") == before, "the device was changed");
}

#[test]
fn what_is_no_store_is_refused_and_left_alone() {
    let scratch = Scratch::new();
    let file = || std::fs::File::create(scratch.path("store")).unwrap();
    file().set_len(64 << 20).unwrap();
    every_reader_refuses(&scratch, NOT_FOUND, &["/store", "no Ballast store", "store format"]);
    let ext4 = file();
    ext4.set_len(64 << 20).unwrap();
    ext4.write_all_at(&[0x53, 0xef], 0x438).unwrap();
    every_reader_refuses(&scratch, NOT_FOUND, &["ext4"]);
    ballast(["store", "format", &scratch.store()]).refused(CONFLICT, &["ext", "--force"]);
    file().write_all_at(b"short", 0).unwrap();
    every_reader_refuses(&scratch, FAILED, &["/store"]);
    std::fs::remove_file(scratch.path("store")).unwrap();
    ballast(["store", "info", &scratch.store()]).refused(FAILED, &["/store", "does not exist"]);
    ballast(["store", "format", &scratch.store()]).refused(NOT_FOUND, &["/store", "--size"]);
    ballast(["store", "format", &scratch.store(), "--size", "64KiB"])
        .refused(USAGE, &["/store", "too few"]);
    assert!(!std::path::Path::new(&scratch.path("store")).exists(), "a half-made store was left");
    ballast(["store", "info", "nbd://x"]).refused(USAGE, &["nbd://x", "file:PATH", "iscsi://"]);
    ballast(["store", "info", "file:/tmp"]).refused(USAGE, &["/tmp", "folder"]);
}

#[test]
fn a_store_is_not_formatted_twice_by_accident() {
    let scratch = Scratch::new();
    let before = scratch.content("store");
    ballast(["store", "format", &scratch.store()]).refused(CONFLICT, &["/store", "--force"]);
    assert!(scratch.content("store") == before);
    ballast(["store", "format", &scratch.store(), "--force"]).done();
}

#[test]
fn a_damaged_superblock_is_served_by_its_copy_and_two_are_refused() {
    let scratch = Scratch::new();
    let store = std::fs::File::options().write(true).open(scratch.path("store")).unwrap();
    store.write_all_at(&[0xff; 64], 100).unwrap();
    ballast(["store", "info", &scratch.store()]).done();
    // The copy ends the first extent: 256 MiB have 64 of 4 MiB.
    store.write_all_at(&[0xff; 64], (4 << 20) - 4096 + 100).unwrap();
    every_reader_refuses(&scratch, FAILED, &["/store", "both superblocks are damaged"]);
}

#[test]
fn a_store_that_was_cut_short_is_refused() {
    let scratch = Scratch::new();
    let store = std::fs::File::options().write(true).open(scratch.path("store")).unwrap();
    store.set_len(100 << 20).unwrap();
    every_reader_refuses(&scratch, USAGE, &["/store", "cut short"]);
    store.set_len(256 << 20).unwrap();
    ballast(["store", "check", &scratch.store()]).done();
}

#[test]
fn damage_inside_a_store_is_found_by_the_check() {
    let mut good = Good::start();
    good.rig.agent().unwrap().drain().unwrap();
    let path = good.rig.config().store.clone().replace("file:", "");
    drop(good.client);
    good.rig.shut_down().unwrap();
    good.rig.check_store().unwrap();
    let sound = std::fs::read(&path).unwrap();
    let store = std::fs::File::options().write(true).open(&path).unwrap();
    let url = format!("file:{path}");
    // Blocks in use, spread over the store: tables, bitmaps, nodes, data.
    let used: Vec<usize> = (1..sound.len() / 4096)
        .filter(|n| sound[n * 4096..][..4096].iter().any(|&byte| byte != 0))
        .collect();
    let mut found = 0;
    for block in used.iter().step_by(used.len().div_ceil(25)) {
        let at = *block * 4096 + 20;
        let wrong: Vec<u8> = sound[at..at + 16].iter().map(|byte| !byte).collect();
        store.write_all_at(&wrong, at as u64).unwrap();
        let said = ballast(["store", "check", "--data", &url]);
        match said.code {
            Some(PROBLEMS) => {
                assert!(said.stdout.contains("PROBLEM: "), "{said:#?}");
                found += 1;
            }
            // Blocks that nothing refers to any more may say what they like.
            _ => drop(said.done()),
        }
        let json = ballast(["store", "check", "--data", &url, "--json"]);
        assert_eq!(json.code, said.code);
        serde_json::from_str::<serde_json::Value>(&json.stdout).unwrap();
        store.write_all_at(&sound[at..at + 16], at as u64).unwrap();
    }
    assert!(found >= 5, "only {found} of some 25 damages were found");
    ballast(["store", "check", "--data", &url]).done();
}

#[test]
fn what_is_no_cache_is_refused_and_left_alone() {
    let scratch = Scratch::new();
    let size = ["--cache-size", "32MiB"];
    scratch.agent("none", &[]).refused(NOT_FOUND, &["/none", "--cache-size"]);
    scratch.agent("tiny", &["--cache-size", "64KiB"]).refused(USAGE, &["/tiny", "too small"]);
    assert!(!std::path::Path::new(&scratch.path("tiny")).exists());
    std::fs::write(scratch.path("text"), vec![b'x'; 1 << 20]).unwrap();
    scratch.agent("text", &size).refused(NOT_FOUND, &["/text", "not a ballast cache"]);
    assert_eq!(scratch.content("text"), vec![b'x'; 1 << 20]);
    std::fs::write(scratch.path("empty"), "").unwrap();
    scratch.agent("empty", &size).refused(FAILED, &["/empty", "empty"]);
    std::fs::create_dir(scratch.path("folder")).unwrap();
    scratch.agent("folder", &size).refused(USAGE, &["/folder", "folder"]);
    scratch.agent("no/such/folder/cache", &size).refused(FAILED, &["no/such/folder/cache"]);
    // A store is no cache.
    let before = scratch.content("store");
    scratch.agent("store", &size).refused(NOT_FOUND, &["/store", "not a ballast cache"]);
    assert!(scratch.content("store") == before);
    ballast(["cache", "check", &scratch.path("text")])
        .refused(NOT_FOUND, &["/text", "not a ballast cache"]);
    ballast(["cache", "check", &scratch.path("none")]).refused(NOT_FOUND, &["/none"]);
    ballast(["--run-dir", &scratch.path("nowhere"), "cache", "check"])
        .refused(USAGE, &["/nowhere"]);
}

#[test]
fn a_cache_of_another_store_is_refused_with_both_identities() {
    let mut good = Good::start();
    let uuid = good.ask(&["status", "--json"]).json()["store"]["uuid"].as_str().unwrap().to_owned();
    good.rig.shut_down().unwrap();
    let other = Scratch::new();
    let other_uuid = ballast(["store", "info", &other.store(), "--json"]).json();
    let other_uuid = other_uuid["uuid"].as_str().unwrap();
    let (cache, before) = (good.cache(), std::fs::read(good.cache()).unwrap());
    let said = good.second_agent(&other.store(), &cache, other.dir.path());
    said.refused(CONFLICT, &[cache.to_str().unwrap(), &uuid, other_uuid]);
    assert!(std::fs::read(&cache).unwrap() == before, "the cache was changed");
    ballast(["store", "check", &other.store()]).done();
    // The right store takes it back, and the other one can be used.
    good.rig.start().unwrap();
    good.client.reconnect(&mut good.rig).unwrap();
    good.assert_unharmed();
}

#[test]
fn a_truncated_cache_is_refused_and_good_again_when_restored() {
    let mut good = Good::start();
    good.rig.kill().unwrap();
    let cache = good.cache();
    let whole = std::fs::read(&cache).unwrap();
    let file = std::fs::File::options().write(true).open(&cache).unwrap();
    for len in [whole.len() - 4096, whole.len() / 2, 8192] {
        file.set_len(len as u64).unwrap();
        let (store, run) = (good.store(), good.rig.config().run_dir());
        let said = good.second_agent(&store, &cache, &run);
        said.refused(FAILED, &[cache.to_str().unwrap(), "cut short", &whole.len().to_string()]);
        assert_eq!(file.metadata().unwrap().len(), len as u64, "the cache was changed");
    }
    file.set_len(0).unwrap();
    file.write_all_at(&whole, 0).unwrap();
    good.rig.start().unwrap();
    // kill -9 of the agent loses nothing that it had acknowledged.
    good.client.reconnect(&mut good.rig).unwrap();
    good.assert_unharmed();
}

#[test]
fn a_second_agent_is_refused_and_the_first_goes_on() {
    let mut good = Good::start();
    let (store, cache, run) = (good.store(), good.cache(), good.rig.config().run_dir());
    let other = good.rig.dir().join("other");
    let pid = good.rig.agent().unwrap().process().pid().to_string();
    good.second_agent(&store, &cache, &run)
        .refused(CONFLICT, &["already running", &pid, "--run-dir"]);
    good.second_agent(&store, &cache, &other)
        .refused(CONFLICT, &[cache.to_str().unwrap(), "another"]);
    let cache2 = good.rig.dir().join("cache2");
    let said = good.second_agent(&store, &cache2, &other);
    said.refused(CONFLICT, &["the store is in use", "--take-over-host"]);
    ballast(["store", "format", &store, "--force"]).refused(CONFLICT, &["store", "agent"]);
    ballast([std::ffi::OsStr::new("cache"), "check".as_ref(), cache.as_os_str()])
        .refused(CONFLICT, &["in use", "stop"]);
    good.ask(&["cache", "check"]).refused(CONFLICT, &["in use", "stop"]);
    // Looking is allowed.
    ballast(["store", "info", &store]).done();
    good.assert_unharmed();
}

/// A daemon that is to be stopped by a signal, by process id, and reaped.
struct Daemon {
    child: std::process::Child,
}

impl Daemon {
    fn spawn(arguments: &[&str]) -> Self {
        let mut command = Command::new(find_binary().unwrap());
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { child: command.spawn().unwrap() }
    }

    /// Asks for its status until the exit code is as expected.
    fn wait_for(&mut self, run_dir: &str, code: i32) -> Said {
        for _ in 0..1000 {
            let said = ballast(["--run-dir", run_dir, "status"]);
            if said.code == Some(code) {
                return said;
            }
            assert!(self.child.try_wait().unwrap().is_none(), "the daemon ended: {said:?}");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        panic!("status never ended with {code}");
    }

    fn stop(mut self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{signal}: {status}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_start_that_was_refused_leaves_nothing_that_hinders_the_next() {
    let scratch = Scratch::new();
    let (store, cache, run) = (scratch.store(), scratch.path("cache"), scratch.path("run"));
    scratch.agent("cache", &["--cache-size", "32MiB", "--queues", "0"]).refused(USAGE, &["queues"]);
    scratch.agent("none", &[]).refused(NOT_FOUND, &["/none"]);
    let fixed =
        ["agent", "--store", &store, "--cache", &cache, "--cache-size", "32MiB", "--run-dir", &run];
    let mut daemon = Daemon::spawn(&fixed);
    daemon.wait_for(&run, 0);
    daemon.stop(Signal::SIGINT);
}

#[test]
fn an_agent_waits_for_a_store_that_is_away_and_says_so() {
    let scratch = Scratch::new();
    let (cache, run) = (scratch.path("cache"), scratch.path("run"));
    // A device node that is missing may come with its session; so may a target that does not answer.
    for url in ["file:/dev/no-such-lun", "iscsi://127.0.0.1:1/iqn.2024-01.example:none/0"] {
        let fixed = [
            "agent",
            "--store",
            url,
            "--cache",
            &cache,
            "--cache-size",
            "32MiB",
            "--run-dir",
            &run,
        ];
        let said = ballast(fixed.iter().chain(&["--store-wait", "1s"]));
        said.refused(UNAVAILABLE, &[url, "--store-wait"]);
        let mut daemon = Daemon::spawn(&fixed);
        daemon.wait_for(&run, UNAVAILABLE).refused(UNAVAILABLE, &["not ready yet"]);
        daemon.stop(Signal::SIGTERM);
    }
}
