//! Deleting, thinning and labelling snapshots, of a disk that is attached here or nowhere.

use crate::alloc::Purpose;
use crate::alloc::runs::merge;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::snapshot::{Snapshot, SnapshotLabel};
use crate::format::vdi::VdiHead;
use crate::io::{Io, Patience, Write};
use crate::root::{Garbage, Root};
use crate::sabotage::{self, Bug};
use crate::schedule::is_automatic;
use crate::snapshots::Page;
use crate::snapshots::edit::{Edited, Edits, Ground};
use crate::tree::Reader;
use crate::types::{Birth, Lsn};
use crate::vdi::{Vdi, VdiInner};
use std::sync::Arc;
use std::time::Duration;

/// So long thinning waits for a commit of its disk.
const THIN_WAIT: Duration = Duration::from_millis(100);

/// What is to become of snapshots.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// They are deleted. What only they hold is free after collection.
    Delete(Vec<Lsn>),
    /// As [`Self::Delete`], but only those that are there and have the label of a schedule: people may have deleted others, or
    /// made them theirs, since the caller looked.
    Thin(Vec<Lsn>),
    /// One gets another label.
    Label(Lsn, SnapshotLabel),
}

/// What a change makes of a disk.
#[derive(Debug)]
pub(crate) struct Changed {
    /// Its head then.
    pub head: VdiHead,
    /// What to write before it.
    pub edited: Edited,
    /// The snapshots that were changed.
    pub snapshots: Vec<Lsn>,
}

impl Change {
    /// More room is not needed to give room back (rule C6).
    pub(crate) fn purpose(&self) -> Purpose {
        match self {
            Self::Delete(_) | Self::Thin(_) => Purpose::GivesBack,
            Self::Label(..) => Purpose::Normal,
        }
    }

    /// The disk after the change; none if there is nothing to change.
    ///
    /// # Errors
    /// `NotFound` if there is no such snapshot, unless they are thinned: nothing was changed; those of reading.
    pub(crate) async fn apply(
        &self,
        ground: &Ground<'_>,
        object: &str,
        head: &VdiHead,
    ) -> Result<Option<Changed>> {
        let wanted: &[Lsn] = match self {
            Self::Delete(wanted) | Self::Thin(wanted) => wanted,
            Self::Label(lsn, _) => std::slice::from_ref(lsn),
        };
        let (mut edits, mut snapshots) = (Edits::new(), Vec::new());
        // Those that are to go at once lie side by side, as a rule: so few leaves are read, not one search for each.
        let mut leaf: Vec<(u64, Snapshot)> = Vec::new();
        for lsn in wanted {
            let mut found = leaf.iter().find(|(_, snapshot)| snapshot.lsn == *lsn).cloned();
            if found.is_none() {
                (found, leaf) = ground.reader.find_with_leaf(&head.snapshots, *lsn).await?;
            }
            let edit = match (self, found) {
                (Self::Thin(_), None) => continue,
                (_, None) => return Err(no_snapshot(object, *lsn)),
                (Self::Thin(_), Some((_, snapshot))) if !is_automatic(snapshot.label.as_str()) => {
                    continue;
                }
                (Self::Delete(_) | Self::Thin(_), Some((place, _))) => (place, None),
                (Self::Label(_, label), Some((place, snapshot))) => {
                    (place, Some(Snapshot { label: label.clone(), ..snapshot }))
                }
            };
            edits.insert(edit.0, edit.1);
            snapshots.push(*lsn);
        }
        if edits.is_empty() {
            return Ok(None);
        }
        let birth = head.birth.plus(1);
        let edited = ground.change(head.snapshots, &edits, birth).await?;
        let falls = sabotage::on(Bug::BirthFalls) && !matches!(self, Self::Label(..));
        let last_snapshot_birth = if falls { Birth(0) } else { head.last_snapshot_birth };
        let head = VdiHead { birth, last_snapshot_birth, snapshots: edited.index, ..head.clone() };
        Ok(Some(Changed { head, edited, snapshots }))
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

    /// Returns the snapshots that were changed. As long as `io` is patient: a commit that waits for space must not make the operator's commands wait with it.
    pub(crate) async fn change_snapshots(&self, change: Change, io: Io) -> Result<Vec<Lsn>> {
        self.unstoppable(move |inner| async move { inner.change_snapshots(&change, &io).await })
            .await
    }
}

impl VdiInner {
    async fn change_snapshots(&self, change: &Change, io: &Io) -> Result<Vec<Lsn>> {
        let mut control = match io.patience() {
            Patience::Forever => self.control.lock().await,
            Patience::Limited(limit) => {
                // Nobody waits for thinning, and others wait for the registry meanwhile.
                let thins = matches!(change, Change::Thin(_));
                let limit = if thins { limit.min(THIN_WAIT) } else { limit };
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
        self.settle(&mut control).await?;
        loop {
            let base = self.root.load_full();
            let reader = &Reader { io: io.clone(), ..self.core.reader.clone() };
            let ground = Ground { io, reader, ..self.snapshot_ground(change.purpose())? };
            let changed = change.apply(&ground, &self.object(), &base.head).await?;
            let Some(Changed { head: next, edited, snapshots }) = changed else {
                return Ok(Vec::new());
            };
            self.core.write_fresh(io, &self.object(), &writes(&edited)).await?;
            control.last_leaf = None;
            let added = merge(edited.writes.iter().map(|(gba, _)| *gba).collect());
            if let Some(since) = self.swap_head(&mut control, next.clone()).await? {
                self.core.allocator()?.settle(&added);
                let next = Root::new(next, Arc::clone(&self.sink));
                self.root.store(Arc::clone(&next));
                let garbage = Garbage { blocks: edited.replaced, ..Garbage::default() };
                base.retire(next, garbage, since);
                return Ok(snapshots);
            }
            self.core.allocator()?.put_back(&added);
        }
    }
}
