//! What can go wrong in the cache, with its context.

use crate::format::FormatError;
use blockstore::device::DeviceError;
use std::path::PathBuf;
use uuid::Uuid;

/// A failed cache operation.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The cache device could not be read, written or opened.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A local file operation failed.
    #[error("cache {path}: {what}: {source}")]
    Local { path: PathBuf, what: &'static str, source: std::io::Error },
    /// The device holds something else or nothing.
    #[error(
        "{path} is not a ballast cache ({source}); name a file that does not exist to create one, or the right device"
    )]
    NotACache { path: PathBuf, source: FormatError },
    /// The device is shorter than its superblock says.
    #[error(
        "cache {path} was cut short: it should have {expected} bytes and has {found}; restore its full length, nothing was changed"
    )]
    Truncated { path: PathBuf, expected: u64, found: u64 },
    /// The wanted size cannot be used.
    #[error("cache {path}: a size of {size} bytes is too small, the least is {least} bytes")]
    TooSmall { path: PathBuf, size: u64, least: u64 },
    /// It does not exist and no size was given to create it with.
    #[error("cache {path} does not exist; give --cache-size to create it")]
    Missing { path: PathBuf },
    /// It belongs to another store.
    #[error(
        "cache {path} holds the log of store {bound}, but the store given is {given}; use the cache that belongs to this store, or a new one"
    )]
    OtherStore { path: PathBuf, bound: Uuid, given: Uuid },
    /// Unacknowledged features.
    #[error("cache {path}: {what}")]
    Unsupported { path: PathBuf, what: String },
    /// All VDI slots are taken.
    #[error("the cache has room for {slots} attached disks and all are taken; detach one first")]
    NoSlot { slots: u32 },
    /// Not enough segments for another disk.
    #[error(
        "the cache has no free segments for another disk ({free} free, 2 needed): wait for the flusher, detach a disk, or use a larger cache"
    )]
    NoSegments { free: u32 },
    /// A disk by that UUID is attached already.
    #[error("VDI {name} ({vdi}) is attached already")]
    Attached { name: String, vdi: Uuid },
    /// No such disk is attached.
    #[error("VDI {vdi} is not attached to this cache")]
    NotAttached { vdi: Uuid },
    /// The log of a disk does not fit the store or is damaged. Nothing was changed.
    #[error(
        "the log of VDI {name} ({vdi}) cannot be used: {why}. Nothing was changed; the disk stays closed"
    )]
    Log { name: String, vdi: Uuid, why: String },
    /// The log could not be committed.
    #[error("VDI {vdi}: {why}")]
    Flush { vdi: Uuid, why: String },
}
