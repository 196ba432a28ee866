//! The cache as the agent sees it: open, attach, drain, detach, close.

pub(crate) mod attach;
mod cloning;
mod loss;
pub(crate) mod replacing;
mod snapshots;
#[cfg(test)]
mod tests;

pub use self::cloning::NewClone;
pub use self::loss::{LogFinding, QuarantinedLog, Survey};
pub use self::snapshots::AsOf;

use crate::disk::AttachedDisk;
use crate::disk::plan::SegmentId;
use crate::error::CacheError;
use crate::flusher::FlushOptions;
use crate::format::Geometry;
use crate::format::segment::SegmentHeader;
use crate::format::slot::{DiskPolicy, SlotVdi, VdiSlot};
use crate::image::ImagePool;
use crate::local::{LegState, Local, Mode, Terms};
use crate::log_open::Ground;
use crate::pool::Pool;
use crate::vdi::{Attached, HydrateError, HydrateStatus, Leave, PinError, VdiHandle, VdiStatus};
use crate::witness::{Witness, WitnessSeat};
use blockstore::format::vdi::Origin;
use blockstore::sabotage::{self, Bug};
use blockstore::types::{BLOCK_SIZE, Lba, Lsn};
use blockstore::{Policy, PolicyChange};
use hashbrown::{HashMap, HashSet};
use parking_lot::Mutex;
use replacing::Replacing;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use uuid::Uuid;

/// How to open a cache.
#[derive(Clone, Debug)]
pub struct CacheOptions {
    /// The cache device or file; of a mirrored cache the first leg's, for messages.
    pub path: PathBuf,
    /// Create the file with so many bytes if it does not exist.
    pub create_size: Option<u64>,
    /// Pace of the flusher.
    pub flush: FlushOptions,
    /// Bytes of segment images kept in memory for the flusher, over all disks.
    pub image_bytes: usize,
}

/// Who a cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CacheIdentity {
    /// The cache.
    pub cache: Uuid,
    /// The host, as the store knows it.
    pub host: Uuid,
    /// The store it is bound to.
    pub store: Option<Uuid>,
}

/// A disk recorded as attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedRecord {
    /// The disk in the store.
    pub vdi: Uuid,
    /// Its name when it was attached.
    pub name: String,
    /// Its log.
    pub log_id: u128,
    /// Bytes.
    pub size_bytes: u64,
    /// It was served before, and is not behind the store: it can be attached from the local device alone.
    pub was_served: bool,
    /// It is a clone of this that the store may not know of yet.
    pub origin: Option<Origin>,
}

/// The disk to attach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdiIdentity {
    /// The disk in the store.
    pub uuid: Uuid,
    /// Its name.
    pub name: String,
    /// Bytes the guest sees.
    pub size_bytes: u64,
}

/// How full the cache is.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct CacheStatus {
    /// Bytes in segments.
    pub capacity: u64,
    /// Bytes in a segment.
    pub segment_size: u64,
    /// How many segments.
    pub segments: u32,
    /// Bytes in free segments.
    pub free_bytes: u64,
    /// Bytes in segments that are committed and can be evicted.
    pub clean_bytes: u64,
    /// Bytes in segments that hold or wait for uncommitted records.
    pub dirty_bytes: u64,
    /// Bytes of `clean_bytes` that belong to pinned disks.
    pub pinned_bytes: u64,
    /// Share of the segments that hold uncommitted records, 0 to 1; those that are pinned do not count.
    pub fill: f64,
}

/// See the module.
#[derive(Debug)]
pub struct Cache {
    options: CacheOptions,
    ground: Ground,
    images_held: Arc<AtomicUsize>,
    inner: tokio::sync::Mutex<Inner>,
    handles: Arc<Attached>,
    /// Disks on their way.
    attaching: Mutex<HashSet<Uuid>>,
    /// One clone is made at a time.
    cloning: tokio::sync::Mutex<()>,
    /// Logs that were given up and are kept.
    quarantined: Mutex<Vec<loss::Kept>>,
    /// The leg that is being filled, or was last.
    replacing: Mutex<Replacing>,
}

