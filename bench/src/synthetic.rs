//! Stores with real metadata and no data: trees, lists of snapshots and bitmaps as commits write them, while the blocks of the
//! disks stay holes of a sparse file. So a store of a terabyte in use takes some gigabytes of a real file system.
//!
//! All data is one block of zeros. [`Hollow`] lies between the store and its file and drops whatever consists of that very
//! block; everything else goes through. Whoever opens the file as an ordinary store afterwards reads zeros with the right
//! checksum.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use anyhow::{Context, Result};
use async_trait::async_trait;
use blockstore::buf::AlignedBuf;
use blockstore::device::{BlockDevice, CawOutcome, Device, DeviceError, DeviceInfo, OpenOptions};
use blockstore::types::{Lba, Lsn};
use blockstore::{AttachOptions, Batch, Change, Cut, FormatOptions, SnapshotLabel, Store, Vdi};
use bytes::Bytes;
use uuid::Uuid;

use crate::load::Random;

/// Bytes of a block of the store.
const BLOCK: u64 = 4096;
/// Blocks per commit while disks are filled.
const FILL_BLOCKS: u64 = 1 << 18;
/// Snapshots per commit.
const CUTS: u32 = 256;
/// Random blocks that are overwritten before each snapshot, unless something else is said.
pub const WRITES_PER_SNAPSHOT: u64 = 16;

/// All data there is; recognised by its address. On the heap, since a compiler may merge equal constants.
static HOLE: LazyLock<&[u8]> = LazyLock::new(|| vec![0; BLOCK as usize].leak());
static HOLE_CRC: LazyLock<u32> = LazyLock::new(|| blockstore::crc::crc32c(*HOLE));
/// What is written where data is wanted.
static NOISE: LazyLock<&[u8]> = LazyLock::new(|| {
    let mut block = AlignedBuf::zeroed(BLOCK as usize);
    Random(7).fill(&mut block);
    Box::leak(Box::new(block))
});
static NOISE_CRC: LazyLock<u32> = LazyLock::new(|| blockstore::crc::crc32c(*NOISE));

/// What a synthetic store holds.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Bytes that are written of all disks together, from the start of each on.
    pub used_bytes: u64,
    /// Bytes of each disk, if that is more than its part of those.
    pub disk_bytes: u64,
    /// Room for more, in bytes.
    pub room_bytes: u64,
    /// Disks of equal size.
    pub disks: u32,
    /// Snapshots of all disks together.
    pub snapshots: u32,
    /// Random blocks that are overwritten before each snapshot.
    pub writes_per_snapshot: u64,
    /// What is written.
    pub content: Content,
}

/// What disks of a synthetic store are full of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Nothing: zeros that take no room.
    Holes,
    /// Noise, the same in every block, which is really written.
    Noise,
}

impl Default for Shape {
    /// An empty disk.
    fn default() -> Self {
        Self {
            used_bytes: BLOCK,
            disk_bytes: 0,
            room_bytes: 0,
            disks: 1,
            snapshots: 0,
            writes_per_snapshot: WRITES_PER_SNAPSHOT,
            content: Content::Holes,
        }
    }
}

impl Shape {
    /// Bytes of a store with room for it, and a quarter of it free.
    #[must_use]
    pub fn store_bytes(&self) -> u64 {
        // Per snapshot its data, and some nodes for each block.
        let snapshots = u64::from(self.snapshots) * (self.writes_per_snapshot * 5 + 1) * BLOCK;
        let bytes = self.used_bytes + self.used_bytes / 64 + snapshots + self.room_bytes;
        (bytes + bytes / 4 + (2 << 30)).next_multiple_of(1 << 20)
    }

    /// Blocks that are written of each disk.
    fn blocks(&self) -> u64 {
        (self.used_bytes / u64::from(self.disks)).div_ceil(BLOCK).max(1)
    }
}

/// Name of a disk of a synthetic store.
#[must_use]
pub fn disk_name(number: u32) -> String {
    format!("d{number}")
}

/// Fills a formatted store in a sparse file, as host `host`, whose the extents are then. The disks are detached.
///
/// # Errors
/// When the store fails.
pub async fn build(path: &Path, shape: &Shape, host: Uuid) -> Result<()> {
    let inner = blockstore::device::open(&url(path), &OpenOptions::default()).await?;
    let options = blockstore::OpenOptions {
        host_uuid: host,
        host_name: "bench".into(),
        ..Default::default()
    };
    let store = Store::open(Arc::new(Hollow { inner }), options).await?;
    let disk_bytes = shape.disk_bytes.max(shape.blocks() * BLOCK);
    for number in 0..shape.disks {
        let first = u64::from(number) * u64::from(shape.snapshots) / u64::from(shape.disks);
        let end = u64::from(number + 1) * u64::from(shape.snapshots) / u64::from(shape.disks);
        let info = store.create_vdi(&disk_name(number), disk_bytes).await?;
        let log_id = Uuid::new_v4();
        let vdi = store.attach(info.uuid, AttachOptions { log_id }).await?;
        let lsn = fill(&vdi, shape.blocks(), shape.content).await?;
        let lsn = snapshots(&vdi, lsn, (end - first) as u32, shape).await?;
        vdi.detach(lsn).await?;
    }
    store.reclaimed().await;
    store.close().await?;
    Ok(())
}

