//! What crosses the control socket, and what `--json` prints: the same objects.
//!
//! Scripts rely on these fields: they are only ever added to. Sizes are bytes, ages and times are
//! milliseconds, LSNs count from 1 per disk (0: nothing written yet).

pub mod diff;
pub mod gc;
pub mod loss;
pub mod schedule;
pub mod scrub;
pub mod sizes;
pub mod snapshots;
pub mod tree;

use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use uuid::Uuid;

/// A virtual disk as `vdi list` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Vdi {
    /// Unique in its store.
    pub name: String,
    /// Its identity for good.
    pub uuid: Uuid,
    /// Bytes that the guest sees.
    pub size: u64,
    /// Attached to this host.
    pub attached: bool,
    /// The vhost-user socket, while attached to this host.
    pub socket: Option<PathBuf>,
    /// The store's durable image reaches this LSN.
    pub committed_lsn: u64,
    /// What it is doing.
    pub state: VdiState,
    /// The host that holds it, if any: its name or UUID.
    pub owner: Option<String>,
    /// Its schedule of snapshots, as `vdi schedule` takes it; none: it has none.
    #[serde(default)]
    pub schedule: Option<String>,
    /// It is this snapshot of the disk, attached read-only; `name` is `VDI@LSN` then, and `uuid` that of the disk.
    #[serde(default)]
    pub snapshot: Option<u64>,
    /// It takes no writes.
    #[serde(default)]
    pub read_only: bool,
    /// It is not in the store yet: the snapshot that it is a clone of, `VDI@LSN`, made while the store was away.
    #[serde(default)]
    pub provisional_clone_of: Option<String>,
}

/// What a disk is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VdiState {
    /// Attached to no host.
    Detached,
    /// Attached to another host.
    Elsewhere,
    /// Its socket listens, its log is being recovered; requests wait.
    Recovering,
    /// Serving.
    Running,
    /// Being detached.
    Detaching,
    /// Attached, but not served: see `last_error`. `vdi attach` tries again.
    Failed,
}

impl VdiState {
    /// The word that tables and JSON show.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Detached => "detached",
            Self::Elsewhere => "elsewhere",
            Self::Recovering => "recovering",
            Self::Running => "running",
            Self::Detaching => "detaching",
            Self::Failed => "failed",
        }
    }
}

/// A virtual disk as `vdi info` and `status` show it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VdiInfo {
    /// The same as in the list.
    #[serde(flatten)]
    pub vdi: Vdi,
    /// The last write that was taken.
    pub last_lsn: u64,
    /// Everything up to here is durable in the local log.
    pub flushed_lsn: u64,
    /// The cache has failed: writes are committed to the store before they are acknowledged.
    #[serde(default)]
    pub write_through: bool,
    /// Bytes in the local log that the store does not have yet.
    pub dirty_bytes: u64,
    /// Age of the oldest of them.
    pub oldest_dirty_ms: Option<u64>,
    /// Snapshots in the local log that the store does not have yet.
    #[serde(default)]
    pub snapshots_in_log: u64,
    /// The last trouble with this disk, if it still matters.
    pub last_error: Option<String>,
    /// A virtual machine is connected.
    pub front_end_connected: bool,
    /// Requests of the guest that wait: for space in the ring, or for the store.
    #[serde(default)]
    pub waiting: Waiting,
    /// Where its writes lead to.
    #[serde(default)]
    pub outlook: Outlook,
    /// What it can do without the store.
    #[serde(default)]
    pub readiness: Readiness,
    /// Totals since the disk was attached.
    #[serde(default)]
    pub totals: Totals,
    /// An outage drill is under way and ends by itself at this time, in milliseconds of UNIX time.
    #[serde(default)]
    pub drill_until: Option<u64>,
    /// What becomes of requests that cannot go on without the store: `stall`, or `fail-after=` and a time.
    #[serde(default)]
    pub when_offline: String,
    /// The hydration that goes on, or the last one since the disk was opened.
    #[serde(default)]
    pub hydrate: Option<cache::HydrateStatus>,
    /// What is held of it is not evicted while anything else could be.
    #[serde(default)]
    pub pinned: bool,
    /// Why its schedule of snapshots does not go on as it should, in words; none: it does, or there is none.
    #[serde(default)]
    pub schedule_trouble: Option<String>,
}

