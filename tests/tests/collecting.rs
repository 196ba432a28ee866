//! Goal: what no disk and no snapshot holds comes back, and nothing else, while guests write, the store goes away, and the
//! agent is killed at any moment of a cycle.
//!
//! Method: a real agent on a real target behind a relay; cycles by request and by themselves; contents compared byte by byte
//! in the store, the store checked and its leaked blocks counted.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::single::{CHUNK, Disk, San, control, detach, until};
use tests::targets::IstgtTarget;

const MIB: u64 = 1 << 20;
const DISK: u64 = 8 * MIB;

/// The byte that each chunk is full of.
type Content = BTreeMap<u64, u8>;

fn write_all(disk: &mut Disk, byte: u8) -> Result<Content> {
    let mut content = Content::new();
    for at in (0..DISK).step_by(CHUNK) {
        disk.write(at, byte)?;
        content.insert(at, byte);
    }
    Ok(content)
}

fn cut(rig: &AgentRig) -> Result<u64> {
    control(rig, "snap create db")?["lsn"].as_u64().context("no LSN")
}

fn ensure_same(rig: &AgentRig, what: &str, expected: &Content) -> Result<()> {
    let found = std::fs::read(rig.export(what)?)?;
    for (chunk, at) in found.chunks(CHUNK).zip((0..).step_by(CHUNK)) {
        let byte = expected.get(&at).copied().unwrap_or_default();
        ensure!(chunk.iter().all(|found| *found == byte), "{what} at {at}: not {byte} throughout");
    }
    Ok(())
}

/// What the check says of a store that nobody uses.
fn checked(rig: &mut AgentRig) -> Result<Value> {
    let url = rig.config().store.clone();
    let report = rig.config().command(&["store", "check", &url, "--json"])?;
    Ok(serde_json::from_str(&report)?)
}

#[test]
fn what_deleted_snapshots_held_comes_back() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    // Only when it is asked for.
    rig.config().arguments = ["--gc-every", "0s", "--gc-free-below", "0"].map(Into::into).to_vec();
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    let mut held = BTreeMap::new();
    for byte in 1..=6 {
        let content = write_all(&mut disk, byte)?;
        held.insert(cut(&rig)?, content);
    }
    rig.agent()?.drain()?;
    let status = control(&rig, "gc status")?;
    ensure!(status["last"].is_null() && status["every"].is_null(), "{status}");
    let free = |rig: &AgentRig| control(rig, "gc run --wait")?["free"].as_u64().context("free");
    let before = free(&rig)?;
    let lsns: Vec<u64> = held.keys().copied().collect();
    // The newest holds what the disk holds, too.
    control(&rig, &format!("snap delete db {} {} {}", lsns[0], lsns[2], lsns[5]))?;
    let status = control(&rig, "gc run --wait")?;
    let given_back = status["last"]["reclaimed_data"].as_u64().context("bytes")?;
    ensure!(given_back == 2 * DISK, "{status}");
    ensure!(free(&rig)? >= before + 2 * DISK, "space must come back");
    for index in [1, 3, 4] {
        ensure_same(&rig, &format!("db@{}", lsns[index]), &held[&lsns[index]])?;
    }
    // The store goes away: nothing is collected, and that is said.
    san.cut();
    let refused = control(&rig, "gc run --wait").unwrap_err().to_string();
    ensure!(refused.contains("answer"), "{refused}");
    san.restore();
    until(&rig, "back", |status| status["store"]["reachable"] == true)?;
    let content = write_all(&mut disk, 7)?;
    rig.agent()?.drain()?;
    control(&rig, "gc run --wait")?;
    ensure_same(&rig, "db", &content)?;
    drop(disk);
    detach(&rig)?;
    control(&rig, "vdi delete db --with-snapshots")?;
    control(&rig, "gc run --wait")?;
    control(&rig, "gc run --wait")?;
    rig.shut_down()?;
    let report = checked(&mut rig)?;
    ensure!(report["blocks_allocated"] == 0, "all of it is free: {report}");
    Ok(())
}

