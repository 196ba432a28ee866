//! The cache device as the asynchronous side sees it: superblock, slots, segments.
//!
//! The worker writes records through file handles of its own; here is everything else.

use crate::disk::plan::SegmentId;
use crate::error::CacheError;
use crate::format::segment::SegmentHeader;
use crate::format::slot::VdiSlot;
use crate::format::superblock::Superblock;
use crate::format::{FormatError, Geometry, geometry::CACHE_SIZE_MIN};
use blockstore::buf::AlignedBuf;
use blockstore::device::file::FileDevice;
use blockstore::device::{Device, DeviceErrorKind, OpenOptions};
use blockstore::types::BLOCK_SIZE;
use futures_util::StreamExt;
use std::fs::File;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// Bytes written at a time when a new cache is filled.
const FILL_CHUNK: usize = 4 << 20;
/// Stands at the start of a cache while it is created.
const UNMADE: &[u8] = b"BLSTNEW cache being created";
/// How much of a block device must be blank to become a cache.
const BLANK_LEN: u64 = 1 << 20;
/// Segment headers read at once.
const HEADERS_AT_ONCE: usize = 32;

/// See the module.
#[derive(Debug)]
pub struct Local {
    /// For messages.
    pub path: PathBuf,
    /// Division of the device.
    pub geometry: Geometry,
    cache: Uuid,
    device: Device,
    superblock: tokio::sync::Mutex<Superblock>,
}

/// How to open a cache device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// For serving: exclusive; created with so many bytes if the file does not exist.
    Serve { create_size: Option<u64> },
    /// For looking only.
    ReadOnly,
}

impl Local {
    /// Opens the cache at `path`, or creates it where `mode` says so.
    pub async fn open(path: &Path, mode: Mode) -> Result<Self, CacheError> {
        let create = match mode {
            Mode::Serve { create_size } => create_size,
            Mode::ReadOnly => None,
        };
        let exists = path.exists();
        let is_new = !exists || (create.is_some() && is_unmade(path)?);
        if is_new {
            let Some(size) = create else { return Err(CacheError::Missing { path: path.into() }) };
            return Self::create(path, size / BLOCK_SIZE as u64 * BLOCK_SIZE as u64, exists).await;
        }
        let options = OpenOptions {
            exclusive: matches!(mode, Mode::Serve { .. }),
            read_only: mode == Mode::ReadOnly,
            ..OpenOptions::default()
        };
        let device = FileDevice::open(path, &options)?;
        Self::on_device(path, device).await
    }

    /// Writes every byte of a new cache once, so that later writes change no file system metadata, superblock last: a
    /// creation that is cut short leaves a file that says so at its start and is created anew.
    async fn create(path: &Path, size: u64, exists: bool) -> Result<Self, CacheError> {
        let too_small = || CacheError::TooSmall { path: path.into(), size, least: CACHE_SIZE_MIN };
        let options = OpenOptions {
            exclusive: true,
            create_size: (!exists).then_some(size),
            ..OpenOptions::default()
        };
        if size < CACHE_SIZE_MIN {
            return Err(too_small());
        }
        let device = FileDevice::open(path, &options)?;
        let size = device.info().capacity;
        tracing::info!(path = %path.display(), bytes = size, "creating the cache: writing it once from end to end");
        let mut mark = AlignedBuf::zeroed(BLOCK_SIZE);
        mark[..UNMADE.len()].copy_from_slice(UNMADE);
        device.write(0, vec![mark.freeze()]).await?;
        let chunk = AlignedBuf::zeroed(FILL_CHUNK).freeze();
        // The mark stands until the second superblock takes its place.
        let chunks = (BLOCK_SIZE as u64..size).step_by(FILL_CHUNK);
        let filled: Vec<_> = futures_util::stream::iter(chunks)
            .map(|offset| {
                let part = chunk.slice(..FILL_CHUNK.min((size - offset) as usize));
                let device = &device;
                async move { device.write(offset, vec![part]).await }
            })
            .buffered(4)
            .collect()
            .await;
        if let Some(error) = filled.into_iter().find_map(Result::err) {
            if !exists {
                // Nothing was ever stored in it: leave no half-made file behind.
                let _ = std::fs::remove_file(path);
            }
            return Err(error.into());
        }
        device.flush().await?;
        Self::make_on(path, device).await
    }

