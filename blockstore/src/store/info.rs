//! What the store says of itself, and copying a committed image out of it.

use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::extent::{ExtentRecord, ExtentType};
use crate::format::host::{HostRecord, HostState};
use crate::format::pointer::Pointer;
use crate::format::vdi::{Origin, VdiHead, VdiState};
use crate::io::{Health, now_ms};
use crate::policy::WhenOffline;
use crate::schedule::Schedule;
use crate::slot::{Content, View};
use crate::store::Store;
use crate::store::registry::Found;
use crate::tree::{Extents, Reader};
use crate::types::{BLOCK_SIZE, Generation, Lsn};
use serde::Serialize;
use std::io;
use uuid::Uuid;

/// Who has a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct OwnerInfo {
    /// The host.
    pub host: Uuid,
    /// Its name, if its record says so.
    pub host_name: Option<String>,
    /// Its generation when it took, or last took up, the disk.
    pub generation: Generation,
    /// Milliseconds since 1970.
    pub since_ms: u64,
}

/// A virtual disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VdiInfo {
    /// Identity.
    pub uuid: Uuid,
    /// Name.
    pub name: String,
    /// Bytes.
    pub size_bytes: u64,
    /// Where it is in its life.
    pub state: VdiState,
    /// Who has it attached.
    pub owner: Option<OwnerInfo>,
    /// Rises with each attach and each resumption.
    pub attachment: Generation,
    /// The image is the disk as of this point of the guest's write order.
    pub committed_lsn: Lsn,
    /// When it was reached, milliseconds since 1970 by its owner's clock; 0: not noted.
    pub committed_ms: u64,
    /// The log that extends the image.
    pub log_id: Option<Uuid>,
    /// How many snapshots of it there are in the store.
    pub snapshots: u64,
    /// The snapshot that it was cloned from.
    pub origin: Option<Origin>,
    /// Levels of its tree.
    pub height: u8,
    /// Root of its tree.
    pub root: Pointer,
    /// Milliseconds since 1970.
    pub created_ms: u64,
    /// What becomes of requests that cannot go on without the store, as noted here: a host that has the disk attached may
    /// know of a later choice.
    #[serde(serialize_with = "crate::policy::in_words")]
    pub when_offline: WhenOffline,
    /// Its snapshots by themselves, as noted here, in the same way.
    #[serde(serialize_with = "crate::policy::in_words")]
    pub schedule: Schedule,
}

/// A host of the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostInfo {
    /// Identity.
    pub uuid: Uuid,
    /// Name.
    pub name: String,
    /// Address.
    pub address: String,
    /// Whether it uses the store.
    pub state: HostState,
    /// Its incarnation.
    pub generation: Generation,
    /// Milliseconds since 1970.
    pub up_since_ms: u64,
    /// Milliseconds since 1970, by its own clock.
    pub heartbeat_ms: u64,
}

/// A store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StoreInfo {
    /// Identity.
    pub uuid: Uuid,
    /// The device.
    pub url: String,
    /// Free text of the operator.
    pub label: String,
    /// Version of the format.
    pub format_version: u16,
    /// Records are guarded by alternating slots; one host only.
    pub single_host: bool,
    /// Milliseconds since 1970.
    pub created_ms: u64,
    /// Bytes that the store uses of the device.
    pub capacity_bytes: u64,
    /// Bytes.
    pub extent_size_bytes: u64,
    /// All extents, the system extent included.
    pub extents: u32,
    /// Extents that anyone may claim.
    pub extents_unused: u32,
    /// Extents that hold disks' blocks.
    pub extents_data: u32,
    /// Extents that hold nodes and names.
    pub extents_metadata: u32,
    /// Blocks of data extents that are allocated or claimed.
    pub data_blocks_allocated: u64,
    /// Blocks of metadata extents that are allocated or claimed.
    pub metadata_blocks_allocated: u64,
    /// Blocks that can still be allocated, those of unused extents included.
    pub blocks_free: u64,
    /// Hosts.
    pub hosts: Vec<HostInfo>,
    /// Disks.
    pub vdis: Vec<VdiInfo>,
    /// How the device does.
    pub health: Health,
    /// Damage that was noticed on the way, in words; `store check` tells more.
    pub problems: Vec<String>,
}

/// How much room a store has, in blocks of disks and their maps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Space {
    /// All that can be allocated.
    pub blocks: u64,
    /// Not allocated and not claimed.
    pub free: u64,
}

/// An extent's blocks.
struct ExtentSpace {
    kind: ExtentType,
    /// Or claimed.
    allocated: u64,
    free: u64,
}

