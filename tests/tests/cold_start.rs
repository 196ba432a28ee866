//! Goal: an agent that starts while its store is away brings its disks back from the local device alone, serves them, and
//! joins the store by itself when that returns (P3). A store that does not fit a disk's log is refused, and nothing is
//! written to it.
//!
//! Method: the store's file, in the place where devices' nodes are, is taken away while the agent is dead, and brought
//! back later, under a verifying client that judges every read, then the disk, then the store's own image. Nothing is
//! timed; waits have limits only so that a hang ends.
//!
//! To repeat a failure: BALLAST_COLD_START_SEED=<seed printed> cargo test -p tests --test cold_start NAME

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::client::on_agent::{Client, DiskSpec, FrontEnd, seed_from};
use tests::client::{End, Loss, Mix};

const MIB: u64 = 1 << 20;
const STORE_BYTES: u64 = 512 * MIB;
const CACHE_BYTES: u64 = 256 * MIB;
const DISK_BYTES: u64 = 16 * MIB;
const SEED_VARIABLE: &str = "BALLAST_COLD_START_SEED";
/// For what must come to an end, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whole blocks only: once written, each is held locally.
const WHOLE_BLOCKS: Mix =
    Mix { reads: 20, flushes: 5, large: 0, small: 0, zeroes: 0, discards: 0, depth_max: 32 };

fn with_seed(name: &str, test: impl FnOnce(u64) -> Result<()>) {
    let seed = seed_from(SEED_VARIABLE);
    if let Err(error) = test(seed) {
        panic!(
            "{error:#}\n\nto repeat: {SEED_VARIABLE}={seed} cargo test -p tests --test cold_start {name}"
        );
    }
}

/// A store that can be unplugged while nobody has it open: a path below /dev that vanishes is a device that is away.
struct Store {
    path: PathBuf,
    dir: TempDir,
}

impl Store {
    fn new() -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("ballast-cold-")
            .tempdir_in("/dev/shm")
            .context("make a scratch directory below /dev")?;
        let path = dir.path().join("store");
        std::fs::File::create_new(&path)?.set_len(STORE_BYTES)?;
        Ok(Self { path, dir })
    }

    fn spec(&self) -> StoreSpec {
        StoreSpec::url(format!("file:{}", self.path.display()), STORE_BYTES)
    }

    fn unplug(&self) -> Result<()> {
        std::fs::rename(&self.path, self.dir.path().join("away")).context("unplug the store")
    }

    fn plug(&self) -> Result<()> {
        std::fs::rename(self.dir.path().join("away"), &self.path).context("plug the store in")
    }
}

fn status(rig: &AgentRig) -> Result<Value> {
    rig.agent()?.control(&["status"])
}

