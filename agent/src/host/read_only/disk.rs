//! One snapshot that is served read-only.

use super::super::parts::Parts;
use super::super::served::{blocking, server_options};
use super::awaited::Awaited;
use super::records::Record;
use crate::api::VdiState;
use crate::api::snapshots::AttachedSnapshot;
use crate::error::{Failure, Kind, Result};
use crate::names::snapshot_socket_path;
use ballast_vhost::{DiskServer, NotServed, Stats};
use blockstore::types::Lsn;
use blockstore::{SnapshotHold, SnapshotHolds, SnapshotImage, Store};
use cache::read_only::{self, Reader};
use parking_lot::Mutex;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// See the module.
#[derive(Debug)]
pub struct ReadOnlyDisk {
    /// What it is.
    pub record: Record,
    /// Where it is served, unless the run directory's path leaves no room for a socket.
    pub socket: Option<PathBuf>,
    image: Arc<Awaited>,
    /// From before it is looked for until nothing reads it any more.
    hold: Mutex<Option<SnapshotHold>>,
    serving: Mutex<Option<Serving>>,
    view: Mutex<View>,
}

#[derive(Debug)]
struct Serving {
    server: DiskServer,
    reader: Reader,
}

#[derive(Clone, Debug)]
struct View {
    state: VdiState,
    error: Option<String>,
}

impl ReadOnlyDisk {
    /// One that is about to come up: from now on nobody deletes the snapshot.
    #[must_use]
    pub fn new(holds: &Arc<SnapshotHolds>, run_dir: &Path, record: Record) -> Self {
        let hold = holds.hold(record.vdi, Lsn(record.lsn));
        let socket = snapshot_socket_path(run_dir, &record.name, record.vdi, record.lsn);
        Self {
            socket: socket.ok(),
            image: Arc::new(Awaited::new()),
            hold: Mutex::new(Some(hold)),
            serving: Mutex::default(),
            view: Mutex::new(View { state: VdiState::Recovering, error: None }),
            record,
        }
    }

