//! Helpers of this crate's tests: a store on a simulated device, and a model of a disk.

use crate::commit::{Batch, Change, Cut};
use crate::crc::crc32c;
use crate::device::sim::{SimDevice, SimOptions};
use crate::format::snapshot::{Snapshot, SnapshotLabel};
use crate::format::vdi::VdiHead;
use crate::snapshots::Page;
use crate::tree::Extents;
use crate::types::{BLOCK_SIZE, Lba, Lsn};
use crate::{AttachOptions, FormatOptions, OpenOptions, Store, Vdi};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

pub const HOST: Uuid = Uuid::from_u128(0xa11ce);
pub const LOG: Uuid = Uuid::from_u128(0x109);
pub const MIB: u64 = 1 << 20;

pub fn sim(capacity: u64, seed: u64) -> SimDevice {
    SimDevice::new(capacity, seed)
}

pub fn sim_without_caw(capacity: u64, seed: u64) -> SimDevice {
    let options = SimOptions { compare_and_write: false, ..SimOptions::new(capacity, seed) };
    SimDevice::with_options(options)
}

pub fn host(uuid: Uuid) -> OpenOptions {
    OpenOptions {
        host_uuid: uuid,
        host_name: format!("host-{:x}", uuid.as_u128()),
        ..Default::default()
    }
}

pub async fn format(sim: &SimDevice) {
    Store::format(sim.device(), FormatOptions::default()).await.expect("format");
}

pub async fn open(sim: &SimDevice) -> Arc<Store> {
    Store::open(sim.device(), host(HOST)).await.expect("open")
}

pub async fn attach(store: &Arc<Store>, name: &str) -> Arc<Vdi> {
    let info = store.lookup_vdi(name).await.expect("lookup");
    store.attach(info.uuid, AttachOptions { log_id: LOG }).await.expect("attach")
}

/// A fresh store with one attached disk "d".
pub async fn store_with_disk(sim: &SimDevice, size: u64) -> (Arc<Store>, Arc<Vdi>) {
    format(sim).await;
    let store = open(sim).await;
    store.create_vdi("d", size).await.expect("create");
    let vdi = attach(&store, "d").await;
    (store, vdi)
}

/// A block that says which block and which version it is.
pub fn stamp(lba: u64, version: u64) -> Bytes {
    let mut block = vec![0u8; BLOCK_SIZE];
    for (index, word) in block.chunks_exact_mut(8).enumerate() {
        let value = if index % 2 == 0 { lba } else { version };
        word.copy_from_slice(&(value ^ (index as u64) << 40).to_le_bytes());
    }
    Bytes::from(block)
}

pub fn write(lba: u64, version: u64) -> Change {
    let data = stamp(lba, version);
    Change::Write { lba: Lba(lba), crc: crc32c(&data), data }
}

pub fn zero(lba: u64, blocks: u64) -> Change {
    Change::Zero { lba: Lba(lba), blocks }
}

pub fn batch(lsn: u64, changes: Vec<Change>) -> Batch {
    Batch::new(Lsn(lsn), changes)
}

/// A batch of parts, each with the LSN at which it ends; a snapshot after each but the last.
pub fn cut_batch(mut parts: Vec<(u64, Vec<Change>)>) -> Batch {
    let (lsn, changes) = parts.pop().expect("a part");
    let cuts = parts.into_iter().map(|(lsn, changes)| Cut {
        changes,
        lsn: Lsn(lsn),
        time_ms: 1000 + lsn,
        label: SnapshotLabel::new(format!("at {lsn}")).expect("label"),
    });
    Batch { lsn: Lsn(lsn), cuts: cuts.collect(), changes }
}

/// All snapshots of a disk, oldest first.
pub async fn snapshots(store: &Store, name: &str) -> Vec<Snapshot> {
    let page = Page { newest_first: false, beyond: None, limit: usize::MAX };
    store.snapshots(name, page).await.expect("snapshots")
}

/// What a disk should hold: version by block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model(pub BTreeMap<u64, u64>);

impl Model {
    pub fn apply(&mut self, changes: &[Change], version: u64) {
        for change in changes {
            match change {
                Change::Write { lba, .. } => {
                    self.0.insert(lba.0, version);
                }
                Change::Zero { .. } => {
                    let (first, end) = (change.first(), change.end());
                    self.0.retain(|lba, _| !(first..end).contains(lba));
                }
            }
        }
    }

    /// Compares with an image read by `export_vdi`.
    pub async fn check(&self, store: &Store, name: &str) {
        let mut found = BTreeMap::new();
        store
            .export_vdi(name, &mut |offset, block| {
                let lba = offset / BLOCK_SIZE as u64;
                let version =
                    u64::from_le_bytes(block[8..16].try_into().expect("8 bytes")) ^ 1 << 40;
                assert_eq!(block, &stamp(lba, version)[..], "block {lba} holds garbage");
                found.insert(lba, version);
                Ok(())
            })
            .await
            .expect("export");
        assert_eq!(found, self.0);
    }

