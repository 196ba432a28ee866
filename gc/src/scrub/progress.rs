//! How far a scrub is, and what it found: read while it runs, and kept across restarts.

use super::damage::{DAMAGE_MAX, Damage};
use super::passed::{Missed, Passed, Source};
use blockstore::format::pointer::Pointer;
use blockstore::format::vdi::VdiHead;
use blockstore::types::{Generation, Lsn};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// What a scrub has done so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scrubbed {
    /// Disks that were gone through.
    pub disks: u64,
    /// Snapshots of them.
    pub snapshots: u64,
    /// Blocks of maps, lists and names that are what they should be.
    pub metadata_blocks: u64,
    /// Blocks of content that are.
    pub data_blocks: u64,
    /// Bytes read for it.
    pub read_bytes: u64,
    /// Blocks that were not what they were to be, since something else had taken their place meanwhile.
    pub replaced: u64,
    /// Blocks of which it could not be found out: they never were the same for long enough, or the device does not answer for
    /// them, or for what leads to them. What lies below a block of a map is not counted.
    pub unverified: u64,
    /// The last of those, in words.
    pub unverified_last: Option<String>,
    /// What is damaged.
    pub damage: Vec<Damage>,
    /// Damage beyond that.
    pub damage_not_listed: u64,
}

impl Scrubbed {
    /// Damage that was found, listed or not.
    #[must_use]
    pub fn damaged(&self) -> u64 {
        self.damage.len() as u64 + self.damage_not_listed
    }
}

/// A disk as it was when its turn came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Start {
    /// Its snapshots up to here are to be verified; what is younger holds nothing else that was there then.
    pub(crate) committed: Lsn,
    attachment: Generation,
    log: Option<Uuid>,
    root: Pointer,
}

impl Start {
    pub(crate) fn of(head: &VdiHead) -> Self {
        let VdiHead { committed, attachment, log_id, root, .. } = *head;
        Self { committed, attachment, log: log_id, root }
    }

    /// True if nobody has rolled the disk back since.
    pub(crate) fn leads_to(&self, head: &VdiHead) -> bool {
        let same_log = self.log.is_some() && self.log == head.log_id;
        same_log || (self.attachment == head.attachment && self.root == head.root)
    }
}

/// A tree that is being verified.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TreeAt {
    pub(crate) start: Start,
    /// None: the disk as it is.
    pub(crate) snapshot: Option<Lsn>,
    /// That snapshot's place in the list.
    #[serde(default)]
    pub(crate) place: Option<u64>,
    /// Everything before this block of the disk is done.
    pub(crate) block: u64,
    /// Snapshots of the disk that were passed over before.
    #[serde(default)]
    pub(crate) missed: Missed,
}

/// How far a scrub is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The disk that is being verified.
    pub disk: Uuid,
    pub(crate) tree: Option<TreeAt>,
}

impl Position {
    /// The snapshot of the disk that is being verified; none: the disk as it is.
    #[must_use]
    pub fn snapshot(&self) -> Option<u64> {
        self.tree.as_ref()?.snapshot.map(|lsn| lsn.0)
    }

    /// The block of the disk that comes next.
    #[must_use]
    pub fn block(&self) -> u64 {
        self.tree.as_ref().map_or(0, |tree| tree.block)
    }
}

/// What a scrub needs to go on, by this process or the next.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// None: no disk was begun.
    pub position: Option<Position>,
    /// What was done until then.
    pub scrubbed: Scrubbed,
    /// Disks whose turn has been.
    #[serde(default)]
    pub(crate) passed: Passed,
}

/// How far a scrub is; may be read while it runs.
#[derive(Debug, Default)]
pub struct ScrubProgress {
    now: Mutex<Saved>,
    /// As of the position: what was done since is done again if the scrub is cut off.
    kept: Mutex<Saved>,
    waiting: Mutex<Option<String>>,
}

impl ScrubProgress {
    /// From where an earlier one was cut off.
    #[must_use]
    pub fn from(saved: Saved) -> Self {
        Self { now: Mutex::new(saved.clone()), kept: Mutex::new(saved), waiting: Mutex::default() }
    }

    /// What was done so far, and where it is.
    #[must_use]
    pub fn saved(&self) -> Saved {
        self.now.lock().clone()
    }

    /// As of the last position: from there it can go on.
    #[must_use]
    pub fn kept(&self) -> Saved {
        self.kept.lock().clone()
    }

    /// Why it does not go on just now.
    #[must_use]
    pub fn waiting(&self) -> Option<String> {
        self.waiting.lock().clone()
    }

    pub(crate) fn wait_for(&self, what: Option<String>) {
        *self.waiting.lock() = what;
    }

    pub(crate) fn note(&self, change: impl FnOnce(&mut Scrubbed)) {
        change(&mut self.now.lock().scrubbed);
    }

    pub(crate) fn found(&self, damage: Damage) {
        self.note(|so_far| {
            // A scrub that goes on where it was cut off may meet it again.
            if so_far.damage.contains(&damage) {
                return;
            }
            if so_far.damage.len() == DAMAGE_MAX {
                so_far.damage_not_listed += 1;
                return;
            }
            tracing::warn!(
                part = damage.part.as_str(),
                vdi = damage.name.as_deref(),
                snapshot = damage.snapshot,
                offset = damage.offset,
                block = damage.block,
                "scrub: {}; {}",
                damage.what,
                damage.advice
            );
            so_far.damage.push(damage);
        });
    }

    /// All before this is done.
    pub(crate) fn reach(&self, position: Position) {
        let mut now = self.now.lock();
        now.position = Some(position);
        *self.kept.lock() = now.clone();
    }

    /// A disk's turn is over. `source`: how much of it was gone through, if clones hang on it.
    pub(crate) fn pass(&self, slot: u32, source: Option<Source>) {
        let mut now = self.now.lock();
        now.scrubbed.disks += 1;
        now.passed.add(slot, source);
        *self.kept.lock() = now.clone();
    }

    pub(crate) fn has_passed(&self, slot: u32) -> bool {
        self.now.lock().passed.has(slot)
    }

    /// True if all that this snapshot holds was gone through in this pass.
    pub(crate) fn has_read(&self, vdi: Uuid, snapshot: Lsn) -> bool {
        self.now.lock().passed.has_read(vdi, snapshot)
    }
}
