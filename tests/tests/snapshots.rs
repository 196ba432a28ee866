//! Goal: a snapshot is the disk at one point of its writes, for good: taken with the store there or away, before a kill of the
//! agent or after it, between any two writes; a clone begins as exactly that, and neither takes anything from the other.
//!
//! Method: a real agent on a real target behind a relay that falls silent; what is in the store afterwards is copied out by
//! another process and compared byte by byte, and the store is checked.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use bench::agent::find_binary;
use serde_json::Value;
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::single::{
    CHUNK, Content, Disk, San, control, ensure_same, fill_log, in_the_store, until,
};

const MIB: u64 = 1 << 20;
const DISK: u64 = 8 * MIB;

/// A disk that is written and cut, and what it held at each cut.
struct Written {
    disk: Disk,
    now: Content,
    cuts: BTreeMap<u64, Content>,
    next: u8,
}

impl Written {
    /// Writes some chunks anew, some of them again.
    fn write(&mut self) -> Result<()> {
        for n in 0..6u64 {
            self.next = self.next % 250 + 1;
            let at = (u64::from(self.next) * 37 + n * 11) % (DISK / CHUNK as u64) * CHUNK as u64;
            self.disk.write(at, self.next)?;
            self.now.insert(at, self.next);
        }
        Ok(())
    }

    fn cut(&mut self, rig: &AgentRig, more: &str) -> Result<u64> {
        let taken = control(rig, &format!("snap create db{more}"))?;
        let lsn = taken["lsn"].as_u64().with_context(|| format!("no LSN in {taken}"))?;
        self.cuts.insert(lsn, self.now.clone());
        Ok(lsn)
    }
}

fn listed(rig: &AgentRig, what: &str) -> Result<Vec<(u64, String)>> {
    let list = control(rig, format!("snap list db {what}").trim())?;
    let row = |row: &Value| Some((row["lsn"].as_u64()?, row["place"].as_str()?.to_owned()));
    let rows = list["snapshots"].as_array().context("a list")?;
    rows.iter().map(|snapshot| row(snapshot).context("a row")).collect()
}

