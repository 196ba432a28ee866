//! A disk: its name and lists, its present state, then its snapshots, the newest first.
//!
//! Why so: a snapshot that is deleted meanwhile need not be looked at any more, for what the others and the disk do not hold, too,
//! is garbage. The present state comes first, and is followed through all that is committed to it. Of each snapshot only that is read
//! which the next younger one, or the disk, does not have at the same place: of them all was read that was there when the disk's turn
//! came. That holds as long as the disk goes on from where it was: one that was rolled back may have again what it did not
//! have then, and nothing is compared with it ([`Start::leads_to`]). Nor with a snapshot that could not be listed in its turn, if it can
//! be by now ([`Missed`]).

use super::damage::{Damage, Part};
use super::lists;
use super::looking::{Looking, Place, Whose};
use super::order::Disk;
use super::passed::{Missed, Source};
use super::progress::{Position, Start, TreeAt};
use super::snapshots::{Next, Older};
use super::tree::{self, Ended, Neighbour, Tree};
use blockstore::format::pointer::Pointer;
use blockstore::format::vdi::VdiHead;
use blockstore::types::Lsn;
use blockstore::{Result, StoreErrorKind};
use std::time::Duration;

/// How often a list is read that changes while it is.
const LOOKS: u32 = 8;
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// A disk with the name by which people know it.
pub(super) struct Named<'d> {
    pub(super) disk: &'d Disk,
    name: Option<String>,
}

impl Named<'_> {
    pub(super) fn about(&self, words: &str) -> String {
        let name = self.name.as_deref().unwrap_or("unnamed");
        format!("VDI '{name}' ({}): {words}", self.disk.uuid)
    }

    pub(super) fn position(&self, tree: Option<TreeAt>) -> Position {
        Position { disk: self.disk.uuid, tree }
    }

    /// Tells of a damaged block. `range`: the snapshot, and what of it cannot be read, in bytes.
    pub(super) fn found(
        &self,
        looking: &Looking<'_>,
        part: Part,
        range: Option<(Option<Lsn>, u64, u64)>,
        pointer: Pointer,
        what: String,
        advice: &str,
    ) {
        looking.found(Damage {
            part,
            vdi: Some(self.disk.uuid),
            name: self.name.clone(),
            snapshot: range.and_then(|(snapshot, ..)| Some(snapshot?.0)),
            offset: range.map(|(_, offset, _)| offset),
            bytes: range.map(|(_, _, bytes)| bytes),
            block: Some(pointer.gba.0),
            what,
            advice: advice.into(),
        });
    }
}

/// Verifies a disk, or goes on with it; returns how much of it was gone through, unless it is gone.
pub(super) async fn verify(
    looking: &mut Looking<'_>,
    disk: &Disk,
    disks: &[Disk],
    resumed: Option<TreeAt>,
) -> Result<Option<Source>> {
    let Some(head) = looking.head(disk).await? else { return Ok(None) };
    let named = Named { disk, name: looking.name(&head).await? };
    let at = match resumed {
        Some(at) => at,
        None => {
            looking.progress().reach(named.position(None));
            if !lists::verify(looking, &named, &head).await? {
                return Ok(None);
            }
            let Some(head) = looking.head(disk).await? else { return Ok(None) };
            let (start, missed) = (Start::of(&head), Missed::default());
            TreeAt { start, snapshot: None, place: None, block: 0, missed }
        }
    };
    if at.snapshot.is_none() && of_disk(looking, &named, disks, &at).await? == Ended::Gone {
        return Ok(None);
    }
    let mut older = Older::from(&at);
    if !of_snapshots(looking, &named, &at, &mut older).await? {
        return Ok(None);
    }
    let (committed, missed) = (at.start.committed, older.missed);
    Ok(Some(Source { vdi: disk.uuid, committed, missed }))
}

