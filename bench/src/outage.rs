//! What an outage of the shared device costs a guest: latency of its writes with the device there, frozen, and back, and
//! how much the ring takes before writers are slowed.
//!
//! The load is one client that writes random 4 KiB blocks, one at a time, as fast as they are answered; only to fill the
//! ring it keeps many in flight. The device returns twice: to a ring that is full, where writers wait for room whatever the
//! drain does, and to one that is half dirty.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::agent::{Agent, AgentConfig};
use crate::ballast::Ballast;
use crate::filling::fill as fill_ring;
use crate::front_end::{Disk, Options};
use crate::load::{self, Limit, Pattern, Workload};
use crate::san::FreezableSan;
use crate::server::Server;
use crate::suite::{CLIENT_CORE, SERVER_CORE, Settings, fill};

/// How long one look at the speed of writers takes.
const SLICE: Duration = Duration::from_millis(250);
/// The drain is over, for this measurement, when less than this share of the ring is dirty.
const DRAINED: f64 = 0.1;
/// Patience with the drain.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(600);

/// Each call writes elsewhere than the one before.
static NEXT_SEED: AtomicU64 = AtomicU64::new(0x0bad_5eed);

/// Latency of writes.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Latency {
    /// How many were measured.
    pub writes: u64,
    /// Half of them took no longer.
    pub p50: Duration,
    /// 99 of 100 took no longer.
    pub p99: Duration,
    /// None took longer.
    pub max: Duration,
}

/// One outage.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Outage {
    /// Bytes of the ring for records.
    pub ring_bytes: u64,
    /// With the device there.
    pub present: Latency,
    /// With the device frozen, and room in the ring.
    pub away: Latency,
    /// Bytes of log that the ring held, none of them in the store, when writers were slowed.
    pub absorbed_bytes: u64,
    /// The same when nothing was answered any more.
    pub full_bytes: u64,
    /// The device returned to a full ring.
    pub from_full: Return,
    /// It returned to a ring of which half was dirty.
    pub from_half: Return,
}

/// One return of the device.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Return {
    /// Until the ring was nearly drained.
    pub writes: Latency,
    /// From the device's return until the store answered.
    pub answered: Duration,
    /// From the device's return until the ring was nearly drained.
    pub drained: Duration,
}

/// Takes the device away from a busy guest and gives it back.
///
/// # Errors
/// When there is no agent to measure, it fails, or a write fails.
pub fn run(settings: &Settings) -> Result<Outage> {
    let binary = settings.ballast.as_ref().context("no `ballast` binary to measure")?;
    let dir = tempfile::tempdir_in(&settings.dir).context("make a directory")?;
    let san_dir = tempfile::tempdir_in(&settings.san_dir).context("make a directory")?;
    let image = san_dir.path().join("lun.img");
    let store_bytes = 3 * settings.disk_bytes + (1 << 30);
    File::create(&image)
        .and_then(|file| file.set_len(store_bytes))
        .context("make the shared device")?;
    let san = FreezableSan::start(&image, store_bytes, dir.path(), CLIENT_CORE)?;
    let config = AgentConfig {
        binary: binary.clone(),
        store: san.url(),
        cache: dir.path().join("cache.img"),
        cache_bytes: settings.ring_bytes,
        dir: dir.path().to_owned(),
        arguments: settings.agent_arguments.clone(),
        environment: Vec::new(),
        core: Some(SERVER_CORE),
    };
    config.format_store(store_bytes)?;
    let mut ballast = Ballast::create(&config, settings.disk_bytes)?;
    fill(&mut ballast, settings.disk_bytes, settings.ring_bytes)?;

    let mut disk = Disk::connect(ballast.socket(), &Options::default())?;
    let present = one_at_a_time(&mut disk, settings, settings.sustained)?;
    ballast.settle()?;
    san.freeze()?;
    let away = one_at_a_time(&mut disk, settings, settings.burst)?;
    let (held, _, _) = ballast.agent().cache_bytes()?;
    drop(disk);
    let (mut answers, start) = (Vec::new(), Instant::now());
    fill_ring(ballast.socket(), settings.disk_bytes, u64::MAX, &mut |_| {
        let slice = (start.elapsed().as_millis() / SLICE.as_millis()) as usize;
        answers.resize(answers.len().max(slice + 1), 0);
        answers[slice] += 1;
    })?;
    let (full, _, ring_bytes) = ballast.agent().cache_bytes()?;
    let filled = full - held;

    let from_full = device_returns(&san, &ballast, settings, ring_bytes)?;

    ballast.settle()?;
    san.freeze()?;
    fill_ring(ballast.socket(), settings.disk_bytes, ring_bytes / 2 / 4096, &mut |_| {})?;
    let from_half = device_returns(&san, &ballast, settings, ring_bytes)?;
    Ok(Outage {
        ring_bytes,
        present,
        away,
        absorbed_bytes: held + (filled as f64 * share_before_slowing(&answers)) as u64,
        full_bytes: full,
        from_full,
        from_half,
    })
}

