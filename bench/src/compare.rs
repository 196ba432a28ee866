//! Two servers side by side: the same workloads in turn, round after round, medians and their ratio.
//!
//! Absolute figures of a shared machine move by a third from hour to hour; the alternation makes the
//! ratio hold still. While one server is measured the other has settled and sleeps.

use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::load::{Limit, Pattern, Workload};
use crate::server::{Sample, Server, measure};

/// Which figure of a sample a row compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Metric {
    /// Operations per second; more is better.
    Iops,
    /// Megabytes per second; more is better.
    MegabytesPerSecond,
    /// CPU seconds of the server per million operations; less is better.
    CpuPerMillion,
}

impl Metric {
    /// The figure of `sample`.
    #[must_use]
    pub fn of(self, sample: &Sample) -> f64 {
        match self {
            Self::Iops => sample.measured.iops(),
            Self::MegabytesPerSecond => sample.measured.megabytes_per_second(),
            Self::CpuPerMillion => sample.cpu_seconds_per_million(),
        }
    }

    /// Unit as tables show it.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Self::Iops => "IOPS",
            Self::MegabytesPerSecond => "MB/s",
            Self::CpuPerMillion => "CPU s per million",
        }
    }

    /// Whether `ratio` (ours to the peer's) meets `target`.
    #[must_use]
    pub fn meets(self, ratio: f64, target: f64) -> bool {
        match self {
            Self::CpuPerMillion => ratio <= target,
            _ => ratio >= target,
        }
    }
}

/// What the ring log's state is while a row is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// The ring is drained before and has room for everything written.
    Burst,
    /// The ring is small and was filled once before, or writes go on beside the measured reads.
    Sustained,
}

/// A promise: this metric, of this workload, in this mode, at this ratio to the peer.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// What is measured.
    pub metric: Metric,
    /// Ratio to reach (or, for CPU, not to exceed).
    pub ratio: f64,
}

/// One measurement of the comparison and what is promised of it.
#[derive(Debug, Clone)]
pub struct Row {
    /// Name in tables.
    pub title: &'static str,
    /// Kind of request.
    pub pattern: Pattern,
    /// Bytes of each.
    pub block_bytes: u32,
    /// Requests in flight.
    pub depth: usize,
    /// State of the ring.
    pub mode: Mode,
    /// Promises; the first is the row's main figure.
    pub targets: Vec<Target>,
}

const KIB: u32 = 1024;

/// Writes per second beside the measured reads of a sustained row: they keep the flusher at work.
pub const PACED_WRITES_PER_SECOND: u32 = 2000;

/// The rows that the project promises, reads first: they want the cache as the set-up left it.
#[must_use]
pub fn rows() -> Vec<Row> {
    let row = |title, pattern, block_kib, depth, mode, targets: &[(Metric, f64)]| Row {
        title,
        pattern,
        block_bytes: block_kib * KIB,
        depth,
        mode,
        targets: targets.iter().map(|&(metric, ratio)| Target { metric, ratio }).collect(),
    };
    use Metric::{CpuPerMillion, Iops, MegabytesPerSecond};
    use Mode::{Burst, Sustained};
    use Pattern::{RandomRead, RandomWrite, RandomWriteFlush, SequentialRead, SequentialWrite};
    let read = "4k random read, cached";
    let write = "4k random write";
    let flush = "4k random write + flush";
    vec![
        row(
            "128k sequential read, cached",
            SequentialRead,
            128,
            8,
            Burst,
            &[(MegabytesPerSecond, 0.95)],
        ),
        row(read, RandomRead, 4, 1, Burst, &[(Iops, 1.0)]),
        row(read, RandomRead, 4, 32, Burst, &[(Iops, 1.0)]),
        row(read, RandomRead, 4, 1, Sustained, &[(Iops, 0.9)]),
        row(read, RandomRead, 4, 32, Sustained, &[(Iops, 0.9)]),
        row(write, RandomWrite, 4, 32, Burst, &[(Iops, 1.5), (CpuPerMillion, 1.0)]),
        row(flush, RandomWriteFlush, 4, 1, Burst, &[(Iops, 1.2)]),
        row("128k sequential write", SequentialWrite, 128, 8, Burst, &[(MegabytesPerSecond, 0.9)]),
        row(write, RandomWrite, 4, 32, Sustained, &[(Iops, 0.7), (CpuPerMillion, 2.0)]),
        row(flush, RandomWriteFlush, 4, 1, Sustained, &[(Iops, 1.0)]),
        row(
            "128k sequential write",
            SequentialWrite,
            128,
            8,
            Sustained,
            &[(MegabytesPerSecond, 0.45)],
        ),
    ]
}

impl Row {
    /// Whether the row needs the small ring: writes that must wait for the flusher.
    #[must_use]
    pub fn needs_small_ring(&self) -> bool {
        self.mode == Mode::Sustained && self.pattern.writes()
    }
}

/// How long and over what the rows are measured.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Times each server is measured per row.
    pub rounds: usize,
    /// Time of one measurement of a burst row.
    pub burst: Duration,
    /// Most bytes written in one measurement of a burst row, so that it stays one.
    pub burst_bytes: u64,
    /// Time of one measurement of a sustained row.
    pub sustained: Duration,
    /// Random writes before each sustained measurement, in bytes: more than the ring holds.
    pub fill_bytes: u64,
    /// Bytes of the disk.
    pub disk_bytes: u64,
    /// Whether the client polls instead of waiting for events.
    pub poll: bool,
}

/// One server's samples of a row, as the figures of one metric.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Figures {
    /// Server's name.
    pub server: String,
    /// One figure per round.
    pub rounds: Vec<f64>,
    /// Median latency of the rounds' medians, in microseconds.
    pub latency_median_us: f64,
    /// Median of the rounds' 99th percentiles, in microseconds.
    pub latency_99_us: f64,
    /// Median share of one core that neither server nor client used, in percent.
    pub other_percent: f64,
}

