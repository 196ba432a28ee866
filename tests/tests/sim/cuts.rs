//! Snapshots: taken and deleted while the agent runs, also by schedules that have one behind every write or batch; found in the
//! store, each the disk as of its LSN (P5).

use crate::host::{Agent, few};
use crate::model::Model;
use crate::worker::Orders;
use crate::world::read_out;
use blockstore::schedule::is_cut;
use blockstore::snapshots::{PAGE_MAX, Page};
use blockstore::types::Lsn;
use blockstore::{PolicyChange, Store, Vdi};
use cache::AsOf;
use futures_util::future::join_all;
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::time::Duration;

impl Agent {
    /// Takes snapshots, some of them at once, and deletes some.
    pub async fn cut(&self, rng: &mut SmallRng, orders: &Orders) {
        // Apart, so that the others come as they would without.
        let mut rules = SmallRng::seed_from_u64(rng.clone().random::<u64>() ^ 0xcade);
        let has_rules = rules.random_bool(0.3);
        let mut labels = SmallRng::seed_from_u64(rng.clone().random::<u64>() ^ 0x1abe1);
        // A day's outage needs no ten thousand.
        for round in 0_u32.. {
            if orders.wind_down.get() {
                break;
            }
            let pause = Duration::from_millis(few(rng, 3_000));
            tokio::time::sleep(pause * (1 + round / 100)).await;
            if orders.wind_down.get() {
                break;
            }
            let (n, vdi) = self.any_disk(rng);
            let model = &*self.models.get(n);
            if has_rules {
                self.change_rule(&vdi, model, &mut rules).await;
            }
            self.check_pending(&vdi, model);
            let taken = (0..few(rng, 12)).map(|_| {
                let label = self.next_label(&mut labels);
                let vdi = vdi.uuid();
                async move {
                    model.lock().labels.asked(&label);
                    if let Ok(taken) = self.cache.snapshot(vdi, label.clone()).await {
                        let mut model = model.lock();
                        model.labels.taken(taken.lsn.0, &label);
                        model.cut_taken(taken.lsn.0);
                    }
                }
            });
            join_all(taken).await;
            self.check_pending(&vdi, model);
            if self.labels && labels.random_bool(0.3) {
                self.change_label(&vdi, model, &mut labels).await;
            }
            if rng.random_range(0..4) == 0 {
                self.cut_as_of(&vdi, model, rng, &mut labels).await;
            }
            if rng.random_range(0..6) == 0 {
                self.delete_some(&vdi, model, rng).await;
            }
        }
        std::future::pending().await
    }

    /// Has a schedule cut snapshots behind writes, or not, and thins what it made.
    async fn change_rule(&self, vdi: &Vdi, model: &Mutex<Model>, rng: &mut SmallRng) {
        if rng.random_bool(0.3) {
            let keep = rng.random_range(1..12);
            let rules = match rng.random_range(0..3) {
                0 => format!("every write keep {keep}"),
                1 => format!("every batch keep {keep}"),
                _ => "none".into(),
            };
            model.lock().has_rules = true;
            let schedule = Some(rules.parse().expect("a schedule"));
            let change = PolicyChange { schedule, ..PolicyChange::default() };
            // Refused without a device: then it is as it was.
            let _ = self.cache.set_policy(vdi.uuid(), change).await;
        }
        let mut made: Vec<Lsn> =
            self.cache.take_made_cuts(vdi.uuid()).cuts.iter().map(|(lsn, _)| *lsn).collect();
        made.truncate(made.len().saturating_sub(3));
        if !made.is_empty() {
            let _ = self.store().thin_snapshots(vdi.uuid(), made).await;
        }
    }

    /// Takes one of what a disk was.
    async fn cut_as_of(
        &self,
        vdi: &Vdi,
        model: &Mutex<Model>,
        rng: &mut SmallRng,
        labels: &mut SmallRng,
    ) {
        let (from, to) = (vdi.committed().lsn.0, model.lock().last_lsn());
        if from >= to {
            return;
        }
        let lsn = rng.random_range(from + 1..=to);
        let label = self.next_label(labels);
        {
            let mut model = model.lock();
            model.maybe_as_of.insert(lsn);
            model.labels.asked_at(lsn, &label);
        }
        let point = AsOf::Lsn(Lsn(lsn));
        let taken = self.cache.snapshot_as_of(vdi.uuid(), point, label.clone());
        // With the store away since the start it waits for it.
        let patience = Duration::from_millis(few(rng, 100_000));
        if let Ok(Ok(_)) = tokio::time::timeout(patience, taken).await {
            let mut model = model.lock();
            let is_cut = model.is_cut(lsn);
            model.labels.taken_at(lsn, &label, is_cut);
            model.as_of_taken(lsn);
        }
    }

    async fn delete_some(&self, vdi: &Vdi, model: &Mutex<Model>, rng: &mut SmallRng) {
        let mut wanted = model.lock().there(vdi.committed().lsn.0);
        wanted.retain(|_| rng.random_bool(0.3));
        if wanted.is_empty() {
            return;
        }
        for lsn in &wanted {
            self.find_by_label(vdi, model, *lsn).await;
        }
        {
            // Others delete some, too: each is one's own to tell of.
            let Model { deleted, maybe_deleted, .. } = &mut *model.lock();
            wanted.retain(|lsn| !deleted.contains(lsn) && maybe_deleted.insert(*lsn));
        }
        if wanted.is_empty() {
            return;
        }
        let lsns = wanted.iter().copied().map(Lsn).collect();
        if self.store().delete_snapshots(&vdi.uuid().to_string(), lsns).await.is_ok() {
            let mut model = model.lock();
            model.maybe_deleted.retain(|lsn| !wanted.contains(lsn));
            model.deleted.extend(&wanted);
        }
    }
}

/// The store, where a disk is at `lsn`, lists the snapshots that it should have; some of them, and the last, hold what they
/// should.
pub async fn check_snapshots(
    store: &Store,
    disk: &str,
    model: &Mutex<Model>,
    lsn: u64,
    picks: usize,
    store_harmed: bool,
) {
    let (mut lsns, mut labelled): (Vec<u64>, Vec<_>) = (Vec::new(), Vec::new());
    loop {
        let beyond = lsns.last().copied().map(Lsn);
        let page = Page { newest_first: false, beyond, limit: PAGE_MAX };
        let listed = match store.snapshots(disk, page).await {
            Err(_) if store_harmed => return,
            listed => listed.expect("P5: the list of snapshots is read"),
        };
        lsns.extend(listed.iter().map(|snapshot| snapshot.lsn.0));
        // Those of rules come and go; each is what it should be, as the others.
        let others = listed.iter().filter(|snapshot| !is_cut(snapshot.label.as_str()));
        labelled.extend(others.map(|snapshot| (snapshot.lsn.0, snapshot.label.clone())));
        if listed.len() < PAGE_MAX {
            break;
        }
    }
    let asked: Vec<u64> = labelled.iter().map(|(lsn, _)| *lsn).collect();
    model.lock().check_listed(lsn, &asked);
    model.lock().check_labels(&labelled);
    for lsn in lsns.iter().skip(picks).step_by(7).chain(lsns.last()) {
        match read_out(store, disk, Some(*lsn), model).await {
            Err(_) if store_harmed => {}
            Err(error) => panic!("P5: snapshot {lsn} cannot be read: {error}"),
            Ok((_, found)) => model.lock().check_store(*lsn, &found),
        }
    }
}
