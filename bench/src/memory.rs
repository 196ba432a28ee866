//! Memory of the agent per GiB of cache that holds random 4 KiB blocks: the worst case for an index,
//! for no two blocks are neighbours in the log and on the disk.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::ballast::{Ballast, DISK_NAME};
use crate::load::{Limit, Pattern, Workload};
use crate::server::{Server, measure};
use crate::suite::Settings;

/// One reading.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Reading {
    /// Bytes in the cache that are not in the store.
    pub dirty_bytes: u64,
    /// Bytes in the cache that are in the store too.
    pub clean_bytes: u64,
    /// Private memory of the agent (`RssAnon`).
    pub anonymous_bytes: u64,
    /// Most memory it ever held (`VmHWM`), shared memory of the guest included.
    pub peak_bytes: u64,
}

/// What the agent held idle, and after each step of filling.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Memory {
    /// With the disk attached and nothing written.
    pub idle: Reading,
    /// After each quarter of the cache's size, written at random.
    pub filled: Vec<Reading>,
}

/// Memory that the agent may hold whatever it caches.
const FIXED_MAX_BYTES: u64 = 64 << 20;

/// Memory per GiB of dirty and clean data that it may hold on top.
const PER_GIB_MAX_BYTES: u64 = 3 << 20;

/// Size of each of the agent's two configurable caches in this measurement.
const CONFIGURED_MIB: [(&str, u64); 2] = [("--node-memory", 32), ("--segment-memory", 64)];

impl Memory {
    /// Whether the agent stayed within its promise at every reading.
    #[must_use]
    pub fn is_within_limits(&self) -> bool {
        self.filled.iter().all(|reading| reading.anonymous_bytes <= reading.allowed_bytes())
    }
}

impl Reading {
    /// Bytes held by the cache.
    #[must_use]
    pub fn cached(&self) -> u64 {
        self.dirty_bytes + self.clean_bytes
    }

    /// Private memory that is promised not to be exceeded: a fixed part, the configured caches, and
    /// what the index may take for the data held.
    #[must_use]
    pub fn allowed_bytes(&self) -> u64 {
        let configured = CONFIGURED_MIB.iter().map(|(_, mib)| mib << 20).sum::<u64>();
        let index = (u128::from(self.cached()) * u128::from(PER_GIB_MAX_BYTES)) >> 30;
        FIXED_MAX_BYTES + configured + index as u64
    }
}

/// Fills a cache of `settings.cache_bytes` with random blocks and reads the agent's memory.
///
/// # Errors
/// When there is no agent to measure, or it fails.
pub fn run(settings: &Settings) -> Result<Memory> {
    let binary = settings.ballast.as_ref().context("no `ballast` binary to measure")?;
    let dir = tempfile::tempdir_in(&settings.dir).context("make a directory")?;
    let mut config = settings.agent_config(binary, dir.path(), settings.cache_bytes)?;
    for (flag, mib) in CONFIGURED_MIB {
        config.arguments.extend([flag.to_owned(), format!("{mib}MiB")]);
    }
    let ballast = Ballast::create(&config, settings.disk_bytes)?;
    let idle = read(&ballast)?;
    let mut filled = Vec::new();
    for step in 0..4 {
        let workload = Workload {
            pattern: Pattern::RandomWrite,
            block_bytes: 4096,
            depth: 32,
            span_bytes: settings.disk_bytes,
            paced_writes_per_second: 0,
            seed: 77 + step,
        };
        let limit =
            Limit { time: Duration::from_secs(1800), bytes: settings.cache_bytes.div_ceil(4) };
        measure(&ballast, &workload, limit, settings.poll)?;
        filled.push(read(&ballast)?);
    }
    Ok(Memory { idle, filled })
}

fn read(ballast: &Ballast) -> Result<Reading> {
    let (dirty_bytes, clean_bytes, _) = ballast.agent().cache_bytes()?;
    let process = ballast.process();
    Ok(Reading {
        dirty_bytes: dirty_bytes.max(ballast.agent().info(DISK_NAME)?.dirty_bytes),
        clean_bytes,
        anonymous_bytes: process.memory("RssAnon")?,
        peak_bytes: process.memory("VmHWM")?,
    })
}
