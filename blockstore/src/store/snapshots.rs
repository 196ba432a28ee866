//! Snapshots of disks wherever they are attached, and the clones that are made from them.
//!
//! A clone is one record: a new disk whose tree is that of a snapshot. It counts its births on from its source's, so that
//! nothing of the source passes for its own (rule C4). Being made, it is a root before its source is looked at once more
//! (rule G3): a snapshot that was deleted meanwhile ends it, and one that is deleted afterwards takes nothing from it.

use crate::alloc::runs::merge;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::snapshot::{Snapshot, SnapshotLabel};
use crate::format::vdi::{Origin, Owner, SnapshotIndex, VdiHead};
use crate::io::now_ms;
use crate::name::check_name;
use crate::policy::WhenOffline;
use crate::root::{Garbage, GarbageSink};
use crate::sabotage::{self, Bug};
use crate::slot::View;
use crate::snapshots::Page;
use crate::snapshots::change::{Change, Changed, no_snapshot, writes};
use crate::snapshots::edit::Ground;
use crate::store::registry::Found;
use crate::store::{Store, VdiInfo};
use crate::tree::Reader;
use crate::types::{Birth, Lsn};
use crate::vdi::Vdi;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use uuid::Uuid;

/// How often a listing starts over when the disk's owner changes it meanwhile.
const LIST_ATTEMPTS: u32 = 5;

/// Which snapshots of a disk to read.
enum Wanted<'a> {
    Page(Page),
    At(Lsn),
    /// Each of these by LSN, else by label: the newest, and another if there is one.
    Named(&'a [&'a str]),
}

/// What [`Store::thin_snapshots`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Thinned {
    /// They are gone.
    pub deleted: Vec<Lsn>,
    /// Clones hang on these, or they are attached read-only.
    pub held: Vec<Lsn>,
}

/// A clone that a host served from its log before the store knew of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisteredClone {
    /// Its identity, which never changes.
    pub uuid: Uuid,
    /// Its name, if nobody else has it.
    pub name: String,
    /// The snapshot that it began as.
    pub origin: Origin,
    /// When that was taken, milliseconds since 1970. Another log of its disk may have had another snapshot at that LSN.
    pub snapshot_ms: u64,
    /// What was chosen for it.
    pub when_offline: WhenOffline,
    /// The log in the host's cache.
    pub log_id: Uuid,
}

