//! The host: its store, its cache and the disks that it serves, wired together.
//!
//! `store` opens a store, `opening` this host's, `seat` is where it is found, `parts` is what all disks share, `served` is one disk, `requests` and `report` are
//! what the control API does and shows, `meters` what the counters foretell, `drill` cuts a disk off
//! on purpose, `clones` makes clones while the store is away, `socket_names` has the sockets of those that got another name, `collecting` collects garbage, `scrubbing` verifies what the store holds, `sizing` computes sizes, `watermarks` warns of a store that fills, `schedules` takes and thins snapshots, `read_only` serves them, `quiesce` freezes guests for snapshots and sees to it that they are thawed, `replacing` fills a new leg of the cache, `errors` translates. All use of the other crates' APIs is in this folder.
//!
//! A disk that does not come back at the start, or whose worker fails, is shown as failed; all others go on.

mod ahead;
mod clones;
mod collecting;
mod diff;
mod drill;
mod errors;
mod forest;
mod left_behind;
mod loss;
mod meters;
mod notes;
mod opening;
mod parts;
mod quiesce;
mod read_only;
mod receipt;
mod replacing;
mod report;
mod requests;
mod rewind;
mod schedules;
mod scrubbing;
mod seat;
mod served;
mod sizing;
mod snapshots;
mod socket_names;
pub mod store;
mod watch;
mod watermarks;

use crate::config::AgentConfig;
use crate::error::{Failure, Kind, Result};
use crate::machine::{host_name, this_machine};
use crate::notify;
use blockstore::format::vdi::Origin;
use blockstore::{OpenOptions, StoreErrorKind};
use cache::local::Terms;
use cache::{AttachedRecord, Cache, CacheIdentity, CacheOptions};
use opening::Opening;
use parking_lot::Mutex;
use parts::Parts;
use seat::Seat;
use served::{Served, Way};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use uuid::Uuid;

/// How often this host tells the store that it is alive.
const HEARTBEAT_PERIOD: Duration = Duration::from_secs(10);

/// Disks of this host, by their UUID.
type ServedDisks = BTreeMap<Uuid, Arc<Served>>;

/// See the module.
#[derive(Debug)]
pub struct Host {
    parts: Arc<Parts>,
    identity: CacheIdentity,
    name: String,
    started: Instant,
    /// Disks attached to this host, by identity. Held for moments only.
    served: Mutex<ServedDisks>,
    /// What `status` foretells.
    meters: Mutex<meters::Meters>,
    /// How far disks were, for when their log is lost.
    notes: notes::Notes,
    socket_names: socket_names::SocketNames,
    /// Garbage collection.
    collecting: collecting::Collecting,
    /// Verifying what the store holds.
    scrubbing: scrubbing::Scrubbing,
    /// What disks and snapshots hold.
    sizing: Arc<sizing::Sizing>,
    /// Snapshots by themselves.
    schedules: Arc<schedules::Schedules>,
    /// Snapshots that are served.
    read_only: read_only::ReadOnlyDisks,
    /// Guests that are frozen for a snapshot.
    quiescing: Arc<quiesce::Quiescing>,
    /// Logs that the store has left behind.
    left_behind: Arc<left_behind::LogsLeftBehind>,
    /// Heartbeat, and disks on their way back. Ended at the stop.
    tasks: Mutex<JoinSet<()>>,
}

