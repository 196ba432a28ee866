//! Allocator: gives out blocks from the extents that this host owns.
//!
//! Every block of an own extent is in one of these states:
//!
//! ```text
//! free in the BMap ──claim (page written, flushed)──► in the pool ──allocate──► in use
//!    │  ▲ ▲                                              │ ▲  ▲                    │
//!    │  │ └──(page written)── on the way back ◄──release─┘ │  └────────free────────┤
//!    │  │                        │ ▲   └───no other room───┘                       │
//!    │  │                        │ └─marking is over── in quarantine ◄─free, amid──┘
//!    │  │                                                                a marking
//!    │  └────give back, once the device has answered (page written)──┐
//!    └───────claim (page written, flushed)────────────────────────► being unmapped
//! ```
//! Invariants:
//! * INV-ALLOC-1: a block is given out only after its BMap bit is durably set.
//! * INV-ALLOC-2: a block is in at most one place: clear in the BMap, in the pool, on the way back, in quarantine, in use, or being
//!   unmapped.
//! * INV-ALLOC-3: data and metadata blocks come from different extents.
//! * INV-ALLOC-4: normal allocations leave a reserve of metadata blocks to those that free space.
//!
//! A crash leaks at most what was in the pool, on the way back, in quarantine, or in use by an uncommitted commit; GC gets it back.
//! So does an operation that is cut off while its device writes have an unknown outcome.

pub mod runs;

mod cycle;
mod pages;
mod returning;
#[cfg(test)]
mod tests;
pub mod unmap;
mod waiting;

use crate::alloc::cycle::Cycle;
use crate::alloc::pages::Pages;
use crate::alloc::returning::{Returning, twice};
use crate::alloc::runs::{FreeRuns, Run, merge};
use crate::alloc::unmap::Unmapping;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::extent::{ExtentRecord, ExtentType};
use crate::format::geometry::Geometry;
use crate::io::{Io, Lacking, Patience, SpaceWaiter};
use crate::slot::{Records, View};
use crate::types::{Gba, Generation};
use hashbrown::HashMap;
use parking_lot::{Mutex, RwLock};
use roaring::RoaringTreemap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use uuid::Uuid;

/// How often an allocation that waits for space looks again without being woken.
const SPACE_POLL: Duration = Duration::from_secs(1);
/// Most blocks claimed ahead of need at once (thesis, section 3.4.3).
const CLAIM_MAX: u64 = 10_000;

/// Free blocks kept in memory, if claims are not larger themselves.
const POOL_MAX: u64 = 16_384;
/// From so many blocks on an allocation looks for room where they lie together.
const LARGE: u64 = 256;
/// Blocks in a run, on average, that make an allocation good enough, and twice the least that a claim for one takes.
const RUN_WANTED: u64 = 16;

/// How to claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    /// What the pool lacks for an allocation, wherever it is.
    Missing(Purpose),
    /// The same for allocations to come: not from pages that the device has refused.
    Ahead,
    /// As much as asked for, from emptier places only; nothing if there are none.
    Roomy,
}

/// What became of a claim.
#[derive(Debug)]
enum Refill {
    /// The pool holds what was asked for.
    Enough,
    /// There is no more, as far as the device tells. What it refused last.
    Full(Option<StoreError>),
    /// The device refuses every page of a bitmap that was tried. What it said last.
    Refused(StoreError),
}

/// What an allocation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Anything.
    Normal,
    /// Work that gives space back (discards, deletes): may use the reserve (rule C6).
    GivesBack,
}

/// Where the allocator works.
#[derive(Clone, Debug)]
pub(crate) struct Territory {
    pub geometry: Geometry,
    pub records: Records,
    pub host: Uuid,
    pub generation: Generation,
}

/// Gives out and takes back blocks.
#[derive(Debug)]
pub struct Allocator {
    pub(crate) territory: Territory,
    pools: Mutex<Pools>,
    /// Extents of this host, by number.
    owned: RwLock<HashMap<u32, ExtentType>>,
    pages: tokio::sync::Mutex<Pages>,
    freed: Notify,
    /// Rung when the pool is low or overfull.
    housekeeping: Notify,
    unmapping: Unmapping,
}

