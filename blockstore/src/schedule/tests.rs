//! Goal: what is written is read, nothing jumps with the clock, and what people count on is kept.
//! Method: examples; a day of an hourly and a ten-second rule against a plain count; random histories with clocks that jump.

use super::*;
use proptest::prelude::*;

const HOUR: u64 = 3_600_000;
/// 2026-11-22T08:00:00Z.
const START: u64 = 1_795_334_400_000;

fn schedule(text: &str) -> Schedule {
    text.parse().expect(text)
}

fn at(wall_ms: u64) -> Now {
    Now { wall_ms, mono_ms: wall_ms - START + 5 * HOUR }
}

#[test]
fn what_is_written_is_read() {
    for (text, canonical) in [
        ("none", "none"),
        (" none ", "none"),
        ("every 10s keep 6", "every 10s keep 6"),
        ("every 1h keep 24,every 10s  keep 6", "every 10s keep 6, every 1h keep 24"),
        ("every 24h keep 7, every 60m keep 1", "every 1h keep 1, every 1d keep 7"),
        ("every 100ms keep 100000", "every 100ms keep 100000"),
        ("every 1w keep 4", "every 7d keep 4"),
        ("every 3650d keep 1", "every 3650d keep 1"),
        ("every write keep 100000", "every write keep 100000"),
        ("every 1h keep 24, every  batch keep 7", "every batch keep 7, every 1h keep 24"),
    ] {
        let read = schedule(text);
        assert_eq!(read.to_string(), canonical);
        assert_eq!(schedule(canonical), read);
        assert_eq!(Schedule::from_bits(read.to_bits()), read);
    }
    assert_eq!(Schedule::default().to_bits(), [0; RULES_MAX], "what former versions wrote");
}

#[test]
fn what_makes_no_sense_is_refused_in_words() {
    for (text, words) in [
        ("", "'' is no rule"),
        ("hourly", "'hourly' is no rule"),
        ("every 10s", "'every 10s' is no rule"),
        ("every 10s keep 6,", "'' is no rule"),
        ("every 10 keep 6", "'10' in 'every 10 keep 6' is no interval"),
        ("every 1month keep 6", "is no interval: write a whole number and ms, s, m, h, d or w"),
        ("every 99ms keep 6", "an interval may be 100ms to 3650d"),
        ("every 3651d keep 6", "an interval may be 100ms to 3650d"),
        ("every 99999999999999999d keep 6", "an interval may be"),
        ("every 10s keep 0", "may keep 1 to 100000 snapshots, not 0"),
        ("every 10s keep 100001", "may keep 1 to 100000"),
        ("every 10s keep all", "'all' in 'every 10s keep all' is no number"),
        ("every 1h keep 2, every 60m keep 3", "two rules have the interval 1h"),
        ("every write", "'every write' is no rule"),
        ("every writes keep 3", "'writes' in 'every writes keep 3' is no interval"),
        ("every write keep 0", "'every write keep 0' is not possible: a rule may keep 1 to 100000"),
        ("every batch keep 100001", "may keep 1 to 100000"),
        ("every batch keep x", "'x' in 'every batch keep x' is no number"),
        (
            "every write keep 2, every batch keep 3",
            "'every write keep 2' and 'every batch keep 3' are given",
        ),
        ("every write keep 2, every write keep 3", "give one of them"),
    ] {
        let said = text.parse::<Schedule>().unwrap_err();
        assert!(said.contains(words), "'{text}': {said}");
        assert!(said.contains("every 10s keep 6, every 1h keep 24' or"), "'{text}': {said}");
    }
    let many: Vec<String> = (1..=9).map(|n| format!("every {n}s keep 1")).collect();
    let said = many.join(",").parse::<Schedule>().unwrap_err();
    assert!(said.contains("may have 8 rules, this one has 9"), "{said}");
    let many = format!("every write keep 1, {}", many[..8].join(","));
    let said = many.parse::<Schedule>().unwrap_err();
    assert!(said.contains("may have 8 rules, this one has 9"), "{said}");
}

