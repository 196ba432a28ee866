//! Clean segments on their way back to the pool.
//!
//! The pool asks for one; the worker drops its index entries and answers once no read uses it any more; then the slot that
//! names it dead is written, and it is free. The pool counts on those it asked for and asks for no others meanwhile, so
//! a segment that comes later is set aside: it is free when it comes, and the pool asks for another at once. A slow read,
//! or a slow worker, must not keep the writers of all disks waiting. One that cannot be evicted at all is offered again later (INV-EVICT-1: no segment is ever lost to the pool).

use super::task::VdiTask;
use crate::disk::plan::SegmentId;
use crate::error::CacheError;
use crate::flusher;
use crate::link::ToDisk;
use crate::pool::PoolMessage;
use blockstore::sabotage::{self, Bug};
use std::time::Duration;
use tokio::time::Instant;

/// How long a worker may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// After an eviction failed, how long until the segment is offered again.
const OFFER_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// Freed at once at most, when more are on their way.
const FREED_TOGETHER: usize = 16;

/// Evictions under way.
#[derive(Debug)]
pub(super) struct Evictions {
    /// The worker was asked, and the pool counts on them.
    asked: Vec<SegmentId>,
    last_asked: Instant,
    /// The worker was asked; the pool does not count on them any more.
    aside: Vec<SegmentId>,
    /// Dead, but the slot does not say so yet: place, sequence number, whether the pool counts on it.
    dead: Vec<(SegmentId, u64, bool)>,
    /// The worker owes answers for so long that it is asked for nothing more until it gives one.
    silent: bool,
    /// Could not be evicted; to be offered again at `offer_again_at`.
    held_back: Vec<SegmentId>,
    offer_again_at: Option<Instant>,
}

impl Evictions {
    pub fn new() -> Self {
        Self {
            asked: Vec::new(),
            last_asked: Instant::now(),
            aside: Vec::new(),
            dead: Vec::new(),
            silent: false,
            held_back: Vec::new(),
            offer_again_at: None,
        }
    }

    /// Segments that are dead, but not free yet.
    pub fn dead(&self) -> impl Iterator<Item = SegmentId> {
        self.dead.iter().map(|(id, ..)| *id)
    }
}

impl VdiTask {
    /// The pool wants this segment.
    pub(super) async fn evict(&mut self, id: SegmentId) {
        let Some(segment) = self.p.segments.get(id) else {
            return self.p.ground.pool.eviction_failed();
        };
        let (seq, last_lsn) = (segment.seq, segment.last_lsn);
        if self.released {
            // No worker, no reads that count: nothing refers to it but the slot.
            self.evictions.asked.push(id);
            return self.was_evicted(id).await;
        }
        if self.evictions.silent {
            return self.hold_back(id);
        }
        match flusher::lbas_of(&self.p.ground.local, self.p.vdi, id, seq, last_lsn).await {
            Ok(named) => {
                if self.p.record.policy.pinned {
                    self.lost.note(&named);
                }
                self.evictions.asked.push(id);
                self.evictions.last_asked = Instant::now();
                tracing::trace!(segment = id.0, blocks = named.lbas.len(), "evicting");
                let (lbas, holes) = (named.lbas, named.zeros);
                if !self.p.sender.send(ToDisk::Evict { segment: id, lbas, holes }) {
                    // The disk is gone, and its reads with it; what was lent does not count.
                    self.loans.worker_is_gone();
                    self.was_evicted(id).await;
                }
            }
            // It stays: without its list the index cannot be cleaned.
            Err(error) => {
                self.note_error(&error.to_string());
                self.hold_back(id);
            }
        }
    }

    /// The segment stays for a while.
    fn hold_back(&mut self, id: SegmentId) {
        self.evictions.held_back.push(id);
        self.evictions.offer_again_at.get_or_insert(Instant::now() + OFFER_AGAIN_AFTER);
        self.p.ground.pool.eviction_failed();
    }

    /// A read uses the segment: it comes later.
    pub(super) fn is_pinned(&mut self, id: SegmentId) {
        self.evictions.silent = false;
        self.set_aside(id);
    }

    /// The pool must not wait for the segment.
    fn set_aside(&mut self, id: SegmentId) {
        if let Some(at) = self.evictions.asked.iter().position(|asked| *asked == id) {
            self.evictions.asked.swap_remove(at);
            self.evictions.aside.push(id);
            self.p.ground.pool.eviction_failed();
        }
    }

