//! The local side of Ballast: writes are acknowledged from a ring log on the host's own device and replayed, in order and
//! atomically, to whatever [`backing::Backing`] stands behind.
//!
//! * A disk's writes go into *segments* of the cache device, each disk's into its own. A segment is free → open → sealed
//!   (it ends in a summary of its records) → clean (committed: now it is read cache) → evicted → free.
//! * [`disk::Disk`] is the state machine of one disk: index, LSNs, open segment. No I/O, clock or threads; its driver is a
//!   worker thread in production and a seeded simulator in tests.
//! * One task per disk (`vdi/`) looks after what is sealed: it commits batches ([`flusher`]), writes checkpoints, evicts.
//! * [`recovery`] puts a log together again after a crash.
//!
//! Invariants, by the module that keeps them: INV-LOG-1 to 4 (`disk/log`), INV-POOL-1 ([`pool`]), the order of steps after a
//! commit (`vdi`), before a disk is served again ([`recovery`]). The byte layout is in [`format`] and
//! docs/on-disk-format.md.
//!
//! Start reading at [`Cache`] for the life of a disk, at [`disk`] for the life of a write.

mod aside;
pub mod backing;
mod cache;
mod check;
mod clone;
mod desk;
pub mod disk;
pub mod error;
pub mod flusher;
pub mod format;
pub mod image;
pub mod index;
pub mod leg_filler;
pub mod link;
pub mod local;
mod log_open;
pub mod pending;
pub mod pool;
pub mod read_only;
pub mod recovery;
pub mod release;
mod vdi;
mod witness;

pub use cache::replacing::{Replacement, ReplacementState};
pub use cache::{
    AsOf, AttachedRecord, Cache, CacheIdentity, CacheOptions, CacheStatus, LogFinding, NewClone,
    QuarantinedLog, Survey, VdiIdentity,
};
pub use check::{CheckReport, VdiReport, check};
pub use desk::{OnTaken, SnapshotTaken};
pub use error::CacheError;
pub use format::slot::{CloneOrigin, LeftBehind};
pub use local::LegState;
pub use pending::{LogCut, PendingSnapshot, PendingSnapshots};
pub use vdi::{HydrateError, HydrateStatus, MadeCuts, Phase, PinError, Pressed, VdiStatus};
pub use witness::Witness;
