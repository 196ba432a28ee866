//! One seed: devices, disks, and the agent's lives on them, up to the end in peace.

use crate::clones::{self, Clones};
use crate::cuts;
use crate::damage;
use crate::device::{Pace, Timed};
use crate::host::{self, End};
use crate::legs::Legs;
use crate::model::{Image, Model, Models};
use crate::parting::{Lasting, Plan, Tally};
use crate::profile::Profile;
use crate::scrubs::Scrubs;
use crate::shown;
use crate::taken;
use crate::trace::Trace;
use crate::witness::Memory;
use blockstore::device::sim::{SimDevice, SimOptions};
use blockstore::{FormatOptions, LostLog, OpenOptions, Store, StoreError, StoreErrorKind};
use cache::Cache;
use cache::local::Local;
use gc::{CollectOptions, Progress};
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::cell::Cell;
use std::cmp::Reverse;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use tokio::runtime::Runtime;
use uuid::Uuid;

/// Bytes of the cache device: the least there is, so that the ring wraps often.
const CACHE_BYTES: u64 = 16 << 20;
/// Bytes of the store's device: enough for what crashes leak.
const STORE_BYTES: u64 = 1 << 30;
/// The cache's path. Nothing is ever read or written there: all I/O goes to the simulated device.
pub const NOWHERE: &str = "/dev/null";

/// What is drawn apart begins with the seed and one of these.
const CUTS: u64 = 0xc07;
const SERVES: u64 = 0x5e12e;
const LABELS: u64 = 0x1abe1;
const SHOWS: u64 = 0x5404;
const SCRUBS: u64 = 0x5c12b;
/// Of all seeds, those that take snapshots.
const CUTS_SHARE: f64 = 0.4;

/// What a run came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Of everything that happened, see [`Trace`].
    pub hash: u64,
    pub requests: u64,
    pub lives: u32,
    pub simulated_ms: u64,
    /// Seeds with two legs, and what happened to them.
    pub events: Events,
}

/// How often something happened that only some seeds have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// Seeds on two legs.
    pub mirrored: u64,
    /// Lives that began with a leg put out or not there.
    pub one_legged: u64,
    /// Legs replaced.
    pub replaced: u64,
    /// Lives that began without the store.
    pub cold: u64,
    /// Seeds with damage of which there was no second copy, and those that ended with a refusal.
    pub damaged: u64,
    pub refused: u64,
    /// Disks that lost the last leg under their guests, and may have gone on in write-through.
    pub without_legs: u64,
    /// Clones that were served.
    pub clones_served: u64,
    /// Of them, those that the cache alone made.
    pub provisional: u64,
    /// Scrubs that came to their end, and blocks that were harmed and found by them.
    pub scrubbed: u64,
    pub named: u64,
    /// What became of them otherwise.
    pub parted: Tally,
}

/// See the module.
pub struct World {
    pub profile: Profile,
    pub rng: SmallRng,
    /// For snapshots alone, so that seeds without them take the course that they would take if there were none.
    pub cut_rng: SmallRng,
    /// For clones alone, likewise.
    pub clone_rng: SmallRng,
    pub clones: Clones,
    /// For clones that are served alone, likewise.
    pub serve_rng: SmallRng,
    /// For clones that leave, likewise.
    pub parting: Lasting,
    /// For collection alone, likewise.
    pub collect_rng: SmallRng,
    /// For scrubs alone, and for snapshots that are attached, likewise.
    pub scrub_rng: SmallRng,
    pub scrubs: Scrubs,
    pub show_rng: SmallRng,
    pub shown: shown::Notes,
    pub trace: Arc<Trace>,
    /// The cache device.
    pub legs: Legs,
    /// The run directory.
    pub witness: Arc<Memory>,
    /// The session of the agent that lives now.
    pub san: SimDevice,
    /// The store's device was damaged: some of it may be lost.
    pub store_harmed: bool,
    pub san_pace: Arc<Pace>,
    pub models: Models,
    /// Requests that guests are to make, and those still to come.
    pub asked: u64,
    pub left: u64,
    /// Requests that guests made.
    pub requests: Arc<AtomicU64>,
    pub report: Report,
    /// The agent's cache, for words about a run that comes to no end.
    pub cache: Arc<Mutex<Weak<Cache>>>,
    /// Disks are served in this life.
    pub served: Rc<Cell<bool>>,
}

/// Clones are served in this seed.
pub fn serves_clones(seed: u64) -> bool {
    let draw = |of, share| SmallRng::seed_from_u64(seed ^ of).random_bool(share);
    draw(CUTS, CUTS_SHARE) && draw(SERVES, 0.3)
}

