//! Goal: a store that goes away, in every way that real parts offer, is nothing that a guest notices (P3): writes, flushes
//! and discards go on, reads go on for what is held locally, nothing is lost, and all of it resumes by itself.
//!
//! Method: a real target (tgtd) is cut off, frozen, killed or made slow under a verifying client, or under a Linux guest
//! with the target and the agent in network namespaces of their own. Every read is judged, then the whole disk, then the
//! store's own image. Times are printed; none is asserted, waits have limits only so that a hang ends.
//!
//! BALLAST_OUTAGE_SECONDS: how long the Linux guest's store is away (60); the other outages last a ninth of it.
//! To repeat a failure: BALLAST_OUTAGE_SEED=<seed printed> cargo test -p tests --test outage NAME

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::client::on_agent::{Client, DiskSpec, FrontEnd, seed_from};
use tests::client::{End, Mix};
use tests::guest::workload::{endless_writer, verifier};
use tests::guest::{Guest, GuestOptions, Promises};
use tests::netns::Network;
use tests::targets::{TcpRelay, TgtOptions, TgtTarget};

const MIB: u64 = 1 << 20;
const STORE_BYTES: u64 = 2048 * MIB;
const CACHE_BYTES: u64 = 256 * MIB;
const DISK_BYTES: u64 = 24 * MIB;
const SEED_VARIABLE: &str = "BALLAST_OUTAGE_SEED";
const SECONDS_VARIABLE: &str = "BALLAST_OUTAGE_SECONDS";
/// For what must come to an end, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(100);

/// Whole blocks only: once they are committed, each is still held locally (a sector written into a block of the store,
/// or a discard, is not).
const WHOLE_BLOCKS: Mix =
    Mix { reads: 20, flushes: 5, large: 0, small: 0, zeroes: 0, discards: 0, depth_max: 32 };

/// How long the store is away.
fn outage() -> Duration {
    let seconds = std::env::var(SECONDS_VARIABLE).ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(60))
}

fn with_seed(name: &str, test: impl FnOnce(u64) -> Result<()>) {
    let seed = seed_from(SEED_VARIABLE);
    if let Err(error) = test(seed) {
        panic!(
            "{error:#}\n\nto repeat: {SEED_VARIABLE}={seed} cargo test -p tests --test outage {name}"
        );
    }
}

/// A target behind a relay.
struct San {
    target: TgtTarget,
    relay: TcpRelay,
    _dir: TempDir,
}

impl San {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        // With CHAP: without, tgtd does not reinstate sessions, and its LUN is refused.
        let target = TgtTarget::start(dir.path(), STORE_BYTES, TgtOptions::default())?;
        let relay = TcpRelay::start(target.address())?;
        Ok(Self { target, relay, _dir: dir })
    }

    fn store(&self) -> StoreSpec {
        StoreSpec::url(self.target.url_through(self.relay.address()), STORE_BYTES)
    }
}

/// What `status` says.
fn status(rig: &AgentRig) -> Result<Value> {
    rig.agent()?.control(&["status"])
}

fn is_up(status: &Value) -> bool {
    status["store"]["reachable"] == true
}

fn dirty_bytes(status: &Value) -> u64 {
    status["vdis"][0]["dirty_bytes"].as_u64().unwrap_or(u64::MAX)
}

