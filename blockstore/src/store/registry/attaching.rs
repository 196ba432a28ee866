//! Attaching disks to this host.

use super::Found;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::vdi::{GIVEN_UP, Owner, VdiHead};
use crate::io::now_ms;
use crate::root::{GarbageSink, Root};
use crate::store::Store;
use crate::vdi::{Control, Vdi, VdiInner};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use std::sync::Arc;
use uuid::Uuid;

/// How to attach.
#[derive(Clone, Debug)]
pub struct AttachOptions {
    /// Identity of the local log whose records will extend the image.
    pub log_id: Uuid,
}

impl Store {
    /// Attaches a disk to this host, or resumes this host's attachment with the same log.
    ///
    /// # Errors
    /// `NotFound`; `InUse` if another host or another log has it; `Damaged`; `Unreachable` while [`is_unraised`](Self::is_unraised);
    /// the device's.
    pub async fn attach(self: &Arc<Self>, uuid: Uuid, options: AttachOptions) -> Result<Arc<Vdi>> {
        self.change(move |store| async move { store.attach_now(uuid, &options, false).await }).await
    }

    /// As [`attach`](Self::attach), with a log that the disk was served from before: it may hold records, and so must be
    /// the disk's present log, or the one that was drained when the disk was detached last (rule L6).
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub async fn resume(self: &Arc<Self>, uuid: Uuid, options: AttachOptions) -> Result<Arc<Vdi>> {
        self.change(move |store| async move { store.attach_now(uuid, &options, true).await }).await
    }

    async fn attach_now(
        &self,
        uuid: Uuid,
        options: &AttachOptions,
        resumes: bool,
    ) -> Result<Arc<Vdi>> {
        let core = &self.core;
        let writer = core.writer()?;
        if options.log_id.is_nil() {
            let problem = "a log needs an identity";
            return Err(StoreError::new(StoreErrorKind::Invalid, format!("VDI {uuid}"), problem));
        }
        let mut found = self.find_vdi(&uuid.to_string()).await?;
        if self.raise(found.place).await? {
            found = self.find_vdi(&uuid.to_string()).await?;
        }
        self.check_attachable(&found, writer.host, options).await?;
        let head = &found.head;
        if resumes {
            check_resumable(&found, options.log_id)?;
        }
        let next = VdiHead {
            owner: Some(Owner { host: writer.host, generation: writer.generation }),
            attachment: head.attachment.plus(1),
            attached_ms: if head.owner.is_some() { head.attached_ms } else { now_ms() },
            log_id: Some(options.log_id),
            ..head.clone()
        };
        let swap = core.records.swap(&core.io, &found.view, next.clone()).await?;
        let view = swap.done(|| found.object())?;
        let sink: Arc<dyn GarbageSink> = Arc::clone(&writer.reclaimer) as _;
        let inner = Arc::new(VdiInner {
            core: Arc::clone(core),
            uuid,
            name: found.name,
            policy: Mutex::new(found.policy),
            root: ArcSwap::new(Root::new(next, Arc::clone(&sink))),
            sink,
            control: tokio::sync::Mutex::new(Control::new(view)),
        });
        self.attached.lock().insert(uuid, Arc::downgrade(&inner));
        Ok(Arc::new(Vdi { inner }))
    }

    async fn check_attachable(
        &self,
        found: &Found,
        host: Uuid,
        options: &AttachOptions,
    ) -> Result<()> {
        let head = &found.head;
        let in_use =
            |message: String| Err(StoreError::new(StoreErrorKind::InUse, found.object(), message));
        if head.owner.is_some_and(|owner| owner.host != host) {
            let owner = self.describe_owner(head).await?;
            return in_use(format!("it is attached {owner}; detach it there first"));
        }
        if head.owner.is_some() && self.attached_here(head).is_some() {
            return in_use("it is attached to this host already".to_owned());
        }
        match head.log_id {
            Some(log_id) if log_id != options.log_id => in_use(format!(
                "its writes are in log {log_id}, but this host's cache has log {}; start the agent with \
                 the cache that holds the former, or give its writes up with 'ballast vdi rollback \
                 --accept-loss'",
                options.log_id
            )),
            _ => Ok(()),
        }
    }

    /// The handle of a disk that is attached through this store object, by the head that the store has of it. A handle that was
    /// kept over a detach is none: what it shows may have been collected since.
    pub(in crate::store) fn attached_here(&self, head: &VdiHead) -> Option<Arc<VdiInner>> {
        let mut attached = self.attached.lock();
        attached.retain(|_, weak| weak.strong_count() > 0);
        let inner = attached.get(&head.uuid).and_then(std::sync::Weak::upgrade)?;
        let own = inner.root.load();
        let same = own.head.owner == head.owner && own.head.attachment == head.attachment;
        same.then_some(Arc::clone(&inner))
    }
}

/// A log that was served before goes on only where it ended.
fn check_resumable(found: &Found, log_id: Uuid) -> Result<()> {
    let (head, object) = (&found.head, found.object());
    // A head without a note was written by a former version: believed, as it was then.
    let Some(last) = head.last_log.filter(|last| *last != log_id && head.log_id.is_none()) else {
        return Ok(());
    };
    let since = if last == GIVEN_UP {
        "it was rolled back since, to its committed image or to a snapshot, and what this log holds is given up".to_owned()
    } else {
        format!("it has been attached and detached since with log {last}")
    };
    Err(StoreError::new(
        StoreErrorKind::InUse,
        object,
        format!(
            "this host's cache has log {log_id} of it, but {since}; nothing was changed. 'ballast vdi rollback \
             --accept-loss' of the disk puts the old log into quarantine, then the disk can be attached"
        ),
    ))
}
