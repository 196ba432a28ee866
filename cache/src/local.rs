//! The cache device as the asynchronous side sees it: superblock, slots, segments, on one leg or two.
//!
//! The worker writes records through file handles of its own; here is everything else. What is written here goes to all
//! members of the mirror at once; a leg that fails is put out of the set, durably on the other, before the write counts as
//! done (rule L5). Reads are answered by any member, and judged by checksums: a copy that does not match is rewritten from
//! one that does. A leg that is being filled is written with the members, and never read.
//!
//! A leg that does not answer is treated as one that failed, while another does: `local/waiting.rs`.
//!
//! Where to read on: `local/opening.rs` (which legs are the cache), `local/create.rs`, `local/joining.rs` (a leg that is to
//! become a member), `local/superblock.rs`, `local/slots.rs`.

mod attempted;
mod choose;
mod create;
mod joining;
mod opening;
mod replace;
mod slots;
mod superblock;
#[cfg(test)]
mod tests;
mod waiting;

pub use crate::format::superblock::Machine;
pub use opening::{LegState, Mode, Terms};
pub use replace::Replaced;
pub use waiting::LEG_TIMEOUT;

use crate::disk::plan::SegmentId;
use crate::error::CacheError;
use crate::format::Geometry;
use crate::format::legs::LegSet;
use crate::format::segment::SegmentHeader;
use crate::format::superblock::Superblock;
use crate::link::{DiskSender, ToDisk};
use attempted::Attempted;
use blockstore::buf::AlignedBuf;
use blockstore::device::file::FileDevice;
use blockstore::device::{Device, DeviceError};
use blockstore::sabotage::{self, Bug};
use blockstore::types::BLOCK_SIZE;
use bytes::Bytes;
use futures_util::StreamExt;
use joining::Joining;
use parking_lot::Mutex;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use uuid::Uuid;

/// Segment headers read at once.
const HEADERS_AT_ONCE: usize = 32;

/// See the module.
#[derive(Debug)]
pub struct Local {
    /// Of the first leg that is there, for messages.
    pub path: PathBuf,
    /// Division of each leg.
    pub geometry: Geometry,
    cache: Uuid,
    read_only: bool,
    leg_timeout_ms: AtomicU64,
    /// As the members hold it, but for the leg's own UUID.
    superblock: tokio::sync::Mutex<Superblock>,
    /// What a leg may hold that was never durable on all of its members.
    attempted: Mutex<Attempted>,
    /// Held alone while bytes are copied to a leg that is being filled, so that what is copied is not old when it arrives.
    /// Never held by who waits for the superblock's lock.
    copying: tokio::sync::RwLock<()>,
    mirror: Mutex<Mirror>,
}

/// A leg of the cache, or one that is to become one.
#[derive(Debug)]
struct Leg {
    number: u8,
    path: PathBuf,
    device: Device,
}

/// Who is a member, and who must be told of changes.
#[derive(Debug)]
struct Mirror {
    members: LegSet,
    /// At least the members.
    legs: Vec<Arc<Leg>>,
    /// Paths that were given, or were members, and are none now: why.
    outsiders: Vec<(PathBuf, String)>,
    joining: Option<Joining>,
    /// The leg that joined last, and why it was given up.
    given_up: Option<(PathBuf, String)>,
    /// Legs that do not answer, of which it is being found out whether they are to be put out.
    suspected: LegSet,
    disks: Vec<DiskSender>,
}

impl Mirror {
    /// Legs that are written.
    fn written(&self) -> LegSet {
        self.joining.as_ref().map_or(self.members, |joining| self.members.with(joining.leg.number))
    }

    /// Those that could not be put out stay members.
    fn members_are_no_outsiders(&mut self) {
        let Self { members, legs, outsiders, .. } = self;
        let is_member =
            |path: &PathBuf| legs.iter().any(|l| members.contains(l.number) && l.path == *path);
        outsiders.retain(|(path, _)| !is_member(path));
    }

    fn why_out(&self, path: &Path) -> String {
        let why = self.outsiders.iter().find(|(out, _)| out == path).map(|(_, why)| why);
        why.cloned().unwrap_or_default()
    }
}

