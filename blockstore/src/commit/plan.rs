//! The tree part of a commit. Pure: old nodes come in, new nodes and garbage go out.
//!
//! From the root down, [`TreePlan::descend`] finds which nodes a batch touches and cuts off subtrees
//! that it zeroes whole, so that discarding a 256 TiB disk looks at one node. From the leaves up,
//! [`TreePlan::build`] makes the new nodes. A node that becomes empty becomes a hole.

use crate::commit::Change;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::node::{NODE_SHIFT, Node, entry_span};
use crate::format::pointer::Pointer;
use crate::format::vdi::VdiHead;
use crate::root::{Garbage, Subtree};
use crate::types::{Birth, Gba};
use std::ops::Range;
use std::sync::Arc;

/// A node that the batch touches.
#[derive(Debug)]
struct Touched {
    /// Number of the node within its level.
    index: u64,
    old: Pointer,
    content: Arc<Node>,
    /// Indexes into the batch's changes: those that overlap the node.
    changes: Range<usize>,
    /// New entries, by slot.
    edits: Vec<(u8, Pointer)>,
    /// Position of the parent in the level above.
    parent: usize,
}

/// A node to read before the plan can go on.
#[derive(Debug)]
struct Pending {
    index: u64,
    old: Pointer,
    changes: Range<usize>,
    parent: usize,
}

/// A commit's walk over the tree.
#[derive(Debug)]
pub(crate) struct TreePlan<'a> {
    changes: &'a [Change],
    head: &'a VdiHead,
    /// By level, leaves first.
    levels: Vec<Vec<Touched>>,
    pending: Vec<Pending>,
    /// Level of the pending nodes; 0 when the walk down is over.
    level: u8,
    garbage: Garbage,
    /// The whole tree is cut off.
    root_cut: bool,
}

/// The outcome: nodes to write and what they replace.
#[derive(Debug)]
pub(crate) struct NewTree {
    pub root: Pointer,
    /// In the order of their addresses as given.
    pub nodes: Vec<(Pointer, Arc<Node>)>,
    pub garbage: Garbage,
    /// Addresses that were not needed.
    pub spare: Vec<Gba>,
}

/// Checks a batch's form: sorted, disjoint, within the disk.
///
/// # Errors
/// `Invalid`, naming the change.
pub(crate) fn check_changes(changes: &[Change], blocks: u64) -> Result<(), String> {
    let mut end = 0;
    for (number, change) in changes.iter().enumerate() {
        if change.first() < end || change.end() <= change.first() {
            return Err(format!("change {number} at block {} is out of order", change.first()));
        }
        end = change.end();
        if end > blocks {
            return Err(format!("change {number} ends at block {end}, the disk has {blocks}"));
        }
        if let Change::Write { data, .. } = change
            && data.len() != crate::types::BLOCK_SIZE
        {
            return Err(format!("change {number} carries {} bytes instead of 4096", data.len()));
        }
    }
    Ok(())
}

impl<'a> TreePlan<'a> {
    pub(crate) fn new(changes: &'a [Change], head: &'a VdiHead) -> Self {
        let mut plan = Self {
            changes,
            head,
            levels: (0..head.height).map(|_| Vec::new()).collect(),
            pending: Vec::new(),
            level: head.height,
            garbage: Garbage::default(),
            root_cut: false,
        };
        let whole = matches!(changes, [only @ Change::Zero { .. }]
            if only.first() == 0 && only.end() >= head.blocks());
        if whole {
            plan.cut(head.root, head.height);
            plan.root_cut = true;
        } else if plan.touches(head.root, 0..changes.len()) {
            plan.pending.push(Pending {
                index: 0,
                old: head.root,
                changes: 0..changes.len(),
                parent: 0,
            });
        }
        plan
    }

    /// A hole that is only zeroed stays as it is.
    fn touches(&self, old: Pointer, changes: Range<usize>) -> bool {
        !changes.is_empty()
            && (!old.is_sparse()
                || self.changes[changes].iter().any(|c| matches!(c, Change::Write { .. })))
    }

    /// The nodes to read next, if there are any; holes are not asked for. Give their contents to
    /// [`descend`](Self::descend) in this order.
    pub(crate) fn wanted(&self) -> Option<(u8, Vec<Pointer>)> {
        if self.pending.is_empty() {
            return None;
        }
        let stored = self.pending.iter().map(|p| p.old).filter(|p| !p.is_sparse());
        Some((self.level, stored.collect()))
    }

    /// Takes the nodes in and goes one level down.
    pub(crate) fn descend(&mut self, nodes: Vec<Arc<Node>>, written: &[(Gba, u32)], birth: Birth) {
        let mut nodes = nodes.into_iter();
        let empty = Arc::new(Node::empty());
        let level = self.level;
        let pending = std::mem::take(&mut self.pending);
        for item in pending {
            let content = if item.old.is_sparse() {
                Arc::clone(&empty)
            } else {
                nodes.next().expect("one node for each that was asked for")
            };
            let position = self.levels[usize::from(level) - 1].len();
            let mut touched = Touched {
                index: item.index,
                old: item.old,
                content,
                changes: item.changes,
                edits: Vec::new(),
                parent: item.parent,
            };
            if level == 1 {
                self.edit_leaf(&mut touched, written, birth);
            } else {
                self.edit_inner(&mut touched, level, position);
            }
            self.levels[usize::from(level) - 1].push(touched);
        }
        self.level -= 1;
    }

