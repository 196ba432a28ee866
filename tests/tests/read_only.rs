//! Goal: a snapshot that is attached read-only reads as the disk was then, whatever is done to the disk, the store, the agent and
//! the snapshots beside it; it takes no writes, and cannot be deleted before it is detached.
//!
//! Method: a real agent on a real target behind a relay that falls silent, or on a file that is damaged; every chunk that a guest
//! reads is compared with what was written before the snapshot. Garbage is collected all the time.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::single::{CHUNK, Content, Disk, San, control, detach, until};

const MIB: u64 = 1 << 20;
const DISK: u64 = 8 * MIB;
const CHUNKS: u64 = DISK / CHUNK as u64;

fn chunk(n: u64) -> u64 {
    n * CHUNK as u64
}

fn fill(disk: &mut Disk, chunks: impl Iterator<Item = u64>, byte: u8) -> Result<Content> {
    let mut content = Content::new();
    for at in chunks.map(chunk) {
        disk.write(at, byte)?;
        content.insert(at, byte);
    }
    Ok(content)
}

/// What the guest reads of some chunks.
fn ensure_read(disk: &mut Disk, step: usize, expected: &Content, what: &str) -> Result<()> {
    for at in (0..CHUNKS).step_by(step).map(chunk) {
        let byte = expected.get(&at).copied().unwrap_or_default();
        let found = disk.read(at)?;
        ensure!(found == Some(byte), "{what} at {at}: {found:?}, not {byte}");
    }
    Ok(())
}

fn refused(rig: &AgentRig, line: &str, words: &str) -> Result<()> {
    match control(rig, line) {
        Ok(done) => anyhow::bail!("'{line}' was done: {done}"),
        Err(said) => {
            let said = said.to_string();
            ensure!(said.contains(words), "'{line}' says: {said}");
            Ok(())
        }
    }
}

fn taken(rig: &AgentRig, label: &str) -> Result<u64> {
    let answer = control(rig, &format!("snap create db --label {label}"))?;
    answer["lsn"].as_u64().with_context(|| format!("no LSN in {answer}"))
}

/// Attaches a snapshot of `db`; its socket.
fn attach(rig: &AgentRig, snapshot: &str) -> Result<PathBuf> {
    let answer = control(rig, &format!("vdi attach db@{snapshot} --read-only"))?;
    ensure!(answer["read_only"] == true, "{answer}");
    Ok(answer["socket"].as_str().with_context(|| format!("no socket in {answer}"))?.into())
}

/// Detaches the only snapshot that is attached, whose front end has just gone.
fn detach_snapshot(rig: &AgentRig, snapshot: &str) -> Result<()> {
    let gone = |status: &Value| status["snapshots"][0]["front_end_connected"] == false;
    until(rig, "disconnected", gone)?;
    control(rig, &format!("vdi detach db@{snapshot}")).map(drop)
}

