//! The table of slots: which disks the cache holds a log of, and from where each is replayed.

use super::{Leg, Local};
use crate::error::CacheError;
use crate::format::slot::VdiSlot;
use crate::format::{FormatError, Geometry};
use blockstore::buf::AlignedBuf;
use blockstore::device::{DeviceError, DeviceErrorKind};
use blockstore::types::BLOCK_SIZE;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use tokio::time::Instant;

/// Bytes of the two copies of a slot.
const SLOT_LEN: usize = 2 * BLOCK_SIZE;

/// Slots of one leg that are not read, after which the others are not asked for singly.
const UNREAD_MAX: usize = 8;

/// What a leg gave of the table.
struct Table {
    leg: u8,
    bytes: AlignedBuf,
    unread: BTreeSet<u32>,
}

impl Table {
    /// Both copies of a slot; none if it was not read.
    fn copies(&self, slot: u32) -> Option<[&[u8]; 2]> {
        let (a, b) = self.bytes[range_of(slot)].split_at(BLOCK_SIZE);
        (!self.unread.contains(&slot)).then_some([a, b])
    }
}

impl Local {
    /// All slots; those never written are free. A slot of which all copies are damaged is an error, since a disk's log
    /// hangs on it. What a leg is behind in is written to it, and what of the table cannot be read there: a member
    /// holds everything (rule L5).
    pub async fn read_slots(&self) -> Result<Vec<VdiSlot>, CacheError> {
        let slots = self.geometry.slots;
        let tables = self.read_tables().await?;
        let mut found = Vec::new();
        let mut whole = AlignedBuf::zeroed(slots as usize * SLOT_LEN);
        for slot in 0..slots {
            let (best, at) = self.judge(slot, &tables)?;
            whole[range_of(slot)].copy_from_slice(&tables[at].bytes[range_of(slot)]);
            for table in &tables {
                self.mend(slot, &best, table, tables.len() > 1).await?;
            }
            found.push(best);
        }
        for table in &tables {
            if table.unread.len() == slots as usize {
                let first = Geometry::slot_offset(0, 0);
                self.repair(table.leg, first, AlignedBuf::copy_of(&whole)).await?;
                continue;
            }
            for slot in &table.unread {
                // Both copies of one leg: a newer one that only this leg had must not come back.
                let copies = AlignedBuf::copy_of(&whole[range_of(*slot)]);
                self.repair(table.leg, Geometry::slot_offset(*slot, 0), copies).await?;
            }
        }
        Ok(found)
    }

    /// Each member's table. Where it cannot be read as a whole it is read slot by slot.
    async fn read_tables(&self) -> Result<Vec<Table>, CacheError> {
        let len = self.geometry.slots as usize * SLOT_LEN;
        let began = Instant::now();
        let read = self.read_each(Geometry::slot_offset(0, 0), len).await?;
        let is_late = began.elapsed() >= self.leg_timeout();
        let mut tables: Vec<Table> = Vec::new();
        for (leg, bytes) in read {
            tables.push(Table { leg, bytes, unread: BTreeSet::new() });
        }
        for leg in self.members_now() {
            if tables.iter().any(|table| table.leg == leg.number) {
                continue;
            }
            let mut table = Table {
                leg: leg.number,
                bytes: AlignedBuf::zeroed(len),
                unread: (0..self.geometry.slots).collect(),
            };
            if !is_late {
                self.read_singly(&leg, &mut table).await;
            }
            tables.push(table);
        }
        Ok(tables)
    }

    async fn read_singly(&self, leg: &Arc<Leg>, table: &mut Table) {
        let slots = self.geometry.slots;
        for (slot, read) in (0..slots).zip(1..) {
            let to_read = Arc::clone(leg);
            let offset = Geometry::slot_offset(slot, 0);
            let copies = async move { to_read.device.read(offset, SLOT_LEN).await };
            let began = Instant::now();
            if let Ok(copies) = self.in_time(leg, copies).await {
                table.bytes[range_of(slot)].copy_from_slice(&copies);
                table.unread.remove(&slot);
            } else if began.elapsed() >= self.leg_timeout()
                || read - (slots as usize - table.unread.len()) > UNREAD_MAX
            {
                break;
            }
        }
    }

