//! What the run of one seed is like: sizes, speeds, faults.

use crate::parting::Plan;
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
    /// Guest requests in each of them at most, if there is a limit.
    pub life_requests: Option<u64>,
    /// Of the requests that guests make otherwise, they make one in so many.
    pub fewer: u64,
    /// The cache device is slow all the time, so that much is under way at once.
    pub slow_legs: bool,
    /// Outages last up to this long, milliseconds.
    pub outage_ms: u64,
    /// Share of lives in which replies to reads from the store come late.
    pub late_reads: f64,
    /// Only those are late that guests wait for, while commits go on.
    pub only_fetches: bool,
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
    /// Snapshots are taken now and then, and deleted: drawn apart.
    pub cuts: bool,
    /// Some of them are cloned in the store, and the clones deleted.
    pub clones: bool,
    /// Some of the clones are served as well, from then on.
    pub serves: bool,
    /// Snapshots have labels.
    pub labels: bool,
    /// Some are attached read-only.
    pub shows: bool,
    /// The store is scrubbed, one pass after the other.
    pub scrubs: bool,
    /// And some of those leave again.
    pub parts: Plan,
    /// Garbage is collected, one cycle after the other.
    pub collects: bool,
    /// The store's device is told of free blocks after cycles, and beside them.
    pub unmaps: bool,
}

/// What most goes on in a run: a rare bug needs much of one kind of trouble rather than a little of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Theme {
    Mixed,
    /// Guests zero most of what they write.
    Zeroes,
    /// They read much that the log does not hold, while the same blocks are written, committed and evicted quickly.
    Reads,
    /// They change parts of few blocks, which the log forgets as soon as they are committed, while replies to reads of the
    /// store are under way and commits are quick.
    LateReads,
    /// One short life after the other.
    Restarts,
}

impl Theme {
    fn draw(rng: &mut SmallRng) -> Self {
        match rng.random_range(0..20) {
            0..3 => Self::Zeroes,
            3..6 => Self::Reads,
            6..9 => Self::LateReads,
            9..13 => Self::Restarts,
            _ => Self::Mixed,
        }
    }
}

impl Profile {
    pub fn draw(rng: &mut SmallRng) -> Self {
        let theme = Theme::draw(rng);
        let blocks = match theme {
            Theme::Reads => 300..=400,
            Theme::LateReads => 48..=128,
            _ => 32..=400,
        };
        let disks_max = if matches!(theme, Theme::LateReads | Theme::Restarts) { 1 } else { 3 };
        let disks = (0..rng.random_range(1..=disks_max))
            .map(|_| rng.random_range(blocks.clone()))
            .collect();
        let reads = match theme {
            Theme::Mixed => rng.random_range(5..60),
            Theme::Zeroes => rng.random_range(5..40),
            Theme::Reads => rng.random_range(50..70),
            Theme::LateReads => rng.random_range(60..80),
            Theme::Restarts => rng.random_range(5..20),
        };
        let zeros = match theme {
            Theme::Mixed | Theme::Restarts => rng.random_range(0..10),
            Theme::Zeroes => rng.random_range(15..40),
            Theme::Reads | Theme::LateReads => 2,
        };
        let read_heavy = matches!(theme, Theme::Reads | Theme::LateReads);
        let restarts = theme == Theme::Restarts;
        let flushes = rng.random_range(1..if read_heavy || restarts { 4 } else { 20 });
        let habits = Habits {
            think_ms: match theme {
                Theme::Reads => rng.random_range(0..10),
                Theme::LateReads => rng.random_range(50..300),
                _ => rng.random_range(0..60),
            },
            burst: rng.random_range(1..12),
            mix: [100 - reads - zeros - flushes, zeros, flushes],
            large: match theme {
                Theme::Reads | Theme::Restarts => 2000,
                Theme::LateReads => 24,
                _ if rng.random_bool(0.4) => 2000,
                _ => 160,
            },
            larges: if restarts { 6 } else { 3 },
            parts: if theme == Theme::LateReads { 14 } else { 5 },
        };
        let flush = FlushOptions {
            max_age_ms: match theme {
                Theme::Reads => rng.random_range(50..500),
                Theme::LateReads => rng.random_range(50..300),
                _ => rng.random_range(50..4000),
            },
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
            lives: if restarts { rng.random_range(20..50) } else { rng.random_range(2..12) },
            life_requests: restarts.then(|| rng.random_range(10..80)),
            fewer: if restarts { 4 } else { 1 },
            slow_legs: restarts,
            outage_ms,
            late_reads: if read_heavy { 0.9 } else { 0.3 },
            only_fetches: theme == Theme::LateReads,
            san,
            local_fails: rng.random_bool(if legs > 1 { 0.8 } else { 0.4 }),
            legs,
            rots: rng.random_bool(if legs > 1 { 0.4 } else { 0.15 }),
            store_rots: rng.random_bool(0.04),
            cold_starts: rng.random_bool(0.5),
            grows: rng.random_bool(0.3),
            looks_ahead: rng.random_bool(0.3),
            cuts: false,
            clones: false,
            serves: false,
            labels: false,
            shows: false,
            scrubs: false,
            parts: Plan::default(),
            collects: false,
            unmaps: false,
        }
    }
}
