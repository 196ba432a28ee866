//! Goal: a clone that is made while the store is away is its snapshot, for a guest at once, after a kill of the agent without the
//! store too, and in the store once that is back; each is there once, whatever name it gets, and whenever the agent is killed on the way.
//!
//! Method: a real agent on a real target behind a relay that falls silent; clones are read and written through their sockets, copied
//! out of the store by another process and compared byte by byte; the store is checked.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::agent_rig::AgentRig;
use tests::single::{CHUNK, Content, Disk, San, control, ensure_same, in_the_store, until};

const MIB: u64 = 1 << 20;
const DISK: u64 = 8 * MIB;
const CHUNKS: u64 = DISK / CHUNK as u64;

/// A disk beside what it should be.
struct Written {
    disk: Disk,
    now: Content,
}

impl Written {
    fn write(&mut self, chunk: u64, byte: u8) -> Result<()> {
        let at = chunk % CHUNKS * CHUNK as u64;
        self.disk.write(at, byte)?;
        self.now.insert(at, byte);
        Ok(())
    }

    fn ensure_reads(&mut self, chunks: impl Iterator<Item = u64>) -> Result<()> {
        for chunk in chunks {
            let at = chunk % CHUNKS * CHUNK as u64;
            let (found, wanted) = (self.disk.read(at)?, self.now.get(&at).copied());
            ensure!(found == Some(wanted.unwrap_or_default()), "{at}: {found:?}, not {wanted:?}");
        }
        Ok(())
    }
}

fn refused(rig: &AgentRig, line: &str, words: &str) -> Result<()> {
    let said = control(rig, line).err().with_context(|| format!("'{line}' succeeds"))?.to_string();
    ensure!(said.contains(words), "'{line}' says: {said}");
    Ok(())
}

fn socket_of(created: &Value) -> Result<PathBuf> {
    ensure!(created["provisional"] == true, "{created}");
    Ok(created["socket"].as_str().context("a socket")?.into())
}

fn provisional(status: &Value) -> usize {
    let vdis = status["vdis"].as_array().map_or(&[][..], Vec::as_slice);
    vdis.iter().filter(|vdi| !vdi["provisional_clone_of"].is_null()).count()
}

fn connect(rig: &mut AgentRig, socket: &Path, now: &Content) -> Result<Written> {
    Ok(Written { disk: Disk::connect(rig, socket)?, now: now.clone() })
}

