//! Snapshots of attached disks.

use super::Cache;
use crate::error::CacheError;
use crate::pending::PendingSnapshot;
use crate::vdi::SnapshotTaken;
use blockstore::SnapshotLabel;
use uuid::Uuid;

impl Cache {
    /// Takes a snapshot of an attached disk: all requests that were answered before the call are in it, and none that
    /// comes after the answer. It is durable in the log when this returns, whether the store answers or not, and reaches
    /// the store with the commit that covers its LSN.
    ///
    /// # Errors
    /// [`CacheError::NotAttached`]; [`CacheError::Snapshot`]: the disk is not served, its log has failed, its worker died
    /// or stopped meanwhile, or too many wait.
    pub async fn snapshot(
        &self,
        vdi: Uuid,
        label: SnapshotLabel,
    ) -> Result<SnapshotTaken, CacheError> {
        self.handle(vdi).ok_or(CacheError::NotAttached { vdi })?.snapshot(vdi, label).await
    }

    /// Snapshots in an attached disk's log that are durable and that the store does not have yet, oldest first.
    #[must_use]
    pub fn pending_snapshots(&self, vdi: Uuid) -> Vec<PendingSnapshot> {
        let handle = self.handle(vdi);
        handle.map_or_else(Vec::new, |handle| handle.snapshots.lock().iter().collect())
    }
}
