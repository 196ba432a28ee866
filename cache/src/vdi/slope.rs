//! How fast a writer may go while the store is away. Pure.
//!
//! The ring is there to be filled: most of the room that an outage finds is taken at full speed. Over the rest the writer
//! gets segments at a share of its own pace that falls evenly from all to nothing, so that it feels the end coming
//! instead of running into it, and what is left lasts longer. A full ring makes it wait for the store.

use std::time::Duration;

/// Share of the room found at the outage's start that is taken at full speed.
const AT_FULL_SPEED: f64 = 0.8;
/// A disk that took longer for a segment than this was not in a hurry.
const PACE_MAX: Duration = Duration::from_secs(1);
/// The longest wait for a segment that is there: the last ones are to be used, too.
const WAIT_MAX: Duration = Duration::from_secs(2);

/// The state of one disk.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Slope {
    /// Fill of the ring when the store went away.
    from: Option<f64>,
    /// Time between two segments when nothing slowed the disk down.
    pace: Duration,
    /// When it last got one, if at full speed.
    unhindered: Option<Duration>,
    /// When it last got one.
    last: Duration,
}

impl Slope {
    /// How long a disk that wants a segment at `at` has to wait for it, with the store away and so much of the ring dirty.
    pub fn wait(&mut self, at: Duration, fill: f64) -> Duration {
        let from = *self.from.get_or_insert(fill);
        let used = (fill - from) / (1.0 - from).max(f64::EPSILON);
        let steepness = ((used - AT_FULL_SPEED) / (1.0 - AT_FULL_SPEED)).clamp(0.0, 1.0);
        if steepness == 0.0 {
            return Duration::ZERO;
        }
        self.unhindered = None;
        // At this share of the pace a segment takes so much longer.
        let factor = (1.0 - steepness).max(f64::EPSILON).recip();
        let interval = self.pace.as_secs_f64() * factor;
        let interval = Duration::try_from_secs_f64(interval).map_or(WAIT_MAX, |i| i.min(WAIT_MAX));
        (self.last + interval).saturating_sub(at)
    }

    /// The disk got a segment.
    pub fn granted(&mut self, at: Duration) {
        let interval = self.unhindered.map(|before| at.saturating_sub(before).min(PACE_MAX));
        // The end of one that was given in parts is told of, and then the next.
        if let Some(interval) = interval.filter(|interval| !interval.is_zero()) {
            self.pace = if self.pace.is_zero() { interval } else { (self.pace * 7 + interval) / 8 };
        }
        (self.unhindered, self.last) = (Some(at), at);
    }

    /// The store answers.
    pub fn end(&mut self) {
        self.from = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENTS: u32 = 1000;
    const PACE: Duration = Duration::from_millis(10);

    /// A writer that takes what it gets, from a ring of which so many segments are dirty: when it got each.
    fn fill_up(from: u32) -> Vec<Duration> {
        let (mut slope, mut at, mut granted) = (Slope::default(), Duration::ZERO, Vec::new());
        for dirty in from..SEGMENTS {
            at += PACE;
            at += slope.wait(at, f64::from(dirty) / f64::from(SEGMENTS));
            slope.granted(at);
            granted.push(at);
        }
        granted
    }

    #[test]
    fn three_quarters_of_the_room_are_taken_at_full_speed() {
        for from in [0, 400, 900] {
            let granted = fill_up(from);
            let full_speed =
                granted.windows(2).take_while(|pair| pair[1] - pair[0] == PACE).count();
            assert!(full_speed * 4 >= granted.len() * 3, "{full_speed} of {}", granted.len());
        }
    }

    #[test]
    fn the_rest_is_a_slope_without_a_step_and_the_ring_gets_full() {
        let granted = fill_up(100);
        let intervals: Vec<_> = granted.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let last = intervals.len() - 5;
        for pair in intervals[..last].windows(2) {
            assert!(pair[1] >= pair[0], "slower and slower");
            assert!(pair[1] < pair[0].mul_f64(1.3), "no step: {pair:?}");
        }
        assert!(intervals[last] > PACE * 20);
        assert!(intervals.iter().all(|interval| *interval <= PACE + WAIT_MAX));
    }

    #[test]
    fn the_next_outage_starts_anew() {
        let mut slope = Slope::default();
        slope.granted(PACE);
        slope.granted(PACE * 2);
        slope.wait(PACE * 3, 0.0);
        assert!(!slope.wait(PACE * 2, 0.99).is_zero());
        slope.end();
        assert!(slope.wait(PACE * 4, 0.99).is_zero());
    }

    #[test]
    fn a_writer_that_was_slow_is_not_made_to_wait() {
        let mut slope = Slope::default();
        slope.granted(PACE);
        slope.granted(PACE * 2);
        slope.wait(PACE * 3, 0.0);
        assert_eq!(slope.wait(Duration::from_secs(60), 0.9), Duration::ZERO);
    }
}