impl Host {
    /// Opens cache and store, and brings back the disks that were attached. Returns when their sockets listen; recovery
    /// goes on. A store that does not answer is waited for only if no disk can be served without it.
    pub async fn start(
        config: AgentConfig,
        run_dir: &Path,
        progress: &(dyn Fn(&str) + Sync),
    ) -> Result<Arc<Self>> {
        // First of all: nothing that follows is needed for it, and much of it may take long or fail.
        let quiescing = quiesce::Quiescing::open(run_dir);
        let name = host_name();
        let legs = config.caches();
        for path in &legs {
            progress(&format!("opening the cache {}", path.display()));
            if path.is_dir() {
                let folder = path.display();
                let words = format!("cache {folder} is a folder: give a file or a block device");
                return Err(Failure::new(Kind::Usage, words));
            }
        }
        let mut options = CacheOptions {
            path: config.cache.clone(),
            create_size: config.cache_size,
            flush: cache::flusher::FlushOptions::default(),
            image_bytes: config.segment_memory,
        };
        if let Some(age) = config.flush_max_age {
            options.flush.max_age_ms = age.as_millis() as u64;
        }
        let machine = this_machine(&config.machine_id_file)?;
        let terms = Terms { degraded: config.degraded, machine };
        let cache = Cache::open_legs(options, &legs, &terms).await?;
        cache.set_leg_timeout(config.leg_timeout);
        keep_identity(&cache, run_dir).await?;
        let left_behind = Arc::new(left_behind::LogsLeftBehind::new(run_dir));
        cache.set_witness(Arc::<left_behind::LogsLeftBehind>::clone(&left_behind));
        let identity = cache.identity().await;
        progress(&format!("opening the store {}", store::without_secrets(&config.store)));
        let seat = Arc::new(Seat::new(&config.store, identity.store));
        let holds = Arc::default();
        let opening = Opening {
            url: config.store.clone(),
            device: config.device.clone(),
            options: OpenOptions {
                host_uuid: identity.host,
                host_name: name.clone(),
                take_over_host: config.take_over_host,
                node_cache_bytes: config.node_memory,
                holds: Arc::clone(&holds),
                unmap: config.gc_unmap,
                ..OpenOptions::default()
            },
            cache: Arc::clone(&cache),
            cache_path: config.cache.clone(),
        };
        let mut tasks = JoinSet::new();
        let has_disks = cache.attached().await.iter().any(|disk| disk.was_served);
        if has_disks || read_only::ReadOnlyDisks::were_any(run_dir) {
            let trying = AbortOnDrop(opening.start(&seat).await?);
            tasks.spawn(async move {
                let mut trying = trying;
                let _ = (&mut trying.0).await;
            });
        } else {
            opening.wait_for(&seat, &config, progress).await?;
        }
        let parts =
            Arc::new(Parts { config, run_dir: run_dir.to_owned(), store: seat, cache, holds });
        let read_only = read_only::ReadOnlyDisks::recall(&parts);
        let host = Arc::new(Self {
            parts,
            identity,
            name,
            started: Instant::now(),
            served: Mutex::default(),
            meters: Mutex::default(),
            notes: notes::Notes::open(run_dir),
            socket_names: socket_names::SocketNames::open(run_dir),
            collecting: collecting::Collecting::default(),
            scrubbing: scrubbing::Scrubbing::default(),
            sizing: Arc::default(),
            schedules: Arc::default(),
            read_only,
            quiescing,
            left_behind,
            tasks: Mutex::new(tasks),
        });
        host.bring_back().await;
        host.bring_back_snapshots().await;
        host.spawn(heartbeat(Arc::clone(&host.parts)));
        host.spawn(watch::workers(Arc::downgrade(&host)));
        host.spawn(report::read_meters(Arc::downgrade(&host)));
        host.spawn(notes::keep(Arc::downgrade(&host)));
        host.spawn(collecting::by_itself(Arc::downgrade(&host)));
        host.spawn(scrubbing::by_itself(Arc::downgrade(&host)));
        host.spawn(schedules::taking::by_itself(Arc::downgrade(&host)));
        host.spawn(schedules::thinning::by_itself(Arc::downgrade(&host)));
        host.spawn(loss::find(Arc::downgrade(&host)));
        Ok(host)
    }

    /// What commands need to know while no agent runs, and the next agent if the cache is lost.
    #[must_use]
    pub fn remembered(&self) -> crate::run_dir::Remembered {
        let (caches, host) = (self.parts.config.caches(), Some(self.identity.host));
        crate::run_dir::Remembered { caches, host }
    }

    /// Opens the sockets of all disks that were attached, then recovers them side by side.
    async fn bring_back(self: &Arc<Self>) {
        let attached = self.parts.cache.attached().await;
        let here: Vec<Uuid> = attached.iter().map(|record| record.vdi).collect();
        self.socket_names.keep_only(&here);
        // All before any disk comes up: a parent's snapshots may be thinned from then on.
        let hold = |origin: Origin| self.parts.holds.hold(origin.vdi, origin.lsn);
        let holds: Vec<_> = attached.iter().map(|record| record.origin.map(hold)).collect();
        for (record, hold) in attached.into_iter().zip(holds) {
            let AttachedRecord { vdi, name, size_bytes, was_served, .. } = record;
            let served = Arc::new(self.new_served(vdi, &name, size_bytes));
            self.served.lock().insert(vdi, Arc::clone(&served));
            // Should this fail, coming up tries again, and says why.
            let listening = served.listen(&self.parts).await.ok();
            let parts = Arc::clone(&self.parts);
            if let Some(hold) = hold {
                served.keep_origin(hold, false);
                let host = Arc::downgrade(self);
                self.spawn(async move {
                    // Whether the store knows of it shows later.
                    if was_served {
                        let _ = served.bring_up(&parts, listening, Way::Alone).await;
                    }
                    clones::follow(host, served).await;
                });
                continue;
            }
            // The store may be there, but for the head of this disk.
            let alone = was_served && parts.store.opened().is_none_or(|s| s.is_unraised(vdi));
            self.spawn(async move {
                // Its state tells how it went.
                let way = if alone { Way::Alone } else { Way::Back };
                let up = served.bring_up(&parts, listening, way).await;
                if alone && up.is_ok() {
                    served.join(&parts).await;
                } else if alone {
                    // The store may know more than the local device.
                    parts.store.wait().await;
                    let _ = served.bring_up(&parts, None, Way::Back).await;
                }
            });
        }
    }

