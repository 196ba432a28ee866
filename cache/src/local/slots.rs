//! The table of slots: which disks the cache holds a log of, and from where each is replayed.

use super::Local;
use crate::error::CacheError;
use crate::format::legs::LegSet;
use crate::format::slot::VdiSlot;
use crate::format::{FormatError, Geometry};
use blockstore::buf::AlignedBuf;
use blockstore::device::{DeviceError, DeviceErrorKind};
use blockstore::types::BLOCK_SIZE;
use std::ops::Range;

/// Bytes of the two copies of a slot.
const SLOT_LEN: usize = 2 * BLOCK_SIZE;

impl Local {
    /// All slots; those never written are free. A slot of which all copies are damaged is an error, since a disk's log
    /// hangs on it. What a leg is behind in is written to it, and all of the table if it cannot be read there: a member
    /// holds everything (rule L5).
    pub async fn read_slots(&self) -> Result<Vec<VdiSlot>, CacheError> {
        let slots = self.geometry.slots;
        let first = Geometry::slot_offset(0, 0);
        let tables = self.read_each(first, slots as usize * SLOT_LEN).await?;
        let read = tables.iter().fold(LegSet::NONE, |read, (leg, _)| read.with(*leg));
        let unread = self.members().minus(read);
        let mut found = Vec::new();
        let mut whole = AlignedBuf::zeroed(slots as usize * SLOT_LEN);
        for slot in 0..slots {
            let at = slot as usize * SLOT_LEN..(slot as usize + 1) * SLOT_LEN;
            let copies: Vec<(u8, Result<VdiSlot, FormatError>)> = tables
                .iter()
                .map(|(leg, table)| {
                    let (a, b) = table[at.clone()].split_at(BLOCK_SIZE);
                    (*leg, newest(slot, [a, b]))
                })
                .collect();
            if let Some(leg) = unread.iter().next()
                && let Some(damage) = self.damage_of(slot, &tables)
            {
                return Err(self.unread_slot(leg, slot, &damage.to_string()).into());
            }
            let good = copies.iter().filter_map(|(leg, copy)| Some((leg, copy.as_ref().ok()?)));
            let Some((leg, best)) = good.max_by_key(|(_, copy)| copy.sequence) else {
                let source = copies.into_iter().find_map(|(_, copy)| copy.err());
                let why = source.map(|source| source.to_string()).unwrap_or_default();
                return Err(CacheError::Unsupported {
                    path: self.path.clone(),
                    what: format!(
                        "slot {slot}: {why}; the disk whose log it holds cannot be told: restore the device from a good copy"
                    ),
                });
            };
            // Both copies of one leg: a newer one that only the leg has that cannot be read must not come back.
            let (_, table) = tables.iter().find(|(other, _)| other == leg).expect("it has a copy");
            whole[at.clone()].copy_from_slice(&table[at.clone()]);
            let best = best.clone();
            for (leg, _) in copies.iter().filter(|(_, copy)| copy.as_ref() != Ok(&best)) {
                let offset = Geometry::slot_offset(slot, best.sequence);
                self.repair(*leg, offset, AlignedBuf::copy_of(&best.encode())).await?;
            }
            // It would be in doubt again at a start that gets nothing of the other leg.
            let other = best.sequence + 1;
            for (leg, table) in tables.iter().filter(|_| tables.len() > 1) {
                let copy = &table[at.clone()][copy_at(other)];
                if is_damaged(&VdiSlot::decode(copy, slot)) {
                    let offset = Geometry::slot_offset(slot, other);
                    self.repair(*leg, offset, AlignedBuf::copy_of(&best.encode())).await?;
                }
            }
            found.push(best);
        }
        for leg in unread.iter() {
            self.repair(leg, first, AlignedBuf::copy_of(&whole)).await?;
        }
        Ok(found)
    }

    /// What is wrong with a copy of a slot: it may have been the newer one, which only a leg that gave nothing has then.
    fn damage_of(&self, slot: u32, tables: &[(u8, AlignedBuf)]) -> Option<FormatError> {
        let at = slot as usize * SLOT_LEN..(slot as usize + 1) * SLOT_LEN;
        let copies = tables.iter().flat_map(|(_, table)| table[at.clone()].chunks(BLOCK_SIZE));
        copies.map(|copy| VdiSlot::decode(copy, slot)).find(is_damaged).and_then(Result::err)
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
                "a copy of this slot is damaged on the other leg ({why}), so this one is needed; see to it, then try again, or go on \
                 without it (--degraded): nothing was changed"
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

/// Where the copy of a slot with this sequence lies among both.
fn copy_at(sequence: u64) -> Range<usize> {
    let first = (Geometry::slot_offset(0, sequence) - Geometry::slot_offset(0, 0)) as usize;
    first..first + BLOCK_SIZE
}

fn is_damaged(copy: &Result<VdiSlot, FormatError>) -> bool {
    !matches!(copy, Ok(_) | Err(FormatError::Absent(_)))
}

/// The newer valid copy of a slot.
fn newest(slot: u32, copies: [&[u8]; 2]) -> Result<VdiSlot, FormatError> {
    match copies.map(|copy| VdiSlot::decode(copy, slot)) {
        [Ok(a), Ok(b)] => Ok(if a.sequence >= b.sequence { a } else { b }),
        // A torn write destroys only the older copy; the younger one stands.
        [Ok(one), Err(_)] | [Err(_), Ok(one)] => Ok(one),
        [Err(FormatError::Absent(_)), Err(FormatError::Absent(_))] => {
            Ok(VdiSlot { sequence: 0, slot, vdi: None, quarantined: None })
        }
        [Err(FormatError::Absent(_)), Err(error)] | [Err(error), Err(_)] => Err(error),
    }
}

#[cfg(test)]
mod tests {
    //! Goal: a leg whose table cannot be read, or is behind, does not stay a member without it (rule L5).
    //! Method: two simulated legs; one refuses reads at a start, then is the only one.

    use super::*;
    use blockstore::device::sim::{FaultRates, SimDevice};

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
