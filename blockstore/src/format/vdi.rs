//! VDI record head: one virtual disk's present state. The only thing a commit changes in place.

use crate::format::head::{BODY_SIZE, Body, Damage, RECORD_VERSION, Record, RecordKind};
use crate::format::node::{HEIGHT_MAX, tree_span};
use crate::format::pointer::{POINTER_SIZE, Pointer};
use crate::format::snapshot::{SNAPSHOTS_HEIGHT_MAX, snapshots_span};
use crate::format::{optional_uuid, uuid_bytes};
use crate::types::{BLOCK_SIZE, Birth, Generation, Lsn};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Largest virtual disk: 256 TiB.
pub const VDI_SIZE_MAX: u64 = 256 << 40;
/// Largest committed LSN: no disk lives long enough for more, and LSNs after it are computed without overflow.
pub const COMMITTED_LSN_MAX: u64 = 1 << 62;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawVdi {
    uuid: [u8; 16],
    state: U32,
    height: U32,
    owner: [u8; 16],
    owner_generation: U64,
    attachment: U64,
    attached_ms: U64,
    size_bytes: U64,
    committed_lsn: U64,
    log_id: [u8; 16],
    birth: U64,
    last_snapshot_birth: U64,
    root: [u8; POINTER_SIZE],
    snapshots_root: [u8; POINTER_SIZE],
    meta: [u8; POINTER_SIZE],
    created_ms: U64,
    committed_ms: U64,
    last_log: [u8; 16],
    snapshots_made: U64,
    snapshots_live: U64,
    snapshots_height: U32,
    reserved_a: U32,
    origin_vdi: [u8; 16],
    origin_lsn: U64,
    reserved: [u8; 220],
}

const _: () = {
    assert!(size_of::<RawVdi>() == BODY_SIZE);
    assert!(std::mem::offset_of!(RawVdi, owner) == 24);
    assert!(std::mem::offset_of!(RawVdi, committed_lsn) == 72);
    assert!(std::mem::offset_of!(RawVdi, root) == 112);
    assert!(std::mem::offset_of!(RawVdi, created_ms) == 160);
    assert!(std::mem::offset_of!(RawVdi, committed_ms) == 168);
    assert!(std::mem::offset_of!(RawVdi, last_log) == 176);
    assert!(std::mem::offset_of!(RawVdi, snapshots_made) == 192);
    assert!(std::mem::offset_of!(RawVdi, origin_vdi) == 216);
};

/// Where a virtual disk is in its life. (A slot that was never used is all zero.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u32)]
pub enum VdiState {
    /// Its slot and name are taken; counts as a root, but is not a disk yet.
    Creating = 1,
    /// A disk.
    Active = 2,
    /// Being deleted; holds nothing any more.
    Deleting = 3,
    /// Deleted; the slot may be used again.
    Tombstone = 4,
}

/// The host that holds a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The host.
    pub host: Uuid,
    /// Its generation when it took, or last took up, the disk.
    pub generation: Generation,
}

/// Where a disk's snapshots are: a tree whose leaves hold the snapshots in the order in which they were made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnapshotIndex {
    /// Its top node, or only leaf; sparse if there is no snapshot.
    pub root: Pointer,
    /// Levels, that of the leaves included; 0 if there never was a snapshot.
    pub height: u8,
    /// How many were ever made: the place of the next one.
    pub made: u64,
    /// How many there are.
    pub live: u64,
}

/// A snapshot of another disk that a disk began as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Origin {
    /// The disk.
    pub vdi: Uuid,
    /// The snapshot.
    pub lsn: Lsn,
}

/// A virtual disk's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdiHead {
    /// Identity.
    pub uuid: Uuid,
    /// Where it is in its life.
    pub state: VdiState,
    /// Who may commit.
    pub owner: Option<Owner>,
    /// Rises with each attach and each resumption.
    pub attachment: Generation,
    /// Since when the present owner has it, milliseconds since 1970.
    pub attached_ms: u64,
    /// Root of the radix tree; sparse for an empty disk.
    pub root: Pointer,
    /// Levels of the tree, 1 to 5.
    pub height: u8,
    /// A multiple of 4096.
    pub size_bytes: u64,
    /// The image is the disk as of this point of the guest's write order.
    pub committed: Lsn,
    /// The log whose records extend this image; nil when there is none.
    pub log_id: Option<Uuid>,
    /// Commit counter; every pointer of the tree was born at or before it.
    pub birth: Birth,
    /// Pointers born at or before this may be shared with a snapshot or a clone's source.
    pub last_snapshot_birth: Birth,
    /// Its snapshots.
    pub snapshots: SnapshotIndex,
    /// The snapshot that it was cloned from.
    pub origin: Option<Origin>,
    /// The immutable block with name and policy.
    pub meta: Pointer,
    /// Milliseconds since 1970.
    pub created_ms: u64,
    /// When `committed` was reached, milliseconds since 1970 by its owner's clock, for people; 0: not noted.
    pub committed_ms: u64,
    /// The log that was drained when the disk was last detached, [`GIVEN_UP`] if it was lost instead, or the disk rolled
    /// back to a snapshot afterwards; none: not noted.
    pub last_log: Option<Uuid>,
}

