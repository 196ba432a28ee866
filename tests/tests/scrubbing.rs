//! Goal: an operator is told of damage in the store: which disk or snapshot, where, and in which block of the device; and of nothing else.
//! A scrub survives the agent's death and the store's absence, and ends when it is told to.
//!
//! Method: a real agent on a real target behind a relay; blocks are made to rot in the file behind the LUN.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::agent_rig::AgentRig;
use tests::single::{CHUNK, Disk, San, control, until};

const MIB: u64 = 1 << 20;
const DISK: u64 = 8 * MIB;
const BLOCK: u64 = 4096;

fn write_all(disk: &mut Disk, byte: u8) -> Result<()> {
    (0..DISK).step_by(CHUNK).try_for_each(|at| disk.write(at, byte))
}

fn cut(rig: &AgentRig) -> Result<u64> {
    control(rig, "snap create db")?["lsn"].as_u64().context("no LSN")
}

/// Blocks of the device that are full of a byte.
fn blocks_of(san: &San, byte: u8) -> Result<Vec<u64>> {
    let image = File::open(san.image())?;
    let (mut found, mut chunk) = (Vec::new(), vec![0; MIB as usize]);
    for at in (0..image.metadata()?.len()).step_by(chunk.len()) {
        image.read_exact_at(&mut chunk, at)?;
        let blocks = chunk.chunks(BLOCK as usize).zip(at / BLOCK..);
        found.extend(blocks.filter(|(b, _)| b.iter().all(|x| *x == byte)).map(|(_, block)| block));
    }
    Ok(found)
}

/// Changes a byte of a block, behind everybody's back.
fn rot(san: &San, block: u64) -> Result<()> {
    let image = File::options().read(true).write(true).open(san.image())?;
    let (mut byte, at) = ([0], block * BLOCK + 1234);
    image.read_exact_at(&mut byte, at)?;
    Ok(image.write_all_at(&[byte[0] ^ 0x40], at)?)
}

fn command(rig: &mut AgentRig, line: &str) -> Result<Output> {
    let mut command = std::process::Command::new(rig.config().binary.clone());
    command.arg("--run-dir").arg(rig.config().run_dir()).args(line.split(' '));
    Ok(command.output()?)
}

/// A whole scrub: its exit code, and what the last one did.
fn scrub(rig: &mut AgentRig) -> Result<(Option<i32>, Value)> {
    let output = command(rig, "--json scrub run --wait")?;
    let status: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{output:?}\n{}", rig.log_tail()))?;
    Ok((output.status.code(), status["last"].clone()))
}

#[test]
fn rot_is_named_and_nothing_else() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    let arguments = ["--gc-every", "0s", "--scrub-every", "never", "--scrub-rate", "0"];
    rig.config().arguments = arguments.map(Into::into).to_vec();
    rig.start()?;
    let status = control(&rig, "scrub status")?;
    ensure!(status["last"].is_null() && status["next"].is_null(), "{status}");
    ensure!(command(&mut rig, "scrub stop")?.status.code() == Some(3), "there is none to stop");
    control(&rig, "vdi create db --size 8MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    write_all(&mut disk, 1)?;
    let (old, new) = (3 * CHUNK as u64, 7 * CHUNK as u64);
    disk.write(old, 0x5a)?;
    let lsn = cut(&rig)?;
    write_all(&mut disk, 2)?;
    disk.write(new, 0xa7)?;
    rig.agent()?.drain()?;
    let (code, sound) = scrub(&mut rig)?;
    ensure!(code == Some(0) && sound["damage"] == Value::Array(vec![]), "{sound:#}");
    ensure!(sound["data_blocks"] == 2 * DISK / BLOCK && sound["unverified"] == 0, "{sound:#}");

    let per_chunk = CHUNK as u64 / BLOCK;
    let (held, own) = (blocks_of(&san, 0x5a)?, blocks_of(&san, 0xa7)?);
    ensure!(held.len() as u64 >= per_chunk && own.len() as u64 >= per_chunk, "{held:?} {own:?}");
    let (held, own) = (held[held.len() - 1], own[own.len() - 1]);
    rot(&san, held)?;
    rot(&san, own)?;
    let (code, found) = scrub(&mut rig)?;
    ensure!(code == Some(5), "{code:?}: {found:#}");
    let damage: BTreeMap<u64, &Value> = found["damage"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|entry| Some((entry["block"].as_u64()?, entry)))
        .collect();
    ensure!(damage.len() == 2, "{found:#}");
    for (block, snapshot, chunk) in [(held, Value::from(lsn), old), (own, Value::Null, new)] {
        let entry = damage.get(&block).with_context(|| format!("{block}: {found:#}"))?;
        ensure!(entry["part"] == "data" && entry["name"] == "db", "{entry:#}");
        ensure!(entry["snapshot"] == snapshot && entry["bytes"] == BLOCK, "{entry:#}");
        let offset = entry["offset"].as_u64().context("an offset")?;
        ensure!((chunk..chunk + CHUNK as u64).contains(&offset), "{entry:#}");
        ensure!(entry["advice"].as_str().is_some_and(|advice| !advice.is_empty()), "{entry:#}");
    }
    let status = control(&rig, "status")?;
    ensure!(status["degraded"].to_string().contains("damaged in 2 places"), "{status:#}");
    let metrics = String::from_utf8(command(&mut rig, "metrics")?.stdout)?;
    ensure!(metrics.contains("ballast_scrub_damaged 2.0"), "{metrics}");
    let shown = String::from_utf8(command(&mut rig, "scrub status")?.stdout)?;
    for words in ["damage in 2 places", "data of 'db',", format!("data of 'db@{lsn}',").as_str()] {
        ensure!(shown.contains(words), "{words}: {shown}");
    }
    ensure!(rig.log_tail().contains("damage in 2 places"), "{}", rig.log_tail());

    // Put back, it is found sound, also by the next agent, by itself.
    rot(&san, held)?;
    rot(&san, own)?;
    drop(disk);
    rig.shut_down()?;
    rig.config().arguments = ["--scrub-every", "1s", "--scrub-rate", "0"].map(Into::into).to_vec();
    rig.start()?;
    let status = until(&rig, "sound", |status| {
        status["scrub"]["damaged"] == 0 && status["scrub"]["last_completed"].is_u64()
    })?;
    ensure!(!status["degraded"].to_string().contains("damaged"), "{status:#}");
    rig.shut_down()?;
    rig.check_store()
}

