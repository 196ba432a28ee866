//! What the control API changes.

use super::Host;
use super::drill::TIME_MAX;
use super::read_only::snapshot_named;
use super::served::{Served, Way};
use crate::api::{
    Attached, Created, Done, Drained, DrainedVdi, DrillBegun, Set, SetRequest, VdiState,
};
use crate::error::{Failure, Kind, Result};
use crate::names::check_vdi_name;
use blockstore::{Policy, PolicyChange, WhenOffline};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use uuid::Uuid;

impl Host {
    /// The disk of this host with that name or UUID.
    /// A disk of that name or UUID is served, or about to be.
    pub fn serves(&self, name_or_uuid: &str) -> bool {
        self.find_served(name_or_uuid).is_some()
    }

    /// The identity of a disk that is served here.
    pub fn served(&self, name_or_uuid: &str) -> Option<Uuid> {
        self.find_served(name_or_uuid).map(|disk| disk.uuid)
    }

    pub(super) fn find_served(&self, name_or_uuid: &str) -> Option<Arc<Served>> {
        let uuid = Uuid::try_parse(name_or_uuid).ok();
        let served = self.served.lock();
        let found =
            served.values().find(|disk| disk.name == name_or_uuid || Some(disk.uuid) == uuid);
        found.map(Arc::clone)
    }

    /// Creates an empty disk.
    pub async fn create(
        &self,
        name: &str,
        size: u64,
        when_offline: Option<&str>,
    ) -> Result<Created> {
        check_vdi_name(name).map_err(|words| Failure::new(Kind::Usage, words))?;
        let policy = when_offline.map_or(Ok(WhenOffline::default()), policy_of)?;
        let info = self.parts.store.get()?.create_vdi_with(name, size, policy).await?;
        Ok(Created::in_store(info))
    }

    /// Deletes a disk that is not attached, with its snapshots or only if it has none.
    pub async fn delete(&self, name: &str, with_snapshots: bool) -> Result<Done> {
        if let Some(disk) = self.find_served(name) {
            // Only a clone that the store does not know of is deleted while it is attached.
            self.give_up_clone(&disk).await?;
            return Ok(Done { name: disk.name.clone(), uuid: disk.uuid });
        }
        let store = self.parts.store.get()?;
        let (name, uuid) = store.identify_vdi(name).await?;
        if with_snapshots {
            store.delete_vdi_and_snapshots(&uuid.to_string()).await?;
        } else {
            store.delete_vdi(&uuid.to_string()).await?;
        }
        self.schedules.release_held();
        Ok(Done { name, uuid })
    }

    /// Serves a disk, or, `read_only`, a snapshot. One that is served already stays as it is; one that failed is tried again.
    pub async fn attach(&self, name: &str, read_only: bool) -> Result<Attached> {
        match snapshot_named(name) {
            Some(snapshot) if read_only => return self.attach_snapshot(&snapshot).await,
            Some(_) => {
                let words = format!(
                    "'{name}' is a snapshot, which never changes: attach it with --read-only, or, to write, a clone of it \
                     ('ballast vdi create NAME --from {name}')"
                );
                return Err(Failure::new(Kind::Usage, words));
            }
            None if read_only => {
                let words = format!(
                    "disk '{name}' cannot be attached read-only, but its snapshots can: 'ballast snap create {name}', then \
                     'ballast vdi attach {name}@LSN --read-only'"
                );
                return Err(Failure::new(Kind::Usage, words));
            }
            None => {}
        }
        loop {
            let (disk, is_new) = match self.find_served(name) {
                Some(disk) => (disk, false),
                None => (self.enter_from_store(name).await?, true),
            };
            match disk.bring_up(&self.parts, None, Way::Asked).await {
                Ok(()) => {
                    let socket = disk.socket.clone().unwrap_or_default();
                    return Ok(Attached {
                        name: disk.name.clone(),
                        uuid: disk.uuid,
                        socket,
                        read_only: false,
                    });
                }
                // It waited for a detach to end.
                Err(_) if disk.is_gone() => self.remove(&disk),
                Err(failure) => {
                    if is_new {
                        self.leave_if_untouched(&disk, &failure).await;
                    }
                    return Err(
                        failure.within(format_args!("disk '{}' cannot be attached", disk.name))
                    );
                }
            }
        }
    }

