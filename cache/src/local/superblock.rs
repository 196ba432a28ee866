//! Writing the superblock: to all members at once, a changed set in both of its places.
//!
//! A leg that fails is put out of the set, as long as another one takes it. The last one is asked again for a while, since
//! a pause is better than no log at all; but not after a flush that failed while logs are open, which may have lost some of them.
//!
//! What failed may have torn its place, so that is written again until it is durable: the other one is whole. A place of the last leg that
//! still takes no writes then is done without, where no harm can come of what it holds: the leg goes on with the other one.

use super::{Local, failures};
use crate::error::CacheError;
use crate::format::Geometry;
use crate::format::superblock::Superblock;
use blockstore::buf::AlignedBuf;
use blockstore::device::{DeviceError, DeviceErrorKind};
use blockstore::types::BLOCK_SIZE;
use std::time::Duration;
use tokio::time::Instant;

#[cfg(test)]
mod tests;

/// How often the last leg is asked again to take a superblock.
const ASKED_AGAIN: u32 = 4;
/// What is waited before the first time; each further time twice as long.
const ASKED_AGAIN_AFTER: Duration = Duration::from_millis(100);
/// A leg that takes longer than this to refuse is not asked again: everybody waits meanwhile.
const ASKED_WITHIN: Duration = Duration::from_secs(2);

/// The device's name for a write, in its errors.
const WRITE: &str = "write";

/// What stands in a place that takes no superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stands {
    /// A whole one, which names the same members.
    Same,
    /// Nothing that could count.
    Nothing,
    /// It may count, should the other one rot, and name other members; or it is not known.
    InDoubt,
}

impl Local {
    /// A copy of the superblock.
    pub async fn superblock(&self) -> Superblock {
        self.superblock.lock().await.clone()
    }

    /// Changes the superblock durably, on every member.
    pub async fn rewrite_superblock(
        &self,
        change: impl FnOnce(&mut Superblock),
    ) -> Result<(), CacheError> {
        let mut superblock = self.superblock.lock().await;
        let mut next = superblock.clone();
        change(&mut next);
        self.store_superblock(&mut superblock, next).await
    }

    /// Writes the set of members that this start serves under, if that could not be done at the start. Before that nothing may be
    /// acknowledged: another leg may know the set that is written as an attempt that failed.
    ///
    /// # Errors
    /// The leg's.
    pub async fn note_members(&self) -> Result<(), CacheError> {
        if !self.attempted.lock().is_unnoted {
            return Ok(());
        }
        let mut superblock = self.superblock.lock().await;
        // Another disk may have done it meanwhile.
        if !self.attempted.lock().is_unnoted {
            return Ok(());
        }
        let next = superblock.clone();
        let stored = Box::pin(self.store_superblock(&mut superblock, next)).await;
        stored.map_err(|error| match error {
            CacheError::Device(mut error) => {
                error.message.push_str(
                    "; the cache is not used before its start is noted there: see to the device, or copy all of it to a sound one and \
                     name that instead",
                );
                CacheError::Device(error)
            }
            other => other,
        })
    }

