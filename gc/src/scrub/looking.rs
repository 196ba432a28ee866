//! What a scrub looks at, with a second look at what is not what it should be.
//!
//! The second look. A block did not match its pointer: it is damaged, or it is in use for something else since the pointer was
//! read. So the way from the present root to the place of the pointer is walked, reading the device only. If it ends in another
//! pointer, or in none, the block was replaced. If it ends in the same one (address, birth and checksum: no two writes of a disk
//! have the same), the block is read again, and then the way is walked once more. Was it the same before and after, then it was
//! reachable throughout, and nothing reachable is ever written over: the block is damaged. Heads are read from the
//! device, and a block is freed only after the head that does not lead to it is durable (rule C3): so the device's heads never
//! lead to what is in use for something else.
//!
//! The place of a tree that was the disk's own when it was read is looked for in the oldest snapshot that was made since, and without
//! one in the disk as it is: what was reachable by the former tree is reachable there, or not at all.

use super::damage::{Damage, Part};
use super::order::Disk;
use super::progress::{ScrubProgress, Start};
use super::reading::{Bad, Region, Silent};
use crate::check::{VDI_ADVICE, is_root};
use crate::fetch::Pace;
use blockstore::format::node::{NODE_SHIFT, Node, entry_span, tree_span};
use blockstore::format::pointer::Pointer;
use blockstore::format::snapshot::Snapshot;
use blockstore::format::vdi::VdiHead;
use blockstore::sabotage::{self, Bug};
use blockstore::slot::{Content, View};
use blockstore::snapshots::Page;
use blockstore::tree::Reader;
use blockstore::types::Lsn;
use blockstore::{Inspection, Result, Store, StoreError, StoreErrorKind, TableProblem};
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::HashSet;
use std::time::Duration;
use uuid::Uuid;

/// Blocks read at once: 1 MiB, one request where they lie together.
pub(super) const BATCH: usize = 256;

/// How often it is tried to find out about a block that keeps changing its place.
const LOOKS: u32 = 8;
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// Between two looks at a record that is damaged, or not given: what is being written is whole the next time.
const RECORD_PAUSE: Duration = Duration::from_secs(1);
const RECORD_LOOKS: u32 = 3;
/// Records one after the other that are not given, after which the rest of the registry is given up.
const BAD_RECORDS: u32 = 16;

/// Blocks that were not verified of which the log tells.
const SAID_MAX: u64 = 100;

/// Where something that a pointer names belongs in a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The block with its name.
    Name,
    /// A block of the list of snapshots; leaves at level 1, and the first leaf below it.
    List { level: u8, leaf: u64 },
    /// A node of a tree, data at level 0, and the first block of the disk below it.
    Tree { whose: Whose, level: u8, block: u64 },
}

/// Which tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Whose {
    /// That of the snapshot at this LSN.
    Snapshot(Lsn),
    /// The disk's, as it was when it had committed so far.
    Disk(Lsn),
}

/// What leads to a place now.
enum Present {
    At(Pointer),
    /// The disk or the snapshot is gone.
    Gone,
    /// A part of the way could not be read.
    Unknown(String),
    /// The device does not answer for a part of the way.
    NoAnswer(String),
}

impl Present {
    /// A part of the way could not be had, with this error.
    fn of(error: &StoreError) -> Self {
        match error.kind {
            StoreErrorKind::Unreachable => Self::NoAnswer(error.to_string()),
            _ => Self::Unknown(error.to_string()),
        }
    }
}

/// Outcome of a second look.
#[derive(Debug)]
pub(super) enum Verdict {
    /// It is what it should be.
    Good(Bytes),
    /// This is in its place; perhaps a hole.
    Replaced(Pointer),
    /// The disk or the snapshot is gone.
    Gone,
    Damaged(StoreError),
    Unknown(String),
}

/// True if two pointers name the same write.
pub(super) fn same(a: Pointer, b: Pointer) -> bool {
    (a.gba, a.birth, a.crc) == (b.gba, b.birth, b.crc)
}

