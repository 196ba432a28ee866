//! The commit protocol's I/O: see the parent module for the order of writes.

use crate::alloc::runs::{Run, merge};
use crate::alloc::{Allocator, Purpose};
use crate::buf::AlignedBuf;
use crate::commit::decide::{Decision, decide};
use crate::commit::plan::{NewTree, TreePlan, check_changes};
use crate::commit::{Batch, Change, Committed, Cut, SnapshotLabel};
use crate::eras::Stay;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::extent::ExtentType;
use crate::format::node::Node;
use crate::format::pointer::Pointer;
use crate::format::snapshot::Snapshot;
use crate::format::vdi::VdiHead;
use crate::io::{Write, now_ms};
use crate::root::{Garbage, Root};
use crate::sabotage::{self, Bug};
use crate::slot::{Content, Swap, View};
use crate::snapshots::edit::{Edited, Ground, KnownLeaf};
use crate::tree::RUN_BLOCKS_MAX;
use crate::types::{BLOCK_SIZE, Birth, Gba, Lsn};
use crate::vdi::{Control, VdiInner};
use bytes::Bytes;
use hashbrown::HashMap;
use std::sync::Arc;

/// A batch whose data is on the device, but not reachable yet. Dropped unpublished, it gives its
/// blocks back.
#[derive(Debug)]
pub struct Prepared {
    lsn: Lsn,
    parts: Vec<Part>,
    writes: Vec<Write>,
    /// The device's epoch before the first write.
    epoch: u64,
    runs: Vec<Run>,
    allocator: Arc<Allocator>,
}

/// What a batch changes up to one of its cuts, or after the last.
#[derive(Debug)]
struct Part {
    changes: Vec<Change>,
    /// Address and checksum per change; unused for zeros.
    written: Vec<(Gba, u32)>,
    /// The snapshot that it ends with, but for what only the commit knows.
    cut: Option<(Lsn, u64, SnapshotLabel)>,
}

impl Part {
    fn pointers(&self, birth: Birth) -> impl Iterator<Item = Pointer> {
        let pairs = self.changes.iter().zip(&self.written);
        let writes = pairs.filter(|(change, _)| matches!(change, Change::Write { .. }));
        writes.map(move |(_, &(gba, crc))| Pointer { gba, read_only: false, birth, crc })
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        self.allocator.put_back(&self.runs);
    }
}

impl Prepared {
    /// From here on the blocks may become reachable, or be under a write of unknown outcome. Returns them, once.
    fn disarm(&mut self) -> Vec<Run> {
        std::mem::take(&mut self.runs)
    }
}

/// The next image, as it would be: nothing of it is written yet but data.
#[derive(Debug)]
struct Image {
    head: VdiHead,
    /// Nodes of the disk's tree, and of the snapshots' trees in between.
    nodes: Vec<(Pointer, Arc<Node>)>,
    /// Changes to the snapshots.
    snapshots: Option<Edited>,
    garbage: Garbage,
    /// Where the batch's data is, in its order.
    pointers: Vec<Pointer>,
}

impl Image {
    /// Begins as it is.
    fn of(head: &VdiHead) -> Self {
        Self {
            head: head.clone(),
            nodes: Vec::new(),
            snapshots: None,
            garbage: Garbage::default(),
            pointers: Vec::new(),
        }
    }

    /// Everything that is written before the head.
    fn writes(&self) -> Vec<Write> {
        let mut writes = gather_nodes(&self.nodes);
        if let Some(edited) = &self.snapshots {
            writes.extend(gather(edited.writes.iter().cloned()));
        }
        writes
    }

    /// The blocks of [`Self::writes`].
    fn blocks(&self) -> Vec<Gba> {
        let nodes = self.nodes.iter().map(|(pointer, _)| pointer.gba);
        let edited = self.snapshots.iter().flat_map(|edited| &edited.writes);
        nodes.chain(edited.map(|(gba, _)| *gba)).collect()
    }
}

