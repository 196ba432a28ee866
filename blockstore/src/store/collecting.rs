//! Garbage collection, as far as the store's format and this host's allocator are concerned: see docs/garbage-collection.md.
//!
//! One cycle, in the order of its writes:
//! 1. this host begins to note what it touches, and keeps what it frees in quarantine; GC record: next epoch, *prepare*; own
//!    host record: the epoch is acknowledged; GC record: *mark*;
//! 2. the caller reads roots, which are made durable, and marks what they reach (`gc` does); if it marks in several passes, a
//!    reclaim bitmap per own extent of all passes but the last, durably;
//! 3. GC record: *sweep*; a reclaim bitmap per own extent in which anything was not reached, durably; GC record: *done*;
//! 4. once nobody reads, or has yet to free, what was cut off before the roots were read: these bitmaps are applied.
//!
//! Cut off anywhere, a cycle is abandoned: the next has another epoch, and nothing but a finished cycle of this very
//! incarnation is applied.

use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::bitmap::{BitmapKind, BitmapPage, PAGE_BITS, WORD_BITS};
use crate::format::extent::ExtentType;
use crate::format::gc::{GcPhase, GcRecord};
use crate::format::head::Damage;
use crate::format::vdi::VdiHead;
use crate::io::{Write, now_ms};
use crate::sabotage::{self, Bug};
use crate::slot::{Slot, Swap, View};
use crate::store::Store;
use crate::tree::Reader;
use crate::types::{Gba, Generation};
use bytes::Bytes;
use serde::Serialize;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Extents whose reclaim bitmaps are written together, with one flush: at most 4.3 MiB.
const PUBLISHED_AT_ONCE: usize = 64;
/// Extents whose reclaim bitmaps are applied together. Allocations that need a claim wait so long.
const APPLIED_AT_ONCE: usize = 16;

/// How often it is looked, while a cycle waits, for heads of which it is not known what became of them.
const SETTLE_PAUSE: Duration = Duration::from_secs(1);

/// How often the registry is read until nobody has changed it meanwhile.
const SCANS_MAX: usize = 16;

/// What a cycle gave back, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Reclaimed {
    /// Blocks of virtual disks.
    pub data: u64,
    /// Nodes, lists of snapshots, names.
    pub metadata: u64,
}

/// What became of a cycle.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// What it gave back.
    pub reclaimed: Reclaimed,
    /// Extents that it left to the next one, because the device did not read or write what describes them.
    pub extents_left_out: u64,
    /// What it said about the last of those.
    pub last_left_out: Option<String>,
}

impl Swept {
    fn leave_out(&mut self, extent: u32, why: &dyn fmt::Display) {
        tracing::warn!(extent, %why, "garbage collection leaves this extent to the next cycle");
        self.extents_left_out += 1;
        self.last_left_out = Some(format!("extent {extent}: {why}"));
    }
}

/// A cycle under way. Dropped, it is abandoned.
#[derive(Debug)]
pub struct Collection {
    store: Arc<Store>,
    record: View<GcRecord>,
    epoch: u64,
    extents: Vec<Extent>,
    /// Those with a reclaim bitmap of this cycle.
    named: Vec<Extent>,
    swept: Swept,
}

/// Tells whether a cycle goes on.
#[derive(Clone, Debug)]
pub struct CycleCheck {
    store: Arc<Store>,
    epoch: u64,
}

impl CycleCheck {
    /// Makes sure that the cycle goes on.
    ///
    /// # Errors
    /// `NoSpace` if this host needed what it had in quarantine.
    pub fn check(&self) -> Result<()> {
        self.store.core.allocator()?.check_cycle(self.epoch)
    }
}

/// An extent of this host, as it was when the cycle began.
#[derive(Clone, Copy, Debug)]
struct Extent {
    number: u32,
    kind: ExtentType,
    sequence: u64,
    generation: Generation,
}

impl Store {
    /// The GC record: which cycle there was last, and how far it came.
    ///
    /// # Errors
    /// The device's; `Damaged` if it fails its checks.
    pub async fn gc_record(&self) -> Result<GcRecord> {
        let view = self.read_gc().await?;
        view.record().cloned().ok_or_else(|| self.bad_gc_record())
    }

    async fn read_gc(&self) -> Result<View<GcRecord>> {
        let slot = Slot { first: Gba(self.core.superblock.geometry.gc_start), paired: true };
        self.core.records.read(&self.control_io, slot).await
    }

