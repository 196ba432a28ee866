//! One life of the agent: the store and the cache are opened, disks come up, guests use them, and it ends somehow.

use crate::chaos;
use crate::device::Timed;
use crate::model::Model;
use crate::worker::{Excuses, Orders, Worker};
use crate::world::{NOWHERE, World, name};
use async_trait::async_trait;
use blockstore::device::Device;
use blockstore::device::sim::{FaultRates, Reach};
use blockstore::types::{BLOCK_SIZE, Lba, Lsn};
use blockstore::{AttachOptions, OpenOptions, Store, StoreErrorKind, Vdi};
use bytes::Bytes;
use cache::backing::{Backing, BackingError, Batch};
use cache::disk::AttachedDisk;
use cache::local::Local;
use cache::{Cache, CacheError, CacheOptions, VdiIdentity};
use futures_util::future::join_all;
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use uuid::Uuid;

/// Longest that anything may take once all faults are over.
const PATIENCE: Duration = Duration::from_secs(3600);

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
}

/// Lives until something ends it.
pub async fn live(world: &mut World, last: bool) -> End {
    let (local, san) = (world.local.clone(), world.san.clone());
    if !last {
        if world.rng.random_bool(0.4) {
            local.crash_after(few(&mut world.rng, 3000));
        } else if world.rng.random_bool(0.3) {
            san.crash_after(few(&mut world.rng, 1000));
        }
    }
    // What is possible at all is possible between two outages.
    let limit = PATIENCE + Duration::from_millis(world.profile.outage_ms) * 20;
    let (cache, pace) = (Arc::clone(&world.cache), Arc::clone(&world.local_pace));
    pace.broken.store(false, Ordering::Relaxed);
    tokio::select! {
        biased;
        () = local.died() => End::Died,
        () = san.died() => End::Died,
        end = serve(world, last) => end,
        words = async {
            tokio::time::sleep(limit).await;
            let cache = cache.lock().upgrade();
            cache.map(|cache| format!("{cache:#?}"))
        } => {
            // With a cache device that is broken for good, nothing can be promised but that it is said.
            let excused = pace.broken.load(Ordering::Relaxed) && !last;
            assert!(excused, "liveness: a life comes to no end: {}", words.unwrap_or_default());
            End::LogFailed
        }
    }
}

/// Small numbers as often as large ones.
fn few(rng: &mut SmallRng, most: u64) -> u64 {
    let order = rng.random_range(0.0..(most as f64).ln());
    order.exp() as u64
}

async fn serve(world: &mut World, last: bool) -> End {
    let seed = world.rng.random();
    let mut chaos = chaos::Chaos::new(world, seed);
    if last {
        return bring_up_and_use(world, last, None).await;
    }
    // The store may be away from the start.
    chaos.begin();
    let orders = chaos.excuses();
    tokio::select! {
        biased;
        end = bring_up_and_use(world, last, Some(orders)) => end,
        () = chaos.run() => unreachable!("chaos never ends"),
    }
}

async fn bring_up_and_use(world: &mut World, last: bool, excuses: Option<Excuses>) -> End {
    let [local, san] = world.devices();
    if last {
        world.local.set_rates(FaultRates::default());
        world.san.set_rates(FaultRates::default());
        world.san.set_reach(Reach::Up);
        world.local_pace.set(20, 3);
        world.san_pace.set(20, 5);
        world.local_pace.set_late(0, 0);
        world.local_pace.breaks.store(0, Ordering::Relaxed);
        world.san_pace.set_late(0, 0);
        world.san_pace.late_reads.store(0, Ordering::Relaxed);
    }
    let (host, requests) = (world.local.clone(), Arc::clone(&world.requests));
    let orders = Rc::new(Orders {
        host,
        requests,
        wanting: Cell::new(if world.rng.random() { 1 } else { world.profile.disks.len() }),
        wind_down: Cell::new(false),
        stop: Cell::new(false),
    });
    let agent = Agent::start(world, local, san).await;
    let mut workers = agent.attach_all(world, excuses.unwrap_or_default(), &orders).await;
    let count = workers.len() as u64;
    let share = if last { world.left } else { world.rng.random_range(0..=world.left / 2 + 1) };
    for worker in &mut workers {
        if last || world.rng.random_bool(0.6) {
            worker.verify_all();
        }
        worker.budget = share / count;
    }
    let orderly = last || world.rng.random_bool(0.2);
    if !orderly {
        let workers = join_all(workers.into_iter().map(Worker::run)).await;
        let failed = workers.iter().any(|worker| worker.log_failed);
        return if failed { End::LogFailed } else { End::Spent };
    }
    // Workers go on while their disks are drained.
    let running = join_all(workers.into_iter().map(Worker::run_to_the_end));
    let ending = agent.wind_down(&orders, last);
    let (workers, ()) = tokio::join!(running, ending);
    if workers.iter().any(|worker| worker.log_failed) {
        return End::LogFailed;
    }
    agent.stop(workers, last).await
}

