//! The VDI registry: creating, finding, deleting, attaching and changing virtual disks.
//!
//! The registry is a table of heads, one place per disk; a head is changed by compare-and-write alone. What this process has
//! read of it is kept as a [`directory`]: names, mostly, which lie in a block of their own for each disk.

mod attaching;
mod changing;
mod creating;
mod deleting;
mod directory;
mod reading;

pub use attaching::AttachOptions;
pub(in crate::store) use directory::Latest;

use crate::alloc::Purpose;
use crate::error::Result;
use crate::format::extent::ExtentType;
use crate::format::meta::VdiMeta;
use crate::format::node::height_for;
use crate::format::pointer::Pointer;
use crate::format::vdi::{SnapshotIndex, VdiHead, VdiState};
use crate::io::{Io, now_ms};
use crate::policy::Policy;
use crate::slot::View;
use crate::store::Core;
use crate::types::{BLOCK_SIZE, Birth, Generation, Lsn};
use bytes::Bytes;
use uuid::Uuid;

impl VdiHead {
    /// An empty disk that nobody has.
    pub(crate) fn new_disk(size_bytes: u64) -> Self {
        Self {
            uuid: Uuid::new_v4(),
            state: VdiState::Active,
            owner: None,
            attachment: Generation(0),
            attached_ms: 0,
            root: Pointer::SPARSE,
            height: height_for(size_bytes / BLOCK_SIZE as u64),
            size_bytes,
            committed: Lsn(0),
            log_id: None,
            birth: Birth(0),
            last_snapshot_birth: Birth(0),
            snapshots: SnapshotIndex::default(),
            origin: None,
            meta: Pointer::SPARSE,
            created_ms: now_ms(),
            committed_ms: 0,
            last_log: None,
        }
    }

    /// The immutable block of this disk under that name and policy.
    pub(crate) fn meta_block(&self, name: String, policy: Policy) -> VdiMeta {
        VdiMeta { uuid: self.uuid, name, policy, created_ms: self.created_ms }
    }

    /// What is left of a deleted disk: it holds nothing.
    pub(crate) fn buried(self) -> Self {
        Self {
            state: VdiState::Tombstone,
            owner: None,
            log_id: None,
            root: Pointer::SPARSE,
            snapshots: SnapshotIndex::default(),
            origin: None,
            meta: Pointer::SPARSE,
            ..self
        }
    }
}

/// A disk as found in the registry.
#[derive(Debug)]
pub(super) struct Found {
    /// Number of its place.
    pub place: u32,
    pub view: View<VdiHead>,
    pub head: VdiHead,
    pub name: String,
    pub policy: Policy,
}

/// Writes a disk's immutable block, durably, to a fresh place; `patience` says how long to wait for one.
pub(crate) async fn write_meta(core: &Core, patience: &Io, meta: &VdiMeta) -> Result<Pointer> {
    // With the patience of a control operation a full store is an error, and so is a full device.
    let allocator = core.allocator()?;
    let runs = allocator.allocate(patience, ExtentType::Metadata, 1, Purpose::Normal).await?;
    let block = Bytes::from(meta.encode());
    let crc = crate::crc::crc32c(&block);
    let pointer = Pointer { gba: runs[0].start, read_only: false, birth: Birth(0), crc };
    let object = format!("VDI '{}'", meta.name);
    core.write_fresh(patience, &object, &[(pointer.gba, vec![block])]).await?;
    Ok(pointer)
}
