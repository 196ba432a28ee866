//! Which of the legs that were found are the cache. Pure: the decision of rule L5 as a function of superblocks.
//!
//! | found | decision |
//! |---|---|
//! | two caches, or one leg twice (a clone) | refused |
//! | equal event counts, one id | both are members |
//! | equal event counts, two ids | each went on without the other: refused, the operator says which one counts |
//! | unequal event counts, no leg a member of both sets, and the lower one, in two whole copies, not known to the other as a change that failed | the same |
//! | unequal event counts else | the higher is the cache; the other was left behind and is no member |
//! | a member is not there | the one that is there may be the one left behind: only on the operator's word |

use crate::error::CacheError;
use crate::format::legs::LegSet;
use crate::format::superblock::Superblock;
use blockstore::sabotage::{self, Bug};
use std::cmp::Ordering;
use std::path::PathBuf;

/// What to open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    /// The superblock that counts, by place in what was found.
    pub best: usize,
    /// Members that were found, by place, with their leg numbers.
    pub members: Vec<(usize, u8)>,
    /// Found and no member, by place: why.
    pub outsiders: Vec<(usize, String)>,
    /// Members that were not found.
    pub missing: LegSet,
}

/// Decides on what was found: at least one superblock, at most two; `are_whole` says of each, by place, whether both of its copies are.
pub(super) fn choose(
    found: &[(PathBuf, Superblock)],
    are_whole: impl Fn(usize) -> bool,
) -> Result<Choice, CacheError> {
    let [(path, a), others @ ..] = found else {
        return Err(CacheError::Missing { path: PathBuf::new() });
    };
    let Some((twin, b)) = others.first() else { return Ok(with_best(found, 0)) };
    let (path, twin) = (path.clone(), twin.clone());
    if a.cache != b.cache {
        return Err(CacheError::OtherCache { path, cache: a.cache, twin, twin_cache: b.cache });
    }
    if a.leg == b.leg {
        return Err(CacheError::ClonedLeg { path, twin, leg: a.leg });
    }
    let (of_a, of_b) = (&a.membership, &b.membership);
    let is_split = match of_a.events.cmp(&of_b.events) {
        Ordering::Equal => of_a.id != of_b.id,
        Ordering::Less => of_a.is_split_from(of_b, are_whole(0)),
        Ordering::Greater => of_b.is_split_from(of_a, are_whole(1)),
    };
    if is_split && !(of_a.events != of_b.events && sabotage::on(Bug::UseStaleLeg)) {
        return Err(CacheError::SplitLegs { path, twin });
    }
    let newer = |s: &Superblock| (s.membership.events, s.sequence);
    let best = usize::from((newer(b) > newer(a)) != sabotage::on(Bug::UseStaleLeg));
    Ok(with_best(found, best))
}

fn with_best(found: &[(PathBuf, Superblock)], best: usize) -> Choice {
    let (path, superblock) = &found[best];
    let membership = &superblock.membership;
    let mut choice =
        Choice { best, members: Vec::new(), outsiders: Vec::new(), missing: membership.members };
    for (at, (_, other)) in found.iter().enumerate() {
        let number = membership.number_of(other.leg).filter(|n| membership.members.contains(*n));
        match number {
            Some(number)
                if other.membership.events == membership.events
                    || sabotage::on(Bug::UseStaleLeg) =>
            {
                choice.members.push((at, number));
                choice.missing = choice.missing.minus(LegSet::NONE.with(number));
            }
            _ => choice.outsiders.push((
                at,
                format!(
                    "it was left behind: its event count is {}, that of {} is {}; it holds old data and must be replaced",
                    other.membership.events,
                    path.display(),
                    membership.events
                ),
            )),
        }
    }
    choice
}

#[cfg(test)]
mod tests {
    //! Goal: each row of the table above. Method: superblocks made up by hand.

    use super::*;
    use crate::format::{Geometry, Membership, Voided};
    use uuid::Uuid;

    fn pair() -> [Superblock; 2] {
        let legs = vec![Uuid::from_u128(1), Uuid::from_u128(2)];
        let membership = Membership::new(legs.clone());
        [0, 1].map(|n| Superblock {
            sequence: 2,
            cache: Uuid::from_u128(7),
            host: Uuid::from_u128(8),
            machine: None,
            store: None,
            leg: legs[n],
            membership: membership.clone(),
            geometry: Geometry::for_size(16 << 20).unwrap(),
        })
    }

    fn decide(found: &[Superblock]) -> Result<Choice, CacheError> {
        let named: Vec<_> =
            found.iter().enumerate().map(|(n, s)| (format!("leg{n}").into(), s.clone())).collect();
        choose(&named, |_| true)
    }

    fn alone(superblock: &Superblock, number: u8) -> Superblock {
        let other = LegSet::NONE.with(1 - number);
        let membership = superblock.membership.without(other).unwrap();
        Superblock { membership, ..superblock.clone() }
    }

    #[test]
    fn equal_counts_are_both_members_in_whatever_order_they_are_named() {
        let [a, b] = pair();
        let choice = decide(&[b, a]).unwrap();
        assert_eq!(choice.members, [(0, 1), (1, 0)]);
        assert!(choice.missing.is_empty() && choice.outsiders.is_empty());
    }