impl VdiInner {
    /// Step 1: writes the batch's data to fresh blocks, in virtual order.
    pub(crate) async fn prepare(&self, batch: Batch) -> Result<Prepared> {
        let size = self.root.load().head.blocks();
        let lsn = batch.lsn;
        let mut parts = parts_of(batch).map_err(|problem| self.invalid(problem))?;
        for part in &parts {
            check_changes(&part.changes, size).map_err(|problem| self.invalid(problem))?;
        }
        let changes = parts.iter().flat_map(|part| &part.changes);
        let data = changes.filter_map(|change| match change {
            Change::Write { data, crc, .. } => Some((data.clone(), *crc)),
            Change::Zero { .. } => None,
        });
        let data: Vec<(Bytes, u32)> = data.collect();
        let allocator = Arc::clone(self.core.allocator()?);
        let io = &self.core.io;
        let blocks = data.len() as u64;
        let runs = if blocks == 0 {
            Vec::new()
        } else {
            allocator.allocate(io, ExtentType::Data, blocks, Purpose::Normal).await?
        };
        let addresses: Vec<Gba> = runs.iter().flat_map(|run| run.iter()).collect();
        let writes = gather(addresses.iter().copied().zip(data.iter().map(|(d, _)| d.clone())));
        let mut places = addresses.into_iter().zip(data.into_iter().map(|(_, crc)| crc));
        for part in &mut parts {
            let written = part.changes.iter().map(|change| match change {
                Change::Write { .. } => places.next().unwrap_or_default(),
                Change::Zero { .. } => (Gba(0), 0),
            });
            part.written = written.collect();
        }
        let epoch = io.device().epoch();
        let started = std::time::Instant::now();
        // Cut off or failed here, the writes' outcome is unknown: their blocks leak until GC.
        io.write_all(&writes).await?;
        let ms = started.elapsed().as_millis() as u64;
        tracing::debug!(vdi = %self.name, blocks, writes = writes.len(), ms, "data written");
        Ok(Prepared { lsn, parts, writes, epoch, runs, allocator })
    }

    /// Steps 2 to 5.
    pub(crate) async fn publish(&self, mut prepared: Prepared) -> Result<Committed> {
        let mut control = self.control.lock().await;
        control.check(self)?;
        let lsn = prepared.lsn;
        let committed = self.root.load().head.committed;
        if lsn < committed {
            let problem = format!("the batch ends at LSN {lsn}, before the committed {committed}");
            return Err(self.invalid(problem));
        }
        // Before it waits for room.
        self.settle(&mut control).await?;
        let mut data = Vec::new();
        loop {
            let base = self.root.load_full();
            let head = &base.head;
            if lsn <= head.committed {
                // Committed before: by a call whose caller stopped waiting, or by an adopted head.
                return Ok(Committed { lsn: head.committed, pointers: Vec::new() });
            }
            let started = std::time::Instant::now();
            let known = control.last_leaf.take();
            let mut image = Image::of(head);
            if let Err(error) = self.build_image(&mut image, &prepared, known.as_ref()).await {
                self.core.allocator()?.free(image.blocks());
                return Err(error);
            }
            if sabotage::on(Bug::FreeBeforeHead) {
                self.core.allocator()?.free(std::mem::take(&mut image.garbage.blocks));
            }
            data.append(&mut prepared.disarm());
            let tree_ms = started.elapsed().as_millis() as u64;
            self.barrier(&prepared, &image.writes()).await?;
            let ms = started.elapsed().as_millis() as u64;
            tracing::debug!(vdi = %self.name, nodes = image.nodes.len(), tree_ms, ms, "tree written");
            if let Some(since) = self.swap_head(&mut control, image.head.clone()).await? {
                let allocator = self.core.allocator()?;
                allocator.settle(&data);
                allocator.settle(&merge(image.blocks()));
                let next = Root::new(self.head_of(&control)?, Arc::clone(&self.sink));
                let edited = image.snapshots.iter().flat_map(|edited| &edited.nodes);
                for (pointer, node) in image.nodes.iter().chain(edited) {
                    self.core.reader.nodes.insert(*pointer, Arc::clone(node));
                }
                control.last_leaf = image.snapshots.map_or(known, |edited| edited.last_leaf);
                self.root.store(Arc::clone(&next));
                base.retire(next, image.garbage, since);
                return Ok(Committed { lsn, pointers: image.pointers });
            }
            // They were written, but no head will ever name them: its compare can't succeed now.
            self.core.allocator()?.free(image.blocks());
        }
    }

