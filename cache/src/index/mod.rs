//! Where each block of a disk lies locally.
//!
//! An entry is a place on the cache device and the CRC32C of the block there. Memory is the point: 10 bytes per block in
//! sparse regions, 8 in dense ones, so that a gibibyte of random 4 KiB blocks stays below 3 MiB (rule L11).
//!
//! Order of precedence, newest first: patches, entries, zero ranges, holes (`holes.rs`). It holds because a write replaces the entry and
//! any patch of its block, and a zeroing removes entries and patches of its range (see `Index::zero`).

mod holes;
mod patches;
mod region;
#[cfg(test)]
mod tests;
mod zeros;

pub use holes::Holes;
pub use patches::{Patch, PatchBase, PatchSource, Patched};
pub use zeros::ZeroRanges;

use blockstore::sabotage::{self, Bug};
use blockstore::types::{Lba, Lsn};
use hashbrown::HashMap;
use region::{REGION_SHIFT, Region};

/// A block on the cache device, counted from the first block of segment 0.
pub type Slot = u32;

/// Marks an entry whose block is patched: look in [`Index::patched`].
const PATCHED: Slot = u32::MAX;

/// What the index knows of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// One whole block.
    At { slot: Slot, crc: u32 },
    /// A base with sector patches over it.
    Patched(&'a Patched),
    /// Zeros: not committed yet, or known not to be in the store.
    Zero,
    /// Nothing: the store's image counts.
    Absent,
}

/// The index of one disk.
#[derive(Debug, Default)]
pub struct Index {
    regions: HashMap<u32, Region>,
    patches: HashMap<u64, Patched>,
    zeros: ZeroRanges,
    holes: Holes,
}

