//! The shared block device: what the store needs of it, and its backends.
//!
//! All offsets and lengths are bytes and multiples of 4096. Buffers are owned while an operation is
//! under way, because io_uring and libiscsi keep using them after a caller's future was dropped.

mod check;
#[cfg(any(test, feature = "sim"))]
pub mod conformance;
pub mod file;
#[cfg(feature = "iscsi")]
pub mod iscsi;
mod open;
#[cfg(any(test, feature = "sim"))]
pub mod sim;

pub use open::{OpenOptions, URL_FORMS, open};

use crate::buf::AlignedBuf;
use async_trait::async_trait;
use bytes::Bytes;
use std::fmt;
use std::sync::Arc;

/// A shared block device behind any backend.
pub type Device = Arc<dyn BlockDevice>;

/// What a device said of itself, or showed when probed, when it was opened.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// The URL it was opened by, without secrets; names the device in messages.
    pub url: String,
    /// Bytes.
    pub capacity: u64,
    /// Bytes of a logical block: 512 or 4096. Compare-and-write covers one of these.
    pub logical_block: u32,
    /// Atomic compare-and-write was tried on this device and works.
    pub compare_and_write: bool,
    /// Discard (hole punching, UNMAP) was tried or is promised by the backend.
    pub discard: bool,
    /// Bytes that a discard gives back together, a multiple of 4096: a smaller one, or the ends of one that is not aligned to
    /// it, may do nothing.
    pub discard_granularity: u64,
    /// Bytes from the device's start to where the first such piece begins, below the granularity.
    pub discard_alignment: u64,
}

/// Outcome of a compare-and-write that the device carried out.
#[derive(Debug, PartialEq, Eq)]
pub enum CawOutcome {
    /// The device held `expected` and now holds `new`.
    Written,
    /// The device held something else, which is returned if the device told; nothing was written.
    Miscompare,
}

/// Asynchronous access to a device that other hosts may share.
#[async_trait]
pub trait BlockDevice: Send + Sync + fmt::Debug {
    /// Facts established when the device was opened.
    fn info(&self) -> &DeviceInfo;

    /// Reads `len` bytes at `offset`.
    async fn read(&self, offset: u64, len: usize) -> Result<AlignedBuf, DeviceError>;

    /// Writes the concatenation of `data` at `offset`. Each piece is a multiple of 4096 bytes long; pieces
    /// whose address is not a multiple of 512 are copied. Durable only after a later [`flush`](Self::flush).
    async fn write(&self, offset: u64, data: Vec<Bytes>) -> Result<(), DeviceError>;

    /// Makes every write that completed before the call durable.
    async fn flush(&self) -> Result<(), DeviceError>;

    /// Atomically replaces one logical block. `expected` and `new` are `logical_block` bytes long
    /// and `offset` is a multiple of it. Durable only after a later flush.
    async fn compare_and_write(
        &self,
        offset: u64,
        expected: Bytes,
        new: Bytes,
    ) -> Result<CawOutcome, DeviceError>;

    /// Tells the device that the range's content is no longer needed. Reads of it may return anything.
    async fn discard(&self, offset: u64, len: u64) -> Result<(), DeviceError>;

    /// Rises whenever writes that completed but were not flushed may have been lost (session loss,
    /// target restart). A batch whose first write and whose flush saw different epochs must be
    /// written again (rule C1).
    fn epoch(&self) -> u64;
}

/// Why a device operation failed, for the caller to branch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceErrorKind {
    /// The device cannot be reached, or the command was cut off: retry later. The outcome of a write
    /// or compare-and-write is unknown until the device answers again; by the time this error is
    /// returned the backend guarantees that the old command can no longer land (session reinstated),
    /// or the device stays unreachable.
    Unreachable,
    /// Out of space on the device (thin-provisioned LUN, full file system): retry later.
    NoSpace,
    /// The device reports a media or other lasting error.
    Io,
    /// The request lies outside the device or is misaligned: a bug or a damaged structure.
    OutOfRange,
    /// The device cannot do this at all.
    Unsupported,
    /// Another owner holds the device exclusively.
    Reserved,
}

/// A failed device operation with its context.
#[derive(Debug, thiserror::Error)]
#[error("{device}: {operation}{}: {message}", DisplayRange(*offset, *len))]
pub struct DeviceError {
    /// What callers branch on.
    pub kind: DeviceErrorKind,
    /// URL of the device.
    pub device: String,
    /// `read`, `write`, `flush`, `compare-and-write`, `discard`, `open`.
    pub operation: &'static str,
    /// Bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// What went wrong and, where it helps, what to do next.
    pub message: String,
}

/// The range of an operation in a message; nothing for one that has none.
struct DisplayRange(u64, u64);

impl fmt::Display for DisplayRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(offset, len) = self;
        if (*offset, *len) == (0, 0) {
            return Ok(());
        }
        write!(f, " of {len} bytes at offset {offset}")
    }
}

impl DeviceError {
    /// True if the same operation may succeed later without anyone's doing.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self.kind, DeviceErrorKind::Unreachable | DeviceErrorKind::NoSpace)
    }
}
