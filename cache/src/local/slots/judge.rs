//! What a slot holds, by what its copies on all members say together. Pure.
//!
//! A slot's two places are written in turn, each write durable on every member before the next one begins. So, while n is the
//! newest sequence that was acknowledged, its place holds n on every member, and the other place what was there before or
//! parts of n + 1. Sequence 1 goes to place 1: as long as place 0 was never written, nothing was ever logged under this slot
//! (a log is opened with sequence 2 or a later one, and a clone is answered after both of its copies).
//!
//! | what was found | decision |
//! |---|---|
//! | a copy of a newer version | refused |
//! | place 0 never used on any member, no whole copy in place 1, which names no later sequence | free: what is in place 1 is a first write that never counted |
//! | place 1 never used on any member, place 0 nowhere damaged, perhaps unread | free: there was no first write |
//! | each place can be told on some member | the newest copy; free if there is none |
//! | a place that can be told nowhere, and one of several members did not give it | refused: that member may have the newest |
//! | a place that can be told nowhere, damaged on all, or not given by the only member | the copy in the other place: it was torn, or rot |
//! | the same, and there is no copy in the other place | refused |

use crate::format::slot::VdiSlot;
use crate::format::{FormatError, Geometry};
use blockstore::buf::is_zero;
use blockstore::types::BLOCK_SIZE;

/// For messages.
const WHAT: &str = "VDI slot";
/// Where a slot says its sequence.
const SEQUENCE: std::ops::Range<usize> = 16..24;

/// What a member gave of one copy of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing.
    Unread,
    /// Zeros: a cache is made with them.
    Blank,
    /// Something that was not written there, or only part of it was.
    Damaged(FormatError),
    /// As `Damaged`, and the parts that are there are of this sequence.
    Torn(u64, FormatError),
    /// A copy.
    Whole(Box<VdiSlot>),
}

impl Found {
    /// Of a block that was read, or was not.
    pub fn of(block: Option<&[u8]>, slot: u32) -> Self {
        let Some(block) = block else { return Self::Unread };
        match VdiSlot::decode(block, slot) {
            Ok(whole) => Self::Whole(Box::new(whole)),
            Err(FormatError::Absent(_)) if is_zero(block) => Self::Blank,
            Err(error @ FormatError::Checksum { .. }) => {
                let sequence = block[SEQUENCE].try_into().map_or(0, u64::from_le_bytes);
                Self::Torn(sequence, error)
            }
            Err(error) => Self::Damaged(error),
        }
    }

    fn whole(&self) -> Option<&VdiSlot> {
        if let Self::Whole(whole) = self { Some(whole) } else { None }
    }

    fn damage(&self) -> Option<&FormatError> {
        match self {
            Self::Damaged(error) | Self::Torn(_, error) => Some(error),
            Self::Unread | Self::Blank | Self::Whole(_) => None,
        }
    }

    /// Why a place that cannot be told does not say what was written there, if it was read.
    fn lost(&self) -> Option<FormatError> {
        let is_blank = (*self == Self::Blank).then_some(FormatError::Absent(WHAT));
        self.damage().cloned().or(is_blank)
    }

    /// What this place held when `newest` was written can be told. From the second write on no place is blank.
    fn tells(&self, newest: u64) -> bool {
        match self {
            Self::Whole(_) => true,
            Self::Blank => newest < 2,
            Self::Unread | Self::Damaged(_) | Self::Torn(..) => false,
        }
    }

    /// Nothing was ever written to this place, or that nothing was.
    fn is_unused(&self) -> bool {
        *self == Self::Blank || self.whole().is_some_and(|whole| *whole == unused(whole.slot))
    }

    /// May be part of the first write of all.
    fn is_at_most_first(&self) -> bool {
        match self {
            Self::Torn(sequence, _) => *sequence <= 1,
            Self::Whole(_) => self.is_unused(),
            Self::Unread | Self::Blank | Self::Damaged(_) => true,
        }
    }
}

/// Why it cannot be told what a slot holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Doubt {
    /// A newer Ballast wrote it.
    Newer(FormatError),
    /// This member, by its place in what was found, may have the newest copy in this place, and did not give it. Where it was
    /// read it is damaged.
    Unread { at: usize, place: u64, damage: Option<FormatError> },
    /// Nothing of it is whole.
    Damaged(FormatError),
}

