//! Clones that are made while the store is away (decision 0024): out of this host's cache at first, then in the store.
//!
//! Order: the snapshot is held → copied into a log of the clone's own, durably → served. When the store is there: the parent's
//! log is committed up to the snapshot → the clone is made in the store, as this host's, with its log → it joins the store, as any
//! disk that came up without it. A crash between any two steps leaves a clone that the next start takes up again; its UUID,
//! chosen before all, is what keeps it from being made twice.

use super::served::{RETRY_PAUSE, Served, Way};
use super::{Host, ServedDisks};
use crate::api::Created;
use crate::api::VdiState;
use crate::error::{Failure, Kind, Result};
use crate::names::check_vdi_name;
use blockstore::format::vdi::Origin;
use blockstore::types::Lsn;
use blockstore::{Policy, RegisteredClone, StoreErrorKind, WhenOffline};
use cache::{CacheError, NewClone, VdiIdentity};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;
use uuid::Uuid;

/// Names that are tried for a clone whose own is taken in the store.
const NAMES_MAX: u32 = 1000;
/// A drain of the parent's log, under way.
type Draining = Pin<Box<dyn Future<Output = std::result::Result<Lsn, CacheError>> + Send>>;
/// How often somebody who waits for the store asks whether that is away.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

impl Host {
    /// Returns when the store is known to be away.
    pub(super) async fn store_is_away(&self) {
        while self.parts.store.health().reachable {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Creates a disk that begins as a snapshot which this host's log has and the store does not, without the store.
    pub(super) async fn clone_without_store(
        self: &Arc<Self>,
        name: &str,
        parent: &Arc<Served>,
        snapshot: &str,
        when_offline: WhenOffline,
    ) -> Result<Created> {
        let parts = &self.parts;
        let away = || {
            let why = parts.store.health().last_error;
            let why = why.unwrap_or_else(|| "it does not answer".into());
            format!("the store {} is down ({why})", parts.store.url())
        };
        let pending = parts.cache.pending_snapshots(parent.uuid);
        let lsn = snapshot.parse().ok();
        let by_lsn = pending.iter().find(|pending| Some(pending.lsn.0) == lsn);
        let by_label = || pending.iter().rev().find(|pending| pending.label.as_str() == snapshot);
        let found = by_lsn.or_else(by_label).ok_or_else(|| {
            // It got there just now.
            let words = format!(
                "{}, and snapshot '{snapshot}' of disk '{}' is in this host's log no more: clone it when the store is back",
                away(),
                parent.name
            );
            Failure::new(Kind::Unavailable, words)
        })?;
        let origin = Origin { vdi: parent.uuid, lsn: found.lsn };
        let (uuid, size) = (Uuid::new_v4(), parent.view().size);
        let disk = Arc::new(Served::new(&parts.run_dir, uuid, name, size));
        disk.keep_origin(parts.holds.hold(origin.vdi, origin.lsn), true);
        let new = NewClone {
            disk: VdiIdentity { uuid, name: name.to_owned(), size_bytes: size },
            origin,
            policy: Policy { when_offline, ..Policy::default() },
        };
        let enter = || {
            let is_free = |served: &ServedDisks| {
                if served.values().any(|known| known.name == name) {
                    let words =
                        format!("a disk '{name}' is attached to this host: choose another name");
                    return Err(Failure::new(Kind::Conflict, words));
                }
                Ok(())
            };
            self.enter_if(Arc::clone(&disk), is_free).map(drop)
        };
        let begun = Box::pin(disk.begin(parts, enter, parent.clone_pending(parts, &new))).await;
        let made = parts.cache.origin_of(uuid).await.is_some();
        if !made {
            self.remove(&disk);
        } else {
            tracing::warn!(
                vdi = %name, parent = %parent.name, lsn = origin.lsn.0,
                "a clone was made without the store, in this host's cache"
            );
            self.spawn(follow(Arc::downgrade(self), Arc::clone(&disk)));
        }
        begun.map_err(|failure| {
            let what = if made { "was made, and is not served" } else { "was not made" };
            failure.within(format_args!("{}; clone '{name}' {what}", away()))
        })?;
        let socket = disk.socket.clone();
        Ok(Created { name: name.to_owned(), uuid, size, provisional: true, socket })
    }

    /// Makes a clone in the store, if that does not know of it yet. Its name may be taken there: then it gets another, and is
    /// another object from then on.
    async fn register(
        &self,
        disk: &Arc<Served>,
        draining: &mut Option<Draining>,
    ) -> Result<Arc<Served>> {
        let (parts, uuid) = (&self.parts, disk.uuid);
        let Some(origin) = parts.cache.origin_of(uuid).await else { return Ok(Arc::clone(disk)) };
        let name = &disk.name;
        parts.refuse_while_down(format_args!("clone '{name}' waits"))?;
        let store = parts.store.get()?;
        let cache::CloneOrigin { snapshot: origin, time_ms: snapshot_ms } = origin;
        let is_it = |pending: &cache::PendingSnapshot| pending.lsn == origin.lsn;
        if parts.cache.pending_snapshots(origin.vdi).iter().any(is_it) {
            // One for all attempts: each seals what the parent's log has, and a parent that cannot commit has to make do with its ring.
            let drain = draining.get_or_insert_with(|| {
                let cache = Arc::clone(&parts.cache);
                Box::pin(async move { cache.drain(origin.vdi).await })
            });
            // Not for longer than until the next attempt: the store may go away again.
            let Ok(drained) = tokio::time::timeout(RETRY_PAUSE, drain).await else {
                let words = "its snapshot is on its way to the store";
                return Err(Failure::new(Kind::Unavailable, words));
            };
            *draining = None;
            drained?;
        }
        let handle = disk.lock().await;
        if disk.is_gone() {
            return Ok(Arc::clone(disk));
        }
        disk.note_attempt();
        let (log_id, _) = parts.cache.log_of(uuid).await.ok_or_else(|| {
            Failure::new(Kind::Failed, format!("disk '{name}' has no log in this host's cache"))
        })?;
        let policy = parts.cache.vdi_status(uuid).map(|status| status.policy).unwrap_or_default();
        let mut clone = RegisteredClone {
            uuid,
            name: name.clone(),
            origin,
            snapshot_ms,
            when_offline: policy.when_offline,
            log_id: Uuid::from_u128(log_id),
        };
        for number in 2.. {
            match store.register_clone(clone.clone()).await {
                Err(error) if error.kind == StoreErrorKind::AlreadyExists && number < NAMES_MAX => {
                    clone.name = numbered(name, number);
                }
                result => {
                    result?;
                    break;
                }
            }
        }
        let found = store.lookup_vdi(&uuid.to_string()).await?;
        if found.uuid != uuid {
            let words = format!("disk {} has the UUID of clone '{name}' as its name", found.uuid);
            return Err(Failure::new(Kind::Conflict, words));
        }
        tracing::info!(vdi = %found.name, %uuid, "the clone is in the store");
        if found.name == *name {
            return Ok(Arc::clone(disk));
        }
        tracing::warn!(vdi = %name, now = %found.name, "the clone's name was taken in the store: it has another one");
        // First the socket: once the slot has the new name, nothing else tells it.
        self.socket_names.keep(uuid, name)?;
        if parts.cache.vdi_status(uuid).is_some() {
            parts.cache.rename(uuid, &found.name).await?;
        }
        let renamed = Arc::new(disk.renamed(&found.name));
        self.served.lock().insert(uuid, Arc::clone(&renamed));
        drop(handle);
        Ok(renamed)
    }

    /// Gives up a clone that the store does not know of, with all that was written to it.
    pub(super) async fn give_up_clone(&self, disk: &Arc<Served>) -> Result<()> {
        let (parts, name) = (&self.parts, &disk.name);
        let refuse = |words: String| Err(Failure::new(Kind::Conflict, words));
        let attached =
            format!("disk '{name}' is attached to this host: 'ballast vdi detach {name}' first");
        if disk.origin().is_none() {
            return refuse(attached);
        }
        let _handle = disk.lock().await;
        if disk.is_gone() || parts.cache.origin_of(disk.uuid).await.is_none() {
            return refuse(attached);
        }
        if disk.stats().is_some_and(|stats| stats.connected) {
            return refuse(format!(
                "disk '{name}' is in use by a virtual machine: stop the machine or unplug the disk there"
            ));
        }
        if disk.may_be_registered() {
            let lookup = parts.store.get()?.lookup_vdi(&disk.uuid.to_string()).await;
            match lookup {
                Err(error) if error.kind == StoreErrorKind::NotFound => {}
                Err(error) => {
                    let words = format!("whether the store knows of clone '{name}' is not known");
                    return Err(Failure::from(error).within(words));
                }
                Ok(_) => {
                    return refuse(format!(
                        "clone '{name}' is in the store by now: 'ballast vdi detach {name}', then delete it"
                    ));
                }
            }
        }
        if parts.cache.vdi_status(disk.uuid).is_none() {
            return refuse(format!(
                "clone '{name}' is not served: 'ballast vdi attach {name}' first"
            ));
        }
        disk.stop_server(parts).await?;
        if let Err(error) = parts.cache.give_up_clone(disk.uuid).await {
            // It has no server by now.
            disk.set(VdiState::Failed, Some(error.to_string()));
            return Err(error.into());
        }
        disk.mark_gone();
        self.remove(disk);
        tracing::warn!(vdi = %name, "a clone that the store does not know of was given up");
        Ok(())
    }
}

/// `name-2` and so on, within what a name may have.
fn numbered(name: &str, number: u32) -> String {
    let suffix = format!("-{number}");
    let mut base = name;
    while check_vdi_name(&format!("{base}{suffix}")).is_err() {
        let Some((at, _)) = base.char_indices().next_back() else { break };
        base = &base[..at];
    }
    format!("{base}{suffix}")
}

/// Sees to it that a clone gets into the store, and joins it there.
pub(super) async fn follow(host: Weak<Host>, disk: Arc<Served>) {
    let Some(parts) = host.upgrade().map(|host| Arc::clone(&host.parts)) else { return };
    let mut disk = disk;
    parts.store.wait().await;
    let mut draining = None;
    loop {
        if disk.is_gone() {
            return;
        }
        let Some(host) = host.upgrade() else { return };
        match host.register(&disk, &mut draining).await {
            Ok(found) => {
                disk = found;
                break;
            }
            Err(failure) => disk.waits_for_store(&failure),
        }
        drop(host);
        tokio::time::sleep(RETRY_PAUSE).await;
    }
    disk.let_go_of_origin();
    if parts.cache.vdi_status(disk.uuid).is_none() {
        // Its state tells how it went.
        let _ = disk.bring_up(&parts, None, Way::Back).await;
    }
    if parts.cache.vdi_status(disk.uuid).is_some() {
        // Also if somebody else brought it up meanwhile, who may have taken it for one that the store does not know of.
        disk.join(&parts).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_fits_behind_any_name() {
        assert_eq!(numbered("db", 2), "db-2");
        let long = "ü".repeat(127);
        for name in [long.as_str(), &"x".repeat(255)] {
            let numbered = numbered(name, 999);
            assert!(numbered.ends_with("-999") && check_vdi_name(&numbered).is_ok(), "{numbered}");
        }
    }
}
