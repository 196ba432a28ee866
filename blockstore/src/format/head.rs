//! The 512-byte head that all lockable records share.
//!
//! A record is one 4 KiB block whose first 512 bytes hold everything that changes; the rest is zero.
//! The head names its own address, so that a misdirected write or read does not pass for it, and the
//! store, so that leftovers of an earlier store on the same device do not either.

use crate::buf::is_zero;
use crate::crc::crc32c;
use crate::types::{BLOCK_SIZE, Gba};
use std::fmt;
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a head: what a compare-and-write on a 512-byte sector changes.
pub const HEAD_SIZE: usize = 512;
/// Bytes of a head that belong to the record's kind.
pub const BODY_SIZE: usize = 460;
/// First bytes of every record.
pub const MAGIC: [u8; 8] = *b"BALLAST\x01";
/// Version of the record layouts, but for records that say more than it knows.
pub const RECORD_VERSION: u16 = 1;

/// A record's body as bytes.
pub type Body = [u8; BODY_SIZE];

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone)]
#[repr(C)]
struct RawHead {
    magic: [u8; 8],
    version: U16,
    kind: U16,
    reserved: U32,
    address: U64,
    sequence: U64,
    store: [u8; 16],
    body: Body,
    crc: U32,
}

const _: () = {
    assert!(size_of::<RawHead>() == HEAD_SIZE);
    assert!(std::mem::offset_of!(RawHead, address) == 16);
    assert!(std::mem::offset_of!(RawHead, sequence) == 24);
    assert!(std::mem::offset_of!(RawHead, store) == 32);
    assert!(std::mem::offset_of!(RawHead, body) == 48);
    assert!(std::mem::offset_of!(RawHead, crc) == CRC_OFFSET);
};

const CRC_OFFSET: usize = 508;

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum RecordKind {
    /// The store itself.
    Superblock = 1,
    /// The garbage collector's cycle.
    Gc = 2,
    /// A host.
    Host = 3,
    /// An extent, in the catalogue.
    Extent = 4,
    /// A virtual disk.
    Vdi = 5,
    /// The first block of an extent.
    ExtentHeader = 6,
}

/// Why bytes are not the structure they should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// The magic number is missing.
    Magic,
    /// The checksum does not match.
    Crc {
        /// What the bytes say.
        expected: u32,
        /// What they amount to.
        found: u32,
    },
    /// A record of another kind.
    Kind(u16),
    /// The record belongs to another block.
    Address(u64),
    /// The record belongs to another store.
    Store(Uuid),
    /// Written by a newer version.
    Newer(u16),
    /// A field holds a value that it never has.
    Field(&'static str),
    /// Too few bytes.
    Short,
    /// The device lastingly does not give the bytes.
    Unreadable,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => write!(f, "magic number missing"),
            Self::Crc { expected, found } => {
                write!(f, "checksum is {found:08x}, expected {expected:08x}")
            }
            Self::Kind(kind) => write!(f, "it is a record of kind {kind}"),
            Self::Address(address) => write!(f, "it says it belongs to block {address}"),
            Self::Store(store) => write!(f, "it belongs to store {store}"),
            Self::Newer(version) => write!(f, "it has version {version}, newer than this program"),
            Self::Field(field) => write!(f, "field '{field}' has an impossible value"),
            Self::Short => write!(f, "too few bytes"),
            Self::Unreadable => write!(f, "the device does not read it"),
        }
    }
}

/// A record that lives in a head.
pub trait Record: Sized + Clone + fmt::Debug + PartialEq {
    /// Its kind.
    const KIND: RecordKind;
    /// The newest version of its layout that is read.
    const NEWEST: u16 = RECORD_VERSION;
    /// The oldest version that says all of it: programs of before do not take it for what it is not.
    fn version(&self) -> u16 {
        RECORD_VERSION
    }
    /// The body's bytes.
    fn encode_body(&self) -> Body;
    /// Checks a body.
    ///
    /// # Errors
    /// Names the field that is out of its range.
    fn decode_body(body: &Body) -> Result<Self, Damage>;
}

/// A decoded head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head<T> {
    /// The store it says it belongs to.
    pub store: Uuid,
    /// Rises by one with each change of the record.
    pub sequence: u64,
    /// The body.
    pub record: T,
}

impl<T: Record> Head<T> {
    /// The head's 512 bytes at block `address`.
    #[must_use]
    pub fn encode(&self, address: Gba) -> [u8; HEAD_SIZE] {
        let mut raw = RawHead {
            magic: MAGIC,
            version: U16::new(self.record.version()),
            kind: U16::new(T::KIND as u16),
            reserved: U32::ZERO,
            address: U64::new(address.0),
            sequence: U64::new(self.sequence),
            store: self.store.into_bytes(),
            body: self.record.encode_body(),
            crc: U32::ZERO,
        };
        raw.crc = U32::new(crc32c(&raw.as_bytes()[..CRC_OFFSET]));
        let mut bytes = [0; HEAD_SIZE];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// A whole block that starts with the head and is zero after it.
    #[must_use]
    pub fn encode_block(&self, address: Gba) -> [u8; BLOCK_SIZE] {
        let mut block = [0; BLOCK_SIZE];
        block[..HEAD_SIZE].copy_from_slice(&self.encode(address));
        block
    }

    /// Decodes the head of a record that is expected at `address`.
    ///
    /// # Errors
    /// Says which check failed. The store's UUID is not judged here, see [`Head::of_store`].
    pub fn decode(bytes: &[u8], address: Gba) -> Result<Self, Damage> {
        let (raw, _) = RawHead::read_from_prefix(bytes).map_err(|_| Damage::Short)?;
        if raw.magic != MAGIC {
            return Err(Damage::Magic);
        }
        let found = crc32c(&raw.as_bytes()[..CRC_OFFSET]);
        if found != raw.crc.get() {
            return Err(Damage::Crc { expected: raw.crc.get(), found });
        }
        if raw.kind.get() != T::KIND as u16 {
            return Err(Damage::Kind(raw.kind.get()));
        }
        if raw.version.get() > T::NEWEST {
            return Err(Damage::Newer(raw.version.get()));
        }
        if raw.address.get() != address.0 {
            return Err(Damage::Address(raw.address.get()));
        }
        if raw.version.get() == 0 || raw.reserved.get() != 0 {
            return Err(Damage::Field("version"));
        }
        Ok(Self {
            store: Uuid::from_bytes(raw.store),
            sequence: raw.sequence.get(),
            record: T::decode_body(&raw.body)?,
        })
    }

    /// Refuses a head of another store.
    ///
    /// # Errors
    /// [`Damage::Store`].
    pub fn of_store(self, store: Uuid) -> Result<Self, Damage> {
        if self.store == store { Ok(self) } else { Err(Damage::Store(self.store)) }
    }
}

/// True if the bytes of a head were never written.
#[must_use]
pub fn is_unused(bytes: &[u8]) -> bool {
    is_zero(bytes.get(..HEAD_SIZE).unwrap_or(bytes))
}
