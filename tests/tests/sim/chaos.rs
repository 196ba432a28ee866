//! What goes wrong around a living agent: the store vanishes, restarts, answers late, wrongly or not at all; devices turn
//! slow. Each trouble is followed by some peace.

use crate::device::Pace;
use crate::profile::Profile;
use crate::worker::Excuses;
use crate::world::World;
use blockstore::device::sim::{FaultRates, Reach, SimDevice};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// See the module.
pub struct Chaos {
    rng: SmallRng,
    profile: Profile,
    san: SimDevice,
    local: SimDevice,
    san_pace: Arc<Pace>,
    local_pace: Arc<Pace>,
    /// The cache device fails in this life.
    local_fails: bool,
}

impl Chaos {
    pub fn new(world: &World, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let local_fails = world.profile.local_fails && rng.random_bool(0.6);
        Self {
            rng,
            profile: world.profile.clone(),
            san: world.san.clone(),
            local: world.local.clone(),
            san_pace: Arc::clone(&world.san_pace),
            local_pace: Arc::clone(&world.local_pace),
            local_fails,
        }
    }

    /// What guests must put up with in this life.
    pub fn excuses(&self) -> Excuses {
        let read_errors = self.local_fails || self.profile.san.read_garbled > 0.0;
        Excuses { write_errors: self.local_fails, read_errors }
    }

    /// The state of things at the agent's start.
    pub fn begin(&mut self) {
        self.san_pace.set(self.rng.random_range(0..60), self.rng.random_range(1..12));
        self.local_pace.set(self.rng.random_range(0..60), self.rng.random_range(1..4));
        self.san_pace.set_late(self.rng.random_range(0..30), self.rng.random_range(1..15_000));
        let late_reads = if self.rng.random_bool(0.3) { 50..400 } else { 0..1 };
        self.san_pace.late_reads.store(self.rng.random_range(late_reads), Ordering::Relaxed);
        self.local_pace.set_late(self.rng.random_range(0..4), self.rng.random_range(1..4_000));
        self.local_pace.breaks.store(0, Ordering::Relaxed);
        let read_io = if self.local_fails && self.rng.random() { 0.06 } else { 0.0 };
        self.local.set_rates(FaultRates { read_io, ..FaultRates::default() });
        match self.rng.random_range(0..10) {
            0 => self.san.set_reach(Reach::Failing),
            1 => self.san.set_reach(Reach::Hanging),
            2 | 3 => self.san.set_rates(self.profile.san),
            _ => {}
        }
    }

    /// One trouble after the other, for ever.
    pub async fn run(&mut self) {
        loop {
            self.sleep(2_000).await;
            self.heal();
            let peace = if self.rng.random_bool(0.5) { 3_000 } else { 300 };
            self.sleep(peace).await;
            if self.local_fails && self.rng.random_bool(0.3) {
                self.local_pace.breaks.store(self.rng.random_range(0..20), Ordering::Relaxed);
            }
            match self.rng.random_range(0..7) {
                0 => self.outage(Reach::Failing).await,
                1 => self.outage(Reach::Hanging).await,
                2 => self.san.lose_session(),
                3 => self.san_pace.set(100, self.rng.random_range(20..800)),
                4 => self.local_pace.set(100, self.rng.random_range(5..60)),
                _ => self.san.set_rates(self.profile.san),
            }
        }
    }

    async fn outage(&mut self, reach: Reach) {
        self.san.set_reach(reach);
        let most = if self.rng.random_bool(0.3) { self.profile.outage_ms } else { 1_500 };
        self.sleep(most).await;
        self.san.set_reach(Reach::Up);
    }

    fn heal(&mut self) {
        self.san.set_reach(Reach::Up);
        self.san.set_rates(FaultRates::default());
        self.san_pace.set(self.rng.random_range(0..60), self.rng.random_range(1..12));
        self.local_pace.set(self.rng.random_range(0..60), self.rng.random_range(1..4));
    }

    async fn sleep(&mut self, most_ms: u64) {
        tokio::time::sleep(Duration::from_millis(self.rng.random_range(0..=most_ms))).await;
    }
}
