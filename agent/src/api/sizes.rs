//! What disks and snapshots hold, and what deletions would free.

use gc::sizes::{DiskSizes, StoreSizes};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Body of a request for sizes. Computing them reads the maps of all disks and snapshots, also for one.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SizesRequest {
    /// Tell of snapshots of this disk, too; else only of those on which clones hang.
    #[serde(default)]
    pub snapshots_of: Option<Uuid>,
    /// Only of those from this LSN on.
    #[serde(default)]
    pub first_lsn: Option<u64>,
    /// And up to this one.
    #[serde(default)]
    pub last_lsn: Option<u64>,
}

/// Answer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SizesReport {
    /// When the disks were looked at, milliseconds since 1970.
    pub at: u64,
    /// How long it took, milliseconds.
    pub took: u64,
    /// Nodes of maps that were read for it.
    pub nodes: u64,
    /// The store as a whole.
    pub store: StoreSizes,
    /// All disks.
    pub disks: Vec<DiskSizes>,
}

/// What the store's space was used for when sizes were computed last.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UsedFor {
    /// When that was, milliseconds since 1970.
    pub at: u64,
    /// The figures.
    #[serde(flatten)]
    pub store: StoreSizes,
    /// The snapshots of which each alone holds most, the greatest first.
    pub largest: Vec<PinnedBy>,
}

/// A snapshot that holds what nothing else does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinnedBy {
    /// Its disk's name.
    pub vdi: String,
    /// The disk.
    pub uuid: Uuid,
    /// The snapshot.
    pub lsn: u64,
    /// Clones hang on it: it cannot be deleted before they are.
    pub cloned: bool,
    /// Bytes that no other snapshot and no disk holds: what its deletion frees.
    pub frees: u64,
}