    /// Makes a cache of the whole of `device`, which is blank but for the mark of an unfinished creation.
    pub async fn make_on(path: &Path, device: Device) -> Result<Self, CacheError> {
        let size = device.info().capacity;
        let too_small = || CacheError::TooSmall { path: path.into(), size, least: CACHE_SIZE_MIN };
        let superblock = Superblock {
            sequence: 0,
            cache: Uuid::new_v4(),
            host: Uuid::new_v4(),
            store: None,
            leg: Uuid::new_v4(),
            legs: 1,
            geometry: Geometry::for_size(size).ok_or_else(too_small)?,
        };
        let local = Self::with(path, device, superblock);
        for _ in 0..2 {
            local.rewrite_superblock(|_| ()).await?;
        }
        Ok(local)
    }

    /// The cache on `device`.
    pub async fn on_device(path: &Path, device: Device) -> Result<Self, CacheError> {
        let superblock = read_superblock(&device, path).await?;
        let (expected, found) = (superblock.geometry.size, device.info().capacity);
        if found < expected {
            return Err(CacheError::Truncated { path: path.into(), expected, found });
        }
        Ok(Self::with(path, device, superblock))
    }

    fn with(path: &Path, device: Device, superblock: Superblock) -> Self {
        Self {
            path: path.into(),
            geometry: superblock.geometry,
            cache: superblock.cache,
            device,
            superblock: tokio::sync::Mutex::new(superblock),
        }
    }

    /// The cache's identity.
    #[must_use]
    pub fn cache_uuid(&self) -> Uuid {
        self.cache
    }

    /// A copy of the superblock.
    pub async fn superblock(&self) -> Superblock {
        self.superblock.lock().await.clone()
    }

    /// Changes the superblock durably.
    pub async fn rewrite_superblock(
        &self,
        change: impl FnOnce(&mut Superblock),
    ) -> Result<(), CacheError> {
        let mut superblock = self.superblock.lock().await;
        let mut next = superblock.clone();
        change(&mut next);
        next.sequence += 1;
        let offset = Geometry::superblock_offset(next.sequence);
        self.write(offset, AlignedBuf::copy_of(&next.encode())).await?;
        self.flush().await?;
        *superblock = next;
        Ok(())
    }

    /// All slots; those never written are free. A slot of which both copies are damaged is an error, since a
    /// disk's log hangs on it.
    pub async fn read_slots(&self) -> Result<Vec<VdiSlot>, CacheError> {
        let slots = self.geometry.slots;
        let first = Geometry::slot_offset(0, 0);
        let bytes = self.read(first, (Geometry::slot_offset(slots, 0) - first) as usize).await?;
        let copies: Vec<&[u8]> = bytes.chunks_exact(BLOCK_SIZE).collect();
        (0..slots).map(|slot| {
            let at = slot as usize * 2;
            newest(slot, [copies[at], copies[at + 1]]).map_err(|source| CacheError::Unsupported {
                path: self.path.clone(),
                what: format!("slot {slot}: {source}; the disk whose log it holds cannot be told: restore the device from a good copy"),
            })
        }).collect()
    }

    /// Writes a slot durably to the copy that its sequence selects.
    pub async fn write_slot(&self, slot: &VdiSlot) -> Result<(), CacheError> {
        let offset = Geometry::slot_offset(slot.slot, slot.sequence);
        self.write(offset, AlignedBuf::copy_of(&slot.encode())).await?;
        self.flush().await
    }

    /// The headers of all segments that have one.
    pub async fn read_headers(&self) -> Result<Vec<SegmentHeader>, CacheError> {
        let cache = self.cache;
        let mut found = Vec::new();
        let mut headers = futures_util::stream::iter(0..self.geometry.segments)
            .map(|id| async move {
                let id = SegmentId(id);
                (id, self.read(self.geometry.segment_offset(id), BLOCK_SIZE).await)
            })
            .buffered(HEADERS_AT_ONCE);
        while let Some((id, block)) = headers.next().await {
            // A header that does not decode leaves a gap in its disk's LSNs, which recovery judges.
            found.extend(SegmentHeader::decode(&block?, cache, id).ok());
        }
        Ok(found)
    }

