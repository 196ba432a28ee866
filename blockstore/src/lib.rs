//! The shared store: virtual disks on one block device that hosts share.
//!
//! It knows nothing of caches or guests. What it promises:
//! * A disk's image is at every instant exactly the disk as of one LSN: [`Vdi::commit`] replaces it
//!   atomically and durably, or not at all.
//! * Nothing reachable is ever overwritten; every block read was checked against the checksum that
//!   its parent holds.
//! * Outages and a full store are waited out ([`Store::health`] tells); control operations give up
//!   after a time.
//!
//! ```no_run
//! # async fn example(device: blockstore::device::Device) -> blockstore::Result<()> {
//! use blockstore::{AttachOptions, Batch, FormatOptions, OpenOptions, Store};
//! use blockstore::types::{Lba, Lsn};
//! use uuid::Uuid;
//!
//! Store::format(device.clone(), FormatOptions::default()).await?;
//! let host = OpenOptions { host_uuid: Uuid::new_v4(), host_name: "a".into(), ..Default::default() };
//! let store = Store::open(device, host).await?;
//! let info = store.create_vdi("web", 4 << 30).await?;
//! let vdi = store.attach(info.uuid, AttachOptions { log_id: Uuid::new_v4() }).await?;
//! vdi.commit(Batch::new(Lsn(1), vec![])).await?;
//! assert!(vdi.read(Lba(0), 1).await?[0].is_none());
//! vdi.detach(Lsn(1)).await?;
//! store.close().await
//! # }
//! ```
//!
//! Where to start reading: `format/` (bytes, pure), `slot` (lockable records), `alloc/` (free blocks),
//! `tree/` (reading), `snapshots/`, `commit/` (the protocol, in its module's head), `root` (when blocks may be used
//! again), `store/` (what users call). The byte layout is in docs/on-disk-format.md.

pub mod alloc;
pub mod buf;
pub mod commit;
pub mod crc;
pub mod describe;
pub mod device;
pub mod eras;
pub mod error;
pub mod format;
pub mod holds;
pub mod io;
pub mod name;
pub mod node_cache;
pub mod policy;
pub mod root;
pub mod sabotage;
pub mod schedule;
pub mod slot;
pub mod snapshots;
pub mod store;
pub mod tree;
pub mod turns;
pub mod types;
pub mod vdi;

pub use alloc::unmap::{UnmapOptions, Unmapped};
pub use commit::publish::Prepared;
pub use commit::{Batch, Change, Committed, Cut, SnapshotLabel};
pub use error::{Result, StoreError, StoreErrorKind};
pub use holds::{SnapshotHold, SnapshotHolds};
pub use io::Health;
pub use policy::{Policy, PolicyChange, WhenOffline};
pub use schedule::Schedule;
pub use store::{
    AttachOptions, CHANGES_MAX, Collection, Cure, CycleCheck, Difference, ExportReport,
    Fingerprint, Fix, FormatOptions, Held, HostInfo, ImageInfo, Inspection, LostLog, OpenOptions,
    OwnerInfo, REPAIR_HOST, Reclaimed, RegisteredClone, Repairer, Rewound, SnapshotImage, Space,
    Store, StoreInfo, Swept, TableProblem, Thinned, VdiInfo, Walk,
};
pub use vdi::{CommittedState, Vdi};

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
