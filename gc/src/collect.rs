//! Garbage collection: one cycle, from the acknowledgement to the blocks given back.
//!
//! The protocol, and why it frees nothing that is reachable: docs/garbage-collection.md. What concerns the allocator and the
//! records is in `blockstore::Collection`; here is the order of things, and the marking.

use crate::marks::Marks;
use crate::reach::{Memory, Reach};
use blockstore::format::vdi::{VdiHead, VdiState};
use blockstore::slot::View;
use blockstore::{Collection, Reclaimed, Result, Store, Swept};
use serde::Serialize;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use uuid::Uuid;

/// What marking may take of memory unless something else is said: bits of some 7 TiB in use.
pub const MEMORY_DEFAULT: u64 = 256 << 20;

/// How to collect.
#[derive(Clone, Copy, Debug)]
pub struct CollectOptions {
    /// Most bytes of metadata read in a second; none: as fast as the device can.
    pub rate: Option<u64>,
    /// Bytes of memory for bits and lists of nodes. Where one bit per block in use is more, there are several passes over the
    /// metadata. A least amount is taken in any case: bits of the metadata, twice, and of one extent, and some MiB.
    pub memory: u64,
    /// How long to wait for those who still read what was cut off before the cycle.
    pub patience: Duration,
}

impl Default for CollectOptions {
    fn default() -> Self {
        Self { rate: None, memory: MEMORY_DEFAULT, patience: Duration::from_secs(600) }
    }
}

/// How far a cycle is; may be read while it runs.
#[derive(Debug, Default)]
pub struct Progress {
    nodes: AtomicU64,
    reached: AtomicU64,
    sweeping: AtomicU64,
    pass: AtomicU64,
    passes: AtomicU64,
}

impl Progress {
    /// What was found so far, in all.
    pub(crate) fn note(&self, nodes: u64, reached: u64) {
        self.nodes.store(nodes, Ordering::Relaxed);
        self.reached.store(reached, Ordering::Relaxed);
    }

    fn note_pass(&self, pass: u64, passes: u64) {
        self.pass.store(pass, Ordering::Relaxed);
        self.passes.store(passes, Ordering::Relaxed);
    }

    /// The pass over the metadata that is under way, from 1 on, and how many there will be, as far as is known.
    #[must_use]
    pub fn pass(&self) -> (u64, u64) {
        let pass = self.pass.load(Ordering::Relaxed).max(1);
        (pass, self.passes.load(Ordering::Relaxed).max(pass))
    }

    /// Nodes read, in all passes.
    #[must_use]
    pub fn nodes(&self) -> u64 {
        self.nodes.load(Ordering::Relaxed)
    }

    /// Blocks found reachable.
    #[must_use]
    pub fn reached(&self) -> u64 {
        self.reached.load(Ordering::Relaxed)
    }

    /// True once all trees are marked.
    #[must_use]
    pub fn is_sweeping(&self) -> bool {
        self.sweeping.load(Ordering::Relaxed) != 0
    }
}

/// What a cycle did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// Its number.
    pub epoch: u64,
    /// Disks whose trees, and whose snapshots' trees, were marked.
    pub vdis: u64,
    /// Nodes read, in all passes.
    pub nodes: u64,
    /// Passes over the metadata.
    pub passes: u64,
    /// Bytes that the bits took at the most.
    pub bits_bytes: u64,
    /// Blocks that they reach.
    pub blocks_reachable: u64,
    /// Blocks given back.
    pub reclaimed: Reclaimed,
    /// Extents that were left to the next cycle, because the device did not read or write what describes them.
    pub extents_left_out: u64,
    /// What it said about the last of those.
    pub last_left_out: Option<String>,
}