    /// Reads bytes of the device.
    pub async fn read(&self, offset: u64, len: usize) -> Result<AlignedBuf, CacheError> {
        Ok(self.device.read(offset, len).await?)
    }

    /// Writes bytes of the device.
    pub async fn write(&self, offset: u64, bytes: AlignedBuf) -> Result<(), CacheError> {
        Ok(self.device.write(offset, vec![bytes.freeze()]).await?)
    }

    /// Makes finished writes durable.
    pub async fn flush(&self) -> Result<(), CacheError> {
        Ok(self.device.flush().await?)
    }

    /// A file handle for a worker: O_DIRECT where the file system has it.
    pub fn worker_file(&self) -> Result<Arc<File>, CacheError> {
        let open = |flags| {
            File::options()
                .read(true)
                .write(true)
                .custom_flags(flags | libc::O_CLOEXEC)
                .open(&self.path)
        };
        open(libc::O_DIRECT)
            .or_else(
                |error| {
                    if error.raw_os_error() == Some(libc::EINVAL) { open(0) } else { Err(error) }
                },
            )
            .map(Arc::new)
            .map_err(|source| CacheError::Local { path: self.path.clone(), what: "open", source })
    }
}

/// True for a file whose creation was cut short, and for a block device whose start holds nothing. Other files are
/// never overwritten.
fn is_unmade(path: &Path) -> Result<bool, CacheError> {
    use std::io::Read;
    let local = |source| CacheError::Local { path: path.into(), what: "read", source };
    let mut start = Vec::new();
    let file = File::open(path).map_err(local)?;
    let is_device = file.metadata().map_err(local)?.file_type().is_block_device();
    file.take(BLANK_LEN).read_to_end(&mut start).map_err(local)?;
    Ok(start.starts_with(UNMADE) || (is_device && start.iter().all(|&byte| byte == 0)))
}

async fn read_superblock(device: &Device, path: &Path) -> Result<Superblock, CacheError> {
    let not_a_cache = |source| CacheError::NotACache { path: path.into(), source };
    if device.info().capacity < 2 * BLOCK_SIZE as u64 {
        return Err(not_a_cache(FormatError::Absent("cache superblock")));
    }
    let bytes = match device.read(0, 2 * BLOCK_SIZE).await {
        Err(error) if error.kind == DeviceErrorKind::OutOfRange => {
            return Err(not_a_cache(FormatError::Absent("cache superblock")));
        }
        other => other?,
    };
    let copies = [0, 1].map(|n| Superblock::decode(&bytes[n * BLOCK_SIZE..(n + 1) * BLOCK_SIZE]));
    match copies {
        [Ok(a), Ok(b)] => Ok(if a.sequence >= b.sequence { a } else { b }),
        [Ok(one), Err(error)] | [Err(error), Ok(one)] => {
            tracing::warn!(path = %path.display(), %error, "one copy of the cache superblock is damaged; the other is used");
            Ok(one)
        }
        [Err(error), Err(_)] => Err(not_a_cache(error)),
    }
}

/// The newer valid copy of a slot.
fn newest(slot: u32, copies: [&[u8]; 2]) -> Result<VdiSlot, FormatError> {
    match copies.map(|copy| VdiSlot::decode(copy, slot)) {
        [Ok(a), Ok(b)] => Ok(if a.sequence >= b.sequence { a } else { b }),
        // A torn write destroys only the older copy; the younger one stands.
        [Ok(one), Err(_)] | [Err(_), Ok(one)] => Ok(one),
        [Err(FormatError::Absent(_)), Err(FormatError::Absent(_))] => {
            Ok(VdiSlot { sequence: 0, slot, vdi: None })
        }
        [Err(FormatError::Absent(_)), Err(error)] | [Err(error), Err(_)] => Err(error),
    }
}