/// Its snapshots of before; false if the disk is gone.
async fn of_snapshots(
    looking: &mut Looking<'_>,
    named: &Named<'_>,
    at: &TreeAt,
    older: &mut Older,
) -> Result<bool> {
    let mut above = None;
    loop {
        let (head, leaf) = match older.next(looking, named).await? {
            Next::Some(head, leaf) => (head, leaf),
            Next::End => return Ok(true),
            Next::Gone => return Ok(false),
        };
        for (place, snapshot) in leaf {
            older.reach(place, snapshot.lsn);
            // What is younger may be one that was passed over.
            let all = older.missed.is_empty();
            let beside = match above.take() {
                None if all => younger(looking, &head, &at.start, snapshot.lsn).await?,
                above => above,
            };
            let whose = all.then_some(Whose::Disk(snapshot.lsn));
            let tree = Tree {
                named,
                start: &at.start,
                snapshot: Some((place, snapshot.lsn)),
                missed: &older.missed,
                whose: Whose::Snapshot(snapshot.lsn),
                root: snapshot.root,
                height: snapshot.height,
                size: snapshot.size_bytes,
                neighbour: beside.map(|(root, height)| Neighbour { root, height, whose }),
                from: if at.snapshot == Some(snapshot.lsn) { at.block } else { 0 },
            };
            if tree::verify(looking, &tree).await? == Ended::Gone {
                if looking.has_lost(named.disk) {
                    // It may be there all the same.
                    older.missed.some();
                }
                // Not all of it was read: the next is to be compared with what is there.
                break;
            }
            looking.progress().note(|so_far| so_far.snapshots += 1);
            above = Some((snapshot.root, snapshot.height));
        }
    }
}

/// What comes after a snapshot: the next younger one, or the disk, if it still goes on from where it was.
async fn younger(
    looking: &mut Looking<'_>,
    head: &VdiHead,
    start: &Start,
    lsn: Lsn,
) -> Result<Option<(Pointer, u8)>> {
    if !start.leads_to(head) {
        return Ok(None);
    }
    match looking.tree_of(head, Whose::Disk(lsn)).await {
        Err(error) if error.kind == StoreErrorKind::Closing => Err(error),
        found => Ok(found.ok().flatten()),
    }
}

/// Its present state, followed from the one when its turn came.
async fn of_disk(
    looking: &mut Looking<'_>,
    named: &Named<'_>,
    disks: &[Disk],
    at: &TreeAt,
) -> Result<Ended> {
    let whose = Whose::Disk(at.start.committed);
    for look in 1.. {
        let Some(head) = looking.head(named.disk).await? else { return Ok(Ended::Gone) };
        let (root, height) = match looking.tree_of(&head, whose).await {
            Ok(Some(tree)) => tree,
            Ok(None) => return Ok(Ended::Gone),
            Err(error) if error.kind == StoreErrorKind::Closing => return Err(error),
            // What does not answer does not change, either.
            Err(error) if error.kind != StoreErrorKind::Unreachable && look < LOOKS => {
                tokio::time::sleep(LOOK_PAUSE).await;
                continue;
            }
            // That its snapshots cannot be listed is told when their turn comes.
            Err(_) => (head.root, head.height),
        };
        let neighbour = origin(looking, &head, disks).await?;
        let tree = Tree {
            named,
            start: &at.start,
            snapshot: None,
            missed: &at.missed,
            whose,
            root,
            height,
            size: head.size_bytes,
            neighbour,
            from: at.block,
        };
        return tree::verify(looking, &tree).await;
    }
    Ok(Ended::Gone)
}

/// What a disk was cloned from, if it was verified before: it is not deleted before its clones.
async fn origin(
    looking: &mut Looking<'_>,
    head: &VdiHead,
    disks: &[Disk],
) -> Result<Option<Neighbour>> {
    let Some(origin) = head.origin else { return Ok(None) };
    if !looking.progress().has_read(origin.vdi, origin.lsn) {
        return Ok(None);
    }
    let Some(disk) = disks.iter().find(|disk| disk.uuid == origin.vdi) else { return Ok(None) };
    let Some(head) = looking.head(disk).await? else { return Ok(None) };
    match looking.tree_of(&head, Whose::Snapshot(origin.lsn)).await {
        Ok(found) => Ok(found.map(|(root, height)| Neighbour { root, height, whose: None })),
        Err(error) if error.kind == StoreErrorKind::Closing => Err(error),
        Err(_) => Ok(None),
    }
}

impl Tree<'_> {
    pub(super) fn lsn(&self) -> Option<Lsn> {
        self.snapshot.map(|(_, lsn)| lsn)
    }

    pub(super) fn place(&self, level: u8, block: u64) -> Place {
        Place::Tree { whose: self.whose, level, block }
    }

    /// Everything before this block is done.
    pub(super) fn reach(&self, looking: &Looking<'_>, block: u64) {
        let at = TreeAt {
            start: self.start.clone(),
            snapshot: self.lsn(),
            place: self.snapshot.map(|(place, _)| place),
            block,
            missed: self.missed.clone(),
        };
        looking.progress().reach(self.named.position(Some(at)));
    }
}