/// A store's disk, with every commit checked on its way.
#[derive(Debug)]
struct Checked {
    vdi: Arc<Vdi>,
    model: Arc<Mutex<Model>>,
}

#[async_trait]
impl Backing for Checked {
    fn committed(&self) -> Lsn {
        Backing::committed(&*self.vdi)
    }

    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        Backing::read(&*self.vdi, lba, blocks).await
    }

    async fn commit(&self, batch: Batch) -> Result<(), BackingError> {
        let lsn = batch.lsn.0;
        self.model.lock().check_commit(Backing::committed(self).0, &batch);
        Backing::commit(&*self.vdi, batch).await?;
        self.model.lock().committed(lsn);
        Ok(())
    }
}

/// What a running agent holds.
struct Agent {
    cache: Arc<Cache>,
    store: Arc<Store>,
    vdis: Mutex<Vec<Arc<Vdi>>>,
    models: Vec<Arc<Mutex<Model>>>,
    legs: Vec<Device>,
}

impl Agent {
    async fn start(world: &mut World, local: Arc<Timed>, san: Arc<Timed>) -> Self {
        let legs: Vec<Device> = vec![local];
        let options = CacheOptions {
            path: NOWHERE.into(),
            create_size: None,
            flush: world.profile.flush,
            image_bytes: world.profile.image_bytes,
        };
        let cache = loop {
            let opened = match Local::on_device(Path::new(NOWHERE), Arc::clone(&legs[0])).await {
                Ok(local) => Cache::on_local(options.clone(), local).await,
                Err(error) => Err(error),
            };
            match opened {
                Ok(cache) => break cache,
                Err(error) => again("the cache", &error).await,
            }
        };
        *world.cache.lock() = Arc::downgrade(&cache);
        let host = OpenOptions {
            host_uuid: cache.identity().await.host,
            host_name: "host".into(),
            ..OpenOptions::default()
        };
        let store = loop {
            match Store::open(san.clone(), host.clone()).await {
                Ok(store) => break store,
                Err(error) => transient("opening the store", &error).await,
            }
        };
        let models = world.models.clone();
        Self { cache, store, vdis: Mutex::default(), models, legs }
    }

    async fn attach_all(
        &self,
        world: &mut World,
        excuses: Excuses,
        orders: &Rc<Orders>,
    ) -> Vec<Worker> {
        while let Err(error) = self.cache.bind(self.store.uuid()).await {
            again("binding the cache", &error).await;
        }
        let mut workers = Vec::new();
        for (n, blocks) in world.profile.disks.clone().into_iter().enumerate() {
            let bytes = blocks * BLOCK_SIZE as u64;
            let uuid = self.make(n, bytes).await;
            world.made[n] = true;
            let attached = self.attach(n, uuid, bytes).await;
            let rng = SmallRng::seed_from_u64(world.rng.random());
            let manner = (world.profile.habits, excuses, Rc::clone(orders));
            let model = Arc::clone(&self.models[n]);
            workers.push(Worker::new(attached, model, self.legs.clone(), rng, manner));
        }
        workers
    }

