//! What roots reach: one bit per block, and per level of the trees a list of the nodes to read, in the order of the device.
//!
//! Nothing that a root reached when it was read is used again while this runs: this host keeps what it frees in quarantine. So
//! each block holds one thing throughout, a bit says all there is to say of it, and a node that does not match its pointer is
//! damage (rule G4). Nodes of all disks and snapshots of one level are read together: a tree that many snapshots share is
//! read once, and the reads go over the metadata in one direction. When the list of a level is full, the levels below are
//! walked first, so that lists do not grow with the store.

use crate::collect::Progress;
use crate::fetch::{Ahead, BATCH, Entry, Failed, INNER_BATCH, Pace, misplaced_words};
use crate::marks::Marks;
use blockstore::format::node::{HEIGHT_MAX, NODE_ENTRIES};
use blockstore::format::pointer::Pointer;
use blockstore::format::vdi::{SnapshotIndex, VdiHead};
use blockstore::tree::Reader;
use blockstore::{Result, StoreError, StoreErrorKind};
use uuid::Uuid;

/// The list of each level may take this part of a cycle's memory.
const LISTS: u64 = 64;
/// Nodes in a full list, at least: what a batch of inner nodes names.
const LIST_MIN: usize = INNER_BATCH * NODE_ENTRIES;

/// How a cycle's memory is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Bytes of bits.
    pub(crate) bits: u64,
    /// Nodes in the list of a level before it is full; a batch more may come.
    list: usize,
}

impl Memory {
    /// Divides so many bytes. Lists have a least size, bits take what is left.
    pub(crate) fn of(bytes: u64) -> Self {
        let list = ((bytes / LISTS) as usize / size_of::<Entry>()).max(LIST_MIN);
        let lists = (list + LIST_MIN) * size_of::<Entry>() * usize::from(HEIGHT_MAX);
        Self { bits: bytes.saturating_sub(lists as u64), list }
    }
}

/// Marks what roots reach.
pub(crate) struct Reach<'a> {
    reader: Reader,
    marks: Marks,
    list_max: usize,
    /// By level; leaves at 1.
    frontier: Vec<Vec<Entry>>,
    disks: Vec<Uuid>,
    /// Fails when the cycle was given up meanwhile.
    goes_on: &'a (dyn Fn() -> Result<()> + Send + Sync),
    pace: Pace,
    progress: &'a Progress,
}

impl<'a> Reach<'a> {
    /// Nothing is reached yet. Reads at most `rate` bytes a second, if that is said, and keeps to the memory.
    pub(crate) fn new(
        reader: Reader,
        rate: Option<u64>,
        memory: Memory,
        goes_on: &'a (dyn Fn() -> Result<()> + Send + Sync),
        progress: &'a Progress,
    ) -> Self {
        let marks = Marks::new(reader.geometry(), memory.bits);
        let (frontier, disks, pace) = (Vec::new(), Vec::new(), Pace::new(rate));
        let list_max = memory.list;
        Self { reader, marks, list_max, frontier, disks, goes_on, pace, progress }
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
        self.walk().await
    }

    /// What is marked.
    pub(crate) fn marks(&self) -> &Marks {
        &self.marks
    }

    /// Ends a pass over all roots, and begins the next, over the same roots.
    ///
    /// # Errors
    /// As [`finish`](Self::finish).
    pub(crate) fn next_pass(&mut self) -> Result<()> {
        self.marks.next_pass().map_err(|words| self.strange(words))?;
        self.disks.clear();
        Ok(())
    }

    /// Ends the last pass; what is marked.
    ///
    /// # Errors
    /// `Corrupt` if passes differ: something changed that must not.
    pub(crate) fn finish(self) -> Result<Marks> {
        self.marks.check_pass().map_err(|words| self.strange(words))?;
        Ok(self.marks)
    }

    fn strange(&self, words: &str) -> StoreError {
        StoreError::new(
            StoreErrorKind::Corrupt,
            "garbage collection",
            format!("{words}: nothing is collected; report this"),
        )
    }

    /// Reads all nodes that are listed, and what is below them.
    async fn walk(&mut self) -> Result<()> {
        while let Some(level) = self.frontier.iter().rposition(|nodes| !nodes.is_empty()) {
            self.walk_level(level).await?;
        }
        Ok(())
    }

    /// Reads the nodes that are listed of a level, and marks what they name; those of the levels below, too, when their list is
    /// full.
    async fn walk_level(&mut self, level: usize) -> Result<()> {
        let mut nodes = std::mem::take(&mut self.frontier[level]);
        nodes.sort_unstable();
        let reader = self.reader.clone();
        let mut ahead = Ahead::new(&reader, level, &nodes, &self.pace);
        while let Some((batch, read)) = ahead.next(&mut self.pace).await {
            (self.goes_on)()?;
            let named = match read {
                Ok(named) => named,
                Err(failed) => return Err(self.blame(batch, failed).await),
            };
            for (first, blocks) in named.data {
                self.marks.insert_data(first, blocks);
            }
            for child in named.nodes {
                if self.mark_metadata(child.pointer(), child.disk)? {
                    self.push(level - 1, child);
                }
            }
            self.note(batch.len());
            if level > 1 && self.is_full(level - 1) {
                Box::pin(self.walk_level(level - 1)).await?;
            }
        }
        Ok(())
    }

    /// Tells of nodes that were read.
    fn note(&self, nodes: usize) {
        self.progress.note(self.progress.nodes() + nodes as u64, self.marks.reached());
    }

    fn is_full(&self, level: usize) -> bool {
        self.frontier.get(level).is_some_and(|nodes| nodes.len() >= self.list_max)
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
        self.mark_metadata(pointer, disk)
    }

    /// As [`reach`](Self::reach), of a pointer whose place is known to be good.
    fn mark_metadata(&mut self, pointer: Pointer, disk: u32) -> Result<bool> {
        self.marks.insert_metadata(pointer.gba).map_err(|words| {
            let corrupt = StoreError::new(StoreErrorKind::Corrupt, String::new(), words);
            self.judge(disk, corrupt)
        })
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
                self.note(batch.len());
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
            if (0..self.frontier.len()).any(|level| self.is_full(level)) {
                self.walk().await?;
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
