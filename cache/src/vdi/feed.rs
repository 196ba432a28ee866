//! Segments for a worker that wants one: at once, at the store's pace (`admission.rs`), or slowed down (`slope.rs`).

use super::admission::Pressure;
use super::task::VdiTask;
use crate::backing::Backing;
use crate::link::ToDisk;
use std::time::Duration;
use tokio::time::Instant;

/// A commit that takes longer means that the store is away, or as good as that.
const STORE_SLOW_AFTER: Duration = Duration::from_secs(2);

impl VdiTask {
    /// Passes a segment on to a worker that wants one, if there is one.
    pub(super) fn feed(&mut self) {
        self.feed_at = None;
        if !self.starving || self.released {
            return;
        }
        let pressure = self.pressure();
        let wait = self.slowed_by(pressure);
        if !wait.is_zero() {
            self.feed_at = Some(Instant::now() + wait);
        }
        if !wait.is_zero() || !self.admission.admit(pressure) {
            return self.p.ground.pool.leave_queue(self.p.vdi);
        }
        if let Some(grant) = self.p.ground.pool.grant(self.p.vdi) {
            self.starving = false;
            self.admission.granted();
            self.slope.granted(pressure.at);
            tracing::trace!(segment = grant.id.0, "granted");
            self.p.sender.send(ToDisk::Segment(grant));
        }
    }

    /// How long the disk has to wait for its next segment because the store is away.
    fn slowed_by(&mut self, now: Pressure) -> Duration {
        if now.store_answers {
            self.slope.end();
            return Duration::ZERO;
        }
        self.slope.wait(now.at, now.fill)
    }

    pub(super) fn pressure(&self) -> Pressure {
        let stuck = self.commit.as_ref().is_some_and(|c| c.started.elapsed() >= STORE_SLOW_AFTER);
        Pressure {
            fill: self.fill(),
            dirty_bytes: self.p.segments.bytes(self.p.record.committed).0,
            target_bytes: self.p.images_max as u64 / 4 * 3,
            store_answers: !stuck
                && self.failure.is_none()
                && self.p.backing.is_joined()
                && self.p.backing.away_since_ms().is_none(),
            at: self.started.elapsed(),
        }
    }

    pub(super) fn fill(&self) -> f64 {
        self.p.ground.pool.counts().fill()
    }
}
