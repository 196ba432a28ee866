//! Snapshots of what the disk was at an LSN that its log has gone beyond.
//!
//! Until the store has them, the records of the log are there one by one, so the disk as of any of them can still be made:
//! by a commit that is cut there, as it is at the log's own snapshots. Which these are the disk's slot says; one is answered
//! once the slot is durable, with the store there or away. Then it cannot be missed:
//!
//! * Its LSN is beyond all that this task ever sent to the store, whatever became of it, and beyond where the store was when
//!   it joined: what an earlier agent sent. Before that nobody knows how far it is, so those who ask wait for it.
//! * Every batch is drafted with the cuts in the slot. One that was drafted ahead, without it, is drafted anew.
//! * Its LSN is flushed: a log that ends before it is damaged, and none of its LSNs comes again with other data.

use super::task::VdiTask;
use crate::desk::{Reply, SnapshotTaken};
use crate::error::CacheError;
use crate::flusher::Replay;
use crate::format::slot::CUTS_MAX;
use crate::pending::PendingSnapshot;
use blockstore::types::Lsn;
use tokio::sync::oneshot;

/// What a disk's log holds that the store may not have.
#[derive(Clone, Debug)]
pub struct Undrained {
    /// The store's image reached at least this LSN.
    pub committed: Lsn,
    /// Sealed segments with something beyond, oldest first, without a gap.
    pub segments: Vec<Replay>,
}

pub(crate) type UndrainedReply = oneshot::Sender<Result<Undrained, CacheError>>;

/// A snapshot that somebody wants.
#[derive(Debug)]
struct Asked {
    cut: PendingSnapshot,
    reply: Reply,
}

/// Those who wait.
#[derive(Debug, Default)]
pub(super) struct AsOf {
    /// For the worker to seal what it has.
    looks: Vec<(u64, UndrainedReply)>,
    /// For the store to join, at most [`CUTS_MAX`].
    asked: Vec<Asked>,
}

impl AsOf {
    /// Snapshots that wait for the store to join.
    pub fn waiting(&self) -> usize {
        self.asked.len()
    }
}

impl VdiTask {
    /// Has the log sealed and tells what is in it, `for_cut` to somebody who will ask for a snapshot of it.
    pub(super) fn undrained(&mut self, for_cut: bool, reply: UndrainedReply) {
        self.as_of.looks.retain(|(_, reply)| !reply.is_closed());
        // Each seals a segment, of which an outage leaves only so many.
        let no_more_cuts = for_cut && self.p.record.cuts.len() >= CUTS_MAX;
        let full = no_more_cuts || self.as_of.looks.len() >= CUTS_MAX;
        let too_many = if full { Err(Self::too_many()) } else { Ok(()) };
        if let Err(why) = self.p.desk.may_ask().and(too_many) {
            let _ = reply.send(Err(CacheError::Snapshot { vdi: self.p.vdi, why }));
            return;
        }
        // One that is under way covers what was acknowledged before it was asked for, not what was since.
        let roll = self.roll();
        self.as_of.looks.push((roll, reply));
    }

    /// The worker has sealed all that it had when it was asked for `roll`.
    pub(super) fn show_undrained(&mut self, roll: u64) {
        let committed = self.p.record.committed;
        let looks = std::mem::take(&mut self.as_of.looks);
        for (wanted, reply) in looks {
            if wanted == roll {
                let segments = self.p.segments.batch(committed, u64::MAX);
                let _ = reply.send(Ok(Undrained { committed, segments }));
            } else {
                self.as_of.looks.push((wanted, reply));
            }
        }
    }

    /// Nobody seals anything any more.
    pub(super) fn fail_looks(&mut self, why: &str) {
        for (_, reply) in self.as_of.looks.drain(..) {
            let why = why.to_owned();
            let _ = reply.send(Err(CacheError::Snapshot { vdi: self.p.vdi, why }));
        }
    }

    /// Has the commit that covers `cut` make it; answered when that is sure.
    pub(super) async fn cut(&mut self, cut: PendingSnapshot, reply: Reply) {
        let asked = Asked { cut, reply };
        if self.p.backing.is_joined() {
            return self.place(asked).await;
        }
        self.as_of.asked.retain(|asked| !asked.reply.is_closed());
        if let Some(why) = &self.failure {
            self.answer_cut(asked, Err(why.clone()));
        } else if self.as_of.asked.len() >= CUTS_MAX {
            let why = format!(
                "{CUTS_MAX} snapshots of what it was wait already for the store, which has not answered since the agent's start"
            );
            self.answer_cut(asked, Err(why));
        } else {
            self.as_of.asked.push(asked);
        }
    }

    /// The store has joined, and nothing was sent to it yet.
    pub(super) async fn place_waiting_cuts(&mut self) {
        for asked in std::mem::take(&mut self.as_of.asked) {
            // Who has gone was told that it was not taken.
            if !asked.reply.is_closed() {
                self.place(asked).await;
            }
        }
    }

    /// The store cannot be used.
    pub(super) fn fail_cuts(&mut self, why: &str) {
        for asked in std::mem::take(&mut self.as_of.asked) {
            self.answer_cut(asked, Err(why.to_owned()));
        }
    }

    async fn place(&mut self, asked: Asked) {
        let lsn = asked.cut.lsn;
        let known = self.p.desk.pending().find(lsn);
        if let Some(known) = known {
            let taken = SnapshotTaken { lsn, time_ms: known.time_ms };
            let is_it = known.label == asked.cut.label;
            // A schedule's own would be thinned, whatever it was asked for.
            let other = || {
                format!(
                    "LSN {lsn} is snapshot '{}' of it already: 'ballast snap label' gives that another label, under which no schedule \
                     deletes it",
                    known.label.as_str()
                )
            };
            return self.answer_cut(asked, if is_it { Ok(taken) } else { Err(other()) });
        }
        if let Err(why) = self.may_place(lsn) {
            return self.answer_cut(asked, Err(why));
        }
        let at = self.p.record.cuts.partition_point(|cut| cut.lsn < lsn);
        self.p.record.cuts.insert(at, asked.cut.clone());
        self.drafting.take_if(|ahead| ahead.lsn() >= lsn);
        if let Err(error) = self.write_slot().await {
            self.p.record.cuts.retain(|cut| cut.lsn != lsn);
            return self.answer_cut(asked, Err(format!("it cannot be noted: {error}")));
        }
        self.p.desk.pending().insert(&asked.cut);
        let taken = SnapshotTaken { lsn, time_ms: asked.cut.time_ms };
        self.answer_cut(asked, Ok(taken));
    }

    /// Why there can be none at this LSN.
    fn may_place(&self, lsn: Lsn) -> Result<(), String> {
        let sent = self.sent.max(self.p.record.committed);
        let durable = self.durable();
        if lsn <= sent {
            return Err(format!(
                "everything up to LSN {sent} is in the store already, or on its way there, and LSN {lsn} is not kept apart in it"
            ));
        }
        if lsn > durable {
            return Err(format!("its log is durable up to LSN {durable} only"));
        }
        if self.p.record.cuts.len() >= CUTS_MAX {
            return Err(Self::too_many());
        }
        Ok(())
    }

    fn too_many() -> String {
        format!(
            "{CUTS_MAX} snapshots of what it was wait for the store to get that far: try again when it has"
        )
    }

    fn answer_cut(&self, asked: Asked, result: Result<SnapshotTaken, String>) {
        let vdi = self.p.vdi;
        let _ = asked.reply.send(result.map_err(|why| CacheError::Snapshot { vdi, why }));
    }
}