fn until(rig: &AgentRig, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let end = Instant::now() + PATIENCE;
    loop {
        let now = status(rig)?;
        if wanted(&now) {
            return Ok(now);
        }
        ensure!(Instant::now() < end, "never {what}; the status is {now:#}\n{}", rig.log_tail());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn client(rig: &mut AgentRig, disk: u64, seed: u64) -> Result<Client> {
    let front_end = FrontEnd::Own;
    let (bytes, mix) = (DISK_BYTES, WHOLE_BLOCKS);
    let spec = DiskSpec { disk, bytes, seed, mix, front_end, switch_write_cache: false };
    Client::create(rig, &spec)
}

fn burst(client: &mut Client) -> Result<()> {
    let wanted = client.runner.counts().mutations + 500;
    let end = client.runner.run(|counts| counts.mutations >= wanted)?;
    ensure!(end == End::Stopped, "the agent went away");
    client.runner.quiesce()?;
    Ok(())
}

/// After a kill and a start: nothing acknowledged is missing.
fn back(rig: &mut AgentRig, client: &mut Client) -> Result<()> {
    client.reconnect(rig)?;
    client.runner.recover(Loss::AgentDied).map(drop).with_context(|| rig.log_tail())
}

/// Everything is drained, and the store alone holds the disk.
fn settle(rig: &mut AgentRig, mut clients: Vec<Client>) -> Result<()> {
    rig.agent()?.drain().context("the drain at the end")?;
    for client in &mut clients {
        let acknowledged = client.runner.oracle().acknowledged();
        client.runner.oracle().set_committed(acknowledged);
        client.runner.verify().context("after the drain")?;
        client.check_store_image(rig)?;
    }
    drop(clients);
    rig.shut_down()?;
    rig.check_store()
}

#[test]
fn disks_are_served_without_the_store_and_drained_when_it_is_back() {
    with_seed("disks_are_served", |seed| {
        let store = Store::new()?;
        let mut rig = AgentRig::new(&store.spec(), CACHE_BYTES)?;
        rig.start()?;
        let mut clients = vec![client(&mut rig, 1, seed)?, client(&mut rig, 2, seed)?];
        for client in &mut clients {
            client.runner.fill()?;
            burst(client)?;
        }
        // Twice, so that what was written without the store is recovered without it.
        for round in 0..2 {
            rig.kill()?;
            if round == 0 {
                store.unplug()?;
            }
            rig.start().context("start without the store")?;
            for client in &mut clients {
                back(&mut rig, client)?;
                burst(client)?;
                client.runner.flush()?;
                client.runner.verify().context("without the store")?;
            }
        }
        ensure!(status(&rig)?["store"]["reachable"] == false, "the store is away");
        store.plug()?;
        until(&rig, "reached the store", |now| now["store"]["reachable"] == true)?;
        clients.iter_mut().try_for_each(burst)?;
        settle(&mut rig, clients)
    });
}

#[test]
fn reads_of_what_is_not_held_wait_for_the_store() {
    with_seed("reads_of_what_is_not_held", |seed| {
        let store = Store::new()?;
        let mut rig = AgentRig::new(&store.spec(), CACHE_BYTES)?;
        rig.start()?;
        // Never written as a whole: most blocks are not in the cache.
        let mut client = client(&mut rig, 1, seed)?;
        client.runner.quiesce()?;
        rig.kill()?;
        store.unplug()?;
        rig.start()?;
        client.reconnect(&mut rig)?;
        std::thread::scope(|scope| -> Result<()> {
            let reading = scope.spawn(|| client.runner.recover(Loss::AgentDied).map(drop));
            until(&rig, "waited for reads", |now| {
                now["vdis"][0]["waiting"]["reads"].as_u64().is_some_and(|reads| reads > 0)
            })?;
            ensure!(!reading.is_finished(), "a read was answered without the store");
            store.plug()?;
            reading.join().expect("the client's thread panicked")
        })?;
        burst(&mut client)?;
        settle(&mut rig, vec![client])
    });
}

#[test]
fn a_store_that_was_put_back_is_refused_and_nothing_is_lost() {
    with_seed("a_store_that_was_put_back", |seed| {
        let store = Store::new()?;
        let mut rig = AgentRig::new(&store.spec(), CACHE_BYTES)?;
        rig.start()?;
        let mut client = client(&mut rig, 1, seed)?;
        client.runner.fill()?;
        rig.agent()?.drain()?;
        rig.kill()?;
        let (former, newer) = (store.dir.path().join("former"), store.dir.path().join("newer"));
        std::fs::copy(&store.path, &former)?;
        rig.start()?;
        back(&mut rig, &mut client)?;
        burst(&mut client)?;
        rig.agent()?.drain()?;
        rig.kill()?;
        store.unplug()?;
        rig.start()?;
        back(&mut rig, &mut client)?;
        burst(&mut client)?;
        // The array's operator restores an old snapshot.
        std::fs::rename(store.dir.path().join("away"), &newer)?;
        let image = {
            std::fs::rename(&former, &store.path)?;
            std::fs::read(rig.export(&client.name)?)?
        };
        let status = until(&rig, "refused the store", |now| now["vdis"][0]["state"] == "failed")?;
        let why = status["vdis"][0]["last_error"].as_str().unwrap_or_default();
        for word in ["put back to an older state", "disk-1", "the log is kept", "attach"] {
            ensure!(why.contains(word), "no '{word}' in: {why}");
        }
        ensure!(std::fs::read(rig.export(&client.name)?)? == image, "the old image was changed");
        // An attach is refused in the same words, and a start, too.
        let refused = rig.agent()?.attach(&client.name).unwrap_err();
        ensure!(format!("{refused:#}").contains("put back"), "{refused:#}");
        rig.kill()?;
        rig.start()?;
        until(&rig, "refused the store", |now| now["vdis"][0]["state"] == "failed")?;
        rig.kill()?;
        // The newer state is back: nothing was lost.
        std::fs::rename(&newer, &store.path)?;
        rig.start()?;
        back(&mut rig, &mut client)?;
        settle(&mut rig, vec![client])
    });
}
