//! A new leg for a cache that lost one, or a second one for a cache that never had one, while the cache is not in use. For one
//! that is see `joining.rs`.
//!
//! Order: the new leg is marked as unfinished, all else is copied and flushed; then the superblock of the good leg names
//! both as members, then that of the new leg does. A crash before that leaves the good leg as it was, alone; a crash
//! between the two leaves a good leg whose twin is missing, which opens on the operator's word only, and without loss.
//! Never does a leg count as a member while the other can be served without knowing of it.

use super::create::{mark_filling, may_be_filled};
use super::joining::write_both_copies;
use super::opening::{FoundLeg, open_leg, refuse_same};
use super::{Local, Mode};
use crate::error::CacheError;
use crate::format::FormatError;
use crate::format::superblock::Superblock;
use blockstore::device::file::FileDevice;
use blockstore::device::{Device, OpenOptions};
use blockstore::types::BLOCK_SIZE;
use futures_util::StreamExt;
use serde::Serialize;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Bytes copied at a time.
const CHUNK: u64 = 4 << 20;
/// Chunks under way at once.
const AT_ONCE: usize = 4;
/// The superblocks are not copied.
const COPIED_FROM: u64 = 2 * BLOCK_SIZE as u64;

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Replaced {
    /// The leg that was copied.
    pub good: PathBuf,
    /// Its twin from now on.
    pub new: PathBuf,
    /// Bytes copied.
    pub bytes: u64,
}

impl Local {
    /// Opens a new leg for this cache, which is in use, and changes nothing on it.
    ///
    /// # Errors
    /// As [`Self::replace`] for the new leg.
    pub async fn open_new_leg(&self, new: &Path) -> Result<Device, CacheError> {
        for leg in self.members_now() {
            refuse_same(&[leg.path.clone(), new.into()])?;
        }
        open_blank(self, new).await
    }

    /// Copies the cache whose only member is at `good` to `new`, which becomes its second leg. `new` may not exist yet,
    /// be blank, or hold a leg of this cache that was left behind. `progress` is told bytes done and all.
    ///
    /// # Errors
    /// `good` is in use, or lacks its twin; `new` holds something else, or is too small: nothing was changed. A copy that
    /// failed leaves `good` as it was.
    pub async fn replace(
        good: &Path,
        new: &Path,
        progress: &(dyn Fn(u64, u64) + Send + Sync),
    ) -> Result<Replaced, CacheError> {
        refuse_same(&[good.into(), new.into()])?;
        let local = Self::open(good, Mode::Serve { create_size: None }).await?;
        let device = open_blank(&local, new).await?;
        let bytes = local.replace_on(&device, progress).await?;
        Ok(Replaced { good: good.into(), new: new.into(), bytes })
    }

    /// Copies this cache, which has one member and is not in use, to `device`, which becomes the second and whose content
    /// is lost. Returns bytes copied.
    ///
    /// # Errors
    /// The devices'. The good leg stays as it was, or names a twin that is not finished.
    pub async fn replace_on(
        self,
        device: &Device,
        progress: &(dyn Fn(u64, u64) + Send + Sync),
    ) -> Result<u64, CacheError> {
        let superblock = self.superblock().await;
        let Some(source) = self.members_now().into_iter().next() else {
            return Err(self.no_leg_left("nothing can be copied".into()));
        };
        mark_filling(device).await?;
        copy(&source.device, device, self.geometry.size, progress).await?;
        let leg = Uuid::new_v4();
        let Some(membership) = superblock.membership.with_new(leg) else {
            let why = "both legs of the cache are there and in step".into();
            return Err(CacheError::NewLeg { path: self.path.clone(), why });
        };
        let sequence = self.attempted.lock().following(superblock.sequence) - 1;
        let next = Superblock { membership, sequence, ..superblock };
        write_both_copies(&source.device, &mut next.clone()).await?;
        write_both_copies(device, &mut Superblock { leg, ..next }).await?;
        Ok(self.geometry.size - COPIED_FROM)
    }
}

async fn open_blank(local: &Local, new: &Path) -> Result<Device, CacheError> {
    let size = local.geometry.size;
    if !may_be_filled(new)? {
        // A leg that was left behind may be overwritten; anything else may be someone's data.
        let FoundLeg { superblock: other, are_whole, .. } = open_leg(new, true, false).await?;
        if other.cache != local.cache {
            let source = FormatError::Invalid {
                what: "the new leg",
                why: "it is a leg of another cache, which would be overwritten",
            };
            return Err(CacheError::NotACache { path: new.into(), source });
        }
        let own = local.superblock().await.membership;
        let is_behind = other.membership.events < own.events;
        if !is_behind || other.membership.is_split_from(&own, are_whole) {
            // It was served after the other, or beside it: what it holds may be nowhere else.
            let why = format!(
                "it went on without {} at some time, or is from before that one's last twin, and may hold writes that are nowhere else; if they are to be given up, wipe its \
                 first 8 KiB, or remove the file, and try again",
                local.path.display()
            );
            return Err(CacheError::NewLeg { path: new.into(), why });
        }
    }
    let options = OpenOptions {
        exclusive: true,
        create_size: (!new.exists()).then_some(size),
        ..OpenOptions::default()
    };
    let device = FileDevice::open(new, &options)?;
    let found = device.info().capacity;
    if found < size {
        let (path, twin) = (new.into(), local.path.clone());
        return Err(CacheError::SmallerLeg { path, found, twin, expected: size });
    }
    Ok(device)
}

async fn copy(
    from: &Device,
    to: &Device,
    size: u64,
    progress: &(dyn Fn(u64, u64) + Send + Sync),
) -> Result<(), CacheError> {
    let starts: Vec<u64> = (COPIED_FROM..size).step_by(CHUNK as usize).collect();
    let mut chunks = futures_util::stream::iter(starts)
        .map(|offset| async move {
            let len = CHUNK.min(size - offset);
            let bytes = from.read(offset, len as usize).await?;
            to.write(offset, vec![bytes.freeze()]).await?;
            Ok::<u64, CacheError>(offset + len)
        })
        .buffered(AT_ONCE);
    while let Some(done) = chunks.next().await {
        progress(done?, size);
    }
    Ok(to.flush().await?)
}
