//! The bounds within which all schedules are tried: where each begins, and how often what may happen.

use crate::state::*;

/// Nothing may happen.
const NOTHING: Budget = Budget {
    commits: 0,
    cuts: 0,
    deletions: 0,
    clones: 0,
    readers: 0,
    crashes: 0,
    restarts: 0,
    evictions: 0,
    cycles: 1,
};

/// A part of all that can happen, small enough to be tried as a whole.
#[derive(Clone, Debug)]
pub struct Scope {
    pub initial: Vec<State>,
    /// Hosts that may lead.
    pub leaders: &'static [Index],
    /// Hosts that make clones.
    pub cloners: &'static [Index],
    /// Commits drop data, too.
    pub drops: bool,
}

impl Scope {
    pub fn of(initial: Vec<State>) -> Self {
        Self { initial, leaders: &[0], cloners: &[1], drops: false }
    }
}

/// Commits beside a cycle, in every order with it; data in the other host's extent; reads of former trees.
pub fn commits() -> Scope {
    let left = Budget { commits: 2, readers: 1, ..NOTHING };
    let initial = vec![a_disk_each(left), two_disks_on(0, left), two_disks_on(1, left)];
    Scope { drops: true, ..Scope::of(initial) }
}

/// With a snapshot that is taken, and one thing that is deleted.
pub fn snapshots() -> Scope {
    let left = Budget { commits: 2, cuts: 1, deletions: 1, ..NOTHING };
    Scope { drops: true, ..Scope::of(vec![a_disk_each(left)]) }
}

/// With blocks that are claimed meanwhile.
pub fn claims() -> Scope {
    let left = Budget { commits: 2, ..NOTHING };
    Scope { drops: true, ..Scope::of(vec![room_to_claim(left)]) }
}

/// Either host leads, also while the other still does; either one dies, leaves late writes, and comes back.
pub fn crashes() -> Scope {
    let left = Budget { commits: 1, crashes: 1, restarts: 1, cycles: 2, ..NOTHING };
    Scope { leaders: &[0, 1], ..Scope::of(vec![a_disk_each(left)]) }
}

/// One cycle, and enough commits to use again what a crash left.
pub fn late_writes() -> Scope {
    let left = Budget { commits: 2, crashes: 1, restarts: 1, ..NOTHING };
    Scope::of(vec![two_disks_on(0, left)])
}

/// Clones of clones beside the deletion of what they were made from.
pub fn clones() -> Scope {
    let left = Budget { clones: 2, cuts: 1, deletions: 3, ..NOTHING };
    Scope::of(vec![a_snapshot(left)])
}

/// A clone that is written to while trees are marked.
pub fn clones_in_use() -> Scope {
    let left = Budget { commits: 2, clones: 1, deletions: 1, ..NOTHING };
    Scope::of(vec![a_snapshot(left).with_disk(1, 1, 4, 0)])
}

/// A clone of a snapshot that is being committed on the same host.
pub fn early_clones() -> Scope {
    let left = Budget { commits: 1, cuts: 1, clones: 1, ..NOTHING };
    Scope { cloners: &[0], ..Scope::of(vec![two_disks_on(0, left)]) }
}

/// A host is evicted; its extents, and others without an owner, are claimed with what was found of them.
pub fn evictions() -> Scope {
    let left = Budget { commits: 1, crashes: 1, evictions: 1, ..NOTHING };
    Scope::of(vec![an_extent_without_owner(left)])
}

/// A host with room for one commit, whose next can only have what the first frees; the cycle's leader is dead.
pub fn full_beside_a_dead_leader() -> Scope {
    Scope::of(vec![a_dead_leader(Budget { commits: 2, cycles: 0, ..NOTHING })])
}

/// The same; another cycle may begin.
pub fn after_a_dead_leader() -> Scope {
    Scope::of(vec![a_dead_leader(NOTHING)])
}