    /// Leaf entries: data blocks. `written` is parallel to `changes`.
    fn edit_leaf(&mut self, node: &mut Touched, written: &[(Gba, u32)], birth: Birth) {
        let base = node.index << NODE_SHIFT;
        for number in node.changes.clone() {
            let change = &self.changes[number];
            let first = change.first().max(base);
            let end = change.end().min(base + (1 << NODE_SHIFT));
            for lba in first..end {
                let slot = (lba - base) as u8;
                let old = node.content.get(slot);
                let new = match change {
                    Change::Zero { .. } => Pointer::SPARSE,
                    Change::Write { .. } => {
                        let (gba, crc) = written[number];
                        Pointer { gba, read_only: false, birth, crc }
                    }
                };
                if !(old.is_sparse() && new.is_sparse()) {
                    self.drop_block(old);
                    node.edits.push((slot, new));
                }
            }
        }
    }

    /// Entries above the leaves: a child is cut off whole, left alone, or touched.
    fn edit_inner(&mut self, node: &mut Touched, level: u8, position: usize) {
        let span = entry_span(level);
        let base = node.index * (span << NODE_SHIFT);
        let mut number = node.changes.start;
        let mut slot = self.changes[number].first().max(base).saturating_sub(base) / span;
        while number < node.changes.end && slot < 256 {
            let (first, end) = (base + slot * span, base + (slot + 1) * span);
            // Changes are sorted: those of this child are consecutive.
            while number < node.changes.end && self.changes[number].end() <= first {
                number += 1;
            }
            let mut last = number;
            while last < node.changes.end && self.changes[last].first() < end {
                last += 1;
            }
            if number == last {
                // Jump to the child of the next change.
                let Some(next) = self.changes[..node.changes.end].get(number) else { break };
                slot = (next.first() - base) / span;
                continue;
            }
            self.edit_child(node, level, position, slot as u8, number..last);
            slot += 1;
        }
    }

    fn edit_child(
        &mut self,
        node: &mut Touched,
        level: u8,
        position: usize,
        slot: u8,
        changes: Range<usize>,
    ) {
        let span = entry_span(level);
        let index = (node.index << NODE_SHIFT) + u64::from(slot);
        let (first, end) = (index * span, ((index + 1) * span).min(self.head.blocks()));
        let old = node.content.get(slot);
        if !self.touches(old, changes.clone()) {
            return;
        }
        let change = &self.changes[changes.start];
        let whole = matches!(change, Change::Zero { .. });
        if whole && change.first() <= first && change.end() >= end {
            self.cut(old, level - 1);
            node.edits.push((slot, Pointer::SPARSE));
            return;
        }
        self.pending.push(Pending { index, old, changes, parent: position });
    }

    fn drop_block(&mut self, old: Pointer) {
        if old.is_exclusive(self.head.last_snapshot_birth) {
            self.garbage.blocks.push(old.gba);
        }
    }

    fn cut(&mut self, pointer: Pointer, level: u8) {
        if pointer.is_exclusive(self.head.last_snapshot_birth) {
            let last_snapshot = self.head.last_snapshot_birth;
            self.garbage.subtrees.push(Subtree { pointer, level, last_snapshot });
        }
    }

    /// At most this many nodes will be written.
    pub(crate) fn nodes_max(&self) -> u64 {
        self.levels.iter().map(|level| level.len() as u64).sum()
    }

    /// Makes the new nodes; `addresses` holds at least [`nodes_max`](Self::nodes_max) of them.
    pub(crate) fn build(mut self, addresses: Vec<Gba>, birth: Birth) -> Result<NewTree> {
        let mut addresses = addresses.into_iter();
        let mut nodes = Vec::new();
        let mut root = if self.root_cut { Pointer::SPARSE } else { self.head.root };
        for level in 1..=self.head.height {
            let touched = std::mem::take(&mut self.levels[usize::from(level) - 1]);
            for node in touched {
                if node.edits.is_empty() {
                    continue;
                }
                let mut content = Arc::unwrap_or_clone(node.content);
                for (slot, pointer) in node.edits {
                    content.set(slot, pointer);
                }
                self.drop_block(node.old);
                let pointer = if content.is_empty() {
                    Pointer::SPARSE
                } else {
                    let gba = addresses.next().ok_or_else(out_of_addresses)?;
                    let pointer = Pointer { gba, read_only: false, birth, crc: content.crc() };
                    nodes.push((pointer, Arc::new(content)));
                    pointer
                };
                if level == self.head.height {
                    root = pointer;
                } else {
                    let slot = (node.index & 0xff) as u8;
                    self.levels[usize::from(level)][node.parent].edits.push((slot, pointer));
                }
            }
        }
        Ok(NewTree { root, nodes, garbage: self.garbage, spare: addresses.collect() })
    }
}

fn out_of_addresses() -> StoreError {
    StoreError::new(StoreErrorKind::Invalid, "commit", "more nodes changed than were counted")
}
