//! Marking: walks a tree, checks every node against its pointer, and sets a bit per reachable block.
//!
//! Depth first, 256 nodes at a time in disk order, so memory does not grow with the disk. A subtree
//! that another tree reached before, and that both may share, is not walked again: so a disk's thousandth snapshot costs
//! what it does not share with the others.

mod snapshots;

use crate::bits::Bits;
use blockstore::format::extent::ExtentType;
use blockstore::format::geometry::Geometry;
use blockstore::format::node::{NODE_SHIFT, entry_span};
use blockstore::format::pointer::Pointer;
use blockstore::format::vdi::VdiHead;
use blockstore::tree::Reader;
use blockstore::types::{Gba, Lsn};
use blockstore::{Result, StoreErrorKind};

/// What the catalogue says of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// Its record is damaged.
    Unknown,
    /// Nothing that counts: it is unused, the system's, or still being set up.
    Nothing(ExtentType),
    /// Blocks of this kind, with a BMap.
    Blocks(ExtentType),
}

/// What the bitmaps and the catalogue say, and what was reached so far.
#[derive(Debug)]
pub struct Marks {
    /// What each extent holds.
    pub extents: Vec<Holds>,
    /// Blocks whose BMap bit is set.
    pub allocated: Bits,
    /// Blocks that some tree reaches.
    pub reached: Bits,
    /// Of these, those that their tree holds as its own, which nobody else may reach.
    exclusive: Bits,
    /// Nodes read and checked.
    pub nodes: u64,
    /// Snapshots whose trees were walked.
    pub snapshots: u64,
    /// Data blocks read and checked.
    pub data_checked: u64,
    /// Problems that leave open what is reachable.
    pub doubts: u64,
}

/// A node to visit.
#[derive(Clone, Copy)]
struct Visit {
    pointer: Pointer,
    /// First block of the disk that the node maps.
    base: u64,
}

/// Takes problems, as sentences.
pub trait Problems {
    /// One more, with what the operator can do; none: it is repaired by `store repair`.
    fn report(&mut self, problem: String, advice: Option<&'static str>);
}

pub(crate) const MAP_ADVICE: &str = "the disk blocks below it cannot be read: put the block back from a copy of the device, or take the disk \
     back to a snapshot that the check does not name ('vdi rollback --to')";
pub(crate) const DATA_ADVICE: &str =
    "reads of it fail: let the guest write it anew, or take it from a backup or a snapshot";
pub(crate) const SNAPSHOTS_ADVICE: &str = "snapshots in it cannot be read, and the disk takes no commits that change the list: put the block \
     back from a copy of the device, or copy the disk out with 'store export'";
pub(crate) const NAME_ADVICE: &str = "the disk goes on under its UUID";
pub(crate) const ENTRY_ADVICE: &str = "this was not written by a sound program: copy the disk out with 'store export', delete it, and report this";

impl Marks {
    /// Nothing is reached yet.
    #[must_use]
    pub fn new(extents: Vec<Holds>, allocated: Bits, geometry: &Geometry) -> Self {
        let blocks = geometry.total_blocks();
        Self {
            extents,
            allocated,
            reached: Bits::new(blocks),
            exclusive: Bits::new(blocks),
            nodes: 0,
            snapshots: 0,
            data_checked: 0,
            doubts: 0,
        }
    }

