//! Snapshots and clones.
//!
//! A snapshot is taken in the log of a served disk, store or not. All else is about snapshots in the store: one that is still
//! in the log is drained there first.

use super::Host;
use super::parts::Parts;
use super::requests::policy_of;
use super::schedules::Spared;
use super::served::Served;
use crate::api::snapshots::{
    AsOf, SnapDeleted, SnapLabelRequest, SnapListRequest, SnapRequest, Snapped, Snapshot,
    SnapshotPlace, Snapshots,
};
use crate::api::{Created, Origin};
use crate::error::{Failure, Kind, Result};
use crate::names::check_vdi_name;
use blockstore::io::now_ms;
use blockstore::schedule::{is_automatic, is_cut};
use blockstore::snapshots::{PAGE_MAX, Page};
use blockstore::types::Lsn;
use blockstore::{SnapshotLabel, WhenOffline};
use cache::{LogCut, PendingSnapshot, SnapshotTaken};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// Most snapshots that one request deletes: they are looked for in the store while the disk's commits wait.
const DELETE_MAX: usize = 256;
/// How long a caller waits for a snapshot if nothing was said, and at most.
const WAIT: Duration = Duration::from_secs(30);
const WAIT_MAX: Duration = Duration::from_secs(3600);
/// As many snapshots of a cadence can be held in the log at once.
const HELD_MAX: usize = 4;
/// Snapshots in a page if nothing was said.
const PAGE: usize = 1000;

impl Host {
    /// Takes a snapshot of a served disk; it is durable in the local log when this returns.
    pub async fn snap(&self, name: &str, request: SnapRequest) -> Result<Snapped> {
        let label = label_of(request.label)?;
        let disk = self.served_or_reason(name).await?;
        // A log without room may stay so for hours: callers that wait for it must not use up the control socket.
        let wait = request.wait_ms.map_or(WAIT, Duration::from_millis).min(WAIT_MAX);
        if let Some(point) = request.as_of {
            return take_as_of(&self.parts, &disk, point, label, wait).await;
        }
        take(&self.parts, &disk, label, wait).await
    }

    /// Likewise, for as long as it takes, and `then` is done with the answer, as a rule by the disk's worker: it must not wait. A disk
    /// that was attached as `name` once.
    pub async fn snap_then(
        &self,
        uuid: Uuid,
        name: &str,
        label: String,
        then: impl FnOnce(Result<Snapped>) + Send + 'static,
    ) {
        let label = match label_of(label) {
            Ok(label) => label,
            Err(failure) => return then(Err(failure)),
        };
        let Some(disk) = self.served.lock().get(&uuid).cloned() else {
            let words = format!("disk '{name}' is not attached to this host any more");
            return then(Err(Failure::new(Kind::Conflict, words)));
        };
        // Not the disk itself, which ends its worker when it is dropped.
        let (text, name) = (label.as_str().to_owned(), disk.name.clone());
        let then = move |taken| then(answer_for(&name, uuid, text, taken));
        disk.snapshot_then(&self.parts, label, then).await;
    }

    /// A page of a disk's snapshots, those that are still in the log among them.
    pub async fn snapshots(&self, name: &str, request: SnapListRequest) -> Result<Snapshots> {
        let SnapListRequest { oldest_first, beyond, limit } = request;
        let limit = if limit == 0 { PAGE } else { limit.min(PAGE_MAX - 1) };
        let served = self.find_served(name);
        let in_log: Vec<Snapshot> = served.iter().flat_map(|disk| self.in_log(disk)).collect();
        let page = Page { newest_first: !oldest_first, beyond: beyond.map(Lsn), limit: limit + 1 };
        let stored = match self.stored(name, page).await {
            // What the log has is known all the same.
            Err(failure) if failure.kind == Kind::Unavailable && served.is_some() => None,
            stored => Some(stored?),
        };
        let store_away = stored.is_none();
        let (name, uuid, stored) = match (stored, &served) {
            (Some(found), _) => found,
            (None, Some(disk)) => (disk.name.clone(), disk.uuid, Vec::new()),
            (None, None) => return Err(Failure::new(Kind::Unavailable, "the store is away")),
        };
        let is_beyond = |lsn: u64| {
            beyond.is_none_or(|beyond| if oldest_first { lsn > beyond } else { lsn < beyond })
        };
        // One that was committed meanwhile is in both.
        let known: HashSet<u64> = stored.iter().map(|stored| stored.lsn).collect();
        let new = |snapshot: &Snapshot| !known.contains(&snapshot.lsn);
        let mut pending: Vec<_> =
            in_log.into_iter().filter(|s| is_beyond(s.lsn) && new(s)).collect();
        let named: HashSet<u64> = pending.iter().map(|snapshot| snapshot.lsn).collect();
        let cuts = served.iter().flat_map(|disk| self.parts.cache.pending_cuts(disk.uuid));
        let mut cuts: Vec<LogCut> = cuts
            .filter(|cut| is_beyond(cut.lsn.0))
            .filter(|cut| !known.contains(&cut.lsn.0) && !named.contains(&cut.lsn.0))
            .collect();
        if !oldest_first {
            cuts.reverse();
        }
        // There may be many, of which a page shows a few.
        pending.extend(cuts.iter().take(limit + 1).map(|cut| in_log_only(cut.named())));
        let mut snapshots: Vec<_> = stored.into_iter().chain(pending).collect();
        snapshots.sort_unstable_by_key(|snapshot| snapshot.lsn);
        if !oldest_first {
            snapshots.reverse();
        }
        let more = snapshots.len() > limit;
        snapshots.truncate(limit);
        Ok(Snapshots { name, uuid, snapshots, more, store_away })
    }

