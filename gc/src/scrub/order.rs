//! In which order disks are verified: each after that which it was cloned from, so that what they share is read once. A disk that others
//! were cloned from cannot be deleted before them: its place in this order is the same for as long as it is there, and its record, and those of
//! its sources, can be read.

use super::looking::Looking;
use crate::check::is_root;
use blockstore::Result;
use blockstore::format::vdi::Origin;
use blockstore::slot::{Content, View};
use std::collections::{HashMap, HashSet};
use uuid::Uuid;

/// A disk of the registry.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) uuid: Uuid,
    pub(super) slot: u32,
    depth: u32,
    /// Others were cloned from it.
    pub(super) has_clones: bool,
}

pub(super) async fn disks(looking: &mut Looking<'_>) -> Result<Vec<Disk>> {
    let mut origins: HashMap<Uuid, Option<Origin>> = HashMap::new();
    let mut disks = Vec::new();
    for (slot, view) in looking.registry().await? {
        let view = if matches!(view.content, Content::Damaged(_)) {
            looking.record(slot).await?
        } else {
            Some(view)
        };
        let head = view.as_ref().and_then(View::record).filter(|head| is_root(head));
        if let Some(head) = head {
            origins.insert(head.uuid, head.origin);
            disks.push(Disk { uuid: head.uuid, slot, depth: 0, has_clones: false });
        }
    }
    let sources: HashSet<Uuid> = origins.values().flatten().map(|origin| origin.vdi).collect();
    for disk in &mut disks {
        disk.depth = depth(&origins, disk.uuid);
        disk.has_clones = sources.contains(&disk.uuid);
    }
    disks.sort_by_key(|disk| (disk.depth, disk.slot));
    Ok(disks)
}

fn depth(origins: &HashMap<Uuid, Option<Origin>>, disk: Uuid) -> u32 {
    let (mut depth, mut at) = (0, disk);
    // Not further than there are disks, whatever the records say.
    while let Some(Some(origin)) = origins.get(&at)
        && origins.contains_key(&origin.vdi)
        && (depth as usize) < origins.len()
    {
        (depth, at) = (depth + 1, origin.vdi);
    }
    depth
}