    /// Finds a disk, or makes it.
    async fn make(&self, n: usize, bytes: u64) -> Uuid {
        loop {
            match self.store.lookup_vdi(&name(n)).await {
                Ok(info) => return info.uuid,
                Err(error) if error.kind == StoreErrorKind::NotFound => {
                    match self.store.create_vdi(&name(n), bytes).await {
                        Ok(info) => return info.uuid,
                        Err(error) if error.kind == StoreErrorKind::AlreadyExists => {}
                        Err(error) => transient("creating a disk", &error).await,
                    }
                }
                Err(error) => transient("looking a disk up", &error).await,
            }
        }
    }

    async fn attach(&self, n: usize, uuid: Uuid, size_bytes: u64) -> AttachedDisk {
        let identity = VdiIdentity { uuid, name: name(n), size_bytes };
        let log_id = loop {
            match self.cache.reserve(&identity).await {
                Ok(log_id) => break Uuid::from_u128(log_id),
                Err(error) => again("reserving a log", &error).await,
            }
        };
        let vdi = loop {
            match self.store.attach(uuid, AttachOptions { log_id }).await {
                Ok(vdi) => break vdi,
                Err(error) => transient("attaching", &error).await,
            }
        };
        self.vdis.lock().push(Arc::clone(&vdi));
        let model = &self.models[n];
        let backing = Arc::new(Checked { vdi: Arc::clone(&vdi), model: Arc::clone(model) });
        loop {
            match self.cache.attach(&identity, Arc::<Checked>::clone(&backing)).await {
                Ok(attached) => {
                    let mut model = model.lock();
                    model.recovered(attached.disk.staged_lsn().0);
                    model.attached_at(Backing::committed(&*vdi).0);
                    return attached;
                }
                Err(error) => again("recovering a log", &error).await,
            }
        }
    }

    /// Lets the guests finish, and in the last life drains every disk: all of it must get through.
    async fn wind_down(&self, orders: &Orders, last: bool) {
        if last {
            // Guests use up what they have left first.
            while self.models.iter().any(|model| !model.lock().guest_is_done) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        orders.wind_down.set(true);
        if last {
            let vdis = self.vdis.lock().clone();
            for (vdi, model) in vdis.iter().zip(&self.models) {
                loop {
                    match self.cache.drain(vdi.uuid()).await {
                        Ok(_) => break,
                        // A commit that failed for good under the former faults is tried again after a while.
                        Err(error) => again("draining", &error).await,
                    }
                }
                let model = model.lock();
                let committed = Backing::committed(&**vdi).0;
                assert_eq!(committed, model.last_lsn(), "liveness: all of the log is in the store");
            }
        }
        orders.stop.set(true);
    }

    /// Stops in order; in the last life the disks are given up as well.
    async fn stop(&self, workers: Vec<Worker>, last: bool) -> End {
        let vdis = self.vdis.lock().clone();
        for ((worker, vdi), model) in workers.into_iter().zip(&vdis).zip(&self.models) {
            let Worker { attached, .. } = worker;
            if self.cache.release(vdi.uuid(), attached).await.is_err() {
                return End::LogFailed;
            }
            let mut model = model.lock();
            model.flushed = model.last_lsn();
        }
        if last {
            for (vdi, model) in vdis.iter().zip(&self.models) {
                let lsn = Lsn(model.lock().last_lsn());
                vdi.detach(lsn).await.expect("a drained disk can be given up");
                self.cache.detach(vdi.uuid()).await.expect("a drained log can be forgotten");
            }
        }
        self.cache.close().await;
        // The store may be away; then what it should have heard is found out at the next start.
        let closed = self.store.close().await;
        assert!(!last || closed.is_ok(), "liveness: the store closes");
        End::Orderly
    }
}

/// A fault of the cache device on the way up: tried again. What recovery refuses is a broken promise.
async fn again(what: &str, error: &CacheError) {
    match error {
        CacheError::Device(_) | CacheError::Flush { .. } | CacheError::NoSegments { .. } => {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        other => panic!("{what}: {other}"),
    }
}

/// An outage of the store is waited out; anything else is a broken promise.
async fn transient(what: &str, error: &blockstore::StoreError) {
    match error.kind {
        StoreErrorKind::Unreachable
        | StoreErrorKind::Device
        | StoreErrorKind::Corrupt
        | StoreErrorKind::Damaged => {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        _ => panic!("{what}: {error}"),
    }
}
