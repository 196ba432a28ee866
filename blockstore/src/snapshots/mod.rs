//! A disk's snapshots: a tree of its own beside the disk's.
//!
//! Snapshots lie in leaves of 32, in the order in which they were made, which is that of their LSNs; a deleted one leaves
//! its place empty, and what becomes empty becomes a hole. So the newest are found without reading the others, a page of a
//! million costs what the page costs, and nothing grows with what was deleted. Blocks of this tree belong to the disk
//! alone and are replaced like the disk's own (rule C3): a change is written to fresh blocks, and counts with the head that
//! names the new root. See docs/decisions/0016-snapshots-in-a-tree.md for why this is no log.
//!
//! Here: reading. `edit.rs`: the tree's changes; `change.rs`: deleting and labelling. Snapshots are made by commits.

pub(crate) mod change;
pub(crate) mod edit;
#[cfg(test)]
mod tests;

use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::node::NODE_SHIFT;
use crate::format::pointer::Pointer;
use crate::format::snapshot::{LEAF_SNAPSHOTS, SNAPSHOT_SIZE, Snapshot};
use crate::format::vdi::{SnapshotIndex, VdiHead};
use crate::tree::Reader;
use crate::types::Lsn;

/// Most snapshots in one page.
pub const PAGE_MAX: usize = 10_000;

/// Which snapshots to list.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    /// From the newest on, else from the oldest on.
    pub newest_first: bool,
    /// Only those beyond this one, in the order of the list; none: from the start.
    pub beyond: Option<Lsn>,
    /// At most so many; at most [`PAGE_MAX`].
    pub limit: usize,
}

/// A snapshot with its place.
pub(crate) type Placed = (u64, Snapshot);

impl Snapshot {
    /// The snapshot as if it were the state of `disk`, for walks and reads; nothing in it counts as its own.
    #[must_use]
    pub fn as_head(&self, disk: &VdiHead) -> VdiHead {
        VdiHead {
            root: self.root,
            height: self.height,
            size_bytes: self.size_bytes,
            birth: self.birth,
            last_snapshot_birth: self.birth,
            committed: self.lsn,
            snapshots: SnapshotIndex::default(),
            meta: Pointer::SPARSE,
            ..disk.clone()
        }
    }
}

/// The snapshots in a leaf, with their places in it.
///
/// # Errors
/// An entry that makes no sense, in words.
pub fn decode_leaf(block: &[u8]) -> Result<Vec<(u64, Snapshot)>, String> {
    let mut found = Vec::new();
    for (place, entry) in (0..).zip(block.chunks_exact(SNAPSHOT_SIZE)) {
        match Snapshot::decode(entry) {
            Ok(Some(snapshot)) => found.push((place, snapshot)),
            Ok(None) => {}
            Err(damage) => return Err(format!("entry {place}: {damage}")),
        }
    }
    Ok(found)
}

impl Reader {
    /// The nearest leaf that is there, at `leaf` or after it (with `back`, before it), with its number.
    async fn seek_leaf(
        &self,
        index: &SnapshotIndex,
        leaf: u64,
        back: bool,
    ) -> Result<Option<(u64, Pointer)>> {
        let mut stack = vec![(index.root, index.height, 0)];
        while let Some((pointer, level, first)) = stack.pop() {
            if pointer.is_sparse() {
                continue;
            }
            if level <= 1 {
                if if back { first <= leaf } else { first >= leaf } {
                    return Ok(Some((first, pointer)));
                }
                continue;
            }
            let shift = NODE_SHIFT * (u32::from(level) - 2);
            let node = self.nodes(&[pointer]).await?.remove(0);
            let children =
                node.children().map(|(slot, p)| (p, level - 1, first + (u64::from(slot) << shift)));
            let wanted = children.filter(|(_, _, first)| match back {
                true => *first <= leaf,
                false => first + (1 << shift) > leaf,
            });
            let at = stack.len();
            stack.extend(wanted);
            if !back {
                // The nearest is looked at first.
                stack[at..].reverse();
            }
        }
        Ok(None)
    }

    /// The snapshots of one leaf, by its number, with their places.
    ///
    /// # Errors
    /// Those of reading blocks; `Corrupt` if it makes no sense.
    pub async fn snapshot_leaf(
        &self,
        number: u64,
        pointer: Pointer,
    ) -> Result<Vec<(u64, Snapshot)>> {
        let block = self.read_blocks(&[pointer]).await?.remove(0);
        let entries = decode_leaf(&block).map_err(|problem| self.bad_leaf(pointer, &problem))?;
        let first = number * LEAF_SNAPSHOTS;
        Ok(entries.into_iter().map(|(place, snapshot)| (first + place, snapshot)).collect())
    }

