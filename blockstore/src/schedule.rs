//! Schedules of snapshots with retention: what they say, when a snapshot is due, and which of those that were taken no rule
//! keeps any more. Pure: no clock, no I/O; times are milliseconds.
//!
//! A rule divides the wall clock's time since 1970 into *slots* as long as its interval, so that hours begin at full hours (UTC). The first
//! snapshot taken in a slot stands for it, and a rule keeps those of its last `keep` slots that have one. One snapshot may
//! stand for a slot of several rules; it is surplus when it stands for none that is kept. So nothing but the list of snapshots has to be
//! known to thin it: not which rule took which, nor what the schedule was before.
//!
//! The clock may jump. Snapshots are in the order of their LSNs, and neighbours in it that have one slot are together one:
//! what is newest by LSN is kept first, whatever the clock says of it. And a snapshot is due when its slot has begun by
//! the wall clock *or* its time is up by a clock that never jumps: a wall clock that is put back stops nothing, one that is put
//! forward makes for one snapshot.
//!
//! Besides, a schedule may have a *cadence*: a snapshot behind every write, or behind every batch of writes, of which the newest are
//! kept. Its snapshots have labels of their own (`auto write 2026-11-22T08:00:00.000Z`) and count for no rule with slots, nor do those of
//! such rules count for it.
//!
//! What a schedule took says so by its label (`auto 1h 2026-11-22T08:00:00.000Z`), which is denied to people: whoever gives such a
//! snapshot another label makes it theirs.

#[cfg(test)]
mod tests;

use crate::format::snapshot::SnapshotLabel;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, UNIX_EPOCH};

/// Most rules of a schedule.
pub const RULES_MAX: usize = 8;
/// Shortest interval of a rule, milliseconds.
pub const EVERY_MIN_MS: u64 = 100;
/// Longest interval of a rule, milliseconds: ten years.
pub const EVERY_MAX_MS: u64 = 3650 * DAY_MS;
/// Most slots that a rule keeps.
pub const KEEP_MAX: u32 = 100_000;

const DAY_MS: u64 = 24 * 3_600_000;
/// Units of an interval, the largest first.
const UNITS: [(&str, u64); 6] =
    [("w", 7 * DAY_MS), ("d", DAY_MS), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];
/// Bits of a rule on a disk that say how many it keeps; the interval is above them.
const KEEP_BITS: u32 = 24;
const EXAMPLE: &str = "'every 10s keep 6, every 1h keep 24' or 'every write keep 1000'";
/// What the labels of a schedule's snapshots begin with.
const LABEL_PREFIX: &str = "auto ";
/// From here on years have five digits.
const YEAR_10000_MS: u64 = 253_402_300_800_000;
/// With so many of its snapshots in the log only, the shortest interval is doubled; with twice as many, once more; and so on.
const PRESSED: usize = 4096;

/// One rule: a snapshot in each slot, of which the last ones are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// Length of a slot, milliseconds: [`EVERY_MIN_MS`] to [`EVERY_MAX_MS`].
    pub every_ms: u64,
    /// Slots of which the snapshot is kept: 1 to [`KEEP_MAX`].
    pub keep: u32,
}

/// Behind what a cadence has a snapshot cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Behind {
    /// Each write, discard or zeroing of a guest.
    Write,
    /// Each batch of those that goes to the log's device in one record.
    Batch,
}

/// A rule without slots: a snapshot behind every write or batch, of which the newest are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cadence {
    /// Where they are cut.
    pub behind: Behind,
    /// How many are kept: 1 to [`KEEP_MAX`].
    pub keep: u32,
}

/// A schedule: up to [`RULES_MAX`] rules, a cadence or none first, then those with slots, which have different intervals, the
/// shortest first. Without rules it is none. Held as [`Self::to_bits`] says: it is a part of much that is copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Schedule([u64; RULES_MAX]);

/// Snapshots that a schedule took: LSN and time, milliseconds since 1970.
pub type Taken = BTreeMap<u64, u64>;

impl Behind {
    /// Both, in the order of their numbers.
    pub const ALL: [Self; 2] = [Self::Write, Self::Batch];

    /// As it is written in schedules and labels.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Batch => "batch",
        }
    }

    /// The number that stands for it on a disk, in the place of an interval: shorter than any.
    #[must_use]
    pub const fn to_bits(self) -> u64 {
        match self {
            Self::Write => 1,
            Self::Batch => 2,
        }
    }

    /// What such a number stands for.
    #[must_use]
    pub fn from_bits(bits: u64) -> Option<Self> {
        Self::ALL.into_iter().find(|behind| behind.to_bits() == bits)
    }
}

impl fmt::Display for Behind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Cadence {
    fn new(behind: Behind, keep: u64) -> Result<Self, String> {
        Ok(Self { behind, keep: checked_keep(keep)? })
    }

