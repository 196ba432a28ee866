//! An entry of a disk's snapshot tree: one snapshot.
//!
//! ```text
//! 0     state      1: a snapshot; all zero: none, or deleted
//! 1     height     levels of the tree under `root`
//! 2     bytes of the label
//! 3..8  zero
//! 8     root       pointer
//! 24    size       bytes
//! 32    birth      the disk's counter when it was cut
//! 40    LSN
//! 48    time       milliseconds since 1970
//! 56    zero
//! 64    label      UTF-8, zero-padded
//! ```
//! 32 entries fill a leaf; the leaf's checksum is in the pointer to it.

use crate::buf::is_zero;
use crate::format::head::Damage;
use crate::format::node::{HEIGHT_MAX, NODE_SHIFT, tree_span};
use crate::format::pointer::{POINTER_SIZE, Pointer};
use crate::format::text;
use crate::format::vdi::{COMMITTED_LSN_MAX, VDI_SIZE_MAX};
use crate::types::{BLOCK_SIZE, Birth, Lsn};
use serde::{Deserialize, Serialize};
use std::fmt;
use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of an entry.
pub const SNAPSHOT_SIZE: usize = 128;
/// Entries of a leaf.
pub const LEAF_SNAPSHOTS: u64 = (BLOCK_SIZE / SNAPSHOT_SIZE) as u64;
/// Tallest tree of snapshots: more than anyone makes.
pub const SNAPSHOTS_HEIGHT_MAX: u8 = 5;
/// Longest label, in bytes.
pub const LABEL_MAX: usize = 64;

