//! The VDI registry: creating, finding, deleting, attaching and resizing virtual disks.

use crate::alloc::Purpose;
use crate::alloc::runs::merge;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::extent::ExtentType;
use crate::format::meta::VdiMeta;
use crate::format::node::height_for;
use crate::format::pointer::Pointer;
use crate::format::vdi::{GIVEN_UP, Owner, SnapshotIndex, VdiHead, VdiState};
use crate::io::{Io, Patience, now_ms};
use crate::name::check_name;
use crate::policy::{Policy, PolicyChange, WhenOffline};
use crate::root::{Garbage, GarbageSink, Root, Subtree};
use crate::slot::{Content, Swap, View};
use crate::store::{Core, Store, VdiInfo, check_size, vdi_slot};
use crate::types::{BLOCK_SIZE, Birth, Generation, Lsn};
use crate::vdi::{Control, Vdi, VdiInner, grow};
use arc_swap::ArcSwap;
use bytes::Bytes;
use parking_lot::Mutex;
use std::sync::Arc;
use uuid::Uuid;

/// How often creating looks for another slot when other hosts take them.
const CREATE_ATTEMPTS: u32 = 8;

/// How to attach.
#[derive(Clone, Debug)]
pub struct AttachOptions {
    /// Identity of the local log whose records will extend the image.
    pub log_id: Uuid,
}

impl VdiHead {
    /// An empty disk that nobody has.
    pub(crate) fn new_disk(size_bytes: u64) -> Self {
        Self {
            uuid: Uuid::new_v4(),
            state: VdiState::Active,
            owner: None,
            attachment: Generation(0),
            attached_ms: 0,
            root: Pointer::SPARSE,
            height: height_for(size_bytes / BLOCK_SIZE as u64),
            size_bytes,
            committed: Lsn(0),
            log_id: None,
            birth: Birth(0),
            last_snapshot_birth: Birth(0),
            snapshots: SnapshotIndex::default(),
            origin: None,
            meta: Pointer::SPARSE,
            created_ms: now_ms(),
            committed_ms: 0,
            last_log: None,
        }
    }

    /// The immutable block of this disk under that name and policy.
    pub(crate) fn meta_block(&self, name: String, policy: Policy) -> VdiMeta {
        VdiMeta { uuid: self.uuid, name, policy, created_ms: self.created_ms }
    }

    /// What is left of a deleted disk: it holds nothing.
    pub(crate) fn buried(self) -> Self {
        Self {
            state: VdiState::Tombstone,
            owner: None,
            log_id: None,
            root: Pointer::SPARSE,
            snapshots: SnapshotIndex::default(),
            origin: None,
            meta: Pointer::SPARSE,
            ..self
        }
    }
}