/// Requests of a guest that wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// Writes, for space in the ring.
    pub writes: u64,
    /// Reads, in pieces, for the store.
    pub reads: u64,
}

/// What the present rates lead to. Rates are bytes of log per second, over the last minute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outlook {
    /// What goes into the log.
    pub write_rate: u64,
    /// What the store took per second when it was last at work; none until it was.
    pub drain_rate: Option<u64>,
    /// With the store away, how long until the ring is full at the present rate of writes; none while nothing is written.
    /// The ring is shared: the figure of a disk assumes that the others write nothing.
    pub runway_ms: Option<u64>,
    /// How long it takes to commit what is not in the store, from now or from the store's return; none if no rate is known.
    pub drain_eta_ms: Option<u64>,
}

/// What a disk can do without the store.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Readiness {
    /// Bytes of the disk that can be read without the store: held locally, or known to be zeros.
    pub held_bytes: u64,
    /// Their share of the disk's size, 0 to 1.
    pub held_share: f64,
    /// Share of what the guest read in the last ten minutes that the store was not asked for, 0 to 1; none if it read
    /// nothing.
    pub recent_reads_local_share: Option<f64>,
    /// Share of what the guest read when it last booted that can be read without the store, 0 to 1; none if no boot was
    /// recorded.
    #[serde(default)]
    pub boot_trace_share: Option<f64>,
    /// What of the store's metadata an outage needs, in words.
    #[serde(default)]
    pub metadata: String,
    /// What is missing and how to get it, in words; none if nothing is.
    #[serde(default)]
    pub missing: Option<String>,
}

/// Counters of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Read requests.
    pub reads: u64,
    /// Bytes that they asked for.
    pub read_bytes: u64,
    /// Bytes that the store was asked for to answer them.
    pub fetched_bytes: u64,
    /// Write requests.
    pub writes: u64,
    /// Bytes in them.
    pub written_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Requests that ended with an I/O error although they were valid.
    pub failed: u64,
    /// Requests that the disk's policy for outages failed; not in `failed`.
    #[serde(default)]
    pub failed_by_policy: u64,
    /// Commits to the store.
    pub commits: u64,
    /// Bytes of log in them.
    pub replayed_bytes: u64,
    /// Snapshots that its schedule took.
    #[serde(default)]
    pub snapshots_scheduled: u64,
    /// Snapshots of a schedule that were deleted because no rule kept them.
    #[serde(default)]
    pub snapshots_thinned: u64,
}

/// The store as `status` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoreStatus {
    /// Where it is, without secrets.
    pub url: String,
    /// Its identity.
    pub uuid: Uuid,
    /// It answered last time.
    pub reachable: bool,
    /// Since when it did not, in milliseconds of UNIX time.
    pub down_since: Option<u64>,
    /// Since when `reachable` has had its value, in milliseconds of UNIX time.
    #[serde(default)]
    pub since: u64,
    /// Its last error, which may be over.
    pub last_error: Option<String>,
    /// Operations that wait because the store is full.
    pub waiting_for_space: u32,
    /// Operations that wait because the store's device, a thin one, has no space for blocks that are free in the store.
    #[serde(default)]
    pub waiting_for_device_space: u32,
    /// The device has no compare-and-write: this host has the store for itself.
    pub single_host: bool,
    /// Bytes of the device that the store manages.
    pub capacity: u64,
    /// Its room, when it was looked at last; none: not yet.
    #[serde(default)]
    pub space: Option<StoreSpace>,
}

