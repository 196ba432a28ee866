//! Goal: when the cache's last leg fails under a running agent, a disk whose acknowledged writes all reach the store goes on
//! in write-through: no error, nothing lost; one that lost any stops. A cache that comes back afterwards is never taken for
//! the disk (rule L6).
//!
//! Method: the cache lies on a tmpfs of its own (in a mount namespace that ends with the test's thread), is cut to nothing
//! while in use, and finds no room any more; a verifying client judges every read, the whole disk, and the store's image.
//!
//! To repeat a failure: BALLAST_WRITE_THROUGH_SEED=<seed printed> cargo test -p tests --test write_through NAME

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::client::on_agent::{Client, DiskSpec, FrontEnd, seed_from};
use tests::client::{End, Loss, Mix};

const MIB: u64 = 1 << 20;
const STORE_BYTES: u64 = 1024 * MIB;
const CACHE_BYTES: u64 = 64 * MIB;
const DISK_BYTES: u64 = 24 * MIB;
const SEED_VARIABLE: &str = "BALLAST_WRITE_THROUGH_SEED";

/// Runs a test with a tmpfs, in a thread of its own, because it never leaves its mount namespace.
fn with_tmpfs(name: &'static str, test: fn(u64, &Path) -> Result<()>) {
    let seed = seed_from(SEED_VARIABLE);
    let run = move || {
        if let Err(error) = mounted(seed, test) {
            panic!(
                "{error:#}\n\nto repeat: {SEED_VARIABLE}={seed} cargo test -p tests --test write_through {name}"
            );
        }
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

fn mounted(seed: u64, test: fn(u64, &Path) -> Result<()>) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mount = dir.path().display().to_string();
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .context("a mount namespace (root?)")?;
    run("mount", &["--make-rprivate", "/"])?;
    run("mount", &["-t", "tmpfs", "-o", "size=96m", "none", &mount])?;
    let outcome = test(seed, dir.path());
    run("umount", &["-l", &mount])?;
    outcome
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = std::process::Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {} failed: {}", arguments.join(" "), said.trim());
    Ok(())
}

/// An agent whose cache lies on the tmpfs, with a disk that has some writes.
fn started(seed: u64, mount: &Path, arguments: &[&str]) -> Result<(AgentRig, Client)> {
    let mut rig = AgentRig::new(&StoreSpec::file(STORE_BYTES), CACHE_BYTES)?;
    rig.config().cache = mount.join("cache.img");
    rig.config().arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
    rig.start()?;
    let spec = DiskSpec {
        disk: 1,
        bytes: DISK_BYTES,
        seed,
        mix: Mix::default(),
        front_end: FrontEnd::Own,
        switch_write_cache: true,
    };
    let mut client = Client::create(&mut rig, &spec)?;
    burst(&mut client, 500)?;
    Ok((rig, client))
}

fn burst(client: &mut Client, mutations: u64) -> Result<()> {
    let goal = client.runner.counts().mutations + mutations;
    let end = client.runner.run(|counts| counts.mutations >= goal)?;
    ensure!(end == End::Stopped, "the agent went away under load");
    Ok(())
}

/// The cache's blocks are gone, and no others are to be had.
fn lose_the_cache(mount: &Path) -> Result<()> {
    File::options().write(true).open(mount.join("cache.img"))?.set_len(0)?;
    let filled = std::io::copy(&mut std::io::repeat(1), &mut File::create(mount.join("filler"))?);
    ensure!(filled.is_err(), "the file system has an end");
    Ok(())
}

fn info(rig: &AgentRig) -> Result<Value> {
    rig.agent()?.control(&["vdi", "info", "disk-1"])
}

fn goes_on(seed: u64, mount: &Path) -> Result<()> {
    let (mut rig, mut client) = started(seed, mount, &[])?;
    let old = rig.dir().join("old.img");
    for round in 0..2 {
        if round == 0 {
            // In the one round all is in the store; in the other the rest is in memory.
            rig.agent()?.drain()?;
            std::fs::copy(mount.join("cache.img"), &old)?;
        }
        burst(&mut client, 50)?;
        lose_the_cache(mount)?;
        burst(&mut client, 500).context("with the cache failing")?;
        client.runner.verify().with_context(|| rig.log_tail())?;
        client.runner.flush()?;
        let now = info(&rig)?;
        ensure!(now["write_through"] == true && now["state"] == "running", "{now:#}");
        ensure!(now["dirty_bytes"] == 0, "all that was acknowledged is in the store: {now:#}");
        let words = rig.agent()?.control(&["status"])?["degraded"].to_string();
        ensure!(
            words.contains("write-through") && words.contains("disk-1"),
            "status says: {words}"
        );
        let acknowledged = client.runner.oracle().acknowledged();
        client.runner.oracle().set_committed(acknowledged);
        client.check_store_image(&rig).context("what was acknowledged is in the store")?;
        // The agent dies, and the cache is there again as it was at some time before: it is behind the store.
        rig.kill()?;
        std::fs::remove_file(mount.join("filler"))?;
        std::fs::copy(&old, mount.join("cache.img"))?;
        rig.start()?;
        client.reconnect(&mut rig)?;
        let recovered = client.runner.recover(Loss::AgentDied);
        recovered.with_context(|| format!("agent's log:\n{}", rig.log_tail()))?;
        ensure!(info(&rig)?["write_through"] == false, "the cache is in use again");
        burst(&mut client, 300)?;
        client.runner.verify()?;
    }
    rig.agent()?.drain()?;
    client.runner.quiesce()?;
    drop(client);
    rig.shut_down()?;
    rig.check_store()
}

#[test]
fn a_disk_that_lost_nothing_goes_on_without_the_cache() {
    with_tmpfs("a_disk_that_lost_nothing_goes_on_without_the_cache", goes_on);
}

/// Waits until the agent has noted how far the disk is, as it does once a second.
fn wait_for_note(rig: &AgentRig) -> Result<()> {
    let last = info(rig)?["last_lsn"].as_u64().context("no last LSN")?;
    let path = rig.dir().join("run/progress.json");
    let noted = || {
        let notes: Value = serde_json::from_slice(&std::fs::read(&path).ok()?).ok()?;
        notes.as_object()?.values().next()?["last_lsn"].as_u64()
    };
    for _ in 0..1000 {
        if noted().is_some_and(|noted| noted >= last) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(30));
    }
    bail!("{} does not say that the disk is at LSN {last}", path.display())
}

