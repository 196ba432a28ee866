//! What roots reach: one bit per block, and per level of the trees a list of the nodes to read, in the order of the device.
//!
//! Nothing that a root reached when it was read is used again while this runs: this host keeps what it frees in quarantine. So
//! each block holds one thing throughout, a bit says all there is to say of it, and a node that does not match its pointer is
//! damage (rule G4). Nodes of all disks and snapshots of one level are read together: a tree that many snapshots share is
//! read once, and the reads go over the metadata in one direction.

use crate::bits::Bits;
use crate::collect::Progress;
use crate::reading::{BATCH, Entry, Listed, Reading};
use blockstore::Result;
use blockstore::format::pointer::Pointer;
use blockstore::format::vdi::VdiHead;
use blockstore::tree::Reader;

/// Marks what roots reach.
pub(crate) struct Reach<'a> {
    reading: Reading<'a>,
    found: Found,
    disks: u32,
}

struct Found {
    reached: Bits,
    /// Blocks of it that the progress was not told of yet.
    fresh: u64,
    /// By level; leaves at 1.
    frontier: Vec<Vec<Entry>>,
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
        let reading = Reading::new(reader, rate, "nothing is collected", goes_on, progress);
        let found = Found { reached, fresh: 0, frontier: Vec::new() };
        Self { reading, found, disks: 0 }
    }

    /// Marks what disks and their snapshots reach.
    ///
    /// # Errors
    /// `Corrupt` naming the disk if a part of its map is damaged; that of `goes_on`; the device's.
    pub(crate) async fn mark(&mut self, heads: impl Iterator<Item = &VdiHead>) -> Result<()> {
        let Self { reading, found, disks } = self;
        for head in heads {
            let disk = *disks;
            *disks += 1;
            reading.own(disk, head.uuid);
            found.reach(reading, head.meta, disk)?;
            found.begin(reading, head.root, head.height, disk)?;
            let mut take = |reading: &Reading<'_>, listed: Listed<'_>| match listed {
                Listed::Block(pointer) => found.reach(reading, pointer, disk),
                Listed::Snapshot(snapshot) => {
                    found.begin(reading, snapshot.root, snapshot.height, disk).map(|()| false)
                }
            };
            reading.lists(head.snapshots, disk, &mut take).await?;
        }
        while let Some(mut nodes) = found.frontier.pop() {
            let level = found.frontier.len();
            nodes.sort_unstable();
            let mut batches = nodes.chunks(BATCH);
            let mut ahead = batches.next().map(|batch| (batch, reading.fetch(batch)));
            while let Some((batch, fetched)) = ahead {
                let read = reading.fetched(batch, fetched).await?;
                found.tell(reading.progress());
                ahead = batches.next().map(|batch| (batch, reading.fetch(batch)));
                for (entry, node) in batch.iter().zip(read) {
                    for (_, child) in node.children() {
                        if found.reach(reading, child, entry.whose)? && level > 1 {
                            found.push(level - 1, child, entry.whose);
                        }
                    }
                }
            }
        }
        found.tell(reading.progress());
        Ok(())
    }

    /// What is reached.
    pub(crate) fn into_bits(self) -> Bits {
        self.found.reached
    }
}

impl Found {
    fn tell(&mut self, progress: &Progress) {
        progress.note_reached(std::mem::take(&mut self.fresh));
    }

    /// The root of a tree whose top node is at `level`.
    fn begin(&mut self, reading: &Reading<'_>, root: Pointer, level: u8, disk: u32) -> Result<()> {
        if self.reach(reading, root, disk)? {
            self.push(usize::from(level), root, disk);
        }
        Ok(())
    }

    fn push(&mut self, level: usize, pointer: Pointer, disk: u32) {
        if self.frontier.len() <= level {
            self.frontier.resize_with(level + 1, Vec::new);
        }
        self.frontier[level].push(Entry::new(pointer, disk));
    }

    /// Sets a block's bit; true if it was not set before.
    #[inline]
    fn reach(&mut self, reading: &Reading<'_>, pointer: Pointer, disk: u32) -> Result<bool> {
        if pointer.is_sparse() {
            return Ok(false);
        }
        reading.check_place(pointer, disk)?;
        let fresh = self.reached.insert(pointer.gba);
        self.fresh += u64::from(fresh);
        Ok(fresh)
    }
}