#[test]
fn cycles_that_are_killed_take_nothing_and_leave_nothing() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    rig.config().arguments = ["--gc-every", "1s", "--gc-rate", "0"].map(Into::into).to_vec();
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut held: BTreeMap<u64, Content> = BTreeMap::new();
    let mut now = Content::new();
    for round in 0..10u8 {
        let mut disk = Disk::connect(&mut rig, &socket)?;
        now = write_all(&mut disk, 2 * round + 1)?;
        held.insert(cut(&rig)?, now.clone());
        let part = u64::from(round) * 5 * CHUNK as u64;
        for at in (part..part + MIB).step_by(CHUNK) {
            disk.write(at % DISK, 2 * round + 2)?;
            now.insert(at % DISK, 2 * round + 2);
        }
        disk.flush()?;
        rig.agent()?.drain()?;
        while held.len() > 3 {
            let (lsn, _) = held.pop_first().context("one")?;
            control(&rig, &format!("snap delete db {lsn}"))?;
        }
        // Beside a cycle, at another moment of it each time.
        rig.kill_in(Duration::from_micros(u64::from(round) * 700))?;
        let _ = control(&rig, "gc run");
        rig.reap()?;
        rig.start()?;
        ensure_same(&rig, "db", &now)?;
        for (lsn, content) in &held {
            ensure_same(&rig, &format!("db@{lsn}"), content)?;
        }
    }
    control(&rig, "gc run --wait")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    for at in (0..DISK).step_by(CHUNK) {
        ensure!(disk.read(at)? == now.get(&at).copied(), "the disk at {at}");
    }
    drop(disk);
    rig.agent()?.drain()?;
    rig.shut_down()?;
    let report = checked(&mut rig)?;
    ensure!(report["blocks_leaked"] == 0, "an orderly stop leaves no garbage: {report}");
    Ok(())
}

/// A thin LUN gives back what a deleted disk took, while another disk is written, and what is left is what it was.
#[test]
fn the_device_gets_back_what_deleted_disks_took() -> Result<()> {
    const BIG: u64 = 96 * MIB;
    let san = San::new()?;
    let mut rig = san.rig(256 * MIB)?;
    rig.config().arguments = ["--gc-every", "0s", "--gc-unmap-rate", "0"].map(Into::into).to_vec();
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    control(&rig, "vdi create big --size 96MiB")?;
    let (kept, big) = (rig.agent()?.attach("db")?, rig.agent()?.attach("big")?);
    let mut disk = Disk::connect(&mut rig, &kept)?;
    let mut content = write_all(&mut disk, 1)?;
    let mut gone = Disk::connect(&mut rig, &big)?;
    for at in (0..BIG).step_by(CHUNK) {
        gone.write(at, 0x77)?;
    }
    rig.agent()?.drain()?;
    let full = san.bytes_taken()?;
    ensure!(full >= BIG, "{full} bytes are taken");
    drop(gone);
    until(&rig, "disconnected", |status| {
        let vdis = status["vdis"].as_array().into_iter().flatten();
        vdis.filter(|vdi| vdi["name"] == "big").all(|vdi| vdi["front_end_connected"] == false)
    })?;
    control(&rig, "vdi detach big")?;
    control(&rig, "vdi delete big")?;
    control(&rig, "gc run --wait")?;
    // Guests go on meanwhile; what they write is given blocks that were just unmapped.
    for (at, byte) in (0..MIB).step_by(CHUNK).zip(2..) {
        disk.write(at, byte)?;
        content.insert(at, byte);
    }
    rig.agent()?.drain()?;
    // The store keeps some of the blocks at hand.
    let given_back = BIG - 24 * MIB;
    until(&rig, "unmapped", |status| {
        status["unmap"]["bytes"].as_u64() >= Some(given_back) && status["unmap"]["running"] == false
    })?;
    let unmap = &control(&rig, "gc status")?["unmap"];
    ensure!(unmap["wanted"] == true && unmap["supported"] == true, "{unmap}");
    ensure!(unmap["failures"] == 0 && unmap["last_failure"].is_null(), "{unmap}");
    let left = san.bytes_taken()?;
    ensure!(left + given_back <= full + 2 * MIB, "{left} of {full} bytes are taken still");
    ensure_same(&rig, "db", &content)?;
    drop(disk);
    until(&rig, "disconnected", |status| status["vdis"][0]["front_end_connected"] == false)?;
    control(&rig, "vdi detach db")?;
    rig.shut_down()?;
    let report = checked(&mut rig)?;
    ensure!(report["blocks_leaked"] == 0, "{report}");
    Ok(())
}