#[test]
fn snapshots_are_exact_with_the_store_there_away_and_after_a_kill() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let disk = Disk::connect(&mut rig, &socket)?;
    let mut db = Written { disk, now: Content::new(), cuts: BTreeMap::new(), next: 0 };
    db.write()?;
    let first = db.cut(&rig, " --label base")?;
    for _ in 0..8 {
        db.write()?;
        db.cut(&rig, "")?;
        db.cut(&rig, "")?;
    }
    rig.agent()?.drain()?;
    san.cut();
    for _ in 0..8 {
        db.write()?;
        db.cut(&rig, "")?;
    }
    let offline = db.cut(&rig, " --label offline")?;
    db.write()?;
    ensure!(listed(&rig, "--limit 3")?.iter().all(|(_, place)| place == "log"));
    // A clone of it is this host's alone until the store is back (`clones.rs`), and can be given up.
    let early = control(&rig, "vdi create early --from db@offline")?;
    ensure!(early["provisional"] == true, "{early}");
    control(&rig, "vdi delete early")?;
    rig.kill()?;
    rig.start().context("start without the store")?;
    db.disk = Disk::connect(&mut rig, &socket)?;
    let in_log: Vec<u64> = listed(&rig, "")?.into_iter().map(|(lsn, _)| lsn).collect();
    let expected: Vec<u64> = db.cuts.keys().rev().take(9).copied().collect();
    ensure!(in_log == expected, "after the kill: {in_log:?}, not {expected:?}");
    db.write()?;
    db.cut(&rig, "")?;
    san.restore();
    until(&rig, "back", |status| status["store"]["reachable"] == true)?;
    // A clone of one that is in the log waits for it to reach the store.
    control(&rig, "vdi create late --from db@offline")?;
    rig.agent()?.drain()?;
    let all = listed(&rig, "--oldest-first")?;
    ensure!(all.iter().all(|(_, place)| place == "store"), "{all:?}");
    ensure!(all.iter().map(|(lsn, _)| lsn).eq(db.cuts.keys()), "{all:?}");
    for (lsn, content) in &db.cuts {
        ensure_same(
            &in_the_store(&rig, &format!("db@{lsn}"))?,
            DISK,
            content,
            &format!("snapshot {lsn}"),
        )?;
    }
    ensure_same(&in_the_store(&rig, "late")?, DISK, &db.cuts[&offline], "the clone")?;

    // The clone is written; the snapshots that are in nobody's way are deleted.
    let of_clone = rig.agent()?.attach("late")?;
    let mut clone = Disk::connect(&mut rig, &of_clone)?;
    for at in (0..DISK).step_by(CHUNK) {
        let expected = db.cuts[&offline].get(&at).copied().unwrap_or_default();
        ensure!(clone.read(at)? == Some(expected), "the clone at {at}");
    }
    for at in (0..DISK).step_by(2 * CHUNK) {
        clone.write(at, 251)?;
    }
    let refused = control(&rig, "snap delete db offline").unwrap_err().to_string();
    ensure!(refused.contains("'late' was cloned from its snapshot"), "{refused}");
    let gone: Vec<u64> =
        db.cuts.keys().copied().filter(|lsn| ![first, offline].contains(lsn)).collect();
    let names: Vec<String> = gone.iter().map(u64::to_string).collect();
    control(&rig, &format!("snap delete db {}", names.join(" ")))?;
    for _ in 0..10 {
        db.write()?;
    }
    rig.agent()?.drain()?;
    ensure!(listed(&rig, "")?.len() == 2);
    ensure_same(&in_the_store(&rig, "db@base")?, DISK, &db.cuts[&first], "the first")?;
    ensure_same(&in_the_store(&rig, "db@offline")?, DISK, &db.cuts[&offline], "the cloned one")?;
    ensure_same(&in_the_store(&rig, "db")?, DISK, &db.now, "the disk")?;
    drop((clone, db));
    rig.shut_down()?;
    rig.check_store()
}

#[test]
fn what_cannot_be_done_is_said_and_nothing_is_done() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let refused = |line: &str, words: &str| {
        let said = control(&rig, line).unwrap_err().to_string();
        ensure!(said.contains(words), "'{line}' says: {said}");
        Ok(())
    };
    refused("snap create db", "not attached")?;
    refused("snap create nix", "no such disk")?;
    rig.agent()?.attach("db")?;
    refused(&format!("snap create db --label {}", "x".repeat(65)), "64 bytes")?;
    let lsn = control(&rig, "snap create db --label one")?["lsn"].as_u64().context("LSN")?;
    refused("snap delete db 77", "no snapshot with that LSN or label")?;
    refused("snap delete db one two", "no snapshot with that LSN or label")?;
    refused("snap create db --label 1834", "is a number")?;
    refused("snap list nix", "no such disk")?;
    refused("snap label db two three", "no snapshot")?;
    refused("vdi create db --from db@one", "taken")?;
    refused("vdi create a --from db@two", "no snapshot")?;
    refused("vdi create a --from nix@one", "no such disk")?;
    refused("vdi create a --from db@", "such as db@1834")?;
    refused("vdi create a --from db@one --size 8MiB", "cannot be used with")?;
    refused("vdi create a", "--size")?;
    // Of two with one label none is chosen to be deleted.
    control(&rig, "snap create db --label one")?;
    refused("snap delete db one", "both have that label")?;
    control(&rig, &format!("snap label db {lsn} two"))?;
    control(&rig, "snap delete db one")?;
    control(&rig, "vdi create a --from db@two")?;
    let tree = control(&rig, "vdi tree")?;
    let origin = &tree["disks"][0]["origin"];
    ensure!(origin["label"] == "two" && origin["lsn"] == lsn, "{tree}");
    ensure!(
        origin["uuid"] == tree["disks"][1]["uuid"] && tree["disks"][1]["snapshots"] == 1,
        "{tree}"
    );
    control(&rig, "vdi detach db")?;
    refused("vdi delete db", "--with-snapshots")?;
    refused("vdi delete db --with-snapshots", "'a' was cloned from its snapshot")?;
    control(&rig, "vdi delete a")?;
    control(&rig, "vdi delete db --with-snapshots")?;
    ensure!(control(&rig, "vdi list")?.as_array().is_some_and(Vec::is_empty));
    rig.shut_down()?;
    rig.check_store()?;
    // An export of one that is not there leaves no file.
    let out = rig.dir().join("none.raw");
    let done = Command::new(find_binary()?)
        .args(["store", "export", &rig.config().store, "db@two"])
        .arg(&out)
        .output()?;
    ensure!(!done.status.success() && !out.exists());
    Ok(())
}

