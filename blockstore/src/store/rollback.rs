//! Giving up a log that is lost: the disk goes back to what is committed here, and is free to be attached again.
//!
//! The image needs no change: it is exactly the disk as of its committed LSN (P2). One compare-and-write of the head ends
//! the attachment, so that the old log can never be taken for this disk's again (rule L6). LSN and births go on rising
//! (rule C4), and the head says that a log was given up: a cache that comes back with it is refused, see
//! [`Store::resume`]. A crash before it leaves the disk attached as it was; after it, detached.

use super::Store;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::vdi::{GIVEN_UP, VdiHead};
use crate::types::Lsn;
use std::sync::Arc;
use uuid::Uuid;

/// The attachment that is to end: what the caller found when it judged that the log is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LostLog {
    /// The host that holds the disk.
    pub host: Uuid,
    /// Its log, which nobody has any more.
    pub log_id: Option<Uuid>,
}

impl Store {
    /// Ends the attachment of a disk whose log is lost. What was acknowledged after the committed LSN, which is returned,
    /// is given up.
    ///
    /// # Errors
    /// `NotFound`; `InUse` if the disk is not attached as `lost` says, or is attached through this store object: nothing
    /// was changed; the device's.
    pub async fn roll_back(self: &Arc<Self>, uuid: Uuid, lost: LostLog) -> Result<Lsn> {
        self.change(move |store| async move { store.roll_back_now(uuid, lost).await }).await
    }

    async fn roll_back_now(&self, uuid: Uuid, lost: LostLog) -> Result<Lsn> {
        let core = &self.core;
        core.writer()?;
        let mut found = self.find_vdi(&uuid.to_string()).await?;
        if self.raise(found.place).await? {
            found = self.find_vdi(&uuid.to_string()).await?;
        }
        let head = &found.head;
        let as_judged =
            head.owner.is_some_and(|owner| owner.host == lost.host) && head.log_id == lost.log_id;
        if !as_judged || self.attached_here(head).is_some() {
            return Err(StoreError::new(
                StoreErrorKind::InUse,
                found.object(),
                "its attachment is not the one that was to be given up; nothing was changed: look \
                 at it with 'ballast vdi info', then decide again",
            ));
        }
        let next = VdiHead {
            owner: None,
            log_id: None,
            last_log: Some(GIVEN_UP),
            attached_ms: 0,
            birth: head.birth.plus(1),
            ..head.clone()
        };
        let swap = core.records.swap(&core.io, &found.view, next).await?;
        let view = swap.done(|| found.object())?;
        Ok(view.record().map_or(head.committed, |head| head.committed))
    }
}
