//! Goal: the client convicts every kind of wrong disk and acquits a right one.
//! Method: disks in memory, driven by the very runner that drives real ones; each fault is injected
//! in one place, once, in the middle of a seeded run.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::Result;
use bench::front_end::Request;
use bench::load::Random;

use super::oracle::{Loss, Oracle};
use super::port::{BlockPort, Event};
use super::runner::{End, RunOptions, Runner};
use super::stamp::Identity;
use super::workload::{Mix, SECTORS_MAX, Workload};
use super::{BLOCK_SECTORS, SECTOR};

const SECTORS: u64 = 16384;
/// Requests before a fault.
const CALM: u64 = 3750;
const IDENTITY: Identity = Identity { seed: 42, disk: 1 };

/// One way to be wrong. Each strikes once, late in the run: what is overwritten is never found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// A write is acknowledged and dropped.
    LostWrite,
    /// Only the first sectors of a block are written.
    TornBlock,
    /// A sector is half written.
    TornSector,
    /// A write lands one block further.
    Misdirected,
    /// A read returns what the disk held some requests ago.
    StaleRead,
    /// A read leaves its buffer alone.
    ShortRead,
    /// Write-zeroes does nothing.
    LostZeroes,
    /// A discard takes the edges of its range too.
    WideDiscard,
    /// A completion overtakes an earlier one.
    Reordered,
    /// Two requests are applied in the wrong order.
    AppliedOutOfOrder,
}

/// A disk that applies requests in order at kick and completes some of them per wait.
struct MemoryDisk {
    data: Vec<u8>,
    buffers: Vec<Vec<u8>>,
    queued: Vec<(usize, Request)>,
    done: VecDeque<(usize, bool)>,
    random: Random,
    fault: Fault,
    applied: u64,
    old: Vec<u8>,
}

impl MemoryDisk {
    fn new(fault: Fault, seed: u64) -> Self {
        Self {
            data: vec![0; SECTORS as usize * SECTOR],
            buffers: vec![vec![0; SECTORS_MAX as usize * SECTOR]; 16],
            queued: Vec::new(),
            done: VecDeque::new(),
            random: Random(seed | 1),
            fault,
            applied: 0,
            old: vec![0; SECTORS as usize * SECTOR],
        }
    }

    /// Whether the fault strikes now.
    fn strikes(&mut self, fault: Fault) -> bool {
        if self.fault != fault || self.applied < CALM {
            return false;
        }
        self.fault = Fault::None;
        true
    }

    fn apply(&mut self, slot: usize, request: &Request) {
        let at = |sector: u64| sector as usize * SECTOR;
        self.applied += 1;
        match *request {
            Request::Read { sector, sectors } => {
                let range = at(sector)..at(sector + u64::from(sectors));
                let stale = self.old[range.clone()] != self.data[range.clone()]
                    && self.strikes(Fault::StaleRead);
                let source = if stale { &self.old } else { &self.data };
                let len = range.len();
                let data = source[range].to_vec();
                if !self.strikes(Fault::ShortRead) {
                    self.buffers[slot][..len].copy_from_slice(&data);
                }
            }
            Request::Write { sector, sectors } => self.write(slot, sector, u64::from(sectors)),
            Request::WriteZeroes { sector, sectors, .. } => {
                let range = at(sector)..at(sector + u64::from(sectors));
                let matters = self.data[range.clone()].iter().any(|byte| *byte != 0);
                if !(matters && self.strikes(Fault::LostZeroes)) {
                    self.data[range].fill(0);
                }
            }
            Request::Discard { sector, sectors } => {
                let end = sector + u64::from(sectors);
                let mut range = at(sector.next_multiple_of(BLOCK_SECTORS))
                    ..at(end / BLOCK_SECTORS * BLOCK_SECTORS);
                let edges = at(sector)..at(end);
                let edge_matters = self.data[edges.start..range.start.min(edges.end)]
                    .iter()
                    .any(|byte| *byte != 0);
                if edge_matters && self.strikes(Fault::WideDiscard) {
                    range = edges;
                }
                if range.start < range.end {
                    self.data[range].fill(0);
                }
            }
            Request::Flush | Request::GetId => {}
        }
    }

    /// Applies everything queued in order, completes it in order; unless a fault says otherwise.
    fn serve(&mut self) {
        let mut queued = std::mem::take(&mut self.queued);
        let mut order: Vec<usize> = (0..queued.len()).collect();
        if let Some((first, second)) = overlapping_writes(&queued)
            && self.strikes(Fault::AppliedOutOfOrder)
        {
            order.swap(first, second);
        }
        for index in order {
            let (slot, request) = queued[index];
            self.apply(slot, &request);
        }
        let is_write = |(_, request): &(usize, Request)| matches!(request, Request::Write { .. });
        let ends = (queued.iter().position(is_write), queued.iter().rposition(is_write));
        if let (Some(first), Some(last)) = ends
            && first < last
            && self.strikes(Fault::Reordered)
        {
            queued.swap(first, last);
        }
        self.done.extend(queued.iter().map(|(slot, _)| (*slot, true)));
    }