/// What a clone is made of.
#[derive(Debug)]
pub(super) struct Source {
    origin: Origin,
    /// The head in the store that lists the snapshot; none if it was found through another.
    view: Option<View<VdiHead>>,
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
        let found = self.read_snapshots(name_or_uuid, &Wanted::Named(&[snapshot])).await?;
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
        let mut found = self.find_only_snapshots(name_or_uuid, &[snapshot]).await?;
        Ok(found.remove(0))
    }

    /// As [`find_only_snapshot`](Self::find_only_snapshot), of each of these, in their order. Those that lie side by side are read
    /// together, and labels are looked for at once.
    ///
    /// # Errors
    /// As [`find_only_snapshot`](Self::find_only_snapshot).
    pub async fn find_only_snapshots(
        &self,
        name_or_uuid: &str,
        snapshots: &[&str],
    ) -> Result<Vec<Snapshot>> {
        let (_, found, _) = self.read_snapshots_of(name_or_uuid, &Wanted::Named(snapshots)).await?;
        let mut only = Vec::with_capacity(snapshots.len());
        for (name, found) in snapshots.iter().zip(found) {
            let mut found = found.into_iter();
            match (found.next(), found.next()) {
                (Some(found), None) => only.push(found),
                (Some(newer), Some(older)) => {
                    return Err(StoreError::new(
                        StoreErrorKind::Invalid,
                        format!("VDI '{name_or_uuid}', snapshot '{name}'"),
                        format!(
                            "snapshots {} and {} both have that label; name one by its LSN",
                            newer.lsn, older.lsn
                        ),
                    ));
                }
                (None, _) => return Err(self.no_snapshot_named(name_or_uuid, name).await?),
            }
        }
        Ok(only)
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
        let (_, found, _) = self.read_snapshots_of(name_or_uuid, wanted).await?;
        Ok(found.into_iter().flatten().collect())
    }

    /// As [`Self::read_snapshots`], for each name if they are looked for by name, with the disk as the store has it, and whether it was that head whose snapshots were read: of a
    /// disk that is attached here it is the one at hand, which may be older or newer.
    async fn read_snapshots_of(
        &self,
        name_or_uuid: &str,
        wanted: &Wanted<'_>,
    ) -> Result<(Found, Vec<Vec<Snapshot>>, bool)> {
        let mut attempts = LIST_ATTEMPTS;
        loop {
            let found = self.find_vdi(name_or_uuid).await?;
            // Held while reading, so that commits of this very process reuse nothing under us.
            let pinned = self.attached_here(&found.head).map(|inner| inner.root.load_full());
            let head = pinned.as_ref().map_or(&found.head, |root| &root.head);
            let as_stored = *head == found.head;
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
                outcome => return Ok((found, outcome?, as_stored)),
            }
        }
    }

    async fn look_for(
        &self,
        index: &SnapshotIndex,
        wanted: &Wanted<'_>,
    ) -> Result<Vec<Vec<Snapshot>>> {
        let reader = self.control_reader();
        Ok(match wanted {
            Wanted::Page(page) => vec![reader.snapshot_page(index, *page).await?],
            Wanted::At(lsn) => {
                let found = reader.find_snapshot(index, *lsn).await?;
                vec![found.into_iter().map(|(_, found)| found).collect()]
            }
            Wanted::Named(names) => look_for_names(&reader, index, names).await?,
        })
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
        let cloned = self.cloned_of(vdi).await?;
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
        core.write_fresh(ground.io, &found.object(), &writes(&edited)).await?;
        let since = reclaimer.stay();
        let swap = core.records.swap(&core.io, &found.view, next).await?;
        swap.done(|| found.object())?;
        allocator.settle(&merge(edited.writes.iter().map(|(gba, _)| *gba).collect()));
        reclaimer.discard(Garbage { blocks: edited.replaced, ..Garbage::default() }, since);
        Ok(snapshots)
    }

    /// The snapshots of a disk on which clones hang.
    async fn cloned_of(&self, vdi: Uuid) -> Result<HashSet<Lsn>> {
        Ok(self.settled_directory(None).await?.clones_of(vdi).map(|(lsn, _)| lsn).collect())
    }

    /// Refuses what would take a snapshot away on which a clone hangs: any of the disk's, or one of `snapshots`.
    pub(super) async fn refuse_cloned(
        &self,
        found: &Found,
        snapshots: Option<&[Lsn]>,
    ) -> Result<()> {
        let directory = self.settled_directory(None).await?;
        let clones = directory.clones_of(found.head.uuid);
        let clones: Vec<_> =
            clones.filter(|(lsn, _)| snapshots.is_none_or(|list| list.contains(lsn))).collect();
        let Some((lsn, first)) = clones.first() else { return Ok(()) };
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
        if sabotage::on(Bug::DeleteHeld) {
            return Ok(());
        }
        let name = &found.name;
        let words = format!(
            "its snapshot {lsn} is attached read-only ('ballast vdi detach {name}@{lsn}' first), or a clone of it that was made \
             while the store was away is on its way there ('ballast status')"
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
            store.clone_now(&name, &source, snapshot, when_offline, None).await
        };
        self.change(clone).await
    }

    /// Makes a disk that begins as a committed snapshot of another and that this host served before the store knew of it, from a
    /// log of its own. It is this host's, with that log, from its first moment on: nobody comes in between. Done once,
    /// however often it is asked for.
    ///
    /// # Errors
    /// As [`clone_vdi`](Self::clone_vdi); `Changed` if there is a disk of that UUID that began as something else.
    pub async fn register_clone(self: &Arc<Self>, clone: RegisteredClone) -> Result<()> {
        check_name(&clone.name)?;
        if clone.log_id.is_nil() {
            let problem = "a log needs an identity";
            let object = format!("VDI {}", clone.uuid);
            return Err(StoreError::new(StoreErrorKind::Invalid, object, problem));
        }
        self.change(move |store| async move { store.register_now(&clone).await }).await
    }

    async fn register_now(&self, clone: &RegisteredClone) -> Result<()> {
        // One that was left in creation is none: it is made anew.
        let known = self.settled_directory(None).await?.origin_of(clone.uuid);
        if let Some(origin) = known.filter(|_| !sabotage::on(Bug::CloneTwice)) {
            if origin == Some(clone.origin) {
                return Ok(());
            }
            let object = format!("VDI {}", clone.uuid);
            let problem =
                "it is in the store, and did not begin as the snapshot that this host's cache says";
            return Err(StoreError::new(StoreErrorKind::Changed, object, problem));
        }
        let source = clone.origin.vdi.to_string();
        let own = Some(clone);
        self.clone_now(&clone.name, &source, clone.origin.lsn, clone.when_offline, own)
            .await
            .map(drop)
    }

    /// With `own` the UUID that the clone has, and the log from which this host serves it.
    async fn clone_now(
        &self,
        name: &str,
        source: &str,
        lsn: Lsn,
        when_offline: WhenOffline,
        own: Option<&RegisteredClone>,
    ) -> Result<VdiInfo> {
        let writer = self.core.writer()?;
        self.refuse_known_name(name).await?;
        let (found, snapshots, as_stored) =
            self.read_snapshots_of(source, &Wanted::At(lsn)).await?;
        let Some(snapshot) = snapshots.into_iter().flatten().next() else {
            return Err(no_snapshot(&found.object(), lsn));
        };
        if own.is_some_and(|clone| clone.snapshot_ms != snapshot.time_ms) {
            let problem = format!(
                "its snapshot {lsn} is not the one that was cloned, but one that it took after its log was given up: copy what the \
                 clone holds to a new disk, then 'ballast vdi delete' the clone"
            );
            return Err(StoreError::new(StoreErrorKind::Changed, found.object(), problem));
        }
        let origin = Origin { vdi: found.head.uuid, lsn };
        let birth = found.head.birth.max(snapshot.birth);
        let owned_after = if sabotage::on(Bug::CloneOwnsShared) { Birth(0) } else { birth };
        let head = VdiHead {
            root: snapshot.root,
            height: snapshot.height,
            birth,
            last_snapshot_birth: owned_after,
            origin: Some(origin),
            ..VdiHead::new_disk(snapshot.size_bytes)
        };
        let head = match own {
            Some(clone) => VdiHead {
                uuid: clone.uuid,
                owner: Some(Owner { host: writer.host, generation: writer.generation }),
                attached_ms: now_ms(),
                log_id: Some(clone.log_id),
                ..head
            },
            None => head,
        };
        let source = Source { origin, view: as_stored.then_some(found.view) };
        self.enrol(name, when_offline, head, Some(&source)).await
    }

    /// Refuses a clone whose source is gone by now (rule G3).
    pub(super) async fn refuse_lost_source(&self, source: &Source) -> Result<()> {
        if let Some(view) = &source.view
            && self.core.records.read::<VdiHead>(&self.control_io, view.slot).await? == *view
        {
            return Ok(());
        }
        self.snapshot_of(source.origin).await.map(drop)
    }

    /// The snapshot that a disk begins as.
    pub(super) async fn snapshot_of(&self, origin: Origin) -> Result<Snapshot> {
        let vdi = origin.vdi.to_string();
        let found = self.read_snapshots(&vdi, &Wanted::At(origin.lsn)).await?;
        found.into_iter().next().ok_or_else(|| no_snapshot(&format!("VDI {vdi}"), origin.lsn))
    }
}