/// Host 0 owns blocks 0 to 3, host 1 owns 4 to 7; nothing is allocated, and there is no disk.
fn empty(left: Budget) -> State {
    let host = || Host {
        up: true,
        generation: 0,
        acknowledged: 0,
        withdrawn: 0,
        settled: 0,
        pool: 0,
        commit: None,
        reader: None,
        cloning: None,
        cycle: None,
        lead: None,
    };
    let extent = |owner| Extent { owner: Some(owner), generation: 0, sequence: 0, swept: 0 };
    State {
        record: Record { epoch: 0, phase: Phase::Idle, leader: 0 },
        extents: [extent(0), extent(1)],
        allocated: 0xff,
        pages: [None; 2],
        nodes: [0; 8],
        registry: [Slot::default(); 3],
        hosts: [host(), host()],
        late: [Late::default(); 2],
        left,
    }
}

impl State {
    /// A disk whose tree is all its own.
    fn with_disk(mut self, slot: Index, owner: Index, node: Gba, children: Blocks) -> Self {
        let tree = Tree { node, children };
        let (own, creating) = (tree.blocks(), false);
        let head = Head { owner, creating, tree: Some(tree), own, snapshot: None };
        self.registry[slot as usize].head = Some(head);
        self.nodes[node as usize] = children;
        self
    }

    fn with_pools(mut self, pools: [Blocks; 2]) -> Self {
        (self.hosts[0].pool, self.hosts[1].pool) = (pools[0], pools[1]);
        self
    }
}

/// One disk on each host. The second one's data is in the first one's extent: it was there once. Block 3 (or 7) is in the pool,
/// one is garbage (2, 6).
fn a_disk_each(left: Budget) -> State {
    let state = empty(left).with_disk(0, 0, 0, 0).with_disk(1, 1, 4, bit(1));
    state.with_pools([bit(3), bit(7)])
}

/// Both disks on one host, each with data in the first host's extent.
fn two_disks_on(host: Index, left: Budget) -> State {
    let base = 4 * host;
    let (first, second) = if host == 0 { (bit(1), bit(4)) } else { (bit(0), bit(1)) };
    let state = empty(left).with_disk(0, host, base + 2, first).with_disk(1, host, base, second);
    let spare = bit(base + 3);
    state.with_pools(if host == 0 { [spare, 0] } else { [0, spare] })
}

/// A disk of the first host with a snapshot, in the last place: clones get places before it. Its data is block 1.
fn a_snapshot(left: Budget) -> State {
    let mut state = empty(left).with_disk(2, 0, 0, bit(1)).with_pools([bit(3), bit(7)]);
    if let Some(head) = &mut state.registry[2].head {
        // The disk itself was zeroed since.
        (head.snapshot, head.tree, head.own) = (head.tree, None, 0);
    }
    state
}

/// A disk of the first host, which has acknowledged a cycle; its leader died amid the marking.
fn a_dead_leader(left: Budget) -> State {
    let mut state = empty(left).with_disk(0, 0, 0, 0).with_pools([bit(3), 0]);
    state.record = Record { epoch: 1, phase: Phase::Mark, leader: 1 };
    state.hosts[1].up = false;
    let own = &mut state.hosts[0];
    own.acknowledged = 1;
    let (touched, quarantine) = (own.pool, Some(0));
    own.cycle = Some(Cycle { epoch: 1, touched, quarantine, turned: false });
    state
}

/// As [`a_disk_each`], and some of the bitmap is clear.
fn room_to_claim(left: Budget) -> State {
    let mut state = a_disk_each(left);
    state.allocated &= !(bit(2) | bit(6));
    state
}

/// As [`a_disk_each`], but nobody owns the second extent, where room is.
fn an_extent_without_owner(left: Budget) -> State {
    let mut state = a_disk_each(left);
    state.extents[1].owner = None;
    state.hosts[1].pool = 0;
    state.allocated &= !(bit(6) | bit(7));
    state
}
