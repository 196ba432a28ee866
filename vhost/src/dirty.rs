//! The dirty log: a bitmap in the front end's shared memory that tells it which pages of its guest we wrote to
//! (vhost-user, "Migration"). One bit per 4 KiB of guest physical address space.
//!
//! A page is marked after it was written: data and status before the used index is raised over them, the used ring
//! right after. The front end clears a bit, then copies the page: so whatever it copies too early, it copies again. When
//! a ring has stopped, all that was written on its behalf is marked.
//!
//! Nothing in the log is trusted or even read. Addresses beyond its end are left out: the front end made it too short.

use crate::sigbus::Guard;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU8, Ordering};
use vm_memory::{FileOffset, MmapRegion};

/// Bytes of guest memory that a bit stands for.
const PAGE: u64 = 4096;
/// A log for 16 TiB of guest addresses.
const LEN_MAX: u64 = 512 << 20;

/// A mapped log.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    /// Before the mapping, so that it goes first.
    _guard: Guard,
    mapping: MmapRegion,
}

impl DirtyLog {
    /// Maps `len` bytes at `offset` of a file that the front end gave.
    pub(crate) fn map(file: File, offset: u64, len: u64) -> io::Result<Self> {
        let end = offset.checked_add(len);
        let size = file.metadata()?.size();
        if len == 0 || len > LEN_MAX || end.is_none_or(|end| end > size) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("dirty log of {len} bytes at {offset} of a file of {size} bytes"),
            ));
        }
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), len as usize)
            .map_err(io::Error::other)?;
        let guard = Guard::new(mapping.as_ptr(), mapping.size())?;
        Ok(Self { _guard: guard, mapping })
    }

    /// `len` bytes at guest physical address `address` were written.
    pub(crate) fn mark(&self, address: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|more| address.checked_add(more)) else {
            return;
        };
        for page in address / PAGE..=last / PAGE {
            let at = page / 8;
            if at >= self.mapping.size() as u64 {
                return;
            }
            // SAFETY: inside the mapping, as just checked; both sides access it atomically.
            let byte = unsafe { AtomicU8::from_ptr(self.mapping.as_ptr().add(at as usize)) };
            // The mark may be seen only after what it stands for.
            byte.fetch_or(1 << (page % 8), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn every_page_that_a_range_touches_is_marked_and_no_other() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let log = DirtyLog::map(file.try_clone().unwrap(), 4096, 4096).unwrap();
        log.mark(4095, 1);
        log.mark(3 * PAGE - 1, 2);
        log.mark(9 * PAGE, 2 * PAGE);
        log.mark(20 * PAGE, 0);
        // The last page of the log, those behind it, and the end of all addresses.
        log.mark(4096 * 8 * PAGE - 1, 5 * PAGE);
        log.mark(u64::MAX, 1);
        log.mark(u64::MAX, 2);
        let mut bytes = vec![0; 8192];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let mut expected = vec![0; 8192];
        (expected[4096], expected[4097], expected[8191]) = (0b1101, 0b110, 0x80);
        assert!(bytes == expected, "{:?}", &bytes[4096..4100]);
    }

    #[test]
    fn logs_that_do_not_fit_their_file_are_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        for (offset, len) in [(0, 0), (0, 8193), (4096, 4097), (u64::MAX, 4096), (0, u64::MAX)] {
            assert!(DirtyLog::map(file.try_clone().unwrap(), offset, len).is_err());
        }
    }
}
