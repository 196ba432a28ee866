//! Layout of the cache device: encode, decode, validate. Pure; see docs/on-disk-format.md, "Local cache".
//!
//! ```text
//! block 0, 1     superblock, two copies taken in turn
//! block 2 …      VDI slots, two copies each, taken in turn
//! data_start …   segments
//! ```
//!
//! All integers are little-endian. Every structure carries magic, CRC32C and its own place.

pub mod geometry;
pub mod legs;
pub mod record;
pub mod segment;
pub mod slot;
pub mod summary;
pub mod superblock;
#[cfg(test)]
mod tests;

pub use geometry::Geometry;
pub use legs::{LegSet, Membership, Voided};

use blockstore::crc::crc32c;
use blockstore::types::BLOCK_SIZE;

/// Version of everything on the cache device.
pub const VERSION: u32 = 1;

/// Why bytes are not the structure they were read as.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Never written, or something else.
    #[error("no {0} here")]
    Absent(&'static str),
    /// Written by a newer Ballast.
    #[error(
        "{what} has format version {found}, this ballast knows up to {known}; use the newer version"
    )]
    Version { what: &'static str, found: u32, known: u32 },
    /// The checksum does not match.
    #[error("{what} is damaged: CRC32C expected {expected:#010x}, found {found:#010x}")]
    Checksum { what: &'static str, expected: u32, found: u32 },
    /// A field that contradicts the rest.
    #[error("{what} is not valid: {why}")]
    Invalid { what: &'static str, why: &'static str },
}

/// Bytes that a block-sized structure starts with: magic and CRC32C of the block with this field zero.
const CRC_OFFSET: usize = 8;

/// Puts the checksum of a whole block into its CRC field.
fn seal_block(block: &mut [u8]) {
    block[CRC_OFFSET..CRC_OFFSET + 4].fill(0);
    let crc = crc32c(block);
    block[CRC_OFFSET..CRC_OFFSET + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Checks magic, CRC and version of a block-sized structure (version at byte 12).
fn open_block(block: &[u8], magic: [u8; 8], what: &'static str) -> Result<(), FormatError> {
    open_block_up_to(block, magic, what, VERSION)
}

/// As [`open_block`], of a structure that has had newer versions than the rest.
fn open_block_up_to(
    block: &[u8],
    magic: [u8; 8],
    what: &'static str,
    known: u32,
) -> Result<(), FormatError> {
    if block.len() != BLOCK_SIZE || block[..8] != magic {
        return Err(FormatError::Absent(what));
    }
    let expected = u32::from_le_bytes(block[8..12].try_into().expect("four bytes"));
    let mut copy = [0u8; BLOCK_SIZE];
    copy.copy_from_slice(block);
    copy[CRC_OFFSET..CRC_OFFSET + 4].fill(0);
    let found = crc32c(&copy);
    if expected != found {
        return Err(FormatError::Checksum { what, expected, found });
    }
    let version = u32::from_le_bytes(block[12..16].try_into().expect("four bytes"));
    if version > known || version == 0 {
        return Err(FormatError::Version { what, found: version, known });
    }
    Ok(())
}
