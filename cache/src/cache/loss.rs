//! What is left of a log that cannot be used, and what is kept of it.
//!
//! A log whose disk was rolled back is never deleted: its slot says that it is in quarantine, and its segments stay as they
//! are until [`Cache::discard_quarantine`]. The slot is written before the store's head lets go of the log, so that a log
//! that was given up is never opened again, not even if what damaged it turns out to be transient.

use super::{Cache, VdiIdentity};
use crate::cache::attach::verified;
use crate::error::CacheError;
use crate::format::record::{Entries, Kind};
use crate::format::segment::SegmentHeader;
use crate::format::slot::SlotVdi;
use crate::recovery;
use blockstore::types::{BLOCK_SIZE, Lsn};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use uuid::Uuid;

/// What became of a log that the store names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogFinding {
    /// Nothing of it is here.
    Absent,
    /// It was given up before.
    Quarantined,
    /// It is open: the disk is served, or its flusher is at work.
    Open,
    /// It is here and whole.
    Whole {
        /// Where it ends.
        last_lsn: Lsn,
    },
    /// It is here and is not opened.
    Refused {
        /// Why.
        why: String,
    },
}

/// A log in quarantine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuarantinedLog {
    /// The log.
    pub log_id: Uuid,
    /// The disk that it belonged to, and its name then.
    pub vdi: Uuid,
    /// See `vdi`.
    pub name: String,
    /// Segments that are kept.
    pub segments: u32,
    /// Bytes in them.
    pub bytes: u64,
}

/// What can still be told of a log without trusting it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// The last LSN that anything names.
    pub last_lsn: Lsn,
    /// Bytes of the disk that records after the committed LSN touched, in whole blocks, in order, without overlaps.
    pub ranges: Vec<Range<u64>>,
    /// Segments of the log, and how many of them could not be read to their end.
    pub segments: u32,
    /// See `segments`.
    pub unreadable: u32,
}

/// A log that is kept, by what its slot says.
#[derive(Debug)]
pub(crate) struct Kept {
    pub record: SlotVdi,
    pub headers: Vec<SegmentHeader>,
}

/// In the pool a log in quarantine owns its segments itself: its disk may have others by now.
pub(super) fn owner_of(log_id: u128) -> Uuid {
    Uuid::from_u128(log_id)
}

impl Cache {
    /// What became of log `log_id` of a disk whose image in the store is at `store`. Changes nothing.
    ///
    /// # Errors
    /// The local device's: a log that cannot be read is neither whole nor damaged.
    pub async fn examine(
        &self,
        vdi: &VdiIdentity,
        log_id: u128,
        store: Lsn,
    ) -> Result<LogFinding, CacheError> {
        if self.vdi_status(vdi.uuid).is_some() {
            return Ok(LogFinding::Open);
        }
        if self.quarantined.lock().iter().any(|kept| kept.record.log_id == log_id) {
            return Ok(LogFinding::Quarantined);
        }
        let (_claim, _, record, headers) = match self.claim(vdi.uuid).await {
            Ok(found) => found,
            Err(CacheError::NotAttached { .. }) => return Ok(LogFinding::Absent),
            Err(CacheError::Attached { .. }) => return Ok(LogFinding::Open),
            Err(error) => return Err(error),
        };
        if record.log_id != log_id {
            return Ok(LogFinding::Absent);
        }
        let record = SlotVdi { left_behind: self.ground.left_behind(&record)?, ..record };
        if let Err(error) = verified(&record, None, store) {
            return Ok(LogFinding::Refused { why: error.to_string() });
        }
        match self.ground.end_of(&record, store, &headers).await {
            Ok(end) => Ok(LogFinding::Whole { last_lsn: end.max(store) }),
            Err(error @ (CacheError::Log { .. } | CacheError::LogIsOlder { .. })) => {
                Ok(LogFinding::Refused { why: error.to_string() })
            }
            Err(error) => Err(error),
        }
    }

    /// The log that a disk has here, and whether it was served from it before: then it may hold records.
    pub async fn log_of(&self, vdi: Uuid) -> Option<(u128, bool)> {
        let inner = self.inner.lock().await;
        let mut records = inner.slots.iter().filter_map(|slot| slot.vdi.as_ref());
        records.find(|record| record.uuid == vdi).map(|record| (record.log_id, record.epoch > 0))
    }

    /// What can still be told of log `log_id` after `committed`; nothing if it is not here.
    pub async fn survey(&self, log_id: u128, committed: Lsn) -> Survey {
        let (record, headers) = {
            let inner = self.inner.lock().await;
            let active = inner.slots.iter().filter_map(|slot| slot.vdi.as_ref());
            let active = active.filter(|record| record.log_id == log_id).map(|record| {
                (record.clone(), inner.found.get(&record.uuid).cloned().unwrap_or_default())
            });
            let quarantined = self.quarantined.lock();
            let kept = quarantined.iter().filter(|kept| kept.record.log_id == log_id);
            let kept = kept.map(|kept| (kept.record.clone(), kept.headers.clone()));
            match active.chain(kept).next() {
                Some(found) => found,
                None => return Survey::default(),
            }
        };
        let before = Lsn(record.first_lsn.0.saturating_sub(1));
        let mut survey = Survey {
            last_lsn: record.committed.max(before).max(record.durable),
            segments: headers.len() as u32,
            ..Survey::default()
        };
        for header in &headers {
            self.survey_segment(header, committed, &mut survey).await;
        }
        survey.ranges = joined(std::mem::take(&mut survey.ranges));
        survey
    }

