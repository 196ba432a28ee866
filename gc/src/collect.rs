//! Garbage collection: one cycle, from the acknowledgement to the blocks given back.
//!
//! The protocol, and why it frees nothing that is reachable: docs/garbage-collection.md. What concerns the allocator and the
//! records is in `blockstore::Collection`; here is the order of things, and the marking.

use crate::reach::Reach;
use blockstore::format::vdi::{VdiHead, VdiState};
use blockstore::slot::View;
use blockstore::{Reclaimed, Result, Store};
use serde::Serialize;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use uuid::Uuid;

/// How to collect.
#[derive(Clone, Copy, Debug)]
pub struct CollectOptions {
    /// Most bytes of metadata read in a second; none: as fast as the device can.
    pub rate: Option<u64>,
    /// How long to wait for those who still read what was cut off before the cycle.
    pub patience: Duration,
}

impl Default for CollectOptions {
    fn default() -> Self {
        Self { rate: None, patience: Duration::from_secs(600) }
    }
}

/// How far a cycle is; may be read while it runs.
#[derive(Debug, Default)]
pub struct Progress {
    nodes: AtomicU64,
    reached: AtomicU64,
    sweeping: AtomicU64,
}

impl Progress {
    pub(crate) fn note_nodes(&self, nodes: u64) {
        self.nodes.fetch_add(nodes, Ordering::Relaxed);
    }

    pub(crate) fn note_reached(&self, blocks: u64) {
        self.reached.fetch_add(blocks, Ordering::Relaxed);
    }

    /// What was found so far, in all.
    pub(crate) fn note(&self, nodes: u64, reached: u64) {
        self.nodes.store(nodes, Ordering::Relaxed);
        self.reached.store(reached, Ordering::Relaxed);
    }

    /// Nodes read.
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
    /// Nodes read.
    pub nodes: u64,
    /// Blocks that they reach.
    pub blocks_reachable: u64,
    /// Blocks given back.
    pub reclaimed: Reclaimed,
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
    let cycle = store.begin_collection().await?;
    let epoch = cycle.epoch();
    let goes_on = || cycle.check();
    let mut reach = Reach::new(cycle.reader(), options.rate, &goes_on, progress);
    let first = cycle.roots().await?;
    reach.mark(first.iter().filter_map(root)).await?;
    // A clone may have been made in a place that had been read, of a snapshot that was deleted before its disk was read
    // (rule G3): of hosts that look for each other's clones one may miss what the other makes. Whatever is made from here on
    // is made of what was marked.
    let seen: HashSet<_> = first.iter().map(|view| (view.slot.first, view.sequence())).collect();
    let mut vdis: HashSet<Uuid> = first.iter().filter_map(root).map(|head| head.uuid).collect();
    let mut again = cycle.roots().await?;
    again.retain(|view| !seen.contains(&(view.slot.first, view.sequence())));
    vdis.extend(again.iter().filter_map(root).map(|head| head.uuid));
    reach.mark(again.iter().filter_map(root)).await?;
    let reached = reach.into_bits();
    let blocks_reachable = reached.len();
    progress.sweeping.store(1, Ordering::Relaxed);
    let reclaimed = cycle.sweep(move |first| reached.word(first), options.patience).await?;
    let nodes = progress.nodes();
    tracing::info!(
        store = store.url(),
        epoch,
        nodes,
        blocks_reachable,
        data = reclaimed.data,
        metadata = reclaimed.metadata,
        "garbage was collected"
    );
    Ok(Collected { epoch, vdis: vdis.len() as u64, nodes, blocks_reachable, reclaimed })
}

/// A disk that is being made is a root already.
fn root(view: &View<VdiHead>) -> Option<&VdiHead> {
    view.record().filter(|head| matches!(head.state, VdiState::Active | VdiState::Creating))
}