/// Decides as the table at the head of this file says; `found` has both copies of each member.
pub(super) fn judge(slot: u32, found: &[[Found; 2]]) -> Result<VdiSlot, Doubt> {
    let damages = || found.iter().flatten().filter_map(Found::damage);
    if let Some(newer) = damages().find(|error| matches!(error, FormatError::Version { .. })) {
        return Err(Doubt::Newer(newer.clone()));
    }
    let copies = found.iter().flatten().filter_map(Found::whole);
    let best = copies.reduce(|best, copy| if copy.sequence > best.sequence { copy } else { best });
    let everywhere = |place: usize, is: fn(&Found) -> bool| found.iter().all(|of| is(&of[place]));
    let never_logged = everywhere(0, Found::is_unused) && everywhere(1, Found::is_at_most_first);
    let never_written =
        everywhere(1, Found::is_unused) && everywhere(0, |copy| copy.damage().is_none());
    if never_logged || never_written && best.is_none_or(|best| *best == unused(slot)) {
        return Ok(unused(slot));
    }
    let newest = best.map_or(0, |best| best.sequence);
    let untold = |place: &usize| found.iter().all(|of| !of[*place].tells(newest));
    let untold: Vec<usize> = [0, 1].into_iter().filter(untold).collect();
    let unread = untold.iter().find_map(|&place| {
        let at = found.iter().position(|of| of[place] == Found::Unread)?;
        let damage = found.iter().find_map(|of| of[place].lost());
        Some(Doubt::Unread { at, place: place as u64, damage })
    });
    match (best, unread) {
        (Some(best), unread) if unread.is_none() || found.len() < 2 => Ok(best.clone()),
        (_, Some(unread)) => Err(unread),
        (_, None) if untold.is_empty() => Ok(unused(slot)),
        (_, None) => {
            let mut of_untold =
                untold.iter().flat_map(|&place| found.iter().map(move |of| &of[place]));
            let damage = of_untold.find_map(Found::lost);
            Err(Doubt::Damaged(damage.unwrap_or(FormatError::Absent(WHAT))))
        }
    }
}

/// A member that gave this of a place must be given [`copy_for`] that place, so that it holds everything itself: the newest
/// copy; and no damage beside it, which would be in doubt again at a start that gets nothing of the others.
pub(super) fn lacks(found: &Found, place: usize, best: &VdiSlot) -> bool {
    let is_its_place = *best != unused(best.slot) && place == place_of(best.sequence);
    match found {
        Found::Unread | Found::Damaged(_) | Found::Torn(..) => true,
        Found::Blank => is_its_place || best.sequence >= 2,
        Found::Whole(copy) => is_its_place && **copy != *best,
    }
}

/// What is to be in a place of a slot that holds `best`: that; zeros if nothing was ever there; and in the other place the
/// same as the one before, so that it does not take the place of the newest one, which is not to be written over next.
pub(super) fn copy_for(place: usize, best: &VdiSlot) -> [u8; BLOCK_SIZE] {
    if *best == unused(best.slot) {
        [0; BLOCK_SIZE]
    } else if place == place_of(best.sequence) {
        best.encode()
    } else {
        VdiSlot { sequence: best.sequence.saturating_sub(1), ..best.clone() }.encode()
    }
}

/// A slot to which nothing was ever written.
fn unused(slot: u32) -> VdiSlot {
    VdiSlot { sequence: 0, slot, vdi: None, quarantined: None }
}

/// In which of both places a copy of this sequence is.
fn place_of(sequence: u64) -> usize {
    (Geometry::slot_offset(0, sequence) - Geometry::slot_offset(0, 0)) as usize / BLOCK_SIZE
}

#[cfg(test)]
mod tests {
    //! Goal: no slot that was acknowledged is taken for an older one or a free one, and no cache is refused, whatever a power loss
    //! tears on each member, with one copy beside it that rotted or cannot be read.
    //! Method: every history of a few writes, on one member and on two, with every such fault.

    use super::*;

    const LOST: FormatError = FormatError::Absent(WHAT);