impl Local {
    fn with(
        superblock: Superblock,
        legs: Vec<Leg>,
        outsiders: Vec<(PathBuf, String)>,
        read_only: bool,
    ) -> Self {
        let present = legs.iter().fold(LegSet::NONE, |set, leg| set.with(leg.number));
        let members = superblock.membership.members.and(present);
        Self {
            path: legs.first().map(|leg| leg.path.clone()).unwrap_or_default(),
            geometry: superblock.geometry,
            cache: superblock.cache,
            read_only,
            leg_timeout_ms: AtomicU64::new(LEG_TIMEOUT.as_millis() as u64),
            superblock: tokio::sync::Mutex::new(superblock),
            attempted: Mutex::default(),
            copying: tokio::sync::RwLock::new(()),
            mirror: Mutex::new(Mirror {
                members,
                legs: legs.into_iter().map(Arc::new).collect(),
                outsiders,
                joining: None,
                given_up: None,
                suspected: LegSet::NONE,
                disks: Vec::new(),
            }),
        }
    }

    /// The cache's identity.
    #[must_use]
    pub fn cache_uuid(&self) -> Uuid {
        self.cache
    }

    /// The legs that are written together now.
    #[must_use]
    pub fn members(&self) -> LegSet {
        self.mirror.lock().members
    }

    /// Makes a disk's worker known: from now on it is told of each change, first of a leg that is being filled. Returns the
    /// members as they are.
    pub fn join(&self, disk: DiskSender) -> LegSet {
        let mut mirror = self.mirror.lock();
        if let Some(joining) = &mirror.joining {
            disk.send(joining.message());
        }
        mirror.disks.push(disk);
        mirror.members
    }

    /// A leg failed: puts it out of the set of members, durably on those that are left, and then tells all disks. If that
    /// cannot be done, no leg is left, and they are told that.
    /// One that was joining as `joining` when it failed is given up, unless it has become a member.
    pub async fn leg_failed(&self, leg: u8, joining: Option<u64>, why: &str) {
        {
            let mirror = self.mirror.lock();
            if let Some(now) = mirror.joining.as_ref().filter(|now| now.leg.number == leg)
                && joining != Some(now.id())
            {
                // That was its predecessor, which is out already.
                return;
            }
        }
        let gone = LegSet::NONE.with(leg);
        if sabotage::on(Bug::LegOutUnnoted) && self.members() != gone {
            return self.now_members(self.members().minus(gone));
        }
        if let Err(error) = self.put_out(gone, why).await {
            tracing::error!(%error, "the cache's last leg failed");
            self.now_members(LegSet::NONE);
            self.note_lost(gone, why);
        }
    }

    /// Makes the set of members without `gone` durable. Done at once if none of them is a member; one that is joining is given
    /// up.
    async fn put_out(&self, gone: LegSet, why: &str) -> Result<(), CacheError> {
        let mut superblock = self.superblock.lock().await;
        {
            let mut mirror = self.mirror.lock();
            if mirror.joining.as_ref().is_some_and(|joining| gone.contains(joining.leg.number)) {
                mirror.give_up(why);
            }
        }
        let gone = gone.and(self.members());
        if gone.is_empty() {
            return Ok(());
        }
        let mut next = superblock.clone();
        next.membership =
            next.membership.without(gone).ok_or_else(|| self.no_leg_left(why.to_string()))?;
        self.note_lost(gone, why);
        // Every write may end here, and hardly any does: what it takes is not carried along by each.
        Box::pin(self.store_superblock(&mut superblock, next)).await
    }

    /// Legs are being put out: why.
    fn note_lost(&self, legs: LegSet, why: &str) {
        for leg in legs.iter() {
            let path = self.leg_path(leg);
            let mut mirror = self.mirror.lock();
            mirror.outsiders.retain(|(known, _)| *known != path);
            mirror.outsiders.push((path, why.to_string()));
        }
    }

