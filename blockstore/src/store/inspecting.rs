//! Looking at what may be damaged, while everything else goes on.
//!
//! Whoever inspects a store expects blocks that the device does not give. Such an error ends a read at once, and says nothing of the
//! device's health: a bad sector is no outage, and those who ask whether the store is there are not to be told so. Outages are noted,
//! and waited out for as long as control operations wait.

use crate::error::Result;
use crate::format::vdi::VdiHead;
use crate::io::Io;
use crate::slot::View;
use crate::store::verify::TableProblem;
use crate::store::{Store, scan_vdis, vdi_slot};
use crate::tree::Reader;
use crate::types::Gba;

/// A store as it is inspected.
#[derive(Debug)]
pub struct Inspection<'a> {
    store: &'a Store,
    io: Io,
}

impl Store {
    /// The store for somebody who looks for damage in it.
    #[must_use]
    pub fn inspect(&self) -> Inspection<'_> {
        Inspection { store: self, io: self.control_io.giving_up() }
    }
}

impl<'a> Inspection<'a> {
    /// What is inspected.
    #[must_use]
    pub fn store(&self) -> &'a Store {
        self.store
    }

    /// As [`Store::reader`].
    #[must_use]
    pub fn reader(&self) -> Reader {
        Reader { io: self.io.clone(), ..self.store.core.reader.clone() }
    }

    /// Asks the device for a block, whatever it holds.
    ///
    /// # Errors
    /// The device's.
    pub async fn try_read(&self, block: Gba) -> Result<()> {
        self.io.read(block, 1).await.map(drop)
    }

    /// As [`Store::verify_tables`].
    ///
    /// # Errors
    /// As there.
    pub async fn verify_tables(&self) -> Result<Vec<TableProblem>> {
        self.store.verify_tables_through(&self.io).await
    }

    /// As [`Store::scan_vdis`].
    ///
    /// # Errors
    /// As there.
    pub async fn scan_vdis(&self) -> Result<Vec<(u32, View<VdiHead>)>> {
        scan_vdis(&self.store.core, &self.io).await
    }

    /// As [`Store::read_vdi_slot`].
    ///
    /// # Errors
    /// As there.
    pub async fn read_vdi_slot(&self, slot: u32) -> Result<View<VdiHead>> {
        let core = &self.store.core;
        core.records.read(&self.io, vdi_slot(core.geometry(), slot)).await
    }

    /// As [`Store::read_name_block`].
    ///
    /// # Errors
    /// As there.
    pub async fn read_name_block(&self, head: &VdiHead) -> Result<Result<String, String>> {
        self.store.read_name_block_through(&self.reader(), head).await
    }
}