    fn bad_gc_record(&self) -> StoreError {
        let words = "the record of garbage collection is damaged; nothing is collected. 'ballast store check' says more";
        StoreError::new(StoreErrorKind::Damaged, self.url(), words)
    }

    /// Begins a cycle: the steps under 1.
    ///
    /// # Errors
    /// `InUse` if one is under way; `ReadOnly`; `Damaged`, also if the registry has a gap, behind which there are disks that
    /// nobody sees; `Unreachable` if a head of this host's was not raised since the store was opened; the device's.
    pub async fn begin_collection(self: &Arc<Self>) -> Result<Collection> {
        let began = self.change(|store| async move { store.begin_collection_now().await });
        let mut cycle = began.await?;
        // Without the registry: others need that, and sectors that the device does not read may take it long.
        cycle.find_extents().await?;
        Ok(cycle)
    }

    async fn begin_collection_now(self: &Arc<Self>) -> Result<Collection> {
        let writer = self.core.writer()?;
        let (host, generation) = (writer.host, writer.generation);
        self.refuse_gap().await?;
        self.raise_all().await?;
        self.settle_heads().await;
        let record = self.read_gc().await?;
        let before = record.record().ok_or_else(|| self.bad_gc_record())?;
        let epoch = before.epoch + 1;
        self.core.allocator()?.begin_cycle(epoch).await?;
        let store = Arc::clone(self);
        // From here on, dropping it ends the cycle here.
        let (extents, named) = (Vec::new(), Vec::new());
        let swept = Swept::default();
        let mut cycle = Collection { store, record, epoch, extents, named, swept };
        let next = |phase| GcRecord {
            epoch,
            phase,
            leader: Some(host),
            leader_generation: generation,
            progress_ms: now_ms(),
        };
        cycle.write_record(next(GcPhase::Prepare)).await?;
        self.update_host_now(|host| host.gc_epoch_acknowledged = epoch).await?;
        cycle.write_record(next(GcPhase::Mark)).await?;
        Ok(cycle)
    }
}

impl Store {
    async fn roots_now(&self) -> Result<Vec<View<VdiHead>>> {
        for _ in 0..SCANS_MAX {
            let mut roots = Vec::new();
            for (slot, view) in self.scan_vdis().await? {
                if view.record().is_none() {
                    return Err(StoreError::new(
                        StoreErrorKind::Damaged,
                        format!("{}, VDI record in slot {slot}", self.url()),
                        "it is damaged, and what its disk holds is not known: nothing is collected. \
                         'ballast store check' says more",
                    ));
                }
                roots.push(view);
            }
            // What an attached disk's own head was before is settled by its next write, and stays until then.
            let others = |view: &&View<VdiHead>| {
                view.record().is_some_and(|head| self.attached_here(head).is_none())
            };
            let others: Vec<_> = roots.iter().filter(others).cloned().collect();
            if self.core.records.seal(&self.core.io, &others).await? {
                return Ok(roots);
            }
        }
        Err(StoreError::new(
            StoreErrorKind::InUse,
            format!("{}, VDI registry", self.url()),
            "other hosts keep changing disks while it is read; the next cycle tries again",
        ))
    }
}

impl Drop for Collection {
    fn drop(&mut self) {
        if let Ok(allocator) = self.store.core.allocator() {
            allocator.end_cycle(self.epoch);
        }
    }
}

impl Collection {
    /// The cycle's number.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The store that is collected.
    #[must_use]
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// The extents that are collected: those of this host whose records can be read.
    async fn find_extents(&mut self) -> Result<()> {
        let core = &self.store.core;
        let host = core.writer()?.host;
        let catalogue = self.store.scan_extents_readable().await?;
        core.allocator()?.learn_unread(&catalogue).await;
        for (number, view) in (0..).zip(&catalogue) {
            if view.is_unreadable() {
                let why = format!("its record (block {}): {}", view.slot.first, Damage::Unreadable);
                self.swept.leave_out(number, &why);
            }
            let Some(record) = view.record() else { continue };
            if record.owner == Some(host) && record.ready {
                let (kind, sequence) = (record.kind, view.sequence());
                let generation = record.owner_generation;
                self.extents.push(Extent { number, kind, sequence, generation });
            }
        }
        Ok(())
    }

    /// Reads checked nodes; gives up when the device does not answer.
    #[must_use]
    pub fn reader(&self) -> Reader {
        self.store.reader()
    }

