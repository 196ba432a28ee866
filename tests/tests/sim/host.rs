//! One life of the agent: the store and the cache are opened, disks come up, guests use them, and it ends somehow.

use crate::chaos;
use crate::clones::Clones;
use crate::crew::Crew;
use crate::damage;
use crate::device::Timed;
use crate::model::{Model, Models};
use crate::parting::Parting;
use crate::scrubs::Scrubs;
use crate::serving::Manner;
use crate::shown;
use crate::witness::Memory;
use crate::worker::{Excuses, Orders, Worker};
use crate::world::{NOWHERE, World};
use async_trait::async_trait;
use blockstore::device::Device;
use blockstore::device::sim::{FaultRates, Reach, SimDevice};
use blockstore::types::{BLOCK_SIZE, Lba, Lsn};
use blockstore::{OpenOptions, Policy, SnapshotHolds, Store, StoreErrorKind, Vdi};
use bytes::Bytes;
use cache::backing::{Backing, BackingError, Batch};
use cache::disk::AttachedDisk;
use cache::{Cache, CacheError, CacheOptions};
use futures_util::future::FutureExt;
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use uuid::Uuid;

/// Longest that anything may take once all faults are over.
const PATIENCE: Duration = Duration::from_secs(3600);
/// Pauses of a life that are short.
const PAUSES_SHORT: u32 = 1000;
/// Disks grow up to this.
const GROWN_MAX: u64 = 600 * BLOCK_SIZE as u64;

/// How a life ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A device died with its host, at one certain operation.
    Died,
    /// The guests had asked for all they wanted in this life.
    Spent,
    /// The cache device failed.
    LogFailed,
    /// Stopped in order: logs sealed, flushers stopped, store closed.
    Orderly,
    /// Something did not come up, for damage of which there was no second copy.
    Refused,
}

/// Why something did not come up; only after damage of which there was no second copy.
#[derive(Debug)]
pub struct Refused(pub String);

/// Lives until something ends it.
pub async fn live(world: &mut World, last: bool) -> End {
    let (legs, san) = (world.legs.sims.clone(), world.san.clone());
    PAUSES.set(0);
    if !last {
        if world.rng.random_bool(0.4) {
            let leg = world.rng.random_range(0..legs.len());
            // Short lives end amid their writes, others as often while they come up.
            let after = match world.profile.life_requests {
                Some(_) => world.rng.random_range(40..300),
                None => few(&mut world.rng, 3000),
            };
            legs[leg].crash_after(after);
        } else if world.rng.random_bool(0.3) {
            san.crash_after(few(&mut world.rng, 1000));
        }
    }
    let may_have_lost = world.may_have_lost();
    // What is possible at all is possible between two outages; after damage beyond repair it may not be possible at all.
    let outages = if may_have_lost { 0 } else { 20 };
    let limit = PATIENCE + Duration::from_millis(world.profile.outage_ms) * outages;
    // With one outage after the other, a life may be slow: if it still goes on then, it is cut off.
    let lately = PATIENCE + Duration::from_millis(world.profile.outage_ms) * 3;
    let (models, requests) = (world.models.clone(), Arc::clone(&world.requests));
    let all = world.models.clone();
    let progress = move || {
        let committed: u64 = models.all().iter().map(|model| model.lock().stored_lsn()).sum();
        (requests.load(Ordering::Relaxed), committed)
    };
    let (cache, paces) = (Arc::clone(&world.cache), world.legs.paces.clone());
    let served = Rc::clone(&world.served);
    served.set(false);
    paces.iter().for_each(|pace| pace.broken.store(false, Ordering::Relaxed));
    tokio::select! {
        biased;
        _ = futures_util::future::select_all(legs.iter().map(|leg| leg.died().boxed_local())) => End::Died,
        () = san.died() => End::Died,
        end = serve(world, last) => end.unwrap_or_else(|Refused(why)| {
            assert!(may_have_lost, "refused without damage: {why}");
            End::Refused
        }),
        words = async {
            tokio::time::sleep(limit.saturating_sub(lately)).await;
            let before = progress();
            tokio::time::sleep(limit.min(lately)).await;
            if progress() != before && !last {
                return None;
            }
            let Some(cache) = cache.lock().upgrade() else { return Some((String::new(), false)) };
            Some((format!("{cache:#?}"), has_orphan(&cache, &all)))
        } => {
            let Some((words, orphan)) = words else { return End::Spent };
            // Nothing comes up on a device that is broken; what is up goes on without it.
            let broken = paces.iter().any(|pace| pace.broken.load(Ordering::Relaxed)) && !last;
            let excused = broken && (!served.get() || orphan) || may_have_lost;
            assert!(excused, "liveness: a life comes to no end: {words}");
            End::LogFailed
        }
    }
}

