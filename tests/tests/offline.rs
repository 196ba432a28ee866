//! Goal: what an operator prepares for an outage holds in one: a disk fails requests after a deadline or waits, as its policy
//! says, and only because of an outage.
//!
//! Method: a real agent on a real target behind a relay that falls silent, and single requests whose answers are looked at one by
//! one. Nothing is timed; waits have limits only so that a hang ends.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::agent_rig::AgentRig;
use tests::single::{CHUNK, Disk, San, control, detach, until};

const MIB: u64 = 1 << 20;

/// The byte that each part of the test's disk is full of, by where it begins.
const PARTS: [(u64, u8); 4] = [(0, 1), (5 * MIB, 2), (20 * MIB, 3), (40 * MIB, 4)];
const PART_BYTES: u64 = 3 * MIB;

fn expected(at: u64) -> u8 {
    let part = PARTS.iter().find(|(start, _)| (*start..start + PART_BYTES).contains(&at));
    part.map_or(0, |(_, byte)| *byte)
}

/// A disk of which the store alone has some parts, and nobody the rest, attached anew. Returns its socket.
fn disk_in_the_store(rig: &mut AgentRig) -> Result<PathBuf> {
    control(rig, "vdi create db --size 48MiB --when-offline fail-after=1s")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(rig, &socket)?;
    for (start, byte) in PARTS {
        for at in (start..start + PART_BYTES).step_by(CHUNK) {
            disk.write(at, byte)?;
        }
    }
    drop(disk);
    detach(rig)?;
    rig.agent()?.attach("db")
}

/// Reads all of the disk; a part that would have to wait for a store that is away fails.
fn read_all(disk: &mut Disk) -> Result<()> {
    for at in (0..48 * MIB).step_by(CHUNK) {
        let found = disk.read(at)?;
        ensure!(found == Some(expected(at)), "at {at}: {found:?}, not {}", expected(at));
    }
    Ok(())
}

/// Has another disk write more than the cache holds, and drains it: nothing of the first disk is left but what is pinned.
fn push_everything_out(rig: &mut AgentRig, bytes: u64) -> Result<()> {
    control(rig, "vdi create other --size 256MiB")?;
    let socket = rig.agent()?.attach("other")?;
    let mut disk = Disk::connect(rig, &socket)?;
    for at in (0..bytes).step_by(CHUNK) {
        disk.write(at, 99)?;
    }
    rig.agent()?.drain()
}

fn readiness(status: &Value) -> &Value {
    &status["vdis"][0]["readiness"]
}

#[test]
fn a_hydrated_disk_reads_everything_in_an_outage_and_after_a_restart() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    rig.start()?;
    let socket = disk_in_the_store(&mut rig)?;
    let none = control(&rig, "vdi hydrate db --boot-trace").unwrap_err().to_string();
    ensure!(none.contains("no boot"), "{none}");
    let status = until(&rig, "measured", |status| readiness(status)["held_share"] == 0.0)?;
    let missing = readiness(&status)["missing"].to_string();
    ensure!(missing.contains("48.0 MiB of 48.0 MiB; run 'ballast vdi hydrate db'"), "{missing}");

    // A boot that reads one part and a little of nothing.
    let mut disk = Disk::connect(&mut rig, &socket)?;
    for at in (20 * MIB..24 * MIB).step_by(CHUNK) {
        ensure!(disk.read(at)? == Some(expected(at)));
    }
    drop(disk);
    let booted = |status: &Value| readiness(status)["boot_trace_share"].is_f64();
    until(&rig, "traced", booted)?;
    rig.agent()?.drain()?;
    push_everything_out(&mut rig, 128 * MIB)?;
    let pushed_out = |status: &Value| readiness(status)["boot_trace_share"] == 0.0;
    let status = until(&rig, "pushed out", pushed_out)?;
    let missing = readiness(&status)["missing"].to_string();
    ensure!(missing.contains("--boot-trace"), "{missing}");

    let hydrated = control(&rig, "vdi hydrate db --boot-trace --wait")?;
    ensure!(hydrated["total_bytes"] == PART_BYTES, "{hydrated:#}");
    let whole = |status: &Value| readiness(status)["boot_trace_share"] == 1.0;
    let status = until(&rig, "whole", whole)?;
    ensure!(readiness(&status)["held_bytes"] == 4 * MIB, "{status:#}");

    let hydrated = control(&rig, "vdi hydrate db --wait")?;
    ensure!(hydrated["total_bytes"] == 3 * PART_BYTES, "{hydrated:#}");
    ensure!(hydrated["done_bytes"] == hydrated["total_bytes"], "{hydrated:#}");
    let held = |status: &Value| readiness(status)["held_share"] == 1.0;
    let status = until(&rig, "held", held)?;
    ensure!(readiness(&status)["missing"].is_null(), "{status:#}");

    san.cut();
    read_all(&mut Disk::connect(&mut rig, &socket)?)?;
    rig.kill()?;
    rig.start().context("start without the store")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    read_all(&mut disk).context("after a restart without the store")?;
    // Sure of its boot trace after the restart, too.
    until(&rig, "whole", whole)?;
    disk.write(30 * MIB, 7)?;
    ensure!(disk.read(30 * MIB)? == Some(7));
    san.restore();
    rig.agent()?.drain()?;
    ensure!(disk.read(30 * MIB)? == Some(7));
    let refused = control(&rig, "vdi hydrate other").unwrap_err().to_string();
    ensure!(refused.contains("larger cache"), "{refused}");
    drop(disk);
    rig.shut_down()?;
    rig.check_store()
}

