//! Reading the registry: all of it, or the place where a disk was seen last; names and policies.

use super::Found;
use super::directory::{Directory, Entry, Place, Stamp};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::host::HostState;
use crate::format::meta::VdiMeta;
use crate::format::pointer::Pointer;
use crate::format::vdi::{VdiHead, VdiState};
use crate::slot::Content;
use crate::store::{Store, VdiInfo, hosts};
use crate::tree::Reader;
use std::sync::Arc;
use uuid::Uuid;

impl Store {
    /// Every disk of the registry, with its name. Damaged records are skipped, with a warning.
    pub(in crate::store) async fn all_vdis(&self) -> Result<Vec<Found>> {
        Ok(self.read_registry().await?.0)
    }

    /// The registry as it is now; not read again if nobody else can have changed it since it was. What this process changes
    /// itself must not be under way: the caller has the registry's lock.
    pub(in crate::store) async fn directory(&self) -> Result<Arc<Directory>> {
        if let Some(directory) = self.latest.get()
            && directory.stamp.is_some()
            && directory.stamp == self.stamp().await?
        {
            return Ok(directory);
        }
        Ok(self.read_registry().await?.1)
    }

    /// The registry as it was read last, if the target cannot have forgotten any of it since.
    pub(super) fn hint(&self) -> Option<Arc<Directory>> {
        let epoch = self.core.io.device().epoch();
        self.latest.get().filter(|directory| directory.epoch == epoch)
    }

    /// See [`Stamp`]. None: others may change the registry now.
    async fn stamp(&self) -> Result<Option<Stamp>> {
        let Some(writer) = &self.core.writer else { return Ok(None) };
        let epoch = self.core.io.device().epoch();
        let table =
            hosts::read_used(&self.control_io, &self.core.records, self.core.geometry()).await?;
        let (mut own, mut others) = (false, Vec::new());
        for view in &table {
            match &view.content {
                Content::Valid(head) if head.record.uuid == writer.host => {
                    let host = &head.record;
                    own = host.generation == writer.generation && host.state == HostState::Up;
                }
                Content::Valid(head) if head.record.state == HostState::Up => return Ok(None),
                Content::Damaged(_) => return Ok(None),
                Content::Valid(_) | Content::Unused => {
                    others.push((view.slot.first, view.sequence()));
                }
            }
        }
        Ok(own.then_some(Stamp { epoch, others }))
    }

    /// Reads all of it, but only those name blocks that were not read before.
    pub(super) async fn read_registry(&self) -> Result<(Vec<Found>, Arc<Directory>)> {
        let reading = self.latest.begin();
        let epoch = self.core.io.device().epoch();
        // Before the registry: who comes in between is seen by the next look at the table.
        let stamp = self.stamp().await?;
        let former = self.latest.get().unwrap_or_default();
        let (mut all, mut places) = (Vec::new(), Vec::new());
        for (slot, view) in self.scan_vdis().await? {
            places.push(match &view.content {
                Content::Valid(head) if head.record.state != VdiState::Tombstone => {
                    let head = head.record.clone();
                    let (name, policy) = Default::default();
                    all.push(Found { place: slot, view, head, name, policy });
                    // Replaced below.
                    Place::Damaged
                }
                Content::Valid(_) | Content::Unused => Place::Buried,
                Content::Damaged(damage) => {
                    tracing::error!(slot, %damage, "damaged VDI record");
                    Place::Damaged
                }
            });
        }
        let unread = |found: &&Found| {
            let meta = found.head.meta;
            !meta.is_sparse() && former.known(found.place, found.head.uuid, meta).is_none()
        };
        let metas: Vec<Pointer> = all.iter().filter(unread).map(|found| found.head.meta).collect();
        // All at once; if one of them is damaged, one by one.
        let mut blocks = match self.control_reader().read_blocks(&metas).await {
            Ok(blocks) => blocks.into_iter(),
            Err(error) if error.kind == StoreErrorKind::Corrupt => Vec::new().into_iter(),
            Err(error) => return Err(error),
        };
        for found in &mut all {
            let head = &found.head;
            let known = former.known(found.place, head.uuid, head.meta);
            let named = match known {
                Some(entry) => Some((entry.name.clone(), entry.policy)),
                None => {
                    let block = if head.meta.is_sparse() { None } else { blocks.next() };
                    let meta = block.and_then(|block| VdiMeta::decode(&block).ok());
                    let meta = meta.filter(|meta| meta.uuid == head.uuid);
                    meta.map(|meta| (meta.name, meta.policy))
                }
            };
            let named = match named {
                Some(named) => Some(named),
                None => match read_meta(&self.control_reader(), head).await? {
                    Ok(Some(meta)) => Some((meta.name, meta.policy)),
                    Ok(None) => Some((unnamed(head), Default::default())),
                    Err(damage) => {
                        tracing::error!(vdi = %head.uuid, %damage, "damaged name block");
                        None
                    }
                },
            };
            let meta = named.is_some().then_some(head.meta);
            (found.name, found.policy) =
                named.unwrap_or_else(|| (unnamed(&found.head), Default::default()));
            places[found.place as usize] = Place::Taken(found.entry(meta));
        }
        let directory = self.latest.end(reading, Directory { places, stamp, epoch });
        Ok((all, directory))
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
        self.read_name_block_through(&self.control_reader(), head).await
    }

