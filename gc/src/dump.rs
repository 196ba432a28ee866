//! `store dump`: any block of a store, or one of its tables, in words. Read-only, beside an agent too.
//!
//! The words are `blockstore::describe`'s; here is what is read for them. A device whose superblocks cannot be read is shown by
//! block, as far as a block says itself what it is.

use crate::collect::Progress;
use crate::pointing::{Pointing, find};
use blockstore::describe::{
    Described, Region, Role, Surroundings, Verdict, describe, describe_alone,
};
use blockstore::device::Device;
use blockstore::format::bitmap::{BitmapKind, BitmapPage, PAGE_BITS};
use blockstore::format::extent::{ExtentRecord, ExtentType};
use blockstore::format::geometry::{EXTENT_SIZE_MAX, EXTENT_SIZE_MIN, Geometry};
use blockstore::format::head::{Head, MAGIC, is_unused};
use blockstore::format::node::NODE_SHIFT;
use blockstore::format::pointer::Pointer;
use blockstore::format::vdi::VdiHead;
use blockstore::slot::View;
use blockstore::types::{BLOCK_SHIFT, BLOCK_SIZE, Gba};
use blockstore::{OpenOptions, Result, Store, StoreError, StoreErrorKind};
use bytes::Bytes;
use serde::Serialize;
use std::sync::Arc;
use uuid::Uuid;

/// Blocks of a list of snapshots that are shown.
const LIST_MAX: usize = 4096;

/// What to show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// Both superblocks.
    Superblock,
    /// The GC record.
    Gc,
    /// The host table.
    Hosts,
    /// The extent catalogue.
    Extents,
    /// The VDI registry.
    Heads,
    /// A disk's head, name block and root, by name or UUID.
    Vdi(String),
    /// The blocks of a disk's list of snapshots.
    Snapshots(String),
    /// Any block.
    Block(Gba),
}

/// A block, and who points at it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dumped {
    /// The block.
    #[serde(flatten)]
    pub described: Described,
    /// Who points at it, as far as that was looked for.
    pub pointed_at_by: Vec<String>,
}

/// What was shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dump {
    /// The device.
    pub url: String,
    /// The store on it, if its superblock can be read.
    pub store: Option<Uuid>,
    /// The blocks.
    pub blocks: Vec<Dumped>,
    /// What else there is to say.
    pub notes: Vec<String>,
}

impl Dump {
    /// Blocks that are not what they should be.
    #[must_use]
    pub fn damaged(&self) -> usize {
        self.blocks.iter().filter(|block| block.described.is_damaged()).count()
    }
}

/// Shows `what` of the store on a device. Who points at a block is looked for as far as that is cheap, or with `who` everywhere.
///
/// # Errors
/// `Invalid` for a block that the device does not have; `NotFound` for a disk; those of opening the store, if it takes more than
/// the block itself; the device's.
pub async fn dump(device: Device, what: &What, who: bool, progress: &Progress) -> Result<Dump> {
    let options = OpenOptions { any_size: true, ..OpenOptions::read_only() };
    let opened = Store::open(Arc::clone(&device), options).await;
    let mut blocks = Blocks::new(device);
    match (opened, what) {
        (Ok(store), what) => {
            blocks.dump.store = Some(store.uuid());
            blocks.of_store(&store, what, who, progress).await?;
        }
        (Err(error), What::Block(gba)) => {
            blocks.dump.notes.push(error.to_string());
            blocks.alone(*gba).await?;
        }
        (Err(error), What::Superblock) => {
            blocks.dump.notes.push(error.to_string());
            blocks.alone(Gba(0)).await?;
            blocks.possible_copies().await?;
        }
        (Err(error), _) => return Err(error),
    }
    Ok(blocks.dump)
}

struct Blocks {
    device: Device,
    dump: Dump,
}

impl Blocks {
    fn new(device: Device) -> Self {
        let url = device.info().url.clone();
        let dump = Dump { url, store: None, blocks: Vec::new(), notes: Vec::new() };
        Self { device, dump }
    }