    /// Step 2, without the writes: part after part, with a snapshot after each that ends in one (rule C4).
    /// Should it fail, nothing was written to the blocks that `image` has by then.
    async fn build_image(
        &self,
        image: &mut Image,
        prepared: &Prepared,
        known: Option<&KnownLeaf>,
    ) -> Result<()> {
        let (committed, listed) = (image.head.committed, image.head.snapshots);
        let purpose = if prepared.writes.is_empty() { Purpose::GivesBack } else { Purpose::Normal };
        let mut unwritten = HashMap::new();
        let mut taken: Vec<Snapshot> = Vec::new();
        for part in &prepared.parts {
            // It rises at every cut, also at one that changes nothing.
            let birth = image.head.birth.plus(1);
            let tree = self.build_tree(&image.head, part, birth, &unwritten, purpose).await?;
            if prepared.parts.len() > 1 {
                let nodes = tree.nodes.iter();
                unwritten.extend(nodes.map(|(pointer, node)| (*pointer, Arc::clone(node))));
            }
            image.pointers.extend(part.pointers(birth));
            image.nodes.extend(tree.nodes);
            image.garbage.blocks.extend(tree.garbage.blocks);
            image.garbage.subtrees.extend(tree.garbage.subtrees);
            (image.head.root, image.head.birth) = (tree.root, birth);
            // A batch that was committed in part, before a crash, has its first cuts already.
            if let Some((lsn, time_ms, label)) = &part.cut
                && *lsn > committed
            {
                let head = &image.head;
                let label = match taken.last() {
                    Some(last) if sabotage::on(Bug::LabelOfNeighbour) => &last.label,
                    _ => label,
                };
                taken.push(Snapshot {
                    lsn: *lsn,
                    time_ms: *time_ms,
                    label: label.clone(),
                    root: head.root,
                    height: head.height,
                    size_bytes: head.size_bytes,
                    birth,
                });
                if !sabotage::on(Bug::CutKeepsBirth) {
                    image.head.last_snapshot_birth = birth;
                }
            }
        }
        if !taken.is_empty() {
            let ground = self.snapshot_ground(purpose)?;
            let birth = image.head.birth;
            let mut edited = ground.append(listed, taken, birth, known).await?;
            image.head.snapshots = edited.index;
            image.garbage.blocks.append(&mut edited.replaced);
            image.snapshots = Some(edited);
        }
        image.head.committed = prepared.lsn;
        image.head.committed_ms = now_ms();
        Ok(())
    }

    /// The tree after one part of a batch. Nodes of the parts before it are `unwritten`.
    async fn build_tree(
        &self,
        head: &VdiHead,
        part: &Part,
        birth: Birth,
        unwritten: &HashMap<Pointer, Arc<Node>>,
        purpose: Purpose,
    ) -> Result<NewTree> {
        let changes = &part.changes;
        check_changes(changes, head.blocks()).map_err(|problem| self.invalid(problem))?;
        let mut plan = TreePlan::new(changes, head);
        while let Some((_, wanted)) = plan.wanted() {
            let stored: Vec<Pointer> =
                wanted.iter().copied().filter(|pointer| !unwritten.contains_key(pointer)).collect();
            let read = self.core.reader.nodes(&stored).await.map_err(|e| self.named(e))?;
            let mut read = read.into_iter();
            let nodes = wanted.iter().filter_map(|pointer| match unwritten.get(pointer) {
                Some(node) => Some(Arc::clone(node)),
                None => read.next(),
            });
            plan.descend(nodes.collect(), &part.written, birth);
        }
        let allocator = self.core.allocator()?;
        let blocks = plan.nodes_max();
        let runs = match blocks {
            0 => Vec::new(),
            _ => allocator.allocate(&self.core.io, ExtentType::Metadata, blocks, purpose).await?,
        };
        let mut tree = plan.build(runs.iter().flat_map(|run| run.iter()).collect(), birth)?;
        allocator.free(std::mem::take(&mut tree.spare));
        Ok(tree)
    }

