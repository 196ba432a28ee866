//! Drives a port by a workload and tells the oracle all that happens.

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bench::front_end::Request;

use super::SECTOR;
use super::oracle::{Cut, FlushTicket, Loss, Mutation, Oracle, ReadTicket, Violation};
use super::port::{BlockPort, Event};
use super::stamp::Sequence;
use super::workload::{SECTORS_MAX, Step, Workload};

/// A request without an answer for this long counts as hung.
const HUNG_AFTER: Duration = Duration::from_secs(120);

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The caller's condition; nothing is in flight.
    Stopped,
    /// The server died; everything it had completed was taken.
    Disconnected,
}

/// What was done so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Mutating requests submitted.
    pub mutations: u64,
    /// Sectors they covered.
    pub sectors_written: u64,
    /// Reads whose every sector was judged.
    pub reads_checked: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Whole images judged.
    pub images: u64,
    /// Times the write cache was switched.
    pub switches: u64,
}

/// What varies between servers and tests.
#[derive(Debug, Clone, Copy)]
pub struct RunOptions {
    /// Keep writes in flight that overlap each other. Only a server that applies requests in ring
    /// order has a defined outcome then.
    pub overlap: bool,
    /// Switch the write cache off and on now and then.
    pub switch_write_cache: bool,
}

enum Pending {
    Mutation(Sequence, Range<u64>),
    Read(ReadTicket, usize),
    Flush(FlushTicket),
}

/// A client at work.
pub struct Runner {
    port: Box<dyn BlockPort + Send>,
    oracle: Oracle,
    workload: Workload,
    options: RunOptions,
    slots: Vec<Option<Pending>>,
    free: Vec<usize>,
    write_cache: bool,
    counts: Counts,
}

impl std::fmt::Debug for Runner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner").field("counts", &self.counts).finish_non_exhaustive()
    }
}

impl Runner {
    /// A client on `port`.
    ///
    /// # Errors
    /// When port and oracle do not speak of the same disk.
    pub fn new(
        port: Box<dyn BlockPort + Send>,
        oracle: Oracle,
        workload: Workload,
        options: RunOptions,
    ) -> Result<Self> {
        let mut runner = Self {
            slots: Vec::new(),
            free: Vec::new(),
            port,
            oracle,
            workload,
            options,
            write_cache: true,
            counts: Counts::default(),
        };
        runner.reset_slots()?;
        Ok(runner)
    }

    /// Goes on over a new connection; the old one is closed first, and requests in flight on it stay
    /// without an answer.
    ///
    /// # Errors
    /// When `connect` fails or the new port's disk has another size.
    pub fn reconnect(
        &mut self,
        connect: impl FnOnce() -> Result<Box<dyn BlockPort + Send>>,
    ) -> Result<()> {
        self.port = Box::new(NoPort);
        self.port = connect()?;
        self.write_cache = true;
        self.oracle.set_write_through(false);
        self.reset_slots()
    }

    fn reset_slots(&mut self) -> Result<()> {
        ensure!(
            self.port.sectors() == self.oracle.sectors(),
            "the disk has {} sectors, expected {}",
            self.port.sectors(),
            self.oracle.sectors()
        );
        let slots = self.port.slots();
        self.slots = (0..slots).map(|_| None).collect();
        self.free = (0..slots).rev().collect();
        Ok(())
    }

    /// What was done so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// What is known of the disk.
    pub fn oracle(&mut self) -> &mut Oracle {
        &mut self.oracle
    }

    /// The stream of requests, for decisions that belong to the same seed.
    pub fn workload(&mut self) -> &mut Workload {
        &mut self.workload
    }

    /// Sends requests until `stop` says so or the server dies; every read is judged.
    ///
    /// # Errors
    /// When something illegal was returned, a request failed, or the server hangs.
    pub fn run(&mut self, mut stop: impl FnMut(&Counts) -> bool) -> Result<End> {
        let mut steps: u64 = 0;
        while !stop(&self.counts) {
            let depth = self.workload.depth().min(self.slots.len());
            while self.in_flight() < depth {
                let step = self.workload.step();
                self.start(step)?;
                steps += 1;
            }
            self.port.kick()?;
            if self.take(1)? == End::Disconnected {
                return Ok(End::Disconnected);
            }
            if self.options.switch_write_cache && steps > 400 {
                steps = 0;
                if self.quiesce()? == End::Disconnected || !self.switch_write_cache() {
                    return self.drain_dead();
                }
            }
        }
        self.quiesce()
    }

