//! Going back: a disk that nobody has becomes one of its snapshots again.
//!
//! One head is written, whatever the size. It has the snapshot's root, height and size. What the disk was until then is kept
//! as a snapshot that the same head names, unless the caller gives it up.
//!
//! Both take a point of the disk's write order that no log had: the snapshot of what was, then the rollback itself. So no two
//! images have one LSN, and a log that ends before is behind the store. Nor does the log that was drained last go on
//! from here (rule L6): what its cache holds clean is the disk as it was. The counter of births is above all that any
//! snapshot holds, and the last snapshot's with it: nothing of the snapshot is ever freed by the disk (rule C4).
//! A crash before the head leaves the disk as it was, and one leaf of the list as an unused claim.

use super::Store;
use crate::alloc::Purpose;
use crate::alloc::runs::merge;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::snapshot::{Snapshot, SnapshotLabel};
use crate::format::vdi::{COMMITTED_LSN_MAX, GIVEN_UP, VdiHead};
use crate::io::now_ms;
use crate::root::{Garbage, GarbageSink, Subtree};
use crate::sabotage::{self, Bug};
use crate::snapshots::change::{no_snapshot, writes};
use crate::snapshots::edit::Ground;
use crate::types::{Birth, Lsn};
use std::sync::Arc;

/// What a rollback to a snapshot did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewound {
    /// The disk is as of this LSN now: that of the rollback.
    pub committed: Lsn,
    /// The snapshot of what it was before, if that was to be kept.
    pub kept: Option<Lsn>,
    /// Bytes that the guest sees now.
    pub size_bytes: u64,
}

impl Store {
    /// Makes a detached disk what it was at its snapshot `to`. What it is now becomes a snapshot labelled `keep`; without,
    /// it is given up.
    ///
    /// # Errors
    /// `NotFound`: no such disk or snapshot; `InUse`: it is attached; `Invalid`: its LSNs are used up; `NoSpace`. Nothing was
    /// changed. The device's.
    pub async fn rewind_vdi(
        self: &Arc<Self>,
        name_or_uuid: &str,
        to: Lsn,
        keep: Option<SnapshotLabel>,
    ) -> Result<Rewound> {
        let name = name_or_uuid.to_owned();
        self.change(move |store| async move { store.rewind_now(&name, to, keep).await }).await
    }

    async fn rewind_now(
        &self,
        name_or_uuid: &str,
        to: Lsn,
        keep: Option<SnapshotLabel>,
    ) -> Result<Rewound> {
        let core = &self.core;
        let reclaimer = Arc::clone(&core.writer()?.reclaimer);
        let found = self.find_vdi(name_or_uuid).await?;
        self.refuse_attached(&found, "roll it back").await?;
        let (head, object) = (&found.head, found.object());
        let reader = &self.control_reader();
        let target = reader.find_snapshot(&head.snapshots, to).await?;
        let (_, target) = target.ok_or_else(|| no_snapshot(&object, to))?;
        let kept = keep.is_some().then(|| head.committed.plus(1));
        let committed = kept.unwrap_or(head.committed).plus(1);
        if committed.0 > COMMITTED_LSN_MAX {
            let words = format!("its LSNs are used up at {}: clone it instead", head.committed);
            return Err(StoreError::new(StoreErrorKind::Invalid, object, words));
        }
        let birth = head.birth.plus(1);
        let owns = sabotage::on(Bug::RollbackOwnsSnapshot);
        let last_snapshot_birth = if owns { Birth(0) } else { birth };
        let without_lsn = sabotage::on(Bug::RollbackWithoutLsn);
        let committed = if without_lsn { kept.unwrap_or(head.committed) } else { committed };
        let mut next = VdiHead {
            root: target.root,
            height: target.height,
            size_bytes: target.size_bytes,
            committed,
            committed_ms: now_ms(),
            birth,
            last_snapshot_birth,
            last_log: Some(GIVEN_UP),
            ..head.clone()
        };
        let (mut garbage, mut added) = (Garbage::default(), Vec::new());
        if let (Some(label), Some(lsn)) = (keep, kept) {
            let present = Snapshot {
                lsn,
                time_ms: now_ms(),
                label,
                root: head.root,
                height: head.height,
                size_bytes: head.size_bytes,
                birth: head.birth,
            };
            let (allocator, io) = (reclaimer.allocator(), &self.control_io);
            let ground = Ground { reader, allocator, io, purpose: Purpose::Normal };
            let edited = ground.append(head.snapshots, vec![present], birth, None).await?;
            core.write_fresh(io, &object, &writes(&edited)).await?;
            added = merge(edited.writes.iter().map(|(gba, _)| *gba).collect());
            next.snapshots = edited.index;
            garbage.blocks = edited.replaced;
        } else if head.root.is_exclusive(head.last_snapshot_birth) {
            let last_snapshot = head.last_snapshot_birth;
            let (pointer, level) = (head.root, head.height);
            garbage.subtrees.push(Subtree { pointer, level, last_snapshot });
        }
        let size_bytes = next.size_bytes;
        let since = reclaimer.stay();
        let swap = core.records.swap(&core.io, &found.view, next).await?;
        swap.done(|| object)?;
        reclaimer.allocator().settle(&added);
        reclaimer.discard(garbage, since);
        Ok(Rewound { committed, kept, size_bytes })
    }
}
