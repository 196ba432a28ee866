//! Snapshots that are served as disks of their own, read-only (decision 0019).
//!
//! Nothing of one is on the cache device or in the store: it is a hold on the snapshot (`blockstore::holds`), a server
//! (`disk`), and a line in a file of the run directory (`records`), by which the next agent serves it again.
//!
//! Coming up:   held → found in the store → noted → served. At a start: held → served → found in the store (`awaited`).
//! Going down:  struck from the notes → server and reads ended → let go of.
//! So whatever is served is held, a note without a server is served by the next agent, and a detach that a crash cut off is done.

mod awaited;
mod disk;
mod records;

use super::Host;
use super::parts::Parts;
use super::schedules::Spared;
use crate::api::snapshots::AttachedSnapshot;
use crate::api::{Attached, Done, Origin, Vdi};
use crate::error::{Failure, Kind, Result};
use disk::ReadOnlyDisk;
use parking_lot::Mutex;
use records::{Record, Records};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// Pause between attempts to find a snapshot while the store cannot be reached.
const RETRY_PAUSE: Duration = Duration::from_secs(2);

/// The snapshots that are attached to this host.
#[derive(Debug)]
pub struct ReadOnlyDisks {
    /// By disk and LSN. Held for moments only.
    disks: Mutex<BTreeMap<(Uuid, u64), Arc<ReadOnlyDisk>>>,
    records: Records,
    /// Held by whoever attaches or detaches one.
    changing: tokio::sync::Mutex<()>,
}

impl ReadOnlyDisks {
    /// Those that were attached to the last agent in the run directory: they are held from now on.
    #[must_use]
    pub fn recall(parts: &Parts) -> Self {
        let records = Records::of(&parts.run_dir);
        let found = records.read().unwrap_or_else(|failure| {
            tracing::error!("{failure}");
            Vec::new()
        });
        let disks = found.into_iter().map(|record| {
            let key = (record.vdi, record.lsn);
            (key, Arc::new(ReadOnlyDisk::new(&parts.holds, &parts.run_dir, record)))
        });
        let disks = Mutex::new(disks.collect());
        Self { disks, records, changing: tokio::sync::Mutex::default() }
    }

    /// There are notes of any in this run directory.
    #[must_use]
    pub fn were_any(run_dir: &Path) -> bool {
        Records::of(run_dir).read().is_ok_and(|records| !records.is_empty())
    }

    /// Ends all servers. What is attached stays held, and noted.
    async fn stop(&self) {
        // Whoever is attaching one just now ends with the store, at the latest.
        let _changing = tokio::time::timeout(RETRY_PAUSE, self.changing.lock()).await;
        for disk in self.all() {
            if let Err(failure) = disk.stop().await {
                tracing::error!(snapshot = %disk.name(), "its server did not stop in good order: {failure}");
            }
            disk.put_down();
        }
    }

    fn all(&self) -> Vec<Arc<ReadOnlyDisk>> {
        self.disks.lock().values().cloned().collect()
    }

    /// The one of that name: by LSN, else by the label that it had when it was attached.
    fn find(&self, origin: &Origin) -> Result<Arc<ReadOnlyDisk>> {
        let uuid = Uuid::try_parse(&origin.vdi).ok();
        let mut of_disk = self.all();
        of_disk.retain(|disk| disk.record.name == origin.vdi || Some(disk.record.vdi) == uuid);
        let lsn = origin.snapshot.parse().ok();
        if let Some(found) = of_disk.iter().find(|disk| Some(disk.record.lsn) == lsn) {
            return Ok(Arc::clone(found));
        }
        of_disk.retain(|disk| disk.record.label == origin.snapshot);
        let asked = format!("snapshot '{}' of disk '{}'", origin.snapshot, origin.vdi);
        match &of_disk[..] {
            [one] => Ok(Arc::clone(one)),
            [one, other, ..] => {
                let (one, other) = (one.name(), other.name());
                let words = format!("{asked} may be {one} or {other}: name one of them by its LSN");
                Err(Failure::new(Kind::Usage, words))
            }
            [] => {
                let words = format!(
                    "{asked} is not attached to this host: 'ballast status' shows those that are"
                );
                Err(Failure::new(Kind::Conflict, words))
            }
        }
    }

    /// Notes those that are attached, with `more` and without `less`.
    fn note(&self, more: Option<&Record>, less: Option<&Record>) -> Result<()> {
        let noted = self.disks.lock().values().map(|disk| disk.record.clone()).collect::<Vec<_>>();
        let key = |record: &Record| (record.vdi, record.lsn);
        let changed = [more, less].into_iter().flatten().map(key).collect::<Vec<_>>();
        let kept = noted.into_iter().filter(|record| !changed.contains(&key(record)));
        self.records.write(&kept.chain(more.cloned()).collect::<Vec<_>>())
    }
}