/// A clone that the store does not know of waits for a disk that takes nothing more to the store in this life.
fn has_orphan(cache: &Cache, models: &Models) -> bool {
    let status = |uuid: Uuid| cache.vdi_status(uuid);
    let all = models.all().into_iter().filter_map(|model| model.lock().uuid);
    let mut origins = all.filter_map(|uuid| status(uuid)?.origin);
    origins.any(|origin| {
        status(origin.snapshot.vdi).is_some_and(|parent| parent.state == cache::Phase::Failed)
    })
}

/// Small numbers as often as large ones.
pub fn few(rng: &mut SmallRng, most: u64) -> u64 {
    let order = rng.random_range(0.0..(most as f64).ln());
    order.exp() as u64
}

async fn serve(world: &mut World, last: bool) -> Result<End, Refused> {
    let seed = world.rng.random();
    let mut chaos = chaos::Chaos::new(world, seed);
    let cold = world.profile.cold_starts && world.rng.random_bool(0.5);
    if last {
        let excuses = Excuses { write_errors: false, read_errors: world.may_have_lost() };
        heal(world);
        return Box::pin(bring_up_and_use(world, last, cold, excuses)).await;
    }
    // The store may be away from the start.
    chaos.begin(cold);
    let excuses = chaos.excuses();
    tokio::select! {
        biased;
        end = bring_up_and_use(world, last, cold, excuses) => end,
        () = chaos.run() => unreachable!("chaos never ends"),
    }
}

fn heal(world: &World) {
    world.legs.heal();
    world.san.set_rates(FaultRates::default());
    world.san.set_reach(Reach::Up);
    world.san.set_full(false);
    world.san_pace.set(20, 5);
    world.san_pace.set_late(0, 0);
    world.san_pace.late_reads.store(0, Ordering::Relaxed);
    world.san_pace.late_fetches.store(0, Ordering::Relaxed);
}

