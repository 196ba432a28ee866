//! The values one sector had, oldest first: a base that is settled, then one entry per request.

use smallvec::{SmallVec, smallvec};

use crate::client::stamp::{Found, Sequence};

/// A value and the request that made it (0: the disk's creation).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Value {
    /// The request.
    pub sequence: Sequence,
    /// Zeros rather than the request's stamp.
    pub zero: bool,
}

impl Value {
    /// Whether a sector that holds this value reads as `found`.
    #[must_use]
    pub fn matches(self, found: Found) -> bool {
        match found {
            Found::Zero => self.zero,
            Found::Stamp(sequence) => !self.zero && sequence == self.sequence,
            _ => false,
        }
    }
}

/// Never empty. Entries are packed (sequence × 2 + zero): a disk has hundreds of thousands.
#[derive(Debug, Clone)]
pub struct History {
    entries: SmallVec<[u64; 2]>,
}

impl Default for History {
    fn default() -> Self {
        Self { entries: smallvec![pack(Value { sequence: 0, zero: true })] }
    }
}

fn pack(value: Value) -> u64 {
    value.sequence << 1 | u64::from(value.zero)
}

fn unpack(entry: u64) -> Value {
    Value { sequence: entry >> 1, zero: entry & 1 == 1 }
}

impl History {
    /// Adds the value of a later request.
    pub fn push(&mut self, sequence: Sequence, zero: bool) {
        debug_assert!(sequence > self.last_sequence());
        self.entries.push(pack(Value { sequence, zero }));
    }

    /// Every value, oldest first.
    pub fn values(&self) -> impl DoubleEndedIterator<Item = Value> + '_ {
        self.entries.iter().map(|&entry| unpack(entry))
    }

    /// The values of request `floor` and later ones.
    pub fn values_from(&self, floor: Sequence) -> impl Iterator<Item = Value> + '_ {
        self.values().filter(move |value| value.sequence >= floor)
    }

    /// The latest request of which `condition` holds; the base's when of none.
    #[must_use]
    pub fn last_where(&self, condition: impl Fn(Sequence) -> bool) -> Sequence {
        let found = self.values().rev().find(|value| condition(value.sequence));
        found.map_or(unpack(self.entries[0]).sequence, |value| value.sequence)
    }

    /// Request of the latest value.
    #[must_use]
    pub fn last_sequence(&self) -> Sequence {
        unpack(*self.entries.last().expect("never empty")).sequence
    }

    /// Whether there is one value only, which every cut allows.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.entries.len() == 1
    }

    /// Drops values made by requests after `cut`.
    pub fn truncate_after(&mut self, cut: Sequence) {
        while self.entries.len() > 1 && self.last_sequence() > cut {
            self.entries.pop();
        }
    }

    /// Drops the latest value unless it is what was found.
    pub fn drop_last_unless(&mut self, found: Found) {
        let last = unpack(*self.entries.last().expect("never empty"));
        if self.entries.len() > 1 && !last.matches(found) {
            self.entries.pop();
        }
    }

    /// Drops values that were replaced by request `cut` or earlier.
    pub fn forget_before(&mut self, cut: Sequence) {
        let newer = self.entries.iter().filter(|&&entry| unpack(entry).sequence > cut).count();
        let keep = (newer + 1).min(self.entries.len());
        let drop = self.entries.len() - keep;
        self.entries.drain(..drop);
    }
}