    /// The registry as it is now, durably: none of these heads goes back to the one before it. To be read before anything is
    /// marked, and once more afterwards (rule G3).
    ///
    /// # Errors
    /// The device's; `Damaged` if a record cannot be read: what it reaches is not known.
    pub async fn roots(&self) -> Result<Vec<View<VdiHead>>> {
        // Only disks that are attached here change meanwhile.
        self.store.change(|store| async move { store.roots_now().await }).await
    }

    /// Makes sure that the cycle goes on.
    ///
    /// # Errors
    /// As [`CycleCheck::check`].
    pub fn check(&self) -> Result<()> {
        self.checker().check()
    }

    /// Asks later whether the cycle goes on.
    #[must_use]
    pub fn checker(&self) -> CycleCheck {
        CycleCheck { store: Arc::clone(&self.store), epoch: self.epoch }
    }

    /// How many extents of data, and of metadata, are collected from this one on; metadata from the first on.
    #[must_use]
    pub fn extents_from(&self, first: u32) -> (u64, u64) {
        let is_metadata = |extent: &&Extent| extent.kind == ExtentType::Metadata;
        let metadata = self.extents.iter().filter(is_metadata).count();
        let left = self.extents.iter().filter(|extent| extent.number >= first);
        (left.filter(|extent| !is_metadata(extent)).count() as u64, metadata as u64)
    }

    /// Notes what is not reached in some extents, so that the marks of these need not be kept: their reclaim bitmaps are
    /// written. For all of step 2; nothing is given back before [`sweep`](Self::sweep). `reached` is as there.
    ///
    /// # Errors
    /// As [`check`](Self::check), the device's.
    pub async fn note_window(
        &mut self,
        window: Range<u32>,
        reached: &(impl Fn(Gba) -> u64 + Sync),
    ) -> Result<()> {
        self.check()?;
        let mut group = Vec::new();
        for extent in self.extents.iter().filter(|extent| window.contains(&extent.number)) {
            group.extend(self.reclaim_pages(*extent, reached).map(|write| (*extent, write)));
            if group.len() == PUBLISHED_AT_ONCE {
                let group = std::mem::take(&mut group);
                self.named.extend(write_pages(&self.store, group, &mut self.swept).await?);
            }
        }
        self.named.extend(write_pages(&self.store, group, &mut self.swept).await?);
        Ok(())
    }

    /// Steps 3 and 4: gives back what is not reached in the extents of this window, and of those that were noted before.
    /// `reached` tells of 64 blocks from the one it is asked for on, which is a multiple of as many; the first is the lowest
    /// bit. Waits at most `patience` for readers of what was cut off before.
    ///
    /// # Errors
    /// `NoSpace` as [`check`](Self::check), `InUse` if another host leads a cycle now or readers take too long, the device's.
    /// What was not given back leaks until the next cycle. That single extents had to be left out is none.
    pub async fn sweep(
        mut self,
        window: Range<u32>,
        reached: impl Fn(Gba) -> u64 + Send + Sync + 'static,
        patience: Duration,
    ) -> Result<Swept> {
        let store = Arc::clone(&self.store);
        // As a task that nobody stops: pages are written in place.
        let task = tokio::spawn(async move {
            // The roots were read and marked: what is cut off from here on was reached.
            self.check()?;
            self.store.core.allocator()?.end_quarantine(self.epoch)?;
            self.go_to(GcPhase::Sweep).await?;
            self.note_window(window, &reached).await?;
            self.go_to(GcPhase::Done).await?;
            self.apply(patience).await
        });
        store.core.io.await_task(task).await
    }

    /// An extent's reclaim bitmap; none if all of its blocks were reached. A bitmap of another cycle names nothing in this one.
    fn reclaim_pages(&self, extent: Extent, reached: &impl Fn(Gba) -> u64) -> Option<Write> {
        let g = &self.store.core.superblock.geometry;
        let base = g.extent_base(extent.number);
        let mut any = false;
        let pages = (0..g.bmap_pages()).map(|page| {
            let address = g.reclaim_page(extent.number, page);
            let mut content = BitmapPage::clear().with_sequence(self.epoch);
            content.gc_epoch = self.epoch;
            content.extent_sequence = extent.sequence;
            content.owner_generation = extent.generation.0;
            let start = base.plus(u64::from(page) * PAGE_BITS);
            for bit in (0..g.page_bits(page)).step_by(WORD_BITS as usize) {
                let first = start.plus(bit);
                let word = g.allocatable_word(first) & !reached(first);
                any |= word != 0;
                content.set_word(bit, word);
            }
            (content, address)
        });
        let pages: Vec<_> = pages.collect();
        let encode = |(content, address): (BitmapPage, Gba)| {
            Bytes::from(content.encode(BitmapKind::Reclaim, self.store.uuid(), address))
        };
        any.then(|| (g.reclaim_page(extent.number, 0), pages.into_iter().map(encode).collect()))
    }

