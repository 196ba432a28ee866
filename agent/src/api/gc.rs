//! Garbage collection: what it does, did, and will do.

use super::sizes::UsedFor;
use serde::{Deserialize, Serialize};

/// Answer of `gc run` and `gc status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GcStatus {
    /// The cycle that runs now.
    pub running: Option<GcRunning>,
    /// The last one of this agent that ended, well or not.
    pub last: Option<GcEnded>,
    /// Cycles that ended well since the agent's start.
    pub cycles: u64,
    /// Bytes that they gave back.
    pub reclaimed: u64,
    /// A cycle begins when less than this percentage of the store is free; 0: not for that.
    pub free_below: u8,
    /// A cycle begins so long after the one before, milliseconds; none: not for that.
    pub every: Option<u64>,
    /// Most bytes of metadata that a cycle reads in a second; 0: as many as it can.
    pub rate: u64,
    /// Free blocks of which the device is told.
    #[serde(default)]
    pub unmap: UnmapStatus,
    /// Bytes of memory that a cycle marks in; where that is too little for one pass, it takes several.
    pub memory: u64,
    /// What the store can hold, bytes; none: not looked at yet.
    pub capacity: Option<u64>,
    /// Bytes of that which are free, when it was looked at last.
    pub free: Option<u64>,
    /// Bytes that were freed since a cycle, or a computing of sizes, began, and cannot be used before its marking ends.
    #[serde(default)]
    pub quarantine: u64,
    /// Sizes are being computed.
    #[serde(default)]
    pub computing_sizes: bool,
    /// What space was used for when sizes were computed last since the agent's start; none: they were not.
    #[serde(default)]
    pub used_for: Option<UsedFor>,
}

/// What the device is told of free blocks, so that a thin one gives their space back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnmapStatus {
    /// `[gc] unmap`.
    pub wanted: bool,
    /// False: the device has no UNMAP, and cannot punch holes. None: it was not asked yet.
    pub supported: Option<bool>,
    /// A pass over the free blocks is under way.
    pub running: bool,
    /// Bytes unmapped since the agent's start.
    pub bytes: u64,
    /// In so many pieces.
    pub runs: u64,
    /// Times that the device refused, or that nobody knows what it did.
    pub failures: u64,
    /// What the last of those said.
    pub last_failure: Option<String>,
    /// Extents that the last pass left out, because the device did not read or write what describes them.
    #[serde(default)]
    pub extents_left_out: u64,
    /// What it said about the last of those.
    #[serde(default)]
    pub last_left_out: Option<String>,
    /// Most bytes in a second; 0: as many as the device takes.
    pub rate: u64,
}

/// A cycle under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GcRunning {
    /// Counts the cycles of this agent, from 1.
    pub id: u64,
    /// What it does.
    pub phase: GcPhase,
    /// Milliseconds since 1970.
    pub since: u64,
    /// Which pass over the metadata it is in, from 1.
    pub pass: u64,
    /// How many passes there will be, as far as is known.
    pub passes: u64,
    /// Nodes read, in all passes.
    pub nodes: u64,
    /// Bytes found reachable.
    pub reachable: u64,
}

/// What a cycle does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GcPhase {
    /// It reads what disks and snapshots reach.
    Marking,
    /// It gives back what they do not.
    Sweeping,
}

impl GcPhase {
    /// As in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Marking => "marking",
            Self::Sweeping => "sweeping",
        }
    }
}

/// A cycle that ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GcEnded {
    /// As in [`GcRunning`].
    pub id: u64,
    /// When it ended, milliseconds since 1970.
    pub at: u64,
    /// How long it took, milliseconds.
    pub took: u64,
    /// Why it came to nothing; none: it ended well.
    pub failure: Option<String>,
    /// Its number in the store.
    pub epoch: Option<u64>,
    /// Disks whose maps, and whose snapshots' maps, it read.
    pub vdis: u64,
    /// Passes over the metadata that it took, or had begun.
    pub passes: u64,
    /// Nodes that it read, in all passes.
    pub nodes: u64,
    /// Bytes found reachable.
    pub reachable: u64,
    /// Bytes of disks' data that it gave back.
    pub reclaimed_data: u64,
    /// Bytes of maps and lists that it gave back.
    pub reclaimed_metadata: u64,
    /// Extents that it left to the next one, because the device did not read or write what describes them.
    #[serde(default)]
    pub extents_left_out: u64,
    /// What it said about the last of those.
    #[serde(default)]
    pub last_left_out: Option<String>,
}
