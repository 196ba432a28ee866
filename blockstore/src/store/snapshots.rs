//! Snapshots of disks wherever they are attached, and the clones that are made from them.
//!
//! A clone is one record: a new disk whose tree is that of a snapshot. It counts its births on from its source's, so that
//! nothing of the source passes for its own (rule C4). Being made, it is a root before its source is looked at once more
//! (rule G3): a snapshot that was deleted meanwhile ends it, and one that is deleted afterwards takes nothing from it.

use crate::alloc::runs::merge;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::snapshot::{Snapshot, SnapshotLabel};
use crate::format::vdi::{Origin, SnapshotIndex, VdiHead};
use crate::name::check_name;
use crate::policy::WhenOffline;
use crate::root::{Garbage, GarbageSink};
use crate::snapshots::Page;
use crate::snapshots::change::{Change, Changed, no_snapshot, writes};
use crate::snapshots::edit::Ground;
use crate::store::registry::Found;
use crate::store::{Store, VdiInfo};
use crate::types::Lsn;
use crate::vdi::Vdi;
use std::collections::HashSet;
use std::sync::Arc;
use uuid::Uuid;

/// How often a listing starts over when the disk's owner changes it meanwhile.
const LIST_ATTEMPTS: u32 = 5;

/// Which snapshots of a disk to read.
enum Wanted<'a> {
    Page(Page),
    At(Lsn),
    /// By LSN, else by label: the newest, and another if there is one.
    Named(&'a str),
}

/// What [`Store::thin_snapshots`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Thinned {
    /// They are gone.
    pub deleted: Vec<Lsn>,
    /// Clones hang on these, or they are attached read-only.
    pub held: Vec<Lsn>,
}

impl Store {
    /// A page of a disk's committed snapshots, whoever has it attached.
    ///
    /// # Errors
    /// `NotFound`; `Changed` if its owner keeps changing them meanwhile; the device's.
    pub async fn snapshots(&self, name_or_uuid: &str, page: Page) -> Result<Vec<Snapshot>> {
        self.read_snapshots(name_or_uuid, &Wanted::Page(page)).await
    }

    /// The committed snapshot at `lsn`, or the newest one labelled like that.
    ///
    /// # Errors
    /// As [`snapshots`](Self::snapshots); `NotFound` if there is none.
    pub async fn find_snapshot(&self, name_or_uuid: &str, snapshot: &str) -> Result<Snapshot> {
        let found = self.read_snapshots(name_or_uuid, &Wanted::Named(snapshot)).await?;
        if let Some(found) = found.into_iter().next() {
            return Ok(found);
        }
        Err(self.no_snapshot_named(name_or_uuid, snapshot).await?)
    }

    /// As [`find_snapshot`](Self::find_snapshot), but no choice is made between several of one label.
    ///
    /// # Errors
    /// As [`find_snapshot`](Self::find_snapshot); `Invalid` naming two of them.
    pub async fn find_only_snapshot(&self, name_or_uuid: &str, snapshot: &str) -> Result<Snapshot> {
        let found = self.read_snapshots(name_or_uuid, &Wanted::Named(snapshot)).await?;
        let mut found = found.into_iter();
        match (found.next(), found.next()) {
            (Some(found), None) => Ok(found),
            (Some(newer), Some(older)) => Err(StoreError::new(
                StoreErrorKind::Invalid,
                format!("VDI '{name_or_uuid}', snapshot '{snapshot}'"),
                format!(
                    "snapshots {} and {} both have that label; name one by its LSN",
                    newer.lsn, older.lsn
                ),
            )),
            (None, _) => Err(self.no_snapshot_named(name_or_uuid, snapshot).await?),
        }
    }

    async fn no_snapshot_named(&self, name_or_uuid: &str, snapshot: &str) -> Result<StoreError> {
        Ok(StoreError::new(
            StoreErrorKind::NotFound,
            format!("{}, snapshot '{snapshot}'", self.find_vdi(name_or_uuid).await?.object()),
            "there is no snapshot with that LSN or label in the store; 'ballast snap list' shows those that are",
        ))
    }

