//! Labels of a disk's snapshots: each that is listed has the one that was asked for. Who was never answered may have got one, at
//! whatever LSN; who was never answered when one was to be changed has the former or the new one.

use crate::host::Agent;
use crate::model::Model;
use blockstore::format::snapshot::LABEL_MAX;
use blockstore::schedule::{is_automatic, is_cut};
use blockstore::types::Lsn;
use blockstore::{SnapshotLabel, StoreErrorKind, Vdi};
use parking_lot::Mutex;
use rand::Rng;
use rand::rngs::SmallRng;
use std::collections::{BTreeMap, BTreeSet};

/// What labels are made of: what is special to somebody, and characters of one to four bytes.
const CHARACTERS: &str = "aB70 @/\\\"'%{-_\u{a0}ßéЖ\u{301}\u{200d}雪\u{feff}🦀\u{10ffff}";

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Labels {
    /// Of snapshots that were answered.
    sure: BTreeMap<u64, SnapshotLabel>,
    /// What a snapshot may have instead.
    maybe: BTreeMap<u64, Vec<SnapshotLabel>>,
    /// Asked for at no certain LSN, without an answer.
    unanswered: Vec<SnapshotLabel>,
}

/// Any label that people may give.
pub fn any_label(rng: &mut SmallRng) -> SnapshotLabel {
    match rng.random_range(0..10) {
        0 => return SnapshotLabel::default(),
        1 => return SnapshotLabel::new("nightly").expect("a label"),
        _ => {}
    }
    let most = rng.random_range(1..=LABEL_MAX);
    let (mut label, characters) = (String::new(), CHARACTERS.chars().collect::<Vec<_>>());
    loop {
        let next = characters[rng.random_range(0..characters.len())];
        if label.len() + next.len_utf8() > most {
            break;
        }
        label.push(next);
    }
    assert!(!is_automatic(&label), "no schedule's");
    SnapshotLabel::new(label).unwrap_or_default()
}

impl Labels {
    /// A snapshot is asked for.
    pub fn asked(&mut self, label: &SnapshotLabel) {
        self.unanswered.push(label.clone());
    }

    /// And was taken.
    pub fn taken(&mut self, lsn: u64, label: &SnapshotLabel) {
        if let Some(at) = self.unanswered.iter().position(|other| other == label) {
            self.unanswered.swap_remove(at);
        }
        self.sure.insert(lsn, label.clone());
    }

    /// One was taken, without a label unless it is known to have one.
    pub fn taken_by_others(&mut self, lsn: u64) {
        self.sure.entry(lsn).or_default();
    }

    /// A snapshot is asked for at this LSN.
    pub fn asked_at(&mut self, lsn: u64, label: &SnapshotLabel) {
        self.maybe.entry(lsn).or_default().push(label.clone());
    }

    /// And was taken. There may be another in its place if that was asked for.
    pub fn taken_at(&mut self, lsn: u64, label: &SnapshotLabel, is_cut: bool) {
        if !is_cut {
            self.sure.insert(lsn, label.clone());
        }
    }

    /// A snapshot is to have another label.
    pub fn changing(&mut self, lsn: u64, label: &SnapshotLabel) {
        self.maybe.entry(lsn).or_default().push(label.clone());
    }

    /// It has.
    pub fn changed(&mut self, lsn: u64, label: &SnapshotLabel) {
        self.maybe.remove(&lsn);
        self.sure.insert(lsn, label.clone());
    }

    /// There will be none of those that were asked for at this LSN.
    pub fn never(&mut self, lsn: u64) {
        self.maybe.remove(&lsn);
    }

    /// The one that alone has this label, if that is known for sure: by that name it is found.
    pub fn is_only(&self, lsn: u64) -> Option<&SnapshotLabel> {
        let label = self.sure.get(&lsn).filter(|label| !label.as_str().is_empty())?;
        let mut others = self.sure.iter().filter(|(other, _)| **other != lsn);
        let mut possible = self.maybe.values().flatten().chain(&self.unanswered);
        let is_only =
            others.all(|(_, other)| other != label) && possible.all(|other| other != label);
        (is_only && !self.maybe.contains_key(&lsn)).then_some(label)
    }

