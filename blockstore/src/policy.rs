//! What was chosen for a disk: what becomes of requests that cannot go on without the store, and its schedule of snapshots. Pure.
//!
//! It is noted in the disk's immutable block in the store, and, while a host serves it, in that host's cache
//! (docs/decisions say which counts when). Only requests of which nothing was taken may fail by it.

use crate::schedule::Schedule;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// What was chosen for a disk, wherever it is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// What becomes of requests that cannot go on without the store.
    pub when_offline: WhenOffline,
    /// Its snapshots by themselves.
    pub schedule: Schedule,
}

/// A change of a disk's policy: what is none stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyChange {
    /// See [`Policy`].
    pub when_offline: Option<WhenOffline>,
    /// See [`Policy`].
    pub schedule: Option<Schedule>,
}

impl PolicyChange {
    /// The policy after the change.
    #[must_use]
    pub fn of(self, policy: Policy) -> Policy {
        Policy {
            when_offline: self.when_offline.unwrap_or(policy.when_offline),
            schedule: self.schedule.unwrap_or(policy.schedule),
        }
    }
}

impl From<Policy> for PolicyChange {
    fn from(policy: Policy) -> Self {
        Self { when_offline: Some(policy.when_offline), schedule: Some(policy.schedule) }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "while the store is away, {}; snapshots: {}", self.when_offline, self.schedule)
    }
}

/// With the store away: what happens to writes when the ring is full, and to reads of what is not held locally.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum WhenOffline {
    /// They wait for the store, for ever.
    #[default]
    Stall,
    /// They end with an I/O error once they have waited, and the store has been away, for so many milliseconds.
    FailAfter(u32),
}

impl WhenOffline {
    /// The shortest deadline: a reconnect must not be an error.
    pub const DEADLINE_MIN: Duration = Duration::from_secs(1);
    /// The longest deadline.
    pub const DEADLINE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

    /// Fails after `deadline`.
    ///
    /// # Errors
    /// Words, if that is out of range.
    pub fn fail_after(deadline: Duration) -> Result<Self, String> {
        if (Self::DEADLINE_MIN..=Self::DEADLINE_MAX).contains(&deadline) {
            // At most 30 days, which fit.
            return Ok(Self::FailAfter(deadline.as_millis() as u32));
        }
        Err(format!("a deadline of {deadline:?} is not possible: give 1s to 720h"))
    }

    /// The number that stands for it on a disk: 0 to stall, else milliseconds.
    #[must_use]
    pub const fn to_bits(self) -> u32 {
        match self {
            Self::Stall => 0,
            Self::FailAfter(ms) => ms,
        }
    }

    /// What a number on a disk stands for.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        match bits {
            0 => Self::Stall,
            ms => Self::FailAfter(ms),
        }
    }

    /// The deadline, if there is one.
    #[must_use]
    pub const fn deadline(self) -> Option<Duration> {
        match self {
            Self::Stall => None,
            Self::FailAfter(ms) => Some(Duration::from_millis(ms as u64)),
        }
    }
}

impl fmt::Display for WhenOffline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stall => f.write_str("stall"),
            Self::FailAfter(ms) if ms.is_multiple_of(1000) => {
                write!(f, "fail-after={}s", ms / 1000)
            }
            Self::FailAfter(ms) => write!(f, "fail-after={ms}ms"),
        }
    }
}

impl FromStr for WhenOffline {
    type Err = String;

    /// Reads what [`fmt::Display`] writes, with `ms`, `s`, `m` or `h`.
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "stall" {
            return Ok(Self::Stall);
        }
        let refused = || format!("'{text}' is no policy: write stall, or fail-after=30s");
        let time = text.strip_prefix("fail-after=").ok_or_else(refused)?;
        let digits = time.find(|c: char| !c.is_ascii_digit()).unwrap_or(time.len());
        let (number, unit) = time.split_at(digits);
        let unit_ms = match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(refused()),
        };
        let number: u64 = number.parse().map_err(|_| refused())?;
        Self::fail_after(Duration::from_millis(number.saturating_mul(unit_ms)))
    }
}

/// Serializes as [`fmt::Display`] writes it.
pub(crate) fn in_words<S: serde::Serializer>(
    choice: &impl fmt::Display,
    to: S,
) -> Result<S::Ok, S::Error> {
    to.collect_str(choice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for (text, policy) in [
            ("stall", WhenOffline::Stall),
            ("fail-after=30s", WhenOffline::FailAfter(30_000)),
            ("fail-after=1500ms", WhenOffline::FailAfter(1500)),
        ] {
            assert_eq!(text.parse(), Ok(policy));
            assert_eq!(policy.to_string(), text);
            assert_eq!(WhenOffline::from_bits(policy.to_bits()), policy);
        }
        assert_eq!("fail-after=2m".parse(), Ok(WhenOffline::FailAfter(120_000)));
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_words() {
        for text in ["", "fail", "fail-after=", "fail-after=30", "fail-after=s", "fail-after=-1s"] {
            assert!(text.parse::<WhenOffline>().unwrap_err().contains("fail-after=30s"), "{text}");
        }
        for text in ["fail-after=0s", "fail-after=999ms", "fail-after=721h"] {
            assert!(text.parse::<WhenOffline>().unwrap_err().contains("1s to 720h"), "{text}");
        }
    }
}
