//! Goal: after any sequence of commits, discards, growth and reopening the disk equals a plain map, and so does each of
//! its snapshots, as of its LSN (P5).
//! Method: random steps on disks of every height, compared block by block.

use crate::testing::{
    MIB, Model, attach, check_blocks, cut_batch, open, sim, sim_without_caw, snapshots,
    store_with_disk, write, zero,
};
use crate::types::Lsn;
use crate::{Change, Store};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;

/// Places that matter: node and level boundaries, the ends, and a few random clusters.
fn place(rng: &mut StdRng, blocks: u64) -> u64 {
    let near = |rng: &mut StdRng, at: u64| at.saturating_sub(4) + rng.random_range(0..8);
    let lba = match rng.random_range(0..6) {
        0 => near(rng, 256),
        1 => near(rng, 65_536),
        2 => near(rng, 1 << 24),
        3 => near(rng, blocks),
        4 => near(rng, blocks / 2),
        _ => rng.random_range(0..600),
    };
    lba.min(blocks - 1)
}

fn changes(rng: &mut StdRng, blocks: u64, version: u64) -> Vec<Change> {
    let mut starts: Vec<u64> = (0..rng.random_range(1..30)).map(|_| place(rng, blocks)).collect();
    starts.sort_unstable();
    starts.dedup();
    let mut all = Vec::new();
    for (index, &lba) in starts.iter().enumerate() {
        let room = starts.get(index + 1).copied().unwrap_or(blocks) - lba;
        match rng.random_range(0..10) {
            0 | 1 => all.push(zero(lba, rng.random_range(1..=room))),
            2 => all.push(zero(lba, room)),
            3 => {
                let run = room.min(rng.random_range(1..40));
                all.extend((lba..lba + run).map(|lba| write(lba, version)));
            }
            _ => all.push(write(lba, version)),
        }
    }
    all
}

async fn run(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let sizes = [MIB, 16 * MIB, 1 << 30, 64 << 30, 1 << 40, 16 << 40, 256 << 40];
    let mut size = sizes[seed as usize % sizes.len()];
    let sim =
        if seed.is_multiple_of(3) { sim_without_caw(64 * MIB, seed) } else { sim(64 * MIB, seed) };
    let (mut store, mut vdi) = store_with_disk(&sim, size).await;
    let mut model = Model::default();
    let mut snapshots = BTreeMap::new();
    let mut lsn = 0;
    for _ in 0..40 {
        let mut parts = Vec::new();
        for _ in 0..[0, 0, 0, 1, 2, 40][rng.random_range(0..6)] {
            lsn += rng.random_range(1..3);
            let few = if rng.random() { changes(&mut rng, size / 4096, lsn) } else { Vec::new() };
            model.apply(&few, lsn);
            snapshots.insert(lsn, model.clone());
            parts.push((lsn, few));
        }
        lsn += rng.random_range(1..5);
        let changes = changes(&mut rng, size / 4096, lsn);
        model.apply(&changes, lsn);
        parts.push((lsn, changes));
        vdi.commit(cut_batch(parts)).await.expect("commit");
        let first = place(&mut rng, size / 4096);
        let blocks = (size / 4096 - first).min(700) as u32;
        model.check_read(&vdi, first, blocks).await;
        match rng.random_range(0..20) {
            0 => {
                size = sizes[rng.random_range(0..sizes.len())].max(size);
                vdi.resize(size).await.expect("grow");
            }
            1 => {
                store.close().await.expect("close");
                drop((vdi, store));
                store = open(&sim).await;
                vdi = attach(&store, "d").await;
            }
            2 => {
                store.reclaimed().await;
                check_blocks(&store).await;
            }
            3 | 4 => {
                let gone: Vec<u64> =
                    snapshots.keys().copied().filter(|_| rng.random_bool(0.4)).collect();
                snapshots.retain(|lsn, _| !gone.contains(lsn));
                let gone = gone.into_iter().map(Lsn).collect();
                store.delete_snapshots("d", gone).await.expect("delete");
            }
            _ => {}
        }
    }
    model.check(&store, "d").await;
    check_snapshots(&store, &snapshots).await;
    check_blocks(&store).await;
}

async fn check_snapshots(store: &Store, expected: &BTreeMap<u64, Model>) {
    let disk = store.scan_vdis().await.expect("registry")[0].1.record().cloned().expect("disk");
    let found = snapshots(store, "d").await;
    let lsns: Vec<u64> = found.iter().map(|snapshot| snapshot.lsn.0).collect();
    assert_eq!(lsns, expected.keys().copied().collect::<Vec<_>>());
    for snapshot in &found {
        assert_eq!(snapshot.label.as_str(), format!("at {}", snapshot.lsn));
        expected[&snapshot.lsn.0].check_snapshot(store, &disk, snapshot).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_disk_equals_its_model() {
    for seed in 0..28 {
        run(seed).await;
    }
}
