//! In which order disks are verified: each after that which it was cloned from, so that what they share is read once. A disk that others
//! were cloned from cannot be deleted before them: its place in this order is the same for as long as it is there.

use super::damage::{Damage, Part};
use super::looking::Looking;
use crate::check::{VDI_ADVICE, is_root};
use blockstore::Result;
use blockstore::format::vdi::Origin;
use blockstore::slot::Content;
use std::collections::HashMap;
use std::time::Duration;
use uuid::Uuid;

/// Between two looks at a record that is damaged: what is being written is not, the next time.
const PAUSE: Duration = Duration::from_secs(1);
const LOOKS: u32 = 3;

/// A disk of the registry.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) uuid: Uuid,
    pub(super) slot: u32,
    pub(super) depth: u32,
}

impl Disk {
    pub(super) fn turn(&self) -> (u32, u32) {
        (self.depth, self.slot)
    }
}

pub(super) async fn disks(looking: &mut Looking<'_>) -> Result<Vec<Disk>> {
    let mut origins: HashMap<Uuid, Option<Origin>> = HashMap::new();
    let mut disks = Vec::new();
    for (slot, view) in looking.registry().await? {
        match &view.content {
            Content::Valid(head) if is_root(&head.record) => {
                origins.insert(head.record.uuid, head.record.origin);
                disks.push(Disk { uuid: head.record.uuid, slot, depth: 0 });
            }
            Content::Damaged(_) => damaged_record(looking, slot).await?,
            Content::Valid(_) | Content::Unused => {}
        }
    }
    for disk in &mut disks {
        disk.depth = depth(&origins, disk.uuid);
    }
    disks.sort_by_key(Disk::turn);
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

async fn damaged_record(looking: &mut Looking<'_>, slot: u32) -> Result<()> {
    for look in 1.. {
        tokio::time::sleep(PAUSE).await;
        let view = looking.slot(slot).await?;
        let Content::Damaged(damage) = &view.content else { break };
        if look == LOOKS {
            let at = view.slot.first;
            looking.found(Damage {
                part: Part::Record,
                vdi: None,
                name: None,
                snapshot: None,
                offset: None,
                bytes: None,
                block: Some(at.0),
                what: format!("the VDI record in slot {slot} (block {at}) is damaged: {damage}"),
                advice: VDI_ADVICE.into(),
            });
            break;
        }
    }
    Ok(())
}
