//! The cache device: one leg or two, and what happens to them.
//!
//! Of two legs one is the victim: everything happens to it, so that no more is broken than is promised to be survived.
//! It is drawn anew while neither leg lacks more than a recovery gives it back, and when a lost leg was replaced. Of one leg
//! alone, damage is final: then what is lost may be refused, and must not be replaced by anything else.

use crate::damage;
use crate::device::Pace;
use crate::host::Refused;
use crate::world::NOWHERE;
use blockstore::device::Device;
use blockstore::device::sim::{FaultRates, SimDevice};
use blockstore::types::BLOCK_SIZE;
use cache::CacheError;
use cache::format::superblock::Superblock;
use cache::local::Local;
use rand::Rng;
use rand::rngs::SmallRng;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

/// Every operation fails.
pub const GONE: FaultRates = FaultRates {
    read_io: 1.0,
    read_garbled: 0.0,
    write_io: 1.0,
    write_no_space: 0.0,
    flush_io: 1.0,
    unreachable: 0.0,
    unknown: 0.0,
};

/// What the victim went through. Shared with whoever does it to it.
#[derive(Debug, Default)]
pub struct Condition {
    /// It may differ from the other in more than a recovery makes equal.
    pub harmed: AtomicBool,
    /// It answers nothing, for good.
    pub gone: AtomicBool,
    /// It hangs in this life, or did.
    pub hung: AtomicBool,
}

/// See the module.
#[derive(Debug)]
pub struct Legs {
    /// The living agent's sessions, by the legs' numbers.
    pub sims: Vec<SimDevice>,
    pub paces: Vec<Arc<Pace>>,
    pub victim: usize,
    pub condition: Arc<Condition>,
    /// The victim is not there in this life.
    absent: bool,
    /// Damage comes between lives, too.
    rots: bool,
    /// How often a leg was replaced.
    pub replaced: u64,
}

impl Legs {
    pub fn new(count: usize, bytes: u64, rots: bool, rng: &mut SmallRng) -> Self {
        Self {
            sims: (0..count).map(|_| SimDevice::new(bytes, rng.random())).collect(),
            paces: (0..count).map(|_| Arc::default()).collect(),
            victim: rng.random_range(0..count),
            condition: Arc::default(),
            absent: false,
            rots,
            replaced: 0,
        }
    }

    pub fn are_mirrored(&self) -> bool {
        self.sims.len() > 1
    }

    pub fn is_harmed(&self) -> bool {
        self.condition.harmed.load(Ordering::Relaxed)
    }

    /// The only leg was damaged: some of it may be lost.
    pub fn may_have_lost(&self) -> bool {
        !self.are_mirrored() && self.is_harmed()
    }

    fn is_gone(&self) -> bool {
        self.condition.gone.load(Ordering::Relaxed)
    }

    pub fn victim_sim(&self) -> &SimDevice {
        &self.sims[self.victim]
    }

    /// The leg that nothing happens to, if there is one.
    fn good(&self) -> Option<usize> {
        self.are_mirrored().then(|| 1 - self.victim)
    }

    /// As a new cache is made on them.
    pub fn named(&self) -> Vec<(PathBuf, Device)> {
        self.sims.iter().map(|sim| (NOWHERE.into(), sim.device())).collect()
    }

    /// Power fails, or the agent alone dies.
    pub fn die(&self, power: bool) {
        for sim in &self.sims {
            if power { sim.crash() } else { sim.kill_host() }
        }
    }

    pub fn connect(&mut self) {
        self.sims = self.sims.iter().map(SimDevice::connect).collect();
        if self.is_gone() {
            self.victim_sim().set_rates(GONE);
        }
    }

    /// All that ails them ends, but what is gone stays so.
    pub fn heal(&self) {
        for (n, sim) in self.sims.iter().enumerate() {
            if !(n == self.victim && self.is_gone()) {
                sim.set_rates(FaultRates::default());
            }
        }
        for pace in &self.paces {
            pace.set(20, 3);
            pace.set_late(0, 0);
            pace.breaks.store(0, Ordering::Relaxed);
        }
    }

    /// The good leg says that the victim is no member, and the victim does not know better.
    pub fn victim_is_out(&self) -> bool {
        self.good().is_some_and(|good| leaves_out(&self.sims[good], self.victim))
            && !self.victim_counts()
    }

    /// The good leg says so after an attempt that failed; then it was put out itself, and the victim knows of both.
    fn victim_counts(&self) -> bool {
        let Some(good) = self.good().and_then(|good| newest(&self.sims[good])) else {
            return false;
        };
        newest(self.victim_sim()).is_some_and(|victim| {
            let mut voided = victim.membership.voided.iter();
            let (id, events) = (good.membership.id, good.membership.events);
            voided.any(|set| set.id == id && events <= set.events)
        })
    }