/// What an export copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExportReport {
    /// Bytes of the disk; the copy must be this long.
    pub size_bytes: u64,
    /// The image is the disk as of this point of the guest's write order.
    pub lsn: Lsn,
    /// Blocks copied; all others are zeros.
    pub blocks: u64,
}

impl Store {
    /// The same reader with the patience of a control operation.
    pub(super) fn control_reader(&self) -> Reader {
        Reader { io: self.control_io.clone(), ..self.core.reader.clone() }
    }

    /// Everything `store info` shows.
    ///
    /// # Errors
    /// The device's.
    pub async fn info(&self) -> Result<StoreInfo> {
        let sb = &self.core.superblock;
        let hosts = self.scan_hosts().await?;
        let mut info = StoreInfo {
            uuid: self.uuid(),
            url: self.url().to_owned(),
            label: sb.label.clone(),
            format_version: sb.format_version,
            single_host: sb.single_host,
            created_ms: sb.created_ms,
            capacity_bytes: sb.device_size,
            extent_size_bytes: sb.geometry.extent_size(),
            extents: sb.geometry.extent_count,
            extents_unused: 0,
            extents_data: 0,
            extents_metadata: 0,
            data_blocks_allocated: 0,
            metadata_blocks_allocated: 0,
            blocks_free: 0,
            hosts: hosts.iter().filter_map(View::record).map(host_info).collect(),
            vdis: self.list_vdis().await?,
            health: self.health(),
            problems: Vec::new(),
        };
        for (number, view) in (0..).zip(self.scan_extents_readable().await?) {
            let problems = &mut info.problems;
            let Some(extent) = self.count_extent(number, &view, problems).await? else { continue };
            info.blocks_free += extent.free;
            match extent.kind {
                ExtentType::System => {}
                ExtentType::Unused => info.extents_unused += 1,
                ExtentType::Data => {
                    info.extents_data += 1;
                    info.data_blocks_allocated += extent.allocated;
                }
                ExtentType::Metadata => {
                    info.extents_metadata += 1;
                    info.metadata_blocks_allocated += extent.allocated;
                }
            }
        }
        Ok(info)
    }

    /// How much room there is, from the bitmaps on the device.
    ///
    /// # Errors
    /// The device's.
    pub async fn space(&self) -> Result<Space> {
        let mut space = Space::default();
        for (number, view) in (0..).zip(self.scan_extents_readable().await?) {
            if let Some(extent) = self.count_extent(number, &view, &mut Vec::new()).await? {
                space.blocks += extent.free + extent.allocated;
                space.free += extent.free;
            }
        }
        Ok(space)
    }

    /// None for extents that hold no blocks of disks, and for those whose record is damaged. What pages of a bitmap describe that are
    /// damaged, or that the device does not read, is not free.
    async fn count_extent(
        &self,
        number: u32,
        view: &View<ExtentRecord>,
        problems: &mut Vec<String>,
    ) -> Result<Option<ExtentSpace>> {
        let g = &self.core.superblock.geometry;
        let usable = g.extent_blocks - g.extent_overhead();
        let kind = match &view.content {
            Content::Unused => ExtentType::Unused,
            Content::Valid(head) => head.record.kind,
            Content::Damaged(damage) => {
                problems.push(format!("the record of extent {number} is damaged: {damage}"));
                return Ok(None);
            }
        };
        let ready = view.record().is_some_and(|record| record.ready);
        if kind == ExtentType::System {
            return Ok(None);
        }
        if kind == ExtentType::Unused || !ready {
            return Ok(Some(ExtentSpace { kind, allocated: 0, free: usable }));
        }
        let mut free = 0;
        for (page, content) in (0..).zip(self.bmap_readable(number).await?) {
            match content {
                Ok(content) => free += content.clear_bits(g.page_bits(page)),
                Err(damage) => {
                    problems
                        .push(format!("BMap page {page} of extent {number} is damaged: {damage}"));
                }
            }
        }
        Ok(Some(ExtentSpace { kind, allocated: usable.saturating_sub(free), free }))
    }

    pub(super) async fn describe(
        &self,
        found: &Found,
        hosts: &[View<HostRecord>],
    ) -> Result<VdiInfo> {
        let head = &found.head;
        let name_of = |uuid| {
            let records = hosts.iter().filter_map(View::record);
            records.filter(|r| r.uuid == uuid).map(|r| r.name.clone()).next()
        };
        let attached = head.owner.filter(|_| head.state == VdiState::Active);
        Ok(VdiInfo {
            uuid: head.uuid,
            name: found.name.clone(),
            size_bytes: head.size_bytes,
            state: head.state,
            owner: attached.map(|owner| OwnerInfo {
                host: owner.host,
                host_name: name_of(owner.host),
                generation: owner.generation,
                since_ms: head.attached_ms,
            }),
            attachment: head.attachment,
            committed_lsn: head.committed,
            committed_ms: head.committed_ms,
            log_id: head.log_id,
            snapshots: head.snapshots.live,
            origin: head.origin,
            height: head.height,
            root: head.root,
            created_ms: head.created_ms,
            when_offline: found.policy.when_offline,
            schedule: found.policy.schedule,
        })
    }

