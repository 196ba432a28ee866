//! What is remembered of each block while sizes are computed: four bits, and a fifth for a time. Memory is taken where blocks are
//! reached, so what a store does not use costs nothing.

use blockstore::types::Gba;

/// How many lead to a block directly: nodes, or roots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reached {
    Never,
    /// By one node of one root, or as one root.
    Once,
    /// Several times, by one disk and its snapshots.
    Again,
    /// By several disks, or their snapshots.
    ByOthers,
}

/// Who leads to a block, directly or not, beside others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Holders(u64);

impl Holders {
    pub(super) const NONE: Self = Self(0);
    /// A disk as it is now.
    pub(super) const PRESENT: Self = Self(0b0100);
    /// A snapshot that a clone hangs on.
    pub(super) const CLONED: Self = Self(0b1000);

    /// Who keeps a block even if all snapshots that can be deleted are.
    pub(super) const STAYING: Self = Self(Self::PRESENT.0 | Self::CLONED.0);

    /// True if one of them does.
    pub(super) fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

const PAGE_WORDS: usize = 4096;
/// Blocks of a word.
const BLOCKS: u64 = 16;

type Page = Box<[u64; PAGE_WORDS]>;

/// Four bits per block.
#[derive(Debug)]
pub(super) struct Marks {
    pages: Vec<Option<Page>>,
}

impl Marks {
    pub(super) fn new(blocks: u64) -> Self {
        Self { pages: vec![None; blocks.div_ceil(BLOCKS * PAGE_WORDS as u64) as usize] }
    }

    fn get(&self, gba: Gba) -> u64 {
        let word = gba.0 / BLOCKS;
        let page = self.pages.get((word / PAGE_WORDS as u64) as usize).and_then(Option::as_ref);
        page.map_or(0, |page| page[word as usize % PAGE_WORDS] >> (gba.0 % BLOCKS * 4) & 0xf)
    }

    /// Its word, and where in it the block's bits are. Blocks beyond the end were refused before.
    fn word(&mut self, gba: Gba) -> (&mut u64, u64) {
        let word = gba.0 / BLOCKS;
        let page = &mut self.pages[(word / PAGE_WORDS as u64) as usize];
        let page = page.get_or_insert_with(|| Box::new([0; PAGE_WORDS]));
        (&mut page[word as usize % PAGE_WORDS], gba.0 % BLOCKS * 4)
    }

    pub(super) fn reached(&self, gba: Gba) -> Reached {
        match self.get(gba) & 0b11 {
            0 => Reached::Never,
            1 => Reached::Once,
            2 => Reached::Again,
            _ => Reached::ByOthers,
        }
    }

    pub(super) fn holders(&self, gba: Gba) -> Holders {
        Holders(self.get(gba) & 0b1100)
    }

    /// Raises how it was reached, and adds to who holds it.
    pub(super) fn note(&mut self, gba: Gba, reached: Reached, holders: Holders) {
        let (word, shift) = self.word(gba);
        let before = *word >> shift & 0xf;
        let after = (before & 0b11).max(reached as u64) | (before & 0b1100) | holders.0;
        *word = *word & !(0xf << shift) | after << shift;
    }
}

const CHUNK_WORDS: usize = 64;

/// The blocks that the present disk has led to, while disks are gone through one after the other. To empty it costs as much as
/// was put in.
#[derive(Debug)]
pub(super) struct OfDisk {
    chunks: Vec<Option<Box<[u64; CHUNK_WORDS]>>>,
    used: Vec<u32>,
}

impl OfDisk {
    pub(super) fn new(blocks: u64) -> Self {
        Self {
            chunks: vec![None; blocks.div_ceil(64 * CHUNK_WORDS as u64) as usize],
            used: Vec::new(),
        }
    }

    /// False if it was in already.
    pub(super) fn insert(&mut self, gba: Gba) -> bool {
        let (word, bit) = (gba.0 / 64, 1 << (gba.0 % 64));
        let (chunk, word) = ((word / CHUNK_WORDS as u64) as usize, word as usize % CHUNK_WORDS);
        let words = self.chunks[chunk].get_or_insert_with(|| Box::new([0; CHUNK_WORDS]));
        if words[word] & bit != 0 {
            return false;
        }
        // The first block of a chunk that was empty: looked for only when this word was.
        if words[word] == 0 && words.iter().all(|word| *word == 0) {
            self.used.push(chunk as u32);
        }
        words[word] |= bit;
        true
    }

    pub(super) fn clear(&mut self) {
        for chunk in self.used.drain(..) {
            if let Some(words) = &mut self.chunks[chunk as usize] {
                **words = [0; CHUNK_WORDS];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_of_neighbours_do_not_touch_each_other() {
        let mut marks = Marks::new(200_000);
        marks.note(Gba(16), Reached::Once, Holders::NONE);
        marks.note(Gba(17), Reached::ByOthers, Holders::CLONED);
        marks.note(Gba(199_999), Reached::Again, Holders::PRESENT);
        marks.note(Gba(17), Reached::Once, Holders::PRESENT);
        assert_eq!(marks.reached(Gba(15)), Reached::Never);
        assert_eq!(
            (marks.reached(Gba(16)), marks.holders(Gba(16))),
            (Reached::Once, Holders::NONE)
        );
        assert_eq!(marks.reached(Gba(17)), Reached::ByOthers, "it does not fall back");
        let holders = marks.holders(Gba(17));
        assert!(holders.has(Holders::PRESENT) && holders.has(Holders::CLONED));
        assert_eq!(marks.reached(Gba(199_999)), Reached::Again);
        assert_eq!(marks.reached(Gba(100_000)), Reached::Never);
    }

    #[test]
    fn a_disk_s_blocks_are_forgotten_together() {
        let mut blocks = OfDisk::new(1 << 20);
        for _ in 0..2 {
            assert!(
                blocks.insert(Gba(1)) && blocks.insert(Gba(4095)) && blocks.insert(Gba(1 << 19))
            );
            assert!(!blocks.insert(Gba(1)) && !blocks.insert(Gba(1 << 19)));
            assert_eq!(blocks.used.len(), 2);
            blocks.clear();
        }
    }
}
