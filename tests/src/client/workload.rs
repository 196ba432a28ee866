//! A seeded stream of requests: what a nasty guest might send, reproducible from the seed alone.

use std::ops::Range;

use bench::load::Random;

use super::BLOCK_SECTORS;
use super::oracle::Mutation;

/// Longest request in sectors (256 KiB).
pub const SECTORS_MAX: u64 = 512;

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Change sectors.
    Mutate(Mutation, Range<u64>),
    /// Read sectors and check them.
    Read(Range<u64>),
    /// Flush.
    Flush,
}

/// Shares of the kinds, in percent; the rest is 4 KiB writes.
#[derive(Debug, Clone, Copy)]
pub struct Mix {
    /// Reads.
    pub reads: u64,
    /// Flushes.
    pub flushes: u64,
    /// Writes of several blocks, up to 256 KiB, aligned or not.
    pub large: u64,
    /// Writes of 1 to 7 sectors at any sector: within a block or across two.
    pub small: u64,
    /// Write-zeroes of any size and place.
    pub zeroes: u64,
    /// Discards of any size and place.
    pub discards: u64,
    /// Deepest queue.
    pub depth_max: usize,
}

impl Default for Mix {
    fn default() -> Self {
        Self { reads: 20, flushes: 5, large: 10, small: 20, zeroes: 4, discards: 4, depth_max: 64 }
    }
}

impl Mix {
    /// Without discards and zeroes, for servers that do not offer them.
    #[must_use]
    pub fn plain() -> Self {
        Self { zeroes: 0, discards: 0, ..Self::default() }
    }
}

/// The stream.
#[derive(Debug)]
pub struct Workload {
    random: Random,
    mix: Mix,
    sectors: u64,
    hot: Range<u64>,
    tail: u64,
    depth: usize,
    steps_at_depth: u64,
}

impl Workload {
    /// A stream for a disk of `sectors`.
    ///
    /// # Panics
    /// When the disk is smaller than the longest request.
    #[must_use]
    pub fn new(seed: u64, mix: Mix, sectors: u64) -> Self {
        assert!(sectors >= 2 * SECTORS_MAX, "a disk of {sectors} sectors is too small");
        // Spread the seed: neighbouring seeds must not give neighbouring streams.
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        random.word();
        let hot_len = (sectors / 16).max(2 * SECTORS_MAX).min(sectors);
        let hot_start = random.below(sectors - hot_len + 1);
        let hot = hot_start..hot_start + hot_len;
        Self { random, mix, sectors, hot, tail: 0, depth: 1, steps_at_depth: 0 }
    }

    /// Other shares from now on.
    pub fn set_mix(&mut self, mix: Mix) {
        self.mix = mix;
        self.steps_at_depth = 0;
    }

    /// How many requests to keep in flight now; changes now and then.
    pub fn depth(&mut self) -> usize {
        if self.steps_at_depth == 0 {
            self.steps_at_depth = 20 + self.random.below(300);
            // Shallow and deep queues alike: 1, 2, 4, … up to the most.
            let powers = self.mix.depth_max.ilog2() + 1;
            let power = self.random.below(u64::from(powers));
            self.depth = (1usize << power).min(self.mix.depth_max);
        }
        self.steps_at_depth -= 1;
        self.depth
    }

    /// A number below `bound` from the stream's own randomness.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.random.below(bound)
    }

    /// The next step.
    pub fn step(&mut self) -> Step {
        let mix = self.mix;
        let mut dice = self.random.below(100);
        let mut hit = |share: u64| {
            let yes = dice < share;
            dice = dice.wrapping_sub(share);
            yes
        };
        if hit(mix.reads) {
            let len = if self.random.below(4) == 0 {
                1 + self.random.below(SECTORS_MAX)
            } else {
                1 + self.random.below(16)
            };
            Step::Read(self.place(len, 1))
        } else if hit(mix.flushes) {
            Step::Flush
        } else if hit(mix.large) {
            Step::Mutate(Mutation::Write, self.large())
        } else if hit(mix.small) {
            let len = 1 + self.random.below(BLOCK_SECTORS - 1);
            Step::Mutate(Mutation::Write, self.place(len, 1))
        } else if hit(mix.zeroes) {
            Step::Mutate(Mutation::Zero, self.large())
        } else if hit(mix.discards) {
            Step::Mutate(Mutation::Discard, self.large())
        } else {
            Step::Mutate(Mutation::Write, self.place(BLOCK_SECTORS, BLOCK_SECTORS))
        }
    }

    fn large(&mut self) -> Range<u64> {
        if self.random.below(3) == 0 {
            let len = 1 + self.random.below(SECTORS_MAX);
            self.place(len, 1)
        } else {
            let blocks = 1 + self.random.below(SECTORS_MAX / BLOCK_SECTORS);
            self.place(blocks * BLOCK_SECTORS, BLOCK_SECTORS)
        }
    }

    /// A range of `len` sectors: in the hot part, right after the last one, at an end of the disk, or
    /// anywhere.
    fn place(&mut self, len: u64, align: u64) -> Range<u64> {
        let last = self.sectors - len;
        let start = match self.random.below(16) {
            0..=6 => self.hot.start + self.random.below(self.hot.end - self.hot.start),
            7..=8 => self.tail,
            9 if self.random.below(8) == 0 => 0,
            9 if self.random.below(8) == 0 => last,
            _ => self.random.below(last + 1),
        };
        let start = start.min(last) / align * align;
        self.tail = start + len;
        start..start + len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_its_seed_and_stays_on_the_disk() {
        let sectors = 3001;
        let stream = |seed| {
            let mut workload = Workload::new(seed, Mix::default(), sectors);
            (0..5000).map(|_| (workload.depth(), workload.step())).collect::<Vec<_>>()
        };
        assert_eq!(stream(1), stream(1));
        assert_ne!(stream(1), stream(2));
        for (depth, step) in stream(3) {
            assert!((1..=64).contains(&depth));
            if let Step::Read(range) | Step::Mutate(_, range) = step {
                assert!(range.start < range.end && range.end <= sectors);
                assert!(range.end - range.start <= SECTORS_MAX);
            }
        }
    }

    #[test]
    fn every_kind_occurs() {
        let mut workload = Workload::new(5, Mix::default(), 1 << 17);
        let steps: Vec<Step> = (0..2000).map(|_| workload.step()).collect();
        let count = |of: fn(&Step) -> bool| steps.iter().filter(|step| of(step)).count();
        assert!(count(|step| matches!(step, Step::Read(_))) > 200);
        assert!(count(|step| matches!(step, Step::Flush)) > 40);
        assert!(count(|step| matches!(step, Step::Mutate(Mutation::Discard, _))) > 30);
        assert!(count(|step| matches!(step, Step::Mutate(Mutation::Zero, _))) > 30);
        let unaligned = |range: &Range<u64>| {
            !range.start.is_multiple_of(BLOCK_SECTORS) || !range.end.is_multiple_of(BLOCK_SECTORS)
        };
        let small = steps.iter().filter(
            |step| matches!(step, Step::Mutate(Mutation::Write, range) if unaligned(range)),
        );
        assert!(small.count() > 200);
    }
}
