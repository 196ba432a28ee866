//! Snapshots, as they cross the control socket.

use serde::{Deserialize, Serialize};
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
}

/// Answer of `snap create` and `snap label`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapped {
    /// The disk.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// The snapshot.
    #[serde(flatten)]
    pub snapshot: Snapshot,
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