/// How full the store is. What hosts have claimed ahead of need counts as used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreSpace {
    /// Bytes that disks, snapshots and their maps can have.
    pub capacity: u64,
    /// Bytes of that which are used.
    pub used: u64,
    /// Bytes that are free.
    pub free: u64,
    /// The highest mark of `[space] warn_used` that it is over, percent.
    pub over_mark: Option<u8>,
}

/// The cache as `cache status` and `status` show it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CacheStatus {
    /// Its files or devices.
    pub paths: Vec<PathBuf>,
    /// Its identity.
    pub uuid: Uuid,
    /// Bytes for segments.
    pub capacity: u64,
    /// Bytes of a segment.
    pub segment_size: u64,
    /// How many there are.
    pub segments: u64,
    /// Bytes in segments that the store does not have yet.
    pub dirty_bytes: u64,
    /// Bytes in segments that serve as read cache.
    pub clean_bytes: u64,
    /// Bytes in free segments.
    pub free_bytes: u64,
    /// Bytes of `clean_bytes` that belong to pinned disks.
    #[serde(default)]
    pub pinned_bytes: u64,
    /// Share of the ring that cannot be reclaimed at once, 0 to 1; what is pinned does not count.
    pub fill: f64,
    /// The devices that it is written to together: one, or two of a mirror.
    #[serde(default)]
    pub legs: Vec<cache::LegState>,
    /// Damaged logs that were given up and are kept.
    #[serde(default)]
    pub quarantined: Vec<cache::QuarantinedLog>,
    /// A leg that is being replaced, or was last since the agent started.
    #[serde(default)]
    pub replacement: Option<Replacement>,
}

/// How far a leg's replacement is.
pub type Replacement = cache::Replacement;

/// Asks for a leg's replacement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReplaceRequest {
    /// Where the new leg is to be; absolute.
    pub path: PathBuf,
    /// Bytes a second at most; zero: as fast as it goes.
    pub rate: u64,
}

/// The agent as `status` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentStatus {
    /// Its process id.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// Since its start.
    pub uptime_ms: u64,
    /// This host's identity, kept in the cache.
    pub host_uuid: Uuid,
    /// This host's name.
    pub host_name: String,
}

/// Everything `status` shows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The daemon.
    pub agent: AgentStatus,
    /// The shared store.
    pub store: StoreStatus,
    /// The local cache.
    pub cache: CacheStatus,
    /// Disks attached to this host.
    pub vdis: Vec<VdiInfo>,
    /// Snapshots attached to this host, read-only.
    #[serde(default)]
    pub snapshots: Vec<snapshots::AttachedSnapshot>,
    /// Where the writes of all disks lead to.
    #[serde(default)]
    pub outlook: Outlook,
    /// What is not as it should be, in words, the worst first. Empty: all is well.
    #[serde(default)]
    pub degraded: Vec<String>,
    /// Guests that were frozen for a snapshot and could not be thawed so far.
    #[serde(default)]
    pub frozen_guests: Vec<FrozenGuest>,
    /// Free blocks of which the store's device is told.
    #[serde(default)]
    pub unmap: gc::UnmapStatus,
    /// What is known of damage in the store.
    #[serde(default)]
    pub scrub: scrub::ScrubSummary,
}

/// A guest that was frozen for a snapshot and has not said that it is thawed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenGuest {
    /// The socket of its agent.
    pub guest_agent: PathBuf,
    /// Since when, in milliseconds of UNIX time.
    pub since: u64,
    /// Why the last attempt to thaw it did not succeed.
    pub why: String,
}

/// Request of `vdi create`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateRequest {
    /// Unique in the store.
    pub name: String,
    /// Bytes; not with `from`.
    #[serde(default)]
    pub size: Option<u64>,
    /// The snapshot that it begins as; else it is empty.
    #[serde(default)]
    pub from: Option<Origin>,
    /// What becomes of requests that cannot go on without the store: `stall`, or `fail-after=` and a time.
    #[serde(default)]
    pub when_offline: Option<String>,
}

/// A snapshot to begin a disk as.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// The disk: name or UUID.
    pub vdi: String,
    /// LSN or label.
    pub snapshot: String,
}

