//! A split virtqueue, device side (virtio 1.2, section 2.7), on memory that the guest may change at any time.
//!
//! Own code rather than a crate's queue, because the rings are the hot path: host addresses are resolved once when a
//! ring starts, the used index is published once per batch, and notifications are suppressed in both directions with
//! and without EVENT_IDX.
//!
//! What the guest writes is loaded once, by value. An available index that runs ahead of the ring's size, or a head
//! outside the table, breaks the ring ([`Broken`]): nothing more is taken from it until it is started again. The used
//! ring is only ever written, except for its index when the ring starts.
//!
//! Order: an element is written before the index that covers it (release), the index before the event fields are read
//! (full fence), and the available index is read (acquire) before the entries that it covers.

#[cfg(test)]
mod deaths;
mod inflight;
#[cfg(test)]
mod tests;

pub(crate) use inflight::InflightRegion;

use crate::dirty::DirtyLog;
use crate::memory::GuestMap;
use crate::request::Chain;
use inflight::InflightQueue;
use std::collections::VecDeque;
use std::io;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use vm_memory::GuestAddress;

const AVAIL_FLAG_NO_INTERRUPT: u16 = 1;
const USED_FLAG_NO_NOTIFY: u16 = 1;

/// Largest ring of the specification.
pub(crate) const SIZE_LIMIT: u16 = 1 << 15;

/// Where a ring's parts lie, in guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Entries; a power of two.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: GuestAddress,
    /// Available ring.
    pub available: GuestAddress,
    /// Used ring.
    pub used: GuestAddress,
}

/// The guest broke the ring's rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Broken {
    #[error("available index {index} is more than {size} entries ahead of {next}")]
    Index { index: u16, next: u16, size: u16 },
    #[error("chain starts at descriptor {head} of {size}")]
    Head { head: u16, size: u16 },
}

/// A started ring.
#[derive(Debug)]
pub(crate) struct SplitRing {
    layout: Layout,
    event_idx: bool,
    map: Arc<GuestMap>,
    /// Host address of the available ring: flags, index, `size` entries, used event.
    available: *mut u8,
    /// Host address of the used ring: flags, index, `size` elements, available event.
    used: *mut u8,
    /// Next entry of the available ring to take.
    next_avail: Wrapping<u16>,
    /// The guest's available index when last loaded.
    seen_avail: Wrapping<u16>,
    /// Next element of the used ring to fill.
    next_used: Wrapping<u16>,
    /// The used index that the guest can see.
    published: Wrapping<u16>,
    /// What the guest was last told about its kicks.
    kicks: Kicks,
    /// Where the front end remembers what was taken.
    inflight: Option<InflightQueue>,
    /// Where the used ring's pages are marked when they were written.
    log: Option<Arc<DirtyLog>>,
    /// Heads that a process before this one took and never gave back: to be served first.
    replay: VecDeque<u16>,
}

/// Whether the guest was asked to kick when it adds a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kicks {
    Unknown,
    Off,
    /// On; with EVENT_IDX for the chain at this index.
    On(Wrapping<u16>),
}

impl SplitRing {
    /// A ring that goes on at available index `next_avail`. The used index is taken from guest memory.
    pub(crate) fn new(
        layout: Layout,
        map: Arc<GuestMap>,
        event_idx: bool,
        next_avail: u16,
    ) -> io::Result<Self> {
        let size = usize::from(layout.size);
        if !layout.size.is_power_of_two() || layout.size > SIZE_LIMIT {
            return Err(invalid(format!("a ring of {size} entries; want a power of two")));
        }
        let outside = |part: &str| invalid(format!("{part} lies outside the guest's memory"));
        map.host(layout.descriptors, 16 * size, 1).ok_or_else(|| outside("descriptor table"))?;
        let available = map.host(layout.available, 6 + 2 * size, 2);
        let used = map.host(layout.used, 6 + 8 * size, 4);
        let mut ring = Self {
            layout,
            event_idx,
            available: available.ok_or_else(|| outside("available ring"))?,
            used: used.ok_or_else(|| outside("used ring"))?,
            map,
            next_avail: Wrapping(next_avail),
            seen_avail: Wrapping(next_avail),
            next_used: Wrapping(0),
            published: Wrapping(0),
            kicks: Kicks::Unknown,
            inflight: None,
            log: None,
            replay: VecDeque::new(),
        };
        ring.next_used = Wrapping(ring.used_word(2).load(Ordering::Acquire));
        ring.published = ring.next_used;
        Ok(ring)
    }

