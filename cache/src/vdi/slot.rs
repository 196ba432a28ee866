//! The disk's slot on the cache device: what must be durable there before anything rests on it (rule L2), and the disk that
//! leaves it.

use super::task::VdiTask;
use crate::disk::trace::Ranges;
use crate::error::CacheError;
use crate::link::ToDisk;
use blockstore::sabotage::{self, Bug};
use blockstore::types::Lsn;
use blockstore::{Policy, PolicyChange};
use std::sync::atomic::Ordering;

impl VdiTask {
    /// Writes the slot, so that what was committed may turn clean.
    pub(super) async fn checkpoint(&mut self) {
        if self.through.is_some() {
            // What is known of a log that was left behind says all that the slot could.
            self.join_unnoted = false;
            return self.committed_without_legs();
        }
        if !sabotage::on(Bug::ReuseBeforeSlot)
            && let Err(error) = self.write_slot().await
        {
            self.note_error(&error.to_string());
            return;
        }
        (self.checkpoint_due, self.join_unnoted) = (false, false);
        self.p.sender.send(ToDisk::Committed { lsn: self.p.record.committed });
        self.offer_clean();
        self.answer_waiters();
    }

    pub(super) fn offer_clean(&mut self) {
        if self.checkpoint_due || self.through.is_some() || self.keeps_origin() {
            return;
        }
        for (id, seq) in self.p.segments.newly_clean(self.p.record.committed) {
            self.p.ground.pool.offer_clean(self.p.vdi, id, seq);
        }
    }

    /// The guest learns of the size once it is durable here: what it then writes beyond the former one must be its disk's
    /// after a start without the store, too.
    pub(super) async fn resize(&mut self, bytes: u64) -> Result<(), CacheError> {
        let former = std::mem::replace(&mut self.p.record.size_bytes, bytes);
        // With no leg left the store alone knows, and did before.
        if self.through.is_none()
            && let Err(error) = self.write_slot().await
        {
            self.p.record.size_bytes = former;
            return Err(error);
        }
        // Into the slot's other copy, too: should one rot, a start without the store must not shrink the disk.
        if self.through.is_none()
            && let Err(error) = self.write_slot().await
        {
            self.note_error(&error.to_string());
        }
        self.p.sender.send(ToDisk::Resized { bytes });
        Ok(())
    }

    /// Durable before it takes effect. With no leg left the slot is not written any more; it names the store's snapshot still, so the
    /// next start asks the store for the disk's name again.
    pub(super) async fn rename(&mut self, name: String) -> Result<(), CacheError> {
        if sabotage::on(Bug::RenameUnnoted) {
            return Ok(());
        }
        let former = std::mem::replace(&mut self.p.record.name, name);
        if self.through.is_some() {
            return Ok(());
        }
        let written = self.write_slot().await;
        if written.is_err() {
            self.p.record.name = former;
        }
        written
    }

    /// Durable before it takes effect.
    pub(super) async fn set_policy(&mut self, change: PolicyChange) -> Result<Policy, CacheError> {
        let former = self.p.record.policy.chosen;
        let (had_cuts, may_have_had) = (self.p.record.has_cuts, self.p.record.may_have_cuts());
        let policy = change.of(former);
        self.p.record.policy.chosen = policy;
        // What it has of them, it has for as long as it is open.
        self.p.record.has_cuts = may_have_had || policy.schedule.cadence().is_some();
        let mut written = self.write_slot().await;
        if written.is_ok() && self.p.record.has_cuts && !may_have_had {
            // In both copies: a former version would go by the one that it knows.
            written = self.write_slot().await;
        }
        if let Err(error) = written {
            self.p.record.policy.chosen = former;
            self.p.record.has_cuts = had_cuts;
            return Err(error);
        }
        self.p.status.lock().policy = policy;
        self.send_cadence();
        tracing::info!(vdi = %self.p.record.name, %policy, "policy set");
        Ok(policy)
    }

    /// What the guest read while it booted is kept in the slot. Losing it costs comfort only.
    pub(super) async fn keep_trace(&mut self, ranges: Ranges) {
        self.p.record.boot_trace = ranges;
        match self.write_slot().await {
            Ok(()) => self.p.status.lock().boot_trace.clone_from(&self.p.record.boot_trace),
            Err(error) => self.note_error(&error.to_string()),
        }
    }

