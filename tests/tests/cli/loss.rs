//! Goal: a disk whose log is lost is never opened by accident, and never for ever closed: it is refused with both sides
//! named, says what would be lost, and on the operator's word goes back to exactly what the store has (rule L6).
//! Method: the cache's file of a killed agent is taken away, spoilt, or brought back later.

use super::{CONFLICT, Good, NOT_FOUND, USAGE};
use serde_json::Value;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
const SEGMENT: usize = 1 << 20;

impl Good {
    /// Writes what the store does not get, and kills the agent; returns the disk's LSN at the end.
    fn dies_with_writes_in_its_log(&mut self) -> u64 {
        self.rig.shut_down().unwrap();
        self.rig.config().arguments = vec!["--flush-max-age".into(), "1h".into()];
        self.rig.start().unwrap();
        self.client.reconnect(&mut self.rig).unwrap();
        self.works().unwrap();
        self.client.runner.flush().unwrap();
        let last = self.info("disk-1")["last_lsn"].as_u64().unwrap();
        let notes = format!("{}/progress.json", self.run_dir());
        until("the agent notes how far the disk is", || {
            let notes: Value = serde_json::from_slice(&std::fs::read(&notes).ok()?).ok()?;
            let noted = notes.as_object()?.values().next()?["last_lsn"].as_u64()?;
            (noted >= last).then_some(())
        });
        self.rig.kill().unwrap();
        last
    }

    fn info(&mut self, disk: &str) -> Value {
        self.ask(&["vdi", "info", disk, "--json"]).json()
    }

    fn lose_the_cache(&mut self) -> PathBuf {
        let (cache, away) = (self.cache(), self.rig.dir().join("away.img"));
        std::fs::rename(cache, &away).unwrap();
        away
    }

    /// Starts the agent and waits until the disk is known not to be served; why.
    fn starts_without_the_disk(&mut self) -> String {
        self.rig.start().unwrap();
        let info = until("the disk is refused", || {
            let status = self.ask(&["status", "--json"]).json();
            let disk = status["vdis"].as_array()?.first()?.clone();
            (disk["state"] == "failed").then_some(disk)
        });
        info["last_error"].as_str().unwrap().to_owned()
    }

    /// What the store alone has of the disk.
    fn stored(&self) -> Vec<u8> {
        std::fs::read(self.rig.export("disk-1").unwrap()).unwrap()
    }

    /// Attaches the disk again and compares what is served with `image`.
    #[track_caller]
    fn serves_exactly(&mut self, image: &[u8]) {
        self.ask(&["vdi", "attach", "disk-1"]).done();
        self.client.reconnect(&mut self.rig).unwrap();
        let served = self.client.runner.read_image().unwrap();
        assert!(served == image, "the disk is not the committed image");
    }

    /// The disk is detached, drained; store and cache are sound.
    fn ends_sound(mut self) {
        let cache = self.cache();
        self.ask(&["vdi", "detach", "disk-1", "--force"]).done();
        drop(self.client);
        self.rig.shut_down().unwrap();
        self.rig.check_store().unwrap();
        super::ballast(["cache", "check", cache.to_str().unwrap()]).done();
    }
}

