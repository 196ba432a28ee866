//! A note, once a second, of how far each disk is: so that a loss can be told when the log itself is gone.
//!
//! A hint and nothing else. It is written beside the data path, not flushed, and behind by up to a second; no decision
//! rests on it. A disk's note stays until the disk is detached or rolled back, so that it outlives the cache.

use super::Host;
use crate::api::loss::CacheName;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Weak;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use uuid::Uuid;

const FILE: &str = "progress.json";
const PERIOD: Duration = Duration::from_secs(1);

/// How far a disk was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Its name.
    pub name: String,
    /// The last write that was taken.
    pub last_lsn: u64,
    /// Everything up to here was durable in the log.
    pub flushed_lsn: u64,
    /// When that was, in milliseconds of UNIX time.
    pub at: u64,
    /// Where its log is.
    pub cache: CacheName,
}

/// The notes of a run directory.
#[derive(Debug)]
pub struct Notes {
    path: PathBuf,
    by_disk: Mutex<BTreeMap<Uuid, Note>>,
}

impl Notes {
    /// Those that the last agent left, if they can be read.
    #[must_use]
    pub fn open(run_dir: &Path) -> Self {
        let path = run_dir.join(FILE);
        let text = std::fs::read(&path).unwrap_or_default();
        let by_disk = serde_json::from_slice(&text).unwrap_or_default();
        Self { path, by_disk: Mutex::new(by_disk) }
    }

    /// How far a disk was when that was last noted.
    pub fn of(&self, disk: Uuid) -> Option<Note> {
        self.by_disk.lock().get(&disk).cloned()
    }

    /// The disk was let go of in good order, or its loss was told.
    pub fn forget(&self, disk: Uuid) {
        if self.by_disk.lock().remove(&disk).is_some() {
            self.write();
        }
    }

    /// Takes new notes; a disk of which nothing changed keeps its old one, with the time at which it was so.
    fn take(&self, notes: impl Iterator<Item = (Uuid, Note)>) {
        let mut changed = false;
        {
            let mut by_disk = self.by_disk.lock();
            for (disk, note) in notes {
                let far = |note: &Note| (note.last_lsn, note.flushed_lsn, note.cache.uuid);
                if by_disk.get(&disk).is_none_or(|old| far(old) != far(&note)) {
                    by_disk.insert(disk, note);
                    changed = true;
                }
            }
        }
        if changed {
            self.write();
        }
    }

    fn write(&self) {
        let text = serde_json::to_vec_pretty(&*self.by_disk.lock()).unwrap_or_default();
        let beside = self.path.with_extension("json.new");
        let written =
            std::fs::write(&beside, text).and_then(|()| std::fs::rename(&beside, &self.path));
        if let Err(error) = written {
            tracing::debug!("cannot write {}: {error}", self.path.display());
        }
    }
}

/// Notes how far the disks are for as long as the host lives.
pub(super) async fn keep(host: Weak<Host>) {
    let mut tick = tokio::time::interval(PERIOD);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let Some(host) = host.upgrade() else { return };
        let cache = host.cache_name();
        let at = now_ms();
        let disks: Vec<_> = host.served.lock().values().cloned().collect();
        let notes = disks.iter().filter_map(|disk| {
            let log = host.parts.cache.vdi_status(disk.uuid)?;
            let (last_lsn, flushed_lsn) = (log.last_lsn, log.flushed_lsn);
            let (name, cache) = (disk.name.clone(), cache.clone());
            Some((disk.uuid, Note { name, last_lsn, flushed_lsn, at, cache }))
        });
        host.notes.take(notes);
    }
}

/// Milliseconds of UNIX time.
pub(super) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(last_lsn: u64, at: u64) -> Note {
        let cache = CacheName { uuid: Uuid::from_u128(7), paths: vec!["/c".into()] };
        Note { name: "d".into(), last_lsn, flushed_lsn: 1, at, cache }
    }

    #[test]
    fn notes_outlive_the_agent_until_they_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let notes = Notes::open(dir.path());
        notes.take([(a, note(5, 100)), (b, note(6, 100))].into_iter());
        notes.take([(a, note(5, 200)), (b, note(7, 200))].into_iter());
        let again = Notes::open(dir.path());
        assert_eq!(again.of(a), Some(note(5, 100)), "nothing changed since");
        assert_eq!(again.of(b), Some(note(7, 200)));
        again.forget(a);
        assert_eq!(Notes::open(dir.path()).of(a), None);
        std::fs::write(dir.path().join(FILE), "junk").unwrap();
        assert_eq!(Notes::open(dir.path()).of(b), None, "a hint that cannot be read is no trouble");
    }
}
