//! The table of slots: which disks the cache holds a log of, and from where each is replayed.
//!
//! Each member's table is read as a whole, or, where that fails, slot by slot and copy by copy. What all members say of a slot
//! together is judged (`slots/judge.rs`); only when that is known of all slots are the members given what they lack.

mod judge;
#[cfg(test)]
mod tests;

use super::{Leg, Local, failures, write_leg};
use crate::error::CacheError;
use crate::format::Geometry;
use crate::format::legs::LegSet;
use crate::format::slot::VdiSlot;
use blockstore::buf::AlignedBuf;
use blockstore::device::{DeviceError, DeviceErrorKind};
use blockstore::types::BLOCK_SIZE;
use judge::{Doubt, Found};
use std::ops::Range;
use std::sync::Arc;
use tokio::time::Instant;

/// Copies of a slot.
const COPIES: usize = 2;

/// Slots of one leg that are refused, after which the others are asked for only where that matters; and so many reads of it may
/// take longer than a leg is waited for, after which it is not asked at all.
const UNREAD_MAX: usize = 8;

/// What it means that nothing is left of a slot.
const LOST: &str = "which disk's log it holds cannot be told, and other disks would write over that log, so none is served: ";
/// What to do about it.
const GIVE_UP: &str = "or restore the device from a good copy; if there is none, zeros over both copies of this slot (docs/operations.md) \
     give its log up, and the others are served";

/// What became of a copy on one leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Read {
    NotAsked,
    Refused,
    Done,
}

/// What a leg gave of the table.
struct Table {
    leg: Arc<Leg>,
    /// It is the only member, which is waited for however long it takes.
    is_alone: bool,
    bytes: AlignedBuf,
    copies: Vec<Read>,
    /// How many reads of it may be late yet.
    late_left: usize,
}

impl Table {
    /// Both copies of a slot.
    fn found(&self, slot: u32) -> [Found; COPIES] {
        [0, 1].map(|place| {
            let at = slot as usize * COPIES + place;
            let block = &self.bytes[at * BLOCK_SIZE..(at + 1) * BLOCK_SIZE];
            Found::of((self.copies[at] == Read::Done).then_some(block), slot)
        })
    }

    /// What must be written to it so that it says what `slots` do.
    fn lacks(&self, slots: &[VdiSlot]) -> Vec<(u64, AlignedBuf)> {
        if self.copies.iter().all(|copy| *copy != Read::Done) {
            let mut whole = AlignedBuf::zeroed(self.bytes.len());
            for (at, copy) in whole.chunks_exact_mut(BLOCK_SIZE).enumerate() {
                copy.copy_from_slice(&judge::copy_for(at % COPIES, &slots[at / COPIES]));
            }
            return vec![(Geometry::slot_offset(0, 0), whole)];
        }
        let mut lacks = Vec::new();
        for slot in slots {
            for (place, found) in self.found(slot.slot).iter().enumerate() {
                if judge::lacks(found, place, slot) {
                    let offset = Geometry::slot_offset(slot.slot, place as u64);
                    lacks.push((offset, AlignedBuf::copy_of(&judge::copy_for(place, slot))));
                }
            }
        }
        lacks
    }
}

impl Local {
    /// All slots; those never written are free. A slot of which it cannot be told what it holds is an error, since a disk's
    /// log hangs on it: nothing was changed then. What a leg is behind in is written to it, and what of the table cannot be
    /// read there: a member holds everything (rule L5). The only member is not written: what it does not give may be read yet.
    pub async fn read_slots(&self) -> Result<Vec<VdiSlot>, CacheError> {
        let mut tables = self.read_tables().await?;
        let mut slots = Vec::new();
        for slot in 0..self.geometry.slots {
            let found = |tables: &[Table]| tables.iter().map(|table| table.found(slot)).collect();
            let copies: Vec<_> = found(&tables);
            let judged = match judge::judge(slot, &copies) {
                Err(Doubt::Unread { .. }) if self.ask_again(slot, &mut tables).await => {
                    let copies: Vec<_> = found(&tables);
                    judge::judge(slot, &copies)
                }
                judged => judged,
            };
            slots.push(judged.map_err(|doubt| self.refusal(slot, doubt, &tables))?);
        }
        self.mend(&slots, &tables).await?;
        Ok(slots)
    }

    /// Each member's table.
    async fn read_tables(&self) -> Result<Vec<Table>, CacheError> {
        let copies = self.geometry.slots as usize * COPIES;
        let len = copies * BLOCK_SIZE;
        let legs = self.members_now();
        let is_alone = legs.len() < 2;
        let began = Instant::now();
        let mut read = match self.read_each(Geometry::slot_offset(0, 0), len).await {
            Err(error) if legs.is_empty() => return Err(error),
            read => read.unwrap_or_default(),
        };
        let late_left = match read.is_empty() {
            // No other has it: this is waited for longer.
            true => UNREAD_MAX,
            false => usize::from(began.elapsed() < self.leg_timeout()),
        };
        let mut tables = Vec::new();
        for leg in legs {
            let whole = read.iter().position(|(number, _)| *number == leg.number);
            let whole = whole.map(|at| read.swap_remove(at).1);
            let of_all = if whole.is_some() { Read::Done } else { Read::NotAsked };
            let mut table = Table {
                leg,
                is_alone,
                bytes: whole.unwrap_or_else(|| AlignedBuf::zeroed(len)),
                copies: vec![of_all; copies],
                late_left,
            };
            if of_all == Read::NotAsked {
                self.read_singly(&mut table).await;
            }
            tables.push(table);
        }
        Ok(tables)
    }