/// Runs one cycle over a store that is open for writing. Cut off or failed, it has freed nothing, or a part of what it
/// found; the next cycle starts over.
///
/// # Errors
/// `InUse` if a cycle is under way or readers take too long; `Corrupt` naming a disk whose map is damaged, `Damaged` for a
/// record: nothing is freed then; `NoSpace` if this host needed at once what was freed meanwhile; the device's.
pub async fn collect(
    store: &Arc<Store>,
    options: CollectOptions,
    progress: &Progress,
) -> Result<Collected> {
    let mut cycle = store.begin_collection().await?;
    let epoch = cycle.epoch();
    let mut roots = Roots::default();
    let marks = mark(&mut cycle, options, progress, &mut roots).await?;
    let (passes, _) = progress.pass();
    let (blocks_reachable, bits_bytes) = (marks.reached(), marks.peak());
    progress.sweeping.store(1, Ordering::Relaxed);
    let last = marks.window();
    let swept = cycle.sweep(last, move |first| marks.word(first), options.patience).await?;
    let Swept { reclaimed, extents_left_out, last_left_out } = swept;
    let nodes = progress.nodes();
    tracing::info!(
        store = store.url(),
        epoch,
        nodes,
        passes,
        blocks_reachable,
        data = reclaimed.data,
        metadata = reclaimed.metadata,
        extents_left_out,
        "garbage was collected"
    );
    let vdis = roots.vdis.len() as u64;
    Ok(Collected {
        epoch,
        vdis,
        nodes,
        passes,
        bits_bytes,
        blocks_reachable,
        reclaimed,
        extents_left_out,
        last_left_out,
    })
}

/// The roots of a cycle.
#[derive(Default)]
struct Roots {
    heads: Vec<VdiHead>,
    vdis: HashSet<Uuid>,
}

impl Roots {
    /// Takes what is a root among the views; those heads.
    fn add(&mut self, views: &[View<VdiHead>]) -> &[VdiHead] {
        let known = self.heads.len();
        self.heads.extend(views.iter().filter_map(root).cloned());
        self.vdis.extend(self.heads[known..].iter().map(|head| head.uuid));
        &self.heads[known..]
    }
}

/// Marks what the roots reach, in as many passes as the memory demands, and has the store note what the passes before the last
/// have not reached. What is marked in the last pass.
async fn mark(
    cycle: &mut Collection,
    options: CollectOptions,
    progress: &Progress,
    roots: &mut Roots,
) -> Result<Marks> {
    let (reader, checked) = (cycle.reader(), cycle.checker());
    let geometry = reader.geometry().clone();
    let goes_on = || checked.check();
    let memory = Memory::of(options.memory);
    let passes = |cycle: &Collection, from| {
        let (data, metadata) = cycle.extents_from(from);
        Marks::passes(&geometry, memory.bits, data, metadata)
    };
    progress.note_pass(1, passes(cycle, 0));
    let mut reach = Reach::new(reader, options.rate, memory, &goes_on, progress);
    let first = cycle.roots().await?;
    reach.mark(roots.add(&first).iter()).await?;
    // A clone may have been made in a place that had been read, of a snapshot that was deleted before its disk was read
    // (rule G3): of hosts that look for each other's clones one may miss what the other makes. Whatever is made from here on
    // is made of what was marked.
    let seen: HashSet<_> = first.iter().map(|view| (view.slot.first, view.sequence())).collect();
    let mut again = cycle.roots().await?;
    again.retain(|view| !seen.contains(&(view.slot.first, view.sequence())));
    reach.mark(roots.add(&again).iter()).await?;
    let mut pass = 1;
    while !reach.marks().is_last_pass() {
        let window = reach.marks().window();
        let left = passes(cycle, window.end);
        cycle.note_window(window, &|first| reach.marks().word(first)).await?;
        reach.next_pass()?;
        pass += 1;
        progress.note_pass(pass, pass - 1 + left);
        // The very same roots: nothing that they reach was used again since.
        reach.mark(roots.heads.iter()).await?;
    }
    progress.note_pass(pass, pass);
    reach.finish()
}

/// A disk that is being made is a root already.
fn root(view: &View<VdiHead>) -> Option<&VdiHead> {
    view.record().filter(|head| matches!(head.state, VdiState::Active | VdiState::Creating))
}
