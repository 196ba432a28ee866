//! Closed-loop load: keeps a fixed number of requests in flight and counts what completes.
//!
//! One thread, one queue. In event mode the client sleeps on the call eventfd as a guest's driver
//! does; completions are taken in batches, refilled, and published with one kick.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;

use crate::front_end::{Disk, Request, Status, Wake};

/// How long a request may take before the server counts as hung.
const HUNG_AFTER: Duration = Duration::from_secs(60);

/// What is asked of the disk, over and over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Writes at random aligned places.
    RandomWrite,
    /// A write at a random aligned place, then a flush; both count as one operation.
    RandomWriteFlush,
    /// Reads at random aligned places.
    RandomRead,
    /// Writes one after the other, starting over at the end of the span.
    SequentialWrite,
    /// Reads one after the other, starting over at the end of the span.
    SequentialRead,
}

impl Pattern {
    /// Whether operations change the disk.
    #[must_use]
    pub fn writes(self) -> bool {
        !matches!(self, Self::RandomRead | Self::SequentialRead)
    }
}

/// A workload.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// Kind of request.
    pub pattern: Pattern,
    /// Bytes of each; a multiple of 512.
    pub block_bytes: u32,
    /// Requests in flight.
    pub depth: usize,
    /// The part of the disk in use, from its start, in bytes.
    pub span_bytes: u64,
    /// Writes of one 4 KiB block at this rate beside the measured requests (0 for none), so that the
    /// server has writing to do while it is measured reading.
    pub paced_writes_per_second: u32,
    /// Where random places come from.
    pub seed: u64,
}

/// When a run ends: at the first of these.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    /// Time.
    pub time: Duration,
    /// Bytes of measured operations.
    pub bytes: u64,
}

/// What was counted.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Completed operations.
    pub operations: u64,
    /// Bytes they moved.
    pub bytes: u64,
    /// Wall time.
    pub time: Duration,
    /// Latency of operations in nanoseconds.
    pub latency: Histogram<u64>,
}

impl Measured {
    /// Operations per second.
    #[must_use]
    pub fn iops(&self) -> f64 {
        self.operations as f64 / self.time.as_secs_f64()
    }

    /// Megabytes (10^6 bytes) per second.
    #[must_use]
    pub fn megabytes_per_second(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.time.as_secs_f64()
    }
}

/// Runs `workload` until `limit` and waits for the last request.
///
/// # Errors
/// When a request fails, the server goes away or hangs, or the disk is too small.
pub fn run(disk: &mut Disk, workload: &Workload, limit: Limit) -> Result<Measured> {
    let mut run = Run::new(disk, workload)?;
    let start = Instant::now();
    let end = start + limit.time;
    let mut now = start;
    run.left = limit.bytes.div_ceil(u64::from(workload.block_bytes)).max(1);
    for slot in 0..workload.depth {
        run.start(slot, now)?;
    }
    run.disk.kick()?;
    while run.disk.in_flight() > 0 {
        run.wait(now)?;
        now = Instant::now();
        if now >= end {
            run.left = 0;
        }
        run.collect(now)?;
        run.write_paced(start, now)?;
        run.disk.kick()?;
    }
    let time = now - start;
    let bytes = run.operations * u64::from(workload.block_bytes);
    Ok(Measured { operations: run.operations, bytes, time, latency: run.latency })
}

/// Bytes of one paced write.
const PACED_BYTES: u32 = 4096;

struct Run<'a> {
    disk: &'a mut Disk,
    workload: &'a Workload,
    random: Random,
    next_block: u64,
    blocks: u64,
    started: Vec<Instant>,
    flushing: Vec<bool>,
    paced_sent: u64,
    /// Operations still to submit.
    left: u64,
    operations: u64,
    latency: Histogram<u64>,
}

impl<'a> Run<'a> {
    fn new(disk: &'a mut Disk, workload: &'a Workload) -> Result<Self> {
        let paced = usize::from(workload.paced_writes_per_second > 0);
        let slots = workload.depth + paced;
        ensure!(workload.depth > 0 && slots <= disk.options().slots, "{slots} slots are needed");
        let blocks = workload.span_bytes / u64::from(workload.block_bytes);
        let capacity = disk.config().capacity_sectors * 512;
        ensure!(
            blocks > 0 && workload.span_bytes <= capacity,
            "a span of {} bytes on a disk of {capacity}",
            workload.span_bytes
        );
        let mut random = Random(workload.seed | 1);
        for slot in 0..slots {
            random.fill(disk.buffer(slot));
        }
        Ok(Self {
            disk,
            workload,
            random,
            next_block: 0,
            blocks,
            started: vec![Instant::now(); slots],
            flushing: vec![false; slots],
            paced_sent: 0,
            left: 0,
            operations: 0,
            latency: Histogram::new_with_bounds(1, 120_000_000_000, 3).context("histogram")?,
        })
    }

