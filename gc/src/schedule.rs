//! When a cycle of collection, and when a scrub, begins by itself. Pure.

use std::time::Duration;

/// Between two cycles that were called for by little space, if the first gave back much.
const SHORT_PAUSE: Duration = Duration::from_secs(60);
/// If it gave back little, or failed: to try again soon would cost reads and find nothing.
const LONG_PAUSE: Duration = Duration::from_secs(15 * 60);
/// Between two cycles while somebody waits for space.
const NEEDED_PAUSE: Duration = Duration::from_secs(10);
/// A cycle that gives back less than this share of the store has given back little.
const LITTLE: u64 = 100;

/// What calls for a cycle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Percent of the store; less free space than this does. 0: no free space is too little.
    pub free_below: u8,
    /// So long after the last cycle began; none: never.
    pub every: Option<Duration>,
}

/// How things are.
#[derive(Clone, Copy, Debug, Default)]
pub struct Situation {
    /// Since the last cycle of this host began; none: it is not known that there was one.
    pub since_last: Option<Duration>,
    /// What the last one gave back, in blocks; none: it failed.
    pub reclaimed: Option<u64>,
    /// Blocks of the store that can be allocated.
    pub blocks: u64,
    /// Of these, how many are free.
    pub free: u64,
    /// Somebody waits for space.
    pub waiting: bool,
}

impl Schedule {
    /// True if a cycle is to begin.
    #[must_use]
    pub fn is_due(&self, now: &Situation) -> bool {
        let Some(since) = now.since_last else {
            return now.waiting || self.every.is_some() || self.is_low(now);
        };
        if self.every.is_some_and(|every| since >= every) {
            return true;
        }
        let fruitful = now.reclaimed.is_some_and(|blocks| blocks >= now.blocks / LITTLE);
        if now.waiting {
            return since >= if fruitful { NEEDED_PAUSE } else { SHORT_PAUSE };
        }
        self.is_low(now) && since >= if fruitful { SHORT_PAUSE } else { LONG_PAUSE }
    }

    fn is_low(&self, now: &Situation) -> bool {
        now.free.saturating_mul(100) < now.blocks.saturating_mul(u64::from(self.free_below))
    }
}

/// The first scrub of a store of which it is not known that there was one: not at once, since agents that start together share
/// its device.
const FIRST_SCRUB: Duration = Duration::from_secs(3600);
/// After one that failed.
const SCRUB_AGAIN: Duration = Duration::from_secs(3600);

/// What calls for a scrub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubSchedule {
    /// So long after the last one began; none: never.
    pub every: Option<Duration>,
}

/// How things are.
#[derive(Clone, Copy, Debug, Default)]
pub struct ScrubSituation {
    /// Since the agent's start.
    pub since_start: Duration,
    /// Since the last one began; none: it is not known that there was one.
    pub since_begun: Option<Duration>,
    /// Since the last one ended, if it did not come to its end by itself.
    pub since_failed: Option<Duration>,
}

impl ScrubSchedule {
    /// How long it is until the next begins; none: it does not.
    #[must_use]
    pub fn wait(&self, now: &ScrubSituation) -> Option<Duration> {
        let every = self.every?;
        let (pause, since) = match (now.since_failed, now.since_begun) {
            (Some(failed), _) => (every.min(SCRUB_AGAIN), failed),
            (None, Some(begun)) => (every, begun),
            (None, None) => (every.min(FIRST_SCRUB), now.since_start),
        };
        Some(pause.saturating_sub(since))
    }

    /// True if one is to begin.
    #[must_use]
    pub fn is_due(&self, now: &ScrubSituation) -> bool {
        self.wait(now) == Some(Duration::ZERO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minutes(n: u64) -> Duration {
        Duration::from_secs(60 * n)
    }

    #[test]
    fn a_cycle_begins_when_its_time_has_come_or_space_is_short_and_not_over_and_over() {
        let schedule = Schedule { free_below: 20, every: Some(minutes(600)) };
        let idle = Situation {
            since_last: Some(minutes(20)),
            reclaimed: Some(0),
            blocks: 1000,
            free: 200,
            waiting: false,
        };
        let due = |now| schedule.is_due(&now);
        assert!(!due(idle), "a fifth is free");
        assert!(due(Situation { since_last: None, ..idle }), "none is known of");
        assert!(due(Situation { since_last: Some(minutes(600)), ..idle }));
        let low = Situation { free: 199, ..idle };
        assert!(due(low));
        assert!(!due(Situation { since_last: Some(minutes(14)), ..low }), "the last found nothing");
        assert!(!due(Situation { since_last: Some(minutes(14)), reclaimed: None, ..low }));
        let fruitful = Situation { reclaimed: Some(10), since_last: Some(minutes(1)), ..low };
        assert!(due(fruitful));
        let waiting = Situation { waiting: true, since_last: Some(Duration::from_secs(10)), ..low };
        assert!(!due(waiting) && due(Situation { reclaimed: Some(10), ..waiting }));
        assert!(due(Situation { since_last: Some(minutes(1)), ..waiting }));
    }

    #[test]
    fn nothing_is_done_that_was_not_asked_for() {
        let never = Schedule { free_below: 0, every: None };
        let full = Situation { blocks: 1000, ..Situation::default() };
        assert!(!never.is_due(&full));
        assert!(!never.is_due(&Situation { since_last: Some(minutes(100_000)), ..full }));
    }

    #[test]
    fn a_scrub_begins_when_its_time_has_come() {
        let monthly = ScrubSchedule { every: Some(minutes(43_200)) };
        let fresh = ScrubSituation::default();
        assert_eq!(monthly.wait(&fresh), Some(FIRST_SCRUB));
        let later = ScrubSituation { since_start: FIRST_SCRUB, ..fresh };
        assert!(monthly.is_due(&later));
        let done = ScrubSituation { since_begun: Some(minutes(43_199)), ..later };
        assert_eq!(monthly.wait(&done), Some(minutes(1)));
        assert!(monthly.is_due(&ScrubSituation { since_begun: Some(minutes(50_000)), ..later }));
        let failed = ScrubSituation { since_failed: Some(minutes(59)), ..done };
        assert_eq!(monthly.wait(&failed), Some(minutes(1)));
        let often = ScrubSchedule { every: Some(Duration::from_secs(2)) };
        assert_eq!(often.wait(&fresh), Some(Duration::from_secs(2)));
        assert!(often.is_due(&failed));
        let never = ScrubSchedule { every: None };
        assert!(!never.is_due(&later) && !never.is_due(&failed) && never.wait(&done).is_none());
    }
}