/// Snapshots have labels in this seed.
pub fn has_labels(seed: u64) -> bool {
    let draw = |of, share| SmallRng::seed_from_u64(seed ^ of).random_bool(share);
    draw(CUTS, CUTS_SHARE) && draw(LABELS, 0.5)
}

/// Snapshots are attached read-only in this seed.
pub fn shows_snapshots(seed: u64) -> bool {
    let draw = |of, share| SmallRng::seed_from_u64(seed ^ of).random_bool(share);
    draw(CUTS, CUTS_SHARE) && draw(SHOWS, 0.4)
}

/// The store is scrubbed in this seed.
pub fn is_scrubbed(seed: u64) -> bool {
    SmallRng::seed_from_u64(seed ^ SCRUBS).random_bool(0.35)
}

/// How clones leave in this seed. What a disk's worker hands over is sealed on files, of which there are none here: nothing may be
/// fetched ahead then.
pub fn parts_of(seed: u64) -> Plan {
    let looks_ahead = || Profile::draw(&mut SmallRng::seed_from_u64(seed)).looks_ahead;
    if serves_clones(seed) && !looks_ahead() { Plan::draw(seed) } else { Plan::default() }
}

/// Runs a seed with so many guest requests. Panics when a promise is broken.
pub fn run(seed: u64, requests: u64) -> Report {
    let mut world = World::new(seed, requests);
    for life in 0..=world.profile.lives {
        let last = life == world.profile.lives;
        let end = world.live(last);
        world.check_store();
        if last && end == End::Orderly && !world.may_have_lost() {
            world.delete_everything();
        }
        if end == End::Refused {
            world.report.events.refused += 1;
            // What is lost is lost, and somebody knows.
            break;
        }
    }
    let events = &mut world.report.events;
    events.mirrored = u64::from(world.legs.are_mirrored());
    events.replaced = world.legs.replaced;
    let models = world.models.all();
    let clones = models.iter().skip(world.profile.disks.len()).map(|model| model.lock());
    for clone in clones.filter(|clone| !clone.is_none) {
        events.clones_served += 1;
        events.provisional += u64::from(clone.is_provisional);
    }
    events.parted = *world.parting.tally.lock();
    events.without_legs = world.witness.notes.load(Ordering::Relaxed);
    (events.scrubbed, events.named) = world.scrubs.lock().counts();
    events.damaged = u64::from(world.legs.may_have_lost() || world.store_harmed);
    world.report.hash = world.trace.hash();
    world.report.requests = world.requests.load(Ordering::Relaxed);
    world.report
}

impl World {
    fn new(seed: u64, requests: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut cut_rng = SmallRng::seed_from_u64(seed ^ CUTS);
        let cuts = cut_rng.random_bool(CUTS_SHARE);
        let mut clone_rng = SmallRng::seed_from_u64(seed ^ 0xc10e);
        let clones = cuts && clone_rng.random_bool(0.5);
        let serve_rng = SmallRng::seed_from_u64(!seed ^ SERVES);
        let serves = serves_clones(seed);
        let mut collect_rng = SmallRng::seed_from_u64(seed ^ 0x6c);
        let collects = collect_rng.random_bool(0.5);
        let unmaps = collects && SmallRng::seed_from_u64(seed ^ 0x0a9).random_bool(0.5);
        let (labels, shows, scrubs) = (has_labels(seed), shows_snapshots(seed), is_scrubbed(seed));
        let parts = parts_of(seed);
        let drawn = Profile::draw(&mut rng);
        let profile = Profile { cuts, clones, serves, parts, collects, unmaps, ..drawn };
        let profile = Profile { labels, shows, scrubs, ..profile };
        let legs = Legs::new(profile.legs, CACHE_BYTES, profile.rots, &mut rng);
        let logical_block = if rng.random_bool(0.8) { 512 } else { 4096 };
        let options = SimOptions {
            logical_block,
            compare_and_write: rng.random_bool(0.85),
            ..SimOptions::new(STORE_BYTES, rng.random())
        };
        let san = SimDevice::with_options(options);
        let models = Models::default();
        for blocks in &profile.disks {
            models.add(|n| Model::new(n, *blocks));
        }
        let runtime = runtime();
        runtime.block_on(async {
            Local::make_legs(legs.named()).await.expect("a new cache");
            Store::format(san.device(), FormatOptions::default()).await.expect("a new store");
        });
        let requests = requests / profile.fewer;
        Self {
            asked: requests,
            left: requests,
            profile,
            rng,
            cut_rng,
            clone_rng,
            clones: Clones::default(),
            serve_rng,
            parting: Lasting::new(seed),
            collect_rng,
            scrub_rng: SmallRng::seed_from_u64(!seed ^ SCRUBS),
            scrubs: Scrubs::default(),
            show_rng: SmallRng::seed_from_u64(!seed ^ SHOWS),
            shown: shown::Notes::default(),
            trace: Arc::new(Trace::new()),
            legs,
            witness: Arc::default(),
            san,
            store_harmed: false,
            san_pace: Arc::default(),
            models,
            requests: Arc::default(),
            report: Report::default(),
            cache: Arc::default(),
            served: Rc::default(),
        }
    }