fn until<T>(what: &str, mut wanted: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = wanted() {
            return found;
        }
        assert!(Instant::now() < end, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[track_caller]
fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
}

#[test]
fn a_lost_log_is_refused_and_given_up_on_the_operators_word() {
    let mut good = Good::start();
    let host = good.ask(&["status", "--json"]).json()["agent"]["host_uuid"].clone();
    let (last, image) = (good.dies_with_writes_in_its_log(), good.stored());
    good.lose_the_cache();
    let why = good.starts_without_the_disk();
    says(
        &why,
        &["its log", "not in this host's cache", "cache.img", "rollback disk-1 --accept-loss"],
    );
    assert_eq!(good.ask(&["status", "--json"]).json()["agent"]["host_uuid"], host, "the same host");
    says(good.ask(&["status"]).done(), &["ATTENTION", "disk 'disk-1' has failed", "cache"]);
    for refused in [&["vdi", "attach", "disk-1"][..], &["vdi", "detach", "disk-1", "--force"]] {
        good.ask(refused)
            .refused(CONFLICT, &["disk-1", "not in this host's cache", "--accept-loss"]);
    }
    let committed = good.info("disk-1")["committed_lsn"].as_u64().unwrap();
    let store = good.store();
    let head = super::ballast(["store", "info", &store, "--json"]).json()["vdis"].clone();
    let lost = format!("to {last} at least are lost");
    let committed_lsn = head[0]["committed_lsn"].to_string();
    let words = ["disk-1", &store, &committed_lsn, &lost, "--accept-loss", "nothing was changed"];
    good.ask(&["vdi", "rollback", "disk-1"]).refused(CONFLICT, &words);
    assert_eq!(super::ballast(["store", "info", &store, "--json"]).json()["vdis"], head);
    assert!(!Path::new(&format!("{}/receipts", good.run_dir())).exists());

    let receipt = good.ask(&["vdi", "rollback", "disk-1", "--accept-loss", "--json"]).json();
    assert_eq!((&receipt["done"], &receipt["log_id"]), (&true.into(), &head[0]["log_id"]));
    assert_eq!(receipt["committed_lsn"], head[0]["committed_lsn"], "{receipt} {committed}");
    assert!(receipt["committed_at"].as_u64().unwrap() > 0, "{receipt}");
    assert_eq!(receipt["lost"]["to_lsn"], last, "{receipt}");
    assert_eq!(receipt["lost"]["flushed_lsn"], last, "{receipt}");
    assert!(receipt["former_cache"]["uuid"] != receipt["cache"]["uuid"], "{receipt}");
    let kept = std::fs::read(receipt["file"].as_str().unwrap()).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&kept).unwrap(), receipt);
    says(&good.rig.log_tail(), &["rolled back", "committed_lsn"]);
    good.ask(&["vdi", "rollback", "disk-1", "--accept-loss"])
        .refused(CONFLICT, &["disk-1", "attached to no host", "vdi attach"]);
    good.serves_exactly(&image);
    good.ask(&["vdi", "rollback", "disk-1", "--accept-loss"])
        .refused(CONFLICT, &["disk-1", "served", "cache.img", "nothing is lost"]);
    let now = super::ballast(["store", "info", &store, "--json"]).json()["vdis"][0].clone();
    assert!(now["attachment"].as_u64() > head[0]["attachment"].as_u64(), "{now}");
    assert!(now["log_id"] != head[0]["log_id"]);
    good.ends_sound();
}

/// A cache that was given up comes back: what it held is a disk that never was.
#[test]
fn a_cache_that_comes_back_after_a_rollback_is_refused() {
    let mut good = Good::start();
    good.dies_with_writes_in_its_log();
    let image = good.stored();
    let old = good.lose_the_cache();
    good.starts_without_the_disk();
    good.ask(&["vdi", "rollback", "disk-1", "--accept-loss"]).done();
    for attached_since in [false, true] {
        if attached_since {
            good.serves_exactly(&image);
            good.ask(&["vdi", "detach", "disk-1", "--force"]).done();
        }
        good.rig.shut_down().unwrap();
        let (cache, new) = (good.cache(), good.rig.dir().join("new.img"));
        std::fs::rename(&cache, &new).unwrap();
        std::fs::copy(&old, &cache).unwrap();
        let why = good.starts_without_the_disk();
        let since = if attached_since { "attached and detached since" } else { "rolled back" };
        says(&why, &["this host's cache has log", since, "nothing was changed", "--accept-loss"]);
        good.ask(&["vdi", "attach", "disk-1"]).refused(CONFLICT, &["disk-1", since]);
        if attached_since {
            break;
        }
        good.rig.kill().unwrap();
        std::fs::rename(&new, &cache).unwrap();
        good.rig.start().unwrap();
    }
    // The operator does not want it: it is kept, and the disk opens beside it.
    let receipt = good.ask(&["vdi", "rollback", "disk-1", "--accept-loss", "--json"]).json();
    assert_eq!((&receipt["done"], &receipt["quarantined"]), (&true.into(), &true.into()));
    good.serves_exactly(&image);
    good.ends_sound();
}

