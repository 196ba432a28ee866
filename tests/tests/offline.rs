//! Goal: what an operator prepares for an outage holds in one: a disk fails requests after a deadline or waits, as its policy
//! says, and only because of an outage.
//!
//! Method: a real agent on a real target behind a relay that falls silent, and single requests whose answers are looked at one by
//! one. Nothing is timed; waits have limits only so that a hang ends.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bench::front_end::Request;
use serde_json::Value;
use tempfile::TempDir;
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::client::SECTOR;
use tests::client::port::{BlockPort, Event};
use tests::client::ring_port::RingPort;
use tests::targets::{TcpRelay, TgtOptions, TgtTarget};

const MIB: u64 = 1 << 20;
const STORE_BYTES: u64 = 1024 * MIB;
/// Bytes of a request.
const CHUNK: usize = 64 << 10;
/// For what must come to an end, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(100);

/// A target behind a relay.
struct San {
    relay: TcpRelay,
    target: TgtTarget,
    _dir: TempDir,
}

impl San {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let target = TgtTarget::start(dir.path(), STORE_BYTES, TgtOptions::default())?;
        let relay = TcpRelay::start(target.address())?;
        Ok(Self { relay, target, _dir: dir })
    }

    fn rig(&self, cache_bytes: u64) -> Result<AgentRig> {
        let store = StoreSpec::url(self.target.url_through(self.relay.address()), STORE_BYTES);
        AgentRig::new(&store, cache_bytes)
    }

    fn cut(&self) {
        self.relay.refuse(true);
        self.relay.black_hole();
    }

    fn restore(&self) {
        self.relay.refuse(false);
    }
}

/// A disk, used one request at a time.
struct Disk(RingPort);

impl Disk {
    fn connect(rig: &mut AgentRig, socket: &Path) -> Result<Self> {
        Ok(Self(rig.connect(|| RingPort::connect(socket, 4, 4))?))
    }

    fn submit(&mut self, request: Request) -> Result<()> {
        self.0.submit(0, &request)?;
        self.0.kick()
    }

    fn answer(&mut self) -> Result<bool> {
        match self.0.next(PATIENCE)? {
            Event::Completed { ok, .. } => Ok(ok),
            other => anyhow::bail!("no answer: {other:?}"),
        }
    }

    /// Writes the chunk at `at` full of `byte`.
    fn write(&mut self, at: u64, byte: u8) -> Result<()> {
        self.0.buffer(0)[..CHUNK].fill(byte);
        self.submit(Request::Write { sector: at / SECTOR as u64, sectors: sectors() })?;
        ensure!(self.answer()?, "the write at {at} failed");
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.submit(Request::Flush)?;
        ensure!(self.answer()?, "the flush failed");
        Ok(())
    }

    fn begin_read(&mut self, at: u64) -> Result<()> {
        self.0.buffer(0)[..CHUNK].fill(0xee);
        self.submit(Request::Read { sector: at / SECTOR as u64, sectors: sectors() })
    }

    /// The byte that the chunk at `at` is full of; none if the read failed.
    fn end_read(&mut self, at: u64) -> Result<Option<u8>> {
        if !self.answer()? {
            return Ok(None);
        }
        let found = &self.0.buffer(0)[..CHUNK];
        let byte = found[0];
        ensure!(found.iter().all(|b| *b == byte), "the chunk at {at} is torn");
        Ok(Some(byte))
    }

    fn read(&mut self, at: u64) -> Result<Option<u8>> {
        self.begin_read(at)?;
        self.end_read(at)
    }
}

fn sectors() -> u32 {
    (CHUNK / SECTOR) as u32
}

fn control(rig: &AgentRig, line: &str) -> Result<Value> {
    rig.agent()?.control(&line.split(' ').collect::<Vec<_>>())
}

