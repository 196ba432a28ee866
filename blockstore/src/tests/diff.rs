//! Goal: a difference lists every block that is not the same and, if nothing was written anew with the same bytes, no other,
//! page by page as all at once; and reads no more than has changed.
//! Method: a disk with many snapshots and a clone, compared with models, in all pairs.

use crate::store::Difference;
use crate::testing::{MIB, Model, attach, batch, cut_batch, sim, store_with_disk, write, zero};
use crate::tree::diff::ChangedRange;
use crate::types::{BLOCK_SIZE, Lba, Lsn};
use crate::{Store, StoreErrorKind, WhenOffline};
use std::collections::BTreeMap;

type Image<'a> = (&'a str, Option<&'a str>);
/// An image under its name, its model, and its size in blocks.
type Modelled = ((&'static str, Option<String>), Model, u64);

/// All pages of at most `limit` ranges, joined.
async fn all(store: &Store, old: Image<'_>, new: Image<'_>, limit: usize) -> Vec<ChangedRange> {
    let (mut from, mut list) = (Lba(0), Vec::<ChangedRange>::new());
    loop {
        let Difference { changed, .. } = store.diff(old, new, from, limit).await.expect("diff");
        assert!(changed.ranges.len() <= limit);
        for range in changed.ranges {
            assert!(range.first >= from && range.blocks > 0);
            match list.last_mut() {
                Some(last)
                    if last.first.0 + last.blocks == range.first.0 && last.zeros == range.zeros =>
                {
                    last.blocks += range.blocks;
                }
                last => {
                    assert!(last.is_none_or(|last| last.first.0 + last.blocks <= range.first.0));
                    list.push(range);
                }
            }
        }
        let Some(next) = changed.next else { return list };
        assert!(next > from, "it goes on");
        from = next;
    }
}

/// What the models say; true: it is zeros now.
fn expected(old: &Model, new: &Model, blocks: u64) -> BTreeMap<u64, bool> {
    let mut found = BTreeMap::new();
    for lba in old.0.keys().chain(new.0.keys()).filter(|lba| **lba < blocks) {
        if old.0.get(lba) != new.0.get(lba) {
            found.insert(*lba, !new.0.contains_key(lba));
        }
    }
    found
}

fn blocks_of(ranges: &[ChangedRange]) -> BTreeMap<u64, bool> {
    let blocks = |range: &ChangedRange| {
        let (first, zeros) = (range.first.0, range.zeros);
        (first..first + range.blocks).map(move |lba| (lba, zeros))
    };
    ranges.iter().flat_map(blocks).collect()
}

#[tokio::test(start_paused = true)]
async fn all_pairs_of_images_agree_with_their_models() {
    let sim = sim(256 * MIB, 1);
    let (store, vdi) = store_with_disk(&sim, MIB).await;
    let mut model = Model::default();
    let mut images: Vec<Modelled> = Vec::new();
    let mut blocks = 256;
    for lsn in 1..=12u64 {
        // It grows by a level, and by another.
        if let Some(mib) = [(4, 64), (8, 1024)].iter().find(|(at, _)| *at == lsn).map(|at| at.1) {
            vdi.resize(mib * MIB).await.expect("grow");
            blocks = mib * 256;
        }
        let step = blocks / 40;
        let mut changes: Vec<_> =
            (0..40).map(|n| write(n * step + lsn % step.min(7), lsn)).collect();
        if lsn % 3 == 0 {
            changes = vec![zero(0, blocks / 3), write(blocks / 2, lsn), write(blocks - 1, lsn)];
        }
        model.apply(&changes, lsn);
        vdi.commit(cut_batch(vec![(lsn, changes), (lsn, vec![])])).await.expect("commit");
        images.push((("d", Some(lsn.to_string())), model.clone(), blocks));
    }
    images.push((("d", None), model.clone(), blocks));
    store.clone_vdi("c", "d", Lsn(5), WhenOffline::default()).await.expect("clone");
    let mut clone = images[4].1.clone();
    let of_clone = attach(&store, "c").await;
    let changes = vec![write(5, 99), write(6, 99), write(8000, 99)];
    clone.apply(&changes, 99);
    of_clone.commit(batch(99, changes)).await.expect("commit");
    images.push((("c", None), clone, 64 * 256));
    for ((old_vdi, old_at), old, _) in &images {
        for ((new_vdi, new_at), new, blocks) in &images {
            let (a, b) = ((*old_vdi, old_at.as_deref()), (*new_vdi, new_at.as_deref()));
            let found = all(&store, a, b, 10_000).await;
            assert_eq!(blocks_of(&found), expected(old, new, *blocks), "{a:?} {b:?}");
            assert_eq!(all(&store, a, b, 3).await, found, "{a:?} {b:?} in pages");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn it_reads_no_more_than_has_changed() {
    let sim = sim(256 * MIB, 2);
    let (store, vdi) = store_with_disk(&sim, 1024 * MIB).await;
    // Some hundred leaves.
    let changes = (0..500).map(|n| write(n * 500, 1)).collect();
    vdi.commit(cut_batch(vec![(1, changes), (1, vec![])])).await.expect("commit");
    vdi.commit(cut_batch(vec![(2, vec![write(70_000, 2)]), (2, vec![])])).await.expect("commit");
    vdi.detach(Lsn(2)).await.expect("detach");
    drop(vdi);
    store.close().await.expect("close");
    drop(store);
    // Nothing is in memory yet.
    let store = crate::testing::open(&sim).await;
    let read = || sim.counts().bytes_read;
    let begun = read();
    for lsn in ["1", "2"] {
        store.find_snapshot("d", lsn).await.expect("it is there");
    }
    let to_find = read() - begun;
    let begun = read();
    assert_eq!(all(&store, ("d", Some("2")), ("d", None), 10).await, []);
    let same = read() - begun;
    let begun = read();
    let found = all(&store, ("d", Some("1")), ("d", Some("2")), 10).await;
    assert_eq!(found, [ChangedRange { first: Lba(70_000), blocks: 1, zeros: false }]);
    let one = read() - begun;
    // Images are looked for, some more than once, and of each tree the nodes on one path are read. All leaves of both would
    // be twice as much as is allowed here.
    let leaves = 500 * BLOCK_SIZE as u64;
    assert!(same < to_find + leaves, "{same} bytes for no difference, {to_find} to find two");
    assert!(one < to_find + leaves, "{one} bytes for one, {to_find} to find two");
}

#[tokio::test(start_paused = true)]
async fn what_is_not_there_is_said() {
    let sim = sim(64 * MIB, 3);
    let (store, vdi) = store_with_disk(&sim, MIB).await;
    vdi.commit(cut_batch(vec![(1, vec![write(1, 1)]), (1, vec![])])).await.expect("commit");
    for (old, new) in [(("d", Some("2")), ("d", None)), (("d", None), ("x", None))] {
        let absent = store.diff(old, new, Lba(0), 1).await.unwrap_err();
        assert_eq!(absent.kind, StoreErrorKind::NotFound, "{absent}");
    }
    let beyond = store.diff(("d", None), ("d", Some("1")), Lba(u64::MAX), 1).await.expect("diff");
    assert_eq!((beyond.changed.ranges.len(), beyond.changed.next), (0, None));
}
