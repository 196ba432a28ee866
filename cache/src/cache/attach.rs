//! Attaching disks: with the store at hand, or from the local device alone.
//!
//! Several disks may be attached at once: the cache's lock is held for moments only, and a disk on its way is named in
//! `attaching`, so that nobody else touches its slot.

use super::{Cache, VdiIdentity};
use crate::backing::Backing;
use crate::backing::deferred::Deferred;
use crate::desk::Desk;
use crate::disk::{AttachedDisk, Progress};
use crate::error::CacheError;
use crate::format::segment::SegmentHeader;
use crate::format::slot::{DiskPolicy, SlotVdi, VdiSlot};
use crate::log_open::OpenLog;
use crate::pool::Pin;
use crate::vdi::{VdiHandle, VdiStatus, VdiTaskParts};
use blockstore::types::Lsn;
use hashbrown::HashSet;
use parking_lot::Mutex;
use std::sync::Arc;
use uuid::Uuid;

/// A disk that nobody else may attach or forget for now.
pub(super) struct Claim<'a> {
    vdi: Uuid,
    among: &'a Mutex<HashSet<Uuid>>,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.among.lock().remove(&self.vdi);
    }
}

impl Cache {
    /// Recovers the log of a disk that has one (see [`Self::reserve`]) and returns the disk, ready to be driven. Its
    /// flusher runs from here on.
    ///
    /// # Errors
    /// The log does not fit the store or is damaged; the local device's; no segments. Nothing was changed.
    pub async fn attach(
        &self,
        vdi: &VdiIdentity,
        backing: Arc<dyn Backing>,
    ) -> Result<AttachedDisk, CacheError> {
        let (_claim, slot, record, headers) = self.claim(vdi.uuid).await?;
        let record = SlotVdi { left_behind: self.ground.left_behind(&record)?, ..record };
        let record = SlotVdi {
            name: vdi.name.clone(),
            size_bytes: vdi.size_bytes,
            committed: verified(&record, None, backing.committed())?,
            policy: if record.epoch == 0 { noted(&*backing) } else { record.policy },
            origin: None,
            ..record
        };
        match record.left_behind {
            Some(_) => self.open_left_behind(slot, record, &headers, backing).await,
            None => self.open_log(slot, record, &headers, Deferred::joined(backing)).await,
        }
    }

    /// A log that write-through left behind, or was about to. If the store is ahead of it, the store has all of it and none
    /// of it counts any more; if not, it goes on.
    async fn open_left_behind(
        &self,
        slot: VdiSlot,
        record: SlotVdi,
        headers: &[SegmentHeader],
        backing: Arc<dyn Backing>,
    ) -> Result<AttachedDisk, CacheError> {
        let (log_id, store) = (record.log_id, record.committed);
        let end = self.ground.end_of(&record, store, headers).await?;
        tracing::warn!(
            vdi = %record.name, log = end.0, store = store.0,
            "the cache had failed under this disk: its log goes on{}",
            if end < store { ", empty, from where the store is" } else { "" }
        );
        let backing = Deferred::joined(backing);
        let disk = if end < store {
            let record = SlotVdi { evicted_below: self.ground.pool.next_seq(), ..record };
            let disk = self.open_log(slot, record, &[], backing).await?;
            // The slot says durably that these are dead.
            for header in headers {
                self.ground.pool.release(header.segment, false);
            }
            disk
        } else {
            self.open_log(slot, record, headers, backing).await?
        };
        // Its slot says durably that this is another epoch.
        self.ground.witness.forget(log_id);
        Ok(disk)
    }

    /// As [`Self::attach`], from the local device alone: what the log does not hold is waited for, and nothing is
    /// committed, until [`Self::join`].
    ///
    /// # Errors
    /// As [`Self::attach`], and [`CacheError::NeverServed`]: the store may not know this log, or be ahead of it.
    pub async fn attach_alone(&self, vdi: Uuid) -> Result<AttachedDisk, CacheError> {
        let (_claim, slot, record, headers) = self.claim(vdi).await?;
        if record.epoch == 0 || self.ground.left_behind(&record)?.is_some() {
            return Err(CacheError::NeverServed { name: record.name, vdi });
        }
        let store = Deferred::waiting(record.committed);
        self.open_log(slot, record, &headers, store).await
    }

    /// The store of a disk that was attached alone is there: from now on misses are read from it, and the log is
    /// committed to it.
    ///
    /// # Errors
    /// As [`Self::verify`].
    pub async fn join(&self, vdi: Uuid, backing: Arc<dyn Backing>) -> Result<(), CacheError> {
        self.handle(vdi).ok_or(CacheError::NotAttached { vdi })?.join(vdi, backing).await
    }

    /// Whether the store, whose image of the disk is at `store`, fits the log of an attached disk.
    ///
    /// # Errors
    /// [`CacheError::StoreIsOlder`] or [`CacheError::LogIsOlder`]: nothing was changed, and the disk was cut off from
    /// the store, see [`Self::refuse`].
    pub async fn verify(&self, vdi: Uuid, store: Lsn) -> Result<(), CacheError> {
        self.handle(vdi).ok_or(CacheError::NotAttached { vdi })?.verify(vdi, store).await
    }

