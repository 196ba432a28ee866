//! What `status`, `vdi list`, `vdi info` and `cache status` show. Nothing here waits for the store, except the list.

use super::Host;
use super::meters::{PERIOD, Reading};
use super::served::Served;
use crate::api::scrub::ScrubSummary;
use crate::api::snapshots::AttachedSnapshot;
use crate::api::{
    AgentStatus, CacheStatus, FrozenGuest, Readiness, Status, StoreSpace, StoreStatus, Totals, Vdi,
    VdiInfo, VdiState, Waiting,
};
use crate::error::Result;
use crate::units::format_size;
use blockstore::Schedule;
use blockstore::format::vdi::Origin;
use blockstore::types::BLOCK_SIZE;
use cache::ReplacementState;
use std::collections::BTreeMap;
use std::sync::Weak;
use std::time::Instant;

/// Share of the ring from which `status` calls it nearly full.
const NEARLY_FULL: f64 = 0.8;

/// Reads the meters of all disks for as long as the host lives.
pub(super) async fn read_meters(host: Weak<Host>) {
    let mut tick = tokio::time::interval(PERIOD);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let Some(host) = host.upgrade() else { return };
        let store_answers = host.parts.store.health().reachable;
        let disks: Vec<_> = host.served.lock().values().cloned().collect();
        let readings = disks.iter().filter_map(|disk| {
            let log = host.parts.cache.vdi_status(disk.uuid)?;
            let stats = disk.stats().unwrap_or_default();
            let reading = Reading {
                at: Instant::now(),
                dirty: log.dirty_bytes,
                replayed: log.replayed_bytes,
                written: stats.written_bytes,
                read: stats.read_bytes,
                fetched: log.fetched_bytes,
                store_answers: store_answers && disk.drill.until_ms().is_none(),
            };
            Some((disk.uuid, reading))
        });
        host.meters.lock().take(readings);
    }
}

impl Host {
    /// Everything, from what is known without asking the store.
    pub fn status(&self) -> Status {
        let disks: Vec<_> = self.served.lock().values().cloned().collect();
        let mut vdis: Vec<_> = disks.iter().map(|disk| self.describe(disk)).collect();
        vdis.sort_by(|a, b| a.vdi.name.cmp(&b.vdi.name));
        let (store, cache) = (self.store_status(), self.cache_status());
        let dirty: BTreeMap<_, _> =
            vdis.iter().map(|info| (info.vdi.uuid, info.dirty_bytes)).collect();
        let outlook = self.meters.lock().outlook_of_all(&dirty, room(&cache));
        let snapshots = self.attached_snapshots();
        let frozen_guests = self.quiescing.owed();
        let scrub = self.scrub_summary();
        let mut degraded = degraded(&store, &cache, &vdis, &snapshots);
        degraded.splice(0..0, damaged(&scrub).into_iter().chain(frozen_guests.iter().map(frozen)));
        Status {
            agent: AgentStatus {
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION").into(),
                uptime_ms: self.started.elapsed().as_millis() as u64,
                host_uuid: self.identity.host,
                host_name: self.name.clone(),
            },
            store,
            cache,
            vdis,
            snapshots,
            outlook,
            degraded,
            frozen_guests,
            unmap: self.unmap_status(),
            scrub,
        }
    }

    fn store_status(&self) -> StoreStatus {
        let store = &self.parts.store;
        let health = store.health();
        let opened = store.opened();
        let superblock = opened.as_ref().map(|store| store.superblock());
        let (space, over_mark) = self.store_space();
        StoreStatus {
            url: store.url().to_owned(),
            uuid: store.uuid(),
            reachable: health.reachable,
            down_since: (!health.reachable).then_some(health.since_ms),
            since: health.since_ms,
            last_error: health.last_error,
            waiting_for_space: health.waiting_for_space,
            waiting_for_device_space: health.waiting_for_device_space,
            single_host: superblock.is_some_and(|s| s.single_host),
            capacity: superblock.map_or(0, |s| s.device_size),
            space: space.map(|space| StoreSpace {
                capacity: space.blocks * BLOCK_SIZE as u64,
                used: space.blocks.saturating_sub(space.free) * BLOCK_SIZE as u64,
                free: space.free * BLOCK_SIZE as u64,
                over_mark,
            }),
        }
    }

    /// The ring.
    pub fn cache_status(&self) -> CacheStatus {
        let status = self.parts.cache.status();
        CacheStatus {
            paths: self.parts.config.caches(),
            uuid: self.identity.cache,
            capacity: status.capacity,
            segment_size: status.segment_size,
            segments: status.segments.into(),
            dirty_bytes: status.dirty_bytes,
            clean_bytes: status.clean_bytes,
            pinned_bytes: status.pinned_bytes,
            free_bytes: status.free_bytes,
            fill: status.fill,
            legs: self.parts.cache.legs(),
            quarantined: self.parts.cache.quarantined(),
            replacement: self.parts.cache.replacement(),
        }
    }

