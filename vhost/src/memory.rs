//! The guest's memory as the front end shares it, and copies into and out of it.
//!
//! A [`GuestMap`] is an immutable snapshot of the front end's memory table. Rings and requests hold one by `Arc`, so
//! that a region that the front end takes away stays mapped until the last request that uses it has ended.
//!
//! The guest may change its memory at any moment. So nothing read from it is looked at twice, and its bytes are
//! reached through raw pointers; only whole-buffer copies and checksums, whose control flow does not depend on the
//! bytes, run over them.

use crate::sigbus::Guard;
use libc::iovec;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};

/// One region of the front end's table.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    /// Address in the front end's process; ring addresses are given in these.
    user: u64,
    /// Before the mapping, so that it goes first.
    _guard: Arc<Guard>,
    mapping: Arc<GuestRegionMmap>,
}

/// Where a region lies, as the front end says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionPlace {
    /// Guest physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Address in the front end's process.
    pub user: u64,
    /// Byte of the file where the region starts.
    pub file_offset: u64,
}

impl Region {
    /// Maps `file`, which must be long enough: touching a page behind a file's end would kill the process.
    pub(crate) fn map(place: RegionPlace, file: File) -> io::Result<Self> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        let end = place.file_offset.checked_add(place.size);
        let len = file.metadata()?.size();
        if end.is_none_or(|end| end > len) {
            return Err(invalid(format!(
                "memory region of {} bytes at file offset {} does not fit its file of {len} bytes",
                place.size, place.file_offset
            )));
        }
        let size = usize::try_from(place.size)
            .map_err(|_| invalid(format!("memory region of {} bytes", place.size)))?;
        let mapping = MmapRegion::from_file(FileOffset::new(file, place.file_offset), size)
            .map_err(io::Error::other)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(place.guest)).ok_or_else(|| {
            invalid(format!("memory region at {:#x} wraps the address space", place.guest))
        })?;
        let guard = Guard::new(region.as_ptr(), size)?;
        Ok(Self { user: place.user, _guard: Arc::new(guard), mapping: Arc::new(region) })
    }

    fn guest(&self) -> u64 {
        self.mapping.start_addr().raw_value()
    }

    fn size(&self) -> u64 {
        self.mapping.len()
    }

    fn contains_user(&self, address: u64) -> bool {
        address.checked_sub(self.user).is_some_and(|offset| offset < self.size())
    }
}

/// The session's view: regions that come and go.
#[derive(Debug, Default)]
pub(crate) struct MemoryTable {
    regions: Vec<Region>,
}

impl MemoryTable {
    /// Takes `regions` in place of everything before.
    pub(crate) fn replace(&mut self, regions: Vec<Region>) {
        self.regions = regions;
    }

    /// Adds one region.
    pub(crate) fn add(&mut self, region: Region) {
        self.regions.push(region);
    }

    /// Removes the region at `guest` of `size` bytes; false if there is none.
    pub(crate) fn remove(&mut self, guest: u64, size: u64) -> bool {
        let before = self.regions.len();
        self.regions.retain(|region| (region.guest(), region.size()) != (guest, size));
        self.regions.len() < before
    }

    /// Number of regions.
    pub(crate) fn len(&self) -> usize {
        self.regions.len()
    }

    /// An immutable snapshot. Fails if regions overlap in the guest's address space.
    pub(crate) fn snapshot(&self) -> io::Result<GuestMap> {
        if self.regions.is_empty() {
            return Ok(GuestMap::default());
        }
        let mut sorted = self.regions.clone();
        sorted.sort_by_key(Region::guest);
        let mappings = sorted.iter().map(|region| Arc::clone(&region.mapping)).collect();
        let memory = GuestMemoryMmap::from_arc_regions(mappings)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        Ok(GuestMap { memory, regions: sorted })
    }
}

/// A snapshot of the guest's memory.
#[derive(Debug, Default)]
pub(crate) struct GuestMap {
    /// Before the memory, so that the regions' guards go before their mappings.
    regions: Vec<Region>,
    memory: GuestMemoryMmap,
}

impl GuestMap {
    /// The memory by guest physical address.
    pub(crate) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Guest physical address of an address in the front end's process.
    pub(crate) fn translate(&self, user: u64) -> Option<GuestAddress> {
        let region = self.regions.iter().find(|region| region.contains_user(user))?;
        Some(GuestAddress(region.guest() + (user - region.user)))
    }

    /// Guest physical address of a host address that was resolved in this snapshot.
    pub(crate) fn guest_address(&self, host: *const u8) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = host.addr().checked_sub(region.mapping.as_ptr().addr())? as u64;
            (offset < region.size()).then(|| region.guest() + offset)
        })
    }

    /// Host address of `len` bytes of guest memory that lie in one region, aligned to `align`.
    pub(crate) fn host(&self, address: GuestAddress, len: usize, align: usize) -> Option<*mut u8> {
        let slice = self.memory.get_slice(address, len).ok()?;
        let ptr = slice.ptr_guard_mut().as_ptr();
        ptr.addr().is_multiple_of(align).then_some(ptr)
    }
}

/// Walks a list of guest buffers as one run of bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursor<'a> {
    rest: &'a [iovec],
    /// Bytes of `rest[0]` already behind.
    skip: usize,
}

impl<'a> Cursor<'a> {
    /// At byte `offset` of the buffers.
    pub(crate) fn new(buffers: &'a [iovec], offset: usize) -> Self {
        let mut cursor = Self { rest: buffers, skip: 0 };
        cursor.advance(offset);
        cursor
    }

    /// Moves `count` bytes on, or to the end.
    pub(crate) fn advance(&mut self, mut count: usize) {
        while let Some(first) = self.rest.first() {
            let left = first.iov_len - self.skip;
            if count < left {
                self.skip += count;
                return;
            }
            count -= left;
            self.rest = &self.rest[1..];
            self.skip = 0;
        }
    }