    /// The store of a disk that was attached alone cannot be used: what waits for it fails with the reason, and so do
    /// drains. The log is kept. [`Self::join`] may still be tried.
    ///
    /// # Errors
    /// [`CacheError::NotAttached`].
    pub async fn refuse(&self, vdi: Uuid, why: &str) -> Result<(), CacheError> {
        self.handle(vdi).ok_or(CacheError::NotAttached { vdi })?.refuse(vdi, why).await
    }

    /// Opens the log of an attached disk again, whose driver has ended without giving the disk back in order, or was
    /// released. What was acknowledged is all there.
    ///
    /// # Errors
    /// The local device's. The disk stays without a driver; its flusher goes on.
    pub async fn reopen(&self, vdi: Uuid) -> Result<AttachedDisk, CacheError> {
        self.handle(vdi).ok_or(CacheError::NotAttached { vdi })?.reopen(vdi).await
    }

    pub(super) async fn claim(
        &self,
        vdi: Uuid,
    ) -> Result<(Claim<'_>, VdiSlot, SlotVdi, Vec<SegmentHeader>), CacheError> {
        let inner = self.inner.lock().await;
        let slot = inner.slots.iter().find(|s| s.vdi.as_ref().is_some_and(|v| v.uuid == vdi));
        let slot = slot.ok_or(CacheError::NotAttached { vdi })?.clone();
        let record = slot.vdi.clone().ok_or(CacheError::NotAttached { vdi })?;
        if self.handle(vdi).is_some() || !self.attaching.lock().insert(vdi) {
            return Err(CacheError::Attached { name: record.name, vdi });
        }
        let claim = Claim { vdi, among: &self.attaching };
        Ok((claim, slot, record, inner.found.get(&vdi).cloned().unwrap_or_default()))
    }

    async fn open_log(
        &self,
        mut slot: VdiSlot,
        record: SlotVdi,
        headers: &[SegmentHeader],
        backing: Deferred,
    ) -> Result<AttachedDisk, CacheError> {
        let progress = Arc::new(Progress::default());
        let vdi = record.uuid;
        // A leg that is being filled is told of the disk, or it comes when the disk is there.
        let _opening = self.ground.logs_opening.read().await;
        self.ground.pool.await_disk(vdi);
        let alone = !backing.is_joined();
        let progress_too = Arc::clone(&progress);
        let opened = self.ground.open_log(&mut slot, record, headers, alone, progress_too).await;
        let opened = opened.inspect_err(|_| self.ground.pool.disk_joined(vdi, None, None));
        let mut inner = self.inner.lock().await;
        let at = slot.slot as usize;
        inner.slots[at] = opened.as_ref().map_or(slot, |open| open.slot.clone());
        let open = opened?;
        inner.found.remove(&open.record.uuid);
        Ok(self.start(open, backing, progress))
    }

    /// Cannot fail: what recovery decided is durable, and the segments it freed are free.
    fn start(&self, open: OpenLog, backing: Deferred, progress: Arc<Progress>) -> AttachedDisk {
        let (to_task, from_pool) = tokio::sync::mpsc::unbounded_channel();
        let (vdi, name) = (open.record.uuid, open.record.name.clone());
        self.ground.pool.register(vdi, to_task);
        let policy = open.record.policy.chosen;
        let (boot_trace, pinned) = (open.record.boot_trace.clone(), open.record.policy.pinned);
        let origin = open.record.origin;
        let status = VdiStatus { policy, pinned, boot_trace, origin, ..VdiStatus::default() };
        if pinned {
            // Until the task says otherwise the store may be away.
            self.ground.pool.set_pin(vdi, Some(Pin::Firm));
        }
        let desk = Arc::new(Desk::new(vdi, open.sender.clone(), open.snapshots));
        let mut disk = open.disk;
        disk.link.answer_at(Arc::clone(&desk));
        let parts = VdiTaskParts {
            vdi,
            ground: self.ground.clone(),
            backing: Arc::new(backing),
            options: self.options.flush,
            images_held: Arc::clone(&self.images_held),
            images_max: self.options.image_bytes,
            slot: open.slot,
            record: open.record,
            recovered: open.last_lsn,
            segments: open.segments,
            sender: open.sender,
            from_disk: open.from_disk,
            from_pool,
            status: Arc::new(Mutex::new(status)),
            desk,
            made: Arc::default(),
            progress: Arc::clone(&progress),
        };
        let handle = VdiHandle::spawn(name, progress, parts);
        self.handles.lock().insert(vdi, Arc::new(handle));
        disk
    }
}

/// What the store notes of how the disk is to be served: a log that was never served starts with that.
fn noted(backing: &dyn Backing) -> DiskPolicy {
    DiskPolicy { chosen: backing.policy(), pinned: false }
}

/// The LSN at which the store's image of a disk is, if that fits its log, which ended at `log` when it was opened, or
/// earlier when it was opened without the store before.
///
/// # Errors
/// One of them is older than the other knows it was.
pub(crate) fn verified(record: &SlotVdi, log: Option<Lsn>, store: Lsn) -> Result<Lsn, CacheError> {
    let (name, vdi) = (record.name.clone(), record.uuid);
    if store < record.committed {
        return Err(CacheError::StoreIsOlder { name, vdi, store, log: record.committed });
    }
    // What the store took while there were no legs, it took from this log.
    let alone_from = record.alone_from.filter(|_| record.left_behind.is_none());
    match log.into_iter().chain(alone_from).min() {
        Some(log) if store > log => Err(CacheError::LogIsOlder { name, vdi, store, log }),
        _ => Ok(store),
    }
}