#[test]
fn a_pinned_disk_outlives_other_writers_its_own_and_a_restart_in_an_outage() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    rig.start()?;
    let socket = disk_in_the_store(&mut rig)?;
    let refused = control(&rig, "vdi pin db").unwrap_err().to_string();
    ensure!(refused.contains("hydrate"), "how empty it is, is not known: {refused}");
    control(&rig, "vdi hydrate db --wait")?;
    let held = |status: &Value| readiness(status)["held_share"] == 1.0;
    until(&rig, "held", held)?;
    ensure!(control(&rig, "vdi pin db")?["missing"].is_null());
    push_everything_out(&mut rig, 192 * MIB)?;
    let refused = control(&rig, "vdi pin other").unwrap_err().to_string();
    ensure!(refused.contains("larger cache"), "{refused}");
    let status = control(&rig, "status")?;
    ensure!(held(&status), "{status:#}");
    ensure!(status["vdis"][0]["pinned"] == true && status["cache"]["pinned_bytes"] != 0);

    // Its own writer leaves more behind than the ring holds. What has to give way for that comes back.
    let mut disk = Disk::connect(&mut rig, &socket)?;
    for _ in 0..50 {
        for at in (20 * MIB..20 * MIB + PART_BYTES).step_by(CHUNK) {
            disk.write(at, 3)?;
        }
    }
    drop(disk);
    rig.agent()?.drain()?;
    let compact =
        |status: &Value| held(status) && status["cache"]["pinned_bytes"].as_u64() < Some(30 * MIB);
    until(&rig, "held again, without what was overwritten", compact)?;

    san.cut();
    rig.kill()?;
    rig.start().context("start without the store")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    read_all(&mut disk).context("after a restart without the store")?;
    // What is not pinned of the ring takes writes, which push nothing out.
    for at in (0..20 * MIB).step_by(CHUNK) {
        let at = at % PART_BYTES;
        disk.write(at, expected(at))?;
    }
    read_all(&mut disk).context("after writes without the store")?;
    san.restore();
    drop(disk);
    rig.agent()?.drain()?;
    until(&rig, "held", held)?;
    ensure!(control(&rig, "vdi unpin db")?["pinned"] == false);
    let socket = rig.agent()?.attach("other")?;
    let mut other = Disk::connect(&mut rig, &socket)?;
    for at in (0..192 * MIB).step_by(CHUNK) {
        other.write(at, 98)?;
    }
    until(&rig, "pushed out", |status| !held(status))?;
    drop(other);
    rig.shut_down()?;
    rig.check_store()
}

fn policy(rig: &AgentRig) -> Result<String> {
    let info = control(rig, "vdi info db")?;
    Ok(info["when_offline"].as_str().context("a policy")?.to_owned())
}

#[test]
fn a_disk_fails_or_waits_in_an_outage_as_its_policy_says() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(128 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 64MiB --when-offline fail-after=2s")?;
    ensure!(policy(&rig)? == "fail-after=2s");
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    disk.write(32 * MIB, 32)?;
    disk.write(40 * MIB, 40)?;
    // Afterwards the store alone has these.
    drop(disk);
    detach(&rig)?;
    rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    disk.write(0, 7)?;
    rig.agent()?.drain()?;
    ensure!(policy(&rig)? == "fail-after=2s", "the log starts with what the store notes");

    san.cut();
    // What needs no store goes on; the rest fails, but not before the store has been away for the deadline.
    ensure!(disk.read(32 * MIB)?.is_none(), "a read of what is not held locally");
    disk.write(MIB, 8)?;
    disk.flush()?;
    ensure!(disk.read(0)? == Some(7) && disk.read(MIB)? == Some(8));
    let status = control(&rig, "status")?;
    let totals = &status["vdis"][0]["totals"];
    ensure!(totals["failed_by_policy"] == 1 && totals["failed"] == 0, "{totals:#}");
    let degraded = status["degraded"].to_string();
    ensure!(degraded.contains("fail-after=2s"), "{degraded}");
    ensure!(control(&rig, "vdi set db --when-offline fail-after=1ms").is_err());

    // From now on it waits, and the change is kept by a host whose store is away.
    control(&rig, "vdi set db --when-offline stall")?;
    disk.begin_read(40 * MIB)?;
    until(&rig, "waiting", |status| status["vdis"][0]["waiting"]["reads"] != 0)?;
    std::thread::sleep(Duration::from_secs(5));
    ensure!(disk.is_waiting()?, "it should have waited");
    drop(disk);
    rig.kill()?;
    rig.start().context("start without the store")?;
    ensure!(policy(&rig)? == "stall", "a cold start knows the policy");
    let mut disk = Disk::connect(&mut rig, &socket)?;
    disk.begin_read(40 * MIB)?;
    until(&rig, "waiting", |status| status["vdis"][0]["waiting"]["reads"] != 0)?;
    control(&rig, "vdi set db --when-offline fail-after=1s")?;
    ensure!(disk.end_read(40 * MIB)?.is_none(), "it takes effect at once");
    control(&rig, "vdi set db --when-offline fail-after=600s")?;
    disk.begin_read(40 * MIB)?;
    until(&rig, "waiting", |status| status["vdis"][0]["waiting"]["reads"] != 0)?;
    san.restore();
    ensure!(disk.end_read(40 * MIB)? == Some(40), "the store was back before the deadline");
    ensure!(disk.read(MIB)? == Some(8));

    // The store's record follows.
    drop(disk);
    detach(&rig)?;
    ensure!(policy(&rig)? == "fail-after=600s");
    control(&rig, "vdi set db --when-offline fail-after=5s")?;
    ensure!(policy(&rig)? == "fail-after=5s");
    rig.agent()?.attach("db")?;
    ensure!(policy(&rig)? == "fail-after=5s");
    rig.shut_down()?;
    rig.check_store()
}