async fn bring_up_and_use(
    world: &mut World,
    last: bool,
    cold: bool,
    excuses: Excuses,
) -> Result<End, Refused> {
    let orders = Rc::new(Orders {
        hosts: world.legs.sims.clone(),
        requests: Arc::clone(&world.requests),
        wanting: Cell::new(if world.rng.random() { 1 } else { world.profile.disks.len() }),
        wind_down: Cell::new(false),
        stop: Cell::new(false),
    });
    let agent = Agent::start(world).await?;
    agent.check_provisional().await;
    let _held = agent.hold_origins().await;
    agent.recall_shown();
    let mut disks = None;
    if cold {
        disks = agent.attach_alone().await?;
    }
    let events = &mut world.report.events;
    events.cold += u64::from(disks.is_some());
    events.one_legged += u64::from(
        world.legs.are_mirrored() && agent.cache.legs().iter().filter(|leg| leg.member).count() < 2,
    );
    let is_alone = disks.is_some();
    let disks = match disks {
        Some(disks) => disks,
        None => {
            agent.open_store().await?;
            agent.attach_all(world).await?
        }
    };
    world.served.set(true);
    let count = disks.len() as u64;
    let most = world.profile.life_requests.unwrap_or(u64::MAX).min(world.left / 2 + 1);
    let share = if last { world.left } else { world.rng.random_range(0..=most) };
    // One that did not come up cannot be satisfied.
    orders.wanting.set(orders.wanting.get().min(disks.len()));
    let (habits, budget) = (world.profile.habits, share / count);
    let manner = Manner { habits, excuses, orders: Rc::clone(&orders), budget, last };
    let mut workers = Vec::new();
    for (n, attached) in disks.into_iter().enumerate() {
        let rng = SmallRng::seed_from_u64(world.rng.random());
        let mut worker = agent.worker(n, attached, rng, &manner);
        if last || world.rng.random_bool(0.6) {
            worker.verify_all();
        }
        worker.budget = budget;
        if world.profile.looks_ahead {
            worker.attached.disk.begin_boot_trace();
        }
        workers.push(worker);
    }
    let orderly = last || world.rng.random_bool(0.2);
    let mut rng = SmallRng::seed_from_u64(world.rng.random());
    let grows = world.profile.grows && !orderly;
    let looks_ahead = world.profile.looks_ahead;
    let (cuts, collects) = (world.profile.cuts, world.profile.collects);
    let (clones, serves) = (world.profile.clones, world.profile.serves);
    let (scrubs, shows) = (world.profile.scrubs, world.profile.shows);
    let parts = world.profile.parts;
    let crew = Crew::default();
    let mut collect_rng = SmallRng::seed_from_u64(world.collect_rng.random());
    let mut cut_rng = SmallRng::seed_from_u64(world.cut_rng.random());
    let mut clone_rng = SmallRng::seed_from_u64(world.clone_rng.random());
    let mut scrub_rng = SmallRng::seed_from_u64(world.scrub_rng.random());
    let mut show_rng = SmallRng::seed_from_u64(world.show_rng.random());
    let mut serve_rng = SmallRng::seed_from_u64(world.serve_rng.random());
    // What the agent does beside serving.
    let beside = async {
        if is_alone {
            agent.join_all().await?;
        }
        let wind_down = async {
            if !orderly {
                std::future::pending::<()>().await;
            }
            agent.wind_down(&orders, last).await;
        };
        tokio::select! {
            biased;
            () = wind_down => {}
            () = agent.now_and_then(&mut rng, grows, looks_ahead) => {}
            () = agent.cut(&mut cut_rng, &orders), if cuts => {}
            () = agent.clone_some(&mut clone_rng, &orders), if clones => {}
            () = agent.collect(&mut collect_rng), if collects => {}
            () = agent.scrub(&mut scrub_rng, last), if scrubs => {}
            () = agent.show_some(&mut show_rng), if shows => {}
        }
        Ok(())
    };
    // And the clones, which come and join as they can.
    let beside = async {
        tokio::select! {
            biased;
            done = beside => done,
            refused = agent.serve_clones(&mut serve_rng, &manner, &crew), if serves => refused,
            refused = agent.part_with_clones(&manner, &crew), if parts.is_any() => refused,
        }
    };
    if !orderly {
        let running = crew.run(workers, |worker| agent.run(worker));
        let workers = tokio::select! {
            biased;
            workers = running => workers,
            refused = beside => return refused.map(|()| End::Spent),
        };
        let failed = workers.iter().flatten().any(|worker| worker.log_failed);
        return Ok(if failed { End::LogFailed } else { End::Spent });
    }
    // Workers go on while their disks are drained.
    let running = crew.run(workers, |worker| agent.run_to_the_end(worker));
    let (sealed, ()) = tokio::try_join!(running.map(Ok), beside)?;
    if sealed.contains(&false) {
        return Ok(End::LogFailed);
    }
    if last && scrubs {
        agent.finish_scrubs(&mut scrub_rng).await;
    }
    if last && shows {
        agent.finish_shown().await;
    }
    Ok(agent.stop(last).await)
}

/// A store's disk, with every commit checked on its way.
#[derive(Debug)]
pub struct Checked {
    pub vdi: Arc<Vdi>,
    pub model: Arc<Mutex<Model>>,
    pub san: Arc<Timed>,
}