/// Body of `vdi delete`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteRequest {
    /// With all of its snapshots.
    #[serde(default)]
    pub with_snapshots: bool,
}

/// Answer of `vdi create` and `vdi resize`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Created {
    /// As given.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Bytes that it has now.
    pub size: u64,
    /// It is a clone that was made without the store, which gets it when it is back; it is attached.
    #[serde(default)]
    pub provisional: bool,
    /// The vhost-user socket of that.
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

impl Created {
    /// A disk of the store.
    #[must_use]
    pub fn in_store(info: blockstore::VdiInfo) -> Self {
        let (name, uuid, size) = (info.name, info.uuid, info.size_bytes);
        Self { name, uuid, size, provisional: false, socket: None }
    }
}

/// Request of `vdi attach`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// A snapshot, of which nothing can be changed.
    #[serde(default)]
    pub read_only: bool,
}

/// Answer of `vdi attach`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attached {
    /// As given.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Path of the vhost-user socket.
    pub socket: PathBuf,
    /// It takes no writes.
    #[serde(default)]
    pub read_only: bool,
}

/// Request of `vdi detach`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DetachRequest {
    /// Even while a virtual machine is connected.
    #[serde(default)]
    pub force: bool,
}

/// Request of `vdi resize`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeRequest {
    /// Bytes.
    pub size: u64,
}

/// Request of `vdi hydrate`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HydrateRequest {
    /// Only what the guest read when it last booted.
    #[serde(default)]
    pub boot_trace: bool,
}

/// Answer of `vdi hydrate`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hydrating {
    /// Which disk.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// How far it is.
    #[serde(flatten)]
    pub progress: cache::HydrateStatus,
}

/// Answer of `vdi pin` and `vdi unpin`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pinned {
    /// Which disk.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// It is pinned now.
    pub pinned: bool,
    /// What of it is not in the cache, in words; none if nothing is missing.
    pub missing: Option<String>,
}

/// Request of `vdi set`: what is absent stays as it is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetRequest {
    /// What becomes of requests that cannot go on without the store: `stall`, or `fail-after=` and a time.
    #[serde(default)]
    pub when_offline: Option<String>,
}

/// Answer of `vdi set`: what holds now.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Set {
    /// Which disk.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// What becomes of requests that cannot go on without the store.
    pub when_offline: String,
}

/// Answer of `vdi detach` and `vdi delete`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Done {
    /// Which disk.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
}

/// Request of `outage drill`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrillRequest {
    /// How long.
    pub time_ms: u64,
}

/// Answer of a drill's begin.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DrillBegun {
    /// Which disk.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// It ends by itself then, in milliseconds of UNIX time.
    pub until: u64,
}

/// What `outage drill` reports at the end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DrillReport {
    /// Which disk.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// How long it was cut off.
    pub seconds: f64,
    /// Writes that the guest made meanwhile.
    pub writes: u64,
    /// Bytes in them.
    pub written_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Reads.
    pub reads: u64,
    /// Bytes that were asked of the store: these reads had to wait.
    pub missed_bytes: u64,
    /// The most reads, in pieces, that waited for the store at one time.
    pub waiting_reads_max: u64,
    /// The most writes that waited for space in the ring at one time.
    pub waiting_writes_max: u64,
    /// The most bytes of log that were not in the store.
    pub dirty_bytes_max: u64,
    /// The runway at the end.
    pub runway_ms: Option<u64>,
    /// How long it then took until all that was acknowledged was in the store.
    pub drain_seconds: f64,
}

/// Request of `cache drain`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// One disk, by name or UUID; all attached ones if absent.
    #[serde(default)]
    pub vdi: Option<String>,
}

/// Answer of `cache drain`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Drained {
    /// The disks that were drained.
    pub drained: Vec<DrainedVdi>,
    /// How long it took.
    pub seconds: f64,
}

/// One drained disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DrainedVdi {
    /// Which disk.
    pub name: String,
    /// All up to this LSN is committed to the store.
    pub lsn: u64,
}
