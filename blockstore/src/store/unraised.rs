//! Disks of this host whose head the device did not write when the store was opened.
//!
//! A host that returns raises all heads that it owns first (rule C2): a late command of an earlier incarnation finds another head than
//! it expects then. One that lies on a bad sector does not keep the other disks from the store. Until it was raised, by whoever tries next,
//! * its disk is not attached, nor is its log given up: the attempt ends at once, with an error as of an outage. All else that
//!   would change the head is refused, since the disk is attached to this host by what the head says;
//! * no cycle of collection begins: a late head may lead to what no root does now.
//!
//! Allocating need not wait. What a late head could name was claimed, durably, before its blocks were written, and nobody but a cycle
//! clears these claims; what it would replace stays allocated, since nobody else frees what the disk holds.

use super::{Core, Store, Writer};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::vdi::{Owner, VdiHead, VdiState};
use crate::io::Io;
use crate::slot::{Content, View};
use crate::store::open::take_up_vdi;
use std::collections::BTreeMap;
use uuid::Uuid;

/// These disks, by their places in the registry.
pub(super) type Unraised = BTreeMap<u32, Uuid>;

/// Raises the heads of this host's disks, and ends what an earlier incarnation left half done; what the device does not write.
pub(super) async fn take_up_vdis(
    core: &Core,
    io: &Io,
    owner: Owner,
    registry: Vec<(u32, View<VdiHead>)>,
) -> Result<Unraised> {
    let mut unraised = Unraised::new();
    for (place, view) in registry {
        let disk = view.record().filter(|head| head.state == VdiState::Active);
        let Some(uuid) = disk.map(|head| head.uuid) else {
            // What nobody finishes may stand in the way of all that are made: it is not left as it is.
            take_up_vdi(core, io, owner, place, view).await?;
            continue;
        };
        match take_up_vdi(core, &io.giving_up(), owner, place, view).await {
            Err(error) if error.is_of_blocks() => {
                tracing::error!(
                    place, %uuid, %error,
                    "the device does not write the head of a disk: it is not attached, and nothing is collected, until it does; see to \
                     the device"
                );
                unraised.insert(place, uuid);
            }
            outcome => outcome?,
        }
    }
    Ok(unraised)
}

impl Store {
    /// True if the device did not write this disk's head when the store was opened, and has not since: the disk cannot be attached, and
    /// wants to be served without the store, as in an outage.
    #[must_use]
    pub fn is_unraised(&self, disk: Uuid) -> bool {
        let writer = self.core.writer.as_ref();
        writer.is_some_and(|writer| writer.unraised.lock().values().any(|uuid| *uuid == disk))
    }

    /// Raises the head in a place if that is still to be done; true if it was. Only amid a change of the registry.
    ///
    /// # Errors
    /// `Unreachable` if the device does not write it.
    pub(super) async fn raise(&self, place: u32) -> Result<bool> {
        let writer = self.core.writer()?;
        if !writer.unraised.lock().contains_key(&place) {
            return Ok(false);
        }
        let Err(error) = self.raise_now(writer, place).await else {
            writer.unraised.lock().remove(&place);
            tracing::info!(place, "the device writes the head of this disk again");
            return Ok(true);
        };
        if !error.is_of_blocks() {
            return Err(error);
        }
        Err(StoreError::new(
            StoreErrorKind::Unreachable,
            format!("{}, VDI slot {place}", self.url()),
            format!(
                "the device does not write the head of this disk: the disk is not attached, and nothing is collected, until it does. See to \
                 the device; it is tried again by itself: {}",
                error.message
            ),
        ))
    }

    async fn raise_now(&self, writer: &Writer, place: u32) -> Result<()> {
        let owner = Owner { host: writer.host, generation: writer.generation };
        let view = self.read_vdi_slot(place).await?;
        if let Content::Damaged(damage) = &view.content {
            // Nothing would be written over it: the one that is there when it can be read again is still to be raised.
            let object = format!("{}, VDI slot {place}", self.url());
            return Err(StoreError::new(StoreErrorKind::Device, object, damage.to_string()));
        }
        take_up_vdi(&self.core, &self.core.io.giving_up(), owner, place, view).await
    }

    /// Raises all heads that are still to be raised. Only amid a change of the registry.
    ///
    /// # Errors
    /// As [`raise`](Self::raise), of the first that the device does not write.
    pub(super) async fn raise_all(&self) -> Result<()> {
        let places: Vec<u32> = self.core.writer()?.unraised.lock().keys().copied().collect();
        for place in places {
            self.raise(place).await?;
        }
        Ok(())
    }
}
