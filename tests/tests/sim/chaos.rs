//! What goes wrong around a living agent: the store vanishes, restarts, fills up, answers late, wrongly or not at all; the
//! cache device, or one leg of it, fails, is lost or rots; devices turn slow. Each trouble is followed by some peace.

use crate::damage;
use crate::device::Pace;
use crate::legs::{Condition, GONE, leaves_out};
use crate::profile::Profile;
use crate::worker::Excuses;
use crate::world::World;
use blockstore::device::sim::{Fault, FaultRates, OpKind, Reach, SimDevice};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// Seconds: longer than any life.
const FOR_EVER: u64 = 365 * 24 * 3600;

/// What the cache device, or the one leg that may, does in this life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    None,
    /// Reads fail.
    Reads,
    /// Writes fail, sometimes.
    Writes,
    /// A flush fails, and with it the device for good.
    Breaks,
    /// Every operation fails.
    Lost,
    /// It answers nothing, for a while or for good, and much of what it answers comes late.
    Hangs,
    /// A write is not carried out, or lands elsewhere.
    Astray,
}

/// See the module.
pub struct Chaos {
    rng: SmallRng,
    profile: Profile,
    san: SimDevice,
    san_pace: Arc<Pace>,
    /// The victim among the legs.
    leg: SimDevice,
    leg_pace: Arc<Pace>,
    paces: Vec<Arc<Pace>>,
    condition: Arc<Condition>,
    mirrored: bool,
    /// The other leg breaks, too.
    both: Option<(SimDevice, Arc<Pace>)>,
    victim: usize,
    trouble: Trouble,
    /// The leg hangs until then.
    hangs_until: Option<Instant>,
    excuses: Excuses,
}

impl Chaos {
    pub fn new(world: &World, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (profile, legs) = (world.profile.clone(), &world.legs);
        let mirrored = legs.are_mirrored();
        let fails = profile.local_fails && rng.random_bool(0.6);
        let trouble = match rng.random_range(0..10) {
            _ if !fails => Trouble::None,
            0..5 if !mirrored => Trouble::Breaks,
            _ if !mirrored => Trouble::Reads,
            0 => Trouble::Reads,
            1 | 2 => Trouble::Writes,
            3 => Trouble::Breaks,
            4 | 5 => Trouble::Lost,
            9 if profile.rots => Trouble::Astray,
            _ => Trouble::Hangs,
        };
        let alone = fails && !mirrored;
        // Drawn apart, so that other lives take the course that they would take without this.
        let mut extra = SmallRng::seed_from_u64(seed ^ 0xb07);
        let both = mirrored && fails && extra.random_bool(0.15);
        let refuses = extra.random_bool(0.1);
        world.witness.refuses.store(refuses, Ordering::Relaxed);
        // With no leg left disks go on, if somebody can note it, and all that the log has can be read: the leg that broke
        // last can still be read, and it has everything unless it is the only one and was damaged.
        let breaks = alone && trouble == Trouble::Breaks || both;
        let stops = breaks && (refuses || world.may_have_lost());
        let unreadable = trouble == Trouble::Reads && !mirrored;
        let garbled = profile.san.read_garbled > 0.0;
        let excuses = Excuses {
            write_errors: stops,
            read_errors: stops || unreadable || garbled || world.may_have_lost(),
        };
        Self {
            rng,
            san: world.san.clone(),
            san_pace: Arc::clone(&world.san_pace),
            leg: legs.victim_sim().clone(),
            leg_pace: Arc::clone(&legs.paces[legs.victim]),
            paces: legs.paces.clone(),
            condition: Arc::clone(&legs.condition),
            profile,
            mirrored,
            both: both.then(|| {
                let other = 1 - legs.victim;
                (legs.sims[other].clone(), Arc::clone(&legs.paces[other]))
            }),
            victim: legs.victim,
            trouble,
            hangs_until: None,
            excuses,
        }
    }

    /// What guests must put up with in this life.
    pub fn excuses(&self) -> Excuses {
        self.excuses
    }

