//! Time from the start of an agent, killed with its ring full, to the first read it serves, with the shared device away
//! all the while.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::agent::{Agent, AgentConfig};
use crate::ballast::{Ballast, DISK_NAME};
use crate::front_end::{Disk, Options, Request, Status, Wake};
use crate::load::Random;
use crate::san::FreezableSan;
use crate::server::Server;
use crate::suite::{CLIENT_CORE, SERVER_CORE, Settings};

/// The ring counts as full when a write has waited this long.
const FULL_AFTER: Duration = Duration::from_secs(3);

/// One recovery.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
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
}

/// Fills a ring of `settings.cache_bytes` with random 4 KiB writes while the shared device is frozen,
/// kills the agent, restarts it with the device still frozen, reads the last block written.
///
/// # Errors
/// When there is no agent to measure, it fails, or it returns something else than was written.
pub fn run(settings: &Settings) -> Result<Recovery> {
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
    let filled = fill(&socket, settings.disk_bytes);
    let dirty = ballast.agent().info(DISK_NAME).map(|info| info.dirty_bytes);
    ballast.agent_mut().process_mut().kill()?;
    let (filled, dirty_bytes) = (filled?, dirty?);

    config.wait_for_release()?;

    // The device stays frozen: the local one must be enough.
    let start = Instant::now();
    let agent = Agent::spawn(&config)?;
    let mut disk = connect(&socket, start)?;
    let connected = start.elapsed();
    let read = Request::Read { sector: filled.last_sector, sectors: 8 };
    disk.execute(&read, Duration::from_secs(600))?;
    let first_read = start.elapsed();
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
        peak_bytes: agent.process().memory("VmHWM")?,
    })
}

struct Filled {
    writes: u64,
    last_sector: u64,
    last_stamp: u64,
}

/// Writes random blocks until one is not answered any more. Each starts with its own number.
fn fill(socket: &Path, disk_bytes: u64) -> Result<Filled> {
    let mut disk = Disk::connect(socket, &Options::default())?;
    let mut random = Random(0x0f11_5eed);
    let slots = disk.options().slots;
    let mut placed = vec![(0, 0); slots];
    let mut filled = Filled { writes: 0, last_sector: 0, last_stamp: 0 };
    let mut submitted: u64 = 0;
    for slot in 0..slots {
        random.fill(disk.buffer(slot));
    }
    let mut idle: Vec<usize> = (0..slots).collect();
    loop {
        for slot in idle.drain(..) {
            submitted += 1;
            let sector = random.below(disk_bytes / 4096) * 8;
            placed[slot] = (sector, submitted);
            disk.buffer(slot)[..8].copy_from_slice(&submitted.to_le_bytes());
            disk.submit(slot, &Request::Write { sector, sectors: 8 })?;
        }
        disk.kick()?;
        match disk.wait(FULL_AFTER)? {
            Wake::Completions => {}
            Wake::TimedOut => break,
            Wake::Disconnected => bail!("the agent died while its ring was filled"),
        }
        while let Some(done) = disk.take()? {
            ensure!(done.status == Status::Ok, "a write ended with {:?}", done.status);
            filled.writes += 1;
            let (sector, stamp) = placed[done.slot];
            if stamp > filled.last_stamp {
                (filled.last_sector, filled.last_stamp) = (sector, stamp);
            }
            idle.push(done.slot);
        }
    }
    Ok(filled)
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
