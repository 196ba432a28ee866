//! What the run of one seed is like: sizes, speeds, faults.

use crate::worker::Habits;
use blockstore::device::sim::FaultRates;
use cache::flusher::FlushOptions;
use rand::Rng;
use rand::rngs::SmallRng;

/// Drawn from the seed, before anything else.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Blocks of each disk.
    pub disks: Vec<u64>,
    pub habits: Habits,
    pub flush: FlushOptions,
    /// Bytes of images kept in memory.
    pub image_bytes: usize,
    /// Lives of the agent before the last one, which ends in peace.
    pub lives: u32,
    /// Outages last up to this long, milliseconds.
    pub outage_ms: u64,
    /// Share of lives in which replies to reads from the store come late.
    pub late_reads: f64,
    /// Faults of the store's device while the chaos has its turn.
    pub san: FaultRates,
    /// The cache device, or one leg of a mirrored one, fails in some lives.
    pub local_fails: bool,
    /// Legs of the cache device.
    pub legs: usize,
    /// The cache device, or one leg of a mirrored one, is damaged now and then.
    pub rots: bool,
    /// So is the store's device.
    pub store_rots: bool,
    /// The store is away at many starts, and disks come up without it.
    pub cold_starts: bool,
    /// Disks grow now and then.
    pub grows: bool,
    /// Disks are hydrated, pinned and unpinned now and then.
    pub looks_ahead: bool,
}

/// What guests do most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manner {
    Mixed,
    /// They zero most of what they write.
    Zeroes,
    /// They read much that the log does not hold, while the same blocks are written, committed and evicted quickly.
    Reads,
}

impl Manner {
    fn draw(rng: &mut SmallRng) -> Self {
        match rng.random_range(0..20) {
            0..3 => Self::Zeroes,
            3..7 => Self::Reads,
            _ => Self::Mixed,
        }
    }
}

impl Profile {
    pub fn draw(rng: &mut SmallRng) -> Self {
        let manner = Manner::draw(rng);
        let smallest = if manner == Manner::Reads { 300 } else { 32 };
        let disks =
            (0..rng.random_range(1..=3)).map(|_| rng.random_range(smallest..=400)).collect();
        let reads = match manner {
            Manner::Mixed => rng.random_range(5..60),
            Manner::Zeroes => rng.random_range(5..40),
            Manner::Reads => rng.random_range(50..70),
        };
        let zeros = match manner {
            Manner::Mixed => rng.random_range(0..10),
            Manner::Zeroes => rng.random_range(15..40),
            Manner::Reads => 2,
        };
        let flushes = rng.random_range(1..if manner == Manner::Reads { 4 } else { 20 });
        let hurried = manner == Manner::Reads;
        let habits = Habits {
            think_ms: rng.random_range(0..if hurried { 10 } else { 60 }),
            burst: rng.random_range(1..12),
            mix: [100 - reads - zeros - flushes, zeros, flushes],
            large: if hurried || rng.random_bool(0.4) { 2000 } else { 160 },
        };
        let flush = FlushOptions {
            max_age_ms: rng.random_range(50..if hurried { 500 } else { 4000 }),
            start_fill: rng.random_range(0.05..0.6),
            full_speed_fill: 0.6,
            batch_bytes: rng.random_range(1..8) << 20,
        };
        let faulty = rng.random_bool(0.6);
        let garbles = rng.random_bool(0.4);
        let mut rate = |most: f64| if faulty { rng.random_range(0.0..most) } else { 0.0 };
        let san = FaultRates {
            read_io: rate(0.02),
            read_garbled: if garbles { rate(0.1) } else { 0.0 },
            write_io: rate(0.02),
            write_no_space: rate(0.02),
            flush_io: rate(0.1),
            unreachable: rate(0.03),
            unknown: rate(0.05),
        };
        let outage_ms = match rng.random_range(0..40) {
            0 => 24 * 3_600_000,
            1..6 => 600_000,
            _ => 20_000,
        };
        let legs = rng.random_range(1..=2);
        Self {
            disks,
            habits,
            flush,
            image_bytes: rng.random_range(1..12) << 20,
            lives: rng.random_range(2..12),
            outage_ms,
            late_reads: if hurried { 0.8 } else { 0.3 },
            san,
            local_fails: rng.random_bool(if legs > 1 { 0.8 } else { 0.4 }),
            legs,
            rots: rng.random_bool(if legs > 1 { 0.4 } else { 0.15 }),
            store_rots: rng.random_bool(0.04),
            cold_starts: rng.random_bool(0.5),
            grows: rng.random_bool(0.3),
            looks_ahead: rng.random_bool(0.3),
        }
    }
}
