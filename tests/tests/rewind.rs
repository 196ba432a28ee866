//! Goal: a disk that was rolled back to a snapshot is that snapshot, for its next virtual machine as in the store, whatever
//! is still in a cache; what it was before is kept, and can be gone back to.
//!
//! Method: a real agent on a file; the cache as it was before the rollback is put back, as after a crash between the
//! detach in the store and the detach in the cache.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::single::{CHUNK, Content, Disk, control, detach, ensure_same, in_the_store};

const MIB: u64 = 1 << 20;
const DISK: u64 = 8 * MIB;

fn fill(disk: &mut Disk, chunks: impl Iterator<Item = u64>, byte: u8) -> Result<Content> {
    let mut content = Content::new();
    for at in chunks.map(|chunk| chunk * CHUNK as u64) {
        disk.write(at, byte)?;
        content.insert(at, byte);
    }
    Ok(content)
}

/// What the guest reads.
fn ensure_read(disk: &mut Disk, expected: &Content, what: &str) -> Result<()> {
    for at in (0..DISK).step_by(CHUNK) {
        let byte = expected.get(&at).copied().unwrap_or_default();
        let found = disk.read(at)?;
        ensure!(found == Some(byte), "{what} at {at}: {found:?}, not {byte}");
    }
    Ok(())
}

fn lsn(answer: &Value, field: &str) -> Result<u64> {
    answer[field].as_u64().with_context(|| format!("{field} in {answer}"))
}

#[test]
fn a_disk_goes_back_and_no_cache_brings_back_what_it_was() -> Result<()> {
    let mut rig = AgentRig::new(&StoreSpec::file(512 * MIB), 64 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    let base = fill(&mut disk, 0..100, 1)?;
    let taken = lsn(&control(&rig, "snap create db --label base")?, "lsn")?;
    let mut wrong = base.clone();
    wrong.extend(fill(&mut disk, 50..128, 2)?);
    rig.agent()?.drain()?;
    // All of it is in the cache, as clean.
    let refused = control(&rig, "vdi rollback db --to base").unwrap_err().to_string();
    ensure!(
        refused.contains("is attached to this host: 'ballast vdi detach db' first"),
        "{refused}"
    );
    ensure_read(&mut disk, &wrong, "what was refused changes nothing:")?;
    drop(disk);
    rig.kill()?;
    let (cache, before) = (rig.config().cache.clone(), rig.dir().join("cache.before"));
    std::fs::copy(&cache, &before)?;
    rig.start()?;
    control(&rig, "vdi detach db")?;

    let refused = |line: &str, words: &str| {
        let said = control(&rig, line).unwrap_err().to_string();
        ensure!(said.contains(words), "'{line}' says: {said}");
        Ok(())
    };
    refused("vdi rollback db --to nix", "no snapshot with that LSN or label")?;
    refused("vdi rollback nix --to base", "no such disk")?;
    refused("vdi rollback db", "no log to be given up")?;
    refused("vdi rollback db --to base --label 77", "is a number")?;
    let done = control(&rig, "vdi rollback db --to base")?;
    ensure!(lsn(&done, "to")? == taken && done["size"] == DISK, "{done}");
    let kept = lsn(&done, "kept")?;
    ensure!(lsn(&done, "committed_lsn")? > kept && kept > taken, "{done}");
    let label = format!("before rollback to {taken}");
    ensure!(control(&rig, "snap list db")?["snapshots"][0]["label"] == label.as_str());
    ensure_same(&in_the_store(&rig, "db")?, DISK, &base, "the disk")?;
    ensure_same(&in_the_store(&rig, &format!("db@{kept}"))?, DISK, &wrong, "what it was")?;

    // The same host, the same cache: what it holds of the disk that was is not read.
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    ensure_read(&mut disk, &base, "attached again")?;
    let mut now = base.clone();
    now.extend(fill(&mut disk, 90..110, 3)?);
    rig.agent()?.drain()?;
    drop(disk);
    detach(&rig)?;
    control(&rig, "vdi rollback db --to base --discard-present")?;
    ensure_same(&in_the_store(&rig, "db")?, DISK, &base, "the disk, again")?;
    ensure!(control(&rig, "snap list db")?["snapshots"].as_array().is_some_and(|l| l.len() == 2));
    rig.shut_down()?;

    // The cache of before: the agent brings the disk back with its log, and is refused.
    let after = rig.dir().join("cache.after");
    std::fs::rename(&cache, &after)?;
    std::fs::rename(&before, &cache)?;
    rig.start()?;
    let served = control(&rig, "vdi attach db");
    if served.is_ok() {
        let mut disk = Disk::connect(&mut rig, &socket)?;
        ensure_read(&mut disk, &base, "with the cache of before")?;
    }
    let refused = served.map(drop).unwrap_err().to_string();
    ensure!(refused.contains("rolled back since"), "{refused}");
    let refused = control(&rig, "vdi rollback db --to base").unwrap_err().to_string();
    ensure!(refused.contains("is attached to this host"), "{refused}");
    // The way out that the message names.
    control(&rig, "vdi rollback db --accept-loss")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    ensure_read(&mut disk, &base, "after the old log went into quarantine")?;
    drop(disk);
    detach(&rig)?;
    // There and back again.
    control(&rig, &format!("vdi rollback db --to {kept} --label base-again"))?;
    ensure_same(&in_the_store(&rig, "db")?, DISK, &wrong, "the rollback undone")?;
    ensure_same(&in_the_store(&rig, "db@base-again")?, DISK, &base, "what that was")?;
    rig.shut_down()?;
    rig.check_store()
}