    /// Nobody lives: a lost leg may be replaced, the other may become the victim, copies may rot. True if power failed.
    pub async fn between_lives(&mut self, rng: &mut SmallRng) -> bool {
        self.absent = false;
        self.condition.hung.store(false, Ordering::Relaxed);
        let mut power_lost = false;
        if self.are_mirrored() {
            if self.victim_is_out() && rng.random_bool(0.4) {
                power_lost = !self.replace(rng).await;
            }
            if !self.is_harmed() && !self.is_gone() && !self.victim_is_out() {
                self.victim = rng.random_range(0..2);
            }
            // The other one would open without it: only a witness would know.
            self.absent = rng.random_bool(0.08) && !self.victim_counts();
        }
        if self.rots && rng.random_bool(0.3) {
            for _ in 0..rng.random_range(1..4) {
                damage::to_cache(self.victim_sim(), &self.condition, rng);
            }
        }
        self.connect();
        power_lost
    }

    /// As `ballast cache replace` does it. False if it was cut short by a loss of power.
    async fn replace(&mut self, rng: &mut SmallRng) -> bool {
        let Some(good) = self.good() else { return true };
        let new = SimDevice::new(self.sims[good].connect().capacity(), rng.random());
        let good = self.sims[good].connect();
        let cut_short = rng.random_bool(0.2).then(|| rng.random_range(1..400));
        let copied = cut_after(cut_short, async {
            let local = Local::on_devices(vec![(NOWHERE.into(), good.device())], false).await;
            let local = local.expect("a leg that knows that it is alone opens");
            local.replace_on(&new.device(), &|_, _| ()).await.expect("nothing fails");
        })
        .await;
        self.sims[self.victim] = new;
        self.replaced += 1;
        // Until it is whole, the other is needed.
        self.condition.gone.store(false, Ordering::Relaxed);
        self.condition.harmed.store(copied.is_none(), Ordering::Relaxed);
        if copied.is_none() {
            self.die(true);
        }
        copied.is_some()
    }

    /// Opens the cache as an agent does at its start. `devices` are the ways to the legs, by their numbers.
    pub async fn open(&self, devices: &[Device], rng: &mut SmallRng) -> Result<Local, Refused> {
        let way = |leg: usize| (PathBuf::from(NOWHERE), Arc::clone(&devices[leg]));
        if let Some(good) = self.good()
            && rng.random_bool(0.1)
            && !self.victim_counts()
        {
            self.must_refuse(self.victim, way(self.victim)).await;
            if !self.victim_is_out() {
                self.must_refuse(good, way(good)).await;
            }
        }
        let mut degraded = false;
        let left_behind = self.victim_is_out();
        loop {
            let mut named: Vec<_> = (0..devices.len()).map(way).collect();
            if self.absent {
                named.remove(self.victim);
            } else if rng.random() {
                named.reverse();
            }
            match Local::on_devices(named, degraded).await {
                Ok(local) => {
                    let counts = local.members().contains(self.victim as u8);
                    assert!(!left_behind || !counts, "L5: a leg that was left behind counts again");
                    return Ok(local);
                }
                // Nobody hears of it.
                Err(_) if self.sims.iter().any(SimDevice::is_dead) => {
                    std::future::pending::<()>().await
                }
                Err(CacheError::LegMissing { .. }) if self.are_mirrored() => {
                    let ails = self.absent || self.is_gone() || self.is_harmed();
                    let hung = self.condition.hung.load(Ordering::Relaxed);
                    let faulty = hung || self.victim_sim().is_faulty();
                    assert!(ails || faulty, "both legs are there");
                    // The operator's word.
                    degraded = rng.random();
                }
                Err(CacheError::Device(_)) => {}
                Err(error) if self.may_have_lost() => return Err(Refused(error.to_string())),
                Err(error) => panic!("opening the cache: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// A leg whose twin is not there may be the one that was left behind.
    async fn must_refuse(&self, leg: usize, way: (PathBuf, Device)) {
        let opened = Local::on_devices(vec![way], false).await;
        assert!(opened.is_err(), "L5: leg {leg} was opened alone, without the operator's word");
    }
}

/// What a leg's newest superblock says: that the other is no member.
pub fn leaves_out(leg: &SimDevice, other: usize) -> bool {
    newest(leg).is_some_and(|superblock| !superblock.membership.members.contains(other as u8))
}

fn newest(leg: &SimDevice) -> Option<Superblock> {
    let block = |n: u64| leg.peek(n * BLOCK_SIZE as u64, BLOCK_SIZE);
    let copies = [0, 1].map(|n| Superblock::decode(&block(n)).ok());
    copies.into_iter().flatten().max_by_key(|superblock| superblock.sequence)
}

/// Runs a future for so many polls at most.
async fn cut_after<F: Future>(polls: Option<u32>, future: F) -> Option<F::Output> {
    let (mut future, mut left) = (pin!(future), polls.unwrap_or(u32::MAX));
    std::future::poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending if left == 0 => Poll::Ready(None),
        Poll::Pending => {
            left -= 1;
            context.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await
}
