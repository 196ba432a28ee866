//! What garbage collection costs: cycles of an agent over synthetic stores of many sizes, disks and snapshots.
//!
//! Per store: an agent with no limit of its own is started on it and told to collect once; then the metadata that it had to
//! read is read once more, in the order of the file, as fast as the device gives it: that is the rate to compare with. At
//! last all snapshots are deleted, and another cycle gives back what they held.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blockstore::buf::AlignedBuf;
use serde_json::{Value, json};

use crate::agent::Agent;
use crate::control::Control;
use crate::stage::{NO_CYCLES, NO_LIMIT, Stage};
use crate::suite::Settings;
use crate::synthetic::{Shape, disk_name};

/// Cache of the agent; nothing is written through it.
const CACHE_BYTES: u64 = 64 << 20;
/// How often a cycle is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// Reads of the device at its own rate: bytes of each, and how many at once.
const READ_BYTES: usize = 1 << 20;
const READERS: usize = 8;
/// Snapshots deleted by one request.
const DELETE_AT_ONCE: usize = 250;

/// A cycle.
#[derive(Debug, Clone, Copy)]
pub struct Cycle {
    /// From its beginning to its end.
    pub took: Duration,
    /// Of that, the time after everything was marked.
    pub sweeping: Duration,
    /// Nodes read.
    pub nodes: u64,
    /// Bytes in use.
    pub reachable_bytes: u64,
    /// Bytes given back.
    pub reclaimed_bytes: u64,
    /// Resident memory of the agent at most, and before the cycle.
    pub peak_bytes: u64,
    /// The same before it.
    pub idle_bytes: u64,
}

impl Cycle {
    /// Bytes of nodes read in a second, the time of sweeping counted.
    #[must_use]
    pub fn metadata_rate(&self) -> f64 {
        (self.nodes * 4096) as f64 / self.took.as_secs_f64()
    }
}

/// What one store showed.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    /// What it holds.
    pub shape: Shape,
    /// Bytes that the file takes: metadata.
    pub file_bytes: u64,
    /// From the agent's start until it answers and has the store open.
    pub started: Duration,
    /// The first cycle: all is in use.
    pub full: Cycle,
    /// After the deletion of all snapshots, if there were any.
    pub deleted: Option<Cycle>,
    /// Bytes in a second that the device gives for the same metadata, read in order.
    pub device_rate: f64,
}

impl Found {
    /// GiB in use that are collected in a second.
    #[must_use]
    pub fn gib_per_second(&self) -> f64 {
        self.shape.used_bytes as f64 / f64::from(1 << 30) / self.full.took.as_secs_f64()
    }

    /// Share of the device's rate.
    #[must_use]
    pub fn share(&self) -> f64 {
        self.full.metadata_rate() / self.device_rate
    }
}

/// Measures one store, and removes it.
///
/// # Errors
/// When there is no agent to measure, it fails, or the file system has no room for the metadata.
pub fn run(settings: &Settings, shape: Shape) -> Result<Found> {
    let arguments = [&NO_CYCLES[..], &NO_LIMIT].concat();
    let stage = Stage::new(settings, &shape, CACHE_BYTES, None, &arguments)?;
    let (agent, mut control) = (&stage.agent, stage.control()?);
    let full = collect(agent, &mut control)?;
    let (file_bytes, device_rate) = read_in_order(&stage.image)?;
    let deleted = match shape.snapshots {
        0 => None,
        _ => {
            delete_snapshots(&mut control, &shape)?;
            Some(collect(agent, &mut control)?)
        }
    };
    let started = stage.started;
    Ok(Found { shape, file_bytes, started, full, deleted, device_rate })
}

