//! The ring against a driver side written from the specification.

use super::*;
use crate::memory::{MemoryTable, Region, RegionPlace};
use proptest::prelude::*;
use vm_memory::Bytes;

const SIZE: u16 = 8;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;

fn guest() -> Arc<GuestMap> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x10000).unwrap();
    let place = RegionPlace { guest: 0, size: 0x10000, user: 0, file_offset: 0 };
    let mut table = MemoryTable::default();
    table.add(Region::map(place, file).unwrap());
    Arc::new(table.snapshot().unwrap())
}

fn layout() -> Layout {
    Layout {
        size: SIZE,
        descriptors: GuestAddress(0),
        available: GuestAddress(AVAIL),
        used: GuestAddress(USED),
    }
}

struct Driver {
    map: Arc<GuestMap>,
    index: Wrapping<u16>,
}

impl Driver {
    fn word(&self, at: u64) -> u16 {
        self.map.memory().read_obj(GuestAddress(at)).unwrap()
    }

    fn set_word(&self, at: u64, value: u16) {
        self.map.memory().write_obj(value, GuestAddress(at)).unwrap();
    }

    fn add(&mut self, head: u16) {
        self.set_word(AVAIL + 4 + 2 * u64::from(self.index.0 % SIZE), head);
        self.index += 1;
        self.set_word(AVAIL + 2, self.index.0);
    }

    fn used(&self, at: u16) -> (u32, u32) {
        let element = USED + 4 + 8 * u64::from(at % SIZE);
        let read = |at| self.map.memory().read_obj::<u32>(GuestAddress(at)).unwrap();
        (read(element), read(element + 4))
    }

    fn set_used_event(&self, value: u16) {
        self.set_word(AVAIL + 4 + 2 * u64::from(SIZE), value);
    }
}

fn start(event_idx: bool, at: u16) -> (SplitRing, Driver) {
    let map = guest();
    let driver = Driver { map: Arc::clone(&map), index: Wrapping(at) };
    driver.set_word(AVAIL + 2, at);
    driver.set_word(USED + 2, at);
    (SplitRing::new(layout(), map, event_idx, at).unwrap(), driver)
}

#[test]
fn chains_come_in_order_and_are_seen_only_once_published() {
    let (mut ring, mut driver) = start(true, u16::MAX - 1);
    for head in [3, 5, 7] {
        driver.add(head);
    }
    let heads: Vec<u16> = std::iter::from_fn(|| ring.pop().unwrap()).map(|c| c.head).collect();
    assert_eq!(heads, [3, 5, 7]);
    ring.push_used(5, 513);
    ring.push_used(3, 1);
    assert_eq!(driver.word(USED + 2), u16::MAX - 1);
    ring.publish();
    assert_eq!(driver.word(USED + 2), 0);
    assert_eq!(driver.used(u16::MAX - 1), (5, 513));
    assert_eq!(driver.used(u16::MAX), (3, 1));
    assert_eq!(ring.next_avail(), 1);
}

#[test]
fn a_runaway_index_or_head_breaks_the_ring() {
    let (mut ring, mut driver) = start(false, 0);
    driver.set_word(AVAIL + 2, SIZE + 1);
    assert_eq!(ring.pop().unwrap_err(), Broken::Index { index: SIZE + 1, next: 0, size: SIZE });
    driver.set_word(AVAIL + 2, 0);
    driver.add(SIZE);
    assert_eq!(ring.pop().unwrap_err(), Broken::Head { head: SIZE, size: SIZE });
}

#[test]
fn rings_outside_guest_memory_or_misaligned_are_refused() {
    let map = guest();
    let good = layout();
    let start = |layout| SplitRing::new(layout, Arc::clone(&map), true, 0);
    assert!(start(good).is_ok());
    for bad in [
        Layout { descriptors: GuestAddress(0xffff), ..good },
        Layout { available: GuestAddress(0x1001), ..good },
        Layout { available: GuestAddress(0xfff8), ..good },
        Layout { used: GuestAddress(0x2002), ..good },
        Layout { used: GuestAddress(u64::MAX - 3), ..good },
        Layout { size: 0, ..good },
        Layout { size: 12, ..good },
    ] {
        assert!(start(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn kicks_are_wanted_only_after_the_wish_was_made_and_the_ring_rechecked() {
    let (mut ring, mut driver) = start(true, 0);
    assert!(!ring.want_kicks());
    driver.add(1);
    assert!(ring.want_kicks(), "a chain that came before the wish must be reported");
    ring.pop().unwrap().unwrap();
    assert!(!ring.want_kicks());
    assert_eq!(driver.word(USED + 4 + 8 * u64::from(SIZE)), 1);

    let (mut ring, driver) = start(false, 0);
    ring.refuse_kicks();
    assert_eq!(driver.word(USED), USED_FLAG_NO_NOTIFY);
    assert!(!ring.want_kicks());
    assert_eq!(driver.word(USED), 0);
}

#[test]
fn without_event_idx_the_no_interrupt_flag_is_honoured() {
    let (mut ring, driver) = start(false, 0);
    driver.set_word(AVAIL, AVAIL_FLAG_NO_INTERRUPT);
    ring.push_used(0, 1);
    assert!(!ring.publish());
    driver.set_word(AVAIL, 0);
    ring.push_used(0, 1);
    assert!(ring.publish());
    assert!(!ring.publish(), "nothing new: no interrupt");
}

#[test]
fn a_remapped_ring_goes_on_where_it_was() {
    let (mut ring, mut driver) = start(true, 0);
    driver.add(2);
    ring.pop().unwrap().unwrap();
    ring.push_used(2, 1);
    ring.remap(Arc::clone(&driver.map)).unwrap();
    ring.publish();
    assert_eq!((driver.word(USED + 2), driver.used(0)), (1, (2, 1)));
    assert_eq!(ring.next_avail(), 1);
}

proptest! {
    /// An interrupt is due exactly if the guest's event index lies among the elements just published.
    #[test]
    fn interrupts_follow_the_event_index(first in any::<u16>(), batch in 1u16..=SIZE, event in any::<u16>()) {
        let (mut ring, driver) = start(true, first);
        driver.set_used_event(event);
        for _ in 0..batch {
            ring.push_used(0, 1);
        }
        let crossed = (0..batch).any(|n| first.wrapping_add(n) == event);
        prop_assert_eq!(ring.publish(), crossed);
    }

    /// Whatever the guest scribbles over its rings, taking chains never panics and never yields a head outside.
    #[test]
    fn scribbled_rings_never_yield_a_bad_head(words in prop::collection::vec(any::<u16>(), 64), at in any::<u16>()) {
        let (mut ring, driver) = start(true, at);
        for (n, word) in words.iter().enumerate() {
            driver.set_word(AVAIL + 2 * (n as u64 % 12), *word);
            while let Ok(Some(chain)) = ring.pop() {
                prop_assert!(chain.head < SIZE);
            }
        }
    }
}
