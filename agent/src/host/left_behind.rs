//! Logs that write-through left behind, as files of the run directory: `left-behind/LOG`, whole or not there.
//!
//! A log that is listed here is never opened without the store, and with it only if all is there that was promised to
//! survive; see `cache::Witness`.

use blockstore::types::Lsn;
use cache::{LeftBehind, Witness};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{Error, ErrorKind, Result, Write};
use std::path::{Path, PathBuf};
use uuid::Uuid;

const FOLDER: &str = "left-behind";

/// See the module.
#[derive(Debug)]
pub struct LogsLeftBehind {
    folder: PathBuf,
}

/// What a file holds.
#[derive(Debug, Serialize, Deserialize)]
struct Noted {
    epoch: u32,
    flushed_lsn: u64,
    last_lsn: u64,
}

impl LogsLeftBehind {
    /// Those of a run directory.
    #[must_use]
    pub fn new(run_dir: &Path) -> Self {
        Self { folder: run_dir.join(FOLDER) }
    }

    fn path(&self, log_id: u128) -> PathBuf {
        self.folder.join(Uuid::from_u128(log_id).to_string())
    }
}

impl Witness for LogsLeftBehind {
    fn note(&self, log_id: u128, behind: &LeftBehind) -> Result<()> {
        let noted =
            Noted { epoch: behind.epoch, flushed_lsn: behind.flushed.0, last_lsn: behind.staged.0 };
        std::fs::create_dir_all(&self.folder)?;
        let path = self.path(log_id);
        let new = path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(&noted)?)?;
        file.sync_all()?;
        std::fs::rename(&new, &path)?;
        File::open(&self.folder)?.sync_all()?;
        // The folder itself may be new.
        self.folder.parent().map_or(Ok(()), |run_dir| File::open(run_dir)?.sync_all())
    }

    fn find(&self, log_id: u128) -> Result<Option<LeftBehind>> {
        let path = self.path(log_id);
        let content = match std::fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            content => content?,
        };
        let noted: Noted = serde_json::from_slice(&content).map_err(|error| {
            let words = format!(
                "{} is damaged ({error}): it says that a log may be behind the store; remove it only if the cache never \
                 failed under that disk",
                path.display()
            );
            Error::new(ErrorKind::InvalidData, words)
        })?;
        Ok(Some(LeftBehind {
            epoch: noted.epoch,
            flushed: Lsn(noted.flushed_lsn),
            staged: Lsn(noted.last_lsn),
        }))
    }

    fn forget(&self, log_id: u128) {
        let path = self.path(log_id);
        if path.exists()
            && let Err(error) = std::fs::remove_file(&path)
        {
            tracing::warn!("cannot remove {}: {error}", path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn behind(flushed: u64) -> LeftBehind {
        LeftBehind { epoch: 3, flushed: Lsn(flushed), staged: Lsn(9) }
    }

    #[test]
    fn a_log_is_remembered_until_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogsLeftBehind::new(dir.path());
        assert_eq!(logs.find(7).unwrap(), None);
        logs.forget(7);
        logs.note(7, &behind(1)).unwrap();
        logs.note(7, &behind(2)).unwrap();
        let again = LogsLeftBehind::new(dir.path());
        assert_eq!(again.find(7).unwrap(), Some(behind(2)));
        assert_eq!(again.find(8).unwrap(), None);
        again.forget(7);
        assert_eq!(logs.find(7).unwrap(), None);
    }

    #[test]
    fn a_note_that_cannot_be_read_is_not_taken_for_none() {
        let dir = tempfile::tempdir().unwrap();
        let logs = LogsLeftBehind::new(dir.path());
        logs.note(7, &behind(1)).unwrap();
        for content in ["", "{}", "\u{0}\u{0}"] {
            std::fs::write(logs.path(7), content).unwrap();
            let error = logs.find(7).unwrap_err();
            assert!(error.to_string().contains("is damaged"), "{error}");
        }
        std::fs::remove_file(logs.path(7)).unwrap();
        std::fs::create_dir(logs.path(7)).unwrap();
        logs.find(7).unwrap_err();
    }
}