#[test]
fn a_cadence_stands_beside_rules_with_slots_and_neither_counts_the_others() {
    let both = schedule("every 1h keep 24, every write keep 3");
    assert_eq!(both.cadence(), Some(Cadence { behind: Behind::Write, keep: 3 }));
    assert_eq!(both.rules().map(|rule| rule.every_ms).collect::<Vec<_>>(), [HOUR]);
    let cut = Taken::from_iter((1..=5).map(|lsn| (lsn, START)));
    assert_eq!(both.surplus_cuts(&cut).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(both.surplus(&Taken::from([(7, START)])), [0; 0]);
    let few = Taken::from([(1, START)]);
    assert_eq!(both.surplus_cuts(&few).count(), 0);
    let other = schedule("every 1h keep 24");
    assert_eq!(
        (other.cadence(), other.surplus_cuts(&cut).count()),
        (None, 5),
        "as of any rule that is gone"
    );
    assert_eq!(Schedule::default().surplus_cuts(&cut).count(), 0, "one that ended leaves all");
    let only = schedule("every batch keep 3");
    assert!(!only.is_none() && only.rules().next().is_none());
    let label = Cadence::label(Behind::Batch, START);
    assert_eq!(label.as_str(), "auto batch 2026-11-22T08:00:00.000Z");
    assert!(is_automatic(label.as_str()) && is_cut(label.as_str()));
    assert!(
        !is_cut("auto 1h 2026-11-22T08:00:00.000Z")
            && !is_cut("auto write")
            && !is_cut("auto write x")
    );
    // Former versions see rules that make no sense in its numbers, and take none.
    assert!(
        both.to_bits().iter().filter(|bits| **bits >> 24 < EVERY_MIN_MS && **bits > 0).count() == 1
    );
}

#[test]
fn labels_tell_rule_and_time_and_people_do_not_have_them_by_chance() {
    let rule = schedule("every 1h keep 1").rules().next().expect("one");
    let label = label(rule, START);
    assert_eq!(label.as_str(), "auto 1h 2026-11-22T08:00:00.000Z");
    assert!(is_automatic(label.as_str()));
    assert!(is_automatic(super::label(rule, u64::MAX).as_str()), "a clock gone mad");
    for theirs in [
        "",
        "auto",
        "auto ",
        "auto save",
        "auto 1h",
        "auto 1h 2026-11-22",
        "auto 60m 2026-11-22T08:00:00.000Z",
        "auto 0d 2026-11-22T08:00:00.000Z",
        "auto 1h 2026-13-22T08:00:00.000Z",
        "auto 1h 2026-11-22T08:00:00.000Z, keep",
        "my auto 1h 2026-11-22T08:00:00.000Z",
    ] {
        assert!(!is_automatic(theirs), "{theirs}");
    }
}

/// Lives from one moment to the next at which something is due; a write comes before each look.
struct Life {
    schedule: Schedule,
    plan: Plan,
    taken: Taken,
    lsn: u64,
}

impl Life {
    fn new(text: &str, now: Now) -> Self {
        let schedule = schedule(text);
        Self { schedule, plan: Plan::new(schedule, None, now), taken: Taken::new(), lsn: 0 }
    }

    /// True if a snapshot was taken.
    fn look(&mut self, now: Now) -> bool {
        if wanting(&self.plan.due(now), &self.taken, self.lsn).is_empty() {
            self.plan.skipped(now);
            return false;
        }
        self.plan.taken(now, 0);
        self.lsn += 1;
        self.taken.insert(self.lsn, now.wall_ms);
        for surplus in self.schedule.surplus(&self.taken) {
            self.taken.remove(&surplus);
        }
        true
    }

    fn times(&self) -> Vec<u64> {
        self.taken.values().map(|time| time - START).collect()
    }
}

#[test]
fn a_day_keeps_full_hours_and_the_last_minute() {
    let mut life = Life::new("every 10s keep 6, every 1h keep 24", at(START + 1234));
    let mut now = at(START + 1234);
    let mut count = 0;
    while now.wall_ms < START + 30 * HOUR + 5000 {
        life.lsn += 1;
        count += u64::from(life.look(now));
        now = at(now.wall_ms + life.plan.wait_ms(now).expect("rules"));
    }
    assert_eq!(count, 30 * 360 + 1, "each slot has one, whatever the number of rules");
    let hours = (7..=30).map(|hour| hour * HOUR);
    let last_minute = (1..=5).rev().map(|n| 30 * HOUR - n * 10_000);
    let mut expected: Vec<u64> = hours.chain(last_minute).collect();
    expected.sort_unstable();
    assert_eq!(life.times(), expected);
}

#[test]
fn what_is_not_written_to_is_not_taken_again() {
    let mut life = Life::new("every 10s keep 6, every 1h keep 24", at(START));
    life.lsn = 7;
    assert!(life.look(at(START)));
    assert!(!life.look(at(START + 10_000)));
    assert!(!life.look(at(START + 20_000)));
    life.lsn += 1;
    assert!(life.look(at(START + 30_000)));
    assert!(!life.look(at(START + 40_000)));
    // The hour has changed since the snapshot that stands for the last one, so the new hour gets its own; then no more.
    assert!(life.look(at(START + HOUR)));
    for hour in 2..20 {
        assert!(!life.look(at(START + hour * HOUR)), "{hour}");
    }
    assert_eq!(life.times(), [0, 30_000, HOUR]);
}

#[test]
fn after_a_stop_one_is_taken_unless_its_slot_has_one() {
    let hourly = schedule("every 1h keep 24");
    let due = |newest, now| Plan::new(hourly, newest, now).due(now).len();
    assert_eq!(due(None, at(START + 5)), 1);
    assert_eq!(due(Some(START + 1), at(START + HOUR - 1)), 0);
    assert_eq!(due(Some(START + 1), at(START + 9 * HOUR)), 1);
    let mut plan = Plan::new(hourly, Some(START + 1), at(START + 9 * HOUR + 5));
    plan.taken(at(START + 9 * HOUR + 5), 0);
    assert_eq!(plan.wait_ms(at(START + 9 * HOUR + 5)), Some(HOUR - 5));
}

#[test]
fn a_clock_put_back_stops_nothing_and_loses_nothing_new() {
    let mut life = Life::new("every 1h keep 3", at(START));
    let mut mono_ms = at(START).mono_ms;
    let day = 24 * HOUR;
    // Eight hours; then the clock says that it is a day before.
    for hour in 0..16 {
        let wall_ms = START + day + hour * HOUR - if hour < 8 { 0 } else { day };
        life.lsn += 1;
        assert!(life.look(Now { wall_ms, mono_ms }), "{hour}");
        mono_ms += HOUR;
    }
    assert_eq!(life.times(), [13 * HOUR, 14 * HOUR, 15 * HOUR]);
}

#[test]
fn a_clock_put_forward_makes_for_one_snapshot() {
    let mut life = Life::new("every 1h keep 3", at(START));
    let jumped =
        |ms: u64| Now { wall_ms: START + 1000 * HOUR + ms, mono_ms: at(START).mono_ms + ms };
    life.lsn += 1;
    assert!(life.look(at(START)));
    let mut count = 0;
    for second in 0..3600 {
        life.lsn += 1;
        count += u32::from(life.look(jumped(second * 1000)));
    }
    assert_eq!(count, 1);
}

#[test]
fn a_long_outage_takes_ever_fewer() {
    let every = schedule("every 100ms keep 6, every 1h keep 24");
    let mut plan = Plan::new(every, None, at(START));
    let (mut now, mut in_log, mut hours) = (at(START), 0, 0);
    while now.wall_ms < START + 7 * 24 * HOUR {
        let due = plan.due(now);
        hours += usize::from(due.iter().any(|rule| rule.every_ms == HOUR));
        plan.taken(now, in_log);
        in_log += 1;
        now = at(now.wall_ms + plan.wait_ms(now).expect("rules"));
    }
    assert!(in_log < 60_000, "{in_log} in a week");
    assert_eq!(hours, 7 * 24, "the hours are kept");
}

#[test]
fn without_rules_nothing_is_surplus_or_due() {
    let taken = Taken::from([(1, 5), (2, 6)]);
    let none = Schedule::default();
    assert!(none.surplus(&taken).is_empty());
    let plan = Plan::new(none, None, at(START));
    assert!(plan.due(at(START)).is_empty() && plan.wait_ms(at(START)).is_none());
}

fn rules() -> impl Strategy<Value = Schedule> {
    let rule = (1u64..40, 1u32..6).prop_map(|(tenths, keep)| (tenths * 100, keep));
    proptest::collection::vec(rule, 1..4).prop_map(|rules| {
        let rules = rules.into_iter().map(|(every_ms, keep)| (every_ms, Rule { every_ms, keep }));
        Schedule::of(None, rules.collect())
    })
}

/// Steps of both clocks between two looks: always alike, or mostly, and sometimes the wall clock jumps.
fn steps() -> impl Strategy<Value = Vec<(u64, i64, bool)>> {
    let steps = |jump: BoxedStrategy<i64>| {
        proptest::collection::vec((1u64..500, jump, any::<bool>()), 1..200)
    };
    let jumps = prop_oneof![20 => Just(0i64), 1 => -20_000i64..20_000];
    prop_oneof![steps(Just(0).boxed()), steps(jumps.boxed())]
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "(every|keep|[0-9]{1,20}|[a-z]{1,2}|[ ,]){0,24}") {
        if let Ok(schedule) = text.parse::<Schedule>() {
            prop_assert_eq!(schedule.to_string().parse(), Ok(schedule));
        }
        let _ = is_automatic(&text);
    }

    #[test]
    fn any_bytes_on_a_disk_are_a_schedule(bits: [u64; RULES_MAX]) {
        let read = Schedule::from_bits(bits);
        prop_assert_eq!(Schedule::from_bits(read.to_bits()), read);
        prop_assert_eq!(read.to_string().parse(), Ok(read));
    }

    /// Thinning at every step, or at the end only, keeps the same; no rule keeps more than it may; nothing that is kept becomes
    /// surplus by thinning. But a clock that jumped may have left two runs of one slot, which are one as soon as nothing
    /// is between them any more: then thinning once more may find the later one surplus.
    #[test]
    fn thinning_is_the_same_sooner_or_later(schedule in rules(), steps in steps()) {
        let (mut thinned, mut all) = (Taken::new(), Taken::new());
        let mut wall = 1_000_000i64;
        for (lsn, (step, jump, _)) in (1..).zip(&steps) {
            wall = (wall + *step as i64 + jump).max(0);
            thinned.insert(lsn, wall as u64);
            all.insert(lsn, wall as u64);
            for surplus in schedule.surplus(&thinned) {
                thinned.remove(&surplus);
            }
        }
        let most: u32 = schedule.rules().map(|rule| rule.keep).sum();
        prop_assert!(thinned.len() <= most as usize);
        for rule in schedule.rules() {
            prop_assert!(rule.kept(&thinned).count() <= rule.keep as usize);
        }
        if steps.iter().all(|(_, jump, _)| *jump == 0) {
            let surplus: BTreeSet<u64> = schedule.surplus(&all).into_iter().collect();
            all.retain(|lsn, _| !surplus.contains(lsn));
            prop_assert_eq!(&thinned, &all);
            prop_assert!(schedule.surplus(&thinned).is_empty());
        } else {
            let slots = |taken: &Taken| -> BTreeSet<(Rule, u64)> {
                let kept = |rule: Rule| rule.kept(taken).map(move |lsn| (rule, lsn));
                schedule
                    .rules()
                    .flat_map(kept)
                    .map(|(rule, lsn)| (rule, rule.slot(taken[&lsn])))
                    .collect()
            };
            let before = slots(&thinned);
            for surplus in schedule.surplus(&thinned) {
                thinned.remove(&surplus);
            }
            prop_assert!(slots(&thinned).is_superset(&before), "each slot that was kept is");
        }
    }

    /// However the wall clock jumps: it is decided anew whether to take one whenever the shortest interval is over, nothing
    /// that was looked at stays due, and there are no more snapshots than slots that passed, and two for each jump: one in the slot that
    /// it leads to, and one as that ends early.
    #[test]
    fn clocks_that_jump_neither_stop_nor_storm(schedule in rules(), steps in steps()) {
        let shortest = schedule.rules().next().expect("a rule").every_ms;
        let mut now = Now { wall_ms: 1_000_000, mono_ms: 0 };
        let mut plan = Plan::new(schedule, None, now);
        let (mut taken, mut lsn, mut decided, mut count, mut jumps) = (Taken::new(), 1, 0, 0, 0);
        for (step, jump, writes) in steps {
            now.mono_ms += step;
            now.wall_ms = (now.wall_ms as i64 + step as i64 + jump).max(0) as u64;
            jumps += u64::from(jump != 0);
            lsn += u64::from(writes);
            let due = plan.due(now);
            if due.iter().any(|rule| rule.every_ms == shortest) {
                decided = now.mono_ms;
            }
            if wanting(&due, &taken, lsn).is_empty() {
                plan.skipped(now);
            } else {
                plan.taken(now, 0);
                lsn += 1;
                taken.insert(lsn, now.wall_ms);
                (decided, count) = (now.mono_ms, count + 1);
            }
            prop_assert!(now.mono_ms - decided < shortest, "stopped");
            prop_assert!(plan.wait_ms(now).is_some_and(|wait| (1..=shortest).contains(&wait)));
        }
        let rules = schedule.rules().count() as u64;
        let slots: u64 = schedule.rules().map(|rule| now.mono_ms / rule.every_ms + 1).sum();
        prop_assert!(count <= slots + rules * (1 + 2 * jumps), "{count} in {slots} slots, {jumps} jumps");
    }
}