    /// Step 4.
    async fn apply(&mut self, patience: Duration) -> Result<Swept> {
        self.wait_for_readers(patience).await?;
        let store = Arc::clone(&self.store);
        self.check()?;
        for group in self.named.chunks(APPLIED_AT_ONCE) {
            let numbers = group.iter().map(|extent| extent.number).collect();
            let allocator = store.core.allocator()?;
            let outcomes = allocator.apply(&store.core.io, numbers, self.epoch).await?;
            for (extent, outcome) in group.iter().zip(outcomes) {
                let reclaimed = &mut self.swept.reclaimed;
                match outcome {
                    Ok(freed) if extent.kind == ExtentType::Metadata => reclaimed.metadata += freed,
                    Ok(freed) => reclaimed.data += freed,
                    Err(error) if error.kind == StoreErrorKind::Closing => return Err(error),
                    // One bad extent does not keep the others from being collected.
                    Err(error) => self.swept.leave_out(extent.number, &error),
                }
            }
        }
        Ok(std::mem::take(&mut self.swept))
    }

    /// Waits until nobody reads, or has yet to free, what was cut off before this moment.
    async fn wait_for_readers(&self, patience: Duration) -> Result<()> {
        let core = &self.store.core;
        let writer = core.writer()?;
        let era = writer.reclaimer.eras().turn();
        if sabotage::on(Bug::CollectUnderReaders) {
            return Ok(());
        }
        // A disk that waits for room must not be what this waits for.
        let over = async {
            while tokio::time::timeout(SETTLE_PAUSE, writer.reclaimer.eras().over(era))
                .await
                .is_err()
            {
                self.store.settle_heads().await;
            }
        };
        let over = tokio::time::timeout(patience, over);
        let over = tokio::select! {
            biased;
            () = core.io.closed() => return Err(core.io.closing_error()),
            over = over => over,
        };
        over.map_err(|_| {
            StoreError::new(
                StoreErrorKind::InUse,
                format!("{}, garbage collection, cycle {}", core.io.url(), self.epoch),
                format!(
                    "given up: what was cut off before was still read, or being freed, after {} s; \
                     the next cycle takes it up",
                    patience.as_secs()
                ),
            )
        })
    }

    async fn go_to(&mut self, phase: GcPhase) -> Result<()> {
        let Some(record) = self.record.record().cloned() else {
            return Err(self.store.bad_gc_record());
        };
        self.write_record(GcRecord { phase, progress_ms: now_ms(), ..record }).await
    }

    async fn write_record(&mut self, next: GcRecord) -> Result<()> {
        let core = &self.store.core;
        // In a store for a single host its second place may never have been written.
        match core.records.swap(&core.io.unless_full(), &self.record, next).await? {
            Swap::Done(view) => self.record = view,
            Swap::Lost(_) => {
                return Err(StoreError::new(
                    StoreErrorKind::InUse,
                    format!("{}, garbage collection, cycle {}", core.io.url(), self.epoch),
                    "another host has begun a cycle; this one is abandoned",
                ));
            }
        }
        Ok(())
    }
}

/// Writes reclaim bitmaps with one flush; the extents of those that are durable. One that lies on a bad sector does not keep the
/// others from being collected.
///
/// # Errors
/// `Closing`, and what concerns the device as a whole.
async fn write_pages(
    store: &Store,
    group: Vec<(Extent, Write)>,
    swept: &mut Swept,
) -> Result<Vec<Extent>> {
    let (extents, writes): (Vec<Extent>, Vec<Write>) = group.into_iter().unzip();
    if extents.is_empty() {
        return Ok(extents);
    }
    // With limited patience: a page that lands late names a cycle that nobody asks for any more.
    let refused = store.control_io.giving_up().write_taken(&writes, true).await?;
    for (index, error) in &refused {
        swept.leave_out(extents[*index].number, error);
    }
    let is_refused = |place: usize| refused.iter().any(|(index, _)| *index == place);
    let written = extents.into_iter().enumerate().filter(|(place, _)| !is_refused(*place));
    Ok(written.map(|(_, extent)| extent).collect())
}
