//! The image of a committed snapshot, to be read for as long as one likes.

use super::{Core, Store};
use crate::error::Result;
use crate::format::snapshot::Snapshot;
use crate::format::vdi::{Origin, VdiHead};
use crate::holds::SnapshotHold;
use crate::types::Lba;
use bytes::Bytes;
use std::sync::Arc;

/// A snapshot that is held: nothing that it leads to is used anew while this lives.
#[derive(Debug)]
pub struct SnapshotImage {
    core: Arc<Core>,
    /// A disk that is as the snapshot is.
    head: VdiHead,
    snapshot: Snapshot,
    object: String,
    _hold: SnapshotHold,
}

impl Store {
    /// The image of the snapshot that is held. It is read with the patience of a disk: for ever.
    ///
    /// # Errors
    /// `NotFound` if there is no such disk or snapshot; the device's.
    pub async fn open_snapshot(self: &Arc<Self>, hold: SnapshotHold) -> Result<SnapshotImage> {
        // Behind deletions that were let through before the hold was taken.
        self.change(move |store| async move {
            let (vdi, lsn) = (hold.vdi(), hold.lsn());
            let snapshot = store.snapshot_of(Origin { vdi, lsn }).await?;
            let found = store.find_vdi(&vdi.to_string()).await?;
            Ok(SnapshotImage {
                core: Arc::clone(&store.core),
                head: snapshot.as_head(&found.head),
                snapshot,
                object: format!("snapshot {lsn} of {}", found.object()),
                _hold: hold,
            })
        })
        .await
    }
}

impl SnapshotImage {
    /// What it is.
    #[must_use]
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Reads blocks, as [`Vdi::read`](crate::Vdi::read) does those of a disk.
    ///
    /// # Errors
    /// `Corrupt`, `Invalid`, `Closing`, or a lasting error of the device.
    pub async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>> {
        let read = self.core.reader.read(&self.head, lba, blocks).await;
        read.map_err(|error| {
            let object = format!("{} in {}", self.object, error.object);
            error.about(object)
        })
    }
}
