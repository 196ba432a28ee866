//! Random reads of a disk with many snapshots before it, beside chains of qcow2 overlays.
//!
//! Every block of the disk was written before the first snapshot, and a few random ones between any two: what a snapshot, or an
//! overlay, is normally like. Reads go to the store: the agent's cache is much smaller than the disk. Depths of one kind are
//! measured in turn, there and back, and each is compared with depth 0 of its own kind in the same round. One more disk had
//! as many snapshots as the deepest, all deleted since: its blocks lie as scattered as with them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::ballast::Ballast;
use crate::collecting::delete_snapshots_of;
use crate::compare::median;
use crate::load::{Limit, Pattern, Random, Workload};
use crate::peer::StorageDaemon;
use crate::server::{Server, measure};
use crate::stage::{NO_CYCLES, Stage};
use crate::suite::{SERVER_CORE, Settings, write_fully};
use crate::synthetic::{Content, Shape, WRITES_PER_SNAPSHOT, disk_name};

/// Snapshots of our disk.
pub const SNAPSHOTS: [u32; 5] = [0, 1, 32, 1000, 10_000];
/// Overlays of the peer's.
pub const OVERLAYS: [u32; 4] = [0, 1, 8, 32];
/// Reads in flight.
const DEPTH: usize = 32;
/// Largest disk: there is a file for each depth.
pub const DISK_BYTES_MAX: u64 = 1 << 30;
/// The agent's cache.
const CACHE_BYTES: u64 = 64 << 20;

/// What one depth showed.
#[derive(Debug, Clone)]
pub struct Depth {
    /// Who served it.
    pub server: &'static str,
    /// Snapshots, or overlays.
    pub depth: u32,
    /// The snapshots are deleted.
    pub deleted: bool,
    /// Reads in a second, per round.
    pub rounds: Vec<f64>,
}

impl Depth {
    /// Median of the rounds.
    #[must_use]
    pub fn median(&self) -> f64 {
        median(&self.rounds)
    }

    /// Median of the ratios to `other` in the same rounds.
    #[must_use]
    pub fn against(&self, other: &Self) -> f64 {
        let ratios = self.rounds.iter().zip(&other.rounds).map(|(own, other)| own / other);
        median(&ratios.collect::<Vec<_>>())
    }
}

/// Measures all depths of both.
///
/// # Errors
/// When there is no agent to measure, or a server fails.
pub fn run(settings: &Settings) -> Result<Vec<Depth>> {
    let disk_bytes = settings.disk_bytes.min(DISK_BYTES_MAX);
    let settings = Settings { disk_bytes, ..settings.clone() };
    let mut found = ours(&settings)?;
    found.extend(peers(&settings)?);
    Ok(found)
}

fn ours(settings: &Settings) -> Result<Vec<Depth>> {
    let (mut servers, mut stages): (Vec<Box<dyn Server>>, Vec<_>) = Default::default();
    let deepest = SNAPSHOTS.into_iter().max().unwrap_or(0);
    let depths: Vec<_> = SNAPSHOTS
        .map(|snapshots| (snapshots, false))
        .into_iter()
        .chain([(deepest, true)])
        .collect();
    for &(snapshots, deleted) in &depths {
        let used_bytes = settings.disk_bytes;
        let shape = Shape { used_bytes, snapshots, content: Content::Noise, ..Shape::default() };
        let stage = Stage::new(settings, &shape, CACHE_BYTES, Some(SERVER_CORE), &NO_CYCLES)?;
        if deleted {
            delete_snapshots_of(&mut stage.control()?, &disk_name(0))?;
        }
        let (agent, files) = stage.into_parts();
        servers.push(Box::new(Ballast::attach(agent, &disk_name(0))?));
        stages.push(files);
    }
    rounds(settings, &depths, &mut servers)
}

fn peers(settings: &Settings) -> Result<Vec<Depth>> {
    let dir = tempfile::tempdir_in(&settings.dir).context("make a directory")?;
    let mut images = vec![dir.path().join("base.qcow2")];
    let base = dir.path().join("base.raw");
    write_fully(&base, settings.disk_bytes, 1)?;
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2"], &[&base, &images[0]])?;
    std::fs::remove_file(&base).context("remove the raw image")?;
    let mut random = Random(0x000c_0135);
    for number in 1..=OVERLAYS.into_iter().max().unwrap_or(0) {
        let image = dir.path().join(format!("overlay-{number}.qcow2"));
        let below = images[images.len() - 1].display().to_string();
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &below], &[&image])?;
        let mut io = Command::new("qemu-io");
        for _ in 0..WRITES_PER_SNAPSHOT {
            let at = random.below(settings.disk_bytes / 4096) * 4096;
            io.args(["-c", &format!("write -q {at} 4096")]);
        }
        let output = io.arg(&image).output().context("start qemu-io")?;
        ensure!(output.status.success(), "qemu-io: {}", String::from_utf8_lossy(&output.stderr));
        images.push(image);
    }
    let mut servers: Vec<Box<dyn Server>> = Vec::new();
    for depth in OVERLAYS {
        let sockets = dir.path().join(depth.to_string());
        std::fs::create_dir(&sockets).context("make a directory")?;
        let chain = &images[..=depth as usize];
        servers.push(Box::new(StorageDaemon::start_chain(chain, &sockets, SERVER_CORE)?));
    }
    rounds(settings, &OVERLAYS.map(|overlays| (overlays, false)), &mut servers)
}

fn qemu_img(arguments: &[&str], images: &[&PathBuf]) -> Result<()> {
    let paths = images.iter().map(|path| path as &Path);
    let output =
        Command::new("qemu-img").args(arguments).args(paths).output().context("start qemu-img")?;
    ensure!(output.status.success(), "qemu-img: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn rounds(
    settings: &Settings,
    depths: &[(u32, bool)],
    servers: &mut [Box<dyn Server>],
) -> Result<Vec<Depth>> {
    let mut found: Vec<Depth> = depths
        .iter()
        .zip(&*servers)
        .map(|(&(depth, deleted), server)| Depth {
            server: server.name(),
            depth,
            deleted,
            rounds: Vec::new(),
        })
        .collect();
    // The first round warms up.
    for round in 0..=settings.rounds {
        let mut turns: Vec<_> = servers.iter_mut().zip(&mut found).collect();
        if round % 2 == 0 {
            turns.reverse();
        }
        for (server, found) in turns {
            let workload = Workload {
                pattern: Pattern::RandomRead,
                block_bytes: 4096,
                depth: DEPTH,
                span_bytes: settings.disk_bytes,
                paced_writes_per_second: 0,
                seed: 0x5eed_0000 + round as u64,
            };
            let limit = Limit { time: settings.burst, bytes: u64::MAX };
            let sample = measure(server.as_ref(), &workload, limit, settings.poll)?;
            if round > 0 {
                found.rounds.push(sample.measured.iops());
            }
            server.settle()?;
        }
    }
    Ok(found)
}
