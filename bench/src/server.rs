//! What the comparison needs of a program under test.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use crate::front_end::{Disk, Options};
use crate::load::{self, Limit, Measured, Workload};
use crate::process::{Process, machine_cpu, own_cpu};

/// A running vhost-user-blk server with one disk.
pub trait Server {
    /// Name in tables.
    fn name(&self) -> &'static str;

    /// Its vhost-user socket.
    fn socket(&self) -> &Path;

    /// The process that serves it.
    fn process(&self) -> &Process;

    /// Returns when nothing is left to do in the background for what was written so far.
    ///
    /// # Errors
    /// When the server cannot be asked.
    fn settle(&mut self) -> Result<()>;
}

/// One measurement: the client's figures and the server's CPU time meanwhile.
#[derive(Debug, Clone)]
pub struct Sample {
    /// What the client counted.
    pub measured: Measured,
    /// CPU time of the server's threads during the run.
    pub server_cpu: Duration,
    /// CPU time that neither the server nor the client used meanwhile: interrupts, and other work on
    /// the machine, which spoils figures.
    pub other_cpu: Duration,
}

impl Sample {
    /// CPU seconds of the server per million operations.
    #[must_use]
    pub fn cpu_seconds_per_million(&self) -> f64 {
        self.server_cpu.as_secs_f64() * 1e6 / self.measured.operations.max(1) as f64
    }

    /// Share of one core that went to others, in percent.
    #[must_use]
    pub fn other_percent(&self) -> f64 {
        100.0 * self.other_cpu.as_secs_f64() / self.measured.time.as_secs_f64()
    }
}

/// Runs `workload` on `server` over a fresh connection.
///
/// # Errors
/// When the connection or a request fails.
pub fn measure(
    server: &dyn Server,
    workload: &Workload,
    limit: Limit,
    poll: bool,
) -> Result<Sample> {
    let options = Options {
        slots: workload.depth + 1,
        slot_bytes: workload.block_bytes.max(4096) as usize,
        poll,
        ..Options::default()
    };
    let mut disk = Disk::connect(server.socket(), &options)?;
    let (server_before, own_before) = (server.process().cpu()?, own_cpu()?);
    let machine_before = machine_cpu()?;
    let measured = load::run(&mut disk, workload, limit)?;
    let server_cpu = server.process().cpu()?.saturating_sub(server_before);
    let own = own_cpu()?.saturating_sub(own_before);
    let other_cpu = machine_cpu()?.saturating_sub(machine_before + server_cpu + own);
    disk.stop()?;
    Ok(Sample { measured, server_cpu, other_cpu })
}
