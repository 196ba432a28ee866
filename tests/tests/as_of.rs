//! Goal: what a disk was at a time within an outage can still be had: after a kill of the agent, exactly, and as a clone; and
//! where the store has gone beyond it, that is said.
//!
//! Method: a real agent on a real target behind a relay that falls silent; clones are copied out by another process and compared
//! byte by byte, and the store is checked.

use std::thread::sleep;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use tests::single::{CHUNK, Content, Disk, San, control, ensure_same, in_the_store, until};

const MIB: u64 = 1 << 20;
const DISK: u64 = 8 * MIB;

#[test]
fn a_disk_as_it_was_within_an_outage_becomes_a_clone() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    let mut now = Content::new();
    let mut write = |disk: &mut Disk, byte: u8| -> Result<Content> {
        for n in [0, 3, u64::from(byte) % 7] {
            disk.write(n * CHUNK as u64, byte)?;
            now.insert(n * CHUNK as u64, byte);
        }
        Ok(now.clone())
    };
    write(&mut disk, 1)?;
    rig.agent()?.drain()?;
    let refused = |line: &str, words: &str| {
        let said = control(&rig, line).unwrap_err().to_string();
        ensure!(said.contains(words), "'{line}' says: {said}");
        Ok(())
    };
    refused("snap create db --as-of 1", "everything is in the store")?;
    refused("snap create db --as-of 2100-01-01T00:00:00Z", "still to come")?;
    refused("snap create db --as-of yesterday", "no point of a log")?;
    refused("vdi create was --from db@1 --as-of 1", "no such disk")?;
    san.cut();
    write(&mut disk, 2)?;
    until(&rig, "away", |status| status["store"]["reachable"] == false)?;
    // What follows is not sent: the commit of what came before waits.
    for byte in 3..6 {
        write(&mut disk, byte)?;
    }
    let good = write(&mut disk, 6)?;
    let then = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    sleep(Duration::from_millis(20));
    for byte in 7..20 {
        write(&mut disk, byte)?;
    }
    let taken = control(&rig, &format!("snap create db --label good --as-of {then}"))?;
    let lsn = taken["lsn"].as_u64().context("an LSN")?;
    let again = control(&rig, &format!("snap create db --label good --as-of {lsn}"))?;
    ensure!(again["lsn"] == lsn && again["time"] == taken["time"], "{again}");
    refused(&format!("snap create db --as-of {lsn}"), "is snapshot 'good' of it already")?;
    let bad = write(&mut disk, 20)?;
    rig.kill()?;
    rig.start().context("start without the store")?;
    // Once it is served, its log is known.
    let disk = Disk::connect(&mut rig, &socket)?;
    let listed = control(&rig, "snap list db")?;
    let row = &listed["snapshots"][0];
    ensure!(row["lsn"] == lsn && row["place"] == "log" && row["label"] == "good", "{listed}");
    san.restore();
    until(&rig, "back", |status| status["store"]["reachable"] == true)?;
    control(&rig, "vdi create was --from db@good")?;
    rig.agent()?.drain()?;
    ensure_same(&in_the_store(&rig, "was")?, DISK, &good, "the disk as it was")?;
    ensure_same(&in_the_store(&rig, "db")?, DISK, &bad, "the disk")?;
    ensure!(control(&rig, "snap list db")?["snapshots"].as_array().map(Vec::len) == Some(1));
    drop(disk);
    rig.shut_down()?;
    rig.check_store()
}