    async fn stored(&self, name: &str, page: Page) -> Result<(String, Uuid, Vec<Snapshot>)> {
        let store = self.parts.store.get()?;
        let (name, uuid) = store.identify_vdi(name).await?;
        let list = store.snapshots(&uuid.to_string(), page).await?;
        Ok((name, uuid, list.iter().map(in_store).collect()))
    }

    fn in_log(&self, disk: &Served) -> Vec<Snapshot> {
        let pending = self.parts.cache.pending_snapshots(disk.uuid).into_iter();
        pending.map(in_log_only).collect()
    }

    /// Sees to it that snapshots of a cadence that are only in the log and are named here will be there, though newer ones come meanwhile.
    /// True if the log has some that may be meant; and what is to be kept for as long as they are used.
    async fn hold_cuts(
        &self,
        disk: &Served,
        lsns: &HashSet<u64>,
        wanted: &[&str],
    ) -> Result<(bool, Vec<Spared>)> {
        let mut spared = self.schedules.spare_again(disk.uuid, lsns.iter().copied());
        let pending = self.parts.cache.pending_cuts(disk.uuid);
        let by_label = !pending.is_empty() && wanted.iter().any(|wanted| is_cut(wanted));
        let named: Vec<LogCut> =
            pending.into_iter().filter(|cut| lsns.contains(&cut.lsn.0)).collect();
        if named.is_empty() {
            return Ok((by_label, spared));
        }
        let what =
            format!("snapshot {} of disk '{}' is not in the store yet", named[0].lsn, disk.name);
        self.parts.refuse_while_down(&what)?;
        for cut in named.iter().take(HELD_MAX) {
            spared.push(self.schedules.spare(disk.uuid, cut));
            let PendingSnapshot { lsn, label, .. } = cut.named();
            let held = disk.snapshot_as_of(&self.parts, cache::AsOf::Lsn(lsn), label);
            // If the store goes beyond it just now, it is in it, or no rule keeps it any more: the store says which.
            if let Ok(Err(failure)) = tokio::time::timeout(WAIT, held).await {
                tracing::debug!(vdi = %disk.name, %lsn, "a snapshot of the log was asked for: {failure}");
            }
        }
        Ok((true, spared))
    }

    /// Deletes snapshots, all or none.
    pub async fn delete_snapshots(&self, name: &str, which: Vec<String>) -> Result<SnapDeleted> {
        if which.is_empty() {
            return Err(Failure::new(Kind::Usage, "no snapshot was named: give LSNs or labels"));
        }
        if which.len() > DELETE_MAX {
            let words = format!(
                "{} snapshots were named: delete at most {DELETE_MAX} at once",
                which.len()
            );
            return Err(Failure::new(Kind::Usage, words));
        }
        let (name, uuid) = self.named(name).await?;
        let vdi = uuid.to_string();
        let wanted: Vec<&str> = which.iter().map(String::as_str).collect();
        let _spared = self.bring_to_store(&vdi, &wanted).await?;
        let found = self.parts.store.get()?.find_only_snapshots(&vdi, &wanted).await?;
        let mut lsns: Vec<Lsn> = found.iter().map(|snapshot| snapshot.lsn).collect();
        lsns.sort_unstable();
        lsns.dedup();
        self.parts.store.get()?.delete_snapshots(&vdi, lsns.clone()).await?;
        let deleted: Vec<u64> = lsns.iter().map(|lsn| lsn.0).collect();
        self.schedules.forget(uuid, deleted.iter().copied());
        Ok(SnapDeleted { name, uuid, deleted })
    }

