//! Who points at a block: a walk over all trees that looks for one address.
//!
//! A node is read once, however many disks and snapshots share it, and named after the first of them. Leaves of disks' trees are
//! read only if what is looked for lies in an extent of data. Damaged nodes are passed over, and counted.

use crate::bits::Bits;
use crate::collect::Progress;
use blockstore::describe::Role;
use blockstore::format::extent::ExtentType;
use blockstore::format::node::{NODE_SHIFT, Node, entry_span};
use blockstore::format::pointer::Pointer;
use blockstore::format::snapshot::LEAF_SNAPSHOTS;
use blockstore::format::vdi::{VdiHead, VdiState};
use blockstore::tree::Reader;
use blockstore::types::Gba;
use blockstore::{Result, Store, StoreErrorKind};
use std::sync::Arc;

/// Pointers that are listed.
const FOUND_MAX: usize = 64;
/// Nodes read at once.
const BATCH: usize = 128;
/// Nodes that a search reads that is not told to read all.
const CHEAP: u64 = 16_384;

/// Something that points at the block.
#[derive(Clone, Debug)]
pub struct Pointing {
    /// What, in words.
    pub by: String,
    /// What it takes the block for.
    pub role: Role,
    /// The pointer.
    pub pointer: Pointer,
}

/// Outcome of a search.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Who points at it.
    pub pointing: Vec<Pointing>,
    /// All trees were searched, or something was found and that was enough.
    pub complete: bool,
    /// Nodes that could not be read: somebody below them may point at it, too.
    pub damaged: u64,
}

/// Looks for pointers at `target`, which lies in an extent of `kind`. Without `all` until one is found, or a good many nodes were
/// read.
///
/// # Errors
/// The device's.
pub async fn find(
    store: &Store,
    target: Gba,
    kind: Option<ExtentType>,
    all: bool,
    progress: &Progress,
) -> Result<Found> {
    let reader = store.reader();
    let seen = Bits::new(reader.geometry().total_blocks());
    let lowest = if kind == Some(ExtentType::Metadata) { 2 } else { 1 };
    let found = Found { complete: true, ..Found::default() };
    let mut search = Search { reader, target, lowest, all, seen, nodes: 0, found, progress };
    for (_, view) in store.scan_vdis().await? {
        let Some(head) = view.record() else {
            search.found.damaged += 1;
            continue;
        };
        if matches!(head.state, VdiState::Active | VdiState::Creating) {
            let name = store.read_name_block(head).await?.unwrap_or_else(|_| "unnamed".into());
            search.disk(&format!("VDI '{name}' ({})", head.uuid), head).await?;
        }
        if search.is_over() {
            break;
        }
    }
    Ok(search.found)
}

struct Search<'a> {
    reader: Reader,
    target: Gba,
    /// Nodes below this level have no children that could be meant.
    lowest: u8,
    all: bool,
    seen: Bits,
    nodes: u64,
    found: Found,
    progress: &'a Progress,
}

/// A node to read.
#[derive(Clone, Copy)]
struct Visit {
    pointer: Pointer,
    level: u8,
    /// The first of what it stands for: a block of the disk, or a leaf of the list.
    first: u64,
}

