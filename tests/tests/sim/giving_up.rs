//! Clones that are given up before the store knows of them: with all that was written to them, and for good. The agent's
//! `give_up_clone`.

use crate::clones::CloneOf;
use crate::crew::Crew;
use crate::host::{Agent, Refused, again, few};
use crate::serving::Manner;
use crate::taken::clone_number;
use blockstore::StoreErrorKind;
use blockstore::types::Lsn;
use cache::CacheError;
use rand::Rng;
use rand::rngs::SmallRng;
use std::time::Duration;

impl Agent {
    /// Gives a clone up soon, unless the store knows of it by then.
    pub async fn give_up_soon(
        &self,
        n: usize,
        rng: &mut SmallRng,
        manner: &Manner,
        crew: &Crew,
    ) -> Result<(), Refused> {
        tokio::time::sleep(Duration::from_millis(few(rng, 6_000))).await;
        let mut attempts = rng.random_range(1..8);
        while attempts > 0 && !manner.orders.wind_down.get() {
            attempts -= 1;
            self.parting.seat(n).guest_leaves();
            match self.give_up(n, rng, manner).await {
                Ok(true) => {
                    self.delete_origin(n).await;
                    return Ok(());
                }
                Ok(false) => break,
                Err(error) => again("giving a clone up", &error, self.may_have_lost).await?,
            }
        }
        self.go_on(n, rng, manner, crew).await
    }

    /// Nothing hangs by it on what it began as: that can be deleted, unless it has not come to the store yet, another clone hangs on it, or it is
    /// attached read-only.
    async fn delete_origin(&self, n: usize) {
        let (name, may_be_in_store) = {
            let model = self.models.get(n);
            let model = model.lock();
            (model.name.clone(), model.parted.may_be_in_store)
        };
        let Some(number) = clone_number(&name) else { return };
        let (disk, lsn, is_alone) = {
            let clones = self.clones.lock();
            let CloneOf { disk, lsn, .. } = clones[number];
            let same = clones.iter().filter(|clone| (clone.disk, clone.lsn) == (disk, lsn));
            (disk, lsn, same.count() == 1 && !may_be_in_store)
        };
        let (source, store) = (self.models.get(disk), self.store.lock().clone());
        let Some(store) = store else { return };
        let uuid = {
            let mut source = source.lock();
            let is_new = !source.deleted.contains(&lsn) && source.maybe_deleted.insert(lsn);
            source.uuid.filter(|_| is_new)
        };
        let Some(uuid) = uuid else { return };
        let was_shown = self.is_shown(disk, lsn);
        let deleted = store.delete_snapshots(&uuid.to_string(), vec![Lsn(lsn)]).await;
        let is_alone = is_alone && !was_shown && !self.is_shown(disk, lsn);
        let mut source = source.lock();
        match deleted {
            Ok(_) => {
                source.maybe_deleted.remove(&lsn);
                source.deleted.insert(lsn);
            }
            Err(error) if error.kind == StoreErrorKind::NotFound => {
                source.maybe_deleted.remove(&lsn);
            }
            Err(error) if error.kind == StoreErrorKind::InUse => {
                // Its disk may just be coming up, which is another reason.
                let words = error.to_string();
                let is_held =
                    words.contains("on its way there") || words.contains("was cloned from");
                assert!(
                    !is_alone || !is_held,
                    "{name} was given up, and its snapshot is held: {words}"
                );
                source.maybe_deleted.remove(&lsn);
            }
            // Nobody knows.
            Err(_) => {}
        }
    }

    /// False if it is refused.
    async fn give_up(
        &self,
        n: usize,
        rng: &mut SmallRng,
        manner: &Manner,
    ) -> Result<bool, CacheError> {
        let (model, seat, uuid) = (self.models.get(n), self.parting.seat(n), self.uuid_of(n));
        let _handle = seat.handle.lock().await;
        if seat.is_gone.get() || self.cache.origin_of(uuid).await.is_none() {
            return Ok(false);
        }
        if !seat.is_known_here_only.get() {
            let Some(store) = self.store.lock().clone() else { return Ok(false) };
            match store.lookup_vdi(&uuid.to_string()).await {
                Err(error) if error.kind == StoreErrorKind::NotFound => {}
                _ => return Ok(false),
            }
        }
        if self.cache.vdi_status(uuid).is_none() {
            return Ok(false);
        }
        self.stop_server(n).await?;
        {
            let parted = &mut model.lock().parted;
            (parted.may_be_given_up, parted.may_be_in_store) = (true, seat.is_unsure.get());
        }
        self.may_die(rng, manner);
        self.cache.give_up_clone(uuid).await?;
        self.parting.left(n);
        {
            let mut model = model.lock();
            (model.is_none, model.parted.may_be_given_up) = (true, false);
        }
        self.has_left(n).await;
        self.parting.count(|tally| tally.given_up += 1);
        Ok(true)
    }
}
