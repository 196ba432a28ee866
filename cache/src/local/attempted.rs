//! Changes of the cache's legs that could not be written: a leg may say so all the same, at its next start. What holds counts beyond
//! them, and names them as void: so that such a leg, should it come back, is told from one that went on alone.

use crate::format::superblock::Superblock;
use crate::format::{Membership, Voided};

/// Superblocks whose writing failed: nobody acted on them, and they may be there all the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Attempted {
    /// Of the newest.
    pub(super) sequence: u64,
    /// The set that is served under is not written yet: the start could not be noted.
    pub(super) is_unnoted: bool,
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

    /// The number of the next superblock after `durable`, the newest that was written everywhere: it goes to the place of one that
    /// failed, which may be torn, and not over the other, which is whole.
    pub(super) fn following(&self, durable: u64) -> u64 {
        if self.sequence > durable { self.sequence + 2 } else { durable + 1 }
    }

    /// A set holds: it is written on all of its members.
    pub(super) fn holds(&mut self, set: &Membership) {
        self.is_unnoted = false;
        self.sets.retain(|attempted| attempted.id != set.id);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Geometry, LegSet};
    use uuid::Uuid;

    /// A set that was written at last is not told to others as one that nobody acted on.
    #[test]
    fn what_holds_is_void_nowhere() {
        let legs = vec![Uuid::from_u128(1), Uuid::from_u128(2)];
        let current = Superblock {
            sequence: 2,
            cache: Uuid::from_u128(7),
            host: Uuid::from_u128(8),
            machine: None,
            store: None,
            leg: legs[0],
            membership: Membership::new(legs),
            geometry: Geometry::for_size(16 << 20).unwrap(),
        };
        let without = |gone| current.membership.without(LegSet::NONE.with(gone)).unwrap();
        let next = Superblock { sequence: 3, membership: without(1), ..current.clone() };
        let mut attempted = Attempted::default();
        attempted.note(&next, &current);
        assert_eq!((attempted.following(2), attempted.following(3)), (5, 4));
        assert_eq!(attempted.beyond(without(0)).voided.len(), 1);
        attempted.holds(&next.membership);
        assert_eq!(attempted.beyond(without(0)).voided, []);
    }
}