    /// A disk of this host.
    pub(super) fn describe(&self, disk: &Served) -> VdiInfo {
        let view = disk.view();
        let log = self.parts.cache.vdi_status(disk.uuid).unwrap_or_default();
        let stats = disk.stats().unwrap_or_default();
        let schedule = self.schedules.counts(disk.uuid);
        let ring = self.parts.cache.status();
        let (outlook, readiness) = {
            let meters = self.meters.lock();
            let room = ring.free_bytes + ring.clean_bytes.saturating_sub(ring.pinned_bytes);
            (
                meters.outlook(disk.uuid, log.dirty_bytes, room),
                readiness(disk, &log, meters.readiness(disk.uuid, log.held_bytes, view.size)),
            )
        };
        let (state, own_error) = if stats.worker_failed {
            let words =
                "its worker failed inside (the agent's log has the details): restart the agent";
            (VdiState::Failed, Some(words.to_owned()))
        } else if view.state == VdiState::Running && log.state == cache::Phase::Failed {
            (VdiState::Failed, None)
        } else {
            (view.state, view.error)
        };
        VdiInfo {
            vdi: Vdi {
                name: disk.name.clone(),
                uuid: disk.uuid,
                size: view.size,
                attached: true,
                socket: disk.socket.clone(),
                committed_lsn: log.committed_lsn,
                state,
                owner: Some(self.name.clone()),
                schedule: in_words(log.policy.schedule),
                snapshot: None,
                read_only: false,
                provisional_clone_of: disk.origin().map(|origin| self.name_of_snapshot(origin)),
            },
            last_lsn: log.last_lsn,
            flushed_lsn: log.flushed_lsn,
            write_through: log.write_through,
            dirty_bytes: log.dirty_bytes,
            oldest_dirty_ms: log.oldest_dirty_ms,
            snapshots_in_log: log.snapshots_pending,
            last_error: own_error.or(log.last_error),
            front_end_connected: stats.connected,
            waiting: Waiting { writes: stats.stalled, reads: stats.fetching },
            outlook,
            readiness,
            totals: Totals {
                reads: stats.reads,
                read_bytes: stats.read_bytes,
                fetched_bytes: log.fetched_bytes,
                writes: stats.writes,
                written_bytes: stats.written_bytes,
                flushes: stats.flushes,
                failed: stats.failed,
                failed_by_policy: stats.failed_by_policy,
                commits: log.commits,
                replayed_bytes: log.replayed_bytes,
                snapshots_scheduled: schedule.taken,
                snapshots_thinned: schedule.deleted,
            },
            drill_until: disk.drill.until_ms(),
            when_offline: log.policy.when_offline.to_string(),
            hydrate: log.hydrate,
            pinned: log.pinned,
            schedule_trouble: schedule.trouble,
        }
    }

    /// A snapshot of a disk that is served here, as people call it.
    fn name_of_snapshot(&self, snapshot: Origin) -> String {
        let vdi = snapshot.vdi.to_string();
        let name = self.find_served(&vdi).map_or(vdi, |disk| disk.name.clone());
        format!("{name}@{}", snapshot.lsn)
    }

    /// A disk of the store as the store knows it, or as this host does if it serves it.
    pub(super) fn describe_stored(&self, found: &blockstore::VdiInfo) -> VdiInfo {
        if let Some(disk) = self.find_served(&found.uuid.to_string()) {
            let mut info = self.describe(&disk);
            info.vdi.committed_lsn = info.vdi.committed_lsn.max(found.committed_lsn.0);
            return info;
        }
        let owner = found.owner.as_ref();
        VdiInfo {
            vdi: Vdi {
                name: found.name.clone(),
                uuid: found.uuid,
                size: found.size_bytes,
                attached: false,
                socket: None,
                committed_lsn: found.committed_lsn.0,
                state: owner.map_or(VdiState::Detached, |_| VdiState::Elsewhere),
                owner: owner.map(|o| o.host_name.clone().unwrap_or_else(|| o.host.to_string())),
                schedule: in_words(found.schedule),
                snapshot: None,
                read_only: false,
                provisional_clone_of: None,
            },
            last_lsn: found.committed_lsn.0,
            flushed_lsn: found.committed_lsn.0,
            write_through: false,
            dirty_bytes: 0,
            oldest_dirty_ms: None,
            snapshots_in_log: 0,
            last_error: None,
            front_end_connected: false,
            waiting: Waiting::default(),
            outlook: Default::default(),
            readiness: Default::default(),
            totals: Totals::default(),
            drill_until: None,
            when_offline: found.when_offline.to_string(),
            hydrate: None,
            pinned: false,
            schedule_trouble: None,
        }
    }