/// Makes a sparse file for [`build`], and an empty store in it.
///
/// # Errors
/// When the file cannot be made or the store not be formatted.
pub async fn format(path: &Path, shape: &Shape) -> Result<()> {
    File::create(path)
        .and_then(|file| file.set_len(shape.store_bytes()))
        .with_context(|| format!("make the sparse file {}", path.display()))?;
    let device = blockstore::device::open(&url(path), &OpenOptions::default()).await?;
    Store::format(device, FormatOptions::default()).await?;
    Ok(())
}

fn url(path: &Path) -> String {
    format!("file:{}", path.display())
}

/// Writes the first `blocks` of a disk; the LSN that it is at then.
async fn fill(vdi: &Vdi, blocks: u64, content: Content) -> Result<Lsn> {
    let mut lsn = Lsn(0);
    for first in (0..blocks).step_by(FILL_BLOCKS as usize) {
        lsn = Lsn(lsn.0 + 1);
        let changes =
            (first..blocks.min(first + FILL_BLOCKS)).map(|lba| content.write(lba)).collect();
        vdi.commit(Batch::new(lsn, changes)).await?;
    }
    Ok(lsn)
}

/// Takes `count` snapshots after `lsn`, each after some random writes; the LSN that the disk is at then.
async fn snapshots(vdi: &Vdi, mut lsn: Lsn, count: u32, shape: &Shape) -> Result<Lsn> {
    let (mut random, blocks) = (Random(0x5eed_0001 ^ lsn.0), shape.blocks());
    for first in (0..count).step_by(CUTS as usize) {
        let mut cuts = Vec::new();
        for _ in first..count.min(first + CUTS) {
            lsn = Lsn(lsn.0 + shape.writes_per_snapshot + 1);
            let mut places: Vec<u64> =
                (0..shape.writes_per_snapshot).map(|_| random.below(blocks)).collect();
            places.sort_unstable();
            places.dedup();
            let changes = places.into_iter().map(|lba| shape.content.write(lba)).collect();
            let label = SnapshotLabel::default();
            cuts.push(Cut { changes, lsn, time_ms: blockstore::io::now_ms(), label });
        }
        vdi.commit(Batch { lsn, cuts, changes: Vec::new() }).await?;
    }
    Ok(lsn)
}

impl Content {
    fn write(self, lba: u64) -> Change {
        let (data, crc) = match self {
            Self::Holes => (*HOLE, *HOLE_CRC),
            Self::Noise => (*NOISE, *NOISE_CRC),
        };
        Change::Write { lba: Lba(lba), crc, data: Bytes::from_static(data) }
    }
}

/// A device that drops what consists of [`HOLE`] alone.
#[derive(Debug)]
struct Hollow {
    inner: Device,
}

#[async_trait]
impl BlockDevice for Hollow {
    fn info(&self) -> &DeviceInfo {
        self.inner.info()
    }

    async fn read(&self, offset: u64, len: usize) -> Result<AlignedBuf, DeviceError> {
        self.inner.read(offset, len).await
    }

    async fn write(&self, offset: u64, data: Vec<Bytes>) -> Result<(), DeviceError> {
        let is_hole = |piece: &Bytes| std::ptr::eq(piece.as_ptr(), HOLE.as_ptr());
        if !data.is_empty() && data.iter().all(is_hole) {
            return Ok(());
        }
        self.inner.write(offset, data).await
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        self.inner.flush().await
    }

    async fn compare_and_write(
        &self,
        offset: u64,
        expected: Bytes,
        new: Bytes,
    ) -> Result<CawOutcome, DeviceError> {
        self.inner.compare_and_write(offset, expected, new).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        self.inner.discard(offset, len).await
    }

    fn epoch(&self) -> u64 {
        self.inner.epoch()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    /// What is built is a sound store with the snapshots asked for, reads as zeros, and takes no room for data.
    #[tokio::test]
    async fn a_synthetic_store_is_a_store() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.img");
        let shape = Shape { used_bytes: 256 << 20, disks: 2, snapshots: 5, ..Shape::default() };
        format(&path, &shape).await.unwrap();
        build(&path, &shape, Uuid::new_v4()).await.unwrap();
        let on_disk = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!(on_disk < shape.used_bytes / 4, "{on_disk} bytes");

        let device = blockstore::device::open(&url(&path), &OpenOptions::default()).await.unwrap();
        let store = Store::open(device, blockstore::OpenOptions::read_only()).await.unwrap();
        let report = gc::check(&store, gc::CheckOptions { data: true }).await.unwrap();
        assert!(report.is_sound(), "{report:?}");
        assert_eq!((report.vdis, report.snapshots), (2, 5));
        assert!(report.data_blocks_checked >= shape.used_bytes / BLOCK);
        store.close().await.unwrap();
    }
}