    #[test]
    fn the_higher_count_wins_and_the_other_is_no_member() {
        let [a, b] = pair();
        for found in [[a.clone(), alone(&b, 1)], [alone(&b, 1), a.clone()]] {
            let choice = decide(&found).unwrap();
            assert_eq!(found[choice.best].leg, b.leg);
            assert_eq!(choice.members, [(choice.best, 1)]);
            assert_eq!(choice.outsiders[0].0, 1 - choice.best);
            assert!(choice.outsiders[0].1.contains("left behind"));
            assert!(choice.missing.is_empty(), "it knows itself that it is alone");
        }
    }

    #[test]
    fn a_leg_whose_twin_is_absent_may_be_the_one_left_behind() {
        let [a, b] = pair();
        assert_eq!(decide(&[a]).unwrap().missing, LegSet::NONE.with(1));
        assert_eq!(decide(std::slice::from_ref(&b)).unwrap().missing, LegSet::NONE.with(0));
        assert!(decide(&[alone(&b, 1)]).unwrap().missing.is_empty());
    }

    #[test]
    fn legs_that_went_on_without_each_other_are_refused() {
        let [a, b] = pair();
        let error = decide(&[alone(&a, 0), alone(&b, 1)]).unwrap_err();
        assert!(matches!(error, CacheError::SplitLegs { .. }), "{error}");
    }

    /// However often each was started, or tried to put the other out, since.
    #[test]
    fn the_count_does_not_say_which_of_two_that_went_on_alone_is_the_cache() {
        let [a, b] = pair();
        let (a, b) = (alone(&a, 0), alone(&b, 1));
        let again = Superblock { membership: b.membership.renewed(), ..b.clone() };
        for found in [[a.clone(), again.clone()], [again.clone(), a.clone()]] {
            let error = decide(&found).unwrap_err();
            assert!(matches!(error, CacheError::SplitLegs { .. }), "{error}");
        }
        // That one only tried, and never went on: it is known.
        let mut knowing = again;
        knowing.membership.void([Voided { id: a.membership.id, events: a.membership.events }]);
        let choice = decide(&[a.clone(), knowing.clone()]).unwrap();
        assert_eq!((choice.best, choice.members), (1, vec![(1, 1)]));
        // It went on after all: under the same id at a later attempt, which was written.
        let mut written = Superblock { membership: a.membership.clone(), ..a.clone() };
        written.membership.events += 1;
        let mut later = knowing.clone();
        later.membership.events += 5;
        assert!(matches!(decide(&[written, later]), Err(CacheError::SplitLegs { .. })));
        // Or at a start, which gives its set another id.
        let started = Superblock { membership: a.membership.renewed(), ..a };
        let knowing = Superblock { membership: knowing.membership.renewed(), ..knowing };
        assert!(matches!(decide(&[started, knowing]), Err(CacheError::SplitLegs { .. })));
    }

    /// It is not alone any more, and has served all the while.
    #[test]
    fn a_leg_that_was_mirrored_again_is_not_left_behind_by_one_that_was_started_alone() {
        let [a, mut b] = pair();
        let mut mirrored = alone(&a, 0);
        mirrored.membership = mirrored.membership.with_new(Uuid::from_u128(3)).unwrap();
        b = alone(&b, 1);
        for _ in 0..3 {
            b.membership = b.membership.renewed();
            for found in [[mirrored.clone(), b.clone()], [b.clone(), mirrored.clone()]] {
                let error = decide(&found).unwrap_err();
                assert!(matches!(error, CacheError::SplitLegs { .. }), "{error}");
            }
        }
        // Its new twin goes on without it, and is mirrored itself: that one knows of it.
        let gone = LegSet::NONE.with(0);
        let twin = Superblock { leg: Uuid::from_u128(3), ..mirrored.clone() };
        let alone = Superblock { membership: twin.membership.without(gone).unwrap(), ..twin };
        let again = alone.membership.with_new(Uuid::from_u128(4)).unwrap();
        for later in [alone.clone(), Superblock { membership: again, ..alone }] {
            let choice = decide(&[mirrored.clone(), later]).unwrap();
            assert_eq!((choice.best, choice.outsiders.len()), (1, 1));
        }
    }

    /// A crash while a leg became a member again: it is named already, and does not know it yet.
    #[test]
    fn a_leg_that_is_named_has_not_gone_on_without_the_other() {
        let [a, b] = pair();
        let both = a.membership.renewed().renewed();
        let choice = decide(&[Superblock { membership: both, ..a }, alone(&b, 1)]).unwrap();
        assert_eq!((choice.best, choice.missing), (0, LegSet::NONE.with(1)));
    }

    #[test]
    fn another_cache_and_a_clone_are_refused() {
        let [a, b] = pair();
        let other = Superblock { cache: Uuid::from_u128(70), ..b };
        let error = decide(&[a.clone(), other]).unwrap_err().to_string();
        assert!(error.contains("leg0") && error.contains("leg1"), "{error}");
        assert!(matches!(decide(&[a.clone(), a]), Err(CacheError::ClonedLeg { .. })));
    }
}