    /// All disks of the store, and the snapshots that this host serves.
    pub async fn list(&self) -> Result<Vec<Vdi>> {
        let found = self.parts.store.get()?.list_vdis().await?;
        let mut list: Vec<_> = found.iter().map(|found| self.describe_stored(found).vdi).collect();
        list.extend(self.snapshots_as_disks());
        list.extend(self.clones_beside(&found));
        list.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(list)
    }

    /// Clones that the store does not know of.
    fn clones_beside(&self, stored: &[blockstore::VdiInfo]) -> Vec<Vdi> {
        let known = |disk: &Served| stored.iter().any(|found| found.uuid == disk.uuid);
        let disks: Vec<_> = self.served.lock().values().cloned().collect();
        let unknown = disks.iter().filter(|disk| !known(disk)).map(|disk| self.describe(disk).vdi);
        unknown.filter(|vdi| vdi.provisional_clone_of.is_some()).collect()
    }

    /// One disk. One that this host serves is shown even while the store is down.
    pub async fn info(&self, name: &str) -> Result<VdiInfo> {
        match self.find_served(name) {
            Some(disk) => Ok(self.describe(&disk)),
            None => Ok(self.describe_stored(&self.parts.store.get()?.lookup_vdi(name).await?)),
        }
    }
}

/// A schedule, if there is one.
fn in_words(schedule: Schedule) -> Option<String> {
    (!schedule.is_none()).then(|| schedule.to_string())
}

/// Bytes that writers can have of the ring while the store is away.
fn room(cache: &CacheStatus) -> u64 {
    cache.free_bytes + cache.clean_bytes.saturating_sub(cache.pinned_bytes)
}

/// Completes what the meters know with what the log says.
fn readiness(disk: &Served, log: &cache::VdiStatus, known: Readiness) -> Readiness {
    let (size, name) = (disk.view().size, &disk.name);
    let (trace, missing) = (log.boot_trace_bytes, log.boot_trace_missing_bytes);
    let boot_trace_share = (trace > 0).then(|| 1.0 - missing as f64 / trace as f64);
    let mut words = Vec::new();
    if missing > 0 {
        let (missing, trace) = (format_size(missing), format_size(trace));
        words.push(format!(
            "{missing} of {trace} that its last boot read; run 'ballast vdi hydrate {name} --boot-trace'"
        ));
    }
    let absent = size.saturating_sub(known.held_bytes);
    if absent > 0 {
        let (absent, size) = (format_size(absent), format_size(size));
        words.push(format!("{absent} of {size}; run 'ballast vdi hydrate {name}'"));
    }
    let metadata =
        "none: what is held is found by its place on the disk, not through the store's tree";
    let missing = (!words.is_empty()).then(|| words.join("; "));
    Readiness { boot_trace_share, metadata: metadata.into(), missing, ..known }
}

/// The last year that a date is written for.
const YEAR_9999_MS: u64 = 253_370_764_800_000;

fn frozen(guest: &FrozenGuest) -> String {
    format!(
        "a guest may be frozen since {}, agent {}: thawing it is tried again and again ({}); 'echo j > /proc/sysrq-trigger' in a \
         Linux guest thaws it",
        humantime::format_rfc3339_seconds(
            std::time::UNIX_EPOCH + std::time::Duration::from_millis(guest.since.min(YEAR_9999_MS))
        ),
        guest.guest_agent.display(),
        guest.why
    )
}

/// What scrubs found in the store. It stands until one finds nothing.
fn damaged(scrub: &ScrubSummary) -> Option<String> {
    let places = match scrub.damaged {
        0 => return None,
        1 => "1 place".to_owned(),
        places => format!("{places} places"),
    };
    Some(format!("the store is damaged in {places}: 'ballast scrub status' lists them"))
}

/// The words for a thin device that is full.
fn full_device(store: &StoreStatus) -> Option<String> {
    let why = store.last_error.as_deref().unwrap_or("see the agent's log");
    (store.waiting_for_device_space > 0).then(|| {
        format!(
            "the store's device refuses writes for lack of space, although the store has free blocks: commits wait; extend it, or free \
             space on it: {why}"
        )
    })
}

