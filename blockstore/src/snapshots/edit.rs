//! Changing a disk's snapshot tree: new leaves and nodes for what is touched, in fresh blocks.
//!
//! Nothing here writes to the device: the caller writes what comes out, has it flushed, and then swaps the head (rule C3).

use crate::alloc::{Allocator, Purpose};
use crate::buf::is_zero;
use crate::crc::crc32c;
use crate::error::Result;
use crate::format::extent::ExtentType;
use crate::format::node::{NODE_SHIFT, Node};
use crate::format::pointer::Pointer;
use crate::format::snapshot::{LEAF_SNAPSHOTS, SNAPSHOT_SIZE, Snapshot, snapshots_span};
use crate::format::vdi::SnapshotIndex;
use crate::io::Io;
use crate::tree::Reader;
use crate::types::{BLOCK_SIZE, Birth, Gba};
use bytes::{Bytes, BytesMut};
use std::collections::BTreeMap;
use std::sync::Arc;

/// New content by place; `None` deletes.
pub(crate) type Edits = BTreeMap<u64, Option<Snapshot>>;

/// A leaf that is known without reading it: the one that was written last.
pub(crate) type KnownLeaf = (Pointer, Bytes);

/// A changed tree that is not written yet.
#[derive(Debug)]
pub(crate) struct Edited {
    /// For the head.
    pub index: SnapshotIndex,
    /// What to write.
    pub writes: Vec<(Gba, Bytes)>,
    /// Nodes among that, for the node cache.
    pub nodes: Vec<(Pointer, Arc<Node>)>,
    /// What the tree no longer has.
    pub replaced: Vec<Gba>,
    /// The leaf with the newest place that was touched.
    pub last_leaf: Option<KnownLeaf>,
}

/// Where to look, and where to get blocks.
pub(crate) struct Ground<'a> {
    pub reader: &'a Reader,
    pub allocator: &'a Arc<Allocator>,
    pub io: &'a Io,
    pub purpose: Purpose,
}

