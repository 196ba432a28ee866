//! A store on a simulated device with disks, snapshots and clones, and what each of them should hold.

use blockstore::buf::AlignedBuf;
use blockstore::crc::crc32c;
use blockstore::device::sim::SimDevice;
use blockstore::format::vdi::VdiHead;
use blockstore::snapshots::Page;
use blockstore::tree::Extents;
use blockstore::types::{Lba, Lsn};
use blockstore::{
    AttachOptions, Batch, Change, Cut, FormatOptions, OpenOptions, SnapshotLabel, Store,
    UnmapOptions, Vdi, WhenOffline,
};
use bytes::Bytes;
use gc::{CheckOptions, CollectOptions, Collected, Progress, Report, check, collect};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

pub const HOST: Uuid = Uuid::from_u128(1);
pub const MIB: u64 = 1 << 20;
/// Blocks that a random history uses of each disk.
const SPAN: u64 = 900;

/// Version by block; what is not here reads as zeros.
pub type Content = BTreeMap<u64, u64>;

pub fn host() -> OpenOptions {
    OpenOptions { host_uuid: HOST, host_name: "a".into(), ..Default::default() }
}

pub async fn open(sim: &SimDevice) -> Arc<Store> {
    Store::open(sim.device(), host()).await.expect("open")
}

/// As [`open`]; extents are given up only after the device was told of them.
pub async fn open_to_unmap(sim: &SimDevice) -> Arc<Store> {
    let options = OpenOptions { unmap: true, ..host() };
    Store::open(sim.device(), options).await.expect("open")
}

/// Tells the device of all free blocks that it was not told of, in runs of 16 KiB or more.
pub async fn unmap(store: &Store) -> blockstore::Result<blockstore::Unmapped> {
    store.unmap(UnmapOptions { rate: None, run_min: Some(4) }).await
}

/// A block that says what it is.
pub fn stamp(lba: u64, version: u64) -> Bytes {
    let mut block = [0u8; 4096];
    for (index, word) in block.chunks_exact_mut(16).enumerate() {
        word[..8].copy_from_slice(&(lba ^ (index as u64) << 40).to_le_bytes());
        word[8..].copy_from_slice(&version.to_le_bytes());
    }
    AlignedBuf::copy_of(&block).freeze()
}

pub fn write(lba: u64, version: u64) -> Change {
    let data = stamp(lba, version);
    Change::Write { lba: Lba(lba), crc: crc32c(&data), data }
}

pub fn apply(content: &mut Content, changes: &[Change], version: u64) {
    for change in changes {
        match change {
            Change::Write { lba, .. } => {
                content.insert(lba.0, version);
            }
            Change::Zero { .. } => {
                content.retain(|lba, _| !(change.first()..change.end()).contains(lba));
            }
        }
    }
}

/// A batch that ends at `lsn`, with a snapshot at its end.
pub fn with_snapshot(lsn: u64, changes: Vec<Change>) -> Batch {
    let label = SnapshotLabel::default();
    let cuts = vec![Cut { changes, lsn: Lsn(lsn), time_ms: lsn, label }];
    Batch { lsn: Lsn(lsn), cuts, changes: Vec::new() }
}

/// A disk and what it should hold.
#[derive(Debug)]
pub struct Disk {
    pub vdi: Arc<Vdi>,
    pub content: Content,
    pub snapshots: BTreeMap<u64, Content>,
    pub lsn: u64,
}

/// Disks by name.
pub struct World {
    pub sim: SimDevice,
    pub store: Arc<Store>,
    pub disks: BTreeMap<String, Disk>,
    pub rng: StdRng,
    /// The device is told of free blocks.
    pub unmaps: bool,
    version: u64,
    names: u64,
}

impl World {
    pub async fn new(seed: u64) -> Self {
        Self::on(SimDevice::new(48 * MIB, seed), seed, false).await
    }

    pub async fn on(sim: SimDevice, seed: u64, unmaps: bool) -> Self {
        Store::format(sim.device(), FormatOptions::default()).await.expect("format");
        let store = if unmaps { open_to_unmap(&sim).await } else { open(&sim).await };
        let (disks, rng) = (BTreeMap::new(), StdRng::seed_from_u64(seed));
        Self { sim, store, disks, rng, unmaps, version: 0, names: 0 }
    }

    pub async fn attach(store: &Arc<Store>, name: &str) -> Arc<Vdi> {
        let info = store.lookup_vdi(name).await.expect("lookup");
        store.attach(info.uuid, AttachOptions { log_id: info.uuid }).await.expect("attach")
    }

