//! Goal: whatever happens to one leg of a mirrored cache, a client sees no error and loses nothing, status says what
//! happened, and a leg that was left behind is never used again.
//!
//! Method: the agent with two files as legs, under a verifying client; one leg is overwritten with junk while in use, or
//! its file system gives no more room (the second leg lies on a tmpfs of its own, in a mount namespace that ends with the
//! test's thread); kills in between. Everything is read back through the legs that are left.
//!
//! To repeat a failure: BALLAST_MIRROR_SEED=<seed printed> cargo test -p tests --test mirror NAME

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::client::on_agent::{Client, DiskSpec, FrontEnd, seed_from};
use tests::client::{End, Loss, Mix};

const MIB: u64 = 1 << 20;
const STORE_BYTES: u64 = 1024 * MIB;
const CACHE_BYTES: u64 = 64 * MIB;
const DISK_BYTES: u64 = 24 * MIB;
/// Where a leg's segments start: its superblock and slots lie before.
const SEGMENTS: u64 = MIB;
const SEED_VARIABLE: &str = "BALLAST_MIRROR_SEED";

/// Runs a test in a thread of its own, because it never leaves its mount namespace.
fn with_seed(name: &'static str, test: fn(u64) -> Result<()>) {
    let seed = seed_from(SEED_VARIABLE);
    let run = move || {
        if let Err(error) = test(seed) {
            panic!(
                "{error:#}\n\nto repeat: {SEED_VARIABLE}={seed} cargo test -p tests --test mirror {name}"
            );
        }
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

/// An agent whose cache is mirrored on `cache.img` and `second`, with a disk that has some writes.
fn mirrored(seed: u64, second: &Path) -> Result<(AgentRig, Client)> {
    let mut rig = AgentRig::new(&StoreSpec::file(STORE_BYTES), CACHE_BYTES)?;
    rig.config().arguments = vec!["--cache".to_owned(), second.display().to_string()];
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

fn kill_and_compare(rig: &mut AgentRig, client: &mut Client) -> Result<()> {
    rig.kill()?;
    rig.start()?;
    client.reconnect(rig)?;
    let recovered = client.runner.recover(Loss::AgentDied);
    recovered.with_context(|| format!("agent's log:\n{}", rig.log_tail()))?;
    Ok(())
}

/// Legs in step, and all, as `cache status` says.
fn legs(rig: &AgentRig) -> Result<(usize, usize)> {
    let status = rig.agent()?.control(&["cache", "status"])?;
    let legs = status["legs"].as_array().context("legs in the status")?;
    let in_step = legs.iter().filter(|leg| leg["member"] == true).count();
    Ok((in_step, legs.len()))
}

fn finish(mut rig: AgentRig, mut client: Client) -> Result<()> {
    burst(&mut client, 300)?;
    client.runner.verify()?;
    rig.agent()?.drain()?;
    client.runner.quiesce()?;
    drop(client);
    rig.shut_down()?;
    rig.check_store()
}

/// Overwrites all segments of a leg with junk.
fn scribble(leg: &Path) -> Result<()> {
    let file = File::options().write(true).open(leg)?;
    let junk = vec![0x5a; MIB as usize];
    for offset in (SEGMENTS..CACHE_BYTES).step_by(MIB as usize) {
        file.write_all_at(&junk, offset)?;
    }
    file.sync_all()?;
    Ok(())
}

fn either_leg_rots(seed: u64) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let second = dir.path().join("second.img");
    let (mut rig, mut client) = mirrored(seed, &second)?;
    let first = rig.dir().join("cache.img");
    ensure!(legs(&rig)? == (2, 2), "both legs are in step");
    for leg in [&first, &second] {
        burst(&mut client, 300)?;
        client.runner.verify()?;
        scribble(leg)?;
        // Reads meet the junk, are answered from the other leg, and mend it.
        client.runner.verify().with_context(|| format!("{} rotten", leg.display()))?;
        // What rots under the agent must not be what it recovers from.
        scribble(leg)?;
        kill_and_compare(&mut rig, &mut client)?;
        ensure!(legs(&rig)? == (2, 2), "rot does not put a leg out");
        client.runner.verify()?;
        // All of the log goes to the store, so that the other leg's turn starts with whole copies on both.
        rig.agent()?.drain()?;
        let committed = client.runner.oracle().submitted();
        client.runner.oracle().set_committed(committed);
        let wanted = client.runner.counts().sectors_written + 2 * CACHE_BYTES / 512;
        let end = client.runner.run(|counts| counts.sectors_written >= wanted)?;
        ensure!(end == End::Stopped, "the agent went away under load");
    }
    finish(rig, client)
}

#[test]
fn a_leg_that_rots_is_read_around_and_mended() {
    with_seed("a_leg_that_rots_is_read_around_and_mended", either_leg_rots);
}

fn one_leg_fails(seed: u64) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mount = dir.path().display().to_string();
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .context("a mount namespace (root?)")?;
    run("mount", &["--make-rprivate", "/"])?;
    run("mount", &["-t", "tmpfs", "-o", "size=96m", "none", &mount])?;
    let outcome = on_tmpfs(seed, dir.path());
    run("umount", &["-l", &mount])?;
    outcome
}

fn on_tmpfs(seed: u64, mount: &Path) -> Result<()> {
    let second = mount.join("second.img");
    let (mut rig, mut client) = mirrored(seed, &second)?;
    let (old, kept) = (rig.dir().join("old.img"), rig.dir().join("new.img"));
    std::fs::copy(&second, &old)?;
    // Its blocks are gone, and no others are to be had.
    File::options().write(true).open(&second)?.set_len(0)?;
    let filler = mount.join("filler");
    let full = std::io::copy(&mut std::io::repeat(1), &mut File::create(&filler)?);
    ensure!(full.is_err(), "the file system has an end");
    burst(&mut client, 500).context("with one leg failing")?;
    client.runner.verify()?;
    ensure!(legs(&rig)? == (1, 2), "the leg is out");
    let status = rig.agent()?.control(&["status"])?;
    let words = status["degraded"].to_string();
    ensure!(words.contains("not mirrored") && words.contains("second.img"), "status says: {words}");
    // The other leg knows that it is alone: no word of the operator is needed.
    kill_and_compare(&mut rig, &mut client)?;
    burst(&mut client, 300)?;
    // The leg comes back as it was when it was left behind: it is not believed.
    rig.kill()?;
    std::fs::remove_file(&filler)?;
    std::fs::copy(&old, &second)?;
    rig.start()?;
    client.reconnect(&mut rig)?;
    client.runner.recover(Loss::AgentDied)?;
    ensure!(legs(&rig)? == (1, 2), "a leg left behind is no member");
    burst(&mut client, 300)?;
    // It alone, without the one that went on, is refused: it lacks what was acknowledged since.
    rig.kill()?;
    std::fs::rename(rig.dir().join("cache.img"), &kept)?;
    let refused = rig.start().expect_err("the leg left behind is not the cache");
    let refused = format!("{refused:#}");
    ensure!(refused.contains("--degraded") && refused.contains("second.img"), "{refused}");
    std::fs::rename(&kept, rig.dir().join("cache.img"))?;
    rig.start()?;
    client.reconnect(&mut rig)?;
    client.runner.recover(Loss::AgentDied)?;
    the_leg_is_replaced(&mut rig, &mut client, &second)?;
    finish(rig, client)
}

/// While an agent uses the cache it is refused; afterwards both legs are members again, and the new one alone has all.
fn the_leg_is_replaced(rig: &mut AgentRig, client: &mut Client, second: &Path) -> Result<()> {
    let first = rig.dir().join("cache.img");
    let (good, new) = (first.display().to_string(), second.display().to_string());
    let replace = ["cache", "replace", &good, &new];
    let refused = rig.config().command(&replace).expect_err("the cache is in use");
    ensure!(format!("{refused:#}").contains("another process"), "{refused:#}");
    rig.kill()?;
    rig.config().command(&replace)?;
    rig.start()?;
    client.reconnect(rig)?;
    client.runner.recover(Loss::AgentDied)?;
    ensure!(legs(rig)? == (2, 2), "the new leg is in step");
    scribble(&first)?;
    client.runner.verify()?;
    Ok(())
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = std::process::Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {} failed: {}", arguments.join(" "), said.trim());
    Ok(())
}

#[test]
fn a_leg_that_fails_is_put_out_and_never_comes_back() {
    with_seed("a_leg_that_fails_is_put_out_and_never_comes_back", one_leg_fails);
}