/// A disk as found in the registry.
#[derive(Debug)]
pub(super) struct Found {
    pub view: View<VdiHead>,
    pub head: VdiHead,
    pub name: String,
    pub policy: Policy,
}

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
        self.refuse_taken_name(name, None).await?;
        self.enrol(name, when_offline, VdiHead::new_disk(size_bytes)).await
    }

    /// Gives a new disk a place in the registry under its name. From its first moment there it is a root, but no disk yet;
    /// that it becomes only if the snapshot that it begins as is still there then.
    pub(super) async fn enrol(
        &self,
        name: &str,
        when_offline: WhenOffline,
        head: VdiHead,
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
        let view = match self.take_slot(creating.clone()).await {
            Ok(view) => view,
            Err(error) => {
                if error.kind == StoreErrorKind::NoSpace {
                    self.core.allocator()?.free(vec![meta.gba]);
                }
                return Err(error.about(object));
            }
        };
        self.core.allocator()?.settle(&merge(vec![meta.gba]));
        // Two hosts may have taken the same name at the same moment: both see the other here.
        let io = &self.core.io;
        let mut fit = self.refuse_taken_name(name, Some(uuid)).await;
        if let (Ok(()), Some(origin)) = (&fit, head.origin) {
            fit = self.snapshot_of(origin).await.map(drop);
        }
        if let Err(error) = fit {
            self.core.records.swap(io, &view, creating.buried()).await?;
            return Err(error);
        }
        let swap = self.core.records.swap(io, &view, head).await?;
        let view = swap.done(|| object.clone())?;
        let head = view.record().cloned().ok_or_else(|| gone(&object))?;
        let name = name.to_owned();
        self.describe(&Found { view, head, name, policy }, &[]).await
    }

    /// Claims the lowest free slot.
    async fn take_slot(&self, head: VdiHead) -> Result<View<VdiHead>> {
        let (core, io) = (&self.core, &self.core.io);
        for _ in 0..CREATE_ATTEMPTS {
            let used = self.scan_vdis().await?;
            let buried = used.iter().find(|(_, view)| {
                view.record().is_some_and(|head| head.state == VdiState::Tombstone)
            });
            let view = match buried {
                Some((_, view)) => view.clone(),
                None => {
                    let next = used.len() as u32;
                    if next >= core.superblock.geometry.vdi_slots {
                        return Err(StoreError::new(
                            StoreErrorKind::NoSpace,
                            self.url(),
                            format!("the registry's {next} places are all taken"),
                        ));
                    }
                    let slot = vdi_slot(&core.superblock.geometry, next);
                    core.records.read(io, slot).await?
                }
            };
            if let Swap::Done(view) = core.records.swap(io, &view, head.clone()).await? {
                return Ok(view);
            }
        }
        Err(StoreError::new(
            StoreErrorKind::InUse,
            self.url(),
            "other hosts keep taking the free places of the registry; try again",
        ))
    }

    pub(super) async fn refuse_taken_name(&self, name: &str, own: Option<Uuid>) -> Result<()> {
        for found in self.all_vdis().await? {
            if found.name == name && Some(found.head.uuid) != own {
                return Err(StoreError::new(
                    StoreErrorKind::AlreadyExists,
                    format!("VDI '{name}'"),
                    format!("the name is taken by VDI {}; choose another", found.head.uuid),
                ));
            }
        }
        Ok(())
    }

    /// Every disk of the registry, with its name. Damaged records are skipped, with a warning.
    pub(super) async fn all_vdis(&self) -> Result<Vec<Found>> {
        let mut all = Vec::new();
        for (slot, view) in self.scan_vdis().await? {
            match &view.content {
                Content::Valid(head) if head.record.state != VdiState::Tombstone => {
                    let head = head.record.clone();
                    let (name, policy) = Default::default();
                    all.push(Found { view, head, name, policy });
                }
                Content::Valid(_) | Content::Unused => {}
                Content::Damaged(damage) => {
                    tracing::error!(slot, %damage, "damaged VDI record");
                }
            }
        }
        let metas = all.iter().map(|found| found.head.meta).filter(|meta| !meta.is_sparse());
        let metas: Vec<Pointer> = metas.collect();
        // All at once; if one of them is damaged, one by one.
        let mut blocks = match self.control_reader().read_blocks(&metas).await {
            Ok(blocks) => blocks.into_iter(),
            Err(error) if error.kind == StoreErrorKind::Corrupt => Vec::new().into_iter(),
            Err(error) => return Err(error),
        };
        for found in &mut all {
            let block = if found.head.meta.is_sparse() { None } else { blocks.next() };
            match block.and_then(|block| VdiMeta::decode(&block).ok()) {
                Some(meta) if meta.uuid == found.head.uuid => {
                    (found.name, found.policy) = (meta.name, meta.policy);
                }
                _ => match self.read_meta(&found.head).await? {
                    Ok(Some(meta)) => (found.name, found.policy) = (meta.name, meta.policy),
                    Ok(None) => found.name = unnamed(&found.head),
                    Err(damage) => {
                        tracing::error!(vdi = %found.head.uuid, %damage, "damaged name block");
                        found.name = unnamed(&found.head);
                    }
                },
            }
        }
        Ok(all)
    }

    /// A disk's name; a damaged one is replaced by the UUID, so that the disk can still be handled.
    ///
    /// # Errors
    /// The device's.
    pub async fn read_name(&self, head: &VdiHead) -> Result<String> {
        Ok(self.read_name_block(head).await?.unwrap_or_else(|damage| {
            tracing::error!(vdi = %head.uuid, %damage, "damaged name block");
            unnamed(head)
        }))
    }

    /// A disk's name, or what is wrong with the block that says it.
    ///
    /// # Errors
    /// The device's.
    pub async fn read_name_block(&self, head: &VdiHead) -> Result<Result<String, String>> {
        let meta = self.read_meta(head).await?;
        Ok(meta.map(|meta| meta.map_or_else(|| unnamed(head), |meta| meta.name)))
    }

    /// The block with a disk's name and policy, if it has one, or what is wrong with it.
    async fn read_meta(&self, head: &VdiHead) -> Result<Result<Option<VdiMeta>, String>> {
        if head.meta.is_sparse() {
            return Ok(Ok(None));
        }
        match self.control_reader().read_blocks(&[head.meta]).await {
            Ok(blocks) => Ok(match VdiMeta::decode(&blocks[0]) {
                Ok(meta) if meta.uuid == head.uuid => Ok(Some(meta)),
                Ok(meta) => Err(format!("block {} is that of disk {}", head.meta.gba, meta.uuid)),
                Err(damage) => Err(format!("block {}: {damage}", head.meta.gba)),
            }),
            Err(error) if error.kind == StoreErrorKind::Corrupt => Ok(Err(error.to_string())),
            Err(error) => Err(error),
        }
    }

    /// Finds a disk by name or UUID.
    pub(super) async fn find_vdi(&self, name_or_uuid: &str) -> Result<Found> {
        let uuid = Uuid::try_parse(name_or_uuid).ok();
        let mut all = self.all_vdis().await?;
        all.retain(|found| found.head.state == VdiState::Active);
        let by_name = all.iter().position(|found| found.name == name_or_uuid);
        let by_uuid = || all.iter().position(|found| Some(found.head.uuid) == uuid);
        match by_name.or_else(by_uuid) {
            Some(index) => Ok(all.swap_remove(index)),
            None => Err(StoreError::new(
                StoreErrorKind::NotFound,
                format!("VDI '{name_or_uuid}'"),
                format!("{} has no such disk; 'ballast vdi list' shows those it has", self.url()),
            )),
        }
    }

    /// All disks.
    ///
    /// # Errors
    /// The device's.
    pub async fn list_vdis(&self) -> Result<Vec<VdiInfo>> {
        let hosts = self.scan_hosts().await?;
        let mut list = Vec::new();
        for found in self.all_vdis().await? {
            list.push(self.describe(&found, &hosts).await?);
        }
        Ok(list)
    }

    /// One disk, by name or UUID.
    ///
    /// # Errors
    /// `NotFound`, the device's.
    pub async fn lookup_vdi(&self, name_or_uuid: &str) -> Result<VdiInfo> {
        let found = self.find_vdi(name_or_uuid).await?;
        self.describe(&found, &self.scan_hosts().await?).await
    }

    /// Deletes a disk without snapshots, by name or UUID. It is gone when this returns; its blocks are freed in the
    /// background.
    ///
    /// # Errors
    /// `NotFound`; `InUse` saying by whom and since when it is attached, that it has snapshots, or that one is held; the device's.
    pub async fn delete_vdi(self: &Arc<Self>, name_or_uuid: &str) -> Result<()> {
        let name = name_or_uuid.to_owned();
        self.change(|store| async move { store.delete_now(&name, false).await }).await
    }

    /// Deletes a disk with all of its snapshots, of which no clone may hang on any. What only they hold is free after
    /// collection.
    ///
    /// # Errors
    /// As [`delete_vdi`](Self::delete_vdi); `InUse` naming a clone.
    pub async fn delete_vdi_and_snapshots(self: &Arc<Self>, name_or_uuid: &str) -> Result<()> {
        let name = name_or_uuid.to_owned();
        self.change(|store| async move { store.delete_now(&name, true).await }).await
    }

    async fn delete_now(&self, name_or_uuid: &str, with_snapshots: bool) -> Result<()> {
        let core = &self.core;
        let reclaimer = Arc::clone(&core.writer()?.reclaimer);
        let found = self.find_vdi(name_or_uuid).await?;
        self.refuse_attached(&found, "delete").await?;
        self.refuse_held(&found, None)?;
        let live = found.head.snapshots.live;
        if live > 0 && !with_snapshots {
            return Err(StoreError::new(
                StoreErrorKind::InUse,
                found.object(),
                format!(
                    "it has {live} snapshots; delete them first, or with it: 'ballast vdi delete --with-snapshots'"
                ),
            ));
        }
        self.refuse_cloned(&found, None).await?;
        let head = &found.head;
        let since = reclaimer.stay();
        let swap = core.records.swap(&core.io, &found.view, head.clone().buried()).await?;
        swap.done(|| found.object())?;
        let last_snapshot = head.last_snapshot_birth;
        let mut garbage = Garbage::default();
        if head.root.is_exclusive(last_snapshot) {
            let (pointer, level) = (head.root, head.height);
            garbage.subtrees.push(Subtree { pointer, level, last_snapshot });
        }
        if !head.meta.is_sparse() {
            garbage.blocks.push(head.meta.gba);
        }
        reclaimer.discard(garbage, since);
        Ok(())
    }

    pub(super) async fn refuse_attached(&self, found: &Found, verb: &str) -> Result<()> {
        if found.head.owner.is_none() {
            return Ok(());
        }
        Err(StoreError::new(
            StoreErrorKind::InUse,
            found.object(),
            format!(
                "it is attached {}; detach it there, then {verb} it",
                self.describe_owner(&found.head).await?
            ),
        ))
    }

    /// Attaches a disk to this host, or resumes this host's attachment with the same log.
    ///
    /// # Errors
    /// `NotFound`; `InUse` if another host or another log has it; `Damaged`; the device's.
    pub async fn attach(self: &Arc<Self>, uuid: Uuid, options: AttachOptions) -> Result<Arc<Vdi>> {
        self.change(move |store| async move { store.attach_now(uuid, &options, false).await }).await
    }

    /// As [`attach`](Self::attach), with a log that the disk was served from before: it may hold records, and so must be
    /// the disk's present log, or the one that was drained when the disk was detached last (rule L6).
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub async fn resume(self: &Arc<Self>, uuid: Uuid, options: AttachOptions) -> Result<Arc<Vdi>> {
        self.change(move |store| async move { store.attach_now(uuid, &options, true).await }).await
    }

    async fn attach_now(
        &self,
        uuid: Uuid,
        options: &AttachOptions,
        resumes: bool,
    ) -> Result<Arc<Vdi>> {
        let core = &self.core;
        let writer = core.writer()?;
        if options.log_id.is_nil() {
            let problem = "a log needs an identity";
            return Err(StoreError::new(StoreErrorKind::Invalid, format!("VDI {uuid}"), problem));
        }
        let found = self.find_vdi(&uuid.to_string()).await?;
        self.check_attachable(&found, writer.host, options).await?;
        let head = &found.head;
        if resumes {
            check_resumable(&found, options.log_id)?;
        }
        let next = VdiHead {
            owner: Some(Owner { host: writer.host, generation: writer.generation }),
            attachment: head.attachment.plus(1),
            attached_ms: if head.owner.is_some() { head.attached_ms } else { now_ms() },
            log_id: Some(options.log_id),
            ..head.clone()
        };
        let swap = core.records.swap(&core.io, &found.view, next.clone()).await?;
        let view = swap.done(|| found.object())?;
        let sink: Arc<dyn GarbageSink> = Arc::clone(&writer.reclaimer) as _;
        let inner = Arc::new(VdiInner {
            core: Arc::clone(core),
            uuid,
            name: found.name,
            policy: Mutex::new(found.policy),
            root: ArcSwap::new(Root::new(next, Arc::clone(&sink))),
            sink,
            control: tokio::sync::Mutex::new(Control::new(view)),
        });
        self.attached.lock().insert(uuid, Arc::downgrade(&inner));
        Ok(Arc::new(Vdi { inner }))
    }

    async fn check_attachable(
        &self,
        found: &Found,
        host: Uuid,
        options: &AttachOptions,
    ) -> Result<()> {
        let head = &found.head;
        let in_use =
            |message: String| Err(StoreError::new(StoreErrorKind::InUse, found.object(), message));
        if head.owner.is_some_and(|owner| owner.host != host) {
            let owner = self.describe_owner(head).await?;
            return in_use(format!("it is attached {owner}; detach it there first"));
        }
        if head.owner.is_some() && self.attached_here(head).is_some() {
            return in_use("it is attached to this host already".to_owned());
        }
        match head.log_id {
            Some(log_id) if log_id != options.log_id => in_use(format!(
                "its writes are in log {log_id}, but this host's cache has log {}; start the agent with \
                 the cache that holds the former, or give its writes up with 'ballast vdi rollback \
                 --accept-loss'",
                options.log_id
            )),
            _ => Ok(()),
        }
    }

    /// The handle of a disk that is attached through this store object, by the head that the store has of it. A handle that was
    /// kept over a detach is none: what it shows may have been collected since.
    pub(super) fn attached_here(&self, head: &VdiHead) -> Option<Arc<VdiInner>> {
        let mut attached = self.attached.lock();
        attached.retain(|_, weak| weak.strong_count() > 0);
        let inner = attached.get(&head.uuid).and_then(std::sync::Weak::upgrade)?;
        let own = inner.root.load();
        let same = own.head.owner == head.owner && own.head.attachment == head.attachment;
        same.then_some(Arc::clone(&inner))
    }

    /// Waits for an operation that goes on by itself, as long as a control operation may take.
    async fn no_longer_than_control<T>(
        &self,
        found: &Found,
        operation: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let Patience::Limited(limit) = self.control_io.patience() else { return operation.await };
        tokio::time::timeout(limit, operation).await.unwrap_or_else(|_| {
            Err(StoreError::new(
                StoreErrorKind::Unreachable,
                found.object(),
                "a commit of it waits, for the device or for space: this is done when it goes on; see 'ballast status'",
            ))
        })
    }

    /// Grows a disk, attached to this host or to none.
    ///
    /// # Errors
    /// `NotFound`, `Invalid` for a smaller size, `InUse` if another host has it, the device's.
    pub async fn resize_vdi(self: &Arc<Self>, name_or_uuid: &str, size_bytes: u64) -> Result<()> {
        let name = name_or_uuid.to_owned();
        self.change(move |store| async move { store.resize_now(&name, size_bytes).await }).await
    }

    /// Changes the policy of a disk that is attached to this host or to none; returns what holds then.
    ///
    /// # Errors
    /// `NotFound`, `InUse` if another host has it, `NoSpace`, the device's.
    pub async fn set_policy(
        self: &Arc<Self>,
        name_or_uuid: &str,
        change: PolicyChange,
    ) -> Result<Policy> {
        let name = name_or_uuid.to_owned();
        self.change(move |store| async move { store.set_policy_now(&name, change).await }).await
    }

    async fn set_policy_now(&self, name_or_uuid: &str, change: PolicyChange) -> Result<Policy> {
        let core = &self.core;
        let reclaimer = Arc::clone(&core.writer()?.reclaimer);
        let found = self.find_vdi(name_or_uuid).await?;
        if let Some(inner) = self.attached_here(&found.head) {
            let vdi = Vdi { inner };
            return self.no_longer_than_control(&found, vdi.set_policy(change)).await;
        }
        self.refuse_attached(&found, "change").await?;
        let policy = change.of(found.policy);
        if found.policy == policy {
            return Ok(policy);
        }
        let meta = found.head.meta_block(found.name.clone(), policy);
        let meta = write_meta(core, &self.control_io, &meta).await?;
        let next = VdiHead { meta, ..found.head.clone() };
        let since = reclaimer.stay();
        let swap = core.records.swap(&core.io, &found.view, next).await?;
        swap.done(|| found.object())?;
        reclaimer.allocator().settle(&merge(vec![meta.gba]));
        if !found.head.meta.is_sparse() {
            let blocks = vec![found.head.meta.gba];
            reclaimer.discard(Garbage { blocks, ..Garbage::default() }, since);
        }
        Ok(policy)
    }

    async fn resize_now(&self, name_or_uuid: &str, size_bytes: u64) -> Result<()> {
        let core = &self.core;
        core.writer()?;
        let found = self.find_vdi(name_or_uuid).await?;
        if let Some(inner) = self.attached_here(&found.head) {
            let vdi = Vdi { inner };
            return self.no_longer_than_control(&found, vdi.resize(size_bytes)).await;
        }
        self.refuse_attached(&found, "resize").await?;
        let io = &self.control_io;
        let (next, added) = grow(core, io, &found.object(), &found.head, size_bytes).await?;
        let swap = core.records.swap(&core.io, &found.view, next).await?;
        swap.done(|| found.object())?;
        core.allocator()?.settle(&added);
        Ok(())
    }
}

