//! No leg of the cache is left: the task's half of write-through (rule L6; the log's is in `disk/log/through.rs`).
//!
//! What the log still had to say comes from memory, what was sealed before from memory or from the device, if that can
//! still be read: each payload is checked, and a gap is an error. If all of it reaches the store, the store has everything
//! that was acknowledged, and the disk goes on in write-through. If not, acknowledged writes are missing: nothing may be
//! written beyond them, and the disk stops.
//!
//! Before anything of that is committed which the log may not have, it is noted durably that the log may be behind the
//! store: in its slot, if that can still be written, and by the witness beside the cache. If neither takes the note, the
//! disk stops. A log of which this is noted is opened together with the store only, which tells whether it counts
//! (`Ground::end_of`): wherever a crash comes, the log or the store reaches what was acknowledged. The slot is not written
//! after that.

use super::task::VdiTask;
use crate::aside;
use crate::backing::{Backing, BackingError};
use crate::flusher::FlushError;
use crate::format::LegSet;
use crate::format::slot::LeftBehind;
use crate::link::{FetchError, SealedSegment, ToDisk};
use blockstore::sabotage::{self, Bug};
use blockstore::types::{Lba, Lsn};
use tokio::time::Instant;

/// So many writes of its slot, about a second apart, must have been refused before a disk that waits is told that no leg is
/// left. A worker believes its first failure; here nothing is lost by asking again.
const REFUSALS_MAX: u32 = 3;

/// See the module.
#[derive(Debug)]
pub(crate) struct Through {
    /// What happened, in words.
    pub why: String,
    /// Everything up to here must reach the store first; none once it has.
    wanted: Option<Lsn>,
    /// Reads of the store that wait for that.
    fetches: Vec<(u64, Lba, u32)>,
}

impl VdiTask {
    /// The disk's worker says that the last leg failed, and hands over what was not sealed.
    pub(super) async fn no_leg_left(
        &mut self,
        reason: &str,
        tail: Vec<SealedSegment>,
        flushed: Lsn,
    ) {
        let name = &self.p.record.name;
        tracing::error!(
            vdi = %name, reason,
            "no leg of the cache is left: its writes wait until all that was acknowledged is in the store"
        );
        self.device_failed = true;
        let sealed = self.p.segments.last_lsn().unwrap_or(self.p.record.committed);
        let last = tail.last().map_or(sealed, |segment| segment.last_lsn);
        let last = last.max(self.p.record.committed);
        self.through = Some(Through {
            why: format!("{reason}; no leg of the cache is left"),
            wanted: Some(last),
            fetches: std::mem::take(&mut self.unreadable),
        });
        (self.open_since, self.checkpoint_due, self.starving) = (None, false, false);
        self.ration = None;
        self.p.ground.pool.leave_queue(self.p.vdi);
        self.p.ground.pool.withdraw(self.p.vdi);
        self.set_all_aside();
        if let Some(why) = self.failure.clone().filter(|_| !self.p.backing.is_joined()) {
            return self.give_up(&format!("the store cannot be used ({why})"));
        }
        let epoch = self.p.record.epoch;
        if let Err(error) = self.note_left_behind(LeftBehind { epoch, flushed, staged: last }).await
        {
            let why = format!(
                "neither the cache nor the run directory takes the note that its log will be behind the store ({error})"
            );
            return self.give_up(&why);
        }
        // The note says more than that the store has joined. Without it the slot's word stands, and nothing is committed.
        self.join_unnoted = false;
        for sealed in tail {
            self.p.segments.push_in_memory(sealed, Instant::now(), &self.p.images_held);
        }
        self.not_before = Instant::now();
        // If there is nothing to be brought to the store.
        self.committed_without_legs();
    }

    /// A segment that exists in memory only.
    pub(super) fn take_memory(&mut self, sealed: SealedSegment) {
        self.p.segments.push_in_memory(sealed, Instant::now(), &self.p.images_held);
    }

    /// The store's image moved on, or is where it has to be.
    pub(super) fn committed_without_legs(&mut self) {
        let committed = self.p.record.committed;
        self.checkpoint_due = false;
        let Some(through) = &mut self.through else { return };
        match through.wanted {
            Some(wanted) if committed >= wanted => {
                through.wanted = None;
                let fetches = std::mem::take(&mut through.fetches);
                self.p.segments.forget_committed(committed);
                tracing::warn!(
                    vdi = %self.p.record.name, lsn = committed.0,
                    "all that was acknowledged is in the store: the disk goes on in write-through"
                );
                self.p.sender.send(ToDisk::WriteThrough { lsn: committed });
                for (id, lba, blocks) in fetches {
                    self.fetch(id, lba, blocks);
                }
            }
            Some(_) => {}
            None => {
                self.p.segments.forget_committed(committed);
                self.p.sender.send(ToDisk::Committed { lsn: committed });
            }
        }
        self.answer_waiters();
    }

