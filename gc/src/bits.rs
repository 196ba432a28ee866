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

/// Sets `blocks` bits from bit `first` on, which must be there; how many of them were not set.
#[inline]
pub(crate) fn insert_run(words: &mut [u64], first: u64, blocks: u64) -> u64 {
    let (mut at, end, mut fresh) = (first, first + blocks, 0);
    while at < end {
        let bits = (64 - at % 64).min(end - at);
        let mask = (!0 >> (64 - bits)) << (at % 64);
        let word = &mut words[(at / 64) as usize];
        fresh += u64::from((mask & !*word).count_ones());
        *word |= mask;
        at += bits;
    }
    fresh
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_their_blocks() {
        for (first, blocks) in [(0, 1), (0, 64), (63, 2), (5, 187), (100, 92), (190, 2), (191, 0)] {
            let (mut run, mut single) = ([0; 3], Bits::new(192));
            insert_run(&mut run, 101, 1);
            single.insert(Gba(101));
            let fresh = (first..first + blocks).filter(|&block| single.insert(Gba(block))).count();
            assert_eq!(insert_run(&mut run, first, blocks), fresh as u64, "{first}, {blocks}");
            assert_eq!(run, *single.words, "{first}, {blocks}");
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
