//! Radix tree node: 256 pointers in one block, nothing else. The checksum is in the parent's pointer.

use crate::buf::is_zero;
use crate::crc::crc32c;
use crate::format::head::Damage;
use crate::format::pointer::{POINTER_SIZE, Pointer};
use crate::types::BLOCK_SIZE;
use std::fmt;

/// Entries of a node.
pub const NODE_ENTRIES: usize = 256;
/// log2 of [`NODE_ENTRIES`].
pub const NODE_SHIFT: u32 = 8;
/// Tallest tree: 4 PiB.
pub const HEIGHT_MAX: u8 = 5;

const _: () = assert!(NODE_ENTRIES * POINTER_SIZE == BLOCK_SIZE);

/// A node whose entries were all checked for form.
#[derive(Clone, PartialEq, Eq)]
pub struct Node {
    raw: Box<[u8; BLOCK_SIZE]>,
}

impl Node {
    /// A node without children.
    #[must_use]
    pub fn empty() -> Self {
        Self { raw: Box::new([0; BLOCK_SIZE]) }
    }

    /// Checks a node's bytes for form (not their checksum).
    ///
    /// # Errors
    /// An entry that no node ever holds, or too few bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        let raw: &[u8; BLOCK_SIZE] = bytes.try_into().map_err(|_| Damage::Short)?;
        let (entries, _) = raw.as_chunks::<POINTER_SIZE>();
        for entry in entries {
            Pointer::decode(*entry)?;
        }
        Ok(Self { raw: Box::new(*raw) })
    }

    /// Hands the children in a node's bytes to `child`, checked as by [`decode`](Self::decode), in order and without a copy: for
    /// walks over everything.
    ///
    /// # Errors
    /// As [`decode`](Self::decode); some children may have been handed over.
    #[inline]
    pub fn children_in(bytes: &[u8], mut child: impl FnMut(Pointer)) -> Result<(), Damage> {
        let raw: &[u8; BLOCK_SIZE] = bytes.try_into().map_err(|_| Damage::Short)?;
        let (entries, _) = raw.as_chunks::<POINTER_SIZE>();
        for entry in entries {
            let pointer = Pointer::decode(*entry)?;
            if !pointer.is_sparse() {
                child(pointer);
            }
        }
        Ok(())
    }

    /// The child in `slot`.
    #[must_use]
    pub fn get(&self, slot: u8) -> Pointer {
        let (entries, _) = self.raw.as_chunks::<POINTER_SIZE>();
        Pointer::from_bits(u128::from_le_bytes(entries[usize::from(slot)]))
    }

    /// Replaces the child in `slot`.
    pub fn set(&mut self, slot: u8, pointer: Pointer) {
        let (entries, _) = self.raw.as_chunks_mut::<POINTER_SIZE>();
        entries[usize::from(slot)] = pointer.encode();
    }

    /// All children that are not holes, with their slots.
    #[inline]
    pub fn children(&self) -> impl Iterator<Item = (u8, Pointer)> + '_ {
        let (entries, _) = self.raw.as_chunks::<POINTER_SIZE>();
        let slots = (0..=255u8).zip(entries);
        let pointers = slots.map(|(s, entry)| (s, Pointer::from_bits(u128::from_le_bytes(*entry))));
        pointers.filter(|(_, p)| !p.is_sparse())
    }

    /// True if there is no child.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        is_zero(&self.raw[..])
    }

    /// The block's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8; BLOCK_SIZE] {
        &self.raw
    }

    /// CRC32C of the block.
    #[must_use]
    pub fn crc(&self) -> u32 {
        crc32c(self.raw.as_slice())
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.children()).finish()
    }
}

/// Blocks that one entry of a node at `level` stands for; level 1 is the leaves.
#[must_use]
pub const fn entry_span(level: u8) -> u64 {
    1 << (NODE_SHIFT * (level as u32 - 1))
}

/// Blocks that a tree of `height` levels maps.
#[must_use]
pub const fn tree_span(height: u8) -> u64 {
    1 << (NODE_SHIFT * height as u32)
}

/// Levels needed for a disk of `blocks` blocks.
#[must_use]
pub fn height_for(blocks: u64) -> u8 {
    (1..=HEIGHT_MAX).find(|&h| tree_span(h) >= blocks).unwrap_or(HEIGHT_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Birth, Gba};
    use proptest::prelude::*;

    #[test]
    fn heights_follow_the_size() {
        assert_eq!(height_for(1), 1);
        assert_eq!(height_for(256), 1);
        assert_eq!(height_for(257), 2);
        assert_eq!(height_for((64 << 30) >> 12), 3);
        assert_eq!(height_for(((64 << 30) >> 12) + 1), 4);
        assert_eq!(height_for((16 << 40) >> 12), 4);
        assert_eq!(height_for((256 << 40) >> 12), 5);
        assert_eq!(entry_span(1), 1);
        assert_eq!(entry_span(3), 65536);
    }

    #[test]
    fn entries_sit_where_the_document_says() {
        let mut node = Node::empty();
        assert!(node.is_empty());
        let pointer = Pointer { gba: Gba(7), read_only: false, birth: Birth(9), crc: 3 };
        node.set(2, pointer);
        assert_eq!(&node.bytes()[32..48], &pointer.encode());
        assert_eq!(node.children().collect::<Vec<_>>(), vec![(2, pointer)]);
        let mut seen = Vec::new();
        assert_eq!(Node::children_in(node.bytes(), |child| seen.push(child)), Ok(()));
        assert_eq!(seen, [pointer]);
        assert_eq!(Node::decode(node.bytes()), Ok(node));
    }

    proptest! {
        #[test]
        fn garbage_is_judged_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let decoded = Node::decode(&bytes).map(drop);
            prop_assert_eq!(Node::children_in(&bytes, drop), decoded);
        }
    }
}
