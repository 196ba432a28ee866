//! What the run directory remembers of scrubs: how far the present one is, and how the last ones ended. A hint: without it, or with one of
//! another store, the next pass begins anew.

use crate::api::scrub::ScrubEnded;
use gc::scrub::Saved;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use uuid::Uuid;

const FILE: &str = "scrub.json";

/// The note.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Note {
    /// Of which store.
    pub(super) store: Uuid,
    /// A pass that was not at its end.
    pub(super) begun: Option<Begun>,
    /// The last that ended.
    pub(super) last: Option<ScrubEnded>,
    /// The last that came to its end.
    pub(super) completed: Option<ScrubEnded>,
}

/// A pass under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Begun {
    /// When it began, milliseconds since 1970.
    pub(super) at: u64,
    pub(super) saved: Saved,
}

impl Note {
    /// What was noted of a store.
    pub(super) fn read(run_dir: &Path, store: Uuid) -> Self {
        let text = std::fs::read(path(run_dir)).unwrap_or_default();
        let found: Option<Self> = serde_json::from_slice(&text).ok();
        found.filter(|note| note.store == store).unwrap_or(Self { store, ..Self::default() })
    }

    /// Not flushed: what is lost is verified again.
    pub(super) fn write(&self, run_dir: &Path) {
        let path = path(run_dir);
        let text = serde_json::to_vec_pretty(self).unwrap_or_default();
        let beside = path.with_extension("json.new");
        let written = std::fs::write(&beside, text).and_then(|()| std::fs::rename(&beside, &path));
        if let Err(error) = written {
            tracing::debug!("cannot write {}: {error}", path.display());
        }
    }
}

fn path(run_dir: &Path) -> PathBuf {
    run_dir.join(FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_of_one_store_and_may_be_missing_or_junk() {
        let dir = tempfile::tempdir().unwrap();
        let (store, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let fresh = Note::read(dir.path(), store);
        assert_eq!((fresh.store, &fresh.begun, &fresh.last), (store, &None, &None));
        let begun = Some(Begun { at: 5, saved: Saved::default() });
        let note = Note { begun, ..fresh.clone() };
        note.write(dir.path());
        assert_eq!(Note::read(dir.path(), store), note);
        assert_eq!(Note::read(dir.path(), other), Note { store: other, ..Note::default() });
        std::fs::write(path(dir.path()), "junk").unwrap();
        assert_eq!(Note::read(dir.path(), store), fresh);
    }
}