    /// The set is durable: whoever waits for a leg outside of it goes on.
    fn now_members(&self, members: LegSet) {
        let mut mirror = self.mirror.lock();
        if mirror.members == members {
            return;
        }
        if let Some(joining) =
            mirror.joining.take_if(|joining| members.contains(joining.leg.number))
        {
            mirror.legs.push(joining.leg);
            // It takes the place of whatever is no member.
            mirror.outsiders.clear();
        }
        mirror.give_up("the leg that it was filled from failed");
        mirror.members = members;
        if !members.is_empty() {
            // Closed when nothing is under way on them, so that they can be opened to be filled anew.
            mirror.legs.retain(|leg| members.contains(leg.number));
        }
        mirror.disks.retain(|disk| disk.send(ToDisk::Legs { members }));
    }

    fn no_leg_left(&self, why: String) -> CacheError {
        CacheError::NoLegLeft { path: self.path.clone(), why }
    }

    fn leg_path(&self, number: u8) -> PathBuf {
        let mirror = self.mirror.lock();
        let leg = mirror.legs.iter().find(|leg| leg.number == number);
        leg.map_or(&self.path, |leg| &leg.path).clone()
    }

    /// The headers of all segments that have one. Where legs differ, a crash came between their writes: the later one counts.
    pub async fn read_headers(&self) -> Result<Vec<SegmentHeader>, CacheError> {
        let cache = self.cache;
        let mut found = Vec::new();
        let mut headers = futures_util::stream::iter(0..self.geometry.segments)
            .map(|id| async move {
                let id = SegmentId(id);
                (id, self.read_each(self.geometry.segment_offset(id), BLOCK_SIZE).await)
            })
            .buffered(HEADERS_AT_ONCE);
        while let Some((id, blocks)) = headers.next().await {
            // A header that does not decode leaves a gap in its disk's LSNs, which recovery judges.
            let copies = blocks?;
            let decoded =
                copies.iter().filter_map(|(_, block)| SegmentHeader::decode(block, cache, id).ok());
            found.extend(decoded.max_by_key(|header| header.seq));
        }
        Ok(found)
    }

    /// Reads bytes of the first member that gives them. They may be damaged.
    pub async fn read(&self, offset: u64, len: usize) -> Result<AlignedBuf, CacheError> {
        self.read_good(offset, len, |_| true).await
    }

    /// Reads bytes of every member that gives them, with the legs' numbers. At least one.
    pub async fn read_each(
        &self,
        offset: u64,
        len: usize,
    ) -> Result<Vec<(u8, AlignedBuf)>, CacheError> {
        let read = move |leg: Arc<Leg>| async move { leg.device.read(offset, len).await };
        let results = self.on_legs(self.members(), false, read).await;
        let (mut copies, mut failed) = (Vec::new(), None);
        for (leg, result) in results {
            match result {
                Ok(bytes) => copies.push((leg, bytes)),
                Err(error) => {
                    tracing::warn!(leg, %error, "a leg of the cache cannot be read here");
                    failed = Some(error);
                }
            }
        }
        match failed {
            Some(error) if copies.is_empty() => Err(error.into()),
            _ if copies.is_empty() => Err(self.no_leg_left("nothing can be read".into())),
            _ => Ok(copies),
        }
    }

    /// Rewrites what is damaged on a leg. If that fails, the leg is none any more.
    pub async fn repair(&self, leg: u8, offset: u64, bytes: AlignedBuf) -> Result<(), CacheError> {
        if self.read_only {
            return Ok(());
        }
        let path = self.leg_path(leg);
        tracing::warn!(leg, path = %path.display(), offset, len = bytes.len(), "rewriting a damaged copy from another leg");
        let (only, bytes) = (LegSet::NONE.with(leg), bytes.freeze());
        let results = self.on_legs(only, true, |leg| write_leg(leg, offset, bytes.clone())).await;
        match failures(results) {
            (_, None) => Ok(()),
            (failed, Some(error)) => self.put_out(failed, &error.to_string()).await,
        }
    }