    /// The state of things at the agent's start, which may find the store away.
    pub fn begin(&mut self, cold: bool) {
        self.san_pace.set(self.rng.random_range(0..60), self.rng.random_range(1..12));
        self.san_pace.set_late(self.rng.random_range(0..30), self.rng.random_range(1..15_000));
        let is_late = self.rng.random_bool(self.profile.late_reads);
        let late = self.rng.random_range(if is_late { 50..400 } else { 0..1 });
        let (reads, fetches) = if self.profile.only_fetches { (0, late) } else { (late, 0) };
        self.san_pace.late_reads.store(reads, Ordering::Relaxed);
        self.san_pace.late_fetches.store(fetches, Ordering::Relaxed);
        for pace in self.paces.clone() {
            self.usual(&pace);
            pace.set_late(self.rng.random_range(0..4), self.rng.random_range(1..4_000));
            pace.breaks.store(0, Ordering::Relaxed);
        }
        if self.trouble == Trouble::Hangs {
            self.leg_pace.set_late(self.rng.random_range(0..4), self.rng.random_range(1..30_000));
        }
        if self.trouble == Trouble::Reads {
            self.rates(FaultRates { read_io: 0.06, ..FaultRates::default() });
        }
        match self.rng.random_range(if cold { 0..2 } else { 0..10 }) {
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
            if self.rng.random_bool(if self.mirrored { 0.5 } else { 0.3 }) {
                self.trouble();
            }
            if self.profile.rots && self.mirrored && self.rng.random_bool(0.2) {
                damage::to_cache(&self.leg, &self.condition, &mut self.rng);
            }
            match self.rng.random_range(0..8) {
                0 => self.outage(Reach::Failing).await,
                1 => self.outage(Reach::Hanging).await,
                2 => self.san.lose_session(),
                3 => self.san_pace.set(100, self.rng.random_range(20..800)),
                4 => {
                    let pace = self.rng.random_range(0..self.paces.len());
                    self.paces[pace].set(100, self.rng.random_range(5..60));
                }
                5 => self.san.set_full(true),
                _ => self.san.set_rates(self.profile.san),
            }
        }
    }

    /// Faults of the leg, unless it is gone for good.
    fn rates(&self, rates: FaultRates) {
        if !self.condition.gone.load(Ordering::Relaxed) {
            self.leg.set_rates(rates);
        }
    }

    fn trouble(&mut self) {
        if let Some((other, pace)) = &self.both
            && leaves_out(other, self.victim)
            && self.rng.random_bool(0.5)
        {
            pace.breaks.store(self.rng.random_range(1..20), Ordering::Relaxed);
        }
        match self.trouble {
            Trouble::None | Trouble::Reads => {}
            Trouble::Writes => {
                let write_io = self.rng.random_range(0.0..0.1);
                self.rates(FaultRates { write_io, ..FaultRates::default() });
            }
            Trouble::Breaks => {
                if self.mirrored {
                    self.condition.harmed.store(true, Ordering::Relaxed);
                }
                self.leg_pace.breaks.store(self.rng.random_range(0..20), Ordering::Relaxed);
            }
            Trouble::Lost => {
                // For good, or till the next start.
                let gone = self.rng.random_bool(0.3);
                self.condition.gone.fetch_or(gone, Ordering::Relaxed);
                self.leg.set_rates(GONE);
            }
            Trouble::Hangs => {
                let seconds = match self.rng.random_range(0..4) {
                    0 => self.rng.random_range(0..12),
                    1 | 2 => self.rng.random_range(8..60),
                    _ => FOR_EVER,
                };
                self.condition.hung.store(true, Ordering::Relaxed);
                self.hangs_until = Some(Instant::now() + Duration::from_secs(seconds));
                self.leg.set_reach(Reach::Hanging);
            }
            Trouble::Astray => {
                self.condition.harmed.store(true, Ordering::Relaxed);
                let by = self.rng.random_range(1..4000) * 4096;
                let fault = if self.rng.random() { Fault::Lost } else { Fault::Misdirected(by) };
                self.leg.inject(OpKind::Write, self.rng.random_range(0..20), fault);
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
        if self.hangs_until.take_if(|until| *until <= Instant::now()).is_some() {
            self.leg.set_reach(Reach::Up);
        }
        self.san.set_reach(Reach::Up);
        self.san.set_full(false);
        self.san.set_rates(FaultRates::default());
        self.san_pace.set(self.rng.random_range(0..60), self.rng.random_range(1..12));
        for pace in self.paces.clone() {
            self.usual(&pace);
        }
    }

    /// How fast a leg is while nothing ails it.
    fn usual(&mut self, pace: &Pace) {
        if self.profile.slow_legs {
            pace.set(100, self.rng.random_range(5..60));
        } else {
            pace.set(self.rng.random_range(0..60), self.rng.random_range(1..4));
        }
    }

    async fn sleep(&mut self, most_ms: u64) {
        tokio::time::sleep(Duration::from_millis(self.rng.random_range(0..=most_ms))).await;
    }
}