    /// One life of the agent, and how it ends.
    fn live(&mut self, last: bool) -> End {
        if runtime().block_on(self.legs.between_lives(&mut self.rng)) {
            self.note_power_loss();
        }
        self.san = self.san.connect();
        if self.profile.store_rots && self.rng.random_bool(0.3) {
            self.store_harmed = true;
            damage::to_store(&self.san, &mut self.rng);
        }
        if self.legs.may_have_lost() {
            self.models.all().iter().for_each(|model| model.lock().damaged = true);
        }
        self.report.lives += 1;
        let runtime = runtime();
        self.trace.note([0xa11e, u64::from(last), self.left, 0]);
        let (end, elapsed) = runtime.block_on(async {
            let began = tokio::time::Instant::now();
            self.trace.begin_life();
            let end = Box::pin(host::live(self, last)).await;
            self.trace.end_life();
            (end, began.elapsed())
        });
        self.left = self.asked.saturating_sub(self.requests.load(Ordering::Relaxed));
        self.report.simulated_ms += elapsed.as_millis() as u64;
        self.die(end);
        // Whatever still ran ends here, wherever it was.
        drop(runtime);
        end
    }

    /// More was damaged than there are copies for: errors are legal, and a refusal; wrong data is not.
    pub fn may_have_lost(&self) -> bool {
        self.legs.may_have_lost() || self.store_harmed
    }

    /// The agent, the host or the whole site fails.
    fn die(&mut self, end: End) {
        let how = self.rng.random_range(0..6);
        // After a failed flush the device's cache is not to be trusted: only what is durable counts.
        let broken = self.legs.paces.iter().any(|pace| pace.broken.load(Ordering::Relaxed));
        let power = (how >= 3 || end == End::LogFailed) && end != End::Orderly || broken;
        self.trace.note([0xdead, end as u64, u64::from(power), how]);
        self.legs.die(power);
        if power {
            self.note_power_loss();
        }
        if power && how == 5 { self.san.crash() } else { self.san.kill_host() }
    }

    /// What was acknowledged and not flushed may be gone.
    fn note_power_loss(&self) {
        self.models.all().iter().for_each(|model| model.lock().power_lost = true);
    }

    /// Were everything but the store lost now: each disk's image is the disk as of one LSN (P2), and the store is sound.
    fn check_store(&mut self) {
        let fork = self.san.fork(self.rng.random());
        if self.rng.random_bool(0.7) {
            fork.crash();
        }
        let session = fork.connect();
        let models = self.models.all();
        let picks = self.cut_rng.random_range(0..7);
        runtime().block_on(async {
            let opened = Store::open(session.device(), OpenOptions::read_only()).await;
            let store = match opened {
                Err(_) if self.store_harmed => return,
                opened => opened.expect("the store opens at any time"),
            };
            for model in &models {
                let (disk, made, is_none) = {
                    let model = model.lock();
                    let is_none = model.is_none && !model.parted.may_be_in_store;
                    (model.in_store(), model.made, is_none)
                };
                match read_out(&store, &disk, None, model).await {
                    Ok((lsn, image)) => {
                        assert!(!is_none, "{disk} was not made, and is in the store");
                        model.lock().check_store(lsn, &image);
                        cuts::check_snapshots(&store, &disk, model, lsn, picks, self.store_harmed)
                            .await;
                    }
                    Err(error) if error.kind == StoreErrorKind::NotFound && !made => {}
                    Err(_) if self.store_harmed => {}
                    Err(error) => panic!("P2: the store's image cannot be read: {error}"),
                }
            }
            let takers = &self.parting.takers;
            clones::check_listed(&store, &self.clones, &models, takers, self.store_harmed).await;
            taken::check_takers(&store, takers, self.store_harmed).await;
            clones::check_clones(&store, &self.clones, &models, self.store_harmed).await;
            let report = match gc::check(&store, gc::CheckOptions { data: false }).await {
                Err(_) if self.store_harmed => return,
                report => report.expect("check"),
            };
            assert!(
                report.is_sound() || self.store_harmed,
                "the store is damaged: {:?}",
                report.problems
            );
        });
    }