    /// Gives a snapshot another label.
    pub async fn label_snapshot(&self, name: &str, request: SnapLabelRequest) -> Result<Snapped> {
        let label = label_of(request.label)?;
        let (name, uuid) = self.named(name).await?;
        let vdi = uuid.to_string();
        let (found, _spared) = self.find_stored(&vdi, &request.snapshot).await?;
        self.parts.store.get()?.label_snapshot(&vdi, found.lsn, label.clone()).await?;
        self.schedules.forget(uuid, [found.lsn.0]);
        let snapshot = Snapshot { label: label.into(), ..in_store(&found) };
        Ok(Snapped::new(&name, uuid, snapshot))
    }

    /// Creates a disk that begins as a snapshot of another. While the store is away, of one that only this host's log has.
    pub async fn create_from(
        self: &Arc<Self>,
        name: &str,
        from: &Origin,
        when_offline: Option<&str>,
    ) -> Result<Created> {
        check_vdi_name(name).map_err(|words| Failure::new(Kind::Usage, words))?;
        let policy = when_offline.map_or(Ok(WhenOffline::default()), policy_of)?;
        let in_log = |disk: &Arc<Served>| {
            let lsn = from.snapshot.parse().ok();
            let is_it = |one: &Snapshot| Some(one.lsn) == lsn || one.label == from.snapshot;
            !from.snapshot.is_empty() && self.in_log(disk).iter().any(is_it)
        };
        let Some(parent) = self.find_served(&from.vdi).filter(in_log) else {
            return self.clone_stored(name, from, policy).await;
        };
        let uuid = parent.uuid.to_string();
        // Nothing was made while it waits: what the store does not answer is looked for in the log.
        let stored = tokio::select! {
            biased;
            () = self.store_is_away() => None,
            found = self.find_stored(&uuid, &from.snapshot) => Some(found),
        };
        match stored {
            Some(Err(failure))
                if failure.kind != Kind::Unavailable || self.parts.store.health().reachable =>
            {
                Err(failure)
            }
            None | Some(Err(_)) => {
                Box::pin(self.clone_without_store(name, &parent, &from.snapshot, policy)).await
            }
            Some(Ok((_, _spared))) => self.clone_stored(name, from, policy).await,
        }
    }

    async fn clone_stored(
        &self,
        name: &str,
        from: &Origin,
        policy: WhenOffline,
    ) -> Result<Created> {
        let source = self.named(&from.vdi).await?.1.to_string();
        let (found, _spared) = self.find_stored(&source, &from.snapshot).await?;
        let info = self.parts.store.get()?.clone_vdi(name, &source, found.lsn, policy).await?;
        Ok(Created::in_store(info))
    }

    /// A disk's name and identity; of one that is served here without asking the store.
    pub(super) async fn named(&self, name: &str) -> Result<(String, Uuid)> {
        if let Some(disk) = self.find_served(name) {
            return Ok((disk.name.clone(), disk.uuid));
        }
        Ok(self.parts.store.get()?.identify_vdi(name).await?)
    }

    /// A snapshot in the store; one that is still in this host's log is drained there first. With what is to be kept until it has been
    /// used: see [`bring_to_store`](Self::bring_to_store).
    pub(super) async fn find_stored(
        &self,
        vdi: &str,
        snapshot: &str,
    ) -> Result<(blockstore::format::snapshot::Snapshot, Vec<Spared>)> {
        let spared = self.bring_to_store(vdi, &[snapshot]).await?;
        Ok((self.parts.store.get()?.find_snapshot(vdi, snapshot).await?, spared))
    }

