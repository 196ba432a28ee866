//! Goal: with a schedule of a snapshot behind every write the last of them are there, each exactly the disk as of that write, through kills
//! of the agent, an outage and a start in it; what people make theirs and what is cloned from stays.
//!
//! Method: a real agent on a real target behind a relay that falls silent. One write at a time, so the last N snapshots are the disk after
//! the last N writes: each is copied out by another process and compared byte by byte, and the store is checked.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::agent_rig::AgentRig;
use tests::single::{CHUNK, Content, Disk, San, control, ensure_same, in_the_store, until};

const MIB: u64 = 1 << 20;
const DISK: u64 = 8 * MIB;
const KEEP: usize = 6;
const PATIENCE: Duration = Duration::from_secs(120);

/// The disk after each write.
struct History(Vec<Content>);

impl History {
    /// Writes so many times; chunks are overwritten again and again.
    fn write(&mut self, disk: &mut Disk, count: usize) -> Result<()> {
        for _ in 0..count {
            let n = self.0.len();
            let (at, byte) = ((n * n % 11 * CHUNK) as u64, (n % 250 + 1) as u8);
            disk.write(at, byte)?;
            let mut now = self.0.last().cloned().unwrap_or_default();
            now.insert(at, byte);
            self.0.push(now);
        }
        Ok(())
    }

    /// These are the disk after the last writes.
    fn check(&self, rig: &AgentRig, lsns: &[u64]) -> Result<()> {
        let last = &self.0[self.0.len() - lsns.len()..];
        for (lsn, expected) in lsns.iter().zip(last) {
            let what = format!("db@{lsn}");
            ensure_same(&in_the_store(rig, &what)?, DISK, expected, &what)?;
        }
        Ok(())
    }
}

/// LSN, label and place of each snapshot, the oldest first.
fn listed(rig: &AgentRig) -> Result<Vec<(u64, String, String)>> {
    let list = control(rig, "snap list db")?;
    let row = |row: &Value| {
        let text = |field: &str| row[field].as_str().map(str::to_owned);
        Some((row["lsn"].as_u64()?, text("label")?, text("place")?))
    };
    let rows = list["snapshots"].as_array().context("a list")?;
    let mut rows = rows.iter().map(|r| row(r).context("a row")).collect::<Result<Vec<_>>>()?;
    rows.sort();
    Ok(rows)
}

fn behind(rows: &[(u64, String, String)], what: &str) -> Vec<u64> {
    let label = format!("auto {what} ");
    rows.iter().filter(|(_, found, _)| found.starts_with(&label)).map(|(lsn, ..)| *lsn).collect()
}

