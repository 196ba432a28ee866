//! The legs of a mirrored cache: which there are, which of them hold everything.
//!
//! A cache has one leg, or two that are written together. Each change of the set of members is written to every member's
//! superblock, with a higher event count and a fresh id, before anything is acknowledged under it. When legs meet
//! again, the count tells which one was left behind, and the id tells two that went on without each other apart.

use uuid::Uuid;

/// Most legs of a cache.
pub const LEGS_MAX: usize = 2;
/// Most sets that a membership knows as void.
pub const VOIDED_MAX: usize = 4;

/// A set of legs, by number: its place in [`Membership::legs`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct LegSet(u8);

impl LegSet {
    /// No leg.
    pub const NONE: Self = Self(0);
    /// The one leg of a cache without a mirror.
    pub const FIRST: Self = Self(1);

    /// Legs 0 to `count - 1`.
    #[must_use]
    pub fn first(count: usize) -> Self {
        (0..count.min(LEGS_MAX) as u8).fold(Self::NONE, Self::with)
    }

    /// From its bits; none if they name legs that cannot be.
    #[must_use]
    pub fn from_bits(bits: u32) -> Option<Self> {
        (bits < 1 << LEGS_MAX).then_some(Self(bits as u8))
    }

    /// Bit n is leg n.
    #[must_use]
    pub fn bits(self) -> u32 {
        u32::from(self.0)
    }

    /// With one more leg.
    #[must_use]
    pub fn with(self, leg: u8) -> Self {
        debug_assert!(usize::from(leg) < LEGS_MAX);
        Self(self.0 | (1 << leg))
    }

    /// Without the legs of `other`.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The legs that are in both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The legs that are in either.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether the leg is in it.
    #[must_use]
    pub fn contains(self, leg: u8) -> bool {
        usize::from(leg) < LEGS_MAX && self.0 & (1 << leg) != 0
    }

    /// No leg is in it.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many legs are in it.
    #[must_use]
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Its legs, lowest first.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        (0..LEGS_MAX as u8).filter(move |leg| self.contains(*leg))
    }
}

/// Which legs a cache has and which hold everything; the same in the superblocks of all members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// Counts the changes of this set.
    pub events: u64,
    /// Drawn at random with each change.
    pub id: Uuid,
    /// All legs of the cache, one or two; a leg's number is its place here.
    pub legs: Vec<Uuid>,
    /// Those that hold everything; never empty.
    pub members: LegSet,
    /// Sets that a leg may hold although nobody ever acted on them, since writing them failed; the latest [`VOIDED_MAX`].
    pub voided: Vec<Voided>,
}

/// A set of members that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Voided {
    pub id: Uuid,
    /// Up to this event count: beyond it the same set may have been written after all.
    pub events: u64,
}

impl Membership {
    /// A cache of these legs, all in step.
    #[must_use]
    pub fn new(legs: Vec<Uuid>) -> Self {
        let members = LegSet::first(legs.len());
        // A cache without a mirror has no changes to tell apart.
        let id = if legs.len() == 1 { Uuid::nil() } else { Uuid::new_v4() };
        Self { events: 0, id, legs, members, voided: Vec::new() }
    }

    /// Without the legs of `gone`; none if no member would be left.
    #[must_use]
    pub fn without(&self, gone: LegSet) -> Option<Self> {
        let members = self.members.minus(gone);
        (!members.is_empty()).then(|| Self {
            events: self.events + 1,
            id: Uuid::new_v4(),
            legs: self.legs.clone(),
            members,
            voided: self.voided.clone(),
        })
    }

    /// The same set, told apart from what it was before: for a start that goes on with some legs only.
    #[must_use]
    pub fn renewed(&self) -> Self {
        Self { events: self.events + 1, id: Uuid::new_v4(), ..self.clone() }
    }

    /// Notes sets as void, the latest last.
    pub fn void(&mut self, sets: impl IntoIterator<Item = Voided>) {
        for set in sets {
            self.voided.retain(|known| known.id != set.id);
            self.voided.push(set);
        }
        let too_many = self.voided.len().saturating_sub(VOIDED_MAX);
        self.voided.drain(..too_many);
    }

    /// True if a leg whose word this is may have gone on without the legs of `others`, alone or with one that it got since: no leg is
    /// a member of both, and `others` does not know this set as an attempt that failed. What it holds may then be nowhere else. If not
    /// both copies of its superblock `are_whole`, the one that is gone may have named a later set than this one, which was acted on.
    #[must_use]
    pub fn is_split_from(&self, others: &Self, are_whole: bool) -> bool {
        let shares = self.member_legs().any(|leg| others.member_legs().any(|other| other == leg));
        let is_void = others.voided.iter().any(|v| v.id == self.id && self.events <= v.events);
        self.legs.len() > 1 && !shares && !(is_void && are_whole)
    }

    /// Both say that the same legs hold everything.
    #[must_use]
    pub fn has_members_of(&self, other: &Self) -> bool {
        self.member_legs().eq(other.member_legs())
    }

    /// The legs that hold everything, by their numbers.
    fn member_legs(&self) -> impl Iterator<Item = Uuid> {
        self.members.iter().filter_map(|number| self.legs.get(usize::from(number)).copied())
    }

    /// The number that a new leg gets: the place of one that is no member, or the next one; none if all are members.
    #[must_use]
    pub fn free_place(&self) -> Option<u8> {
        (0..LEGS_MAX as u8).find(|number| !self.members.contains(*number))
    }

    /// With a new leg that holds everything, at its free place; none if there is no such place.
    #[must_use]
    pub fn with_new(&self, leg: Uuid) -> Option<Self> {
        let place = self.free_place()?;
        let mut legs = self.legs.clone();
        match legs.get_mut(usize::from(place)) {
            Some(gone) => *gone = leg,
            None => legs.push(leg),
        }
        let members = self.members.with(place);
        let (events, id) = (self.events + 1, Uuid::new_v4());
        Some(Self { events, id, legs, members, voided: self.voided.clone() })
    }

    /// The number of a leg of this cache.
    #[must_use]
    pub fn number_of(&self, leg: Uuid) -> Option<u8> {
        self.legs.iter().position(|known| *known == leg).map(|at| at as u8)
    }

    /// True if the fields do not contradict each other.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let known = LegSet::first(self.legs.len());
        let distinct = self.legs.iter().enumerate().all(|(n, leg)| !self.legs[..n].contains(leg));
        (1..=LEGS_MAX).contains(&self.legs.len())
            && distinct
            && !self.members.is_empty()
            && self.members.minus(known).is_empty()
            && self.events < u64::MAX
            && self.voided.len() <= VOIDED_MAX
    }
}
