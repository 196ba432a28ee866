//! Walks all trees, level by level from the top, and finds out to whom each block belongs.
//!
//! A block is exclusive to a root if one node leads to it, and that node is exclusive to the root; or if it is the root's top
//! node, and of no other. Within one tree no two nodes lead to the same block: so counting to two is enough. All that lead to the blocks
//! of a level lie one level above, or are roots of that level. So when a level was read, it is known of each block of the next to whom
//! it belongs, and it carries that to its own children:
//!
//! * `Class::Root`: one root, which its entry names; `Class::Disk`: several roots of that root's disk; `Class::Many`: several disks.
//!
//! Whether a second node that leads to a block is of the same disk as the first must be told for each block, with few bits: nodes
//! of a level are read disk by disk, and what the present disk has led to is a set of its own ([`OfDisk`]). What was reached, and not by the
//! present disk, is from now on several disks'. Nodes of several disks come last: what they lead to is several disks', too.
//!
//! Data blocks have no entry that could carry a class: when all leaves were read, those that belong to one disk are read once more,
//! and each block is counted by its leaf's class and how it was reached itself. What a root refers to in all is summed up from the leaves: inner
//! nodes are read once more for it, a 256th of all.

use super::marks::{Holders, Marks, OfDisk, Reached};
use super::reading::{BATCH, Entry, Fetch, Listed, Reading};
use super::{Amount, DiskSizes, RootSizes, SnapshotSizes};
use crate::collect::Progress;
use blockstore::format::node::Node;
use blockstore::format::pointer::Pointer;
use blockstore::format::vdi::{Origin, VdiHead};
use blockstore::tree::Reader;
use blockstore::types::{Gba, Lsn};
use blockstore::{Result, StoreError, StoreErrorKind};
use std::collections::HashSet;
use std::sync::Arc;

/// What the walk found.
pub(super) struct Walked {
    pub(super) disks: Vec<DiskSizes>,
    pub(super) marks: Marks,
}

/// To whom a block belongs that some root leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Root,
    Disk,
    Many,
}

/// In the place of a disk: several, and none.
const MANY: u32 = u32::MAX;
const NOBODY: u32 = u32::MAX - 1;

/// A tree.
#[derive(Clone, Copy, Debug)]
struct Root {
    top: Entry,
    height: u8,
    disk: u32,
    /// None: the disk as it is now.
    snapshot: Option<Lsn>,
    cloned: bool,
    exclusive: Amount,
}

impl Root {
    fn is_sparse(&self) -> bool {
        self.top.gba == 0
    }
}

/// A node.
#[derive(Clone, Copy, Debug)]
struct Visit {
    /// `whose` is a root, the one that first led here.
    entry: Entry,
    class: Class,
}

/// What lies at and below a node, in blocks.
#[derive(Clone, Copy, Debug)]
struct Below {
    gba: u64,
    data: u64,
    metadata: u64,
}

pub(super) async fn walk(
    reader: Reader,
    heads: &[&VdiHead],
    rate: Option<u64>,
    goes_on: &(dyn Fn() -> Result<()> + Send + Sync),
    progress: &Progress,
) -> Result<Walked> {
    let blocks = reader.geometry().total_blocks();
    let mut walk = Walking {
        reading: Reading::new(reader, rate, "no sizes were computed", goes_on, progress),
        marks: Marks::new(blocks),
        of_disk: OfDisk::new(blocks),
        present: NOBODY,
        roots: Vec::new(),
        disks: Vec::new(),
    };
    walk.find_roots(heads).await?;
    let (levels, leaves) = walk.classify().await?;
    walk.count_nodes(&levels);
    walk.count_data(levels.first().map_or(&[], Vec::as_slice)).await?;
    let sums = walk.sum_up(leaves, levels).await?;
    for root in std::mem::take(&mut walk.roots) {
        let referenced = walk.referenced(&root, &sums)?;
        let sizes = RootSizes { referenced, exclusive: root.exclusive };
        let disk = &mut walk.disks[root.disk as usize];
        match root.snapshot {
            None => disk.sizes = sizes,
            Some(lsn) => {
                disk.snapshots.push(SnapshotSizes { lsn, cloned: root.cloned, sizes });
            }
        }
    }
    Ok(Walked { disks: walk.disks, marks: walk.marks })
}

struct Walking<'a> {
    reading: Reading<'a>,
    marks: Marks,
    /// What `present`, a disk, has led to in the level that is being read.
    of_disk: OfDisk,
    present: u32,
    /// Disk by disk; of each first the disk as it is now, then its snapshots from the oldest on.
    roots: Vec<Root>,
    disks: Vec<DiskSizes>,
}

