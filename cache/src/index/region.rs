//! Entries of 2048 neighbouring blocks: a sorted array while few, a table once that is smaller.

/// log2 of the blocks in a region.
pub const REGION_SHIFT: u32 = 11;
const BLOCKS: usize = 1 << REGION_SHIFT;
/// From here on 10 bytes an entry, with some room to grow, take more than 8 bytes a block.
const DENSE_FROM: usize = BLOCKS * 3 / 4;
/// Below this a dense region turns sparse again (with a gap, so that it does not flap).
const SPARSE_BELOW: usize = BLOCKS / 2;
/// Free place in a dense table.
const EMPTY: u32 = u32::MAX - 1;

#[derive(Clone, Copy, Debug)]
#[repr(C, packed)]
struct Packed {
    key: u16,
    slot: u32,
    crc: u32,
}

#[derive(Debug)]
struct Dense {
    slots: [u32; BLOCKS],
    crcs: [u32; BLOCKS],
    len: usize,
}

#[derive(Debug)]
enum Shape {
    Sparse(Vec<Packed>),
    Dense(Box<Dense>),
}

/// See the module.
#[derive(Debug)]
pub struct Region(Shape);

impl Default for Region {
    fn default() -> Self {
        Self(Shape::Sparse(Vec::new()))
    }
}

impl Region {
    pub fn len(&self) -> usize {
        match &self.0 {
            Shape::Sparse(entries) => entries.len(),
            Shape::Dense(dense) => dense.len,
        }
    }

    pub fn memory(&self) -> usize {
        match &self.0 {
            Shape::Sparse(entries) => entries.capacity() * size_of::<Packed>() + 16,
            Shape::Dense(_) => size_of::<Dense>() + 16,
        }
    }

    pub fn get(&self, key: u16) -> Option<(u32, u32)> {
        match &self.0 {
            Shape::Sparse(entries) => {
                let at = entries.binary_search_by_key(&key, |e| e.key).ok()?;
                Some((entries[at].slot, entries[at].crc))
            }
            Shape::Dense(dense) => {
                let slot = dense.slots[usize::from(key)];
                (slot != EMPTY).then(|| (slot, dense.crcs[usize::from(key)]))
            }
        }
    }

    /// Inserts or replaces; returns the slot that was there.
    pub fn insert(&mut self, key: u16, slot: u32, crc: u32) -> Option<u32> {
        match &mut self.0 {
            Shape::Sparse(entries) => {
                let at = match entries.binary_search_by_key(&key, |e| e.key) {
                    Ok(at) => {
                        let old = entries[at].slot;
                        entries[at] = Packed { key, slot, crc };
                        return Some(old);
                    }
                    Err(at) => at,
                };
                if entries.len() == entries.capacity() {
                    entries.reserve_exact(entries.len() / 8 + 4);
                }
                entries.insert(at, Packed { key, slot, crc });
                if entries.len() >= DENSE_FROM {
                    self.make_dense();
                }
                None
            }
            Shape::Dense(dense) => {
                let place = &mut dense.slots[usize::from(key)];
                let old = (*place != EMPTY).then_some(*place);
                *place = slot;
                dense.crcs[usize::from(key)] = crc;
                dense.len += usize::from(old.is_none());
                old
            }
        }
    }

    pub fn remove(&mut self, key: u16) {
        match &mut self.0 {
            Shape::Sparse(entries) => {
                if let Ok(at) = entries.binary_search_by_key(&key, |e| e.key) {
                    entries.remove(at);
                }
            }
            Shape::Dense(dense) => {
                let place = &mut dense.slots[usize::from(key)];
                if *place != EMPTY {
                    *place = EMPTY;
                    dense.len -= 1;
                }
                if dense.len < SPARSE_BELOW {
                    self.make_sparse();
                }
            }
        }
    }

    /// Removes keys in `from..to`, telling each with its slot.
    pub fn remove_range(&mut self, from: u16, to: u16, mut removed: impl FnMut(u16, u32)) {
        match &mut self.0 {
            Shape::Sparse(entries) => entries.retain(|e| {
                let inside = (from..to).contains(&{ e.key });
                if inside {
                    removed(e.key, e.slot);
                }
                !inside
            }),
            Shape::Dense(dense) => {
                for key in from..to {
                    let place = &mut dense.slots[usize::from(key)];
                    if *place != EMPTY {
                        removed(key, *place);
                        *place = EMPTY;
                        dense.len -= 1;
                    }
                }
                if dense.len < SPARSE_BELOW {
                    self.make_sparse();
                }
            }
        }
    }

    /// Visits all entries in order of their keys.
    pub fn for_each(&self, mut visit: impl FnMut(u16, u32, u32)) {
        match &self.0 {
            Shape::Sparse(entries) => entries.iter().for_each(|e| visit(e.key, e.slot, e.crc)),
            Shape::Dense(dense) => {
                for (key, (&slot, &crc)) in dense.slots.iter().zip(&dense.crcs).enumerate() {
                    if slot != EMPTY {
                        visit(key as u16, slot, crc);
                    }
                }
            }
        }
    }

    fn make_dense(&mut self) {
        let Shape::Sparse(entries) = &self.0 else { return };
        let mut dense =
            Box::new(Dense { slots: [EMPTY; BLOCKS], crcs: [0; BLOCKS], len: entries.len() });
        for entry in entries {
            dense.slots[usize::from(entry.key)] = entry.slot;
            dense.crcs[usize::from(entry.key)] = entry.crc;
        }
        self.0 = Shape::Dense(dense);
    }

    fn make_sparse(&mut self) {
        let Shape::Dense(dense) = &self.0 else { return };
        let mut entries = Vec::with_capacity(dense.len);
        for (key, (&slot, &crc)) in dense.slots.iter().zip(&dense.crcs).enumerate() {
            if slot != EMPTY {
                entries.push(Packed { key: key as u16, slot, crc });
            }
        }
        self.0 = Shape::Sparse(entries);
    }
}