    /// Writes bytes to every member, and to a leg that is being filled.
    pub async fn write(&self, offset: u64, bytes: AlignedBuf) -> Result<(), CacheError> {
        let not_copied_meanwhile = self.copying.read().await;
        let (members, written) = self.members_and_written();
        let bytes = bytes.freeze();
        let results =
            self.on_legs(written, false, |leg| write_leg(leg, offset, bytes.clone())).await;
        // Putting a leg out takes the superblock's lock, which comes first.
        drop(not_copied_meanwhile);
        self.settle_failures(members, results).await
    }

    /// Makes finished writes durable on every member, and on a leg that is being filled.
    pub async fn flush(&self) -> Result<(), CacheError> {
        let (members, written) = self.members_and_written();
        let flush = |leg: Arc<Leg>| async move { leg.device.flush().await };
        self.settle_failures(members, self.on_legs(written, false, flush).await).await
    }

    fn members_and_written(&self) -> (LegSet, LegSet) {
        let mirror = self.mirror.lock();
        (mirror.members, mirror.written())
    }

    /// Legs on which a write or flush failed while a member did it are put out; if none of `members` did it, it failed.
    async fn settle_failures(
        &self,
        members: LegSet,
        results: Vec<(u8, Result<(), DeviceError>)>,
    ) -> Result<(), CacheError> {
        match failures(results) {
            (_, None) if members.is_empty() => {
                Err(self.no_leg_left("nothing can be written".into()))
            }
            (_, None) => Ok(()),
            (failed, Some(error)) if members.minus(failed).is_empty() => Err(error.into()),
            (failed, Some(error)) => self.put_out(failed, &error.to_string()).await,
        }
    }

    fn members_now(&self) -> Vec<Arc<Leg>> {
        self.legs_in(self.members())
    }

    fn legs_in(&self, legs: LegSet) -> Vec<Arc<Leg>> {
        let mirror = self.mirror.lock();
        let all = mirror.legs.iter().chain(mirror.joining.iter().map(|joining| &joining.leg));
        all.filter(|leg| legs.contains(leg.number)).cloned().collect()
    }

    /// A file handle for a worker for each leg, at its number: O_DIRECT where the file system has it. The place of a leg
    /// that is no member is taken by one that is.
    pub fn worker_files(&self) -> Result<Vec<Arc<File>>, CacheError> {
        let mut files: Vec<Option<Arc<File>>> = Vec::new();
        for leg in self.members_now() {
            let at = usize::from(leg.number);
            files.resize(files.len().max(at + 1), None);
            files[at] = Some(open_for_worker(&leg.path)?);
        }
        let any = files.iter().flatten().next().cloned();
        Ok(files.into_iter().filter_map(|file| file.or_else(|| any.clone())).collect())
    }

    /// What became of each leg that was given or is known, for status.
    #[must_use]
    pub fn leg_states(&self) -> Vec<LegState> {
        let mirror = self.mirror.lock();
        let legs = mirror.legs.iter().map(|leg| LegState {
            path: leg.path.clone(),
            member: mirror.members.contains(leg.number),
            why: None,
        });
        // Those that are being put out are named below.
        let legs = legs
            .filter(|leg| leg.member || mirror.outsiders.iter().all(|(path, _)| *path != leg.path));
        let outsiders = mirror.outsiders.iter().map(|(path, why)| LegState {
            path: path.clone(),
            member: false,
            why: Some(why.clone()),
        });
        legs.chain(outsiders).collect()
    }
}

async fn write_leg(leg: Arc<Leg>, offset: u64, bytes: Bytes) -> Result<(), DeviceError> {
    leg.device.write(offset, vec![bytes]).await
}

/// Legs that failed, and an error of one.
fn failures<T>(results: Vec<(u8, Result<T, DeviceError>)>) -> (LegSet, Option<DeviceError>) {
    let (mut failed, mut error) = (LegSet::NONE, None);
    for (leg, result) in results {
        if let Err(why) = result {
            failed = failed.with(leg);
            error = Some(why);
        }
    }
    (failed, error)
}

fn open_for_worker(path: &Path) -> Result<Arc<File>, CacheError> {
    let opened = FileDevice::open_beside(path);
    opened.map(Arc::new).map_err(|source| CacheError::Local {
        path: path.into(),
        what: "open",
        source,
    })
}
