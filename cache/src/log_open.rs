//! Opening a disk's log: recover it, make that durable, hand out the disk. Used when a disk is attached, and again when
//! its worker died.

use crate::disk::{AttachedDisk, Disk, Identity, Progress, Start};
use crate::error::CacheError;
use crate::format::legs::LEGS_MAX;
use crate::format::segment::SegmentHeader;
use crate::format::slot::{LeftBehind, SlotVdi, VdiSlot};
use crate::image::ImagePool;
use crate::link::{self, DiskSender, FromDisk, Grant};
use crate::local::Local;
use crate::pending::PendingSnapshots;
use crate::pool::Pool;
use crate::recovery::{self, Live, Recovered};
use crate::vdi::{Attached, Segment, Segments};
use crate::witness::WitnessSeat;
use blockstore::types::Lsn;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::Instant;
use uuid::Uuid;

/// What every log of a cache needs.
#[derive(Clone, Debug)]
pub(crate) struct Ground {
    pub local: Arc<Local>,
    pub pool: Arc<Pool>,
    pub images: Arc<ImagePool>,
    /// Held by whoever opens a log, until its disk is known to the cache; alone, by whoever changes which legs are written
    /// by adding one.
    pub logs_opening: Arc<tokio::sync::RwLock<()>>,
    /// Who remembers that a log was left behind.
    pub witness: WitnessSeat,
    /// The disks that are attached, while the cache is open.
    pub attached: Weak<Attached>,
}

/// A log that is open.
#[derive(Debug)]
pub(crate) struct OpenLog {
    /// As it stands on the device now, and what is in it.
    pub slot: VdiSlot,
    pub record: SlotVdi,
    /// For the disk's driver.
    pub disk: AttachedDisk,
    /// The other ends of the disk's link.
    pub sender: DiskSender,
    pub from_disk: UnboundedReceiver<FromDisk>,
    /// Sealed segments.
    pub segments: Segments,
    /// Where the log ended.
    pub last_lsn: Lsn,
    /// Snapshots in it that the store does not have.
    pub snapshots: PendingSnapshots,
}

impl Ground {
    /// Whether write-through left this log behind, by its slot or by the witness.
    pub fn left_behind(&self, record: &SlotVdi) -> Result<Option<LeftBehind>, CacheError> {
        let found = self.witness.find(record.log_id).map_err(|source| CacheError::Local {
            path: self.local.path.clone(),
            what: "finding out whether a log was left behind in write-through",
            source,
        })?;
        let found = found.filter(|behind| behind.epoch >= record.epoch);
        Ok(match (record.left_behind, found) {
            (Some(here), Some(there)) => Some(LeftBehind {
                epoch: here.epoch.max(there.epoch),
                flushed: here.flushed.max(there.flushed),
                staged: here.staged.max(there.staged),
            }),
            (here, there) => here.or(there),
        })
    }

    /// Where the log of `record` ends, whose disk is at `store` in the store. It ends before that only if write-through
    /// left it behind. Changes nothing.
    ///
    /// # Errors
    /// The log cannot be used, or neither it nor the store has all that was promised to survive.
    pub async fn end_of(
        &self,
        record: &SlotVdi,
        store: Lsn,
        headers: &[SegmentHeader],
    ) -> Result<Lsn, CacheError> {
        let behind = self.left_behind(record)?;
        let end = match recovery::recover(&self.local, record, store, headers).await {
            Ok(recovered) => recovered.last_lsn,
            Err(CacheError::LogIsOlder { log, .. }) if behind.is_some() => log,
            Err(error) => return Err(error),
        };
        let promised = behind.map_or(Lsn(0), |behind| behind.flushed);
        if end.max(store) < promised {
            return Err(CacheError::Log {
                name: record.name.clone(),
                vdi: record.uuid,
                why: format!(
                    "everything up to LSN {promised} was written durably before the cache failed, but this log ends at \
                     LSN {end}, and the store's image is at LSN {store}"
                ),
            });
        }
        Ok(end)
    }

