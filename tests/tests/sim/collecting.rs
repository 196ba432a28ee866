//! Garbage collection beside everything else, and what it must come to (P6).

use crate::host::{Agent, few, transient};
use blockstore::{StoreErrorKind, UnmapOptions};
use gc::{CheckOptions, CollectOptions, MEMORY_DEFAULT, Progress};
use rand::Rng;
use rand::rngs::SmallRng;
use std::time::Duration;

impl Agent {
    /// One cycle after the other, whatever becomes of them.
    pub async fn collect(&self, rng: &mut SmallRng) {
        loop {
            tokio::time::sleep(Duration::from_millis(few(rng, 10_000))).await;
            let patience = Duration::from_millis(few(rng, 60_000));
            // One that takes a window for each extent, now and then.
            let memory = if rng.random_bool(0.3) { 0 } else { MEMORY_DEFAULT };
            let options = CollectOptions { rate: None, memory, patience };
            let store = self.store();
            if !self.unmaps {
                let _ = gc::collect(&store, options, &Progress::default()).await;
                continue;
            }
            let progress = Progress::default();
            let _ = tokio::join!(gc::collect(&store, options, &progress), self.unmap());
            let _ = self.unmap().await;
        }
    }

    /// Tells the device of all free blocks that it was not told of.
    async fn unmap(&self) -> blockstore::Result<blockstore::Unmapped> {
        self.store().unmap(UnmapOptions { rate: None, run_min: Some(2) }).await
    }

    /// P6: a cycle leaves only what is reachable.
    pub async fn collect_all(&self) {
        let store = self.store();
        store.reclaimed().await;
        if self.unmaps {
            // What is begun amid the cycle takes up extents, which the cycle would leave out.
            let _ = self.unmap().await;
        }
        loop {
            let outcome =
                gc::collect(&store, CollectOptions::default(), &Progress::default()).await;
            let Err(error) = outcome else { break };
            if error.kind == StoreErrorKind::InUse {
                // One that was cut off still waits for readers.
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
            if transient("collecting", &error, self.may_have_lost).await.is_err() {
                return;
            }
        }
        // What the allocator releases and claims meanwhile would be counted on one side only.
        tokio::time::sleep(Duration::from_secs(60)).await;
        let report = gc::check(&store, CheckOptions::default()).await.expect("check");
        let (data, metadata) = store.pooled();
        let held = data + metadata + store.in_flight() + store.in_unmapping();
        let leaked = report.blocks_leaked.saturating_sub(held);
        assert!(leaked == 0 || self.may_have_lost, "P6: {leaked} blocks of garbage are left");
    }
}
