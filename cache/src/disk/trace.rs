//! The boot trace: what a guest reads in the first minutes after its driver came up. Pure.
//!
//! It is what the disk needs to boot from, and worth having locally before an outage. Bounded in time, blocks and
//! ranges: neighbouring ranges are joined, the closest ones first, whatever lies in between.

use blockstore::types::{BLOCK_SIZE, Lba};
use std::collections::BTreeMap;

/// Ranges that a trace may have when it is kept.
pub const RANGES_MAX: usize = 400;
/// Blocks that a range may have, so that it fits its place in the slot.
pub const RANGE_BLOCKS_MAX: u64 = (1 << 24) - 1;
/// Blocks after which a trace is complete: 256 MiB.
const BLOCKS_MAX: u64 = (256 << 20) / BLOCK_SIZE as u64;
/// Seconds after which a trace is complete.
const SECONDS_MAX: u32 = 120;
/// Blocks between two ranges that may be taken along: 1 MiB.
const GAP_MAX: u64 = 256;
/// Ranges kept while recording; beyond, the closest are joined.
const RECORDED_MAX: usize = 8 * RANGES_MAX;

/// Ranges of blocks, sorted and disjoint: first block, number of blocks.
pub type Ranges = Vec<(Lba, u64)>;

/// A trace being recorded.
#[derive(Debug, Default)]
pub struct Recorder {
    /// start → end
    ranges: BTreeMap<u64, u64>,
    blocks: u64,
    seconds: u32,
}

impl Recorder {
    /// The guest read these blocks.
    pub fn read(&mut self, lba: Lba, blocks: u64) {
        let (mut from, mut to) = (lba.0, lba.0 + blocks);
        if let Some((&left, &left_end)) = self.ranges.range(..=from).next_back()
            && left_end >= from
        {
            if left_end >= to {
                return;
            }
            from = left;
        }
        let joined: Vec<u64> = self.ranges.range(from..=to).map(|(&start, _)| start).collect();
        for start in joined {
            let end = self.ranges.remove(&start).unwrap_or(start);
            self.blocks -= end - start;
            to = to.max(end);
        }
        self.ranges.insert(from, to);
        self.blocks += to - from;
        if self.ranges.len() > RECORDED_MAX {
            let fewer = join(std::mem::take(&mut self.ranges), RECORDED_MAX / 2);
            self.blocks = fewer.iter().map(|(start, end)| end - start).sum();
            self.ranges = fewer;
        }
    }

    /// A second went by.
    pub fn tick(&mut self) {
        self.seconds += 1;
    }

    /// Nothing more is to be recorded.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.seconds >= SECONDS_MAX || self.blocks >= BLOCKS_MAX
    }

    /// The trace.
    #[must_use]
    pub fn finish(self) -> Ranges {
        let ranges = join(self.ranges, RANGES_MAX).into_iter();
        ranges.map(|(start, end)| (Lba(start), (end - start).min(RANGE_BLOCKS_MAX))).collect()
    }
}

/// Closes the smallest gaps, none longer than [`GAP_MAX`], until at most `most` ranges are left. If that is not enough, the
/// longest ones are kept.
fn join(ranges: BTreeMap<u64, u64>, most: usize) -> BTreeMap<u64, u64> {
    if ranges.len() <= most {
        return ranges;
    }
    let list: Vec<(u64, u64)> = ranges.into_iter().collect();
    let gaps = list.windows(2).map(|pair| pair[1].0 - pair[0].1);
    let mut order: Vec<(u64, usize)> = gaps.zip(1..).filter(|(gap, _)| *gap <= GAP_MAX).collect();
    order.sort_unstable();
    order.truncate(list.len() - most);
    let mut closed = vec![false; list.len()];
    order.iter().for_each(|(_, at)| closed[*at] = true);
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (&(start, end), closed) in list.iter().zip(closed) {
        match joined.last_mut() {
            Some(last) if closed => last.1 = end,
            _ => joined.push((start, end)),
        }
    }
    joined.sort_unstable_by_key(|(start, end)| std::cmp::Reverse(end - start));
    joined.truncate(most);
    joined.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_merged() {
        let mut recorder = Recorder::default();
        for (lba, blocks) in [(10, 5), (15, 5), (12, 2), (100, 1), (8, 4), (99, 3)] {
            recorder.read(Lba(lba), blocks);
        }
        assert_eq!(recorder.blocks, 15);
        assert_eq!(recorder.finish(), [(Lba(8), 12), (Lba(99), 3)]);
    }

    #[test]
    fn a_trace_is_bounded_in_ranges_blocks_and_time() {
        let mut recorder = Recorder::default();
        // Pairs, close to each other and far from the next.
        for n in 0..3000 {
            recorder.read(Lba(n * 10_000), 1);
            recorder.read(Lba(n * 10_000 + 3), 1);
        }
        assert!(!recorder.is_complete());
        let ranges = recorder.finish();
        assert!(ranges.len() <= RANGES_MAX && !ranges.is_empty());
        assert!(ranges.windows(2).all(|pair| pair[0].0.0 + pair[0].1 < pair[1].0.0));
        assert!(ranges.iter().all(|(_, blocks)| *blocks == 4), "what is far apart is not joined");

        let mut recorder = Recorder::default();
        recorder.read(Lba(5), BLOCKS_MAX);
        assert!(recorder.is_complete());
        let mut recorder = Recorder::default();
        (0..SECONDS_MAX).for_each(|_| recorder.tick());
        assert!(recorder.is_complete());
    }

    #[test]
    fn the_closest_ranges_are_joined() {
        let ranges = [(0, 1), (2, 3), (100, 101), (103, 104), (500, 501)].into();
        let joined: Vec<_> = join(ranges, 3).into_iter().collect();
        assert_eq!(joined, [(0, 3), (100, 104), (500, 501)]);
    }
}