    fn has(&self, gba: Gba) -> bool {
        gba.0 < self.device.info().capacity >> BLOCK_SHIFT
    }

    /// A block's bytes; words if the device cannot read it.
    async fn read(&self, gba: Gba) -> Result<Result<Bytes, String>> {
        if !self.has(gba) {
            let blocks = self.device.info().capacity >> BLOCK_SHIFT;
            let words = format!(
                "there is no block {gba}: the device has {blocks} blocks of {BLOCK_SIZE} bytes"
            );
            return Err(StoreError::new(StoreErrorKind::Invalid, &*self.dump.url, words));
        }
        match self.device.read(gba.byte_offset(), BLOCK_SIZE).await {
            Ok(block) => Ok(Ok(block.freeze())),
            Err(error) if error.is_transient() => Err(error.into()),
            Err(error) => Ok(Err(format!("it cannot be read: {error}"))),
        }
    }

    fn push(&mut self, described: Described) {
        self.dump.blocks.push(Dumped { described, pointed_at_by: Vec::new() });
    }

    async fn alone(&mut self, gba: Gba) -> Result<()> {
        let described = match self.read(gba).await? {
            Ok(block) => describe_alone(&block, gba),
            Err(why) => unreadable(describe_alone(&[], gba), why),
        };
        self.push(described);
        Ok(())
    }

    /// The second superblock may be in a few places.
    async fn possible_copies(&mut self) -> Result<()> {
        let mut extent = EXTENT_SIZE_MIN;
        while extent <= EXTENT_SIZE_MAX {
            let gba = Gba((extent >> BLOCK_SHIFT) - 1);
            extent *= 2;
            if self.has(gba) && self.read(gba).await?.is_ok_and(|block| block.starts_with(&MAGIC)) {
                self.alone(gba).await?;
            }
        }
        Ok(())
    }

    /// A block of a store, as `pointed` takes it.
    async fn one(
        &mut self,
        store: &Store,
        gba: Gba,
        pointed: Option<(Role, Pointer)>,
        kind: Option<ExtentType>,
    ) -> Result<&mut Dumped> {
        let within = Surroundings { store: store.uuid(), geometry: &store.superblock().geometry };
        let described = match self.read(gba).await? {
            Ok(block) => describe(&block, gba, within, pointed, kind),
            Err(why) => unreadable(describe(&[], gba, within, None, None), why),
        };
        self.push(described);
        let last = self.dump.blocks.len() - 1;
        Ok(&mut self.dump.blocks[last])
    }

    async fn of_store(
        &mut self,
        store: &Store,
        what: &What,
        who: bool,
        progress: &Progress,
    ) -> Result<()> {
        let g = &store.superblock().geometry;
        match what {
            What::Superblock => self.run(store, g.superblocks().to_vec(), false).await,
            What::Gc => self.run(store, vec![Gba(g.gc_start), Gba(g.gc_start + 1)], true).await,
            What::Hosts => {
                let pairs = (0..g.host_slots).flat_map(|slot| pair(g.host_slot(slot)));
                self.run(store, pairs.collect(), true).await
            }
            What::Heads => {
                let used = store.scan_vdis().await?.len() as u32;
                let pairs = (0..used).flat_map(|slot| pair(g.vdi_slot(slot)));
                self.run(store, pairs.collect(), true).await
            }
            What::Extents => self.extents(store, g).await,
            What::Vdi(name) => {
                let (slot, head) = find_head(store, name).await?;
                self.run(store, pair(g.vdi_slot(slot)).to_vec(), true).await?;
                let top = top_role(head.snapshots.height);
                let parts = [
                    (head.meta, Role::Name),
                    (head.root, Role::Node(head.height)),
                    (head.snapshots.root, top),
                ];
                for (pointer, role) in parts {
                    self.pointed(store, pointer, role, format!("the head of '{name}'")).await?;
                }
                Ok(())
            }
            What::Snapshots(name) => self.snapshots(store, name).await,
            What::Block(gba) => self.any(store, *gba, who, progress).await,
        }
    }

