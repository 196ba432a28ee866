//! What a scrub found to be wrong.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Damage that is listed; the rest is only counted.
pub const DAMAGE_MAX: usize = 256;

/// What is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// The store's own: superblocks, records of hosts, extents and collection, extents' headers.
    Table,
    /// A disk's record in the registry.
    Record,
    /// The block with a disk's name.
    Name,
    /// A block of the list of a disk's snapshots.
    SnapshotList,
    /// A node of a disk's map, or of a snapshot's: what lies below it was not verified.
    Map,
    /// A block of a disk's content.
    Data,
}

impl Part {
    /// As in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Table => "table",
            Self::Record => "record",
            Self::Name => "name",
            Self::SnapshotList => "snapshot-list",
            Self::Map => "map",
            Self::Data => "data",
        }
    }
}

/// Something that is damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage {
    /// What it is.
    pub part: Part,
    /// The disk that leads to it, and by whose place it is named; others may share it.
    pub vdi: Option<Uuid>,
    /// That disk's name, if it is known.
    pub name: Option<String>,
    /// The disk's snapshot that leads to it; none: the disk as it is.
    pub snapshot: Option<u64>,
    /// What of the disk cannot be read for it: first byte.
    pub offset: Option<u64>,
    /// And how many bytes.
    pub bytes: Option<u64>,
    /// The block on the store's device, in blocks of 4096 bytes.
    pub block: Option<u64>,
    /// What is wrong with it.
    pub what: String,
    /// What to do about it.
    pub advice: String,
}
