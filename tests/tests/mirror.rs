//! Goal: whatever happens to one leg of a mirrored cache, a client sees no error and loses nothing, status says what
//! happened, and a leg that was left behind is never used again.
//!
//! Method: the agent with two files as legs, under a verifying client; one leg is overwritten with junk while in use, or
//! its file system gives no more room (the second leg lies on a tmpfs of its own, in a mount namespace that ends with the
//! test's thread); kills in between. Everything is read back through the legs that are left.
//!
//! A leg hangs: its file system, an ext4 on a loop device in the same namespace, is frozen, so that no write or flush there
//! ends before it is thawed.
//!
//! A leg is replaced while the client goes on, and the new leg alone must then have everything; that is cut short by a kill,
//! given up on request, and watched by other disks that come and go.
//!
//! To repeat a failure: BALLAST_MIRROR_SEED=<seed printed> cargo test -p tests --test mirror NAME

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

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
    mirrored_with(seed, second, &[])
}

fn mirrored_with(seed: u64, second: &Path, options: &[&str]) -> Result<(AgentRig, Client)> {
    let mut rig = AgentRig::new(&StoreSpec::file(STORE_BYTES), CACHE_BYTES)?;
    let options = options.iter().map(|option| (*option).to_owned());
    let twin = ["--cache".to_owned(), second.display().to_string()];
    rig.config().arguments = twin.into_iter().chain(options).collect();
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

/// Runs `test` with the path of a tmpfs of its own, which other threads' processes do not see.
fn with_tmpfs(test: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mount = dir.path().display().to_string();
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .context("a mount namespace (root?)")?;
    run("mount", &["--make-rprivate", "/"])?;
    run("mount", &["-t", "tmpfs", "-o", "size=96m", "none", &mount])?;
    let outcome = test(dir.path());
    run("umount", &["-l", &mount])?;
    outcome
}

/// The leg on the tmpfs loses its blocks, and no others are to be had.
fn break_leg(mount: &Path, leg: &Path) -> Result<()> {
    File::options().write(true).open(leg)?.set_len(0)?;
    let full = std::io::copy(&mut std::io::repeat(1), &mut File::create(mount.join("filler"))?);
    ensure!(full.is_err(), "the file system has an end");
    Ok(())
}

fn one_leg_fails(seed: u64) -> Result<()> {
    with_tmpfs(|mount| on_tmpfs(seed, mount))
}

fn on_tmpfs(seed: u64, mount: &Path) -> Result<()> {
    let second = mount.join("second.img");
    let (mut rig, mut client) = mirrored(seed, &second)?;
    let (old, kept) = (rig.dir().join("old.img"), rig.dir().join("new.img"));
    std::fs::copy(&second, &old)?;
    break_leg(mount, &second)?;
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
    std::fs::remove_file(mount.join("filler"))?;
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

/// A file system that is thawed at the end, for what hangs in it cannot be ended by force.
struct Frozen<'a>(&'a Path);

impl<'a> Frozen<'a> {
    fn new(mount: &'a Path) -> Result<Self> {
        run("fsfreeze", &["-f", &mount.display().to_string()])?;
        Ok(Self(mount))
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if let Err(error) = run("fsfreeze", &["-u", &self.0.display().to_string()]) {
            eprintln!("{} stays frozen: {error:#}", self.0.display());
        }
    }
}

/// As [`with_tmpfs`], with an ext4.
fn with_ext4(test: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (image, mount) = (dir.path().join("image"), dir.path().join("mount"));
    File::create(&image)?.set_len(2 * CACHE_BYTES)?;
    std::fs::create_dir(&mount)?;
    let (image, at) = (image.display().to_string(), mount.display().to_string());
    run("mkfs.ext4", &["-q", "-F", &image])?;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .context("a mount namespace (root?)")?;
    run("mount", &["--make-rprivate", "/"])?;
    run("mount", &["-o", "loop", &image, &at])?;
    let outcome = test(&mount);
    run("umount", &["-l", &at])?;
    outcome
}

fn one_leg_hangs(seed: u64) -> Result<()> {
    with_ext4(|mount| {
        let second = mount.join("second.img");
        let (mut rig, mut client) = mirrored_with(seed, &second, &["--leg-timeout", "1s"])?;
        let frozen = Frozen::new(mount)?;
        burst(&mut client, 500).context("with a leg that hangs")?;
        client.runner.verify()?;
        ensure!(legs(&rig)? == (1, 2), "the leg is out");
        let status = rig.agent()?.control(&["status"])?;
        let words = status["degraded"].to_string();
        ensure!(words.contains("second.img") && words.contains("no answer"), "status: {words}");
        // Nobody waits for what still hangs.
        rig.agent()?.drain()?;
        burst(&mut client, 300)?;
        drop(frozen);
        // What hung lands on a leg that is none any more.
        burst(&mut client, 300)?;
        client.runner.verify()?;
        kill_and_compare(&mut rig, &mut client)?;
        ensure!(legs(&rig)? == (1, 2), "a leg left behind is no member");
        finish(rig, client)
    })
}

#[test]
fn a_leg_that_hangs_is_put_out_and_costs_a_pause() {
    with_seed("a_leg_that_hangs_is_put_out_and_costs_a_pause", one_leg_hangs);
}

/// `cache replace NEW` with these options, by the running agent, while the client goes on.
fn replace_under_load(
    rig: &mut AgentRig,
    client: &mut Client,
    new: &Path,
    options: &[&str],
) -> Result<String> {
    let config = rig.config().clone();
    let (run_dir, new) = (config.run_dir().display().to_string(), new.display().to_string());
    let mut arguments = vec!["--run-dir", &run_dir, "cache", "replace", &new];
    arguments.extend(options);
    std::thread::scope(|scope| {
        let command = scope.spawn(|| config.command(&arguments));
        while !command.is_finished() {
            burst(client, 50).context("while a leg is replaced")?;
        }
        command.join().expect("the command's thread does not panic")
    })
}

/// Starts an agent on these legs alone, and compares all that the client knows.
fn go_on_with(
    rig: &mut AgentRig,
    client: &mut Client,
    legs: [&Path; 2],
    options: &[&str],
) -> Result<()> {
    use_legs(rig, legs, options);
    rig.start()?;
    client.reconnect(rig)?;
    let recovered = client.runner.recover(Loss::AgentDied);
    recovered.with_context(|| format!("agent's log:\n{}", rig.log_tail()))?;
    client.runner.verify()
}

fn use_legs(rig: &mut AgentRig, [first, second]: [&Path; 2], options: &[&str]) {
    let config = rig.config();
    config.cache = first.to_owned();
    config.arguments = vec!["--cache".to_owned(), second.display().to_string()];
    config.arguments.extend(options.iter().map(|option| (*option).to_owned()));
}

fn a_leg_is_replaced_online(seed: u64) -> Result<()> {
    with_tmpfs(|mount| {
        let second = mount.join("second.img");
        let (mut rig, mut client) = mirrored(seed, &second)?;
        let (first, third) = (rig.dir().join("cache.img"), rig.dir().join("third.img"));
        let refused = replace_under_load(&mut rig, &mut client, &third, &[]);
        let refused = format!("{:#}", refused.expect_err("nothing is missing"));
        ensure!(refused.contains("in step"), "{refused}");
        break_leg(mount, &second)?;
        burst(&mut client, 500).context("with one leg failing")?;
        ensure!(legs(&rig)? == (1, 2), "the leg is out");
        let refused = replace_under_load(&mut rig, &mut client, &first, &[]);
        let refused = format!("{:#}", refused.expect_err("a leg is no twin of itself"));
        ensure!(refused.contains("same file"), "{refused}");
        let said = replace_under_load(&mut rig, &mut client, &third, &["--rate", "32MiB"])?;
        ensure!(said.contains("third.img is in step"), "{said}");
        ensure!(legs(&rig)? == (2, 2), "the new leg is a member");
        let status = rig.agent()?.control(&["status"])?;
        ensure!(!status["degraded"].to_string().contains("mirror"), "{}", status["degraded"]);
        burst(&mut client, 300)?;
        client.runner.verify()?;
        // A recovery with both, and then the new leg alone.
        rig.kill()?;
        go_on_with(&mut rig, &mut client, [&first, &third], &[])?;
        ensure!(legs(&rig)? == (2, 2), "both are members");
        burst(&mut client, 300)?;
        rig.kill()?;
        std::fs::remove_file(&first)?;
        go_on_with(&mut rig, &mut client, [&third, &first], &["--degraded"])?;
        finish(rig, client)
    })
}

#[test]
fn a_leg_replaced_while_disks_are_served_has_everything() {
    let name = "a_leg_replaced_while_disks_are_served_has_everything";
    with_seed(name, a_leg_is_replaced_online);
}

/// Starts a copy that takes long, and waits until it has begun.
fn begin_slow_copy(rig: &mut AgentRig, client: &mut Client, new: &Path) -> Result<()> {
    let config = rig.config().clone();
    let (run_dir, path) = (config.run_dir().display().to_string(), new.display().to_string());
    // It ends with an error when the copy is cut short; the agent needs no command to go on.
    let slow = ["--run-dir", &run_dir, "cache", "replace", &path, "--rate", "2MiB"];
    let mut command = std::process::Command::new(&config.binary)
        .args(slow)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .context("run ballast")?;
    let outcome = copied_some(rig, client);
    command.kill().context("interrupt the command")?;
    command.wait().context("reap the command")?;
    outcome?;
    let before = copied(rig)?.context("the agent goes on")?;
    burst(client, 200)?;
    let after = copied(rig)?.context("the agent goes on without the command")?;
    ensure!(after >= before, "{before} bytes, then {after}");
    Ok(())
}

fn copied_some(rig: &AgentRig, client: &mut Client) -> Result<()> {
    while copied(rig)?.is_none_or(|bytes| bytes < 4 * MIB) {
        burst(client, 50)?;
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Bytes that a copy under way has done.
fn copied(rig: &AgentRig) -> Result<Option<u64>> {
    let status = rig.agent()?.control(&["cache", "status"])?;
    let replacement = &status["replacement"];
    let bytes = replacement["bytes_done"].as_u64();
    Ok(bytes.filter(|_| replacement["state"] == "copying"))
}

fn a_copy_is_cut_short(seed: u64) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (second, third) = (dir.path().join("second.img"), dir.path().join("third.img"));
    let (mut rig, mut client) = mirrored(seed, &second)?;
    let first = rig.dir().join("cache.img");
    rig.kill()?;
    std::fs::remove_file(&second)?;
    go_on_with(&mut rig, &mut client, [&first, &second], &["--degraded"])?;
    // Killed amid the copy: the good leg is the cache as it was, the other is nothing yet.
    begin_slow_copy(&mut rig, &mut client, &third)?;
    rig.kill()?;
    use_legs(&mut rig, [&third, &second], &[]);
    let refused = format!("{:#}", rig.start().expect_err("the new leg is not finished"));
    ensure!(refused.contains("unfinished"), "{refused}");
    go_on_with(&mut rig, &mut client, [&first, &third], &[])?;
    ensure!(legs(&rig)? == (1, 2), "the unfinished leg is no member");
    // Given up on request.
    begin_slow_copy(&mut rig, &mut client, &third)?;
    rig.agent()?.control(&["cache", "replace", "--cancel"])?;
    burst(&mut client, 200)?;
    ensure!(legs(&rig)? == (1, 2) && copied(&rig)?.is_none(), "the copy is given up");
    // Disks that come, write and go amid the copy; the agent stops in order, and goes on.
    begin_slow_copy(&mut rig, &mut client, &third)?;
    let spec = DiskSpec {
        disk: 2,
        bytes: DISK_BYTES,
        seed,
        mix: Mix::default(),
        front_end: FrontEnd::Own,
        switch_write_cache: true,
    };
    let mut other = Client::create(&mut rig, &spec)?;
    burst(&mut other, 300)?;
    burst(&mut client, 300)?;
    ensure!(copied(&rig)?.is_some(), "the copy goes on");
    client.runner.quiesce()?;
    other.runner.quiesce()?;
    rig.shut_down()?;
    rig.start()?;
    client.reconnect(&mut rig)?;
    other.reconnect(&mut rig)?;
    for client in [&mut client, &mut other] {
        client.runner.recover(Loss::AgentDied)?;
    }
    ensure!(legs(&rig)? == (1, 2), "the unfinished leg is no member");
    begin_slow_copy(&mut rig, &mut client, &third)?;
    other.runner.verify()?;
    other.runner.quiesce()?;
    drop(other);
    rig.agent()?.control(&["vdi", "detach", "disk-2", "--force"])?;
    rig.agent()?.control(&["cache", "replace", "--cancel"])?;
    replace_under_load(&mut rig, &mut client, &third, &["--rate", "0"])?;
    ensure!(legs(&rig)? == (2, 2), "the new leg is a member");
    rig.kill()?;
    std::fs::remove_file(&first)?;
    go_on_with(&mut rig, &mut client, [&third, &first], &["--degraded"])?;
    finish(rig, client)
}

#[test]
fn a_replacement_cut_short_changes_nothing() {
    with_seed("a_replacement_cut_short_changes_nothing", a_copy_is_cut_short);
}
