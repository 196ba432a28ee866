//! Goal: `status`, the metrics and an outage drill tell the truth before, during and after an outage.
//! Method: a verifying client whose writes, reads and locally held blocks are known, on an agent with its store in a file.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::client::on_agent::{Client, DiskSpec, FrontEnd};
use tests::client::{End, Mix};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 24 * MIB;
const PATIENCE: Duration = Duration::from_secs(100);
const DISK: &str = "disk-1";
/// What was written as whole blocks and committed is still held locally.
const WHOLE_BLOCKS: Mix =
    Mix { reads: 20, flushes: 5, large: 0, small: 0, zeroes: 0, discards: 0, depth_max: 32 };

fn rig(arguments: &[&str]) -> Result<(AgentRig, Client)> {
    let mut rig = AgentRig::new(&StoreSpec::file(512 * MIB), 128 * MIB)?;
    rig.config().arguments = arguments.iter().map(|&argument| argument.into()).collect();
    rig.start()?;
    let front_end = FrontEnd::Own;
    let spec = DiskSpec {
        disk: 1,
        bytes: DISK_BYTES,
        seed: 7,
        mix: WHOLE_BLOCKS,
        front_end,
        switch_write_cache: false,
    };
    let client = Client::create(&mut rig, &spec)?;
    Ok((rig, client))
}

fn burst(client: &mut Client, mutations: u64) -> Result<()> {
    let wanted = client.runner.counts().mutations + mutations;
    let end = client.runner.run(|counts| counts.mutations >= wanted)?;
    ensure!(end == End::Stopped, "the agent went away");
    Ok(())
}

/// The disk in `status`.
fn disk(rig: &AgentRig) -> Result<Value> {
    Ok(rig.agent()?.control(&["status"])?["vdis"][0].clone())
}