#[async_trait]
impl Backing for Checked {
    fn committed(&self) -> Lsn {
        Backing::committed(&*self.vdi)
    }

    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        let read = Backing::read(&*self.vdi, lba, blocks).await;
        self.san.answer_fetch().await;
        read
    }

    async fn commit(&self, batch: Batch) -> Result<(), BackingError> {
        let lsn = batch.lsn.0;
        self.model.lock().check_commit(Backing::committed(self).0, &batch);
        Backing::commit(&*self.vdi, batch).await?;
        self.model.lock().committed(lsn);
        Ok(())
    }

    fn policy(&self) -> Policy {
        Backing::policy(&*self.vdi)
    }
}

/// What a running agent holds.
pub struct Agent {
    pub cache: Arc<Cache>,
    pub san: Arc<Timed>,
    pub store: Mutex<Option<Arc<Store>>>,
    /// Disks that are attached in the store, by their places among the models.
    pub vdis: Mutex<BTreeMap<usize, Arc<Vdi>>>,
    pub models: Models,
    /// Disks that are no clones: the first among the models.
    pub disks: usize,
    pub clones: Clones,
    /// Snapshots that are not deleted, as clones hang on them of which the store may not know.
    pub holds: Arc<SnapshotHolds>,
    /// Clones that are served and have not joined the store.
    pub alone: Cell<usize>,
    /// How they leave.
    pub parting: Parting,
    legs: Vec<Device>,
    /// The legs themselves: they die with their host.
    pub hosts: Vec<SimDevice>,
    /// The only leg, if it was damaged.
    damaged: Option<SimDevice>,
    /// There was damage without a second copy, on whatever device.
    pub may_have_lost: bool,
    /// The store's device is told of free blocks.
    pub unmaps: bool,
    /// Snapshots have labels.
    pub labels: bool,
    pub scrubs: Scrubs,
    /// Snapshots that are attached read-only.
    pub shown: shown::Notes,
    pub held: shown::Held,
    /// The store's device was damaged.
    pub store_harmed: bool,
    /// What it says is wrong at times.
    pub garbles: bool,
}

impl Agent {
    async fn start(world: &mut World) -> Result<Self, Refused> {
        let (legs, san) = world.devices();
        let legs: Vec<Device> = legs.into_iter().map(|leg| -> Device { leg }).collect();
        let options = CacheOptions {
            path: NOWHERE.into(),
            create_size: None,
            flush: world.profile.flush,
            image_bytes: world.profile.image_bytes,
        };
        let may_have_lost = world.may_have_lost();
        let cache = loop {
            let local = world.legs.open(&legs, &mut world.rng).await?;
            match Cache::on_local(options.clone(), local).await {
                Ok(cache) => break cache,
                Err(error) => again("the cache", &error, may_have_lost).await?,
            }
        };
        cache.set_witness(Arc::<Memory>::clone(&world.witness));
        *world.cache.lock() = Arc::downgrade(&cache);
        let damaged = world.legs.may_have_lost().then(|| world.legs.victim_sim().clone());
        let hosts = world.legs.sims.clone();
        let (models, clones) = (world.models.clone(), Arc::clone(&world.clones));
        let (store, vdis) = (Mutex::default(), Mutex::default());
        let (unmaps, disks) = (world.profile.unmaps, world.profile.disks.len());
        let (scrubs, shown) = (Arc::clone(&world.scrubs), Arc::clone(&world.shown));
        let parting = Parting::new(world.profile.parts, &mut world.parting);
        Ok(Self {
            cache,
            san,
            store,
            vdis,
            models,
            disks,
            clones,
            holds: Arc::default(),
            alone: Cell::default(),
            parting,
            legs,
            hosts,
            damaged,
            may_have_lost,
            unmaps,
            labels: world.profile.labels,
            scrubs,
            shown,
            held: shown::Held::default(),
            store_harmed: world.store_harmed,
            garbles: world.profile.san.read_garbled > 0.0,
        })
    }

