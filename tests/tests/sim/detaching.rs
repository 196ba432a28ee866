//! Clones that are detached, in order, and then deleted: the agent's `take_down` and `delete`. What was drained is in the store, what
//! was there is free, and nothing of it comes back.

use crate::host::{Agent, Refused, again, transient};
use crate::serving::Manner;
use blockstore::{StoreError, StoreErrorKind, Vdi};
use cache::{AttachedRecord, CacheError};
use rand::rngs::SmallRng;
use uuid::Uuid;

/// Why a disk did not go down.
enum NotDown {
    Store(StoreError),
    Cache(CacheError),
    /// The store let go of it, the cache did not.
    NotForgotten(CacheError),
}

impl From<CacheError> for NotDown {
    fn from(error: CacheError) -> Self {
        Self::Cache(error)
    }
}

impl From<StoreError> for NotDown {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl Agent {
    /// False if it must not be taken down.
    pub async fn detach(
        &self,
        n: usize,
        rng: &mut SmallRng,
        manner: &Manner,
    ) -> Result<bool, Refused> {
        let (seat, uuid) = (self.parting.seat(n), self.uuid_of(n));
        let was_behind;
        loop {
            let _handle = seat.handle.lock().await;
            let being_cloned = self.parting.being_cloned.borrow().get(&n).copied();
            let vdi = self.vdis.lock().get(&n).cloned();
            let Some(vdi) = vdi.filter(|_| being_cloned.unwrap_or(0) == 0) else {
                return Ok(false);
            };
            if self.cache.origin_of(uuid).await.is_some()
                || self.cache.waiting_clone_of(uuid).await.is_some()
            {
                return Ok(false);
            }
            match self.go_down(n, &vdi, rng, manner).await {
                Ok(in_order) => {
                    // A device that takes nothing more keeps what is on it.
                    was_behind = !in_order;
                    break;
                }
                Err(NotDown::Store(error)) => {
                    transient("detaching", &error, self.may_have_lost).await?;
                }
                Err(NotDown::Cache(error)) => {
                    again("detaching", &error, self.may_have_lost).await?;
                }
                Err(NotDown::NotForgotten(error)) => {
                    // It can only be attached again.
                    again("forgetting a log", &error, self.may_have_lost).await?;
                    self.vdis.lock().remove(&n);
                    let records = self.cache.attached().await;
                    let record = records.into_iter().find(|record| record.vdi == uuid);
                    let vdi = self.join(n, &record.expect("it is here")).await?;
                    self.vdis.lock().insert(n, vdi);
                    return Ok(false);
                }
            }
        }
        self.vdis.lock().remove(&n);
        self.parting.left(n);
        if !was_behind {
            self.has_left(n).await;
        }
        Ok(true)
    }

    /// False if its log had been left behind in write-through.
    async fn go_down(
        &self,
        n: usize,
        vdi: &Vdi,
        rng: &mut SmallRng,
        manner: &Manner,
    ) -> Result<bool, NotDown> {
        let uuid = vdi.uuid();
        self.cache.drain(uuid).await?;
        self.stop_server(n).await?;
        let drained = self.cache.drain(uuid).await?;
        assert_eq!(drained.0, self.models.get(n).lock().last_lsn(), "all of it is in the store");
        let status = self.cache.vdi_status(uuid).unwrap_or_default();
        vdi.set_policy(status.policy.into()).await?;
        self.models.get(n).lock().parted.may_have_left = true;
        self.may_die(rng, manner);
        vdi.detach(drained).await?;
        self.may_die(rng, manner);
        self.cache.detach(uuid).await.map_err(NotDown::NotForgotten)?;
        Ok(!status.write_through)
    }

