//! What a cycle has marked: one bit per block, of all metadata and of as much data as its memory has room for.
//!
//! Bits are kept by extent, and only for extents of which anything was reached. If they are more than the memory allows, the
//! cycle marks in *windows*: each pass walks the same trees and keeps bits of data for a range of extents only. A pass begins with
//! all extents that are left; when the memory is full, the bits of the last extent are dropped, and the window ends before it.
//! So each pass takes as much as fits, whatever the extents hold, and at least one extent.
//!
//! Metadata keeps its bits over all passes, since they tell what was walked already: it is a small part of a store. A later
//! pass has bits of its own to tell what it has walked, and must walk exactly what the first did.

use crate::bits::insert_run;
use blockstore::format::geometry::Geometry;
use blockstore::types::Gba;
use std::ops::Range;

/// Bits of some extents.
#[derive(Debug, Default)]
struct Extents {
    /// By number.
    bits: Vec<Option<Box<[u64]>>>,
    /// How many have bits.
    count: u64,
}

impl Extents {
    fn get(&self, extent: u32) -> Option<&[u64]> {
        self.bits.get(extent as usize)?.as_deref()
    }

    fn add(&mut self, extent: u32, words: usize) {
        let index = extent as usize;
        if self.bits.len() <= index {
            self.bits.resize_with(index + 1, || None);
        }
        self.bits[index] = Some(vec![0; words].into());
        self.count += 1;
    }

    fn get_mut(&mut self, extent: u32) -> Option<&mut [u64]> {
        self.bits.get_mut(extent as usize)?.as_deref_mut()
    }

    /// Takes the bits of the last extent that has any.
    fn pop(&mut self) -> Option<(u32, Box<[u64]>)> {
        while let Some(last) = self.bits.pop() {
            if let Some(bits) = last {
                self.count -= 1;
                return Some((self.bits.len() as u32, bits));
            }
        }
        None
    }

    fn last(&self) -> Option<u32> {
        self.bits.iter().rposition(Option::is_some).map(|index| index as u32)
    }

    fn blocks(&self) -> u64 {
        self.bits.iter().flatten().map(|bits| ones(bits)).sum()
    }
}

