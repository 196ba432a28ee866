//! The policy for requests that cannot go on without the store: when the worker is told to fail them.
//!
//! The worker knows since when each request waits, and nothing of policies or stores. This side knows since when the store
//! has been away, on a clock of its own, and tells the worker what may fail now (`ToDisk::FailWaiting`). So a store that is slow, full,
//! or back is never the reason of an error: it must have been away, in one piece, for the whole deadline. A guest that is
//! slowed down because the ring gets full is not failed either, only one that meets a full ring.

use super::task::VdiTask;
use crate::backing::Backing;
use crate::link::ToDisk;
use std::time::Duration;
use tokio::time::Instant;

/// The outage that goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Offline {
    /// Its name, which the store gave it, and when it was noticed here.
    outage: Option<(u64, Instant)>,
}

impl Offline {
    /// Takes note of whether the store is away, as of `now`; returns since when it has been, without a break.
    fn notice(&mut self, away: Option<u64>, now: Instant) -> Option<Duration> {
        self.outage = away.map(|name| match self.outage {
            Some(known) if known.0 == name => known,
            // Another outage than the one that was seen last: the store answered in between.
            _ => (name, now),
        });
        self.outage.map(|(_, since)| now - since)
    }
}

impl VdiTask {
    /// Tells the worker to fail what the policy says.
    pub(super) fn tick_offline(&mut self) {
        let away = self.offline.notice(self.p.backing.away_since_ms(), Instant::now());
        let Some(deadline) = self.p.record.policy.chosen.when_offline.deadline() else { return };
        if self.released || away.is_none_or(|away| away < deadline) {
            return;
        }
        // The disk wants a segment and is not just slowed down: there is none for it.
        let full = self.starving && self.feed_at.is_none();
        let writes = full.then_some(deadline);
        self.p.sender.send(ToDisk::FailWaiting { reads: Some(deadline), writes });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_an_outage_without_a_break_counts() {
        let mut offline = Offline::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let seconds = |n| Some(Duration::from_secs(n));
        assert_eq!(offline.notice(None, at(0)), None);
        assert_eq!(offline.notice(Some(7), at(1)), seconds(0));
        assert_eq!(offline.notice(Some(7), at(9)), seconds(8));
        assert_eq!(offline.notice(Some(8), at(10)), seconds(0), "it answered in between");
        assert_eq!(offline.notice(None, at(11)), None);
        assert_eq!(offline.notice(Some(8), at(12)), seconds(0));
    }
}