#[test]
fn one_that_a_full_log_has_no_room_for_is_answered_after_its_wait() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 64MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    san.cut();
    fill_log(&rig, &mut disk, 64 * MIB)?;
    let said = control(&rig, "snap create db --label late --wait 1s").unwrap_err().to_string();
    ensure!(said.contains("not durable in the log after 1s"), "{said}");
    ensure!(said.contains("it may be taken yet"), "{said}");
    san.restore();
    ensure!(disk.answer()?, "the write that waited failed");
    rig.agent()?.drain()?;
    control(&rig, "snap create db --label after")?;
    let labels = control(&rig, "snap list db")?.to_string();
    ensure!(labels.contains("late"), "taken yet: {labels}");
    drop(disk);
    rig.shut_down()?;
    rig.check_store()
}

/// What `snap diff` says differs, as chunks: true where they are zeros now.
fn differing(rig: &AgentRig, images: &str) -> Result<BTreeMap<u64, bool>> {
    let told = control(rig, &format!("snap diff {images}"))?;
    let mut chunks = BTreeMap::new();
    for range in told["ranges"].as_array().context("ranges")? {
        let number = |field: &str| range[field].as_u64().with_context(|| format!("{range}"));
        let (first, length) = (number("offset")?, number("length")?);
        for at in (first..first + length).step_by(CHUNK) {
            chunks.insert(at / CHUNK as u64, range["zeros"] == true);
        }
    }
    Ok(chunks)
}

#[test]
fn a_difference_is_what_was_written_between() -> Result<()> {
    let mut rig = AgentRig::new(&StoreSpec::file(512 * MIB), 64 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    let chunk = |n: u64| n * CHUNK as u64;
    for n in 0..100 {
        disk.write(chunk(n), 1)?;
    }
    control(&rig, "snap create db --label one")?;
    for n in [3, 40, 41, 120] {
        disk.write(chunk(n), 2)?;
    }
    // Still in the log: it is drained for the comparison, and so is what comes after it.
    control(&rig, "snap create db --label two")?;
    let written = |chunks: &[u64]| chunks.iter().map(|n| (*n, false)).collect::<BTreeMap<_, _>>();
    ensure!(differing(&rig, "db@one db@two")? == written(&[3, 40, 41, 120]));
    disk.write(chunk(41), 3)?;
    disk.write(chunk(77), 3)?;
    ensure!(differing(&rig, "db@two db")? == written(&[41, 77]));
    ensure!(differing(&rig, "db@one db")? == written(&[3, 40, 41, 77, 120]));
    // Backwards: what was not there yet is zeros.
    let mut back = written(&[3, 40, 41]);
    back.insert(120, true);
    ensure!(differing(&rig, "db@two db@one")? == back);
    control(&rig, "vdi create test --from db@one")?;
    ensure!(differing(&rig, "db@one test")?.is_empty());
    ensure!(differing(&rig, "test db@two")? == written(&[3, 40, 41, 120]));
    for (images, words) in [
        ("db@nix db", "no snapshot with that LSN or label"),
        ("db nix@one", "no such disk"),
        ("db db@", "such as db@1834"),
    ] {
        let said = control(&rig, &format!("snap diff {images}")).unwrap_err().to_string();
        ensure!(said.contains(words), "'{images}' says: {said}");
    }
    drop(disk);
    rig.shut_down()?;
    rig.check_store()
}
