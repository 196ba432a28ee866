//! Changing disks as wholes: their size and their policy.

use super::{Found, write_meta};
use crate::alloc::runs::merge;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::vdi::VdiHead;
use crate::io::Patience;
use crate::policy::{Policy, PolicyChange};
use crate::root::{Garbage, GarbageSink};
use crate::store::Store;
use crate::vdi::{Vdi, grow};
use std::sync::Arc;

impl Store {
    /// Waits for an operation that goes on by itself, as long as a control operation may take.
    async fn no_longer_than_control<T>(
        &self,
        found: &Found,
        operation: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let Patience::Limited(limit) = self.control_io.patience() else { return operation.await };
        tokio::time::timeout(limit, operation).await.unwrap_or_else(|_| {
            Err(StoreError::new(
                StoreErrorKind::Unreachable,
                found.object(),
                "a commit of it waits, for the device or for space: this is done when it goes on; see 'ballast status'",
            ))
        })
    }

    /// Grows a disk, attached to this host or to none.
    ///
    /// # Errors
    /// `NotFound`, `Invalid` for a smaller size, `InUse` if another host has it, the device's.
    pub async fn resize_vdi(self: &Arc<Self>, name_or_uuid: &str, size_bytes: u64) -> Result<()> {
        let name = name_or_uuid.to_owned();
        self.change(move |store| async move { store.resize_now(&name, size_bytes).await }).await
    }

    /// Changes the policy of a disk that is attached to this host or to none; returns what holds then.
    ///
    /// # Errors
    /// `NotFound`, `InUse` if another host has it, `NoSpace`, the device's.
    pub async fn set_policy(
        self: &Arc<Self>,
        name_or_uuid: &str,
        change: PolicyChange,
    ) -> Result<Policy> {
        let name = name_or_uuid.to_owned();
        self.change(move |store| async move { store.set_policy_now(&name, change).await }).await
    }

    async fn set_policy_now(&self, name_or_uuid: &str, change: PolicyChange) -> Result<Policy> {
        let core = &self.core;
        let reclaimer = Arc::clone(&core.writer()?.reclaimer);
        let found = self.find_vdi(name_or_uuid).await?;
        if let Some(inner) = self.attached_here(&found.head) {
            let vdi = Vdi { inner };
            return self.no_longer_than_control(&found, vdi.set_policy(change)).await;
        }
        self.refuse_attached(&found, "change").await?;
        let policy = change.of(found.policy);
        if found.policy == policy {
            return Ok(policy);
        }
        let meta = found.head.meta_block(found.name.clone(), policy);
        let meta = write_meta(core, &self.control_io, &meta).await?;
        let next = VdiHead { meta, ..found.head.clone() };
        let since = reclaimer.stay();
        let swap = core.records.swap(&core.io, &found.view, next).await?;
        swap.done(|| found.object())?;
        reclaimer.allocator().settle(&merge(vec![meta.gba]));
        if !found.head.meta.is_sparse() {
            let blocks = vec![found.head.meta.gba];
            reclaimer.discard(Garbage { blocks, ..Garbage::default() }, since);
        }
        Ok(policy)
    }

    async fn resize_now(&self, name_or_uuid: &str, size_bytes: u64) -> Result<()> {
        let core = &self.core;
        core.writer()?;
        let found = self.find_vdi(name_or_uuid).await?;
        if let Some(inner) = self.attached_here(&found.head) {
            let vdi = Vdi { inner };
            return self.no_longer_than_control(&found, vdi.resize(size_bytes)).await;
        }
        self.refuse_attached(&found, "resize").await?;
        let io = &self.control_io;
        let (next, added) = grow(core, io, &found.object(), &found.head, size_bytes).await?;
        let swap = core.records.swap(&core.io, &found.view, next).await?;
        swap.done(|| found.object())?;
        core.allocator()?.settle(&added);
        Ok(())
    }
}
