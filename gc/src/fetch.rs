//! Reading nodes ahead: several batches of one level are read, checked and taken apart on other cores, while those before them
//! are being marked. What comes out is small: the data that leaves name as runs of blocks, nodes of the next level as entries.

use blockstore::format::node::Node;
use blockstore::format::pointer::Pointer;
use blockstore::tree::Reader;
use blockstore::types::{BLOCK_SIZE, Birth, Gba};
use blockstore::{Result, StoreError, StoreErrorKind};
use std::collections::VecDeque;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Leaves read at once: 1 MiB, one request where they lie together.
pub(crate) const BATCH: usize = 256;
/// Inner nodes read at once. They are few, and name 256 times as much.
pub(crate) const INNER_BATCH: usize = 64;

/// Batches of leaves that are read ahead, 12 MiB; the device is never without work then.
const AHEAD: usize = 12;
/// Of inner nodes; and below a rate, so that a device that is slow for a while is not buried in reads that guests would have to
/// wait for.
const AHEAD_FEW: usize = 4;
const AHEAD_PACED: usize = 2;
/// Nodes read at once below a rate, so that a guest's request finds little before it on the device.
const PACED_BATCH: usize = 64;
/// Below a rate the processor is offered to others after so many nodes: a disk's worker that wants it does not wait for the end of
/// a time slice.
const NODES_AT_A_STRETCH: usize = 16;

/// A node to read. Small, since there is one for each node of a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Entry {
    pub(crate) gba: u64,
    pub(crate) crc: u32,
    /// Whose it is, for messages: an index into the disks.
    pub(crate) disk: u32,
}

impl Entry {
    pub(crate) fn of(pointer: Pointer, disk: u32) -> Self {
        Self { gba: pointer.gba.0, crc: pointer.crc, disk }
    }

    pub(crate) fn pointer(self) -> Pointer {
        Pointer { gba: Gba(self.gba), read_only: false, birth: Birth(0), crc: self.crc }
    }
}

/// What a batch of nodes names, holes left out.
#[derive(Debug, Default)]
pub(crate) struct Named {
    /// Nodes of the level below; none if the batch was leaves.
    pub(crate) nodes: Vec<Entry>,
    /// Data, as first block and number of blocks; none if the batch was inner nodes.
    pub(crate) data: Vec<(Gba, u64)>,
}

/// Why a batch was not read.
#[derive(Debug)]
pub(crate) struct Failed {
    /// Whose node it was, if that is known.
    pub(crate) disk: Option<u32>,
    pub(crate) error: StoreError,
}

/// A batch that is being read; given up when it is dropped.
type Fetch = JoinSet<Result<Named, Failed>>;

/// The nodes of one level, in the order in which they are to be read.
#[derive(Debug)]
pub(crate) struct Ahead<'a> {
    reader: &'a Reader,
    level: usize,
    rest: std::slice::Chunks<'a, Entry>,
    /// Each a set of one, so that what is not waited for ends with it.
    under_way: VecDeque<(&'a [Entry], Fetch)>,
    ahead: usize,
    gives_way: bool,
}

impl<'a> Ahead<'a> {
    /// Nothing is read yet. Leaves are at level 1.
    pub(crate) fn new(reader: &'a Reader, level: usize, nodes: &'a [Entry], pace: &Pace) -> Self {
        let (batch, ahead) = if level > 1 { (INNER_BATCH, AHEAD_FEW) } else { (BATCH, AHEAD) };
        let gives_way = pace.rate.is_some();
        let (batch, ahead) = if gives_way { (PACED_BATCH, AHEAD_PACED) } else { (batch, ahead) };
        let rest = nodes.chunks(batch);
        Self { reader, level, rest, under_way: VecDeque::new(), ahead, gives_way }
    }

    /// The next batch with what it names, and how many nodes it has; none at the end.
    pub(crate) async fn next(
        &mut self,
        pace: &mut Pace,
    ) -> Option<(&'a [Entry], Result<Named, Failed>)> {
        while self.under_way.len() < self.ahead {
            let Some(batch) = self.rest.next() else { break };
            pace.before(batch.len()).await;
            let (reader, level, nodes) = (self.reader.clone(), self.level, batch.to_vec());
            let (mut task, gives_way) = (JoinSet::new(), self.gives_way);
            task.spawn(async move { named(&reader, level, &nodes, gives_way).await });
            self.under_way.push_back((batch, task));
        }
        let (batch, mut task) = self.under_way.pop_front()?;
        let read = match task.join_next().await {
            Some(Ok(read)) => read,
            // It was stopped with its runtime, or failed inside: then it is told where.
            _ => named(self.reader, self.level, batch, self.gives_way).await,
        };
        Some((batch, read))
    }
}

/// Reads nodes and takes them apart.
async fn named(
    reader: &Reader,
    level: usize,
    nodes: &[Entry],
    gives_way: bool,
) -> Result<Named, Failed> {
    let pointers: Vec<Pointer> = nodes.iter().map(|entry| entry.pointer()).collect();
    let read = reader.read_blocks(&pointers).await;
    let blocks = read.map_err(|error| Failed { disk: None, error })?;
    let mut named = Named::default();
    for (place, (entry, block)) in nodes.iter().zip(blocks).enumerate() {
        if gives_way && place % NODES_AT_A_STRETCH == 0 {
            std::thread::yield_now();
        }
        let mut misplaced = None;
        let decoded = Node::children_in(&block, |child| {
            if !reader.geometry().is_allocatable(child.gba) {
                misplaced = Some(child.gba);
            } else if level > 1 {
                named.nodes.push(Entry::of(child, entry.disk));
            } else {
                named.add(child.gba);
            }
        });
        let words = match (decoded, misplaced) {
            (Ok(()), None) => continue,
            (Ok(()), Some(gba)) => misplaced_words(gba),
            (Err(damage), _) => format!(
                "node at block {}: {damage}, though its checksum matches; was it written by a newer version?",
                entry.gba
            ),
        };
        let error = StoreError::new(StoreErrorKind::Corrupt, String::new(), words);
        return Err(Failed { disk: Some(entry.disk), error });
    }
    Ok(named)
}

/// Of a pointer to where no tree block can be.
pub(crate) fn misplaced_words(gba: Gba) -> String {
    format!("a pointer names block {gba}, which no tree block can be")
}

impl Named {
    /// A block of data. Where a disk was written in order, a leaf is one run.
    #[inline]
    fn add(&mut self, gba: Gba) {
        match self.data.last_mut() {
            // An extent begins with a header, so no run leaves its extent.
            Some((first, blocks)) if first.0 + *blocks == gba.0 => *blocks += 1,
            _ => self.data.push((gba, 1)),
        }
    }
}

/// Keeps reading below a rate.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Bytes a second; none: as fast as the device can.
    rate: Option<u64>,
    next: Instant,
}

impl Pace {
    pub(crate) fn new(rate: Option<u64>) -> Self {
        Self { rate: rate.filter(|rate| *rate > 0), next: Instant::now() }
    }

    /// To be called before `blocks` are read.
    pub(crate) async fn before(&mut self, blocks: usize) {
        let Some(rate) = self.rate else { return };
        tokio::time::sleep_until(self.next).await;
        let takes = Duration::from_secs_f64((blocks * BLOCK_SIZE) as f64 / rate as f64);
        // What was not used is not saved up: a burst would be felt by the guests.
        self.next = self.next.max(Instant::now()) + takes;
    }

    /// Nothing is read for so long.
    pub(crate) fn rest(&mut self, time: Duration) {
        self.next = self.next.max(Instant::now() + time);
    }
}
