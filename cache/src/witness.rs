//! Whoever can remember, beside the cache, that a log may be behind the store.
//!
//! A disk that is in write-through moves on in the store while its log stays behind on a device that has failed. Should
//! that device be there again at some start, the log would be a disk of the past, and without the store nobody could tell.
//! So before anything is committed that the log may not have, its slot says so, or somebody else does, or both.

use crate::format::slot::LeftBehind;
use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};

/// Remembers logs, durably, by their ids.
pub trait Witness: Send + Sync + fmt::Debug {
    /// From now on the log may be behind the store.
    ///
    /// # Errors
    /// It cannot be remembered.
    fn note(&self, log_id: u128, behind: &LeftBehind) -> io::Result<()>;

    /// What was noted last of the log.
    ///
    /// # Errors
    /// It cannot be told whether anything was.
    fn find(&self, log_id: u128) -> io::Result<Option<LeftBehind>>;

    /// The log is in use again, or is gone. What is not forgotten does no harm: it is of a former epoch.
    fn forget(&self, log_id: u128);
}

/// The place of the witness, empty until there is one.
#[derive(Clone, Debug, Default)]
pub(crate) struct WitnessSeat(Arc<OnceLock<Arc<dyn Witness>>>);

impl WitnessSeat {
    pub fn take(&self, witness: Arc<dyn Witness>) {
        let _ = self.0.set(witness);
    }

    pub fn note(&self, log_id: u128, behind: &LeftBehind) -> io::Result<()> {
        let nobody = || io::Error::other("nobody is there to remember it");
        self.0.get().ok_or_else(nobody)?.note(log_id, behind)
    }

    pub fn find(&self, log_id: u128) -> io::Result<Option<LeftBehind>> {
        self.0.get().map_or(Ok(None), |witness| witness.find(log_id))
    }

    pub fn forget(&self, log_id: u128) {
        if let Some(witness) = self.0.get() {
            witness.forget(log_id);
        }
    }
}
