//! Goal: with every fault that the store promises to survive, at random, nothing is lost, nothing old
//! or foreign is read, and once the faults end everything goes on.
//!
//! Method: commits and reads against a model on a device that fails at seeded rates and restarts now
//! and then; after each commit the durable image must be that commit's. A failing seed is in the
//! message.

use crate::device::sim::{FaultRates, SimDevice, SimOptions};
use crate::testing::{MIB, Model, attach, batch, check_blocks, open, store_with_disk, write, zero};
use crate::types::Lba;
use crate::{Change, StoreErrorKind};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;

fn rates(rng: &mut StdRng) -> FaultRates {
    let mut rate = |most: f64| if rng.random_bool(0.5) { rng.random_range(0.0..most) } else { 0.0 };
    FaultRates {
        read_io: rate(0.05),
        read_garbled: rate(0.05),
        write_io: rate(0.1),
        write_no_space: rate(0.05),
        flush_io: rate(0.3),
        unreachable: rate(0.1),
        unknown: rate(0.2),
    }
}

fn changes(rng: &mut StdRng, version: u64) -> Vec<Change> {
    let mut lbas: Vec<u64> =
        (0..rng.random_range(1..60)).map(|_| rng.random_range(0..4096)).collect();
    lbas.sort_unstable();
    lbas.dedup();
    let room = |index: usize| lbas.get(index + 1).copied().unwrap_or(4096) - lbas[index];
    let change = |(index, &lba): (usize, &u64)| match version % 5 {
        0 if index % 3 == 0 => zero(lba, room(index)),
        _ => write(lba, version),
    };
    lbas.iter().enumerate().map(change).collect()
}

async fn run(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let options = SimOptions {
        compare_and_write: !seed.is_multiple_of(3),
        logical_block: if seed.is_multiple_of(2) { 512 } else { 4096 },
        ..SimOptions::new(64 * MIB, seed)
    };
    let mut sim = SimDevice::with_options(options);
    let (mut store, mut vdi) = store_with_disk(&sim, 16 * MIB).await;
    let mut model = Model::default();
    for lsn in 1..=30 {
        sim.set_rates(rates(&mut rng));
        let changes = changes(&mut rng, lsn);
        let disk = Arc::clone(&vdi);
        let changed = changes.clone();
        let commit = tokio::spawn(async move { disk.commit(batch(lsn, changed)).await });
        if rng.random_bool(0.3) {
            for _ in 0..rng.random_range(0..200) {
                tokio::task::yield_now().await;
            }
            sim.lose_session();
        }
        let outcome = commit.await.expect("runs");
        if let Err(error) = &outcome {
            // A read that failed three times is reported, and the same batch can be committed again.
            assert!(
                matches!(error.kind, StoreErrorKind::Device | StoreErrorKind::Corrupt),
                "{error}"
            );
            sim.set_rates(FaultRates::default());
            vdi.commit(batch(lsn, changes.clone())).await.expect("commit without faults");
        }
        model.apply(&changes, lsn);
        match vdi.read(Lba(0), 4096).await {
            Ok(_) => {}
            Err(error) => {
                assert!(matches!(error.kind, StoreErrorKind::Device | StoreErrorKind::Corrupt));
            }
        }
        sim.set_rates(FaultRates::default());
        model.check_read(&vdi, 0, 4096).await;
        if rng.random_bool(0.15) {
            sim.crash();
            sim = sim.connect();
            drop((vdi, store));
            store = open(&sim).await;
            vdi = attach(&store, "d").await;
            model.check(&store, "d").await;
            check_blocks(&store).await;
        }
    }
    model.check(&store, "d").await;
    store.reclaimed().await;
    check_blocks(&store).await;
    assert!(store.health().reachable);
}

#[tokio::test(start_paused = true)]
async fn random_faults_lose_nothing() {
    for seed in 0..24 {
        println!("seed {seed}");
        run(seed).await;
    }
}