    pub(super) fn remove(&self, gone: &Arc<Served>) {
        let mut served = self.served.lock();
        // A new one may have taken its place.
        if served.get(&gone.uuid).is_some_and(|disk| Arc::ptr_eq(disk, gone)) {
            served.remove(&gone.uuid);
        }
    }

    /// Notes a disk of the store as one of this host.
    async fn enter_from_store(&self, name: &str) -> Result<Arc<Served>> {
        let info = self.parts.store.get()?.lookup_vdi(name).await?;
        if self.is_lost(&info).await {
            return Ok(self.show_lost(&info));
        }
        if let Some(owner) = info.owner.as_ref().filter(|owner| owner.host != self.identity.host) {
            let host = owner.host_name.clone().unwrap_or_else(|| owner.host.to_string());
            return Err(Failure::new(
                Kind::Conflict,
                format!("disk '{name}' is attached to host '{host}': detach it there first"),
            ));
        }
        self.enter(Arc::new(self.new_served(info.uuid, &info.name, info.size_bytes)))
    }

    /// Takes a disk off the list again if its attach failed before it took hold in the store. One of which the store's
    /// answer is unknown stays, with its log, so that trying again is safe.
    async fn leave_if_untouched(&self, disk: &Arc<Served>, failure: &Failure) {
        if disk.is_lost() {
            return;
        }
        if failure.kind != Kind::Unavailable && disk.give_up(&self.parts).await {
            self.remove(disk);
        }
    }

    /// Drains a disk and releases it, or stops serving a snapshot.
    pub async fn detach(&self, name: &str, force: bool) -> Result<Done> {
        if let Some(snapshot) = snapshot_named(name) {
            return self.detach_snapshot(&snapshot, force).await;
        }
        let Some(disk) = self.find_served(name) else {
            // Tells a wrong name from a disk that is not attached.
            let info = self.parts.store.get()?.lookup_vdi(name).await?;
            let words = match &info.owner {
                None => format!("disk '{}' is not attached", info.name),
                Some(owner) => {
                    let host = owner.host_name.clone().unwrap_or_else(|| owner.host.to_string());
                    format!(
                        "disk '{}' is attached to host '{host}', not to this one: detach it there",
                        info.name
                    )
                }
            };
            return Err(Failure::new(Kind::Conflict, words));
        };
        if disk.drill.until_ms().is_some() {
            let words = format!(
                "disk '{0}' cannot be drained during its outage drill: 'ballast outage end {0}' first",
                disk.name
            );
            return Err(Failure::new(Kind::Conflict, words));
        }
        disk.take_down(&self.parts, force).await?;
        self.notes.forget(disk.uuid);
        self.socket_names.forget(disk.uuid);
        self.remove(&disk);
        Ok(Done { name: disk.name.clone(), uuid: disk.uuid })
    }

    /// Grows a disk.
    pub async fn resize(&self, name: &str, size: u64) -> Result<Created> {
        let (name, uuid) = match self.find_served(name) {
            Some(disk) => {
                disk.grow(&self.parts, size).await?;
                (disk.name.clone(), disk.uuid)
            }
            None => {
                let info = self.parts.store.get()?.lookup_vdi(name).await?;
                self.parts.store.get()?.resize_vdi(&info.uuid.to_string(), size).await?;
                (info.name, info.uuid)
            }
        };
        Ok(Created { name, uuid, size, provisional: false, socket: None })
    }

    /// Changes how a disk is served. For a disk of this host it takes effect at once, store or not; the store's record
    /// follows, at the latest when the disk is detached.
    pub async fn set(&self, name: &str, request: SetRequest) -> Result<Set> {
        let when_offline = request.when_offline.as_deref().map(policy_of).transpose()?;
        let change = PolicyChange { when_offline, ..PolicyChange::default() };
        let (name, uuid, policy) = self.change_policy(name, change).await?;
        Ok(Set { name, uuid, when_offline: policy.when_offline.to_string() })
    }

