//! A store that may come later: until then reads and commits wait.
//!
//! A disk that comes up from the local device alone gets one of these. Whoever opens the store joins it, after the
//! disk's task has compared what the store holds with the log; a store that does not fit is refused, and what waits
//! fails with the reason. Those who wait go on in the order in which they came.

use super::{Backing, BackingError, Batch};
use async_trait::async_trait;
use blockstore::types::{Lba, Lsn};
use bytes::Bytes;
use parking_lot::Mutex;
use std::sync::Arc;
use tokio::sync::Notify;

/// See the module.
#[derive(Debug)]
pub(crate) struct Deferred {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Clone, Debug)]
enum State {
    /// Nothing is known of the store but that it reached this LSN once.
    Waiting(Lsn),
    Joined(Arc<dyn Backing>),
    Refused(String),
}

impl Deferred {
    /// A store that is to come, known to have reached `committed`.
    pub fn waiting(committed: Lsn) -> Self {
        Self::in_state(State::Waiting(committed))
    }

    /// A store that is here.
    pub fn joined(backing: Arc<dyn Backing>) -> Self {
        Self::in_state(State::Joined(backing))
    }

    fn in_state(state: State) -> Self {
        Self { state: Mutex::new(state), changed: Notify::new() }
    }

    fn set(&self, state: State) {
        *self.state.lock() = state;
        self.changed.notify_waiters();
    }

    /// The store is here and fits the log.
    pub fn join(&self, backing: Arc<dyn Backing>) {
        self.set(State::Joined(backing));
    }

    /// The store does not fit the log: what waits fails, and what comes.
    pub fn refuse(&self, why: String) {
        self.set(State::Refused(why));
    }

    /// Commits can be made.
    pub fn is_joined(&self) -> bool {
        matches!(*self.state.lock(), State::Joined(_))
    }

    async fn backing(&self) -> Result<Arc<dyn Backing>, BackingError> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            match &*self.state.lock() {
                State::Joined(backing) => return Ok(Arc::clone(backing)),
                State::Refused(why) => return Err(BackingError::Failed(why.clone())),
                State::Waiting(_) => {}
            }
            changed.await;
        }
    }
}

#[async_trait]
impl Backing for Deferred {
    fn committed(&self) -> Lsn {
        match &*self.state.lock() {
            State::Waiting(committed) => *committed,
            State::Joined(backing) => backing.committed(),
            State::Refused(_) => Lsn(0),
        }
    }

    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        self.backing().await?.read(lba, blocks).await
    }

    async fn stored(&self, lba: Lba, blocks: u32) -> Result<Vec<bool>, BackingError> {
        self.backing().await?.stored(lba, blocks).await
    }

    async fn commit(&self, batch: Batch) -> Result<(), BackingError> {
        self.backing().await?.commit(batch).await
    }

    fn away_since_ms(&self) -> Option<u64> {
        match &*self.state.lock() {
            // Since this was made; one outage is as good a name as another.
            State::Waiting(_) => Some(0),
            State::Joined(backing) => backing.away_since_ms(),
            // What waits has failed with the reason.
            State::Refused(_) => None,
        }
    }
}