/// An attached disk with a snapshot `base`, and all of it overwritten since.
fn written(rig: &mut AgentRig) -> Result<(Disk, Content, u64)> {
    control(rig, "vdi create db --size 8MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(rig, &socket)?;
    let mut base = fill(&mut disk, 0..100, 1)?;
    base.extend(fill(&mut disk, (0..100).step_by(7), 2)?);
    let lsn = taken(rig, "base")?;
    fill(&mut disk, 0..CHUNKS, 3)?;
    Ok((disk, base, lsn))
}

#[test]
fn it_reads_as_the_disk_was_and_is_not_deleted_meanwhile() -> Result<()> {
    let mut rig = AgentRig::new(&StoreSpec::file(512 * MIB), 64 * MIB)?;
    rig.start()?;
    let (mut disk, base, lsn) = written(&mut rig)?;
    refused(&rig, "vdi attach db@base", "attach it with --read-only")?;
    refused(&rig, "vdi attach db --read-only", "snap create db")?;
    refused(&rig, "vdi attach db@nix --read-only", "no snapshot with that LSN or label")?;
    refused(&rig, "vdi attach nix@base --read-only", "no such disk")?;
    refused(&rig, "vdi detach db@base", "not attached to this host")?;
    // It is in the log still: it is brought to the store first.
    let socket = attach(&rig, "base")?;
    ensure!(socket.ends_with(format!("db@{lsn}.sock")), "{socket:?}");
    ensure!(attach(&rig, &lsn.to_string())? == socket, "the same again");
    let mut snapshot = Disk::connect(&mut rig, &socket)?;
    ensure_read(&mut snapshot, 1, &base, "the snapshot")?;
    // Neither of the two is the other's.
    for byte in 4..7 {
        fill(&mut disk, 0..CHUNKS, byte)?;
        rig.agent()?.drain()?;
        ensure_read(&mut snapshot, 3, &base, "the snapshot beside writes")?;
    }
    for at in [0, chunk(50), DISK - CHUNK as u64] {
        snapshot.begin_write(at, 9)?;
        ensure!(!snapshot.answer()?, "a write to a snapshot was taken");
    }
    snapshot.flush()?;
    ensure_read(&mut snapshot, 1, &base, "the snapshot after writes to it")?;

    let status = control(&rig, "status")?;
    let shown = &status["snapshots"][0];
    let name = format!("db@{lsn}");
    ensure!(shown["name"] == *name && shown["read_only"] == true, "{status}");
    ensure!(shown["state"] == "running" && shown["refused"] == 3, "{status}");
    ensure!(status["vdis"].as_array().is_some_and(|disks| disks.len() == 1), "{status}");
    let list = control(&rig, "vdi list")?;
    ensure!(list[0]["read_only"] == false && list[1]["name"] == *name, "{list}");
    ensure!(list[1]["read_only"] == true && list[1]["snapshot"] == lsn, "{list}");
    let metrics = control(&rig, "metrics")?["metrics"].to_string();
    ensure!(metrics.contains("ballast_read_only_up"), "{metrics}");

    // What it reads is not deleted; all else is, and is collected.
    let attached =
        format!("its snapshot {lsn} is attached read-only ('ballast vdi detach {name}' first)");
    let later = taken(&rig, "later")?;
    refused(&rig, "snap delete db base", &attached)?;
    refused(&rig, &format!("snap delete db {later} {lsn}"), &attached)?;
    control(&rig, "snap delete db later")?;
    drop(disk);
    detach(&rig)?;
    refused(&rig, "vdi delete db", &attached)?;
    refused(&rig, "vdi delete db --with-snapshots", &attached)?;
    control(&rig, "vdi rollback db --to base --discard-present")?;
    let of_disk = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &of_disk)?;
    ensure_read(&mut disk, 5, &base, "the disk that was rolled back")?;
    fill(&mut disk, 0..CHUNKS, 7)?;
    rig.agent()?.drain()?;
    control(&rig, "gc run --wait")?;
    fill(&mut disk, 0..CHUNKS, 8)?;
    rig.agent()?.drain()?;
    ensure_read(&mut snapshot, 1, &base, "the snapshot after collection")?;

    refused(&rig, "vdi detach db@base", "in use by a virtual machine")?;
    drop(snapshot);
    detach_snapshot(&rig, "base")?;
    ensure!(!socket.exists(), "its socket is left");
    control(&rig, "snap delete db base")?;
    control(&rig, "gc run --wait")?;
    drop(disk);
    detach(&rig)?;
    control(&rig, "vdi delete db")?;
    rig.shut_down()?;
    rig.check_store()
}

#[test]
fn reads_wait_while_the_store_is_away_and_go_on_after_a_kill() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    rig.start()?;
    let (mut disk, base, lsn) = written(&mut rig)?;
    rig.agent()?.drain()?;
    let socket = attach(&rig, "base")?;
    let mut snapshot = Disk::connect(&mut rig, &socket)?;
    let waits = |status: &Value| status["snapshots"][0]["waiting_reads"] != 0;
    let expected = |at: u64| base.get(&at).copied().unwrap_or_default();

    // The store falls silent in the middle of reads.
    san.cut();
    snapshot.begin_read(chunk(14))?;
    until(&rig, "waiting", waits)?;
    disk.write(0, 4)?;
    ensure!(snapshot.is_waiting()?, "read without a store");
    san.restore();
    ensure!(snapshot.end_read(chunk(14))? == Some(expected(chunk(14))));
    ensure_read(&mut snapshot, 9, &base, "the snapshot after an outage")?;

    // The agent dies, and the next one finds no store.
    san.cut();
    taken(&rig, "pending")?;
    snapshot.begin_read(chunk(14))?;
    until(&rig, "away", |status| status["store"]["reachable"] == false)?;
    refused(&rig, "vdi attach db@pending --read-only", "not in the store yet")?;
    rig.kill()?;
    rig.start().context("start without the store")?;
    drop(disk);
    let mut snapshot = Disk::connect(&mut rig, &socket)?;
    snapshot.begin_read(chunk(15))?;
    let status = until(&rig, "waiting after the kill", waits)?;
    ensure!(status["snapshots"][0]["state"] == "recovering", "{status}");
    ensure!(attach(&rig, "base")? == socket, "it is attached");
    san.restore();
    ensure!(snapshot.end_read(chunk(15))? == Some(expected(chunk(15))));
    refused(&rig, "snap delete db base", "attached read-only")?;
    ensure_read(&mut snapshot, 1, &base, "the snapshot after a kill")?;
    for _ in 0..4 {
        rig.kill()?;
        rig.start()?;
        snapshot = Disk::connect(&mut rig, &socket)?;
        ensure_read(&mut snapshot, 11, &base, "the snapshot after kills")?;
    }
    rig.shut_down()?;
    rig.start()?;
    snapshot = Disk::connect(&mut rig, &socket)?;
    ensure_read(&mut snapshot, 11, &base, "the snapshot after a stop")?;

    // A read that waits does not keep the snapshot from being detached, nor from being deleted afterwards.
    san.cut();
    snapshot.begin_read(chunk(16))?;
    until(&rig, "waiting", waits)?;
    refused(&rig, "vdi detach db@base", "in use by a virtual machine")?;
    control(&rig, "vdi detach db@base --force")?;
    san.restore();
    until(&rig, "back", |status| status["store"]["reachable"] == true)?;
    control(&rig, &format!("snap delete db {lsn}"))?;
    rig.kill()?;
    rig.start()?;
    let status = control(&rig, "status")?;
    ensure!(status["snapshots"].as_array().is_some_and(Vec::is_empty), "{status}");
    rig.shut_down()?;
    rig.check_store()
}

