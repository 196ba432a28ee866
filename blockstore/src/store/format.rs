//! Formatting a device.
//!
//! Order: the old superblock is wiped first and the new one written last, so a crash in between
//! leaves a device without a store, never a mixture. Leftovers of an earlier store elsewhere carry its
//! UUID and are not taken for this one's; but its superblock's copy, which lies elsewhere if extents had another size, would be
//! should both of this one's rot, and is wiped.

use crate::device::Device;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::FORMAT_VERSION;
use crate::format::extent::ExtentRecord;
use crate::format::gc::GcRecord;
use crate::format::geometry::{EXTENT_COUNT_MIN, EXTENT_SIZE_MIN, Geometry};
use crate::format::head::{Head, MAGIC};
use crate::format::superblock::Superblock;
use crate::format::vdi::VDI_SIZE_MAX;
use crate::io::{Io, Patience, now_ms};
use crate::store::Store;
use crate::types::{BLOCK_SIZE, Gba};
use bytes::Bytes;
use std::time::Duration;
use uuid::Uuid;

/// Blocks looked at and zeroed at once.
const ZERO_BLOCKS: u64 = 256;
const PATIENCE: Duration = Duration::from_secs(30);

/// How to format.
#[derive(Clone, Debug, Default)]
pub struct FormatOptions {
    /// Bytes; a power of two from 1 MiB to 2 GiB. Default: such that there are at least 64.
    pub extent_size: Option<u64>,
    /// Bytes of the device to use. Default: all.
    pub size: Option<u64>,
    /// Identity of the store. Default: random.
    pub uuid: Option<Uuid>,
    /// Free text, at most 64 bytes are kept.
    pub label: String,
    /// Guard records by alternating slots even if the device has compare-and-write. A device without
    /// it is always formatted so.
    pub single_host: bool,
    /// Destroy what is on the device.
    pub force: bool,
}

/// Checks the size of a virtual disk.
///
/// # Errors
/// `Invalid`, with the nearest size that would do.
pub fn check_size(object: &str, size_bytes: u64) -> Result<()> {
    let block = BLOCK_SIZE as u64;
    let problem = if size_bytes == 0 {
        "a disk of 0 bytes is of no use; give a size, for example 4GiB".to_owned()
    } else if size_bytes > VDI_SIZE_MAX {
        format!("{size_bytes} bytes are more than the largest disk, 256 TiB")
    } else if !size_bytes.is_multiple_of(block) {
        let next = size_bytes.div_ceil(block) * block;
        format!("{size_bytes} bytes are not a multiple of {block}; the next size is {next}")
    } else {
        return Ok(());
    };
    Err(StoreError::new(StoreErrorKind::Invalid, object, problem))
}

impl Store {
    /// Makes an empty store on a device and returns its UUID.
    ///
    /// # Errors
    /// `Foreign` if the device holds a store or something else that is known, unless forced;
    /// `Invalid` for sizes that do not fit; the device's.
    pub async fn format(device: Device, options: FormatOptions) -> Result<Uuid> {
        let io = Io::new(device, Patience::Limited(PATIENCE));
        let capacity = io.device().info().capacity;
        let size = options.size.unwrap_or(capacity);
        let invalid = |problem| StoreError::new(StoreErrorKind::Invalid, io.url(), problem);
        if size > capacity {
            let problem = format!("the device has {capacity} bytes, {size} were asked for");
            return Err(invalid(problem));
        }
        if size < u64::from(EXTENT_COUNT_MIN) * EXTENT_SIZE_MIN {
            let least = u64::from(EXTENT_COUNT_MIN) * EXTENT_SIZE_MIN;
            let problem =
                format!("{size} bytes are too few for a store; at least {least} are needed");
            return Err(invalid(problem));
        }
        let extent_size = options.extent_size.unwrap_or(Geometry::default_extent_size(size));
        let geometry = Geometry::plan(size, extent_size).map_err(invalid)?;
        if !options.force {
            refuse_foreign(&io).await?;
        }
        let uuid = options.uuid.unwrap_or_else(Uuid::new_v4);
        let superblock = Superblock {
            format_version: FORMAT_VERSION,
            single_host: options.single_host || !io.device().info().compare_and_write,
            features_incompatible: 0,
            features_compatible: 0,
            created_ms: now_ms(),
            device_size: size,
            geometry,
            label: options.label,
        };
        write_store(&io, uuid, superblock).await?;
        Ok(uuid)
    }
}

