//! Finds the cut: the number N such that every sector of an image holds its value after requests
//! 1 to N.
//!
//! Each sector allows the cuts during which it held the value found: one interval for a stamp, one or
//! several for zeros. The cut lies in the intersection over all sectors.

use super::history::{History, Value};
use super::verdict::{Kind, Violation};
use super::{Oracle, effect};
use crate::client::stamp::{Found, Sequence};
use crate::client::{BLOCK_SECTORS, SECTOR};

/// Violations reported at most; more of the same helps nobody.
const REPORTED_MAX: usize = 8;

/// Where an image was cut out of the client's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// First request after which the image may have been taken.
    pub first: Sequence,
    /// Last such request.
    pub last: Sequence,
    /// Request `last` shows in some of its 4 KiB blocks and not in others.
    pub split: bool,
}

/// Disjoint inclusive intervals, ascending.
type Intervals = Vec<(Sequence, Sequence)>;

impl Oracle {
    /// The cut of `image` at or after `floor`.
    pub(super) fn find_cut(&self, image: &[u8], floor: Sequence) -> Result<Cut, Vec<Violation>> {
        assert_eq!(image.len(), self.sectors.len() * SECTOR, "not an image of the whole disk");
        let found = self.read_image(image, floor)?;
        match self.intersect(&found, floor, false) {
            Ok(allowed) => Ok(as_cut(&allowed, false)),
            Err(violations) => match self.intersect(&found, floor, true) {
                Ok(allowed) => self.split_cut(&allowed, &found).ok_or(violations),
                Err(_) => Err(violations),
            },
        }
    }

    /// What each sector holds; fails on values that are legal at no cut at all.
    fn read_image(&self, image: &[u8], floor: Sequence) -> Result<Vec<Found>, Vec<Violation>> {
        let mut violations = Vec::new();
        let mut all = Vec::with_capacity(self.sectors.len());
        for (sector, bytes) in (0..).zip(image.chunks_exact(SECTOR)) {
            let found = self.identity.read(sector, bytes);
            let history = &self.sectors[sector as usize];
            let mut known = history.values().filter(|value| value.matches(found));
            let live_from = history.last_where(|sequence| sequence <= floor);
            if !known.any(|value| value.sequence >= live_from) {
                violations.push(self.judge(sector, found, live_from));
                if violations.len() == REPORTED_MAX {
                    break;
                }
            }
            all.push(found);
        }
        if violations.is_empty() { Ok(all) } else { Err(violations) }
    }

    fn intersect(
        &self,
        found: &[Found],
        floor: Sequence,
        partial: bool,
    ) -> Result<Intervals, Vec<Violation>> {
        let mut allowed: Intervals = vec![(floor, self.submitted())];
        // The sectors that raised the lower and lowered the upper bound last, to name a contradiction.
        let (mut lower, mut upper) = (None, None);
        for (sector, (history, found)) in (0u64..).zip(self.sectors.iter().zip(found)) {
            if history.is_settled() {
                continue;
            }
            let own = cuts_of(history, *found, partial);
            let covers = |(from, to): &(Sequence, Sequence)| {
                own.iter().any(|(first, last)| first <= from && to <= last)
            };
            if allowed.iter().all(covers) {
                continue;
            }
            let next = intersection(&allowed, &own);
            if next.is_empty() {
                return Err(vec![self.contradiction(sector, *found, lower, upper)]);
            }
            if next[0].0 > allowed[0].0 {
                lower = Some((sector, *found));
            }
            if next.last().map(|one| one.1) < allowed.last().map(|one| one.1) {
                upper = Some((sector, *found));
            }
            allowed = next;
        }
        Ok(allowed)
    }

    fn contradiction(
        &self,
        sector: u64,
        found: Found,
        lower: Option<(u64, Found)>,
        upper: Option<(u64, Found)>,
    ) -> Violation {
        let name = |(sector, found): (u64, Found)| {
            let at = self.sectors[sector as usize].values().collect::<Vec<_>>();
            let value = at.iter().find(|value| value.matches(found)).map(|value| value.sequence);
            let next = at.iter().find(|one| Some(one.sequence) > value).map(|one| one.sequence);
            match (value, next) {
                (Some(value), Some(next)) => format!(
                    "sector {sector} shows {} but not {}",
                    self.describe(value),
                    self.describe(next)
                ),
                (Some(value), None) => format!("sector {sector} shows {}", self.describe(value)),
                (None, _) => format!("sector {sector} shows {found:?}"),
            }
        };
        let others: Vec<String> = [lower, upper].into_iter().flatten().map(name).collect();
        Violation {
            sector,
            kind: Kind::NoPrefix,
            detail: format!(
                "no point of the client's order explains the image: {}; against {}",
                name((sector, found)),
                if others.is_empty() { "what must survive".to_owned() } else { others.join("; ") }
            ),
        }
    }

    /// Among cuts at which the cut's own request may show in part, one where each 4 KiB block shows
    /// it wholly or not at all.
    fn split_cut(&self, allowed: &Intervals, found: &[Found]) -> Option<Cut> {
        let candidates = allowed.iter().flat_map(|&(first, last)| first..=last);
        let whole_blocks = |cut: &Sequence| {
            let Some(request) = cut.checked_sub(1).map(|index| &self.requests[index as usize])
            else {
                return false;
            };
            let range = effect(request.kind, &request.sectors);
            let shows = |sector: u64| {
                self.sectors[sector as usize]
                    .values()
                    .any(|value| value.sequence == *cut && value.matches(found[sector as usize]))
            };
            range.clone().zip(range.skip(1)).all(|(one, next)| {
                one / BLOCK_SECTORS != next / BLOCK_SECTORS || shows(one) == shows(next)
            })
        };
        candidates.rev().find(whole_blocks).map(|cut| Cut { first: cut, last: cut, split: true })
    }
}

fn as_cut(allowed: &Intervals, split: bool) -> Cut {
    let (first, last) = (allowed[0].0, allowed[allowed.len() - 1].1);
    Cut { first, last, split }
}

/// The cuts at which a sector of this history reads as `found`. With `partial`, also the cut at the
/// request that replaced the value, which may not have reached this sector.
fn cuts_of(history: &History, found: Found, partial: bool) -> Intervals {
    let values: Vec<Value> = history.values().collect();
    let mut out: Intervals = Vec::with_capacity(1);
    for (index, value) in values.iter().enumerate() {
        if !value.matches(found) {
            continue;
        }
        // The base stands for everything up to it.
        let first = if index == 0 { 0 } else { value.sequence };
        let last = match values.get(index + 1) {
            Some(next) => next.sequence - u64::from(!partial),
            None => Sequence::MAX,
        };
        match out.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last,
            _ => out.push((first, last)),
        }
    }
    out
}

fn intersection(a: &Intervals, b: &Intervals) -> Intervals {
    let (mut i, mut j) = (0, 0);
    let mut out = Vec::new();
    while i < a.len() && j < b.len() {
        let (first, last) = (a[i].0.max(b[j].0), a[i].1.min(b[j].1));
        if first <= last {
            out.push((first, last));
        }
        if a[i].1 < b[j].1 { i += 1 } else { j += 1 }
    }
    out
}