/// Asks for the status until `wanted` holds; in between, does something else.
fn until(
    rig: &AgentRig,
    what: &str,
    wanted: impl Fn(&Value) -> bool,
    mut between: impl FnMut() -> Result<()>,
) -> Result<Value> {
    let end = Instant::now() + PATIENCE;
    loop {
        let now = status(rig)?;
        if wanted(&now) {
            return Ok(now);
        }
        ensure!(Instant::now() < end, "never {what}; the status is {now:#}\n{}", rig.log_tail());
        between()?;
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A few requests of the present mix, all answered.
fn burst(client: &mut Client, mutations: u64) -> Result<()> {
    let wanted = client.runner.counts().mutations + mutations;
    let end = client.runner.run(|counts| counts.mutations >= wanted)?;
    ensure!(end == End::Stopped, "the agent went away");
    Ok(())
}

fn new_client(rig: &mut AgentRig, seed: u64, bytes: u64, mix: Mix) -> Result<Client> {
    let front_end = FrontEnd::Own;
    let spec = DiskSpec { disk: 1, bytes, seed, mix, front_end, switch_write_cache: false };
    Client::create(rig, &spec)
}

/// Everything is drained, the disk is what it must be, and so is the store without the cache.
fn settle(rig: &mut AgentRig, mut client: Client) -> Result<()> {
    rig.agent()?.drain().context("the drain at the end")?;
    let acknowledged = client.runner.oracle().acknowledged();
    client.runner.oracle().set_committed(acknowledged);
    client.runner.verify().context("after the drain")?;
    client.check_store_image(rig)?;
    drop(client);
    rig.shut_down()?;
    rig.check_store()
}

/// Cuts a store off under load, goes on without it, brings it back and compares everything.
fn ride_out(
    seed: u64,
    fault: impl Fn(&mut San) -> Result<()>,
    cure: impl Fn(&mut San) -> Result<()>,
) -> Result<()> {
    let mut san = San::new()?;
    let mut rig = AgentRig::new(&san.store(), CACHE_BYTES)?;
    rig.start()?;
    let mut client = new_client(&mut rig, seed, DISK_BYTES, WHOLE_BLOCKS)?;
    // From here on every block of the disk is held locally.
    client.runner.fill()?;
    burst(&mut client, 1000).context("before the outage")?;

    fault(&mut san)?;
    let away = Instant::now();
    let before = client.runner.counts();
    client.runner.workload().set_mix(Mix { depth_max: 32, ..Mix::default() });
    while away.elapsed() < outage() / 9 {
        // Not a request waits for the store, or this never returns.
        burst(&mut client, 40).context("during the outage")?;
        std::thread::sleep(Duration::from_millis(100));
    }
    let down = until(&rig, "down", |now| !is_up(now), || burst(&mut client, 10))?;
    let during = client.runner.counts();
    client.runner.verify().context("the whole disk, during the outage")?;
    ensure!(down["store"]["down_since"].as_u64().is_some(), "down since when? {down:#}");
    ensure!(dirty_bytes(&down) > 0, "nothing is dirty in {down:#}");
    ensure!(down["vdis"][0]["state"] == "running", "{down:#}");
    ensure!(during.flushes > before.flushes && during.reads_checked > before.reads_checked);

    cure(&mut san)?;
    let back = Instant::now();
    let dirty = dirty_bytes(&down);
    until(&rig, "up again", is_up, || burst(&mut client, 10))?;
    let up = back.elapsed();
    until(&rig, "draining", |now| dirty_bytes(now) < dirty, || burst(&mut client, 1))?;
    println!(
        "away {:.1} s: {} writes, {} flushes, {} reads; back: answers after {:.1} s, drains after {:.1} s",
        (back - away).as_secs_f64(),
        during.mutations - before.mutations,
        during.flushes - before.flushes,
        during.reads_checked - before.reads_checked,
        up.as_secs_f64(),
        back.elapsed().as_secs_f64(),
    );
    burst(&mut client, 500).context("after the outage")?;
    settle(&mut rig, client)
}

#[test]
fn a_silent_network() {
    with_seed("a_silent_network", |seed| {
        let cut = |san: &mut San| {
            san.relay.refuse(true);
            san.relay.black_hole();
            Ok(())
        };
        let restore = |san: &mut San| {
            san.relay.refuse(false);
            Ok(())
        };
        ride_out(seed, cut, restore)
    });
}

#[test]
fn a_network_that_resets_and_refuses() {
    with_seed("a_network_that_resets_and_refuses", |seed| {
        let cut = |san: &mut San| {
            san.relay.refuse(true);
            san.relay.cut();
            Ok(())
        };
        let restore = |san: &mut San| {
            san.relay.refuse(false);
            Ok(())
        };
        ride_out(seed, cut, restore)
    });
}

#[test]
fn a_network_that_delivers_late() {
    with_seed("a_network_that_delivers_late", |seed| {
        let hold = |san: &mut San| {
            san.relay.refuse(true);
            san.relay.hold();
            Ok(())
        };
        // What was under way at the cut reaches the target now, after its session was given up or not.
        let release = |san: &mut San| {
            san.relay.refuse(false);
            san.relay.release();
            Ok(())
        };
        ride_out(seed, hold, release)
    });
}

#[test]
fn a_frozen_target() {
    with_seed("a_frozen_target", |seed| {
        ride_out(seed, |san| san.target.stop(), |san| san.target.cont())
    });
}

#[test]
fn a_killed_target() {
    with_seed("a_killed_target", |seed| {
        ride_out(seed, |san| san.target.kill(), |san| san.target.restart())
    });
}

/// Goal: writes are taken at the local device's pace however slow the store is; nothing is called an outage, and
/// everything arrives.
#[test]
fn a_slow_store() {
    with_seed("a_slow_store", |seed| {
        let san = San::new()?;
        let mut rig = AgentRig::new(&san.store(), CACHE_BYTES)?;
        rig.start()?;
        let mut client =
            new_client(&mut rig, seed, DISK_BYTES, Mix { reads: 0, ..Mix::default() })?;
        san.relay.cap(2 * MIB);
        san.relay.delay(Duration::from_millis(3));
        let slow = Instant::now();
        burst(&mut client, 3000)?;
        let written = client.runner.counts().sectors_written * 512;
        let taken = slow.elapsed();
        ensure!(dirty_bytes(&status(&rig)?) > 0, "the store was not slow enough to show anything");
        while slow.elapsed() < outage() / 9 {
            burst(&mut client, 5)?;
            std::thread::sleep(Duration::from_millis(50));
        }
        println!(
            "{} MiB written in {:.1} s, 2 MiB/s to the store",
            written >> 20,
            taken.as_secs_f64()
        );
        san.relay.cap(0);
        san.relay.delay(Duration::ZERO);
        settle(&mut rig, client)
    });
}

/// Goal: a ring that fills during an outage makes writers wait, and nothing else: no error, no loss, and they go on by
/// themselves when the store is back.
#[test]
fn a_full_ring_waits_for_the_store() {
    with_seed("a_full_ring_waits_for_the_store", |seed| {
        let san = San::new()?;
        let mut rig = AgentRig::new(&san.store(), 64 * MIB)?;
        rig.start()?;
        let writes = Mix { reads: 0, large: 60, ..WHOLE_BLOCKS };
        let mut client = new_client(&mut rig, seed, DISK_BYTES, writes)?;
        burst(&mut client, 200)?;
        rig.agent()?.drain()?;
        san.relay.refuse(true);
        san.relay.black_hole();
        let done = AtomicBool::new(false);
        let absorbed = std::thread::scope(|threads| -> Result<u64> {
            let writer = threads.spawn(|| {
                // Three times what the ring holds.
                let wanted = client.runner.counts().sectors_written + 3 * 64 * MIB / 512;
                let end = client.runner.run(|counts| counts.sectors_written >= wanted);
                done.store(true, Ordering::SeqCst);
                end
            });
            let stalled = wait_for_a_stall(&rig, &done);
            san.relay.refuse(false);
            let end = writer.join().expect("the writer panicked")?;
            ensure!(end == End::Stopped, "the agent went away");
            stalled
        })?;
        let capacity = status(&rig)?["cache"]["capacity"].as_u64().context("capacity")?;
        println!("absorbed {absorbed} of {capacity} bytes: {} %", absorbed * 100 / capacity);
        ensure!(absorbed >= capacity / 4 * 3, "{absorbed} of {capacity} bytes were absorbed");
        settle(&mut rig, client)
    });
}

/// Waits until the ring takes no more, then a moment longer. Returns how many bytes it took.
fn wait_for_a_stall(rig: &AgentRig, done: &AtomicBool) -> Result<u64> {
    let end = Instant::now() + PATIENCE;
    let (mut last, mut same) = (0, 0);
    while same < 20 {
        ensure!(!done.load(Ordering::SeqCst), "the writer never waited");
        ensure!(Instant::now() < end, "the ring never fills: {:#}", status(rig)?);
        let dirty = dirty_bytes(&status(rig)?);
        same = if dirty == last && dirty > 0 { same + 1 } else { 0 };
        last = dirty;
        std::thread::sleep(Duration::from_millis(100));
    }
    // The ring may be full before the silence is noticed.
    let now = until(rig, "down", |now| !is_up(now), || Ok(()))?;
    ensure!(now["vdis"][0]["state"] == "running", "{now:#}");
    ensure!(!done.load(Ordering::SeqCst), "the writer did not wait");
    Ok(last)
}

/// Measures, and asserts nothing but that all is right at the end: 4 KiB writes one at a time, with the store present, away,
/// and taking its backlog at 32 MiB/s. Meaningful with an optimised agent (BALLAST_BIN) on an idle machine.
#[test]
fn write_latency_with_and_without_the_store() {
    with_seed("write_latency_with_and_without_the_store", |seed| {
        let single = Mix { reads: 0, flushes: 0, depth_max: 1, ..WHOLE_BLOCKS };
        let san = San::new()?;
        let mut rig = AgentRig::new(&san.store(), 512 * MIB)?;
        rig.start()?;
        let mut client = new_client(&mut rig, seed, 160 * MIB, single)?;
        client.runner.fill()?;
        rig.agent()?.drain()?;
        let present = probe(&mut client, 4000, || Ok(false))?;

        san.relay.refuse(true);
        san.relay.black_hole();
        until(&rig, "down", |now| !is_up(now), || burst(&mut client, 5))?;
        let away = probe(&mut client, 4000, || Ok(false))?;
        client.runner.fill()?;

        san.relay.cap(32 * MIB);
        san.relay.refuse(false);
        let dirty = dirty_bytes(&status(&rig)?);
        until(&rig, "draining", |now| dirty_bytes(now) < dirty, || Ok(()))?;
        let draining = probe(&mut client, 20_000, || Ok(dirty_bytes(&status(&rig)?) < 16 * MIB))?;
        for (what, times) in [("present", present), ("away", away), ("draining", draining)] {
            println!(
                "store {what}: {} writes, p50 {:?}, p99 {:?}",
                times.len(),
                at(&times, 50),
                at(&times, 99)
            );
        }
        san.relay.cap(0);
        settle(&mut rig, client)
    });
}

/// Times of `count` requests one after the other, sorted; ends early when `stop`, asked now and then, says so.
fn probe(
    client: &mut Client,
    count: usize,
    stop: impl Fn() -> Result<bool>,
) -> Result<Vec<Duration>> {
    let mut times = Vec::with_capacity(count);
    while times.len() < count && (times.len() % 1000 != 999 || !stop()?) {
        let started = Instant::now();
        burst(client, 1)?;
        times.push(started.elapsed());
    }
    times.sort_unstable();
    Ok(times)
}

/// A percentile of sorted times.
fn at(times: &[Duration], percent: usize) -> Duration {
    times[(times.len() - 1) * percent / 100]
}

/// Goal: an agent whose cache's file system fills up to the last byte does not notice: its file was written from end to
/// end when it was made. Method: a file system of its own, in a mount namespace that ends with the test's thread.
#[test]
fn a_full_file_system_around_the_cache() {
    let test = || with_seed("a_full_file_system_around_the_cache", full_file_system);
    // In a thread of its own, because it never leaves its mount namespace.
    if let Err(panic) = std::thread::spawn(test).join() {
        std::panic::resume_unwind(panic);
    }
}

fn full_file_system(seed: u64) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (image, mount) = (dir.path().join("fs.img"), dir.path().join("mnt"));
    std::fs::create_dir(&mount)?;
    std::fs::File::create(&image)?.set_len(200 * MIB)?;
    run("mkfs.ext4", &["-q", "-m", "0", &image.display().to_string()])?;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .context("a mount namespace (root?)")?;
    run("mount", &["--make-rprivate", "/"])?;
    run("mount", &["-o", "loop", &image.display().to_string(), &mount.display().to_string()])?;
    let outcome = in_full_file_system(seed, &mount);
    // The kernel lets go of the files of an agent that has just ended a moment later.
    run("umount", &["--lazy", &mount.display().to_string()])?;
    outcome
}

fn in_full_file_system(seed: u64, mount: &std::path::Path) -> Result<()> {
    let mut rig = AgentRig::new(&StoreSpec::file(512 * MIB), 64 * MIB)?;
    rig.config().cache = mount.join("cache.img");
    rig.start()?;
    let mut client =
        new_client(&mut rig, seed, DISK_BYTES, Mix { depth_max: 32, ..Mix::default() })?;
    burst(&mut client, 500)?;
    let filler = mount.join("filler");
    let full = std::io::copy(&mut std::io::repeat(1), &mut std::fs::File::create(&filler)?);
    let full = full.expect_err("the file system is full").kind();
    ensure!(full == std::io::ErrorKind::StorageFull, "{full}");
    // Around the ring more than once.
    let wanted = client.runner.counts().sectors_written + 2 * 64 * MIB / 512;
    let end = client.runner.run(|counts| counts.sectors_written >= wanted)?;
    ensure!(end == End::Stopped, "the agent went away");
    client.runner.verify()?;
    rig.kill()?;
    rig.start().context("a start with the file system full")?;
    client.reconnect(&mut rig)?;
    client.runner.recover(tests::client::Loss::AgentDied)?;
    settle(&mut rig, client)
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = std::process::Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {} failed: {}", arguments.join(" "), said.trim());
    Ok(())
}

/// Goal: a Linux guest on a store whose network cable is pulled while it writes sees nothing: every `fsync` returns, no
/// I/O error, the right checksums, a clean file system; afterwards everything is drained.
#[test]
fn a_linux_guest_rides_out_a_pulled_cable() {
    let network = Network::new().expect("network namespaces");
    let dir = tempfile::tempdir().expect("temporary folder");
    let address = SocketAddr::from((Network::SAN_ADDRESS, 3260));
    let options = TgtOptions::default();
    let start = || TgtTarget::start_at(dir.path(), 4096 * MIB, address, options);
    let target = network.san.enter(start).expect("target");
    let mut rig = network
        .host
        .enter(|| {
            let mut rig = AgentRig::new(&StoreSpec::url(target.url(), 4096 * MIB), 1024 * MIB)?;
            rig.start()?;
            Ok(rig)
        })
        .expect("agent");
    rig.agent().expect("agent").create("vm", 2048 * MIB).expect("create");
    let disks = vec![rig.agent().expect("agent").attach("vm").expect("attach")];
    // However long the outage is, the ring has room for what is written in it.
    let job = endless_writer(512, outage() / 1000);
    let time_limit = outage() + Duration::from_secs(300);
    let options = GuestOptions { disks, job, time_limit, ..GuestOptions::default() };
    let mut guest = Guest::boot(&rig.dir().join("guest"), &options).expect("boot");
    assert_eq!(guest.wait_for("write-cache").expect("write cache"), "write back");
    for _ in 0..4 {
        guest.wait_for("synced").expect("fsync");
    }

    network.cut().expect("cut");
    let cut = Instant::now();
    guest.skip_reported();
    let mut syncs = 0;
    while cut.elapsed() < outage() {
        let synced = guest.wait_for_at_most("synced", PATIENCE).expect("the guest lives");
        assert!(synced.is_some(), "no fsync returned for {} s", PATIENCE.as_secs());
        syncs += 1;
    }
    let down = until(&rig, "down", |now| !is_up(now), || Ok(())).expect("status");
    assert!(dirty_bytes(&down) > 0, "{down:#}");

    network.restore().expect("restore");
    let back = Instant::now();
    until(&rig, "up again", is_up, || Ok(())).expect("status");
    let up = back.elapsed();
    println!(
        "away {} s: {syncs} fsyncs; answers {:.1} s after its return",
        outage().as_secs(),
        up.as_secs_f64()
    );
    for _ in 0..2 {
        guest.wait_for("synced").expect("fsync after the outage");
    }
    guest.say("stop").expect("say");
    let results = guest.finish().expect("no I/O error, and a sound file system").results;
    let mut promises = Promises::default();
    promises.record(&results).expect("results");

    rig.agent().expect("agent").drain().expect("drain");
    let files = vec![("/promises".to_owned(), promises.checklist().into_bytes())];
    let options = GuestOptions { job: verifier(""), files, ..options };
    let guest = Guest::boot(&rig.dir().join("checker"), &options).expect("boot");
    let checked = guest.finish().expect("the second guest");
    assert_eq!(checked.last()["verified"], promises.len().to_string());
    rig.shut_down().expect("clean end");
    network.host.enter(|| rig.check_store()).expect("a sound store");
}