impl Index {
    /// Looks up a block.
    #[must_use]
    pub fn get(&self, lba: Lba) -> Found<'_> {
        if let Some((slot, crc)) = self.entry(lba) {
            if slot == PATCHED {
                return self.patches.get(&lba.0).map_or(Found::Absent, Found::Patched);
            }
            return Found::At { slot, crc };
        }
        let zero = self.zeros.contains(lba) || self.holes.contains(lba);
        if zero { Found::Zero } else { Found::Absent }
    }

    /// A whole block was written at `slot`.
    pub fn insert(&mut self, lba: Lba, slot: Slot, crc: u32) {
        debug_assert_ne!(slot, PATCHED);
        self.holes.remove(lba.0, lba.0 + 1);
        let (region, key) = split(lba);
        let old = self.regions.entry(region).or_default().insert(key, slot, crc);
        if old == Some(PATCHED) {
            self.patches.remove(&lba.0);
        }
    }

    /// Some sectors of a block were written or zeroed.
    pub fn patch(&mut self, lba: Lba, lsn: Lsn, patch: Patch) {
        let base = match self.get(lba) {
            Found::Patched(_) => None,
            Found::At { slot, crc } => Some(PatchBase::At { slot, crc }),
            Found::Zero => Some(PatchBase::Zero),
            Found::Absent => Some(PatchBase::Store),
        };
        if let Some(base) = base {
            self.holes.remove(lba.0, lba.0 + 1);
            let (region, key) = split(lba);
            self.regions.entry(region).or_default().insert(key, PATCHED, 0);
            self.patches.insert(lba.0, Patched::new(base));
        }
        if let Some(patched) = self.patches.get_mut(&lba.0) {
            patched.push(lsn, patch);
        }
    }

    /// `blocks` whole blocks read as zeros from `lsn` on.
    pub fn zero(&mut self, lba: Lba, blocks: u64, lsn: Lsn) {
        let end = lba.0.saturating_add(blocks);
        self.remove_range(lba.0, end);
        self.holes.remove(lba.0, end);
        self.zeros.insert(lba.0, end, lsn);
    }

    /// Keeps a block fetched from the store, unless something newer is known. Returns whether it was kept.
    pub fn fill(&mut self, lba: Lba, slot: Slot, crc: u32) -> bool {
        let absent = matches!(self.get(lba), Found::Absent);
        if absent {
            self.insert(lba, slot, crc);
        }
        absent
    }

    /// The store does not have these blocks: those of which nothing else is known read as zeros from here on.
    pub fn hole(&mut self, lba: Lba, blocks: u64) {
        for (start, end) in self.absent(lba, blocks) {
            self.holes.insert(start, end);
        }
    }

    /// Forgets that the store does not have these blocks.
    pub fn forget_hole(&mut self, lba: Lba, blocks: u64) {
        self.holes.remove(lba.0, lba.0.saturating_add(blocks));
    }

    /// All runs of blocks that the store is known not to have, sorted.
    pub fn holes(&self) -> impl Iterator<Item = (Lba, u64)> + '_ {
        self.holes.ranges()
    }

    /// The parts of a range of which nothing is known, sorted.
    #[must_use]
    pub fn absent(&self, lba: Lba, blocks: u64) -> Vec<(u64, u64)> {
        let end = lba.0.saturating_add(blocks);
        let mut out: Vec<(u64, u64)> = Vec::new();
        for (start, end) in self.without_entries(lba.0, end) {
            // Zeros and holes are ranges themselves: what is left of a run is found from bound to bound.
            let mut at = start;
            while at < end {
                let (known, until) = match (self.zeros.run(at), self.holes.run(at)) {
                    ((false, zeros), (false, holes)) => (false, zeros.min(holes)),
                    ((true, zeros), (true, holes)) => (true, zeros.max(holes)),
                    ((true, until), _) | (_, (true, until)) => (true, until),
                };
                let until = until.min(end);
                match out.last_mut() {
                    _ if known => {}
                    Some(last) if last.1 == at => last.1 = until,
                    _ => out.push((at, until)),
                }
                at = until;
            }
        }
        out
    }

    /// Blocks of the disk that read the same with and without the store: whole blocks held, and zeros.
    #[must_use]
    pub fn known_blocks(&self) -> u64 {
        // A patched block may need its base from the store.
        let whole = self.len().saturating_sub(self.patches.len()) as u64;
        whole + self.zero_blocks()
    }

    /// Blocks that are known to be zeros.
    #[must_use]
    pub fn zero_blocks(&self) -> u64 {
        self.zeros.blocks() + self.holes.blocks()
    }

    /// The store's image reaches `lsn`: forgets patches up to it; zero ranges up to it are holes from now on, but for
    /// what was written over them. Returns whether there were any.
    pub fn committed(&mut self, lsn: Lsn) -> bool {
        let retired = self.zeros.retire(lsn);
        let zeros = !retired.is_empty();
        // Before patches go: what they change in a zeroed block is in the store, too.
        for (start, end) in retired {
            self.hole(Lba(start), end - start);
        }
        let before = self.patches.len();
        let regions = &mut self.regions;
        self.patches.retain(|&lba, patched| {
            let keep = patched.last_lsn() > lsn && !sabotage::on(Bug::RetireAllPatches);
            if !keep {
                remove_entry(regions, Lba(lba));
            }
            keep
        });
        zeros || self.patches.len() != before
    }

    /// Forgets `lba` where it lies in `range` (slots of a segment that is being evicted; all of it is committed).
    pub fn evict(&mut self, lba: Lba, range: &std::ops::Range<Slot>) {
        match self.entry(lba) {
            Some((PATCHED, _)) => {
                if let Some(patched) = self.patches.get_mut(&lba.0) {
                    patched.evict(range);
                    if patched.is_plain_store() {
                        self.patches.remove(&lba.0);
                        remove_entry(&mut self.regions, lba);
                    }
                }
            }
            Some((slot, _)) if range.contains(&slot) => remove_entry(&mut self.regions, lba),
            _ => {}
        }
    }

    /// Forgets the entry of `lba` if it is at `slot` (its bytes turned out bad).
    pub fn forget(&mut self, lba: Lba, slot: Slot) {
        if matches!(self.entry(lba), Some((found, _)) if found == slot) {
            remove_entry(&mut self.regions, lba);
        }
    }

    /// Blocks with an entry.
    #[must_use]
    pub fn len(&self) -> usize {
        self.regions.values().map(Region::len).sum()
    }

    /// No block has an entry, and nothing is zeroed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty() && self.zeros.is_empty() && self.holes.is_empty()
    }

    /// Bytes of memory in use, estimated from capacities.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.regions.values().map(Region::memory).sum::<usize>()
            + self.regions.capacity() * (size_of::<(u32, Region)>() + 1)
            + self.patches.capacity() * (size_of::<(u64, Patched)>() + 1)
            + self.zeros.memory()
            + self.holes.memory()
    }

    fn entry(&self, lba: Lba) -> Option<(Slot, u32)> {
        let (region, key) = split(lba);
        self.regions.get(&region)?.get(key)
    }

    /// Regions with entries that a range touches, in any order.
    fn regions_of(&self, start: u64, end: u64) -> Vec<u32> {
        let first = (start >> REGION_SHIFT) as u32;
        let last = ((end - 1) >> REGION_SHIFT) as u32;
        let span = u64::from(last) - u64::from(first) + 1;
        if span > self.regions.len() as u64 {
            self.regions.keys().copied().filter(|r| (first..=last).contains(r)).collect()
        } else {
            (first..=last).filter(|r| self.regions.contains_key(r)).collect()
        }
    }

    /// The runs of a range without entries, sorted.
    fn without_entries(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        if start >= end {
            return runs;
        }
        let mut touched = self.regions_of(start, end);
        touched.sort_unstable();
        let mut from = start;
        for number in touched {
            let base = u64::from(number) << REGION_SHIFT;
            let inside = base.max(start)..(base + (1 << REGION_SHIFT)).min(end);
            for lba in inside {
                if self.entry(Lba(lba)).is_some() {
                    if from < lba {
                        runs.push((from, lba));
                    }
                    from = lba + 1;
                }
            }
        }
        if from < end {
            runs.push((from, end));
        }
        runs
    }

    fn remove_range(&mut self, start: u64, end: u64) {
        for number in self.regions_of(start, end) {
            let base = u64::from(number) << REGION_SHIFT;
            let from = start.saturating_sub(base) as u16;
            let to = (end - base).min(1 << REGION_SHIFT) as u16;
            let Some(region) = self.regions.get_mut(&number) else { continue };
            let patches = &mut self.patches;
            region.remove_range(from, to, |key, slot| {
                if slot == PATCHED {
                    patches.remove(&(base + u64::from(key)));
                }
            });
            if region.len() == 0 {
                self.regions.remove(&number);
            }
        }
    }
}