    /// Waits for the store.
    pub async fn open_store(&self) -> Result<(), Refused> {
        let host = OpenOptions {
            host_uuid: self.cache.identity().await.host,
            host_name: "host".into(),
            unmap: self.unmaps,
            holds: Arc::clone(&self.holds),
            ..OpenOptions::default()
        };
        let store = loop {
            match Store::open(self.san.clone(), host.clone()).await {
                Ok(store) => break store,
                Err(error) => transient("opening the store", &error, self.may_have_lost).await?,
            }
        };
        while let Err(error) = self.cache.bind(store.uuid()).await {
            again("binding the cache", &error, self.may_have_lost).await?;
        }
        *self.store.lock() = Some(store);
        Ok(())
    }

    pub fn store(&self) -> Arc<Store> {
        self.store.lock().clone().expect("the store was opened")
    }

    /// The highest LSN that the device itself says to be durable in a disk's log; it matters only after damage.
    pub fn stated(&self, cache: Uuid, vdi: Uuid, log_id: u128) -> u64 {
        self.damaged.as_ref().map_or(u64::MAX, |sim| damage::stated(sim, cache, vdi, log_id))
    }

    /// What does for a disk what its worker would.
    pub fn worker(
        &self,
        n: usize,
        attached: AttachedDisk,
        rng: SmallRng,
        manner: &Manner,
    ) -> Worker {
        let Manner { habits, excuses, orders, .. } = manner.clone();
        Worker::new(attached, self.models.get(n), self.legs.clone(), rng, (habits, excuses, orders))
    }

    /// A disk that is attached in the store, any of them.
    pub fn any_disk(&self, rng: &mut SmallRng) -> (usize, Arc<Vdi>) {
        let vdis = self.vdis.lock();
        let at = rng.random_range(0..vdis.len());
        let (n, vdi) = vdis.iter().nth(at).expect("so many");
        (*n, Arc::clone(vdi))
    }

