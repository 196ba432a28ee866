//! A tree, beside a neighbour of which all was read: depth first, some leaves at a time; what these lead to is read in the order of
//! the device.

use super::damage::Part;
use super::disk::Named;
use super::looking::{BATCH, Looking, Place, Verdict, Whose, same};
use super::passed::Missed;
use super::progress::Start;
use super::reading::Bad;
use crate::mark::{DATA_ADVICE, MAP_ADVICE};
use blockstore::Result;
use blockstore::format::node::{Node, entry_span, tree_span};
use blockstore::format::pointer::Pointer;
use blockstore::sabotage::{self, Bug};
use blockstore::types::{BLOCK_SIZE, Lsn};
use bytes::Bytes;

/// Leaves looked through at once: 64 MiB of a disk.
const LEAVES: usize = 64;
/// Blocks of content that are read in one sweep over the device, at least; 1 MiB of memory.
const GATHER: usize = 16_384;
/// How often a node is followed to where it was moved to.
const MOVES: u32 = 16;

/// A tree of which all was read, or will have been.
pub(super) struct Neighbour {
    pub(super) root: Pointer,
    pub(super) height: u8,
    /// What it is, if it may change or go meanwhile.
    pub(super) whose: Option<Whose>,
}

/// A tree to verify.
pub(super) struct Tree<'t> {
    pub(super) named: &'t Named<'t>,
    pub(super) start: &'t Start,
    /// A snapshot, with its place in the list; none: the disk.
    pub(super) snapshot: Option<(u64, Lsn)>,
    /// Of the disk's snapshots, what was passed over so far.
    pub(super) missed: &'t Missed,
    pub(super) whose: Whose,
    pub(super) root: Pointer,
    pub(super) height: u8,
    /// Bytes of the disk.
    pub(super) size: u64,
    pub(super) neighbour: Option<Neighbour>,
    /// Everything before this block of the disk was done.
    pub(super) from: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Through,
    /// The disk, or the snapshot, was deleted.
    Gone,
}

/// What the neighbour has at the place of a node.
#[derive(Clone, Copy)]
enum Beside {
    Nothing,
    /// It is not as high; its top lies below the first entry.
    Above,
    At(Pointer),
}

impl Beside {
    fn is(self, pointer: Pointer) -> bool {
        matches!(self, Self::At(other) if same(other, pointer))
    }
}

#[derive(Clone, Copy)]
struct Visit {
    pointer: Pointer,
    /// First block of the disk below it.
    base: u64,
    beside: Beside,
}

/// A block of content.
#[derive(Clone, Copy)]
struct Block {
    pointer: Pointer,
    block: u64,
}

struct Walk<'w, 'a, 't> {
    looking: &'w mut Looking<'a>,
    tree: &'w Tree<'t>,
    gathered: Vec<Block>,
    gone: bool,
}

pub(super) async fn verify(looking: &mut Looking<'_>, tree: &Tree<'_>) -> Result<Ended> {
    if sabotage::on(Bug::ScrubNotesAhead) {
        tree.reach(looking, tree_span(tree.height));
    }
    let mut walk = Walk { looking, tree, gathered: Vec::new(), gone: false };
    walk.all().await?;
    if walk.gone {
        return Ok(Ended::Gone);
    }
    tree.reach(walk.looking, tree_span(tree.height));
    Ok(Ended::Through)
}

