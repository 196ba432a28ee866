//! Goal: without crashes, every read under load, every image, and the store itself are right, for
//! both front ends and every kind of store; after drain, restart and detach too.
//! Method: the verifying client (`tests::client`) on seeded streams; first on qemu-storage-daemon, to
//! show that the client does not accuse a good server.
//!
//! To repeat a failure: BALLAST_VERIFY_SEED=<seed printed> cargo test -p tests --test verify NAME

use anyhow::{Context, Result};
use bench::peer::StorageDaemon;
use bench::server::Server;
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::client::driver_port::DriverPort;
use tests::client::on_agent::{Client, DiskSpec, FrontEnd, seed_from};
use tests::client::ring_port::RingPort;
use tests::client::runner::RunOptions;
use tests::client::{BlockPort, End, Identity, Mix, Oracle, Runner, SECTOR, Workload};
use tests::targets::{IstgtTarget, TgtOptions, TgtTarget};

const MIB: u64 = 1 << 20;
const SEED_VARIABLE: &str = "BALLAST_VERIFY_SEED";

/// Runs `test` with a seed and says how to repeat it when it fails.
fn with_seed(name: &str, test: impl FnOnce(u64) -> Result<()>) {
    let seed = seed_from(SEED_VARIABLE);
    if let Err(error) = test(seed) {
        panic!(
            "{error:#}\n\nto repeat: {SEED_VARIABLE}={seed} cargo test -p tests --test verify {name}"
        );
    }
}

fn on_storage_daemon(
    seed: u64,
    connect: impl Fn(&StorageDaemon) -> Result<Box<dyn BlockPort + Send>>,
) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("disk.raw");
    std::fs::write(&file, vec![0; 32 * MIB as usize])?;
    let server = StorageDaemon::start(&file, dir.path(), 0)?;
    let sectors = 32 * MIB / SECTOR as u64;
    let oracle = Oracle::new(Identity { seed, disk: 1 }, sectors, false);
    let workload = Workload::new(seed, Mix { zeroes: 3, ..Mix::plain() }, sectors);
    let options = RunOptions { overlap: false, switch_write_cache: false };
    let mut runner = Runner::new(connect(&server)?, oracle, workload, options)?;
    for round in 1..=3 {
        assert_eq!(runner.run(|counts| counts.mutations >= 1500 * round)?, End::Stopped);
        runner.verify()?;
        runner.reconnect(|| connect(&server))?;
    }
    runner.verify()?;
    assert!(runner.counts().reads_checked > 500);
    Ok(())
}

#[test]
fn the_client_acquits_the_storage_daemon() {
    with_seed("the_client_acquits_the_storage_daemon", |seed| {
        on_storage_daemon(seed, |server| Ok(Box::new(RingPort::connect(server.socket(), 32, 3)?)))
    });
}

#[test]
fn the_independent_driver_acquits_the_storage_daemon() {
    with_seed("the_independent_driver_acquits_the_storage_daemon", |seed| {
        on_storage_daemon(seed, |server| Ok(Box::new(DriverPort::connect(server.socket(), 32)?)))
    });
}

/// Load, compare, drain, compare the store alone, restart, compare, load again.
fn on_ballast(seed: u64, store: &StoreSpec, front_end: FrontEnd) -> Result<()> {
    let mut rig = AgentRig::new(store, 64 * MIB)?;
    rig.start()?;
    let spec = DiskSpec {
        disk: 1,
        bytes: 96 * MIB,
        seed,
        mix: Mix::default(),
        front_end,
        switch_write_cache: front_end == FrontEnd::Own,
    };
    let mut client = Client::create(&mut rig, &spec)?;
    for round in 1..=3 {
        load(&mut client, 2500 * round).with_context(|| format!("round {round}"))?;
        rig.agent()?.drain()?;
        let acknowledged = client.runner.oracle().acknowledged();
        client.runner.oracle().set_committed(acknowledged);
        client.runner.verify().context("after the drain")?;
        client.check_store_image(&rig)?;
        rig.shut_down()?;
        rig.start()?;
        client.reconnect(&mut rig)?;
        client.runner.verify().context("after the restart")?;
    }
    drop(client);
    rig.shut_down()?;
    rig.check_store()
}

fn load(client: &mut Client, mutations: u64) -> Result<()> {
    let end = client.runner.run(|counts| counts.mutations >= mutations)?;
    anyhow::ensure!(end == End::Stopped, "the agent went away under load");
    client.runner.verify().context("after the load")
}

#[test]
fn file_store_own_front_end() {
    with_seed("file_store_own_front_end", |seed| {
        on_ballast(seed, &StoreSpec::file(1024 * MIB), FrontEnd::Own)
    });
}

#[test]
fn file_store_independent_driver() {
    with_seed("file_store_independent_driver", |seed| {
        on_ballast(seed, &StoreSpec::file(1024 * MIB), FrontEnd::VirtioDriver)
    });
}

#[test]
fn iscsi_store_with_compare_and_write() {
    with_seed("iscsi_store_with_compare_and_write", |seed| {
        let dir = tempfile::tempdir()?;
        let target = IstgtTarget::start(dir.path(), 1024 * MIB)?;
        on_ballast(seed, &StoreSpec::url(target.url(), 1024 * MIB), FrontEnd::Own)
    });
}

#[test]
fn iscsi_store_without_compare_and_write() {
    with_seed("iscsi_store_without_compare_and_write", |seed| {
        let dir = tempfile::tempdir()?;
        let target = TgtTarget::start(dir.path(), 1024 * MIB, TgtOptions::default())?;
        let store = StoreSpec::url(target.url(), 1024 * MIB);
        on_ballast(seed, &store, FrontEnd::VirtioDriver)
    });
}
