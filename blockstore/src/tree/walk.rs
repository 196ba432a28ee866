//! Walks: from block numbers of a disk to pointers, and over everything that a disk holds.

use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::node::{NODE_ENTRIES, NODE_SHIFT, entry_span};
use crate::format::pointer::Pointer;
use crate::format::vdi::VdiHead;
use crate::tree::Reader;
use crate::types::Lba;

/// Most blocks that one read may ask for: 64 MiB.
pub const READ_BLOCKS_MAX: u32 = 16_384;

impl Reader {
    /// The pointers of a range of a disk's blocks, sparse for holes.
    ///
    /// # Errors
    /// `Invalid` for a range beyond the disk or longer than [`READ_BLOCKS_MAX`], and those of reading.
    pub async fn resolve(&self, head: &VdiHead, lba: Lba, blocks: u32) -> Result<Vec<Pointer>> {
        let end = lba.0.checked_add(u64::from(blocks)).filter(|end| *end <= head.blocks());
        let Some(end) = end.filter(|_| blocks <= READ_BLOCKS_MAX) else {
            return Err(StoreError::new(
                StoreErrorKind::Invalid,
                format!("VDI {}", head.uuid),
                format!(
                    "a read of {blocks} blocks at block {lba} is too long, or beyond the disk's {} \
                     blocks",
                    head.blocks()
                ),
            ));
        };
        if blocks == 0 {
            return Ok(Vec::new());
        }
        let mut frontier = vec![head.root];
        let mut first_node = 0;
        for level in (1..=head.height).rev() {
            let stored: Vec<Pointer> =
                frontier.iter().copied().filter(|p| !p.is_sparse()).collect();
            let mut nodes = self.nodes(&stored).await?.into_iter();
            // Children that the range touches, counted over the whole level below.
            let span = entry_span(level);
            let (first, last) = (lba.0 / span, (end - 1) / span);
            let mut children = Vec::with_capacity((last - first + 1) as usize);
            for (number, pointer) in (first_node..).zip(&frontier) {
                let base = number << NODE_SHIFT;
                let slots = first.max(base)..=last.min(base + NODE_ENTRIES as u64 - 1);
                if pointer.is_sparse() {
                    children.extend(slots.map(|_| Pointer::SPARSE));
                } else if let Some(node) = nodes.next() {
                    children.extend(slots.map(|child| node.get((child - base) as u8)));
                }
            }
            frontier = children;
            first_node = first;
        }
        Ok(frontier)
    }
}

/// Walks over all blocks that a disk holds, in order, skipping holes: for exports and checks.
#[derive(Debug)]
pub struct Extents {
    /// Subtrees still to visit, the next one last: (pointer, level, first block).
    stack: Vec<(Pointer, u8, u64)>,
}

impl Extents {
    /// A walk over the tree of `head`.
    #[must_use]
    pub fn of(head: &VdiHead) -> Self {
        let stack = if head.root.is_sparse() { vec![] } else { vec![(head.root, head.height, 0)] };
        Self { stack }
    }

    /// The blocks of the next leaf, as (block number, pointer); `None` at the end.
    ///
    /// # Errors
    /// Those of reading nodes.
    pub async fn next_leaf(&mut self, reader: &Reader) -> Result<Option<Vec<(Lba, Pointer)>>> {
        while let Some((pointer, level, base)) = self.stack.pop() {
            let node = reader.read_nodes(&[pointer]).await?.remove(0);
            let span = entry_span(level);
            let children = node.children().map(|(slot, p)| (base + u64::from(slot) * span, p));
            if level == 1 {
                return Ok(Some(children.map(|(lba, p)| (Lba(lba), p)).collect()));
            }
            let below: Vec<_> = children.map(|(lba, p)| (p, level - 1, lba)).collect();
            self.stack.extend(below.into_iter().rev());
        }
        Ok(None)
    }
}
