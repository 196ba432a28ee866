//! The forest of disks and clones, as it crosses the control socket.

use super::VdiState;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Answer of `vdi tree`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forest {
    /// All disks, by name.
    pub disks: Vec<TreeDisk>,
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