    /// Writes the whole disk once, from its start to its end.
    ///
    /// # Errors
    /// As for [`Self::run`].
    pub fn fill(&mut self) -> Result<End> {
        let sectors = self.oracle.sectors();
        for start in (0..sectors).step_by(SECTORS_MAX as usize) {
            let range = start..(start + SECTORS_MAX).min(sectors);
            self.start(Step::Mutate(Mutation::Write, range))?;
            self.port.kick()?;
            if self.take(usize::from(self.free.is_empty()))? == End::Disconnected {
                return Ok(End::Disconnected);
            }
        }
        self.quiesce()
    }

    /// Waits until nothing is in flight.
    ///
    /// # Errors
    /// As for [`Self::run`].
    pub fn quiesce(&mut self) -> Result<End> {
        let count = self.in_flight();
        if count > 0 {
            self.port.kick()?;
        }
        self.take(count)
    }

    /// Sends one flush with nothing else in flight and waits for it.
    ///
    /// # Errors
    /// As for [`Self::run`].
    pub fn flush(&mut self) -> Result<End> {
        if self.quiesce()? == End::Disconnected {
            return Ok(End::Disconnected);
        }
        self.start(Step::Flush)?;
        self.quiesce()
    }

    /// Reads the whole disk, without judging it. Nothing may be in flight.
    ///
    /// # Errors
    /// When a read fails, or the server hangs or goes away.
    pub fn read_image(&mut self) -> Result<Vec<u8>> {
        ensure!(self.in_flight() == 0, "requests are in flight");
        let sectors = self.oracle.sectors();
        let mut image = vec![0; sectors as usize * SECTOR];
        let mut next = 0;
        let mut reading: Vec<Option<Range<u64>>> = vec![None; self.slots.len()];
        let mut busy = 0;
        while next < sectors || busy > 0 {
            for (slot, range) in reading.iter_mut().enumerate().take(8) {
                if range.is_some() || next == sectors {
                    continue;
                }
                let end = (next + SECTORS_MAX).min(sectors);
                let count = (end - next) as u32;
                self.port.submit(slot, &Request::Read { sector: next, sectors: count })?;
                *range = Some(next..end);
                next = end;
                busy += 1;
            }
            self.port.kick()?;
            let slot = match self.port.next(HUNG_AFTER)? {
                Event::Completed { slot, ok: true } => slot,
                Event::Completed { slot, ok: false } => {
                    bail!("reading sectors {:?} back failed", reading[slot])
                }
                other => bail!("reading the disk back: {other:?}"),
            };
            let range = reading[slot].take().context("a read completed twice")?;
            busy -= 1;
            let bytes = range.start as usize * SECTOR..range.end as usize * SECTOR;
            let len = bytes.len();
            image[bytes].copy_from_slice(&self.port.buffer(slot)[..len]);
        }
        self.counts.images += 1;
        Ok(image)
    }

    /// After a crash: reads everything back, judges it, and carries on from there.
    ///
    /// # Errors
    /// When the disk is not what it must be.
    pub fn recover(&mut self, loss: Loss) -> Result<Cut> {
        let image = self.read_image()?;
        self.oracle.recover(&image, loss).map_err(|found| report("after the crash", &found))
    }