/// The snapshot that a name stands for, if it is no disk's: none can have an '@'.
pub(super) fn snapshot_named(name: &str) -> Option<Origin> {
    let (vdi, snapshot) = name.split_once('@')?;
    Some(Origin { vdi: vdi.to_owned(), snapshot: snapshot.to_owned() })
}

impl Host {
    /// Serves a snapshot read-only. One that is served already stays as it is; one that failed is tried again.
    pub(super) async fn attach_snapshot(&self, origin: &Origin) -> Result<Attached> {
        let outcome = self.attach_found(origin).await;
        outcome.map_err(|failure| {
            let Origin { vdi, snapshot } = origin;
            failure.within(format_args!("snapshot '{vdi}@{snapshot}' cannot be attached"))
        })
    }

    async fn attach_found(&self, origin: &Origin) -> Result<Attached> {
        let all = &self.read_only;
        let found = match self.found(origin).await {
            // One that waits for the store itself is as much attached as it can be.
            Err(failure) if failure.kind == Kind::Unavailable => {
                let known = all.find(origin).ok().filter(|disk| disk.is_served());
                return known.map(|disk| attached(&disk)).ok_or(failure);
            }
            found => found?,
        };
        let (found, _spared) = found;
        let _changing = all.changing.lock().await;
        let known = all.disks.lock().get(&(found.vdi, found.lsn)).cloned();
        let disk = match &known {
            Some(disk) if disk.is_up() => return Ok(attached(disk)),
            Some(disk) => Arc::clone(disk),
            None => Arc::new(ReadOnlyDisk::new(&self.parts.holds, &self.parts.run_dir, found)),
        };
        let outcome = self.come_up(&disk).await;
        if let Err(failure) = outcome {
            if known.is_none() {
                // Nothing of it is left.
                disk.let_go();
                if let Err(failure) = all.note(None, Some(&disk.record)) {
                    tracing::warn!(snapshot = %disk.name(), "the next agent serves it, though it was not attached: {failure}");
                }
            } else if failure.kind != Kind::Unavailable {
                let _ = disk.stop().await;
                disk.fail(&failure);
            }
            return Err(failure);
        }
        all.disks.lock().insert((disk.record.vdi, disk.record.lsn), Arc::clone(&disk));
        Ok(attached(&disk))
    }

    async fn come_up(&self, disk: &ReadOnlyDisk) -> Result<()> {
        disk.join(&self.parts, &self.parts.store.get()?).await?;
        let key = (disk.record.vdi, disk.record.lsn);
        let noted = self.read_only.disks.lock().contains_key(&key);
        if !noted {
            self.read_only.note(Some(&disk.record), None)?;
        }
        if disk.is_served() {
            // It only waited for its image.
            return Ok(());
        }
        disk.serve(&self.parts).await
    }

    /// What is to be attached. A snapshot that is only in the log is brought to the store first, and left alone there until it is held.
    async fn found(&self, origin: &Origin) -> Result<(Record, Vec<Spared>)> {
        let (name, vdi) = self.named(&origin.vdi).await?;
        let (found, spared) = self.find_stored(&vdi.to_string(), &origin.snapshot).await?;
        let record = Record {
            vdi,
            name,
            lsn: found.lsn.0,
            label: found.label.as_str().to_owned(),
            time_ms: found.time_ms,
            size: found.size_bytes,
        };
        Ok((record, spared))
    }

    /// Stops serving a snapshot; then it may be deleted.
    pub(super) async fn detach_snapshot(&self, origin: &Origin, force: bool) -> Result<Done> {
        let all = &self.read_only;
        let _changing = all.changing.lock().await;
        let disk = all.find(origin)?;
        if !force && disk.stats().is_some_and(|stats| stats.connected) {
            let words = format!(
                "snapshot {} is in use by a virtual machine: stop the machine or unplug the disk there, or give --force",
                disk.name()
            );
            return Err(Failure::new(Kind::Conflict, words));
        }
        all.note(None, Some(&disk.record))?;
        // What waits for a store that is away fails instead of keeping the snapshot.
        disk.stop().await?;
        disk.let_go();
        all.disks.lock().remove(&(disk.record.vdi, disk.record.lsn));
        self.schedules.release_held();
        tracing::info!(snapshot = %disk.name(), "detached");
        Ok(Done { name: disk.name(), uuid: disk.record.vdi })
    }

    /// Serves those that were attached when the last agent ended: at once, and reads wait until they are found in the store.
    pub(super) async fn bring_back_snapshots(self: &Arc<Self>) {
        for disk in self.read_only.all() {
            disk.waits("it waits for the store");
            if let Err(failure) = disk.serve(&self.parts).await {
                disk.fail(&failure);
                continue;
            }
            let host = Arc::clone(self);
            self.spawn(async move { host.join_snapshot(&disk).await });
        }
    }