fn device_returns(
    san: &FreezableSan,
    ballast: &Ballast,
    settings: &Settings,
    ring_bytes: u64,
) -> Result<Return> {
    let mut disk = Disk::connect(ballast.socket(), &Options::default())?;
    san.thaw()?;
    let back = Instant::now();
    let mut answered = None;
    let mut times = histogram()?;
    loop {
        times.add(write(&mut disk, settings, SLICE)?.latency).context("add up latencies")?;
        if answered.is_none() && is_reachable(ballast.agent())? {
            answered = Some(back.elapsed());
        }
        let (dirty, ..) = ballast.agent().cache_bytes()?;
        if (dirty as f64) < DRAINED * ring_bytes as f64 {
            break;
        }
        ensure!(back.elapsed() < DRAIN_TIMEOUT, "{dirty} bytes are still dirty");
    }
    let drained = back.elapsed();
    Ok(Return { writes: Latency::of(&times), answered: answered.unwrap_or(drained), drained })
}

impl Latency {
    pub(crate) fn of(times: &Histogram<u64>) -> Self {
        let at = |quantile| Duration::from_nanos(times.value_at_quantile(quantile));
        let max = Duration::from_nanos(times.max());
        Self { writes: times.len(), p50: at(0.5), p99: at(0.99), max }
    }
}

pub(crate) fn histogram() -> Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, 120_000_000_000, 3).context("histogram")
}

fn one_at_a_time(disk: &mut Disk, settings: &Settings, time: Duration) -> Result<Latency> {
    Ok(Latency::of(&write(disk, settings, time)?.latency))
}

fn write(disk: &mut Disk, settings: &Settings, time: Duration) -> Result<load::Measured> {
    let workload = Workload {
        pattern: Pattern::RandomWrite,
        block_bytes: 4096,
        depth: 1,
        span_bytes: settings.disk_bytes,
        paced_writes_per_second: 0,
        seed: NEXT_SEED.fetch_add(1, Ordering::Relaxed),
    };
    load::run(disk, &workload, Limit { time, bytes: u64::MAX >> 1 })
}

/// The share of what was answered, before the ring was full, after which writers were slowed for good: from there no slice
/// was half as fast as the median of those before. `answers` are the answers of each slice.
fn share_before_slowing(answers: &[u64]) -> f64 {
    let all: u64 = answers.iter().sum();
    let is_slow = |at: usize| {
        let mut before = answers[..at].to_vec();
        before.sort_unstable();
        before.get(before.len() / 2).is_some_and(|median| answers[at] < median / 2)
    };
    let slow = answers.len() - (0..answers.len()).rev().take_while(|at| is_slow(*at)).count();
    answers[..slow].iter().sum::<u64>() as f64 / all.max(1) as f64
}

fn is_reachable(agent: &Agent) -> Result<bool> {
    let status = agent.control(&["status"])?;
    status["store"]["reachable"].as_bool().context("no store.reachable in `status`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slowing_is_what_lasts_until_the_end() {
        // A slow slice amid fast ones is noise.
        let share = share_before_slowing(&[100, 90, 10, 100, 100, 40, 30, 0, 0]);
        assert!((share - 400.0 / 470.0).abs() < 1e-9, "{share}");
        assert!((share_before_slowing(&[100, 100, 90]) - 1.0).abs() < 1e-9);
        assert!(share_before_slowing(&[]).abs() < 1e-9);
    }
}
