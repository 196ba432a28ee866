//! Locks on byte ranges of an open file, far beyond its data. They belong to the open file (OFD
//! locks), so two opens in one process exclude each other too, and the kernel releases them when the
//! last descriptor is closed, however the process ends.
//!
//! The byte [`OWNER_BYTE`] says who may write: every writer holds it shared, an exclusive owner alone. An owner's other
//! opens of the same file hold [`BESIDE_BYTE`] shared, and nobody becomes the exclusive owner while any does: io_uring
//! keeps a file, and its locks, until its last request is done, so what a killed process had sent cannot land later.
//! From [`CAW_BASE`] on, each byte of the device has a lock that serialises compare-and-writes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Held by everyone who opened the file for writing.
const OWNER_BYTE: i64 = 1 << 61;
/// Held by the owner's other opens.
const BESIDE_BYTE: i64 = OWNER_BYTE + 1;
/// Offset of the locks that cover compare-and-writes.
const CAW_BASE: i64 = 1 << 62;

/// Takes the right to write, alone (`exclusive`) or beside other shared writers.
///
/// # Errors
/// `WouldBlock` if another open file's lock is in the way; otherwise what fcntl reports.
pub(super) fn lock_owner(file: &File, exclusive: bool) -> io::Result<()> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    try_lock(file, kind, OWNER_BYTE)?;
    if exclusive && let Err(e) = try_lock(file, libc::F_WRLCK, BESIDE_BYTE) {
        unlock_owner(file);
        return Err(e);
    }
    if exclusive {
        // Only to see that nobody is left: the owner's own opens come now.
        set_lock(file, libc::F_OFD_SETLK, libc::F_UNLCK, BESIDE_BYTE, 1)?;
    }
    Ok(())
}

/// Marks one more open of the owner's file, until it is closed.
///
/// # Errors
/// What fcntl reports.
pub(super) fn lock_beside(file: &File) -> io::Result<()> {
    try_lock(file, libc::F_RDLCK, BESIDE_BYTE)
}

fn try_lock(file: &File, kind: i32, byte: i64) -> io::Result<()> {
    match set_lock(file, libc::F_OFD_SETLK, kind, byte, 1) {
        Err(e) if e.raw_os_error() == Some(libc::EACCES) => {
            Err(io::Error::from_raw_os_error(libc::EAGAIN))
        }
        other => other,
    }
}

/// Gives up what [`lock_owner`] took. Closing the file does so too, but only once the kernel has let go
/// of it.
pub(super) fn unlock_owner(file: &File) {
    if let Err(e) = set_lock(file, libc::F_OFD_SETLK, libc::F_UNLCK, OWNER_BYTE, 1) {
        tracing::warn!("releasing the lock against other agents failed: {e}");
    }
}

/// Who keeps [`lock_owner`] from succeeding, as words for a message; None if nobody does any more.
pub(super) fn describe_owner(file: &File, exclusive: bool) -> Option<&'static str> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    let mut lock = flock(kind, OWNER_BYTE, 1);
    // SAFETY: the descriptor is open and `lock` is a valid flock that the kernel fills.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) };
    if result != 0 {
        return Some("another process has it open");
    }
    match i32::from(lock.l_type) {
        libc::F_UNLCK => None,
        libc::F_WRLCK => Some("another process holds it exclusively"),
        _ => Some("another process has it open for writing"),
    }
}

/// The lock under which one compare-and-write reads and writes; released on drop.
pub(super) struct CawLock<'a> {
    file: &'a File,
    start: i64,
    len: i64,
}

impl<'a> CawLock<'a> {
    /// Waits for the lock on `len` bytes at `offset`; blocks the thread.
    ///
    /// # Errors
    /// What fcntl reports (`ENOLCK` on a file system without locks).
    pub(super) fn acquire(file: &'a File, offset: u64, len: u64) -> io::Result<Self> {
        let range = i64::try_from(offset).ok().zip(i64::try_from(len).ok());
        let range = range.and_then(|(offset, len)| Some((CAW_BASE.checked_add(offset)?, len)));
        let Some((start, len)) = range else {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        };
        loop {
            match set_lock(file, libc::F_OFD_SETLKW, libc::F_WRLCK, start, len) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map(|()| Self { file, start, len }),
            }
        }
    }
}

impl Drop for CawLock<'_> {
    fn drop(&mut self) {
        // Unlocking a range of an open descriptor fails only for lack of memory; the lock then ends
        // with the descriptor.
        if let Err(e) = set_lock(self.file, libc::F_OFD_SETLK, libc::F_UNLCK, self.start, self.len)
        {
            tracing::warn!("releasing a compare-and-write lock failed: {e}");
        }
    }
}

fn flock(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

fn set_lock(file: &File, command: i32, kind: i32, start: i64, len: i64) -> io::Result<()> {
    let lock = flock(kind, start, len);
    // SAFETY: the descriptor is open and `lock` is a valid flock that the kernel only reads.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