/// A target without UNMAP is sent none, and that is said once.
#[test]
fn a_target_without_unmap_is_left_alone() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let target = IstgtTarget::start(dir.path(), 256 * MIB)?;
    let mut rig = AgentRig::new(&StoreSpec::url(target.url(), 256 * MIB), 64 * MIB)?;
    rig.start()?;
    for _ in 0..3 {
        control(&rig, "gc run --wait")?;
    }
    let unmap = &control(&rig, "gc status")?["unmap"];
    ensure!(unmap["wanted"] == true && unmap["supported"] == false, "{unmap}");
    ensure!(unmap["runs"] == 0 && unmap["failures"] == 0, "{unmap}");
    let said = rig.log_tail().matches("free blocks are not unmapped").count();
    ensure!(said == 1, "said {said} times");
    rig.shut_down()?;
    Ok(())
}

/// Runs a command of the agent's, and shows its text.
fn text(rig: &mut AgentRig, line: &str) -> Result<String> {
    let run_dir = rig.config().run_dir().display().to_string();
    let mut all = vec!["--run-dir", run_dir.as_str()];
    all.extend(line.split(' '));
    rig.config().command(&all)
}

/// What `vdi tree`, `snap list` and `store info` foretell is what deletions and cycles then give back; `gc status` and `status` tell what the
/// store is full of.
#[test]
fn sizes_foretell_what_deletions_free() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    rig.config().arguments = ["--gc-every", "0s", "--gc-free-below", "0", "--warn-used", "1,99"]
        .map(Into::into)
        .to_vec();
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    let mut cuts = Vec::new();
    for byte in 1..=3 {
        write_all(&mut disk, byte)?;
        cuts.push(cut(&rig)?);
    }
    write_all(&mut disk, 4)?;
    rig.agent()?.drain()?;
    control(&rig, &format!("vdi create web --from db@{}", cuts[0]))?;
    control(&rig, "gc run --wait")?;
    let status = control(&rig, "gc status")?;
    ensure!(status["used_for"].is_null() && status["quarantine"] == 0, "{status}");

    let tree = control(&rig, "vdi tree --sizes")?;
    let (db, web) = (&tree["disks"][0]["sizes"], &tree["disks"][1]["sizes"]);
    ensure!(db["exclusive"]["data"] == DISK && db["referenced"]["data"] == DISK, "{tree:#}");
    ensure!(db["snapshots_free"]["data"] == 2 * DISK, "the second and the third: {tree:#}");
    ensure!(db["deletion_frees"]["data"] == 3 * DISK, "not what the clone holds: {tree:#}");
    ensure!(web["referenced"]["data"] == DISK && web["exclusive"]["data"] == 0, "{tree:#}");
    ensure!(tree["store"]["reachable"]["data"] == 4 * DISK, "{tree:#}");
    ensure!(tree["store"]["reclaimable"]["data"] == 0, "{tree:#}");
    ensure!(tree["store"]["provisioned"] == 2 * DISK, "{tree:#}");
    let status = control(&rig, "gc status")?;
    let used_for = &status["used_for"];
    ensure!(used_for["at"].as_u64().is_some_and(|at| at > 0), "{status}");
    ensure!(used_for["snapshots"]["data"] == 2 * DISK, "{status}");
    ensure!(used_for["largest"][0]["vdi"] == "db", "{status}");

    let list = control(&rig, "snap list db --sizes")?;
    let sizes = list["sizes"].as_array().context("sizes")?;
    let of = |lsn: u64| sizes.iter().find(|size| size["lsn"] == lsn).context("a snapshot");
    ensure!(of(cuts[0])?["cloned"] == true && of(cuts[0])?["exclusive"]["data"] == 0, "{list:#}");
    let second = of(cuts[1])?["exclusive"].clone();
    ensure!(second["data"] == DISK, "{list:#}");
    control(&rig, &format!("snap delete db {}", cuts[1]))?;
    let reclaimable = control(&rig, "vdi tree --sizes")?["store"]["reclaimable"].clone();
    ensure!(reclaimable["data"] == second["data"], "{reclaimable} and {second}");
    let ended = control(&rig, "gc run --wait")?["last"].clone();
    ensure!(ended["reclaimed_data"] == reclaimable["data"], "{ended} and {reclaimable}");
    ensure!(ended["reclaimed_metadata"] == reclaimable["metadata"], "{ended} and {reclaimable}");

    // The same from the device, beside the agent, while nothing is written.
    let url = rig.config().store.clone();
    let info: Value = serde_json::from_str(
        &rig.config().command(&["store", "info", &url, "--sizes", "--json"])?,
    )?;
    ensure!(info["sizes"]["store"]["reachable"]["data"] == 3 * DISK, "{info:#}");
    ensure!(info["overcommit"].as_f64().is_some_and(|times| times > 0.0), "{info:#}");
    let plain = rig.config().command(&["store", "info", &url])?;
    ensure!(plain.contains("overcommit") && !plain.contains("reclaimable"), "{plain}");

    for (line, words) in [
        ("vdi tree --sizes", ["holds 8.", "deletion frees", "reclaimable", "overcommit"]),
        ("vdi tree --sizes --dot", ["digraph", "holds 8.", "deletion frees", "exclusive"]),
        ("vdi tree --sizes --svg", ["<svg", "holds 8.", "deletion frees", "exclusive"]),
        ("snap list db --sizes", ["DELETION FREES", "8.0 MiB", "db@", "HOLDS"]),
        ("gc status", ["as of ", "snapshots alone", "quarantine", "most by"]),
    ] {
        let shown = text(&mut rig, line)?;
        ensure!(words.iter().all(|words| shown.contains(words)), "{line}: {shown}");
    }

    let status = until(&rig, "over the mark", |status| status["store"]["space"]["over_mark"] == 1)?;
    let reasons = status["degraded"].to_string();
    ensure!(reasons.contains("over the mark of 1 %"), "{status:#}");
    let metrics = text(&mut rig, "metrics")?;
    ensure!(metrics.contains("ballast_store_watermark_percent 1.0"), "{metrics}");
    ensure!(rig.log_tail().contains("over the mark of 1 %"), "{}", rig.log_tail());
    Ok(())
}

