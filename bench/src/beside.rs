//! A guest beside garbage collection at its default limit: the same load with and without a cycle under way, in turn.
//!
//! The store is synthetic and large, so that a cycle lasts as long as a round; the guest's disk is an ordinary one in it.
//! How many rounds were over before their cycle is told with the figures.

use std::time::Duration;

use anyhow::Result;
use serde_json::Value;

use crate::ballast::{Ballast, DISK_NAME};
use crate::compare::median;
use crate::load::{Limit, Pattern, Workload};
use crate::server::{Sample, Server, measure};
use crate::stage::{NO_CYCLES, Stage};
use crate::suite::{SERVER_CORE, Settings, fill};
use crate::synthetic::Shape;

/// Patience with a cycle.
const LOOK: Duration = Duration::from_millis(50);

/// One load.
#[derive(Debug, Clone)]
pub struct Beside {
    /// What the guest did.
    pub title: &'static str,
    /// Operations in a second, per round, without and with a cycle.
    pub iops: (Vec<f64>, Vec<f64>),
    /// 99 of 100 operations took no longer, in microseconds, per round.
    pub p99_us: (Vec<f64>, Vec<f64>),
    /// Rounds that were over before their cycle was, of all.
    pub covered: usize,
}

impl Beside {
    /// Throughput with a cycle over that without.
    #[must_use]
    pub fn throughput(&self) -> f64 {
        median(&self.iops.1) / median(&self.iops.0)
    }

    /// The same for the 99th percentile.
    #[must_use]
    pub fn p99(&self) -> f64 {
        median(&self.p99_us.1) / median(&self.p99_us.0)
    }
}

/// Measures every load on a store with `used_bytes` of other disks.
///
/// # Errors
/// When there is no agent to measure, or it fails.
pub fn run(settings: &Settings, used_bytes: u64) -> Result<Vec<Beside>> {
    let shape = Shape { used_bytes, room_bytes: 4 * settings.disk_bytes, ..Shape::default() };
    let stage = Stage::new(settings, &shape, settings.cache_bytes, Some(SERVER_CORE), &NO_CYCLES)?;
    let mut control = stage.control()?;
    let (agent, _files) = stage.into_parts();
    agent.create(DISK_NAME, settings.disk_bytes)?;
    let mut ballast = Ballast::attach(agent, DISK_NAME)?;
    fill(&mut ballast, settings.disk_bytes, settings.cache_bytes)?;
    let loads = [
        ("4k random write, depth 32", Pattern::RandomWrite, 32),
        ("4k random write + flush, depth 1", Pattern::RandomWriteFlush, 1),
        ("4k random read, cached, depth 32", Pattern::RandomRead, 32),
    ];
    let mut found = Vec::new();
    for (title, pattern, depth) in loads {
        let empty = || (Vec::new(), Vec::new());
        let mut beside = Beside { title, iops: empty(), p99_us: empty(), covered: 0 };
        for round in 0..settings.rounds {
            let workload = Workload {
                pattern,
                block_bytes: 4096,
                depth,
                span_bytes: settings.disk_bytes,
                paced_writes_per_second: 0,
                seed: 0x5eed_0000 + round as u64,
            };
            // So much is written in a round that the ring has room for it.
            let bytes = if pattern.writes() { settings.cache_bytes / 4 } else { u64::MAX };
            let limit = Limit { time: settings.burst, bytes };
            for collecting in [false, true] {
                if collecting {
                    control.post("/v1/gc", &Value::Null)?;
                }
                let sample = measure(&ballast, &workload, limit, settings.poll)?;
                if collecting && !control.get("/v1/gc")?["running"].is_null() {
                    beside.covered += 1;
                }
                beside.note(&sample, collecting);
                ballast.settle()?;
                while !control.get("/v1/gc")?["running"].is_null() {
                    std::thread::sleep(LOOK);
                }
                ballast.settle()?;
            }
        }
        found.push(beside);
    }
    Ok(found)
}

impl Beside {
    fn note(&mut self, sample: &Sample, collecting: bool) {
        let p99 = sample.measured.latency.value_at_quantile(0.99) as f64 / 1e3;
        let iops = sample.measured.iops();
        if collecting {
            self.iops.1.push(iops);
            self.p99_us.1.push(p99);
        } else {
            self.iops.0.push(iops);
            self.p99_us.0.push(p99);
        }
    }
}
