//! A disk that is a clone which the store does not know of yet (decision 0024), from its making to its name in the store.

use super::{RETRY_PAUSE, Served, Way};
use crate::api::VdiState;
use crate::error::{Failure, Kind, Result};
use crate::host::parts::Parts;
use blockstore::SnapshotHold;
use blockstore::format::vdi::Origin;
use cache::NewClone;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Of a disk that was made as a clone while the store was away.
#[derive(Debug, Default)]
pub(super) struct Provisional {
    /// Keeps the snapshot that it began as, until the store knows of the clone.
    origin: Option<SnapshotHold>,
    /// This process made it, and has not told the store of it.
    is_known_here_only: bool,
}

/// While a clone is made.
struct BeingCloned<'a>(&'a AtomicUsize);

impl<'a> BeingCloned<'a> {
    fn begin(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for BeingCloned<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Served {
    /// A clone that the store does not know of, as far as is known; `is_new`: nobody has told it.
    pub fn keep_origin(&self, hold: SnapshotHold, is_new: bool) {
        *self.provisional.lock() = Provisional { origin: Some(hold), is_known_here_only: is_new };
    }

    /// The snapshot that it is a clone of which the store may not know of.
    pub fn origin(&self) -> Option<Origin> {
        let provisional = self.provisional.lock();
        provisional.origin.as_ref().map(|held| Origin { vdi: held.vdi(), lsn: held.lsn() })
    }

    /// The store knows of it: what it hangs on is not deleted.
    pub fn let_go_of_origin(&self) {
        self.provisional.lock().origin = None;
    }

    /// The store is about to be told of it.
    pub fn note_attempt(&self) {
        self.provisional.lock().is_known_here_only = false;
    }

    /// The store may have been told of it.
    pub fn may_be_registered(&self) -> bool {
        !self.provisional.lock().is_known_here_only
    }

    /// The same disk under another name, on its socket, as a new object; this one is gone. Between transitions only.
    #[must_use]
    pub fn renamed(&self, name: &str) -> Self {
        let mut view = self.view();
        view.error = Some(format!(
            "its name '{}' was taken in the store when it came there: it is '{name}' now; its socket keeps the former name \
             until it is detached",
            self.name
        ));
        let new = Self {
            uuid: self.uuid,
            name: name.to_owned(),
            socket: self.socket.clone(),
            socket_name: self.socket_name.clone(),
            // None is made of what is itself one.
            being_cloned: AtomicUsize::new(0),
            drill: Arc::clone(&self.drill),
            view: Mutex::new(view),
            server: Mutex::new(self.server.lock().take()),
            unserved: Mutex::new(self.unserved.lock().take()),
            handle: tokio::sync::Mutex::new(None),
            provisional: Mutex::new(std::mem::take(&mut *self.provisional.lock())),
        };
        self.mark_gone();
        new
    }

    /// It is not in the store yet, and cannot be brought there now.
    pub fn waits_for_store(&self, failure: &Failure) {
        let mut view = self.view.lock();
        if view.state == VdiState::Running && view.error.as_ref() != Some(&failure.message) {
            tracing::warn!(vdi = %self.name, "the clone is not in the store yet: {failure}");
            view.error = Some(failure.message.clone());
        }
    }

    /// Comes to be: `enter` makes it known to others, who wait for the rest; `make` makes its log.
    pub async fn begin(
        &self,
        parts: &Parts,
        enter: impl FnOnce() -> Result<()>,
        make: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        let mut handle = self.handle.lock().await;
        let mut made = enter();
        if made.is_ok() {
            made = make.await;
        }
        if made.is_err() {
            self.mark_gone();
            return made;
        }
        self.rise(parts, None, Way::Alone, &mut handle).await
    }

    /// Has a clone made of a snapshot in its log, without the store. That may take minutes, so nothing is held up by it but the disk's
    /// leaving this host.
    pub async fn clone_pending(&self, parts: &Parts, new: &NewClone) -> Result<()> {
        let handle = self.handle.lock().await;
        self.refuse_gone()?;
        if parts.cache.vdi_status(self.uuid).is_none() || self.unserved.lock().is_some() {
            return Err(self.log_not_open());
        }
        let _being_cloned = BeingCloned::begin(&self.being_cloned);
        drop(handle);
        Ok(parts.cache.clone_pending(new).await?)
    }

    /// Refuses what takes its log away while a clone is made of that.
    pub(super) fn refuse_being_cloned(&self) -> Result<()> {
        if self.being_cloned.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        let words = format!(
            "a clone of disk '{}' is being made out of its log, without the store: try again when it is there",
            self.name
        );
        Err(Failure::new(Kind::Conflict, words))
    }

    /// Refuses to take down what the store does not know of, or what such a disk hangs on.
    pub(super) async fn refuse_clones(&self, parts: &Parts) -> Result<()> {
        let name = &self.name;
        let refuse = |words: String| Err(Failure::new(Kind::Conflict, words));
        self.refuse_being_cloned()?;
        if self.origin().is_some() {
            return refuse(format!(
                "disk '{name}' is a clone that is not in the store yet: it gets there by itself when the store is back, then \
                 it can be detached; 'ballast vdi delete {name}' gives it up, with all that was written to it"
            ));
        }
        match parts.cache.waiting_clone_of(self.uuid).await {
            Some(clone) => refuse(format!(
                "disk '{clone}', a clone of '{name}', is not in the store yet: it gets there by itself when the store has the \
                 snapshot; detach '{name}' then"
            )),
            None => Ok(()),
        }
    }

    /// Returns once a clone that the store does not know of has failed to get there for a while.
    pub(super) async fn stays_provisional(&self) -> Failure {
        loop {
            tokio::time::sleep(3 * RETRY_PAUSE).await;
            let why = self.view().error.filter(|_| self.origin().is_some());
            if let Some(why) = why {
                let words = format!("the clone is not in the store yet: {why}");
                return Failure::new(Kind::Unavailable, words);
            }
        }
    }
}