impl Walk<'_, '_, '_> {
    async fn all(&mut self) -> Result<()> {
        let Tree { root, height, .. } = *self.tree;
        let beside = self.beside_root().await?;
        if root.is_sparse() || beside.is(root) {
            return Ok(());
        }
        let mut stack = vec![(vec![Visit { pointer: root, base: 0, beside }], height)];
        while let Some((visits, level)) = stack.pop() {
            let mut end = 0;
            for (visit, node) in self.nodes(&visits, level).await? {
                let below = self.below(visit, &node, level).await?;
                if level > 1 {
                    // Inner nodes one by one, leaves some at a time: bounds the stack.
                    let batch = if level == 2 { LEAVES } else { 1 };
                    stack.extend(below.chunks(batch).rev().map(|c| (c.to_vec(), level - 1)));
                    continue;
                }
                end = visit.base + entry_span(2);
                let block = |visit: Visit| Block { pointer: visit.pointer, block: visit.base };
                self.gathered.extend(below.into_iter().map(block));
            }
            if self.gathered.len() >= GATHER {
                self.read_gathered().await?;
                self.tree.reach(self.looking, end);
            }
            if self.gone {
                return Ok(());
            }
        }
        self.read_gathered().await
    }

    /// What is to be looked at below a node.
    async fn below(&mut self, visit: Visit, node: &Node, level: u8) -> Result<Vec<Visit>> {
        let other = self.other(visit, level).await?;
        let mut below = Vec::new();
        for (slot, pointer) in node.children() {
            let base = visit.base + u64::from(slot) * entry_span(level);
            if base + entry_span(level) <= self.tree.from {
                continue;
            }
            let beside = match (&other, visit.beside, &self.tree.neighbour) {
                (Some(other), ..) => Beside::At(other.get(slot)),
                (None, Beside::Above, Some(neighbour)) if slot == 0 => {
                    match neighbour.height == level - 1 {
                        true => Beside::At(neighbour.root),
                        false => Beside::Above,
                    }
                }
                _ => Beside::Nothing,
            };
            let skips = sabotage::on(Bug::ScrubSkipsBeside)
                && matches!(beside, Beside::At(other) if !other.is_sparse());
            if !beside.is(pointer) && !skips {
                below.push(Visit { pointer, base, beside });
            }
        }
        Ok(below)
    }

    /// The neighbour's node at the place of a node.
    async fn other(&mut self, visit: Visit, level: u8) -> Result<Option<Node>> {
        match visit.beside {
            Beside::At(pointer) => self.node_beside(pointer, level, visit.base).await,
            Beside::Nothing | Beside::Above => Ok(None),
        }
    }

    async fn node_beside(
        &mut self,
        pointer: Pointer,
        level: u8,
        block: u64,
    ) -> Result<Option<Node>> {
        if pointer.is_sparse() {
            return Ok(None);
        }
        let whose = self.tree.neighbour.as_ref().and_then(|neighbour| neighbour.whose);
        let place = whose.map(|whose| Place::Tree { whose, level, block });
        let (disk, start) = (self.tree.named.disk, self.tree.start);
        self.looking.node_beside(disk, start, place, pointer).await
    }

    async fn beside_root(&mut self) -> Result<Beside> {
        let Some(neighbour) = &self.tree.neighbour else { return Ok(Beside::Nothing) };
        let (mut at, height) = (neighbour.root, neighbour.height);
        if height < self.tree.height {
            return Ok(Beside::Above);
        }
        for level in (self.tree.height + 1..=height).rev() {
            match self.node_beside(at, level, 0).await? {
                Some(node) => at = node.get(0),
                None => return Ok(Beside::Nothing),
            }
        }
        Ok(Beside::At(at))
    }

    /// Reads nodes of one level, and leaves out those that are damaged or gone.
    async fn nodes(&mut self, visits: &[Visit], level: u8) -> Result<Vec<(Visit, Node)>> {
        let pointers: Vec<Pointer> = visits.iter().map(|visit| visit.pointer).collect();
        let mut nodes = Vec::with_capacity(visits.len());
        for (visit, read) in visits.iter().zip(self.looking.read(&pointers).await?) {
            nodes.extend(self.node(*visit, level, read).await?);
            if self.gone {
                return Ok(Vec::new());
            }
        }
        Ok(nodes)
    }

    /// A node, or what is in its place by now.
    async fn node(
        &mut self,
        mut visit: Visit,
        level: u8,
        mut read: Result<Bytes, Bad>,
    ) -> Result<Option<(Visit, Node)>> {
        for _ in 0..MOVES {
            let verdict = match read {
                Ok(block) => Verdict::Good(block),
                Err(bad) => self.second_look(level, visit.base, visit.pointer, bad).await?,
            };
            match verdict {
                Verdict::Good(block) => match Node::decode(&block) {
                    Ok(node) => {
                        self.looking.progress().note(|so_far| so_far.metadata_blocks += 1);
                        return Ok(Some((visit, node)));
                    }
                    Err(damage) => {
                        let what = format!(
                            "node at block {}: {damage}, though its checksum matches; was it written by a newer version?",
                            visit.pointer.gba
                        );
                        self.found(level, visit.base, visit.pointer, what);
                        return Ok(None);
                    }
                },
                Verdict::Damaged(error) => {
                    self.found(level, visit.base, visit.pointer, error.to_string());
                    return Ok(None);
                }
                Verdict::Unknown(words) => {
                    self.unverified(level, visit.base, &words);
                    return Ok(None);
                }
                Verdict::Gone => {
                    self.gone = true;
                    return Ok(None);
                }
                Verdict::Replaced(now) => {
                    self.looking.progress().note(|so_far| so_far.replaced += 1);
                    if now.is_sparse() || visit.beside.is(now) {
                        return Ok(None);
                    }
                    visit.pointer = now;
                    read = self.looking.read(&[now]).await?.remove(0);
                }
            }
        }
        self.unverified(level, visit.base, "it keeps changing");
        Ok(None)
    }

    /// Reads what was gathered, in the order of the device.
    async fn read_gathered(&mut self) -> Result<()> {
        let mut blocks = std::mem::take(&mut self.gathered);
        blocks.sort_unstable_by_key(|block| block.pointer.gba);
        for batch in blocks.chunks(BATCH) {
            let pointers: Vec<Pointer> = batch.iter().map(|block| block.pointer).collect();
            for (block, read) in batch.iter().zip(self.looking.read(&pointers).await?) {
                let verdict = match read {
                    Ok(good) => Verdict::Good(good),
                    Err(bad) => self.second_look(0, block.block, block.pointer, bad).await?,
                };
                match verdict {
                    Verdict::Good(_) => {
                        self.looking.progress().note(|so_far| so_far.data_blocks += 1);
                    }
                    Verdict::Damaged(error) => {
                        self.found(0, block.block, block.pointer, error.to_string());
                    }
                    // What is in its place was written meanwhile.
                    Verdict::Replaced(_) => {
                        self.looking.progress().note(|so_far| so_far.replaced += 1);
                    }
                    Verdict::Unknown(words) => self.unverified(0, block.block, &words),
                    Verdict::Gone => {
                        self.gone = true;
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    async fn second_look(
        &mut self,
        level: u8,
        block: u64,
        pointer: Pointer,
        bad: Bad,
    ) -> Result<Verdict> {
        let place = self.tree.place(level, block);
        self.looking.second_look(self.tree.named.disk, place, pointer, bad).await
    }

    /// What lies below a place, in bytes of the disk.
    fn range(&self, level: u8, block: u64) -> (Option<Lsn>, u64, u64) {
        let offset = block * BLOCK_SIZE as u64;
        let bytes = tree_span(level) * BLOCK_SIZE as u64;
        (self.tree.lsn(), offset, bytes.min(self.tree.size.saturating_sub(offset)))
    }

    fn found(&self, level: u8, block: u64, pointer: Pointer, what: String) {
        let (part, advice) =
            if level == 0 { (Part::Data, DATA_ADVICE) } else { (Part::Map, MAP_ADVICE) };
        let range = Some(self.range(level, block));
        self.tree.named.found(self.looking, part, range, pointer, what, advice);
    }

    fn unverified(&self, level: u8, block: u64, words: &str) {
        let (snapshot, offset, bytes) = self.range(level, block);
        let of = snapshot.map_or(String::new(), |lsn| format!("snapshot {lsn}, "));
        let words = format!("{of}{bytes} bytes from offset {offset} on: {words}");
        self.looking.unverified(self.tree.named.about(&words));
    }
}
