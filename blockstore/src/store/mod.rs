//! The store: open, close, and what concerns all of it.

mod collecting;
mod differences;
mod format;
mod hosts;
mod image;
mod info;
mod inspecting;
pub(crate) mod open;
mod registry;
mod repair;
mod rewind;
mod rollback;
mod snapshots;
mod unraised;
mod unsure;
mod verify;
pub(crate) mod walking;

pub use collecting::{Collection, CycleCheck, Reclaimed, Swept};
pub use differences::{CHANGES_MAX, Difference, ImageInfo};
pub use format::{FormatOptions, check_size, foreign_signature};
pub use image::SnapshotImage;
pub use info::{ExportReport, HostInfo, OwnerInfo, Space, StoreInfo, VdiInfo};
pub use inspecting::Inspection;
pub use open::OpenOptions;
pub use registry::AttachOptions;
pub(crate) use registry::write_meta;
pub use repair::{Fingerprint, Held, REPAIR_HOST, Repairer};
pub use rewind::Rewound;
pub use rollback::LostLog;
pub use snapshots::{RegisteredClone, Thinned};
pub use verify::{Cure, Fix, TableProblem};
pub use walking::Walk;

use crate::alloc::Allocator;
use crate::alloc::unmap::{UnmapOptions, Unmapped};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::extent::ExtentRecord;
use crate::format::geometry::Geometry;
use crate::format::host::{HostRecord, HostState};
use crate::format::superblock::Superblock;
use crate::format::vdi::VdiHead;
use crate::holds::SnapshotHolds;
use crate::io::{Health, Io, Patience, Write, now_ms};
use crate::slot::{Content, Records, Slot, View};
use crate::tree::Reader;
use crate::tree::reclaim::Reclaimer;
use crate::types::{BLOCK_SIZE, Gba, Generation};
use crate::vdi::VdiInner;
use bytes::Bytes;
use hashbrown::HashMap;
use parking_lot::Mutex;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use uuid::Uuid;

/// VDI slots read at once.
const SCAN_SLOTS: u32 = 64;

/// What disks and the store share.
#[derive(Debug)]
pub(crate) struct Core {
    pub io: Io,
    pub superblock: Superblock,
    pub records: Records,
    pub reader: Reader,
    pub writer: Option<Writer>,
}

/// Present when the store is open for writing.
#[derive(Debug)]
pub(crate) struct Writer {
    pub host: Uuid,
    pub generation: Generation,
    pub reclaimer: Arc<Reclaimer>,
    /// Heads that the device did not write yet.
    pub unraised: Mutex<unraised::Unraised>,
}

impl Core {
    pub(crate) fn writer(&self) -> Result<&Writer> {
        self.writer.as_ref().ok_or_else(|| {
            StoreError::new(StoreErrorKind::ReadOnly, self.io.url(), "the store is open read-only")
        })
    }

    pub(crate) fn allocator(&self) -> Result<&Arc<Allocator>> {
        Ok(self.writer()?.reclaimer.allocator())
    }

    fn geometry(&self) -> &Geometry {
        &self.superblock.geometry
    }

    /// Writes what goes to blocks that were just allocated, durably. With limited `patience` a thin device that is full ends this after a
    /// moment, as a full store ends the allocation: who asks holds the registry, or a disk, and what would give space back needs
    /// these. The blocks are free again then, since nothing names them and none of their writes lands later.
    ///
    /// # Errors
    /// `NoSpace`, in the name of `object`; `Closing`, the device's: the blocks stay in flight.
    pub(crate) async fn write_fresh(
        &self,
        patience: &Io,
        object: &str,
        writes: &[Write],
    ) -> Result<()> {
        let io = match patience.patience() {
            Patience::Forever => self.io.clone(),
            Patience::Limited(_) => self.io.unless_full(),
        };
        let outcome = io.write_durable(writes).await;
        let Err(error) = outcome else { return Ok(()) };
        if error.kind == StoreErrorKind::NoSpace {
            let blocks = writes.iter().flat_map(|(start, pieces)| {
                let bytes: usize = pieces.iter().map(Bytes::len).sum();
                (start.0..start.0 + (bytes / BLOCK_SIZE) as u64).map(Gba)
            });
            self.allocator()?.free(blocks.collect());
        }
        Err(device_full(&format!("{object} in {}", self.io.url()), error))
    }
}

/// The error of a control operation; what to do about it, if it is that a thin device has no space.
pub(crate) fn device_full(object: &str, error: StoreError) -> StoreError {
    if error.kind != StoreErrorKind::NoSpace {
        return error;
    }
    let message = format!(
        "the device has no space for it, though the store has: it is thin, and full; extend it or free space on it, or let the store do \
         that ('ballast vdi delete' what is not needed, then 'ballast gc run'), then try again: {}",
        error.message
    );
    StoreError { message, ..error.about(object) }
}

