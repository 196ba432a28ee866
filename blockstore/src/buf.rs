//! Block-aligned heap memory, as O_DIRECT wants it.

use crate::types::BLOCK_SIZE;
use bytes::Bytes;
use parking_lot::Mutex;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Large buffers are kept for reuse while those kept and those in use are at most so many bytes in all: their page faults
/// cost more than their copying.
const LARGE_BYTES_MAX: usize = 24 << 20;
/// Smallest buffer that is kept.
const KEPT_LEN_MIN: usize = 128 << 10;

/// Buffers kept for reuse.
static KEPT: Mutex<Kept> = Mutex::new(Kept { bytes: 0, buffers: Vec::new() });

struct Kept {
    /// Bytes of large buffers, kept or in use.
    bytes: usize,
    buffers: Vec<AlignedBuf>,
}

/// True if all of `bytes` are zero, with which most of a thin store's blocks begin and end.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Compared in whole vectors: byte by byte the compiler does not dare to look past the first that is not.
    let (vectors, rest) = bytes.as_chunks::<64>();
    vectors.iter().all(|vector| *vector == [0; 64]) && rest.iter().all(|&byte| byte == 0)
}

/// An owned, initialised byte buffer whose address is a multiple of 4096.
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    len: usize,
    /// Bytes allocated, at least `len`.
    capacity: usize,
    /// Made by [`Self::scratch`], to be kept for reuse.
    large: bool,
}

// SAFETY: AlignedBuf owns its memory exclusively, as Box<[u8]> does.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared references give only shared access to the bytes.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zero bytes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self { ptr: NonNull::dangling(), len, capacity: 0, large: false };
        }
        let layout = Self::layout(len);
        // SAFETY: the layout has a non-zero size.
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(raw) else { handle_alloc_error(layout) };
        Self { ptr, len, capacity: len, large: false }
    }

    /// `len` bytes of any content, for overwriting: large ones come from buffers used before.
    #[must_use]
    pub fn scratch(len: usize) -> Self {
        if len < KEPT_LEN_MIN {
            return Self::zeroed(len);
        }
        let capacity = len.next_power_of_two();
        let mut kept = KEPT.lock();
        let found = kept.buffers.iter().rposition(|buffer| buffer.capacity == capacity);
        let mut buffer = match found {
            Some(at) => kept.buffers.swap_remove(at),
            None => {
                kept.bytes += capacity;
                drop(kept);
                let mut buffer = Self::zeroed(capacity);
                buffer.large = true;
                buffer
            }
        };
        buffer.len = len;
        buffer
    }

    /// A copy of `bytes`.
    #[must_use]
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buf = Self::zeroed(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    /// Turns the buffer into shared, immutable [`Bytes`] without copying; the alignment is kept.
    #[must_use]
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, BLOCK_SIZE).expect("buffer length overflows isize")
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if self.capacity == 0 {
            return;
        }
        if self.large {
            let mut kept = KEPT.lock();
            if kept.bytes <= LARGE_BYTES_MAX {
                let (ptr, capacity) = (self.ptr, self.capacity);
                kept.buffers.push(Self { ptr, len: capacity, capacity, large: true });
                return;
            }
            kept.bytes -= self.capacity;
        }
        // SAFETY: allocated in `zeroed` with this very layout, freed once: a buffer that is kept moved on above.
        unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.capacity)) }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: ptr is valid for len initialised bytes (or dangling with len 0).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_zeroed_and_keep_their_address_when_frozen() {
        let mut buf = AlignedBuf::zeroed(3 * BLOCK_SIZE);
        assert!(is_zero(&buf));
        buf[5] = 7;
        let address = buf.as_ptr() as usize;
        assert_eq!(address % BLOCK_SIZE, 0);
        let frozen = buf.freeze();
        assert_eq!(frozen.as_ptr() as usize, address);
        assert_eq!(frozen[5], 7);
        assert!(AlignedBuf::zeroed(0).is_empty());
    }

    #[test]
    fn scratch_buffers_have_the_length_asked_for_and_never_overlap() {
        let mut held: Vec<AlignedBuf> = Vec::new();
        for round in 0..200usize {
            let len = (round * 37 % 90 + 1) * BLOCK_SIZE;
            let mut buf = AlignedBuf::scratch(len);
            assert_eq!(buf.len(), len);
            assert_eq!(buf.as_ptr() as usize % BLOCK_SIZE, 0);
            buf.fill(round as u8);
            held.push(buf);
            if held.len() > 6 {
                let old = held.remove(0);
                assert!(old.iter().all(|&b| b == old[0]));
            }
        }
    }
}
