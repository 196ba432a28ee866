//! Pointer to a block: address, flags, birth and checksum in 16 bytes.
//!
//! ```text
//! bit   0..44   GBA           byte 0..5.5
//! bit  44..48   flags         bit 44 read-only, 45..47 zero
//! bit  48..96   birth         byte 6..12
//! bit  96..128  CRC32C        byte 12..16
//! ```
//! All zero means sparse: the block, or the whole subtree, reads as zeros.

use crate::crc::crc32c;
use crate::format::head::Damage;
use crate::types::{Birth, Gba};
use serde::{Deserialize, Serialize};

/// Bytes of an encoded pointer.
pub const POINTER_SIZE: usize = 16;
const GBA_BITS: u32 = 44;
const GBA_MASK: u128 = (1 << GBA_BITS) - 1;
const BIRTH_MASK: u128 = (1 << 48) - 1;
const FLAG_READ_ONLY: u128 = 1 << GBA_BITS;
const FLAGS_RESERVED: u128 = 0b1110 << GBA_BITS;

/// Where a block is, when it was written, and what its bytes amount to. Blocks are immutable under
/// one pointer, so it serves as the key of every cache.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Serialize, Deserialize,
)]
pub struct Pointer {
    /// Address; 0 means sparse.
    pub gba: Gba,
    /// The disk does not own the block: never free it when it is replaced.
    pub read_only: bool,
    /// The commit that wrote it.
    pub birth: Birth,
    /// CRC32C of the block.
    pub crc: u32,
}

impl Pointer {
    /// Nothing there; reads as zeros.
    pub const SPARSE: Self = Self { gba: Gba(0), read_only: false, birth: Birth(0), crc: 0 };

    /// True for a hole.
    #[must_use]
    pub const fn is_sparse(&self) -> bool {
        self.gba.0 == 0
    }

    /// The pointer as a number, which is also its little-endian encoding.
    #[must_use]
    pub const fn bits(&self) -> u128 {
        let flags = if self.read_only { FLAG_READ_ONLY } else { 0 };
        (self.gba.0 as u128 & GBA_MASK)
            | flags
            | ((self.birth.0 as u128 & BIRTH_MASK) << 48)
            | ((self.crc as u128) << 96)
    }

    /// The 16 bytes on disk.
    #[must_use]
    pub const fn encode(&self) -> [u8; POINTER_SIZE] {
        self.bits().to_le_bytes()
    }

    /// Decodes 16 bytes.
    ///
    /// # Errors
    /// A reserved flag is set, or a hole carries a birth or checksum.
    pub const fn decode(bytes: [u8; POINTER_SIZE]) -> Result<Self, Damage> {
        let bits = u128::from_le_bytes(bytes);
        if bits & FLAGS_RESERVED != 0 {
            return Err(Damage::Field("pointer flags"));
        }
        if bits & GBA_MASK == 0 && bits != 0 {
            return Err(Damage::Field("pointer address"));
        }
        Ok(Self::from_bits(bits))
    }

    /// Reads a pointer that was checked before.
    #[inline]
    pub(crate) const fn from_bits(bits: u128) -> Self {
        Self {
            gba: Gba((bits & GBA_MASK) as u64),
            read_only: bits & FLAG_READ_ONLY != 0,
            birth: Birth(((bits >> 48) & BIRTH_MASK) as u64),
            crc: (bits >> 96) as u32,
        }
    }

    /// True if `block` is what this pointer points to.
    #[must_use]
    pub fn matches(&self, block: &[u8]) -> bool {
        crc32c(block) == self.crc
    }

    /// True if nothing but the disk's present tree can hold the block: it is not flagged read-only
    /// and was born after the last snapshot.
    #[must_use]
    pub fn is_exclusive(&self, last_snapshot: Birth) -> bool {
        !self.is_sparse() && !self.read_only && self.birth > last_snapshot
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes() {
        let pointer = Pointer {
            gba: Gba(0xabc_def0_1234),
            read_only: true,
            birth: Birth(0x1122_3344_5566),
            crc: 0xdead_beef,
        };
        assert_eq!(
            pointer.encode(),
            [
                0x34, 0x12, 0xf0, 0xde, 0xbc, 0x1a, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0xef, 0xbe,
                0xad, 0xde
            ]
        );
        assert_eq!(Pointer::SPARSE.encode(), [0; 16]);
    }

    #[test]
    fn a_hole_with_a_birth_and_reserved_flags_are_refused() {
        let mut bytes = [0; 16];
        bytes[6] = 1;
        assert_eq!(Pointer::decode(bytes), Err(Damage::Field("pointer address")));
        let mut bytes = [1; 16];
        bytes[5] = 0x20;
        assert_eq!(Pointer::decode(bytes), Err(Damage::Field("pointer flags")));
    }

    proptest! {
        #[test]
        fn every_byte_counts(bytes: [u8; 16]) {
            if let Ok(pointer) = Pointer::decode(bytes) {
                prop_assert_eq!(pointer.encode(), bytes);
            }
        }
    }
}