    /// Grows disks, hydrates, pins and unpins them, for ever. Whatever becomes of it: the store says at the next start.
    async fn now_and_then(&self, rng: &mut SmallRng, grows: bool, looks_ahead: bool) {
        loop {
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..8_000))).await;
            let (_, vdi) = self.any_disk(rng);
            if grows {
                let bytes =
                    vdi.committed().size_bytes + rng.random_range(1..40) * BLOCK_SIZE as u64;
                if bytes <= GROWN_MAX && vdi.resize(bytes).await.is_ok() {
                    let _ = self.cache.resize(vdi.uuid(), bytes).await;
                }
            }
            if looks_ahead {
                let _ = self.cache.pin(vdi.uuid(), rng.random()).await;
                let part = (Lba(rng.random_range(0..30)), rng.random_range(1..300));
                let ranges = rng.random_bool(0.3).then(|| vec![part]);
                let _ = self.cache.hydrate(vdi.uuid(), ranges).await;
            }
        }
    }

    /// Lets the guests finish, and in the last life drains every disk: all of it must get through.
    async fn wind_down(&self, orders: &Orders, last: bool) {
        if last {
            // Clones are there, and guests use up what they have left first.
            while self.served_clones().iter().any(|n| !self.vdis.lock().contains_key(n))
                || self.served().iter().any(|(_, model)| !model.lock().guest_is_done)
            {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        orders.wind_down.set(true);
        if last {
            for (vdi, model) in self.served() {
                // A snapshot that waited for room may have come after the first drain was asked for.
                let mut drains = 2;
                loop {
                    match self.cache.drain(vdi.uuid()).await {
                        Ok(_) if drains == 1 => break,
                        Ok(_) => drains -= 1,
                        // A commit that failed for good under the former faults is tried again after a while.
                        Err(error) => {
                            if again("draining", &error, self.may_have_lost).await.is_err() {
                                return;
                            }
                        }
                    }
                }
                let model = model.lock();
                let committed = Backing::committed(&*vdi).0;
                assert_eq!(committed, model.last_lsn(), "liveness: all of the log is in the store");
            }
        }
        // What guests wait for comes from the store.
        while self.alone.get() > 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        orders.stop.set(true);
    }

    /// Clones that are disks.
    pub fn served_clones(&self) -> Vec<usize> {
        let models = self.models.all();
        (self.disks..models.len()).filter(|n| !models[*n].lock().is_none).collect()
    }

    /// Disks that are attached in the store, with what they should hold.
    fn served(&self) -> Vec<(Arc<Vdi>, Arc<Mutex<Model>>)> {
        let vdis = self.vdis.lock();
        vdis.iter().map(|(n, vdi)| (Arc::clone(vdi), self.models.get(*n))).collect()
    }

    /// A disk is served until it is to stop, and its log sealed. False if the log failed.
    async fn run_to_the_end(&self, worker: Worker) -> bool {
        let Some(Worker { attached, model, log_failed, .. }) =
            worker.run_to_the_end().await.leave()
        else {
            return true;
        };
        if log_failed {
            return false;
        }
        let uuid = model.lock().uuid.expect("it is attached");
        if self.cache.release(uuid, attached).await.is_err() {
            return false;
        }
        let mut model = model.lock();
        model.flushed = model.last_lsn();
        true
    }

    /// Stops in order; in the last life the disks are given up as well.
    async fn stop(&self, last: bool) -> End {
        if last {
            for (vdi, model) in self.served() {
                let lsn = Lsn(model.lock().last_lsn());
                vdi.detach(lsn).await.expect("a drained disk can be given up");
                self.cache.detach(vdi.uuid()).await.expect("a drained log can be forgotten");
            }
        }
        if last {
            self.discard_logs().await;
            let status = self.cache.status();
            let is_free = status.free_bytes == status.capacity;
            let excused = self.may_have_lost || self.keeps_logs_of_none().await;
            let (logs, left) = (self.cache.attached().await, self.cache.quarantined());
            assert!(is_free || excused, "P6: no disk is left, and: {status:?}, {logs:?}, {left:?}");
            self.collect_all().await;
        }
        self.cache.close().await;
        // The store may be away; then what it should have heard is found out at the next start.
        let closed = self.store().close().await;
        assert!(!last || closed.is_ok(), "liveness: the store closes");
        End::Orderly
    }
}

thread_local! {
    /// How often something was tried again in this life.
    static PAUSES: Cell<u32> = const { Cell::new(0) };
}

/// Before something is tried again; longer if that goes on: a device that is away for a day is not asked every moment.
pub async fn pause() {
    let before = PAUSES.replace(PAUSES.get() + 1);
    let factor = if before < PAUSES_SHORT { 1 } else { 120 };
    tokio::time::sleep(Duration::from_millis(500) * factor).await;
}

/// A fault of the cache device on the way up: tried again. What recovery refuses is a broken promise, unless damage did it.
pub async fn again(what: &str, error: &CacheError, may_have_lost: bool) -> Result<(), Refused> {
    match error {
        CacheError::Device(_)
        | CacheError::Flush { .. }
        | CacheError::NoSegments { .. }
        // A device that says something else each time.
        | CacheError::LogChanged { .. } => {
            pause().await;
            Ok(())
        }
        other if may_have_lost => Err(Refused(format!("{what}: {other}"))),
        other => panic!("{what}: {other}"),
    }
}

/// An outage of the store is waited out; anything else is a broken promise, unless damage did it.
pub async fn transient(
    what: &str,
    error: &blockstore::StoreError,
    may_have_lost: bool,
) -> Result<(), Refused> {
    match error.kind {
        StoreErrorKind::Unreachable
        | StoreErrorKind::Device
        | StoreErrorKind::Corrupt
        | StoreErrorKind::Damaged => {
            pause().await;
            Ok(())
        }
        _ if may_have_lost => Err(Refused(format!("{what}: {error}"))),
        _ => panic!("{what}: {error}"),
    }
}