/// What `scrub status` says until `wanted` holds.
fn scrubbing(rig: &AgentRig, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let end = Instant::now() + Duration::from_secs(100);
    loop {
        let status = control(rig, "scrub status")?;
        if wanted(&status) {
            return Ok(status);
        }
        ensure!(Instant::now() < end, "never {what}: {status:#}\n{}", rig.log_tail());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_killed_agent_and_a_lost_store_only_interrupt_it() -> Result<()> {
    const TREES: u64 = 6;
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    let arguments = ["--gc-every", "0s", "--scrub-every", "never", "--scrub-rate", "8MiB"];
    rig.config().arguments = arguments.map(Into::into).to_vec();
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    for byte in 1..TREES as u8 {
        write_all(&mut disk, byte)?;
        cut(&rig)?;
    }
    write_all(&mut disk, TREES as u8)?;
    rig.agent()?.drain()?;
    let oldest = *blocks_of(&san, 1)?.first().context("the oldest snapshot")?;
    rot(&san, oldest)?;

    control(&rig, "scrub run")?;
    let note = rig.config().run_dir().join("scrub.json");
    let end = Instant::now() + Duration::from_secs(100);
    let noted = loop {
        let text = std::fs::read(&note).unwrap_or_default();
        let found: Value = serde_json::from_slice(&text).unwrap_or_default();
        let noted = found["begun"]["saved"]["scrubbed"]["data_blocks"].as_u64().unwrap_or(0);
        if noted > 0 {
            break noted;
        }
        ensure!(Instant::now() < end, "never noted: {found:#}\n{}", rig.log_tail());
        std::thread::sleep(Duration::from_millis(20));
    };
    drop(disk);
    rig.kill()?;
    rig.start()?;
    let resumed = scrubbing(&rig, "resumed", |status| status["running"]["resumed"] == true)?;
    let blocks = resumed["running"]["data_blocks"].as_u64().context("blocks")?;
    ensure!(blocks >= noted, "it begins where it was, {noted}: {resumed:#}");

    san.cut();
    let waiting = scrubbing(&rig, "waiting", |s| s["running"]["waiting"].is_string())?;
    ensure!(waiting["last"].is_null(), "{waiting:#}");
    let status = control(&rig, "status")?;
    ensure!(status["scrub"]["running"] == true && status["scrub"]["waiting"] == true, "{status:#}");
    san.restore();
    let ended = scrubbing(&rig, "ended", |status| status["last"].is_object())?["last"].clone();
    ensure!(ended["failure"].is_null() && ended["snapshots"] == TREES - 1, "{ended:#}");
    ensure!(ended["data_blocks"] == TREES * DISK / BLOCK - 1, "each block once: {ended:#}");
    ensure!(ended["damage"].as_array().is_some_and(|damage| damage.len() == 1), "{ended:#}");
    ensure!(ended["damage"][0]["block"] == oldest && ended["unverified"] == 0, "{ended:#}");

    // One that is told to stop ends at once, and what was known of damage stays known.
    control(&rig, "scrub run")?;
    let stopped = control(&rig, "scrub stop")?;
    ensure!(stopped["running"].is_null() && stopped["last"]["stopped"] == true, "{stopped:#}");
    ensure!(stopped["completed"]["damage"][0]["block"] == oldest, "{stopped:#}");
    let status = control(&rig, "status")?;
    ensure!(status["scrub"]["running"] == false && status["scrub"]["damaged"] == 1, "{status:#}");
    rot(&san, oldest)?;
    rig.shut_down()?;
    rig.check_store()
}
