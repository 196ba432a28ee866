//! A store that may come later: until then reads and commits wait.
//!
//! A disk that comes up from the local device alone gets one of these. Whoever opens the store joins it, after the
//! disk's task has compared what the store holds with the log; a store that does not fit is refused, and what waits
//! fails with the reason.

use super::{Backing, BackingError, Batch};
use async_trait::async_trait;
use blockstore::types::{Lba, Lsn};
use bytes::Bytes;
use std::sync::Arc;
use tokio::sync::watch;

/// See the module.
#[derive(Debug)]
pub(crate) struct Deferred {
    state: watch::Sender<State>,
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
        Self { state: watch::Sender::new(State::Waiting(committed)) }
    }

    /// A store that is here.
    pub fn joined(backing: Arc<dyn Backing>) -> Self {
        Self { state: watch::Sender::new(State::Joined(backing)) }
    }

    /// The store is here and fits the log.
    pub fn join(&self, backing: Arc<dyn Backing>) {
        self.state.send_replace(State::Joined(backing));
    }

    /// The store does not fit the log: what waits fails, and what comes.
    pub fn refuse(&self, why: String) {
        self.state.send_replace(State::Refused(why));
    }

    /// Commits can be made.
    pub fn is_joined(&self) -> bool {
        matches!(*self.state.borrow(), State::Joined(_))
    }

    async fn backing(&self) -> Result<Arc<dyn Backing>, BackingError> {
        let mut state = self.state.subscribe();
        let known = state.wait_for(|state| !matches!(state, State::Waiting(_))).await;
        match known.as_deref() {
            Ok(State::Joined(backing)) => Ok(Arc::clone(backing)),
            Ok(State::Refused(why)) => Err(BackingError::Failed(why.clone())),
            // The sender lives in `self`.
            Ok(State::Waiting(_)) | Err(_) => Err(BackingError::Closing),
        }
    }
}

#[async_trait]
impl Backing for Deferred {
    fn committed(&self) -> Lsn {
        match &*self.state.borrow() {
            State::Waiting(committed) => *committed,
            State::Joined(backing) => backing.committed(),
            State::Refused(_) => Lsn(0),
        }
    }

    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        self.backing().await?.read(lba, blocks).await
    }

    async fn commit(&self, batch: Batch) -> Result<(), BackingError> {
        self.backing().await?.commit(batch).await
    }

    fn away_since_ms(&self) -> Option<u64> {
        match &*self.state.borrow() {
            // Since this was made; one outage is as good a name as another.
            State::Waiting(_) => Some(0),
            State::Joined(backing) => backing.away_since_ms(),
            // What waits has failed with the reason.
            State::Refused(_) => None,
        }
    }
}