#[test]
fn a_clone_made_in_an_outage_is_its_snapshot_and_gets_into_the_store_once() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(96 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create taken --size 4MiB")?;
    control(&rig, "vdi create db --size 8MiB")?;
    let db_socket = rig.agent()?.attach("db")?;
    let mut db = connect(&mut rig, &db_socket, &Content::new())?;
    for chunk in 0..20 {
        db.write(chunk, 1)?;
    }
    rig.agent()?.drain()?;
    let stored = control(&rig, "snap create db --label stored")?["lsn"].to_string();
    rig.agent()?.drain()?;
    san.cut();
    db.write(0, 2)?;
    until(&rig, "away", |status| status["store"]["reachable"] == false)?;
    for chunk in 10..40 {
        db.write(chunk, 3)?;
    }
    let lsn = control(&rig, "snap create db --label golden")?["lsn"].to_string();
    let golden = db.now.clone();
    for chunk in 30..45 {
        db.write(chunk, 4)?;
    }
    let (then, time) = (db.now.clone(), humantime::format_rfc3339_millis(SystemTime::now()));
    sleep(Duration::from_millis(20));
    for chunk in 40..60 {
        db.write(chunk, 4)?;
    }
    // First of all, as each of the others has the log sealed, and so sent once that is old.
    let was = control(&rig, &format!("vdi create was --from db --as-of {time}"))?;
    ensure!(was["provisional"] == true, "{was}");
    // What only the store has is not cloned without it, and what was made is known by its name.
    refused(&rig, &format!("vdi create no --from db@{stored}"), "")?;
    let web_socket = socket_of(&control(&rig, "vdi create web --from db@golden")?)?;
    refused(&rig, "vdi create web --from db@golden", "choose another name")?;
    control(&rig, &format!("vdi create idle --from db@{lsn}"))?;
    control(&rig, &format!("vdi create off --from db@{lsn}"))?;
    let taken_socket = socket_of(&control(&rig, "vdi create taken --from db@golden")?)?;
    for chunk in 50..70 {
        db.write(chunk, 5)?;
    }
    let status = control(&rig, "status")?;
    ensure!(provisional(&status) == 5, "{status:#}");
    ensure!(status.to_string().contains("is in this host's cache only"), "{status:#}");
    ensure!(control(&rig, "vdi info web")?["provisional_clone_of"] == format!("db@{lsn}").as_str());
    let mut web = connect(&mut rig, &web_socket, &golden)?;
    // The first ones were in the store before, and are in its parent's cache.
    web.ensure_reads(0..40)?;
    for chunk in [12, 45, 100] {
        web.write(chunk, 6)?;
    }
    web.disk.flush()?;
    // Neither goes away, nor becomes a parent, before the store knows it.
    refused(&rig, "vdi detach db --force", "is not in the store yet")?;
    refused(&rig, "vdi detach web --force", "is not in the store yet")?;
    refused(&rig, "vdi delete web", "in use by a virtual machine")?;
    control(&rig, "vdi delete off")?;
    let of_clone = control(&rig, "snap create web")?["lsn"].to_string();
    refused(&rig, &format!("vdi create no --from web@{of_clone}"), "itself a clone")?;
    web.write(13, 7)?;
    let (db_now, web_now) = (db.now.clone(), web.now.clone());
    drop((db, web));

    rig.kill()?;
    rig.start().context("start without the store")?;
    let mut web = connect(&mut rig, &web_socket, &web_now)?;
    // Its parent is up before anybody uses it, and has what it had.
    web.ensure_reads((0..40).chain([45, 100]))?;
    web.write(101, 8)?;
    web.disk.flush()?;
    // It waits for what only the store can know.
    web.disk.begin_read(110 * CHUNK as u64)?;
    sleep(Duration::from_millis(300));
    ensure!(web.disk.is_waiting()?, "nobody can know");
    let status = control(&rig, "status")?;
    ensure!(provisional(&status) == 4, "{status:#}");
    let web_now = web.now.clone();
    drop(web);
    san.restore();
    // Killed on the way, again and again.
    for pause in [0, 150, 300, 600, 900] {
        rig.kill()?;
        rig.start().context("start, and the store is back")?;
        sleep(Duration::from_millis(pause));
    }
    let mut web = connect(&mut rig, &web_socket, &web_now)?;
    web.ensure_reads(0..CHUNKS)?;
    until(&rig, "registered", |status| provisional(status) == 0)?;
    web.write(102, 9)?;
    rig.agent()?.drain()?;
    let list = control(&rig, "vdi list")?;
    let mut names: Vec<_> =
        list.as_array().context("a list")?.iter().map(|vdi| vdi["name"].as_str()).collect();
    names.sort_unstable();
    let expected = ["db", "idle", "taken", "taken-2", "was", "web"].map(Some);
    ensure!(names == expected, "{names:?}");
    for (name, content) in [
        ("db", &db_now),
        ("web", &web.now),
        ("idle", &golden),
        ("taken-2", &golden),
        ("was", &then),
        ("db@golden", &golden),
    ] {
        ensure_same(&in_the_store(&rig, name)?, DISK, content, name)?;
    }
    refused(&rig, "snap delete db golden", "was cloned from its snapshot")?;
    let tree = control(&rig, "vdi tree")?.to_string();
    ensure!(tree.contains("taken-2"), "{tree}");
    // Its guest finds it where it was, whatever it is called; nobody else is found there.
    drop(web);
    rig.kill()?;
    rig.start()?;
    let mut taken = connect(&mut rig, &taken_socket, &golden)?;
    taken.ensure_reads(0..CHUNKS)?;
    refused(&rig, "vdi attach taken", "disk 'taken-2' has that socket")?;
    drop(taken);
    control(&rig, "vdi detach taken-2")?;
    let attached = rig.agent()?.attach("taken")?;
    ensure!(attached == taken_socket, "{attached:?}");
    // They are disks like any other now.
    control(&rig, "vdi detach idle")?;
    control(&rig, "vdi delete idle")?;
    rig.shut_down()?;
    rig.check_store()
}

#[test]
fn a_clone_that_could_not_be_served_joins_the_store_once_it_can() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(64 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 8MiB")?;
    let db_socket = rig.agent()?.attach("db")?;
    let mut db = connect(&mut rig, &db_socket, &Content::new())?;
    db.write(0, 1)?;
    rig.agent()?.drain()?;
    san.cut();
    db.write(1, 2)?;
    until(&rig, "away", |status| status["store"]["reachable"] == false)?;
    control(&rig, "snap create db --label golden")?;
    let golden = db.now.clone();
    let in_the_way = db_socket.with_file_name("web.sock");
    std::fs::create_dir(&in_the_way)?;
    refused(&rig, "vdi create web --from db@golden", "was made, and is not served")?;
    san.restore();
    until(&rig, "registered", |_| {
        let list = control(&rig, "vdi list").unwrap_or_default();
        list.as_array().is_some_and(|vdis| {
            vdis.iter().any(|vdi| vdi["name"] == "web" && vdi["provisional_clone_of"].is_null())
        })
    })?;
    // It is tried once more then, in vain.
    sleep(Duration::from_secs(1));
    std::fs::remove_dir(&in_the_way)?;
    let socket = rig.agent()?.attach("web")?;
    let mut web = connect(&mut rig, &socket, &golden)?;
    web.write(2, 3)?;
    web.disk.flush()?;
    until(&rig, "committed", |status| {
        let vdis = status["vdis"].as_array().map_or(&[][..], Vec::as_slice);
        vdis.iter().all(|vdi| vdi["dirty_bytes"] == 0)
    })?;
    rig.agent()?.drain()?;
    ensure_same(&in_the_store(&rig, "web")?, DISK, &web.now, "web")?;
    control(&rig, "vdi detach db --force")?;
    rig.shut_down()?;
    rig.check_store()
}
