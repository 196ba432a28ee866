//! Ranges that the store is known not to have: they read as zeros, with the store or without.
//!
//! Nothing newer is ever below a hole: a write, a patch or a zeroing takes its blocks out at once, so that what leaves
//! the index later does not bring a hole back. To forget a hole is always safe; it is done when there are too many.

use blockstore::types::Lba;
use std::collections::BTreeMap;

/// Most ranges kept, which bounds the memory: about 1 MiB.
const RANGES_MAX: usize = 32_768;

/// See the module.
#[derive(Debug, Default)]
pub struct Holes {
    /// start → end, disjoint and not touching
    ranges: BTreeMap<u64, u64>,
    blocks: u64,
}

impl Holes {
    /// True if the block is in a hole.
    #[must_use]
    pub fn contains(&self, lba: Lba) -> bool {
        self.ranges.range(..=lba.0).next_back().is_some_and(|(_, end)| lba.0 < *end)
    }

    /// All of them, sorted: the first block and how many.
    pub fn ranges(&self) -> impl Iterator<Item = (Lba, u64)> + '_ {
        self.ranges.iter().map(|(&start, &end)| (Lba(start), end - start))
    }

    /// Blocks in all holes.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Adds `start..end`.
    pub fn insert(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let (mut from, mut to) = (start, end);
        if let Some((&left, &left_end)) = self.ranges.range(..start).next_back()
            && left_end >= start
        {
            (from, to) = (left, to.max(left_end));
        }
        let joined: Vec<u64> = self.ranges.range(from..=end).map(|(&start, _)| start).collect();
        for start in joined {
            to = to.max(self.take(start));
        }
        self.put(from, to);
        if self.ranges.len() > RANGES_MAX {
            self.take(from);
        }
    }

    /// Forgets `start..end`.
    pub fn remove(&mut self, start: u64, end: u64) {
        if self.ranges.is_empty() {
            return;
        }
        if let Some((&left, &left_end)) = self.ranges.range(..start).next_back()
            && left_end > start
        {
            self.take(left);
            self.put(left, start);
            self.put(end, left_end);
            if self.ranges.len() > RANGES_MAX && end < left_end {
                self.take(if start - left < left_end - end { left } else { end });
            }
        }
        let inside: Vec<u64> = self.ranges.range(start..end).map(|(&start, _)| start).collect();
        for old in inside {
            let old_end = self.take(old);
            self.put(end, old_end);
        }
    }

    /// Whether the block at `at` is in a hole, and the end of the run around it for which that is so.
    pub(super) fn run(&self, at: u64) -> (bool, u64) {
        let around = self.ranges.range(..=at).next_back().map(|(_, &end)| end);
        let next = || self.ranges.range(at..).next().map_or(u64::MAX, |(&start, _)| start);
        around.filter(|end| at < *end).map_or_else(|| (false, next()), |end| (true, end))
    }

    /// Bytes of memory, estimated.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.ranges.len() * 32
    }

    /// No hole at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    fn put(&mut self, start: u64, end: u64) {
        if start < end {
            self.blocks += end - start;
            self.ranges.insert(start, end);
        }
    }

    /// Takes out the range that begins at `start`; returns its end.
    fn take(&mut self, start: u64) -> u64 {
        let end = self.ranges.remove(&start).unwrap_or(start);
        self.blocks -= end - start;
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn holes_agree_with_a_set(ops in prop::collection::vec((any::<bool>(), 0u64..60, 1u64..20), 1..80)) {
            let (mut holes, mut model) = (Holes::default(), BTreeSet::new());
            for (add, start, blocks) in ops {
                let range = start..start + blocks;
                if add {
                    holes.insert(range.start, range.end);
                    model.extend(range);
                } else {
                    holes.remove(range.start, range.end);
                    model.retain(|lba| !range.contains(lba));
                }
                prop_assert_eq!(holes.blocks(), model.len() as u64);
                for lba in 0..90 {
                    prop_assert_eq!(holes.contains(Lba(lba)), model.contains(&lba));
                }
                // Each is one range: none touches the next.
                let ends: Vec<_> = holes.ranges.iter().collect();
                prop_assert!(ends.windows(2).all(|pair| pair[0].1 < pair[1].0));
            }
        }
    }

    #[test]
    fn there_are_never_too_many() {
        let mut holes = Holes::default();
        holes.insert(0, 1 << 36);
        for n in 1..2 * RANGES_MAX as u64 {
            holes.remove(n * 1000, n * 1000 + 1);
        }
        assert!(holes.ranges.len() <= RANGES_MAX);
        assert!(holes.contains(Lba(1 << 35)), "the long ones stay");
        assert!(!holes.contains(Lba(5000)));
        for n in 1..2 * RANGES_MAX as u64 {
            holes.insert(n * 1000 + 2, n * 1000 + 3);
        }
        assert!(holes.ranges.len() <= RANGES_MAX);
    }
}