/// A walk that takes long ends with whoever asked for it, and when garbage is to be collected; and is one at a time.
#[test]
fn computing_sizes_gives_way() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    // A block a second.
    let arguments = ["--gc-every", "0s", "--gc-free-below", "0", "--gc-rate", "4096"];
    rig.config().arguments = arguments.map(Into::into).to_vec();
    rig.start()?;
    control(&rig, "vdi create db --size 64MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    // A leaf for each MiB.
    for at in (0..60 * MIB).step_by(MIB as usize) {
        disk.write(at, 1)?;
    }
    rig.agent()?.drain()?;
    let (run_dir, binary) = (rig.config().run_dir(), rig.config().binary.clone());
    let begin = |rig: &AgentRig| -> Result<std::process::Child> {
        let mut command = std::process::Command::new(&binary);
        command.arg("--run-dir").arg(&run_dir).args(["vdi", "tree", "--sizes"]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        computing(rig, true)?;
        Ok(child)
    };
    let mut first = begin(&rig)?;
    let refused = control(&rig, "snap list db --sizes").unwrap_err().to_string();
    ensure!(refused.contains("are being computed already"), "{refused}");
    first.kill()?;
    first.wait()?;
    computing(&rig, false)?;
    let second = begin(&rig)?;
    control(&rig, "gc run")?;
    let ended = second.wait_with_output()?;
    let words = String::from_utf8_lossy(&ended.stderr);
    ensure!(!ended.status.success() && words.contains("garbage is being collected"), "{words}");
    let refused = control(&rig, "vdi tree --sizes").unwrap_err().to_string();
    ensure!(refused.contains("garbage is being collected"), "{refused}");
    Ok(())
}

/// Waits until sizes are being computed, or are not.
fn computing(rig: &AgentRig, wanted: bool) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(60);
    while control(rig, "gc status")?["computing_sizes"] != wanted {
        ensure!(Instant::now() < end, "computing sizes: never {wanted}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