    /// Compares with a snapshot, read block by block.
    pub async fn check_snapshot(&self, store: &Store, disk: &VdiHead, snapshot: &Snapshot) {
        let reader = store.reader();
        let mut extents = Extents::of(&snapshot.as_head(disk));
        let mut found = BTreeMap::new();
        while let Some(leaf) = extents.next_leaf(&reader).await.expect("a node of a snapshot") {
            let pointers: Vec<_> = leaf.iter().map(|(_, pointer)| *pointer).collect();
            let blocks = reader.read_blocks(&pointers).await.expect("data of a snapshot");
            for ((lba, _), block) in leaf.iter().zip(blocks) {
                found.insert(
                    lba.0,
                    u64::from_le_bytes(block[8..16].try_into().expect("8")) ^ 1 << 40,
                );
            }
        }
        assert_eq!(found, self.0, "snapshot {}", snapshot.lsn);
    }

    /// Compares blocks read through the attached disk.
    pub async fn check_read(&self, vdi: &Vdi, lba: u64, blocks: u32) {
        let read = vdi.read(Lba(lba), blocks).await.expect("read");
        for (lba, block) in (lba..).zip(read) {
            let expected = self.0.get(&lba).map(|version| stamp(lba, *version));
            assert_eq!(block, expected, "block {lba}");
        }
    }
}

/// Walks every disk: each block is marked allocated in an extent of the right type, and none is used
/// twice. Returns the blocks in use.
pub async fn check_blocks(store: &Store) -> std::collections::BTreeSet<u64> {
    use crate::format::extent::ExtentType;
    use crate::format::vdi::VdiState;
    let g = store.superblock().geometry.clone();
    let extents = store.scan_extents().await.expect("catalogue");
    let mut bitmaps = BTreeMap::new();
    let mut used = std::collections::BTreeSet::new();
    for (_, view) in store.scan_vdis().await.expect("registry") {
        let Some(head) = view.record() else { panic!("damaged VDI record: {view:?}") };
        if !matches!(head.state, VdiState::Active | VdiState::Creating) {
            continue;
        }
        let mut blocks = vec![(head.meta, ExtentType::Metadata)];
        let mut trees = vec![(head.root, head.height, head.last_snapshot_birth)];
        let mut lists = vec![(head.snapshots.root, head.snapshots.height, 0)];
        while let Some((pointer, level, first)) = lists.pop() {
            if pointer.is_sparse() {
                continue;
            }
            blocks.push((pointer, ExtentType::Metadata));
            if level > 1 {
                let node = store.reader().read_nodes(&[pointer]).await.expect("node").remove(0);
                lists.extend(node.children().map(|(slot, p)| (p, level - 1, u64::from(slot))));
                continue;
            }
            let list = store.reader().snapshot_leaf(first, pointer).await.expect("snapshots");
            trees.extend(list.into_iter().map(|(_, s)| (s.root, s.height, s.birth)));
        }
        let mut shared = std::collections::BTreeSet::new();
        for (root, height, last_snapshot) in trees {
            let mut stack = vec![(root, height)];
            while let Some((pointer, level)) = stack.pop() {
                if pointer.is_sparse() {
                    continue;
                }
                // Snapshots, clones and what they were made from may share what is not a disk's own.
                if !pointer.is_exclusive(last_snapshot)
                    && (used.contains(&pointer.gba.0) || !shared.insert(pointer.gba.0))
                {
                    continue;
                }
                let kind = if level == 0 { ExtentType::Data } else { ExtentType::Metadata };
                blocks.push((pointer, kind));
                if level > 0 {
                    let node = store.reader().read_nodes(&[pointer]).await.expect("node").remove(0);
                    stack.extend(node.children().map(|(_, child)| (child, level - 1)));
                }
            }
        }
        for (pointer, kind) in blocks {
            let gba = pointer.gba;
            let extent = g.extent_of(gba);
            let record = extents[extent as usize].record().expect("an extent with a record");
            assert_eq!(record.kind, kind, "block {gba} lies in an extent of another type");
            if let std::collections::btree_map::Entry::Vacant(entry) = bitmaps.entry(extent) {
                entry.insert(store.read_bmap(extent).await.expect("BMap"));
            }
            let bit = gba.0 % g.extent_blocks;
            let page = &bitmaps[&extent][(bit / crate::format::bitmap::PAGE_BITS) as usize];
            let set = page.as_ref().map_or(true, |p| p.get(bit % crate::format::bitmap::PAGE_BITS));
            assert!(set, "block {gba} is reachable but free");
            assert!(used.insert(gba.0), "block {gba} is used twice");
        }
    }
    used
}