fn stops(seed: u64, mount: &Path) -> Result<()> {
    // Nothing is committed by itself, and nearly nothing kept in memory.
    let arguments = ["--flush-max-age", "1h", "--segment-memory", "2MiB"];
    let (mut rig, mut client) = started(seed, mount, &arguments)?;
    rig.agent()?.drain()?;
    let wanted = client.runner.counts().sectors_written + 8 * MIB / 512;
    let end = client.runner.run(|counts| counts.sectors_written >= wanted)?;
    ensure!(end == End::Stopped, "the agent went away under load");
    client.runner.flush()?;
    wait_for_note(&rig)?;
    lose_the_cache(mount)?;
    let failed = burst(&mut client, 500).expect_err("acknowledged writes are lost");
    ensure!(!format!("{failed:#}").contains("hang"), "{failed:#}");
    let now = info(&rig)?;
    let why = now["last_error"].as_str().unwrap_or_default();
    ensure!(now["state"] == "failed" && now["write_through"] == false, "{now:#}");
    for word in ["no leg", "cannot be brought to the store", "rollback disk-1 --accept-loss"] {
        ensure!(why.contains(word), "no '{word}' in: {why}");
    }
    // The store has a prefix of what was written, and the operator's word opens it.
    client.check_store_image(&rig)?;
    let image = std::fs::read(rig.export(&client.name)?)?;
    rig.kill()?;
    std::fs::remove_file(mount.join("filler"))?;
    std::fs::remove_file(mount.join("cache.img"))?;
    rig.start()?;
    let receipt = rig.agent()?.control(&["vdi", "rollback", "disk-1", "--accept-loss"])?;
    ensure!(receipt["lost"]["to_lsn"].as_u64() > receipt["committed_lsn"].as_u64(), "{receipt:#}");
    rig.agent()?.attach("disk-1")?;
    client.reconnect(&mut rig)?;
    ensure!(client.runner.read_image()? == image, "the disk is not the committed image");
    drop(client);
    rig.shut_down()?;
    rig.check_store()
}

#[test]
fn a_disk_that_lost_acknowledged_writes_stops_and_is_rolled_back() {
    with_tmpfs("a_disk_that_lost_acknowledged_writes_stops_and_is_rolled_back", stops);
}
