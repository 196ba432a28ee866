//! Making disks: a place in the registry, and a name that nobody else has.
//!
//! Order: the name's block is written; the place is taken by compare-and-write, as *creating*; then it is made sure that the
//! name is nobody else's, and that the snapshot that the disk begins as is still there; the disk becomes *active*, or is
//! buried. Of two hosts that take one name at the same moment each has its place before it looks, so at least one sees
//! the other. A crash in between leaves a disk in creation, which its host buries when it is back, or as soon as its name, or the
//! snapshot that it was to begin as, is wanted: so it does with what an error left, or a target that forgot the rest.
//!
//! Where the place is, and that the name seems to be free, is a hint of what was read last ([`directory`](super::directory)); what
//! decides is the compare-and-write of the place, and a look at the registry as it is after it.

use super::directory::{Directory, Entry, Place};
use super::{Found, write_meta};
use crate::alloc::runs::merge;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::vdi::{Owner, VdiHead, VdiState};
use crate::name::check_name;
use crate::policy::{Policy, WhenOffline};
use crate::sabotage::{self, Bug};
use crate::slot::{Content, Swap, View};
use crate::store::snapshots::Source;
use crate::store::{Store, VdiInfo, check_size, device_full, vdi_slot};
use std::sync::Arc;
use uuid::Uuid;

/// How often creating looks for another slot when other hosts take them.
const CREATE_ATTEMPTS: u32 = 8;

impl Store {
    /// Creates an empty disk with the default policy.
    ///
    /// # Errors
    /// As [`create_vdi_with`](Self::create_vdi_with).
    pub async fn create_vdi(self: &Arc<Self>, name: &str, size_bytes: u64) -> Result<VdiInfo> {
        self.create_vdi_with(name, size_bytes, WhenOffline::default()).await
    }

    /// Creates an empty disk.
    ///
    /// # Errors
    /// `Invalid` name or size, `AlreadyExists`, `NoSpace`, the device's.
    pub async fn create_vdi_with(
        self: &Arc<Self>,
        name: &str,
        size_bytes: u64,
        when_offline: WhenOffline,
    ) -> Result<VdiInfo> {
        check_name(name)?;
        check_size(&format!("VDI '{name}'"), size_bytes)?;
        let name = name.to_owned();
        let create = move |store: Arc<Self>| async move {
            store.create_now(&name, size_bytes, when_offline).await
        };
        self.change(create).await
    }

    async fn create_now(
        &self,
        name: &str,
        size_bytes: u64,
        when_offline: WhenOffline,
    ) -> Result<VdiInfo> {
        self.core.writer()?;
        self.refuse_known_name(name).await?;
        self.enrol(name, when_offline, VdiHead::new_disk(size_bytes), None).await
    }

    /// Gives a new disk a place in the registry under its name. From its first moment there it is a root, but no disk yet;
    /// that it becomes only if the snapshot that it begins as is still there then.
    pub(in crate::store) async fn enrol(
        &self,
        name: &str,
        when_offline: WhenOffline,
        head: VdiHead,
        source: Option<&Source>,
    ) -> Result<VdiInfo> {
        let object = format!("VDI '{name}'");
        let writer = self.core.writer()?;
        let policy = Policy { when_offline, ..Policy::default() };
        let meta = head.meta_block(name.to_owned(), policy);
        let meta = write_meta(&self.core, &self.control_io, &meta).await?;
        let (uuid, head) = (head.uuid, VdiHead { meta, ..head });
        let creating = VdiHead {
            state: VdiState::Creating,
            owner: Some(Owner { host: writer.host, generation: writer.generation }),
            ..head.clone()
        };
        let (place, view) = match self.take_place(&creating).await {
            Ok(taken) => taken,
            Err(error) => return Err(error.about(object)),
        };
        self.core.allocator()?.settle(&merge(vec![meta.gba]));
        let mut found =
            Found { place, view, head: creating.clone(), name: name.to_owned(), policy };
        self.latest.note(place, Place::Taken(found.entry(Some(meta))));
        // Two hosts may have taken the same name at the same moment: both see the other here.
        let mut fit = self.refuse_taken_name(name, Some(uuid)).await;
        if let (Ok(()), Some(source)) = (&fit, source) {
            fit = self.refuse_lost_source(source).await;
        }
        if let Err(error) = fit {
            self.change_place(&found, creating.buried()).await?;
            return Err(error);
        }
        found.view = self.change_place(&found, head).await?.done(|| object.clone())?;
        found.head = found.view.record().cloned().ok_or_else(|| gone(&object))?;
        self.describe(&found, &[]).await
    }

    /// As [`directory`](Self::directory), without disks in creation that nobody will finish. Those are this host's, but for
    /// the one that it makes right now, `own`: changes follow one another.
    pub(in crate::store) async fn settled_directory(
        &self,
        own: Option<Uuid>,
    ) -> Result<Arc<Directory>> {
        let directory = self.directory().await?;
        let left = directory.in_creation().filter(|(_, entry)| Some(entry.uuid) != own);
        let left: Vec<_> = left.map(|(place, entry)| (place, entry.clone())).collect();
        if left.is_empty() {
            return Ok(directory);
        }
        let host = self.core.writer()?.host;
        for (place, Entry { uuid, name, policy, .. }) in left {
            let view = self.read_vdi_slot(place).await?;
            let is_left = |head: &&VdiHead| {
                head.uuid == uuid
                    && head.state == VdiState::Creating
                    && head.owner.is_some_and(|owner| owner.host == host)
            };
            let Some(head) = view.record().filter(is_left).cloned() else { continue };
            tracing::warn!(vdi = %name, %uuid, "a disk that was never finished is buried");
            let buried = head.clone().buried();
            self.change_place(&Found { place, view, head, name, policy }, buried).await?;
        }
        self.directory().await
    }

