//! Clones of snapshots that only the log has, made by the cache alone, with the store there or away: each is what its source was at that
//! LSN, whatever dies meanwhile, or was never answered, and gets into the store once. The agent's `host/clones.rs` does the same in
//! the same order.

use crate::clones::{CloneOf, Fate, clone_name};
use crate::cold::record_named;
use crate::crew::Crew;
use crate::host::{Agent, Refused, again, few, pause, transient};
use crate::model::Model;
use crate::parting::{Seat, check_parted};
use crate::serving::Manner;
use blockstore::format::vdi::Origin;
use blockstore::types::{Lsn, SECTOR_SIZE};
use blockstore::{
    Policy, RegisteredClone, SnapshotHold, SnapshotLabel, StoreErrorKind, WhenOffline,
};
use cache::{AttachedRecord, NewClone, VdiIdentity};
use futures_util::future::OptionFuture;
use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::SmallRng;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// The next attempt to bring a clone into the store comes after so long.
const ATTEMPT_AFTER: Duration = Duration::from_secs(2);

impl Agent {
    /// What the cache has of the clones that it was asked for: all that were answered.
    pub async fn check_provisional(&self) {
        let records = self.cache.attached().await;
        for model in self.models.all() {
            let mut model = model.lock();
            check_parted(&records, &model, self.may_have_lost);
            if !model.is_provisional || model.is_none || model.parted.may_have_left {
                continue;
            }
            let is_here = record_named(&records, &model.name, model.uuid).is_some();
            let may_be_gone = std::mem::take(&mut model.parted.may_be_given_up);
            let name = &model.name;
            assert!(
                is_here || !model.is_promised || may_be_gone || self.may_have_lost,
                "P1: {name} was made, and the cache does not know of it"
            );
            model.is_none = !is_here;
            if may_be_gone {
                // The store may have heard of it when that was asked for, or after it failed.
                let was_made = !is_here && std::mem::take(&mut model.made);
                model.parted.may_be_in_store =
                    !is_here && (was_made || model.parted.may_be_in_store);
            }
        }
    }

    /// Keeps the snapshots that clones hang on which the store may not know of.
    pub async fn hold_origins(&self) -> Vec<SnapshotHold> {
        let (records, models) = (self.cache.attached().await, self.models.all());
        let held = records.into_iter().filter_map(|record| {
            let origin = record.origin?;
            let is_it = |model: &Arc<Mutex<Model>>| model.lock().uuid == Some(record.vdi);
            let n = models.iter().position(is_it).unwrap_or(usize::MAX);
            self.parting.hold(n, &self.holds, origin)
        });
        held.collect()
    }

    /// A clone is made without the store, and comes to be served.
    pub async fn begin_provisional(
        &self,
        mut rng: SmallRng,
        manner: &Manner,
        crew: &Crew,
    ) -> Result<(), Refused> {
        let Some((source, parent, lsn)) = self.any_pending(&mut rng).await else { return Ok(()) };
        if !self.takes_more(manner) {
            return Ok(());
        }
        let number = {
            let mut clones = self.clones.lock();
            clones.push(CloneOf { disk: source, lsn, fate: Fate::Disk });
            clones.len() - 1
        };
        let (name, uuid) = (clone_name(number), Uuid::from_u128(rng.random()));
        let (n, size_bytes) = {
            let source = self.models.get(source);
            let source = source.lock();
            let begun = |n| source.provisional_clone_of(n, name.clone(), uuid, lsn);
            (self.models.add(begun), source.sectors() * SECTOR_SIZE as u64)
        };
        let origin = Origin { vdi: parent, lsn: Lsn(lsn) };
        let _held = self.parting.hold(n, &self.holds, origin);
        self.parting.seat(n).is_known_here_only.set(true);
        let new = NewClone {
            disk: VdiIdentity { uuid, name, size_bytes },
            origin,
            policy: Policy::default(),
        };
        self.may_die(&mut rng, manner);
        let being_cloned = self.parting.begin_cloning(source).await;
        let made = self.cache.clone_pending(&new).await;
        drop(being_cloned);
        let is_here = self.cache.origin_of(uuid).await.is_some();
        {
            let model = self.models.get(n);
            let mut model = model.lock();
            assert!(is_here || made.is_err(), "{} was made, and is not here", model.name);
            // What was refused is none, whatever comes.
            (model.is_promised, model.is_none) = (made.is_ok(), !is_here);
        }
        if !is_here {
            self.parting.left(n);
            return Ok(());
        }
        Box::pin(self.serve_provisional(n, rng, manner, crew)).await
    }

