//! Coming up with the store at hand: a disk is found or made there, its log reserved, attached in the store, recovered.

use crate::host::{Agent, Checked, Refused, again, pause, transient};
use crate::world::World;
use blockstore::device::sim::SimDevice;
use blockstore::types::BLOCK_SIZE;
use blockstore::{AttachOptions, StoreErrorKind};
use cache::backing::Backing;
use cache::disk::AttachedDisk;
use cache::{CacheError, VdiIdentity};
use std::sync::Arc;
use uuid::Uuid;

/// What came of an attempt to bring a disk up.
pub enum Up {
    Disk(Box<AttachedDisk>),
    /// It is new, and there are no segments for it now.
    NoRoom,
    /// It was found, and is not there: a target forgot it, whose making nobody was told of.
    Gone,
}

impl Agent {
    /// All disks but clones come up, with the store at hand.
    pub async fn attach_all(&self, world: &mut World) -> Result<Vec<AttachedDisk>, Refused> {
        let mut disks = Vec::new();
        for (n, blocks) in world.profile.disks.clone().into_iter().enumerate() {
            loop {
                let (uuid, bytes) = self.make(n, blocks * BLOCK_SIZE as u64).await?;
                match self.attach(n, uuid, bytes).await? {
                    Up::Disk(disk) => break disks.push(*disk),
                    // A new disk has to wait for evictions, and so for workers, which do not run yet: the next life.
                    Up::NoRoom => return Ok(disks),
                    Up::Gone => {}
                }
            }
        }
        Ok(disks)
    }

    /// Finds a disk, or makes it; with its size.
    pub async fn make(&self, n: usize, bytes: u64) -> Result<(Uuid, u64), Refused> {
        let (store, lenient) = (self.store(), self.may_have_lost);
        let (name, is_made) = {
            let model = self.models.get(n);
            let model = model.lock();
            (model.in_store(), model.made)
        };
        loop {
            match store.lookup_vdi(&name).await {
                Ok(info) => return Ok((info.uuid, info.size_bytes)),
                Err(error) if error.kind == StoreErrorKind::NotFound => {
                    if is_made {
                        assert!(lenient, "{name} is gone from the store: {error}");
                        return Err(Refused(error.to_string()));
                    }
                    match store.create_vdi(&name, bytes).await {
                        Ok(info) => {
                            self.models.get(n).lock().made = true;
                            return Ok((info.uuid, info.size_bytes));
                        }
                        Err(error) if error.kind == StoreErrorKind::AlreadyExists => {}
                        // A device that is full, on which this host has no room for nodes yet.
                        Err(error) if error.kind == StoreErrorKind::NoSpace => pause().await,
                        Err(error) => transient("creating a disk", &error, lenient).await?,
                    }
                }
                Err(error) => transient("looking a disk up", &error, lenient).await?,
            }
        }
    }

    /// Attaches a disk in the store and here.
    pub async fn attach(&self, n: usize, uuid: Uuid, size_bytes: u64) -> Result<Up, Refused> {
        let model = self.models.get(n);
        let identity = VdiIdentity { uuid, name: model.lock().name.clone(), size_bytes };
        let lenient = self.may_have_lost;
        let log_id = loop {
            match self.cache.reserve(&identity).await {
                Ok(log_id) => break Uuid::from_u128(log_id),
                Err(CacheError::NoSegments { .. }) if n > 0 => return Ok(Up::NoRoom),
                Err(error) => again("reserving a log", &error, lenient).await?,
            }
        };
        let vdi = loop {
            // A log that was served may hold records: it goes on only where it ended (rule L6).
            let parts = self.parting.plan.is_any();
            let was_served = parts && self.cache.log_of(uuid).await.is_some_and(|(_, was)| was);
            let (store, options) = (self.store(), AttachOptions { log_id });
            let attached = match was_served {
                true => store.resume(uuid, options).await,
                false => store.attach(uuid, options).await,
            };
            match attached {
                Ok(vdi) => break vdi,
                Err(error) if error.kind == StoreErrorKind::NotFound && !model.lock().made => {
                    match self.cache.unreserve(uuid).await {
                        Ok(()) => return Ok(Up::Gone),
                        Err(error) => again("giving a log back", &error, lenient).await?,
                    }
                }
                // It was rolled back, and the device had taken no word of its leaving: the operator gives that log up.
                Err(error)
                    if error.kind == StoreErrorKind::InUse
                        && model.lock().parted.was_rolled_back =>
                {
                    self.give_up_log(uuid, log_id).await?;
                    return Ok(Up::Gone);
                }
                Err(error) => transient("attaching", &error, lenient).await?,
            }
        };
        let committed = vdi.committed();
        model.lock().settle_rollback(committed.lsn.0, committed.size_bytes);
        let (san, judge) = (Arc::clone(&self.san), Arc::clone(&model));
        let backing = Arc::new(Checked { vdi: Arc::clone(&vdi), model: judge, san });
        let stated = self.stated(self.cache.identity().await.cache, uuid, log_id.as_u128());
        loop {
            match self.cache.attach(&identity, Arc::<Checked>::clone(&backing)).await {
                Ok(attached) => {
                    let mut model = model.lock();
                    model.grow(attached.disk.size_bytes());
                    model.recovered(attached.disk.staged_lsn().0, stated);
                    model.attached_at(Backing::committed(&*vdi).0);
                    // One that was made by a command of unknown outcome is there for good once something was flushed after it.
                    (model.made, model.uuid) = (true, Some(uuid));
                    model.parted.may_have_left = false;
                    model.parted.was_rolled_back = false;
                    self.vdis.lock().insert(n, Arc::clone(&vdi));
                    return Ok(Up::Disk(Box::new(attached)));
                }
                Err(CacheError::NoSegments { .. }) if n > 0 => return Ok(Up::NoRoom),
                // Nobody hears of it.
                Err(_) if self.hosts.iter().any(SimDevice::is_dead) => {
                    std::future::pending::<()>().await;
                }
                Err(error) => again("recovering a log", &error, lenient).await?,
            }
        }
    }
}
