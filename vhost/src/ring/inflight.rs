//! The inflight region: which requests were taken and not given back, kept in memory that the front end holds, so that
//! it survives this process (vhost-user, "Inflight I/O tracking", split rings).
//!
//! ```text
//! per queue, 64-byte aligned:
//!   0  u64 features   8  u16 version   10 u16 desc_num   12 u16 last_batch_head   14 u16 used_idx
//!  16  desc_num entries of 16 bytes: 0 u8 inflight   6 u16 next   8 u64 counter
//! behind the last queue, ours alone, 64 bytes:
//!   0  u64 magic   8  u8 write cache off
//! ```
//!
//! Taking a chain: counter, then inflight = 1. Giving chains back: each is linked into the batch (`next` = former
//! `last_batch_head`); then the used index is published; then each loses its mark; then `used_idx` follows. Death
//! between any two stores leaves one of two states: `used_idx` equals the ring's used index, and the marks are true; or
//! it does not, and the marks of the last batch, which the list finds, are to be taken back.
//!
//! The last part is room that we ask for beyond what the queues need. It carries the driver's choice of the write cache
//! over to the next process: a guest that switched it off counts on that, and its front end does not say it again.
//!
//! Nothing in the region is trusted: indexes are bounded, lists are followed for as many steps as there are entries.
//! It covers the death of this process, not of the host; replayed writes are simply written once more.

use super::may_die;
use crate::sigbus::Guard;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use vm_memory::{FileOffset, MmapRegion};

const HEADER: usize = 16;
const ENTRY: usize = 16;
const VERSION: u16 = 1;
const OWN_PART: usize = 64;
const OWN_MAGIC: u64 = u64::from_le_bytes(*b"BALLASTw");

/// A mapped region for several queues of one size.
#[derive(Debug)]
pub(crate) struct InflightRegion {
    /// Before the mapping, so that it goes first.
    _guard: Guard,
    mapping: MmapRegion,
    queues: u16,
    queue_size: u16,
    /// Our own part is there.
    own: bool,
}

/// Bytes of one queue's part.
fn part_len(queue_size: u16) -> usize {
    (HEADER + ENTRY * usize::from(queue_size)).next_multiple_of(64)
}

impl InflightRegion {
    /// Bytes that we ask for, for `queues` queues of `queue_size` entries.
    pub(crate) fn len(queues: u16, queue_size: u16) -> usize {
        part_len(queue_size) * usize::from(queues) + OWN_PART
    }

    /// A new region, all zeros, and the file to hand to the front end. It cannot be shortened under us.
    pub(crate) fn create(queues: u16, queue_size: u16) -> io::Result<(Self, File)> {
        // SAFETY: a plain system call with a literal name.
        let fd = unsafe {
            let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
            libc::memfd_create(c"ballast-inflight".as_ptr(), flags)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        let len = Self::len(queues, queue_size) as u64;
        file.set_len(len)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: a plain system call on a descriptor that is open.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let region = Self::map(file.try_clone()?, 0, len, queues, queue_size)?;
        region.word(0).store(OWN_MAGIC.to_le(), Ordering::Release);
        Ok((Self { own: true, ..region }, file))
    }

    /// Maps `len` bytes at `offset` of a file that the front end kept.
    pub(crate) fn map(
        file: File,
        offset: u64,
        len: u64,
        queues: u16,
        queue_size: u16,
    ) -> io::Result<Self> {
        let full = Self::len(queues, queue_size) as u64;
        let needed = full - OWN_PART as u64;
        let end = offset.checked_add(len);
        if len < needed || end.is_none_or(|end| file.metadata().is_ok_and(|m| end > m.size())) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "inflight region of {len} bytes at {offset} is shorter than {needed} bytes or its file"
                ),
            ));
        }
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), len.min(full) as usize)
            .map_err(io::Error::other)?;
        let guard = Guard::new(mapping.as_ptr(), mapping.size())?;
        let mut region = Self { _guard: guard, mapping, queues, queue_size, own: false };
        region.own =
            len >= full && u64::from_le(region.word(0).load(Ordering::Acquire)) == OWN_MAGIC;
        Ok(region)
    }

    /// The write cache as the driver left it, if that is known.
    pub(crate) fn write_cache(&self) -> Option<bool> {
        self.own.then(|| self.word(8).load(Ordering::Relaxed) == 0)
    }

    /// Remembers the driver's choice.
    pub(crate) fn set_write_cache(&self, on: bool) {
        if self.own {
            self.word(8).store(u64::from(!on).to_le(), Ordering::Release);
        }
    }

    /// A word of our own part.
    fn word(&self, at: usize) -> &AtomicU64 {
        let start = part_len(self.queue_size) * usize::from(self.queues);
        assert!(start + at + 8 <= self.mapping.size(), "only asked for where it is mapped");
        // SAFETY: inside the mapping, as just checked, and aligned: parts are multiples of 64 bytes long.
        unsafe { AtomicU64::from_ptr(self.mapping.as_ptr().add(start + at).cast()) }
    }
}