    pub async fn create(&mut self) -> String {
        self.names += 1;
        let name = format!("d{}", self.names);
        self.store.create_vdi(&name, 16 * MIB).await.expect("create");
        let vdi = Self::attach(&self.store, &name).await;
        let disk = Disk { vdi, content: Content::new(), snapshots: BTreeMap::new(), lsn: 0 };
        self.disks.insert(name.clone(), disk);
        name
    }

    /// A random disk.
    fn pick(&mut self) -> Option<String> {
        let index = self.rng.random_range(0..self.disks.len().max(1));
        self.disks.keys().nth(index).cloned()
    }

    fn changes(&mut self) -> Vec<Change> {
        self.version += 1;
        let first = self.rng.random_range(0..SPAN);
        let blocks = self.rng.random_range(1..40);
        match self.rng.random_range(0..8) {
            0 => vec![Change::Zero { lba: Lba(first), blocks: blocks * 6 }],
            1 => vec![Change::Zero { lba: Lba(0), blocks: 4096 }],
            2 => (0..blocks).map(|n| write(first + n * 67, self.version)).collect(),
            _ => (first..first + blocks).map(|lba| write(lba, self.version)).collect(),
        }
    }

    /// One commit of some disk, perhaps with snapshots in it.
    pub async fn commit(&mut self) {
        let Some(name) = self.pick() else { return };
        let mut cuts = Vec::new();
        let mut parts = Vec::new();
        for _ in 0..[0, 0, 1, 2][self.rng.random_range(0..4)] {
            parts.push((self.changes(), self.version));
        }
        let (last, version) = (self.changes(), self.version);
        let Some(disk) = self.disks.get_mut(&name) else { return };
        for (changes, version) in parts {
            disk.lsn += 1;
            apply(&mut disk.content, &changes, version);
            disk.snapshots.insert(disk.lsn, disk.content.clone());
            let (lsn, label) = (Lsn(disk.lsn), SnapshotLabel::default());
            cuts.push(Cut { changes, lsn, time_ms: 0, label });
        }
        disk.lsn += 1;
        apply(&mut disk.content, &last, version);
        let batch = Batch { lsn: Lsn(disk.lsn), cuts, changes: last };
        disk.vdi.commit(batch).await.expect("commit");
    }

    /// Makes a clone of some snapshot of some disk; the disk's name and the snapshot.
    async fn clone_some(&mut self) {
        let Some(source) = self.pick() else { return };
        let disk = &self.disks[&source];
        if self.disks.len() > 6 || disk.snapshots.is_empty() {
            return;
        }
        let index = self.rng.random_range(0..disk.snapshots.len());
        let Some((&lsn, content)) = self.disks[&source].snapshots.iter().nth(index) else { return };
        let content = content.clone();
        self.names += 1;
        let name = format!("d{}", self.names);
        self.store
            .clone_vdi(&name, &source, Lsn(lsn), WhenOffline::default())
            .await
            .expect("clone");
        let vdi = Self::attach(&self.store, &name).await;
        let disk = Disk { vdi, content, snapshots: BTreeMap::new(), lsn: 0 };
        self.disks.insert(name, disk);
    }

    /// Deletes some snapshots, unless a clone hangs on one of them.
    async fn delete_snapshots(&mut self) {
        let Some(name) = self.pick() else { return };
        let rng = &mut self.rng;
        let snapshots = self.disks[&name].snapshots.keys().copied();
        let gone: Vec<u64> = snapshots.filter(|_| rng.random_bool(0.5)).collect();
        let lsns = gone.iter().copied().map(Lsn).collect();
        if self.store.delete_snapshots(&name, lsns).await.is_ok()
            && let Some(disk) = self.disks.get_mut(&name)
        {
            disk.snapshots.retain(|lsn, _| !gone.contains(lsn));
        }
    }

    /// Deletes some disk with its snapshots, unless a clone hangs on one of them.
    async fn delete_disk(&mut self) {
        let Some(name) = self.pick() else { return };
        let Some(disk) = self.disks.remove(&name) else { return };
        disk.vdi.detach(Lsn(disk.lsn)).await.expect("detach");
        if self.store.delete_vdi_and_snapshots(&name).await.is_err() {
            let Disk { content, snapshots, lsn, .. } = disk;
            let vdi = Self::attach(&self.store, &name).await;
            self.disks.insert(name, Disk { vdi, content, snapshots, lsn });
        }
    }