    /// All snapshots of several leaves.
    ///
    /// # Errors
    /// As [`snapshot_leaf`](Self::snapshot_leaf).
    pub async fn snapshots_of(&self, leaves: &[Pointer]) -> Result<Vec<Snapshot>> {
        let mut all = Vec::new();
        for (pointer, block) in leaves.iter().zip(self.read_blocks(leaves).await?) {
            let entries =
                decode_leaf(&block).map_err(|problem| self.bad_leaf(*pointer, &problem))?;
            all.extend(entries.into_iter().map(|(_, snapshot)| snapshot));
        }
        Ok(all)
    }

    fn bad_leaf(&self, pointer: Pointer, problem: &str) -> StoreError {
        StoreError::new(
            StoreErrorKind::Corrupt,
            format!("{}, snapshots at block {}", self.io.url(), pointer.gba),
            format!(
                "{problem}, though the block's checksum matches; was it written by a newer version?"
            ),
        )
    }

    /// The nearest snapshot that is there, at `place` or after it (with `back`, before it), with its place.
    async fn seek_snapshot(
        &self,
        index: &SnapshotIndex,
        place: u64,
        back: bool,
    ) -> Result<Option<(u64, Snapshot)>> {
        let mut leaf = place / LEAF_SNAPSHOTS;
        while let Some((number, pointer)) = self.seek_leaf(index, leaf, back).await? {
            let mut found = self.snapshot_leaf(number, pointer).await?;
            if back {
                found.reverse();
            }
            let wanted = |(at, _): &(u64, Snapshot)| if back { *at <= place } else { *at >= place };
            if let Some(found) = found.into_iter().find(wanted) {
                return Ok(Some(found));
            }
            leaf = match back {
                true if number == 0 => return Ok(None),
                true => number - 1,
                false => number + 1,
            };
        }
        Ok(None)
    }

    /// The place of the first snapshot at `lsn` or after it, and that snapshot if it is at `lsn`.
    async fn search_snapshot(
        &self,
        index: &SnapshotIndex,
        lsn: Lsn,
    ) -> Result<(u64, Option<Snapshot>)> {
        let (mut low, mut high) = (0, index.made);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.seek_snapshot(index, middle, false).await? {
                Some((place, found)) if found.lsn == lsn => return Ok((place, Some(found))),
                Some((place, found)) if found.lsn < lsn => low = place + 1,
                _ => high = middle,
            }
        }
        Ok((low, None))
    }

    /// The snapshot at `lsn`, with its place.
    ///
    /// # Errors
    /// Those of reading blocks; `Corrupt` if a leaf makes no sense.
    pub async fn find_snapshot(
        &self,
        index: &SnapshotIndex,
        lsn: Lsn,
    ) -> Result<Option<(u64, Snapshot)>> {
        let (place, found) = self.search_snapshot(index, lsn).await?;
        Ok(found.map(|found| (place, found)))
    }

    /// As [`Self::find_snapshot`], with all snapshots of the leaf that it is in.
    pub(crate) async fn find_with_leaf(
        &self,
        index: &SnapshotIndex,
        lsn: Lsn,
    ) -> Result<(Option<Placed>, Vec<Placed>)> {
        let Some((place, found)) = self.find_snapshot(index, lsn).await? else {
            return Ok((None, Vec::new()));
        };
        let leaf = match self.seek_leaf(index, place / LEAF_SNAPSHOTS, false).await? {
            Some((number, pointer)) => self.snapshot_leaf(number, pointer).await?,
            None => Vec::new(),
        };
        Ok((Some((place, found)), leaf))
    }

    /// A page of snapshots.
    ///
    /// # Errors
    /// As [`Self::find_snapshot`].
    pub async fn snapshot_page(&self, index: &SnapshotIndex, page: Page) -> Result<Vec<Snapshot>> {
        let back = page.newest_first;
        let start = match (page.beyond, back) {
            (None, false) => Some(0),
            (None, true) => index.made.checked_sub(1),
            (Some(lsn), false) => {
                let (place, found) = self.search_snapshot(index, lsn).await?;
                Some(place + u64::from(found.is_some()))
            }
            (Some(lsn), true) => self.search_snapshot(index, lsn).await?.0.checked_sub(1),
        };
        let limit = page.limit.min(PAGE_MAX);
        let mut list = Vec::new();
        let Some(start) = start else { return Ok(list) };
        let mut leaf = start / LEAF_SNAPSHOTS;
        while list.len() < limit
            && let Some((number, pointer)) = self.seek_leaf(index, leaf, back).await?
        {
            let mut found = self.snapshot_leaf(number, pointer).await?;
            if back {
                found.reverse();
            }
            found.retain(|(at, _)| if back { *at <= start } else { *at >= start });
            list.extend(found.into_iter().map(|(_, snapshot)| snapshot));
            leaf = match back {
                true if number == 0 => break,
                true => number - 1,
                false => number + 1,
            };
        }
        list.truncate(limit);
        Ok(list)
    }
}
