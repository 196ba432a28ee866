//! What each disk and snapshot holds, and what a deletion would free; what the store's space is used for.
//!
//! A *root* is a disk as it is now, or one of its snapshots. A block is *exclusive* to a root if no other leads to it: that is what
//! deleting the root alone frees. What no other disk leads to, nor any snapshot of another, is freed with the disk.
//!
//! Cost: each node is read once, however many roots share it; leaves that one disk has for itself, and inner nodes, a second time.
//! Memory: five bits for each block that is reached, some 50 bytes per node, and 80 per snapshot. Why it is exact: decision 0021,
//! and the head of `sizes/walk.rs`.
//!
//! Where blocks are freed by this very process, a [`blockstore::Walk`] keeps the ground. Beside another process the figures count
//! only if no disk has changed meanwhile.

mod marks;
mod reading;
mod space;
mod walk;

use crate::collect::Progress;
use blockstore::format::vdi::{VdiHead, VdiState};
use blockstore::slot::{Content, View};
use blockstore::types::{BLOCK_SIZE, Lsn};
use blockstore::{Result, Store, StoreError, StoreErrorKind, Walk};
use serde::{Deserialize, Serialize};
use std::ops::{AddAssign, Sub};
use std::sync::Arc;
use uuid::Uuid;

/// How often the computing starts over when another process changes the store meanwhile.
const ATTEMPTS: u32 = 3;

/// How to compute sizes.
#[derive(Clone, Copy, Debug, Default)]
pub struct SizeOptions {
    /// Most bytes of metadata read in a second; none: as fast as the device can.
    pub rate: Option<u64>,
}

/// Bytes of whole blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amount {
    /// Disks' content.
    pub data: u64,
    /// Maps, lists of snapshots, names.
    pub metadata: u64,
}

impl Amount {
    /// Both.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.data + self.metadata
    }

    fn add_blocks(&mut self, data: u64, metadata: u64) {
        self.data += data * BLOCK_SIZE as u64;
        self.metadata += metadata * BLOCK_SIZE as u64;
    }
}

impl AddAssign for Amount {
    fn add_assign(&mut self, other: Self) {
        self.data += other.data;
        self.metadata += other.metadata;
    }
}

impl Sub for Amount {
    type Output = Self;

    /// What is left; nothing, if there was less.
    fn sub(self, other: Self) -> Self {
        Self {
            data: self.data.saturating_sub(other.data),
            metadata: self.metadata.saturating_sub(other.metadata),
        }
    }
}

/// What a root holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootSizes {
    /// All that it leads to.
    pub referenced: Amount,
    /// Of that, what no other root leads to.
    pub exclusive: Amount,
}

impl RootSizes {
    /// What others lead to, too.
    #[must_use]
    pub fn shared(&self) -> Amount {
        self.referenced - self.exclusive
    }
}

/// What a snapshot holds. Its exclusive part is what deleting it, and nothing else, frees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotSizes {
    /// Which.
    pub lsn: Lsn,
    /// Clones hang on it: it cannot be deleted before they are.
    pub cloned: bool,
    /// What it holds.
    #[serde(flatten)]
    pub sizes: RootSizes,
}

/// What a disk holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSizes {
    /// Which.
    pub uuid: Uuid,
    /// Its present state, without its snapshots.
    #[serde(flatten)]
    pub sizes: RootSizes,
    /// What deleting all its snapshots on which no clone hangs, and not the disk, frees.
    pub snapshots_free: Amount,
    /// What deleting it with all its snapshots frees; clones of these would have to go first.
    pub deletion_frees: Amount,
    /// Of that, its name and the lists of its snapshots.
    pub lists: Amount,
    /// Its snapshots, oldest first.
    pub snapshots: Vec<SnapshotSizes>,
}

/// What a store's space is used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreSizes {
    /// All that can be allocated.
    pub capacity: u64,
    /// Allocated or claimed.
    pub used: Amount,
    /// What some root leads to, and the lists of snapshots.
    pub reachable: Amount,
    /// Of that, what several roots lead to.
    pub shared: Amount,
    /// And what one leads to.
    pub exclusive: Amount,
    /// What disks as they are now lead to, perhaps beside snapshots.
    pub present: Amount,
    /// What only snapshots lead to.
    pub snapshots: Amount,
    /// Of that, what snapshots lead to that cannot be deleted, since clones hang on them.
    pub clone_sources: Amount,
    /// What collection would give back. Beside other processes: with what their hosts have claimed ahead of need.
    pub reclaimable: Amount,
    /// Used, and neither reachable nor reclaimable: claimed ahead of need, of commits under way, written or freed meanwhile.
    pub in_hand: Amount,
    /// Sum of the disks' sizes.
    pub provisioned: u64,
}

