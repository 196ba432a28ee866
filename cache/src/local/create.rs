//! Making a cache: every byte of every leg is written once, superblocks last.

use super::{Leg, Local};
use crate::error::CacheError;
use crate::format::geometry::CACHE_SIZE_MIN;
use crate::format::superblock::Superblock;
use crate::format::{Geometry, Membership};
use blockstore::buf::{AlignedBuf, is_zero};
use blockstore::device::file::FileDevice;
use blockstore::device::{Device, OpenOptions};
use blockstore::types::BLOCK_SIZE;
use futures_util::StreamExt;
use futures_util::future::try_join_all;
use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Bytes written at a time when a new cache is filled.
const FILL_CHUNK: usize = 4 << 20;
/// Stands at the start of a cache while it is created: it may be created anew.
const UNMADE: &[u8] = b"BLSTNEW cache being created";
/// Stands at the start of a new leg while it is filled: it may be filled anew, but no cache is created there.
const FILLING: &[u8] = b"BLSTFIL leg being filled";
/// How much of a block device must be blank to become a cache.
const BLANK_LEN: u64 = 1 << 20;

impl Local {
    /// Writes every byte of a new cache once, so that later writes change no file system metadata, superblocks last: a
    /// creation that is cut short leaves files that say so at their start and are created anew.
    pub(super) async fn create(paths: &[PathBuf], size: u64) -> Result<Self, CacheError> {
        let size = size / BLOCK_SIZE as u64 * BLOCK_SIZE as u64;
        let path = paths.first().cloned().unwrap_or_default();
        if size < CACHE_SIZE_MIN {
            return Err(CacheError::TooSmall { path, size, least: CACHE_SIZE_MIN });
        }
        let absent: Vec<&PathBuf> = paths.iter().filter(|path| !path.exists()).collect();
        let made = Self::create_legs(paths, size).await;
        if made.is_err() {
            for path in absent {
                // Nothing was ever stored in it: leave no half-made file behind.
                let _ = std::fs::remove_file(path);
            }
        }
        made
    }

    async fn create_legs(paths: &[PathBuf], size: u64) -> Result<Self, CacheError> {
        let mut devices: Vec<(PathBuf, Device)> = Vec::new();
        for path in paths {
            let options = OpenOptions {
                exclusive: true,
                create_size: (!path.exists()).then_some(size),
                ..OpenOptions::default()
            };
            devices.push((path.clone(), FileDevice::open(path, &options)?));
        }
        refuse_smaller(&devices)?;
        try_join_all(devices.iter().map(|(path, device)| fill(path, device))).await?;
        Self::make_legs(devices).await
    }

    /// Makes a cache of the whole of `device`, which is blank but for the mark of an unfinished creation.
    pub async fn make_on(path: &Path, device: Device) -> Result<Self, CacheError> {
        Self::make_legs(vec![(path.into(), device)]).await
    }

    /// Makes a cache of one or two devices of one size, as [`Self::make_on`] does.
    pub async fn make_legs(devices: Vec<(PathBuf, Device)>) -> Result<Self, CacheError> {
        refuse_smaller(&devices)?;
        let (path, size) = devices
            .first()
            .map(|(path, device)| (path.clone(), device.info().capacity))
            .unwrap_or_default();
        let too_small = || CacheError::TooSmall { path, size, least: CACHE_SIZE_MIN };
        let uuids: Vec<Uuid> = devices.iter().map(|_| Uuid::new_v4()).collect();
        let superblock = Superblock {
            sequence: 0,
            cache: Uuid::new_v4(),
            host: Uuid::new_v4(),
            machine: None,
            store: None,
            leg: uuids.first().copied().unwrap_or_default(),
            membership: Membership::new(uuids),
            geometry: Geometry::for_size(size).ok_or_else(too_small)?,
        };
        let legs = (0..).zip(devices);
        let legs = legs.map(|(number, (path, device))| Leg { number, path, device }).collect();
        let local = Self::with(superblock, legs, Vec::new(), false);
        for _ in 0..2 {
            local.rewrite_superblock(|_| ()).await?;
        }
        Ok(local)
    }
}

