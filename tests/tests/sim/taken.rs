//! Names of clones that others take in the store before these get there: the clone is there once, under another name, which the
//! cache then knows; and the other disk is what it was.

use crate::clones::number_of;
use crate::host::{Agent, few};
use crate::model::Model;
use blockstore::types::{BLOCK_SIZE, Lsn};
use blockstore::{RegisteredClone, Store, StoreError, StoreErrorKind, VdiInfo};
use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::SmallRng;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// Names that are tried for a clone whose own is taken in the store.
const NAMES_MAX: u32 = 1000;

/// A disk that was made under the name of a clone. Nobody attaches it.
#[derive(Debug)]
pub struct Taker {
    name: String,
    blocks: u64,
    /// If it is known to be there.
    uuid: Option<Uuid>,
    /// It came too late.
    is_none: bool,
}

/// All that were ever asked for.
pub type Takers = Arc<Mutex<Vec<Taker>>>;

/// `name-2` and so on.
fn numbered(name: &str, number: u32) -> String {
    format!("{name}-{number}")
}

/// What a clone was called first.
fn first_name(name: &str) -> &str {
    name.split_once('-').map_or(name, |(first, _)| first)
}

impl Agent {
    /// Others take the name of a clone, if they can, and perhaps the next one.
    pub async fn take_names(&self, n: usize, rng: &mut SmallRng) {
        let name = first_name(&self.models.get(n).lock().name).to_owned();
        let names = [numbered(&name, 2), name];
        let count = [0, 1, 1, 2][rng.random_range(0..4)];
        self.store_opened().await;
        if rng.random() {
            tokio::time::sleep(Duration::from_millis(few(rng, 3_000))).await;
        }
        for name in names.into_iter().rev().take(count) {
            let blocks = rng.random_range(1..300);
            let at = {
                let mut takers = self.parting.takers.lock();
                takers.push(Taker { name: name.clone(), blocks, uuid: None, is_none: false });
                takers.len() - 1
            };
            let made = self.store().create_vdi(&name, blocks * BLOCK_SIZE as u64).await;
            let taker = &mut self.parting.takers.lock()[at];
            match made {
                Ok(info) => taker.uuid = Some(info.uuid),
                Err(error) => taker.is_none = error.kind == StoreErrorKind::AlreadyExists,
            }
        }
    }

    /// Makes a clone in the store, under its name or the next that is free; returns the one that it has there, if it has another.
    pub async fn register_under_a_name(
        &self,
        n: usize,
        clone: RegisteredClone,
    ) -> Result<Option<String>, StoreError> {
        if !self.parting.plan.is_any() {
            return self.store().register_clone(clone).await.map(|()| None);
        }
        let (seat, name, mut clone) = (self.parting.seat(n), clone.name.clone(), clone);
        seat.is_unsure.set(true);
        for number in 2.. {
            match self.store().register_clone(clone.clone()).await {
                Err(error) if error.kind == StoreErrorKind::AlreadyExists && number < NAMES_MAX => {
                    clone.name = numbered(&name, number);
                }
                result => {
                    let is_sure = |error: &StoreError| {
                        matches!(
                            error.kind,
                            StoreErrorKind::NotFound | StoreErrorKind::AlreadyExists
                        )
                    };
                    seat.is_unsure.set(!result.as_ref().err().is_none_or(is_sure));
                    result?;
                    break;
                }
            }
        }
        let found = self.store().lookup_vdi(&clone.uuid.to_string()).await?;
        assert_eq!(found.uuid, clone.uuid, "a disk has the UUID of a clone as its name");
        Ok((found.name != name).then_some(found.name))
    }
}

/// Names are unique in the store, clones that this host's cache made are there once, under names that they may have, and so are those
/// who took these. What remains of the list is all the others.
pub fn check_names(
    listed: &mut Vec<VdiInfo>,
    models: &[Arc<Mutex<Model>>],
    takers: &Takers,
    store_harmed: bool,
) {
    let mut names = BTreeSet::new();
    for info in &*listed {
        let name = &info.name;
        assert!(names.insert(name) || store_harmed, "two disks are called {name} in the store");
    }
    for model in models.iter().map(|model| model.lock()).filter(|model| model.is_provisional) {
        let is_it = |info: &VdiInfo| Some(info.uuid) == model.uuid;
        let name = &model.name;
        let found: Vec<_> = listed.extract_if(.., |info| is_it(info)).collect();
        assert!(found.len() < 2 || store_harmed, "{name} is in the store more than once");
        let Some(found) = found.first() else { continue };
        let (is, may_be) = (&found.name, first_name(&found.name) == first_name(name));
        let is_right = if model.made { is == name } else { may_be };
        assert!(is_right || store_harmed, "{name} is called {is} in the store");
    }
    for taker in takers.lock().iter().filter(|taker| !taker.is_none) {
        let is_it = |info: &VdiInfo| {
            info.name == taker.name && taker.uuid.is_none_or(|uuid| uuid == info.uuid)
        };
        listed.retain(|info| !is_it(info));
    }
}

/// Those who took names are there, and nobody touched them.
pub async fn check_takers(store: &Store, takers: &Takers, store_harmed: bool) {
    let known: Vec<(String, u64, Uuid)> = {
        let takers = takers.lock();
        let there = takers.iter().filter_map(|taker| Some((taker, taker.uuid?)));
        there.map(|(taker, uuid)| (taker.name.clone(), taker.blocks, uuid)).collect()
    };
    for (name, blocks, uuid) in known {
        let found = match store.lookup_vdi(&name).await {
            Err(_) if store_harmed => continue,
            found => found.unwrap_or_else(|error| panic!("{name} was made, and: {error}")),
        };
        let bytes = blocks * BLOCK_SIZE as u64;
        let is = (found.uuid, found.size_bytes, found.committed_lsn, found.snapshots);
        let is_untouched = is == (uuid, bytes, Lsn(0), 0) && found.owner.is_none();
        assert!(
            is_untouched || store_harmed,
            "{name} took its name, and is another disk: {found:?}"
        );
        let mut sink = |_, block: &[u8]| match block.iter().all(|byte| *byte == 0) {
            true => Ok(()),
            false => Err(std::io::Error::other("something was written to it")),
        };
        let read = store.export_vdi(&name, &mut sink).await;
        assert!(read.is_ok() || store_harmed, "{name} took its name: {:?}", read.err());
    }
}

/// As [`number_of`], whatever the name came to be.
pub fn clone_number(disk: &str) -> Option<usize> {
    number_of(first_name(disk))
}
