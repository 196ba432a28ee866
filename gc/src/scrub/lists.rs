//! A disk's own blocks beside its trees: its name, and the list of its snapshots.

use super::damage::Part;
use super::disk::Named;
use super::looking::{BATCH, Looking, Place, Verdict};
use super::reading::Bad;
use super::snapshots::below;
use crate::mark::{NAME_ADVICE, SNAPSHOTS_ADVICE};
use blockstore::Result;
use blockstore::format::meta::VdiMeta;
use blockstore::format::node::{NODE_SHIFT, Node};
use blockstore::format::pointer::Pointer;
use blockstore::format::snapshot::LEAF_SNAPSHOTS;
use blockstore::format::vdi::VdiHead;
use bytes::Bytes;

/// How often a block is followed to where it was moved to.
const MOVES: u32 = 16;

/// A block of the list.
pub(super) struct Visit {
    pub(super) pointer: Pointer,
    pub(super) level: u8,
    /// First leaf below it.
    pub(super) leaf: u64,
}

/// What became of a block of its own that a disk's record leads to.
pub(super) enum Had {
    Block(Bytes),
    /// There is nothing any more.
    Nothing,
    /// It is damaged, and that was told.
    Damaged(String),
    /// It is not known what it is.
    Unknown(String),
    /// There is no disk any more.
    Gone,
}

/// Verifies them; false if the disk is gone.
pub(super) async fn verify(
    looking: &mut Looking<'_>,
    named: &Named<'_>,
    head: &VdiHead,
) -> Result<bool> {
    if !head.meta.is_sparse() {
        let first = looking.read(&[head.meta]).await?.remove(0);
        match had(looking, named, Place::Name, head.meta, first).await? {
            Had::Gone => return Ok(false),
            Had::Nothing | Had::Damaged(_) => {}
            Had::Unknown(words) => looking.unverified(named.about(&words)),
            Had::Block(block) => match VdiMeta::decode(&block) {
                Ok(meta) if meta.uuid == head.uuid => {
                    looking.progress().note(|so_far| so_far.metadata_blocks += 1);
                }
                Ok(meta) => {
                    let what = format!("its name block is that of disk {}", meta.uuid);
                    named.found(looking, Part::Name, None, head.meta, what, NAME_ADVICE);
                }
                Err(damage) => {
                    let what = format!("its name block: {damage}, though its checksum matches");
                    named.found(looking, Part::Name, None, head.meta, what, NAME_ADVICE);
                }
            },
        }
    }
    let index = head.snapshots;
    if index.root.is_sparse() {
        return Ok(true);
    }
    let mut stack = vec![vec![Visit { pointer: index.root, level: index.height, leaf: 0 }]];
    while let Some(visits) = stack.pop() {
        let pointers: Vec<Pointer> = visits.iter().map(|visit| visit.pointer).collect();
        for (visit, first) in visits.iter().zip(looking.read(&pointers).await?) {
            let place = Place::List { level: visit.level, leaf: visit.leaf };
            let block = match had(looking, named, place, visit.pointer, first).await? {
                Had::Gone => return Ok(false),
                Had::Nothing | Had::Damaged(_) => continue,
                Had::Unknown(words) => {
                    looking.unverified(named.about(&words));
                    continue;
                }
                Had::Block(block) => block,
            };
            looking.progress().note(|so_far| so_far.metadata_blocks += 1);
            if visit.level <= 1 {
                continue;
            }
            // That its checksum matches is all that is asked of a leaf here; its snapshots are read one by one later.
            let Ok(node) = Node::decode(&block) else { continue };
            let below = below(visit, &node);
            if visit.level == 2 {
                stack.push(below);
            } else {
                stack.extend(below.into_iter().rev().map(|visit| vec![visit]));
            }
        }
    }
    Ok(true)
}

const _: () = assert!(1 << NODE_SHIFT <= BATCH, "what a node leads to is read at once");

/// The block, or what is in its place by now.
pub(super) async fn had(
    looking: &mut Looking<'_>,
    named: &Named<'_>,
    place: Place,
    pointer: Pointer,
    first: Result<Bytes, Bad>,
) -> Result<Had> {
    let (mut pointer, mut read) = (pointer, first);
    for _ in 0..MOVES {
        let bad = match read {
            Ok(block) => return Ok(Had::Block(block)),
            Err(bad) => bad,
        };
        match looking.second_look(named.disk, place, pointer, bad).await? {
            Verdict::Good(block) => return Ok(Had::Block(block)),
            Verdict::Gone => return Ok(Had::Gone),
            Verdict::Replaced(now) => {
                looking.progress().note(|so_far| so_far.replaced += 1);
                if now.is_sparse() {
                    return Ok(Had::Nothing);
                }
                pointer = now;
                read = looking.read(&[now]).await?.remove(0);
            }
            Verdict::Damaged(error) => {
                let why = error.to_string();
                match place {
                    Place::List { leaf, .. } => {
                        let from = leaf * LEAF_SNAPSHOTS;
                        let what = format!("its list of snapshots from place {from} on: {error}");
                        let (part, advice) = (Part::SnapshotList, SNAPSHOTS_ADVICE);
                        named.found(looking, part, None, pointer, what, advice);
                    }
                    _ => {
                        let what = format!("its name block: {error}");
                        named.found(looking, Part::Name, None, pointer, what, NAME_ADVICE);
                    }
                }
                return Ok(Had::Damaged(why));
            }
            Verdict::Unknown(words) => return Ok(Had::Unknown(words)),
        }
    }
    Ok(Had::Unknown("a block of its own keeps changing".into()))
}
