//! A file or block device as the shared device: what the kernel attached (iSCSI, Fibre Channel,
//! multipath), a local disk, or a plain file for tests, demos and single-host stores. The local cache
//! reads its legs through it too.
//!
//! * Reads, writes, flushes and discards go through one io_uring on a thread of its own, past the page
//!   cache where the file system allows that.
//! * Compare-and-write is atomic between all processes that use a file through a file system with
//!   OFD locks, and between all hosts of a SCSI disk that knows COMPARE AND WRITE. Any other block
//!   device has none and serves a single host.
//! * The kernel hides it when a disk it attached restarts. The epoch therefore rises only with an
//!   error that this process sees: such disks need a non-volatile write cache (or none).
//!
//! Crash behaviour: a completed write is durable after a completed flush. A write that was cut off
//! may be there in part, in whole sectors.

mod caw;
mod errno;
mod lock;
mod opening;
mod request;
mod ring;
mod sgio;
#[cfg(test)]
mod tests;

use super::{
    BlockDevice, CawOutcome, Device, DeviceError, DeviceErrorKind, DeviceInfo, OpenOptions,
};
use crate::buf::AlignedBuf;
use async_trait::async_trait;
use bytes::Bytes;
use caw::{CawError, CawWorker};
use request::Request;
use ring::Ring;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// An open file or block device. Dropping it waits up to two seconds for what is in flight; its locks
/// end when the last request has.
#[derive(Debug)]
pub struct FileDevice {
    info: DeviceInfo,
    ring: Ring,
    caw: Option<CawWorker>,
    shared: Arc<Shared>,
    read_only: bool,
    memory_align: usize,
}

/// What the device and its threads have in common. The file is closed, and its locks end, with the
/// last of them.
#[derive(Debug)]
struct Shared {
    file: File,
    epoch: AtomicU64,
    is_block_device: bool,
}

impl Shared {
    /// Raises the epoch if a failure leaves earlier writes in doubt: after a failed flush nobody
    /// knows what became of them, nor while the disk was away.
    fn note_failure(&self, error: &io::Error, is_flush: bool) {
        let kind = errno::kind_of(error, self.is_block_device);
        if is_flush || kind == DeviceErrorKind::Unreachable {
            self.raise_epoch();
        }
    }

    fn raise_epoch(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        lock::unlock_owner(&self.file);
    }
}

impl FileDevice {
    /// Opens once more, for I/O of another thread, a file that this process holds exclusively. As long as it is open,
    /// or requests sent through it are under way, nobody else becomes the file's owner, though this process may be dead.
    ///
    /// # Errors
    /// The system's.
    pub fn open_beside(path: &Path) -> io::Result<File> {
        let open = |flags| {
            File::options().read(true).write(true).custom_flags(flags | libc::O_CLOEXEC).open(path)
        };
        let file = match open(libc::O_DIRECT) {
            // The file system has no direct I/O.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => open(0)?,
            other => other?,
        };
        lock::lock_beside(&file)?;
        Ok(file)
    }

