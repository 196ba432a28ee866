//! Opening a cache: which devices are its legs, and which of them count.
//!
//! Nothing is written before the decision stands, and a refusal writes nothing at all.

use super::choose::choose;
use super::create::{is_unmade, says_unfinished};
use super::{Leg, Local};
use crate::error::CacheError;
use crate::format::FormatError;
use crate::format::legs::LegSet;
use crate::format::superblock::{Machine, Superblock};
use blockstore::buf::AlignedBuf;
use blockstore::device::file::FileDevice;
use blockstore::device::{Device, DeviceError, DeviceErrorKind, OpenOptions};
use blockstore::types::BLOCK_SIZE;
use serde::{Deserialize, Serialize};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One of two legs that takes longer to give its superblock counts as one that cannot be read. The only one is waited for.
const ANSWERS_WITHIN: Duration = Duration::from_secs(30);

/// How to open a cache device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// For serving: exclusive; created with so many bytes if the file does not exist.
    Serve { create_size: Option<u64> },
    /// For looking only.
    ReadOnly,
}

/// On what terms a cache is opened for serving.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// The operator's word: go on without a leg that is recorded as a member and is not there.
    pub degraded: bool,
    /// This machine: a cache that another one is noted in is refused. None: not looked at.
    pub machine: Option<Machine>,
}

/// A leg for status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LegState {
    /// Where it is.
    pub path: PathBuf,
    /// It is written with the others and holds everything.
    pub member: bool,
    /// Why it is no member.
    pub why: Option<String>,
}

/// Opened devices with their superblocks, and the paths that could not be opened.
struct Found {
    legs: Vec<FoundLeg>,
    failed: Vec<(PathBuf, CacheError)>,
}

/// An opened device with its newer superblock.
pub(super) struct FoundLeg {
    pub path: PathBuf,
    pub device: Device,
    pub superblock: Superblock,
    /// Both copies are good and name the same members: either may rot.
    pub agrees: bool,
    /// The older copy is good, and names other members than the newer one.
    pub misleads: bool,
    /// Both copies are good.
    pub are_whole: bool,
}

impl Local {
    /// Opens the cache at `path`, or creates it where `mode` says so.
    pub async fn open(path: &Path, mode: Mode) -> Result<Self, CacheError> {
        Self::open_legs(&[path.into()], mode, &Terms::default()).await
    }

    /// Opens the cache whose legs are at `paths`, one or two, or creates it there.
    pub async fn open_legs(
        paths: &[PathBuf],
        mode: Mode,
        terms: &Terms,
    ) -> Result<Self, CacheError> {
        refuse_same(paths)?;
        if let Mode::Serve { create_size: Some(size) } = mode
            && may_create(paths).await?
        {
            return Self::create(paths, size).await;
        }
        let read_only = mode == Mode::ReadOnly;
        let mut found = Found { legs: Vec::new(), failed: Vec::new() };
        for path in paths {
            match open_leg(path, read_only, paths.len() < 2).await {
                Ok(leg) => found.legs.push(leg),
                Err(CacheError::Device(error)) if error.kind == DeviceErrorKind::Reserved => {
                    return Err(error.into());
                }
                Err(error) => found.failed.push((path.clone(), error)),
            }
        }
        Self::on_found(found, read_only, terms).await
    }

    /// The cache on `device`.
    pub async fn on_device(path: &Path, device: Device) -> Result<Self, CacheError> {
        Self::on_devices(vec![(path.into(), device)], false).await
    }

    /// The cache on these legs. One that cannot be read counts as absent.
    pub async fn on_devices(
        devices: Vec<(PathBuf, Device)>,
        degraded: bool,
    ) -> Result<Self, CacheError> {
        let mut found = Found { legs: Vec::new(), failed: Vec::new() };
        let is_alone = devices.len() < 2;
        for (path, device) in devices {
            match read_leg(&path, device, is_alone).await {
                Ok(leg) => found.legs.push(leg),
                Err(error) => found.failed.push((path, error)),
            }
        }
        Self::on_found(found, false, &Terms { degraded, machine: None }).await
    }

