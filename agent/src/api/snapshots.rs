//! Snapshots, as they cross the control socket.

use super::VdiState;
use crate::error::Failure;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use uuid::Uuid;

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its point in the guest's write order: its name.
    pub lsn: u64,
    /// When it was asked for, in milliseconds of UNIX time.
    pub time: u64,
    /// For people; may be empty.
    pub label: String,
    /// Where it is.
    pub place: SnapshotPlace,
    /// Bytes of the disk then; not known before it is in the store.
    pub size: Option<u64>,
}

/// Where a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotPlace {
    /// In the host's log, durably; it reaches the store with the writes before it.
    Log,
    /// In the store.
    Store,
}

/// Body of `snap create`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapRequest {
    /// For people.
    #[serde(default)]
    pub label: String,
    /// How long to wait until it is durable, milliseconds; none: half a minute.
    #[serde(default)]
    pub wait_ms: Option<u64>,
    /// Not of the disk as it is, but as it was then.
    #[serde(default)]
    pub as_of: Option<AsOf>,
}

/// A line of a stream of snapshots that asks for one.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapAsked {
    /// Comes back with the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<u64>,
    /// For people.
    #[serde(default)]
    pub label: String,
}

/// A line of a stream of snapshots that answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SnapAnswered {
    /// There may be no snapshot.
    Failed {
        /// Of what was asked.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tag: Option<u64>,
        /// Why.
        error: Failure,
    },
    /// It is durable in the log.
    Taken {
        /// Of what was asked.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tag: Option<u64>,
        /// The snapshot.
        #[serde(flatten)]
        snapped: Snapped,
    },
}

/// A point of a disk's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AsOf {
    /// Up to this LSN.
    Lsn(u64),
    /// All that was answered at this time, in milliseconds of UNIX time.
    Time(u64),
}

/// Body of `snap create --quiesce`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapSetRequest {
    /// Disks of one virtual machine.
    pub vdis: Vec<String>,
    /// For people; all snapshots get it.
    #[serde(default)]
    pub label: String,
    /// How long to wait until all are durable, milliseconds; none: ten seconds.
    #[serde(default)]
    pub wait_ms: Option<u64>,
    /// How its guest is frozen meanwhile.
    pub quiesce: QuiesceRequest,
}

/// How a guest is frozen.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuiesceRequest {
    /// The socket of the guest agent's channel.
    pub guest_agent: PathBuf,
    /// How long the guest may take to freeze, milliseconds; none: ten seconds.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
    /// If it cannot be frozen, the snapshots are taken all the same.
    #[serde(default)]
    pub or_crash_consistent: bool,
}

/// Answer of `snap create --quiesce`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapSet {
    /// One of each disk, in the order asked for.
    pub snapshots: Vec<Snapped>,
    /// The guest meanwhile.
    #[serde(flatten)]
    pub guest: Quiesced,
}

/// How a guest was while snapshots were taken.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Quiesced {
    /// Its file systems were frozen from before the snapshots to after them.
    pub quiesced: bool,
    /// How many file systems those were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file_systems: Option<u64>,
    /// How long they were frozen, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_ms: Option<u64>,
    /// Why they were not, though it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_quiesced_because: Option<String>,
}

/// Answer of `snap create` and `snap label`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapped {
    /// What names this snapshot for good, wherever VDI@SNAP is asked for: the disk's identity, `@`, the LSN.
    #[serde(default)]
    pub id: String,
    /// The disk.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// The snapshot.
    #[serde(flatten)]
    pub snapshot: Snapshot,
}

impl Snapped {
    /// A snapshot of a disk.
    #[must_use]
    pub fn new(name: &str, uuid: Uuid, snapshot: Snapshot) -> Self {
        Self { id: format!("{uuid}@{}", snapshot.lsn), name: name.to_owned(), uuid, snapshot }
    }
}

/// Body of `snap list`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapListRequest {
    /// From the oldest on, else from the newest on.
    #[serde(default)]
    pub oldest_first: bool,
    /// Only those beyond this LSN, in the order of the list.
    #[serde(default)]
    pub beyond: Option<u64>,
    /// At most so many; 0: as many as a page has.
    #[serde(default)]
    pub limit: usize,
}

/// Answer of `snap list`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapshots {
    /// The disk.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// A page of them.
    pub snapshots: Vec<Snapshot>,
    /// There are more beyond the last.
    pub more: bool,
    /// The store is away: only those that are still in the log are listed.
    pub store_away: bool,
}

/// Body of `snap delete`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapDeleteRequest {
    /// LSNs or labels.
    pub snapshots: Vec<String>,
}

/// Answer of `snap delete`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapDeleted {
    /// The disk.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Their LSNs.
    pub deleted: Vec<u64>,
}

/// Body of `snap label`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapLabelRequest {
    /// LSN or label.
    pub snapshot: String,
    /// The new one.
    pub label: String,
}

/// Body of `vdi rollback --to`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewindRequest {
    /// The snapshot: LSN or label.
    pub to: String,
    /// What the disk is now is given up.
    #[serde(default)]
    pub discard_present: bool,
    /// Of the snapshot of what it is now; none: one that says what it is.
    #[serde(default)]
    pub label: Option<String>,
}

/// Answer of `vdi rollback --to`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Rewound {
    /// The disk.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// The snapshot that it is now.
    pub to: u64,
    /// Its label.
    pub to_label: String,
    /// Bytes that the guest sees now.
    pub size: u64,
    /// The snapshot of what it was; none: that was given up.
    pub kept: Option<u64>,
    /// Its label.
    pub kept_label: Option<String>,
    /// The LSN of the rollback: the next write comes after it.
    pub committed_lsn: u64,
}

/// A snapshot that is attached read-only, as `status` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedSnapshot {
    /// `VDI@LSN`.
    pub name: String,
    /// The disk's name.
    pub vdi: String,
    /// The disk's identity.
    pub uuid: Uuid,
    /// The snapshot's LSN.
    pub snapshot: u64,
    /// Its label when it was attached.
    pub label: String,
    /// When it was taken, in milliseconds of UNIX time.
    pub time: u64,
    /// Bytes that the guest sees.
    pub size: u64,
    /// Always.
    pub read_only: bool,
    /// The vhost-user socket.
    pub socket: Option<PathBuf>,
    /// What it is doing: `recovering` while it waits for the store after the agent's start.
    pub state: VdiState,
    /// Why it is not running, if it is not.
    pub last_error: Option<String>,
    /// A virtual machine is connected.
    pub front_end_connected: bool,
    /// Reads, in pieces, that wait for the store.
    pub waiting_reads: u64,
    /// Read requests since it was served.
    pub reads: u64,
    /// Bytes that they asked for.
    pub read_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Requests that were refused: writes, and what makes no sense.
    pub refused: u64,
    /// Requests that ended with an I/O error although they were valid.
    pub failed: u64,
}