async fn write_store(io: &Io, store: Uuid, superblock: Superblock) -> Result<()> {
    let g = superblock.geometry.clone();
    let [first, second] = g.superblocks();
    let zero = Bytes::from_static(&[0; BLOCK_SIZE]);
    io.write_durable(&[(first, vec![zero.clone()]), (second, vec![zero.clone()])]).await?;
    for place in Geometry::copy_places(superblock.device_size) {
        if io.read(place, 1).await?.starts_with(&MAGIC) {
            io.write(place, vec![zero.clone()]).await?;
        }
    }
    zero_tables(io, &g).await?;
    let block = |bytes: [u8; BLOCK_SIZE]| vec![Bytes::copy_from_slice(&bytes)];
    let gc = Head { store, sequence: 1, record: GcRecord::initial() };
    // Sequence 1 belongs in the second slot of a pair when slots alternate, in the first otherwise.
    let gc_place = Gba(g.gc_start + u64::from(superblock.single_host));
    let system = Head { store, sequence: 1, record: ExtentRecord::system() };
    let head = Head { store, sequence: 1, record: superblock };
    io.write_durable(&[
        (gc_place, block(gc.encode_block(gc_place))),
        (g.extent_slot(0), block(system.encode_block(g.extent_slot(0)))),
        (second, block(head.encode_block(second))),
    ])
    .await?;
    io.write_durable(&[(first, block(head.encode_block(first)))]).await
}

/// Zeroes the tables, without writing where zeros are read: a sparse device stays sparse.
async fn zero_tables(io: &Io, g: &Geometry) -> Result<()> {
    let end = g.extent_start + u64::from(g.extent_count);
    let zeros = Bytes::from_static(&[0; BLOCK_SIZE]);
    let mut start = g.gc_start;
    while start < end {
        let blocks = ZERO_BLOCKS.min(end - start);
        let content = io.read(Gba(start), blocks).await?;
        if content.iter().any(|&b| b != 0) {
            io.write(Gba(start), vec![zeros.clone(); blocks as usize]).await?;
        }
        start += blocks;
    }
    Ok(())
}

async fn refuse_foreign(io: &Io) -> Result<()> {
    let blocks = (io.device().info().capacity / BLOCK_SIZE as u64).min(32);
    let start = io.read(Gba(0), blocks).await?;
    let Some(what) = foreign_signature(&start) else { return Ok(()) };
    Err(StoreError::new(
        StoreErrorKind::Foreign,
        io.url(),
        format!(
            "the device holds {what}; formatting would destroy it: give --force if it may be lost"
        ),
    ))
}

/// What the first bytes of a device show to be there, if it is something known.
#[must_use]
pub fn foreign_signature(start: &[u8]) -> Option<&'static str> {
    const SIGNATURES: [(usize, &[u8], &str); 24] = [
        (0, &MAGIC, "a Ballast store"),
        (0, b"XFSB", "an XFS file system"),
        (0, b"LUKS\xba\xbe", "a LUKS encrypted volume"),
        (0, b"QFI\xfb", "a qcow2 image"),
        (0, b"KDMV", "a VMDK image"),
        (0, b"conectix", "a VHD image"),
        (0, b"vhdxfile", "a VHDX image"),
        (3, b"NTFS    ", "an NTFS file system"),
        (3, b"EXFAT   ", "an exFAT file system"),
        (54, b"FAT", "a FAT file system"),
        (82, b"FAT32", "a FAT32 file system"),
        (0x218, b"LVM2 001", "an LVM physical volume"),
        (0x18, b"LVM2 001", "an LVM physical volume"),
        (0x200, b"EFI PART", "a GPT partition table"),
        (0x1000, b"EFI PART", "a GPT partition table"),
        (0x438, &[0x53, 0xef], "an ext2, ext3 or ext4 file system"),
        (0x400, &[0x10, 0x20, 0xf5, 0xf2], "an F2FS file system"),
        (0xff6, b"SWAPSPACE2", "a swap area"),
        (0xff6, b"SWAP-SPACE", "a swap area"),
        (0x1000, &[0xfc, 0x4e, 0x2b, 0xa9], "a member of an md array"),
        (0x8001, b"CD001", "an ISO 9660 file system"),
        (0x10040, b"_BHRfS_M", "a Btrfs file system"),
        (0x1018, &[0xc6, 0x85, 0x73, 0xf6, 0x4e, 0x1a, 0x45, 0xca], "a bcache or bcachefs device"),
        (0x1fe, &[0x55, 0xaa], "a partition table or boot sector"),
    ];
    let found = SIGNATURES.iter().find(|(offset, magic, _)| {
        start.get(*offset..*offset + magic.len()).is_some_and(|bytes| bytes == *magic)
    });
    found.map(|(_, _, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_content_is_recognised() {
        let mut start = vec![0; 131_072];
        assert_eq!(foreign_signature(&start), None);
        start[0x438..0x43a].copy_from_slice(&[0x53, 0xef]);
        assert!(foreign_signature(&start).is_some_and(|s| s.contains("ext4")));
        assert_eq!(foreign_signature(&[0; 10]), None);
        assert_eq!(foreign_signature(b"XFSB"), Some("an XFS file system"));
    }

    #[test]
    fn sizes_of_disks_are_checked_with_advice() {
        for good in [4096, 16 << 20, 256 << 40] {
            assert!(check_size("x", good).is_ok());
        }
        for (bad, word) in
            [(0, "0 bytes"), (10_000_000, "10002432"), ((256 << 40) + 4096, "256 TiB")]
        {
            let error = check_size("x", bad).expect_err("bad size");
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
