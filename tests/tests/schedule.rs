//! Goal: a schedule takes snapshots and thins them, through a kill of the agent, an outage and a start in it; and it deletes
//! nothing that is not its own, or that a clone hangs on.
//!
//! Method: a real agent on a real target behind a relay that falls silent, and a short interval. Nothing is timed: what is to
//! happen is waited for, while the disk is written; when nothing is written, nothing changes any more, and can be counted.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::single::{CHUNK, Disk, San, control};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(120);
const OFTEN: &str = "every 200ms keep 3, every 1h keep 24";

fn schedule(rig: &AgentRig, rules: &str) -> Result<Value> {
    rig.agent()?.control(&["vdi", "schedule", "db", rules])
}

fn number(status: &Value, field: &str) -> Result<u64> {
    status[field].as_u64().with_context(|| format!("no {field} in {status}"))
}

/// Labels by LSN.
fn listed(rig: &AgentRig) -> Result<BTreeMap<u64, String>> {
    let list = control(rig, "snap list db")?;
    let row = |row: &Value| Some((row["lsn"].as_u64()?, row["label"].as_str()?.to_owned()));
    let rows = list["snapshots"].as_array().context("a list")?;
    rows.iter().map(|snapshot| row(snapshot).context("a row")).collect()
}

fn automatic(list: &BTreeMap<u64, String>) -> Vec<u64> {
    list.iter().filter(|(_, label)| label.starts_with("auto ")).map(|(lsn, _)| *lsn).collect()
}

/// Writes to the disk, if one is given, until the schedule's status is as wanted.
fn until(
    rig: &AgentRig,
    mut disk: Option<&mut Disk>,
    what: &str,
    wanted: impl Fn(&Value) -> bool,
) -> Result<Value> {
    let end = Instant::now() + PATIENCE;
    for n in 0u64.. {
        if let Some(disk) = &mut disk {
            disk.write(n % 100 * CHUNK as u64, (n % 250) as u8)?;
        }
        let status = control(rig, "vdi schedule db")?;
        if wanted(&status) {
            return Ok(status);
        }
        ensure!(Instant::now() < end, "never {what}: {status:#}\n{}", rig.log_tail());
        std::thread::sleep(Duration::from_millis(20));
    }
    unreachable!("there is always another number")
}

/// Writes until so many more were taken.
fn take(rig: &AgentRig, disk: &mut Disk, more: u64) -> Result<Value> {
    let before = number(&control(rig, "vdi schedule db")?, "taken")?;
    let what = format!("{more} more than {before} taken");
    until(rig, Some(disk), &what, |status| status["taken"].as_u64() >= Some(before + more))
}

/// Waits until nothing is to be deleted but what clones hold, and nothing more is taken.
fn settle(rig: &AgentRig) -> Result<BTreeMap<u64, String>> {
    let is_quiet =
        |status: &Value| status["listed"] == true && status["surplus"] == status["held_by_clones"];
    loop {
        let before = until(rig, None, "thinned", is_quiet)?;
        std::thread::sleep(Duration::from_millis(1500));
        let after = until(rig, None, "thinned", is_quiet)?;
        if before["taken"] == after["taken"] {
            return listed(rig);
        }
    }
}

fn connect(rig: &mut AgentRig, socket: &Path) -> Result<Disk> {
    Disk::connect(rig, socket)
}

