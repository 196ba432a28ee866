//! What every disk on this host shares: the store, the cache, the settings.

use super::seat::Seat;
use crate::config::AgentConfig;
use crate::error::{Failure, Kind, Result};
use blockstore::SnapshotHolds;
use cache::Cache;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// See the module.
#[derive(Debug)]
pub struct Parts {
    /// The daemon's settings.
    pub config: AgentConfig,
    /// The run directory, absolute.
    pub run_dir: PathBuf,
    /// The shared store, once it is open.
    pub store: Arc<Seat>,
    /// The local cache.
    pub cache: Arc<Cache>,
    /// Snapshots that nobody may delete; the store, once it is open, knows of them.
    pub holds: Arc<SnapshotHolds>,
}

impl Parts {
    /// Refuses what needs the store while it is known to be down.
    pub fn refuse_while_down(&self, what: impl fmt::Display) -> Result<()> {
        let health = self.store.health();
        if health.reachable {
            return Ok(());
        }
        let why = health.last_error.unwrap_or_else(|| "it does not answer".into());
        Err(Failure::new(
            Kind::Unavailable,
            format!(
                "{what} while the store {} is down ({why}): try again when it is back",
                self.store.url()
            ),
        ))
    }
}
