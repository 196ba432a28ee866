//! Blocks that were freed and wait, compressed: in quarantine, or on the way back to the BMap.
//!
//! As runs in a tree each run would take some 80 bytes, and many small overwrites beside a cycle of collection leave one for
//! each. Here a block takes two bytes where few are, less where many are, and never more than 32 MiB per TiB of store in all.
//! Nothing is looked up by length here: what is to be given out goes through the pool.

use crate::alloc::runs::Run;
use crate::types::Gba;
use roaring::RoaringTreemap;

/// Bytes that each group of 65,536 blocks of which any is in a set takes beside its content.
const GROUP_BYTES: u64 = 64;
/// A group of which each block has a bit.
const BITS_BYTES: u64 = 8192;
/// The size of a set is found out anew after so many runs: by then it has grown by some 400 KiB at most.
const MEASURED_EVERY: u32 = 4096;

/// A set of blocks.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    blocks: RoaringTreemap,
    total: u64,
    bytes: u64,
    /// Runs added since the size was found out.
    unmeasured: u32,
    /// Where the next part begins.
    cursor: u64,
}

impl Waiting {
    /// Blocks in the set.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// Bytes of memory, as of a short while ago.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The blocks.
    pub(super) fn blocks(&self) -> &RoaringTreemap {
        &self.blocks
    }

    /// Adds a run. False if a part of it is in the set already: somebody frees a block twice.
    #[must_use]
    pub(super) fn add(&mut self, run: Run) -> bool {
        let added = self.blocks.insert_range(run.start.0..run.start.0 + run.blocks);
        self.total += added;
        self.note_change(1);
        added == run.blocks
    }

    /// True if a block of a run is in the set.
    pub(super) fn overlaps(&self, run: Run) -> bool {
        self.total > 0 && self.blocks.range_cardinality(run.start.0..run.start.0 + run.blocks) > 0
    }

    /// Takes over what another set holds. False if a block is in both.
    #[must_use]
    pub(super) fn absorb(&mut self, other: Self) -> bool {
        let expected = self.total + other.total;
        if self.total == 0 {
            self.blocks = other.blocks;
        } else {
            self.blocks |= other.blocks;
        }
        self.total = self.blocks.len();
        self.measure();
        self.total == expected
    }

    /// Takes so many blocks, or all, in the order of their addresses.
    #[must_use]
    pub(super) fn take(&mut self, blocks: u64) -> Vec<Run> {
        let mut runs = Vec::new();
        self.blocks.iter().take(blocks as usize).for_each(|block| append(&mut runs, block));
        self.remove(&runs);
        runs
    }

    /// Takes the blocks of the next `pages` pages of `page` blocks in which there are any, around and around.
    #[must_use]
    pub(super) fn take_part(&mut self, pages: usize, page: u64) -> Vec<Run> {
        if self.blocks.max().is_none_or(|max| max < self.cursor) {
            self.cursor = 0;
        }
        let mut from_cursor = self.blocks.iter();
        from_cursor.advance_to(self.cursor);
        let (mut runs, mut last, mut met) = (Vec::new(), None, 0);
        for block in from_cursor {
            if last != Some(block / page) {
                (last, met) = (Some(block / page), met + 1);
                if met > pages {
                    break;
                }
            }
            append(&mut runs, block);
        }
        self.remove(&runs);
        self.cursor = runs.last().map_or(0, |run: &Run| run.start.0 + run.blocks);
        runs
    }

    /// Removes runs between which there is nothing else.
    fn remove(&mut self, runs: &[Run]) {
        if let (Some(first), Some(last)) = (runs.first(), runs.last()) {
            self.total -= self.blocks.remove_range(first.start.0..last.start.0 + last.blocks);
            self.note_change(if self.total == 0 { MEASURED_EVERY } else { MEASURED_EVERY / 16 });
        }
    }