#[test]
fn a_schedule_does_not_thin_what_is_attached() -> Result<()> {
    let mut rig = AgentRig::new(&StoreSpec::file(512 * MIB), 64 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    let base = fill(&mut disk, 0..CHUNKS, 1)?;
    rig.agent()?.control(&["vdi", "schedule", "db", "every 100ms keep 2"])?;
    let listed = |rig: &AgentRig| -> Result<Vec<u64>> {
        let list = control(rig, "snap list db --oldest-first")?;
        let list = list["snapshots"].as_array().context("a list")?;
        list.iter().map(|snapshot| snapshot["lsn"].as_u64().context("an LSN")).collect()
    };
    // It takes one of what is there already; from then on each write makes for another.
    let first = loop {
        if let Some(lsn) = listed(&rig)?.first() {
            break *lsn;
        }
    };
    let of_snapshot = attach(&rig, &first.to_string())?;
    let thinned = |status: &Value| status["vdis"][0]["totals"]["snapshots_thinned"].as_u64();
    let mut byte = 2;
    while thinned(&control(&rig, "status")?).context("a count")? < 5 {
        byte = byte % 100 + 2;
        disk.write(0, byte)?;
    }
    ensure!(listed(&rig)?.first() == Some(&first), "what is attached was thinned");
    let mut snapshot = Disk::connect(&mut rig, &of_snapshot)?;
    ensure_read(&mut snapshot, 1, &base, "the snapshot")?;
    drop(snapshot);
    detach_snapshot(&rig, &first.to_string())?;
    while listed(&rig)?.first() == Some(&first) {
        byte = byte % 100 + 2;
        disk.write(0, byte)?;
    }
    drop(disk);
    rig.shut_down()?;
    rig.check_store()
}

#[test]
fn a_damaged_block_fails_its_reads_and_no_others() -> Result<()> {
    let mut rig = AgentRig::new(&StoreSpec::file(128 * MIB), 64 * MIB)?;
    rig.start()?;
    let (disk, base, _) = written(&mut rig)?;
    rig.agent()?.drain()?;
    // Of the chunks full of twos the last block in the store.
    let path = rig.dir().join("store.img");
    let store = File::options().read(true).write(true).open(path)?;
    let (mut block, mut last) = ([0; 4096], None);
    for at in (0..store.metadata()?.len()).step_by(4096) {
        store.read_exact_at(&mut block, at)?;
        if block == [2; 4096] {
            last = Some(at);
        }
    }
    store.write_all_at(&[1], last.context("no block of the snapshot in the store")? + 99)?;
    let socket = attach(&rig, "base")?;
    let mut snapshot = Disk::connect(&mut rig, &socket)?;
    let mut failed = 0;
    for at in (0..CHUNKS).map(chunk) {
        match snapshot.read(at)? {
            None => failed += 1,
            found => ensure!(found == Some(base.get(&at).copied().unwrap_or_default()), "at {at}"),
        }
    }
    ensure!(failed == 1, "{failed} chunks failed");
    ensure!(control(&rig, "status")?["snapshots"][0]["failed"] == 1);
    drop((snapshot, disk));
    rig.shut_down()
}
