//! What is said of a log that is lost: the receipt of a rollback, and logs in quarantine.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use uuid::Uuid;

/// Request of `vdi rollback`.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RollbackRequest {
    /// The operator's word that what the lost log held may be given up.
    #[serde(default)]
    pub accept_loss: bool,
}

/// What `vdi rollback` gave up: printed, kept as a file in the run directory, and logged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LossReceipt {
    /// The disk.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Bytes that the guest sees.
    pub size: u64,
    /// The store, without secrets, and its identity.
    pub store: String,
    /// See `store`.
    pub store_uuid: Uuid,
    /// The host that held the disk: this one, or one that was taken over.
    pub host: Uuid,
    /// The log that is given up; none if the store named none.
    pub log_id: Option<Uuid>,
    /// Why it cannot be used.
    pub reason: String,
    /// The disk is now exactly as of this LSN, the last that is durable.
    pub committed_lsn: u64,
    /// When that was committed, in milliseconds of UNIX time; none if the store does not say.
    pub committed_at: Option<u64>,
    /// What was acknowledged after it.
    pub lost: LostWindow,
    /// The parts of the disk that the lost writes touched.
    pub ranges: LostRanges,
    /// The cache in use now, and its legs.
    pub cache: CacheName,
    /// The cache that held the log, if it was noted.
    pub former_cache: Option<CacheName>,
    /// The damaged log is kept in the cache; `cache discard-quarantine` frees its space.
    pub quarantined: bool,
    /// Whether the surviving prefix was kept as a snapshot, in words.
    pub snapshot: String,
    /// When it was decided, in milliseconds of UNIX time.
    pub at: u64,
    /// The rollback was carried out. A file that says false was left by a rollback that was cut off: see `vdi info`.
    pub done: bool,
    /// Where the receipt is kept.
    pub file: PathBuf,
}

/// LSNs after the committed one that were given up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostWindow {
    /// The first of them.
    pub from_lsn: u64,
    /// The last that anything local still knows of; none if nothing does: how much was lost is unknown.
    pub to_lsn: Option<u64>,
    /// The last of which it is known that it was flushed, and so promised to the guest.
    pub flushed_lsn: Option<u64>,
    /// When the agent last noted how far the disk was, in milliseconds of UNIX time. What came after that is in no figure.
    pub noted_at: Option<u64>,
    /// Where the figures come from.
    pub known_from: Vec<String>,
}

/// Parts of the disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostRanges {
    /// Each in bytes, in order, as far as they are listed.
    pub listed: Vec<ByteRange>,
    /// How many more there are.
    pub more: u64,
    /// Segments of the log that are here, and how many of them could not be read to their end.
    pub segments: u32,
    /// See `segments`.
    pub unreadable: u32,
}

/// Bytes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByteRange {
    /// The first.
    pub offset: u64,
    /// How many.
    pub length: u64,
}

/// A cache by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheName {
    /// Its identity.
    pub uuid: Uuid,
    /// Its files or devices.
    pub paths: Vec<PathBuf>,
}
