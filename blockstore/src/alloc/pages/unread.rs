//! What the catalogue says of each extent, and extents of which it says nothing, since the device lastingly does not read their record.
//!
//! Such an extent may be this host's, and hold what disks reach. So nothing in it is given out, freed, collected or unmapped, and nobody
//! claims it; what disks read there they read as before. Its bitmap stays as it was all the while: once the record can be read,
//! the extent is taken over as it would have been when the store was opened.

use super::Pages;
use crate::alloc::Territory;
use crate::format::extent::{ExtentRecord, ExtentType};
use crate::format::head::Damage;
use crate::slot::{Content, View};

impl Pages {
    /// Takes an extent for what its record says.
    pub(super) fn learn(&mut self, territory: &Territory, number: u32, view: &View<ExtentRecord>) {
        let kind = match &view.content {
            Content::Unused => ExtentType::Unused,
            Content::Valid(head) => head.record.kind,
            // Neither ours nor free for the taking.
            Content::Damaged(Damage::Unreadable) => {
                tracing::error!(
                    extent = number,
                    "the device does not read the record of an extent: nothing in it is given out or freed until it does; see to the device"
                );
                self.unread.insert(number);
                ExtentType::System
            }
            Content::Damaged(damage) => {
                tracing::error!(extent = number, %damage, "damaged extent record");
                ExtentType::System
            }
        };
        self.catalogue[number as usize] = kind;
        if is_own(territory, view) {
            self.adopt(territory, number, kind, view.clone());
        }
    }

    /// Takes extents for what their records say that could not be read before; true if there is one. No others: what this host has done
    /// since to those that it knows is known here.
    pub(in crate::alloc) fn learn_unread(
        &mut self,
        territory: &Territory,
        catalogue: &[View<ExtentRecord>],
    ) -> bool {
        let before = self.unread.len();
        for number in std::mem::take(&mut self.unread) {
            let known = catalogue.get(number as usize).filter(|view| !view.is_unreadable());
            let is_unready = |view: &View<ExtentRecord>| {
                is_own(territory, view) && view.record().is_some_and(|record| !record.ready)
            };
            match known {
                // It has no bitmaps yet: the next start sees to it.
                Some(view) if is_unready(view) => drop(self.unread.insert(number)),
                Some(view) => {
                    tracing::info!(
                        extent = number,
                        "the device reads the record of this extent again"
                    );
                    self.learn(territory, number, view);
                }
                None => drop(self.unread.insert(number)),
            }
        }
        self.unread.len() < before
    }
}

fn is_own(territory: &Territory, view: &View<ExtentRecord>) -> bool {
    view.record().is_some_and(|record| record.owner == Some(territory.host))
}