    /// Reads everything back and judges it; nothing may be in flight.
    ///
    /// # Errors
    /// When the disk does not hold exactly what was written last.
    pub fn verify(&mut self) -> Result<()> {
        ensure!(self.quiesce()? == End::Stopped, "the server is gone");
        let image = self.read_image()?;
        self.oracle.check_current(&image).map_err(|found| report("on the idle disk", &found))
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn start(&mut self, step: Step) -> Result<()> {
        let slot = self.free.pop().context("no free slot")?;
        let (pending, request) = match step {
            Step::Mutate(_, ref range) if !self.options.overlap && self.overlaps(range) => {
                self.free.push(slot);
                // Let what is in flight finish first, then the range is free.
                if self.quiesce()? == End::Disconnected {
                    return Ok(());
                }
                return self.start(step);
            }
            Step::Mutate(kind, range) => {
                let sequence = self.oracle.submit(kind, range.clone());
                self.counts.mutations += 1;
                self.counts.sectors_written += range.end - range.start;
                let request = self.prepare(slot, kind, &range, sequence);
                (Pending::Mutation(sequence, range), request)
            }
            Step::Read(range) => {
                let sectors = (range.end - range.start) as u32;
                let request = Request::Read { sector: range.start, sectors };
                // A read that returned nothing must not pass for a good one.
                let len = sectors as usize * SECTOR;
                self.port.buffer(slot)[..len].fill(0xdb);
                (Pending::Read(self.oracle.submit_read(range), len), request)
            }
            Step::Flush => (Pending::Flush(self.oracle.submit_flush()), Request::Flush),
        };
        self.port.submit(slot, &request)?;
        self.slots[slot] = Some(pending);
        Ok(())
    }

    fn prepare(
        &mut self,
        slot: usize,
        kind: Mutation,
        range: &Range<u64>,
        sequence: Sequence,
    ) -> Request {
        let (sector, sectors) = (range.start, (range.end - range.start) as u32);
        match kind {
            Mutation::Write => {
                let identity = self.oracle.identity();
                let buffer = &mut self.port.buffer(slot)[..sectors as usize * SECTOR];
                identity.stamp(sector, sequence, buffer);
                Request::Write { sector, sectors }
            }
            Mutation::Zero => {
                Request::WriteZeroes { sector, sectors, unmap: sequence.is_multiple_of(2) }
            }
            Mutation::Discard => Request::Discard { sector, sectors },
        }
    }

    fn overlaps(&self, range: &Range<u64>) -> bool {
        self.slots.iter().flatten().any(|pending| match pending {
            Pending::Mutation(_, other) => other.start < range.end && range.start < other.end,
            _ => false,
        })
    }

    /// Takes `count` completions.
    fn take(&mut self, count: usize) -> Result<End> {
        for _ in 0..count {
            if self.in_flight() == 0 {
                break;
            }
            let started = Instant::now();
            match self.port.next(HUNG_AFTER)? {
                Event::Completed { slot, ok } => self.finish(slot, ok)?,
                Event::Disconnected => return Ok(End::Disconnected),
                Event::TimedOut => bail!(
                    "hung: {} requests have no answer after {:?}",
                    self.in_flight(),
                    started.elapsed()
                ),
            }
        }
        Ok(End::Stopped)
    }

    /// Takes what a dying server had completed still.
    fn drain_dead(&mut self) -> Result<End> {
        let count = self.in_flight();
        self.take(count)?;
        Ok(End::Disconnected)
    }

    fn finish(&mut self, slot: usize, ok: bool) -> Result<()> {
        let pending = self.slots[slot].take().context("an unknown request completed")?;
        self.free.push(slot);
        match pending {
            Pending::Mutation(sequence, range) => {
                ensure!(ok, "request {sequence} (sectors {range:?}) failed");
                self.oracle.acknowledge(sequence).map_err(|one| report("in flight", &[one]))?;
            }
            Pending::Read(ticket, len) => {
                ensure!(ok, "{ticket:?} failed");
                let data = &self.port.buffer(slot)[..len];
                self.oracle
                    .check_read(&ticket, data)
                    .map_err(|one| report("in a read under load", &[one]))?;
                self.counts.reads_checked += 1;
            }
            Pending::Flush(ticket) => {
                ensure!(ok, "a flush failed");
                self.oracle.acknowledge_flush(ticket);
                self.counts.flushes += 1;
            }
        }
        Ok(())
    }

    /// Flips the write cache; false when the server did not answer, that is, died.
    fn switch_write_cache(&mut self) -> bool {
        let on = !self.write_cache;
        match self.port.set_write_cache(on) {
            Ok(true) => {
                self.write_cache = on;
                self.oracle.set_write_through(!on);
                self.counts.switches += 1;
                true
            }
            Ok(false) => true,
            Err(_) => false,
        }
    }
}

/// Stands in while there is no connection.
struct NoPort;

impl BlockPort for NoPort {
    fn sectors(&self) -> u64 {
        0
    }

    fn slots(&self) -> usize {
        0
    }

    fn buffer(&mut self, _slot: usize) -> &mut [u8] {
        &mut []
    }

    fn submit(&mut self, _slot: usize, _request: &Request) -> Result<()> {
        bail!("not connected")
    }

    fn kick(&mut self) -> Result<()> {
        bail!("not connected")
    }

    fn next(&mut self, _timeout: Duration) -> Result<Event> {
        bail!("not connected")
    }

    fn set_write_cache(&mut self, _on: bool) -> Result<bool> {
        bail!("not connected")
    }
}

/// One error out of findings.
pub(super) fn report(when: &str, found: &[Violation]) -> anyhow::Error {
    let lines: Vec<String> = found.iter().map(ToString::to_string).collect();
    anyhow::anyhow!("the disk is wrong {when}:\n  {}", lines.join("\n  "))
}