    /// Writes `next` to its members, under a number of its own. One that fails is put out of the set, and the rest written
    /// anew, until all that are left agree. A changed set goes to both places: should the newer copy rot, the older must not bring
    /// a leg back. So does what follows an attempt that failed, and it counts further than that: what a leg may have of it must not
    /// stand beside it.
    pub(super) async fn store_superblock(
        &self,
        superblock: &mut Superblock,
        mut next: Superblock,
    ) -> Result<(), CacheError> {
        let attempted = self.attempted.lock().clone();
        let mut is_doubtful = attempted.is_unnoted || attempted.sequence > superblock.sequence;
        next.sequence = attempted.following(superblock.sequence);
        if next.membership != superblock.membership {
            next.membership = attempted.beyond(next.membership);
            is_doubtful = true;
        }
        let (mut copies, mut durable) = (0, superblock.sequence);
        let (mut asked_again, mut one_will_do) = (0, false);
        let began = Instant::now();
        while copies < if is_doubtful && !one_will_do { 2 } else { 1 } {
            let results = self.write_superblock(&next).await;
            let may_pass = may_pass(&results, attempted.is_unnoted);
            let (failed, error) = failures(results);
            let Some(error) = error else {
                (copies, durable) = (copies + 1, next.sequence);
                next.sequence += 1;
                continue;
            };
            is_doubtful = true;
            let attempted = {
                let mut attempted = self.attempted.lock();
                attempted.note(&next, superblock);
                attempted.clone()
            };
            if let Some(left) = next.membership.without(failed) {
                next.membership = attempted.beyond(left);
                // The same place again.
                next.sequence += 2;
                copies = 0;
                self.note_lost(failed, &error.to_string());
                continue;
            }
            if may_pass && asked_again < ASKED_AGAIN && began.elapsed() < ASKED_WITHIN {
                tokio::time::sleep(ASKED_AGAIN_AFTER * (1 << asked_again)).await;
                asked_again += 1;
                next.sequence += 2;
                continue;
            }
            let stands = match error.operation == WRITE && may_pass && !one_will_do {
                true => self.what_stands(&next).await,
                false => Stands::InDoubt,
            };
            match stands {
                Stands::Same | Stands::Nothing if copies > 0 => {}
                // Should the other one be torn now, this one is there.
                Stands::Same => next.sequence += 1,
                _ => {
                    self.mirror.lock().members_are_no_outsiders();
                    return Err(error.into());
                }
            }
            one_will_do = true;
            tracing::warn!(%error, "one place of the cache's superblock takes no writes, and is done without: copy the leg to a sound device");
        }
        next.sequence = durable;
        let lost = superblock.membership.members.minus(next.membership.members);
        for leg in lost.iter() {
            let path = self.leg_path(leg);
            let why = self.mirror.lock().why_out(&path);
            tracing::error!(
                leg, path = %path.display(), why,
                "a leg of the cache failed: the cache goes on without it, unmirrored; replace it"
            );
        }
        let members = next.membership.members;
        self.attempted.lock().holds(&next.membership);
        *superblock = next;
        self.now_members(members);
        Ok(())
    }

    /// Writes a superblock to the place that its sequence selects, durably, on each of its members.
    async fn write_superblock(&self, next: &Superblock) -> Vec<(u8, Result<(), DeviceError>)> {
        let offset = Geometry::superblock_offset(next.sequence);
        self.on_legs(next.membership.members, false, |leg| {
            let own = next.membership.legs[usize::from(leg.number)];
            let block = Superblock { leg: own, ..next.clone() }.encode();
            async move {
                let block = AlignedBuf::copy_of(&block).freeze();
                leg.device.write(offset, vec![block]).await?;
                leg.device.flush().await
            }
        })
        .await
    }

    /// What the place of `next` holds on its only member.
    async fn what_stands(&self, next: &Superblock) -> Stands {
        let legs = self.legs_in(next.membership.members);
        let [leg] = &legs[..] else { return Stands::InDoubt };
        let offset = Geometry::superblock_offset(next.sequence);
        let Ok(block) = leg.device.read(offset, BLOCK_SIZE).await else { return Stands::InDoubt };
        match Superblock::decode(&block) {
            Ok(found) if found.cache != next.cache => Stands::InDoubt,
            Ok(found) if found.membership.has_members_of(&next.membership) => Stands::Same,
            Ok(_) => Stands::InDoubt,
            Err(_) => Stands::Nothing,
        }
    }
}

/// What failed may go well next time, and nothing else was lost with it: a flush that fails says nothing of what other writes
/// before it came to, which is of no account while `none_serves`.
fn may_pass(results: &[(u8, Result<(), DeviceError>)], none_serves: bool) -> bool {
    let mut errors = results.iter().filter_map(|(_, result)| result.as_ref().err());
    errors.all(|error| {
        use DeviceErrorKind::{Io, NoSpace, Unreachable};
        matches!(error.kind, Io | NoSpace | Unreachable)
            && (none_serves || error.operation == WRITE)
    })
}
