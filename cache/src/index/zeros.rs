//! Ranges that read as zeros and are not committed yet.

use blockstore::types::{Lba, Lsn};
use std::collections::BTreeMap;

/// Disjoint ranges of blocks, each with the LSN that zeroed it.
#[derive(Debug, Default)]
pub struct ZeroRanges {
    /// start → (end, lsn)
    ranges: BTreeMap<u64, (u64, Lsn)>,
}

impl ZeroRanges {
    /// True if the block was zeroed.
    #[must_use]
    pub fn contains(&self, lba: Lba) -> bool {
        self.ranges.range(..=lba.0).next_back().is_some_and(|(_, &(end, _))| lba.0 < end)
    }

    /// Zeroes `start..end` at `lsn`; older ranges inside give way.
    pub fn insert(&mut self, start: u64, end: u64, lsn: Lsn) {
        let mut from = start;
        if let Some((&left, &(left_end, _))) = self.ranges.range(..start).next_back()
            && left_end > start
        {
            from = left;
        }
        let overlapping: Vec<u64> = self.ranges.range(from..end).map(|(&s, _)| s).collect();
        for old_start in overlapping {
            let Some((old_end, old_lsn)) = self.ranges.remove(&old_start) else { continue };
            if old_start < start {
                self.ranges.insert(old_start, (start, old_lsn));
            }
            if old_end > end {
                self.ranges.insert(end, (old_end, old_lsn));
            }
        }
        self.ranges.insert(start, (end, lsn));
    }

    /// Forgets ranges zeroed at or before `lsn`, and returns them.
    pub fn retire(&mut self, lsn: Lsn) -> Vec<(u64, u64)> {
        let mut retired = Vec::new();
        self.ranges.retain(|&start, &mut (end, zeroed)| {
            if zeroed <= lsn {
                retired.push((start, end));
            }
            zeroed > lsn
        });
        retired
    }

    /// Whether the block at `at` was zeroed, and the end of the run around it for which that is so.
    pub(super) fn run(&self, at: u64) -> (bool, u64) {
        let around = self.ranges.range(..=at).next_back().map(|(_, &(end, _))| end);
        let next = || self.ranges.range(at..).next().map_or(u64::MAX, |(&start, _)| start);
        around.filter(|end| at < *end).map_or_else(|| (false, next()), |end| (true, end))
    }

    /// Blocks in all ranges.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.ranges.iter().map(|(start, (end, _))| end - start).sum()
    }

    /// The ranges, sorted and joined where they touch, less the blocks in `taken` (sorted).
    #[must_use]
    pub fn without(&self, taken: &[u64]) -> Vec<(u64, u64)> {
        let mut out: Vec<(u64, u64)> = Vec::new();
        for (&start, &(end, _)) in &self.ranges {
            let mut from = start;
            let first = taken.partition_point(|&lba| lba < start);
            for &lba in taken[first..].iter().take_while(|&&lba| lba < end) {
                push_joined(&mut out, from, lba);
                from = lba + 1;
            }
            push_joined(&mut out, from, end);
        }
        out
    }

    /// No range at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Bytes of memory, estimated.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.ranges.len() * 48
    }
}

fn push_joined(out: &mut Vec<(u64, u64)>, start: u64, end: u64) {
    if start >= end {
        return;
    }
    match out.last_mut() {
        Some(last) if last.1 == start => last.1 = end,
        _ => out.push((start, end)),
    }
}
