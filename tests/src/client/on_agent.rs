//! A verifying client on a disk of an [`AgentRig`]: create, attach, connect, reconnect, compare.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::driver_port::DriverPort;
use super::oracle::{Cut, Oracle};
use super::port::BlockPort;
use super::ring_port::RingPort;
use super::runner::{RunOptions, Runner};
use super::stamp::Identity;
use super::workload::{Mix, Workload};
use super::{SECTOR, runner};
use crate::agent_rig::AgentRig;

/// Which front end drives the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrontEnd {
    /// The project's own.
    Own,
    /// The crate `virtio-driver`.
    VirtioDriver,
}

/// One disk and what is known of it.
#[derive(Debug)]
pub struct Client {
    /// The disk's name.
    pub name: String,
    /// The client at work.
    pub runner: Runner,
    socket: PathBuf,
    front_end: FrontEnd,
    slots: usize,
}

/// What to create.
#[derive(Debug, Clone)]
pub struct DiskSpec {
    /// Name and number of the disk within the run.
    pub disk: u64,
    /// Size.
    pub bytes: u64,
    /// Seed of the run.
    pub seed: u64,
    /// Requests.
    pub mix: Mix,
    /// Driver.
    pub front_end: FrontEnd,
    /// Switch the write cache now and then.
    pub switch_write_cache: bool,
}

impl Client {
    /// Creates and attaches the disk and connects to it.
    ///
    /// # Errors
    /// When the agent refuses a step.
    pub fn create(rig: &mut AgentRig, spec: &DiskSpec) -> Result<Self> {
        let name = format!("disk-{}", spec.disk);
        rig.agent()?.create(&name, spec.bytes)?;
        let socket = rig.agent()?.attach(&name)?;
        let sectors = spec.bytes / SECTOR as u64;
        let slots = spec.mix.depth_max;
        let port = connect(rig, &socket, spec.front_end, slots)?;
        let oracle = Oracle::new(Identity { seed: spec.seed, disk: spec.disk }, sectors, true);
        let stream = Workload::new(spec.seed ^ spec.disk << 48, spec.mix, sectors);
        let options = RunOptions { overlap: true, switch_write_cache: spec.switch_write_cache };
        let runner = Runner::new(port, oracle, stream, options)?;
        Ok(Self { name, runner, socket, front_end: spec.front_end, slots })
    }

    /// Connects again, to the same socket, after the agent was restarted.
    ///
    /// # Errors
    /// When the disk does not come back.
    pub fn reconnect(&mut self, rig: &mut AgentRig) -> Result<()> {
        self.runner
            .reconnect(|| connect(rig, &self.socket, self.front_end, self.slots))
            .with_context(|| format!("{} did not come back", self.name))
    }

    /// Judges what the store holds of the disk without the cache.
    ///
    /// # Errors
    /// When the image cannot be exported, or is not the disk at one moment since the last drain.
    pub fn check_store_image(&mut self, rig: &AgentRig) -> Result<Cut> {
        let path = rig.export(&self.name)?;
        let image = std::fs::read(&path).context("read the exported image")?;
        std::fs::remove_file(&path).context("remove the exported image")?;
        let expected = self.runner.oracle().sectors() * SECTOR as u64;
        anyhow::ensure!(
            image.len() as u64 == expected,
            "the exported image has {} bytes, the disk {expected}",
            image.len()
        );
        self.runner
            .oracle()
            .check_store(&image)
            .map_err(|found| runner::report(&format!("{} in the store", self.name), &found))
    }
}

fn connect(
    rig: &mut AgentRig,
    socket: &std::path::Path,
    front_end: FrontEnd,
    slots: usize,
) -> Result<Box<dyn BlockPort + Send>> {
    rig.connect(|| {
        Ok(match front_end {
            FrontEnd::Own => Box::new(RingPort::connect(socket, slots, 4)?) as Box<_>,
            FrontEnd::VirtioDriver => Box::new(DriverPort::connect(socket, slots)?) as Box<_>,
        })
    })
}

/// A seed from the environment variable `name`, else a fresh one.
#[must_use]
pub fn seed_from(name: &str) -> u64 {
    if let Some(seed) = std::env::var(name).ok().and_then(|text| text.parse().ok()) {
        return seed;
    }
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.subsec_nanos());
    u64::from(now) << 16 ^ u64::from(std::process::id())
}
