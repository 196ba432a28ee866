//! Goal: a process that serves a ring may die between any two stores, again and again, and every request is completed
//! exactly once; none is served again after its completion could be seen, when the guest may have put other data there.
//!
//! Method: the device side runs against a guest's memory and an inflight region until a fuse burns down at one of the
//! places marked by `may_die`; a panic stands for the death, memory and region stay as they are. The next process starts
//! on both, told either front ends' idea of where to go on: the used index, or the available index. First every place
//! once, then random schedules.

use super::*;
use crate::memory::{MemoryTable, Region, RegionPlace};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use vm_memory::Bytes;

const SIZE: u16 = 8;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;

thread_local! {
    /// Places to pass before death; negative: immortal.
    static FUSE: Cell<i64> = const { Cell::new(-1) };
}

/// What a death unwinds with, so that no other panic is taken for one.
struct Death;

/// Counts down, and dies.
pub(super) fn may_die() {
    FUSE.with(|fuse| match fuse.get() {
        left if left < 0 => {}
        0 => {
            fuse.set(-1);
            resume_unwind(Box::new(Death));
        }
        left => fuse.set(left - 1),
    });
}

/// Runs `process` until it ends or its fuse has burnt down; true if it died.
fn run(fuse: i64, process: impl FnOnce()) -> bool {
    FUSE.set(fuse);
    let end = catch_unwind(AssertUnwindSafe(process));
    FUSE.set(-1);
    match end {
        Ok(()) => false,
        Err(panic) if panic.is::<Death>() => true,
        Err(panic) => resume_unwind(panic),
    }
}

/// Which index a front end says at a reconnect.
#[derive(Clone, Copy, Debug)]
enum Convention {
    UsedIndex,
    AvailableIndex,
}

/// The guest's driver: it reuses a head as soon as it has seen its completion.
struct Guest {
    map: Arc<GuestMap>,
    region: Arc<InflightRegion>,
    available: Wrapping<u16>,
    seen: Wrapping<u16>,
    free: Vec<u16>,
    /// By head: which request is there, if one is open.
    open: [Option<u64>; SIZE as usize],
    submitted: u64,
    completed: u64,
}

impl Guest {
    fn new(start: u16) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x4000).unwrap();
        let place = RegionPlace { guest: 0, size: 0x4000, user: 0, file_offset: 0 };
        let mut table = MemoryTable::default();
        table.add(Region::map(place, file).unwrap());
        let guest = Self {
            map: Arc::new(table.snapshot().unwrap()),
            region: Arc::new(InflightRegion::create(1, SIZE).unwrap().0),
            available: Wrapping(start),
            seen: Wrapping(start),
            free: (0..SIZE).collect(),
            open: [None; SIZE as usize],
            submitted: 0,
            completed: 0,
        };
        guest.set(AVAIL + 2, start);
        guest.set(USED + 2, start);
        guest
    }

    fn get(&self, at: u64) -> u16 {
        self.map.memory().read_obj(GuestAddress(at)).unwrap()
    }

    fn set(&self, at: u64, value: u16) {
        self.map.memory().write_obj(value, GuestAddress(at)).unwrap();
    }

    fn submit(&mut self) {
        let Some(head) = self.free.pop() else { return };
        self.open[usize::from(head)] = Some(self.submitted);
        self.submitted += 1;
        self.set(AVAIL + 4 + 2 * u64::from(self.available.0 % SIZE), head);
        self.available += 1;
        self.set(AVAIL + 2, self.available.0);
    }

    /// Takes what was completed; panics at a completion of nothing.
    fn take_completions(&mut self) {
        while self.seen.0 != self.get(USED + 2) {
            let head = self.get(USED + 4 + 8 * u64::from(self.seen.0 % SIZE));
            self.seen += 1;
            let request = self.open[usize::from(head)].take();
            assert!(request.is_some(), "head {head} was completed and is not open");
            self.free.insert(0, head);
            self.completed += 1;
        }
    }

    /// The ring as a new process finds it.
    fn device(&self, convention: Convention) -> SplitRing {
        let layout = Layout {
            size: SIZE,
            descriptors: GuestAddress(0),
            available: GuestAddress(AVAIL),
            used: GuestAddress(USED),
        };
        let base = match convention {
            Convention::UsedIndex => self.get(USED + 2),
            Convention::AvailableIndex => self.available.0,
        };
        let mut ring = SplitRing::new(layout, Arc::clone(&self.map), true, base).unwrap();
        ring.track(&self.region, 0);
        ring
    }
}

/// Serves the ring for some turns, in an order of the seed's choice. Whatever is taken must be open at that moment.
fn serve(guest: &mut Guest, rng: &mut StdRng, convention: Convention, turns: u32) {
    let mut ring = guest.device(convention);
    let mut taken = vec![];
    for _ in 0..turns {
        for _ in 0..rng.random_range(0..4) {
            guest.submit();
        }
        while rng.random_bool(0.8) {
            let Some(chain) = ring.pop().unwrap() else { break };
            let open = guest.open[usize::from(chain.head)];
            assert!(open.is_some(), "head {} is served after its completion was seen", chain.head);
            assert!(!taken.contains(&chain.head), "head {} is served twice at once", chain.head);
            taken.push(chain.head);
        }
        for _ in 0..rng.random_range(0..=taken.len()) {
            let head = taken.swap_remove(rng.random_range(0..taken.len()));
            ring.push_used(head, 1);
        }
        ring.publish();
        guest.take_completions();
    }
}

/// A last process finishes everything.
fn finish(guest: &mut Guest, convention: Convention) {
    guest.take_completions();
    let mut ring = guest.device(convention);
    while let Some(chain) = ring.pop().unwrap() {
        assert!(guest.open[usize::from(chain.head)].is_some(), "served after its completion");
        ring.push_used(chain.head, 1);
    }
    ring.publish();
    guest.take_completions();
    assert_eq!(guest.completed, guest.submitted, "requests were lost");
}

const CONVENTIONS: [Convention; 2] = [Convention::UsedIndex, Convention::AvailableIndex];

/// With the available index a front end means the next entry that the back end has not taken, which only the region
/// knows once it is in use; at the very first start both are the same.
#[test]
fn death_at_every_single_place_loses_and_repeats_nothing() {
    for convention in CONVENTIONS {
        let mut fuse = 0;
        loop {
            let mut guest = Guest::new(u16::MAX - 3);
            let mut rng = StdRng::seed_from_u64(5);
            let died = run(fuse, || serve(&mut guest, &mut rng, convention, 12));
            finish(&mut guest, convention);
            if !died {
                break;
            }
            fuse += 1;
        }
        assert!(fuse > 100, "only {fuse} places");
    }
}

#[test]
fn deaths_in_a_row_lose_and_repeat_nothing() {
    for seed in 0..400 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut guest = Guest::new(rng.random());
        let schedule = catch_unwind(AssertUnwindSafe(|| {
            let mut deaths = 0;
            for _ in 0..30 {
                let convention = CONVENTIONS[rng.random_range(0..2)];
                let fuse = rng.random_range(0..60);
                // A guest that runs on sees completions and adds requests while nobody serves it.
                guest.take_completions();
                for _ in 0..rng.random_range(0..3) {
                    guest.submit();
                }
                deaths += u32::from(run(fuse, || serve(&mut guest, &mut rng, convention, 8)));
            }
            assert!(deaths > 0);
            finish(&mut guest, CONVENTIONS[usize::from(rng.random::<bool>())]);
        }));
        if let Err(panic) = schedule {
            eprintln!("seed {seed}");
            resume_unwind(panic);
        }
    }
}