    /// Up to where the log was flushed on all legs. Once a disk was in write-through, what is flushed is in the store only.
    pub(super) fn durable(&self) -> Lsn {
        let noted = self.p.record.durable;
        match self.p.record.left_behind {
            Some(_) => noted,
            None => noted.max(Lsn(self.p.progress.flushed.load(Ordering::Relaxed))),
        }
    }

    /// Lets the slot say how far the log reaches, if it does not yet: a log that is found shorter is damaged. Not in
    /// write-through, where the slot is not written.
    pub(super) async fn note_durable(&mut self) {
        if self.log_failure.is_none()
            && self.durable() > self.p.record.durable
            && let Err(error) = self.write_slot().await
        {
            self.note_error(&error.to_string());
        }
    }

    pub(super) async fn write_slot(&mut self) -> Result<(), CacheError> {
        if self.through.is_some() {
            // Nothing may rest on it any more: see `through.rs`.
            return Err(CacheError::Flush {
                vdi: self.p.vdi,
                why: "no leg of the cache is left".into(),
            });
        }
        self.p.record.sequence_seen =
            self.p.record.sequence_seen.max(self.p.ground.pool.next_seq());
        self.p.record.durable = self.durable();
        let mut slot = self.p.slot.clone();
        slot.sequence += 1;
        slot.vdi = Some(self.p.record.clone());
        // A write that failed may have torn its copy: the next one must go there again, not to the good one.
        self.p.ground.local.write_slot(&slot).await?;
        self.p.slot = slot;
        Ok(())
    }

    /// A drained disk leaves.
    pub(super) async fn forget(&mut self) -> Result<(), CacheError> {
        self.log_is_sound()?;
        if self.keeps_origin() {
            return Err(CacheError::Flush {
                vdi: self.p.vdi,
                why: "it is a clone that the store does not know of yet".into(),
            });
        }
        let sealed = self.p.segments.last_lsn().unwrap_or(self.p.record.committed);
        let last = sealed.max(self.last_staged);
        if !self.released || last > self.p.record.committed {
            return Err(CacheError::Flush {
                vdi: self.p.vdi,
                why: format!(
                    "its log reaches LSN {last}, the store only LSN {}; drain it first",
                    self.p.record.committed
                ),
            });
        }
        self.leave_slot().await
    }

    /// A clone that the store does not know of is given up.
    pub(super) async fn forget_clone(&mut self) -> Result<(), CacheError> {
        if !self.released || !self.keeps_origin() {
            return Err(CacheError::Flush {
                vdi: self.p.vdi,
                why: "it is served, or the store knows of it".into(),
            });
        }
        self.leave_slot().await
    }

    /// The store does not know of the disk: what its log holds of the snapshot that it began as may be nowhere else.
    pub(super) fn keeps_origin(&self) -> bool {
        self.p.record.origin.is_some()
    }

    /// The disk's slot is freed first, then its segments.
    pub(super) async fn leave_slot(&mut self) -> Result<(), CacheError> {
        let mut slot = self.p.slot.clone();
        slot.sequence += 1;
        slot.vdi = None;
        let of_clone = self.keeps_origin();
        let unnoted = if of_clone { Bug::GiveUpUnnoted } else { Bug::DetachUnnoted };
        if !sabotage::on(unnoted)
            && let Err(error) = self.p.ground.local.write_slot(&slot).await
        {
            if self.through.is_none() || self.keeps_origin() {
                return Err(error);
            }
            // Should it be there again one day: the store's head says that this log was drained, so it is no danger.
            self.note_error(&error.to_string());
            self.p.ground.pool.unregister(self.p.vdi);
            return Ok(());
        }
        self.p.slot = slot;
        // Slot gone, so nothing here is anyone's: the pool must ask for no more evictions, and those it has asked for are
        // settled.
        self.p.ground.pool.unregister(self.p.vdi);
        self.refuse_evictions();
        if !(of_clone && sabotage::on(Bug::GiveUpKeepsSegments)) {
            self.free_all();
        }
        if self.through.is_some() {
            // Those that were forgotten when they were committed.
            for id in self.p.ground.pool.owned(self.p.vdi) {
                self.p.ground.pool.release(id, false);
            }
        }
        Ok(())
    }
}