    async fn survey_segment(&self, header: &SegmentHeader, committed: Lsn, survey: &mut Survey) {
        let found = match recovery::read_segment(&self.ground.local, header).await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(segment = header.segment.0, %error, "surveying a lost log");
                survey.unreadable += 1;
                return;
            }
        };
        survey.unreadable += u32::from(!found.sealed);
        survey.last_lsn = survey.last_lsn.max(found.last_lsn).max(found.flushed);
        let mut lsn = Lsn(found.first_lsn.0.saturating_sub(1));
        for entry in Entries::new(&found.entries, found.used_blocks) {
            let Ok(entry) = entry else {
                survey.unreadable += u32::from(found.sealed);
                return;
            };
            if entry.lsns() > 0 {
                lsn = lsn.plus(entry.lsns());
                if lsn > committed && entry.kind != Kind::Snapshot {
                    let first = entry.lba.0.saturating_mul(BLOCK_SIZE as u64);
                    let len = u64::from(entry.blocks).saturating_mul(BLOCK_SIZE as u64);
                    survey.ranges.push(first..first.saturating_add(len));
                }
            }
        }
    }

    /// Puts the log of a disk that is not open into quarantine, durably: it is never opened again. Nothing happens if the
    /// disk has no log here.
    ///
    /// # Errors
    /// [`CacheError::Attached`]: it is open; the local device's.
    pub async fn quarantine(&self, vdi: Uuid) -> Result<(), CacheError> {
        let (_claim, slot, record, headers) = match self.claim(vdi).await {
            Err(CacheError::NotAttached { .. }) => return Ok(()),
            found => found?,
        };
        let mut inner = self.inner.lock().await;
        let next = slot.next_quarantined();
        self.ground.local.write_slot(&next).await?;
        inner.slots[slot.slot as usize] = next;
        inner.found.remove(&vdi);
        self.ground.pool.quarantine(vdi, owner_of(record.log_id));
        self.quarantined.lock().push(Kept { record, headers });
        Ok(())
    }

    /// Logs in quarantine.
    #[must_use]
    pub fn quarantined(&self) -> Vec<QuarantinedLog> {
        let size = self.ground.local.geometry.segment_size;
        let describe = |kept: &Kept| QuarantinedLog {
            log_id: Uuid::from_u128(kept.record.log_id),
            vdi: kept.record.uuid,
            name: kept.record.name.clone(),
            segments: kept.headers.len() as u32,
            bytes: kept.headers.len() as u64 * size,
        };
        self.quarantined.lock().iter().map(describe).collect()
    }

    /// Lets go of a log in quarantine: its slot is freed, durably, then its segments.
    ///
    /// # Errors
    /// [`CacheError::NotQuarantined`], the local device's.
    pub async fn discard_quarantine(&self, log_id: Uuid) -> Result<QuarantinedLog, CacheError> {
        let known = self.quarantined().into_iter().find(|log| log.log_id == log_id);
        let known = known.ok_or(CacheError::NotQuarantined { log_id })?;
        let mut inner = self.inner.lock().await;
        let is_it = |kept: &SlotVdi| kept.log_id == log_id.as_u128();
        let slot = inner.slots.iter().position(|slot| slot.quarantined.as_ref().is_some_and(is_it));
        let Some(slot) = slot else { return Err(CacheError::NotQuarantined { log_id }) };
        let next = inner.slots[slot].next(None);
        self.ground.local.write_slot(&next).await?;
        inner.slots[slot] = next;
        self.quarantined.lock().retain(|kept| kept.record.log_id != log_id.as_u128());
        self.ground.pool.unquarantine(owner_of(log_id.as_u128()));
        Ok(known)
    }

    /// Gives a cache that was just created the identity that this host had before: see the caller for when that is right.
    /// False: the cache is bound to a store or holds logs already, and keeps its own.
    ///
    /// # Errors
    /// The local device's.
    pub async fn take_identity(&self, host: Uuid) -> Result<bool, CacheError> {
        let inner = self.inner.lock().await;
        let is_new = self.ground.local.superblock().await.store.is_none()
            && inner.slots.iter().all(crate::format::slot::VdiSlot::is_free);
        if is_new {
            self.ground.local.rewrite_superblock(|superblock| superblock.host = host).await?;
        }
        Ok(is_new)
    }
}

/// The same bytes in order, without overlaps.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut out: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
}