impl Search<'_> {
    fn is_over(&self) -> bool {
        let limit = if self.all { FOUND_MAX } else { 1 };
        self.found.pointing.len() >= limit || !self.found.complete
    }

    fn look(&mut self, pointer: Pointer, role: Role, by: impl FnOnce() -> String) {
        if pointer.gba == self.target && !pointer.is_sparse() {
            self.found.pointing.push(Pointing { by: by(), role, pointer });
        }
    }

    async fn disk(&mut self, whose: &str, head: &VdiHead) -> Result<()> {
        self.look(head.meta, Role::Name, || format!("{whose}: its head, as its name block"));
        self.tree(whose, head.root, head.height).await?;
        let index = head.snapshots;
        let role = |level| if level <= 1 { Role::SnapshotLeaf } else { Role::SnapshotNode(level) };
        self.look(index.root, role(index.height), || {
            format!("{whose}: its head, as the top of its list of snapshots")
        });
        let mut stack = vec![Visit { pointer: index.root, level: index.height, first: 0 }];
        while let Some(visit) = stack.pop() {
            if self.is_over() || !self.enter(visit.pointer) {
                continue;
            }
            if visit.level <= 1 {
                self.leaf(whose, visit).await?;
                continue;
            }
            let span = 1u64 << (NODE_SHIFT * (u32::from(visit.level) - 2));
            for (_, node) in self.read(&[visit]).await? {
                for (slot, child) in node.children() {
                    let (level, first) = (visit.level - 1, visit.first + u64::from(slot) * span);
                    self.look(child, role(level), || {
                        format!(
                            "{whose}: its list of snapshots from place {} on",
                            first * LEAF_SNAPSHOTS
                        )
                    });
                    stack.push(Visit { pointer: child, level, first });
                }
            }
        }
        Ok(())
    }

    async fn leaf(&mut self, whose: &str, visit: Visit) -> Result<()> {
        let snapshots = match self.reader.snapshot_leaf(visit.first, visit.pointer).await {
            Ok(snapshots) => snapshots,
            Err(error) if error.kind == StoreErrorKind::Corrupt => {
                self.found.damaged += 1;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        for (_, snapshot) in snapshots {
            let whose = format!("{whose}, snapshot {}", snapshot.lsn);
            self.tree(&whose, snapshot.root, snapshot.height).await?;
        }
        Ok(())
    }

    /// A disk's or a snapshot's tree.
    async fn tree(&mut self, whose: &str, root: Pointer, height: u8) -> Result<()> {
        self.look(root, Role::Node(height), || format!("{whose}: its root"));
        let mut stack = vec![Visit { pointer: root, level: height, first: 0 }];
        while let Some(top) = stack.last() {
            let level = top.level;
            let same = stack.iter().rev().take(BATCH).take_while(|visit| visit.level == level);
            let batch = stack.split_off(stack.len() - same.count());
            let batch: Vec<Visit> = batch
                .into_iter()
                .filter(|v| level >= self.lowest && self.enter(v.pointer))
                .collect();
            if self.is_over() {
                return Ok(());
            }
            for (visit, node) in self.read(&batch).await? {
                for (slot, child) in node.children() {
                    let span = entry_span(level);
                    let first = visit.first + u64::from(slot) * span;
                    if level == 1 {
                        self.look(child, Role::Data, || format!("{whose}: disk block {first}"));
                        continue;
                    }
                    self.look(child, Role::Node(level - 1), || {
                        format!("{whose}: disk blocks {first} to {}", first + span - 1)
                    });
                    stack.push(Visit { pointer: child, level: level - 1, first });
                }
            }
        }
        Ok(())
    }

    /// True if the node is to be read, and was not before.
    fn enter(&mut self, pointer: Pointer) -> bool {
        !pointer.is_sparse()
            && self.reader.geometry().is_allocatable(pointer.gba)
            && self.seen.insert(pointer.gba)
    }

    /// Reads nodes; those that are damaged are left out.
    async fn read(&mut self, visits: &[Visit]) -> Result<Vec<(Visit, Arc<Node>)>> {
        self.nodes += visits.len() as u64;
        self.progress.note(self.nodes, self.nodes);
        if !self.all && self.nodes > CHEAP {
            self.found.complete = false;
            return Ok(Vec::new());
        }
        let pointers: Vec<Pointer> = visits.iter().map(|visit| visit.pointer).collect();
        match self.reader.read_nodes(&pointers).await {
            Ok(nodes) => return Ok(visits.iter().copied().zip(nodes).collect()),
            Err(error) if error.kind == StoreErrorKind::Corrupt => {}
            Err(error) => return Err(error),
        }
        let mut good = Vec::new();
        for visit in visits {
            match self.reader.read_nodes(&[visit.pointer]).await {
                Ok(mut nodes) => good.push((*visit, nodes.remove(0))),
                Err(error) if error.kind == StoreErrorKind::Corrupt => self.found.damaged += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(good)
    }
}