    /// Reads snapshots of a disk that its owner may change meanwhile: then once more.
    async fn read_snapshots(
        &self,
        name_or_uuid: &str,
        wanted: &Wanted<'_>,
    ) -> Result<Vec<Snapshot>> {
        let mut attempts = LIST_ATTEMPTS;
        loop {
            let found = self.find_vdi(name_or_uuid).await?;
            // Held while reading, so that commits of this very process reuse nothing under us.
            let pinned = self.attached_here(&found.head).map(|inner| inner.root.load_full());
            let head = pinned.as_ref().map_or(&found.head, |root| &root.head);
            match self.look_for(&head.snapshots, wanted).await {
                Err(error) if error.kind == StoreErrorKind::Corrupt && pinned.is_none() => {
                    let now = self.core.records.read(&self.control_io, found.view.slot).await?;
                    if now == found.view {
                        return Err(error);
                    }
                    attempts -= 1;
                    if attempts == 0 {
                        let words =
                            "its owner keeps changing it; ask on the host that has it attached";
                        return Err(StoreError::new(
                            StoreErrorKind::Changed,
                            found.object(),
                            words,
                        ));
                    }
                }
                outcome => return outcome,
            }
        }
    }

    async fn look_for(&self, index: &SnapshotIndex, wanted: &Wanted<'_>) -> Result<Vec<Snapshot>> {
        let reader = self.control_reader();
        let name = match wanted {
            Wanted::Page(page) => return reader.snapshot_page(index, *page).await,
            Wanted::At(lsn) => {
                let found = reader.find_snapshot(index, *lsn).await?;
                return Ok(found.into_iter().map(|(_, found)| found).collect());
            }
            Wanted::Named(name) => *name,
        };
        if let Ok(lsn) = name.parse::<u64>()
            && let Some((_, found)) = reader.find_snapshot(index, Lsn(lsn)).await?
        {
            return Ok(vec![found]);
        }
        let mut named = Vec::new();
        if name.is_empty() {
            return Ok(named);
        }
        let mut page = Page { newest_first: true, beyond: None, limit: 1024 };
        loop {
            let list = reader.snapshot_page(index, page).await?;
            let Some(last) = list.last() else { return Ok(named) };
            page.beyond = Some(last.lsn);
            named.extend(list.into_iter().filter(|found| found.label.as_str() == name));
            if named.len() >= 2 {
                return Ok(named);
            }
        }
    }

    /// Deletes snapshots of a disk that is attached to this host or to none. What only they hold is free after collection.
    ///
    /// # Errors
    /// `NotFound` if one of them is not there, `InUse` if a clone hangs on one, one is held, or another host has the disk:
    /// nothing was changed; the device's.
    pub async fn delete_snapshots(
        self: &Arc<Self>,
        name_or_uuid: &str,
        snapshots: Vec<Lsn>,
    ) -> Result<()> {
        let name = name_or_uuid.to_owned();
        let change = Change::Delete(snapshots);
        self.change(move |store| async move { store.change_snapshots(&name, change).await })
            .await?;
        Ok(())
    }

    /// Deletes those of these snapshots that have the label of a schedule, on which no clone hangs and which nobody holds. Others are left alone:
    /// people have made them theirs, or they are gone.
    ///
    /// # Errors
    /// `InUse` if another host has the disk: nothing was changed; the device's.
    pub async fn thin_snapshots(
        self: &Arc<Self>,
        vdi: Uuid,
        snapshots: Vec<Lsn>,
    ) -> Result<Thinned> {
        self.change(move |store| async move { store.thin_now(vdi, snapshots).await }).await
    }

    async fn thin_now(&self, vdi: Uuid, mut snapshots: Vec<Lsn>) -> Result<Thinned> {
        let all = self.all_vdis().await?;
        let origins = all.iter().filter_map(|other| other.head.origin);
        let cloned: HashSet<Lsn> =
            origins.filter(|origin| origin.vdi == vdi).map(|origin| origin.lsn).collect();
        let stays = |lsn: &mut Lsn| cloned.contains(lsn) || self.holds.is_held(vdi, *lsn);
        let held = snapshots.extract_if(.., stays).collect();
        let deleted = self.change_snapshots(&vdi.to_string(), Change::Thin(snapshots)).await?;
        Ok(Thinned { deleted, held })
    }

    /// Gives a snapshot another label.
    ///
    /// # Errors
    /// As [`delete_snapshots`](Self::delete_snapshots), but for clones.
    pub async fn label_snapshot(
        self: &Arc<Self>,
        name_or_uuid: &str,
        snapshot: Lsn,
        label: SnapshotLabel,
    ) -> Result<()> {
        let name = name_or_uuid.to_owned();
        let change = Change::Label(snapshot, label);
        self.change(move |store| async move { store.change_snapshots(&name, change).await })
            .await?;
        Ok(())
    }