    /// The cache said that nothing of it is left.
    pub async fn has_left(&self, n: usize) {
        let (model, uuid) = (self.models.get(n), self.uuid_of(n));
        let segments = self.cache.segments_of(uuid);
        let records = self.cache.attached().await;
        let mut model = model.lock();
        let name = &model.name;
        assert_eq!(segments, 0, "P6: {name} left the cache, and its segments are not free");
        let is_here = records.iter().any(|record| record.vdi == uuid);
        assert!(!is_here, "{name} left the cache, and is there");
        (model.parted.left_cache, model.parted.may_have_left) = (true, true);
        model.parted.name_here = None;
    }

    /// As the operator does with a log that is not the disk's any more: it is put aside, and let go of.
    pub async fn give_up_log(&self, uuid: Uuid, log_id: Uuid) -> Result<(), Refused> {
        while let Err(error) = self.cache.quarantine(uuid).await {
            again("putting a log into quarantine", &error, self.may_have_lost).await?;
        }
        while let Err(error) = self.cache.discard_quarantine(log_id).await {
            again("discarding a log", &error, self.may_have_lost).await?;
        }
        Ok(())
    }

    /// The operator lets go of logs that were put aside and not discarded before the agent died.
    pub async fn discard_logs(&self) {
        for log in self.cache.quarantined() {
            let discarded = self.cache.discard_quarantine(log.log_id).await;
            discarded.expect("a log in quarantine is let go of");
        }
    }

    /// The cache has logs of disks that were detached while no leg took a word of that, and then deleted, and no others.
    pub async fn keeps_logs_of_none(&self) -> bool {
        let models = self.models.all();
        let is_none = |record: &AttachedRecord| {
            let mut models = models.iter().map(|model| model.lock());
            let found = models.find(|model| model.uuid == Some(record.vdi));
            found.is_some_and(|model| model.is_none && model.parted.may_have_left)
        };
        let records = self.cache.attached().await;
        !records.is_empty() && records.iter().all(is_none)
    }

    /// Deletes a disk that nobody has; false if clones hang on it.
    pub async fn delete(
        &self,
        n: usize,
        rng: &mut SmallRng,
        manner: &Manner,
    ) -> Result<bool, Refused> {
        let (model, uuid) = (self.models.get(n), self.uuid_of(n).to_string());
        let mut was_asked = false;
        {
            let mut model = model.lock();
            (model.made, model.parted.may_be_deleted) = (false, true);
        }
        self.may_die(rng, manner);
        loop {
            let deleted = self.store().delete_vdi_and_snapshots(&uuid).await;
            let mut model = model.lock();
            match deleted {
                Ok(()) => model.parted.may_be_in_store = false,
                // Nobody heard of it.
                Err(error) if error.kind == StoreErrorKind::NotFound && was_asked => {
                    model.parted.may_be_in_store = true;
                }
                Err(error) if error.kind == StoreErrorKind::InUse => {
                    (model.made, model.parted.may_be_deleted) = (true, false);
                    return Ok(false);
                }
                Err(error) => {
                    drop(model);
                    was_asked = true;
                    transient("deleting a disk", &error, self.may_have_lost).await?;
                    continue;
                }
            }
            (model.is_none, model.parted.may_be_deleted) = (true, false);
            self.parting.count(|tally| tally.deleted += 1);
            return Ok(true);
        }
    }

    /// False if a deletion of which nobody heard was done.
    pub async fn is_still_there(&self, n: usize) -> Result<bool, Refused> {
        let model = self.models.get(n);
        if !model.lock().parted.may_be_deleted {
            return Ok(true);
        }
        let uuid = self.uuid_of(n).to_string();
        let is_there = loop {
            match self.store().lookup_vdi(&uuid).await {
                Ok(_) => break true,
                Err(error) if error.kind == StoreErrorKind::NotFound => break false,
                Err(error) => transient("looking a disk up", &error, self.may_have_lost).await?,
            }
        };
        let mut model = model.lock();
        (model.made, model.is_none) = (is_there, !is_there);
        (model.parted.may_be_deleted, model.parted.may_be_in_store) = (false, !is_there);
        Ok(is_there)
    }
}
