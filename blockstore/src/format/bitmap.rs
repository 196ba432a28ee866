//! A page of an extent's allocation bitmap (BMap) or reclaim bitmap: 96 bytes of header, 32,000 bits.
//!
//! The BMap is written only by the extent's owner, in place. A page that fails its checks reads as
//! "everything allocated": blocks leak until the garbage collector's next cycle, none is given twice.

use crate::format::geometry::Geometry;
use crate::format::head::Damage;
use crate::types::{BLOCK_SIZE, Gba};
use std::fmt;
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Blocks that a page covers.
pub const PAGE_BITS: u64 = 32_000;
/// Blocks that are looked at together, where all of a page is; pages and extents hold whole numbers of them.
pub const WORD_BITS: u64 = 64;
const BIT_BYTES: usize = 4000;
const CRC_OFFSET: usize = 92;
const VERSION: u16 = 1;

/// Which bitmap a page belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapKind {
    /// Bit set = block allocated, or claimed by the owner.
    Allocation,
    /// Bit set = unreachable in the cycle that the page names.
    Reclaim,
}

impl BitmapKind {
    const fn magic(self) -> [u8; 8] {
        match self {
            Self::Allocation => *b"BALLBMAP",
            Self::Reclaim => *b"BALLRECL",
        }
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawPage {
    magic: [u8; 8],
    version: U16,
    reserved_a: [u8; 6],
    address: U64,
    sequence: U64,
    store: [u8; 16],
    gc_epoch: U64,
    extent_sequence: U64,
    owner_generation: U64,
    reserved_b: [u8; 20],
    crc: U32,
    bits: [u8; BIT_BYTES],
}

const _: () = {
    assert!(size_of::<RawPage>() == BLOCK_SIZE);
    assert!(std::mem::offset_of!(RawPage, crc) == CRC_OFFSET);
    assert!(std::mem::offset_of!(RawPage, bits) == 96);
    assert!(BIT_BYTES * 8 == PAGE_BITS as usize);
    assert!(PAGE_BITS.is_multiple_of(WORD_BITS));
};

/// A page of a bitmap.
#[derive(Clone, PartialEq, Eq)]
pub struct BitmapPage {
    /// Rises by one with each write.
    pub sequence: u64,
    /// Reclaim pages: the cycle that made it.
    pub gc_epoch: u64,
    /// Reclaim pages: the extent record's sequence when the cycle took its checkpoint.
    pub extent_sequence: u64,
    /// Reclaim pages: the owner's generation at that time.
    pub owner_generation: u64,
    bits: Box<[u8; BIT_BYTES]>,
}

impl BitmapPage {
    /// A page with every bit clear.
    #[must_use]
    pub fn clear() -> Self {
        Self {
            sequence: 0,
            gc_epoch: 0,
            extent_sequence: 0,
            owner_generation: 0,
            bits: Box::new([0; BIT_BYTES]),
        }
    }

    /// A page of the BMap of an extent whose blocks are all free: what is no block of disks is set.
    #[must_use]
    pub fn fresh(geometry: &Geometry, page: u32) -> Self {
        let mut content = Self::clear();
        let first = u64::from(page) * PAGE_BITS;
        let overhead = geometry.extent_overhead().saturating_sub(first);
        (0..overhead.min(PAGE_BITS)).for_each(|bit| content.set(bit, true));
        (geometry.page_bits(page)..PAGE_BITS).for_each(|bit| content.set(bit, true));
        content
    }

    /// A page with every bit set: how a damaged BMap page is read.
    #[must_use]
    pub fn full() -> Self {
        Self { bits: Box::new([0xff; BIT_BYTES]), ..Self::clear() }
    }

    /// The same page with another sequence number.
    #[must_use]
    pub fn with_sequence(self, sequence: u64) -> Self {
        Self { sequence, ..self }
    }

    /// True if the bit is set. Bits beyond the page count as set.
    #[must_use]
    pub fn get(&self, bit: u64) -> bool {
        self.bits.get(bit as usize / 8).is_none_or(|byte| byte >> (bit % 8) & 1 == 1)
    }

    /// Sets or clears a bit below [`PAGE_BITS`].
    pub fn set(&mut self, bit: u64, value: bool) {
        let byte = &mut self.bits[bit as usize / 8];
        if value {
            *byte |= 1 << (bit % 8);
        } else {
            *byte &= !(1 << (bit % 8));
        }
    }

    /// The [`WORD_BITS`] bits from `first` on, which is a multiple of as many, below [`PAGE_BITS`]; the first is the lowest.
    #[must_use]
    pub fn word(&self, first: u64) -> u64 {
        let (words, _) = self.bits.as_chunks();
        u64::from_le_bytes(words[(first / WORD_BITS) as usize])
    }

    /// Sets the bits that [`word`](Self::word) shows.
    pub fn set_word(&mut self, first: u64, word: u64) {
        let (words, _) = self.bits.as_chunks_mut();
        words[(first / WORD_BITS) as usize] = word.to_le_bytes();
    }

    /// How many of the first `limit` bits are clear.
    #[must_use]
    pub fn clear_bits(&self, limit: u64) -> u64 {
        let limit = limit.min(PAGE_BITS);
        let whole = limit as usize / 8;
        let set: u64 = self.bits[..whole].iter().map(|b| u64::from(b.count_ones())).sum();
        let rest = (whole as u64 * 8..limit).filter(|&bit| self.get(bit)).count() as u64;
        limit - set - rest
    }

    /// The next run of clear bits at or after `from` and below `limit`, as (first, length).
    #[must_use]
    pub fn next_clear_run(&self, from: u64, limit: u64) -> Option<(u64, u64)> {
        let limit = limit.min(PAGE_BITS);
        let mut first = from;
        while first < limit && self.get(first) {
            // Skip whole bytes of allocated blocks.
            if first.is_multiple_of(8) && self.bits[first as usize / 8] == 0xff {
                first += 8;
            } else {
                first += 1;
            }
        }
        if first >= limit {
            return None;
        }
        let mut end = first + 1;
        while end < limit && !self.get(end) {
            end += 1;
        }
        Some((first, end - first))
    }

    /// The block at `address`.
    #[must_use]
    pub fn encode(&self, kind: BitmapKind, store: Uuid, address: Gba) -> Vec<u8> {
        let mut raw = RawPage {
            magic: kind.magic(),
            version: U16::new(VERSION),
            reserved_a: [0; 6],
            address: U64::new(address.0),
            sequence: U64::new(self.sequence),
            store: store.into_bytes(),
            gc_epoch: U64::new(self.gc_epoch),
            extent_sequence: U64::new(self.extent_sequence),
            owner_generation: U64::new(self.owner_generation),
            reserved_b: [0; 20],
            crc: U32::ZERO,
            bits: *self.bits,
        };
        raw.crc = U32::new(checksum(raw.as_bytes()));
        raw.as_bytes().to_vec()
    }

    /// Decodes the page expected at `address`.
    ///
    /// # Errors
    /// Says which check failed.
    pub fn decode(
        bytes: &[u8],
        kind: BitmapKind,
        store: Uuid,
        address: Gba,
    ) -> Result<Self, Damage> {
        let raw = RawPage::ref_from_bytes(bytes).map_err(|_| Damage::Short)?;
        if raw.magic != kind.magic() {
            return Err(Damage::Magic);
        }
        let found = checksum(bytes);
        if found != raw.crc.get() {
            return Err(Damage::Crc { expected: raw.crc.get(), found });
        }
        if raw.version.get() > VERSION {
            return Err(Damage::Newer(raw.version.get()));
        }
        if raw.address.get() != address.0 {
            return Err(Damage::Address(raw.address.get()));
        }
        if raw.store != store.into_bytes() {
            return Err(Damage::Store(Uuid::from_bytes(raw.store)));
        }
        Ok(Self {
            sequence: raw.sequence.get(),
            gc_epoch: raw.gc_epoch.get(),
            extent_sequence: raw.extent_sequence.get(),
            owner_generation: raw.owner_generation.get(),
            bits: Box::new(raw.bits),
        })
    }
}

impl fmt::Debug for BitmapPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BitmapPage")
            .field("sequence", &self.sequence)
            .field("clear", &self.clear_bits(PAGE_BITS))
            .finish_non_exhaustive()
    }
}