/// Writes a disk's immutable block, durably, to a fresh place; `patience` says how long to wait for one.
pub(crate) async fn write_meta(core: &Core, patience: &Io, meta: &VdiMeta) -> Result<Pointer> {
    // With the patience of a control operation a full store is an error.
    let allocator = core.allocator()?;
    let runs = allocator.allocate(patience, ExtentType::Metadata, 1, Purpose::Normal).await?;
    let block = Bytes::from(meta.encode());
    let crc = crate::crc::crc32c(&block);
    let pointer = Pointer { gba: runs[0].start, read_only: false, birth: Birth(0), crc };
    core.io.write_durable(&[(pointer.gba, vec![block])]).await?;
    Ok(pointer)
}

impl Found {
    pub(super) fn object(&self) -> String {
        format!("VDI '{}' ({})", self.name, self.head.uuid)
    }
}

/// A log that was served before goes on only where it ended.
fn check_resumable(found: &Found, log_id: Uuid) -> Result<()> {
    let (head, object) = (&found.head, found.object());
    // A head without a note was written by a former version: believed, as it was then.
    let Some(last) = head.last_log.filter(|last| *last != log_id && head.log_id.is_none()) else {
        return Ok(());
    };
    let since = if last == GIVEN_UP {
        "it was rolled back since, to its committed image or to a snapshot, and what this log holds is given up".to_owned()
    } else {
        format!("it has been attached and detached since with log {last}")
    };
    Err(StoreError::new(
        StoreErrorKind::InUse,
        object,
        format!(
            "this host's cache has log {log_id} of it, but {since}; nothing was changed. 'ballast vdi rollback \
             --accept-loss' of the disk puts the old log into quarantine, then the disk can be attached"
        ),
    ))
}

fn gone(object: &str) -> StoreError {
    StoreError::new(StoreErrorKind::Damaged, object, "its record vanished")
}

/// How a disk is called that has no name, or whose name is lost.
fn unnamed(head: &VdiHead) -> String {
    format!("unnamed-{}", head.uuid)
}
