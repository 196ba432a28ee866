//! Time from the start of an agent, killed with its ring full, to the first read it serves.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::agent::Agent;
use crate::ballast::{Ballast, DISK_NAME};
use crate::front_end::{Disk, Options, Request};
use crate::load::{Limit, Pattern, Workload};
use crate::server::{Server, measure};
use crate::suite::Settings;

/// One recovery.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Recovery {
    /// Size of the ring.
    pub ring_bytes: u64,
    /// Acknowledged and not committed when the agent was killed.
    pub dirty_bytes: u64,
    /// From the start of the process until its socket accepts.
    pub connected: Duration,
    /// From the start of the process until the first read is answered.
    pub first_read: Duration,
}

/// Fills a ring of `settings.cache_bytes` with random 4 KiB writes, kills, restarts, reads.
///
/// The flusher empties the ring meanwhile, so the fill that is reached is part of the result.
///
/// # Errors
/// When there is no agent to measure, or it fails.
pub fn run(settings: &Settings) -> Result<Recovery> {
    let binary = settings.ballast.as_ref().context("no `ballast` binary to measure")?;
    let dir = tempfile::tempdir_in(&settings.dir).context("make a directory")?;
    let config = settings.agent_config(binary, dir.path(), settings.cache_bytes)?;
    let mut ballast = Ballast::create(&config, settings.disk_bytes)?;
    let workload = Workload {
        pattern: Pattern::RandomWrite,
        block_bytes: 4096,
        depth: 32,
        span_bytes: settings.disk_bytes,
        paced_writes_per_second: 0,
        seed: 99,
    };
    let bytes = settings.cache_bytes + settings.cache_bytes / 4;
    let limit = Limit { time: Duration::from_secs(1800), bytes };
    measure(&ballast, &workload, limit, settings.poll)?;
    let dirty_bytes = ballast.agent().info(DISK_NAME)?.dirty_bytes;
    let socket = ballast.socket().to_owned();
    ballast.agent_mut().process_mut().kill()?;

    let start = Instant::now();
    let _agent = Agent::spawn(&config)?;
    let mut disk = connect(&socket, start)?;
    let connected = start.elapsed();
    disk.execute(&Request::Read { sector: 0, sectors: 8 }, Duration::from_secs(600))?;
    let first_read = start.elapsed();
    Ok(Recovery { ring_bytes: settings.cache_bytes, dirty_bytes, connected, first_read })
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