    /// Marks everything that a disk and its snapshots reach. With `data`, data blocks are read and checked too. `name` is the
    /// disk's, or what is wrong with it.
    ///
    /// # Errors
    /// The device's; damage is reported as a problem.
    pub async fn mark(
        &mut self,
        reader: &Reader,
        name: &Result<String, String>,
        head: &VdiHead,
        data: bool,
        problems: &mut (dyn Problems + Send),
    ) -> Result<()> {
        let unnamed = String::from("unnamed");
        let label = name.as_ref().unwrap_or(&unnamed);
        let mut tree =
            TreeWalk { marks: self, reader, name: label, head, problems, snapshot: None };
        if let Err(damage) = name {
            tree.tell(format!("its name block is damaged: {damage}"), Some(NAME_ADVICE));
        }
        tree.reach_own(head.meta, "its name block");
        tree.walk_all(data).await?;
        tree.walk_snapshots(data).await
    }
}

struct TreeWalk<'a> {
    marks: &'a mut Marks,
    reader: &'a Reader,
    name: &'a str,
    head: &'a VdiHead,
    problems: &'a mut (dyn Problems + Send),
    /// The one that is being walked, if it is not the disk itself.
    snapshot: Option<Lsn>,
}

impl TreeWalk<'_> {
    async fn walk_all(&mut self, data: bool) -> Result<()> {
        let root = self.head.root;
        if !root.is_sparse() && self.reach(root, ExtentType::Metadata, "its root") {
            self.walk(data).await?;
        }
        Ok(())
    }

    async fn walk(&mut self, data: bool) -> Result<()> {
        let mut stack = vec![(vec![Visit { pointer: self.head.root, base: 0 }], self.head.height)];
        while let Some((visits, level)) = stack.pop() {
            for visit in self.read_nodes(&visits).await? {
                let (node, visit) = visit;
                let mut below = Vec::new();
                for (slot, child) in node.children() {
                    let base = visit.base + u64::from(slot) * entry_span(level);
                    if self.enter(visit, child, level, base) {
                        below.push(Visit { pointer: child, base });
                    }
                }
                if level > 1 {
                    // Inner nodes one by one, leaves as a batch: bounds the stack.
                    let batch = if level == 2 { below.len().max(1) } else { 1 };
                    stack.extend(below.chunks(batch).rev().map(|c| (c.to_vec(), level - 1)));
                } else if data {
                    self.check_data(&below).await?;
                }
            }
        }
        Ok(())
    }

    /// Checks an entry and marks its block; true if what is below is to be visited.
    fn enter(&mut self, parent: Visit, child: Pointer, level: u8, base: u64) -> bool {
        if base >= self.head.blocks() {
            self.say(format!("an entry for block {base} lies beyond the disk's end"), ENTRY_ADVICE);
            return false;
        }
        if child.birth > parent.pointer.birth {
            let (birth, node) = (child.birth, parent.pointer.birth);
            self.say(
                format!("the entry for block {base} (birth {birth}) is younger than its node (birth {node})"),
                ENTRY_ADVICE,
            );
        }
        if level == 1 {
            self.reach(child, ExtentType::Data, &format!("disk block {base}"))
        } else {
            let blocks = 1u64 << (NODE_SHIFT * u32::from(level - 1));
            let what = format!("the node of disk blocks {base} to {}", base + blocks - 1);
            self.reach(child, ExtentType::Metadata, &what)
        }
    }

    /// Marks one block and checks its place; true if it was not reached before.
    fn reach(&mut self, pointer: Pointer, kind: ExtentType, what: &str) -> bool {
        let own = pointer.is_exclusive(self.head.last_snapshot_birth);
        self.reach_as(pointer, kind, what, own)
    }

    /// As [`Self::reach`], for metadata that is no part of a tree that anyone could share.
    fn reach_own(&mut self, pointer: Pointer, what: &str) -> bool {
        self.reach_as(pointer, ExtentType::Metadata, what, true)
    }

    fn reach_as(&mut self, pointer: Pointer, kind: ExtentType, what: &str, own: bool) -> bool {
        let (gba, geometry) = (pointer.gba, self.reader.geometry());
        if pointer.is_sparse() {
            return false;
        }
        if !geometry.is_allocatable(gba) {
            let words = format!("{what} is said to be at block {gba}, which no tree block can be");
            self.say(words, MAP_ADVICE);
            return false;
        }
        let extent = geometry.extent_of(gba);
        match self.marks.extents[extent as usize] {
            // Its record is reported; what its BMap says is not known to count.
            Holds::Unknown => {}
            Holds::Blocks(found) | Holds::Nothing(found) if found != kind => self.say(
                format!("{what} is at block {gba} of extent {extent}, which holds {found:?}, not {kind:?}"),
                ENTRY_ADVICE,
            ),
            Holds::Nothing(_) => self.say(
                format!("{what} is at block {gba} of extent {extent}, which is still being set up"),
                ENTRY_ADVICE,
            ),
            Holds::Blocks(_) if !self.marks.allocated.contains(gba) => {
                self.tell(format!("{what} is at block {gba}, which is marked free"), None);
            }
            Holds::Blocks(_) => {}
        }
        let fresh = self.marks.reached.insert(gba);
        if !fresh && (own || self.marks.exclusive.contains(gba)) {
            let words = format!("{what} is at block {gba}, which something else uses too");
            self.say(words, ENTRY_ADVICE);
        }
        if own {
            self.marks.exclusive.insert(gba);
        }
        fresh
    }

    /// Reads nodes; on damage one by one, to tell the good from the bad.
    async fn read_nodes(
        &mut self,
        visits: &[Visit],
    ) -> Result<Vec<(std::sync::Arc<blockstore::format::node::Node>, Visit)>> {
        let pointers: Vec<Pointer> = visits.iter().map(|v| v.pointer).collect();
        let nodes = match self.reader.read_nodes(&pointers).await {
            Ok(nodes) => nodes.into_iter().zip(visits.iter().copied()).collect(),
            Err(error) if error.kind == StoreErrorKind::Corrupt => {
                let mut good = Vec::new();
                for visit in visits {
                    match self.reader.read_nodes(&[visit.pointer]).await {
                        Ok(mut nodes) => good.push((nodes.remove(0), *visit)),
                        Err(error) if error.kind == StoreErrorKind::Corrupt => {
                            let base = visit.base;
                            self.say(
                                format!("its map from block {base} on is damaged: {error}"),
                                MAP_ADVICE,
                            );
                        }
                        Err(error) => return Err(error),
                    }
                }
                good
            }
            Err(error) => return Err(error),
        };
        self.marks.nodes += nodes.len() as u64;
        Ok(nodes)
    }

    async fn check_data(&mut self, blocks: &[Visit]) -> Result<()> {
        let pointers: Vec<Pointer> = blocks.iter().map(|v| v.pointer).collect();
        for (visit, block) in blocks.iter().zip(self.reader.judge_blocks(&pointers).await?) {
            if let Err(error) = block {
                // What is reachable is known all the same.
                let words = format!("its block {} is damaged: {error}", visit.base);
                self.tell(words, Some(DATA_ADVICE));
            }
        }
        self.marks.data_checked += blocks.len() as u64;
        Ok(())
    }

    /// A problem that leaves open what the disk reaches.
    fn say(&mut self, what: String, advice: &'static str) {
        self.marks.doubts += 1;
        self.tell(what, Some(advice));
    }

    fn tell(&mut self, what: String, advice: Option<&'static str>) {
        let snapshot = self.snapshot.map_or(String::new(), |lsn| format!(", snapshot {lsn}"));
        let problem = format!("VDI '{}' ({}){snapshot}: {what}.", self.name, self.head.uuid);
        self.problems.report(problem, advice);
    }
}

/// Marks the bits of an extent that its BMap says are allocated.
pub fn take_page(
    allocated: &mut Bits,
    geometry: &Geometry,
    extent: u32,
    page: u32,
    content: &blockstore::format::bitmap::BitmapPage,
) {
    let base =
        geometry.extent_base(extent).0 + u64::from(page) * blockstore::format::bitmap::PAGE_BITS;
    for bit in 0..geometry.page_bits(page) {
        if content.get(bit) {
            allocated.insert(Gba(base + bit));
        }
    }
}
