//! Segments for a worker that wants one: at once, at the store's pace (`admission.rs`), or slowed down: how much is in `slope.rs`, and
//! that it is even in `ration.rs`.

use super::admission::Pressure;
use super::ration::Ration;
use super::task::VdiTask;
use crate::backing::Backing;
use crate::link::ToDisk;
use std::time::Duration;
use tokio::time::Instant;

/// A commit that takes longer means that the store is away, or as good as that.
const STORE_SLOW_AFTER: Duration = Duration::from_secs(2);

impl VdiTask {
    /// Passes a segment on to a worker that wants one, if there is one; and more of one that is given in parts.
    pub(super) fn feed(&mut self) {
        self.feed_at = None;
        let pressure = self.pressure();
        if pressure.store_answers {
            self.slope.end();
        }
        self.raise_ration(pressure);
        if !self.starving || self.released {
            return;
        }
        if self.ration.is_some() || !self.admission.admit(pressure) {
            return self.p.ground.pool.leave_queue(self.p.vdi);
        }
        if let Some(grant) = self.p.ground.pool.grant(self.p.vdi) {
            self.starving = false;
            self.admission.granted();
            let wait = self.slowed_by(pressure);
            tracing::trace!(segment = grant.id.0, ?wait, "granted");
            if wait.is_zero() {
                self.slope.granted(pressure.at);
            } else {
                let blocks = self.p.ground.local.geometry.segment_blocks();
                self.ration = Some(Ration::new(grant.seq, blocks, pressure.at, wait));
                // Before the worker has it.
                self.raise_ration(pressure);
            }
            self.p.sender.send(ToDisk::Segment(grant));
        }
    }

    /// How long the disk would have to wait for its next segment because the store is away.
    fn slowed_by(&mut self, now: Pressure) -> Duration {
        if now.store_answers {
            return Duration::ZERO;
        }
        self.slope.wait(now.at, now.fill)
    }

    /// Lets the worker fill as much as is due of the segment that is given in parts; all of it once the store answers.
    fn raise_ration(&mut self, now: Pressure) {
        let Some(ration) = self.ration else { return };
        let due = ration.blocks(now.at).filter(|_| !now.store_answers);
        match due {
            Some(_) => self.feed_at = Some(Instant::now() + ration.next_in(now.at)),
            None => self.ration_is_over(now),
        }
        self.p.sender.send(ToDisk::Ration { seq: ration.seq(), blocks: due });
    }

    /// The worker has the whole segment.
    fn ration_is_over(&mut self, now: Pressure) {
        self.ration = None;
        self.slope.granted(now.at);
    }

    /// The worker filled a segment, or sealed it before it was full: the next one is not waited for because of it.
    pub(super) fn ration_sealed(&mut self, seq: u64) {
        if self.ration.is_some_and(|ration| ration.seq() <= seq) {
            self.ration_is_over(self.pressure());
            self.feed();
        }
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