    /// True if the read waits until it is known whether the store has everything.
    pub(super) fn hold_fetch(&mut self, id: u64, lba: Lba, blocks: u32) -> bool {
        let waiting = self.through.as_mut().filter(|through| through.wanted.is_some());
        waiting.map(|through| through.fetches.push((id, lba, blocks))).is_some()
    }

    /// A read of blocks of which the log, if it were not held, might know more than the store.
    pub(super) fn fetch_held(&mut self, id: u64, lba: Lba, blocks: u32) {
        if self.through.is_some() {
            if !self.hold_fetch(id, lba, blocks) {
                self.fetch(id, lba, blocks);
            }
            return;
        }
        // The disk was given up meanwhile, and the store may not have what was acknowledged.
        let why = self.log_failure.clone().unwrap_or_else(|| "the log has failed".into());
        self.p.sender.send(ToDisk::Fetched { id, result: Err(FetchError(why)), keep: false });
    }

    /// What only the legs have cannot be read from any. If they take no writes either, they have all failed: the worker is
    /// told, hands over what it has, and the read waits for what becomes of that.
    pub(super) async fn unreadable(&mut self, id: u64, lba: Lba) {
        if self.through.is_some() {
            if !self.hold_fetch(id, lba, 1) {
                self.fetch(id, lba, 1);
            }
            return;
        }
        let works = self.log_failure.is_some() || self.released || self.write_slot().await.is_ok();
        if works {
            let lost = FetchError("its only copy, in the cache, cannot be read".into());
            self.p.sender.send(ToDisk::Fetched { id, result: Err(lost), keep: false });
            return;
        }
        self.unreadable.push((id, lba, 1));
        self.p.sender.send(ToDisk::Legs { members: LegSet::NONE });
    }

    /// A disk that waits, for a segment or until all is in the store, writes nothing of its own, so its worker does not find
    /// out that the last leg has failed, nor does it matter which disk's slot is to be written for it to go on. Its own slot
    /// tells. A device that refuses just that is no use to the disk either: what was committed can never turn clean. With
    /// the store away it waits anyway, and can read meanwhile.
    pub(super) async fn probe_device(&mut self, waits: bool) {
        let away = !self.p.backing.is_joined() || self.p.backing.away_since_ms().is_some();
        if !waits || away || self.log_failure.is_some() || self.write_slot().await.is_ok() {
            self.refusals = 0;
            return;
        }
        self.refusals += 1;
        if self.refusals >= REFUSALS_MAX {
            self.p.sender.send(ToDisk::Legs { members: LegSet::NONE });
        }
    }

    /// Without legs there is nothing to try again from: what could not be read is lost, and so is a disk that is not ours.
    pub(super) fn is_final_without_legs(&self, error: &FlushError) -> bool {
        let unreadable = matches!(error, FlushError::Local(_) | FlushError::Batch(_));
        let not_ours = matches!(error, FlushError::Backing(BackingError::NotOwner(_)));
        self.through.is_some() && (unreadable || not_ours)
    }

    /// Nothing may be written beyond what the log had: the disk stops.
    pub(super) fn give_up(&mut self, why: &str) {
        self.drafting = None;
        let Some(through) = self.through.take() else { return };
        if through.wanted.is_none() {
            // Nothing of what is in memory only was acknowledged.
            self.p.segments.forget_committed(Lsn(u64::MAX));
        }
        let name = self.p.record.name.clone();
        let reason = format!(
            "{}, and {why}: the disk takes no more writes. Bring the cache back and restart the agent; if it is lost for \
             good, start the agent with a new cache, then 'ballast vdi rollback {name} --accept-loss'",
            through.why
        );
        self.p.sender.send(ToDisk::GiveUp { reason: reason.clone() });
        for (id, ..) in through.fetches {
            self.p.sender.send(ToDisk::Fetched {
                id,
                result: Err(FetchError(reason.clone())),
                keep: false,
            });
        }
        self.log_failed(reason);
    }

    /// Notes durably that the store may get ahead of this log: in its slot, and by whoever remembers it otherwise. One of
    /// the two is enough.
    async fn note_left_behind(&mut self, behind: LeftBehind) -> Result<(), String> {
        if sabotage::on(Bug::LogBehindUnnoted) {
            return Ok(());
        }
        self.p.record.left_behind = Some(behind);
        let slot = self.p.slot.next(Some(self.p.record.clone()));
        let on_device = self.p.ground.local.write_slot(&slot).await;
        if on_device.is_ok() {
            self.p.slot = slot;
        }
        let (witness, log_id) = (self.p.ground.witness.clone(), self.p.record.log_id);
        let noted = aside::run(move || witness.note(log_id, &behind)).await;
        let noted = noted.map_err(std::io::Error::other).flatten();
        match (on_device, noted) {
            (Err(here), Err(there)) => Err(format!("{here}; {there}")),
            _ => Ok(()),
        }
    }
}