/// CRC32C of the page without the checksum's own four bytes.
fn checksum(bytes: &[u8]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(&bytes[..CRC_OFFSET]);
    digest.update(&bytes[CRC_OFFSET + 4..]);
    digest.finalize() as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn runs_are_exactly_the_clear_bits(
            set in proptest::collection::btree_set(0u64..400, 0..300), limit in 1u64..400,
        ) {
            let mut page = BitmapPage::clear();
            for &bit in &set {
                page.set(bit, true);
            }
            let mut found = BTreeSet::new();
            let mut from = 0;
            while let Some((first, len)) = page.next_clear_run(from, limit) {
                found.extend(first..first + len);
                from = first + len;
            }
            let expected: BTreeSet<u64> = (0..limit).filter(|b| !set.contains(b)).collect();
            prop_assert_eq!(page.clear_bits(limit), expected.len() as u64);
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn garbage_is_judged_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let _ = BitmapPage::decode(&bytes, BitmapKind::Allocation, Uuid::nil(), Gba(1));
        }
    }

    #[test]
    fn words_are_the_bits_in_order() {
        let mut page = BitmapPage::clear();
        page.set_word(PAGE_BITS - WORD_BITS, 1 << 63 | 1);
        assert!(page.get(PAGE_BITS - 1) && page.get(PAGE_BITS - WORD_BITS));
        assert_eq!(page.clear_bits(PAGE_BITS), PAGE_BITS - 2);
        page.set(WORD_BITS + 3, true);
        assert_eq!(page.word(WORD_BITS), 8);
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let store = Uuid::from_u128(5);
        let mut page = BitmapPage::clear();
        page.sequence = 3;
        page.set(77, true);
        let bytes = page.encode(BitmapKind::Allocation, store, Gba(9));
        assert_eq!(BitmapPage::decode(&bytes, BitmapKind::Allocation, store, Gba(9)), Ok(page));
        assert!(BitmapPage::decode(&bytes, BitmapKind::Reclaim, store, Gba(9)).is_err());
        assert!(BitmapPage::decode(&bytes, BitmapKind::Allocation, store, Gba(8)).is_err());
        for byte in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[byte] ^= 1 << (byte % 8);
            assert!(BitmapPage::decode(&bad, BitmapKind::Allocation, store, Gba(9)).is_err());
        }
    }
}