fn remove_entry(regions: &mut HashMap<u32, Region>, lba: Lba) {
    let (number, key) = split(lba);
    if let Some(region) = regions.get_mut(&number) {
        region.remove(key);
        if region.len() == 0 {
            regions.remove(&number);
        }
    }
}

/// Region number and place inside it. Disks end at 2^36 blocks, so that the number fits.
fn split(lba: Lba) -> (u32, u16) {
    ((lba.0 >> REGION_SHIFT) as u32, (lba.0 & ((1 << REGION_SHIFT) - 1)) as u16)
}

/// Applies a zeroing of `blocks` blocks of which the first and the last may be partial (sector masks).
pub fn apply_zero(index: &mut Index, lba: Lba, blocks: u64, masks: (u8, u8), lsn: Lsn) {
    const WHOLE: u8 = crate::format::record::WHOLE;
    let (mut first, mut end) = (lba.0, lba.0 + blocks);
    let mut edge = |lba: u64, sectors: u8| {
        index.patch(Lba(lba), lsn, Patch { source: PatchSource::Zero, sectors });
    };
    if masks.0 != WHOLE {
        edge(first, masks.0);
        first += 1;
    }
    if masks.1 != WHOLE && end > first {
        end -= 1;
        edge(end, masks.1);
    }
    if first < end {
        index.zero(Lba(first), end - first, lsn);
    }
}

/// What a block or a run of blocks holds, see [`Index::contents`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// One whole block.
    At { slot: Slot, crc: u32 },
    /// A base with sector patches over it.
    Patched(&'a Patched),
    /// Zeros.
    Zero { blocks: u64 },
}

impl Index {
    /// Everything in the index, disjoint, entries sorted by LBA before zero ranges sorted by LBA.
    pub fn contents(&self) -> impl Iterator<Item = (Lba, Content<'_>)> {
        let mut numbers: Vec<u32> = self.regions.keys().copied().collect();
        numbers.sort_unstable();
        let mut taken = Vec::new();
        let mut entries = Vec::new();
        for number in numbers {
            let base = u64::from(number) << REGION_SHIFT;
            self.regions[&number].for_each(|key, slot, crc| {
                let lba = base + u64::from(key);
                taken.push(lba);
                entries.push((lba, slot, crc));
            });
        }
        let zeros = self.zeros.without(&taken);
        let whole = entries.into_iter().filter_map(|(lba, slot, crc)| {
            if slot == PATCHED {
                return self.patches.get(&lba).map(|p| (Lba(lba), Content::Patched(p)));
            }
            Some((Lba(lba), Content::At { slot, crc }))
        });
        whole.chain(
            zeros
                .into_iter()
                .map(|(start, end)| (Lba(start), Content::Zero { blocks: end - start })),
        )
    }
}