#[test]
fn it_goes_on_through_a_kill_and_an_outage_and_deletes_only_its_own() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = connect(&mut rig, &socket)?;
    disk.write(0, 1)?;
    let mine = number(&control(&rig, "snap create db --label mine")?, "lsn")?;
    let set = schedule(&rig, "every 1h keep 24,every 200ms keep 3")?;
    ensure!(set["schedule"] == OFTEN && set["rules"].as_array().map(Vec::len) == Some(2), "{set}");
    ensure!(control(&rig, "vdi info db")?["schedule"] == OFTEN);
    ensure!(control(&rig, "vdi list")?[0]["schedule"] == OFTEN);

    // It takes and thins.
    take(&rig, &mut disk, 8)?;
    let list = settle(&rig)?;
    let first = automatic(&list);
    // Three, the first of the hour, and that of another hour if one has begun meanwhile.
    ensure!((4..=5).contains(&first.len()), "{list:?}");
    ensure!(list[&first[0]].starts_with("auto 1h 20"), "{list:?}");
    ensure!(list.contains_key(&mine), "{list:?}");

    // What people make theirs stays, and what a clone hangs on.
    let theirs = first[first.len() - 3];
    control(&rig, &format!("snap label db {theirs} kept"))?;
    let cloned = first[first.len() - 2];
    control(&rig, &format!("vdi create clone --from db@{cloned}"))?;
    let gone = first[first.len() - 1];
    take(&rig, &mut disk, 8)?;
    let list = settle(&rig)?;
    ensure!(list[&mine] == "mine" && list[&theirs] == "kept", "{list:?}");
    ensure!(list.contains_key(&cloned) && !list.contains_key(&gone), "{list:?}");
    ensure!(control(&rig, "vdi schedule db")?["held_by_clones"] == 1);

    // A kill ends nothing, and neither does an outage, nor a kill and a start in it.
    rig.kill()?;
    rig.start()?;
    disk = connect(&mut rig, &socket)?;
    take(&rig, &mut disk, 4)?;
    san.cut();
    take(&rig, &mut disk, 6)?;
    rig.kill()?;
    rig.start().context("start without the store")?;
    disk = connect(&mut rig, &socket)?;
    let status = take(&rig, &mut disk, 4)?;
    ensure!(status["schedule"] == OFTEN && status["listed"] == false, "{status}");
    ensure!(status["surplus"].is_null() && status["trouble"].is_null(), "{status}");
    let pending = automatic(&listed(&rig)?);
    ensure!(pending.len() >= 10, "all are in the log: {pending:?}");
    schedule(&rig, "every 150ms keep 2")?;
    take(&rig, &mut disk, 2)?;
    san.restore();
    let list = settle(&rig)?;
    let left: Vec<u64> = automatic(&list).into_iter().filter(|lsn| *lsn != cloned).collect();
    ensure!(left.len() == 2 && left > pending, "{list:?}");
    ensure!(list[&mine] == "mine" && list[&theirs] == "kept", "{list:?}");
    ensure!(list.contains_key(&cloned), "{list:?}");

    // Without its clone it goes.
    control(&rig, "vdi delete clone")?;
    ensure!(automatic(&settle(&rig)?) == left);
    // An ended schedule takes and deletes nothing.
    ensure!(control(&rig, "vdi schedule db none")?["schedule"].is_null());
    for n in 0..50 {
        disk.write(n * CHUNK as u64, 7)?;
        std::thread::sleep(Duration::from_millis(20));
    }
    ensure!(automatic(&listed(&rig)?) == left);
    drop(disk);
    rig.shut_down()?;
    rig.check_store()
}

#[test]
fn it_is_the_disks_wherever_that_is_and_what_cannot_be_is_said() -> Result<()> {
    let mut rig = AgentRig::new(&StoreSpec::file(512 * MIB), 64 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let set = schedule(&rig, OFTEN)?;
    ensure!(set["schedule"] == OFTEN && set["attached"] == false, "{set}");
    ensure!(control(&rig, "vdi info db")?["schedule"] == OFTEN);
    for (rules, words) in [
        ("hourly", "'every 10s keep 6, every 1h keep 24'"),
        ("every 1ms keep 6", "an interval may be 100ms"),
        ("every 1h keep 0", "may keep 1 to"),
    ] {
        let said = schedule(&rig, rules).unwrap_err().to_string();
        ensure!(said.contains(words), "'{rules}': {said}");
    }
    let said = control(&rig, "vdi schedule nix").unwrap_err().to_string();
    ensure!(said.contains("no such disk"), "{said}");

    let socket = rig.agent()?.attach("db")?;
    let mut disk = connect(&mut rig, &socket)?;
    take(&rig, &mut disk, 4)?;
    let label = "auto 1h 2026-11-22T08:00:00.000Z";
    let agent = rig.agent()?;
    let said = agent.control(&["snap", "create", "db", "--label", label]).unwrap_err().to_string();
    ensure!(said.contains("those that schedules give"), "{said}");
    let lsn = automatic(&settle(&rig)?)[0].to_string();
    let said = agent.control(&["snap", "label", "db", &lsn, label]).unwrap_err().to_string();
    ensure!(said.contains("those that schedules give"), "{said}");
    // People may delete them, and they no longer count.
    control(&rig, &format!("snap delete db {lsn}"))?;
    let status = control(&rig, "vdi schedule db")?;
    ensure!(
        status["rules"][0]["kept"].as_u64() <= Some(3) && status["trouble"].is_null(),
        "{status}"
    );

    // Changed here, it is known in the store; and from there it comes back.
    schedule(&rig, "every 300ms keep 2")?;
    drop(disk);
    tests::single::until(&rig, "gone", |status| status["vdis"][0]["front_end_connected"] == false)?;
    control(&rig, "vdi detach db")?;
    let status = control(&rig, "vdi schedule db")?;
    ensure!(status["schedule"] == "every 300ms keep 2" && status["attached"] == false, "{status}");
    control(&rig, "vdi set db --when-offline fail-after=30s")?;
    let socket = rig.agent()?.attach("db")?;
    let mut disk = connect(&mut rig, &socket)?;
    take(&rig, &mut disk, 4)?;
    ensure!(automatic(&settle(&rig)?).len() == 2);
    ensure!(control(&rig, "vdi info db")?["when_offline"] == "fail-after=30s");
    ensure!(control(&rig, "vdi schedule db --clear")?["schedule"].is_null());
    drop(disk);
    rig.shut_down()?;
    rig.check_store()
}