#[derive(Debug, Default)]
struct Pools {
    data: FreeRuns,
    metadata: FreeRuns,
    /// To be clear in the BMap again.
    returning: Returning,
    /// What a pool keeps of what comes back.
    keep: u64,
    /// Allocated for a head that is not durable yet, or cut off with a write of unknown outcome.
    in_flight: RoaringTreemap,
    /// Claimed so that the device can be told that they are free, until it has answered.
    unmapping: RoaringTreemap,
    /// The cycle of collection that this host has acknowledged.
    cycle: Option<Cycle>,
}

impl Pools {
    fn of(&mut self, kind: ExtentType) -> &mut FreeRuns {
        match kind {
            ExtentType::Metadata => &mut self.metadata,
            _ => &mut self.data,
        }
    }
}

impl Allocator {
    /// An allocator over the extents that the catalogue gives to this host.
    ///
    /// # Errors
    /// The device's; an own extent that was claimed but not set up is set up first, or given back if the device does not take it.
    pub(crate) async fn open(
        io: &Io,
        territory: Territory,
        catalogue: Vec<View<ExtentRecord>>,
    ) -> Result<Self> {
        let mut pages = Pages::new(&territory, &catalogue);
        pages.finish_claims(io, &territory).await?;
        let owned = pages.owned_extents().collect();
        let allocator = Self {
            territory,
            pools: Mutex::default(),
            owned: RwLock::new(owned),
            pages: tokio::sync::Mutex::new(pages),
            freed: Notify::new(),
            housekeeping: Notify::new(),
            unmapping: Unmapping::default(),
        };
        allocator.pools.lock().keep = allocator.high_water() / 2;
        allocator.ensure_metadata(io).await?;
        Ok(allocator)
    }

    /// Blocks claimed at once.
    #[must_use]
    pub fn claim_blocks(&self) -> u64 {
        (self.territory.geometry.extent_blocks / 16).min(CLAIM_MAX)
    }

    /// Metadata blocks kept for work that gives space back.
    fn reserve(&self, kind: ExtentType, purpose: Purpose) -> u64 {
        if kind == ExtentType::Metadata && purpose == Purpose::Normal {
            (self.territory.geometry.extent_blocks / 32).clamp(4, 512)
        } else {
            0
        }
    }

    /// True if the block lies in an extent of this host.
    #[must_use]
    pub fn owns(&self, gba: Gba) -> bool {
        self.owned.read().contains_key(&self.territory.geometry.extent_of(gba))
    }

