//! What the cache asks of a disk's task.

use super::as_of;
use super::cuts::Pressed;
use super::hydrate::{HydrateError, HydrateStatus};
use super::lend::{Loan, Wanted};
use super::pin::PinError;
use super::task::VdiTask;
use crate::backing::Backing;
use crate::cache::attach::verified;
use crate::desk::{NOT_SERVED, Reply};
use crate::disk::AttachedDisk;
use crate::disk::plan::SegmentId;
use crate::error::CacheError;
use crate::format::segment::SegmentHeader;
use crate::format::slot::VdiSlot;
use crate::log_open::{OpenLog, belongs};
use crate::pending::PendingSnapshot;
use crate::release;
use blockstore::sabotage::{self, Bug};
use blockstore::types::{Lba, Lsn};
use blockstore::{Policy, PolicyChange};
use std::sync::Arc;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// What the cache asks of the task.
#[derive(Debug)]
pub(crate) enum Command {
    /// Commit all that was acknowledged before now.
    Drain(oneshot::Sender<Result<Lsn, CacheError>>),
    /// The worker is gone; here is the disk.
    Released { disk: Box<AttachedDisk>, reply: oneshot::Sender<Result<(), CacheError>> },
    /// Does the store, whose image is at this LSN, fit the log?
    Verify { store: Lsn, reply: oneshot::Sender<Result<(), CacheError>> },
    /// The store is there.
    Join { backing: Arc<dyn Backing>, reply: oneshot::Sender<Result<(), CacheError>> },
    /// The store cannot be used.
    Refuse { why: String, reply: oneshot::Sender<()> },
    /// The worker is gone, with the disk or without: make a new one.
    Reopen(oneshot::Sender<Result<AttachedDisk, CacheError>>),
    /// The disk grew.
    Resize { bytes: u64, reply: oneshot::Sender<Result<(), CacheError>> },
    /// The store knows the disk by this name.
    Rename { name: String, reply: oneshot::Sender<Result<(), CacheError>> },
    /// Change the disk's policy; the answer is what holds then.
    SetPolicy { change: PolicyChange, reply: oneshot::Sender<Result<Policy, CacheError>> },
    /// Seal the log and tell what is in it that the store may not have.
    Undrained { for_cut: bool, reply: as_of::UndrainedReply },
    /// Read what is held of a snapshot of it.
    Lend { wanted: Wanted, reply: oneshot::Sender<Loan> },
    /// Which blocks the store is known not to have.
    Holes(oneshot::Sender<Vec<(Lba, u64)>>),
    /// Take a snapshot of what the disk was.
    Cut { cut: PendingSnapshot, reply: Reply },
    /// Cut more or less often than the schedule says.
    Press { pressed: Pressed, reply: oneshot::Sender<()> },
    /// Fetch these ranges into the cache ahead of need; all of the disk if none are given.
    Hydrate {
        ranges: Option<Vec<(Lba, u64)>>,
        reply: oneshot::Sender<Result<HydrateStatus, HydrateError>>,
    },
    /// Keep what is held of it, or do not.
    Pin { on: bool, reply: oneshot::Sender<Result<(), PinError>> },
    /// End, and leave the cache or not. Answers with the slot as it was written last.
    Stop { leave: Leave, reply: oneshot::Sender<Result<VdiSlot, CacheError>> },
}

/// What becomes of a disk whose task ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    /// It stays in the cache.
    Not,
    /// It was drained, and leaves.
    Drained,
    /// It is a clone that the store does not know of, and is given up with all that was written to it.
    GivenUp,
}

impl VdiTask {
    /// Returns true if the task ends.
    pub(super) async fn command(&mut self, command: Command) -> bool {
        match command {
            Command::Drain(reply) => self.drain(reply),
            Command::Released { disk, reply } => {
                // What the worker said last comes before what its disk says now.
                while let Ok(message) = self.p.from_disk.try_recv() {
                    Box::pin(self.on_disk(message)).await;
                }
                let sealed = release::seal(*disk, &self.p.ground.local).await;
                self.released = true;
                self.end_hydration();
                (self.starving, self.ration) = (false, None);
                self.p.ground.pool.leave_queue(self.p.vdi);
                let result = match sealed {
                    Ok(sealed) => {
                        self.last_staged = sealed.last_lsn;
                        for message in sealed.messages {
                            Box::pin(self.on_disk(message)).await;
                        }
                        self.log_is_sound()
                    }
                    Err(source) => {
                        self.log_failed(format!("sealing the log: {source}"));
                        Err(CacheError::Local {
                            path: self.p.ground.local.path.clone(),
                            what: "sealing the log",
                            source,
                        })
                    }
                };
                self.p.desk.close(NOT_SERVED);
                self.fail_asked("the disk went out of service");
                self.finish_evictions().await;
                let _ = reply.send(result);
            }
            Command::Verify { store, reply } => {
                let _ = reply.send(self.verify(store).map(drop));
            }
            Command::Join { backing, reply } => {
                let _ = reply.send(self.join(backing).await);
            }
            Command::Refuse { why, reply } => {
                self.refuse(why);
                let _ = reply.send(());
            }
            Command::Reopen(reply) => {
                let _ = reply.send(self.reopen().await);
            }
            Command::Resize { bytes, reply } => {
                let _ = reply.send(self.resize(bytes).await);
            }
            Command::Rename { name, reply } => {
                let _ = reply.send(self.rename(name).await);
            }
            Command::SetPolicy { change, reply } => {
                let _ = reply.send(self.set_policy(change).await);
            }
            Command::Pin { on, reply } => {
                let _ = reply.send(self.pin(on).await);
            }
            Command::Undrained { for_cut, reply } => self.undrained(for_cut, reply),
            Command::Lend { wanted, reply } => self.lend(&wanted, reply),
            Command::Holes(reply) => self.ask_holes(reply),
            Command::Cut { cut, reply } => self.cut(cut, reply).await,
            Command::Press { pressed, reply } => {
                self.press(pressed);
                let _ = reply.send(());
            }
            Command::Hydrate { ranges, reply } => self.hydrate(ranges, reply),
            Command::Stop { leave, reply } => {
                let result = match leave {
                    Leave::Not => Ok(()),
                    Leave::Drained => self.forget().await,
                    Leave::GivenUp => self.forget_clone().await,
                };
                let failed = result.is_err();
                let _ = reply.send(result.map(|()| self.p.slot.clone()));
                // A disk that cannot be forgotten yet stays looked after.
                return !failed;
            }
        }
        false
    }