fn ones(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// Marked blocks. See the head of this file.
#[derive(Debug)]
pub(crate) struct Marks {
    /// log2 of the blocks of an extent.
    shift: u32,
    extent_count: u32,
    /// Bytes of bits at most, if that is enough for metadata and one extent.
    budget: u64,
    /// Reached by the first pass.
    metadata: Extents,
    /// Reached by this pass, if it is a later one.
    again: Option<Extents>,
    /// Reached by this pass in its window.
    data: Extents,
    /// Extents whose data this pass marks.
    window: Range<u32>,
    reached: u64,
    peak: u64,
}

impl Marks {
    /// Nothing is marked yet; bits may take `budget` bytes.
    pub(crate) fn new(geometry: &Geometry, budget: u64) -> Self {
        Self {
            shift: geometry.extent_blocks.trailing_zeros(),
            extent_count: geometry.extent_count,
            budget,
            metadata: Extents::default(),
            again: None,
            data: Extents::default(),
            window: 0..geometry.extent_count,
            reached: 0,
            peak: 0,
        }
    }

    /// Passes that the marking of extents takes, as far as can be said before.
    pub(crate) fn passes(geometry: &Geometry, budget: u64, data: u64, metadata: u64) -> u64 {
        let room = budget / (geometry.extent_blocks / 8);
        match data + metadata <= room {
            true => 1,
            false => data.div_ceil(room.saturating_sub(2 * metadata).max(1)).max(1),
        }
    }

    /// Extents of which all that is reached is marked, once the pass is over.
    pub(crate) fn window(&self) -> Range<u32> {
        self.window.clone()
    }

    /// True if no pass is left after this one.
    pub(crate) fn is_last_pass(&self) -> bool {
        self.window.end == self.extent_count
    }

    /// Blocks marked in all passes.
    pub(crate) fn reached(&self) -> u64 {
        self.reached
    }

    /// Bytes of bits at the most.
    pub(crate) fn peak(&self) -> u64 {
        self.peak
    }

    /// Ends a pass, and begins the next, which marks data beyond the window of this one.
    ///
    /// # Errors
    /// As [`check_pass`](Self::check_pass).
    pub(crate) fn next_pass(&mut self) -> Result<(), &'static str> {
        self.check_pass()?;
        self.data = Extents::default();
        self.again = Some(Extents::default());
        self.window = self.window.end..self.extent_count;
        Ok(())
    }

    /// Makes sure that a pass that is over has walked what the first did.
    ///
    /// # Errors
    /// Words: it has not, so what it found is not to be relied on.
    pub(crate) fn check_pass(&self) -> Result<(), &'static str> {
        match &self.again {
            Some(again) if again.blocks() != self.metadata.blocks() => {
                Err("a later pass over its map found less than the first")
            }
            _ => Ok(()),
        }
    }

    /// Marks a block of metadata; true if this pass has not reached it before.
    ///
    /// # Errors
    /// Words: a later pass reached it, and the first did not.
    pub(crate) fn insert_metadata(&mut self, gba: Gba) -> Result<bool, &'static str> {
        let (extent, within) = self.place(gba);
        let first_pass = self.again.is_none();
        if !first_pass && !contains(self.metadata.get(extent), within) {
            return Err("a later pass over its map found more than the first");
        }
        let words = self.words();
        let set = self.again.as_mut().unwrap_or(&mut self.metadata);
        if set.get(extent).is_none() {
            set.add(extent, words);
            self.drop_data(1);
            self.note_peak();
        }
        let set = self.again.as_mut().unwrap_or(&mut self.metadata);
        let Some(bits) = set.get_mut(extent) else { return Ok(false) };
        let fresh = insert_run(bits, within, 1) == 1;
        self.reached += u64::from(fresh && first_pass);
        Ok(fresh)
    }

    /// Marks blocks of data that lie in one extent, if it is in the window.
    #[inline]
    pub(crate) fn insert_data(&mut self, first: Gba, blocks: u64) {
        let (extent, within) = self.place(first);
        if !self.window.contains(&extent) {
            return;
        }
        if self.data.get(extent).is_none() && !self.make_room(extent) {
            return;
        }
        if let Some(bits) = self.data.get_mut(extent) {
            self.reached += insert_run(bits, within, blocks);
        }
    }

    /// The 64 blocks from `first` on, a multiple of 64, of an extent in the window or before; the first is the lowest bit.
    pub(crate) fn word(&self, first: Gba) -> u64 {
        let (extent, within) = self.place(first);
        let word = |set: &Extents| set.get(extent).map_or(0, |bits| bits[(within / 64) as usize]);
        word(&self.metadata) | word(&self.data)
    }

    fn place(&self, gba: Gba) -> (u32, u64) {
        ((gba.0 >> self.shift) as u32, gba.0 & ((1 << self.shift) - 1))
    }

    /// Words of an extent's bits.
    fn words(&self) -> usize {
        1 << (self.shift - 6)
    }

    /// Bytes of all bits.
    fn bytes(&self) -> u64 {
        let again = self.again.as_ref().map_or(0, |again| again.count);
        (self.metadata.count + again + self.data.count) * self.words() as u64 * 8
    }

    fn note_peak(&mut self) {
        self.peak = self.peak.max(self.bytes());
    }

    /// Gives an extent of the window bits of data; false if there is no room, and the window ends before it.
    #[cold]
    fn make_room(&mut self, extent: u32) -> bool {
        let bytes = self.words() as u64 * 8;
        while self.bytes() + bytes > self.budget {
            match self.data.last() {
                Some(last) if last < extent => {
                    self.window.end = extent;
                    return false;
                }
                Some(_) => self.drop_last(),
                None => break,
            }
        }
        self.data.add(extent, self.words());
        self.note_peak();
        true
    }

    /// Keeps to the budget after metadata has grown, if that leaves `least` extents of data.
    fn drop_data(&mut self, least: u64) {
        while self.bytes() > self.budget && self.data.count > least {
            self.drop_last();
        }
    }

    fn drop_last(&mut self) {
        if let Some((extent, bits)) = self.data.pop() {
            self.reached -= ones(&bits);
            self.window.end = extent;
        }
    }
}