/// For each name the snapshot that has it as its LSN, else those that have it as their label, newest first: two of these at least, if
/// there are as many.
async fn look_for_names(
    reader: &Reader,
    index: &SnapshotIndex,
    names: &[&str],
) -> Result<Vec<Vec<Snapshot>>> {
    let mut found: Vec<Vec<Snapshot>> = vec![Vec::new(); names.len()];
    let mut labels: HashMap<&str, Vec<usize>> = HashMap::new();
    // Those that are asked for together lie side by side, as a rule.
    let mut leaf: Vec<(u64, Snapshot)> = Vec::new();
    for (number, name) in names.iter().enumerate() {
        if let Ok(lsn) = name.parse::<u64>().map(Lsn) {
            let mut hit = leaf.iter().find(|(_, snapshot)| snapshot.lsn == lsn).cloned();
            if hit.is_none() && names.len() == 1 {
                hit = reader.find_snapshot(index, lsn).await?;
            } else if hit.is_none() {
                (hit, leaf) = reader.find_with_leaf(index, lsn).await?;
            }
            if let Some((_, snapshot)) = hit {
                found[number].push(snapshot);
                continue;
            }
        }
        if !name.is_empty() {
            labels.entry(name).or_default().push(number);
        }
    }
    let mut page = Page { newest_first: true, beyond: None, limit: 1024 };
    while !labels.is_empty() {
        let list = reader.snapshot_page(index, page).await?;
        let Some(last) = list.last() else { break };
        page.beyond = Some(last.lsn);
        for snapshot in &list {
            for number in labels.get(snapshot.label.as_str()).into_iter().flatten() {
                found[*number].push(snapshot.clone());
            }
        }
        labels.retain(|_, numbers| found[numbers[0]].len() < 2);
    }
    Ok(found)
}