    fn write(&mut self, slot: usize, sector: u64, sectors: u64) {
        let mut start = sector as usize * SECTOR;
        let mut len = sectors as usize * SECTOR;
        if self.strikes(Fault::LostWrite) {
            return;
        }
        if sectors >= BLOCK_SECTORS && self.strikes(Fault::TornBlock) {
            len = 3 * SECTOR;
        }
        if self.strikes(Fault::TornSector) {
            len -= SECTOR / 2;
        }
        if sector + sectors + BLOCK_SECTORS <= SECTORS && self.strikes(Fault::Misdirected) {
            start += BLOCK_SECTORS as usize * SECTOR;
        }
        if self.random.below(50) == 0 {
            self.old.clone_from(&self.data);
        }
        self.data[start..start + len].copy_from_slice(&self.buffers[slot][..len]);
    }
}

/// Two writes of which the later covers part of the earlier.
fn overlapping_writes(queued: &[(usize, Request)]) -> Option<(usize, usize)> {
    let range = |index: usize| match queued[index].1 {
        Request::Write { sector, sectors } => Some(sector..sector + u64::from(sectors)),
        _ => None,
    };
    (0..queued.len()).flat_map(|a| (a + 1..queued.len()).map(move |b| (a, b))).find(
        |&(a, b)| match (range(a), range(b)) {
            (Some(a), Some(b)) => a.start < b.end && b.start < a.end,
            _ => false,
        },
    )
}

impl BlockPort for MemoryDisk {
    fn sectors(&self) -> u64 {
        SECTORS
    }

    fn slots(&self) -> usize {
        self.buffers.len()
    }

    fn buffer(&mut self, slot: usize) -> &mut [u8] {
        &mut self.buffers[slot]
    }

    fn submit(&mut self, slot: usize, request: &Request) -> Result<()> {
        self.queued.push((slot, *request));
        Ok(())
    }

    fn kick(&mut self) -> Result<()> {
        Ok(())
    }

    /// Serves what is queued now and then, so that requests really are in flight together.
    fn next(&mut self, _timeout: Duration) -> Result<Event> {
        if self.done.is_empty() || self.random.below(8) == 0 {
            self.serve();
        }
        Ok(match self.done.pop_front() {
            Some((slot, ok)) => Event::Completed { slot, ok },
            None => Event::TimedOut,
        })
    }

    fn set_write_cache(&mut self, _on: bool) -> Result<bool> {
        Ok(true)
    }
}

/// Runs a seeded load on a disk with `fault`, then reads everything back.
fn run(fault: Fault, seed: u64) -> Result<()> {
    let mix = Mix { depth_max: 16, large: 2, zeroes: 2, discards: 2, ..Mix::default() };
    let workload = Workload::new(seed, mix, SECTORS);
    let oracle = Oracle::new(IDENTITY, SECTORS, true);
    let options = RunOptions { overlap: true, switch_write_cache: true };
    let mut runner =
        Runner::new(Box::new(MemoryDisk::new(fault, seed)), oracle, workload, options)?;
    let end = runner.run(|counts| counts.mutations > 3000)?;
    assert_eq!(end, End::Stopped);
    runner.verify()?;
    let counts = runner.counts();
    assert!(counts.reads_checked > 300 && counts.flushes > 50 && counts.switches > 0, "{counts:?}");
    let cut = runner.recover(Loss::PowerLost)?;
    assert_eq!(cut.last, runner.oracle().submitted());
    Ok(())
}

#[test]
fn a_right_disk_is_acquitted() {
    for seed in 0..5 {
        run(Fault::None, seed).unwrap();
    }
}

#[test]
fn every_fault_is_caught_and_named() {
    let faults: [(Fault, &[&str]); 10] = [
        (Fault::LostWrite, &["Lost", "Stale", "NoPrefix"]),
        (Fault::TornBlock, &["Lost", "Stale", "NoPrefix"]),
        (Fault::TornSector, &["Torn"]),
        (Fault::Misdirected, &["Misdirected", "Lost"]),
        (Fault::StaleRead, &["Lost", "Stale"]),
        (Fault::ShortRead, &["Garbage"]),
        (Fault::LostZeroes, &["Lost", "Stale"]),
        (Fault::WideDiscard, &["Lost"]),
        (Fault::Reordered, &["OutOfOrder"]),
        (Fault::AppliedOutOfOrder, &["Lost", "NoPrefix"]),
    ];
    for (fault, names) in faults {
        let mut caught = 0;
        for seed in 0..8 {
            if let Err(error) = run(fault, seed) {
                let text = error.to_string();
                assert!(names.iter().any(|name| text.contains(name)), "{fault:?}: {text}");
                caught += 1;
            }
        }
        // A fault may be overwritten before anybody looks; most are not.
        assert!(caught >= 4, "{fault:?} was caught in {caught} of 8 runs");
    }
}
