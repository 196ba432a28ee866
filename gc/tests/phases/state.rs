//! The abstract store: eight blocks in two extents, three places for disks, two hosts.
//!
//! A block of metadata holds a set of blocks, one of data holds none. A pointer carries what its block is to hold, which is its
//! checksum. What a host has in memory ends with it; what it had sent may land after its death, once or never.

/// A set of blocks, one bit each.
pub type Blocks = u8;
/// A block's address.
pub type Gba = u8;
/// A host, a place in the registry, an extent.
pub type Index = u8;

pub const HOSTS: Index = 2;
pub const SLOTS: Index = 3;
pub const EXTENTS: Index = 2;
/// The blocks of each extent.
pub const EXTENT_BLOCKS: [Blocks; 2] = [0x0f, 0xf0];

/// The set that holds one block.
pub fn bit(block: Gba) -> Blocks {
    1 << block
}

/// The blocks of a set, in order.
pub fn each(blocks: Blocks) -> impl Iterator<Item = Gba> {
    (0..8).filter(move |block| blocks & bit(*block) != 0)
}

/// A pointer to a disk's only node, with what it is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tree {
    pub node: Gba,
    pub children: Blocks,
}

impl Tree {
    pub fn blocks(self) -> Blocks {
        bit(self.node) | self.children
    }
}

/// A disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Head {
    pub owner: Index,
    /// It is being made: a root, but no disk yet.
    pub creating: bool,
    pub tree: Option<Tree>,
    /// What was born after its last snapshot.
    pub own: Blocks,
    pub snapshot: Option<Tree>,
}

impl Head {
    /// The trees that it is a root of.
    pub fn trees(&self) -> impl Iterator<Item = Tree> {
        self.tree.into_iter().chain(self.snapshot)
    }
}

/// A place of the registry. Changed by compare-and-write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Slot {
    pub sequence: u8,
    /// Disks that were made and buried here: stands for the UUID.
    pub identity: u8,
    pub head: Option<Head>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    Idle,
    Prepare,
    Mark,
    Sweep,
    Done,
}

/// The GC record. Changed by compare-and-write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    pub epoch: u8,
    pub phase: Phase,
    pub leader: Index,
}

/// An extent's record. Changed by compare-and-write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// None: its owner was evicted, and nobody has claimed it since.
    pub owner: Option<Index>,
    pub generation: u8,
    pub sequence: u8,
    pub swept: u8,
}

/// A page of a reclaim bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Page {
    pub epoch: u8,
    pub sequence: u8,
    pub found: Blocks,
}

/// How far a commit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Its block is allocated, and being written.
    Writing,
    /// That is done, and its head is on its way.
    Heading,
    /// The head landed, and the host has yet to learn of it.
    Landed,
}

/// A commit under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Commit {
    pub slot: Index,
    /// Sequence of the head that it replaces.
    pub base: u8,
    /// What the host reads until it has learnt of the next head.
    pub before: Option<Tree>,
    pub tree: Tree,
    pub next: Head,
    pub stage: Stage,
    pub stay: Stay,
    pub garbage: Blocks,
}

/// Keeps an era from being over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Stay {
    /// That era has ended.
    pub old: bool,
    /// Blocks were given back by a cycle in which this host had no part: it finds out by the checksum, and reads anew.
    pub outdated: bool,
}

/// A former tree that is still read, and what is free after that: also what later commits of that disk cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Reader {
    pub slot: Index,
    pub tree: Option<Tree>,
    pub garbage: Blocks,
    pub stay: Stay,
}

/// A clone that is being made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cloning {
    pub source: Index,
    pub tree: Tree,
    /// Where it is in the registry, once it is.
    pub slot: Option<Index>,
    /// Its source was looked at once more.
    pub looked: bool,
}

/// A cycle that a host has acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cycle {
    pub epoch: u8,
    pub touched: Blocks,
    pub quarantine: Option<Blocks>,
    /// The era ended after the marking did.
    pub turned: bool,
}

/// What a leader does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    Ask,
    /// Read that place of the registry.
    Read(Index),
    /// Read the nodes that were found.
    Nodes,
    /// The marking is over.
    Publish,
    /// Write that extent's reclaim page.
    Sweep(Index),
    /// All of them are written.
    Finish,
}

