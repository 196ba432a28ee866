//! Deleting disks: one record is buried, and what only it held is freed behind it.

use super::Found;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::root::{Garbage, GarbageSink, Subtree};
use crate::store::Store;
use std::sync::Arc;

impl Store {
    /// Deletes a disk without snapshots, by name or UUID. It is gone when this returns; its blocks are freed in the
    /// background.
    ///
    /// # Errors
    /// `NotFound`; `InUse` saying by whom and since when it is attached, that it has snapshots, or that one is held; the device's.
    pub async fn delete_vdi(self: &Arc<Self>, name_or_uuid: &str) -> Result<()> {
        let name = name_or_uuid.to_owned();
        self.change(|store| async move { store.delete_now(&name, false).await }).await
    }

    /// Deletes a disk with all of its snapshots, of which no clone may hang on any. What only they hold is free after
    /// collection.
    ///
    /// # Errors
    /// As [`delete_vdi`](Self::delete_vdi); `InUse` naming a clone.
    pub async fn delete_vdi_and_snapshots(self: &Arc<Self>, name_or_uuid: &str) -> Result<()> {
        let name = name_or_uuid.to_owned();
        self.change(|store| async move { store.delete_now(&name, true).await }).await
    }

    async fn delete_now(&self, name_or_uuid: &str, with_snapshots: bool) -> Result<()> {
        let reclaimer = Arc::clone(&self.core.writer()?.reclaimer);
        let found = self.find_vdi(name_or_uuid).await?;
        self.refuse_attached(&found, "delete").await?;
        self.refuse_held(&found, None)?;
        let live = found.head.snapshots.live;
        if live > 0 && !with_snapshots {
            return Err(StoreError::new(
                StoreErrorKind::InUse,
                found.object(),
                format!(
                    "it has {live} snapshots; delete them first, or with it: 'ballast vdi delete --with-snapshots'"
                ),
            ));
        }
        self.refuse_cloned(&found, None).await?;
        let head = &found.head;
        let since = reclaimer.stay();
        let swap = self.change_place(&found, head.clone().buried()).await?;
        swap.done(|| found.object())?;
        let last_snapshot = head.last_snapshot_birth;
        let mut garbage = Garbage::default();
        if head.root.is_exclusive(last_snapshot) {
            let (pointer, level) = (head.root, head.height);
            garbage.subtrees.push(Subtree { pointer, level, last_snapshot });
        }
        if !head.meta.is_sparse() {
            garbage.blocks.push(head.meta.gba);
        }
        reclaimer.discard(garbage, since);
        Ok(())
    }

    pub(in crate::store) async fn refuse_attached(&self, found: &Found, verb: &str) -> Result<()> {
        if found.head.owner.is_none() {
            return Ok(());
        }
        Err(StoreError::new(
            StoreErrorKind::InUse,
            found.object(),
            format!(
                "it is attached {}; detach it there, then {verb} it",
                self.describe_owner(&found.head).await?
            ),
        ))
    }
}