    async fn read_singly(&self, table: &mut Table) {
        let mut refused = 0;
        for slot in 0..self.geometry.slots {
            refused += usize::from(!self.ask(slot, table).await);
            if refused > UNREAD_MAX {
                break;
            }
        }
    }

    /// Asks the legs for what was not asked of this slot. False: it was asked before.
    async fn ask_again(&self, slot: u32, tables: &mut [Table]) -> bool {
        let mut asked = false;
        for table in tables {
            if table.copies[copies_of(slot)].contains(&Read::NotAsked) && table.late_left > 0 {
                self.ask(slot, table).await;
                asked = true;
            }
        }
        asked
    }

    /// Reads a slot of one leg; if it refuses, each copy by itself, since a bad sector may be under one alone. False: it refused.
    async fn ask(&self, slot: u32, table: &mut Table) -> bool {
        let copies = copies_of(slot);
        if self.read_copies(copies.clone(), table).await {
            return true;
        }
        for copy in copies {
            self.read_copies(copy..copy + 1, table).await;
        }
        false
    }

    async fn read_copies(&self, copies: Range<usize>, table: &mut Table) -> bool {
        if table.late_left == 0 {
            return false;
        }
        let at = copies.start * BLOCK_SIZE..copies.end * BLOCK_SIZE;
        let (leg, offset, len) =
            (Arc::clone(&table.leg), Geometry::slot_offset(0, 0) + at.start as u64, at.len());
        let read = async move { leg.device.read(offset, len).await };
        let began = Instant::now();
        let read = match table.is_alone {
            true => read.await,
            false => self.in_time(&table.leg, read).await,
        };
        if !table.is_alone && began.elapsed() >= self.leg_timeout() {
            table.late_left -= 1;
        }
        table.copies[copies].fill(if read.is_ok() { Read::Done } else { Read::Refused });
        match read {
            Ok(bytes) => table.bytes[at].copy_from_slice(&bytes),
            Err(error) => {
                tracing::warn!(leg = table.leg.number, %error, "a leg of the cache cannot be read in its table of slots");
                return false;
            }
        }
        true
    }

    /// Gives each member what it lacks, durably. One that does not take it is put out, once the others have everything: what
    /// they lack, it may be the only one to have.
    async fn mend(&self, slots: &[VdiSlot], tables: &[Table]) -> Result<(), CacheError> {
        if self.read_only || tables.len() < 2 {
            return Ok(());
        }
        let (mut failed, mut why) = (LegSet::NONE, String::new());
        for table in tables {
            if let Err(error) = self.give(table, slots).await {
                failed = failed.with(table.leg.number);
                why = error.to_string();
            }
        }
        if failed.is_empty() {
            return Ok(());
        }
        self.put_out(failed, &why).await
    }

    async fn give(&self, table: &Table, slots: &[VdiSlot]) -> Result<(), DeviceError> {
        let lacks = table.lacks(slots);
        if lacks.is_empty() {
            return Ok(());
        }
        let (leg, path) = (table.leg.number, table.leg.path.display());
        tracing::warn!(leg, %path, places = lacks.len(), "rewriting in a leg's table of slots what it lacks");
        let only = LegSet::NONE.with(leg);
        for (offset, bytes) in lacks {
            let bytes = bytes.freeze();
            let written =
                self.on_legs(only, true, |leg| write_leg(leg, offset, bytes.clone())).await;
            failures(written).1.map_or(Ok(()), Err)?;
        }
        let flush = |leg: Arc<Leg>| async move { leg.device.flush().await };
        failures(self.on_legs(only, true, flush).await).1.map_or(Ok(()), Err)
    }

    /// Why the cache is not opened.
    fn refusal(&self, slot: u32, doubt: Doubt, tables: &[Table]) -> CacheError {
        let unsupported = |what| CacheError::Unsupported { path: self.path.clone(), what };
        let (at, place, damage) = match doubt {
            Doubt::Newer(error) => return unsupported(format!("slot {slot}: {error}")),
            Doubt::Damaged(error) => {
                return unsupported(format!(
                    "slot {slot}: {error}; {LOST}see to the device, then try again, {GIVE_UP}: nothing was changed"
                ));
            }
            Doubt::Unread { at, place, damage } => (at, place, damage),
        };
        let message = match (damage, tables.len()) {
            (damage, 0..2) => format!(
                "no copy of slot {slot} can be read and is whole{}; {LOST}see to the device, then try again, {GIVE_UP}: nothing was changed",
                damage.map_or(String::new(), |damage| format!(" ({damage})"))
            ),
            (Some(damage), _) => format!(
                "a copy of slot {slot} is damaged on the other leg ({damage}), so this one is needed; see to it, then try again, or name \
                 the other leg's path alone, with --degraded, to go on with the older copy: nothing was changed"
            ),
            (None, _) => format!(
                "a copy of slot {slot} is given by no leg; see to them, then try again, or name the path of one leg alone, with \
                 --degraded, to go on with what that has: nothing was changed"
            ),
        };
        let device = tables[at].leg.path.display().to_string();
        let offset = Geometry::slot_offset(slot, place);
        let (kind, operation, len) = (DeviceErrorKind::Io, "read", BLOCK_SIZE as u64);
        DeviceError { kind, device, operation, offset, len, message }.into()
    }

    /// Writes a slot durably to the copy that its sequence selects.
    pub async fn write_slot(&self, slot: &VdiSlot) -> Result<(), CacheError> {
        let offset = Geometry::slot_offset(slot.slot, slot.sequence);
        self.write(offset, AlignedBuf::copy_of(&slot.encode())).await?;
        self.flush().await
    }
}

/// The copies of a slot, counted over the table.
fn copies_of(slot: u32) -> Range<usize> {
    slot as usize * COPIES..(slot as usize + 1) * COPIES
}