impl Figures {
    /// Median of the rounds.
    #[must_use]
    pub fn median(&self) -> f64 {
        median(&self.rounds)
    }
}

/// One line of the result.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Line {
    /// Title with depth.
    pub title: String,
    /// State of the ring.
    pub mode: Mode,
    /// Figure.
    pub metric: Metric,
    /// Ratio promised.
    pub target: f64,
    /// Per server, in the order given.
    pub figures: Vec<Figures>,
}

impl Line {
    /// First server's median over the second's; `None` with one server.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        match self.figures.as_slice() {
            [ours, peer] if peer.median() > 0.0 => Some(ours.median() / peer.median()),
            _ => None,
        }
    }

    /// Whether the promise is kept; `None` with one server.
    #[must_use]
    pub fn met(&self) -> Option<bool> {
        self.ratio().map(|ratio| self.metric.meets(ratio, self.target))
    }
}

/// Measures `row` on every server in turn, `plan.rounds` times.
///
/// # Errors
/// When a server fails.
pub fn run_row(row: &Row, servers: &mut [Box<dyn Server>], plan: &Plan) -> Result<Vec<Line>> {
    let mut samples: Vec<Vec<Sample>> = servers.iter().map(|_| Vec::new()).collect();
    for round in 0..plan.rounds {
        for (index, server) in servers.iter_mut().enumerate() {
            samples[index].push(run_once(row, server.as_mut(), plan, round as u64)?);
            server.settle()?;
        }
    }
    Ok(row
        .targets
        .iter()
        .map(|target| Line {
            title: format!("{}, depth {}", row.title, row.depth),
            mode: row.mode,
            metric: target.metric,
            target: target.ratio,
            figures: servers
                .iter()
                .zip(&samples)
                .map(|(server, samples)| figures(server.name(), target.metric, samples))
                .collect(),
        })
        .collect())
}

fn run_once(row: &Row, server: &mut dyn Server, plan: &Plan, round: u64) -> Result<Sample> {
    let seed = 0x5eed_0000 + round * 0x1_0001;
    let paced = row.mode == Mode::Sustained && !row.pattern.writes();
    let workload = Workload {
        pattern: row.pattern,
        block_bytes: row.block_bytes,
        depth: row.depth,
        span_bytes: plan.disk_bytes,
        paced_writes_per_second: if paced { PACED_WRITES_PER_SECOND } else { 0 },
        seed,
    };
    if row.needs_small_ring() {
        let fill = Workload {
            pattern: Pattern::RandomWrite,
            block_bytes: 4096,
            depth: 32,
            seed: seed + 1,
            ..workload
        };
        let until = Limit { time: Duration::from_secs(600), bytes: plan.fill_bytes };
        measure(server, &fill, until, plan.poll)?;
    }
    let limit = match (row.mode, row.pattern.writes()) {
        (Mode::Burst, true) => Limit { time: plan.burst, bytes: plan.burst_bytes },
        (Mode::Burst, false) => Limit { time: plan.burst, bytes: u64::MAX },
        (Mode::Sustained, _) => Limit { time: plan.sustained, bytes: u64::MAX },
    };
    measure(server, &workload, limit, plan.poll)
}

fn figures(server: &str, metric: Metric, samples: &[Sample]) -> Figures {
    let quantile = |q: f64| -> f64 {
        let values: Vec<f64> = samples
            .iter()
            .map(|sample| sample.measured.latency.value_at_quantile(q) as f64 / 1000.0)
            .collect();
        median(&values)
    };
    Figures {
        server: server.to_owned(),
        rounds: samples.iter().map(|sample| metric.of(sample)).collect(),
        latency_median_us: quantile(0.5),
        latency_99_us: quantile(0.99),
        other_percent: median(&samples.iter().map(Sample::other_percent).collect::<Vec<_>>()),
    }
}

/// Middle value; mean of the two middle ones for an even count; 0 of nothing.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => 0.0,
        (len, middle) if len % 2 == 1 => sorted[middle],
        (_, middle) => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(metric: Metric, target: f64, ours: &[f64], peer: &[f64]) -> Line {
        let figures = |rounds: &[f64]| Figures {
            server: "s".into(),
            rounds: rounds.to_vec(),
            latency_median_us: 0.0,
            latency_99_us: 0.0,
            other_percent: 0.0,
        };
        let figures = vec![figures(ours), figures(peer)];
        Line { title: "t".into(), mode: Mode::Burst, metric, target, figures }
    }

    #[test]
    fn medians_and_ratios_ignore_an_outlier() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[5.0, 1.0]), 3.0);
        let fast = line(Metric::Iops, 1.5, &[300.0, 2.0, 310.0], &[200.0, 9000.0, 190.0]);
        assert_eq!(fast.ratio(), Some(1.5));
        assert_eq!(fast.met(), Some(true));
    }

    #[test]
    fn cpu_is_better_when_smaller() {
        assert_eq!(line(Metric::CpuPerMillion, 1.0, &[9.0], &[10.0]).met(), Some(true));
        assert_eq!(line(Metric::CpuPerMillion, 1.0, &[11.0], &[10.0]).met(), Some(false));
        assert_eq!(line(Metric::Iops, 1.0, &[9.0], &[10.0]).met(), Some(false));
    }

    #[test]
    fn every_promised_cell_is_a_row() {
        let rows = rows();
        let cells = rows.iter().map(|row| row.targets.len()).sum::<usize>();
        assert_eq!(cells, 13);
        assert!(rows.iter().all(|row| !row.targets.is_empty()));
    }
}
