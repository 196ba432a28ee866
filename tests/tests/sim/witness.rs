//! What the run directory remembers of logs that write-through left behind; it outlives agents and hosts.

use blockstore::types::Lsn;
use cache::{LeftBehind, Witness};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io::{Error, Result};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// See the module.
#[derive(Debug, Default)]
pub struct Memory {
    logs: Mutex<BTreeMap<u128, (u32, Lsn, Lsn)>>,
    /// It takes nothing in this life.
    pub refuses: AtomicBool,
    /// Notes taken.
    pub notes: AtomicU64,
}

impl Witness for Memory {
    fn note(&self, log_id: u128, behind: &LeftBehind) -> Result<()> {
        if self.refuses.load(Ordering::Relaxed) {
            return Err(Error::other("the run directory is full"));
        }
        self.notes.fetch_add(1, Ordering::Relaxed);
        self.logs.lock().insert(log_id, (behind.epoch, behind.flushed, behind.staged));
        Ok(())
    }

    fn find(&self, log_id: u128) -> Result<Option<LeftBehind>> {
        let logs = self.logs.lock();
        let found = logs.get(&log_id);
        Ok(found.map(|&(epoch, flushed, staged)| LeftBehind { epoch, flushed, staged }))
    }

    fn forget(&self, log_id: u128) {
        self.logs.lock().remove(&log_id);
    }
}
