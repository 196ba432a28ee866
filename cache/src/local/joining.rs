//! A leg that is being filled while the cache is in use, until it becomes a member.
//!
//! On the device nothing about membership changes until the end: the new leg says at its start that it is unfinished. From
//! the moment it joins, whatever is written to the members is written to it as well, by workers and here; what was there
//! before is copied by `leg_filler.rs`. Then it is flushed, and named a member: first by the superblock of the leg that
//! has everything, then by its own. A crash before that leaves the cache as it was, and a leg that nobody takes for one;
//! a crash between the two a leg whose twin is missing, which opens on the operator's word, and without loss.
//!
//! A leg that fails while it joins is given up: nothing durable names it, so nobody waits for more than a moment.

use super::create::mark_filling;
use super::{Leg, Local, Mirror, open_for_worker};
use crate::disk::plan::SegmentId;
use crate::error::CacheError;
use crate::format::Geometry;
use crate::format::legs::LegSet;
use crate::format::superblock::Superblock;
use crate::link::ToDisk;
use blockstore::buf::AlignedBuf;
use blockstore::device::{Device, DeviceError};
use blockstore::types::BLOCK_SIZE;
use futures_util::StreamExt;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::Notify;
use uuid::Uuid;

/// Headers wiped at once.
const WIPED_AT_ONCE: usize = 32;

/// See the module.
#[derive(Debug)]
pub(super) struct Joining {
    pub leg: Arc<Leg>,
    uuid: Uuid,
    id: u64,
    /// For workers.
    file: Arc<File>,
    given_up: Arc<Notify>,
}

impl Joining {
    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn message(&self) -> ToDisk {
        ToDisk::LegJoins { leg: self.leg.number, id: self.id, file: Arc::clone(&self.file) }
    }
}

impl Mirror {
    /// Whoever fills the new leg finds out, and so do all workers.
    pub(super) fn give_up(&mut self, why: &str) {
        let Some(joining) = self.joining.take() else { return };
        let path = joining.leg.path.display();
        tracing::error!(%path, why, "the new leg of the cache is given up; the cache goes on as it was");
        self.given_up = Some((joining.leg.path.clone(), why.into()));
        let members = self.members;
        self.disks.retain(|disk| disk.send(ToDisk::Legs { members }));
        joining.given_up.notify_one();
    }
}

impl Local {
    /// Marks a device, which is as large as the cache, as unfinished, and wipes what could pass for part of the cache.
    ///
    /// # Errors
    /// The device's.
    pub async fn blank_new_leg(&self, device: &Device) -> Result<(), CacheError> {
        mark_filling(device).await?;
        // Segments that are free now are not all copied: what the device held must not pass for one of their headers.
        let mut wiped =
            futures_util::stream::iter(0..self.geometry.segments)
                .map(|id| {
                    let offset = self.geometry.segment_offset(SegmentId(id));
                    async move {
                        device.write(offset, vec![AlignedBuf::zeroed(BLOCK_SIZE).freeze()]).await
                    }
                })
                .buffered(WIPED_AT_ONCE);
        while let Some(done) = wiped.next().await {
            done?;
        }
        Ok(())
    }

    /// From now on writes `device`, see [`Self::blank_new_leg`], with the members, and has all workers do so. `id` tells it
    /// from those that joined before. What is returned is notified if it is given up.
    ///
    /// # Errors
    /// The device's; no leg is missing; another one is being filled.
    pub async fn begin_joining(
        &self,
        id: u64,
        path: &Path,
        device: Device,
    ) -> Result<Arc<Notify>, CacheError> {
        let file = open_for_worker(path)?;
        let superblock = self.superblock.lock().await;
        // Nothing that was sent without the leg is under way when it begins to count on being sent everything.
        let _all_written = self.copying.write().await;
        let mut mirror = self.mirror.lock();
        let refused = |why: &str| CacheError::NewLeg { path: path.into(), why: why.into() };
        let Some(number) = superblock.membership.free_place() else {
            return Err(refused("both legs of the cache are there and in step"));
        };
        if mirror.joining.is_some() {
            return Err(refused("another new leg is being filled"));
        }
        let leg = Arc::new(Leg { number, path: path.into(), device });
        let given_up = Arc::new(Notify::new());
        let joining =
            Joining { leg, uuid: Uuid::new_v4(), id, file, given_up: Arc::clone(&given_up) };
        mirror.disks.retain(|disk| disk.send(joining.message()));
        mirror.joining = Some(joining);
        mirror.given_up = None;
        Ok(given_up)
    }

