//! Changes of the cache's legs that could not be written: a leg may say so all the same, at its next start. What holds counts beyond
//! them, and names them as void: so that such a leg, should it come back, is told from one that went on alone.

use crate::format::superblock::Superblock;
use crate::format::{Membership, Voided};

/// Superblocks whose writing failed: nobody acted on them, and they may be there all the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Attempted {
    /// Of the newest.
    pub(super) sequence: u64,
    /// Sets of members, the latest last; each once.
    sets: Vec<Membership>,
}

impl Attempted {
    /// `superblock`, which was to follow `current`, was not written everywhere.
    pub(super) fn note(&mut self, superblock: &Superblock, current: &Superblock) {
        self.sequence = superblock.sequence;
        if superblock.membership.id != current.membership.id {
            self.sets.retain(|set| set.id != superblock.membership.id);
            self.sets.push(superblock.membership.clone());
        }
    }

    /// A changed set under a count that no attempt reached. One that was attempted before is that again: it would stand beside
    /// itself, and the count does not run away from a leg that cannot be told.
    pub(super) fn beyond(&self, mut changed: Membership) -> Membership {
        let Some(latest) = self.sets.last() else { return changed };
        let (members, legs) = (changed.members, &changed.legs);
        let same = self.sets.iter().find(|set| set.members == members && set.legs == *legs);
        if let Some(id) = same.map(|set| set.id) {
            changed.id = id;
        }
        let beyond = latest.events + u64::from(latest.id != changed.id);
        changed.events = changed.events.max(beyond);
        let own = changed.id;
        let others = self.sets.iter().filter(|set| set.id != own);
        changed.void(others.map(|set| Voided { id: set.id, events: set.events }));
        changed
    }
}
