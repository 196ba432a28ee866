//! A snapshot's image that may come later: until it is here, reads wait; if it cannot come, they fail.

use async_trait::async_trait;
use blockstore::SnapshotImage;
use blockstore::types::Lba;
use bytes::Bytes;
use cache::backing::BackingError;
use cache::read_only::Image;
use std::sync::Arc;
use tokio::sync::watch;

/// See the module.
#[derive(Debug)]
pub struct Awaited(watch::Sender<State>);

#[derive(Clone, Debug)]
enum State {
    Waiting,
    Here(Arc<SnapshotImage>),
    /// In words.
    Refused(String),
}

impl Awaited {
    /// An image that is not here yet.
    #[must_use]
    pub fn new() -> Self {
        Self(watch::Sender::new(State::Waiting))
    }

    /// It is here.
    pub fn join(&self, image: SnapshotImage) {
        self.0.send_replace(State::Here(Arc::new(image)));
    }

    /// It cannot be had, or not any more: what waits fails, and what comes. What was read is let go of.
    pub fn refuse(&self, why: &str) {
        self.0.send_replace(State::Refused(why.to_owned()));
    }

    /// It is waited for again.
    pub fn wait(&self) {
        self.0.send_replace(State::Waiting);
    }

    /// It is here.
    pub fn is_here(&self) -> bool {
        matches!(*self.0.borrow(), State::Here(_))
    }
}

#[async_trait]
impl Image for Awaited {
    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        let mut state = self.0.subscribe();
        let known = state.wait_for(|state| !matches!(state, State::Waiting)).await;
        // The sender lives in `self`. A copy, since nothing may be locked while the store is read.
        let known = known.map_or(State::Waiting, |state| state.clone());
        match known {
            State::Here(image) => Image::read(&*image, lba, blocks).await,
            State::Refused(why) => Err(BackingError::Failed(why)),
            State::Waiting => Err(BackingError::Closing),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn reads_wait_until_it_is_known_what_becomes_of_it() {
        let image = Arc::new(Awaited::new());
        let reading = Arc::clone(&image);
        let read = tokio::spawn(async move { reading.read(Lba(0), 1).await });
        tokio::task::yield_now().await;
        assert!(!read.is_finished() && !image.is_here());
        image.refuse("it was deleted");
        let failed = read.await.expect("no panic").unwrap_err();
        assert!(failed.to_string().contains("it was deleted"), "{failed}");
    }
}