    /// What a slot holds, and the table that has it.
    fn judge(&self, slot: u32, tables: &[Table]) -> Result<(VdiSlot, usize), CacheError> {
        let (mut best, mut damage): (Option<(VdiSlot, usize)>, Option<FormatError>) = (None, None);
        let mut are_absent = false;
        for (at, copies) in
            tables.iter().enumerate().filter_map(|(n, t)| Some((n, t.copies(slot)?)))
        {
            let copies = copies.map(|copy| VdiSlot::decode(copy, slot));
            if let Some(Err(error @ FormatError::Version { .. })) =
                copies.iter().find(|copy| matches!(copy, Err(FormatError::Version { .. })))
            {
                let what = format!("slot {slot}: {error}");
                return Err(CacheError::Unsupported { path: self.path.clone(), what });
            }
            let newest = copies.iter().flatten().max_by_key(|copy| copy.sequence).cloned();
            let sequence = newest.as_ref().map_or(0, |newest| newest.sequence);
            if copies.iter().all(|copy| matches!(copy, Err(FormatError::Absent(_)))) {
                are_absent = true;
            } else if let Some(error) =
                copies.into_iter().find(|copy| is_damaged(copy, sequence)).and_then(Result::err)
            {
                damage = Some(error);
            }
            if let Some(newest) = newest
                && best.as_ref().is_none_or(|(best, _)| best.sequence < newest.sequence)
            {
                best = Some((newest, at));
            }
        }
        let unread = tables.iter().find(|table| table.unread.contains(&slot));
        match (best, damage, unread) {
            // It may have been the newer one, which only a leg that gave nothing has then.
            (_, Some(damage), Some(unread)) => {
                Err(self.unread_slot(unread.leg, slot, &damage.to_string()).into())
            }
            (Some(best), ..) => Ok(best),
            (None, None, Some(unread)) if !are_absent => {
                Err(self.unread_slot(unread.leg, slot, "it gives none, either").into())
            }
            (None, damage, _) if are_absent || damage.is_none() => {
                let at = tables.iter().position(|table| table.copies(slot).is_some()).unwrap_or(0);
                Ok((VdiSlot { sequence: 0, slot, vdi: None, quarantined: None }, at))
            }
            (None, damage, _) => Err(CacheError::Unsupported {
                path: self.path.clone(),
                what: format!(
                    "slot {slot}: {}; the disk whose log it holds cannot be told: restore the device from a good copy",
                    damage.map(|damage| damage.to_string()).unwrap_or_default()
                ),
            }),
        }
    }

    /// Writes to a leg what it lacks of a slot: the newest copy, in its place; and if the other place is damaged, the same as what was there
    /// before, or that would be in doubt again at a start that gets nothing of the other leg.
    async fn mend(
        &self,
        slot: u32,
        best: &VdiSlot,
        table: &Table,
        is_mirrored: bool,
    ) -> Result<(), CacheError> {
        let Some(copies) = table.copies(slot).filter(|_| is_mirrored) else { return Ok(()) };
        let decoded = copies.map(|copy| VdiSlot::decode(copy, slot));
        if best.sequence == 0 {
            for (copy, place) in decoded.iter().zip(0..) {
                if is_damaged(copy, 0) {
                    let offset = Geometry::slot_offset(slot, place);
                    self.repair(table.leg, offset, AlignedBuf::copy_of(&best.encode())).await?;
                }
            }
            return Ok(());
        }
        if decoded[copy_at(best.sequence)].as_ref() != Ok(best) {
            let offset = Geometry::slot_offset(slot, best.sequence);
            self.repair(table.leg, offset, AlignedBuf::copy_of(&best.encode())).await?;
        }
        if is_damaged(&decoded[copy_at(best.sequence - 1)], best.sequence) {
            let before = VdiSlot { sequence: best.sequence - 1, ..best.clone() };
            let offset = Geometry::slot_offset(slot, before.sequence);
            self.repair(table.leg, offset, AlignedBuf::copy_of(&before.encode())).await?;
        }
        Ok(())
    }

    /// A slot is damaged where it can be read; a leg that gives nothing now may have it.
    fn unread_slot(&self, leg: u8, slot: u32, why: &str) -> DeviceError {
        DeviceError {
            kind: DeviceErrorKind::Io,
            device: self.leg_path(leg).display().to_string(),
            operation: "read",
            offset: Geometry::slot_offset(slot, 0),
            len: SLOT_LEN as u64,
            message: format!(
                "a copy of this slot is damaged on the other leg ({why}), so this one is needed; see to it, then try again, or name the \
                 other leg's path alone, with --degraded, to go on with the older copy: nothing was changed"
            ),
        }
    }