    /// Those that were answered, beyond an LSN.
    pub fn beyond(&self, lsn: u64) -> impl Iterator<Item = u64> {
        self.sure.range(lsn + 1..).map(|(lsn, _)| *lsn)
    }

    /// What came after this LSN is forgotten.
    pub fn truncate(&mut self, last: u64) {
        self.sure.retain(|lsn, _| *lsn <= last);
    }

    /// A snapshot is listed like this.
    ///
    /// # Errors
    /// It should have another label: in words.
    pub fn check(&self, lsn: u64, label: &SnapshotLabel) -> Result<(), String> {
        let (sure, maybe) = (self.sure.get(&lsn), self.maybe.get(&lsn));
        let is_possible = maybe.is_some_and(|maybe| maybe.contains(label));
        let is_it = match sure {
            Some(sure) => sure == label,
            None => label.as_str().is_empty() || self.unanswered.contains(label),
        };
        if is_it || is_possible {
            return Ok(());
        }
        let wanted = sure.map_or("that of one who was not answered", |sure| sure.as_str());
        Err(format!(
            "P5: snapshot {lsn} is labelled {:?}, asked for was {wanted:?}",
            label.as_str()
        ))
    }
}

impl Agent {
    /// That of the next snapshot: none, in seeds without labels.
    pub fn next_label(&self, rng: &mut SmallRng) -> SnapshotLabel {
        if self.labels { any_label(rng) } else { SnapshotLabel::default() }
    }

    /// What only the log has is listed with its labels, and all of it that was answered is.
    pub fn check_pending(&self, vdi: &Vdi, model: &Mutex<Model>) {
        let model = model.lock();
        // The log lists them until it has heard of the commit, and by labels that may be others by then.
        let committed = vdi.committed().lsn.0;
        let mut pending = self.cache.pending_snapshots(vdi.uuid());
        pending.retain(|one| one.lsn.0 > committed && !is_cut(one.label.as_str()));
        for one in &pending {
            if let Err(words) = model.labels.check(one.lsn.0, &one.label) {
                panic!("{}: the log: {words}", model.name);
            }
        }
        let listed: BTreeSet<u64> = pending.iter().map(|one| one.lsn.0).collect();
        let mut missing = model.labels.beyond(committed).filter(|lsn| !listed.contains(lsn));
        let missing = missing.next().filter(|_| !model.damaged);
        assert_eq!(missing, None, "P5, {}: snapshots that only the log has", model.name);
    }

    /// Gives a snapshot in the store another label.
    pub async fn change_label(&self, vdi: &Vdi, model: &Mutex<Model>, rng: &mut SmallRng) {
        let there = model.lock().there(vdi.committed().lsn.0);
        if there.is_empty() {
            return;
        }
        let (lsn, label) = (there[rng.random_range(0..there.len())], any_label(rng));
        model.lock().labels.changing(lsn, &label);
        let (store, disk) = (self.store(), vdi.uuid().to_string());
        if store.label_snapshot(&disk, Lsn(lsn), label.clone()).await.is_ok() {
            model.lock().labels.changed(lsn, &label);
        }
    }

    /// A snapshot in the store is found by its label, if it alone has that.
    pub async fn find_by_label(&self, vdi: &Vdi, model: &Mutex<Model>, lsn: u64) {
        let Some(label) = model.lock().labels.is_only(lsn).cloned() else { return };
        let found = self.store().find_only_snapshot(&vdi.uuid().to_string(), label.as_str()).await;
        match found {
            Ok(found) => assert_eq!(found.lsn.0, lsn, "P5: found by the label {label:?}"),
            // The disk itself left meanwhile.
            Err(error) if error.kind == StoreErrorKind::NotFound && model.lock().may_be_gone() => {}
            Err(error) => {
                let is_excused =
                    error.kind != StoreErrorKind::NotFound && error.kind != StoreErrorKind::Invalid;
                let is_excused = is_excused || self.may_have_lost;
                assert!(is_excused, "P5: snapshot {lsn} by its label {label:?}: {error}");
            }
        }
    }
}
