//! What roots reach: one bit per block, and per level of the trees a list of the nodes to read, in the order of the device.
//!
//! Nothing that a root reached when it was read is used again while this runs: this host keeps what it frees in quarantine. So
//! each block holds one thing throughout, a bit says all there is to say of it, and a node that does not match its pointer is
//! damage (rule G4). Nodes of all disks and snapshots of one level are read together: a tree that many snapshots share is
//! read once, and the reads go over the metadata in one direction.

use crate::bits::Bits;
use crate::collect::Progress;
use blockstore::format::node::Node;
use blockstore::format::pointer::Pointer;
use blockstore::format::vdi::{SnapshotIndex, VdiHead};
use blockstore::tree::Reader;
use blockstore::types::{BLOCK_SIZE, Birth, Gba};
use blockstore::{Result, StoreError, StoreErrorKind};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

/// Nodes read at once.
const BATCH: usize = 1024;

/// A node to read. Small, since there is one for each node of a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    gba: u64,
    crc: u32,
    /// Whose it is, for messages: an index into the disks.
    disk: u32,
}

impl Entry {
    fn pointer(self) -> Pointer {
        Pointer { gba: Gba(self.gba), read_only: false, birth: Birth(0), crc: self.crc }
    }
}

/// Marks what roots reach.
pub(crate) struct Reach<'a> {
    reader: Reader,
    reached: Bits,
    /// Blocks of it that `progress` was not told of yet.
    fresh: u64,
    /// By level; leaves at 1.
    frontier: Vec<Vec<Entry>>,
    disks: Vec<Uuid>,
    /// Fails when the cycle was given up meanwhile.
    goes_on: &'a (dyn Fn() -> Result<()> + Send + Sync),
    pace: Pace,
    progress: &'a Progress,
}

impl<'a> Reach<'a> {
    /// Nothing is reached yet. Reads at most `rate` bytes a second, if that is said.
    pub(crate) fn new(
        reader: Reader,
        rate: Option<u64>,
        goes_on: &'a (dyn Fn() -> Result<()> + Send + Sync),
        progress: &'a Progress,
    ) -> Self {
        let reached = Bits::new(reader.geometry().total_blocks());
        let (frontier, disks, pace) = (Vec::new(), Vec::new(), Pace::new(rate));
        Self { reader, reached, fresh: 0, frontier, disks, goes_on, pace, progress }
    }

    /// Marks what disks and their snapshots reach.
    ///
    /// # Errors
    /// `Corrupt` naming the disk if a part of its map is damaged; that of `goes_on`; the device's.
    pub(crate) async fn mark(&mut self, heads: impl Iterator<Item = &VdiHead>) -> Result<()> {
        for head in heads {
            let disk = self.disks.len() as u32;
            self.disks.push(head.uuid);
            self.reach(head.meta, disk)?;
            self.begin(head.root, head.height, disk)?;
            self.mark_snapshots(head.snapshots, disk).await?;
        }
        while let Some(mut nodes) = self.frontier.pop() {
            let level = self.frontier.len();
            nodes.sort_unstable();
            // While one batch is looked through, the next is read, and its checksums are compared.
            let mut batches = nodes.chunks(BATCH);
            let mut ahead = batches.next().map(|batch| (batch, self.fetch(batch)));
            while let Some((batch, fetched)) = ahead {
                let read = self.fetched(batch, fetched).await?;
                ahead = batches.next().map(|batch| (batch, self.fetch(batch)));
                for (entry, node) in batch.iter().zip(read) {
                    for (_, child) in node.children() {
                        if self.reach(child, entry.disk)? && level > 1 {
                            self.push(level - 1, child, entry.disk);
                        }
                    }
                }
            }
        }
        self.progress.note_reached(std::mem::take(&mut self.fresh));
        Ok(())
    }

    /// What is reached.
    pub(crate) fn into_bits(self) -> Bits {
        self.reached
    }

    /// The root of a tree whose top node is at `level`.
    fn begin(&mut self, root: Pointer, level: u8, disk: u32) -> Result<()> {
        if self.reach(root, disk)? {
            self.push(usize::from(level), root, disk);
        }
        Ok(())
    }

    fn push(&mut self, level: usize, pointer: Pointer, disk: u32) {
        if self.frontier.len() <= level {
            self.frontier.resize_with(level + 1, Vec::new);
        }
        self.frontier[level].push(Entry { gba: pointer.gba.0, crc: pointer.crc, disk });
    }

    /// Sets a block's bit; true if it was not set before.
    #[inline]
    fn reach(&mut self, pointer: Pointer, disk: u32) -> Result<bool> {
        if pointer.is_sparse() {
            return Ok(false);
        }
        if !self.reader.geometry().is_allocatable(pointer.gba) {
            return Err(self.misplaced(pointer, disk));
        }
        let fresh = self.reached.insert(pointer.gba);
        self.fresh += u64::from(fresh);
        Ok(fresh)
    }