    fn from_bits(bits: u64) -> Option<Self> {
        Self::new(Behind::from_bits(bits >> KEEP_BITS)?, bits & ((1 << KEEP_BITS) - 1)).ok()
    }

    /// Those of its snapshots that it keeps no more, the oldest first.
    pub fn surplus<'a>(&self, cut: &'a Taken) -> impl Iterator<Item = u64> + use<'a> {
        cut.keys().copied().take(cut.len().saturating_sub(self.keep as usize))
    }

    /// The label of a snapshot that it has cut.
    #[must_use]
    pub fn label(behind: Behind, time_ms: u64) -> SnapshotLabel {
        label_with(behind.name(), time_ms)
    }
}

impl fmt::Display for Cadence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "every {} keep {}", self.behind, self.keep)
    }
}

fn checked_keep(keep: u64) -> Result<u32, String> {
    match u32::try_from(keep) {
        Ok(keep @ 1..=KEEP_MAX) => Ok(keep),
        _ => Err(format!("a rule may keep 1 to {KEEP_MAX} snapshots, not {keep}")),
    }
}

impl Rule {
    fn new(every_ms: u64, keep: u64) -> Result<Self, String> {
        if !(EVERY_MIN_MS..=EVERY_MAX_MS).contains(&every_ms) {
            let (least, most) = (interval(EVERY_MIN_MS), interval(EVERY_MAX_MS));
            return Err(format!("an interval may be {least} to {most}"));
        }
        Ok(Self { every_ms, keep: checked_keep(keep)? })
    }

    /// The rule that a number on a disk stands for, if it makes sense.
    fn from_bits(bits: u64) -> Option<Self> {
        Self::new(bits >> KEEP_BITS, bits & ((1 << KEEP_BITS) - 1)).ok()
    }

    fn slot(self, time_ms: u64) -> u64 {
        time_ms / self.every_ms
    }

    /// The snapshots that stand for the rule's slots, the newest first.
    fn standing<'a>(&self, taken: &'a Taken) -> impl Iterator<Item = u64> + use<'a> {
        let rule = *self;
        let mut newest_first = taken.iter().rev().peekable();
        std::iter::from_fn(move || {
            let (mut lsn, time) = newest_first.next()?;
            while let Some((older, _)) =
                newest_first.next_if(|(_, older)| rule.slot(**older) == rule.slot(*time))
            {
                lsn = older;
            }
            Some(*lsn)
        })
    }

    /// The snapshots that the rule keeps, the newest first.
    pub fn kept<'a>(&self, taken: &'a Taken) -> impl Iterator<Item = u64> + use<'a> {
        self.standing(taken).take(self.keep as usize)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "every {} keep {}", interval(self.every_ms), self.keep)
    }
}

/// An interval in the largest unit, but for weeks, that it is a whole number of.
#[must_use]
pub fn interval(ms: u64) -> String {
    let fits = |(_, unit): &&(&str, u64)| ms.is_multiple_of(*unit);
    let (name, unit) = UNITS[1..].iter().find(fits).unwrap_or(&("ms", 1));
    format!("{}{name}", ms / unit)
}

fn parse_interval(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, name) = text.split_at(digits);
    let (_, unit) = UNITS.iter().find(|(unit, _)| *unit == name)?;
    number.parse::<u64>().ok().map(|number| number.saturating_mul(*unit))
}