/// Brings all to the store and waits until nothing but what clones hold is to be deleted.
fn settle(rig: &AgentRig) -> Result<Vec<(u64, String, String)>> {
    rig.agent()?.drain()?;
    let end = Instant::now() + PATIENCE;
    let mut quiet = 0;
    loop {
        let status = control(rig, "vdi schedule db")?;
        let done = status["listed"] == true && status["surplus"] == status["held_by_clones"];
        quiet = if done { quiet + 1 } else { 0 };
        // What was made in this moment is learnt of within a second.
        if quiet > 25 {
            ensure!(status["trouble"].is_null(), "{status}");
            ensure!(status["cadence"]["in_log"] == 0, "{status}");
            return listed(rig);
        }
        ensure!(Instant::now() < end, "never thinned: {status:#}\n{}", rig.log_tail());
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn the_last_writes_are_snapshots_through_kills_and_an_outage() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    let mut history = History(Vec::new());
    history.write(&mut disk, 3)?;
    let set =
        rig.agent()?.control(&["vdi", "schedule", "db", "every 1h keep 24, every write keep 6"])?;
    ensure!(set["schedule"] == "every write keep 6, every 1h keep 24", "{set}");
    ensure!(set["cadence"]["behind"] == "write" && set["cadence"]["keep"] == KEEP, "{set}");
    for (rules, words) in [
        ("every write keep 0", "may keep 1 to"),
        ("every write keep 2, every batch keep 2", "give one of them"),
    ] {
        let said = rig.agent()?.control(&["vdi", "schedule", "db", rules]).unwrap_err().to_string();
        ensure!(said.contains(words), "{said}");
    }

    history.write(&mut disk, 40)?;
    let rows = settle(&rig)?;
    let first = behind(&rows, "write");
    ensure!(first.len() == KEEP, "{rows:?}");
    history.check(&rig, &first)?;
    // The other rule takes its own.
    ensure!(behind(&rows, "1h").len() <= 2, "{rows:?}");
    let mine = first[1];
    control(&rig, &format!("snap label db {mine} mine"))?;
    let cloned = first[2];
    control(&rig, &format!("vdi create clone --from db@{cloned}"))?;
    let of_clone = history.0[history.0.len() - KEEP + 2].clone();
    let of_mine = history.0[history.0.len() - KEEP + 1].clone();

    // Killed amid it, and in an outage, in which only the log has them.
    history.write(&mut disk, 20)?;
    rig.kill()?;
    rig.start()?;
    disk = Disk::connect(&mut rig, &socket)?;
    history.write(&mut disk, 9)?;
    san.cut();
    history.write(&mut disk, 3)?;
    until(&rig, "away", |status| status["store"]["reachable"] == false)?;
    history.write(&mut disk, 30)?;
    rig.kill()?;
    rig.start().context("start without the store")?;
    drop(Disk::connect(&mut rig, &socket)?);
    let rows = listed(&rig)?;
    let in_log = behind(&rows, "write");
    ensure!(in_log.len() == KEEP, "{rows:?}");
    ensure!(rows.iter().all(|(.., place)| place == "log"), "{rows:?}");
    let status = control(&rig, "vdi schedule db")?;
    ensure!(
        status["cadence"]["in_log"] == KEEP && status["cadence"]["cutting"] == "as-it-says",
        "{status}"
    );
    let newest = in_log[KEEP - 1];
    let said =
        control(&rig, &format!("vdi create was --from db@{newest}")).unwrap_err().to_string();
    ensure!(said.contains("is not in the store yet"), "{said}");
    san.restore();
    until(&rig, "back", |status| status["store"]["reachable"] == true)?;
    control(&rig, &format!("vdi create was --from db@{newest}"))?;
    let rows = settle(&rig)?;
    let kept: Vec<u64> = behind(&rows, "write").into_iter().filter(|lsn| *lsn != cloned).collect();
    ensure!(kept == in_log, "{rows:?}");
    history.check(&rig, &kept)?;
    ensure_same(
        &in_the_store(&rig, "was")?,
        DISK,
        &history.0[history.0.len() - 1],
        "a clone of it",
    )?;

    // What is somebody's stays, and with other rules the rest goes by those.
    disk = Disk::connect(&mut rig, &socket)?;
    let set = rig.agent()?.control(&["vdi", "schedule", "db", "every batch keep 3"])?;
    ensure!(set["cadence"]["behind"] == "batch", "{set}");
    history.write(&mut disk, 12)?;
    let rows = settle(&rig)?;
    let kept = behind(&rows, "batch");
    history.check(&rig, &kept)?;
    let held = behind(&rows, "write");
    ensure!(kept.len() == 3 && held == [cloned, newest], "{rows:?}");
    ensure!(rows.iter().any(|(lsn, label, _)| *lsn == mine && label == "mine"), "{rows:?}");
    ensure_same(&in_the_store(&rig, &format!("db@{mine}"))?, DISK, &of_mine, "mine")?;
    ensure_same(&in_the_store(&rig, "clone")?, DISK, &of_clone, "the clone")?;
    // One that ended leaves what there is, and takes no more.
    control(&rig, "vdi schedule db none")?;
    history.write(&mut disk, 5)?;
    rig.agent()?.drain()?;
    ensure!(behind(&listed(&rig)?, "batch") == kept);
    drop(disk);
    rig.shut_down()?;
    rig.check_store()
}