    /// Writes a slot durably to the copy that its sequence selects.
    pub async fn write_slot(&self, slot: &VdiSlot) -> Result<(), CacheError> {
        let offset = Geometry::slot_offset(slot.slot, slot.sequence);
        self.write(offset, AlignedBuf::copy_of(&slot.encode())).await?;
        self.flush().await
    }
}

/// Where a slot lies in the table.
fn range_of(slot: u32) -> Range<usize> {
    slot as usize * SLOT_LEN..(slot as usize + 1) * SLOT_LEN
}

/// Which of both copies has this sequence.
fn copy_at(sequence: u64) -> usize {
    (Geometry::slot_offset(0, sequence) - Geometry::slot_offset(0, 0)) as usize / BLOCK_SIZE
}

/// A copy beside one of this sequence is not what was written there: both places were by then, if it is the second or a later one.
fn is_damaged(copy: &Result<VdiSlot, FormatError>, sequence: u64) -> bool {
    match copy {
        Ok(_) => false,
        Err(FormatError::Absent(_)) => sequence >= 2,
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    //! Goal: a leg whose table cannot be read, or is behind, does not stay a member without it (rule L5).
    //! Method: two simulated legs; one refuses reads at a start, then is the only one.

    use super::*;
    use blockstore::device::sim::{FaultRates, OpKind, SimDevice};

    async fn open(sims: &[SimDevice], degraded: bool) -> Local {
        let named = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
        Local::on_devices(named, degraded).await.unwrap()
    }

    fn named(sequence: u64) -> VdiSlot {
        VdiSlot { sequence, slot: 0, vdi: None, quarantined: None }
    }

    #[tokio::test(start_paused = true)]
    async fn a_leg_whose_table_cannot_be_read_is_given_it() {
        let sims = [1, 2].map(|seed| SimDevice::new(16 << 20, seed));
        let devices = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
        drop(Local::make_legs(devices).await.unwrap());
        let local = open(&sims, false).await;
        local.write_slot(&named(4)).await.unwrap();
        local.write_slot(&named(5)).await.unwrap();
        let offset = Geometry::slot_offset(0, 5);
        // The first leg lost it, and has one of its own that was never acknowledged.
        sims[0].misplace(offset, &[0; BLOCK_SIZE]);
        let torn = named(6).encode();
        sims[0].misplace(Geometry::slot_offset(0, 6), torn.as_slice().try_into().expect("a block"));
        sims[0].set_rates(FaultRates { read_io: 1.0, ..FaultRates::default() });
        assert_eq!(local.read_slots().await.unwrap()[0], named(5));
        assert!(local.members().contains(0), "it takes writes");
        local.flush().await.unwrap();
        drop(local);
        sims[0].set_rates(FaultRates::default());
        let alone = open(&sims[..1], true).await;
        assert_eq!(alone.read_slots().await.unwrap()[0], named(5));
    }

    /// The older one, which is whole, is not written over what only the other leg has of the newer one.
    #[tokio::test(start_paused = true)]
    async fn a_damaged_copy_is_not_judged_while_a_leg_that_may_have_it_cannot_be_read() {
        let sims = [1, 2].map(|seed| SimDevice::new(16 << 20, seed));
        let devices = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
        let local = Local::make_legs(devices).await.unwrap();
        local.write_slot(&named(4)).await.unwrap();
        local.write_slot(&named(5)).await.unwrap();
        let of_another = VdiSlot { slot: 1, ..named(5) }.encode();
        let of_another = of_another.as_slice().try_into().expect("a block");
        sims[0].misplace(Geometry::slot_offset(0, 5), of_another);
        sims[1].set_rates(FaultRates { read_io: 1.0, ..FaultRates::default() });
        let refused = local.read_slots().await.unwrap_err();
        assert!(refused.to_string().contains("--degraded"), "{refused}");
        sims[1].set_rates(FaultRates::default());
        assert_eq!(local.read_slots().await.unwrap()[0], named(5));
        sims[1].set_rates(FaultRates { read_io: 1.0, ..FaultRates::default() });
        assert_eq!(local.read_slots().await.unwrap()[0], named(5), "the first leg was given it");
    }

    /// One sector of a leg's table is not all of it, and what is damaged elsewhere on the other leg has nothing to do with it.
    #[tokio::test(start_paused = true)]
    async fn a_bad_sector_in_a_table_concerns_its_own_slot_alone() {
        let sims = [1, 2].map(|seed| SimDevice::new(16 << 20, seed));
        let devices = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
        let local = Local::make_legs(devices).await.unwrap();
        let other = VdiSlot { slot: 1, ..named(7) };
        for slot in [named(4), named(5), VdiSlot { sequence: 6, ..other.clone() }, other.clone()] {
            local.write_slot(&slot).await.unwrap();
        }
        sims[0].misplace(Geometry::slot_offset(0, 4), &[7; BLOCK_SIZE]);
        let set_bad = |slot, kinds: &[OpKind]| {
            sims[1].set_bad(Geometry::slot_offset(slot, 0), SLOT_LEN as u64, kinds);
        };
        set_bad(1, &[OpKind::Read]);
        assert_eq!(local.read_slots().await.unwrap()[..2], [named(5), other]);
        assert_eq!(local.members().len(), 2);
        // The same slot: which of its copies is the newest is not known.
        sims[0].misplace(Geometry::slot_offset(0, 5), &[0; BLOCK_SIZE]);
        set_bad(1, &[]);
        set_bad(0, &[OpKind::Read]);
        local.read_slots().await.unwrap_err();
        set_bad(0, &[]);
        assert_eq!(local.read_slots().await.unwrap()[0], named(5));
    }

    /// A copy that was made good does not take the place of the newest one: that is not written over next.
    #[tokio::test(start_paused = true)]
    async fn the_only_good_copy_is_never_written_over() {
        let sims = [1, 2].map(|seed| SimDevice::new(16 << 20, seed));
        let devices = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
        let local = Local::make_legs(devices).await.unwrap();
        for sequence in 1..=5 {
            local.write_slot(&named(sequence)).await.unwrap();
        }
        // One place after the other rots.
        for place in [4, 5] {
            sims[0].misplace(Geometry::slot_offset(0, place), &[7; BLOCK_SIZE]);
            assert_eq!(local.read_slots().await.unwrap()[0], named(5));
        }
        sims[0].misplace(Geometry::slot_offset(0, 5), &[7; BLOCK_SIZE]);
        drop(local);
        let alone = open(&sims[..1], true).await;
        let next = alone.read_slots().await.unwrap().remove(0);
        let next = VdiSlot { sequence: next.sequence + 1, ..next };
        assert_eq!(Geometry::slot_offset(0, next.sequence), Geometry::slot_offset(0, 5));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slot_is_not_given_up_while_a_leg_that_may_have_it_cannot_be_read() {
        let sims = [1, 2].map(|seed| SimDevice::new(16 << 20, seed));
        let devices = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
        let local = Local::make_legs(devices).await.unwrap();
        local.write_slot(&named(5)).await.unwrap();
        for copy in [0, 1] {
            let of_another = VdiSlot { slot: 1, ..named(5) }.encode();
            let of_another = of_another.as_slice().try_into().expect("a block");
            sims[0].misplace(Geometry::slot_offset(0, copy), of_another);
        }
        sims[1].set_rates(FaultRates { read_io: 1.0, ..FaultRates::default() });
        let refused = local.read_slots().await.unwrap_err();
        assert!(matches!(refused, CacheError::Device(_)), "{refused}");
        assert_eq!(local.members().len(), 2);
        sims[1].set_rates(FaultRates::default());
        assert_eq!(local.read_slots().await.unwrap()[0], named(5));
        sims[1].set_rates(FaultRates { read_io: 1.0, ..FaultRates::default() });
        assert_eq!(local.read_slots().await.unwrap()[0], named(5), "the first leg was given it");
    }

    #[tokio::test(start_paused = true)]
    async fn a_leg_that_takes_no_table_is_out() {
        let sims = [1, 2].map(|seed| SimDevice::new(16 << 20, seed));
        let devices = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
        let local = Local::make_legs(devices).await.unwrap();
        sims[0].set_rates(FaultRates { read_io: 1.0, write_io: 1.0, ..FaultRates::default() });
        local.read_slots().await.unwrap();
        assert!(!local.members().contains(0));
    }
}