    pub(in crate::store) async fn read_name_block_through(
        &self,
        reader: &Reader,
        head: &VdiHead,
    ) -> Result<Result<String, String>> {
        let meta = read_meta(reader, head).await?;
        Ok(meta.map(|meta| meta.map_or_else(|| unnamed(head), |meta| meta.name)))
    }

    /// Finds a disk by name or UUID, as it is now.
    pub(in crate::store) async fn find_vdi(&self, name_or_uuid: &str) -> Result<Found> {
        let uuid = Uuid::try_parse(name_or_uuid).ok();
        if let Some(found) = self.find_where_it_was(name_or_uuid, uuid).await? {
            return Ok(found);
        }
        let (mut all, _) = self.read_registry().await?;
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

    /// Reads the place where a disk was seen last. If that disk is still there, under the same block of name and policy, then no
    /// other has its name.
    async fn find_where_it_was(&self, name: &str, uuid: Option<Uuid>) -> Result<Option<Found>> {
        let Some(hint) = self.hint() else { return Ok(None) };
        let Some((place, entry)) = hint.find(name, uuid) else { return Ok(None) };
        let view = self.read_vdi_slot(place).await?;
        let same = |head: &&VdiHead| {
            head.uuid == entry.uuid
                && head.state == VdiState::Active
                && entry.meta == Some(head.meta)
        };
        let Some(head) = view.record().filter(same).cloned() else { return Ok(None) };
        let (name, policy) = (entry.name.clone(), entry.policy);
        Ok(Some(Found { place, view, head, name, policy }))
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
        let hosts = match found.head.owner {
            Some(_) => self.scan_hosts().await?,
            None => Vec::new(),
        };
        self.describe(&found, &hosts).await
    }

    /// A disk's name and identity, by either.
    ///
    /// # Errors
    /// `NotFound`, the device's.
    pub async fn identify_vdi(&self, name_or_uuid: &str) -> Result<(String, Uuid)> {
        let found = self.find_vdi(name_or_uuid).await?;
        Ok((found.name, found.head.uuid))
    }
}

impl Found {
    pub(in crate::store) fn object(&self) -> String {
        format!("VDI '{}' ({})", self.name, self.head.uuid)
    }

    /// What the directory keeps of it; `meta` is the block that its name is from.
    pub(super) fn entry(&self, meta: Option<Pointer>) -> Entry {
        Entry {
            uuid: self.head.uuid,
            active: self.head.state == VdiState::Active,
            origin: self.head.origin,
            meta,
            name: self.name.clone(),
            policy: self.policy,
        }
    }
}

/// How a disk is called that has no name, or whose name is lost.
fn unnamed(head: &VdiHead) -> String {
    format!("unnamed-{}", head.uuid)
}

/// The block with a disk's name and policy, if it has one, or what is wrong with it.
async fn read_meta(reader: &Reader, head: &VdiHead) -> Result<Result<Option<VdiMeta>, String>> {
    if head.meta.is_sparse() {
        return Ok(Ok(None));
    }
    match reader.read_blocks(&[head.meta]).await {
        Ok(blocks) => Ok(match VdiMeta::decode(&blocks[0]) {
            Ok(meta) if meta.uuid == head.uuid => Ok(Some(meta)),
            Ok(meta) => Err(format!("block {} is that of disk {}", head.meta.gba, meta.uuid)),
            Err(damage) => Err(format!("block {}: {damage}", head.meta.gba)),
        }),
        Err(error) if error.kind == StoreErrorKind::Corrupt => Ok(Err(error.to_string())),
        Err(error) => Err(error),
    }
}
