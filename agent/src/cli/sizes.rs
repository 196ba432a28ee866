//! Sizes in words, and what `store info` prints beside what the store says of itself.

use super::output::{Table, fields};
use super::snap::time_of;
use crate::api::sizes::UsedFor;
use crate::units::format_size;
use blockstore::StoreInfo;
use blockstore::types::BLOCK_SIZE;
use gc::Sizes;
use gc::sizes::{Amount, RootSizes, StoreSizes};
use serde::Serialize;
use std::collections::HashMap;

/// `store info`.
#[derive(Debug, Serialize)]
pub struct StoreReport {
    #[serde(flatten)]
    pub info: StoreInfo,
    /// Sum of the disks' sizes, bytes.
    provisioned_bytes: u64,
    /// How often that is what disks, snapshots and their maps can have.
    overcommit: f64,
    /// If they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sizes: Option<Sizes>,
}

impl StoreReport {
    pub fn new(info: StoreInfo, sizes: Option<Sizes>) -> Self {
        let provisioned_bytes = info.vdis.iter().map(|vdi| vdi.size_bytes).sum();
        let used = info.data_blocks_allocated + info.metadata_blocks_allocated;
        let capacity = (used + info.blocks_free) * BLOCK_SIZE as u64;
        let overcommit = overcommit(provisioned_bytes, capacity);
        Self { info, provisioned_bytes, overcommit, sizes }
    }

    /// What follows after what the store says of itself.
    pub fn words(&self) -> String {
        let provisioned = format_size(self.provisioned_bytes);
        let mut text = fields(&[(
            "overcommit",
            format!("{:.2}: disks of {provisioned} in all", self.overcommit),
        )]);
        if let Some(sizes) = &self.sizes {
            text.push_str(&format!("\n{}", fields(&used_for(&sizes.store))));
            text.push_str(&format!("\n{}", self.disks(sizes)));
        }
        text
    }

    fn disks(&self, sizes: &Sizes) -> String {
        let names: HashMap<_, _> =
            self.info.vdis.iter().map(|vdi| (vdi.uuid, vdi.name.as_str())).collect();
        let mut table = Table::new(&[
            "DISK",
            ">HOLDS",
            ">SHARED",
            ">EXCLUSIVE",
            ">SNAPSHOTS",
            ">DELETING THESE FREES",
            ">DELETING ALL FREES",
        ]);
        for disk in &sizes.disks {
            table.row([
                names.get(&disk.uuid).map_or(disk.uuid.to_string(), |name| (*name).to_owned()),
                format_size(disk.sizes.referenced.total()),
                format_size(disk.sizes.shared().total()),
                format_size(disk.sizes.exclusive.total()),
                disk.snapshots.len().to_string(),
                format_size(disk.snapshots_free.total()),
                format_size(disk.deletion_frees.total()),
            ]);
        }
        if sizes.disks.is_empty() { String::new() } else { table.render() }
    }
}

fn overcommit(provisioned: u64, capacity: u64) -> f64 {
    provisioned as f64 / capacity.max(1) as f64
}

fn both(amount: Amount) -> String {
    format!(
        "{} ({} data, {} metadata)",
        format_size(amount.total()),
        format_size(amount.data),
        format_size(amount.metadata)
    )
}

/// What a store's space is used for, line by line.
pub fn used_for(store: &StoreSizes) -> [(&'static str, String); 9] {
    [
        ("used", both(store.used)),
        ("reachable", both(store.reachable)),
        ("shared", format!("{}, held by several disks or snapshots", both(store.shared))),
        ("exclusive", format!("{}, held by one", both(store.exclusive))),
        ("disks as they are", both(store.present)),
        ("pinned by snapshots", both(store.snapshots)),
        ("of that by sources of clones", both(store.clone_sources)),
        ("reclaimable", both(store.reclaimable)),
        ("claimed or in flight", both(store.in_hand)),
    ]
}

/// `vdi tree --sizes`, below the forest.
pub fn below_forest(store: &StoreSizes) -> String {
    let overcommit = overcommit(store.provisioned, store.capacity);
    let provisioned = format_size(store.provisioned);
    let mut lines = vec![
        ("capacity", format_size(store.capacity)),
        ("overcommit", format!("{overcommit:.2}: disks of {provisioned} in all")),
    ];
    lines.extend(used_for(store));
    fields(&lines)
}

/// `gc status`.
pub fn pinned(used: Option<&UsedFor>) -> Vec<(&'static str, String)> {
    let Some(used) = used else {
        let words = "not known: 'ballast vdi tree --sizes' computes it";
        return vec![("used for", words.into())];
    };
    let store = &used.store;
    let mut lines = vec![
        ("used for", format!("as of {}:", time_of(used.at))),
        ("  disks as they are", format_size(store.present.total())),
        (
            "  snapshots alone",
            format!(
                "{}, {} of it by sources of clones",
                format_size(store.snapshots.total()),
                format_size(store.clone_sources.total())
            ),
        ),
        ("  reclaimable", format_size(store.reclaimable.total())),
        ("  claimed or in flight", format_size(store.in_hand.total())),
    ];
    if !used.largest.is_empty() {
        let largest = used.largest.iter().map(|pinned| {
            let cloned = if pinned.cloned { ", has clones" } else { "" };
            format!("{}@{} {}{cloned}", pinned.vdi, pinned.lsn, format_size(pinned.frees))
        });
        lines.push(("  most by", largest.collect::<Vec<_>>().join("; ")));
    }
    lines
}

/// What a disk or snapshot holds.
pub fn held(sizes: &RootSizes) -> String {
    format!(
        "holds {}: {} shared, {} exclusive",
        format_size(sizes.referenced.total()),
        format_size(sizes.shared().total()),
        format_size(sizes.exclusive.total())
    )
}
