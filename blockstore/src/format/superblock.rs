//! Superblock: what the store is and where its tables lie. Two copies: the first block of the device
//! and the last block of extent 0. It changes only when the store grows.

use crate::format::geometry::Geometry;
use crate::format::head::{BODY_SIZE, Body, Damage, Record, RecordKind};
use crate::format::{FORMAT_VERSION, fill_text, text};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Incompatible features this program understands: none yet.
pub const FEATURES_KNOWN: u64 = 0;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSuperblock {
    format_version: U16,
    label_len: U16,
    single_host: U32,
    features_incompatible: U64,
    features_compatible: U64,
    created_ms: U64,
    device_size: U64,
    extent_size: U64,
    extent_count: U64,
    gc_start: U64,
    host_start: U64,
    host_slots: U64,
    vdi_start: U64,
    vdi_slots: U64,
    extent_start: U64,
    extent_slots: U64,
    label: [u8; 64],
    reserved: [u8; 284],
}

const _: () = {
    assert!(size_of::<RawSuperblock>() == BODY_SIZE);
    assert!(std::mem::offset_of!(RawSuperblock, device_size) == 32);
    assert!(std::mem::offset_of!(RawSuperblock, label) == 112);
};

/// What the store is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// [`FORMAT_VERSION`] of the program that formatted it.
    pub format_version: u16,
    /// Records are guarded by two alternating slots instead of compare-and-write: one host only.
    pub single_host: bool,
    /// A bit not in [`FEATURES_KNOWN`] means: do not touch.
    pub features_incompatible: u64,
    /// Bits that may be ignored.
    pub features_compatible: u64,
    /// Milliseconds since 1970.
    pub created_ms: u64,
    /// Bytes of the device that the store uses.
    pub device_size: u64,
    /// Sizes and places.
    pub geometry: Geometry,
    /// Free text of the operator.
    pub label: String,
}

impl Record for Superblock {
    const KIND: RecordKind = RecordKind::Superblock;

    fn encode_body(&self) -> Body {
        let g = &self.geometry;
        let mut label = [0; 64];
        let label_len = fill_text(&mut label, &self.label);
        let raw = RawSuperblock {
            format_version: U16::new(self.format_version),
            label_len: U16::new(label_len),
            single_host: U32::new(u32::from(self.single_host)),
            features_incompatible: U64::new(self.features_incompatible),
            features_compatible: U64::new(self.features_compatible),
            created_ms: U64::new(self.created_ms),
            device_size: U64::new(self.device_size),
            extent_size: U64::new(g.extent_size()),
            extent_count: U64::new(u64::from(g.extent_count)),
            gc_start: U64::new(g.gc_start),
            host_start: U64::new(g.host_start),
            host_slots: U64::new(u64::from(g.host_slots)),
            vdi_start: U64::new(g.vdi_start),
            vdi_slots: U64::new(u64::from(g.vdi_slots)),
            extent_start: U64::new(g.extent_start),
            extent_slots: U64::new(u64::from(g.extent_slots)),
            label,
            reserved: [0; 284],
        };
        zerocopy::transmute!(raw)
    }

    /// A newer format version or an unknown incompatible feature is [`Damage::Newer`], before any
    /// other field is judged.
    fn decode_body(body: &Body) -> Result<Self, Damage> {
        let raw: RawSuperblock = zerocopy::transmute!(*body);
        if raw.format_version.get() > FORMAT_VERSION
            || raw.features_incompatible.get() & !FEATURES_KNOWN != 0
        {
            return Err(Damage::Newer(raw.format_version.get()));
        }
        if raw.single_host.get() > 1 {
            return Err(Damage::Field("single_host"));
        }
        if raw.reserved.iter().any(|&b| b != 0) {
            return Err(Damage::Field("reserved"));
        }
        let small =
            |value: U64, field| u32::try_from(value.get()).map_err(|_| Damage::Field(field));
        let geometry = Geometry {
            extent_blocks: Geometry::blocks_of_extent_size(raw.extent_size.get())
                .ok_or(Damage::Field("extent_size"))?,
            extent_count: small(raw.extent_count, "extent_count")?,
            gc_start: raw.gc_start.get(),
            host_start: raw.host_start.get(),
            host_slots: small(raw.host_slots, "host_slots")?,
            vdi_start: raw.vdi_start.get(),
            vdi_slots: small(raw.vdi_slots, "vdi_slots")?,
            extent_start: raw.extent_start.get(),
            extent_slots: small(raw.extent_slots, "extent_slots")?,
        };
        geometry.check()?;
        if raw.device_size.get() < geometry.size_bytes() {
            return Err(Damage::Field("device_size"));
        }
        Ok(Self {
            format_version: raw.format_version.get(),
            single_host: raw.single_host.get() == 1,
            features_incompatible: raw.features_incompatible.get(),
            features_compatible: raw.features_compatible.get(),
            created_ms: raw.created_ms.get(),
            device_size: raw.device_size.get(),
            geometry,
            label: text(&raw.label, raw.label_len.get().into(), "label")?,
        })
    }
}