    async fn on_found(found: Found, read_only: bool, terms: &Terms) -> Result<Self, CacheError> {
        let Found { legs: found, failed } = found;
        if found.is_empty() {
            let error = failed.into_iter().map(|(_, error)| error).next();
            return Err(error.unwrap_or(CacheError::Missing { path: PathBuf::new() }));
        }
        let named: Vec<_> =
            found.iter().map(|leg| (leg.path.clone(), leg.superblock.clone())).collect();
        let choice = choose(&named, |at| found[at].are_whole)?;
        let (best_path, best) = &named[choice.best];
        let (given, known) = (found.len() + failed.len(), best.membership.legs.len());
        if given > known {
            let path = best_path.clone();
            return Err(CacheError::LegCount { path, legs: known, given });
        }
        let is_member = |at: usize| choice.members.iter().any(|(member, _)| *member == at);
        refuse_cut_short(&found, best, is_member)?;
        if !read_only {
            refuse_other_machine(best_path, best, terms)?;
        }
        let why = failed.iter().map(|(_, error)| error.to_string()).next();
        if !choice.missing.is_empty() && !terms.degraded && !read_only {
            let missing = choice.missing.iter().map(|leg| best.membership.legs[usize::from(leg)]);
            let missing = missing.map(|leg| leg.to_string()).collect::<Vec<_>>().join(", ");
            let why = why.unwrap_or_else(|| "its path was not given".into());
            return Err(CacheError::LegMissing { path: best_path.clone(), missing, why });
        }
        let behind = choice
            .members
            .iter()
            .any(|(at, _)| found[*at].superblock.sequence != best.sequence || !found[*at].agrees);
        let misleads = choice.members.iter().any(|(at, _)| found[*at].misleads);
        let mut outsiders: Vec<_> =
            failed.into_iter().map(|(path, error)| (path, error.to_string())).collect();
        for (at, why) in &choice.outsiders {
            outsiders.push((named[*at].0.clone(), why.clone()));
        }
        if given < known {
            // Named by its UUID, for want of a path.
            let absent = (0..known as u8).filter(|n| !choice.members.iter().any(|(_, m)| m == n));
            let names = absent.map(|n| format!("leg {}", best.membership.legs[usize::from(n)]));
            outsiders.extend(names.map(|name| (name.into(), "its path was not given".into())));
        }
        for (path, why) in &outsiders {
            tracing::error!(path = %path.display(), why, "this leg of the cache is not used: the cache is not mirrored; replace the leg");
        }
        let mut legs: Vec<Leg> = Vec::new();
        for (at, FoundLeg { path, device, .. }) in found.into_iter().enumerate() {
            if let Some((_, number)) = choice.members.iter().find(|(member, _)| *member == at) {
                legs.push(Leg { number: *number, path, device });
            }
        }
        legs.sort_by_key(|leg| leg.number);
        let local = Self::with(best.clone(), legs, outsiders, read_only);
        if !read_only {
            local.note_start(choice.missing, behind, misleads).await?;
        }
        Ok(local)
    }

    /// Writes the set without `missing` members, and whatever legs are `behind` in, before anything is served. A copy that
    /// `misleads` must not stay.
    async fn note_start(
        &self,
        missing: LegSet,
        behind: bool,
        misleads: bool,
    ) -> Result<(), CacheError> {
        let mut superblock = self.superblock.lock().await;
        let membership = &superblock.membership;
        let goes_on_alone = self.members().len() < membership.legs.len();
        if !goes_on_alone && !behind {
            return Ok(());
        }
        if goes_on_alone {
            // Under an id of its own: that it goes on from here the other leg does not know. From now on, whatever is written.
            let left = membership.without(missing).filter(|_| !missing.is_empty());
            superblock.membership = left.unwrap_or_else(|| membership.renewed());
        }
        drop(superblock);
        // Both copies: a crash came between them, or one rotted; the other must not bring a leg back, should this one rot.
        self.attempted.lock().is_unnoted = true;
        let Err(error) = self.note_members().await else { return Ok(()) };
        if misleads || !missing.is_empty() || self.members().len() > 1 {
            return Err(error);
        }
        tracing::warn!(%error, "the cache's start is not noted on its only leg");
        // No log is opened before it is, but where there was never another leg: what is there says all there is to say.
        self.attempted.lock().is_unnoted = goes_on_alone;
        Ok(())
    }
}

/// Another machine's cache is that of another host: the store would take this agent for that one.
fn refuse_other_machine(path: &Path, best: &Superblock, terms: &Terms) -> Result<(), CacheError> {
    match (&best.machine, &terms.machine) {
        (Some(theirs), Some(ours)) if theirs.id != ours.id => Err(CacheError::OtherMachine {
            path: path.into(),
            theirs: theirs.name.clone(),
            host: best.host,
            ours: ours.name.clone(),
        }),
        _ => Ok(()),
    }
}

pub(super) async fn open_leg(
    path: &Path,
    read_only: bool,
    is_alone: bool,
) -> Result<FoundLeg, CacheError> {
    if !path.exists() {
        return Err(CacheError::Missing { path: path.into() });
    }
    let options = OpenOptions { exclusive: !read_only, read_only, ..OpenOptions::default() };
    let device = FileDevice::open(path, &options)?;
    read_leg(path, device, is_alone).await
}

/// True if nothing would be lost: at each path is nothing, or a leg that was never used because its twin's creation was
/// cut short.
pub(super) async fn may_create(paths: &[PathBuf]) -> Result<bool, CacheError> {
    let mut unmade = 0;
    for path in paths {
        match is_unmade(path) {
            Ok(true) => {
                unmade += 1;
                continue;
            }
            Ok(false) => {}
            // A bad sector there does not make it new, nor useless.
            Err(_) => return Ok(false),
        }
        let Ok(FoundLeg { superblock, .. }) = open_leg(path, true, paths.len() < 2).await else {
            return Ok(false);
        };
        // Two writes make it; the store's name is the third.
        let unused = superblock.sequence <= 2 && superblock.store.is_none();
        if !unused || superblock.membership.legs.len() != paths.len() {
            return Ok(false);
        }
    }
    Ok(unmade > 0)
}

