//! Clones that are served: from then on disks like any other, in this life and those that follow, each beginning with what its
//! source was at the snapshot (P5). They come while others are served already, also after a start without the store.

use crate::attaching::Up;
use crate::clones::{CloneOf, Fate, clone_name};
use crate::cold::record_named;
use crate::crew::Crew;
use crate::host::{Agent, Refused, few, pause};
use crate::worker::{Excuses, Habits, Orders};
use cache::disk::AttachedDisk;
use futures_util::StreamExt;
use futures_util::future::{FutureExt, LocalBoxFuture};
use futures_util::stream::FuturesUnordered;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::rc::Rc;
use std::time::Duration;

/// Disks of a seed at most, but one clone always: each needs segments, of which the cache has fifteen.
const DISKS_MAX: usize = 4;
/// In a life, so many are tried to be had at most.
const ATTEMPTS: u32 = 12;
/// Between two looks at whether the store is there.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How the guests of a life behave, and what they must put up with.
#[derive(Clone)]
pub struct Manner {
    pub habits: Habits,
    pub excuses: Excuses,
    pub orders: Rc<Orders>,
    /// Requests that a guest makes.
    pub budget: u64,
    /// The last life: all that is left is done, and nothing is begun.
    pub last: bool,
}

impl Agent {
    /// Has clones served: all that were, and now and then another one. Goes on for ever.
    pub async fn serve_clones(
        &self,
        rng: &mut SmallRng,
        manner: &Manner,
        crew: &Crew,
    ) -> Result<(), Refused> {
        let own = |rng: &mut SmallRng| SmallRng::seed_from_u64(rng.random());
        let mut under_way: FuturesUnordered<LocalBoxFuture<'_, Result<(), Refused>>> =
            FuturesUnordered::new();
        for n in self.served_clones() {
            under_way.push(self.serve_clone(n, own(rng), manner, crew).boxed_local());
        }
        // An outage of a day needs no thousand.
        let mut attempts_left = ATTEMPTS;
        loop {
            let next = Duration::from_millis(few(rng, 10_000));
            tokio::select! {
                biased;
                Some(done) = under_way.next(), if !under_way.is_empty() => done?,
                () = tokio::time::sleep(next), if attempts_left > 0 => {
                    attempts_left -= 1;
                    if !self.takes_more(manner) {
                        continue;
                    }
                    if rng.random() {
                        under_way.push(self.begin_provisional(own(rng), manner, crew).boxed_local());
                    } else if !self.vdis.lock().is_empty() {
                        under_way.push(self.begin_clone(own(rng), manner, crew).boxed_local());
                    }
                }
                else => std::future::pending().await,
            }
        }
    }

    /// Another clone may come.
    pub fn takes_more(&self, manner: &Manner) -> bool {
        let has_room = self.served_clones().len() < (DISKS_MAX - self.disks).max(1);
        has_room && !manner.last && !manner.orders.wind_down.get()
    }

    /// A clone that is in the store, or is made there now, comes to be served.
    async fn begin_clone(
        &self,
        mut rng: SmallRng,
        manner: &Manner,
        crew: &Crew,
    ) -> Result<(), Refused> {
        let there = self.clones_there();
        let number = if there.is_empty() {
            self.make_clone(&mut rng).await
        } else {
            Some(there[rng.random_range(0..there.len())])
        };
        let Some(number) = number.filter(|_| self.takes_more(manner)) else { return Ok(()) };
        match self.adopt(number) {
            Some(n) => Box::pin(self.serve_clone(n, rng, manner, crew)).await,
            None => Ok(()),
        }
    }

    /// A clone in the store becomes a disk.
    fn adopt(&self, number: usize) -> Option<usize> {
        let mut clones = self.clones.lock();
        let CloneOf { disk, lsn, .. } = clones[number];
        let source = self.models.get(disk);
        let source = source.lock();
        if lsn > source.last_lsn() {
            // Damage took that part of its log: the store will refuse it.
            return None;
        }
        clones[number].fate = Fate::Disk;
        let n = self.models.add(|n| source.clone_of(n, clone_name(number), lsn));
        self.models.get(n).lock().made = true;
        Some(n)
    }

    /// Brings a clone up, and has a guest use it.
    async fn serve_clone(
        &self,
        n: usize,
        mut rng: SmallRng,
        manner: &Manner,
        crew: &Crew,
    ) -> Result<(), Refused> {
        if !manner.last {
            tokio::time::sleep(Duration::from_millis(few(&mut rng, 3_000))).await;
        }
        let alone = self.store.lock().is_none() || rng.random_bool(0.3);
        let name = self.models.get(n).lock().name.clone();
        let uuid = self.models.get(n).lock().uuid;
        let records = self.cache.attached().await;
        let record = record_named(&records, &name, uuid);
        if record.as_ref().is_some_and(|record| record.origin.is_some()) {
            return Box::pin(self.serve_provisional(n, rng, manner, crew)).await;
        }
        if let Some(record) = record.filter(|record| alone && record.was_served) {
            let attached = self.recover_alone(n, &record).await?;
            if !self.begin_guest(n, attached, &mut rng, manner, crew) {
                return Ok(());
            }
            self.alone.update(|alone| alone + 1);
            self.store_opened().await;
            let vdi = self.join(n, &record).await?;
            self.vdis.lock().insert(n, vdi);
            self.alone.update(|alone| alone - 1);
            return Ok(());
        }
        self.store_opened().await;
        self.serve_joined(n, rng, manner, crew).await
    }

    /// Brings a clone up that the store knows of.
    pub async fn serve_joined(
        &self,
        n: usize,
        mut rng: SmallRng,
        manner: &Manner,
        crew: &Crew,
    ) -> Result<(), Refused> {
        if !self.is_still_there(n).await? {
            return Ok(());
        }
        self.models.get(n).lock().parted.left_cache = false;
        let attached = loop {
            let (uuid, bytes) = self.make(n, 0).await?;
            match self.attach(n, uuid, bytes).await? {
                Up::Disk(attached) => break *attached,
                Up::NoRoom | Up::Gone => pause().await,
            }
        };
        self.begin_guest(n, attached, &mut rng, manner, crew);
        Ok(())
    }

    /// False if none begins anything any more.
    pub fn begin_guest(
        &self,
        n: usize,
        attached: AttachedDisk,
        rng: &mut SmallRng,
        manner: &Manner,
        crew: &Crew,
    ) -> bool {
        if manner.orders.wind_down.get() {
            return false;
        }
        let verifies = manner.last || rng.random_bool(0.6);
        let budget = rng.random_range(0..=manner.budget);
        let mut worker = self.worker(n, attached, SmallRng::seed_from_u64(rng.random()), manner);
        if verifies {
            worker.verify_all();
        }
        (worker.budget, worker.counts) = (budget, false);
        worker.exit = self.parting.exit(n);
        crew.join(worker);
        true
    }

    pub async fn store_opened(&self) {
        while self.store.lock().is_none() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
}