#[derive(Debug)]
struct Inner {
    slots: Vec<VdiSlot>,
    /// Segments found at start, by disk; taken when the disk is attached.
    found: HashMap<Uuid, Vec<SegmentHeader>>,
}

impl Cache {
    /// Opens the cache, creating it if it does not exist and a size is given. Holds it exclusively.
    pub async fn open(options: CacheOptions) -> Result<Arc<Self>, CacheError> {
        let legs = [options.path.clone()];
        Self::open_legs(options, &legs, &Terms::default()).await
    }

    /// As [`Self::open`], for a cache whose legs are at `paths`, one or two: see [`Local::open_legs`]. Notes
    /// the machine in the cache, with the name that it has now.
    pub async fn open_legs(
        options: CacheOptions,
        paths: &[PathBuf],
        terms: &Terms,
    ) -> Result<Arc<Self>, CacheError> {
        let mode = Mode::Serve { create_size: options.create_size };
        let local = Local::open_legs(paths, mode, terms).await?;
        if terms.machine.is_some() && local.superblock().await.machine != terms.machine {
            let machine = terms.machine.clone();
            local.rewrite_superblock(|superblock| superblock.machine = machine).await?;
        }
        Self::on_local(options, local).await
    }

    /// Who remembers logs that were left behind. To be said once, before any disk is attached.
    pub fn set_witness(&self, witness: Arc<dyn Witness>) {
        self.ground.witness.take(witness);
    }

    /// The devices that the cache is written to together, and what became of each.
    #[must_use]
    pub fn legs(&self) -> Vec<LegState> {
        self.ground.local.leg_states()
    }

    /// A cache on a device that is open already.
    pub async fn on_local(options: CacheOptions, local: Local) -> Result<Arc<Self>, CacheError> {
        let local = Arc::new(local);
        let slots = local.read_slots().await?;
        let headers = local.read_headers().await?;
        let Sorted { found, quarantined, free, next_seq } =
            sort_segments(&local.geometry, &slots, headers);
        let image_len = local.geometry.segment_size as usize;
        let images = ImagePool::new(image_len, (options.image_bytes / image_len).max(2));
        let pool = Arc::new(Pool::new(local.geometry, free, next_seq));
        for (vdi, headers) in &found {
            pool.adopt(*vdi, headers.iter().map(|header| header.segment));
        }
        let quarantined: Vec<_> = quarantined.into_values().collect();
        for kept in &quarantined {
            let owner = loss::owner_of(kept.record.log_id);
            pool.adopt(owner, kept.headers.iter().map(|header| header.segment));
            pool.quarantine(owner, owner);
        }
        let handles = Arc::<Attached>::default();
        Ok(Arc::new(Self {
            ground: Ground {
                local,
                pool,
                images,
                logs_opening: Arc::default(),
                witness: WitnessSeat::default(),
                attached: Arc::downgrade(&handles),
            },
            images_held: Arc::default(),
            options,
            inner: tokio::sync::Mutex::new(Inner { slots, found }),
            handles,
            attaching: Mutex::default(),
            cloning: tokio::sync::Mutex::default(),
            quarantined: Mutex::new(quarantined),
            replacing: Mutex::default(),
        }))
    }

    /// For so long an operation on one leg is waited for while another leg answers; for disks that are attached from now on.
    pub fn set_leg_timeout(&self, timeout: std::time::Duration) {
        self.ground.local.set_leg_timeout(timeout);
    }

    /// Who this cache is.
    pub async fn identity(&self) -> CacheIdentity {
        let superblock = self.ground.local.superblock().await;
        CacheIdentity { cache: superblock.cache, host: superblock.host, store: superblock.store }
    }