    fn note_change(&mut self, weight: u32) {
        self.unmeasured += weight;
        if self.unmeasured >= MEASURED_EVERY {
            self.measure();
        }
    }

    fn measure(&mut self) {
        self.unmeasured = 0;
        let bitmaps = self.blocks.bitmaps().map(|(_, bitmap)| {
            let of = bitmap.statistics();
            // It counts four bytes for each of two. A list is never larger than bits are.
            let lists = u64::from(of.n_array_containers) * BITS_BYTES;
            u64::from(of.n_containers) * GROUP_BYTES
                + of.n_bytes_array_containers.min(lists)
                + of.n_bytes_run_containers
                + u64::from(of.n_bitset_containers) * BITS_BYTES
        });
        self.bytes = bitmaps.sum();
    }
}

fn append(runs: &mut Vec<Run>, block: u64) {
    match runs.last_mut() {
        Some(run) if run.start.0 + run.blocks == block => run.blocks += 1,
        _ => runs.push(Run { start: Gba(block), blocks: 1 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn blocks(runs: &[Run]) -> BTreeSet<u64> {
        runs.iter().flat_map(|run| run.iter()).map(|gba| gba.0).collect()
    }

    proptest! {
        /// Against a plain set: nothing is given twice, nothing is lost, and parts keep to their pages.
        #[test]
        fn behaves_as_a_set(
            steps in proptest::collection::vec((0u8..4, 0u64..4000, 1u64..60), 1..80)
        ) {
            let mut waiting = Waiting::default();
            let mut model = BTreeSet::new();
            for (what, start, blocks_of_step) in steps {
                let run = Run { start: Gba(start), blocks: blocks_of_step };
                let all: BTreeSet<u64> = run.iter().map(|gba| gba.0).collect();
                let fresh = all.is_disjoint(&model);
                prop_assert_eq!(waiting.overlaps(run), !fresh);
                match what {
                    0 => {
                        prop_assert_eq!(waiting.add(run), fresh);
                        model.extend(all);
                    }
                    1 => {
                        let mut other = Waiting::default();
                        prop_assert!(other.add(run));
                        prop_assert_eq!(waiting.absorb(other), fresh);
                        model.extend(all);
                    }
                    2 => {
                        let taken = blocks(&waiting.take(blocks_of_step));
                        prop_assert_eq!(taken.len(), model.len().min(blocks_of_step as usize));
                        prop_assert!(taken.is_subset(&model));
                        model.retain(|block| !taken.contains(block));
                    }
                    _ => {
                        let taken = blocks(&waiting.take_part(3, 256));
                        let pages: BTreeSet<u64> = taken.iter().map(|block| block / 256).collect();
                        prop_assert!(pages.len() <= 3 && (taken.is_empty() == model.is_empty()));
                        prop_assert!(taken.is_subset(&model));
                        model.retain(|block| !taken.contains(block));
                    }
                }
                prop_assert_eq!(waiting.total(), model.len() as u64);
            }
            let mut parts = 0;
            while !model.is_empty() {
                parts += 1;
                prop_assert!(parts < 100, "what is left is never reached");
                let taken = blocks(&waiting.take_part(3, 256));
                model.retain(|block| !taken.contains(block));
            }
        }
    }

    /// Single blocks all over a store of 4 TiB take some bytes each, not what a run in a tree takes.
    #[test]
    fn what_is_scattered_takes_little() {
        let mut waiting = Waiting::default();
        let count = 1_000_000;
        for n in 0..count {
            let block = u64::wrapping_mul(n, 0x9e37_79b9_7f4a_7c15) >> 34;
            // Few of them meet.
            let _ = waiting.add(Run { start: Gba(block), blocks: 1 });
        }
        assert!(waiting.total() > count * 99 / 100);
        assert!(
            waiting.bytes() >= 2 * count && waiting.bytes() < 12 * count,
            "{}",
            waiting.bytes()
        );
    }
}