/// An open store.
#[derive(Debug)]
pub struct Store {
    pub(crate) core: Arc<Core>,
    /// Reads for control operations: they fail when the device does not answer in time.
    control_io: Io,
    /// One change of the registry at a time.
    registry: tokio::sync::Mutex<()>,
    /// The registry as it was read last.
    latest: registry::Latest,
    attached: Mutex<HashMap<Uuid, Weak<VdiInner>>>,
    /// Snapshots that are not to be deleted.
    holds: Arc<SnapshotHolds>,
    background: Mutex<Option<Background>>,
}

#[derive(Debug)]
struct Background {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Store {
    /// The store's identity.
    #[must_use]
    pub fn uuid(&self) -> Uuid {
        self.core.records.store
    }

    /// The device's URL.
    #[must_use]
    pub fn url(&self) -> &str {
        self.core.io.url()
    }

    /// What the superblock says.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.core.superblock
    }

    /// How the device does, and whether operations wait for space.
    #[must_use]
    pub fn health(&self) -> Health {
        self.core.io.health()
    }

    /// True once it closes for good: whatever is still asked of it fails with `Closing`.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.core.io.is_closing()
    }

    /// Reads checked blocks and nodes, for tools: it gives up when the device does not answer.
    #[must_use]
    pub fn reader(&self) -> Reader {
        self.control_reader()
    }

    /// The snapshots that are held.
    #[must_use]
    pub fn holds(&self) -> &Arc<SnapshotHolds> {
        &self.holds
    }

    /// Resolves when everything that was cut off so far has been freed.
    pub async fn reclaimed(&self) {
        if let Some(writer) = &self.core.writer {
            writer.reclaimer.idle().await;
        }
    }

    /// Blocks that this host has claimed but not used: (data, metadata).
    #[must_use]
    pub fn pooled(&self) -> (u64, u64) {
        self.core.allocator().map_or((0, 0), |allocator| allocator.pooled())
    }

    /// Blocks that this host has allocated and no durable head names: of commits under way, or cut off with a write of
    /// unknown outcome; the latter are not collected before the store is opened anew.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.core.allocator().map_or(0, |allocator| allocator.in_flight())
    }

    /// Tells the device of the free blocks of this host's extents, all of which are its own to use and none of which it gives out
    /// meanwhile; returns what became of that since the store was opened. Dropped, it ends after what it has begun.
    ///
    /// # Errors
    /// `ReadOnly`, `Closing`, those of bitmaps and records. That the device refuses is counted, and is none.
    pub async fn unmap(&self, options: UnmapOptions) -> Result<Unmapped> {
        let allocator = self.core.allocator()?;
        allocator.unmap(&self.core.io, options).await?;
        Ok(allocator.unmapped())
    }

    /// What became of unmapping so far.
    #[must_use]
    pub fn unmapped(&self) -> Unmapped {
        self.core.allocator().map_or_else(|_| Unmapped::default(), |allocator| allocator.unmapped())
    }

    /// Blocks that are claimed only until the device has answered that it unmapped them.
    #[must_use]
    pub fn in_unmapping(&self) -> u64 {
        self.core.allocator().map_or(0, |allocator| allocator.in_unmapping())
    }

    /// Blocks that were freed since a cycle of collection, or a walk, began here, and cannot be used before its marking ends.
    #[must_use]
    pub fn quarantined(&self) -> u64 {
        self.core.allocator().map_or(0, |allocator| allocator.quarantined())
    }

    /// Every slot of the VDI registry that was ever used, by slot number.
    ///
    /// # Errors
    /// The device's; damaged records are content.
    pub async fn scan_vdis(&self) -> Result<Vec<(u32, View<VdiHead>)>> {
        scan_vdis(&self.core, &self.control_io).await
    }

    /// Reads one slot of the VDI registry.
    ///
    /// # Errors
    /// The device's.
    pub async fn read_vdi_slot(&self, slot: u32) -> Result<View<VdiHead>> {
        self.core.records.read(&self.control_io, vdi_slot(self.core.geometry(), slot)).await
    }

    /// The extent catalogue, by extent number.
    ///
    /// # Errors
    /// The device's; damaged records are content.
    pub async fn scan_extents(&self) -> Result<Vec<View<ExtentRecord>>> {
        open::scan_extents(&self.control_io, &self.core.records, self.core.geometry()).await
    }

    /// The same; records that the device lastingly does not read are damaged.
    async fn scan_extents_readable(&self) -> Result<Vec<View<ExtentRecord>>> {
        let (records, geometry) = (&self.core.records, self.core.geometry());
        open::scan_extents_readable(&self.control_io, records, geometry).await
    }

    /// The host table's used slots.
    ///
    /// # Errors
    /// The device's; damaged records are content.
    pub async fn scan_hosts(&self) -> Result<Vec<View<HostRecord>>> {
        hosts::scan(&self.control_io, &self.core.records, self.core.geometry()).await
    }

    /// Notes in the host record that this host is alive. For people only: no decision rests on it.
    ///
    /// # Errors
    /// The device's; `InUse` if the record was changed by another host.
    pub async fn heartbeat(self: &Arc<Self>) -> Result<()> {
        self.update_host(|record| record.heartbeat_ms = now_ms()).await
    }

    async fn update_host(
        self: &Arc<Self>,
        change: impl FnOnce(&mut HostRecord) + Send + 'static,
    ) -> Result<()> {
        self.change(|store| async move { store.update_host_now(change).await }).await
    }

    /// Runs a change of the registry or the host table as a task that nobody stops: a write in place
    /// that was given up half way might land after a later one. The caller waits only so long.
    ///
    /// It waits for the device as long as that is away, but not for space on it: a cycle of collection, which may give some back, needs
    /// the registry. So what it writes to places that a thin device may not have yet ends when that is full ([`Io::unless_full`]).
    async fn change<T, F, R>(self: &Arc<Self>, operation: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(Arc<Self>) -> R + Send + 'static,
        R: Future<Output = Result<T>> + Send,
    {
        let store = Arc::clone(self);
        let task = tokio::spawn(async move {
            let _guard = store.lock_registry().await?;
            operation(Arc::clone(&store)).await
        });
        self.control_io.await_task(task).await
    }

    async fn update_host_now(&self, change: impl FnOnce(&mut HostRecord)) -> Result<()> {
        let core = &self.core;
        let writer = core.writer()?;
        let hosts = self.scan_hosts().await?;
        let own = hosts.iter().find(|v| v.record().is_some_and(|r| r.uuid == writer.host));
        let Some((view, mut record)) = own.and_then(|v| Some((v, v.record()?.clone()))) else {
            return Err(self.lost_host("its record is gone"));
        };
        if record.generation != writer.generation || record.state != HostState::Up {
            return Err(self.lost_host("its record was taken over or marked down"));
        }
        change(&mut record);
        let swap = core.records.swap(&core.io.unless_full(), view, record).await?;
        swap.done(|| format!("{}, own host record", core.io.url()))?;
        Ok(())
    }

    fn lost_host(&self, what: &str) -> StoreError {
        StoreError::new(
            StoreErrorKind::NotOwner,
            self.url(),
            format!("this host no longer uses the store: {what}; restart the agent"),
        )
    }

    /// Waits for the registry as long as a control operation may take.
    async fn lock_registry(&self) -> Result<tokio::sync::MutexGuard<'_, ()>> {
        let limit = match self.control_io.patience() {
            Patience::Limited(limit) => limit,
            Patience::Forever => Duration::MAX,
        };
        tokio::time::timeout(limit, self.registry.lock()).await.map_err(|_| {
            StoreError::new(
                StoreErrorKind::Unreachable,
                self.url(),
                "another control operation still waits for the device; try again later",
            )
        })
    }

    /// Closes in an orderly way: releases unused claims and marks this host down. Attached disks stay
    /// attached to this host. Operations still under way fail with `Closing`; what was cut off and is
    /// not freed yet leaks until GC, unless [`reclaimed`](Self::reclaimed) was awaited before.
    ///
    /// # Errors
    /// The device's; the store is closed all the same, and what could not be written leaks until the
    /// garbage collector's next cycle.
    pub async fn close(self: &Arc<Self>) -> Result<()> {
        let Some(background) = self.background.lock().take() else {
            self.core.io.close();
            return Ok(());
        };
        background.stop.send_replace(true);
        let store = Arc::clone(self);
        let goodbye = tokio::spawn(async move {
            // An error means that the task was stopped with its runtime.
            let _ = background.task.await;
            store.say_goodbye().await
        });
        let outcome = self.control_io.await_task(goodbye).await;
        self.core.io.close();
        outcome
    }

    async fn say_goodbye(self: &Arc<Self>) -> Result<()> {
        self.core.allocator()?.stop_unmapping(&self.core.io).await;
        self.core.writer()?.reclaimer.release_claims(&self.core.io).await?;
        self.update_host(|record| {
            record.state = HostState::Down;
            record.heartbeat_ms = now_ms();
        })
        .await
    }
}

impl Drop for Store {
    /// Without [`close`](Store::close) this is like a crash: the next opening finds the host up.
    fn drop(&mut self) {
        self.core.io.close();
    }
}

fn vdi_slot(geometry: &Geometry, slot: u32) -> Slot {
    Slot { first: geometry.vdi_slot(slot), paired: true }
}

/// Slots are used lowest first and never become unused again, so the first unused one ends the scan.
async fn scan_vdis(core: &Core, io: &Io) -> Result<Vec<(u32, View<VdiHead>)>> {
    let slots = core.geometry().vdi_slots;
    let mut found = Vec::new();
    let mut next = 0;
    while next < slots {
        let count = SCAN_SLOTS.min(slots - next);
        let first = vdi_slot(core.geometry(), next);
        let views = core.records.read_run(io, first, u64::from(count)).await?;
        for (number, view) in (next..).zip(views) {
            if view.content == Content::Unused {
                return Ok(found);
            }
            found.push((number, view));
        }
        next += count;
    }
    Ok(found)
}
