//! Snapshots of attached disks.

use super::Cache;
use crate::desk::{OnTaken, SnapshotTaken};
use crate::error::CacheError;
use crate::flusher::Replay;
use crate::local::Local;
use crate::pending::{LogCut, PendingSnapshot};
use crate::recovery::sent::{self, Point};
use crate::vdi::{MadeCuts, Pressed, Undrained};
use blockstore::SnapshotLabel;
use blockstore::io::now_ms;
use blockstore::types::Lsn;
use std::sync::Arc;
use uuid::Uuid;

/// A point of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AsOf {
    /// Up to this LSN.
    Lsn(Lsn),
    /// Up to the last record that had been sent to the log's device at this time, milliseconds since 1970: all that had been
    /// answered is in it.
    Time(u64),
}

impl Cache {
    /// Takes a snapshot of an attached disk: all requests that were answered before the call are in it, and none that
    /// comes after the answer. It is durable in the log when this returns, whether the store answers or not, and reaches
    /// the store with the commit that covers its LSN.
    ///
    /// # Errors
    /// [`CacheError::NotAttached`]; [`CacheError::Snapshot`]: the disk is not served, its log has failed, its worker died
    /// or stopped meanwhile, or too many wait.
    pub async fn snapshot(
        &self,
        vdi: Uuid,
        label: SnapshotLabel,
    ) -> Result<SnapshotTaken, CacheError> {
        self.handle(vdi).ok_or(CacheError::NotAttached { vdi })?.desk.snapshot(label).await
    }

    /// As [`Self::snapshot`], and `then` is done with what it would return, now or later: as a rule by the disk's worker, which it must
    /// neither hold up nor end.
    pub fn snapshot_then(&self, vdi: Uuid, label: SnapshotLabel, then: OnTaken) {
        match self.handle(vdi) {
            Some(handle) => handle.desk.snapshot_then(label, then),
            None => then(Err(CacheError::NotAttached { vdi })),
        }
    }

    /// Takes a snapshot of what an attached disk was at a point of its log that the store does not have yet. It is durable
    /// when this returns, and reaches the store with the commit that covers its LSN; its time is that of its last write. After
    /// a start without the store this waits until that is there: nobody knows before how far it is.
    ///
    /// # Errors
    /// As [`Self::snapshot`]; [`CacheError::Snapshot`] also if the log does not hold that point, or the store may have gone
    /// beyond it. The local device's.
    pub async fn snapshot_as_of(
        &self,
        vdi: Uuid,
        point: AsOf,
        label: SnapshotLabel,
    ) -> Result<SnapshotTaken, CacheError> {
        let handle = self.handle(vdi).ok_or(CacheError::NotAttached { vdi })?;
        let log = handle.undrained(vdi, true).await?;
        let local = Arc::clone(&self.ground.local);
        // To its end, whatever becomes of who asks: a leg that is silent may be put out on the way.
        let finding = tokio::spawn(async move { find_point(&local, vdi, point, &log).await });
        let found =
            finding.await.unwrap_or_else(|error| Ok(Err(format!("looking for it: {error}"))));
        let Point { lsn, time_ms } = found?.map_err(|why| CacheError::Snapshot { vdi, why })?;
        let time_ms = if time_ms == 0 { now_ms() } else { time_ms };
        handle.cut(vdi, PendingSnapshot { lsn, time_ms, label }).await
    }

    /// Snapshots that the cadence of an attached disk's schedule has cut, that are durable in the log, which the store does not have yet, and
    /// which the rule keeps, oldest first; of those in the segment that is open nothing is known yet.
    #[must_use]
    pub fn pending_cuts(&self, vdi: Uuid) -> Vec<LogCut> {
        let handle = self.handle(vdi);
        handle
            .map_or_else(Vec::new, |handle| handle.desk.pending().cuts().iter().copied().collect())
    }

    /// Which of them commits have made since this was last asked.
    #[must_use]
    pub fn take_made_cuts(&self, vdi: Uuid) -> MadeCuts {
        let handle = self.handle(vdi);
        handle.map_or_else(MadeCuts::default, |handle| std::mem::take(&mut *handle.made.lock()))
    }

    /// Has the cadence of an attached disk cut less than its schedule says, or as much again, from about now on.
    ///
    /// # Errors
    /// [`CacheError::NotAttached`].
    pub async fn press_cuts(&self, vdi: Uuid, pressed: Pressed) -> Result<(), CacheError> {
        self.handle(vdi).ok_or(CacheError::NotAttached { vdi })?.press(vdi, pressed).await
    }

    /// Snapshots in an attached disk's log that are durable and that the store does not have yet, oldest first, but for those
    /// that a cadence has cut.
    #[must_use]
    pub fn pending_snapshots(&self, vdi: Uuid) -> Vec<PendingSnapshot> {
        let handle = self.handle(vdi);
        handle.map_or_else(Vec::new, |handle| handle.desk.pending().iter().collect())
    }
}

/// The point, or why there is none.
async fn find_point(
    local: &Local,
    vdi: Uuid,
    point: AsOf,
    log: &Undrained,
) -> Result<Result<Point, String>, CacheError> {
    let Undrained { committed, segments } = log;
    let found = match point {
        AsOf::Lsn(lsn) => sent::at_lsn(local, vdi, segments, lsn).await?,
        AsOf::Time(ms) => sent::at_time(local, vdi, segments, ms).await?,
    };
    match found.filter(|found| found.lsn > *committed) {
        Some(Point { time_ms: 0, .. }) if matches!(point, AsOf::Time(_)) => Ok(Err(
            "this part of its log was written by a version that did not note times: name an LSN"
                .into(),
        )),
        Some(found) => Ok(Ok(found)),
        None => Ok(Err(what_is_held(local, vdi, *committed, segments).await?)),
    }
}

/// Words on which points the log holds.
async fn what_is_held(
    local: &Local,
    vdi: Uuid,
    committed: Lsn,
    segments: &[Replay],
) -> Result<String, CacheError> {
    let first = committed.plus(1);
    let oldest = sent::at_lsn(local, vdi, segments, first).await?;
    Ok(match (oldest, segments.last()) {
        (Some(oldest), Some(last)) => format!(
            "its log holds the LSNs from {first} to {}, the first of them written {} s ago; what is older is in the store, \
             where only snapshots are kept apart",
            last.last_lsn,
            now_ms().saturating_sub(oldest.time_ms) / 1000
        ),
        _ => format!(
            "everything is in the store, up to LSN {committed}, where only snapshots are kept apart"
        ),
    })
}
