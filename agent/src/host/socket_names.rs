//! Disks whose socket is not called as they are, in the run directory: clones of which the name was taken in the store.
//!
//! A guest knows its disk by the socket. So the clone keeps the socket that it began with for as long as it is attached here, also
//! when the agent starts anew, and no other disk gets that socket meanwhile.

use crate::error::{Failure, Kind, Result};
use crate::run_dir::replace;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use uuid::Uuid;

const FILE: &str = "socket-names.json";

/// See the module.
#[derive(Debug)]
pub(super) struct SocketNames {
    path: PathBuf,
    by_disk: Mutex<BTreeMap<Uuid, String>>,
}

impl SocketNames {
    /// Those that the last agent left. A run directory that does not outlive a boot of the host takes them with it, as it does the
    /// sockets.
    pub(super) fn open(run_dir: &Path) -> Self {
        let path = run_dir.join(FILE);
        let text = std::fs::read(&path).unwrap_or_else(|error| {
            if error.kind() != std::io::ErrorKind::NotFound {
                tracing::warn!(
                    "cannot read {}: {error}: disks get the sockets of their names",
                    path.display()
                );
            }
            Vec::new()
        });
        let by_disk = match serde_json::from_slice(&text) {
            Ok(by_disk) => by_disk,
            Err(error) => {
                if !text.is_empty() {
                    tracing::warn!(
                        "{} makes no sense ({error}): disks get the sockets of their names",
                        path.display()
                    );
                }
                BTreeMap::new()
            }
        };
        Self { path, by_disk: Mutex::new(by_disk) }
    }

    /// The name that a disk's socket has, if not the disk's own.
    pub(super) fn of(&self, disk: Uuid) -> Option<String> {
        self.by_disk.lock().get(&disk).cloned()
    }

    /// From now on, and durably, the disk's socket has this name.
    ///
    /// # Errors
    /// Names the file; nothing was changed.
    pub(super) fn keep(&self, disk: Uuid, name: &str) -> Result<()> {
        let mut by_disk = self.by_disk.lock();
        if by_disk.get(&disk).is_some_and(|kept| kept == name) {
            return Ok(());
        }
        let mut next = by_disk.clone();
        next.insert(disk, name.to_owned());
        self.write(&next)?;
        *by_disk = next;
        Ok(())
    }

    /// Only these disks are this host's: of others an agent that was cut off has left names. If there is none, the agent may have been
    /// started with another cache, once: their front ends know these sockets when it comes back.
    pub(super) fn keep_only(&self, disks: &[Uuid]) {
        if disks.is_empty() {
            return;
        }
        let others = |disk: &Uuid| !disks.contains(disk);
        let gone: Vec<Uuid> = self.by_disk.lock().keys().copied().filter(others).collect();
        gone.into_iter().for_each(|disk| self.forget(disk));
    }

    /// The disk is none of this host's any more.
    pub(super) fn forget(&self, disk: Uuid) {
        let mut by_disk = self.by_disk.lock();
        if by_disk.remove(&disk).is_some()
            && let Err(failure) = self.write(&by_disk)
        {
            // Should the disk come back to this host, it has the former socket again.
            tracing::warn!("{failure}");
        }
    }

    fn write(&self, by_disk: &BTreeMap<Uuid, String>) -> Result<()> {
        let text = serde_json::to_vec_pretty(by_disk).unwrap_or_default();
        replace(&self.path, &text).map_err(|error| {
            let words = format!(
                "cannot note in {} which socket a disk has: {error}; see to the run directory",
                self.path.display()
            );
            Failure::new(Kind::Failed, words)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_keeps_its_name_until_its_disk_leaves() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let names = SocketNames::open(dir.path());
        names.keep(a, "db").unwrap();
        names.keep(b, "web").unwrap();
        let again = SocketNames::open(dir.path());
        assert_eq!(again.of(a).as_deref(), Some("db"));
        again.forget(a);
        let last = SocketNames::open(dir.path());
        assert_eq!((last.of(a), last.of(b).as_deref()), (None, Some("web")));
        last.keep_only(&[b]);
        assert_eq!(SocketNames::open(dir.path()).of(b).as_deref(), Some("web"));
        last.keep_only(&[]);
        assert_eq!(SocketNames::open(dir.path()).of(b).as_deref(), Some("web"), "another cache");
        last.keep_only(&[a]);
        assert_eq!(SocketNames::open(dir.path()).of(b), None);
        let full = SocketNames::open(Path::new("/proc/nowhere"));
        full.keep(a, "db").unwrap_err();
        assert_eq!(full.of(a), None, "what is not durable does not hold");
    }
}
