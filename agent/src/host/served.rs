//! One disk on this host: from its socket to its handle in the store.
//!
//! Without the store: socket listens → log recovered from the local device → served; once the store is there: compared
//! with the log → attached in the store → joined.
//! Coming up:   socket listens → log reserved in the cache, durably → attached in the store → log recovered → served.
//! Going down:  server stopped → log sealed → drained → detached in the store → forgotten by the cache.
//!
//! The log is known to the cache before the store names it (rule L6), so a crash between any two steps leaves at worst a
//! disk that the next start brings back, drained or not: an attach or detach that a crash cut off is simply
//! asked for again. One transition at a time; each runs to its end.

mod provisional;

use self::provisional::Provisional;
use super::drill::{Switch, Switched};
use super::parts::Parts;
use crate::api::VdiState;
use crate::config::AgentConfig;
use crate::error::{Failure, Kind, Result};
use crate::names::socket_path;
use ballast_vhost::{DiskServer, Listening, NotServed, ServerOptions, Stats};
use blockstore::types::Lsn;
use blockstore::{
    AttachOptions, Policy, PolicyChange, SnapshotLabel, StoreError, StoreErrorKind, Vdi,
};
use cache::disk::AttachedDisk;
use cache::{CacheError, SnapshotTaken, VdiIdentity};
use parking_lot::Mutex;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;
use uuid::Uuid;

/// Pause between attempts to bring a disk back while the store cannot be reached.
pub(super) const RETRY_PAUSE: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Debug)]
pub struct Served {
    /// The disk.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Where it is served, unless the run directory's path leaves no room for a socket.
    pub socket: Option<PathBuf>,
    /// The name that its socket has; its own, unless it got another one since it has been here.
    socket_name: String,
    /// Clones of it that are being made.
    being_cloned: AtomicUsize,
    /// Between its log and the store.
    pub drill: Arc<Switch>,
    view: Mutex<View>,
    server: Mutex<Option<DiskServer>>,
    /// Its log is open and no server would take it: the next attempt goes on from here.
    unserved: Mutex<Option<AttachedDisk>>,
    /// Held during a transition; the handle in the store while attached.
    handle: tokio::sync::Mutex<Option<Arc<Vdi>>>,
    provisional: Mutex<Provisional>,
}

/// Why a disk comes up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// It was attached when the agent started: a store that cannot be reached is waited for.
    Back,
    /// The same, from the local device alone.
    Alone,
    /// Someone asked for it, and is told what fails.
    Asked,
    /// Its worker died.
    Again,
}

/// What others see of it.
#[derive(Clone, Debug)]
pub struct View {
    /// Bytes.
    pub size: u64,
    /// What it is doing.
    pub state: VdiState,
    /// Why it failed, if it did.
    pub error: Option<String>,
    /// It was detached: whoever still holds this object is late.
    gone: bool,
    /// It is attached to this host in the store, and its log is not in the cache: why it stays closed.
    lost: Option<String>,
}

impl Served {
    /// A disk that is about to come up.
    #[must_use]
    pub fn new(run_dir: &Path, uuid: Uuid, name: &str, size: u64) -> Self {
        let state = VdiState::Recovering;
        Self {
            uuid,
            name: name.to_owned(),
            socket: socket_path(run_dir, name, uuid).ok(),
            socket_name: name.to_owned(),
            being_cloned: AtomicUsize::new(0),
            drill: Arc::new(Switch::new()),
            view: Mutex::new(View { size, state, error: None, gone: false, lost: None }),
            server: Mutex::new(None),
            unserved: Mutex::new(None),
            handle: tokio::sync::Mutex::new(None),
            provisional: Mutex::default(),
        }
    }

    /// Its socket has this name in place of its own.
    #[must_use]
    pub fn on_socket_of(mut self, run_dir: &Path, name: &str) -> Self {
        self.socket = socket_path(run_dir, name, self.uuid).ok();
        self.socket_name = name.to_owned();
        self
    }

