//! A leg of the cache is replaced while disks are served.

use super::Host;
use crate::api::Replacement;
use crate::error::{Failure, Kind, Result};
use std::path::Path;

impl Host {
    /// Begins to fill a new leg at `path`, at `rate` bytes a second (zero: as fast as it goes).
    ///
    /// # Errors
    /// The path is not absolute, or not to be used: nothing was changed.
    pub async fn replace_leg(&self, path: &Path, rate: u64) -> Result<Replacement> {
        if !path.is_absolute() {
            let words = format!("{}: the new leg's path must begin with '/'", path.display());
            return Err(Failure::new(Kind::Usage, words));
        }
        Ok(self.parts.cache.replace_leg(path, rate).await?)
    }

    /// How far the last replacement is.
    ///
    /// # Errors
    /// There was none since the agent was started.
    pub fn replacement(&self) -> Result<Replacement> {
        self.parts.cache.replacement().ok_or_else(|| {
            Failure::new(Kind::NotFound, "no leg of the cache was replaced since the agent started")
        })
    }

    /// Gives up the leg that is being filled.
    ///
    /// # Errors
    /// There is none.
    pub async fn cancel_replacement(&self) -> Result<Replacement> {
        if !self.parts.cache.cancel_replacement().await {
            return Err(Failure::new(Kind::Conflict, "no leg of the cache is being replaced"));
        }
        self.replacement()
    }
}
