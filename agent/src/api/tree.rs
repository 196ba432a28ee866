//! The forest of disks and clones, as it crosses the control socket.

use super::VdiState;
use gc::sizes::{DiskSizes, StoreSizes};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Answer of `vdi tree`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forest {
    /// All disks, by name.
    pub disks: Vec<TreeDisk>,
    /// The store as a whole, if sizes were asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<StoreSizes>,
}

/// A disk in the forest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeDisk {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Bytes that the guest sees.
    pub size: u64,
    /// What it is doing.
    pub state: VdiState,
    /// The host that holds it, if any.
    pub owner: Option<String>,
    /// Snapshots of it in the store.
    pub snapshots: u64,
    /// What it was cloned from, if it was.
    pub origin: Option<TreeOrigin>,
    /// What it and its snapshots with clones hold, if that was asked for; none also for a disk that was made meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sizes: Option<DiskSizes>,
}

/// The snapshot that a disk was cloned from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeOrigin {
    /// The other disk.
    pub uuid: Uuid,
    /// Its snapshot.
    pub lsn: u64,
    /// The snapshot's label; none: not known.
    pub label: Option<String>,
}