/// One queue's part of a region, in use by a ring.
#[derive(Debug)]
pub(crate) struct InflightQueue {
    /// Keeps the mapping.
    _region: Arc<InflightRegion>,
    base: *mut u8,
    entries: u16,
    counter: u64,
    /// Heads of the batch that is being given back.
    batch: Vec<u16>,
}

impl InflightQueue {
    /// The part of `queue`, if the region has one and it is large enough for a ring of `size` entries.
    pub(crate) fn attach(region: &Arc<InflightRegion>, queue: u16, size: u16) -> Option<Self> {
        if queue >= region.queues || size > region.queue_size {
            return None;
        }
        let base =
            region.mapping.as_ptr().wrapping_add(part_len(region.queue_size) * usize::from(queue));
        Some(Self {
            _region: Arc::clone(region),
            base,
            entries: size,
            counter: 0,
            batch: Vec::with_capacity(usize::from(size)),
        })
    }

    /// Brings the part in line with the ring's used index and tells which requests are to be served again, oldest first.
    pub(crate) fn recover(&mut self, used_index: u16) -> Vec<u16> {
        if self.version().load(Ordering::Acquire) == 0 {
            for head in 0..self.entries {
                self.mark(head).store(0, Ordering::Relaxed);
            }
            self.desc_num().store(self.entries, Ordering::Relaxed);
            self.used_index().store(used_index, Ordering::Release);
            may_die();
            self.version().store(VERSION, Ordering::Release);
            return Vec::new();
        }
        let last_batch = used_index.wrapping_sub(self.used_index().load(Ordering::Acquire));
        let mut head = self.last_batch_head().load(Ordering::Relaxed);
        for _ in 0..last_batch.min(self.entries) {
            if head >= self.entries {
                break;
            }
            self.mark(head).store(0, Ordering::Relaxed);
            may_die();
            head = self.next(head).load(Ordering::Relaxed);
        }
        self.used_index().store(used_index, Ordering::Release);
        let marked = (0..self.entries).filter(|&head| self.mark(head).load(Ordering::Relaxed) == 1);
        let mut heads: Vec<(u64, u16)> =
            marked.map(|head| (self.count(head).load(Ordering::Relaxed), head)).collect();
        heads.sort_unstable();
        self.counter = heads.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        heads.into_iter().map(|(_, head)| head).collect()
    }

    /// A chain was taken.
    pub(crate) fn taken(&mut self, head: u16) {
        self.count(head).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        may_die();
        self.mark(head).store(1, Ordering::Release);
        may_die();
    }

    /// A chain will be given back with the next batch.
    pub(crate) fn link(&mut self, head: u16) {
        let before = self.last_batch_head().load(Ordering::Relaxed);
        self.next(head).store(before, Ordering::Relaxed);
        may_die();
        self.last_batch_head().store(head, Ordering::Release);
        self.batch.push(head);
    }

    /// The batch was published: the ring's used index is `used_index`.
    pub(crate) fn published(&mut self, used_index: u16) {
        for at in 0..self.batch.len() {
            self.mark(self.batch[at]).store(0, Ordering::Release);
            may_die();
        }
        self.batch.clear();
        self.used_index().store(used_index, Ordering::Release);
    }

    fn version(&self) -> &AtomicU16 {
        self.word(8)
    }

    fn desc_num(&self) -> &AtomicU16 {
        self.word(10)
    }

    fn last_batch_head(&self) -> &AtomicU16 {
        self.word(12)
    }

    fn used_index(&self) -> &AtomicU16 {
        self.word(14)
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.word(self.entry(head) + 6)
    }

    fn entry(&self, head: u16) -> usize {
        assert!(head < self.entries, "heads are checked when they are taken");
        HEADER + ENTRY * usize::from(head)
    }

    fn mark(&self, head: u16) -> &AtomicU8 {
        // SAFETY: inside this queue's part, which the region keeps mapped; both sides access it atomically.
        unsafe { AtomicU8::from_ptr(self.base.add(self.entry(head))) }
    }

    fn count(&self, head: u16) -> &AtomicU64 {
        // SAFETY: as in `mark`; parts are 64-byte aligned inside a page-aligned mapping, and 8 divides the offset.
        unsafe { AtomicU64::from_ptr(self.base.add(self.entry(head) + 8).cast()) }
    }

