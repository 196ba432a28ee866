//! Clones of snapshots that the store does not have yet (decision 0024).
//!
//! Order: the parent's log is sealed → what it holds of the snapshot is copied into a log of the clone's own, and flushed → a slot
//! says that the disk is a clone of the snapshot. From then on it is served as a disk whose store is away ([`Cache::attach_alone`]).
//! When the store has the snapshot, somebody tells it of the clone, and [`Cache::join`] makes it a disk like any other.

use super::{Cache, VdiIdentity};
use crate::clone::{self, CLONE_EPOCH, Content};
use crate::disk::Identity;
use crate::error::CacheError;
use crate::format::slot::{CloneOrigin, DiskPolicy, SlotVdi, VdiSlot};
use crate::vdi::Leave;
use blockstore::Policy;
use blockstore::format::vdi::Origin;
use blockstore::types::{BLOCK_SIZE, Lsn};
use uuid::Uuid;

/// A disk that is to begin as a snapshot which only a log has.
#[derive(Clone, Debug)]
pub struct NewClone {
    /// The clone. Its size is the snapshot's.
    pub disk: VdiIdentity,
    /// The snapshot, of an attached disk.
    pub origin: Origin,
    /// How it is to be served.
    pub policy: Policy,
}

impl Cache {
    /// Makes a clone of a snapshot in the log of an attached disk, without the store; durable when this returns. It takes as much
    /// of the cache as the log holds of the snapshot beyond what the store has. The caller sees to it that the disk is not
    /// detached meanwhile.
    ///
    /// # Errors
    /// [`CacheError::Clone`]: the snapshot is not in the log, or no longer; no segments, no slot; the local device's. Nothing was
    /// changed.
    pub async fn clone_pending(&self, new: &NewClone) -> Result<(), CacheError> {
        let _one_at_a_time = self.cloning.lock().await;
        let Origin { vdi: parent, lsn } = new.origin;
        let refuse = |why: String| CacheError::Clone { vdi: parent, lsn, why };
        let handle = self.handle(parent).ok_or(CacheError::NotAttached { vdi: parent })?;
        if handle.status.lock().origin.is_some() {
            return Err(refuse("it is itself a clone that is not in the store yet".into()));
        }
        let log = handle.undrained(parent, false).await?;
        let snapshot = handle.desk.pending().find(lsn).filter(|_| lsn > log.committed);
        let Some(snapshot) = snapshot else {
            return Err(refuse("its log holds no snapshot of that LSN".into()));
        };
        if log.segments.last().is_none_or(|segment| segment.last_lsn < lsn) {
            return Err(refuse("its log was not sealed that far: try again".into()));
        }
        let holes = handle.holes(parent).await;
        let holes =
            holes.map_err(|_| refuse("its worker was replaced meanwhile: try again".into()))?;
        // Whoever adds a leg waits until all of the new log is written, or none of it.
        let _opening = self.ground.logs_opening.read().await;
        let content = Content::as_of(&self.ground.local, parent, &log, lsn).await?;
        let content = content.with_holes(holes);
        self.refuse_too_large(&new.origin, &content)?;
        let log_id = Uuid::new_v4().as_u128();
        let sequence_before = self.ground.pool.next_seq();
        let identity = Identity {
            cache: self.ground.local.cache_uuid(),
            vdi: new.disk.uuid,
            log_id,
            epoch: CLONE_EPOCH,
        };
        let written = clone::write(&self.ground, identity, content).await?;
        // None of what was copied can have left the log before the store had more of it.
        if handle.status.lock().committed_lsn != log.committed.0 {
            return Err(refuse("the store went on meanwhile: try again".into()));
        }
        let record = SlotVdi {
            uuid: new.disk.uuid,
            log_id,
            name: new.disk.name.clone(),
            size_bytes: new.disk.size_bytes,
            committed: Lsn(0),
            evicted_below: sequence_before,
            sequence_seen: self.ground.pool.next_seq(),
            epoch: CLONE_EPOCH,
            first_lsn: written.last_lsn.plus(1),
            durable: written.last_lsn,
            alone_from: Some(Lsn(0)),
            cuts: Vec::new(),
            origin: Some(CloneOrigin { snapshot: new.origin, time_ms: snapshot.time_ms }),
            has_cuts: false,
            policy: DiskPolicy { chosen: new.policy, pinned: false },
            left_behind: None,
            boot_trace: Vec::new(),
        };
        let mut inner = self.inner.lock().await;
        let slots = self.ground.local.geometry.slots;
        let free = inner.slots.iter().position(VdiSlot::is_free);
        let at = free.ok_or(CacheError::NoSlot { slots })?;
        // Both copies: former programs, to which this slot means nothing, must not find the one before and take the segments.
        for _ in 0..2 {
            let next = inner.slots[at].next(Some(record.clone()));
            if let Err(error) = self.ground.local.write_slot(&next).await {
                let (slot, is_free) = Box::pin(self.undo(next)).await;
                inner.slots[at] = slot;
                if !is_free {
                    // It may name the segments: neither is used for anything else, and the disk can be had if they can.
                    inner.found.insert(new.disk.uuid, written.keep());
                }
                return Err(error);
            }
            inner.slots[at] = next;
        }
        let headers = written.keep();
        inner.found.insert(new.disk.uuid, headers);
        Ok(())
    }

