//! A disk: its name and lists, its present state, then its snapshots, the newest first.
//!
//! Why so: a snapshot that is deleted meanwhile need not be looked at any more, for what the others and the disk do not hold, too,
//! is garbage. The present state comes first, and is followed through all that is committed to it. Of each snapshot only that is read
//! which the next younger one, or the disk, does not have at the same place: of them all was read that was there when the disk's turn
//! came. That holds as long as the disk goes on from where it was: one that was rolled back may have again what it did not
//! have then, and nothing is compared with it ([`Start::leads_to`]).

use super::damage::{Damage, Part};
use super::lists;
use super::looking::{Looking, Place, Whose};
use super::order::Disk;
use super::progress::{Position, Start, TreeAt};
use super::tree::{self, Ended, Neighbour, Tree};
use blockstore::format::pointer::Pointer;
use blockstore::format::snapshot::Snapshot;
use blockstore::format::vdi::VdiHead;
use blockstore::snapshots::Page;
use blockstore::types::Lsn;
use blockstore::{Result, StoreErrorKind};
use std::time::Duration;

/// Snapshots listed at once.
const PAGE: usize = 256;
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
        let Disk { uuid, slot, depth } = *self.disk;
        Position { depth, slot, disk: uuid, tree }
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

/// Verifies a disk, or goes on with it.
pub(super) async fn verify(
    looking: &mut Looking<'_>,
    disk: &Disk,
    disks: &[Disk],
    resumed: Option<TreeAt>,
) -> Result<()> {
    let Some(head) = looking.head(disk).await? else { return Ok(()) };
    let named = Named { disk, name: looking.name(&head).await? };
    let at = match resumed {
        Some(at) => at,
        None => {
            looking.progress().reach(named.position(None));
            if !lists::verify(looking, &named, &head).await? {
                return Ok(());
            }
            let Some(head) = looking.head(disk).await? else { return Ok(()) };
            TreeAt { start: Start::of(&head), snapshot: None, block: 0 }
        }
    };
    let mut next = match at.snapshot {
        Some(lsn) => Lsn(lsn.0 + 1),
        None => {
            if of_disk(looking, &named, disks, &at).await? == Ended::Gone {
                return Ok(());
            }
            Lsn(at.start.committed.0 + 1)
        }
    };
    let mut above = None;
    loop {
        let (head, page) = before(looking, &named, next).await?;
        let Some(head) = head.filter(|_| !page.is_empty()) else { return Ok(()) };
        for snapshot in page {
            next = snapshot.lsn;
            let tree = Tree {
                named: &named,
                start: &at.start,
                snapshot: Some(snapshot.lsn),
                whose: Whose::Snapshot(snapshot.lsn),
                root: snapshot.root,
                height: snapshot.height,
                size: snapshot.size_bytes,
                neighbour: match above.take() {
                    None => younger(looking, &head, &at.start, snapshot.lsn).await?,
                    above => above,
                }
                .map(|(root, height)| Neighbour {
                    root,
                    height,
                    whose: Some(Whose::Disk(snapshot.lsn)),
                }),
                from: if at.snapshot == Some(snapshot.lsn) { at.block } else { 0 },
            };
            if tree::verify(looking, &tree).await? == Ended::Gone {
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
            Err(_) if look < LOOKS => {
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

/// What a disk was cloned from. It is verified before its clones, and not deleted before them.
async fn origin(
    looking: &mut Looking<'_>,
    head: &VdiHead,
    disks: &[Disk],
) -> Result<Option<Neighbour>> {
    let Some(origin) = head.origin else { return Ok(None) };
    let Some(disk) = disks.iter().find(|disk| disk.uuid == origin.vdi) else { return Ok(None) };
    let Some(head) = looking.head(disk).await? else { return Ok(None) };
    match looking.tree_of(&head, Whose::Snapshot(origin.lsn)).await {
        Ok(found) => Ok(found.map(|(root, height)| Neighbour { root, height, whose: None })),
        Err(error) if error.kind == StoreErrorKind::Closing => Err(error),
        Err(_) => Ok(None),
    }
}

/// The newest snapshots before a point, some of them, with the head that lists them.
async fn before(
    looking: &mut Looking<'_>,
    named: &Named<'_>,
    lsn: Lsn,
) -> Result<(Option<VdiHead>, Vec<Snapshot>)> {
    let page = Page { newest_first: true, beyond: Some(lsn), limit: PAGE };
    for look in 1.. {
        let Some(head) = looking.head(named.disk).await? else { break };
        match looking.snapshots(&head, page).await {
            Ok(found) => return Ok((Some(head), found)),
            Err(error) if error.kind == StoreErrorKind::Closing => return Err(error),
            Err(_) if look < LOOKS => tokio::time::sleep(LOOK_PAUSE).await,
            Err(error) => {
                let words =
                    format!("its snapshots before {lsn}, since they cannot be listed: {error}");
                looking.unverified(named.about(&words));
                break;
            }
        }
    }
    Ok((None, Vec::new()))
}

impl Tree<'_> {
    pub(super) fn place(&self, level: u8, block: u64) -> Place {
        Place::Tree { whose: self.whose, level, block }
    }

    /// Everything before this block is done.
    pub(super) fn reach(&self, looking: &Looking<'_>, block: u64) {
        let at = TreeAt { start: self.start.clone(), snapshot: self.snapshot, block };
        looking.progress().reach(self.named.position(Some(at)));
    }
}