/// The oldest segment of the disk's log with nothing of it in the store, by its header.
fn first_dirty_segment(cache: &[u8], committed: u64) -> usize {
    let word = |at: usize| u64::from_le_bytes(cache[at..at + 8].try_into().unwrap());
    let starts = (SEGMENT..cache.len()).step_by(SEGMENT);
    let segments = starts.filter(|at| cache[*at..].starts_with(b"BLSTSEGM"));
    let dirty: Vec<_> = segments.filter(|at| word(at + 80) > committed).collect();
    assert!(dirty.len() >= 2, "there are {} dirty segments", dirty.len());
    dirty.into_iter().min_by_key(|at| word(at + 64)).unwrap()
}

#[test]
fn a_damaged_log_is_kept_in_quarantine() {
    let mut good = Good::start();
    good.dies_with_writes_in_its_log();
    let image = good.stored();
    let (cache, store) = (good.cache(), good.store());
    let head = super::ballast(["store", "info", &store, "--json"]).json()["vdis"][0].clone();
    let bytes = std::fs::read(&cache).unwrap();
    let at = first_dirty_segment(&bytes, head["committed_lsn"].as_u64().unwrap());
    let file = File::options().write(true).open(&cache).unwrap();
    file.write_all_at(&vec![0x5a; SEGMENT - 4096], at as u64 + 4096).unwrap();
    let why = good.starts_without_the_disk();
    says(&why, &["log of VDI disk-1", "cannot be used", "missing or damaged"]);
    good.ask(&["vdi", "rollback", "disk-1"]).refused(CONFLICT, &["missing or damaged", "at bytes"]);
    let receipt = good.ask(&["vdi", "rollback", "disk-1", "--accept-loss", "--json"]).json();
    assert_eq!((&receipt["done"], &receipt["quarantined"]), (&true.into(), &true.into()));
    assert!(receipt["ranges"]["unreadable"].as_u64().unwrap() >= 1, "{receipt}");
    assert!(!receipt["ranges"]["listed"].as_array().unwrap().is_empty(), "{receipt}");
    good.serves_exactly(&image);
    // It is kept, over a restart, too, and is not in the way.
    for _ in 0..2 {
        let kept = good.ask(&["cache", "status", "--json"]).json()["quarantined"].clone();
        assert_eq!((&kept[0]["log_id"], &kept[0]["name"]), (&head["log_id"], &"disk-1".into()));
        says(good.ask(&["status"]).done(), &["quarantine"]);
        good.rig.kill().unwrap();
        let now = std::fs::read(&cache).unwrap();
        assert!(now[at..at + 4096] == bytes[at..at + 4096], "the damaged segment was written to");
        good.rig.start().unwrap();
        good.client.reconnect(&mut good.rig).unwrap();
    }
    let log = head["log_id"].as_str().unwrap();
    good.ask(&["cache", "discard-quarantine", "disk-1"])
        .code
        .filter(|code| *code == USAGE)
        .unwrap();
    good.ask(&["cache", "discard-quarantine", log]).done();
    good.ask(&["cache", "discard-quarantine", log]).refused(NOT_FOUND, &[log, "cache status"]);
    assert_eq!(
        good.ask(&["cache", "status", "--json"]).json()["quarantined"],
        serde_json::json!([])
    );
    assert!(good.client.runner.read_image().unwrap() == image);
    good.ends_sound();
}

