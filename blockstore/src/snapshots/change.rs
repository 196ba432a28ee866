//! Deleting and labelling snapshots, of a disk that is attached here or nowhere.

use crate::alloc::Purpose;
use crate::alloc::runs::merge;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::snapshot::{Snapshot, SnapshotLabel};
use crate::format::vdi::VdiHead;
use crate::io::{Io, Patience, Write};
use crate::root::{Garbage, Root};
use crate::sabotage::{self, Bug};
use crate::snapshots::Page;
use crate::snapshots::edit::{Edited, Edits, Ground};
use crate::tree::Reader;
use crate::types::{Birth, Lsn};
use crate::vdi::{Vdi, VdiInner};
use std::sync::Arc;

/// What is to become of snapshots.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// They are deleted. What only they hold is free after collection.
    Delete(Vec<Lsn>),
    /// One gets another label.
    Label(Lsn, SnapshotLabel),
}

impl Change {
    /// More room is not needed to give room back (rule C6).
    pub(crate) fn purpose(&self) -> Purpose {
        match self {
            Self::Delete(_) => Purpose::GivesBack,
            Self::Label(..) => Purpose::Normal,
        }
    }

    /// The head after the change, and what to write before it.
    ///
    /// # Errors
    /// `NotFound` if there is no such snapshot: nothing was changed; those of reading.
    pub(crate) async fn apply(
        &self,
        ground: &Ground<'_>,
        object: &str,
        head: &VdiHead,
    ) -> Result<(VdiHead, Edited)> {
        let wanted: Vec<Lsn> = match self {
            Self::Delete(wanted) => wanted.clone(),
            Self::Label(lsn, _) => vec![*lsn],
        };
        let mut edits = Edits::new();
        for lsn in wanted {
            let found = ground.reader.find_snapshot(&head.snapshots, lsn).await?;
            let (place, snapshot) = found.ok_or_else(|| no_snapshot(object, lsn))?;
            let edit = match self {
                Self::Delete(_) => None,
                Self::Label(_, label) => Some(Snapshot { label: label.clone(), ..snapshot }),
            };
            edits.insert(place, edit);
        }
        let birth = head.birth.plus(1);
        let edited = ground.change(head.snapshots, &edits, birth).await?;
        let falls = sabotage::on(Bug::BirthFalls) && matches!(self, Self::Delete(_));
        let last_snapshot_birth = if falls { Birth(0) } else { head.last_snapshot_birth };
        let snapshots = edited.index;
        Ok((VdiHead { birth, last_snapshot_birth, snapshots, ..head.clone() }, edited))
    }
}

/// What [`Edited`] says to write.
pub(crate) fn writes(edited: &Edited) -> Vec<Write> {
    edited.writes.iter().map(|(gba, block)| (*gba, vec![block.clone()])).collect()
}

pub(crate) fn no_snapshot(object: &str, lsn: Lsn) -> StoreError {
    StoreError::new(
        StoreErrorKind::NotFound,
        format!("{object}, snapshot {lsn}"),
        "there is no such snapshot; 'ballast snap list' shows those that are",
    )
}

impl Vdi {
    /// A page of the disk's snapshots. Waits while the store is unreachable.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn snapshots(&self, page: Page) -> Result<Vec<Snapshot>> {
        let inner = &self.inner;
        // Held until it was read: no block of this version is used again before.
        let root = inner.root.load_full();
        let list = inner.core.reader.snapshot_page(&root.head.snapshots, page).await;
        list.map_err(|error| inner.named(error))
    }

    /// As long as `io` is patient: a commit that waits for space must not make the operator's commands wait with it.
    pub(crate) async fn change_snapshots(&self, change: Change, io: Io) -> Result<()> {
        self.unstoppable(move |inner| async move { inner.change_snapshots(&change, &io).await })
            .await
    }
}

impl VdiInner {
    async fn change_snapshots(&self, change: &Change, io: &Io) -> Result<()> {
        let mut control = match io.patience() {
            Patience::Forever => self.control.lock().await,
            Patience::Limited(limit) => {
                let lock = tokio::time::timeout(limit, self.control.lock()).await;
                lock.map_err(|_| {
                    StoreError::new(
                        StoreErrorKind::Unreachable,
                        self.object(),
                        "a commit of it waits, for the device or for space: nothing was changed; see 'ballast status', try again later",
                    )
                })?
            }
        };
        control.check(self)?;
        loop {
            let base = self.root.load_full();
            let reader = &Reader { io: io.clone(), ..self.core.reader.clone() };
            let ground = Ground { io, reader, ..self.snapshot_ground(change.purpose())? };
            let (next, edited) = change.apply(&ground, &self.object(), &base.head).await?;
            self.core.io.write_durable(&writes(&edited)).await?;
            control.last_leaf = None;
            let added = merge(edited.writes.iter().map(|(gba, _)| *gba).collect());
            if let Some(since) = self.swap_head(&mut control, next.clone()).await? {
                self.core.allocator()?.settle(&added);
                let next = Root::new(next, Arc::clone(&self.sink));
                self.root.store(Arc::clone(&next));
                let garbage = Garbage { blocks: edited.replaced, ..Garbage::default() };
                base.retire(next, garbage, since);
                return Ok(());
            }
            self.core.allocator()?.put_back(&added);
        }
    }
}