pub(super) struct Looking<'a> {
    /// A bad sector is what is looked for: nobody is to take it for an outage.
    pub(super) store: Inspection<'a>,
    pub(super) reader: Reader,
    pub(super) rate: Option<u64>,
    pub(super) pace: Pace,
    pub(super) progress: &'a ScrubProgress,
    pub(super) silent: Mutex<Silent>,
    pub(super) region: Region,
    /// Disks whose records were damaged when they were needed.
    lost: Mutex<HashSet<Uuid>>,
}

impl<'a> Looking<'a> {
    pub(super) fn new(store: &'a Store, rate: Option<u64>, progress: &'a ScrubProgress) -> Self {
        let store = store.inspect();
        let (reader, rate) = (store.reader(), rate.filter(|rate| *rate > 0));
        let (silent, region, lost) = (Mutex::default(), Region::default(), Mutex::default());
        Self { store, reader, rate, pace: Pace::new(rate), progress, silent, region, lost }
    }

    pub(super) fn progress(&self) -> &'a ScrubProgress {
        self.progress
    }

    pub(super) fn found(&self, damage: Damage) {
        self.progress.found(damage);
    }

    /// Notes a block of which it was not found out.
    pub(super) fn unverified(&self, what: String) {
        self.progress.note(|so_far| {
            if so_far.unverified < SAID_MAX {
                tracing::info!("scrub: not verified: {what}");
            }
            so_far.unverified += 1;
            so_far.unverified_last = Some(what);
        });
    }

    /// What is wrong with the tables; `Unreachable` if the device does not answer for a part of them.
    pub(super) async fn tables(&self) -> Result<Vec<TableProblem>> {
        // What it does not give counts as wrong with them.
        self.until_it_gives().await;
        self.patiently(|| self.store.verify_tables()).await
    }

    pub(super) async fn registry(&self) -> Result<Vec<(u32, View<VdiHead>)>> {
        match self.tried_again(|| self.store.scan_vdis()).await {
            Err(error)
                if matches!(error.kind, StoreErrorKind::Device | StoreErrorKind::Unreachable) =>
            {
                self.slot_by_slot().await
            }
            found => found,
        }
    }

    /// The registry, without the records that the device does not give.
    async fn slot_by_slot(&self) -> Result<Vec<(u32, View<VdiHead>)>> {
        let (mut found, mut bad) = (Vec::new(), 0);
        for slot in 0..self.store.store().superblock().geometry.vdi_slots {
            match self.record(slot).await? {
                Some(view) if matches!(view.content, Content::Unused) => break,
                Some(view) => {
                    bad = 0;
                    found.push((slot, view));
                }
                None => bad += 1,
            }
            if bad == BAD_RECORDS {
                self.unverified(format!("the disks of the VDI registry behind slot {slot}"));
                break;
            }
        }
        Ok(found)
    }

    /// A record of the registry; none if it is damaged, or the device does not give it: that is told. One for which the device does
    /// not answer is not verified, and is not asked for again.
    pub(super) async fn record(&self, slot: u32) -> Result<Option<View<VdiHead>>> {
        if self.silent.lock().records.contains(&slot) {
            return Ok(None);
        }
        let mut looks = 0;
        let why = loop {
            let why = match self.tried_again(|| self.store.read_vdi_slot(slot)).await {
                Ok(view) => {
                    let Content::Damaged(damage) = &view.content else { return Ok(Some(view)) };
                    format!("is damaged: {damage}")
                }
                Err(error) if error.kind == StoreErrorKind::Device => {
                    "cannot be read: the device reports an error there".to_owned()
                }
                Err(error) if error.kind == StoreErrorKind::Unreachable => {
                    self.silent.lock().records.insert(slot);
                    self.unverified(format!("the disk of the VDI record in slot {slot}: {error}"));
                    return Ok(None);
                }
                Err(error) => return Err(error),
            };
            looks += 1;
            if looks == RECORD_LOOKS {
                break why;
            }
            tokio::time::sleep(RECORD_PAUSE).await;
        };
        let at = self.store.store().superblock().geometry.vdi_slot(slot);
        self.found(Damage {
            part: Part::Record,
            vdi: None,
            name: None,
            snapshot: None,
            offset: None,
            bytes: None,
            block: Some(at.0),
            what: format!("the VDI record in slot {slot} (block {at}) {why}"),
            advice: VDI_ADVICE.into(),
        });
        Ok(None)
    }

    /// A disk as the device has it now; none if it is gone, or its record cannot be had by now: then it counts as not verified, once.
    pub(super) async fn head(&self, disk: &Disk) -> Result<Option<VdiHead>> {
        let Some(view) = self.record(disk.slot).await? else {
            let told = self.silent.lock().records.contains(&disk.slot);
            if self.lost.lock().insert(disk.uuid) && !told {
                let Disk { uuid, slot, .. } = disk;
                self.unverified(format!("disk {uuid}: its record in slot {slot} is damaged"));
            }
            return Ok(None);
        };
        let head = view.record().filter(|head| head.uuid == disk.uuid && is_root(head));
        Ok(head.cloned())
    }

    /// True if its record could not be read once in this run.
    pub(super) fn has_lost(&self, disk: &Disk) -> bool {
        self.lost.lock().contains(&disk.uuid)
    }

    /// The name, or the UUID of a disk whose name cannot be read.
    pub(super) async fn name(&self, head: &VdiHead) -> Result<Option<String>> {
        match self.tried_again(|| self.store.read_name_block(head)).await {
            Ok(name) => Ok(name.ok()),
            Err(error) if error.kind == StoreErrorKind::Closing => Err(error),
            Err(_) => Ok(None),
        }
    }

    /// A page of a disk's snapshots, if they can be listed.
    pub(super) async fn snapshots(&self, head: &VdiHead, page: Page) -> Result<Vec<Snapshot>> {
        self.tried_again(|| self.reader.snapshot_page(&head.snapshots, page)).await
    }

    /// Finds out whether a block that was not had is damaged.
    pub(super) async fn second_look(
        &mut self,
        disk: &Disk,
        place: Place,
        pointer: Pointer,
        bad: Bad,
    ) -> Result<Verdict> {
        if let Bad::NoAnswer(error) = bad {
            return Ok(Verdict::Unknown(error.to_string()));
        }
        if sabotage::on(Bug::ScrubBelievesFirstLook)
            && let Bad::Mismatch(error) = bad
        {
            return Ok(Verdict::Damaged(error));
        }
        let (mut why, mut pause) = (bad.error().to_string(), LOOK_PAUSE);
        for _ in 0..LOOKS {
            match self.present(disk, place, Some(pointer)).await? {
                Present::Gone => return Ok(Verdict::Gone),
                Present::At(now) if !same(now, pointer) => return Ok(Verdict::Replaced(now)),
                Present::At(_) => {
                    let found = match self.read(&[pointer]).await?.remove(0) {
                        Ok(block) => return Ok(Verdict::Good(block)),
                        Err(Bad::NoAnswer(error)) => {
                            return Ok(Verdict::Unknown(error.to_string()));
                        }
                        Err(Bad::Mismatch(error) | Bad::Unreadable(error)) => error,
                    };
                    if let Present::At(after) = self.present(disk, place, Some(pointer)).await?
                        && same(after, pointer)
                    {
                        return Ok(Verdict::Damaged(found));
                    }
                }
                Present::Unknown(words) => why = words,
                // It is not that something keeps changing.
                Present::NoAnswer(words) => return Ok(Verdict::Unknown(words)),
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        Ok(Verdict::Unknown(why))
    }

    /// What leads to a place. If `wanted` does, that is enough: where the list of snapshots cannot be read, the disk itself may have it.
    async fn present(
        &mut self,
        disk: &Disk,
        place: Place,
        wanted: Option<Pointer>,
    ) -> Result<Present> {
        let Some(head) = self.head(disk).await? else { return Ok(Present::Gone) };
        match place {
            Place::Name => Ok(Present::At(head.meta)),
            Place::List { level, leaf } => {
                let (root, height) = (head.snapshots.root, head.snapshots.height);
                let child = |level: u8| (leaf >> (NODE_SHIFT * (u32::from(level) - 2))) as u8;
                self.descend(root, height, level, &child).await
            }
            Place::Tree { whose, level, block } => {
                let (tree, unlisted) = match (self.tree_of(&head, whose).await, whose) {
                    (Ok(Some(tree)), _) => (tree, None),
                    (Ok(None), _) => return Ok(Present::Gone),
                    (Err(error), _) if error.kind == StoreErrorKind::Closing => return Err(error),
                    (Err(error), Whose::Disk(_)) => ((head.root, head.height), Some(error)),
                    (Err(error), _) => return Ok(Present::of(&error)),
                };
                let (root, height) = tree;
                let child = |level: u8| (block / entry_span(level)) as u8;
                let found = match block >= tree_span(height) {
                    true => Present::At(Pointer::SPARSE),
                    false => self.descend(root, height, level, &child).await?,
                };
                match (unlisted, &found) {
                    (Some(_), Present::At(now)) if wanted.is_some_and(|it| same(it, *now)) => {
                        Ok(found)
                    }
                    (Some(error), _) => Ok(Present::of(&error)),
                    (None, _) => Ok(found),
                }
            }
        }
    }

    /// The root of a tree, and its height: of one that was the disk's, what holds now all that is left of it. A list for a block of
    /// which the device does not answer is not searched again for the same.
    pub(super) async fn tree_of(
        &self,
        head: &VdiHead,
        whose: Whose,
    ) -> Result<Option<(Pointer, u8)>> {
        let known = self.silent.lock().search(head.uuid, whose);
        if let Some(error) = known {
            return Err(error);
        }
        let found = self.listed(head, whose).await;
        if matches!(&found, Err(error) if error.kind == StoreErrorKind::Unreachable) {
            self.silent.lock().add_search(head.uuid, whose);
        }
        found
    }

    async fn listed(&self, head: &VdiHead, whose: Whose) -> Result<Option<(Pointer, u8)>> {
        let found = match whose {
            Whose::Snapshot(lsn) => {
                let find = || self.reader.find_snapshot(&head.snapshots, lsn);
                let Some((_, found)) = self.tried_again(find).await? else { return Ok(None) };
                Some(found)
            }
            Whose::Disk(committed) => {
                let page = Page { newest_first: false, beyond: Some(committed), limit: 1 };
                self.snapshots(head, page).await?.into_iter().next()
            }
        };
        Ok(Some(found.map_or((head.root, head.height), |found| (found.root, found.height))))
    }

    /// The pointer at `level`, found by the way from a root whose node is at level `height`.
    async fn descend(
        &mut self,
        root: Pointer,
        height: u8,
        level: u8,
        child: &(dyn Fn(u8) -> u8 + Sync),
    ) -> Result<Present> {
        let mut at = root;
        // A place above the root is of a tree that was higher.
        if height < level {
            return Ok(Present::At(Pointer::SPARSE));
        }
        for above in (level + 1..=height).rev() {
            if at.is_sparse() {
                break;
            }
            let node = match self.read(&[at]).await?.remove(0) {
                Ok(block) => Node::decode(&block),
                Err(Bad::NoAnswer(error)) => return Ok(Present::NoAnswer(error.to_string())),
                Err(bad) => return Ok(Present::Unknown(bad.error().to_string())),
            };
            match node {
                Ok(node) => at = node.get(child(above)),
                Err(damage) => return Ok(Present::Unknown(damage.to_string())),
            }
        }
        Ok(Present::At(at))
    }

    /// A node of another tree, to compare with; none if it cannot be had.
    pub(super) async fn node_beside(
        &mut self,
        disk: &Disk,
        start: &Start,
        place: Option<Place>,
        pointer: Pointer,
    ) -> Result<Option<Node>> {
        let decoded = |block: Bytes| Node::decode(&block).ok();
        if let Ok(block) = self.read(&[pointer]).await?.remove(0) {
            return Ok(decoded(block));
        }
        // The disk's tree goes on changing.
        let Some(place) = place else { return Ok(None) };
        let Present::At(now) = self.present(disk, place, None).await? else { return Ok(None) };
        if !self.head(disk).await?.is_some_and(|head| start.leads_to(&head)) {
            return Ok(None);
        }
        if now.is_sparse() || same(now, pointer) {
            return Ok(None);
        }
        Ok(self.read(&[now]).await?.remove(0).ok().and_then(decoded))
    }
}