    fn word(&self, at: usize) -> &AtomicU16 {
        // SAFETY: as in `mark`; `at` is even and inside the part.
        unsafe { AtomicU16::from_ptr(self.base.add(at).cast()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u16 = 8;

    fn region() -> Arc<InflightRegion> {
        Arc::new(InflightRegion::create(2, SIZE).unwrap().0)
    }

    fn attach(region: &Arc<InflightRegion>) -> InflightQueue {
        InflightQueue::attach(region, 1, SIZE).unwrap()
    }

    #[test]
    fn a_fresh_part_takes_over_the_rings_used_index() {
        let region = region();
        assert_eq!(attach(&region).recover(500), Vec::<u16>::new());
        // Descriptor 0 must not be lost by a batch that never was.
        attach(&region).taken(0);
        assert_eq!(attach(&region).recover(500), vec![0]);
    }

    #[test]
    fn requests_come_back_in_the_order_they_were_taken() {
        let region = region();
        let mut queue = attach(&region);
        queue.recover(0);
        for head in [5, 2, 7, 0] {
            queue.taken(head);
        }
        queue.link(2);
        queue.published(1);
        let mut again = attach(&region);
        assert_eq!(again.recover(1), vec![5, 7, 0]);
        // The order goes on after a second death.
        again.taken(2);
        assert_eq!(attach(&region).recover(1), vec![5, 7, 0, 2]);
    }

    /// Death between any two steps of giving two chains back: before the used index is published both are still to be
    /// served, from then on neither is.
    #[test]
    fn death_at_any_step_of_a_batch_loses_and_repeats_nothing() {
        for steps in 0..6 {
            let region = region();
            let mut queue = attach(&region);
            queue.recover(u16::MAX);
            [3, 4, 6].into_iter().for_each(|head| queue.taken(head));
            let mut used = u16::MAX;
            for step in 0..steps {
                match step {
                    0 => queue.link(6),
                    1 => queue.link(3),
                    2 => used = used.wrapping_add(2),
                    3 => queue.mark(6).store(0, Ordering::Relaxed),
                    4 => queue.mark(3).store(0, Ordering::Relaxed),
                    _ => queue.used_index().store(used, Ordering::Relaxed),
                }
            }
            let expected = if steps < 3 { vec![3, 4, 6] } else { vec![4] };
            assert_eq!(attach(&region).recover(used), expected, "after {steps} steps");
        }
    }

    #[test]
    fn regions_too_short_for_their_queues_are_refused() {
        let (_, file) = InflightRegion::create(2, SIZE).unwrap();
        let len = InflightRegion::len(2, SIZE) as u64;
        let map = |offset, len, queues, size| {
            InflightRegion::map(file.try_clone().unwrap(), offset, len, queues, size).is_ok()
        };
        assert!(map(0, len, 2, SIZE));
        assert!(map(0, len - OWN_PART as u64, 2, SIZE), "as another back end would have made it");
        assert!(!map(0, len - OWN_PART as u64 - 1, 2, SIZE));
        assert!(!map(0, len, 3, SIZE));
        assert!(!map(0, len, 2, 2 * SIZE));
        assert!(!map(4096, len, 2, SIZE));
        assert!(!map(0, len + 4096, 2, SIZE));
        assert!(!map(u64::MAX - 4095, len, 2, SIZE));
        let region = region();
        assert!(InflightQueue::attach(&region, 2, SIZE).is_none());
        assert!(InflightQueue::attach(&region, 0, 2 * SIZE).is_none());
    }

    #[test]
    fn the_choice_of_the_write_cache_is_carried_over() {
        let (region, file) = InflightRegion::create(2, SIZE).unwrap();
        let len = InflightRegion::len(2, SIZE) as u64;
        let again = |len| {
            InflightRegion::map(file.try_clone().unwrap(), 0, len, 2, SIZE).unwrap().write_cache()
        };
        assert_eq!((region.write_cache(), again(len)), (Some(true), Some(true)));
        region.set_write_cache(false);
        assert_eq!((again(len), again(len - 1)), (Some(false), None));
        let foreign = tempfile::tempfile().unwrap();
        foreign.set_len(len).unwrap();
        assert_eq!(InflightRegion::map(foreign, 0, len, 2, SIZE).unwrap().write_cache(), None);
    }

    proptest! {
        /// Whatever a front end puts into the region, recovery ends, and yields each head inside the ring at most once.
        #[test]
        fn any_content_is_survived(bytes in prop::collection::vec(any::<u8>(), part_len(SIZE)), used in any::<u16>()) {
            let region = region();
            let mut queue = attach(&region);
            for (at, byte) in bytes.iter().enumerate() {
                // SAFETY: inside the queue's part.
                unsafe { queue.base.add(at).write(*byte) };
            }
            let heads = queue.recover(used);
            let mut sorted = heads.clone();
            sorted.sort_unstable();
            sorted.dedup();
            prop_assert!(sorted.len() == heads.len() && heads.iter().all(|&head| head < SIZE));
        }
    }
}
