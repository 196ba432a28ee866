//! Which snapshots are attached, in the run directory: what the next agent serves again.
//!
//! Replaced as a whole, by a rename after a flush: a crash leaves the former list or the new one. A run directory that does not
//! outlive a boot of the host takes the list with it, as it does the sockets.

use crate::error::{Failure, Kind, Result};
use crate::run_dir::replace;
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use uuid::Uuid;

const FILE: &str = "snapshots.json";

/// A snapshot that is attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its disk.
    pub vdi: Uuid,
    /// The disk's name.
    pub name: String,
    /// The snapshot.
    pub lsn: u64,
    /// Its label when it was attached.
    pub label: String,
    /// When it was taken, in milliseconds of UNIX time: tells it from another at the same LSN, in a store that was put back.
    pub time_ms: u64,
    /// Bytes.
    pub size: u64,
}

/// The file.
#[derive(Debug)]
pub struct Records(PathBuf);

impl Records {
    /// The list of a run directory.
    #[must_use]
    pub fn of(run_dir: &Path) -> Self {
        Self(run_dir.join(FILE))
    }

    /// What is in it; nothing if there is none.
    ///
    /// # Errors
    /// Names the file and what to do.
    pub fn read(&self) -> Result<Vec<Record>> {
        let text = match std::fs::read(&self.0) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(self.unreadable(&error)),
            Ok(text) => text,
        };
        serde_json::from_slice(&text).map_err(|error| self.unreadable(&error))
    }

    /// Replaces it.
    ///
    /// # Errors
    /// Names the file; the former list stands.
    pub fn write(&self, records: &[Record]) -> Result<()> {
        let text = serde_json::to_vec_pretty(records).unwrap_or_default();
        replace(&self.0, &text).map_err(|error| {
            let words = format!(
                "cannot note in {} which snapshots are attached: {error}; see to the run directory, then try again",
                self.0.display()
            );
            Failure::new(Kind::Failed, words)
        })
    }

    fn unreadable(&self, error: &(dyn std::error::Error + 'static)) -> Failure {
        let words = format!(
            "cannot read in {} which snapshots were attached; attach them again",
            self.0.display()
        );
        Failure::caused(Kind::Failed, words, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_outlives_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::of(dir.path());
        assert_eq!(records.read().unwrap(), []);
        let (vdi, name, label) = (Uuid::from_u128(5), "db".into(), "a \"label\"".into());
        let list = [Record { vdi, name, lsn: 7, label, time_ms: 9, size: 1 << 40 }];
        records.write(&list).unwrap();
        assert_eq!(Records::of(dir.path()).read().unwrap(), list);
        records.write(&[]).unwrap();
        assert_eq!(records.read().unwrap(), []);
        std::fs::write(dir.path().join(FILE), "junk").unwrap();
        let error = records.read().unwrap_err();
        assert!(error.message.contains(FILE) && error.message.contains("again"), "{error}");
    }
}
