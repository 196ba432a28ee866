//! What differs between two images, as it crosses the control socket.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// An image of a disk: one of its snapshots, or what is committed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageName {
    /// The disk: name or UUID.
    pub vdi: String,
    /// LSN or label; none: the disk as it is.
    #[serde(default)]
    pub snapshot: Option<String>,
}

/// Body of `snap diff`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiffRequest {
    /// What is compared with `to`.
    pub from: ImageName,
    /// See `from`.
    pub to: ImageName,
    /// From this byte of the disk on.
    #[serde(default)]
    pub offset: u64,
    /// At most so many ranges; 0: as many as a page has.
    #[serde(default)]
    pub limit: usize,
}

/// An image that was compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageAt {
    /// The disk.
    pub uuid: Uuid,
    /// It is the disk as of here.
    pub lsn: u64,
    /// Bytes.
    pub size: u64,
}

/// A range that differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// Bytes from the disk's start.
    pub offset: u64,
    /// Bytes, in whole blocks of 4 KiB.
    pub length: u64,
    /// All of it is zeros in the second image.
    pub zeros: bool,
}

/// Answer of `snap diff`: a page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diff {
    /// The first image.
    pub from: ImageAt,
    /// The second.
    pub to: ImageAt,
    /// What differs below the size of the second, in order.
    pub ranges: Vec<Changed>,
    /// Where the next page begins, in bytes; none: this is all.
    pub next: Option<u64>,
}