    /// The next bytes that lie together: address and how many, at most `max`; moves behind them.
    pub(crate) fn take(&mut self, max: usize) -> Option<(*mut u8, usize)> {
        while self.rest.first().is_some_and(|first| first.iov_len == self.skip) {
            self.rest = &self.rest[1..];
            self.skip = 0;
        }
        let first = self.rest.first()?;
        let len = (first.iov_len - self.skip).min(max);
        let ptr = first.iov_base.cast::<u8>().wrapping_add(self.skip);
        self.skip += len;
        Some((ptr, len))
    }

    /// Copies the next bytes out of guest memory into `into`.
    ///
    /// # Safety
    /// The buffers must be mapped.
    pub(crate) unsafe fn copy_from_guest(&mut self, into: &mut [u8]) {
        let mut done = 0;
        while done < into.len() {
            let Some((ptr, len)) = self.take(into.len() - done) else { break };
            // SAFETY: `ptr` is valid for `len` bytes by the caller's promise; `into[done..]` has at least `len`.
            unsafe { std::ptr::copy_nonoverlapping(ptr, into[done..].as_mut_ptr(), len) };
            done += len;
        }
    }

    /// Copies `from` over the next bytes of guest memory.
    ///
    /// # Safety
    /// The buffers must be mapped.
    pub(crate) unsafe fn copy_to_guest(&mut self, from: &[u8]) {
        let mut done = 0;
        while done < from.len() {
            let Some((ptr, len)) = self.take(from.len() - done) else { break };
            // SAFETY: `ptr` is valid for `len` bytes by the caller's promise; `from[done..]` has at least `len`.
            unsafe { std::ptr::copy_nonoverlapping(from[done..].as_ptr(), ptr, len) };
            done += len;
        }
    }

    /// Zeroes the next `count` bytes of guest memory.
    ///
    /// # Safety
    /// The buffers must be mapped.
    pub(crate) unsafe fn zero_guest(&mut self, mut count: usize) {
        while count > 0 {
            let Some((ptr, len)) = self.take(count) else { break };
            // SAFETY: `ptr` is valid for `len` bytes by the caller's promise.
            unsafe { std::ptr::write_bytes(ptr, 0, len) };
            count -= len;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffers(parts: &mut [Vec<u8>]) -> Vec<iovec> {
        parts
            .iter_mut()
            .map(|part| iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() })
            .collect()
    }

    #[test]
    fn copies_cross_buffer_bounds_and_skip_empty_buffers() {
        let mut parts = vec![vec![0; 3], vec![], vec![0; 5], vec![0; 1]];
        let list = buffers(&mut parts);
        // SAFETY: the buffers live in `parts`.
        unsafe { Cursor::new(&list, 2).copy_to_guest(&[1, 2, 3, 4, 5, 6, 7]) };
        let mut back = [9; 9];
        // SAFETY: as above.
        unsafe { Cursor::new(&list, 0).copy_from_guest(&mut back) };
        assert_eq!(back, [0, 0, 1, 2, 3, 4, 5, 6, 7]);
        // SAFETY: as above.
        unsafe { Cursor::new(&list, 7).zero_guest(100) };
        assert_eq!(parts, [vec![0, 0, 1], vec![], vec![2, 3, 4, 5, 0], vec![0]]);
    }

    #[test]
    fn a_region_longer_than_its_file_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let place = RegionPlace { guest: 0, size: 8192, user: 0x5000, file_offset: 0 };
        assert!(Region::map(place, file.try_clone().unwrap()).is_ok());
        for bad in [
            RegionPlace { size: 8193, ..place },
            RegionPlace { file_offset: 4096, ..place },
            RegionPlace { file_offset: u64::MAX, ..place },
        ] {
            assert!(Region::map(bad, file.try_clone().unwrap()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn user_addresses_translate_through_their_region_only() {
        let mut table = MemoryTable::default();
        for (guest, user) in [(0x10_0000u64, 0x7000_0000u64), (0, 0x9000_0000)] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(0x2000).unwrap();
            let place = RegionPlace { guest, size: 0x2000, user, file_offset: 0 };
            table.add(Region::map(place, file).unwrap());
        }
        let map = table.snapshot().unwrap();
        assert_eq!(map.translate(0x7000_0010), Some(GuestAddress(0x10_0010)));
        assert_eq!(map.translate(0x9000_1fff), Some(GuestAddress(0x1fff)));
        assert_eq!(map.translate(0x9000_2000), None);
        assert_eq!(map.translate(0), None);
        for guest in [0, 0x1fff, 0x10_0000, 0x10_1fff] {
            let host = map.host(GuestAddress(guest), 1, 1).unwrap();
            assert_eq!(map.guest_address(host), Some(guest));
        }
        assert_eq!(map.guest_address(std::ptr::null()), None);
        assert!(map.host(GuestAddress(0x1ff0), 16, 16).is_some());
        assert!(map.host(GuestAddress(0x1ff0), 17, 16).is_none());
        assert!(map.host(GuestAddress(0x1ff1), 2, 2).is_none());
        assert!(table.remove(0, 0x2000) && !table.remove(0, 0x2000));
        assert_eq!(table.snapshot().unwrap().translate(0x9000_0000), None);
    }

    #[test]
    fn overlapping_regions_are_refused() {
        let mut table = MemoryTable::default();
        for guest in [0, 0x1000] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(0x2000).unwrap();
            let place = RegionPlace { guest, size: 0x2000, user: guest, file_offset: 0 };
            table.add(Region::map(place, file).unwrap());
        }
        assert!(table.snapshot().is_err());
    }
}