    /// Submits the next operation in `slot`, unless none is left.
    fn start(&mut self, slot: usize, now: Instant) -> Result<()> {
        if self.left == 0 {
            return Ok(());
        }
        self.left -= 1;
        self.started[slot] = now;
        let request = self.next_request();
        if let Request::Write { sector, .. } = request {
            // Every write differs, so that nobody gains from equal blocks.
            let stamp = self.random.word();
            let buffer = self.disk.buffer(slot);
            buffer[0..8].copy_from_slice(&stamp.to_le_bytes());
            buffer[8..16].copy_from_slice(&sector.to_le_bytes());
        }
        self.disk.submit(slot, &request)
    }

    fn next_request(&mut self) -> Request {
        let sectors = self.workload.block_bytes / 512;
        let block = match self.workload.pattern {
            Pattern::SequentialRead | Pattern::SequentialWrite => {
                let block = self.next_block;
                self.next_block = (block + 1) % self.blocks;
                block
            }
            _ => self.random.below(self.blocks),
        };
        let sector = block * u64::from(sectors);
        if self.workload.pattern.writes() {
            Request::Write { sector, sectors }
        } else {
            Request::Read { sector, sectors }
        }
    }

    fn wait(&mut self, now: Instant) -> Result<()> {
        match self.disk.wait(HUNG_AFTER)? {
            Wake::Completions => Ok(()),
            Wake::Disconnected => bail!("the server closed the connection during the run"),
            Wake::TimedOut => {
                bail!("{} requests have no answer after {:?}", self.disk.in_flight(), now.elapsed())
            }
        }
    }

    /// Takes every completion and submits as many operations again.
    fn collect(&mut self, now: Instant) -> Result<()> {
        while let Some(done) = self.disk.take()? {
            let slot = done.slot;
            ensure!(done.status == Status::Ok, "a request ended with {:?}", done.status);
            if slot >= self.workload.depth {
                continue;
            }
            let flush_due =
                self.workload.pattern == Pattern::RandomWriteFlush && !self.flushing[slot];
            self.flushing[slot] = flush_due;
            if flush_due {
                self.disk.submit(slot, &Request::Flush)?;
                continue;
            }
            self.operations += 1;
            self.latency.saturating_record((now - self.started[slot]).as_nanos() as u64);
            self.start(slot, now)?;
        }
        Ok(())
    }

    /// Sends the next paced write when it is due and its slot is free. Only looked at when other
    /// requests complete, so the rate is a ceiling.
    fn write_paced(&mut self, start: Instant, now: Instant) -> Result<()> {
        let rate = f64::from(self.workload.paced_writes_per_second);
        let slot = self.workload.depth;
        if rate == 0.0 || self.left == 0 || self.disk.is_busy(slot) {
            return Ok(());
        }
        if (now - start).as_secs_f64() * rate < self.paced_sent as f64 {
            return Ok(());
        }
        self.paced_sent += 1;
        let blocks = self.workload.span_bytes / u64::from(PACED_BYTES);
        let sector = self.random.below(blocks) * u64::from(PACED_BYTES / 512);
        self.disk.submit(slot, &Request::Write { sector, sectors: PACED_BYTES / 512 })
    }
}

/// A small generator (xorshift64*): places and contents need no quality, only speed and a seed.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn word(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.word()) * u128::from(bound)) >> 64) as u64
    }

    /// Fills `buffer` with bytes that do not compress.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            let bytes = self.word().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_places_stay_below_the_bound_and_differ() {
        let mut random = Random(7);
        let seen: std::collections::HashSet<u64> =
            (0..1000).map(|_| random.below(1 << 20)).collect();
        assert!(seen.len() > 990);
        assert!(seen.iter().all(|place| *place < 1 << 20));
        assert_eq!(random.below(1), 0);
    }
}
