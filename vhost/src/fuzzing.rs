//! What fuzz targets reach of this crate's inside; built with `--cfg fuzzing` only.

use crate::memory::{MemoryTable, Region, RegionPlace};
use crate::ring::{InflightRegion, Layout, SplitRing};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vm_memory::GuestAddress;

/// Bytes of the guest's memory.
const GUEST_LEN: u64 = 16 << 10;
/// Queues that the inflight region is said to have.
const QUEUES: u16 = 2;

/// A ring in memory that a hostile guest fills and keeps changing, and an inflight region that a hostile front end kept.
#[derive(Debug)]
pub struct HostileRing {
    memory: File,
    region: File,
    layout: Layout,
    event_idx: bool,
    ring: Option<SplitRing>,
    taken: Vec<u16>,
}

impl HostileRing {
    /// `guest` and `region` are the first bytes of either; `size` entries, ring parts at `at`.
    #[must_use]
    pub fn new(guest: &[u8], region: &[u8], size: u16, at: [u16; 3], event_idx: bool) -> Self {
        let memory = memfd(GUEST_LEN, guest);
        let len = InflightRegion::len(QUEUES, size.clamp(1, 1 << 10)) as u64;
        let [descriptors, available, used] = at.map(|at| GuestAddress(u64::from(at)));
        let layout = Layout { size, descriptors, available, used };
        let region = memfd(len, region);
        Self { memory, region, layout, event_idx, ring: None, taken: Vec::new() }
    }

    /// A new process serves the ring, as far as it can be started, from available index `base`. Panics if the inflight
    /// region makes it serve a request twice, or one that the ring has no place for.
    pub fn start(&mut self, base: u16, queue: u16, offset: u64, short: u64) {
        let place = RegionPlace { guest: 0, size: GUEST_LEN, user: 0, file_offset: 0 };
        let mut table = MemoryTable::default();
        let file = self.memory.try_clone().expect("one more descriptor");
        table.add(Region::map(place, file).expect("a plain file"));
        let map = Arc::new(table.snapshot().expect("one region"));
        self.taken.clear();
        self.ring = SplitRing::new(self.layout, map, self.event_idx, base).ok();
        let Some(ring) = &mut self.ring else { return };
        let file = self.region.try_clone().expect("one more descriptor");
        let len = file.metadata().expect("open").len().saturating_sub(short);
        let Ok(region) = InflightRegion::map(file, offset, len, QUEUES, self.layout.size) else {
            return;
        };
        let _ = region.write_cache();
        region.set_write_cache(short & 1 == 0);
        ring.track(&Arc::new(region), queue);
        let again = ring.replayed();
        let distinct: BTreeSet<u16> = again.iter().copied().collect();
        assert_eq!(distinct.len(), again.len(), "a request would be served twice");
        assert!(distinct.iter().all(|head| *head < self.layout.size), "no such request");
    }

    /// Takes the next chain.
    pub fn pop(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        match ring.pop() {
            Ok(Some(chain)) => {
                assert!(chain.head < self.layout.size, "a chain that the ring has no place for");
                self.taken.push(chain.head);
            }
            Ok(None) => {}
            Err(_) => self.ring = None,
        }
    }

    /// Gives one of the chains taken back, and lets the guest see it if `publish`.
    pub fn push(&mut self, which: u8, publish: bool) {
        let Some(ring) = &mut self.ring else { return };
        if !self.taken.is_empty() {
            let head = self.taken.swap_remove(usize::from(which) % self.taken.len());
            ring.push_used(head, u32::from(which));
        }
        if publish {
            ring.publish();
        }
        if ring.want_kicks() {
            ring.refuse_kicks();
        }
    }

    /// The guest, or the front end, changes its memory.
    pub fn scribble(&self, region: bool, at: u16, bytes: &[u8]) {
        let file = if region { &self.region } else { &self.memory };
        let room = file.metadata().expect("open").len().saturating_sub(u64::from(at));
        let bytes = &bytes[..bytes.len().min(room as usize)];
        file.write_all_at(bytes, u64::from(at)).expect("memory");
    }
}

fn memfd(len: u64, start: &[u8]) -> File {
    // SAFETY: a plain system call with a literal name.
    let fd = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "no memfd: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    file.set_len(len).expect("memory");
    file.write_all_at(&start[..start.len().min(len as usize)], 0).expect("memory");
    file
}