impl Walking<'_> {
    /// All roots. Names and lists of snapshots are of their disk alone, and are counted here.
    async fn find_roots(&mut self, heads: &[&VdiHead]) -> Result<()> {
        let cloned: HashSet<Origin> = heads.iter().filter_map(|head| head.origin).collect();
        let Self { reading, marks, roots, disks, .. } = self;
        for head in heads {
            let (disk, first) = (disks.len() as u32, roots.len());
            let whose = root_number(first)?;
            reading.own(whose, head.uuid);
            check_top(reading, head.root, head.height, whose)?;
            let root = |pointer, height, whose, snapshot, cloned| {
                let (top, exclusive) = (Entry::new(pointer, whose), Amount::default());
                Root { top, height, disk, snapshot, cloned, exclusive }
            };
            roots.push(root(head.root, head.height, whose, None, false));
            let mut lists = Amount::default();
            let mut reach = |reading: &Reading<'_>, pointer: Pointer| -> Result<bool> {
                if pointer.is_sparse() {
                    return Ok(false);
                }
                reading.check_place(pointer, whose)?;
                let fresh = marks.reached(pointer.gba) == Reached::Never;
                marks.note(pointer.gba, Reached::Once, Holders::PRESENT);
                lists.add_blocks(0, u64::from(fresh));
                Ok(fresh)
            };
            reach(reading, head.meta)?;
            let mut take = |reading: &Reading<'_>, listed: Listed<'_>| match listed {
                Listed::Block(pointer) => reach(reading, pointer),
                Listed::Snapshot(snapshot) => {
                    let origin = Origin { vdi: head.uuid, lsn: snapshot.lsn };
                    let (whose, cloned) = (root_number(roots.len())?, cloned.contains(&origin));
                    let (pointer, height) = (snapshot.root, snapshot.height);
                    check_top(reading, pointer, height, whose)?;
                    roots.push(root(pointer, height, whose, Some(snapshot.lsn), cloned));
                    Ok(false)
                }
            };
            reading.lists(head.snapshots, whose, &mut take).await?;
            disks.push(DiskSizes {
                uuid: head.uuid,
                sizes: RootSizes::default(),
                snapshots_free: Amount::default(),
                deletion_frees: lists,
                lists,
                snapshots: Vec::with_capacity(roots.len() - first - 1),
            });
        }
        Ok(())
    }

    /// Reads all nodes and marks all blocks. The nodes of each level with their classes, leaves first; and what is below each leaf.
    async fn classify(&mut self) -> Result<(Vec<Vec<Visit>>, Vec<Below>)> {
        let real = |root: &&Root| !root.is_sparse();
        let top = self.roots.iter().filter(real).map(|root| usize::from(root.height)).max();
        let top = top.unwrap_or(0);
        let mut roots: Vec<Vec<u32>> = vec![Vec::new(); top + 1];
        for (number, root) in (0..).zip(&self.roots).filter(|(_, root)| !root.is_sparse()) {
            roots[usize::from(root.height)].push(number);
        }
        let mut levels: Vec<Vec<Visit>> = vec![Vec::new(); top];
        let mut leaves = Vec::new();
        for level in (0..=top).rev() {
            // All that leads to blocks of this level: nodes of the level above, and roots.
            let above = levels.get_mut(level).map(std::mem::take).unwrap_or_default();
            let mut roots = roots[level].iter().copied().peekable();
            let mut below = Vec::new();
            let mut batches = Batches::new(&above, &self.reading);
            while let Some((batch, nodes)) = batches.next(&mut self.reading).await? {
                for (visit, node) in batch.iter().zip(nodes) {
                    let disk = self.disk_of(visit);
                    // Disk by disk. What several disks have comes after all roots.
                    while let Some(root) = roots.next_if(|root| self.root(*root).disk <= disk) {
                        self.enter_root(root, &mut below)?;
                    }
                    self.turn_to(disk);
                    let count = self.enter_children(visit, &node, level, &mut below)?;
                    if level == 0 {
                        leaves.push(Below { gba: visit.entry.gba, data: count, metadata: 1 });
                    }
                }
            }
            for root in roots {
                self.enter_root(root, &mut below)?;
            }
            self.turn_to(NOBODY);
            if let Some(place) = levels.get_mut(level) {
                *place = above;
            }
            if level > 0 {
                self.settle(&mut below);
                levels[level - 1] = below;
            }
        }
        Ok((levels, leaves))
    }

    fn root(&self, number: u32) -> &Root {
        &self.roots[number as usize]
    }

    /// Whose node it is; several disks count as the last one.
    fn disk_of(&self, visit: &Visit) -> u32 {
        match visit.class {
            Class::Many => MANY,
            Class::Root | Class::Disk => self.root(visit.entry.whose).disk,
        }
    }

    /// What follows is led to by this disk.
    fn turn_to(&mut self, disk: u32) {
        if self.present != disk {
            self.of_disk.clear();
            self.present = disk;
        }
    }

    fn enter_root(&mut self, number: u32, below: &mut Vec<Visit>) -> Result<()> {
        let Root { top, disk, snapshot, cloned, .. } = *self.root(number);
        let holders = match (snapshot, cloned) {
            (None, _) => Holders::PRESENT,
            (Some(_), true) => Holders::CLONED,
            (Some(_), false) => Holders::NONE,
        };
        self.turn_to(disk);
        if self.enter(Gba(top.gba), Class::Root, holders) {
            below.push(Visit { entry: top, class: Class::Root });
        }
        Ok(())
    }

    /// Enters what a node leads to, blocks of `level`; how many there are.
    fn enter_children(
        &mut self,
        visit: &Visit,
        node: &Node,
        level: usize,
        below: &mut Vec<Visit>,
    ) -> Result<u64> {
        let holders = self.marks.holders(Gba(visit.entry.gba));
        let whose = visit.entry.whose;
        let mut count = 0;
        for (_, child) in node.children() {
            count += 1;
            self.reading.check_place(child, whose)?;
            if self.enter(child.gba, visit.class, holders) && level > 0 {
                below.push(Visit { entry: Entry::new(child, whose), class: visit.class });
            }
        }
        Ok(count)
    }

    /// Marks a block that the present disk leads to; true if it was not reached before.
    fn enter(&mut self, gba: Gba, class: Class, holders: Holders) -> bool {
        let before = self.marks.reached(gba);
        let reached = match (class, before) {
            (Class::Many, _) => Reached::ByOthers,
            (_, Reached::Never) => {
                self.of_disk.insert(gba);
                Reached::Once
            }
            // It was in already, or now it is.
            (_, _) if self.of_disk.insert(gba) => Reached::ByOthers,
            (_, _) => Reached::Again,
        };
        self.marks.note(gba, reached, holders);
        before == Reached::Never
    }

    /// All that leads to these nodes is known: what they are, and in which order they are read.
    fn settle(&self, nodes: &mut [Visit]) {
        for visit in nodes.iter_mut() {
            visit.class = visit.class.max(self.class(Gba(visit.entry.gba)));
        }
        nodes.sort_unstable_by_key(|visit| (self.disk_of(visit), visit.entry.gba));
    }

    /// What a block is by itself, whatever leads to it.
    fn class(&self, gba: Gba) -> Class {
        match self.marks.reached(gba) {
            Reached::Never | Reached::Once => Class::Root,
            Reached::Again => Class::Disk,
            Reached::ByOthers => Class::Many,
        }
    }

    /// Counts blocks that one disk has for itself.
    fn count(&mut self, gba: Gba, whose: u32, class: Class, blocks: Below) {
        if class == Class::Many {
            return;
        }
        let root = &mut self.roots[whose as usize];
        if class == Class::Root {
            root.exclusive.add_blocks(blocks.data, blocks.metadata);
        }
        let disk = &mut self.disks[root.disk as usize];
        disk.deletion_frees.add_blocks(blocks.data, blocks.metadata);
        if !self.marks.holders(gba).has(Holders::STAYING) {
            disk.snapshots_free.add_blocks(blocks.data, blocks.metadata);
        }
    }

    fn count_nodes(&mut self, levels: &[Vec<Visit>]) {
        for visit in levels.iter().flatten() {
            let gba = visit.entry.gba;
            let node = Below { gba, data: 0, metadata: 1 };
            self.count(Gba(gba), visit.entry.whose, visit.class, node);
        }
    }

    /// Reads the leaves that one disk has for itself once more, now that all that leads to data is known.
    async fn count_data(&mut self, leaves: &[Visit]) -> Result<()> {
        let mut own: Vec<Visit> =
            leaves.iter().filter(|visit| visit.class != Class::Many).copied().collect();
        own.sort_unstable_by_key(|visit| visit.entry.gba);
        let mut batches = Batches::new(&own, &self.reading);
        while let Some((batch, nodes)) = batches.next(&mut self.reading).await? {
            for (visit, node) in batch.iter().zip(nodes) {
                for (_, child) in node.children() {
                    let gba = child.gba;
                    let class = visit.class.max(self.class(gba));
                    let block = Below { gba: gba.0, data: 1, metadata: 0 };
                    self.count(gba, visit.entry.whose, class, block);
                    // Another leaf of the disk may lead to it, too: it is counted once.
                    self.marks.note(gba, Reached::ByOthers, Holders::NONE);
                }
            }
        }
        Ok(())
    }

    /// What lies below each node, level by level from the leaves, each level in the order of the device.
    async fn sum_up(
        &mut self,
        mut leaves: Vec<Below>,
        levels: Vec<Vec<Visit>>,
    ) -> Result<Vec<Vec<Below>>> {
        leaves.sort_unstable_by_key(|below| below.gba);
        let mut sums = vec![leaves];
        for mut nodes in levels.into_iter().skip(1) {
            nodes.sort_unstable_by_key(|visit| visit.entry.gba);
            let mut level = Vec::with_capacity(nodes.len());
            let mut batches = Batches::new(&nodes, &self.reading);
            while let Some((batch, read)) = batches.next(&mut self.reading).await? {
                for (visit, node) in batch.iter().zip(read) {
                    let mut sum = Below { gba: visit.entry.gba, data: 0, metadata: 1 };
                    for (_, child) in node.children() {
                        let below = self.below(&sums[sums.len() - 1], child.gba.0, visit.entry)?;
                        sum.data += below.data;
                        sum.metadata += below.metadata;
                    }
                    level.push(sum);
                }
            }
            sums.push(level);
        }
        Ok(sums)
    }

    /// A block that is a node of another level, or none at all, is in no such list.
    fn below(&self, level: &[Below], gba: u64, from: Entry) -> Result<Below> {
        let found = level.binary_search_by_key(&gba, |below| below.gba);
        found.map(|at| level[at]).map_err(|_| {
            let words = format!("block {gba} is used as a node of two levels");
            self.reading.damaged(from.whose, &words)
        })
    }

    /// All that a root leads to.
    fn referenced(&self, root: &Root, sums: &[Vec<Below>]) -> Result<Amount> {
        let mut amount = Amount::default();
        if !root.is_sparse() {
            let level = sums.get(usize::from(root.height) - 1).map_or(&[][..], Vec::as_slice);
            let below = self.below(level, root.top.gba, root.top)?;
            amount.add_blocks(below.data, below.metadata);
        }
        Ok(amount)
    }
}

