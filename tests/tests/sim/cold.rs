//! A start without the store: disks come up from the local device alone, and the store joins when it comes. The agent's
//! `Served` does the same in the same order.

use crate::host::{Agent, Checked, Refused, again, transient};
use blockstore::{AttachOptions, Vdi};
use cache::backing::Backing;
use cache::disk::AttachedDisk;
use cache::{AttachedRecord, CacheError, VdiIdentity};
use std::sync::Arc;
use uuid::Uuid;

impl Agent {
    /// Brings all disks up from the local device alone, but for clones; none if that cannot be, because one was never served.
    pub async fn attach_alone(&self) -> Result<Option<Vec<AttachedDisk>>, Refused> {
        let records = self.cache.attached().await;
        let record = |n: usize| record_of(&records, &self.models.get(n).lock().name);
        let served = |n| record(n).filter(|record| record.was_served);
        for record in records.iter().filter(|record| !record.was_served) {
            let refused = self.cache.attach_alone(record.vdi).await;
            assert!(matches!(refused, Err(CacheError::NeverServed { .. })), "never served");
        }
        let known: Option<Vec<AttachedRecord>> = (0..self.disks).map(served).collect();
        let Some(known) = known else { return Ok(None) };
        let mut disks = Vec::new();
        for (n, record) in known.iter().enumerate() {
            disks.push(self.recover_alone(n, record).await?);
        }
        Ok(Some(disks))
    }

    /// Brings one disk up from the local device alone.
    pub async fn recover_alone(
        &self,
        n: usize,
        record: &AttachedRecord,
    ) -> Result<AttachedDisk, Refused> {
        let cache = self.cache.identity().await.cache;
        let stated = self.stated(cache, record.vdi, record.log_id);
        loop {
            match self.cache.attach_alone(record.vdi).await {
                Ok(attached) => {
                    let model = self.models.get(n);
                    let mut model = model.lock();
                    model.uuid = Some(record.vdi);
                    model.grow(attached.disk.size_bytes());
                    model.recovered(attached.disk.staged_lsn().0, stated);
                    return Ok(attached);
                }
                Err(error) => again("recovering a log alone", &error, self.may_have_lost).await?,
            }
        }
    }

    /// The store comes: it is compared with each log, has the disk attached, and joins.
    pub async fn join_all(&self) -> Result<(), Refused> {
        self.open_store().await?;
        let records = self.cache.attached().await;
        for n in 0..self.disks {
            let record = record_of(&records, &self.models.get(n).lock().name);
            let vdi = self.join(n, &record.expect("it is served")).await?;
            self.vdis.lock().insert(n, vdi);
        }
        Ok(())
    }

    pub async fn join(&self, n: usize, record: &AttachedRecord) -> Result<Arc<Vdi>, Refused> {
        let lenient = self.may_have_lost;
        let vdi = loop {
            let found = match self.store().lookup_vdi(&record.vdi.to_string()).await {
                Ok(found) => found,
                Err(error) => {
                    transient("looking a disk up", &error, lenient).await?;
                    continue;
                }
            };
            if let Err(error) = self.cache.verify(record.vdi, found.committed_lsn).await {
                again("comparing a log with the store", &error, lenient).await?;
                continue;
            }
            let (uuid, size_bytes) = (record.vdi, record.size_bytes);
            let identity = VdiIdentity { uuid, name: record.name.clone(), size_bytes };
            let reserved = self.cache.reserve(&identity).await;
            let log_id = reserved.expect("a log that is open is known");
            assert_eq!(log_id, record.log_id, "a disk keeps its log");
            let options = AttachOptions { log_id: Uuid::from_u128(log_id) };
            // A clone's log was served: it goes on only where it ended (rule L6).
            let attached = match n < self.disks {
                true => self.store().attach(uuid, options).await,
                false => self.store().resume(uuid, options).await,
            };
            match attached {
                Ok(vdi) => break vdi,
                Err(error) => transient("attaching", &error, lenient).await?,
            }
        };
        let model = self.models.get(n);
        model.lock().attached_at(Backing::committed(&*vdi).0);
        model.lock().parted.may_have_left = false;
        let san = Arc::clone(&self.san);
        let backing = Arc::new(Checked { vdi: Arc::clone(&vdi), model, san });
        while let Err(error) = self.cache.join(record.vdi, Arc::<Checked>::clone(&backing)).await {
            again("joining the store", &error, lenient).await?;
        }
        let bytes = vdi.committed().size_bytes;
        if bytes > record.size_bytes {
            // A growth that a crash cut off.
            while let Err(error) = self.cache.resize(record.vdi, bytes).await {
                again("growing a disk", &error, lenient).await?;
            }
        }
        Ok(vdi)
    }
}

/// What the cache has noted of a disk.
pub fn record_of(records: &[AttachedRecord], name: &str) -> Option<AttachedRecord> {
    records.iter().find(|record| record.name == name).cloned()
}

/// As [`record_of`], whatever its name came to be.
pub fn record_named(
    records: &[AttachedRecord],
    name: &str,
    uuid: Option<Uuid>,
) -> Option<AttachedRecord> {
    let same = records.iter().find(|record| Some(record.vdi) == uuid);
    same.cloned().or_else(|| record_of(records, name))
}
