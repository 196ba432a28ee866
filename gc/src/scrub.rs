//! Scrub: reads everything that disks and snapshots hold, slowly, beside all that goes on, and tells what is damaged.
//!
//! Nothing is held meanwhile: no quarantine, no snapshot, no lock. Commits, deletions, collection and unmapping go on, and a block
//! that was to be read may be used for something else by then. So a block that does not match its pointer gets a second look
//! (`scrub/looking.rs`): the way to it is walked anew from the present root, before and after it is read again. Only what is
//! reached by the very same pointer both times was reachable all the while, and is damaged.
//!
//! What a pass covers: every block that is reachable when its disk's turn comes, and stays so. Disk by disk, each after those
//! that it was cloned from; of each disk first its present state, then its snapshots, the newest first (`scrub/disk.rs`). A
//! tree is compared with its neighbour, of which all was read: what both lead to at the same place is not read again
//! (`scrub/tree.rs`). So no bits are needed of what was read, and memory does not grow with the store. That the neighbour was
//! read is known, not taken for granted (`scrub/passed.rs`).
//!
//! docs/scrub.md has the argument in full.

mod damage;
mod disk;
mod lists;
mod looking;
mod order;
mod passed;
mod progress;
mod reading;
mod snapshots;
mod tables;
mod tree;

pub use damage::{DAMAGE_MAX, Damage, Part};
pub use progress::{Position, Saved, ScrubProgress, Scrubbed};

use blockstore::{Result, Store};
use looking::Looking;
use std::sync::Arc;

/// How to scrub.
#[derive(Clone, Copy, Debug, Default)]
pub struct ScrubOptions {
    /// Most bytes read in a second; none: as fast as the device can. With a rate, the device also rests after each read as long as
    /// the read took.
    pub rate: Option<u64>,
}

/// Verifies everything in the store, or goes on with what was begun in `progress`. Writes nothing; may be dropped at any time. While the
/// store does not answer, or gives nothing but errors, it waits.
///
/// # Errors
/// `Closing`. All else is told in `progress`: damage, and what could not be verified.
pub async fn scrub(
    store: &Arc<Store>,
    options: ScrubOptions,
    progress: &ScrubProgress,
) -> Result<Scrubbed> {
    let mut looking = Looking::new(store, options.rate, progress);
    let from = progress.saved().position;
    if from.is_none() {
        tables::verify(&mut looking).await?;
    }
    let disks = order::disks(&mut looking).await?;
    for disk in &disks {
        // Not by the order, which is another one if a record could be read only now, or no longer.
        if progress.has_passed(disk.slot) {
            continue;
        }
        let resumed = from.as_ref().filter(|from| from.disk == disk.uuid);
        let resumed = resumed.and_then(|from| from.tree.clone());
        let source = disk::verify(&mut looking, disk, &disks, resumed).await?;
        progress.pass(disk.slot, source.filter(|_| disk.has_clones));
    }
    Ok(progress.saved().scrubbed)
}