fn contains(words: Option<&[u64]>, within: u64) -> bool {
    words.is_some_and(|words| words[(within / 64) as usize] >> (within % 64) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::collections::BTreeSet;

    const EXTENT: u64 = 256;

    fn geometry() -> Geometry {
        Geometry::plan(64 << 20, 1 << 20).expect("a geometry")
    }

    /// Whatever is reached in whatever order, with room for any number of extents: the windows together are all of it, the bits
    /// never take more than the budget, or than metadata and one extent, and there are no more passes than that takes.
    #[test]
    fn windows_add_up_to_one() {
        for seed in 0..200 {
            let mut rng = StdRng::seed_from_u64(seed);
            let room = rng.random_range(0..70);
            let metadata: BTreeSet<u64> = (0..rng.random_range(1..200))
                .map(|_| rng.random_range(EXTENT..EXTENT * 3))
                .collect();
            let data: Vec<(u64, u64)> = (0..rng.random_range(0..400))
                .map(|_| (rng.random_range(3..64) * EXTENT, rng.random_range(0..250)))
                .map(|(extent, within)| (extent + within, 1 + within % 6))
                .collect();
            let mut marks = Marks::new(&geometry(), room * EXTENT / 8);
            let (mut found, mut passes, mut from) = (BTreeSet::new(), 0, 0);
            loop {
                passes += 1;
                for &block in &metadata {
                    assert_eq!(marks.insert_metadata(Gba(block)), Ok(true));
                    assert_eq!(marks.insert_metadata(Gba(block)), Ok(false));
                }
                data.iter().for_each(|&(first, blocks)| marks.insert_data(Gba(first), blocks));
                let window = marks.window();
                assert_eq!(window.start, from);
                from = window.end;
                let blocks = u64::from(window.start) * EXTENT..u64::from(window.end) * EXTENT;
                for first in blocks.step_by(64) {
                    let word = marks.word(Gba(first));
                    found.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| first + bit));
                }
                if marks.is_last_pass() {
                    break;
                }
                marks.next_pass().expect("the same metadata");
            }
            let runs = data.iter().flat_map(|&(first, blocks)| first..first + blocks);
            let all: BTreeSet<u64> = runs.chain(metadata.iter().copied()).collect();
            assert_eq!(found, all, "seed {seed}");
            assert_eq!(marks.reached(), all.len() as u64, "seed {seed}");
            let extents = |set: &BTreeSet<u64>| {
                set.iter().map(|block| block / EXTENT).collect::<BTreeSet<_>>().len() as u64
            };
            let (of_metadata, all) = (extents(&metadata), extents(&all));
            let least = if passes > 1 { 2 * of_metadata } else { of_metadata } + 1;
            assert!(marks.peak() <= room.max(least) * EXTENT / 8, "seed {seed}: {}", marks.peak());
            let expected =
                Marks::passes(&geometry(), room * EXTENT / 8, all - of_metadata, of_metadata);
            assert!(passes <= expected, "seed {seed}: {passes} passes, {expected} expected");
        }
    }

    /// A later pass that walks anything else than the first is not relied on.
    #[test]
    fn a_pass_that_differs_is_noticed() {
        let mut marks = Marks::new(&geometry(), 0);
        marks.insert_metadata(Gba(300)).expect("the first pass");
        marks.insert_metadata(Gba(301)).expect("the first pass");
        marks.insert_data(Gba(1000), 1);
        marks.insert_data(Gba(2000), 1);
        marks.next_pass().expect("the first pass");
        marks.insert_metadata(Gba(300)).expect("as before");
        assert!(marks.insert_metadata(Gba(302)).is_err());
        assert!(marks.check_pass().is_err());
        marks.insert_metadata(Gba(301)).expect("as before");
        assert!(marks.check_pass().is_ok() && marks.is_last_pass());
    }
}