/// Version of a head that knows of snapshots or an origin: a program of before would lose them.
const VERSION_WITH_SNAPSHOTS: u16 = 2;

/// Stands for the last log of a disk that was rolled back: none goes on from there.
pub const GIVEN_UP: Uuid = Uuid::max();

impl VdiHead {
    /// Size in blocks.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.size_bytes / BLOCK_SIZE as u64
    }
}

impl Record for VdiHead {
    const KIND: RecordKind = RecordKind::Vdi;
    const NEWEST: u16 = VERSION_WITH_SNAPSHOTS;

    fn version(&self) -> u16 {
        if self.snapshots == SnapshotIndex::default() && self.origin.is_none() {
            RECORD_VERSION
        } else {
            VERSION_WITH_SNAPSHOTS
        }
    }

    fn encode_body(&self) -> Body {
        let raw = RawVdi {
            uuid: self.uuid.into_bytes(),
            state: U32::new(self.state as u32),
            height: U32::new(u32::from(self.height)),
            owner: uuid_bytes(self.owner.map(|o| o.host)),
            owner_generation: U64::new(self.owner.map_or(0, |o| o.generation.0)),
            attachment: U64::new(self.attachment.0),
            attached_ms: U64::new(self.attached_ms),
            size_bytes: U64::new(self.size_bytes),
            committed_lsn: U64::new(self.committed.0),
            log_id: uuid_bytes(self.log_id),
            birth: U64::new(self.birth.0),
            last_snapshot_birth: U64::new(self.last_snapshot_birth.0),
            root: self.root.encode(),
            snapshots_root: self.snapshots.root.encode(),
            meta: self.meta.encode(),
            created_ms: U64::new(self.created_ms),
            committed_ms: U64::new(self.committed_ms),
            last_log: uuid_bytes(self.last_log),
            snapshots_made: U64::new(self.snapshots.made),
            snapshots_live: U64::new(self.snapshots.live),
            snapshots_height: U32::new(self.snapshots.height.into()),
            reserved_a: U32::ZERO,
            origin_vdi: uuid_bytes(self.origin.map(|origin| origin.vdi)),
            origin_lsn: U64::new(self.origin.map_or(0, |origin| origin.lsn.0)),
            reserved: [0; 220],
        };
        zerocopy::transmute!(raw)
    }

    fn decode_body(body: &Body) -> Result<Self, Damage> {
        let raw: RawVdi = zerocopy::transmute!(*body);
        let state = match raw.state.get() {
            1 => VdiState::Creating,
            2 => VdiState::Active,
            3 => VdiState::Deleting,
            4 => VdiState::Tombstone,
            _ => return Err(Damage::Field("state")),
        };
        let uuid = Uuid::from_bytes(raw.uuid);
        if uuid.is_nil() {
            return Err(Damage::Field("uuid"));
        }
        let height = raw.height.get();
        if !(1..=u32::from(HEIGHT_MAX)).contains(&height) {
            return Err(Damage::Field("height"));
        }
        let height = height as u8;
        let size_bytes = raw.size_bytes.get();
        if size_bytes == 0
            || !size_bytes.is_multiple_of(BLOCK_SIZE as u64)
            || size_bytes > VDI_SIZE_MAX
            || size_bytes / BLOCK_SIZE as u64 > tree_span(height)
        {
            return Err(Damage::Field("size"));
        }
        if raw.birth.get() >> 48 != 0 || raw.last_snapshot_birth.get() > raw.birth.get() {
            return Err(Damage::Field("birth"));
        }
        if raw.committed_lsn.get() > COMMITTED_LSN_MAX {
            return Err(Damage::Field("committed_lsn"));
        }
        let snapshots = SnapshotIndex {
            root: Pointer::decode(raw.snapshots_root)?,
            height: u8::try_from(raw.snapshots_height.get()).unwrap_or(u8::MAX),
            made: raw.snapshots_made.get(),
            live: raw.snapshots_live.get(),
        };
        if snapshots.height > SNAPSHOTS_HEIGHT_MAX
            || snapshots.made > snapshots_span(snapshots.height)
            || snapshots.live > snapshots.made
            || snapshots.root.is_sparse() != (snapshots.live == 0)
        {
            return Err(Damage::Field("snapshots"));
        }
        let origin_lsn = Lsn(raw.origin_lsn.get());
        Ok(Self {
            uuid,
            state,
            owner: optional_uuid(raw.owner)
                .map(|host| Owner { host, generation: Generation(raw.owner_generation.get()) }),
            attachment: Generation(raw.attachment.get()),
            attached_ms: raw.attached_ms.get(),
            root: Pointer::decode(raw.root)?,
            height,
            size_bytes,
            committed: Lsn(raw.committed_lsn.get()),
            log_id: optional_uuid(raw.log_id),
            birth: Birth(raw.birth.get()),
            last_snapshot_birth: Birth(raw.last_snapshot_birth.get()),
            snapshots,
            origin: optional_uuid(raw.origin_vdi).map(|vdi| Origin { vdi, lsn: origin_lsn }),
            meta: Pointer::decode(raw.meta)?,
            created_ms: raw.created_ms.get(),
            committed_ms: raw.committed_ms.get(),
            last_log: optional_uuid(raw.last_log),
        })
    }
}