    /// Changes the policy of a disk, wherever that is kept now.
    pub(super) async fn change_policy(
        &self,
        name: &str,
        change: PolicyChange,
    ) -> Result<(String, Uuid, Policy)> {
        if let Some(disk) = self.find_served(name) {
            let policy = disk.set_policy(&self.parts, change).await?;
            return Ok((disk.name.clone(), disk.uuid, policy));
        }
        let store = self.parts.store.get()?;
        let info = store.lookup_vdi(name).await?;
        let policy = store.set_policy(&info.uuid.to_string(), change).await?;
        Ok((info.name, info.uuid, policy))
    }

    /// Cuts a disk off from the store for a while.
    pub fn drill(&self, name: &str, time: Duration) -> Result<DrillBegun> {
        if time.is_zero() || time > TIME_MAX {
            let hours = TIME_MAX.as_secs() / 3600;
            let words = format!("a drill of {time:?} is not possible: give up to {hours}h");
            return Err(Failure::new(Kind::Usage, words));
        }
        let disk = self.drillable(name)?;
        if disk.view().state != VdiState::Running {
            let words = format!("disk '{}' is not served now: see 'ballast status'", disk.name);
            return Err(Failure::new(Kind::Conflict, words));
        }
        let until = disk.drill.cut(time);
        tracing::warn!(vdi = %disk.name, seconds = time.as_secs(), "outage drill: cut off from the store");
        let (name, uuid) = (disk.name.clone(), disk.uuid);
        self.spawn(async move {
            disk.drill.connected().await;
            tracing::warn!(vdi = %disk.name, "outage drill: over");
        });
        Ok(DrillBegun { name, uuid, until })
    }

    /// Ends a drill before its time.
    pub fn end_drill(&self, name: &str) -> Result<Done> {
        let disk = self.drillable(name)?;
        if !disk.drill.restore() {
            let words = format!("no outage drill of disk '{}' is under way", disk.name);
            return Err(Failure::new(Kind::Conflict, words));
        }
        Ok(Done { name: disk.name.clone(), uuid: disk.uuid })
    }

    fn drillable(&self, name: &str) -> Result<Arc<Served>> {
        self.find_served(name).ok_or_else(|| {
            let words =
                format!("no disk '{name}' is attached to this host: see 'ballast vdi list'");
            Failure::new(Kind::NotFound, words)
        })
    }

    /// Returns when all that was acknowledged before is committed.
    pub async fn drain(&self, name: Option<&str>) -> Result<Drained> {
        let started = Instant::now();
        let disks = match name {
            Some(name) => vec![self.served_or_reason(name).await?],
            None => self.served.lock().values().cloned().collect(),
        };
        let mut drains = JoinSet::new();
        for disk in disks {
            let parts = Arc::clone(&self.parts);
            drains.spawn(async move {
                let lsn = disk.drain(&parts).await.map_err(|failure| {
                    failure.within(format_args!("disk '{}' cannot be drained", disk.name))
                })?;
                Ok(DrainedVdi { name: disk.name.clone(), lsn: lsn.0 })
            });
        }
        let results: Result<Vec<_>> = drains.join_all().await.into_iter().collect();
        let mut drained = results?;
        drained.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Drained { drained, seconds: started.elapsed().as_secs_f64() })
    }

    pub(super) async fn served_or_reason(&self, name: &str) -> Result<Arc<Served>> {
        if let Some(disk) = self.find_served(name) {
            return Ok(disk);
        }
        let info = self.parts.store.get()?.lookup_vdi(name).await?;
        Err(Failure::new(
            Kind::Conflict,
            format!(
                "disk '{}' is not attached to this host: nothing of it is in this cache",
                info.name
            ),
        ))
    }
}

pub(super) fn policy_of(text: &str) -> Result<WhenOffline> {
    text.parse().map_err(|words: String| Failure::new(Kind::Usage, words))
}