    /// "to host 'a' (uuid) since …", for messages.
    pub(super) async fn describe_owner(&self, head: &VdiHead) -> Result<String> {
        let Some(owner) = head.owner else { return Ok("to no host".to_owned()) };
        let hosts = self.scan_hosts().await?;
        let record = hosts.iter().filter_map(View::record).find(|r| r.uuid == owner.host);
        let name = record.map_or("unknown", |r| r.name.as_str());
        let state = record.map_or("without a record", |r| match r.state {
            HostState::Up => "up",
            HostState::Down => "down",
            HostState::Evicted => "evicted",
        });
        let seconds = now_ms().saturating_sub(head.attached_ms) / 1000;
        Ok(format!("to host '{name}' ({}, {state}) for {seconds} s", owner.host))
    }

    /// Copies the committed image of a disk, whoever has it attached. `sink` gets byte offset and
    /// content of each block that is not a hole, in order.
    ///
    /// # Errors
    /// `NotFound`; `Changed` if a commit replaced blocks while they were being read; `Corrupt`;
    /// `Device` if the sink fails.
    pub async fn export_vdi(
        &self,
        name_or_uuid: &str,
        sink: &mut (dyn FnMut(u64, &[u8]) -> io::Result<()> + Send),
    ) -> Result<ExportReport> {
        let found = self.find_vdi(name_or_uuid).await?;
        // Held while reading, so that commits of this very process reuse nothing under us.
        let pinned = self.attached_here(&found.head).map(|inner| inner.root.load_full());
        let head = pinned.as_ref().map_or(&found.head, |root| &root.head);
        let mut report =
            ExportReport { size_bytes: head.size_bytes, lsn: head.committed, blocks: 0 };
        let outcome = self.copy_out(&found, head, sink, &mut report.blocks).await;
        match outcome {
            Err(error) if error.kind == StoreErrorKind::Corrupt => {
                let now = self.core.records.read(&self.control_io, found.view.slot).await?;
                if pinned.is_none() && now != found.view {
                    return Err(StoreError::new(
                        StoreErrorKind::Changed,
                        found.object(),
                        "its owner committed while the image was being copied; detach it, or try again",
                    ));
                }
                Err(error)
            }
            Err(error) => Err(error),
            Ok(()) => Ok(report),
        }
    }

    /// Copies a snapshot of a disk, by LSN or label, as [`export_vdi`](Self::export_vdi) does.
    ///
    /// # Errors
    /// As [`export_vdi`](Self::export_vdi).
    pub async fn export_snapshot(
        &self,
        name_or_uuid: &str,
        snapshot: &str,
        sink: &mut (dyn FnMut(u64, &[u8]) -> io::Result<()> + Send),
    ) -> Result<ExportReport> {
        let found = self.find_vdi(name_or_uuid).await?;
        let snapshot = self.find_snapshot(&found.head.uuid.to_string(), snapshot).await?;
        let head = snapshot.as_head(&found.head);
        let mut report =
            ExportReport { size_bytes: head.size_bytes, lsn: head.committed, blocks: 0 };
        self.copy_out(&found, &head, sink, &mut report.blocks).await?;
        Ok(report)
    }

    async fn copy_out(
        &self,
        found: &Found,
        head: &VdiHead,
        sink: &mut (dyn FnMut(u64, &[u8]) -> io::Result<()> + Send),
        copied: &mut u64,
    ) -> Result<()> {
        let reader = self.control_reader();
        let mut extents = Extents::of(head);
        while let Some(leaf) = extents.next_leaf(&reader).await? {
            let pointers: Vec<Pointer> = leaf.iter().map(|(_, pointer)| *pointer).collect();
            for ((lba, _), block) in leaf.iter().zip(reader.read_blocks(&pointers).await?) {
                sink(lba.0 * BLOCK_SIZE as u64, &block).map_err(|error| {
                    let message = format!("writing the copy failed: {error}");
                    StoreError::new(StoreErrorKind::Device, found.object(), message)
                })?;
                *copied += 1;
            }
        }
        Ok(())
    }
}

fn host_info(record: &HostRecord) -> HostInfo {
    HostInfo {
        uuid: record.uuid,
        name: record.name.clone(),
        address: record.address.clone(),
        state: record.state,
        generation: record.generation,
        up_since_ms: record.up_since_ms,
        heartbeat_ms: record.heartbeat_ms,
    }
}