/// A cycle that a host leads.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lead {
    pub epoch: u8,
    pub task: Task,
    /// Sequences of the extents to sweep.
    pub extents: [Option<u8>; EXTENTS as usize],
    pub round: u8,
    /// Sequence and identity of each place when it was read.
    pub seen: [(u8, u8); SLOTS as usize],
    /// A disk was made or buried since the round before.
    pub others: bool,
    pub frontier: Vec<Tree>,
    /// Pointers that were followed; not kept if one bit is to be enough.
    pub known: Vec<Tree>,
    pub marks: Blocks,
}

/// What a host has in memory, and its record.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    pub up: bool,
    pub generation: u8,
    /// In its record: the epoch that it acknowledged.
    pub acknowledged: u8,
    /// In its record: the epoch of which it took that back.
    pub withdrawn: u8,
    /// In its record: the epoch of whose marking no older stay is left.
    pub settled: u8,
    pub pool: Blocks,
    pub commit: Option<Commit>,
    pub reader: Option<Reader>,
    pub cloning: Option<Cloning>,
    pub cycle: Option<Cycle>,
    pub lead: Option<Lead>,
}

/// What a dead host had sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Late {
    pub node: Option<Tree>,
    /// Place, sequence that it expects, head.
    pub head: Option<(Index, u8, Head)>,
    pub page: Option<(Index, Page)>,
}

/// What may still happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Budget {
    pub commits: u8,
    pub cuts: u8,
    pub deletions: u8,
    pub clones: u8,
    pub readers: u8,
    pub crashes: u8,
    pub restarts: u8,
    pub evictions: u8,
    pub cycles: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub record: Record,
    pub extents: [Extent; EXTENTS as usize],
    /// Allocation bitmaps.
    pub allocated: Blocks,
    pub pages: [Option<Page>; EXTENTS as usize],
    /// What each block holds.
    pub nodes: [Blocks; 8],
    pub registry: [Slot; SLOTS as usize],
    pub hosts: [Host; HOSTS as usize],
    pub late: [Late; HOSTS as usize],
    pub left: Budget,
}

impl State {
    pub fn host(&self, host: Index) -> &Host {
        &self.hosts[host as usize]
    }

    pub fn host_mut(&mut self, host: Index) -> &mut Host {
        &mut self.hosts[host as usize]
    }

    pub fn head(&self, slot: Index) -> Option<&Head> {
        self.registry[slot as usize].head.as_ref()
    }

    /// Blocks of the extents that a host owns.
    pub fn territory(&self, host: Index) -> Blocks {
        let extents = self.extents.iter().zip(EXTENT_BLOCKS);
        extents.filter(|(extent, _)| extent.owner == Some(host)).fold(0, |all, (_, of)| all | of)
    }

    /// Writes a head if the place is as expected.
    pub fn swap(&mut self, slot: Index, expected: u8, head: Option<Head>) -> bool {
        let place = &mut self.registry[slot as usize];
        if place.sequence != expected {
            return false;
        }
        place.identity += u8::from(place.head.is_some() != head.is_some());
        (place.sequence, place.head) = (expected + 1, head);
        true
    }

    /// A host gives blocks back that nothing of its own reaches any more.
    pub fn free(&mut self, host: Index, blocks: Blocks, touch: bool, quarantine: bool) {
        let blocks = blocks & self.territory(host);
        let host = self.host_mut(host);
        if let Some(cycle) = &mut host.cycle {
            if touch {
                cycle.touched |= blocks;
            }
            if let Some(kept) = cycle.quarantine.as_mut().filter(|_| quarantine) {
                *kept |= blocks;
                return;
            }
        }
        host.pool |= blocks;
    }
}

impl Host {
    /// It acknowledged a cycle, and did not take that back.
    pub fn takes_part(&self, epoch: u8) -> bool {
        self.acknowledged == epoch && self.withdrawn != epoch
    }

    /// Its cycle ends, whatever became of it.
    pub fn give_up(&mut self) {
        self.end_quarantine();
        self.cycle = None;
    }

    pub fn end_quarantine(&mut self) {
        let kept = self.cycle.as_mut().and_then(|cycle| cycle.quarantine.take());
        self.pool |= kept.unwrap_or(0);
    }

    /// What is free for it alone, now or after the quarantine.
    pub fn holds_free(&self) -> Blocks {
        self.pool | self.cycle.and_then(|cycle| cycle.quarantine).unwrap_or(0)
    }
}