    /// Opens the file or block device at `path`. Blocks the thread; a hanging disk may take minutes.
    ///
    /// # Errors
    /// `Reserved` if another owner is in the way, `Unreachable` if a device node or what is behind it
    /// is missing, `OutOfRange` if its size is not the one asked for, `Unsupported` if it is neither
    /// a file nor a block device, or may not be opened.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Device, DeviceError> {
        let opened = opening::open(path, options)?;
        let info = DeviceInfo {
            url: format!("file:{}", path.display()),
            capacity: opened.capacity,
            logical_block: opened.logical_block,
            compare_and_write: opened.caw.is_some(),
            discard: opened.discard,
            discard_granularity: opened.discard_granularity,
            discard_alignment: opened.discard_alignment,
        };
        let no_thread = |e: io::Error| {
            let message = format!(
                "starting its I/O thread failed: {e}; io_uring must be allowed \
                 (sysctl kernel.io_uring_disabled, seccomp) and the limits of threads and open files \
                 must leave room"
            );
            info.error(DeviceErrorKind::Unsupported, "open", 0, 0, message)
        };
        let shared = Arc::new(Shared {
            file: opened.file,
            epoch: AtomicU64::new(0),
            is_block_device: opened.is_block_device,
        });
        let ring = Ring::start(Arc::clone(&shared)).map_err(no_thread)?;
        let caw = opened.caw.map(|method| CawWorker::start(Arc::clone(&shared), method));
        let caw = caw.transpose().map_err(no_thread)?;
        let (read_only, memory_align) = (options.read_only, opened.memory_align);
        Ok(Arc::new(Self { info, ring, caw, shared, read_only, memory_align }))
    }

    /// Runs a request on the ring and puts its failure into words.
    async fn submit(
        &self,
        operation: &'static str,
        offset: u64,
        len: u64,
        request: Request,
    ) -> Result<AlignedBuf, DeviceError> {
        let result = self.ring.submit(request).await;
        result.map_err(|e| self.failed(operation, offset, len, &e))
    }

    fn failed(
        &self,
        operation: &'static str,
        offset: u64,
        len: u64,
        error: &io::Error,
    ) -> DeviceError {
        let block_device = self.shared.is_block_device;
        let kind = errno::kind_of(error, block_device);
        let message = format!("{error}{}", errno::advice(kind, block_device));
        self.info.error(kind, operation, offset, len, message)
    }

    fn check_writable(
        &self,
        operation: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<(), DeviceError> {
        if !self.read_only {
            return Ok(());
        }
        let message = "it was opened to read only";
        Err(self.info.error(DeviceErrorKind::Unsupported, operation, offset, len, message))
    }
}

#[async_trait]
impl BlockDevice for FileDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    async fn read(&self, offset: u64, len: usize) -> Result<AlignedBuf, DeviceError> {
        self.info.check_range("read", offset, len as u64)?;
        if len == 0 {
            return Ok(AlignedBuf::zeroed(0));
        }
        self.submit("read", offset, len as u64, Request::read(offset, len)).await
    }

    async fn write(&self, offset: u64, data: Vec<Bytes>) -> Result<(), DeviceError> {
        let len = self.info.check_write(offset, &data)?;
        self.check_writable("write", offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let request = Request::write(offset, data, self.memory_align);
        self.submit("write", offset, len, request).await.map(drop)
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        if self.read_only {
            return Ok(());
        }
        self.submit("flush", 0, 0, Request::flush()).await.map(drop)
    }

    async fn compare_and_write(
        &self,
        offset: u64,
        expected: Bytes,
        new: Bytes,
    ) -> Result<CawOutcome, DeviceError> {
        const OPERATION: &str = "compare-and-write";
        let len = new.len() as u64;
        self.check_writable(OPERATION, offset, len)?;
        self.info.check_caw(offset, &expected, &new)?;
        let Some(worker) = &self.caw else {
            let message = "the device has no compare-and-write";
            return Err(self.info.error(
                DeviceErrorKind::Unsupported,
                OPERATION,
                offset,
                len,
                message,
            ));
        };
        worker.submit(offset, expected, new).await.map_err(|e| match e {
            CawError::Io(e) => self.failed(OPERATION, offset, len, &e),
            CawError::Scsi(e) => self.info.error(e.kind, OPERATION, offset, len, e.message),
        })
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        self.info.check_discard(offset, len)?;
        self.check_writable("discard", offset, len)?;
        if !self.info.discard {
            let message = "neither the file system nor the disk can discard";
            return Err(self.info.error(
                DeviceErrorKind::Unsupported,
                "discard",
                offset,
                len,
                message,
            ));
        }
        if len == 0 {
            return Ok(());
        }
        self.submit("discard", offset, len, Request::discard(offset, len)).await.map(drop)
    }

    fn epoch(&self) -> u64 {
        self.shared.epoch.load(Ordering::SeqCst)
    }
}
