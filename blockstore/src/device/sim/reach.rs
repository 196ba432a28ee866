//! Whether a session reaches its target, and waiting for a change of it.
//!
//! Those who wait go on in the order in which they came: with tokio's `watch` the order is random, and one seed would
//! not be one schedule.

use super::Reach;
use parking_lot::Mutex;
use tokio::sync::Notify;

#[derive(Debug)]
pub(super) struct ReachState {
    now: Mutex<Reach>,
    changed: Notify,
}

impl ReachState {
    pub(super) fn new(reach: Reach) -> Self {
        Self { now: Mutex::new(reach), changed: Notify::new() }
    }

    pub(super) fn get(&self) -> Reach {
        *self.now.lock()
    }

    pub(super) fn set(&self, reach: Reach) {
        *self.now.lock() = reach;
        self.changed.notify_waiters();
    }

    /// Waits until `wanted` holds; returns what is then.
    pub(super) async fn wait_for(&self, wanted: impl Fn(Reach) -> bool) -> Reach {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let now = self.get();
            if wanted(now) {
                return now;
            }
            changed.await;
        }
    }
}