    /// Binds the cache to a store at its first use; afterwards refuses any other.
    pub async fn bind(&self, store: Uuid) -> Result<(), CacheError> {
        let bound = self.ground.local.superblock().await.store;
        match bound {
            Some(bound) if bound == store => Ok(()),
            Some(bound) => Err(CacheError::OtherStore {
                path: self.ground.local.path.clone(),
                bound,
                given: store,
            }),
            None => {
                self.ground
                    .local
                    .rewrite_superblock(|superblock| superblock.store = Some(store))
                    .await
            }
        }
    }

    /// Disks recorded as attached, to be brought back at start.
    pub async fn attached(&self) -> Vec<AttachedRecord> {
        let inner = self.inner.lock().await;
        let vdis = inner.slots.iter().filter_map(|slot| slot.vdi.as_ref());
        vdis.map(|vdi| AttachedRecord {
            vdi: vdi.uuid,
            name: vdi.name.clone(),
            log_id: vdi.log_id,
            size_bytes: vdi.size_bytes,
            origin: vdi.origin.map(|origin| origin.snapshot),
            was_served: vdi.epoch > 0 && matches!(self.ground.left_behind(vdi), Ok(None)),
        })
        .collect()
    }

    /// Gives a disk a log, durably, before it is attached in the store (rule L6). Returns the log's id; a disk that has
    /// one already keeps it.
    pub async fn reserve(&self, vdi: &VdiIdentity) -> Result<u128, CacheError> {
        let mut inner = self.inner.lock().await;
        let known = inner.slots.iter().filter_map(|slot| slot.vdi.as_ref());
        if let Some(record) = known.into_iter().find(|record| record.uuid == vdi.uuid) {
            return Ok(record.log_id);
        }
        let counts = self.ground.pool.counts();
        if counts.free + counts.clean < 2 {
            return Err(CacheError::NoSegments { free: counts.free });
        }
        self.ground.local.note_members().await?;
        let slots = self.ground.local.geometry.slots;
        let free = inner.slots.iter_mut().find(|slot| slot.is_free());
        let slot = free.ok_or(CacheError::NoSlot { slots })?;
        let log_id = Uuid::new_v4().as_u128();
        let next = slot.next(Some(SlotVdi {
            uuid: vdi.uuid,
            log_id,
            name: vdi.name.clone(),
            size_bytes: vdi.size_bytes,
            committed: Lsn(0),
            evicted_below: self.ground.pool.next_seq(),
            sequence_seen: self.ground.pool.next_seq(),
            epoch: 0,
            first_lsn: Lsn(1),
            durable: Lsn(0),
            alone_from: None,
            cuts: Vec::new(),
            origin: None,
            has_cuts: false,
            policy: DiskPolicy::default(),
            left_behind: None,
            boot_trace: Vec::new(),
        }));
        self.ground.local.write_slot(&next).await?;
        *slot = next;
        Ok(log_id)
    }

    /// Frees the slot of a disk whose attach in the store did not come about. Only for a log that never held a record.
    pub async fn unreserve(&self, vdi: Uuid) -> Result<(), CacheError> {
        let mut inner = self.inner.lock().await;
        let in_use = self.handle(vdi).is_some() || self.attaching.lock().contains(&vdi);
        if in_use || inner.found.contains_key(&vdi) {
            return Err(CacheError::Flush { vdi, why: "its log is in use".into() });
        }
        let slot = inner.slots.iter_mut().find(|s| s.vdi.as_ref().is_some_and(|v| v.uuid == vdi));
        let Some(slot) = slot else { return Ok(()) };
        let next = slot.next(None);
        self.ground.local.write_slot(&next).await?;
        *slot = next;
        Ok(())
    }

    /// Takes a disk back whose worker has stopped: its log is sealed, its flusher goes on.
    pub async fn release(&self, vdi: Uuid, disk: AttachedDisk) -> Result<(), CacheError> {
        self.handle(vdi).ok_or(CacheError::NotAttached { vdi })?.released(vdi, disk).await
    }