/// Nodes in the order of a list; while one batch is looked through, the next is read.
struct Batches<'v> {
    rest: std::slice::Chunks<'v, Visit>,
    ahead: Option<(&'v [Visit], Vec<Entry>, Fetch)>,
}

impl<'v> Batches<'v> {
    fn new(visits: &'v [Visit], reading: &Reading<'_>) -> Self {
        let mut batches = Self { rest: visits.chunks(BATCH), ahead: None };
        batches.look_ahead(reading);
        batches
    }

    fn look_ahead(&mut self, reading: &Reading<'_>) {
        self.ahead = self.rest.next().map(|visits| {
            let entries: Vec<Entry> = visits.iter().map(|visit| visit.entry).collect();
            let fetch = reading.fetch(&entries);
            (visits, entries, fetch)
        });
    }

    async fn next(
        &mut self,
        reading: &mut Reading<'_>,
    ) -> Result<Option<(&'v [Visit], Vec<Arc<Node>>)>> {
        let Some((visits, entries, fetch)) = self.ahead.take() else { return Ok(None) };
        let nodes = reading.fetched(&entries, fetch).await?;
        self.look_ahead(reading);
        Ok(Some((visits, nodes)))
    }
}

fn check_top(reading: &Reading<'_>, top: Pointer, height: u8, whose: u32) -> Result<()> {
    match (top.is_sparse(), height) {
        (true, _) => Ok(()),
        (false, 0) => Err(reading.damaged(whose, "a tree of no levels has a top")),
        (false, _) => reading.check_place(top, whose),
    }
}

fn root_number(number: usize) -> Result<u32> {
    u32::try_from(number).map_err(|_| {
        let words = "there are more snapshots than sizes can be computed for; delete some";
        StoreError::new(StoreErrorKind::Invalid, "sizes", words)
    })
}
