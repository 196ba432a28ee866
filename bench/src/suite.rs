//! The whole comparison: files, servers, phases.
//!
//! Order: limits of the file system; the rows that want a large ring, on a cache larger than the
//! disk; the rows that want a small one. Every file is written in full before anything is measured
//! on it, for a file's layout alone moves random writes by more than the differences looked for.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::agent::AgentConfig;
use crate::ballast::Ballast;
use crate::compare::{self, Line, Plan, Row};
use crate::fio;
use crate::load::{Limit, Pattern, Random, Workload};
use crate::peer::StorageDaemon;
use crate::server::{Server, measure};

/// Core of the server under test; the client and everything else of ours is on [`CLIENT_CORE`].
pub const SERVER_CORE: usize = 0;
/// Core of the client.
pub const CLIENT_CORE: usize = 1;

/// Sizes and times of a run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where files are made; on the file system to measure.
    pub dir: PathBuf,
    /// Where the image behind an iSCSI target is made: on another device than the cache, if there is one.
    pub san_dir: PathBuf,
    /// The `ballast` binary; `None` measures the peer alone.
    pub ballast: Option<PathBuf>,
    /// Bytes of the disk.
    pub disk_bytes: u64,
    /// Bytes of the cache for burst and read rows; more than the disk.
    pub cache_bytes: u64,
    /// Bytes of the cache for sustained write rows; much less than is written.
    pub ring_bytes: u64,
    /// Rounds per row.
    pub rounds: usize,
    /// Time of one burst measurement.
    pub burst: Duration,
    /// Time of one sustained measurement.
    pub sustained: Duration,
    /// Only rows whose title holds this.
    pub filter: Option<String>,
    /// Whether the client polls.
    pub poll: bool,
    /// More arguments for the agent.
    pub agent_arguments: Vec<String>,
}

impl Settings {
    fn plan(&self) -> Plan {
        Plan {
            rounds: self.rounds,
            burst: self.burst,
            burst_bytes: self.cache_bytes / 4,
            sustained: self.sustained,
            fill_bytes: self.ring_bytes + self.ring_bytes / 4,
            disk_bytes: self.disk_bytes,
            poll: self.poll,
        }
    }

    /// An agent on fresh files in `dir`: the store a fully written file of three disks' size.
    ///
    /// # Errors
    /// When a file cannot be made or the store not be formatted.
    pub fn agent_config(&self, binary: &Path, dir: &Path, cache_bytes: u64) -> Result<AgentConfig> {
        let store = dir.join("store.img");
        let store_bytes = 3 * self.disk_bytes + (512 << 20);
        write_fully(&store, store_bytes, 0)?;
        let config = AgentConfig {
            binary: binary.to_owned(),
            store: format!("file:{}", store.display()),
            cache: dir.join("cache.img"),
            cache_bytes,
            dir: dir.to_owned(),
            arguments: self.agent_arguments.clone(),
            environment: Vec::new(),
            core: Some(SERVER_CORE),
        };
        config.format_store(store_bytes)?;
        Ok(config)
    }

    fn wants(&self, row: &Row) -> bool {
        let title = format!("{} {:?} {}", row.title, row.mode, row.depth).to_lowercase();
        self.filter.as_ref().is_none_or(|filter| title.contains(&filter.to_lowercase()))
    }
}

/// Measures the file system by fio.
///
/// # Errors
/// When fio fails.
pub fn limits(settings: &Settings) -> Result<Vec<fio::Limit>> {
    let dir = tempfile::tempdir_in(&settings.dir).context("make a directory")?;
    let file = dir.path().join("limit.raw");
    write_fully(&file, settings.disk_bytes, 1)?;
    fio::measure(&file, settings.disk_bytes, SERVER_CORE, settings.burst)
}

/// Runs every row on Ballast and the peer.
///
/// # Errors
/// When a server fails; nothing is left running.
pub fn compare(settings: &Settings, progress: &mut dyn FnMut(&Line)) -> Result<Vec<Line>> {
    let dir = tempfile::tempdir_in(&settings.dir).context("make a directory")?;
    let raw = dir.path().join("peer.raw");
    write_fully(&raw, settings.disk_bytes, 1)?;

    let mut lines = Vec::new();
    for small_ring in [false, true] {
        let rows: Vec<Row> = compare::rows()
            .into_iter()
            .filter(|row| row.needs_small_ring() == small_ring && settings.wants(row))
            .collect();
        if rows.is_empty() {
            continue;
        }
        let mut servers: Vec<Box<dyn Server>> = Vec::new();
        let ours = tempfile::tempdir_in(dir.path()).context("make a directory")?;
        if let Some(binary) = &settings.ballast {
            let bytes = if small_ring { settings.ring_bytes } else { settings.cache_bytes };
            let config = settings.agent_config(binary, ours.path(), bytes)?;
            let mut ballast = Ballast::create(&config, settings.disk_bytes)?;
            fill(&mut ballast, settings.disk_bytes, bytes)?;
            servers.push(Box::new(ballast));
        }
        servers.push(Box::new(StorageDaemon::start(&raw, dir.path(), SERVER_CORE)?));
        for row in &rows {
            let found = compare::run_row(row, &mut servers, &settings.plan())?;
            found.iter().for_each(&mut *progress);
            lines.extend(found);
        }
    }
    Ok(lines)
}

/// Writes the whole disk in order, as often as it takes to write the whole cache device too, and
/// drains.
///
/// # Errors
/// When the server fails.
pub fn fill(server: &mut dyn Server, disk_bytes: u64, cache_bytes: u64) -> Result<()> {
    let passes = 1 + cache_bytes / disk_bytes;
    for pass in 0..passes {
        let workload = Workload {
            pattern: Pattern::SequentialWrite,
            block_bytes: 128 << 10,
            depth: 8,
            span_bytes: disk_bytes,
            paced_writes_per_second: 0,
            seed: pass + 1,
        };
        let limit = Limit { time: Duration::from_secs(1800), bytes: disk_bytes };
        measure(server, &workload, limit, false)?;
        server.settle()?;
    }
    Ok(())
}

/// Makes a file of `bytes` with every byte written: zeros for seed 0, else noise.
///
/// # Errors
/// When the file system is full or the like.
pub fn write_fully(path: &Path, bytes: u64, seed: u64) -> Result<()> {
    let context = || format!("write {} in full ({bytes} bytes)", path.display());
    let mut file = File::create(path).with_context(context)?;
    let mut chunk = vec![0u8; 4 << 20];
    let mut random = Random(seed);
    let mut left = bytes;
    while left > 0 {
        let len = left.min(chunk.len() as u64) as usize;
        if seed != 0 {
            random.fill(&mut chunk[..len]);
        }
        file.write_all(&chunk[..len]).with_context(context)?;
        left -= len as u64;
    }
    file.sync_all().with_context(context)
}