    /// P6: when everything was deleted, all is free after two cycles.
    fn delete_everything(&self) {
        let session = self.san.connect();
        runtime().block_on(async {
            let looked_at = Store::open(session.device(), OpenOptions::read_only()).await;
            let hosts = looked_at.expect("the store opens").scan_hosts().await.expect("hosts");
            let host = hosts.iter().find_map(|view| view.record()).expect("a host");
            let options = OpenOptions { host_uuid: host.uuid, ..OpenOptions::default() };
            let store = Store::open(session.device(), options).await.expect("the store opens");
            let mut disks = store.list_vdis().await.expect("the disks");
            // A source goes after what was cloned from it.
            disks.sort_by_key(|info| Reverse(taken::clone_number(&info.name)));
            for info in disks {
                let uuid = info.uuid.to_string();
                if let Some(owner) = info.owner {
                    // A clone that was given up when the store's answer was lost: nobody has its log.
                    assert!(self.may_be_in_store(info.uuid), "{} is attached", info.name);
                    let lost = LostLog { host: owner.host, log_id: info.log_id };
                    store.roll_back(info.uuid, lost).await.expect("a lost log is given up");
                }
                store.delete_vdi_and_snapshots(&uuid).await.expect("a detached disk is deleted");
            }
            for _ in 0..2 {
                let (options, progress) = (CollectOptions::default(), Progress::default());
                gc::collect(&store, options, &progress).await.expect("a cycle");
            }
            store.reclaimed().await;
            store.close().await.expect("close");
            let store = Store::open(session.device(), OpenOptions::read_only()).await;
            let store = store.expect("the store opens");
            let report = gc::check(&store, gc::CheckOptions::default()).await.expect("check");
            let left = report.blocks_allocated;
            assert_eq!(left, 0, "P6: blocks are left when everything is deleted");
        });
    }

    fn may_be_in_store(&self, uuid: Uuid) -> bool {
        let models = self.models.all();
        let mut models = models.iter().map(|model| model.lock());
        models.any(|model| model.uuid == Some(uuid) && model.parted.may_be_in_store)
    }

    /// The agent's ways to the legs of its cache device, and to the store's device.
    pub fn devices(&mut self) -> (Vec<Arc<Timed>>, Arc<Timed>) {
        let trace = &self.trace;
        let timed = |name, sim: &SimDevice, pace: &Arc<Pace>, seed| {
            Timed::new(name, sim.clone(), Arc::clone(pace), seed, Arc::clone(trace))
        };
        let san = timed(2, &self.san, &self.san_pace, self.rng.random()).with_passing_errors();
        let mut legs = Vec::new();
        for (n, (sim, pace)) in self.legs.sims.iter().zip(&self.legs.paces).enumerate() {
            let twin = self.legs.sims.get(1 - n).cloned();
            let leg = timed(1 + 2 * n as u64, sim, pace, self.rng.random());
            legs.push(Arc::new(leg.with_twin(twin)));
        }
        (legs, Arc::new(san))
    }
}

/// Reads a disk, or a snapshot of it, from the store: of which LSN it says that it is, and what it holds.
pub async fn read_out(
    store: &Store,
    disk: &str,
    snapshot: Option<u64>,
    model: &Mutex<Model>,
) -> Result<(u64, Image), StoreError> {
    let mut image = Vec::new();
    let mut sink = |offset: u64, block: &[u8]| {
        for (at, sector) in (offset / 512..).zip(block.chunks_exact(512)) {
            let stamp = model.lock().stamp_of(sector, at);
            // It may have grown since its guest heard of it.
            image.resize(image.len().max(at as usize + 1), 0);
            image[at as usize] = stamp.map_err(std::io::Error::other)?;
        }
        Ok(())
    };
    let report = match snapshot {
        Some(lsn) => store.export_snapshot(disk, &lsn.to_string(), &mut sink).await,
        None => store.export_vdi(disk, &mut sink).await,
    };
    Ok((report?.lsn.0, image))
}

/// A disk's name in the store.
pub fn name(disk: usize) -> String {
    format!("disk{disk}")
}

fn runtime() -> Runtime {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_time().start_paused(true).build().expect("a runtime")
}
