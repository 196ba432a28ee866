//! Nodes and pointers of the shared store's radix tree.
//!
//! The first byte chooses: the rest is the node itself (padded with zeros), or patches to a valid node. What decodes must
//! encode to the same bytes, whichever way it is put together.

#![no_main]

use ballast_fuzz::Script;
use blockstore::crc::crc32c;
use blockstore::format::node::{HEIGHT_MAX, Node, entry_span, height_for, tree_span};
use blockstore::format::pointer::{POINTER_SIZE, Pointer};
use blockstore::types::{BLOCK_SIZE, Birth, Gba};
use libfuzzer_sys::fuzz_target;

fn valid_node() -> Node {
    let mut node = Node::empty();
    for slot in [0, 1, 2, 127, 255u8] {
        let read_only = slot == 2;
        let birth = Birth(1 + u64::from(slot));
        node.set(slot, Pointer { gba: Gba(300 + u64::from(slot)), read_only, birth, crc: 7 });
    }
    node
}

fn check(bytes: &[u8; BLOCK_SIZE]) {
    let (entries, _) = bytes.as_chunks::<POINTER_SIZE>();
    let Ok(node) = Node::decode(bytes) else {
        assert!(
            entries.iter().any(|entry| Pointer::decode(*entry).is_err()),
            "refused a good node"
        );
        return;
    };
    let mut copy = Node::empty();
    for (slot, entry) in (0..=255u8).zip(entries) {
        let pointer = node.get(slot);
        assert_eq!(Pointer::decode(*entry), Ok(pointer));
        assert_eq!(pointer.encode(), *entry);
        assert!(!pointer.is_sparse() || pointer == Pointer::SPARSE);
        assert!(!pointer.is_exclusive(pointer.birth));
    }
    for (slot, pointer) in node.children() {
        assert!(!pointer.is_sparse());
        copy.set(slot, pointer);
    }
    assert_eq!(copy.bytes(), bytes);
    assert_eq!(node.is_empty(), node.children().next().is_none());
    assert_eq!(node.crc(), crc32c(bytes));
}

fuzz_target!(|input: &[u8]| {
    let mut script = Script::new(input);
    if script.byte() & 1 == 0 {
        let mut bytes = *valid_node().bytes();
        script.patch_all(&mut bytes);
        check(&bytes);
        return;
    }
    let blocks = script.number(5);
    let height = height_for(blocks);
    assert!(tree_span(height) >= blocks || height == HEIGHT_MAX);
    assert!(height == 1 || tree_span(height - 1) < blocks);
    assert_eq!(entry_span(height) << 8, tree_span(height));
    let raw = script.rest();
    assert!(raw.len() == BLOCK_SIZE || Node::decode(raw).is_err());
    let mut bytes = [0; BLOCK_SIZE];
    let len = raw.len().min(BLOCK_SIZE);
    bytes[..len].copy_from_slice(&raw[..len]);
    check(&bytes);
});
