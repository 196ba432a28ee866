//! When to replay, and how fast: lazily while there is room, so that overwrites coalesce and guests have the device to
//! themselves; at full speed once the ring fills. Pure.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Knobs of the flusher.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FlushOptions {
    /// Written data is replayed to the store after at most about this long.
    pub max_age_ms: u64,
    /// Share of the ring (0 to 1) that may be dirty before replay starts regardless of age.
    pub start_fill: f64,
    /// Share of the ring from which replay runs without pauses.
    pub full_speed_fill: f64,
    /// Most bytes of log that go into one commit.
    pub batch_bytes: u64,
}

impl Default for FlushOptions {
    fn default() -> Self {
        Self { max_age_ms: 5_000, start_fill: 0.25, full_speed_fill: 0.5, batch_bytes: 16 << 20 }
    }
}

/// What the decision depends on.
#[derive(Clone, Copy, Debug)]
pub struct Situation {
    /// Age of the oldest uncommitted sealed segment, or of the first record in the open one.
    pub oldest: Option<Duration>,
    /// Share of the ring that is dirty.
    pub fill: f64,
    /// Someone waits for a drain, or writers wait for space.
    pub urgent: bool,
}

/// Whether to start a commit now.
#[must_use]
pub fn should_start(options: &FlushOptions, now: Situation) -> bool {
    let aged = now.oldest.is_some_and(|age| age.as_millis() as u64 >= options.max_age_ms);
    now.oldest.is_some() && (now.urgent || aged || now.fill >= options.start_fill)
}

/// How long to pause after a commit that took `took`: with little dirty the flusher works a third of the time, so that
/// guests keep the larger share; the pause shrinks to nothing at `full_speed_fill`.
#[must_use]
pub fn pause_after(options: &FlushOptions, took: Duration, fill: f64, urgent: bool) -> Duration {
    if urgent || fill >= options.full_speed_fill {
        return Duration::ZERO;
    }
    let emptiness = 1.0 - fill / options.full_speed_fill.max(f64::EPSILON);
    took.mul_f64(2.0 * emptiness).min(Duration::from_secs(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Situation = Situation { oldest: None, fill: 0.0, urgent: false };

    #[test]
    fn starts_by_age_fill_or_need_and_never_without_cause() {
        let options = FlushOptions::default();
        let young = Situation { oldest: Some(Duration::from_millis(10)), ..IDLE };
        assert!(!should_start(&options, IDLE));
        assert!(!should_start(&options, Situation { urgent: true, fill: 1.0, ..IDLE }));
        assert!(!should_start(&options, young));
        assert!(should_start(&options, Situation { urgent: true, ..young }));
        assert!(should_start(&options, Situation { fill: 0.3, ..young }));
        assert!(should_start(&options, Situation { oldest: Some(Duration::from_secs(6)), ..IDLE }));
    }

    #[test]
    fn pauses_shrink_as_the_ring_fills() {
        let options = FlushOptions::default();
        let took = Duration::from_millis(100);
        let at = |fill| pause_after(&options, took, fill, false);
        assert_eq!(at(0.0), Duration::from_millis(200));
        assert!(at(0.1) > at(0.3) && at(0.3) > at(0.49));
        assert_eq!(at(0.5), Duration::ZERO);
        assert_eq!(pause_after(&options, took, 0.0, true), Duration::ZERO);
        assert!(
            pause_after(&options, Duration::from_secs(60), 0.0, false) <= Duration::from_secs(1)
        );
    }
}