/// Both legs on one file or device would be no mirror.
pub(super) fn refuse_same(paths: &[PathBuf]) -> Result<(), CacheError> {
    let [path, twin] = paths else { return Ok(()) };
    let same = match (std::fs::metadata(path), std::fs::metadata(twin)) {
        (Ok(a), Ok(b)) if a.file_type().is_block_device() && b.file_type().is_block_device() => {
            a.rdev() == b.rdev()
        }
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => std::path::absolute(path).ok() == std::path::absolute(twin).ok(),
    };
    if same {
        return Err(CacheError::SameLeg { path: path.clone(), twin: twin.clone() });
    }
    Ok(())
}

/// A leg must have all bytes that the cache uses.
fn refuse_cut_short(
    found: &[FoundLeg],
    best: &Superblock,
    is_member: impl Fn(usize) -> bool,
) -> Result<(), CacheError> {
    let expected = best.geometry.size;
    for (at, FoundLeg { path, device, .. }) in found.iter().enumerate() {
        let capacity = device.info().capacity;
        if capacity >= expected || !is_member(at) {
            continue;
        }
        let path = path.clone();
        return Err(match found.iter().find(|other| other.path != path) {
            Some(FoundLeg { path: twin, .. }) => {
                CacheError::SmallerLeg { path, found: capacity, twin: twin.clone(), expected }
            }
            None => CacheError::Truncated { path, expected, found: capacity },
        });
    }
    Ok(())
}

/// The newer copy of the superblock that can be read, and how both stand to each other.
async fn read_leg(path: &Path, device: Device, is_alone: bool) -> Result<FoundLeg, CacheError> {
    let not_a_cache = |source| CacheError::NotACache { path: path.into(), source };
    if device.info().capacity < 2 * BLOCK_SIZE as u64 {
        return Err(not_a_cache(FormatError::Absent("cache superblock")));
    }
    let read = read_copies(&device);
    let read = match is_alone {
        true => read.await,
        false => tokio::time::timeout(ANSWERS_WITHIN, read).await.unwrap_or_else(|_| {
            let message = format!(
                "no answer within {ANSWERS_WITHIN:?}: see the kernel's log for what is wrong with it"
            );
            Err(device.info().error(DeviceErrorKind::Io, "read", 0, 2 * BLOCK_SIZE as u64, message))
        }),
    };
    let (bytes, unread) = match read {
        Err(error) if error.kind == DeviceErrorKind::OutOfRange => {
            return Err(not_a_cache(FormatError::Absent("cache superblock")));
        }
        other => other?,
    };
    let copies = [0, 1].map(|n| Superblock::decode(&bytes[n * BLOCK_SIZE..(n + 1) * BLOCK_SIZE]));
    let (superblock, agrees, misleads, are_whole) = match copies {
        [Ok(a), Ok(b)] => {
            let agrees = a.membership == b.membership;
            let misleads = !a.membership.has_members_of(&b.membership);
            (if a.sequence >= b.sequence { a } else { b }, agrees, misleads, true)
        }
        [Ok(one), Err(error)] | [Err(error), Ok(one)] => {
            let why = unread.map_or_else(|| error.to_string(), |unread| unread.to_string());
            tracing::warn!(path = %path.display(), why, "one copy of the cache superblock is damaged; the other is used");
            (one, false, false, false)
        }
        [Err(error), Err(_)] => {
            return Err(match unread {
                // It may be whole.
                Some(unread) => unread.into(),
                // With one good copy it is finished: the mark's place is written last.
                None if says_unfinished(&bytes) => CacheError::Unfinished { path: path.into() },
                None => not_a_cache(error),
            });
        }
    };
    Ok(FoundLeg { path: path.into(), device, superblock, agrees, misleads, are_whole })
}

/// Both copies of the superblock. Of one that cannot be read zeros, with the error: a bad sector under the one says nothing of
/// the other.
async fn read_copies(device: &Device) -> Result<(AlignedBuf, Option<DeviceError>), DeviceError> {
    let error = match device.read(0, 2 * BLOCK_SIZE).await {
        Ok(bytes) => return Ok((bytes, None)),
        Err(error) => error,
    };
    if !matches!(error.kind, DeviceErrorKind::Io | DeviceErrorKind::Unreachable) {
        return Err(error);
    }
    let mut bytes = AlignedBuf::zeroed(2 * BLOCK_SIZE);
    let mut unread = Vec::new();
    for (copy, offset) in bytes.chunks_exact_mut(BLOCK_SIZE).zip([0, BLOCK_SIZE as u64]) {
        match device.read(offset, BLOCK_SIZE).await {
            Ok(block) => copy.copy_from_slice(&block),
            Err(error) => unread.push(error),
        }
    }
    match unread.len() {
        0 | 1 => Ok((bytes, unread.pop())),
        _ => Err(error),
    }
}