    /// As [`Self::set_aside`], all of them.
    pub(super) fn set_all_aside(&mut self) {
        for id in self.evictions.asked.clone() {
            self.set_aside(id);
        }
    }

    /// Nothing refers to the segment any more. Slots are written once for all that are on their way.
    pub(super) async fn was_evicted(&mut self, id: SegmentId) {
        self.evictions.silent = false;
        let asked = self.evictions.asked.iter().position(|asked| *asked == id);
        if let Some(at) = asked {
            self.evictions.asked.swap_remove(at);
        }
        self.evictions.aside.retain(|aside| *aside != id);
        let Some(seq) = self.p.segments.remove(id) else {
            if asked.is_some() {
                self.p.ground.pool.eviction_failed();
            }
            return;
        };
        self.evictions.dead.push((id, seq, asked.is_some()));
        tracing::trace!(segment = id.0, "evicted");
        if self.evictions.asked.is_empty() || self.evictions.dead.len() >= FREED_TOGETHER {
            let _ = self.free_evicted().await;
        }
    }

    /// Writes the slot that names the evicted segments dead, then frees them.
    pub(super) async fn free_evicted(&mut self) -> Result<(), CacheError> {
        let Some(newest) = self.evictions.dead.iter().map(|(_, seq, _)| *seq).max() else {
            return Ok(());
        };
        self.p.record.evicted_below = self.p.record.evicted_below.max(newest + 1);
        if !sabotage::on(Bug::ReuseBeforeSlot)
            && let Err(error) = self.write_slot().await
        {
            self.note_error(&error.to_string());
            return Err(error);
        }
        for (id, _, counted) in self.evictions.dead.drain(..) {
            self.p.ground.pool.release(id, counted);
        }
        self.feed();
        Ok(())
    }

    /// Looks after evictions that do not go on by themselves.
    pub(super) async fn tick_evictions(&mut self) {
        if self.evictions.asked.is_empty() {
            // The slot could not be written before.
            let _ = self.free_evicted().await;
        } else if self.evictions.last_asked.elapsed() >= ANSWER_WITHIN {
            self.note_error("the disk's worker does not answer; its read cache stays for now");
            self.evictions.silent = true;
            self.set_all_aside();
        }
        let due = self.evictions.offer_again_at.is_some_and(|at| at <= Instant::now());
        if due && !self.evictions.silent {
            self.evictions.offer_again_at = None;
            for id in std::mem::take(&mut self.evictions.held_back) {
                self.p.segments.keep(id);
            }
            self.offer_clean();
        }
    }

    /// The worker is gone, and its reads with it: what it was asked for is nobody's.
    pub(super) async fn finish_evictions(&mut self) {
        let mut left = self.evictions.asked.clone();
        left.extend(&self.evictions.aside);
        for id in left {
            self.was_evicted(id).await;
        }
    }

    /// A new worker comes, with an index of its own: what the former was asked for stays, and may be offered again.
    ///
    /// # Errors
    /// Evicted segments must be dead on the device before its headers are believed, and cannot be made so.
    pub(super) async fn abandon_evictions(&mut self) -> Result<(), CacheError> {
        self.free_evicted().await?;
        self.p.ground.pool.withdraw(self.p.vdi);
        self.refuse_evictions();
        for _ in std::mem::take(&mut self.evictions.asked) {
            self.p.ground.pool.eviction_failed();
        }
        self.evictions.aside.clear();
        self.evictions.held_back.clear();
        self.evictions.silent = false;
        self.p.segments.keep_all();
        // Should the new worker not come, they can be had all the same.
        self.evictions.offer_again_at = Some(Instant::now() + OFFER_AGAIN_AFTER);
        Ok(())
    }

    /// The pool's requests that were not looked at yet are not carried out.
    pub(super) fn refuse_evictions(&mut self) {
        while let Ok(message) = self.p.from_pool.try_recv() {
            if matches!(message, PoolMessage::Evict(_)) {
                self.p.ground.pool.eviction_failed();
            }
        }
    }

    /// The disk's slot is free: so are all its segments.
    pub(super) fn free_all(&mut self) {
        for id in self.p.segments.ids() {
            self.p.ground.pool.release(id, self.evictions.asked.contains(&id));
        }
        for (id, _, counted) in self.evictions.dead.drain(..) {
            self.p.ground.pool.release(id, counted);
        }
    }
}