    /// A few random steps.
    pub async fn steps(&mut self, count: u32) {
        for _ in 0..count {
            match self.rng.random_range(0..16) {
                0 => drop(self.create().await),
                1 | 2 => self.clone_some().await,
                3..=5 => self.delete_snapshots().await,
                6 => self.delete_disk().await,
                _ => self.commit().await,
            }
        }
    }

    /// Closes the store in an orderly way, or drops it as a crash of the process does, and opens it again.
    pub async fn reopen(&mut self, orderly: bool) {
        if orderly {
            self.store.reclaimed().await;
            self.store.close().await.expect("close");
        } else {
            self.sim.kill_host();
        }
        self.sim = self.sim.connect();
        self.store =
            if self.unmaps { open_to_unmap(&self.sim).await } else { open(&self.sim).await };
        for (name, disk) in &mut self.disks {
            disk.vdi = Self::attach(&self.store, name).await;
        }
    }

    /// Takes every disk away, those without clones first.
    pub async fn delete_all(&mut self) {
        while !self.disks.is_empty() {
            self.delete_disk().await;
        }
    }

    /// Everything is what it should be, and the store is sound.
    pub async fn verify(&self, when: &str) -> Report {
        let report = check(&self.store, CheckOptions { data: true }).await.expect("check");
        assert!(report.is_sound(), "{when}: {report:#?}");
        for (name, disk) in &self.disks {
            let head = head_of(&self.store, disk.vdi.uuid()).await;
            assert_eq!(read(&self.store, &head).await, disk.content, "{when}: {name}");
            let found = list(&self.store, name).await;
            let lsns: Vec<u64> = found.iter().map(|snapshot| snapshot.0).collect();
            let expected: Vec<u64> = disk.snapshots.keys().copied().collect();
            assert_eq!(lsns, expected, "{when}: snapshots of {name}");
            for (lsn, as_head) in found {
                let content = read(&self.store, &as_head(&head)).await;
                assert_eq!(content, disk.snapshots[&lsn], "{when}: {name}@{lsn}");
            }
        }
        report
    }
}

/// Lets the allocator's housekeeping come to its end, so that bitmaps and pool can be compared.
pub async fn settle() {
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
}

/// A cycle at full speed.
pub async fn cycle(store: &Arc<Store>) -> blockstore::Result<Collected> {
    cycle_in(store, gc::MEMORY_DEFAULT).await
}

/// A cycle at full speed with so many bytes of memory.
pub async fn cycle_in(store: &Arc<Store>, memory: u64) -> blockstore::Result<Collected> {
    let options = CollectOptions { memory, ..CollectOptions::default() };
    collect(store, options, &Progress::default()).await
}

pub async fn head_of(store: &Store, uuid: Uuid) -> VdiHead {
    let registry = store.scan_vdis().await.expect("registry");
    let mut heads = registry.iter().filter_map(|(_, view)| view.record());
    heads.find(|head| head.uuid == uuid).cloned().expect("a head")
}

type AsHead = Box<dyn Fn(&VdiHead) -> VdiHead>;

/// The snapshots of a disk, oldest first.
pub async fn list(store: &Store, name: &str) -> Vec<(u64, AsHead)> {
    let page = Page { newest_first: false, beyond: None, limit: usize::MAX };
    let found = store.snapshots(name, page).await.expect("snapshots");
    let entry = |snapshot: blockstore::format::snapshot::Snapshot| {
        let lsn = snapshot.lsn.0;
        (lsn, Box::new(move |disk: &VdiHead| snapshot.as_head(disk)) as AsHead)
    };
    found.into_iter().map(entry).collect()
}

/// What a tree holds; every block must be what it says.
pub async fn read(store: &Store, head: &VdiHead) -> Content {
    let (reader, mut extents) = (store.reader(), Extents::of(head));
    let mut content = Content::new();
    while let Some(leaf) = extents.next_leaf(&reader).await.expect("a leaf") {
        let pointers: Vec<_> = leaf.iter().map(|(_, pointer)| *pointer).collect();
        let blocks = reader.read_blocks(&pointers).await.expect("data");
        for ((lba, _), block) in leaf.iter().zip(blocks) {
            let version = u64::from_le_bytes(block[8..16].try_into().expect("8 bytes"));
            assert_eq!(block, stamp(lba.0, version), "block {lba}");
            content.insert(lba.0, version);
        }
    }
    content
}
