//! What collection must keep its hands off (rule G1).
//!
//! A cycle finds blocks that no root reaches. Some of these this host knows better: what it has claimed and not used, what it
//! has allocated for a head that is not durable yet, what it has freed itself. From the acknowledgement on, each block that is
//! in such a state, or passes through one, is *touched*: the cycle's findings are never applied to it. The set ends with the
//! cycle, and a host that has none, since it began anew meanwhile, applies nothing.
//!
//! Until the trees were marked, what is freed is kept in quarantine: so no block that a root reached when it was read changes
//! under the marking, and one bit per block is enough. A host that runs short of space takes the quarantine back, which ends
//! the cycle (rule G5).

use crate::alloc::returning::Returning;
use crate::alloc::runs::Run;
use crate::alloc::{Allocator, Pools, add};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::extent::{ExtentRecord, ExtentType};
use crate::io::Io;
use crate::sabotage::{self, Bug};
use crate::slot::View;
use crate::store::walking::FIRST_WALK;
use roaring::RoaringTreemap;
use std::sync::Arc;

/// Bytes that the quarantine may take, with what is still on the way back from the one before; beyond these the cycle is given up.
const QUARANTINE_BYTES_MAX: u64 = 64 << 20;

/// A cycle that this host has acknowledged, or a walk that needs the quarantine only (`store/walking.rs`).
#[derive(Debug)]
pub(super) struct Cycle {
    epoch: u64,
    touched: RoaringTreemap,
    quarantine: Option<Returning>,
}

impl Cycle {
    /// One that begins, with what is touched already.
    pub(super) fn new(epoch: u64, touched: RoaringTreemap) -> Self {
        Self { epoch, touched, quarantine: Some(Returning::default()) }
    }

    /// A block that was claimed, or is given back.
    pub(super) fn touch(&mut self, run: Run) {
        self.touched.insert_range(run.start.0..run.start.0 + run.blocks);
    }

    /// Where blocks that are freed now have to wait; none: they may be used again.
    pub(super) fn quarantine(&mut self) -> Option<&mut Returning> {
        self.quarantine.as_mut()
    }
}

impl Pools {
    /// Whatever it finds is not applied any more.
    pub(super) fn give_up_cycle(&mut self) {
        self.lift_quarantine();
        self.cycle = None;
    }

    /// What waited is on the way back from now on, but for what the pool has room for: no more than that, and a few bitmaps that are
    /// joined, is done here, however much it is.
    fn lift_quarantine(&mut self) {
        let quarantine = self.cycle.as_mut().and_then(|cycle| cycle.quarantine.take());
        let Some(Returning { data, metadata }) = quarantine else { return };
        let joined = [self.returning.data.absorb(data), self.returning.metadata.absorb(metadata)];
        if joined.contains(&false) {
            tracing::error!("blocks were freed twice, and waited twice");
        }
        for kind in [ExtentType::Data, ExtentType::Metadata] {
            let room = self.keep.saturating_sub(self.of(kind).total());
            for run in self.returning.of(kind).take(room) {
                add(self.of(kind), run);
            }
        }
    }

    /// True if there are blocks on the way back that may go on. Not while a cycle that has marked is about to apply what it found: it
    /// would leave out extents that are taken up for this. They are room meanwhile, all the same.
    pub(super) fn may_return(&self) -> bool {
        let applies = self.cycle.as_ref().is_some_and(|cycle| cycle.quarantine.is_none());
        !applies && self.returning.total() > 0
    }

    /// True if the quarantine takes more memory than it may: more is freed beside a marking than it can set aside.
    pub(super) fn is_quarantine_overfull(&self) -> bool {
        let quarantine = self.cycle.as_ref().and_then(|cycle| cycle.quarantine.as_ref());
        quarantine.is_some_and(|q| q.bytes() + self.returning.bytes() > QUARANTINE_BYTES_MAX)
    }
}

impl Allocator {
    /// Acknowledges a cycle: from here on what this host touches is its own.
    ///
    /// # Errors
    /// `InUse` if another cycle is under way here.
    pub(crate) async fn begin_cycle(&self, epoch: u64) -> Result<()> {
        // No claim and no release is half way while this is held.
        let _pages = self.pages.lock().await;
        let mut pools = self.pools.lock();
        if let Some(cycle) = &pools.cycle {
            return Err(StoreError::new(
                StoreErrorKind::InUse,
                "garbage collection",
                match cycle.epoch {
                    FIRST_WALK.. => "sizes are being computed; wait for the end".to_owned(),
                    epoch => format!("cycle {epoch} is under way; wait for its end"),
                },
            ));
        }
        let mut touched = pools.in_flight.clone();
        if sabotage::on(Bug::CollectInFlight) {
            touched.clear();
        }
        touched |= &pools.unmapping;
        touched |= pools.returning.data.blocks();
        touched |= pools.returning.metadata.blocks();
        for run in pools.data.runs().chain(pools.metadata.runs()) {
            touched.insert_range(run.start.0..run.start.0 + run.blocks);
        }
        pools.cycle = Some(Cycle::new(epoch, touched));
        Ok(())
    }

    /// Takes up extents whose records the device did not read when the store was opened, and does now. A cycle that is under way may collect
    /// there: nothing in them was given out by this process, and what it cut off there was not put anywhere.
    pub(crate) async fn learn_unread(&self, catalogue: &[View<ExtentRecord>]) {
        let mut pages = self.pages.lock().await;
        if pages.learn_unread(&self.territory, catalogue) {
            self.refresh_owned(&pages);
            self.freed.notify_waiters();
        }
    }