/// What is not as it should be, the worst first.
fn degraded(
    store: &StoreStatus,
    cache: &CacheStatus,
    vdis: &[VdiInfo],
    snapshots: &[AttachedSnapshot],
) -> Vec<String> {
    let mut found = Vec::new();
    for info in vdis.iter().filter(|info| info.vdi.state == VdiState::Failed) {
        let why = info.last_error.as_deref().unwrap_or("see the agent's log");
        found.push(format!("disk '{}' has failed: {why}", info.vdi.name));
    }
    for snapshot in snapshots.iter().filter(|snapshot| snapshot.state == VdiState::Failed) {
        let why = snapshot.last_error.as_deref().unwrap_or("see the agent's log");
        found.push(format!("snapshot {}, attached read-only, has failed: {why}", snapshot.name));
    }
    for info in vdis {
        let Some(origin) = &info.vdi.provisional_clone_of else { continue };
        let why = info.last_error.as_ref().filter(|_| store.reachable);
        let why = why.map_or_else(String::new, |why| format!(" ({why})"));
        found.push(format!(
            "disk '{}', a clone of {origin}, is in this host's cache only: it gets into the store when that has the snapshot{why}",
            info.vdi.name
        ));
    }
    for info in vdis.iter().filter(|info| info.write_through) {
        let why = info.last_error.as_deref().unwrap_or("see the agent's log");
        found.push(format!(
            "disk '{}' is in write-through, without the cache: {why}",
            info.vdi.name
        ));
    }
    let waiting: u64 = vdis.iter().map(|info| info.waiting.writes).sum();
    if waiting > 0 && cache.fill >= NEARLY_FULL {
        found.push(format!("the ring is full: {waiting} writes wait for the store"));
    } else if cache.fill >= NEARLY_FULL {
        found.push(format!("the ring is {:.0} % full", cache.fill * 100.0));
    }
    if !store.reachable {
        found.push("the store does not answer: serving from the cache".to_owned());
        let of_disks: u64 = vdis.iter().map(|info| info.waiting.reads).sum();
        let reads = of_disks + snapshots.iter().map(|found| found.waiting_reads).sum::<u64>();
        if reads > 0 {
            found.push(format!("{reads} reads of what is not held locally wait for the store"));
        }
    }
    for info in vdis.iter().filter(|info| info.totals.failed_by_policy > 0 && !store.reachable) {
        found.push(format!(
            "disk '{}' fails requests that wait for the store ({}): {} so far",
            info.vdi.name, info.when_offline, info.totals.failed_by_policy
        ));
    }
    for info in vdis {
        if let Some(trouble) = &info.schedule_trouble {
            found.push(format!("schedule of disk '{}': {trouble}", info.vdi.name));
        }
    }
    for info in vdis.iter().filter(|info| info.pinned) {
        if let Some(missing) = &info.readiness.missing {
            found.push(format!(
                "disk '{}' is pinned, but not in the cache is: {missing}",
                info.vdi.name
            ));
        }
    }
    for leg in cache.legs.iter().filter(|leg| !leg.member) {
        let why = leg.why.as_deref().unwrap_or("see the agent's log");
        found.push(format!("the cache is not mirrored, {} is out: {why}", leg.path.display()));
    }
    for kept in &cache.quarantined {
        let (log, name) = (kept.log_id, &kept.name);
        found.push(format!(
            "log {log} of disk '{name}' is in quarantine and takes {} bytes of the cache",
            kept.bytes
        ));
    }
    if let Some(replacement) = &cache.replacement {
        let (path, why) =
            (replacement.path.display(), replacement.why.as_deref().unwrap_or_default());
        match replacement.state {
            ReplacementState::Copying => {
                let percent = replacement.bytes_done * 100 / replacement.bytes_all.max(1);
                found
                    .push(format!("{path} is being filled as a new leg of the cache: {percent} %"));
            }
            ReplacementState::Failed => {
                found.push(format!("{path} did not become a leg of the cache: {why}"));
            }
            ReplacementState::Done => {}
        }
    }
    if store.waiting_for_space > 0 {
        found.push("the store is full: commits wait for free space".to_owned());
    }
    found.extend(full_device(store));
    if let Some((space, mark)) = store.space.and_then(|space| Some((space, space.over_mark?))) {
        let percent = space.used as f64 * 100.0 / space.capacity.max(1) as f64;
        found.push(format!(
            "the store is {percent:.0} % full, over the mark of {mark} %: {} are free; 'ballast vdi tree --sizes' shows what \
             deletions free",
            format_size(space.free)
        ));
    }
    for info in vdis.iter().filter(|info| info.drill_until.is_some()) {
        found.push(format!("an outage drill cuts disk '{}' off from the store", info.vdi.name));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_device_is_told_from_a_full_store() {
        let store = |waiting_for_space, waiting_for_device_space| StoreStatus {
            url: "file:/x".into(),
            uuid: uuid::Uuid::nil(),
            reachable: true,
            down_since: None,
            since: 0,
            last_error: Some("the array is full".into()),
            waiting_for_space,
            waiting_for_device_space,
            single_host: false,
            capacity: 1 << 40,
            space: None,
        };
        assert_eq!(full_device(&store(1, 0)), None, "that it was refused once is over");
        let words = full_device(&store(0, 1)).expect("it is said");
        assert!(words.contains("extend it") && words.ends_with("the array is full"), "{words}");
    }
}