    /// A disk that is about to come up, on the socket that it had here before.
    fn new_served(&self, uuid: Uuid, name: &str, size: u64) -> Served {
        let disk = Served::new(&self.parts.run_dir, uuid, name, size);
        match self.socket_names.of(uuid) {
            Some(kept) => disk.on_socket_of(&self.parts.run_dir, &kept),
            None => disk,
        }
    }

    /// Makes a disk known that comes to this host.
    ///
    /// # Errors
    /// Another disk has its socket; nothing was changed.
    fn enter(&self, disk: Arc<Served>) -> Result<Arc<Served>> {
        self.enter_if(disk, |_| Ok(()))
    }

    /// The same if those that are here allow it.
    fn enter_if(
        &self,
        disk: Arc<Served>,
        allowed: impl FnOnce(&ServedDisks) -> Result<()>,
    ) -> Result<Arc<Served>> {
        let mut served = self.served.lock();
        allowed(&served)?;
        if let Some(known) = served.get(&disk.uuid) {
            // Another request was faster.
            return Ok(Arc::clone(known));
        }
        let socket = |other: &&Arc<Served>| other.socket.is_some() && other.socket == disk.socket;
        if let Some(other) = served.values().find(socket) {
            let words = format!(
                "disk '{}' cannot be served at {}: disk '{1}' has that socket, as it had that name when its machine was given it, for as \
                 long as it is attached here: 'ballast vdi detach {1}' first",
                disk.name, other.name,
            );
            return Err(Failure::new(Kind::Conflict, words));
        }
        served.insert(disk.uuid, Arc::clone(&disk));
        Ok(disk)
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock();
        // What has ended needs no place any more.
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// Stops serving, drains for at most `timeout`, closes everything. What is left is safe in the log.
    pub async fn stop(&self, timeout: Duration) {
        let deadline = tokio::time::Instant::now() + timeout;
        // While their disks are served: a guest that is freezing writes before it can thaw.
        self.quiescing.settle(tokio::time::Instant::now() + timeout / 2).await;
        self.keep_scrub();
        self.tasks.lock().abort_all();
        let served: Vec<_> = self.served.lock().values().cloned().collect();
        let mut stopping = JoinSet::new();
        for disk in served {
            let parts = Arc::clone(&self.parts);
            stopping.spawn(async move {
                // What was written during a drill had better reach the store now.
                disk.drill.restore();
                if let Err(failure) = disk.shut_down(&parts, deadline).await {
                    tracing::error!(vdi = %disk.name, "its server did not stop in good order: {failure}");
                }
                if parts.cache.vdi_status(disk.uuid).is_none() {
                    return;
                }
                if parts.store.opened().is_none() || parts.cache.origin_of(disk.uuid).await.is_some()
                {
                    tracing::warn!(vdi = %disk.name, "not drained: the store is away; the log has everything");
                    return;
                }
                match tokio::time::timeout_at(deadline, disk.drain(&parts)).await {
                    Ok(Ok(lsn)) => tracing::info!(vdi = %disk.name, lsn = lsn.0, "drained"),
                    Ok(Err(failure)) => tracing::warn!(vdi = %disk.name, "not drained: {failure}"),
                    Err(_) => tracing::warn!(
                        vdi = %disk.name,
                        "not drained in time; the log has the rest, and the next start carries on"
                    ),
                }
            });
        }
        while stopping.join_next().await.is_some() {}
        self.stop_snapshots().await;
        notify::status("closing");
        self.parts.cache.close().await;
        if let Some(store) = self.parts.store.opened()
            && let Err(error) = store.close().await
        {
            tracing::warn!("closing the store: {error}");
        }
    }
}

/// A cache that was just created makes a new host, unless this run directory's last agent says who the host was: then it is
/// the same with a new cache, and the disks that the store has for it are still its own. One agent at a time uses a run
/// directory, so two of one identity do not meet.
async fn keep_identity(cache: &Cache, run_dir: &Path) -> Result<()> {
    let Some(host) = crate::run_dir::recall(run_dir).and_then(|last| last.host) else {
        return Ok(());
    };
    if cache.identity().await.host != host && cache.take_identity(host).await? {
        tracing::info!(%host, "a new cache; the host keeps its identity, as the run directory has it");
    }
    Ok(())
}

/// Tells the store now and then that this host is alive; this also notices an outage while all disks are idle.
async fn heartbeat(parts: Arc<Parts>) {
    let store = parts.store.wait().await;
    let mut lost = false;
    loop {
        tokio::time::sleep(HEARTBEAT_PERIOD).await;
        match store.heartbeat().await {
            Err(error) if error.kind == StoreErrorKind::NotOwner && !lost => {
                lost = true;
                tracing::error!("{error}");
            }
            Err(error) => tracing::debug!("heartbeat: {error}"),
            Ok(()) => lost = false,
        }
    }
}

/// A task that ends with whoever waits for it.
struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