    #[cold]
    fn misplaced(&self, pointer: Pointer, disk: u32) -> StoreError {
        let words = format!("a pointer names block {}, which no tree block can be", pointer.gba);
        self.damaged(disk, &words)
    }

    /// The tree that lists a disk's snapshots, and the root of each.
    async fn mark_snapshots(&mut self, index: SnapshotIndex, disk: u32) -> Result<()> {
        let mut level = Vec::new();
        if self.reach(index.root, disk)? {
            level.push(Entry { gba: index.root.gba.0, crc: index.root.crc, disk });
        }
        for _ in 1..index.height {
            let mut below = Vec::new();
            for batch in level.chunks(BATCH) {
                for node in self.read(batch).await? {
                    for (_, child) in node.children() {
                        if self.reach(child, disk)? {
                            below.push(Entry { gba: child.gba.0, crc: child.crc, disk });
                        }
                    }
                }
            }
            level = below;
        }
        for batch in level.chunks(BATCH) {
            (self.goes_on)()?;
            let leaves: Vec<Pointer> = batch.iter().map(|entry| entry.pointer()).collect();
            let read = self.reader.snapshots_of(&leaves).await;
            for snapshot in read.map_err(|error| self.judge(disk, error))? {
                self.begin(snapshot.root, snapshot.height, disk)?;
            }
            self.pace.after(batch.len()).await;
        }
        Ok(())
    }

    /// Reads nodes of one level.
    async fn read(&mut self, batch: &[Entry]) -> Result<Vec<Arc<Node>>> {
        let fetched = self.fetch(batch);
        self.fetched(batch, fetched).await
    }

    /// Begins to read nodes, on another core if there is one; given up when it is dropped.
    fn fetch(&self, batch: &[Entry]) -> JoinSet<Result<Vec<Arc<Node>>>> {
        let pointers: Vec<Pointer> = batch.iter().map(|entry| entry.pointer()).collect();
        let reader = self.reader.clone();
        let mut fetched = JoinSet::new();
        fetched.spawn(async move { reader.read_nodes(&pointers).await });
        fetched
    }

    /// The nodes that are being read.
    async fn fetched(
        &mut self,
        batch: &[Entry],
        mut fetched: JoinSet<Result<Vec<Arc<Node>>>>,
    ) -> Result<Vec<Arc<Node>>> {
        (self.goes_on)()?;
        let read = match fetched.join_next().await {
            Some(Ok(read)) => read,
            // It was stopped with its runtime, or failed inside: then it is told where.
            _ => {
                self.reader.read_nodes(&batch.iter().map(|e| e.pointer()).collect::<Vec<_>>()).await
            }
        };
        let nodes = match read {
            Ok(nodes) => nodes,
            Err(error) if error.kind == StoreErrorKind::Corrupt => {
                return Err(self.blame(batch, error).await);
            }
            Err(error) => return Err(error),
        };
        self.progress.note_nodes(batch.len() as u64);
        self.progress.note_reached(std::mem::take(&mut self.fresh));
        self.pace.after(batch.len()).await;
        Ok(nodes)
    }

    /// Finds out whose node is damaged.
    async fn blame(&self, batch: &[Entry], error: StoreError) -> StoreError {
        for entry in batch {
            match self.reader.read_nodes(&[entry.pointer()]).await {
                Err(error) if error.kind == StoreErrorKind::Corrupt => {
                    return self.judge(entry.disk, error);
                }
                _ => {}
            }
        }
        error
    }

    /// What was given up may well be used by something else by now: that is no damage.
    fn judge(&self, disk: u32, error: StoreError) -> StoreError {
        match (self.goes_on)() {
            Err(given_up) => given_up,
            Ok(()) if error.kind == StoreErrorKind::Corrupt => {
                self.damaged(disk, &error.to_string())
            }
            Ok(()) => error,
        }
    }

    fn damaged(&self, disk: u32, what: &str) -> StoreError {
        let uuid = self.disks.get(disk as usize).copied().unwrap_or_default();
        StoreError::new(
            StoreErrorKind::Corrupt,
            format!("VDI {uuid}"),
            format!(
                "its map or one of its snapshots' is damaged, so what it holds is not known and nothing is collected: \
                 {what}; 'ballast store check' says more"
            ),
        )
    }
}

/// Keeps reading below a rate.
struct Pace {
    rate: Option<u64>,
    next: Instant,
}

impl Pace {
    fn new(rate: Option<u64>) -> Self {
        Self { rate: rate.filter(|rate| *rate > 0), next: Instant::now() }
    }

    /// To be called after `blocks` were read.
    async fn after(&mut self, blocks: usize) {
        let Some(rate) = self.rate else { return };
        let took = Duration::from_secs_f64((blocks * BLOCK_SIZE) as f64 / rate as f64);
        let now = Instant::now();
        // What was not used is not saved up: a burst would be felt by the guests.
        self.next = self.next.max(now) + took;
        tokio::time::sleep_until(self.next).await;
    }
}
