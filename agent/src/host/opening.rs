//! Opening the store at the agent's start, and for as long as it is away.
//!
//! An agent that has disks to serve from the cache alone gives the store a moment and then goes on without it; attempts go
//! on in the background. One that has none has nothing to do without the store, and waits for it as long as it was told.

use super::seat::Seat;
use super::store::{self, open_device, open_read_only};
use crate::config::{AgentConfig, DeviceArgs};
use crate::error::{Failure, Kind, Result};
use blockstore::{OpenOptions, Store};
use cache::{Cache, CacheError};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// How long disks that can be served without the store wait for it.
const GRACE: Duration = Duration::from_millis(500);
/// Pauses between two attempts.
const BACKOFF_MIN: Duration = Duration::from_millis(250);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// All that is needed to open the store.
#[derive(Debug)]
pub struct Opening {
    pub url: String,
    pub device: DeviceArgs,
    pub options: OpenOptions,
    pub cache: Arc<Cache>,
    pub cache_path: PathBuf,
}

impl Opening {
    /// Opens the store, or refuses it: nothing is written to a store that the cache does not belong to.
    async fn attempt(&self) -> Result<Arc<Store>> {
        let looked_at = open_read_only(&self.url, &self.device).await?;
        let (found, single_host) = (looked_at.uuid(), looked_at.superblock().single_host);
        looked_at.close().await?;
        drop(looked_at);
        if let Some(bound) = self.cache.identity().await.store.filter(|bound| *bound != found) {
            let path = self.cache_path.clone();
            return Err(CacheError::OtherStore { path, bound, given: found }.into());
        }
        // A store formatted for a single host is held exclusively, because nothing else guards it.
        let access = if single_host { store::Access::Exclusive } else { store::Access::Shared };
        let device = open_device(&self.url, &self.device, access, None).await?;
        let store = Store::open(device, self.options.clone()).await?;
        if let Err(error) = self.cache.bind(store.uuid()).await {
            let _ = store.close().await;
            return Err(Failure::from(error));
        }
        Ok(store)
    }

    /// Opens the store within the configured time, or fails.
    pub async fn wait_for(
        &self,
        seat: &Seat,
        config: &AgentConfig,
        progress: &(dyn Fn(&str) + Sync),
    ) -> Result<()> {
        let store = store::patiently(|| self.attempt(), config.store_wait, progress).await?;
        seat.take(store);
        Ok(())
    }

    /// Tries until the store is open. The first outcome is told, and ends it if trying again cannot help.
    async fn keep_trying(self, seat: Arc<Seat>, first: oneshot::Sender<Result<()>>) {
        let (mut first, mut backoff) = (Some(first), BACKOFF_MIN);
        loop {
            let failure = match self.attempt().await {
                Ok(store) => {
                    seat.take(store);
                    if let Some(first) = first {
                        let _ = first.send(Ok(()));
                    }
                    tracing::info!("the store is open");
                    return;
                }
                Err(failure) => failure,
            };
            if seat.note(&failure) {
                tracing::warn!("the store cannot be opened; trying again: {failure}");
            }
            if let Some(first) = first.take() {
                let hopeless = failure.kind != Kind::Unavailable;
                // Nobody listens any more if that took long; then the disks are served, and stay so.
                if first.send(Err(failure)).is_ok() && hopeless {
                    return;
                }
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// Starts to open the store, and waits a moment for it. Returns what goes on trying.
    ///
    /// # Errors
    /// The store cannot be used, whether it is reached or not.
    pub async fn start(self, seat: &Arc<Seat>) -> Result<tokio::task::JoinHandle<()>> {
        let (tell, first) = oneshot::channel();
        let trying = tokio::spawn(self.keep_trying(Arc::clone(seat), tell));
        match tokio::time::timeout(GRACE, first).await {
            Ok(Ok(Err(failure))) if failure.kind != Kind::Unavailable => Err(failure),
            _ => Ok(trying),
        }
    }
}