    /// Frees a slot whose writing failed. That may have torn its copy: what comes next must go there again, not to the good one, and
    /// under the same sequence, since a first one that is torn means nothing. Returns what the slot is now, and whether it is free.
    async fn undo(&self, failed: VdiSlot) -> (VdiSlot, bool) {
        let free = VdiSlot { vdi: None, quarantined: None, ..failed.clone() };
        match self.ground.local.write_slot(&free).await {
            Ok(()) => (free, true),
            Err(undoing) => {
                tracing::error!(slot = free.slot, %undoing, "a slot cannot be freed again");
                (VdiSlot { sequence: failed.sequence - 1, ..failed }, false)
            }
        }
    }

    fn refuse_too_large(&self, origin: &Origin, content: &Content) -> Result<(), CacheError> {
        let geometry = &self.ground.local.geometry;
        let of_segment = u64::from(geometry.segment_blocks() - 1);
        let needed = content.log_blocks().div_ceil(of_segment);
        let room = u64::from(self.ground.pool.room_for_new());
        if needed <= room {
            return Ok(());
        }
        let bytes = |segments: u64| (segments * of_segment * BLOCK_SIZE as u64) >> 20;
        Err(CacheError::Clone {
            vdi: origin.vdi,
            lsn: origin.lsn,
            why: format!(
                "what its log holds of it takes {} MiB of the cache once more, and {} MiB can be had beside what other disks \
                 may need; wait for the store, or use a larger cache",
                bytes(needed),
                bytes(room)
            ),
        })
    }

    /// What a disk is a clone of that the store may not know of yet; none for any other.
    pub async fn origin_of(&self, vdi: Uuid) -> Option<CloneOrigin> {
        if let Some(handle) = self.handle(vdi) {
            return handle.status.lock().origin;
        }
        let inner = self.inner.lock().await;
        let mut records = inner.slots.iter().filter_map(|slot| slot.vdi.as_ref());
        records.find(|record| record.uuid == vdi).and_then(|record| record.origin)
    }

    /// A disk, by name, that is a clone of this one which the store may not know of yet.
    pub async fn waiting_clone_of(&self, parent: Uuid) -> Option<String> {
        let inner = self.inner.lock().await;
        let records = inner.slots.iter().filter_map(|slot| slot.vdi.as_ref());
        let of_parent =
            |origin: Option<CloneOrigin>| origin.is_some_and(|of| of.snapshot.vdi == parent);
        let mut clones = records.filter(|record| of_parent(record.origin));
        // A slot here may be as it was before the disk joined.
        let waits = |record: &&SlotVdi| {
            self.handle(record.uuid).is_none_or(|handle| of_parent(handle.status.lock().origin))
        };
        clones.find(waits).map(|record| record.name.clone())
    }

    /// Forgets a clone that the store does not know of, with all that was written to it. It must have been released.
    ///
    /// # Errors
    /// It is served, or no such clone; the local device's.
    pub async fn give_up_clone(&self, vdi: Uuid) -> Result<(), CacheError> {
        let handle = self.handle(vdi).ok_or(CacheError::NotAttached { vdi })?;
        let slot = handle.stop(vdi, Leave::GivenUp).await?;
        let mut inner = self.inner.lock().await;
        self.handles.lock().remove(&vdi);
        let at = slot.slot as usize;
        inner.slots[at] = slot;
        Ok(())
    }

    /// The name by which the store knows a disk.
    ///
    /// # Errors
    /// The local device's; nothing was changed.
    pub async fn rename(&self, vdi: Uuid, name: &str) -> Result<(), CacheError> {
        self.handle(vdi).ok_or(CacheError::NotAttached { vdi })?.rename(vdi, name).await
    }
}
