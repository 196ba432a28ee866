//! Bounds and alignment of requests, checked alike by every backend before anything is done.

use super::{DeviceError, DeviceErrorKind, DeviceInfo};
use crate::types::BLOCK_SIZE;
use bytes::Bytes;

/// Longest single request in bytes; keeps a length within what the kernel takes (`i32`) and turns a
/// damaged length field into an error instead of a huge allocation.
pub const REQUEST_LEN_MAX: u64 = 1 << 30;

impl DeviceInfo {
    /// A [`DeviceError`] on this device.
    #[must_use]
    pub fn error(
        &self,
        kind: DeviceErrorKind,
        operation: &'static str,
        offset: u64,
        len: u64,
        message: impl Into<String>,
    ) -> DeviceError {
        DeviceError {
            kind,
            device: self.url.clone(),
            operation,
            offset,
            len,
            message: message.into(),
        }
    }

    /// Refuses a range that is misaligned or not wholly on the device.
    ///
    /// # Errors
    /// Kind `OutOfRange`.
    pub fn check_range(
        &self,
        operation: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<(), DeviceError> {
        let refuse = |message: String| {
            Err(self.error(DeviceErrorKind::OutOfRange, operation, offset, len, message))
        };
        let block = BLOCK_SIZE as u64;
        if !offset.is_multiple_of(block) || !len.is_multiple_of(block) {
            return refuse(format!("offset and length must be multiples of {block} bytes"));
        }
        self.check_end(operation, offset, len)
    }

    /// Refuses a `discard` that is misaligned or not wholly on the device; its length is not limited.
    ///
    /// # Errors
    /// Kind `OutOfRange`.
    pub fn check_discard(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        let block = BLOCK_SIZE as u64;
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.capacity);
        if inside && offset.is_multiple_of(block) && len.is_multiple_of(block) {
            return Ok(());
        }
        let message = format!(
            "the range must be aligned to {block} bytes and end within the device's {} bytes",
            self.capacity
        );
        Err(self.error(DeviceErrorKind::OutOfRange, "discard", offset, len, message))
    }

    /// Refuses a write whose pieces or whole are misaligned or out of range; returns its length.
    ///
    /// # Errors
    /// Kind `OutOfRange`.
    pub fn check_write(&self, offset: u64, data: &[Bytes]) -> Result<u64, DeviceError> {
        let len = data.iter().map(|piece| piece.len() as u64).sum();
        self.check_range("write", offset, len)?;
        match data.iter().find(|piece| !piece.len().is_multiple_of(BLOCK_SIZE)) {
            None => Ok(len),
            Some(piece) => {
                let message = format!("a piece of {} bytes is not whole blocks", piece.len());
                Err(self.error(DeviceErrorKind::OutOfRange, "write", offset, len, message))
            }
        }
    }

    /// Refuses a compare-and-write that is not exactly one logical block on this device, or any at
    /// all if the device has none.
    ///
    /// # Errors
    /// Kinds `Unsupported` and `OutOfRange`.
    pub fn check_caw(&self, offset: u64, expected: &[u8], new: &[u8]) -> Result<(), DeviceError> {
        const OPERATION: &str = "compare-and-write";
        let block = u64::from(self.logical_block);
        if !self.compare_and_write {
            let message = "the device has no atomic compare-and-write: it can serve one host only, \
                           in a store formatted for a single host";
            return Err(self.error(
                DeviceErrorKind::Unsupported,
                OPERATION,
                offset,
                block,
                message,
            ));
        }
        let whole = expected.len() as u64 == block && new.len() as u64 == block;
        if !whole || !offset.is_multiple_of(block) {
            let message = format!("it must cover one logical block of {block} bytes");
            return Err(self.error(
                DeviceErrorKind::OutOfRange,
                OPERATION,
                offset,
                expected.len() as u64,
                message,
            ));
        }
        self.check_end(OPERATION, offset, block)
    }

    fn check_end(&self, operation: &'static str, offset: u64, len: u64) -> Result<(), DeviceError> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.capacity);
        if inside && len <= REQUEST_LEN_MAX {
            return Ok(());
        }
        let message = if inside {
            format!("longer than the {REQUEST_LEN_MAX} bytes that one request may have")
        } else {
            format!("ends beyond the device's {} bytes", self.capacity)
        };
        Err(self.error(DeviceErrorKind::OutOfRange, operation, offset, len, message))
    }
}
