//! What can go wrong in the cache, with its context.

use crate::format::FormatError;
use blockstore::device::DeviceError;
use blockstore::types::Lsn;
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
    /// It belongs to another machine's host.
    #[error(
        "cache {path} belongs to the host on machine '{theirs}' (host {host}), and this is machine '{ours}': an agent here would pass for that host. \
         Name this machine's own cache; or, if the device was moved here for good, 'ballast cache adopt {path}' first. Nothing was changed"
    )]
    OtherMachine { path: PathBuf, theirs: String, host: Uuid, ours: String },
    /// Both legs are one file or device.
    #[error(
        "{path} and {twin} are the same file or device: a mirror on one device survives nothing; name two different ones"
    )]
    SameLeg { path: PathBuf, twin: PathBuf },
    /// The same leg twice: one is a copy of the other.
    #[error(
        "{path} and {twin} both say that they are leg {leg}: one is a copy of the other; name the original and its twin, nothing was changed"
    )]
    ClonedLeg { path: PathBuf, twin: PathBuf, leg: Uuid },
    /// Two legs of different caches.
    #[error(
        "{path} is a leg of cache {cache}, {twin} one of cache {twin_cache}: they cannot be mirrored; name the two legs of one cache, nothing was changed"
    )]
    OtherCache { path: PathBuf, cache: Uuid, twin: PathBuf, twin_cache: Uuid },
    /// Each leg went on without the other.
    #[error(
        "{path} and {twin} each went on without the other: only one of them holds what was acknowledged last; name that one alone, nothing was changed"
    )]
    SplitLegs { path: PathBuf, twin: PathBuf },
    /// A member of the mirror is not there.
    #[error(
        "cache {path} is mirrored, and its other leg ({missing}) is not there ({why}); it may hold writes that this leg lacks: bring it back, or give --degraded to go on without it, nothing was changed"
    )]
    LegMissing { path: PathBuf, missing: String, why: String },
    /// A leg has less room than the other.
    #[error(
        "cache leg {path} has {found} bytes, its twin {twin} needs {expected}: give both the same size, or bring back the leg's full length; nothing was changed"
    )]
    SmallerLeg { path: PathBuf, found: u64, twin: PathBuf, expected: u64 },
    /// A new leg for a cache that is in use did not become a member.
    #[error(
        "the new leg {path} is not used: {why}; the cache goes on as it was, what was copied to it counts for nothing"
    )]
    NewLeg { path: PathBuf, why: String },
    /// The making or filling of a leg was cut short.
    #[error(
        "{path} is unfinished: it was being made, or filled as the new leg of a cache, when that was cut short, and holds nothing that counts; fill it again with 'ballast cache replace', or leave it out"
    )]
    Unfinished { path: PathBuf },
    /// More legs were named than the cache has.
    #[error(
        "cache {path} has {legs} leg(s) and {given} were named: a cache gets its second leg when it is created; name as many as it has"
    )]
    LegCount { path: PathBuf, legs: usize, given: usize },
    /// Every leg failed.
    #[error(
        "cache {path}: no leg is left that takes writes ({why}); what was acknowledged is on the device: stop, repair it, start again"
    )]
    NoLegLeft { path: PathBuf, why: String },
    /// Unacknowledged features.
    #[error("cache {path}: {what}")]
    Unsupported { path: PathBuf, what: String },
    /// A leg was lost, or rotted, between two looks at a log.
    #[error(
        "{path}: segment {segment} cannot be read a second time as it was the first; try again, nothing was changed"
    )]
    LogChanged {
        /// The cache device.
        path: PathBuf,
        /// Which one.
        segment: u32,
    },
    /// All VDI slots are taken.
    #[error("the cache has room for {slots} attached disks and all are taken; detach one first")]
    NoSlot { slots: u32 },
    /// Not enough segments for another disk.
    #[error(
        "the cache has no free segments for another disk ({free} free, 2 needed): wait for the flusher, detach a disk, discard a log in quarantine, or use a larger cache"
    )]
    NoSegments { free: u32 },
    /// No such log is in quarantine.
    #[error("no log {log_id} is in quarantine here: 'ballast cache status' shows those that are")]
    NotQuarantined { log_id: Uuid },
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
    /// The store was put back.
    #[error(
        "the store's image of VDI {name} ({vdi}) is at LSN {store}, but its log in this host's cache knows that it was at LSN {log}: \
         the store was put back to an older state, or is a copy of one. Nothing was written to it and the log is kept. \
         Bring the store's newer state back, then 'ballast vdi attach {name}'; 'ballast store export' copies out what \
         the store has now"
    )]
    StoreIsOlder { name: String, vdi: Uuid, store: Lsn, log: Lsn },
    /// The cache was put back, or the disk was changed elsewhere.
    #[error(
        "the store's image of VDI {name} ({vdi}) is at LSN {store}, beyond LSN {log} where its log in this host's cache ended: \
         the disk was changed by another host, or the cache was put back to an older state. Nothing was written to the \
         store and the log is kept. Bring the cache's newer state back, then 'ballast vdi attach {name}'"
    )]
    LogIsOlder { name: String, vdi: Uuid, store: Lsn, log: Lsn },
    /// Its attach was cut off before it was served.
    #[error(
        "VDI {name} ({vdi}) was never served from this cache, or its log was left behind in write-through: it waits for the store"
    )]
    NeverServed { name: String, vdi: Uuid },
    /// A snapshot is not known to be durable.
    #[error(
        "the snapshot of VDI {vdi} failed: {why}; 'ballast vdi info' shows how the disk is, 'ballast snap list' whether it was taken after all"
    )]
    Snapshot { vdi: Uuid, why: String },
    /// A disk did not become a clone of what a log holds. Nothing was changed.
    #[error("no clone was made of VDI {vdi} as of LSN {lsn}: {why}")]
    Clone { vdi: Uuid, lsn: Lsn, why: String },
    /// The log could not be committed.
    #[error("VDI {vdi}: {why}")]
    Flush { vdi: Uuid, why: String },
}