    /// Several blocks; of records in pairs those that were never used are left out.
    async fn run(&mut self, store: &Store, blocks: Vec<Gba>, used_only: bool) -> Result<()> {
        for gba in blocks {
            if self.has(gba) {
                self.one(store, gba, None, None).await?;
            } else {
                let words = format!("block {gba} lies behind the end of the device");
                self.dump.notes.push(words);
            }
        }
        if used_only {
            self.dump.blocks.retain(|block| block.described.verdict != Verdict::Unused);
        }
        Ok(())
    }

    async fn extents(&mut self, store: &Store, g: &Geometry) -> Result<()> {
        for (number, view) in (0..).zip(store.scan_extents().await?) {
            if view.sequence() == 0 && view.content == blockstore::slot::Content::Unused {
                continue;
            }
            let mut more = Vec::new();
            let counts = |r: &ExtentRecord| {
                r.ready && matches!(r.kind, ExtentType::Data | ExtentType::Metadata)
            };
            if view.record().is_some_and(counts) && self.has(g.reclaim_page(number, 0)) {
                let (mut free, mut bad) = (0, 0);
                for (page, content) in (0..).zip(store.read_bmap(number).await?) {
                    match content {
                        Ok(content) => free += content.clear_bits(g.page_bits(page)),
                        Err(_) => bad += 1,
                    }
                }
                more.push(("free", format!("{free} blocks of {}", g.extent_blocks)));
                more.push(("damaged pages of its bitmap", bad.to_string()));
            }
            let dumped = self.one(store, g.extent_slot(number), None, None).await?;
            dumped.described.fields.extend(more);
        }
        Ok(())
    }

    async fn pointed(
        &mut self,
        store: &Store,
        pointer: Pointer,
        role: Role,
        by: String,
    ) -> Result<()> {
        if pointer.is_sparse() {
            return Ok(());
        }
        if !self.has(pointer.gba) || !store.superblock().geometry.is_allocatable(pointer.gba) {
            let words = format!("{by} names block {}, which no tree block can be", pointer.gba);
            self.dump.notes.push(words);
            return Ok(());
        }
        let dumped = self.one(store, pointer.gba, Some((role, pointer)), None).await?;
        dumped.pointed_at_by.push(by);
        Ok(())
    }

    async fn snapshots(&mut self, store: &Store, name: &str) -> Result<()> {
        let (_, head) = find_head(store, name).await?;
        let (index, reader) = (head.snapshots, store.reader());
        let mut stack = vec![(index.root, index.height, 0u64)];
        while let Some((pointer, level, first)) = stack.pop() {
            if self.dump.blocks.len() >= LIST_MAX {
                self.dump.notes.push(format!("more than {LIST_MAX} blocks: the rest is not shown"));
                return Ok(());
            }
            let by = format!("the list of snapshots of '{name}'");
            self.pointed(store, pointer, top_role(level), by).await?;
            if level < 2 || pointer.is_sparse() {
                continue;
            }
            let nodes = match reader.read_nodes(&[pointer]).await {
                Ok(nodes) => nodes,
                // Shown as damaged.
                Err(error) if error.kind == StoreErrorKind::Corrupt => continue,
                Err(error) => return Err(error),
            };
            let at = stack.len();
            for (slot, child) in nodes.iter().flat_map(|node| node.children()) {
                let span = 1u64 << (NODE_SHIFT * (u32::from(level) - 2));
                stack.push((child, level - 1, first + u64::from(slot) * span));
            }
            stack[at..].reverse();
        }
        if self.dump.blocks.is_empty() {
            self.dump.notes.push(format!("'{name}' has no snapshots in the store"));
        }
        Ok(())
    }