    /// Returns when all that was acknowledged before the call is committed to the store, with the LSN reached.
    pub async fn drain(&self, vdi: Uuid) -> Result<Lsn, CacheError> {
        self.handle(vdi).ok_or(CacheError::NotAttached { vdi })?.drain(vdi).await
    }

    /// Forgets a disk that was released, drained and detached in the store: its slot and segments are free again.
    pub async fn detach(&self, vdi: Uuid) -> Result<(), CacheError> {
        let handle = self.handle(vdi).ok_or(CacheError::NotAttached { vdi })?;
        let slot = handle.stop(vdi, Leave::Drained).await?;
        let mut inner = self.inner.lock().await;
        self.handles.lock().remove(&vdi);
        let at = slot.slot as usize;
        inner.slots[at] = slot;
        Ok(())
    }

    /// Notes that a disk grew.
    pub async fn resize(&self, vdi: Uuid, bytes: u64) -> Result<(), CacheError> {
        self.handle(vdi).ok_or(CacheError::NotAttached { vdi })?.resize(vdi, bytes).await
    }

    /// Changes the policy of an attached disk: takes effect at once, and holds until the disk is detached. Durable in the
    /// disk's slot when this returns what holds now.
    ///
    /// # Errors
    /// The local device's; nothing was changed.
    pub async fn set_policy(&self, vdi: Uuid, change: PolicyChange) -> Result<Policy, CacheError> {
        let handle = self.handle(vdi).ok_or(CacheError::NotAttached { vdi })?;
        handle.set_policy(vdi, change).await
    }

    /// Keeps what is held of an attached disk: its clean segments are not evicted while anything else could be, and what is
    /// evicted after all comes back while the store answers. Or no longer does. Durable in the disk's slot.
    ///
    /// # Errors
    /// [`PinError::TooLarge`]; the local device's. Nothing was changed.
    pub async fn pin(&self, vdi: Uuid, on: bool) -> Result<(), PinError> {
        let handle = self.handle(vdi);
        let handle = handle.ok_or_else(|| PinError::Failed("it is not attached".into()))?;
        handle.pin(vdi, on).await
    }

    /// Begins to fetch these ranges of an attached disk (first block, blocks; all of it if none are given) into the cache;
    /// [`VdiStatus::hydrate`] tells how it goes on. Returns once it is known what is to be fetched.
    ///
    /// # Errors
    /// It goes on already, or the cache is too small; the store's.
    pub async fn hydrate(
        &self,
        vdi: Uuid,
        ranges: Option<Vec<(Lba, u64)>>,
    ) -> Result<HydrateStatus, HydrateError> {
        let handle = self.handle(vdi);
        let handle = handle.ok_or_else(|| HydrateError::Failed("it is not attached".into()))?;
        handle.hydrate(vdi, ranges).await
    }

    /// Status of an attached disk.
    #[must_use]
    pub fn vdi_status(&self, vdi: Uuid) -> Option<VdiStatus> {
        let handle = self.handle(vdi)?;
        let mut status = handle.status.lock().clone();
        let read = |value: &std::sync::atomic::AtomicU64| value.load(Ordering::Relaxed);
        status.last_lsn = status.last_lsn.max(read(&handle.progress.staged));
        status.flushed_lsn = status.flushed_lsn.max(read(&handle.progress.flushed));
        {
            let pending = handle.desk.pending();
            status.snapshots_pending = pending.len() as u64;
            status.cuts_pending = pending.cuts().len() as u64;
        }
        status.index_bytes = read(&handle.progress.index_bytes);
        status.held_bytes = read(&handle.progress.held_blocks) * BLOCK_SIZE as u64;
        status.boot_trace_bytes = read(&handle.progress.trace_blocks) * BLOCK_SIZE as u64;
        status.boot_trace_missing_bytes = read(&handle.progress.trace_missing) * BLOCK_SIZE as u64;
        Some(status)
    }

    /// Segments that are a disk's.
    #[must_use]
    pub fn segments_of(&self, vdi: Uuid) -> usize {
        self.ground.pool.owned(vdi).len()
    }