    /// Tracks requests in part `queue` of `region`, if it has one for this ring, and serves again what that says was
    /// under way. The front end's base is not believed then: one front end says the used index, another the available
    /// index, and only the region knows. One that was never used says that nothing was taken beyond the used index: a
    /// process that died before its first request leaves it so.
    pub(crate) fn track(&mut self, region: &Arc<InflightRegion>, queue: u16) {
        let Some(mut part) = InflightQueue::attach(region, queue, self.layout.size) else { return };
        let heads = part.recover(self.published.0);
        self.next_avail = self.published + Wrapping(heads.len() as u16);
        self.seen_avail = self.next_avail;
        self.replay = heads.into();
        self.inflight = Some(part);
    }

    /// Heads that are served again, in their order.
    #[cfg(fuzzing)]
    pub(crate) fn replayed(&self) -> &VecDeque<u16> {
        &self.replay
    }

    /// Marks the used ring's pages in `log` from now on.
    pub(crate) fn set_log(&mut self, log: Option<Arc<DirtyLog>>) {
        self.log = log;
    }

    /// The same ring over another snapshot of the guest's memory.
    pub(crate) fn remap(&mut self, map: Arc<GuestMap>) -> io::Result<()> {
        let mut moved = Self::new(self.layout, map, self.event_idx, self.next_avail.0)?;
        moved.seen_avail = self.seen_avail;
        moved.next_used = self.next_used;
        moved.published = self.published;
        moved.inflight = self.inflight.take();
        moved.log = self.log.take();
        moved.replay = std::mem::take(&mut self.replay);
        *self = moved;
        Ok(())
    }

    /// Number of entries.
    pub(crate) fn size(&self) -> u16 {
        self.layout.size
    }

    /// The memory that the ring lies in, for its requests to hold.
    pub(crate) fn map(&self) -> &Arc<GuestMap> {
        &self.map
    }

    /// Available index of the next chain to take: what GET_VRING_BASE reports.
    pub(crate) fn next_avail(&self) -> u16 {
        self.next_avail.0
    }

    /// Takes the next chain, if the guest added one.
    pub(crate) fn pop(&mut self) -> Result<Option<Chain>, Broken> {
        if let Some(head) = self.replay.pop_front() {
            return Ok(Some(self.chain(head)));
        }
        if self.next_avail == self.seen_avail {
            let index = Wrapping(self.avail_word(2).load(Ordering::Acquire));
            if (index - self.next_avail).0 > self.layout.size {
                return Err(Broken::Index {
                    index: index.0,
                    next: self.next_avail.0,
                    size: self.layout.size,
                });
            }
            self.seen_avail = index;
            if index == self.next_avail {
                return Ok(None);
            }
        }
        let slot = usize::from(self.next_avail.0 & (self.layout.size - 1));
        let head = u16::from_le(self.avail_word(4 + 2 * slot).load(Ordering::Relaxed));
        if head >= self.layout.size {
            return Err(Broken::Head { head, size: self.layout.size });
        }
        self.next_avail += 1;
        may_die();
        if let Some(inflight) = &mut self.inflight {
            inflight.taken(head);
        }
        Ok(Some(self.chain(head)))
    }

    fn chain(&self, head: u16) -> Chain {
        Chain { table: self.layout.descriptors, entries: self.layout.size, head }
    }

    /// Gives chain `head` back with `written` bytes in it; the guest sees it after [`Self::publish`].
    pub(crate) fn push_used(&mut self, head: u16, written: u32) {
        let slot = usize::from(self.next_used.0 & (self.layout.size - 1));
        let element = (u64::from(written) << 32 | u64::from(head)).to_le();
        // SAFETY: element `slot` lies inside the used ring, which `new` found mapped; the element's address is a
        // multiple of 4 only, hence unaligned. The guest may read it at any time but has no business to.
        unsafe { self.used.add(4 + 8 * slot).cast::<u64>().write_unaligned(element) };
        self.next_used += 1;
        may_die();
        if let Some(inflight) = &mut self.inflight {
            inflight.link(head);
        }
        may_die();
    }

