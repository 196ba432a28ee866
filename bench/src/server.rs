//! What the comparison needs of a program under test.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use crate::front_end::{Disk, Options};
use crate::load::{self, Limit, Measured, Workload};
use crate::process::Process;

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
}

impl Sample {
    /// CPU seconds of the server per million operations.
    #[must_use]
    pub fn cpu_seconds_per_million(&self) -> f64 {
        self.server_cpu.as_secs_f64() * 1e6 / self.measured.operations.max(1) as f64
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
    let before = server.process().cpu()?;
    let measured = load::run(&mut disk, workload, limit)?;
    let server_cpu = server.process().cpu()?.saturating_sub(before);
    disk.stop()?;
    Ok(Sample { measured, server_cpu })
}