    fn named(sequence: u64) -> VdiSlot {
        VdiSlot { sequence, ..unused(0) }
    }

    /// What a member has after `acknowledged` writes, while the next one is lost, torn or done.
    fn after(acknowledged: u64, next: u8) -> [Found; 2] {
        let mut copies = [Found::Blank, Found::Blank];
        for sequence in 1..=acknowledged {
            copies[place_of(sequence)] = Found::Whole(Box::new(named(sequence)));
        }
        let checksum = FormatError::Checksum { what: WHAT, expected: 1, found: 2 };
        match next {
            0 => {}
            1 => copies[place_of(acknowledged + 1)] = Found::Torn(acknowledged + 1, checksum),
            _ => {
                copies[place_of(acknowledged + 1)] = Found::Whole(Box::new(named(acknowledged + 1)))
            }
        }
        copies
    }

    #[test]
    fn what_was_acknowledged_is_told_after_any_tear_and_one_fault() {
        for acknowledged in 0..6 {
            for (first, second) in (0..3).flat_map(|n| [0, 1, 2, 3].map(|m| (n, m))) {
                let mut clean = vec![after(acknowledged, first)];
                // Three stands for no second member.
                clean.extend((second < 3).then(|| after(acknowledged, second)));
                let told = judge(0, &clean).unwrap().sequence;
                assert!((acknowledged..=acknowledged + 1).contains(&told), "{clean:?}: {told}");
                for (at, place) in (0..clean.len()).flat_map(|at| [0, 1].map(|place| (at, place))) {
                    for fault in [Found::Unread, Found::Damaged(LOST)] {
                        let mut found = clean.clone();
                        found[at][place] = fault.clone();
                        one_fault(acknowledged, &found, place, fault == Found::Unread);
                    }
                }
            }
        }
    }

    fn one_fault(acknowledged: u64, found: &[[Found; 2]], place: usize, is_unread: bool) {
        let judged = judge(0, found).map(|slot| slot.sequence);
        let is_torn = |place: usize| found.iter().all(|of| of[place].damage().is_some());
        if found.len() < 2 {
            // The older copy, as with any damage there, or none if there is none.
            match judged {
                Ok(told) => assert!(told + 1 >= acknowledged, "{found:?}: {told}"),
                Err(_) => assert!(found[0].iter().all(|copy| copy.whole().is_none()), "{found:?}"),
            }
            let was_never_used = acknowledged == 0 && found[0][1 - place] == Found::Blank;
            assert!(!was_never_used || !is_unread || judged == Ok(0), "{found:?}: {judged:?}");
            return;
        }
        match judged {
            Ok(told) => {
                assert!((acknowledged..=acknowledged + 1).contains(&told), "{found:?}: {told}");
            }
            // A power loss tore the other member's copy of the one that is not given.
            Err(Doubt::Unread { at, .. }) => {
                assert!(is_unread && found[1 - at][place].damage().is_some(), "{found:?}");
            }
            Err(doubt) => {
                assert!(acknowledged == 0 && place == 0 && is_torn(1), "{found:?}: {doubt:?}");
            }
        }
    }

    /// Place 0 was written if place 1 has anything of a later write than the first.
    #[test]
    fn only_a_first_write_counts_for_nothing() {
        let checksum = FormatError::Checksum { what: WHAT, expected: 1, found: 2 };
        let torn = |sequence| Found::Torn(sequence, checksum.clone());
        assert_eq!(judge(0, &[[Found::Blank, torn(1)]]), Ok(unused(0)));
        assert_eq!(judge(0, &[[Found::Blank, torn(3)]]), Err(Doubt::Damaged(checksum.clone())));
        assert_eq!(judge(0, &[[torn(2), Found::Blank]]), Err(Doubt::Damaged(checksum.clone())));
        assert_eq!(judge(0, &[[torn(2), torn(1)]]), Err(Doubt::Damaged(checksum.clone())));
        let beside_unread = judge(0, &[[Found::Blank, torn(1)], [Found::Unread, Found::Unread]]);
        assert!(matches!(beside_unread, Err(Doubt::Unread { at: 1, .. })), "{beside_unread:?}");
    }
}