    /// A disk, its UUID, and the LSN of a snapshot that its log has and the store does not; one is taken if there is none.
    async fn any_pending(&self, rng: &mut SmallRng) -> Option<(usize, Uuid, u64)> {
        let open = |model: &Model| {
            let status = self.cache.vdi_status(model.uuid?)?;
            status.origin.is_none().then_some(model.uuid?)
        };
        let all = self.models.all().into_iter().enumerate();
        let open: Vec<(usize, Uuid)> =
            all.filter_map(|(n, model)| Some((n, open(&model.lock())?))).collect();
        if open.is_empty() {
            return None;
        }
        let (n, uuid) = open[rng.random_range(0..open.len())];
        let pending = self.cache.pending_snapshots(uuid);
        if !pending.is_empty() && rng.random_bool(0.7) {
            return Some((n, uuid, pending[rng.random_range(0..pending.len())].lsn.0));
        }
        let taken = self.cache.snapshot(uuid, SnapshotLabel::default()).await.ok()?;
        self.models.get(n).lock().cut_taken(taken.lsn.0);
        Some((n, uuid, taken.lsn.0))
    }

    /// Brings a clone up that the store may not know of, from the local device alone; then into the store.
    pub async fn serve_provisional(
        &self,
        n: usize,
        mut rng: SmallRng,
        manner: &Manner,
        crew: &Crew,
    ) -> Result<(), Refused> {
        let (name, uuid) = {
            let model = self.models.get(n);
            let model = model.lock();
            (model.name.clone(), model.uuid)
        };
        let records = self.cache.attached().await;
        let record = record_named(&records, &name, uuid).expect("it is here");
        let seat = self.parting.seat(n);
        if !record.was_served {
            // Its log was left behind in write-through: the store is to say how far it is.
            self.store_opened().await;
            self.register(n, &seat, &record, &mut rng, manner).await?;
            self.parting.let_go_of_origin(n);
            return self.serve_joined(n, rng, manner, crew).await;
        }
        let attached = self.recover_alone(n, &record).await?;
        self.models.get(n).lock().is_promised = true;
        if !self.begin_guest(n, attached, &mut rng, manner, crew) {
            return Ok(());
        }
        self.alone.update(|alone| alone + 1);
        let cut = rng.random_bool(0.3).then(|| self.cut_alone(n, record.vdi));
        let plan = self.parting.plan;
        let begins = !manner.last && !manner.orders.wind_down.get();
        let (mut taker, mut giver) = (self.parting.rng(), self.parting.rng());
        let gives_up = plan.gives_up && begins && giver.random_bool(0.5);
        let giving = gives_up.then(|| self.give_up_soon(n, &mut giver, manner, crew));
        let is_taken = plan.takes_names && begins;
        let taking = is_taken.then(|| self.take_names(n, &mut taker));
        let joined = async {
            self.store_opened().await;
            if !self.register(n, &seat, &record, &mut rng, manner).await? {
                self.alone.update(|alone| alone - 1);
                return Ok(());
            }
            self.parting.let_go_of_origin(n);
            self.may_die(&mut rng, manner);
            let vdi = self.join(n, &record).await?;
            self.vdis.lock().insert(n, vdi);
            self.alone.update(|alone| alone - 1);
            Ok(())
        };
        let served = async { tokio::join!(joined, OptionFuture::from(cut)).0 };
        if !plan.is_any() {
            return served.await;
        }
        let others = (OptionFuture::from(taking), OptionFuture::from(giving));
        let (served, _, given) = tokio::join!(served, others.0, others.1);
        served.and(given.unwrap_or(Ok(())))
    }