/// The status once `wanted` holds of the disk; works a little in between.
fn until(
    rig: &AgentRig,
    client: &mut Client,
    what: &str,
    wanted: impl Fn(&Value) -> bool,
) -> Result<Value> {
    let end = Instant::now() + PATIENCE;
    loop {
        let now = disk(rig)?;
        if wanted(&now) {
            return Ok(now);
        }
        ensure!(Instant::now() < end, "never {what}: {now:#}");
        burst(client, 20)?;
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn status_foretells_and_knows_what_is_held() {
    let (mut rig, mut client) = rig(&[]).expect("rig");
    client.runner.fill().expect("fill");
    burst(&mut client, 200).expect("load");
    let ready = |now: &Value| {
        now["readiness"]["held_bytes"].as_u64() >= Some(DISK_BYTES)
            && now["outlook"]["write_rate"].as_u64() > Some(0)
            && now["outlook"]["drain_rate"].as_u64() > Some(0)
            && now["readiness"]["recent_reads_local_share"].as_f64() > Some(0.99)
    };
    let now = until(&rig, &mut client, "ready for an outage", ready).expect("status");
    assert_eq!(now["readiness"]["held_share"], 1.0, "{now:#}");
    assert!(now["outlook"]["runway_ms"].as_u64() > Some(0), "{now:#}");
    assert_eq!(now["totals"]["failed"], 0, "{now:#}");
    let written = client.runner.counts().sectors_written * 512;
    assert_eq!(disk(&rig).expect("status")["totals"]["written_bytes"], written);

    // What was discarded is known to be zeros, also once the store has it so: no read of it asks the store.
    let before = now["totals"]["fetched_bytes"].as_u64().expect("fetched");
    client.runner.workload().set_mix(Mix { discards: 60, reads: 20, ..WHOLE_BLOCKS });
    burst(&mut client, 100).expect("discards");
    rig.agent().expect("agent").drain().expect("drain");
    client.runner.verify().expect("verify");
    let now = disk(&rig).expect("status");
    assert_eq!(now["totals"]["fetched_bytes"].as_u64(), Some(before), "{now:#}");
    assert!(now["outlook"]["drain_eta_ms"] == 0, "drained: {now:#}");
    drop(client);
    rig.shut_down().expect("clean end");
}

#[test]
fn a_drill_is_an_outage_of_one_disk() {
    let (mut rig, mut client) = rig(&[]).expect("rig");
    client.runner.fill().expect("fill");
    rig.agent().expect("agent").drain().expect("drain");

    let report = std::thread::scope(|threads| -> Result<Value> {
        let agent = rig.agent()?;
        let drill = threads.spawn(|| agent.control(&["outage", "drill", DISK, "--time", "4s"]));
        let during = until(&rig, &mut client, "drilled", |now| !now["drill_until"].is_null())?;
        let committed = during["committed_lsn"].as_u64().context("LSN")?;
        client.runner.workload().set_mix(Mix { depth_max: 32, ..Mix::default() });
        let mut looked = 0;
        while !drill.is_finished() {
            burst(&mut client, 20)?;
            let now = disk(&rig)?;
            if !now["drill_until"].is_null() {
                // What was under way at the cut may have gone through; nothing else does.
                looked += 1;
                ensure!(now["committed_lsn"].as_u64() <= Some(committed + 100), "{now:#}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        ensure!(looked > 3, "seen {looked} times");
        drill.join().expect("the drill's thread")
    });
    let report = report.expect("drill");
    assert!(report["writes"].as_u64() > Some(0), "{report:#}");
    assert!(report["flushes"].as_u64() > Some(0), "{report:#}");
    assert_eq!(report["missed_bytes"], 0, "everything was held: {report:#}");
    assert!(report["dirty_bytes_max"].as_u64() > Some(0), "{report:#}");

    // By command: begun, seen, in the way of a detach, ended.
    let agent = rig.agent().expect("agent");
    agent.control(&["outage", "drill", DISK, "--time", "1h", "--no-wait"]).expect("begin");
    let text = agent.control(&["metrics"]).expect("metrics")["metrics"].to_string();
    assert!(text.lines().any(|line| line.contains("ballast_vdi_drill{")), "{text}");
    let status = agent.control(&["status"]).expect("status");
    assert!(status["degraded"][0].as_str().expect("words").contains("drill"), "{status:#}");
    let refused = agent.control(&["vdi", "detach", DISK, "--force"]).expect_err("detach");
    assert!(refused.to_string().contains("ballast outage end"), "{refused}");
    agent.control(&["outage", "end", DISK]).expect("end");
    let refused = agent.control(&["outage", "end", DISK]).expect_err("end again");
    assert!(refused.to_string().contains("no outage drill"), "{refused}");
    let refused = agent.control(&["outage", "drill", "nobody"]).expect_err("unknown disk");
    assert!(refused.to_string().contains("nobody"), "{refused}");

    agent.drain().expect("drain");
    let acknowledged = client.runner.oracle().acknowledged();
    client.runner.oracle().set_committed(acknowledged);
    client.runner.verify().expect("verify");
    client.check_store_image(&rig).expect("the store's image");
    drop(client);
    rig.shut_down().expect("clean end");
    rig.check_store().expect("a sound store");
}

/// A drill under way does not keep the agent from stopping, nor what was written from the store.
#[test]
fn an_agent_stops_amid_a_drill_and_has_forgotten_it() {
    let (mut rig, mut client) = rig(&[]).expect("rig");
    let agent = rig.agent().expect("agent");
    agent.control(&["outage", "drill", DISK, "--time", "1h", "--no-wait"]).expect("begin");
    client.runner.fill().expect("fill");
    rig.shut_down().expect("clean end");
    rig.start().expect("start");
    client.reconnect(&mut rig).expect("reconnect");
    assert!(disk(&rig).expect("status")["drill_until"].is_null());
    rig.agent().expect("agent").drain().expect("drain");
    client.runner.verify().expect("verify");
    drop(client);
    rig.shut_down().expect("clean end");
}

#[test]
fn metrics_are_served_on_the_loopback_device() {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|socket| socket.local_addr());
    let address = free.expect("a free port");
    let (mut rig, mut client) = rig(&["--metrics-listen", &address.to_string()]).expect("rig");
    burst(&mut client, 50).expect("load");
    let text = get(address, "/metrics").expect("scrape");
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    for part in [
        "application/openmetrics-text",
        "ballast_store_up 1.0",
        "ballast_vdi_writes_total{vdi=\"disk-1\"",
    ] {
        assert!(text.contains(part), "no '{part}' in\n{text}");
    }
    // Nothing can be controlled there.
    for path in ["/v1/status", "/v1/vdis", "/"] {
        let text = get(address, path).expect("answer");
        assert!(text.starts_with("HTTP/1.1 400"), "{text}");
    }
    drop(client);
    rig.shut_down().expect("clean end");
}

fn get(address: SocketAddr, path: &str) -> Result<String> {
    let mut socket = TcpStream::connect(address)?;
    write!(socket, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    socket.read_to_string(&mut text)?;
    Ok(text)
}