    /// `VDI@LSN`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}@{}", self.record.name, self.record.lsn)
    }

    /// Its server's counters, while it is served.
    pub fn stats(&self) -> Option<Stats> {
        self.serving.lock().as_ref().map(|serving| serving.server.stats())
    }

    /// Front ends find it, whether its image is here or not.
    pub fn is_served(&self) -> bool {
        self.stats().is_some_and(|stats| !stats.worker_failed)
    }

    /// It serves what it should.
    pub fn is_up(&self) -> bool {
        self.image.is_here() && self.is_served()
    }

    /// Finds the snapshot in the store: what waits for it goes on.
    ///
    /// # Errors
    /// It is not there, or not what it was; the store's.
    pub async fn join(&self, parts: &Parts, store: &Arc<Store>) -> Result<()> {
        let image = open(parts, store, self.record.vdi, Lsn(self.record.lsn)).await?;
        let (found, record) = (image.snapshot(), &self.record);
        if (found.time_ms, found.size_bytes) != (record.time_ms, record.size) {
            let words = format!(
                "the store has another snapshot in the place of {0}: it was put back to an earlier state; 'ballast vdi \
                 detach {0}', then look at 'ballast snap list {1}'",
                self.name(),
                record.name
            );
            return Err(Failure::new(Kind::Conflict, words));
        }
        self.image.join(image);
        self.set(VdiState::Running, None);
        tracing::info!(snapshot = %self.name(), "serving, read-only");
        Ok(())
    }

    /// Takes its socket and answers front ends, whether its image is here or not. One that was served before is ended.
    pub async fn serve(&self, parts: &Parts) -> Result<()> {
        self.stop().await?;
        let Record { name, vdi, lsn, size, .. } = &self.record;
        let socket = snapshot_socket_path(&parts.run_dir, name, *vdi, *lsn);
        let socket = socket.map_err(|words| Failure::new(Kind::Usage, words))?;
        let mut options = server_options(&parts.config, socket, serial(*vdi, *lsn));
        options.read_only = true;
        let listening = blocking(move || DiskServer::listen(options)).await?;
        let (disk, reader) = read_only::open(*size, Arc::clone(&self.image) as _)
            .map_err(|error| Failure::caused(Kind::Failed, "no eventfd could be had", &error))?;
        match blocking(move || Ok::<_, Failure>(listening.run(disk))).await? {
            Ok(server) => {
                *self.serving.lock() = Some(Serving { server, reader });
                Ok(())
            }
            Err(not_served) => {
                let NotServed { error, disk } = *not_served;
                drop(disk);
                reader.end().await;
                Err(error.into())
            }
        }
    }

    /// Ends its server, and all reads of the image.
    pub async fn stop(&self) -> Result<()> {
        let Some(Serving { server, reader }) = self.serving.lock().take() else { return Ok(()) };
        blocking(move || {
            drop(server.stop());
            Ok::<_, Failure>(())
        })
        .await?;
        reader.end().await;
        Ok(())
    }

    /// Lets go of the snapshot, of which nothing is read any more: it may be deleted.
    pub fn let_go(&self) {
        self.image.refuse("it was detached");
        self.hold.lock().take();
    }

    /// The agent stops, and nothing is read any more. The snapshot is held all the same, until the agent is gone: a deletion that was
    /// asked for before may be carried out as long as the store is open, and the next agent serves it again.
    pub fn put_down(&self) {
        self.image.refuse("the agent stops");
    }

    /// It is not served, and why.
    pub fn fail(&self, failure: &Failure) {
        tracing::error!(snapshot = %self.name(), "not served: {failure}");
        self.image.refuse(&failure.message);
        self.set(VdiState::Failed, Some(failure.message.clone()));
    }

    /// Its image is not here yet, and why.
    pub fn waits(&self, why: &str) {
        self.image.wait();
        self.set(VdiState::Recovering, Some(why.to_owned()));
    }

    fn set(&self, state: VdiState, error: Option<String>) {
        *self.view.lock() = View { state, error };
    }

    /// What others see of it.
    pub fn describe(&self) -> AttachedSnapshot {
        let View { mut state, mut error } = self.view.lock().clone();
        let stats = self.stats().unwrap_or_default();
        if stats.worker_failed {
            state = VdiState::Failed;
            let words =
                "its worker failed inside (the agent's log has the details): attach it again";
            error = Some(words.to_owned());
        }
        AttachedSnapshot {
            name: self.name(),
            vdi: self.record.name.clone(),
            uuid: self.record.vdi,
            snapshot: self.record.lsn,
            label: self.record.label.clone(),
            time: self.record.time_ms,
            size: self.record.size,
            read_only: true,
            socket: self.socket.clone(),
            state,
            last_error: error,
            front_end_connected: stats.connected,
            waiting_reads: stats.fetching,
            reads: stats.reads,
            read_bytes: stats.read_bytes,
            flushes: stats.flushes,
            refused: stats.refused,
            failed: stats.failed,
        }
    }
}

/// The snapshot's image, held by itself.
pub async fn open(parts: &Parts, store: &Arc<Store>, vdi: Uuid, lsn: Lsn) -> Result<SnapshotImage> {
    Ok(store.open_snapshot(parts.holds.hold(vdi, lsn)).await?)
}

/// What the guest sees as serial number: another than the disk's own, for one guest may have both.
fn serial(vdi: Uuid, lsn: u64) -> String {
    let (vdi, lsn) = (vdi.simple().to_string(), lsn.to_string());
    let room = 19usize.saturating_sub(lsn.len());
    format!("{}@{lsn}", &vdi[..room.min(vdi.len())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_fit_and_tell_snapshots_apart() {
        let vdi = Uuid::from_u128(0x1234_5678_9abc_def0_1122_3344_5566_7788);
        assert_eq!(serial(vdi, 7), "123456789abcdef011@7");
        for lsn in [0, 99, (1 << 48) - 1] {
            let serial = serial(vdi, lsn);
            assert!(serial.len() <= 20 && serial.ends_with(&format!("@{lsn}")), "{serial}");
        }
    }
}
