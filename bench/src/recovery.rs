//! Time from the start of an agent, killed with its ring full, to the first read it serves, with the shared device away
//! all the while.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::agent::{Agent, AgentConfig};
use crate::ballast::{Ballast, DISK_NAME};
use crate::filling::fill;
use crate::front_end::{Disk, Options, Request};
use crate::san::FreezableSan;
use crate::server::Server;
use crate::suite::{CLIENT_CORE, SERVER_CORE, Settings};

/// One recovery.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Recovery {
    /// Size of the ring.
    pub ring_bytes: u64,
    /// Acknowledged random 4 KiB writes, none of them in the store, when the agent was killed.
    pub writes: u64,
    /// What the agent said was dirty.
    pub dirty_bytes: u64,
    /// From the start of the process until its socket accepts.
    pub connected: Duration,
    /// From the start of the process until the first read is answered.
    pub first_read: Duration,
    /// Most memory the recovered agent held by then.
    pub peak_bytes: u64,
    /// From each further kill until the first read is answered by the agent started right after it, the shortest first.
    pub pauses: Vec<Duration>,
}

/// Fills a ring of `settings.cache_bytes` with random 4 KiB writes while the shared device is frozen,
/// kills the agent, restarts it with the device still frozen, reads the last block written; and `kills` times more.
///
/// # Errors
/// When there is no agent to measure, it fails, or it returns something else than was written.
pub fn run(settings: &Settings, kills: usize) -> Result<Recovery> {
    let binary = settings.ballast.as_ref().context("no `ballast` binary to measure")?;
    let dir = tempfile::tempdir_in(&settings.dir).context("make a directory")?;
    let image = dir.path().join("lun.img");
    let store_bytes = settings.disk_bytes + settings.disk_bytes / 4 + (1 << 30);
    File::create(&image)
        .and_then(|file| file.set_len(store_bytes))
        .context("make the shared device")?;
    let san = FreezableSan::start(&image, store_bytes, dir.path(), CLIENT_CORE)?;
    let config = AgentConfig {
        binary: binary.clone(),
        store: san.url(),
        cache: dir.path().join("cache.img"),
        cache_bytes: settings.cache_bytes,
        dir: dir.path().to_owned(),
        arguments: settings.agent_arguments.clone(),
        environment: Vec::new(),
        core: Some(SERVER_CORE),
    };
    config.format_store(store_bytes)?;
    let mut ballast = Ballast::create(&config, settings.disk_bytes)?;
    let socket = ballast.socket().to_owned();

    san.freeze()?;
    let filled = fill(&socket, settings.disk_bytes, u64::MAX, &mut |_| {});
    let dirty = ballast.agent().info(DISK_NAME).map(|info| info.dirty_bytes);
    ballast.agent_mut().process_mut().kill()?;
    let (filled, dirty_bytes) = (filled?, dirty?);

    config.wait_for_release()?;

    // The device stays frozen: the local one must be enough.
    let start = Instant::now();
    let mut agent = Agent::spawn(&config)?;
    let mut disk = connect(&socket, start)?;
    let connected = start.elapsed();
    let read = Request::Read { sector: filled.last_sector, sectors: 8 };
    disk.execute(&read, Duration::from_secs(600))?;
    let first_read = start.elapsed();
    let peak_bytes = agent.process().memory("VmHWM")?;
    let mut pauses = Vec::new();
    for _ in 0..kills {
        let start = Instant::now();
        agent.process_mut().kill()?;
        config.wait_for_release()?;
        agent = Agent::spawn(&config)?;
        disk = connect(&socket, start)?;
        disk.execute(&read, Duration::from_secs(600))?;
        pauses.push(start.elapsed());
    }
    pauses.sort_unstable();
    drop(san);
    // A write that was in flight at the kill may have gone over it.
    let found = u64::from_le_bytes(disk.buffer(0)[..8].try_into().expect("eight bytes"));
    ensure!(
        found >= filled.last_stamp,
        "the last acknowledged write is missing: read {found:#x}, written {:#x}",
        filled.last_stamp
    );
    Ok(Recovery {
        ring_bytes: settings.cache_bytes,
        writes: filled.writes,
        dirty_bytes,
        connected,
        first_read,
        peak_bytes,
        pauses,
    })
}

/// Connects as soon as the restarted agent listens; the dead agent's socket file may still be there.
fn connect(socket: &Path, start: Instant) -> Result<Disk> {
    loop {
        match Disk::connect(socket, &Options::default()) {
            Ok(disk) => return Ok(disk),
            Err(error) if start.elapsed() > Duration::from_secs(600) => {
                return Err(error).context("the restarted agent does not serve its disk");
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