impl Schedule {
    /// Its rules with slots, the shortest interval first.
    pub fn rules(&self) -> impl Iterator<Item = Rule> + '_ {
        self.0.iter().copied().filter_map(Rule::from_bits)
    }

    /// Its rule without slots.
    #[must_use]
    pub fn cadence(&self) -> Option<Cadence> {
        Cadence::from_bits(self.0[0])
    }

    /// Nothing is taken.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.0[0] == 0
    }

    /// The numbers that stand for it on a disk, zeros for none: per rule interval in milliseconds × 2^24 + slots to keep; for a cadence
    /// [`Behind::to_bits`] is in the interval's place.
    #[must_use]
    pub fn to_bits(&self) -> [u64; RULES_MAX] {
        self.0
    }

    /// What numbers on a disk stand for. One that makes no sense is no rule.
    #[must_use]
    pub fn from_bits(bits: [u64; RULES_MAX]) -> Self {
        let cadence = bits.into_iter().find_map(Cadence::from_bits);
        let rules = bits.into_iter().filter_map(Rule::from_bits);
        Self::of(cadence, rules.map(|rule| (rule.every_ms, rule)).collect())
    }

    fn of(cadence: Option<Cadence>, rules: BTreeMap<u64, Rule>) -> Self {
        let cadence = cadence.map(|cadence| (cadence.behind.to_bits(), cadence.keep));
        let rules = rules.into_values().map(|rule| (rule.every_ms, rule.keep));
        let mut all = [0; RULES_MAX];
        for (place, (every, keep)) in all.iter_mut().zip(cadence.into_iter().chain(rules)) {
            *place = every << KEEP_BITS | u64::from(keep);
        }
        Self(all)
    }

    /// What no rule with slots keeps any more of what such rules took, the oldest first. A schedule without rules leaves everything as it
    /// is.
    #[must_use]
    pub fn surplus(&self, taken: &Taken) -> Vec<u64> {
        if self.is_none() {
            return Vec::new();
        }
        let kept: BTreeSet<u64> = self.rules().flat_map(|rule| rule.kept(taken)).collect();
        taken.keys().copied().filter(|lsn| !kept.contains(lsn)).collect()
    }

    /// What the cadence keeps no more of what was `cut` by one, the oldest first: all of it, if there are other rules only.
    #[must_use]
    pub fn surplus_cuts<'a>(&self, cut: &'a Taken) -> Box<dyn Iterator<Item = u64> + 'a> {
        match self.cadence() {
            Some(cadence) => Box::new(cadence.surplus(cut)),
            None if self.is_none() => Box::new(std::iter::empty()),
            None => Box::new(cut.keys().copied()),
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() {
            return f.write_str("none");
        }
        let cadence = self.cadence().map(|cadence| cadence.to_string());
        let rules = self.rules().map(|rule| rule.to_string());
        let all: Vec<String> = cadence.into_iter().chain(rules).collect();
        f.write_str(&all.join(", "))
    }
}

impl FromStr for Schedule {
    type Err = String;

    /// Reads what [`fmt::Display`] writes, with the units ms, s, m, h, d and w.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim() == "none" {
            return Ok(Self::default());
        }
        let (mut cadence, mut rules) = (None, BTreeMap::new());
        for part in text.split(',') {
            let parsed = parse_rule(part.trim())
                .map_err(|why| format!("{why}; a schedule is rules such as {EXAMPLE}, or none"))?;
            match parsed {
                Parsed::Cadence(new) => {
                    if let Some(former) = cadence.replace(new) {
                        return Err(format!(
                            "'{former}' and '{new}' are given: a snapshot behind every write is one behind every batch, too; give one \
                             of them, such as {EXAMPLE}"
                        ));
                    }
                }
                Parsed::Rule(rule) => {
                    if rules.insert(rule.every_ms, rule).is_some() {
                        let every = interval(rule.every_ms);
                        return Err(format!(
                            "two rules have the interval {every}: give one for each interval, such as {EXAMPLE}"
                        ));
                    }
                }
            }
        }
        let count = rules.len() + usize::from(cadence.is_some());
        if count > RULES_MAX {
            return Err(format!(
                "a schedule may have {RULES_MAX} rules, this one has {count}: leave some out"
            ));
        }
        Ok(Self::of(cadence, rules))
    }
}

enum Parsed {
    Cadence(Cadence),
    Rule(Rule),
}

fn parse_rule(text: &str) -> Result<Parsed, String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let ["every", every, "keep", keep] = words[..] else {
        return Err(format!(
            "'{text}' is no rule, which is 'every TIME keep NUMBER', 'every write keep NUMBER' or 'every batch keep NUMBER'"
        ));
    };
    let number = || keep.parse().map_err(|_| format!("'{keep}' in '{text}' is no number to keep"));
    let impossible = |why| format!("'{text}' is not possible: {why}");
    if let Some(behind) = Behind::ALL.into_iter().find(|behind| behind.name() == every) {
        return Cadence::new(behind, number()?).map(Parsed::Cadence).map_err(impossible);
    }
    let every = parse_interval(every).ok_or_else(|| {
        format!(
            "'{every}' in '{text}' is no interval: write a whole number and ms, s, m, h, d or w"
        )
    })?;
    Rule::new(every, number()?).map(Parsed::Rule).map_err(impossible)
}

/// The label of a snapshot that this rule takes.
#[must_use]
pub fn label(rule: Rule, time_ms: u64) -> SnapshotLabel {
    label_with(&interval(rule.every_ms), time_ms)
}

fn label_with(every: &str, time_ms: u64) -> SnapshotLabel {
    let time = UNIX_EPOCH + Duration::from_millis(time_ms.min(YEAR_10000_MS - 1));
    let time = humantime::format_rfc3339_millis(time);
    let label = format!("{LABEL_PREFIX}{every} {time}");
    // Shorter than the longest, and no number.
    SnapshotLabel::new(label).unwrap_or_default()
}

