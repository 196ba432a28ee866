//! The cache as the agent sees it: open, attach, drain, detach, close.

use crate::backing::Backing;
use crate::disk::plan::SegmentId;
use crate::disk::{AttachedDisk, Disk, Identity, Progress, Start};
use crate::error::CacheError;
use crate::flusher::FlushOptions;
use crate::format::Geometry;
use crate::format::segment::SegmentHeader;
use crate::format::slot::{SlotVdi, VdiSlot};
use crate::image::ImagePool;
use crate::link;
use crate::local::{Local, Mode};
use crate::pool::Pool;
use crate::recovery::{self, Recovered};
use crate::vdi::{Segment, Segments, VdiHandle, VdiStatus, VdiTaskParts};
use blockstore::types::Lsn;
use hashbrown::{HashMap, HashSet};
use parking_lot::Mutex;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::time::Instant;
use uuid::Uuid;

/// How to open a cache.
#[derive(Clone, Debug)]
pub struct CacheOptions {
    /// The cache device or file. (A second leg, a mirror, comes later.)
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
    /// Share of the segments that hold uncommitted records, 0 to 1.
    pub fill: f64,
}

/// See the module.
#[derive(Debug)]
pub struct Cache {
    options: CacheOptions,
    local: Arc<Local>,
    pool: Arc<Pool>,
    images: Arc<ImagePool>,
    images_held: Arc<AtomicUsize>,
    inner: tokio::sync::Mutex<Inner>,
    handles: Mutex<HashMap<Uuid, Arc<VdiHandle>>>,
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
        let mode = Mode::Serve { create_size: options.create_size };
        let local = Local::open(&options.path, mode).await?;
        Self::on_local(options, local).await
    }

    /// A cache on a device that is open already.
    pub async fn on_local(options: CacheOptions, local: Local) -> Result<Arc<Self>, CacheError> {
        let local = Arc::new(local);
        let slots = local.read_slots().await?;
        let headers = local.read_headers().await?;
        let (found, free, next_seq) = sort_segments(&local.geometry, &slots, headers);
        let image_len = local.geometry.segment_size as usize;
        let images = ImagePool::new(image_len, (options.image_bytes / image_len).max(2));
        let pool = Pool::new(local.geometry, free, next_seq);
        Ok(Arc::new(Self {
            images,
            images_held: Arc::default(),
            options,
            local,
            pool: Arc::new(pool),
            inner: tokio::sync::Mutex::new(Inner { slots, found }),
            handles: Mutex::new(HashMap::new()),
        }))
    }

    /// Who this cache is.
    pub async fn identity(&self) -> CacheIdentity {
        let superblock = self.local.superblock().await;
        CacheIdentity { cache: superblock.cache, host: superblock.host, store: superblock.store }
    }

    /// Binds the cache to a store at its first use; afterwards refuses any other.
    pub async fn bind(&self, store: Uuid) -> Result<(), CacheError> {
        let bound = self.local.superblock().await.store;
        match bound {
            Some(bound) if bound == store => Ok(()),
            Some(bound) => {
                Err(CacheError::OtherStore { path: self.local.path.clone(), bound, given: store })
            }
            None => {
                self.local.rewrite_superblock(|superblock| superblock.store = Some(store)).await
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
        let counts = self.pool.counts();
        if counts.free + counts.clean < 2 {
            return Err(CacheError::NoSegments { free: counts.free });
        }
        let slots = self.local.geometry.slots;
        let free = inner.slots.iter_mut().find(|slot| slot.vdi.is_none());
        let slot = free.ok_or(CacheError::NoSlot { slots })?;
        let log_id = Uuid::new_v4().as_u128();
        let next = VdiSlot {
            sequence: slot.sequence + 1,
            slot: slot.slot,
            vdi: Some(SlotVdi {
                uuid: vdi.uuid,
                log_id,
                name: vdi.name.clone(),
                size_bytes: vdi.size_bytes,
                committed: Lsn(0),
                evicted_below: self.pool.next_seq(),
                sequence_seen: self.pool.next_seq(),
                epoch: 0,
                first_lsn: Lsn(1),
            }),
        };
        self.local.write_slot(&next).await?;
        *slot = next;
        Ok(log_id)
    }

    /// Frees the slot of a disk whose attach in the store did not come about. Only for a log that never held a record.
    pub async fn unreserve(&self, vdi: Uuid) -> Result<(), CacheError> {
        let mut inner = self.inner.lock().await;
        if self.handle(vdi).is_some() || inner.found.contains_key(&vdi) {
            return Err(CacheError::Flush { vdi, why: "its log is in use".into() });
        }
        let slot = inner.slots.iter_mut().find(|s| s.vdi.as_ref().is_some_and(|v| v.uuid == vdi));
        let Some(slot) = slot else { return Ok(()) };
        let next = VdiSlot { sequence: slot.sequence + 1, slot: slot.slot, vdi: None };
        self.local.write_slot(&next).await?;
        *slot = next;
        Ok(())
    }

    /// Recovers the log of a disk that has one (see [`Self::reserve`]) and returns the disk, ready to be driven. Its
    /// flusher runs from here on.
    pub async fn attach(
        &self,
        vdi: &VdiIdentity,
        backing: Arc<dyn Backing>,
    ) -> Result<AttachedDisk, CacheError> {
        if self.handle(vdi.uuid).is_some() {
            return Err(CacheError::Attached { name: vdi.name.clone(), vdi: vdi.uuid });
        }
        let mut inner = self.inner.lock().await;
        let found = inner.found.get(&vdi.uuid).cloned().unwrap_or_default();
        let at =
            inner.slots.iter().position(|s| s.vdi.as_ref().is_some_and(|v| v.uuid == vdi.uuid));
        let at = at.ok_or(CacheError::NotAttached { vdi: vdi.uuid })?;
        let slot = inner.slots[at].clone();
        let record = slot.vdi.clone().ok_or(CacheError::NotAttached { vdi: vdi.uuid })?;
        let store = backing.committed();
        let started = Instant::now();
        let recovered = recovery::recover(&self.local, &record, store, &found).await?;
        // Everything that can fail for want of resources comes before anything is changed.
        let local_error =
            |what, source| CacheError::Local { path: self.local.path.clone(), what, source };
        let link = link::pair().map_err(|source| local_error("eventfd", source))?;
        let legs = self.local.worker_files()?;
        let grants = self.two_segments(record.epoch == 0).await?;
        let record = SlotVdi {
            name: vdi.name.clone(),
            size_bytes: vdi.size_bytes,
            committed: store,
            epoch: record.epoch + 1,
            first_lsn: recovered.last_lsn.plus(1),
            sequence_seen: self.pool.next_seq(),
            ..record
        };
        let slot =
            VdiSlot { sequence: slot.sequence + 1, slot: slot.slot, vdi: Some(record.clone()) };
        let settled = match recovery::settle(&self.local, &recovered).await {
            Ok(()) => self.local.write_slot(&slot).await,
            Err(error) => Err(error),
        };
        if let Err(error) = settled {
            // Nothing was appended: the next attempt recovers to the same end.
            for grant in grants {
                self.pool.release(grant.id, false);
            }
            return Err(error);
        }
        inner.slots[at] = slot.clone();
        inner.found.remove(&vdi.uuid);
        for id in &recovered.dead {
            self.pool.release(*id, false);
        }
        tracing::info!(
            vdi = %vdi.name, last_lsn = recovered.last_lsn.0, committed = store.0,
            segments = recovered.live.len(), ms = started.elapsed().as_millis() as u64, "log recovered"
        );
        Ok(self.start(vdi, backing, (slot, record), recovered, (grants, legs, link)))
    }

    /// Cannot fail: what recovery decided is durable, and the segments it freed are free.
    fn start(
        &self,
        vdi: &VdiIdentity,
        backing: Arc<dyn Backing>,
        (slot, record): (VdiSlot, SlotVdi),
        recovered: Recovered,
        (grants, legs, (link, sender, from_disk)): Resources,
    ) -> AttachedDisk {
        let mut segments = Segments::default();
        for live in &recovered.live {
            segments.push(Segment {
                id: live.id,
                seq: live.seq,
                first_lsn: live.first_lsn,
                last_lsn: live.last_lsn,
                used_blocks: live.used_blocks,
                image: None,
                since: Instant::now(),
                offered: false,
            });
        }
        let progress = Arc::new(Progress::default());
        // From here on the worker is told of each change of the set of legs.
        let members = self.local.join(sender.clone());
        let start = Start {
            identity: Identity {
                cache: self.local.cache_uuid(),
                vdi: vdi.uuid,
                log_id: record.log_id,
                epoch: record.epoch,
            },
            geometry: self.local.geometry,
            size_bytes: vdi.size_bytes,
            index: recovered.index,
            last_lsn: recovered.last_lsn,
            committed: record.committed,
            sealed: recovered.live.iter().map(|live| (live.id, live.last_lsn)).collect(),
            grants,
            images: Arc::clone(&self.images),
            progress: Arc::clone(&progress),
        };
        let disk = Disk::on_legs(start, members);
        let (to_task, from_pool) = tokio::sync::mpsc::unbounded_channel();
        self.pool.register(vdi.uuid, to_task);
        let handle = VdiHandle::spawn(
            vdi.name.clone(),
            progress,
            VdiTaskParts {
                vdi: vdi.uuid,
                local: Arc::clone(&self.local),
                pool: Arc::clone(&self.pool),
                backing,
                options: self.options.flush,
                images_held: Arc::clone(&self.images_held),
                images_max: self.options.image_bytes,
                slot,
                record,
                segments,
                sender,
                from_disk,
                from_pool,
                status: Arc::new(Mutex::new(VdiStatus::default())),
            },
        );
        self.handles.lock().insert(vdi.uuid, Arc::new(handle));
        AttachedDisk { disk, link, legs }
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
        let slot = handle.stop(vdi, true).await?;
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

    /// Status of an attached disk.
    #[must_use]
    pub fn vdi_status(&self, vdi: Uuid) -> Option<VdiStatus> {
        let handle = self.handle(vdi)?;
        let mut status = handle.status.lock().clone();
        let read = |value: &std::sync::atomic::AtomicU64| value.load(Ordering::Relaxed);
        status.last_lsn = status.last_lsn.max(read(&handle.progress.staged));
        status.flushed_lsn = status.flushed_lsn.max(read(&handle.progress.flushed));
        status.index_bytes = read(&handle.progress.index_bytes);
        Some(status)
    }

    /// How full the cache is.
    #[must_use]
    pub fn status(&self) -> CacheStatus {
        let counts = self.pool.counts();
        let size = self.local.geometry.segment_size;
        CacheStatus {
            capacity: u64::from(counts.segments) * size,
            segment_size: size,
            segments: counts.segments,
            free_bytes: u64::from(counts.free) * size,
            clean_bytes: u64::from(counts.clean) * size,
            dirty_bytes: u64::from(counts.used()) * size,
            fill: counts.fill(),
        }
    }

    /// Stops all flushers between two steps. What is not committed stays safely in the log.
    pub async fn close(&self) {
        let handles: Vec<_> = self.handles.lock().drain().collect();
        for (vdi, handle) in handles {
            if let Err(error) = handle.stop(vdi, false).await {
                tracing::debug!(vdi = %handle.name, %error, "flusher was gone already");
            }
        }
    }

    fn handle(&self, vdi: Uuid) -> Option<Arc<VdiHandle>> {
        self.handles.lock().get(&vdi).map(Arc::clone)
    }

    /// Two free segments for a disk, waiting a little for evictions. A disk that comes back with a full ring takes
    /// what there is: its flusher makes room, and until then its writers wait. Only a new disk is refused (rule L10).
    async fn two_segments(&self, is_new: bool) -> Result<Vec<link::Grant>, CacheError> {
        const ATTEMPTS: u32 = 100;
        let mut grants = self.pool.grant_two();
        for _ in 0..ATTEMPTS {
            if grants.len() >= 2 || !is_new {
                return Ok(grants);
            }
            for grant in grants.drain(..) {
                self.pool.release(grant.id, false);
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            grants = self.pool.grant_two();
        }
        let free = grants.len() as u32;
        for grant in grants {
            self.pool.release(grant.id, false);
        }
        Err(CacheError::NoSegments { free })
    }
}

/// What a disk needs to run: segments, files, and the ways to and from its task.
type Resources = (
    Vec<link::Grant>,
    Vec<Arc<std::fs::File>>,
    (link::Link, link::DiskSender, tokio::sync::mpsc::UnboundedReceiver<link::FromDisk>),
);

/// Segments of each disk, free segments, next sequence number.
type Sorted = (HashMap<Uuid, Vec<SegmentHeader>>, Vec<SegmentId>, u64);

/// Tells which segments belong to a recorded disk (in order of their sequence), which are free, and which sequence number
/// comes next.
pub(crate) fn sort_segments(
    geometry: &Geometry,
    slots: &[VdiSlot],
    headers: Vec<SegmentHeader>,
) -> Sorted {
    let records: HashMap<Uuid, &SlotVdi> =
        slots.iter().filter_map(|slot| slot.vdi.as_ref()).map(|vdi| (vdi.uuid, vdi)).collect();
    let seen = headers.iter().map(|header| header.seq + 1);
    let noted = records.values().map(|vdi| vdi.sequence_seen.max(vdi.evicted_below));
    let next_seq = seen.chain(noted).max().unwrap_or(1).max(1);
    let mut found: HashMap<Uuid, Vec<SegmentHeader>> = HashMap::new();
    let mut taken = HashSet::new();
    for header in headers {
        let belongs = records
            .get(&header.vdi)
            .is_some_and(|vdi| vdi.log_id == header.log_id && header.seq >= vdi.evicted_below);
        if belongs {
            taken.insert(header.segment);
            found.entry(header.vdi).or_default().push(header);
        }
    }
    for headers in found.values_mut() {
        headers.sort_unstable_by_key(|header| header.seq);
    }
    let free = (0..geometry.segments).map(SegmentId).filter(|id| !taken.contains(id)).collect();
    (found, free, next_seq)
}