    /// A snapshot of a disk, whatever the store has of that.
    pub async fn cut_alone(&self, n: usize, vdi: Uuid) {
        if let Ok(taken) = self.cache.snapshot(vdi, SnapshotLabel::default()).await {
            self.models.get(n).lock().cut_taken(taken.lsn.0);
        }
    }

    /// The host dies soon, at some operation, or does not.
    pub fn may_die(&self, rng: &mut SmallRng, manner: &Manner) {
        if manner.last || !rng.random_bool(0.3) {
            return;
        }
        let after = few(rng, 40);
        if rng.random() {
            self.san.crash_after(after);
        } else {
            self.hosts[rng.random_range(0..self.hosts.len())].crash_after(after);
        }
    }

    /// The clone is made in the store, if that does not know of it yet. Its name may be taken there: then it gets another. False if it was
    /// given up.
    async fn register(
        &self,
        n: usize,
        seat: &Seat,
        record: &AttachedRecord,
        rng: &mut SmallRng,
        manner: &Manner,
    ) -> Result<bool, Refused> {
        let lenient = self.may_have_lost;
        let model = self.models.get(n);
        let mut draining = None;
        let origin = self.cache.origin_of(record.vdi).await;
        let Some(origin) = origin else { return Ok(!seat.is_gone.get()) };
        let (parent, lsn) = (origin.snapshot.vdi, origin.snapshot.lsn);
        let _held = self.parting.hold(n, &self.holds, origin.snapshot);
        let name = loop {
            if seat.is_gone.get() {
                return Ok(false);
            }
            if self.cache.pending_snapshots(parent).iter().any(|pending| pending.lsn == lsn) {
                let drain = draining.get_or_insert_with(|| Box::pin(self.cache.drain(parent)));
                let Ok(drained) = tokio::time::timeout(ATTEMPT_AFTER, drain).await else {
                    continue;
                };
                draining = None;
                if let Err(error) = drained {
                    again("draining what was cloned", &error, lenient).await?;
                    continue;
                }
            }
            // Before it has come up itself, nobody knows what its log holds.
            let parent_is_up = self.vdis.lock().values().any(|vdi| vdi.uuid() == parent);
            let clone = RegisteredClone {
                uuid: record.vdi,
                name: record.name.clone(),
                origin: origin.snapshot,
                snapshot_ms: origin.time_ms,
                when_offline: WhenOffline::default(),
                log_id: Uuid::from_u128(record.log_id),
            };
            let handle = match self.parting.plan.is_any() {
                true => Some(seat.handle.lock().await),
                false => None,
            };
            if seat.is_gone.get() {
                return Ok(false);
            }
            seat.is_known_here_only.set(false);
            self.may_die(rng, manner);
            let registered = self.register_under_a_name(n, clone).await;
            match registered {
                Ok(None) => break None,
                Ok(Some(found)) => {
                    if self.cache.vdi_status(record.vdi).is_none() {
                        break Some((found, false));
                    }
                    match self.cache.rename(record.vdi, &found).await {
                        Ok(()) => {
                            // With no leg left nothing is noted there.
                            let status = self.cache.vdi_status(record.vdi);
                            break Some((found, status.is_some_and(|now| !now.write_through)));
                        }
                        Err(error) => {
                            drop(handle);
                            again("renaming a clone", &error, lenient).await?;
                        }
                    }
                }
                Err(error) if error.kind == StoreErrorKind::NotFound && !parent_is_up => {
                    drop(handle);
                    pause().await;
                }
                // A device that is full.
                Err(error) if error.kind == StoreErrorKind::NoSpace => {
                    drop(handle);
                    pause().await;
                }
                Err(error) => {
                    drop(handle);
                    transient("making a clone in the store", &error, lenient).await?;
                }
            }
        };
        let mut model = model.lock();
        model.made = true;
        // The cache may have noted it before its host died.
        let noted = (model.name != record.name).then(|| (record.name.clone(), true));
        if let Some((name, is_noted)) = name.or(noted) {
            self.parting.count(|tally| tally.renamed += u64::from(model.name != name));
            model.parted.name_here = is_noted.then(|| name.clone());
            model.name = name;
        }
        Ok(true)
    }
}