    /// Recovers the log of `record`, which says how far the store is, from `headers` (by sequence), and opens it under
    /// the next epoch, `alone` if the store is not there to compare it with. If this fails, nothing was changed, or nothing
    /// that the next attempt would not do again; `slot` then says after which sequence it has to be written.
    pub async fn open_log(
        &self,
        slot: &mut VdiSlot,
        record: SlotVdi,
        headers: &[SegmentHeader],
        alone: bool,
        progress: Arc<Progress>,
    ) -> Result<OpenLog, CacheError> {
        let started = Instant::now();
        // What is acknowledged from here on must be known to be this start's.
        self.local.note_members().await?;
        let mut recovered = self.recover(&record, headers).await?;
        let mut snapshots = std::mem::take(&mut recovered.snapshots);
        // A log that was opened empty has none of what they are of.
        let held = record.committed.plus(1)..=recovered.last_lsn;
        let mut cuts = record.cuts.clone();
        cuts.retain(|cut| held.contains(&cut.lsn) && snapshots.insert(cut));
        // Everything that can fail for want of resources comes before anything is changed.
        let link = link::pair().map_err(|source| CacheError::Local {
            path: self.local.path.clone(),
            what: "eventfd",
            source,
        })?;
        let legs = self.local.worker_files()?;
        let grants = self.two_segments(record.uuid, record.epoch == 0).await?;
        let record = SlotVdi {
            epoch: record
                .left_behind
                .map_or(0, |left| left.epoch)
                .max(record.epoch)
                .saturating_add(1),
            left_behind: None,
            first_lsn: recovered.last_lsn.plus(1),
            alone_from: alone.then(|| record.alone_from.unwrap_or(recovered.last_lsn)),
            // Recovery flushed what it found.
            durable: recovered.last_lsn,
            sequence_seen: self.pool.next_seq(),
            cuts,
            ..record
        };
        let grew = slot.vdi.as_ref().is_some_and(|former| former.size_bytes < record.size_bytes);
        // Known to former versions again once nothing in it says otherwise.
        let record =
            SlotVdi { has_cuts: recovered.live.iter().any(|live| live.cuts > 0), ..record };
        let mut next = slot.next(Some(record.clone()));
        let mut written = self.local.write_slot(&next).await;
        if written.is_ok() && (grew || record.may_have_cuts()) {
            // In both copies. A former version would go by the one that it knows; and should one rot, a start without the
            // store must not shrink the disk. Should this fail, it may be torn, and the first one is not to be written over.
            slot.sequence = next.sequence;
            next = next.next(Some(record.clone()));
            written = self.local.write_slot(&next).await;
        }
        if let Err(error) = written {
            // Nothing was appended: the next attempt recovers to the same end.
            for grant in grants {
                self.pool.release(grant.id, false);
            }
            return Err(error);
        }
        tracing::info!(
            vdi = %record.name, last_lsn = recovered.last_lsn.0, committed = record.committed.0,
            segments = recovered.live.len(), ms = started.elapsed().as_millis() as u64, "log recovered"
        );
        let (link, sender, from_disk) = link;
        let last_lsn = recovered.last_lsn;
        let segments = sealed(&recovered.live);
        for id in &recovered.dead {
            self.pool.release(*id, false);
        }
        // From here on the worker is told of each change of the set of legs.
        let members = self.local.join(sender.clone());
        let mut disk = Disk::on_legs(self.start(&record, recovered, grants, progress), members);
        disk.set_boot_trace(record.boot_trace.clone());
        disk.set_cadence(record.policy.chosen.schedule.cadence());
        let disk = AttachedDisk { disk, link, legs, leg_timeout: self.local.leg_timeout() };
        Ok(OpenLog { slot: next, record, disk, sender, from_disk, segments, last_lsn, snapshots })
    }

    /// Reads the log and makes all legs agree on it. A leg that is lost between the two takes along what only it had: the
    /// log is then read again, from those that are left, at most as often as there are legs.
    async fn recover(
        &self,
        record: &SlotVdi,
        headers: &[SegmentHeader],
    ) -> Result<Recovered, CacheError> {
        let mut attempts_left = LEGS_MAX;
        loop {
            let recovered =
                recovery::recover(&self.local, record, record.committed, headers).await?;
            match recovery::settle(&self.local, &recovered).await {
                Ok(()) => return Ok(recovered),
                Err(CacheError::LogChanged { .. }) if attempts_left > 0 => attempts_left -= 1,
                Err(error) => return Err(error),
            }
        }
    }

    fn start(
        &self,
        record: &SlotVdi,
        recovered: Recovered,
        grants: Vec<Grant>,
        progress: Arc<Progress>,
    ) -> Start {
        Start {
            identity: Identity {
                cache: self.local.cache_uuid(),
                vdi: record.uuid,
                log_id: record.log_id,
                epoch: record.epoch,
            },
            geometry: self.local.geometry,
            size_bytes: record.size_bytes,
            sealed: recovered
                .live
                .iter()
                .map(|live| (live.header.segment, live.last_lsn))
                .collect(),
            index: recovered.index,
            last_lsn: recovered.last_lsn,
            committed: record.committed,
            grants,
            images: Arc::clone(&self.images),
            progress,
        }
    }

    /// Two free segments for a disk, waiting a little for evictions. A disk that comes back with a full ring takes
    /// what there is: its flusher makes room, and until then its writers wait. Only a new disk is refused (rule L10).
    async fn two_segments(&self, vdi: Uuid, is_new: bool) -> Result<Vec<Grant>, CacheError> {
        const ATTEMPTS: u32 = 100;
        let mut grants = self.pool.grant_two(vdi, is_new);
        for _ in 0..ATTEMPTS {
            if grants.len() >= 2 || !is_new {
                return Ok(grants);
            }
            for grant in grants.drain(..) {
                self.pool.release(grant.id, false);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            grants = self.pool.grant_two(vdi, is_new);
        }
        let free = grants.len() as u32;
        for grant in grants {
            self.pool.release(grant.id, false);
        }
        Err(CacheError::NoSegments { free })
    }
}

fn sealed(live: &[Live]) -> Segments {
    let mut segments = Segments::default();
    for live in live {
        segments.push(Segment {
            id: live.header.segment,
            seq: live.header.seq,
            first_lsn: live.header.first_lsn,
            last_lsn: live.last_lsn,
            used_blocks: live.used_blocks,
            cuts: live.cuts,
            image: None,
            since: Instant::now(),
            offered: false,
        });
    }
    segments
}

/// True if the segment belongs to the log that `record` describes.
pub(crate) fn belongs(header: &SegmentHeader, record: &SlotVdi) -> bool {
    header.vdi == record.uuid
        && header.log_id == record.log_id
        && header.seq >= record.evicted_below
}
