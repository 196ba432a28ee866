//! What differs between two trees: both are walked together, and what one pointer names in both is not looked into.
//!
//! Nothing reachable is overwritten, so one pointer is one content. Reading costs a pair of nodes per changed node, whatever the
//! size; a block that was written anew with the same bytes counts as changed. Trees may differ in height: the shorter one
//! hangs in the first place of what is above it.

use crate::error::Result;
use crate::format::node::{NODE_ENTRIES, NODE_SHIFT, Node, tree_span};
use crate::format::pointer::Pointer;
use crate::tree::Reader;
use crate::types::Lba;
use std::sync::Arc;

/// Pairs of nodes that are read at once.
const PAIRS_AT_ONCE: usize = 64;
/// Pairs of nodes that one page looks into.
const PAIRS_MAX: usize = 16_384;

/// A tree of blocks: a disk's, or that of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tree {
    pub root: Pointer,
    pub height: u8,
    pub blocks: u64,
}

/// Blocks that differ, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChangedRange {
    /// The first.
    pub first: Lba,
    /// How many.
    pub blocks: u64,
    /// They are zeros now.
    pub zeros: bool,
}

/// A part of what differs, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChangedPage {
    /// The ranges. The last may go on with the first of the next page.
    pub ranges: Vec<ChangedRange>,
    /// Where the next page begins; none: this is all.
    pub next: Option<Lba>,
}

/// What both trees have in one place.
#[derive(Clone, Copy, Debug)]
struct Pair {
    old: Side,
    new: Side,
    level: u8,
    base: u64,
}

/// What one tree has in a place of some level: a node of that level, or of a lower one, which is its first child then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Side {
    pointer: Pointer,
    level: u8,
}

impl Side {
    fn child(self, level: u8, slot: u8, node: Option<&Node>) -> Self {
        if self.level == level {
            let pointer = node.map_or(Pointer::SPARSE, |node| node.get(slot));
            return Self { pointer, level: level - 1 };
        }
        if slot == 0 { self } else { Self { pointer: Pointer::SPARSE, level: level - 1 } }
    }

    /// What is to be read to look into it.
    fn to_read(self, level: u8) -> Option<Pointer> {
        (self.level == level && !self.pointer.is_sparse()).then_some(self.pointer)
    }

    fn is_same(self, other: Self) -> bool {
        // A sparse place is one at any level.
        self.pointer == other.pointer && (self.level == other.level || self.pointer.is_sparse())
    }
}

impl Reader {
    /// The blocks below `new`'s size that differ between two trees, from block `from` on, at most `limit` ranges.
    ///
    /// # Errors
    /// Those of reading nodes.
    pub(crate) async fn diff(
        &self,
        old: Tree,
        new: Tree,
        from: Lba,
        limit: usize,
    ) -> Result<ChangedPage> {
        let level = old.height.max(new.height);
        let side = |tree: Tree| Side { pointer: tree.root, level: tree.height };
        let mut page = ChangedPage::default();
        // The next one last.
        let mut stack = vec![Pair { old: side(old), new: side(new), level, base: 0 }];
        let mut looked_into = 0;
        loop {
            // As many as lie one after the other on one level.
            let next = stack.last().filter(|pair| pair.base < new.blocks);
            let level = next.map_or(0, |pair| pair.level);
            let next = next.map(|pair| Lba(pair.base));
            if next.is_none() || page.ranges.len() > limit || looked_into >= PAIRS_MAX {
                return Ok(page.cut_at(limit, next));
            }
            let run = stack.iter().rev().take_while(|pair| pair.level == level);
            let run = stack.len() - run.take(PAIRS_AT_ONCE).count();
            let mut pairs = stack.split_off(run);
            pairs.reverse();
            pairs.retain(|pair| {
                !pair.old.is_same(pair.new) && pair.base + tree_span(pair.level) > from.0
            });
            looked_into += pairs.len();
            let below = self.look_into(&pairs).await?;
            if level == 1 {
                for pair in
                    below.iter().filter(|pair| pair.base >= from.0 && pair.base < new.blocks)
                {
                    page.add(Lba(pair.base), pair.new.pointer.is_sparse());
                }
            } else {
                stack.extend(below.into_iter().rev());
            }
        }
    }

    /// What differs one level down, in order.
    async fn look_into(&self, pairs: &[Pair]) -> Result<Vec<Pair>> {
        let wanted = |pair: &Pair| [pair.old.to_read(pair.level), pair.new.to_read(pair.level)];
        let pointers: Vec<Pointer> = pairs.iter().flat_map(wanted).flatten().collect();
        let mut read = self.nodes(&pointers).await?.into_iter();
        let mut below = Vec::new();
        for pair in pairs {
            let [old, new]: [Option<Arc<Node>>; 2] =
                wanted(pair).map(|pointer| pointer.and_then(|_| read.next()));
            for slot in 0..NODE_ENTRIES as u64 {
                let child = Pair {
                    old: pair.old.child(pair.level, slot as u8, old.as_deref()),
                    new: pair.new.child(pair.level, slot as u8, new.as_deref()),
                    level: pair.level - 1,
                    base: pair.base + (slot << (NODE_SHIFT * u32::from(pair.level - 1))),
                };
                if !child.old.is_same(child.new) {
                    below.push(child);
                }
            }
        }
        Ok(below)
    }
}

impl ChangedPage {
    fn add(&mut self, block: Lba, zeros: bool) {
        match self.ranges.last_mut() {
            Some(last) if last.first.0 + last.blocks == block.0 && last.zeros == zeros => {
                last.blocks += 1;
            }
            _ => self.ranges.push(ChangedRange { first: block, blocks: 1, zeros }),
        }
    }

    /// Ends at `limit` ranges, or before `next`, if anything is left there.
    fn cut_at(mut self, limit: usize, next: Option<Lba>) -> Self {
        self.next = self.ranges.get(limit).map(|range| range.first).or(next);
        self.ranges.truncate(limit);
        self
    }
}