    /// Sees to it that none of these is only in this host's log. What it returns is to be kept until they have been used: so long thinning
    /// leaves those of a cadence alone.
    pub(super) async fn bring_to_store(&self, vdi: &str, wanted: &[&str]) -> Result<Vec<Spared>> {
        if wanted.contains(&"") {
            return Err(Failure::new(
                Kind::Usage,
                "a snapshot's name is empty: give an LSN or a label",
            ));
        }
        let Some(disk) = self.find_served(vdi) else { return Ok(Vec::new()) };
        let lsns: HashSet<u64> = wanted.iter().filter_map(|name| name.parse().ok()).collect();
        let is_wanted = |pending: &Snapshot| {
            lsns.contains(&pending.lsn) || wanted.contains(&pending.label.as_str())
        };
        let (cut, spared) = self.hold_cuts(&disk, &lsns, wanted).await?;
        let pending = self.in_log(&disk).into_iter().find(is_wanted);
        let what = match pending {
            Some(Snapshot { lsn, .. }) => {
                format!("snapshot {lsn} of disk '{}' is not in the store yet", disk.name)
            }
            None if cut => format!("snapshots of disk '{}' are not in the store yet", disk.name),
            None => return Ok(spared),
        };
        self.parts.refuse_while_down(&what)?;
        self.drained(&disk).await.map_err(|failure| failure.within(what))?;
        Ok(spared)
    }

    pub(super) async fn drained(&self, disk: &Arc<Served>) -> Result<()> {
        if disk.drill.until_ms().is_some() {
            let words =
                format!("its outage drill goes on: 'ballast outage end {}' first", disk.name);
            return Err(Failure::new(Kind::Conflict, words));
        }
        disk.drain(&self.parts).await.map(drop)
    }
}

/// Takes a snapshot of a disk and waits at most so long until it is durable.
pub(super) async fn take(
    parts: &Parts,
    disk: &Served,
    label: SnapshotLabel,
    wait: Duration,
) -> Result<Snapped> {
    let text = label.as_str().to_owned();
    let taken = tokio::time::timeout(wait, disk.snapshot(parts, label)).await;
    let taken = taken.unwrap_or_else(|_| {
        let words = format!(
            "it is not durable in the log after {wait:?}, which may have no room; it may be taken yet: \
             'ballast status' shows the ring, 'ballast snap list' the snapshots"
        );
        Err(Failure::new(Kind::Unavailable, words))
    });
    answer_for(&disk.name, disk.uuid, text, taken)
}

/// Takes a snapshot of what a disk was at a point of its log.
async fn take_as_of(
    parts: &Parts,
    disk: &Served,
    point: AsOf,
    label: SnapshotLabel,
    wait: Duration,
) -> Result<Snapped> {
    let text = label.as_str().to_owned();
    let point = match point {
        AsOf::Lsn(lsn) => cache::AsOf::Lsn(Lsn(lsn)),
        AsOf::Time(ms) if ms > now_ms() => {
            return Err(Failure::new(Kind::Usage, "that time is still to come"));
        }
        AsOf::Time(ms) => cache::AsOf::Time(ms),
    };
    let taken = tokio::time::timeout(wait, disk.snapshot_as_of(parts, point, label)).await;
    let taken = taken.unwrap_or_else(|_| {
        let words = format!(
            "after {wait:?} it is not known how far the store is, which has not answered since the agent's start, or the log \
             does not go on: ask again, with a longer --wait"
        );
        Err(Failure::new(Kind::Unavailable, words))
    });
    answer_for(&disk.name, disk.uuid, text, taken)
}

/// What who asked for a snapshot is told.
fn answer_for(
    name: &str,
    uuid: Uuid,
    label: String,
    taken: Result<SnapshotTaken>,
) -> Result<Snapped> {
    let SnapshotTaken { lsn, time_ms } = taken.map_err(|failure| {
        failure.within(format_args!("no snapshot of disk '{name}' is known to be taken"))
    })?;
    let (lsn, time, place) = (lsn.0, time_ms, SnapshotPlace::Log);
    Ok(Snapped::new(name, uuid, Snapshot { lsn, time, label, place, size: None }))
}

/// A label that people give.
pub(super) fn label_of(label: String) -> Result<SnapshotLabel> {
    if is_automatic(&label) {
        let words = format!(
            "the label '{label}' has the form of those that schedules give, and what has them is deleted when no rule keeps \
             it: choose another"
        );
        return Err(Failure::new(Kind::Usage, words));
    }
    SnapshotLabel::new(label).map_err(|words| Failure::new(Kind::Usage, words))
}

fn in_log_only(pending: PendingSnapshot) -> Snapshot {
    Snapshot {
        lsn: pending.lsn.0,
        time: pending.time_ms,
        label: pending.label.into(),
        place: SnapshotPlace::Log,
        size: None,
    }
}

fn in_store(snapshot: &blockstore::format::snapshot::Snapshot) -> Snapshot {
    Snapshot {
        lsn: snapshot.lsn.0,
        time: snapshot.time_ms,
        label: snapshot.label.as_str().to_owned(),
        place: SnapshotPlace::Store,
        size: Some(snapshot.size_bytes),
    }
}