/// Asks for what `status` says of the only disk until `wanted` holds.
fn until(rig: &AgentRig, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let end = Instant::now() + PATIENCE;
    loop {
        let status = control(rig, "status")?;
        if wanted(&status) {
            return Ok(status);
        }
        ensure!(Instant::now() < end, "never {what}; the status is {status:#}\n{}", rig.log_tail());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The front end that has just gone may not be noticed yet.
fn detach(rig: &AgentRig) -> Result<()> {
    until(rig, "disconnected", |status| status["vdis"][0]["front_end_connected"] == false)?;
    control(rig, "vdi detach db").map(drop)
}

fn policy(rig: &AgentRig) -> Result<String> {
    let info = control(rig, "vdi info db")?;
    Ok(info["when_offline"].as_str().context("a policy")?.to_owned())
}

#[test]
fn a_disk_fails_or_waits_in_an_outage_as_its_policy_says() -> Result<()> {
    let san = San::new()?;
    let mut rig = san.rig(128 * MIB)?;
    rig.start()?;
    control(&rig, "vdi create db --size 64MiB --when-offline fail-after=2s")?;
    ensure!(policy(&rig)? == "fail-after=2s");
    let socket = rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    disk.write(32 * MIB, 32)?;
    disk.write(40 * MIB, 40)?;
    // Afterwards the store alone has these.
    drop(disk);
    detach(&rig)?;
    rig.agent()?.attach("db")?;
    let mut disk = Disk::connect(&mut rig, &socket)?;
    disk.write(0, 7)?;
    rig.agent()?.drain()?;
    ensure!(policy(&rig)? == "fail-after=2s", "the log starts with what the store notes");

    san.cut();
    // What needs no store goes on; the rest fails, but not before the store has been away for the deadline.
    ensure!(disk.read(32 * MIB)?.is_none(), "a read of what is not held locally");
    disk.write(MIB, 8)?;
    disk.flush()?;
    ensure!(disk.read(0)? == Some(7) && disk.read(MIB)? == Some(8));
    let status = control(&rig, "status")?;
    let totals = &status["vdis"][0]["totals"];
    ensure!(totals["failed_by_policy"] == 1 && totals["failed"] == 0, "{totals:#}");
    let degraded = status["degraded"].to_string();
    ensure!(degraded.contains("fail-after=2s"), "{degraded}");
    ensure!(control(&rig, "vdi set db --when-offline fail-after=1ms").is_err());

    // From now on it waits, and the change is kept by a host whose store is away.
    control(&rig, "vdi set db --when-offline stall")?;
    disk.begin_read(40 * MIB)?;
    until(&rig, "waiting", |status| status["vdis"][0]["waiting"]["reads"] != 0)?;
    std::thread::sleep(Duration::from_secs(5));
    ensure!(disk.0.next(Duration::ZERO)? == Event::TimedOut, "it should have waited");
    drop(disk);
    rig.kill()?;
    rig.start().context("start without the store")?;
    ensure!(policy(&rig)? == "stall", "a cold start knows the policy");
    let mut disk = Disk::connect(&mut rig, &socket)?;
    disk.begin_read(40 * MIB)?;
    until(&rig, "waiting", |status| status["vdis"][0]["waiting"]["reads"] != 0)?;
    control(&rig, "vdi set db --when-offline fail-after=1s")?;
    ensure!(disk.end_read(40 * MIB)?.is_none(), "it takes effect at once");
    control(&rig, "vdi set db --when-offline fail-after=600s")?;
    disk.begin_read(40 * MIB)?;
    until(&rig, "waiting", |status| status["vdis"][0]["waiting"]["reads"] != 0)?;
    san.restore();
    ensure!(disk.end_read(40 * MIB)? == Some(40), "the store was back before the deadline");
    ensure!(disk.read(MIB)? == Some(8));

    // The store's record follows.
    drop(disk);
    detach(&rig)?;
    ensure!(policy(&rig)? == "fail-after=600s");
    control(&rig, "vdi set db --when-offline fail-after=5s")?;
    ensure!(policy(&rig)? == "fail-after=5s");
    rig.agent()?.attach("db")?;
    ensure!(policy(&rig)? == "fail-after=5s");
    rig.shut_down()?;
    rig.check_store()
}
