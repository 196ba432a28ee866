//! Snapshots that this process reads from for longer than one operation: they, and their disks, are not deleted meanwhile.
//!
//! A hold is taken before its snapshot is looked for, under the lock that deletions take, too. So a deletion either sees the
//! hold and is refused, or is done before the snapshot is looked for, which is then not found. Holds do not need the
//! store: they can be taken before it is open, for snapshots that are to be found once it is.
//!
//! What a hold protects from is this process. Collection needs no word from it: a snapshot is a root for as long as its disk
//! lists it.

use crate::types::Lsn;
use hashbrown::HashMap;
use parking_lot::Mutex;
use std::sync::Arc;
use uuid::Uuid;

/// The snapshots that are held, and how often.
#[derive(Debug, Default)]
pub struct SnapshotHolds {
    held: Mutex<HashMap<(Uuid, Lsn), usize>>,
}

/// Keeps a snapshot from being deleted until it is dropped.
#[derive(Debug)]
pub struct SnapshotHold {
    holds: Arc<SnapshotHolds>,
    vdi: Uuid,
    lsn: Lsn,
}

impl SnapshotHolds {
    /// Holds the snapshot of `vdi` at `lsn`, whether there is one or not.
    #[must_use]
    pub fn hold(self: &Arc<Self>, vdi: Uuid, lsn: Lsn) -> SnapshotHold {
        *self.held.lock().entry((vdi, lsn)).or_default() += 1;
        SnapshotHold { holds: Arc::clone(self), vdi, lsn }
    }

    /// Somebody holds the snapshot.
    #[must_use]
    pub fn is_held(&self, vdi: Uuid, lsn: Lsn) -> bool {
        self.held.lock().contains_key(&(vdi, lsn))
    }

    /// The oldest snapshot of the disk that is held, of these or of any.
    pub(crate) fn first_of(&self, vdi: Uuid, among: Option<&[Lsn]>) -> Option<Lsn> {
        let held = self.held.lock();
        let of_disk = held.keys().filter(|(disk, _)| *disk == vdi).map(|(_, lsn)| *lsn);
        of_disk.filter(|lsn| among.is_none_or(|list| list.contains(lsn))).min()
    }
}

impl SnapshotHold {
    /// The disk.
    #[must_use]
    pub fn vdi(&self) -> Uuid {
        self.vdi
    }

    /// The snapshot.
    #[must_use]
    pub fn lsn(&self) -> Lsn {
        self.lsn
    }
}

impl Drop for SnapshotHold {
    fn drop(&mut self) {
        let mut held = self.holds.held.lock();
        if let Some(count) = held.get_mut(&(self.vdi, self.lsn)) {
            *count -= 1;
            if *count == 0 {
                held.remove(&(self.vdi, self.lsn));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_held_until_its_last_hold_is_gone() {
        let holds = Arc::new(SnapshotHolds::default());
        let (disk, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let first = holds.hold(disk, Lsn(7));
        let second = holds.hold(disk, Lsn(7));
        let third = holds.hold(disk, Lsn(5));
        assert_eq!(holds.first_of(disk, None), Some(Lsn(5)));
        assert_eq!(holds.first_of(disk, Some(&[Lsn(6), Lsn(7)])), Some(Lsn(7)));
        assert_eq!(holds.first_of(other, None), None);
        drop((first, third));
        assert!(holds.is_held(disk, Lsn(7)) && !holds.is_held(disk, Lsn(5)));
        drop(second);
        assert_eq!(holds.first_of(disk, None), None);
    }
}
