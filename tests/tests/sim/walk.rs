//! What a store holds, found by walks that share nothing with a scrub.

use blockstore::Store;
use blockstore::format::pointer::Pointer;
use blockstore::format::vdi::{SnapshotIndex, VdiState};
use blockstore::types::Gba;
use std::collections::BTreeMap;

/// One write, whatever flags its pointers have.
pub type Key = (Gba, u64, u32);

pub fn key(pointer: Pointer) -> Key {
    (pointer.gba, pointer.birth.0, pointer.crc)
}

/// Everything that a disk or a snapshot leads to, and whether it is content. Nothing may change meanwhile.
pub async fn reachable(store: &Store) -> blockstore::Result<BTreeMap<Key, bool>> {
    let (mut found, mut stack, reader) = (BTreeMap::new(), Vec::new(), store.reader());
    for (_, view) in store.scan_vdis().await? {
        let Some(head) = view.record() else { continue };
        if !matches!(head.state, VdiState::Active | VdiState::Creating) {
            continue;
        }
        stack.push((head.root, head.height));
        if !head.meta.is_sparse() {
            found.insert(key(head.meta), false);
        }
        let SnapshotIndex { root, height, .. } = head.snapshots;
        let mut lists = vec![(root, height)];
        while let Some((pointer, level)) = lists.pop() {
            if pointer.is_sparse() {
                continue;
            }
            found.insert(key(pointer), false);
            if level > 1 {
                let node = reader.read_nodes(&[pointer]).await?.remove(0);
                lists.extend(node.children().map(|(_, child)| (child, level - 1)));
                continue;
            }
            let listed = reader.snapshots_of(&[pointer]).await?;
            stack.extend(listed.into_iter().map(|snapshot| (snapshot.root, snapshot.height)));
        }
    }
    while let Some((pointer, level)) = stack.pop() {
        if pointer.is_sparse() || found.insert(key(pointer), level == 0).is_some() || level == 0 {
            continue;
        }
        let node = reader.read_nodes(&[pointer]).await?.remove(0);
        stack.extend(node.children().map(|(_, child)| (child, level - 1)));
    }
    Ok(found)
}
