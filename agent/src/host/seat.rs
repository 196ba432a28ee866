//! The store's place on this host: empty until the store could be opened, then taken for good.
//!
//! Whoever needs the store now asks for it and is told why it is not there; whoever can wait, waits.

use super::store::without_secrets;
use crate::error::{Failure, Kind, Result};
use blockstore::{Health, Store};
use parking_lot::Mutex;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use uuid::Uuid;

/// See the module.
#[derive(Debug)]
pub struct Seat {
    url: String,
    /// The store that the cache is bound to.
    bound: Option<Uuid>,
    store: watch::Sender<Option<Arc<Store>>>,
    /// What stands for the store's health until it is there.
    away: Mutex<Health>,
}

impl Seat {
    /// A place for the store at `url`, which the cache says is `bound`.
    #[must_use]
    pub fn new(url: &str, bound: Option<Uuid>) -> Self {
        let since_ms =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        Self {
            url: without_secrets(url),
            bound,
            store: watch::Sender::new(None),
            away: Mutex::new(Health { reachable: false, since_ms, ..Health::default() }),
        }
    }

    /// The store is here.
    pub fn take(&self, store: Arc<Store>) {
        self.store.send_replace(Some(store));
    }

    /// An attempt to open it failed. False: it failed so before.
    pub fn note(&self, failure: &Failure) -> bool {
        let mut away = self.away.lock();
        let is_news = away.last_error.as_ref() != Some(&failure.message);
        away.last_error = Some(failure.message.clone());
        is_news
    }

    /// The store, if it is there.
    #[must_use]
    pub fn opened(&self) -> Option<Arc<Store>> {
        self.store.borrow().clone()
    }

    /// The store.
    ///
    /// # Errors
    /// [`Kind::Unavailable`]: it could not be opened yet.
    pub fn get(&self) -> Result<Arc<Store>> {
        self.opened().ok_or_else(|| {
            let why = self.health().last_error.unwrap_or_else(|| "it does not answer".into());
            Failure::new(
                Kind::Unavailable,
                format!("the store {} is down ({why}): try again when it is back", self.url),
            )
        })
    }

    /// Waits for the store.
    pub async fn wait(&self) -> Arc<Store> {
        let mut store = self.store.subscribe();
        let found = store.wait_for(Option::is_some).await.ok().and_then(|store| store.clone());
        match found {
            Some(store) => store,
            // Not so, since the sender lives in `self`.
            None => std::future::pending().await,
        }
    }

    /// How the store's device does.
    #[must_use]
    pub fn health(&self) -> Health {
        self.opened().map_or_else(|| self.away.lock().clone(), |store| store.health())
    }

    /// Names the store in messages.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The store's identity, as far as it is known: nil for a cache that never saw a store.
    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.opened().map(|store| store.uuid()).or(self.bound).unwrap_or_default()
    }
}