    /// For changes of this disk's snapshots.
    pub(crate) fn snapshot_ground(&self, purpose: Purpose) -> Result<Ground<'_>> {
        let core = &self.core;
        Ok(Ground { reader: &core.reader, allocator: core.allocator()?, io: &core.io, purpose })
    }

    /// Steps 2 and 3: nodes, and a flush that is known to cover every write since the first.
    async fn barrier(&self, prepared: &Prepared, nodes: &[Write]) -> Result<()> {
        let io = &self.core.io;
        if nodes.is_empty() && prepared.writes.is_empty() {
            return Ok(());
        }
        let mut attempts = io.attempts();
        let mut epoch = prepared.epoch;
        loop {
            io.write_all(nodes).await?;
            if sabotage::on(Bug::HeadBeforeBarrier) {
                return Ok(());
            }
            if io.flush_since(epoch, &mut attempts).await? {
                return Ok(());
            }
            epoch = io.device().epoch();
            io.write_all(&prepared.writes).await?;
        }
    }

    /// Step 4. The head is durable: what the former root is retired with. None: a later head of our own was adopted as the
    /// base.
    ///
    /// If an earlier write of unknown outcome turns out not to be there, a cycle of collection may have read its head, which the
    /// target forgot since, and so have missed what is reachable now: it is given up.
    pub(crate) async fn swap_head(
        &self,
        control: &mut Control,
        next: VdiHead,
    ) -> Result<Option<Stay>> {
        let core = &self.core;
        let unsure = control.unsure.take();
        let was_unsure = unsure.is_some();
        let since = unsure.unwrap_or_else(|| self.sink.stay());
        let before = control.view.clone();
        let swap = match core.records.swap(&core.io, &before, next.clone()).await {
            Ok(swap) => swap,
            Err(error) => {
                // It may have landed: the next head's write, whatever that finds, goes on from there.
                control.unsure = Some(since);
                return Err(error);
            }
        };
        // Whatever is there now: the head of unknown outcome may have been there, and be forgotten, in between.
        if was_unsure {
            core.allocator()?.give_up_cycle();
        }
        match swap {
            Swap::Done(view) => {
                control.view = view;
                Ok(Some(since))
            }
            Swap::Lost(found) => {
                self.judge(control, &before, &next, found, since)?;
                Ok(None)
            }
        }
    }

    /// Rule C2.
    fn judge(
        &self,
        control: &mut Control,
        before: &View<VdiHead>,
        next: &VdiHead,
        found: View<VdiHead>,
        since: Stay,
    ) -> Result<()> {
        let (Some(expected), Content::Valid(head)) = (before.record(), &found.content) else {
            return Err(StoreError::new(
                StoreErrorKind::Damaged,
                self.object(),
                "its head in the store is damaged; run 'ballast store check'",
            ));
        };
        let new = (before.sequence() + 1, next);
        match decide((head.sequence, &head.record), (before.sequence(), expected), new) {
            Decision::Landed | Decision::Reissue | Decision::Adopt => {
                tracing::warn!(vdi = %self.uuid, sequence = head.sequence, "adopted a later head");
                let adopted = Root::new(head.record.clone(), Arc::clone(&self.sink));
                let old = self.root.swap(Arc::clone(&adopted));
                // What that step replaced is not known here: left to GC.
                old.retire(adopted, Garbage::default(), since);
                control.view = found;
                Ok(())
            }
            Decision::RolledBack => {
                let message = format!(
                    "the store shows sequence {} after it had confirmed {}: it was restored from an \
                     older copy; nothing more is written to this disk",
                    head.sequence,
                    before.sequence()
                );
                Err(control.lose(self, StoreErrorKind::RolledBack, message))
            }
            Decision::NotOwner => {
                let owner = head.record.owner.map_or("nobody".to_owned(), |o| o.host.to_string());
                let message = format!(
                    "the disk was taken away from this host; it belongs to {owner} now (attachment \
                     {}); writes that were not committed stay in the local log",
                    head.record.attachment
                );
                Err(control.lose(self, StoreErrorKind::NotOwner, message))
            }
        }
    }

    pub(crate) fn head_of(&self, control: &Control) -> Result<VdiHead> {
        let head = control.view.record().cloned();
        head.ok_or_else(|| self.invalid("its head is not known".to_owned()))
    }
}

/// The parts of a batch, in order.
fn parts_of(batch: Batch) -> Result<Vec<Part>, String> {
    let mut parts = Vec::with_capacity(batch.cuts.len() + 1);
    let mut last = Lsn(0);
    for Cut { changes, lsn, time_ms, label } in batch.cuts {
        if lsn <= last || lsn > batch.lsn {
            return Err(format!(
                "its cut at LSN {lsn} is out of order, or beyond its end at {}",
                batch.lsn
            ));
        }
        last = lsn;
        parts.push(Part { changes, written: Vec::new(), cut: Some((lsn, time_ms, label)) });
    }
    // A batch that ends with a cut needs no part after it.
    if parts.is_empty() || !batch.changes.is_empty() {
        parts.push(Part { changes: batch.changes, written: Vec::new(), cut: None });
    }
    Ok(parts)
}

/// Joins blocks that lie one after the other into writes of at most 1 MiB.
fn gather(blocks: impl Iterator<Item = (Gba, Bytes)>) -> Vec<Write> {
    let mut writes: Vec<Write> = Vec::new();
    for (gba, block) in blocks {
        match writes.last_mut() {
            Some((start, pieces))
                if start.0 + pieces.len() as u64 == gba.0
                    && (pieces.len() as u64) < RUN_BLOCKS_MAX =>
            {
                pieces.push(block);
            }
            _ => writes.push((gba, vec![block])),
        }
    }
    writes
}

/// As [`gather`], with each run copied into one aligned buffer.
fn gather_nodes(nodes: &[(Pointer, Arc<Node>)]) -> Vec<Write> {
    let mut writes = Vec::new();
    let mut rest = nodes;
    while let Some((first, _)) = rest.first() {
        let neighbours = (first.gba.0..).zip(rest).take(RUN_BLOCKS_MAX as usize);
        let run = neighbours.take_while(|(gba, (pointer, _))| pointer.gba.0 == *gba).count();
        let mut buf = AlignedBuf::zeroed(run * BLOCK_SIZE);
        for (block, (_, node)) in buf.chunks_exact_mut(BLOCK_SIZE).zip(rest) {
            block.copy_from_slice(node.bytes());
        }
        writes.push((first.gba, vec![buf.freeze()]));
        rest = &rest[run..];
    }
    writes
}