    /// The store's image is at this LSN: it fits the log, or is refused.
    pub(super) fn verify(&mut self, store: Lsn) -> Result<Lsn, CacheError> {
        let verified = verified(&self.p.record, Some(self.p.recovered), store);
        if let Err(error) = &verified {
            self.refuse(error.to_string());
        }
        verified
    }

    /// What the store holds already need not be replayed; that is noted durably before anything relies on it.
    async fn join(&mut self, backing: Arc<dyn Backing>) -> Result<(), CacheError> {
        if !sabotage::on(Bug::ColdTrustsSlot) {
            let committed = self.verify(backing.committed())?;
            self.p.record.reached(committed);
        }
        self.failure = None;
        self.p.backing.join(backing);
        self.not_before = Instant::now();
        // From the next commit on the store is further than where the log was opened.
        self.p.record.alone_from = None;
        // A clone is in the store now. What its log holds of its origin is kept until the slot says so.
        self.p.record.origin = None;
        self.join_unnoted = true;
        self.place_waiting_cuts().await;
        self.checkpoint_due = true;
        self.checkpoint().await;
        tracing::info!(
            vdi = %self.p.record.name, committed = self.p.record.committed.0, "the store has joined"
        );
        Ok(())
    }

    pub(super) fn refuse(&mut self, why: String) {
        tracing::error!(vdi = %self.p.record.name, %why, "the store cannot be used; the log is kept");
        self.fail_waiters(&why);
        self.fail_cuts(&why);
        self.p.backing.refuse(why.clone());
        self.give_up(&format!("the store cannot be used ({why})"));
        self.failure = Some(why);
    }

    /// Recovers the log as a start would, while commits go on. The old driver's end of the link is gone or about to be.
    async fn reopen(&mut self) -> Result<AttachedDisk, CacheError> {
        if let Some(through) = &self.through {
            // What is on the device is behind the store.
            return Err(CacheError::Flush { vdi: self.p.vdi, why: through.why.clone() });
        }
        if self.device_failed {
            self.log_is_sound()?;
        }
        self.end_hydration();
        self.loans.worker_is_gone();
        self.abandon_evictions().await?;
        let logs_opening = Arc::clone(&self.p.ground.logs_opening);
        let _opening = logs_opening.read().await;
        // What the former worker did not say is in the log, or nowhere: a leg that is being filled gets all of it anew.
        self.p.ground.pool.await_disk(self.p.vdi);
        let open = self.open_log_again().await;
        if open.is_err() {
            self.p.ground.pool.disk_joined(self.p.vdi, None, None);
        }
        let (open, headers, owned) = open?;
        let OpenLog { slot, record, mut disk, sender, from_disk, segments, last_lsn, snapshots } =
            open;
        (self.p.slot, self.p.record) = (slot, record);
        (self.p.sender, self.p.from_disk) = (sender, from_disk);
        self.p.segments.renew(segments);
        // Granted to the former driver and never written to.
        for id in owned.iter().filter(|id| headers.iter().all(|h| h.segment != **id)) {
            self.p.ground.pool.release(*id, false);
        }
        (self.released, self.starving, self.ration) = (false, false, None);
        self.p.ground.pool.leave_queue(self.p.vdi);
        (self.open_since, self.roll_under_way) = (None, None);
        self.log_failure = None;
        self.unreadable.clear();
        // The new worker cuts as the schedule says.
        self.send_cadence();
        self.fail_looks("the disk's worker was replaced");
        self.p.desk.reopen(self.p.sender.clone(), snapshots);
        disk.link.answer_at(Arc::clone(&self.p.desk));
        for waiter in &mut self.waiters {
            waiter.lsn.get_or_insert(last_lsn);
        }
        self.offer_clean();
        Ok(disk)
    }

    /// The log, the headers that it was recovered from, and the segments that the disk had.
    async fn open_log_again(
        &mut self,
    ) -> Result<(OpenLog, Vec<SegmentHeader>, Vec<SegmentId>), CacheError> {
        let owned = self.p.ground.pool.owned(self.p.vdi);
        let mut headers = self.p.ground.local.read_headers().await?;
        headers.retain(|h| owned.contains(&h.segment) && belongs(h, &self.p.record));
        headers.sort_unstable_by_key(|header| header.seq);
        let progress = Arc::clone(&self.p.progress);
        let record = self.p.record.clone();
        let alone = !self.p.backing.is_joined();
        let slot = &mut self.p.slot;
        let open = self.p.ground.open_log(slot, record, &headers, alone, progress).await?;
        Ok((open, headers, owned))
    }
}