    /// Allocates `blocks` blocks, contiguous where possible, sorted by address. Waits for space as long
    /// as `io` is patient.
    ///
    /// A device that takes no bitmap at all is waited for, too, without the lock of these.
    ///
    /// # Errors
    /// `NoSpace` when patience ends, `Closing`, the device's.
    pub async fn allocate(
        self: &Arc<Self>,
        io: &Io,
        kind: ExtentType,
        blocks: u64,
        purpose: Purpose,
    ) -> Result<Vec<Run>> {
        let started = tokio::time::Instant::now();
        let mut waiting = None;
        let mut refusals = None;
        if self.wants_fresh(kind, blocks) {
            self.refill(io, kind, blocks, Claim::Roomy).await?;
        }
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            if let Some(runs) = self.try_take(kind, blocks, purpose) {
                return Ok(runs);
            }
            let refill = self.refill(io, kind, blocks, Claim::Missing(purpose)).await?;
            let wanted = blocks + self.reserve(kind, purpose);
            if matches!(refill, Refill::Enough) || self.draw(kind, wanted) {
                continue;
            }
            let refusal = match refill {
                Refill::Enough => continue,
                Refill::Refused(error) => {
                    // That there is no room is not known.
                    waiting = None;
                    if self.withdraw(kind, wanted) {
                        continue;
                    }
                    let refusals = refusals.get_or_insert_with(|| io.attempts());
                    let pause = refusals.refused(refused(io, error));
                    tokio::pin!(pause);
                    // What is freed needs no bitmap. The device is not asked again for each of these.
                    loop {
                        tokio::select! {
                            biased;
                            paused = &mut pause => break paused?,
                            () = &mut freed => freed.set(self.freed.notified()),
                        }
                        if self.has_room(kind, wanted) {
                            break;
                        }
                    }
                    continue;
                }
                Refill::Full(refusal) => refusal,
            };
            let left_out = refusal.as_ref().map(|error| error.message.clone());
            refusals = None;
            if self.withdraw(kind, wanted) {
                continue;
            }
            // A thin device that is full takes what it has once more, and nothing new.
            let refusal = refusal.filter(|error| error.kind == StoreErrorKind::NoSpace);
            let refusal = refusal.map(|error| refused(io, error));
            let space = match &refusal {
                Some(error) => {
                    io.note_full(error);
                    Lacking::OnDevice
                }
                None => Lacking::InStore,
            };
            if let Patience::Limited(limit) = io.patience()
                && started.elapsed() >= limit.min(SPACE_POLL)
            {
                return Err(refusal.unwrap_or_else(|| self.full(io, kind, blocks, left_out)));
            }
            if waiting.as_ref().is_none_or(|waiter: &SpaceWaiter| waiter.space() != space) {
                tracing::warn!(store = io.url(), ?kind, blocks, ?space, "no space left");
                waiting = Some(io.waiting_for(space));
            }
            tokio::select! {
                biased;
                () = io.closed() => return Err(io.closing_error()),
                () = &mut freed => {}
                () = tokio::time::sleep(SPACE_POLL) => {}
            }
        }
    }

    /// The pool holds so much, or what is to go back does, or a cycle that can be given up for it.
    fn has_room(&self, kind: ExtentType, wanted: u64) -> bool {
        self.pools.lock().of(kind).total() >= wanted
            || self.draw(kind, wanted)
            || self.withdraw(kind, wanted)
    }

    /// The error for a store without room; `left_out` is what the device said of free space that it does not let be used.
    fn full(&self, io: &Io, kind: ExtentType, blocks: u64, left_out: Option<String>) -> StoreError {
        let left_out = left_out.map_or_else(String::new, |error| {
            format!(
                "; some of it may be free, and is left out as the device does not read or write what describes it, see to the \
                 device: {error}"
            )
        });
        let what = if kind == ExtentType::Metadata { "metadata" } else { "data" };
        StoreError::new(
            StoreErrorKind::NoSpace,
            io.url(),
            format!(
                "the store has no {blocks} free {what} blocks left; delete virtual disks or \
                 discard unused data in the guests{left_out}"
            ),
        )
    }

    /// A large allocation for which the pool has only fragments: one write for each costs more than a claim.
    fn wants_fresh(&self, kind: ExtentType, blocks: u64) -> bool {
        blocks >= LARGE
            && self.pools.lock().of(kind).is_scattered(blocks, (blocks / RUN_WANTED) as usize)
    }

    /// Takes from the pool; `None` if it holds too little.
    fn try_take(&self, kind: ExtentType, blocks: u64, purpose: Purpose) -> Option<Vec<Run>> {
        let mut pools = self.pools.lock();
        let pool = pools.of(kind);
        if pool.total() < blocks + self.reserve(kind, purpose) {
            return None;
        }
        let runs = pool.take(blocks)?;
        if pool.total() < self.claim_blocks() / 2 {
            self.housekeeping.notify_one();
        }
        Self::note_in_flight(&mut pools, &runs);
        Some(runs)
    }

    /// Claims what an allocation lacks.
    ///
    /// In a task of its own: BMap pages are written in place, so a write that a caller stopped waiting
    /// for must end before the next one of the same page starts, or it might land after it.
    async fn refill(
        self: &Arc<Self>,
        io: &Io,
        kind: ExtentType,
        blocks: u64,
        claim: Claim,
    ) -> Result<Refill> {
        let (this, patient) = (Arc::clone(self), io.with_patience(Patience::Forever));
        let task =
            tokio::spawn(async move { this.refill_now(&patient, kind, blocks, claim).await });
        io.await_task(task).await
    }

    async fn refill_now(
        &self,
        io: &Io,
        kind: ExtentType,
        blocks: u64,
        claim: Claim,
    ) -> Result<Refill> {
        let mut pages = tokio::select! {
            biased;
            () = io.closed() => return Err(io.closing_error()),
            pages = self.pages.lock() => pages,
        };
        let have = self.pools.lock().of(kind).total();
        let (mut refusal, mut is_refused) = (None, false);
        let (wanted, claimed) = match claim {
            Claim::Missing(_) | Claim::Ahead => {
                let (reserve, is_needed) = match claim {
                    Claim::Missing(purpose) => (self.reserve(kind, purpose), true),
                    _ => (0, false),
                };
                let missing = (blocks + reserve).saturating_sub(have);
                if missing == 0 {
                    return Ok(Refill::Enough);
                }
                let ahead = missing.max(self.claim_blocks());
                let least = if is_needed { missing } else { 0 };
                let claimed = pages.claim(io, &self.territory, kind, least, ahead).await?;
                (refusal, is_refused) = (claimed.refusal, claimed.is_refused);
                (blocks + reserve, claimed.runs)
            }
            Claim::Roomy => {
                let ahead = blocks.max(self.claim_blocks());
                (blocks, pages.claim_roomy(io, &self.territory, kind, ahead, RUN_WANTED / 2).await?)
            }
        };
        self.refresh_owned(&pages);
        let mut pools = self.pools.lock();
        for run in claimed {
            if let Some(cycle) = &mut pools.cycle {
                cycle.touch(run);
            }
            add(pools.of(kind), run);
        }
        Ok(match refusal {
            _ if pools.of(kind).total() >= wanted => Refill::Enough,
            Some(error) if is_refused => Refill::Refused(error),
            refusal => Refill::Full(refusal),
        })
    }

    /// Takes back blocks that nothing can reach any more. Blocks of extents that are not this host's
    /// are left to GC.
    pub fn free(&self, blocks: Vec<Gba>) {
        let owned = self.owned.read();
        let mut pools = self.pools.lock();
        for run in merge(blocks) {
            if !self.territory.geometry.is_allocatable(run.start) {
                tracing::error!(block = %run.start, "a block that is no tree block was to be freed");
                continue;
            }
            // A run never spans extents: each starts with a header.
            pools.in_flight.remove_range(run.start.0..run.start.0 + run.blocks);
            let extent = self.territory.geometry.extent_of(run.start);
            let Some(&kind) = owned.get(&extent) else { continue };
            if pools.returning.of(kind).overlaps(run) {
                twice(run);
                continue;
            }
            if let Some(cycle) = &mut pools.cycle {
                cycle.touch(run);
                if let Some(quarantine) = cycle.quarantine() {
                    quarantine.add(kind, run);
                    continue;
                }
            }
            add(pools.of(kind), run);
        }
        if pools.is_quarantine_overfull() {
            tracing::warn!(
                "a cycle of garbage collection is given up: too much is freed beside it"
            );
            pools.give_up_cycle();
        }
        let high = self.high_water();
        if pools.data.total() > high || pools.metadata.total() > high || pools.may_return() {
            self.housekeeping.notify_one();
        }
        drop(pools);
        self.freed.notify_waiters();
    }

    /// Gives back blocks that were allocated but never used.
    pub fn put_back(&self, runs: &[Run]) {
        self.free(runs.iter().flat_map(|run| run.iter()).collect());
    }

    /// Above this, free blocks are released to the BMap: a few claims, or what a large commit needs.
    fn high_water(&self) -> u64 {
        let share = self.territory.geometry.total_blocks() / 64;
        (self.claim_blocks() * 2).max(share.min(POOL_MAX))
    }

    /// True if the pool holds more than it should.
    #[must_use]
    pub fn is_overfull(&self) -> bool {
        let pools = self.pools.lock();
        pools.data.total().max(pools.metadata.total()) > self.high_water()
    }

    /// Resolves when [`housekeep`](Self::housekeep) has something to do.
    pub async fn wants_housekeeping(&self) {
        self.housekeeping.notified().await;
    }

    /// Claims ahead of need when the pool is low; releases fragments when it is overfull, one part of them: it wants to be called
    /// again while there are more.
    ///
    /// # Errors
    /// The device's, `Closing`.
    pub async fn housekeep(self: &Arc<Self>, io: &Io) -> Result<()> {
        for kind in [ExtentType::Data, ExtentType::Metadata] {
            let (total, may_return) = {
                let mut pools = self.pools.lock();
                let total = pools.of(kind).total();
                if total > self.high_water() {
                    let shed = pools.of(kind).shed(self.high_water() / 2);
                    pools.let_go(kind, shed);
                }
                (total, pools.may_return())
            };
            if may_return {
                let is_more = self.return_part(io, kind).await;
                if !matches!(is_more, Ok(false)) {
                    self.housekeeping.notify_one();
                }
                is_more?;
            }
            if total < self.claim_blocks() / 2 && self.owns_any(kind) {
                self.refill(io, kind, self.claim_blocks(), Claim::Ahead).await?;
            }
        }
        Ok(())
    }

    fn owns_any(&self, kind: ExtentType) -> bool {
        self.owned.read().values().any(|&k| k == kind)
    }

    /// Releases everything in the pool: the last act of an orderly close.
    ///
    /// # Errors
    /// The device's, `Closing`.
    pub async fn release_all(&self, io: &Io) -> Result<()> {
        for kind in [ExtentType::Data, ExtentType::Metadata] {
            {
                let mut pools = self.pools.lock();
                pools.give_up_cycle();
                let shed = pools.of(kind).shed(0);
                pools.let_go(kind, shed);
            }
            while self.return_part(io, kind).await? {}
        }
        Ok(())
    }

    fn refresh_owned(&self, pages: &Pages) {
        let mut owned = self.owned.write();
        // One extent may have been given up and another claimed since.
        let known = |(number, kind)| owned.get(&number) == Some(&kind);
        if owned.len() != pages.owned_count() || !pages.owned_extents().all(known) {
            *owned = pages.owned_extents().collect();
        }
    }

    /// Makes sure that data cannot take the last extent: this host always has one for metadata. But for a thin device that is full:
    /// what gives it space again (collecting, discards, unmapping) needs a store that is open.
    async fn ensure_metadata(&self, io: &Io) -> Result<()> {
        let mut attempts = io.attempts();
        while !self.owns_any(ExtentType::Metadata) {
            let claim = Claim::Missing(Purpose::GivesBack);
            match self.refill_now(io, ExtentType::Metadata, 1, claim).await? {
                Refill::Refused(error) if error.kind == StoreErrorKind::NoSpace => {
                    let error = refused(io, error);
                    tracing::warn!(%error, "this host has no extent for metadata: commits wait until it gets one");
                    break;
                }
                Refill::Refused(error) => attempts.refused(refused(io, error)).await?,
                Refill::Enough | Refill::Full(_) => break,
            }
        }
        Ok(())
    }

    /// Blocks in the pool, or on the way from there to the BMap: (data, metadata).
    #[must_use]
    pub fn pooled(&self) -> (u64, u64) {
        let pools = self.pools.lock();
        let Pools { data, metadata, returning, .. } = &*pools;
        (data.total() + returning.data.total(), metadata.total() + returning.metadata.total())
    }
}

/// The error for a device that refuses everything.
fn refused(io: &Io, error: StoreError) -> StoreError {
    let words = format!(
        "the device refuses what allocating blocks takes, wherever that was tried; see to it (is it write-protected, full, or \
         failing?), then retry: {}",
        error.message
    );
    StoreError { message: words, ..error.about(format!("{}, bitmaps", io.url())) }
}

fn add(pool: &mut FreeRuns, run: Run) {
    if !pool.add(run) {
        twice(run);
    }
}
