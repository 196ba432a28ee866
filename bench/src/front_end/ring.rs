//! The driver's side of a split virtqueue (virtio 1.2, section 2.7), with event index.
//!
//! The ring knows descriptors and indexes, not block requests. Callers own the descriptor numbers;
//! the ring only publishes heads and hands back used ones.

use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::memory::SharedMemory;

/// The descriptor continues in `next`.
pub const DESC_NEXT: u16 = 1;
/// The device writes this buffer (else it reads it).
pub const DESC_WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const DESC_INDIRECT: u16 = 4;

const USED_NO_NOTIFY: u16 = 1;
const AVAIL_NO_INTERRUPT: u16 = 1;

/// One entry of a descriptor table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// `DESC_*`.
    pub flags: u16,
    /// Next descriptor, with `DESC_NEXT`.
    pub next: u16,
}

impl Descriptor {
    /// Size of the encoded form.
    pub const BYTES: usize = 16;

    /// Little-endian bytes as the device reads them.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[0..8].copy_from_slice(&self.address.to_le_bytes());
        out[8..12].copy_from_slice(&self.len.to_le_bytes());
        out[12..14].copy_from_slice(&self.flags.to_le_bytes());
        out[14..16].copy_from_slice(&self.next.to_le_bytes());
        out
    }
}

/// Where the three areas of a ring lie in shared memory, as byte offsets.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Descriptor table.
    pub descriptors: usize,
    /// Available ring (written by the driver).
    pub available: usize,
    /// Used ring (written by the device).
    pub used: usize,
    /// First byte after the ring.
    pub end: usize,
}

impl Layout {
    /// Lays a ring of `size` entries out from `start` on.
    #[must_use]
    pub fn new(start: usize, size: u16) -> Self {
        let entries = usize::from(size);
        let descriptors = start.next_multiple_of(16);
        let available = descriptors + Descriptor::BYTES * entries;
        let used = (available + 6 + 2 * entries).next_multiple_of(4);
        Self { descriptors, available, used, end: used + 6 + 8 * entries }
    }
}

/// One split virtqueue as its driver sees it.
#[derive(Debug)]
pub struct SplitRing {
    layout: Layout,
    size: u16,
    event_idx: bool,
    interrupts: bool,
    /// Entries pushed, of which those up to `published` are visible to the device.
    pushed: u16,
    published: u16,
    used_seen: u16,
}

impl SplitRing {
    /// A ring over zeroed memory.
    ///
    /// # Panics
    /// When `size` is not a power of two within 1 to 32768.
    #[must_use]
    pub fn new(layout: Layout, size: u16, event_idx: bool) -> Self {
        assert!(size.is_power_of_two() && size <= 32768, "queue size {size}");
        Self { layout, size, event_idx, interrupts: true, pushed: 0, published: 0, used_seen: 0 }
    }

    /// Where the ring lies.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Number of entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Writes entry `index` of the descriptor table.
    pub fn set_descriptor(&self, memory: &SharedMemory, index: u16, descriptor: &Descriptor) {
        assert!(index < self.size, "descriptor {index} of {}", self.size);
        memory.write(
            self.layout.descriptors + usize::from(index) * Descriptor::BYTES,
            &descriptor.encode(),
        );
    }

    /// Puts the chain that starts at descriptor `head` into the available ring. The device sees it
    /// at the next [`Self::publish`].
    pub fn push(&mut self, memory: &SharedMemory, head: u16) {
        let entry = usize::from(self.pushed % self.size);
        memory.write(self.layout.available + 4 + 2 * entry, &head.to_le_bytes());
        self.pushed = self.pushed.wrapping_add(1);
    }

    /// Makes everything pushed visible; true when the device wants a kick.
    #[must_use]
    pub fn publish(&mut self, memory: &SharedMemory) -> bool {
        let old = self.published;
        if self.pushed == old {
            return false;
        }
        self.word(memory, self.layout.available + 2).store(self.pushed.to_le(), Ordering::Release);
        self.published = self.pushed;
        // The index must be visible before the device's wish is read, or a kick could be missed.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.load(memory, self.layout.used + 4 + 8 * usize::from(self.size));
            crosses(event, self.published, old)
        } else {
            self.load(memory, self.layout.used) & USED_NO_NOTIFY == 0
        }
    }

    /// The next used chain: its head and the number of bytes the device wrote.
    #[must_use]
    pub fn pop(&mut self, memory: &SharedMemory) -> Option<(u32, u32)> {
        if !self.has_used(memory) {
            return None;
        }
        let entry = self.layout.used + 4 + 8 * usize::from(self.used_seen % self.size);
        let bytes = memory.slice(entry, 8);
        let head = u32::from_le_bytes(bytes[0..4].try_into().expect("four bytes"));
        let written = u32::from_le_bytes(bytes[4..8].try_into().expect("four bytes"));
        self.used_seen = self.used_seen.wrapping_add(1);
        Some((head, written))
    }

    /// Whether the device has published a chain not taken yet.
    #[must_use]
    pub fn has_used(&self, memory: &SharedMemory) -> bool {
        self.load_acquire(memory, self.layout.used + 2) != self.used_seen
    }

    /// Asks for an interrupt at the next used chain; false when one is there already, so that
    /// waiting would be wrong.
    #[must_use]
    pub fn arm(&mut self, memory: &SharedMemory) -> bool {
        if self.event_idx {
            self.word(memory, self.layout.available + 4 + 2 * usize::from(self.size))
                .store(self.used_seen.to_le(), Ordering::Release);
        } else if !self.interrupts {
            self.interrupts = true;
            self.word(memory, self.layout.available).store(0, Ordering::Release);
        }
        fence(Ordering::SeqCst);
        !self.has_used(memory)
    }

    /// Asks for no interrupts: the caller polls. With event index there is no flag for it; the
    /// event is put as far behind as it goes.
    pub fn disarm(&mut self, memory: &SharedMemory) {
        if self.event_idx {
            self.word(memory, self.layout.available + 4 + 2 * usize::from(self.size))
                .store(self.used_seen.wrapping_sub(1).to_le(), Ordering::Release);
        } else if self.interrupts {
            self.interrupts = false;
            self.word(memory, self.layout.available)
                .store(AVAIL_NO_INTERRUPT.to_le(), Ordering::Release);
        }
    }

    fn load(&self, memory: &SharedMemory, offset: usize) -> u16 {
        u16::from_le(self.word(memory, offset).load(Ordering::Relaxed))
    }

    fn load_acquire(&self, memory: &SharedMemory, offset: usize) -> u16 {
        u16::from_le(self.word(memory, offset).load(Ordering::Acquire))
    }

    fn word<'a>(&self, memory: &'a SharedMemory, offset: usize) -> &'a AtomicU16 {
        let pointer = memory.pointer(offset, 2).cast::<u16>();
        assert!(pointer.is_aligned(), "ring fields are laid out aligned");
        // SAFETY: aligned and inside the mapping, which lives as long as `memory`; both sides only
        // touch ring indexes atomically.
        unsafe { AtomicU16::from_ptr(pointer.as_ptr()) }
    }
}

/// Whether index `event` was passed on the way from `old` to `new` (`vring_need_event`).
#[must_use]
pub fn crosses(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
