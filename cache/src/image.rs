//! The RAM image of a segment while it is filled.
//!
//! A segment is composed in memory and written to the device piece by piece. The image is append-only: once a
//! range has been handed out by [`SegmentImage::slice`] or put into a write action it never changes again,
//! which is what makes sharing it with the kernel, the flusher and readers sound.

use blockstore::buf::AlignedBuf;
use bytes::Bytes;
use parking_lot::Mutex;
use std::cell::UnsafeCell;
use std::fmt;
use std::sync::{Arc, Weak};

/// Keeps the memory of a few retired images, so that a new segment costs no page faults.
#[derive(Debug)]
pub struct ImagePool {
    len: usize,
    keep: usize,
    free: Mutex<Vec<AlignedBuf>>,
}

impl ImagePool {
    /// A pool of images of `len` bytes that keeps at most `keep` of them while unused.
    #[must_use]
    pub fn new(len: usize, keep: usize) -> Arc<Self> {
        Arc::new(Self { len, keep, free: Mutex::new(Vec::new()) })
    }

    /// An image with arbitrary content.
    #[must_use]
    pub fn take(self: &Arc<Self>) -> Arc<SegmentImage> {
        let buf = self.free.lock().pop().unwrap_or_else(|| AlignedBuf::zeroed(self.len));
        SegmentImage::from_buf(buf, Arc::downgrade(self))
    }
}

/// Block-aligned memory of one segment. Written by the one [`Disk`](crate::disk::Disk) that owns the
/// segment, read by everyone else.
pub struct SegmentImage {
    bytes: UnsafeCell<AlignedBuf>,
    base: *mut u8,
    len: usize,
    home: Weak<ImagePool>,
}

// SAFETY: `base` points into the owned buffer; sharing follows the append-only rule above.
unsafe impl Send for SegmentImage {}
// SAFETY: writers touch only ranges that nobody else was given (see `writable`).
unsafe impl Sync for SegmentImage {}

impl Drop for SegmentImage {
    fn drop(&mut self) {
        if let Some(pool) = self.home.upgrade() {
            let buf = std::mem::replace(self.bytes.get_mut(), AlignedBuf::zeroed(0));
            let mut free = pool.free.lock();
            if free.len() < pool.keep {
                free.push(buf);
            }
        }
    }
}

impl SegmentImage {
    /// A zeroed image of `len` bytes.
    #[must_use]
    pub fn new(len: usize) -> Arc<Self> {
        Self::from_buf(AlignedBuf::zeroed(len), Weak::new())
    }

    fn from_buf(mut buf: AlignedBuf, home: Weak<ImagePool>) -> Arc<Self> {
        let base = buf.as_mut_ptr();
        let len = buf.len();
        Arc::new(Self { bytes: UnsafeCell::new(buf), base, len, home })
    }

    /// Bytes in the image.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for an image of no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of byte `start`, valid for `len` bytes as long as the image lives.
    ///
    /// # Panics
    /// If the range lies outside the image.
    #[must_use]
    pub fn as_ptr(&self, start: usize, len: usize) -> *const u8 {
        assert!(start <= self.len && len <= self.len - start, "range outside the segment image");
        // SAFETY: the range was just checked to lie inside the allocation.
        unsafe { self.base.add(start) }
    }

    /// The range as a slice. The caller must only name ranges that are complete.
    #[must_use]
    pub fn bytes(&self, start: usize, len: usize) -> &[u8] {
        let ptr = self.as_ptr(start, len);
        // SAFETY: in bounds and initialised; complete ranges are never written again.
        unsafe { std::slice::from_raw_parts(ptr, len) }
    }

    /// The range as shared bytes that keep the image alive.
    #[must_use]
    pub fn slice(self: &Arc<Self>, start: usize, len: usize) -> Bytes {
        assert!(start <= self.len && len <= self.len - start, "range outside the segment image");
        Bytes::from_owner(ImageSlice { image: Arc::clone(self), start, len })
    }

    /// The range for writing.
    ///
    /// # Safety
    /// The caller is the segment's one owner, and the range was never handed to anyone.
    #[allow(clippy::mut_from_ref)] // the image is filled through shared references by design
    pub(crate) unsafe fn writable(&self, start: usize, len: usize) -> &mut [u8] {
        assert!(start <= self.len && len <= self.len - start, "range outside the segment image");
        // SAFETY: in bounds; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start), len) }
    }
}

impl fmt::Debug for SegmentImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SegmentImage({} bytes)", self.len)
    }
}

struct ImageSlice {
    image: Arc<SegmentImage>,
    start: usize,
    len: usize,
}

impl AsRef<[u8]> for ImageSlice {
    fn as_ref(&self) -> &[u8] {
        self.image.bytes(self.start, self.len)
    }
}