/// Snapshots that a tree of `height` levels has places for.
#[must_use]
pub const fn snapshots_span(height: u8) -> u64 {
    match height {
        0 => 0,
        _ => LEAF_SNAPSHOTS << (NODE_SHIFT * (height as u32 - 1)),
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    state: u8,
    height: u8,
    label_len: u8,
    reserved: [u8; 5],
    root: [u8; POINTER_SIZE],
    size_bytes: U64,
    birth: U64,
    lsn: U64,
    time_ms: U64,
    reserved_b: U64,
    label: [u8; LABEL_MAX],
}

const _: () = assert!(size_of::<Raw>() == SNAPSHOT_SIZE);

/// A snapshot's label: at most [`LABEL_MAX`] bytes of UTF-8 without control characters that is no
/// number; may be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotLabel(String);

impl SnapshotLabel {
    /// Checks a label.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn new(label: impl Into<String>) -> Result<Self, String> {
        let label = label.into();
        if label.len() > LABEL_MAX {
            let long = label.len();
            return Err(format!("a label may have {LABEL_MAX} bytes, this one has {long}"));
        }
        if label.parse::<u64>().is_ok() {
            return Err(format!(
                "the label '{label}' is a number, as the LSNs are that name snapshots: choose another"
            ));
        }
        if label.chars().any(char::is_control) {
            return Err("a label may not have control characters".into());
        }
        Ok(Self(label))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SnapshotLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for SnapshotLabel {
    type Error = String;

    fn try_from(label: String) -> Result<Self, String> {
        Self::new(label)
    }
}

impl From<SnapshotLabel> for String {
    fn from(label: SnapshotLabel) -> Self {
        label.0
    }
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its point in the guest's write order: its name.
    pub lsn: Lsn,
    /// When it was asked for, milliseconds since 1970.
    pub time_ms: u64,
    /// For people.
    pub label: SnapshotLabel,
    /// Root of its tree.
    pub root: Pointer,
    /// Levels of the tree.
    pub height: u8,
    /// Bytes of the disk then.
    pub size_bytes: u64,
    /// The disk's counter then: all of its tree was born at or before it.
    pub birth: Birth,
}

impl Snapshot {
    /// The entry's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; SNAPSHOT_SIZE] {
        let mut label = [0; LABEL_MAX];
        let label_len = crate::format::fill_text(&mut label, self.label.as_str());
        let raw = Raw {
            state: 1,
            height: self.height,
            label_len: label_len as u8,
            reserved: [0; 5],
            root: self.root.encode(),
            size_bytes: U64::new(self.size_bytes),
            birth: U64::new(self.birth.0),
            lsn: U64::new(self.lsn.0),
            time_ms: U64::new(self.time_ms),
            reserved_b: U64::ZERO,
            label,
        };
        zerocopy::transmute!(raw)
    }

    /// Reads an entry; none for one that holds no snapshot.
    ///
    /// # Errors
    /// Names the field that no entry ever has like that.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>, Damage> {
        let raw = Raw::ref_from_bytes(bytes).map_err(|_| Damage::Short)?;
        match raw.state {
            0 if is_zero(bytes) => return Ok(None),
            1 => {}
            _ => return Err(Damage::Field("snapshot state")),
        }
        if raw.reserved != [0; 5] || raw.reserved_b.get() != 0 {
            return Err(Damage::Field("snapshot reserved"));
        }
        let size_bytes = raw.size_bytes.get();
        let height = raw.height;
        if !(1..=HEIGHT_MAX).contains(&height)
            || size_bytes == 0
            || !size_bytes.is_multiple_of(BLOCK_SIZE as u64)
            || size_bytes > VDI_SIZE_MAX
            || size_bytes / BLOCK_SIZE as u64 > tree_span(height)
        {
            return Err(Damage::Field("snapshot size"));
        }
        if raw.lsn.get() > COMMITTED_LSN_MAX {
            return Err(Damage::Field("snapshot LSN"));
        }
        let root = Pointer::decode(raw.root)?;
        if raw.birth.get() >> 48 != 0 || root.birth.0 > raw.birth.get() {
            return Err(Damage::Field("snapshot birth"));
        }
        let label = text(&raw.label, raw.label_len.into(), "snapshot label")?;
        Ok(Some(Self {
            lsn: Lsn(raw.lsn.get()),
            time_ms: raw.time_ms.get(),
            label: SnapshotLabel::new(label).map_err(|_| Damage::Field("snapshot label"))?,
            root,
            height,
            size_bytes,
            birth: Birth(raw.birth.get()),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Gba;
    use proptest::prelude::*;

    fn snapshot() -> Snapshot {
        Snapshot {
            lsn: Lsn(77),
            time_ms: 1_700_000_000_000,
            label: SnapshotLabel::new("vor dem Umbau").unwrap(),
            root: Pointer { gba: Gba(9), read_only: false, birth: Birth(4), crc: 5 },
            height: 2,
            size_bytes: 1 << 20,
            birth: Birth(6),
        }
    }

    #[test]
    fn an_entry_is_read_as_it_was_written() {
        let bytes = snapshot().encode();
        assert_eq!(Snapshot::decode(&bytes), Ok(Some(snapshot())));
        assert_eq!(Snapshot::decode(&[0; SNAPSHOT_SIZE]), Ok(None));
        assert_eq!(crate::crc::crc32c(&bytes), 0xd590_f1cb);
        let longest = "ß".repeat(LABEL_MAX / 2);
        let label = SnapshotLabel::new(longest).unwrap();
        let bytes = Snapshot { label: label.clone(), ..snapshot() }.encode();
        assert_eq!(Snapshot::decode(&bytes).unwrap().unwrap().label, label);
    }

    #[test]
    fn labels_that_do_not_fit_are_refused() {
        assert!(SnapshotLabel::new("x".repeat(LABEL_MAX + 1)).is_err());
        assert!(SnapshotLabel::new("two\nlines").is_err());
        assert!(SnapshotLabel::new("1834").is_err(), "it would pass for an LSN");
        assert!(SnapshotLabel::new("").is_ok());
    }

    proptest! {
        #[test]
        fn garbage_is_judged_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Snapshot::decode(&bytes);
        }
    }
}