    /// Lets the guest see what was given back since the last call; true if it wants an interrupt for it.
    pub(crate) fn publish(&mut self) -> bool {
        if self.next_used == self.published {
            return false;
        }
        let before = std::mem::replace(&mut self.published, self.next_used);
        self.used_word(2).store(self.next_used.0.to_le(), Ordering::Release);
        may_die();
        self.mark_used(2, 2);
        let (size, first) = (self.layout.size, before.0 & (self.layout.size - 1));
        let count = (self.next_used - before).0;
        if count > size - first {
            self.mark_used(4, 8 * usize::from(size));
        } else {
            self.mark_used(4 + 8 * usize::from(first), 8 * usize::from(count));
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.published(self.next_used.0);
        }
        may_die();
        // The index must be visible before the guest's wish is read: it sets its wish, then looks at the index.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event_at = 4 + 2 * usize::from(self.layout.size);
            let event = Wrapping(u16::from_le(self.avail_word(event_at).load(Ordering::Relaxed)));
            return self.next_used - event - Wrapping(1) < self.next_used - before;
        }
        u16::from_le(self.avail_word(0).load(Ordering::Relaxed)) & AVAIL_FLAG_NO_INTERRUPT == 0
    }

    /// Asks the guest to kick at the next chain; true if one is there already, and no kick may come for it.
    pub(crate) fn want_kicks(&mut self) -> bool {
        if self.kicks != Kicks::On(self.next_avail) {
            if self.event_idx {
                let event_at = 4 + 8 * usize::from(self.layout.size);
                self.used_word(event_at).store(self.next_avail.0.to_le(), Ordering::Relaxed);
                self.mark_used(event_at, 2);
            } else if !matches!(self.kicks, Kicks::On(_)) {
                self.used_word(0).store(0, Ordering::Relaxed);
                self.mark_used(0, 2);
            }
            self.kicks = Kicks::On(self.next_avail);
            // The wish must be visible before the index is read: the guest adds a chain, then looks at the wish.
            fence(Ordering::SeqCst);
        }
        self.has_more()
    }

    /// There is a chain that was not taken yet.
    pub(crate) fn has_more(&self) -> bool {
        if !self.replay.is_empty() {
            return true;
        }
        Wrapping(u16::from_le(self.avail_word(2).load(Ordering::Acquire))) != self.next_avail
    }

    /// Tells the guest not to kick; a hint. With EVENT_IDX it kicks once at most anyway.
    pub(crate) fn refuse_kicks(&mut self) {
        if !self.event_idx && self.kicks != Kicks::Off {
            self.used_word(0).store(USED_FLAG_NO_NOTIFY.to_le(), Ordering::Relaxed);
            self.mark_used(0, 2);
            self.kicks = Kicks::Off;
        }
    }

    /// `len` bytes at byte `at` of the used ring were written.
    fn mark_used(&self, at: usize, len: usize) {
        if let Some(log) = &self.log {
            log.mark(self.layout.used.0 + at as u64, len as u64);
        }
    }

    fn avail_word(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at + 2 <= 6 + 2 * usize::from(self.layout.size));
        // SAFETY: `at` is even and inside the available ring, which `new` found mapped and aligned to 2, and which
        // `map` keeps mapped. Both sides access these words atomically.
        unsafe { AtomicU16::from_ptr(self.available.add(at).cast()) }
    }

    fn used_word(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at + 2 <= 6 + 8 * usize::from(self.layout.size));
        // SAFETY: `at` is even and inside the used ring, which `new` found mapped and aligned to 4, and which `map`
        // keeps mapped. Both sides access these words atomically.
        unsafe { AtomicU16::from_ptr(self.used.add(at).cast()) }
    }
}

/// A place between two stores that others can see, where the process may die. Tests make it.
fn may_die() {
    #[cfg(test)]
    deaths::may_die();
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}