    /// For what must not meet a transition.
    pub async fn lock(&self) -> tokio::sync::MutexGuard<'_, Option<Arc<Vdi>>> {
        self.handle.lock().await
    }

    /// It left this host.
    pub fn mark_gone(&self) {
        self.view.lock().gone = true;
    }

    /// A disk that stays closed because its log is not here.
    #[must_use]
    pub fn lost(run_dir: &Path, uuid: Uuid, name: &str, size: u64, why: &str) -> Self {
        let disk = Self::new(run_dir, uuid, name, size);
        disk.set(VdiState::Failed, Some(why.to_owned()));
        disk.view.lock().lost = Some(why.to_owned());
        disk
    }

    /// Its log is not here.
    pub fn is_lost(&self) -> bool {
        self.view().lost.is_some()
    }

    /// What others see of it.
    pub fn view(&self) -> View {
        self.view.lock().clone()
    }

    /// Its server's counters, while it is served.
    pub fn stats(&self) -> Option<Stats> {
        self.server.lock().as_ref().map(DiskServer::stats)
    }

    /// It is attached in the store, by no transition that is still under way.
    pub fn is_joined(&self) -> bool {
        self.handle.try_lock().is_ok_and(|handle| handle.is_some())
    }

    /// Opens its socket, before its log is recovered, so that front ends find it early.
    pub async fn listen(&self, parts: &Parts) -> Result<Listening> {
        let socket = socket_path(&parts.run_dir, &self.socket_name, self.uuid);
        let socket = socket.map_err(|words| Failure::new(Kind::Usage, words))?;
        let options = server_options(&parts.config, socket, serial(self.uuid));
        blocking(move || DiskServer::listen(options)).await
    }

    /// Comes up, or says in its state why not. Does nothing if it is up already.
    pub async fn bring_up(
        &self,
        parts: &Parts,
        listening: Option<Listening>,
        way: Way,
    ) -> Result<()> {
        let mut handle = self.handle.lock().await;
        self.refuse_gone()?;
        if self.view().state == VdiState::Running && way != Way::Again {
            return Ok(());
        }
        self.rise(parts, listening, way, &mut handle).await
    }

    async fn rise(
        &self,
        parts: &Parts,
        listening: Option<Listening>,
        way: Way,
        handle: &mut Option<Arc<Vdi>>,
    ) -> Result<()> {
        self.set(VdiState::Recovering, None);
        let result = self.come_up(parts, listening, way, handle).await;
        match &result {
            Ok(()) => {
                self.set(VdiState::Running, None);
                tracing::info!(vdi = %self.name, "serving");
            }
            Err(failure) => {
                self.set(VdiState::Failed, Some(failure.message.clone()));
                tracing::error!(vdi = %self.name, "not served: {failure}");
            }
        }
        result
    }

    async fn come_up(
        &self,
        parts: &Parts,
        listening: Option<Listening>,
        way: Way,
        handle: &mut Option<Arc<Vdi>>,
    ) -> Result<()> {
        self.refuse_lost()?;
        let former = self.server.lock().take();
        if let Some(former) = former {
            // Its worker left the disk half-way through anything: it is made anew from the log.
            blocking(move || {
                drop(former.stop());
                Ok::<_, Failure>(())
            })
            .await?;
        }
        let listening = match listening {
            Some(listening) => listening,
            None => self.listen(parts).await?,
        };
        let disk = self.driverless(parts, way, handle).await?;
        match blocking(move || Ok::<_, Failure>(listening.run(disk))).await? {
            Ok(server) => {
                *self.server.lock() = Some(server);
                Ok(())
            }
            Err(not_served) => {
                let NotServed { error, disk } = *not_served;
                *self.unserved.lock() = Some(disk);
                Err(error.into())
            }
        }
    }

    /// The disk with its log open.
    async fn driverless(
        &self,
        parts: &Parts,
        way: Way,
        handle: &mut Option<Arc<Vdi>>,
    ) -> Result<AttachedDisk> {
        if let Some(disk) = self.unserved.lock().take() {
            return Ok(disk);
        }
        let (cache, uuid) = (Arc::clone(&parts.cache), self.uuid);
        let runtime = tokio::runtime::Handle::current();
        // One that the store may not know of joins it when it does. What the slot says of it is older.
        let is_provisional = self.origin().is_some();
        if cache.vdi_status(uuid).is_some() {
            if handle.is_none() && way != Way::Again && !is_provisional {
                self.join_now(parts, handle).await?;
            }
            return Ok(cache.reopen(uuid).await?);
        }
        // Recovery is work for a processor: it has a thread of its own.
        if way == Way::Alone || is_provisional && way != Way::Back {
            return blocking(move || runtime.block_on(cache.attach_alone(uuid))).await;
        }
        let log_id = cache.reserve(&self.identity(self.view().size)).await?;
        if handle.is_none() {
            *handle = Some(self.attach_in_store(parts, log_id, way == Way::Back).await?);
        }
        let Some(vdi) = handle.as_ref() else { unreachable!("set above") };
        let size = vdi.committed().size_bytes;
        self.view.lock().size = size;
        let identity = self.identity(size);
        let backing = Arc::new(Switched::new(Arc::clone(vdi), Arc::clone(&self.drill)));
        blocking(move || runtime.block_on(cache.attach(&identity, backing))).await
    }

    fn identity(&self, size_bytes: u64) -> VdiIdentity {
        VdiIdentity { uuid: self.uuid, name: self.name.clone(), size_bytes }
    }

    /// For a disk that is served alone: waits for the store, then joins it. A store that does not fit the log, or a disk
    /// that is not ours any more, ends its service: what is in the log stays there.
    pub async fn join(&self, parts: &Parts) {
        parts.store.wait().await;
        loop {
            let mut handle = self.handle.lock().await;
            if self.is_gone() || handle.is_some() {
                return;
            }
            let Err(failure) = self.join_now(parts, &mut handle).await else { return };
            // Where the device does not give or take the disk's head, what the store says of it is not known.
            let is_unraised =
                || parts.store.opened().is_some_and(|store| store.is_unraised(self.uuid));
            if failure.kind != Kind::Unavailable && !is_unraised() {
                tracing::error!(vdi = %self.name, "no longer served: {failure}");
                if let Err(error) = self.stop_server(parts).await {
                    tracing::warn!(vdi = %self.name, "its server did not stop in good order: {error}");
                }
                let _ = parts.cache.refuse(self.uuid, &failure.message).await;
                return self.set(VdiState::Failed, Some(failure.message));
            }
            drop(handle);
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    /// Compares the log with what the store says, before anything is written there; then attaches and joins.
    async fn join_now(&self, parts: &Parts, handle: &mut Option<Arc<Vdi>>) -> Result<()> {
        let found = parts.store.get()?.lookup_vdi(&self.uuid.to_string()).await;
        let found = found.map_err(no_word_on_the_log)?;
        parts.cache.verify(self.uuid, found.committed_lsn).await?;
        let log_id = parts.cache.reserve(&self.identity(self.view().size)).await?;
        let vdi = self.attach_in_store(parts, log_id, false).await?;
        let backing = Switched::new(Arc::clone(&vdi), Arc::clone(&self.drill));
        parts.cache.join(self.uuid, Arc::new(backing)).await?;
        self.note_policy(parts, &vdi);
        let size = vdi.committed().size_bytes;
        *handle = Some(vdi);
        if size > self.view().size {
            // A growth that a crash cut off.
            parts.cache.resize(self.uuid, size).await?;
            self.view.lock().size = size;
        }
        Ok(())
    }

    async fn attach_in_store(
        &self,
        parts: &Parts,
        log_id: u128,
        patient: bool,
    ) -> Result<Arc<Vdi>> {
        let store = if patient { parts.store.wait().await } else { parts.store.get()? };
        loop {
            let options = AttachOptions { log_id: Uuid::from_u128(log_id) };
            // A log that was served may hold records: it goes on only where it ended (rule L6).
            let attached = match parts.cache.log_of(self.uuid).await {
                Some((_, true)) => store.resume(self.uuid, options).await,
                _ => store.attach(self.uuid, options).await,
            };
            let failure = match attached {
                Ok(vdi) => return Ok(vdi),
                Err(error) => no_word_on_the_log(error),
            };
            if !(patient && failure.kind == Kind::Unavailable) {
                return Err(failure);
            }
            self.set(VdiState::Recovering, Some(failure.message));
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    /// Waits for a transition under way, then goes down for good: afterwards no trace of it is left on this host.
    pub async fn take_down(&self, parts: &Parts, force: bool) -> Result<()> {
        let mut handle = self.handle.lock().await;
        self.refuse_gone()?;
        self.refuse_lost()?;
        self.refuse_clones(parts).await?;
        if !force && self.stats().is_some_and(|stats| stats.connected) {
            return Err(Failure::new(
                Kind::Conflict,
                format!(
                    "disk '{}' is in use by a virtual machine: stop the machine or unplug the disk there, \
                     or give --force",
                    self.name
                ),
            ));
        }
        let Some(vdi) = handle.clone() else {
            if parts.cache.vdi_status(self.uuid).is_some() {
                parts.refuse_while_down(format_args!("disk '{}' cannot be drained", self.name))?;
            }
            if parts.cache.origin_of(self.uuid).await.is_some() {
                let words = format!(
                    "disk '{0}', a clone, is in the store since a moment ago, and its log is not open: 'ballast vdi attach {0}' first",
                    self.name
                );
                return Err(Failure::new(Kind::Conflict, words));
            }
            self.forget(parts).await?;
            self.view.lock().gone = true;
            return Ok(());
        };
        if parts.cache.vdi_status(self.uuid).is_none() {
            return Err(self.log_not_open());
        }
        parts.refuse_while_down(format_args!("disk '{}' cannot be drained", self.name))?;
        self.set(VdiState::Detaching, None);
        let result = self.go_down(parts, &vdi, &mut handle).await;
        match &result {
            Ok(()) => {
                self.view.lock().gone = true;
                tracing::info!(vdi = %self.name, "detached");
            }
            Err(failure) => {
                self.set(VdiState::Failed, Some(failure.message.clone()));
                tracing::error!(vdi = %self.name, "not detached: {failure}");
            }
        }
        result
    }

    /// Keeps the disk closed while its log is given up. If that succeeds, the disk is no longer one of this host.
    ///
    /// # Errors
    /// [`Kind::Conflict`]: it is served. Otherwise those of `work`.
    pub async fn give_up_log<T>(
        &self,
        parts: &Parts,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let mut handle = self.handle.lock().await;
        self.refuse_gone()?;
        self.refuse_being_cloned()?;
        if self.server.lock().is_some() || self.unserved.lock().is_some() {
            let words = format!(
                "disk '{}' is being served from its log in this host's cache {}: nothing is lost and nothing is to be given \
                 up; if its log has failed, restart the agent first",
                self.name,
                parts.config.cache.display()
            );
            return Err(Failure::new(Kind::Conflict, words));
        }
        // Not open here, whatever the store was told: the next attach takes it up again.
        *handle = None;
        let result = work.await?;
        self.view.lock().gone = true;
        Ok(result)
    }

    async fn go_down(&self, parts: &Parts, vdi: &Vdi, handle: &mut Option<Arc<Vdi>>) -> Result<()> {
        if self.unserved.lock().is_some() {
            // Nobody is there to seal its log.
            self.stop_server(parts).await?;
        }
        // Most of it while a virtual machine that is cut off on purpose may still write.
        parts.cache.drain(self.uuid).await?;
        self.stop_server(parts).await?;
        let drained = parts.cache.drain(self.uuid).await?;
        vdi.set_policy(policy_here(parts, self.uuid).into()).await?;
        vdi.detach(drained).await?;
        *handle = None;
        Ok(parts.cache.detach(self.uuid).await?)
    }

    /// Undoes an attach that did not take hold in the store. False: it did, or the log cannot be let go of.
    pub async fn give_up(&self, parts: &Parts) -> bool {
        let handle = self.handle.lock().await;
        if handle.is_some() || self.forget(parts).await.is_err() {
            return false;
        }
        self.view.lock().gone = true;
        true
    }

    /// Lets go of the log of a disk that this host does not hold in the store. One with records in it is kept.
    async fn forget(&self, parts: &Parts) -> Result<()> {
        match parts.cache.unreserve(self.uuid).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.log_not_open()),
        }
    }

    fn refuse_lost(&self) -> Result<()> {
        let Some(why) = self.view().lost else { return Ok(()) };
        let words = format!("disk '{}' stays closed: {why}", self.name);
        Err(Failure::new(Kind::Conflict, words))
    }

    fn log_not_open(&self) -> Failure {
        let reason = self.view().error.unwrap_or_else(|| "see the agent's log".into());
        Failure::new(
            Kind::Conflict,
            format!(
                "disk '{0}' is not served ({reason}), and its log may hold writes that the store does not have: \
                 cure the reason, then 'ballast vdi attach {0}'",
                self.name
            ),
        )
    }

    /// True once it was detached: look the disk up anew.
    pub fn is_gone(&self) -> bool {
        self.view.lock().gone
    }

    fn refuse_gone(&self) -> Result<()> {
        if !self.is_gone() {
            return Ok(());
        }
        let words = format!("disk '{}' was detached a moment ago: try again", self.name);
        Err(Failure::new(Kind::Unavailable, words))
    }

    /// Ends its server and seals its log; the flusher goes on. Used at the agent's stop, too.
    pub async fn stop_server(&self, parts: &Parts) -> Result<()> {
        let server = self.server.lock().take();
        let disk = match server {
            Some(server) => blocking(move || Ok::<_, Failure>(server.stop())).await?,
            None => match self.unserved.lock().take() {
                Some(disk) => disk,
                None => return Ok(()),
            },
        };
        Ok(parts.cache.release(self.uuid, disk).await?)
    }

    /// Ends the server at the agent's stop, after a transition under way unless that takes beyond `deadline`.
    pub async fn shut_down(&self, parts: &Parts, deadline: tokio::time::Instant) -> Result<()> {
        let _handle = tokio::time::timeout_at(deadline, self.handle.lock()).await;
        self.stop_server(parts).await
    }

    /// Grows a disk that is attached.
    pub async fn grow(&self, parts: &Parts, size: u64) -> Result<()> {
        let handle = self.handle.lock().await;
        let Some(vdi) = handle.as_ref() else {
            return Err(Failure::new(
                Kind::Conflict,
                format!("disk '{}' is not served now: see 'ballast vdi info'", self.name),
            ));
        };
        // The store first: the guest must not write what the store could not take.
        vdi.resize(size).await?;
        parts.cache.resize(self.uuid, size).await?;
        self.view.lock().size = size;
        Ok(())
    }

    /// Changes its policy; returns what holds now.
    pub async fn set_policy(&self, parts: &Parts, change: PolicyChange) -> Result<Policy> {
        let handle = self.handle.lock().await;
        self.refuse_gone()?;
        if parts.cache.vdi_status(self.uuid).is_none() {
            return Err(self.log_not_open());
        }
        let policy = parts.cache.set_policy(self.uuid, change).await?;
        if let Some(vdi) = handle.as_ref() {
            self.note_policy(parts, vdi);
        }
        Ok(policy)
    }

    /// Has the store's record follow what this host's slot says, now or when the store is back. What counts here is the
    /// slot; a crash before that is made good at detach.
    fn note_policy(&self, parts: &Parts, vdi: &Arc<Vdi>) {
        let (vdi, cache) = (Arc::clone(vdi), Arc::clone(&parts.cache));
        tokio::spawn(async move {
            // Read now, so that of two changes the later one stays.
            let Some(status) = cache.vdi_status(vdi.uuid()) else { return };
            if let Err(error) = vdi.set_policy(status.policy.into()).await {
                tracing::warn!(
                    vdi = vdi.name(),
                    "the store's record of its policy is behind: {error}"
                );
            }
        });
    }

    /// Commits everything acknowledged so far; waits for a transition under way.
    pub async fn drain(&self, parts: &Parts) -> Result<Lsn> {
        drop(self.handle.lock().await);
        if parts.cache.vdi_status(self.uuid).is_none() || self.unserved.lock().is_some() {
            self.refuse_gone()?;
            return Err(self.log_not_open());
        }
        let drained = tokio::select! {
            drained = parts.cache.drain(self.uuid) => drained,
            failure = self.stays_provisional() => return Err(failure),
        };
        match drained {
            Ok(lsn) => Ok(lsn),
            Err(CacheError::NotAttached { .. }) => {
                let words = "the agent stopped, or the disk was detached, before the end; \
                             what is not in the store yet is safe in the log";
                Err(Failure::new(Kind::Unavailable, words))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Takes a snapshot; waits for a transition under way.
    pub async fn snapshot(&self, parts: &Parts, label: SnapshotLabel) -> Result<SnapshotTaken> {
        self.has_open_log(parts).await?;
        Ok(parts.cache.snapshot(self.uuid, label).await?)
    }

    /// As [`Self::snapshot`], and `then` is done with the answer, as a rule by the disk's worker: it must not wait.
    pub async fn snapshot_then(
        &self,
        parts: &Parts,
        label: SnapshotLabel,
        then: impl FnOnce(Result<SnapshotTaken>) + Send + 'static,
    ) {
        match self.has_open_log(parts).await {
            Ok(()) => {
                let then = Box::new(|taken: Result<_, CacheError>| then(taken.map_err(Into::into)));
                parts.cache.snapshot_then(self.uuid, label, then);
            }
            Err(failure) => then(Err(failure)),
        }
    }

    /// Takes a snapshot of what it was at a point of its log that the store does not have yet.
    pub async fn snapshot_as_of(
        &self,
        parts: &Parts,
        point: cache::AsOf,
        label: SnapshotLabel,
    ) -> Result<SnapshotTaken> {
        self.has_open_log(parts).await?;
        Ok(parts.cache.snapshot_as_of(self.uuid, point, label).await?)
    }

    async fn has_open_log(&self, parts: &Parts) -> Result<()> {
        drop(self.handle.lock().await);
        if !parts.cache.is_attached(self.uuid) || self.unserved.lock().is_some() {
            self.refuse_gone()?;
            return Err(self.log_not_open());
        }
        Ok(())
    }

    pub(super) fn set(&self, state: VdiState, error: Option<String>) {
        let mut view = self.view.lock();
        view.state = state;
        view.error = error;
    }
}

/// What this host's slot says of a disk that is attached.
fn policy_here(parts: &Parts, uuid: Uuid) -> Policy {
    parts.cache.vdi_status(uuid).map(|status| status.policy).unwrap_or_default()
}

/// How the agent serves a disk at `socket`.
pub(super) fn server_options(
    config: &AgentConfig,
    socket: PathBuf,
    serial: String,
) -> ServerOptions {
    ServerOptions {
        socket,
        mode: config.socket_mode,
        owner: socket_owner(config.socket_owner),
        queues: config.queues,
        queue_size_max: config.queue_size,
        serial,
        read_only: false,
        poll_us: config.poll_us,
    }
}

/// A block of the store that its device does not read says nothing against the log: to its disk that is an outage.
fn no_word_on_the_log(error: StoreError) -> Failure {
    match error.kind {
        StoreErrorKind::Device => Failure::new(Kind::Unavailable, error.to_string()),
        _ => error.into(),
    }
}

/// What the guest sees as serial number: 20 bytes hold the first ten bytes of the UUID in hexadecimal.
fn serial(uuid: Uuid) -> String {
    uuid.simple().to_string()[..20].to_owned()
}

/// Either half may be left as it is, which chown(2) writes as -1.
fn socket_owner((user, group): (Option<u32>, Option<u32>)) -> Option<(u32, u32)> {
    (user.is_some() || group.is_some())
        .then(|| (user.unwrap_or(u32::MAX), group.unwrap_or(u32::MAX)))
}

/// Runs what may block off the runtime's threads.
pub(super) async fn blocking<T: Send + 'static, E: Into<Failure> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Into::into),
        Err(error) => Err(Failure::new(Kind::Failed, format!("the agent failed inside: {error}"))),
    }
}
