//! Extent record (in the catalogue) and extent header (in the extent).
//!
//! The catalogue is the authority; the header lets tools recognise an extent without it. A zero
//! catalogue block means that the extent was never used.

use crate::format::geometry::Geometry;
use crate::format::head::{BODY_SIZE, Body, Damage, Record, RecordKind};
use crate::format::{optional_uuid, uuid_bytes};
use crate::types::Generation;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What an extent holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u32)]
pub enum ExtentType {
    /// Nothing; anyone may claim it.
    Unused = 0,
    /// The store's tables.
    System = 1,
    /// Blocks of virtual disks.
    Data = 2,
    /// Nodes, snapshot logs, names.
    Metadata = 3,
}

impl ExtentType {
    fn decode(value: u32) -> Result<Self, Damage> {
        Ok(match value {
            0 => Self::Unused,
            1 => Self::System,
            2 => Self::Data,
            3 => Self::Metadata,
            _ => return Err(Damage::Field("type")),
        })
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtent {
    kind: U32,
    ready: U32,
    owner: [u8; 16],
    owner_generation: U64,
    sweep_epoch: U64,
    reserved: [u8; 420],
}

const _: () = assert!(size_of::<RawExtent>() == BODY_SIZE);

/// An extent's entry in the catalogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentRecord {
    /// What it holds.
    pub kind: ExtentType,
    /// False between the claim and the moment its empty bitmaps are durable; a claimant that finds
    /// its own extent unready writes them anew.
    pub ready: bool,
    /// The host that allocates from it.
    pub owner: Option<Uuid>,
    /// The owner's generation when it last took the extent up.
    pub owner_generation: Generation,
    /// The last GC cycle whose reclaim bitmap was applied.
    pub sweep_epoch: u64,
}

impl ExtentRecord {
    /// An extent that anyone may claim.
    #[must_use]
    pub const fn unused() -> Self {
        Self {
            kind: ExtentType::Unused,
            ready: false,
            owner: None,
            owner_generation: Generation(0),
            sweep_epoch: 0,
        }
    }

    /// Extent 0.
    #[must_use]
    pub const fn system() -> Self {
        Self { kind: ExtentType::System, ready: true, ..Self::unused() }
    }
}

impl Record for ExtentRecord {
    const KIND: RecordKind = RecordKind::Extent;

    fn encode_body(&self) -> Body {
        let raw = RawExtent {
            kind: U32::new(self.kind as u32),
            ready: U32::new(u32::from(self.ready)),
            owner: uuid_bytes(self.owner),
            owner_generation: U64::new(self.owner_generation.0),
            sweep_epoch: U64::new(self.sweep_epoch),
            reserved: [0; 420],
        };
        zerocopy::transmute!(raw)
    }

    fn decode_body(body: &Body) -> Result<Self, Damage> {
        let raw: RawExtent = zerocopy::transmute!(*body);
        if raw.ready.get() > 1 {
            return Err(Damage::Field("ready"));
        }
        Ok(Self {
            kind: ExtentType::decode(raw.kind.get())?,
            ready: raw.ready.get() == 1,
            owner: optional_uuid(raw.owner),
            owner_generation: Generation(raw.owner_generation.get()),
            sweep_epoch: raw.sweep_epoch.get(),
        })
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtentHeader {
    extent: U32,
    kind: U32,
    extent_blocks: U64,
    first_block: U64,
    bmap_pages: U32,
    reserved: [u8; 432],
}

const _: () = assert!(size_of::<RawExtentHeader>() == BODY_SIZE);

/// The first block of an extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentHeader {
    /// Its number.
    pub extent: u32,
    /// What it was claimed for.
    pub kind: ExtentType,
    /// Its blocks.
    pub extent_blocks: u64,
    /// First block that is not header or bitmap, counted from the extent's start.
    pub first_block: u64,
    /// Pages of its BMap, and of its reclaim bitmap.
    pub bmap_pages: u32,
}

impl ExtentHeader {
    /// The header of an extent that was claimed for `kind`.
    #[must_use]
    pub fn of(geometry: &Geometry, extent: u32, kind: ExtentType) -> Self {
        Self {
            extent,
            kind,
            extent_blocks: geometry.extent_blocks,
            first_block: geometry.extent_overhead(),
            bmap_pages: geometry.bmap_pages(),
        }
    }
}

impl Record for ExtentHeader {
    const KIND: RecordKind = RecordKind::ExtentHeader;

    fn encode_body(&self) -> Body {
        let raw = RawExtentHeader {
            extent: U32::new(self.extent),
            kind: U32::new(self.kind as u32),
            extent_blocks: U64::new(self.extent_blocks),
            first_block: U64::new(self.first_block),
            bmap_pages: U32::new(self.bmap_pages),
            reserved: [0; 432],
        };
        zerocopy::transmute!(raw)
    }

    fn decode_body(body: &Body) -> Result<Self, Damage> {
        let raw: RawExtentHeader = zerocopy::transmute!(*body);
        Ok(Self {
            extent: raw.extent.get(),
            kind: ExtentType::decode(raw.kind.get())?,
            extent_blocks: raw.extent_blocks.get(),
            first_block: raw.first_block.get(),
            bmap_pages: raw.bmap_pages.get(),
        })
    }
}