    async fn join_snapshot(&self, disk: &Arc<ReadOnlyDisk>) {
        let store = self.parts.store.wait().await;
        loop {
            let changing = self.read_only.changing.lock().await;
            // Without a server an attachment has failed meanwhile, and says so.
            if !self.is_attached(disk) || disk.is_up() || disk.stats().is_none() {
                return;
            }
            match disk.join(&self.parts, &store).await {
                Ok(()) => return,
                Err(failure) if failure.kind == Kind::Unavailable => disk.waits(&failure.message),
                Err(failure) => {
                    disk.fail(&failure);
                    if let Err(failure) = disk.stop().await {
                        tracing::warn!(snapshot = %disk.name(), "its server did not stop in good order: {failure}");
                    }
                    return;
                }
            }
            drop(changing);
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    fn is_attached(&self, disk: &Arc<ReadOnlyDisk>) -> bool {
        let disks = self.read_only.disks.lock();
        disks.get(&(disk.record.vdi, disk.record.lsn)).is_some_and(|known| Arc::ptr_eq(known, disk))
    }

    /// Those whose worker died, by disk and LSN.
    pub(super) fn dead_snapshots(&self) -> Vec<(Uuid, u64)> {
        let disks = self.read_only.all().into_iter();
        let dead = disks.filter(|disk| disk.stats().is_some_and(|stats| stats.worker_failed));
        dead.map(|disk| (disk.record.vdi, disk.record.lsn)).collect()
    }

    /// Serves one again whose worker died; its image is as good as before.
    pub(super) async fn revive_snapshot(&self, key: (Uuid, u64)) {
        let _changing = self.read_only.changing.lock().await;
        let disk = self.read_only.disks.lock().get(&key).cloned();
        let dead = |disk: &Arc<ReadOnlyDisk>| disk.stats().is_some_and(|stats| stats.worker_failed);
        let Some(disk) = disk.filter(dead) else { return };
        tracing::warn!(snapshot = %disk.name(), "its worker died: bringing it back");
        if let Err(failure) = disk.serve(&self.parts).await {
            disk.fail(&failure);
        }
    }

    /// Ends all servers at the agent's stop; the next agent serves them again.
    pub(super) async fn stop_snapshots(&self) {
        self.read_only.stop().await;
    }

    /// Those that are attached, as `status` shows them.
    pub(super) fn attached_snapshots(&self) -> Vec<AttachedSnapshot> {
        let mut list: Vec<_> = self.read_only.all().iter().map(|disk| disk.describe()).collect();
        list.sort_by(|a, b| (&a.vdi, a.snapshot).cmp(&(&b.vdi, b.snapshot)));
        list
    }

    /// The same, as `vdi list` shows disks.
    pub(super) fn snapshots_as_disks(&self) -> Vec<Vdi> {
        let of_one = |found: AttachedSnapshot| Vdi {
            name: found.name,
            uuid: found.uuid,
            size: found.size,
            attached: true,
            socket: found.socket,
            committed_lsn: found.snapshot,
            state: found.state,
            owner: Some(self.name.clone()),
            schedule: None,
            snapshot: Some(found.snapshot),
            read_only: true,
            provisional_clone_of: None,
        };
        self.attached_snapshots().into_iter().map(of_one).collect()
    }
}

fn attached(disk: &ReadOnlyDisk) -> Attached {
    let socket = disk.socket.clone().unwrap_or_default();
    Attached { name: disk.name(), uuid: disk.record.vdi, socket, read_only: true }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_are_told_from_disks_by_their_names() {
        let named = |name| snapshot_named(name).map(|origin| (origin.vdi, origin.snapshot));
        let pair = |vdi: &str, snapshot: &str| Some((vdi.to_owned(), snapshot.to_owned()));
        assert_eq!(named("db"), None);
        assert_eq!(named("db@17"), pair("db", "17"));
        assert_eq!(named("db@a@b"), pair("db", "a@b"));
    }

    /// A deletion that waits for its turn in the store is carried out as late as that closes.
    #[tokio::test]
    async fn what_is_attached_is_held_until_the_agent_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (holds, vdi) = (Arc::default(), Uuid::from_u128(5));
        let record = Record {
            vdi,
            name: "db".into(),
            lsn: 7,
            label: String::new(),
            time_ms: 1,
            size: 1 << 20,
        };
        let disk = Arc::new(ReadOnlyDisk::new(&holds, dir.path(), record));
        let disks = ReadOnlyDisks {
            disks: Mutex::new(BTreeMap::from([((vdi, 7), disk)])),
            records: Records::of(dir.path()),
            changing: tokio::sync::Mutex::default(),
        };
        disks.stop().await;
        assert!(holds.is_held(vdi, blockstore::types::Lsn(7)), "the next agent is to serve it");
        drop(disks);
        assert!(!holds.is_held(vdi, blockstore::types::Lsn(7)));
    }
}