/// Outcome of [`sizes`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// The store as a whole.
    pub store: StoreSizes,
    /// All disks, in the order of the registry.
    pub disks: Vec<DiskSizes>,
    /// Nodes that were read for it.
    pub nodes: u64,
}

/// Computes the sizes of everything in the store. Writes nothing; may be dropped at any time.
///
/// # Errors
/// `Corrupt` naming the block, `Damaged` naming the record, if what a disk holds is not known; `NoSpace` if the ground was lost: this host
/// needed what it freed meanwhile; `InUse` while garbage is collected, or sizes are computed; `Changed` if another process
/// keeps changing the store; the device's.
pub async fn sizes(store: &Arc<Store>, options: SizeOptions, progress: &Progress) -> Result<Sizes> {
    if store.is_writable() {
        let walk = store.begin_walk().await?;
        let heads = walk.heads().await?;
        let goes_on = || walk.check();
        let computed = compute(store, Some(&walk), &heads, options, &goes_on, progress).await;
        // Figures count only if nothing was used again up to their end.
        walk.check()?;
        return computed;
    }
    for _ in 0..ATTEMPTS {
        let heads = store.scan_vdis().await?;
        let computed = compute(store, None, &heads, options, &|| Ok(()), progress).await;
        if store.scan_vdis().await? == heads {
            return computed;
        }
    }
    Err(StoreError::new(
        StoreErrorKind::Changed,
        store.url(),
        format!(
            "disks were written to each of the {ATTEMPTS} times that their sizes were being computed; ask the agent that \
             uses the store: 'ballast vdi tree --sizes'"
        ),
    ))
}

type Heads = [(u32, View<VdiHead>)];

async fn compute(
    store: &Store,
    ground: Option<&Walk>,
    heads: &Heads,
    options: SizeOptions,
    goes_on: &(dyn Fn() -> Result<()> + Send + Sync),
    progress: &Progress,
) -> Result<Sizes> {
    let roots = roots_of(store, heads).await?;
    let nodes_before = progress.nodes();
    let walked = walk::walk(store.reader(), &roots, options.rate, goes_on, progress).await?;
    let mut of_store = space::measure(store, ground, &walked.marks).await?;
    let mut disks = walked.disks;
    of_store.provisioned = roots.iter().map(|head| head.size_bytes).sum();
    for disk in &disks {
        of_store.exclusive += disk.lists;
        of_store.exclusive += disk.sizes.exclusive;
        for snapshot in &disk.snapshots {
            of_store.exclusive += snapshot.sizes.exclusive;
        }
    }
    of_store.shared = of_store.reachable - of_store.exclusive;
    disks.shrink_to_fit();
    Ok(Sizes { store: of_store, disks, nodes: progress.nodes() - nodes_before })
}

/// The disks, if all of them can be seen.
async fn roots_of<'a>(store: &Store, heads: &'a Heads) -> Result<Vec<&'a VdiHead>> {
    if let Some(problem) = store.verify_tables().await?.into_iter().find(|p| p.hides_disks) {
        let words = format!(
            "{} What all disks hold is not known; 'ballast store check' says more",
            problem.what
        );
        return Err(StoreError::new(StoreErrorKind::Damaged, store.url(), words));
    }
    let mut roots = Vec::new();
    for (slot, view) in heads {
        if matches!(view.content, Content::Unused) {
            continue;
        }
        let Some(head) = view.record() else {
            return Err(StoreError::new(
                StoreErrorKind::Damaged,
                format!("{}, VDI record in slot {slot} (block {})", store.url(), view.slot.first),
                "it is damaged, and what its disk holds is not known: no sizes were computed. 'ballast store check' says more",
            ));
        };
        // A disk that is being made is a root already, one that is being deleted is none any more.
        if matches!(head.state, VdiState::Active | VdiState::Creating) {
            roots.push(head);
        }
    }
    Ok(roots)
}
