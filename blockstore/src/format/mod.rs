//! The on-disk format: encode, decode, validate. Pure; no I/O.
//!
//! Every structure is a raw `zerocopy` struct with explicit little-endian fields whose size and
//! offsets are asserted at compile time; `decode` functions check it and turn it into a domain type.
//! Only those leave this module. The byte diagrams are in docs/on-disk-format.md, section "Shared
//! store"; the golden-byte tests here make any change of the format loud.

pub mod bitmap;
pub mod extent;
pub mod gc;
pub mod geometry;
pub mod head;
pub mod host;
pub mod meta;
pub mod node;
pub mod pointer;
pub mod snapshot;
pub mod superblock;
pub mod vdi;

#[cfg(test)]
mod golden;

use crate::format::head::Damage;
use uuid::Uuid;

/// Version of the whole format, as the superblock states it.
pub const FORMAT_VERSION: u16 = 1;

/// `None` for the nil UUID, which stands for "nobody" on disk.
fn optional_uuid(bytes: [u8; 16]) -> Option<Uuid> {
    let uuid = Uuid::from_bytes(bytes);
    (!uuid.is_nil()).then_some(uuid)
}

/// The bytes of a UUID, all zero for `None`.
fn uuid_bytes(uuid: Option<Uuid>) -> [u8; 16] {
    uuid.unwrap_or_default().into_bytes()
}

/// Decodes a length-prefixed, zero-padded text field.
fn text(bytes: &[u8], len: usize, field: &'static str) -> Result<String, Damage> {
    let used = bytes.get(..len).ok_or(Damage::Field(field))?;
    if bytes[len..].iter().any(|&b| b != 0) {
        return Err(Damage::Field(field));
    }
    String::from_utf8(used.to_vec()).map_err(|_| Damage::Field(field))
}

/// Copies `text` into a zero-padded field, cut at a character boundary if it is too long; returns
/// the length used.
pub fn fill_text(field: &mut [u8], text: &str) -> u16 {
    let mut len = text.len().min(field.len());
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    field[..len].copy_from_slice(&text.as_bytes()[..len]);
    len as u16
}
