//! A look at the store's own tables, for `store check`.

use crate::error::Result;
use crate::format::extent::ExtentHeader;
use crate::format::gc::GcRecord;
use crate::format::head::{Damage, Head};
use crate::format::superblock::Superblock;
use crate::slot::{Content, Slot};
use crate::store::Store;
use crate::types::Gba;

impl Store {
    /// Checks both superblocks, the GC record, the host table and the extent catalogue with the
    /// extents' headers. Each problem is a sentence.
    ///
    /// # Errors
    /// The device's.
    pub async fn verify_tables(&self) -> Result<Vec<String>> {
        let mut problems = Vec::new();
        self.verify_superblocks(&mut problems).await?;
        let g = self.core.superblock.geometry.clone();
        let gc = Slot { first: Gba(g.gc_start), paired: true };
        let gc = self.core.records.read::<GcRecord>(&self.control_io, gc).await?;
        match gc.content {
            Content::Valid(_) => {}
            Content::Unused => problems.push("The GC record is missing.".to_owned()),
            Content::Damaged(damage) => {
                problems
                    .push(format!("The GC record at block {} is damaged: {damage}.", g.gc_start));
            }
        }
        for view in self.scan_hosts().await? {
            if let Content::Damaged(damage) = view.content {
                let at = view.slot.first;
                problems.push(format!("The host record at block {at} is damaged: {damage}."));
            }
        }
        self.verify_extents(&mut problems).await?;
        Ok(problems)
    }

    async fn verify_superblocks(&self, problems: &mut Vec<String>) -> Result<()> {
        for address in self.core.superblock.geometry.superblocks() {
            let block = self.control_io.read(address, 1).await?;
            let decoded = Head::<Superblock>::decode(&block, address)
                .and_then(|head| head.of_store(self.uuid()));
            match decoded {
                Ok(head) if head.record == self.core.superblock => {}
                Ok(_) => problems
                    .push(format!("The superblock at block {address} differs from its copy.")),
                Err(damage) => problems.push(format!(
                    "The superblock at block {address} is damaged: {damage}; its copy is in use."
                )),
            }
        }
        Ok(())
    }

    async fn verify_extents(&self, problems: &mut Vec<String>) -> Result<()> {
        let g = self.core.superblock.geometry.clone();
        for (number, view) in (0..).zip(self.scan_extents().await?) {
            let record = match &view.content {
                Content::Unused => continue,
                Content::Valid(head) => &head.record,
                Content::Damaged(damage) => {
                    problems.push(format!(
                        "The record of extent {number} (block {}) is damaged: {damage}.",
                        view.slot.first
                    ));
                    continue;
                }
            };
            if !record.ready || number == 0 || record.owner.is_none() {
                continue;
            }
            let base = g.extent_base(number);
            let block = self.control_io.read(base, 1).await?;
            let header: Result<Head<ExtentHeader>, Damage> =
                Head::decode(&block, base).and_then(|head| head.of_store(self.uuid()));
            match header {
                Ok(head) if head.record.kind == record.kind && head.record.extent == number => {}
                Ok(head) => problems.push(format!(
                    "Extent {number} holds {:?} by the catalogue, but {:?} by its header.",
                    record.kind, head.record.kind
                )),
                Err(damage) => {
                    problems.push(format!("The header of extent {number} is damaged: {damage}."))
                }
            }
        }
        Ok(())
    }
}
