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
use blockstore::device::file::FileDevice;
use blockstore::device::{Device, DeviceErrorKind, OpenOptions};
use blockstore::types::BLOCK_SIZE;
use serde::{Deserialize, Serialize};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One of two legs that takes longer to give its superblock counts as one that cannot be read. The only one is waited for.
const ANSWERS_WITHIN: Duration = Duration::from_secs(30);

/// How often a start is noted on a leg that gives errors.
const NOTED_TRIES: u32 = 4;

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
            match read_superblock(&device, &path, is_alone).await {
                Ok((superblock, agrees)) => {
                    found.legs.push(FoundLeg { path, device, superblock, agrees });
                }
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
        let choice = choose(&named)?;
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
            local.note_start(choice.missing, behind).await?;
        }
        Ok(local)
    }

    /// Writes the set without `missing` members, and whatever legs are `behind` in, before anything is served.
    async fn note_start(&self, missing: LegSet, behind: bool) -> Result<(), CacheError> {
        let goes_on_alone = self.members().len() < self.superblock().await.membership.legs.len();
        if goes_on_alone {
            // Under an id of its own: that it goes on from here the other leg does not know.
            let change = |superblock: &mut Superblock| {
                let membership = &superblock.membership;
                let left = membership.without(missing).filter(|_| !missing.is_empty());
                superblock.membership = left.unwrap_or_else(|| membership.renewed());
            };
            let mut noted = self.rewrite_superblock(change).await;
            if missing.is_empty() && !behind {
                for _ in 1..NOTED_TRIES {
                    if noted.is_ok() {
                        break;
                    }
                    noted = self.rewrite_superblock(change).await;
                }
                // A leg that takes no superblock takes no log either: the store does then.
                if let Err(error) = std::mem::replace(&mut noted, Ok(())) {
                    tracing::warn!(%error, "the cache's start is not noted on its only leg");
                }
            }
            return noted;
        }
        if behind {
            // A crash came between the copies, or one rotted: the other must not bring a leg back, should this one rot.
            self.rewrite_superblock(|_| ()).await?;
            self.rewrite_superblock(|_| ()).await?;
        }
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
    let (superblock, agrees) = read_superblock(&device, path, is_alone).await?;
    Ok(FoundLeg { path: path.into(), device, superblock, agrees })
}

/// True if nothing would be lost: at each path is nothing, or a leg that was never used because its twin's creation was
/// cut short.
async fn may_create(paths: &[PathBuf]) -> Result<bool, CacheError> {
    let mut unmade = 0;
    for path in paths {
        if is_unmade(path)? {
            unmade += 1;
            continue;
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

/// The newer copy, and whether both are good and name the same members.
async fn read_superblock(
    device: &Device,
    path: &Path,
    is_alone: bool,
) -> Result<(Superblock, bool), CacheError> {
    let not_a_cache = |source| CacheError::NotACache { path: path.into(), source };
    if device.info().capacity < 2 * BLOCK_SIZE as u64 {
        return Err(not_a_cache(FormatError::Absent("cache superblock")));
    }
    let read = device.read(0, 2 * BLOCK_SIZE);
    let read = match is_alone {
        true => read.await,
        false => tokio::time::timeout(ANSWERS_WITHIN, read).await.unwrap_or_else(|_| {
            let message = format!(
                "no answer within {ANSWERS_WITHIN:?}: see the kernel's log for what is wrong with it"
            );
            Err(device.info().error(DeviceErrorKind::Io, "read", 0, 2 * BLOCK_SIZE as u64, message))
        }),
    };
    let bytes = match read {
        Err(error) if error.kind == DeviceErrorKind::OutOfRange => {
            return Err(not_a_cache(FormatError::Absent("cache superblock")));
        }
        other => other?,
    };
    let copies = [0, 1].map(|n| Superblock::decode(&bytes[n * BLOCK_SIZE..(n + 1) * BLOCK_SIZE]));
    match copies {
        [Ok(a), Ok(b)] => {
            let agrees = a.membership == b.membership;
            Ok((if a.sequence >= b.sequence { a } else { b }, agrees))
        }
        [Ok(one), Err(error)] | [Err(error), Ok(one)] => {
            tracing::warn!(path = %path.display(), %error, "one copy of the cache superblock is damaged; the other is used");
            Ok((one, false))
        }
        // With one good copy it is finished: the mark's place is written last.
        [Err(_), Err(_)] if says_unfinished(&bytes) => {
            Err(CacheError::Unfinished { path: path.into() })
        }
        [Err(error), Err(_)] => Err(not_a_cache(error)),
    }
}
