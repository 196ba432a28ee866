//! One seed: devices, disks, and the agent's lives on them, up to the end in peace.

use crate::device::{Pace, Timed};
use crate::host::{self, End};
use crate::model::Model;
use crate::profile::Profile;
use crate::trace::Trace;
use blockstore::device::sim::{SimDevice, SimOptions};
use blockstore::{FormatOptions, OpenOptions, Store, StoreErrorKind};
use cache::Cache;
use cache::local::Local;
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use tokio::runtime::Runtime;

/// Bytes of the cache device: the least there is, so that the ring wraps often.
const CACHE_BYTES: u64 = 16 << 20;
/// Bytes of the store's device: enough for what crashes leak.
const STORE_BYTES: u64 = 1 << 30;
/// The cache's path. Nothing is ever read or written there: all I/O goes to the simulated device.
pub const NOWHERE: &str = "/dev/null";

/// What a run came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Of everything that happened, see [`Trace`].
    pub hash: u64,
    pub requests: u64,
    pub lives: u32,
    pub simulated_ms: u64,
}

/// See the module.
pub struct World {
    pub profile: Profile,
    pub rng: SmallRng,
    pub trace: Arc<Trace>,
    /// Sessions of the agent that lives now.
    pub local: SimDevice,
    pub san: SimDevice,
    pub local_pace: Arc<Pace>,
    pub san_pace: Arc<Pace>,
    pub models: Vec<Arc<Mutex<Model>>>,
    /// Disks that were made in the store.
    pub made: Vec<bool>,
    /// Requests that guests are to make, and those still to come.
    pub asked: u64,
    pub left: u64,
    /// Requests that guests made.
    pub requests: Arc<AtomicU64>,
    pub report: Report,
    /// The agent's cache, for words about a run that comes to no end.
    pub cache: Arc<Mutex<Weak<Cache>>>,
}

/// Runs a seed with so many guest requests. Panics when a promise is broken.
pub fn run(seed: u64, requests: u64) -> Report {
    let mut world = World::new(seed, requests);
    for life in 0..=world.profile.lives {
        let last = life == world.profile.lives;
        world.live(last);
        world.check_store();
    }
    world.report.hash = world.trace.hash();
    world.report.requests = world.requests.load(Ordering::Relaxed);
    world.report
}

impl World {
    fn new(seed: u64, requests: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let profile = Profile::draw(&mut rng);
        let local = SimDevice::new(CACHE_BYTES, rng.random());
        let logical_block = if rng.random_bool(0.8) { 512 } else { 4096 };
        let options = SimOptions {
            logical_block,
            compare_and_write: rng.random_bool(0.85),
            ..SimOptions::new(STORE_BYTES, rng.random())
        };
        let san = SimDevice::with_options(options);
        let models = (0u32..).zip(&profile.disks).map(|(n, blocks)| Model::new(n + 1, *blocks));
        let models: Vec<_> = models.map(|model| Arc::new(Mutex::new(model))).collect();
        let runtime = runtime();
        runtime.block_on(async {
            Local::make_on(Path::new(NOWHERE), local.device()).await.expect("a new cache");
            Store::format(san.device(), FormatOptions::default()).await.expect("a new store");
        });
        Self {
            asked: requests,
            left: requests,
            made: vec![false; profile.disks.len()],
            profile,
            rng,
            trace: Arc::new(Trace::new()),
            local,
            san,
            local_pace: Arc::default(),
            san_pace: Arc::default(),
            models,
            requests: Arc::default(),
            report: Report::default(),
            cache: Arc::default(),
        }
    }

    /// One life of the agent, and how it ends.
    fn live(&mut self, last: bool) {
        self.local = self.local.connect();
        self.san = self.san.connect();
        self.report.lives += 1;
        let runtime = runtime();
        self.trace.note([0xa11e, u64::from(last), self.left, 0]);
        let (end, elapsed) = runtime.block_on(async {
            let began = tokio::time::Instant::now();
            self.trace.begin_life();
            let end = host::live(self, last).await;
            self.trace.end_life();
            (end, began.elapsed())
        });
        self.left = self.asked.saturating_sub(self.requests.load(Ordering::Relaxed));
        self.report.simulated_ms += elapsed.as_millis() as u64;
        self.die(end);
        // Whatever still ran ends here, wherever it was.
        drop(runtime);
    }

    /// The agent, the host or the whole site fails.
    fn die(&mut self, end: End) {
        let how = self.rng.random_range(0..6);
        // After a failed flush the device's cache is not to be trusted: only what is durable counts.
        let power = (how >= 3 || end == End::LogFailed) && end != End::Orderly;
        self.trace.note([0xdead, end as u64, u64::from(power), how]);
        if power {
            self.local.crash();
            for model in &self.models {
                model.lock().power_lost = true;
            }
        } else {
            self.local.kill_host();
        }
        if power && how == 5 { self.san.crash() } else { self.san.kill_host() }
    }

    /// Were everything but the store lost now: each disk's image is the disk as of one LSN (P2), and the store is sound.
    fn check_store(&mut self) {
        let fork = self.san.fork(self.rng.random());
        if self.rng.random_bool(0.7) {
            fork.crash();
        }
        let session = fork.connect();
        let (models, made) = (&self.models, &self.made);
        runtime().block_on(async {
            let opened = Store::open(session.device(), OpenOptions::read_only()).await;
            let store = opened.expect("the store opens at any time");
            for ((n, model), made) in models.iter().enumerate().zip(made) {
                let mut image = vec![0; model.lock().sectors() as usize];
                let mut sink = |offset: u64, block: &[u8]| {
                    for (at, sector) in (offset / 512..).zip(block.chunks_exact(512)) {
                        let stamp = model.lock().stamp_of(sector, at);
                        image[at as usize] = stamp.map_err(std::io::Error::other)?;
                    }
                    Ok(())
                };
                match store.export_vdi(&name(n), &mut sink).await {
                    Ok(report) => model.lock().check_store(report.lsn.0, &image),
                    Err(error) if error.kind == StoreErrorKind::NotFound && !made => {}
                    Err(error) => panic!("P2: the store's image cannot be read: {error}"),
                }
            }
            let report = gc::check(&store, gc::CheckOptions { data: false }).await.expect("check");
            assert!(report.is_sound(), "the store is damaged: {:?}", report.problems);
        });
    }

    /// The agent's way to its cache device, and to the store's.
    pub fn devices(&mut self) -> [Arc<Timed>; 2] {
        let timed = |name, sim: &SimDevice, pace: &Arc<Pace>, seed| {
            Arc::new(Timed::new(name, sim.clone(), Arc::clone(pace), seed, Arc::clone(&self.trace)))
        };
        let seeds: [u64; 2] = self.rng.random();
        [
            timed(1, &self.local, &self.local_pace, seeds[0]),
            timed(2, &self.san, &self.san_pace, seeds[1]),
        ]
    }
}

/// A disk's name in the store.
pub fn name(disk: usize) -> String {
    format!("disk{disk}")
}

fn runtime() -> Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true).build().expect("a runtime")
}