/// A schedule took the snapshot with that label, and may delete it.
#[must_use]
pub fn is_automatic(label: &str) -> bool {
    let Some((every, time)) =
        label.strip_prefix(LABEL_PREFIX).and_then(|rest| rest.split_once(' '))
    else {
        return false;
    };
    let is_interval = |ms| Rule::new(ms, 1).is_ok() && interval(ms) == every;
    (is_cadence_name(every) || parse_interval(every).is_some_and(is_interval))
        && time.len() == "2026-11-22T08:00:00.000Z".len()
        && humantime::parse_rfc3339(time).is_ok()
}

/// A cadence had the snapshot with that label cut, see [`is_automatic`].
#[must_use]
pub fn is_cut(label: &str) -> bool {
    let every = label.strip_prefix(LABEL_PREFIX).and_then(|rest| rest.split_once(' '));
    every.is_some_and(|(every, _)| is_cadence_name(every)) && is_automatic(label)
}

fn is_cadence_name(every: &str) -> bool {
    Behind::ALL.iter().any(|behind| behind.name() == every)
}

/// A moment by both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Milliseconds since 1970; may jump.
    pub wall_ms: u64,
    /// Milliseconds since some moment; never jumps.
    pub mono_ms: u64,
}

/// When a schedule's rules are due next.
#[derive(Clone, Debug)]
pub struct Plan {
    schedule: Schedule,
    /// Per rule: when it was planned, and when it is due.
    rules: Vec<(Rule, Now, Now)>,
}

impl Plan {
    /// A plan that begins now. A rule is due at once unless the newest snapshot, taken at `newest_ms`, is in its present
    /// slot: however many slots went by without an agent, one snapshot is taken.
    #[must_use]
    pub fn new(schedule: Schedule, newest_ms: Option<u64>, now: Now) -> Self {
        let next = |rule: Rule| {
            let begun = newest_ms.is_some_and(|time| rule.slot(time) == rule.slot(now.wall_ms));
            (rule, now, if begun { next_slot(rule.every_ms, now) } else { now })
        };
        Self { schedule, rules: schedule.rules().map(next).collect() }
    }

    /// Whose plan it is.
    #[must_use]
    pub fn schedule(&self) -> Schedule {
        self.schedule
    }

    /// Rules that are due, the shortest interval first.
    #[must_use]
    pub fn due(&self, now: Now) -> Vec<Rule> {
        let is_due = |(rule, planned, at): &&(Rule, Now, Now)| {
            // A wall clock that jumps to and fro must not make for snapshots in between.
            let early = now.mono_ms < planned.mono_ms + rule.every_ms / 2;
            now.mono_ms >= at.mono_ms || (now.wall_ms >= at.wall_ms && !early)
        };
        self.rules.iter().filter(is_due).map(|(rule, ..)| *rule).collect()
    }

    /// When each rule is due, by the wall clock.
    pub fn times(&self) -> impl Iterator<Item = (Rule, u64)> + '_ {
        self.rules.iter().map(|(rule, _, at)| (*rule, at.wall_ms))
    }

    /// How long until a rule is due, if the wall clock does not jump; none without rules.
    #[must_use]
    pub fn wait_ms(&self, now: Now) -> Option<u64> {
        self.rules.iter().map(|(.., at)| at.mono_ms.saturating_sub(now.mono_ms)).min()
    }

    /// A snapshot is taken now: it stands for the slots that begin with it. With `in_log` snapshots of the disk that the
    /// store does not have, those that come are further apart the more they are, so that a long outage fills neither log nor
    /// memory with what will not be kept.
    pub fn taken(&mut self, now: Now, in_log: usize) {
        let least = self.rules.first().map_or(0, |(rule, ..)| rule.every_ms);
        let least = least << (in_log / PRESSED).min(16);
        for (rule, planned, at) in &mut self.rules {
            (*planned, *at) = (now, next_slot(rule.every_ms.max(least), now));
        }
    }

    /// The rules that are due take nothing in their present slots.
    pub fn skipped(&mut self, now: Now) {
        for due in self.due(now) {
            for (rule, planned, at) in &mut self.rules {
                if *rule == due {
                    (*planned, *at) = (now, next_slot(rule.every_ms, now));
                }
            }
        }
    }
}

/// When the next slot of that length begins.
fn next_slot(every_ms: u64, now: Now) -> Now {
    let wait = every_ms - now.wall_ms % every_ms;
    Now { wall_ms: now.wall_ms.saturating_add(wait), mono_ms: now.mono_ms.saturating_add(wait) }
}

/// Which of the rules that are due want a snapshot of a disk whose last write or snapshot is `last_lsn`: those of which the
/// snapshot that stands for the last slot is not the disk as it is. What was not written to needs no new snapshot.
#[must_use]
pub fn wanting(due: &[Rule], taken: &Taken, last_lsn: u64) -> Vec<Rule> {
    let differs = |rule: &&Rule| rule.standing(taken).next() != Some(last_lsn);
    due.iter().filter(differs).copied().collect()
}