/// Legs must be of one size: what does not fit on the smaller one could not be mirrored.
fn refuse_smaller(devices: &[(PathBuf, Device)]) -> Result<(), CacheError> {
    let capacity = |(_, device): &&(PathBuf, Device)| device.info().capacity;
    let (Some(small), Some(large)) =
        (devices.iter().min_by_key(capacity), devices.iter().max_by_key(capacity))
    else {
        return Ok(());
    };
    let (found, expected) = (capacity(&small), capacity(&large));
    if found == expected {
        return Ok(());
    }
    let (path, twin) = (small.0.clone(), large.0.clone());
    Err(CacheError::SmallerLeg { path, found, twin, expected })
}

/// Marks a leg as being made, then writes all of it but the mark's block.
async fn fill(path: &Path, device: &Device) -> Result<(), CacheError> {
    let size = device.info().capacity;
    tracing::info!(path = %path.display(), bytes = size, "creating the cache: writing it once from end to end");
    mark_unmade(device).await?;
    let chunk = AlignedBuf::zeroed(FILL_CHUNK).freeze();
    // The mark stands until the second superblock takes its place.
    let chunks = (BLOCK_SIZE as u64..size).step_by(FILL_CHUNK);
    let filled: Vec<_> = futures_util::stream::iter(chunks)
        .map(|offset| {
            let part = chunk.slice(..FILL_CHUNK.min((size - offset) as usize));
            async move { device.write(offset, vec![part]).await }
        })
        .buffered(4)
        .collect()
        .await;
    if let Some(error) = filled.into_iter().find_map(Result::err) {
        return Err(error.into());
    }
    device.flush().await?;
    Ok(())
}

/// Makes sure that what is on `device` counts as nothing until its superblocks are written.
async fn mark_unmade(device: &Device) -> Result<(), CacheError> {
    mark(device, UNMADE).await
}

/// As [`mark_unmade`], for a leg that is filled from another.
pub(super) async fn mark_filling(device: &Device) -> Result<(), CacheError> {
    mark(device, FILLING).await
}

async fn mark(device: &Device, text: &[u8]) -> Result<(), CacheError> {
    let mut mark = AlignedBuf::zeroed(2 * BLOCK_SIZE);
    mark[..text.len()].copy_from_slice(text);
    device.write(0, vec![mark.freeze()]).await?;
    Ok(device.flush().await?)
}

/// True for the first bytes of a leg whose making, or filling, was cut short.
pub(super) fn says_unfinished(start: &[u8]) -> bool {
    start.starts_with(UNMADE) || start.starts_with(FILLING)
}

/// True for a path at which a cache may be made: nothing is there, or a file whose creation was cut short, or a block
/// device whose start holds nothing. Other files are never overwritten.
pub(super) fn is_unmade(path: &Path) -> Result<bool, CacheError> {
    starts(path, |start| start.starts_with(UNMADE))
}

/// True for a path at which a leg may be filled: as [`is_unmade`], or one whose filling was cut short.
pub(super) fn may_be_filled(path: &Path) -> Result<bool, CacheError> {
    starts(path, says_unfinished)
}

/// Whether what is at `path` starts as it should, is not there, or is a blank device.
fn starts(path: &Path, well: impl Fn(&[u8]) -> bool) -> Result<bool, CacheError> {
    use std::io::Read;
    if !path.exists() {
        return Ok(true);
    }
    let local = |source| CacheError::Local { path: path.into(), what: "read", source };
    let mut start = Vec::new();
    let file = File::open(path).map_err(local)?;
    let is_device = file.metadata().map_err(local)?.file_type().is_block_device();
    file.take(BLANK_LEN).read_to_end(&mut start).map_err(local)?;
    Ok(well(&start) || (is_device && is_zero(&start)))
}
