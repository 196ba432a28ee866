//! Reading all nodes of a level, in batches, below a rate. Nodes of all disks and snapshots of one level are read together: while one batch
//! is looked through, the next is read, and its checksums are compared. Marking for collection reads more ahead, and leaves the leaves'
//! pointers behind (`fetch.rs`); sizes need each node whole, with its place in the tree.

use crate::collect::Progress;
use crate::fetch::Pace;
use blockstore::format::node::Node;
use blockstore::format::pointer::Pointer;
use blockstore::format::snapshot::Snapshot;
use blockstore::format::vdi::SnapshotIndex;
use blockstore::tree::Reader;
use blockstore::types::{Birth, Gba};
use blockstore::{Result, StoreError, StoreErrorKind};
use std::sync::Arc;
use tokio::task::JoinSet;
use uuid::Uuid;

/// Nodes read at once.
pub(crate) const BATCH: usize = 1024;

/// A node to read. Small, since there is one for each node of a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Entry {
    pub(crate) gba: u64,
    pub(crate) crc: u32,
    /// What it is found by; see [`Reading::own`].
    pub(crate) whose: u32,
}

impl Entry {
    pub(crate) fn new(pointer: Pointer, whose: u32) -> Self {
        Self { gba: pointer.gba.0, crc: pointer.crc, whose }
    }

    fn pointer(self) -> Pointer {
        Pointer { gba: Gba(self.gba), read_only: false, birth: Birth(0), crc: self.crc }
    }
}

/// What a disk's list of snapshots holds.
pub(crate) enum Listed<'a> {
    /// A block of the list itself. What the caller returns says whether it is to be read.
    Block(Pointer),
    Snapshot(&'a Snapshot),
}

/// Batches that are being read; given up when it is dropped.
pub(crate) type Fetch = JoinSet<Result<Vec<Arc<Node>>>>;

/// Reads nodes for a walk.
pub(crate) struct Reading<'a> {
    reader: Reader,
    /// Disks, each with the least `whose` that is its.
    owners: Vec<(u32, Uuid)>,
    /// What a damaged map keeps from being done, for messages.
    then: &'static str,
    /// Fails when the walk has lost its ground.
    goes_on: &'a (dyn Fn() -> Result<()> + Send + Sync),
    pace: Pace,
    progress: &'a Progress,
}

impl<'a> Reading<'a> {
    /// Reads at most `rate` bytes a second, if that is said.
    pub(crate) fn new(
        reader: Reader,
        rate: Option<u64>,
        then: &'static str,
        goes_on: &'a (dyn Fn() -> Result<()> + Send + Sync),
        progress: &'a Progress,
    ) -> Self {
        Self { reader, owners: Vec::new(), then, goes_on, pace: Pace::new(rate), progress }
    }

    /// What is found by `first` or more, up to the next disk's, is this disk's.
    pub(crate) fn own(&mut self, first: u32, disk: Uuid) {
        self.owners.push((first, disk));
    }

    /// Makes sure that a pointer can be one.
    #[inline]
    pub(crate) fn check_place(&self, pointer: Pointer, whose: u32) -> Result<()> {
        if self.reader.geometry().is_allocatable(pointer.gba) {
            return Ok(());
        }
        Err(self.misplaced(pointer, whose))
    }

    #[cold]
    fn misplaced(&self, pointer: Pointer, whose: u32) -> StoreError {
        let words = format!("a pointer names block {}, which no tree block can be", pointer.gba);
        self.damaged(whose, &words)
    }

    /// Goes through the tree that lists a disk's snapshots, oldest first.
    ///
    /// # Errors
    /// Those of `take`, and as [`fetched`](Self::fetched).
    pub(crate) async fn lists(
        &mut self,
        index: SnapshotIndex,
        whose: u32,
        take: &mut (dyn FnMut(&Self, Listed<'_>) -> Result<bool> + Send),
    ) -> Result<()> {
        let mut level = Vec::new();
        if take(self, Listed::Block(index.root))? {
            level.push(Entry::new(index.root, whose));
        }
        for _ in 1..index.height {
            let mut below = Vec::new();
            for batch in level.chunks(BATCH) {
                for node in self.read(batch).await? {
                    for (_, child) in node.children() {
                        if take(self, Listed::Block(child))? {
                            below.push(Entry::new(child, whose));
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
            for snapshot in read.map_err(|error| self.judge(whose, error))? {
                take(self, Listed::Snapshot(&snapshot))?;
            }
            self.pace.before(batch.len()).await;
        }
        Ok(())
    }

    /// Reads nodes of one level.
    async fn read(&mut self, batch: &[Entry]) -> Result<Vec<Arc<Node>>> {
        let fetched = self.fetch(batch);
        self.fetched(batch, fetched).await
    }

    /// Begins to read nodes, on another core if there is one.
    pub(crate) fn fetch(&self, batch: &[Entry]) -> Fetch {
        let pointers: Vec<Pointer> = batch.iter().map(|entry| entry.pointer()).collect();
        let reader = self.reader.clone();
        let mut fetched = JoinSet::new();
        fetched.spawn(async move { reader.read_nodes(&pointers).await });
        fetched
    }

    /// The nodes that are being read.
    ///
    /// # Errors
    /// `Corrupt` naming the disk if a node is damaged; that of `goes_on`; the device's.
    pub(crate) async fn fetched(
        &mut self,
        batch: &[Entry],
        mut fetched: Fetch,
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
        let progress = self.progress;
        progress.note(progress.nodes() + batch.len() as u64, progress.reached());
        self.pace.before(batch.len()).await;
        Ok(nodes)
    }

    /// Finds out whose node is damaged.
    async fn blame(&self, batch: &[Entry], error: StoreError) -> StoreError {
        for entry in batch {
            match self.reader.read_nodes(&[entry.pointer()]).await {
                Err(error) if error.kind == StoreErrorKind::Corrupt => {
                    return self.judge(entry.whose, error);
                }
                _ => {}
            }
        }
        error
    }

    /// What was given up may well be used by something else by now: that is no damage.
    fn judge(&self, whose: u32, error: StoreError) -> StoreError {
        match (self.goes_on)() {
            Err(given_up) => given_up,
            Ok(()) if error.kind == StoreErrorKind::Corrupt => {
                self.damaged(whose, &error.to_string())
            }
            Ok(()) => error,
        }
    }

    /// What is damaged keeps the walk from its end.
    pub(crate) fn damaged(&self, whose: u32, what: &str) -> StoreError {
        let next = self.owners.partition_point(|(first, _)| *first <= whose);
        let uuid = next.checked_sub(1).map_or(Uuid::nil(), |at| self.owners[at].1);
        let then = self.then;
        StoreError::new(
            StoreErrorKind::Corrupt,
            format!("VDI {uuid}"),
            format!(
                "its map or one of its snapshots' is damaged, so what it holds is not known and {then}: {what}; \
                 'ballast store check' says more"
            ),
        )
    }
}