/// Runs one cycle.
///
/// # Errors
/// When it comes to nothing.
pub fn collect(agent: &Agent, control: &mut Control) -> Result<Cycle> {
    let process = agent.process();
    let idle_bytes = process.memory("VmRSS")?;
    // 5: the peak begins anew.
    std::fs::write(format!("/proc/{}/clear_refs", process.pid()), "5").context("reset the peak")?;
    let status = control.post("/v1/gc", &Value::Null)?;
    let id = number(&status["running"], "id")?;
    let (begun, mut swept_from) = (Instant::now(), None);
    let ended = loop {
        let status = control.get("/v1/gc")?;
        if status["running"]["id"] != json!(id) {
            break status["last"].clone();
        }
        if status["running"]["phase"] == json!("sweeping") {
            swept_from.get_or_insert(begun.elapsed());
        }
        std::thread::sleep(LOOK);
    };
    ensure!(ended["failure"].is_null(), "the cycle came to nothing: {}", ended["failure"]);
    let took = Duration::from_millis(number(&ended, "took")?);
    Ok(Cycle {
        took,
        sweeping: took.saturating_sub(swept_from.unwrap_or(took)),
        nodes: number(&ended, "nodes")?,
        reachable_bytes: number(&ended, "reachable")?,
        reclaimed_bytes: number(&ended, "reclaimed_data")? + number(&ended, "reclaimed_metadata")?,
        peak_bytes: process.memory("VmHWM")?,
        idle_bytes,
    })
}

fn number(of: &Value, name: &str) -> Result<u64> {
    of[name].as_u64().with_context(|| format!("no '{name}' in {of}"))
}

fn delete_snapshots(control: &mut Control, shape: &Shape) -> Result<()> {
    (0..shape.disks).try_for_each(|number| delete_snapshots_of(control, &disk_name(number)))
}

/// Deletes all snapshots of a disk.
///
/// # Errors
/// When the agent refuses.
pub fn delete_snapshots_of(control: &mut Control, disk: &str) -> Result<()> {
    loop {
        let page = json!({ "oldest_first": true, "limit": DELETE_AT_ONCE });
        let list = control.post(&format!("/v1/vdis/{disk}/snapshots/list"), &page)?;
        let listed = list["snapshots"].as_array().context("a list of snapshots")?;
        let lsns: Vec<String> = listed.iter().map(|found| found["lsn"].to_string()).collect();
        if lsns.is_empty() {
            return Ok(());
        }
        let wanted = json!({ "snapshots": lsns });
        control.post(&format!("/v1/vdis/{disk}/snapshots/delete"), &wanted)?;
    }
}

/// Reads all of a sparse file that is no hole, past the page cache, several large reads at once: bytes, and bytes in a
/// second.
///
/// # Errors
/// When it cannot be read.
pub fn read_in_order(path: &Path) -> Result<(u64, f64)> {
    let context = || format!("read {} in order", path.display());
    let file =
        File::options().read(true).custom_flags(libc::O_DIRECT).open(path).with_context(context)?;
    let pieces = pieces(&file).with_context(context)?;
    let (next, bytes, failure) = (AtomicU64::new(0), AtomicU64::new(0), Mutex::new(None));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..READERS {
            scope.spawn(|| {
                let mut buffer = AlignedBuf::zeroed(READ_BYTES);
                while let Some(&(offset, len)) =
                    pieces.get(next.fetch_add(1, Ordering::Relaxed) as usize)
                {
                    match file.read_exact_at(&mut buffer[..len], offset) {
                        Ok(()) => bytes.fetch_add(len as u64, Ordering::Relaxed),
                        Err(error) => {
                            *failure.lock().unwrap_or_else(|e| e.into_inner()) = Some(error);
                            return;
                        }
                    };
                }
            });
        }
    });
    if let Some(error) = failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        return Err(error).with_context(context);
    }
    let bytes = bytes.into_inner();
    Ok((bytes, bytes as f64 / begun.elapsed().as_secs_f64()))
}

/// What is no hole, in pieces of at most [`READ_BYTES`].
fn pieces(file: &File) -> Result<Vec<(u64, usize)>> {
    let seek = |from: u64, whence| -> Result<Option<u64>> {
        // SAFETY: moves the file's position, which nothing here uses.
        match unsafe { libc::lseek(file.as_raw_fd(), from as libc::off_t, whence) } {
            -1 => match std::io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                error => Err(error).context("look for holes"),
            },
            found => Ok(Some(found as u64)),
        }
    };
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(start) = seek(at, libc::SEEK_DATA)? {
        let end = seek(start, libc::SEEK_HOLE)?.context("a file without an end")?;
        let mut from = start;
        while from < end {
            let len = (end - from).min(READ_BYTES as u64);
            found.push((from, len as usize));
            from += len;
        }
        at = end;
    }
    Ok(found)
}
