//! Free blocks in memory, as runs. Pure.

use crate::types::Gba;
use std::collections::{BTreeMap, BTreeSet};

/// Consecutive blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Run {
    /// First block.
    pub start: Gba,
    /// How many, at least 1.
    pub blocks: u64,
}

impl Run {
    /// The addresses, in order.
    pub fn iter(self) -> impl Iterator<Item = Gba> {
        (self.start.0..self.start.0 + self.blocks).map(Gba)
    }
}

/// A set of blocks, kept as maximal runs.
#[derive(Debug, Default)]
pub struct FreeRuns {
    by_start: BTreeMap<u64, u64>,
    by_length: BTreeSet<(u64, u64)>,
    total: u64,
}

impl FreeRuns {
    /// Blocks in the set.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// True if a block of a run is in the set.
    #[must_use]
    pub fn overlaps(&self, run: Run) -> bool {
        let end = run.start.0 + run.blocks;
        let before = self.by_start.range(..end).next_back();
        before.is_some_and(|(&start, &blocks)| start + blocks > run.start.0)
    }

    /// The runs, by address.
    pub fn runs(&self) -> impl Iterator<Item = Run> {
        self.by_start.iter().map(|(&start, &blocks)| Run { start: Gba(start), blocks })
    }

    /// Adds a run and merges it with its neighbours. False, and nothing is added, if a part of it is
    /// in the set already: somebody frees a block twice.
    #[must_use]
    pub fn add(&mut self, run: Run) -> bool {
        let (mut start, mut end) = (run.start.0, run.start.0 + run.blocks);
        if self.overlaps(run) {
            return false;
        }
        let before = self.by_start.range(..end).next_back().map(|(&s, &l)| (s, s + l));
        if let Some((before_start, before_end)) = before
            && before_end == start
        {
            self.remove(before_start);
            start = before_start;
        }
        if let Some(&after) = self.by_start.get(&end) {
            self.remove(end);
            end += after;
        }
        self.insert(start, end - start);
        true
    }

    /// Takes `blocks` blocks, from the longest runs first; `None` if there are not as many. Sorted by
    /// address, so that blocks given out in this order lie in virtual order.
    #[must_use]
    pub fn take(&mut self, blocks: u64) -> Option<Vec<Run>> {
        if blocks > self.total {
            return None;
        }
        let mut missing = blocks;
        let mut taken = Vec::new();
        while missing > 0 {
            let &(length, start) = self.by_length.last()?;
            self.remove(start);
            let used = length.min(missing);
            if used < length {
                self.insert(start + used, length - used);
            }
            taken.push(Run { start: Gba(start), blocks: used });
            missing -= used;
        }
        taken.sort_unstable();
        Some(taken)
    }

    /// True if [`take`](Self::take) would give `blocks` blocks in more than `runs` runs.
    #[must_use]
    pub fn is_scattered(&self, blocks: u64, runs: usize) -> bool {
        let longest: u64 = self.by_length.iter().rev().take(runs).map(|(length, _)| length).sum();
        longest < blocks
    }

    /// Takes the shortest runs until at most `keep` blocks are left.
    #[must_use]
    pub fn shed(&mut self, keep: u64) -> Vec<Run> {
        let mut shed = Vec::new();
        while self.total > keep {
            let Some(&(length, start)) = self.by_length.first() else { break };
            self.remove(start);
            let used = length.min(self.total + length - keep);
            if used < length {
                self.insert(start, length - used);
            }
            shed.push(Run { start: Gba(start + length - used), blocks: used });
        }
        shed
    }

    fn insert(&mut self, start: u64, blocks: u64) {
        self.by_start.insert(start, blocks);
        self.by_length.insert((blocks, start));
        self.total += blocks;
    }

    fn remove(&mut self, start: u64) {
        if let Some(blocks) = self.by_start.remove(&start) {
            self.by_length.remove(&(blocks, start));
            self.total -= blocks;
        }
    }
}

/// Merges sorted or unsorted addresses into runs.
#[must_use]
pub fn merge(mut blocks: Vec<Gba>) -> Vec<Run> {
    blocks.sort_unstable();
    let mut runs: Vec<Run> = Vec::new();
    for gba in blocks {
        match runs.last_mut() {
            Some(run) if run.start.0 + run.blocks == gba.0 => run.blocks += 1,
            _ => runs.push(Run { start: gba, blocks: 1 }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[derive(Clone, Debug)]
    enum Step {
        Add(u64, u64),
        Take(u64),
        Shed(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u64..200, 1u64..20).prop_map(|(s, l)| Step::Add(s, l)),
            (0u64..60).prop_map(Step::Take),
            (0u64..200).prop_map(Step::Shed),
        ]
    }

    proptest! {
        /// Against a plain set of blocks: nothing is given twice, nothing is lost.
        #[test]
        fn behaves_as_a_set(steps in proptest::collection::vec(step(), 1..80)) {
            let mut runs = FreeRuns::default();
            let mut model = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Add(start, blocks) => {
                        let fresh = (start..start + blocks).all(|b| !model.contains(&b));
                        prop_assert_eq!(runs.add(Run { start: Gba(start), blocks }), fresh);
                        if fresh {
                            model.extend(start..start + blocks);
                        }
                    }
                    Step::Take(blocks) => match runs.take(blocks) {
                        None => prop_assert!(blocks > model.len() as u64),
                        Some(taken) => {
                            prop_assert_eq!(taken.iter().map(|r| r.blocks).sum::<u64>(), blocks);
                            for gba in taken.iter().flat_map(|r| r.iter()) {
                                prop_assert!(model.remove(&gba.0));
                            }
                        }
                    },
                    Step::Shed(keep) => {
                        for gba in runs.shed(keep).iter().flat_map(|r| r.iter()) {
                            prop_assert!(model.remove(&gba.0));
                        }
                        prop_assert!(runs.total() <= keep);
                    }
                }
                prop_assert_eq!(runs.total(), model.len() as u64);
            }
        }
    }

    #[test]
    fn long_runs_are_given_first_and_in_order() {
        let mut runs = FreeRuns::default();
        for (start, blocks) in [(10, 2), (100, 50), (300, 40)] {
            assert!(runs.add(Run { start: Gba(start), blocks }));
        }
        let taken = runs.take(60).expect("enough");
        assert_eq!(
            taken,
            [Run { start: Gba(100), blocks: 50 }, Run { start: Gba(300), blocks: 10 }]
        );
        assert_eq!(runs.shed(30), [Run { start: Gba(10), blocks: 2 }]);
    }
}
