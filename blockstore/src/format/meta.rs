//! The immutable block of a virtual disk: its name and policy. The VDI head points to it, with its
//! checksum; a new name or policy is a new block.

use crate::format::head::Damage;
use crate::format::{fill_text, text};
use crate::policy::{Policy, WhenOffline};
use crate::schedule::{RULES_MAX, Schedule};
use crate::types::BLOCK_SIZE;
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 8] = *b"BALLVDIM";
const VERSION: u16 = 1;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawMeta {
    magic: [u8; 8],
    version: U16,
    name_len: U16,
    when_offline: U32,
    uuid: [u8; 16],
    created_ms: U64,
    name: [u8; 256],
    schedule: [U64; RULES_MAX],
    reserved: [u8; 3736],
}

const _: () = {
    assert!(size_of::<RawMeta>() == BLOCK_SIZE);
    assert!(std::mem::offset_of!(RawMeta, name) == 40);
    assert!(std::mem::offset_of!(RawMeta, schedule) == 296);
};

/// Name and policy of a virtual disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdiMeta {
    /// The disk it belongs to.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// What was chosen for it.
    pub policy: Policy,
    /// Milliseconds since 1970.
    pub created_ms: u64,
}

impl VdiMeta {
    /// The block.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut name = [0; 256];
        let name_len = fill_text(&mut name, &self.name);
        let raw = RawMeta {
            magic: MAGIC,
            version: U16::new(VERSION),
            name_len: U16::new(name_len),
            when_offline: U32::new(self.policy.when_offline.to_bits()),
            uuid: self.uuid.into_bytes(),
            created_ms: U64::new(self.created_ms),
            name,
            schedule: self.policy.schedule.to_bits().map(U64::new),
            reserved: [0; 3736],
        };
        raw.as_bytes().to_vec()
    }

    /// Decodes a block whose checksum was verified against the head.
    ///
    /// # Errors
    /// Says which check failed.
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        let raw = RawMeta::ref_from_bytes(bytes).map_err(|_| Damage::Short)?;
        if raw.magic != MAGIC {
            return Err(Damage::Magic);
        }
        if raw.version.get() > VERSION {
            return Err(Damage::Newer(raw.version.get()));
        }
        Ok(Self {
            uuid: Uuid::from_bytes(raw.uuid),
            name: text(&raw.name, raw.name_len.get().into(), "name")?,
            policy: Policy {
                when_offline: WhenOffline::from_bits(raw.when_offline.get()),
                schedule: Schedule::from_bits(raw.schedule.map(U64::get)),
            },
            created_ms: raw.created_ms.get(),
        })
    }
}