    async fn change_snapshots(&self, name_or_uuid: &str, change: Change) -> Result<Vec<Lsn>> {
        let core = &self.core;
        let reclaimer = Arc::clone(&core.writer()?.reclaimer);
        let found = self.find_vdi(name_or_uuid).await?;
        if let Change::Delete(snapshots) = &change {
            self.refuse_cloned(&found, Some(snapshots)).await?;
            self.refuse_held(&found, Some(snapshots))?;
        }
        if let Some(inner) = self.attached_here(&found.head) {
            return Vdi { inner }.change_snapshots(change, self.control_io.clone()).await;
        }
        self.refuse_attached(&found, "change its snapshots").await?;
        let (allocator, purpose) = (reclaimer.allocator(), change.purpose());
        let reader = &self.control_reader();
        let ground = Ground { reader, allocator, io: &self.control_io, purpose };
        let changed = change.apply(&ground, &found.object(), &found.head).await?;
        let Some(Changed { head: next, edited, snapshots }) = changed else {
            return Ok(Vec::new());
        };
        core.io.write_durable(&writes(&edited)).await?;
        let since = reclaimer.stay();
        let swap = core.records.swap(&core.io, &found.view, next).await?;
        swap.done(|| found.object())?;
        allocator.settle(&merge(edited.writes.iter().map(|(gba, _)| *gba).collect()));
        reclaimer.discard(Garbage { blocks: edited.replaced, ..Garbage::default() }, since);
        Ok(snapshots)
    }

    /// Refuses what would take a snapshot away on which a clone hangs: any of the disk's, or one of `snapshots`.
    pub(super) async fn refuse_cloned(
        &self,
        found: &Found,
        snapshots: Option<&[Lsn]>,
    ) -> Result<()> {
        let hangs = |origin: Origin| {
            origin.vdi == found.head.uuid && snapshots.is_none_or(|list| list.contains(&origin.lsn))
        };
        let all = self.all_vdis().await?;
        let clones: Vec<_> =
            all.iter().filter(|other| other.head.origin.is_some_and(hangs)).collect();
        let Some(first) = clones.first() else { return Ok(()) };
        let lsn = first.head.origin.map_or(Lsn(0), |origin| origin.lsn);
        let more = match clones.len() - 1 {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        Err(StoreError::new(
            StoreErrorKind::InUse,
            found.object(),
            format!(
                "VDI '{}' was cloned from its snapshot {lsn}{more}; delete the clones first",
                first.name
            ),
        ))
    }

    /// Refuses what would take a snapshot away that is read just now: any of the disk's, or one of `snapshots`.
    pub(super) fn refuse_held(&self, found: &Found, snapshots: Option<&[Lsn]>) -> Result<()> {
        let Some(lsn) = self.holds.first_of(found.head.uuid, snapshots) else { return Ok(()) };
        let name = &found.name;
        let words = format!(
            "its snapshot {lsn} is attached read-only; 'ballast vdi detach {name}@{lsn}' first"
        );
        Err(StoreError::new(StoreErrorKind::InUse, found.object(), words))
    }

    /// Makes a disk that begins as a committed snapshot of another, wherever that is attached. One record is written, and
    /// one block for the name, whatever the size.
    ///
    /// # Errors
    /// `NotFound`, `Invalid` or `AlreadyExists` name, `NoSpace`, the device's.
    pub async fn clone_vdi(
        self: &Arc<Self>,
        name: &str,
        source: &str,
        snapshot: Lsn,
        when_offline: WhenOffline,
    ) -> Result<VdiInfo> {
        check_name(name)?;
        let (name, source) = (name.to_owned(), source.to_owned());
        let clone = move |store: Arc<Self>| async move {
            store.clone_now(&name, &source, snapshot, when_offline).await
        };
        self.change(clone).await
    }

    async fn clone_now(
        &self,
        name: &str,
        source: &str,
        lsn: Lsn,
        when_offline: WhenOffline,
    ) -> Result<VdiInfo> {
        self.core.writer()?;
        self.refuse_taken_name(name, None).await?;
        let source = self.find_vdi(source).await?;
        let origin = Origin { vdi: source.head.uuid, lsn };
        let snapshot = self.snapshot_of(origin).await?;
        let birth = source.head.birth.max(snapshot.birth);
        let head = VdiHead {
            root: snapshot.root,
            height: snapshot.height,
            birth,
            last_snapshot_birth: birth,
            origin: Some(origin),
            ..VdiHead::new_disk(snapshot.size_bytes)
        };
        self.enrol(name, when_offline, head).await
    }

    /// The snapshot that a disk begins as.
    pub(super) async fn snapshot_of(&self, origin: Origin) -> Result<Snapshot> {
        let vdi = origin.vdi.to_string();
        let found = self.read_snapshots(&vdi, &Wanted::At(origin.lsn)).await?;
        found.into_iter().next().ok_or_else(|| no_snapshot(&format!("VDI {vdi}"), origin.lsn))
    }
}
