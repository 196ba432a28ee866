//! The way back: blocks that may be used again, in the pool or no more in quarantine, and are to be clear in the BMap.
//!
//! They go back in parts of a few bitmap pages. The lock of the pages is held for one part at a time, so commits that claim get
//! in between, however much there is. Until its part comes, a block is in [`Returning`]: an allocation that finds no room takes it
//! from there, and collection counts it as touched. Cut off at any point, by a close or a death, what has not gone back has its bit
//! set, and leaks until a cycle has passed: nothing reaches it.

use crate::alloc::runs::{FreeRuns, Run};
use crate::alloc::waiting::Waiting;
use crate::alloc::{Allocator, Pools, add};
use crate::error::Result;
use crate::format::bitmap::PAGE_BITS;
use crate::format::extent::ExtentType;
use crate::io::Io;

/// Bitmap pages that one part is about: some reads and one round of writes.
const PART_PAGES: usize = 8;

/// Blocks on the way back, or in quarantine.
#[derive(Debug, Default)]
pub(super) struct Returning {
    pub data: Waiting,
    pub metadata: Waiting,
}

impl Returning {
    pub(super) fn of(&mut self, kind: ExtentType) -> &mut Waiting {
        match kind {
            ExtentType::Metadata => &mut self.metadata,
            _ => &mut self.data,
        }
    }

    pub(super) fn total(&self) -> u64 {
        self.data.total() + self.metadata.total()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.data.bytes() + self.metadata.bytes()
    }

    /// Adds a run, unless somebody frees it twice.
    pub(super) fn add(&mut self, kind: ExtentType, run: Run) {
        if !self.of(kind).add(run) {
            twice(run);
        }
    }
}

/// A block that is freed twice means that two pointers name it: it must not be given out, so it
/// leaks, loudly.
pub(super) fn twice(run: Run) {
    tracing::error!(start = %run.start, blocks = run.blocks, "blocks were freed twice; leaked");
}

impl Pools {
    /// Lets blocks go back to the BMap.
    pub(super) fn let_go(&mut self, kind: ExtentType, runs: Vec<Run>) {
        runs.into_iter().for_each(|run| self.returning.add(kind, run));
    }

    /// The next part. What is in the pool as well was freed twice.
    fn next_part(&mut self, kind: ExtentType) -> Vec<Run> {
        let mut part = self.returning.of(kind).take_part(PART_PAGES, PAGE_BITS);
        let pool: &FreeRuns = self.of(kind);
        part.retain(|run| {
            let is_pooled = pool.overlaps(*run);
            if is_pooled {
                twice(*run);
            }
            !is_pooled
        });
        part
    }
}

impl Allocator {
    /// Lets what the pool holds beyond `keep` go back, and gives one part of all that is on the way back to the BMap. True if more is.
    ///
    /// # Errors
    /// `Closing`; what else concerns the store as a whole. The part leaks until it is collected.
    pub(super) async fn return_part(&self, io: &Io, kind: ExtentType) -> Result<bool> {
        let mut pages = tokio::select! {
            biased;
            () = io.closed() => return Err(io.closing_error()),
            pages = self.pages.lock() => pages,
        };
        // Under the lock: a cycle that begins finds a block either here or clear in the BMap.
        let (part, is_more) = {
            let mut pools = self.pools.lock();
            let part = pools.next_part(kind);
            (part, pools.returning.of(kind).total() > 0)
        };
        if part.is_empty() {
            return Ok(is_more);
        }
        let outcome = pages.release(io, &self.territory, kind, part).await;
        self.refresh_owned(&pages);
        self.freed.notify_waiters();
        outcome.map(|()| is_more)
    }

    /// Takes what an allocation lacks from what is on the way back: there is no other room. True if that is enough.
    pub(super) fn draw(&self, kind: ExtentType, wanted: u64) -> bool {
        let mut pools = self.pools.lock();
        let missing = wanted.saturating_sub(pools.of(kind).total());
        let returning = pools.returning.of(kind);
        if returning.total() < missing {
            return false;
        }
        for run in returning.take(missing) {
            add(pools.of(kind), run);
        }
        pools.of(kind).total() >= wanted
    }
}