#[test]
fn nothing_is_given_up_that_is_not_lost() {
    let mut good = Good::start();
    let accept = |disk: &'static str| ["vdi", "rollback", disk, "--accept-loss"];
    good.ask(&accept("nosuch")).refused(NOT_FOUND, &["nosuch"]);
    good.ask(&["vdi", "create", "idle", "--size", "16MiB"]).done();
    good.ask(&accept("idle")).refused(CONFLICT, &["idle", "attached to no host", "vdi attach"]);
    good.ask(&accept("disk-1")).refused(CONFLICT, &["disk-1", "served", "nothing is lost"]);
    // Not served, for a reason that has nothing to do with its log.
    let in_the_way = format!("{}/disk-1.sock", good.run_dir());
    let host = good.ask(&["status", "--json"]).json()["agent"]["host_uuid"].clone();
    good.rig.shut_down().unwrap();
    std::fs::write(&in_the_way, "precious").unwrap();
    let why = good.starts_without_the_disk();
    says(&why, &[&in_the_way]);
    let store = good.store();
    good.ask(&accept("disk-1"))
        .refused(CONFLICT, &["disk-1", "cache.img", "whole up to LSN", &store, "nothing is lost"]);
    good.rig.shut_down().unwrap();
    std::fs::remove_file(&in_the_way).unwrap();
    // Another host: its own cache, its own run directory.
    let before = super::ballast(["store", "info", &store, "--json"]).json()["vdis"].clone();
    let (own_cache, own_dir) = (good.cache(), good.rig.config().dir.clone());
    let other = good.rig.dir().join("other");
    std::fs::create_dir(&other).unwrap();
    good.rig.config().cache = other.join("cache.img");
    good.rig.config().dir = other;
    good.rig.start().unwrap();
    let this = good.ask(&["status", "--json"]).json()["agent"]["host_uuid"].clone();
    let (this, host) = (this.as_str().unwrap(), host.as_str().unwrap());
    assert_ne!(this, host);
    good.ask(&accept("disk-1")).refused(CONFLICT, &["disk-1", this, host, "--take-over-host"]);
    let after = super::ballast(["store", "info", &store, "--json"]).json()["vdis"].clone();
    assert_eq!(before, after);
    good.rig.shut_down().unwrap();
    // On the operator's word that the other host is dead, it can be done here.
    good.rig.config().arguments = vec!["--take-over-host".into(), host.into()];
    let why = good.starts_without_the_disk();
    says(&why, &[host, "taken over", "--accept-loss"]);
    good.rig.shut_down().unwrap();
    (good.rig.config().cache, good.rig.config().dir) = (own_cache, own_dir);
    good.rig.config().arguments.clear();
    good.rig.start().unwrap();
    good.client.reconnect(&mut good.rig).unwrap();
    good.assert_unharmed();
}

/// Method: kill -9 at a growing delay after the request.
#[test]
fn a_kill_amid_a_rollback_leaves_it_made_or_not_made() {
    let mut good = Good::start();
    good.dies_with_writes_in_its_log();
    let image = good.stored();
    let (mut made, mut not_made) = (0, 0);
    for round in 0..8u64 {
        let away = good.lose_the_cache();
        good.starts_without_the_disk();
        let mut stream = UnixStream::connect(format!("{}/control.sock", good.run_dir())).unwrap();
        let body = r#"{"accept_loss":true}"#;
        let request = format!(
            "POST /v1/vdis/disk-1/rollback HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).unwrap();
        std::thread::sleep(Duration::from_micros(round * round * 400));
        good.rig.kill().unwrap();
        good.rig.check_store().unwrap();
        good.rig.start().unwrap();
        let said = good.ask(&["vdi", "rollback", "disk-1", "--accept-loss"]);
        match said.code {
            Some(0) => not_made += 1,
            _ => {
                said.refused(CONFLICT, &["attached to no host"]);
                made += 1;
            }
        }
        good.serves_exactly(&image);
        good.rig.kill().unwrap();
        std::fs::remove_file(away).unwrap();
    }
    eprintln!("made {made} times, not made {not_made} times");
    good.rig.start().unwrap();
    good.client.reconnect(&mut good.rig).unwrap();
    good.ends_sound();
}