    /// Makes sure that a cycle was not given up to get its quarantine back.
    ///
    /// # Errors
    /// `NoSpace` if it was.
    pub(crate) fn check_cycle(&self, epoch: u64) -> Result<()> {
        if self.pools.lock().cycle.as_ref().is_some_and(|cycle| cycle.epoch == epoch) {
            return Ok(());
        }
        Err(StoreError::new(
            StoreErrorKind::NoSpace,
            format!("garbage collection, cycle {epoch}"),
            "given up, because what was freed meanwhile was needed at once, or was too much to set aside, or because a \
             disk's head that was read turned out not to be there; it begins anew by itself",
        ))
    }

    /// The trees are marked: what was freed meanwhile may be used again. From here on nothing needs the cycle's end.
    ///
    /// # Errors
    /// As [`check_cycle`](Self::check_cycle).
    pub(crate) fn end_quarantine(&self, epoch: u64) -> Result<()> {
        {
            let mut pools = self.pools.lock();
            if pools.cycle.as_ref().is_some_and(|cycle| cycle.epoch == epoch) {
                pools.lift_quarantine();
            }
        }
        self.note_room();
        self.check_cycle(epoch)
    }

    /// More is in the pool than there was: for those who wait for it, and for releasing what is too much.
    fn note_room(&self) {
        if self.is_overfull() || self.pools.lock().may_return() {
            self.housekeeping.notify_one();
        }
        self.freed.notify_waiters();
    }

    /// Ends a cycle, whatever became of it.
    pub(crate) fn end_cycle(&self, epoch: u64) {
        let mut pools = self.pools.lock();
        if pools.cycle.as_ref().is_some_and(|cycle| cycle.epoch == epoch) {
            pools.give_up_cycle();
        }
        drop(pools);
        self.note_room();
    }

    /// Ends whatever cycle is under way: it may have read what is not there.
    pub(crate) fn give_up_cycle(&self) {
        self.pools.lock().give_up_cycle();
        self.note_room();
    }

    /// Ends a cycle if that gives an allocation the room that it lacks; true if it did.
    pub(super) fn withdraw(&self, kind: ExtentType, missing: u64) -> bool {
        let mut pools = self.pools.lock();
        let have = pools.of(kind).total() + pools.returning.of(kind).total();
        let Some(quarantine) = pools.cycle.as_mut().and_then(Cycle::quarantine) else {
            return false;
        };
        let waiting = quarantine.of(kind).total();
        if waiting == 0 || waiting + have < missing {
            return false;
        }
        pools.give_up_cycle();
        self.housekeeping.notify_one();
        true
    }

    /// Of blocks that this very cycle found unreachable, those that this host has not touched since it acknowledged it.
    pub(crate) fn untouched(&self, epoch: u64, mut found: RoaringTreemap) -> RoaringTreemap {
        match self.pools.lock().cycle.as_ref().filter(|cycle| cycle.epoch == epoch) {
            Some(cycle) if !sabotage::on(Bug::CollectTouched) => found -= &cycle.touched,
            Some(_) => {}
            None => found.clear(),
        }
        found
    }

    /// Frees what the finished cycle `epoch` found unreachable in some of this host's extents; how many blocks that were, for
    /// each.
    ///
    /// # Errors
    /// `NoSpace` if the cycle was given up, `Closing`; for single extents the device's. What was not freed leaks until the next
    /// cycle.
    pub(crate) async fn apply(
        self: &Arc<Self>,
        io: &Io,
        extents: Vec<u32>,
        epoch: u64,
    ) -> Result<Vec<Result<u64>>> {
        // In a task of its own, as claims are: see `refill`.
        let (this, io_of_task) = (Arc::clone(self), io.clone());
        let task = tokio::spawn(async move {
            let mut pages = this.pages.lock().await;
            this.check_cycle(epoch)?;
            let untouched = |found| this.untouched(epoch, found);
            let outcomes =
                pages.apply(&io_of_task, &this.territory, &extents, epoch, &untouched).await;
            this.refresh_owned(&pages);
            this.freed.notify_waiters();
            Ok(outcomes)
        });
        io.await_task(task).await
    }

    /// Notes blocks that are allocated for a head that is not durable yet.
    pub(super) fn note_in_flight(pools: &mut Pools, runs: &[Run]) {
        for run in runs {
            pools.in_flight.insert_range(run.start.0..run.start.0 + run.blocks);
        }
    }

    /// The head that names these blocks is durable. What is never settled, nor freed, is not collected before this host
    /// opens the store anew: its device write may have an unknown outcome.
    pub(crate) fn settle(&self, runs: &[Run]) {
        let mut pools = self.pools.lock();
        for run in runs {
            pools.in_flight.remove_range(run.start.0..run.start.0 + run.blocks);
        }
    }

    /// Blocks that were freed, and cannot be used before the marking that is under way ends.
    pub(crate) fn quarantined(&self) -> u64 {
        let pools = self.pools.lock();
        let quarantine = pools.cycle.as_ref().and_then(|cycle| cycle.quarantine.as_ref());
        quarantine.map_or(0, Returning::total)
    }

    /// Blocks that are allocated, and reachable by no durable head.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.pools.lock().in_flight.len()
    }
}