    /// A disk's log is open here.
    #[must_use]
    pub fn is_attached(&self, vdi: Uuid) -> bool {
        self.handles.lock().contains_key(&vdi)
    }

    /// How full the cache is.
    #[must_use]
    pub fn status(&self) -> CacheStatus {
        let counts = self.ground.pool.counts();
        let size = self.ground.local.geometry.segment_size;
        CacheStatus {
            capacity: u64::from(counts.segments) * size,
            segment_size: size,
            segments: counts.segments,
            free_bytes: u64::from(counts.free) * size,
            clean_bytes: u64::from(counts.clean) * size,
            pinned_bytes: u64::from(counts.pinned) * size,
            dirty_bytes: u64::from(counts.used()) * size,
            fill: counts.fill(),
        }
    }

    /// Stops all flushers between two steps. What is not committed stays safely in the log.
    pub async fn close(&self) {
        self.stop_replacing().await;
        let mut handles: Vec<_> = self.handles.lock().drain().collect();
        // One order in every run, for the simulator.
        handles.sort_by(|(_, a), (_, b)| a.name.cmp(&b.name));
        for (vdi, handle) in handles {
            if let Err(error) = handle.stop(vdi, Leave::Not).await {
                tracing::debug!(vdi = %handle.name, %error, "flusher was gone already");
            }
        }
    }

    fn handle(&self, vdi: Uuid) -> Option<Arc<VdiHandle>> {
        self.handles.lock().get(&vdi).map(Arc::clone)
    }
}

/// What the segments of a cache are.
pub(crate) struct Sorted {
    /// Those of each attached disk, in order of their sequence.
    pub found: HashMap<Uuid, Vec<SegmentHeader>>,
    /// Logs that were given up, by their ids.
    pub quarantined: HashMap<u128, loss::Kept>,
    /// Free ones.
    pub free: Vec<SegmentId>,
    /// The sequence number that comes next.
    pub next_seq: u64,
}

/// Tells which segments belong to a recorded log, which are free, and which sequence number comes next.
pub(crate) fn sort_segments(
    geometry: &Geometry,
    slots: &[VdiSlot],
    headers: Vec<SegmentHeader>,
) -> Sorted {
    let active = slots.iter().filter_map(|slot| slot.vdi.as_ref());
    let given_up = slots.iter().filter_map(|slot| slot.quarantined.as_ref());
    let records: HashMap<u128, &SlotVdi> =
        active.chain(given_up.clone()).map(|vdi| (vdi.log_id, vdi)).collect();
    let mut quarantined: HashMap<u128, loss::Kept> = given_up
        .map(|vdi| (vdi.log_id, loss::Kept { record: vdi.clone(), headers: Vec::new() }))
        .collect();
    let seen = headers.iter().map(|header| header.seq + 1);
    let noted = records.values().map(|vdi| vdi.sequence_seen.max(vdi.evicted_below));
    let next_seq = seen.chain(noted).max().unwrap_or(1).max(1);
    let next_seq = if sabotage::on(Bug::ReuseSequence) { 1 } else { next_seq };
    let mut found: HashMap<Uuid, Vec<SegmentHeader>> = HashMap::new();
    let mut taken = HashSet::new();
    for header in headers {
        let belongs = records
            .get(&header.log_id)
            .is_some_and(|vdi| vdi.uuid == header.vdi && header.seq >= vdi.evicted_below);
        if belongs {
            taken.insert(header.segment);
            match quarantined.get_mut(&header.log_id) {
                Some(kept) => kept.headers.push(header),
                None => found.entry(header.vdi).or_default().push(header),
            }
        }
    }
    let kept = quarantined.values_mut().map(|kept| &mut kept.headers);
    for headers in found.values_mut().chain(kept) {
        headers.sort_unstable_by_key(|header| header.seq);
    }
    let free = (0..geometry.segments).map(SegmentId).filter(|id| !taken.contains(id)).collect();
    Sorted { found, quarantined, free, next_seq }
}