    /// Makes bytes of the new leg those of a member, or zeros. Nothing else is written here meanwhile by this side; that
    /// workers do not is up to the caller.
    ///
    /// # Errors
    /// Either leg's; the new one was given up.
    pub async fn fill(
        &self,
        id: u64,
        offset: u64,
        len: usize,
        blank: bool,
    ) -> Result<(), CacheError> {
        let alone = self.copying.write().await;
        let leg = self.joining_leg(id)?;
        let bytes = match blank {
            true => AlignedBuf::zeroed(len),
            false => self.read(offset, len).await?,
        };
        let (to, bytes) = (Arc::clone(&leg), bytes.freeze());
        let written = async move { to.device.write(offset, vec![bytes]).await };
        // The members' writes wait meanwhile.
        let written = self.in_time(&leg, written).await;
        drop(alone);
        if let Err(error) = &written {
            self.put_out(LegSet::NONE.with(leg.number), &error.to_string()).await?;
        }
        Ok(written?)
    }

    /// The new leg holds everything: makes it a member, durably.
    ///
    /// # Errors
    /// Either leg's; the new one was given up, then or now.
    pub async fn promote(&self, id: u64) -> Result<(), CacheError> {
        let leg = self.joining_leg(id)?;
        if let Err(error) = leg.device.flush().await {
            self.put_out(LegSet::NONE.with(leg.number), &error.to_string()).await?;
            return Err(error.into());
        }
        let mut superblock = self.superblock.lock().await;
        let (leg, uuid) = self.joining_now(id)?;
        let place_taken =
            || CacheError::NewLeg { path: leg.path.clone(), why: "its place was taken".into() };
        let membership = superblock.membership.with_new(uuid).ok_or_else(place_taken)?;
        let sequence = self.attempted.lock().following(superblock.sequence) - 1;
        let mut next = Superblock { membership, sequence, ..superblock.clone() };
        if let Err(error) = self.name_member(&mut next).await {
            self.mirror.lock().give_up(&error.to_string());
            // What is written from now on must be newer than what may have got through.
            self.attempted.lock().sequence = next.sequence;
            let gone = LegSet::NONE.with(leg.number);
            if let Some(left) = next.membership.without(gone) {
                let undone = Superblock { membership: left, ..next };
                self.store_superblock(&mut superblock, undone).await?;
            }
            return Err(error);
        }
        *superblock = next.clone();
        self.attempted.lock().holds(&next.membership);
        // From here on it is a member that may fail like any other.
        let members = next.membership.members;
        let (to, mut own) = (Arc::clone(&leg), Superblock { leg: uuid, sequence, ..next });
        let own = async move { write_both_copies(&to.device, &mut own).await };
        let own = self.in_time(&leg, own).await;
        self.now_members(members);
        drop(superblock);
        if let Err(error) = own {
            self.put_out(LegSet::NONE.with(leg.number), &error.to_string()).await?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Gives the new leg up, if it is still joining.
    pub async fn cancel_joining(&self, id: u64, why: &str) {
        let _not_promoted_now = self.superblock.lock().await;
        let mut mirror = self.mirror.lock();
        if mirror.joining.as_ref().is_some_and(|joining| joining.id == id) {
            mirror.give_up(why);
        }
    }

    /// Writes `next` to the members that were there before; all of them must take it. Its sequence is then that of what was
    /// written last, or failed.
    async fn name_member(&self, next: &mut Superblock) -> Result<(), CacheError> {
        let before = next.sequence;
        for leg in self.members_now() {
            let own = next.membership.legs[usize::from(leg.number)];
            let mut own = Superblock { leg: own, sequence: before, ..next.clone() };
            let written = write_both_copies(&leg.device, &mut own).await;
            next.sequence = next.sequence.max(own.sequence);
            written?;
        }
        Ok(())
    }

    /// Fails once the leg is not joining under this name any more.
    pub(crate) fn still_joining(&self, id: u64) -> Result<(), CacheError> {
        self.joining_now(id).map(drop)
    }

    /// The leg that is joining under this name.
    fn joining_leg(&self, id: u64) -> Result<Arc<Leg>, CacheError> {
        self.joining_now(id).map(|(leg, _)| leg)
    }

    fn joining_now(&self, id: u64) -> Result<(Arc<Leg>, Uuid), CacheError> {
        let mirror = self.mirror.lock();
        match &mirror.joining {
            Some(joining) if joining.id == id => Ok((Arc::clone(&joining.leg), joining.uuid)),
            _ => {
                let (path, why) = mirror.given_up.clone().unwrap_or_default();
                Err(CacheError::NewLeg { path, why })
            }
        }
    }
}

/// Writes a superblock over both copies, durably, under the two sequence numbers after its own. It has that of the one that
/// was written last, or failed, then.
pub(super) async fn write_both_copies(
    device: &Device,
    superblock: &mut Superblock,
) -> Result<(), DeviceError> {
    for _ in 0..2 {
        superblock.sequence += 1;
        let block = AlignedBuf::copy_of(&superblock.encode()).freeze();
        device.write(Geometry::superblock_offset(superblock.sequence), vec![block]).await?;
        device.flush().await?;
    }
    Ok(())
}
