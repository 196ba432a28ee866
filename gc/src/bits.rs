//! One bit per block of the store.

use blockstore::types::Gba;

/// A set of blocks.
#[derive(Clone, Debug)]
pub struct Bits {
    words: Vec<u64>,
}

impl Bits {
    /// An empty set that can hold the blocks below `blocks`.
    #[must_use]
    pub fn new(blocks: u64) -> Self {
        Self { words: vec![0; blocks.div_ceil(64) as usize] }
    }

    /// True if the block is in the set. Blocks beyond the end are not.
    #[must_use]
    #[inline]
    pub fn contains(&self, gba: Gba) -> bool {
        self.words.get((gba.0 / 64) as usize).is_some_and(|word| word >> (gba.0 % 64) & 1 == 1)
    }

    /// Puts a block in; false if it was in already. Blocks beyond the end are ignored.
    #[inline]
    pub fn insert(&mut self, gba: Gba) -> bool {
        let Some(word) = self.words.get_mut((gba.0 / 64) as usize) else { return false };
        let bit = 1 << (gba.0 % 64);
        let fresh = *word & bit == 0;
        *word |= bit;
        fresh
    }

    /// Puts `blocks` blocks in from `first` on; how many of them were not in. Blocks beyond the end are ignored.
    #[inline]
    pub fn insert_run(&mut self, first: Gba, blocks: u64) -> u64 {
        let end = (first.0 + blocks).min(self.words.len() as u64 * 64);
        let (mut at, mut fresh) = (first.0, 0);
        while at < end {
            let bits = (64 - at % 64).min(end - at);
            let mask = (!0 >> (64 - bits)) << (at % 64);
            let word = &mut self.words[(at / 64) as usize];
            fresh += u64::from((mask & !*word).count_ones());
            *word |= mask;
            at += bits;
        }
        fresh
    }

    /// The 64 blocks from `first` on, a multiple of 64; the first is the lowest bit. Blocks beyond the end are not in the set.
    #[must_use]
    #[inline]
    pub fn word(&self, first: Gba) -> u64 {
        self.words.get((first.0 / 64) as usize).copied().unwrap_or(0)
    }

    /// Takes a block out.
    pub fn remove(&mut self, gba: Gba) {
        if let Some(word) = self.words.get_mut((gba.0 / 64) as usize) {
            *word &= !(1 << (gba.0 % 64));
        }
    }

    /// Blocks in the set.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// True if no block is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// Blocks that are in this set but not in the other.
    #[must_use]
    pub fn count_without(&self, other: &Self) -> u64 {
        let pairs = self.words.iter().zip(&other.words);
        pairs.map(|(a, b)| u64::from((a & !b).count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_their_blocks() {
        for (first, blocks) in [(0, 1), (0, 64), (63, 2), (5, 200), (100, 92), (190, 50), (191, 0)]
        {
            let (mut runs, mut single) = (Bits::new(192), Bits::new(192));
            runs.insert(Gba(101));
            single.insert(Gba(101));
            let fresh = (first..first + blocks).filter(|&block| single.insert(Gba(block))).count();
            assert_eq!(runs.insert_run(Gba(first), blocks), fresh as u64, "{first}, {blocks}");
            assert_eq!(runs.words, single.words, "{first}, {blocks}");
            assert_eq!(runs.word(Gba(128)), single.words[2]);
        }
    }

    #[test]
    fn behaves_as_a_set() {
        let mut bits = Bits::new(100);
        assert!(bits.is_empty());
        assert!(bits.insert(Gba(99)) && !bits.insert(Gba(99)));
        assert!(bits.insert(Gba(0)) && bits.contains(Gba(0)) && !bits.contains(Gba(1)));
        assert!(!bits.insert(Gba(1 << 40)) && !bits.contains(Gba(1 << 40)));
        let mut other = Bits::new(100);
        other.insert(Gba(0));
        assert_eq!((bits.len(), bits.count_without(&other)), (2, 1));
    }
}