    /// Writes the head of a disk in its place, and lets the directory follow.
    pub(super) async fn change_place(&self, found: &Found, head: VdiHead) -> Result<Swap<VdiHead>> {
        let place = match head.state {
            VdiState::Tombstone => Place::Buried,
            state => {
                let entry = found.entry(Some(head.meta));
                Place::Taken(Entry { active: state == VdiState::Active, ..entry })
            }
        };
        let swap = self.core.records.swap(&self.core.io.unless_full(), &found.view, head).await;
        let swap = swap.map_err(|error| device_full(&found.object(), error));
        match &swap {
            Ok(Swap::Done(_)) => self.latest.note(found.place, place),
            Ok(Swap::Lost(_)) | Err(_) => self.latest.forget(),
        }
        swap
    }

    /// Claims a free place: the lowest, as far as is known. Where none can be had, the block with the disk's name is free again.
    async fn take_place(&self, head: &VdiHead) -> Result<(u32, View<VdiHead>)> {
        let (core, io) = (&self.core, &self.core.io.unless_full());
        let slots = core.superblock.geometry.vdi_slots;
        let mut hint = self.hint();
        for _ in 0..CREATE_ATTEMPTS {
            let surely = hint.is_none();
            let directory = match hint.take() {
                Some(hint) => hint,
                None => self.read_registry().await?.1,
            };
            let place = directory.free_place();
            if place >= slots && surely {
                core.allocator()?.free(vec![head.meta.gba]);
                return Err(StoreError::new(
                    StoreErrorKind::NoSpace,
                    self.url(),
                    format!("the registry's {place} places are all taken"),
                ));
            }
            if place < slots
                && let Some(view) = self.read_free_place(place, &directory).await?
            {
                match core.records.swap(io, &view, head.clone()).await {
                    Ok(Swap::Done(view)) => return Ok((place, view)),
                    Ok(Swap::Lost(_)) => {}
                    Err(error) => {
                        self.latest.forget();
                        return Err(self.not_taken(head, &view, error).await);
                    }
                }
            }
            self.latest.forget();
        }
        Err(StoreError::new(
            StoreErrorKind::InUse,
            self.url(),
            "other hosts keep taking the free places of the registry; try again",
        ))
    }

    /// The error for a place that could not be taken. If it was for lack of space on the device, no attempt at it lands later: is the
    /// place as it was, nothing names the block with the disk's name. After any other it stays in flight.
    async fn not_taken(
        &self,
        head: &VdiHead,
        place: &View<VdiHead>,
        error: StoreError,
    ) -> StoreError {
        if error.kind != StoreErrorKind::NoSpace {
            return error;
        }
        let now = self.core.records.read::<VdiHead>(&self.control_io, place.slot).await;
        if now.is_ok_and(|now| now == *place)
            && let Ok(allocator) = self.core.allocator()
        {
            allocator.free(vec![head.meta.gba]);
        }
        device_full(self.url(), error)
    }

    /// A place as it is now, if it may be taken: its disk is buried, or it was never used, and the one before it was. (What lies
    /// behind a place that was never used is seen by nobody.)
    async fn read_free_place(
        &self,
        place: u32,
        directory: &Directory,
    ) -> Result<Option<View<VdiHead>>> {
        let (core, io) = (&self.core, &self.core.io);
        let is_new = place as usize == directory.places.len();
        let first = if is_new { place.saturating_sub(1) } else { place };
        let slot = vdi_slot(&core.superblock.geometry, first);
        let count = u64::from(place - first) + 1;
        let mut views = core.records.read_run::<VdiHead>(io, slot, count).await?;
        let Some(view) = views.pop() else { return Ok(None) };
        let is_free = match &view.content {
            Content::Unused => is_new && views.iter().all(|v| v.content != Content::Unused),
            Content::Valid(head) => head.record.state == VdiState::Tombstone,
            Content::Damaged(_) => false,
        };
        Ok(is_free.then_some(view))
    }

    /// As far as is known. Who says that a name is taken has looked.
    pub(in crate::store) async fn refuse_known_name(&self, name: &str) -> Result<()> {
        match self.hint() {
            Some(hint) if hint.holder(name, None).is_none() => Ok(()),
            _ => self.refuse_taken_name(name, None).await,
        }
    }

    /// Refuses a name that another disk than `own` has, or is about to have.
    async fn refuse_taken_name(&self, name: &str, own: Option<Uuid>) -> Result<()> {
        let directory = self.settled_directory(own).await?;
        let holder = directory.holder(name, own).filter(|_| !sabotage::on(Bug::CloneTakesName));
        let Some(holder) = holder else { return Ok(()) };
        Err(StoreError::new(
            StoreErrorKind::AlreadyExists,
            format!("VDI '{name}'"),
            format!("the name is taken by VDI {}; choose another", holder.uuid),
        ))
    }
}

fn gone(object: &str) -> StoreError {
    StoreError::new(StoreErrorKind::Damaged, object, "its record vanished")
}
