//! A disk's snapshots, the newest first: leaf by leaf of their list, and on behind what of it cannot be had.
//!
//! By places, not by LSNs: to find an LSN, leaves all over the list are read, of which one may be damaged.

use super::disk::Named;
use super::lists::{Had, Visit, had};
use super::looking::{Looking, Place};
use super::passed::Missed;
use super::progress::{Start, TreeAt};
use blockstore::Result;
use blockstore::format::node::{NODE_SHIFT, Node};
use blockstore::format::snapshot::{LEAF_SNAPSHOTS, Snapshot, snapshots_span};
use blockstore::format::vdi::{SnapshotIndex, VdiHead};
use blockstore::snapshots::decode_leaf;
use blockstore::types::Lsn;

/// How far the list was gone through.
pub(super) struct Older {
    /// Only those before this place are still to come; none: all.
    place: Option<u64>,
    /// And before this LSN.
    lsn: Lsn,
    /// Between that one and the next there may be some that cannot be listed.
    gap: bool,
    /// What was passed over so far.
    pub(super) missed: Missed,
}

/// What comes next.
pub(super) enum Next {
    /// With their places, and the head that lists them.
    Some(Box<VdiHead>, Vec<(u64, Snapshot)>),
    End,
    /// There is no disk any more, or its record cannot be read.
    Gone,
}

/// A leaf, by its number.
enum Sought {
    Leaf(u64, Vec<(u64, Snapshot)>),
    Nothing,
    Gone,
}

impl Older {
    /// Those that were there when the disk's turn came.
    pub(super) fn than(start: &Start) -> Self {
        let lsn = Lsn(start.committed.0 + 1);
        Self { place: None, lsn, gap: false, missed: Missed::default() }
    }

    /// From where a pass was cut off.
    pub(super) fn from(at: &TreeAt) -> Self {
        let this = Self { missed: at.missed.clone(), ..Self::than(&at.start) };
        match at.snapshot {
            Some(lsn) => {
                Self { place: at.place.map(|place| place + 1), lsn: Lsn(lsn.0 + 1), ..this }
            }
            None => this,
        }
    }

    /// The turn of a snapshot has come: it need not be listed any more.
    pub(super) fn reach(&mut self, place: u64, lsn: Lsn) {
        if std::mem::take(&mut self.gap) {
            self.missed.between(lsn, self.lsn);
        }
        (self.place, self.lsn) = (Some(place), lsn);
    }

    /// Some of those that come next.
    pub(super) async fn next(
        &mut self,
        looking: &mut Looking<'_>,
        named: &Named<'_>,
    ) -> Result<Next> {
        loop {
            let Some(head) = looking.head(named.disk).await? else { return Ok(Next::Gone) };
            let end = self.place.unwrap_or(head.snapshots.made);
            let sought = match end.checked_sub(1) {
                Some(last) => self.seek(looking, named, &head.snapshots, last).await?,
                None => Sought::Nothing,
            };
            let (number, mut found) = match sought {
                Sought::Leaf(number, found) => (number, found),
                Sought::Gone => return Ok(Next::Gone),
                Sought::Nothing => {
                    if std::mem::take(&mut self.gap) {
                        self.missed.between(Lsn(0), self.lsn);
                    }
                    return Ok(Next::End);
                }
            };
            found.retain(|(place, snapshot)| *place < end && snapshot.lsn < self.lsn);
            if !found.is_empty() {
                found.reverse();
                return Ok(Next::Some(Box::new(head), found));
            }
            self.place = Some(number * LEAF_SNAPSHOTS);
        }
    }

    /// The nearest leaf that can be had, at that of a place or before it.
    async fn seek(
        &mut self,
        looking: &mut Looking<'_>,
        named: &Named<'_>,
        index: &SnapshotIndex,
        place: u64,
    ) -> Result<Sought> {
        let leaf = place / LEAF_SNAPSHOTS;
        let mut stack = vec![Visit { pointer: index.root, level: index.height, leaf: 0 }];
        while let Some(visit) = stack.pop() {
            if visit.pointer.is_sparse() {
                continue;
            }
            let at = Place::List { level: visit.level, leaf: visit.leaf };
            let first = looking.read(&[visit.pointer]).await?.remove(0);
            let block = match had(looking, named, at, visit.pointer, first).await? {
                Had::Block(block) => block,
                Had::Nothing => continue,
                Had::Gone => return Ok(Sought::Gone),
                Had::Damaged(why) | Had::Unknown(why) => {
                    self.miss(looking, named, &visit, &why);
                    continue;
                }
            };
            if visit.level <= 1 {
                let first = visit.leaf * LEAF_SNAPSHOTS;
                match decode_leaf(&block) {
                    Ok(found) => {
                        let found = found.into_iter().map(|(n, snapshot)| (first + n, snapshot));
                        return Ok(Sought::Leaf(visit.leaf, found.collect()));
                    }
                    Err(why) => self.miss(looking, named, &visit, &why),
                }
                continue;
            }
            match Node::decode(&block) {
                Ok(node) => {
                    let below = below(&visit, &node);
                    stack.extend(below.into_iter().filter(|visit| visit.leaf <= leaf));
                }
                Err(why) => self.miss(looking, named, &visit, &why.to_string()),
            }
        }
        Ok(Sought::Nothing)
    }

    fn miss(&mut self, looking: &Looking<'_>, named: &Named<'_>, visit: &Visit, why: &str) {
        self.gap = true;
        let first = visit.leaf * LEAF_SNAPSHOTS;
        let last = first + snapshots_span(visit.level) - 1;
        let words = format!(
            "its snapshots before {}, as far as they are in places {first} to {last} of its list, since that cannot be read: \
             {why}",
            self.lsn
        );
        looking.unverified(named.about(&words));
    }
}

/// What a node of the list leads to, the oldest first.
pub(super) fn below(visit: &Visit, node: &Node) -> Vec<Visit> {
    let shift = NODE_SHIFT * (u32::from(visit.level) - 2);
    let child = |(slot, pointer): (u8, _)| Visit {
        pointer,
        level: visit.level - 1,
        leaf: visit.leaf + (u64::from(slot) << shift),
    };
    node.children().map(child).collect()
}