    /// Any block, with what its extent and those who point at it say.
    async fn any(&mut self, store: &Store, gba: Gba, who: bool, progress: &Progress) -> Result<()> {
        let g = &store.superblock().geometry;
        let Region::Block(extent, within) = Region::of(g, gba) else {
            self.one(store, gba, None, None).await?;
            return Ok(());
        };
        let mut more = Vec::new();
        let at = g.extent_slot(extent);
        let (record, says) = match self.read(at).await? {
            Ok(block) if is_unused(&block) => (None, "nothing: it was never used".into()),
            Ok(block) => match Head::<ExtentRecord>::decode(&block, at)
                .and_then(|head| head.of_store(store.uuid()))
            {
                Ok(head) => {
                    let says = format!("{:?}", head.record.kind).to_lowercase();
                    (Some(head.record), says)
                }
                Err(damage) => (None, format!("not known: its record is damaged ({damage})")),
            },
            Err(why) => (None, format!("not known: of its record {why}")),
        };
        let kind = record.as_ref().map(|record| record.kind);
        more.push(("its extent holds", says));
        let (page, bit) = ((within / PAGE_BITS) as u32, within % PAGE_BITS);
        let address = g.bmap_page(extent, page);
        if record.is_some_and(|record| record.ready) {
            let block = self.read(address).await?;
            let bitmap = block.ok().and_then(|block| {
                BitmapPage::decode(&block, BitmapKind::Allocation, store.uuid(), address).ok()
            });
            let bit = match bitmap {
                Some(page) if page.get(bit) => "allocated",
                Some(_) => "free",
                None => "not known: the page is damaged, so it counts as allocated",
            };
            more.push(("its bit says", bit.into()));
        }
        // What cannot be walked is no reason not to show the block.
        let searched = match self.has(Gba(g.total_blocks() - 1)) {
            true => find(store, gba, kind, who, progress).await.map_err(|error| error.to_string()),
            false => Err("the store is larger than its device".into()),
        };
        let found = searched.unwrap_or_else(|why| {
            self.dump.notes.push(format!("who points at it is not known: {why}"));
            crate::pointing::Found { complete: true, ..Default::default() }
        });
        let pointed = found.pointing.first().map(|p| (p.role, p.pointer));
        if !found.complete {
            let words = "many nodes were read, and none that points at it found: --who searches all of them";
            self.dump.notes.push(words.into());
        } else if found.pointing.is_empty() && self.dump.notes.is_empty() {
            self.dump.notes.push("no disk and no snapshot points at it".into());
        }
        if found.damaged > 0 {
            let words = "heads or nodes are damaged; what is below them was not searched";
            self.dump.notes.push(format!("{} {words}", found.damaged));
        }
        let dumped = self.one(store, gba, pointed, kind).await?;
        dumped.described.fields.extend(more);
        dumped.pointed_at_by = found.pointing.iter().map(in_words).collect();
        Ok(())
    }
}

fn unreadable(mut described: Described, why: String) -> Described {
    described.holds = "what cannot be read".into();
    described.verdict = Verdict::Damaged { why };
    described
}

fn pair(first: Gba) -> [Gba; 2] {
    [first, first.plus(1)]
}

fn top_role(level: u8) -> Role {
    if level <= 1 { Role::SnapshotLeaf } else { Role::SnapshotNode(level) }
}

fn in_words(pointing: &Pointing) -> String {
    let Pointing { by, pointer, .. } = pointing;
    format!("{by} (birth {}, crc {:08x})", pointer.birth, pointer.crc)
}

/// A disk's slot and head, by name or UUID; also one that is being made or deleted.
async fn find_head(store: &Store, name_or_uuid: &str) -> Result<(u32, VdiHead)> {
    let uuid = Uuid::try_parse(name_or_uuid).ok();
    let registry: Vec<(u32, View<VdiHead>)> = store.scan_vdis().await?;
    for (slot, view) in registry {
        let Some(head) = view.record() else { continue };
        let by_name = || async {
            Ok::<_, StoreError>(store.read_name_block(head).await?.is_ok_and(|n| n == name_or_uuid))
        };
        if Some(head.uuid) == uuid || by_name().await? {
            return Ok((slot, head.clone()));
        }
    }
    Err(StoreError::new(
        StoreErrorKind::NotFound,
        format!("VDI '{name_or_uuid}'"),
        format!("{} has no such disk; 'ballast store info' lists them", store.url()),
    ))
}
