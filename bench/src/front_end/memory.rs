//! Memory shared with a back end: one memfd, mapped once, passed over the socket by descriptor.
//!
//! Two views exist of the same bytes, this process's and the back end's, so nothing here hands out a
//! Rust reference that outlives the time in which the protocol gives the bytes to us.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use anyhow::{Context, Result, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// Guest physical address at which the region begins. Not zero, and not this process's address, so
/// that a back end which confuses the two address spaces fails at once.
pub const GUEST_BASE: u64 = 1 << 30;

/// A shared, zeroed, page-aligned memory region.
#[derive(Debug)]
pub struct SharedMemory {
    fd: OwnedFd,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the region is plain memory owned by this value; the pointer is valid until drop, and every
// access through it goes through `&self`/`&mut self` or atomics.
unsafe impl Send for SharedMemory {}

impl SharedMemory {
    /// Maps `len` bytes, rounded up to whole pages.
    ///
    /// # Errors
    /// When the kernel refuses the memory.
    pub fn new(len: usize) -> Result<Self> {
        let len = len.next_multiple_of(4096);
        ensure!(len > 0, "shared memory of no bytes");
        let fd = memfd_create(c"vhost-user-memory", MFdFlags::MFD_CLOEXEC)
            .context("create the memory file to share with the back end")?;
        nix::unistd::ftruncate(&fd, len as i64).context("size the shared memory")?;
        let length = std::num::NonZeroUsize::new(len).context("shared memory of no bytes")?;
        // SAFETY: a fresh shared mapping of a file of exactly this length, at an address of the
        // kernel's choice: it aliases nothing.
        let base = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED | MapFlags::MAP_POPULATE,
                &fd,
                0,
            )
        }
        .context("map the shared memory")?;
        Ok(Self { fd, base: base.cast(), len })
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: a region has at least one page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The file to pass to the back end.
    #[must_use]
    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Where byte `offset` lies for the guest's device driver (what descriptors hold).
    #[must_use]
    pub fn guest_address(&self, offset: usize) -> u64 {
        GUEST_BASE + offset as u64
    }

    /// Where byte `offset` lies in this process (what the ring addresses are given in).
    #[must_use]
    pub fn user_address(&self, offset: usize) -> u64 {
        self.base.as_ptr() as u64 + offset as u64
    }

    /// Pointer to `len` bytes at `offset`.
    ///
    /// # Panics
    /// When the range does not lie inside the region: offsets are computed here, never received.
    #[must_use]
    pub fn pointer(&self, offset: usize, len: usize) -> NonNull<u8> {
        let end = offset.checked_add(len).expect("offset overflows");
        assert!(end <= self.len, "range {offset}..{end} outside of {} shared bytes", self.len);
        // SAFETY: inside the mapping, as just asserted.
        unsafe { self.base.add(offset) }
    }

    /// Copies `bytes` to `offset`.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let target = self.pointer(offset, bytes.len());
        // SAFETY: the target range lies in the mapping and cannot overlap a private slice.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target.as_ptr(), bytes.len()) };
    }

    /// Reads the byte at `offset`, which the back end may have written.
    #[must_use]
    pub fn read_byte(&self, offset: usize) -> u8 {
        // SAFETY: inside the mapping; volatile because another process writes it.
        unsafe { self.pointer(offset, 1).as_ptr().read_volatile() }
    }

    /// The bytes at `offset` as a slice. The caller holds the range: no request that is in flight
    /// covers it.
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> &[u8] {
        // SAFETY: inside the mapping, initialised (a memfd is zeroed); per the contract above the
        // back end does not write it now.
        unsafe { std::slice::from_raw_parts(self.pointer(offset, len).as_ptr(), len) }
    }

    /// As [`Self::slice`], to fill a buffer before it is submitted.
    pub fn slice_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        // SAFETY: as for `slice`; `&mut self` excludes other slices of this process.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(offset, len).as_ptr(), len) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `new` mapped; no slice can outlive `self`.
        let unmapped = unsafe { munmap(self.base.cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "unmapping our own region cannot fail");
    }
}
