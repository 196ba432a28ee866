//! `vdi tree`: which disk was cloned from which snapshot.

use super::Host;
use crate::api::tree::{Forest, TreeDisk, TreeOrigin};
use crate::error::Result;
use blockstore::format::vdi::Origin;
use std::collections::HashMap;

/// Most snapshots of which the label is looked for: each costs a look at the registry.
const LABELS_MAX: usize = 256;

impl Host {
    /// All disks of the store, with what each was cloned from.
    ///
    /// # Errors
    /// The store's.
    pub async fn forest(&self) -> Result<Forest> {
        let store = self.parts.store.get()?;
        let found = store.list_vdis().await?;
        let mut labels: HashMap<Origin, Option<String>> = HashMap::new();
        for origin in found.iter().filter_map(|disk| disk.origin) {
            if labels.contains_key(&origin) || labels.len() >= LABELS_MAX {
                continue;
            }
            let (vdi, lsn) = (origin.vdi.to_string(), origin.lsn.to_string());
            // One that went meanwhile has none.
            let snapshot = store.find_snapshot(&vdi, &lsn).await.ok();
            labels.insert(origin, snapshot.map(|snapshot| snapshot.label.into()));
        }
        let disk = |found: &blockstore::VdiInfo| {
            let vdi = self.describe_stored(found).vdi;
            TreeDisk {
                name: vdi.name,
                uuid: vdi.uuid,
                size: vdi.size,
                state: vdi.state,
                owner: vdi.owner,
                snapshots: found.snapshots,
                sizes: None,
                origin: found.origin.map(|origin| TreeOrigin {
                    uuid: origin.vdi,
                    lsn: origin.lsn.0,
                    label: labels.get(&origin).cloned().flatten(),
                }),
            }
        };
        let mut disks: Vec<TreeDisk> = found.iter().map(disk).collect();
        disks.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Forest { disks, store: None })
    }
}
