//! Clones of snapshots, made in the store and deleted while the agent runs: each is for good what its source was at that LSN (P5),
//! whatever is written, deleted and collected beside it. Those that come to be served are disks from then on, see `serving.rs`.

use crate::host::{Agent, few};
use crate::model::Model;
use crate::taken::{Takers, check_names};
use crate::worker::Orders;
use crate::world::read_out;
use blockstore::types::Lsn;
use blockstore::{Store, StoreErrorKind, WhenOffline};
use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::SmallRng;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Clones that there are at once.
const CLONES_MAX: usize = 6;
/// What the names of clones begin with, and those of no other disk.
const PREFIX: &str = "clone";

/// What is known of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It was asked for, and nobody heard how that went.
    MayBe,
    Is,
    /// Its deletion was asked for, likewise.
    MayBeGone,
    Gone,
    /// It is a disk like any other, and judged as such.
    Disk,
}

/// A clone that was asked for.
#[derive(Debug)]
pub struct CloneOf {
    pub disk: usize,
    pub lsn: u64,
    pub fate: Fate,
}

/// All that were ever asked for: each is called by its place.
pub type Clones = Arc<Mutex<Vec<CloneOf>>>;

pub fn clone_name(number: usize) -> String {
    format!("{PREFIX}{number}")
}

/// By its name; none if it is not a clone. What was cloned from a clone has a higher number than that.
pub fn number_of(disk: &str) -> Option<usize> {
    disk.strip_prefix(PREFIX).map(|number| number.parse().expect("as clones are named"))
}

impl Agent {
    /// Makes clones and deletes some, until the guests stop.
    pub async fn clone_some(&self, rng: &mut SmallRng, orders: &Orders) {
        for round in 0_u32.. {
            let pause = Duration::from_millis(few(rng, 8_000));
            tokio::time::sleep(pause * (1 + round / 50)).await;
            if orders.wind_down.get() {
                break;
            }
            let there = self.clones_there();
            if there.len() >= CLONES_MAX || !there.is_empty() && rng.random_bool(0.3) {
                self.delete_clone(there[rng.random_range(0..there.len())]).await;
            } else {
                self.make_clone(rng).await;
            }
        }
        std::future::pending().await
    }

    /// Those that are surely in the store, and no disks.
    pub fn clones_there(&self) -> Vec<usize> {
        let clones = self.clones.lock();
        (0..clones.len()).filter(|n| clones[*n].fate == Fate::Is).collect()
    }

    /// Its number, if it was surely made.
    pub async fn make_clone(&self, rng: &mut SmallRng) -> Option<usize> {
        let (disk, vdi) = self.any_disk(rng);
        let (committed, model) = (vdi.committed().lsn.0, self.models.get(disk));
        let snapshots = {
            let model = model.lock();
            let mut there = model.cuts(0, committed);
            there.retain(|lsn| !model.deleted.contains(lsn) && !model.maybe_deleted.contains(lsn));
            there
        };
        if snapshots.is_empty() {
            return None;
        }
        let lsn = snapshots[rng.random_range(0..snapshots.len())];
        let number = {
            let mut clones = self.clones.lock();
            clones.push(CloneOf { disk, lsn, fate: Fate::MayBe });
            clones.len() - 1
        };
        let (store, source) = (self.store(), model.lock().name.clone());
        let policy = WhenOffline::default();
        store.clone_vdi(&clone_name(number), &source, Lsn(lsn), policy).await.ok()?;
        self.clones.lock()[number].fate = Fate::Is;
        Some(number)
    }

    async fn delete_clone(&self, number: usize) {
        self.clones.lock()[number].fate = Fate::MayBeGone;
        if self.store().delete_vdi(&clone_name(number)).await.is_ok() {
            self.clones.lock()[number].fate = Fate::Gone;
        }
    }
}

/// The store has no disk that nobody asked for, and none twice.
pub async fn check_listed(
    store: &Store,
    clones: &Clones,
    models: &[Arc<Mutex<Model>>],
    takers: &Takers,
    store_harmed: bool,
) {
    let mut listed = match store.list_vdis().await {
        Err(_) if store_harmed => return,
        listed => listed.expect("the list of disks is read"),
    };
    check_names(&mut listed, models, takers, store_harmed);
    let known = clones.lock();
    let others = (0..known.len()).filter(|n| !matches!(known[*n].fate, Fate::Gone | Fate::Disk));
    let may_be = |model: &Model| !model.is_none || model.parted.may_be_in_store;
    let disks = models.iter().map(|model| model.lock()).filter(|model| may_be(model));
    let disks = disks.filter(|model| !model.is_provisional);
    let mut names: BTreeSet<String> = disks.map(|model| model.name.clone()).collect();
    names.extend(others.map(clone_name));
    for info in listed {
        let name = &info.name;
        assert!(names.remove(name) || store_harmed, "{name} is twice in the store, or unasked for");
    }
}

/// The store has the clones that it should have, and each holds what its source was.
pub async fn check_clones(
    store: &Store,
    clones: &Clones,
    models: &[Arc<Mutex<Model>>],
    store_harmed: bool,
) {
    let known: Vec<(usize, u64, Fate)> =
        clones.lock().iter().map(|clone| (clone.disk, clone.lsn, clone.fate)).collect();
    for (number, (disk, lsn, fate)) in known.into_iter().enumerate() {
        let clone = clone_name(number);
        if fate == Fate::Disk {
            continue;
        }
        if fate == Fate::Gone {
            let found = store.lookup_vdi(&clone).await;
            assert!(found.is_err() || store_harmed, "P5: {clone} was deleted, and is there");
            continue;
        }
        let model = &models[disk];
        match read_out(store, &clone, None, model).await {
            Ok((_, found)) if fate != Fate::MayBe => model.lock().check_store(lsn, &found),
            Err(error) if error.kind == StoreErrorKind::NotFound && fate != Fate::Is => {}
            Ok(_) => {}
            Err(_) if store_harmed => {}
            Err(error) => panic!("P5: {clone} of disk {disk} at LSN {lsn}: {error}"),
        }
    }
}