impl Ground<'_> {
    /// Appends snapshots, which are newer than all that are there.
    pub(crate) async fn append(
        &self,
        index: SnapshotIndex,
        snapshots: Vec<Snapshot>,
        birth: Birth,
        known: Option<&KnownLeaf>,
    ) -> Result<Edited> {
        let added = snapshots.len() as u64;
        let edits = (index.made..).zip(snapshots.into_iter().map(Some)).collect();
        let next = SnapshotIndex { made: index.made + added, live: index.live + added, ..index };
        self.edit(index, next, &edits, birth, known).await
    }

    /// Changes or deletes snapshots that are there.
    pub(crate) async fn change(
        &self,
        index: SnapshotIndex,
        edits: &Edits,
        birth: Birth,
    ) -> Result<Edited> {
        let deleted = edits.values().filter(|edit| edit.is_none()).count() as u64;
        let next = SnapshotIndex { live: index.live - deleted, ..index };
        self.edit(index, next, edits, birth, None).await
    }

    async fn edit(
        &self,
        index: SnapshotIndex,
        next: SnapshotIndex,
        edits: &Edits,
        birth: Birth,
        known: Option<&KnownLeaf>,
    ) -> Result<Edited> {
        let mut height = index.height.max(1);
        while snapshots_span(height) < next.made {
            height += 1;
        }
        let (leaves, mut inner) = self.load(index, height, edits, known).await?;
        let blocks = leaves.len() + inner.iter().map(BTreeMap::len).sum::<usize>();
        let runs = self
            .allocator
            .allocate(self.io, ExtentType::Metadata, blocks as u64, self.purpose)
            .await?;
        let mut free = runs.iter().flat_map(|run| run.iter());
        let mut edited = Edited {
            index: SnapshotIndex { height, ..next },
            writes: Vec::new(),
            nodes: Vec::new(),
            replaced: Vec::new(),
            last_leaf: None,
        };
        // Level by level, from the leaves up: what the level above has to say of each.
        let mut said: BTreeMap<u64, Pointer> = BTreeMap::new();
        for (number, (old, mut leaf)) in leaves {
            let first = number * LEAF_SNAPSHOTS;
            for (place, edit) in edits.range(first..first + LEAF_SNAPSHOTS) {
                let at = (place - first) as usize * SNAPSHOT_SIZE;
                let entry = edit.as_ref().map_or([0; SNAPSHOT_SIZE], Snapshot::encode);
                leaf[at..at + SNAPSHOT_SIZE].copy_from_slice(&entry);
            }
            edited.replaced.extend((!old.is_sparse()).then_some(old.gba));
            let pointer = if is_zero(&leaf) {
                Pointer::SPARSE
            } else {
                let (gba, leaf) = (free.next().unwrap_or_default(), leaf.freeze());
                let pointer = Pointer { gba, read_only: false, birth, crc: crc32c(&leaf) };
                edited.writes.push((gba, leaf.clone()));
                edited.last_leaf = Some((pointer, leaf));
                pointer
            };
            said.insert(number, pointer);
        }
        for nodes in &mut inner {
            let mut above = BTreeMap::new();
            for (number, (old, node)) in nodes {
                let first = *number << NODE_SHIFT;
                for (child, pointer) in said.range(first..first + (1 << NODE_SHIFT)) {
                    node.set((child - first) as u8, *pointer);
                }
                edited.replaced.extend((!old.is_sparse()).then_some(old.gba));
                let pointer = if node.is_empty() {
                    Pointer::SPARSE
                } else {
                    let gba = free.next().unwrap_or_default();
                    let pointer = Pointer { gba, read_only: false, birth, crc: node.crc() };
                    edited.writes.push((gba, Bytes::copy_from_slice(node.bytes())));
                    edited.nodes.push((pointer, Arc::new(node.clone())));
                    pointer
                };
                above.insert(*number, pointer);
            }
            said = above;
        }
        edited.index.root = said.get(&0).copied().unwrap_or_default();
        self.allocator.free(free.collect());
        Ok(edited)
    }

    /// Reads what the edits touch, by number: the leaves, and the nodes of each level above.
    async fn load(
        &self,
        index: SnapshotIndex,
        height: u8,
        edits: &Edits,
        known: Option<&KnownLeaf>,
    ) -> Result<(Leaves, Vec<Nodes>)> {
        let mut inner = Vec::new();
        // Of the level at hand: what is there now. A tree that grows gets levels above its root, which goes below them.
        let mut level = height;
        let root = |level: u8| if level == index.height { index.root } else { Pointer::SPARSE };
        let mut at_level: BTreeMap<u64, Pointer> = [(0, root(height))].into();
        while level > 1 {
            let touched = touched(edits, level - 1);
            let stored: Vec<Pointer> =
                at_level.values().copied().filter(|p| !p.is_sparse()).collect();
            let mut read = self.reader.nodes(&stored).await?.into_iter();
            let mut nodes = Nodes::new();
            let mut below = BTreeMap::new();
            for (number, pointer) in at_level {
                let mut node = match pointer.is_sparse() {
                    true => Node::empty(),
                    false => read.next().map(Arc::unwrap_or_clone).unwrap_or_else(Node::empty),
                };
                if level > index.height && number == 0 {
                    node.set(0, root(level - 1));
                }
                let first = number << NODE_SHIFT;
                for child in touched.iter().filter(|child| *child >> NODE_SHIFT == number) {
                    below.insert(*child, node.get((child - first) as u8));
                }
                nodes.insert(number, (pointer, node));
            }
            inner.push(nodes);
            at_level = below;
            level -= 1;
        }
        inner.reverse();
        let mut leaves = Leaves::new();
        for (number, pointer) in at_level {
            let content = match known.filter(|(known, _)| *known == pointer) {
                _ if pointer.is_sparse() => BytesMut::zeroed(BLOCK_SIZE),
                Some((_, leaf)) => BytesMut::from(&leaf[..]),
                None => BytesMut::from(&self.reader.read_blocks(&[pointer]).await?[0][..]),
            };
            leaves.insert(number, (pointer, content));
        }
        Ok((leaves, inner))
    }
}

type Leaves = BTreeMap<u64, (Pointer, BytesMut)>;
type Nodes = BTreeMap<u64, (Pointer, Node)>;

/// Numbers of the nodes of `level` (1: leaves) that the edits lie in, in order.
fn touched(edits: &Edits, level: u8) -> Vec<u64> {
    let span = snapshots_span(level);
    let mut numbers: Vec<u64> = edits.keys().map(|place| place / span).collect();
    numbers.dedup();
    numbers
}
