//! What the cache device is and whom it belongs to.
//!
//! A cache of one leg, as all were before there were two, has zeros from byte 124 to 183. Caches made before machines were
//! noted have zeros from byte 184 on; those made before sets could be void, from byte 268 on.

use super::legs::{LEGS_MAX, LegSet, Membership, VOIDED_MAX, Voided};
use super::{FormatError, Geometry, VERSION, open_block, seal_block};
use blockstore::format::fill_text;
use blockstore::types::BLOCK_SIZE;
use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const MAGIC: [u8; 8] = *b"BLSTCACH";
const WHAT: &str = "cache superblock";

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    crc: U32,
    version: U32,
    sequence: U64,
    cache: [u8; 16],
    host: [u8; 16],
    store: [u8; 16],
    leg: [u8; 16],
    legs: U32,
    slots: U32,
    size: U64,
    segment_size: U64,
    data_start: U64,
    segments: U32,
    members: U32,
    events: U64,
    set: [u8; 16],
    all_legs: [[u8; 16]; LEGS_MAX],
    machine: [u8; 16],
    machine_name_len: U32,
    machine_name: [u8; MACHINE_NAME_MAX],
    voided: [RawVoided; VOIDED_MAX],
    reserved: [u8; BLOCK_SIZE - 364],
}
const _: () = assert!(size_of::<Raw>() == BLOCK_SIZE);

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawVoided {
    set: [u8; 16],
    events: U64,
}

/// Bytes of a machine's name that are kept.
pub const MACHINE_NAME_MAX: usize = 64;

/// The machine whose host a cache belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Tells it from all others; says nothing else.
    pub id: Uuid,
    /// For people; of a longer one the first [`MACHINE_NAME_MAX`] bytes are kept.
    pub name: String,
}

/// A validated superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Rises with every rewrite; the newer copy counts.
    pub sequence: u64,
    /// The cache, the same on all legs.
    pub cache: Uuid,
    /// The host, as the store knows it.
    pub host: Uuid,
    /// The machine that the cache was last opened on for serving, or was adopted by; none if that was never noted.
    pub machine: Option<Machine>,
    /// The store whose disks are logged here; none before the first use.
    pub store: Option<Uuid>,
    /// This leg.
    pub leg: Uuid,
    /// All legs, and which of them hold everything.
    pub membership: Membership,
    /// Division of the device.
    pub geometry: Geometry,
}

impl Superblock {
    /// The block that stands for it.
    #[must_use]
    pub fn encode(&self) -> [u8; BLOCK_SIZE] {
        let membership = &self.membership;
        let mirrored = membership.legs.len() > 1;
        let mut all_legs = [[0; 16]; LEGS_MAX];
        for (raw, leg) in all_legs.iter_mut().zip(&membership.legs).filter(|_| mirrored) {
            *raw = leg.into_bytes();
        }
        let mut voided = [RawVoided { set: [0; 16], events: U64::ZERO }; VOIDED_MAX];
        for (raw, set) in voided.iter_mut().zip(&membership.voided) {
            *raw = RawVoided { set: set.id.into_bytes(), events: set.events.into() };
        }
        let name = self.machine.as_ref().map_or("", |machine| &machine.name);
        let mut machine_name = [0; MACHINE_NAME_MAX];
        let name_len = fill_text(&mut machine_name, name);
        let raw = Raw {
            magic: MAGIC,
            crc: U32::ZERO,
            version: VERSION.into(),
            sequence: self.sequence.into(),
            cache: self.cache.into_bytes(),
            host: self.host.into_bytes(),
            store: self.store.unwrap_or(Uuid::nil()).into_bytes(),
            leg: self.leg.into_bytes(),
            legs: (membership.legs.len() as u32).into(),
            slots: self.geometry.slots.into(),
            size: self.geometry.size.into(),
            segment_size: self.geometry.segment_size.into(),
            data_start: self.geometry.data_start.into(),
            segments: self.geometry.segments.into(),
            members: if mirrored { membership.members.bits() } else { 0 }.into(),
            events: membership.events.into(),
            set: membership.id.into_bytes(),
            all_legs,
            machine: self.machine.as_ref().map_or(Uuid::nil(), |machine| machine.id).into_bytes(),
            machine_name_len: u32::from(name_len).into(),
            machine_name,
            voided,
            reserved: [0; BLOCK_SIZE - 364],
        };
        let mut block = [0u8; BLOCK_SIZE];
        block.copy_from_slice(raw.as_bytes());
        seal_block(&mut block);
        block
    }

    /// Reads and checks a block.
    pub fn decode(block: &[u8]) -> Result<Self, FormatError> {
        open_block(block, MAGIC, WHAT)?;
        let raw = Raw::ref_from_bytes(block).map_err(|_| FormatError::Absent(WHAT))?;
        let geometry = Geometry {
            size: raw.size.get(),
            segment_size: raw.segment_size.get(),
            segments: raw.segments.get(),
            slots: raw.slots.get(),
            data_start: raw.data_start.get(),
        };
        if !geometry.is_sound() {
            return Err(FormatError::Invalid {
                what: WHAT,
                why: "its sizes contradict each other",
            });
        }
        let machine = Uuid::from_bytes(raw.machine);
        let name = raw.machine_name.get(..raw.machine_name_len.get() as usize);
        let name = name.and_then(|name| str::from_utf8(name).ok());
        let Some(name) = name else {
            return Err(FormatError::Invalid { what: WHAT, why: "its machine's name is none" });
        };
        let store = Uuid::from_bytes(raw.store);
        let leg = Uuid::from_bytes(raw.leg);
        let voided = raw
            .voided
            .iter()
            .map(|raw| Voided { id: Uuid::from_bytes(raw.set), events: raw.events.get() });
        let voided = voided.filter(|set| !set.id.is_nil()).collect();
        let membership = match raw.legs.get() as usize {
            1 => Membership {
                events: raw.events.get(),
                id: Uuid::from_bytes(raw.set),
                legs: vec![leg],
                members: LegSet::FIRST,
                voided,
            },
            LEGS_MAX => Membership {
                events: raw.events.get(),
                id: Uuid::from_bytes(raw.set),
                legs: raw.all_legs.iter().map(|leg| Uuid::from_bytes(*leg)).collect(),
                members: LegSet::from_bits(raw.members.get()).unwrap_or_default(),
                voided,
            },
            _ => {
                let why = "it belongs to a cache of more legs than this ballast knows";
                return Err(FormatError::Invalid { what: WHAT, why });
            }
        };
        let number = membership.number_of(leg);
        if !membership.is_sound() || !number.is_some_and(|n| membership.members.contains(n)) {
            let why = "what it says of the cache's legs contradicts itself";
            return Err(FormatError::Invalid { what: WHAT, why });
        }
        Ok(Self {
            sequence: raw.sequence.get(),
            cache: Uuid::from_bytes(raw.cache),
            host: Uuid::from_bytes(raw.host),
            machine: (!machine.is_nil()).then(|| Machine { id: machine, name: name.into() }),
            store: (!store.is_nil()).then_some(store),
            leg,
            membership,
            geometry,
        })
    }
}
