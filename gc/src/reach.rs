//! What roots reach: one bit per block, and per level of the trees a list of the nodes to read, in the order of the device.
//!
//! Nothing that a root reached when it was read is used again while this runs: this host keeps what it frees in quarantine. So
//! each block holds one thing throughout, a bit says all there is to say of it, and a node that does not match its pointer is
//! damage (rule G4). Nodes of all disks and snapshots of one level are read together: a tree that many snapshots share is
//! read once, and the reads go over the metadata in one direction.

use crate::bits::Bits;
use crate::collect::Progress;
use crate::fetch::{Ahead, BATCH, Entry, Failed, Pace, misplaced_words};
use blockstore::format::pointer::Pointer;
use blockstore::format::vdi::{SnapshotIndex, VdiHead};
use blockstore::tree::Reader;
use blockstore::types::Gba;
use blockstore::{Result, StoreError, StoreErrorKind};
use uuid::Uuid;

/// Marks what roots reach.
pub(crate) struct Reach<'a> {
    reader: Reader,
    reached: Bits,
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
        Self { reader, reached, frontier, disks, goes_on, pace, progress }
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
            self.read_level(level, &nodes).await?;
        }
        Ok(())
    }

    /// Reads nodes of one level, which are sorted, and marks what they name.
    async fn read_level(&mut self, level: usize, nodes: &[Entry]) -> Result<()> {
        let reader = self.reader.clone();
        let mut ahead = Ahead::new(&reader, level, nodes, &self.pace);
        while let Some((batch, read)) = ahead.next(&mut self.pace).await {
            (self.goes_on)()?;
            let named = match read {
                Ok(named) => named,
                Err(failed) => return Err(self.blame(batch, failed).await),
            };
            let mut fresh = 0;
            for (first, blocks) in named.data {
                fresh += self.reached.insert_run(first, blocks);
            }
            for child in named.nodes {
                if self.reached.insert(Gba(child.gba)) {
                    fresh += 1;
                    self.push(level - 1, child);
                }
            }
            self.progress.note_nodes(batch.len() as u64);
            self.progress.note_reached(fresh);
        }
        Ok(())
    }

    /// What is reached.
    pub(crate) fn into_bits(self) -> Bits {
        self.reached
    }

    /// The root of a tree whose top node is at `level`.
    fn begin(&mut self, root: Pointer, level: u8, disk: u32) -> Result<()> {
        if self.reach(root, disk)? {
            self.push(usize::from(level), Entry::of(root, disk));
        }
        Ok(())
    }

    fn push(&mut self, level: usize, entry: Entry) {
        if self.frontier.len() <= level {
            self.frontier.resize_with(level + 1, Vec::new);
        }
        self.frontier[level].push(entry);
    }

    /// Sets the bit of a block of metadata; true if it was not set before.
    fn reach(&mut self, pointer: Pointer, disk: u32) -> Result<bool> {
        if pointer.is_sparse() {
            return Ok(false);
        }
        if !self.reader.geometry().is_allocatable(pointer.gba) {
            return Err(self.damaged(disk, &misplaced_words(pointer.gba)));
        }
        let fresh = self.reached.insert(pointer.gba);
        self.progress.note_reached(u64::from(fresh));
        Ok(fresh)
    }

    /// The tree that lists a disk's snapshots, and the root of each.
    async fn mark_snapshots(&mut self, index: SnapshotIndex, disk: u32) -> Result<()> {
        let mut level = Vec::new();
        if self.reach(index.root, disk)? {
            level.push(Entry::of(index.root, disk));
        }
        for _ in 1..index.height {
            let mut below = Vec::new();
            for batch in level.chunks(BATCH) {
                (self.goes_on)()?;
                self.pace.before(batch.len()).await;
                let nodes: Vec<Pointer> = batch.iter().map(|entry| entry.pointer()).collect();
                let read = self.reader.read_nodes(&nodes).await;
                for node in read.map_err(|error| self.judge(disk, error))? {
                    for (_, child) in node.children() {
                        if self.reach(child, disk)? {
                            below.push(Entry::of(child, disk));
                        }
                    }
                }
                self.progress.note_nodes(batch.len() as u64);
            }
            level = below;
        }
        for batch in level.chunks(BATCH) {
            (self.goes_on)()?;
            self.pace.before(batch.len()).await;
            let leaves: Vec<Pointer> = batch.iter().map(|entry| entry.pointer()).collect();
            let read = self.reader.snapshots_of(&leaves).await;
            for snapshot in read.map_err(|error| self.judge(disk, error))? {
                self.begin(snapshot.root, snapshot.height, disk)?;
            }
        }
        Ok(())
    }

    /// Finds out whose node is damaged.
    async fn blame(&self, batch: &[Entry], failed: Failed) -> StoreError {
        let Failed { disk, error } = failed;
        if error.kind != StoreErrorKind::Corrupt {
            return error;
        }
        if let Some(disk) = disk {
            return self.judge(disk, error);
        }
        for entry in batch {
            match self.reader.read_blocks(&[entry.pointer()]).await {
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
