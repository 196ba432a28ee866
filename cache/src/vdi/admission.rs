//! Who may append, and when: burst freely, then keep to the store's pace. Pure.
//!
//! A writer that outruns the store fills the ring. From there on it can only go at the store's pace; the question is at which
//! fill. Held at a full ring, everything is read back from the cache device before it is replayed, and nothing is left for
//! an outage or another disk's burst. So once the ring was nearly full, the writer gets less than the store takes until
//! the backlog is small enough to be replayed from memory, and then exactly what the store takes. It bursts again once
//! its demand has stayed below that pace for a while: a backlog that is small for a moment only is not a demand that fell. With the store away none of this applies: the ring is there to be filled.

use std::time::Duration;

/// Share of the ring at which a writer is held.
const HOLD_FROM: f64 = 0.85;

/// A held writer may burst again when its backlog was small for so long.
const CALM: Duration = Duration::from_secs(3);

/// What the decision depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pressure {
    /// Share of the ring that is dirty, over all disks.
    pub fill: f64,
    /// Bytes of log of this disk that are not committed.
    pub dirty_bytes: u64,
    /// Dirty bytes that a held disk comes down to: what can be replayed from memory.
    pub target_bytes: u64,
    /// Commits get through.
    pub store_answers: bool,
    /// When this is so, on any clock.
    pub at: Duration,
}

/// The state of one disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    held: bool,
    /// When the backlog of the held disk was last seen not to be small.
    busy_at: Duration,
    /// Segments that may be granted while the backlog shrinks.
    credit: u64,
}

impl Admission {
    /// Whether the disk may have another segment now.
    pub fn admit(&mut self, now: Pressure) -> bool {
        if !now.store_answers {
            return true;
        }
        if now.fill >= HOLD_FROM {
            self.held = true;
        }
        if now.dirty_bytes > now.target_bytes / 4 {
            self.busy_at = now.at;
        } else if now.at.saturating_sub(self.busy_at) >= CALM {
            self.held = false;
        }
        if !self.held || now.dirty_bytes <= now.target_bytes {
            return true;
        }
        self.credit > 0
    }

    /// The disk was given the segment that it was admitted to.
    pub fn granted(&mut self) {
        self.credit = self.credit.saturating_sub(1);
    }

    /// The writer waits for the store: replay has priority.
    pub fn is_held(&self) -> bool {
        self.held
    }

    /// So many segments of the disk were committed: half as many may follow.
    pub fn committed(&mut self, segments: u64) {
        self.credit = segments.div_ceil(2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(100);

    const SEGMENT: u64 = 1 << 20;
    const RING: u64 = 1000 * SEGMENT;
    const TARGET: u64 = 50 * SEGMENT;

    fn pressure(dirty: u64) -> Pressure {
        Pressure {
            fill: dirty as f64 / RING as f64,
            dirty_bytes: dirty,
            target_bytes: TARGET,
            store_answers: true,
            at: Duration::ZERO,
        }
    }

    #[test]
    fn a_burst_passes_and_a_siege_is_held_at_the_target() {
        let (mut admission, mut dirty) = (Admission::default(), 0);
        let mut highest = 0;
        // The writer takes whatever it gets; each step the store commits up to 30 segments.
        for step in 0..1000 {
            for _ in 0..100 {
                if dirty + SEGMENT <= RING && admission.admit(pressure(dirty)) {
                    admission.granted();
                    dirty += SEGMENT;
                }
            }
            highest = highest.max(dirty);
            let committed = dirty.min(30 * SEGMENT);
            dirty -= committed;
            admission.committed(committed / SEGMENT);
            assert!(step < 100 || dirty <= TARGET, "the backlog has come down and stays down");
        }
        assert!(highest >= RING / 10 * 8, "the ring absorbed the burst");
    }

    #[test]
    fn nothing_is_held_while_the_store_is_away() {
        let mut admission = Admission::default();
        admission.admit(pressure(RING));
        let away = Pressure { store_answers: false, ..pressure(RING / 2) };
        assert!((0..100).all(|_| admission.admit(away)));
    }

    #[test]
    fn a_held_disk_bursts_again_after_its_demand_fell_for_good() {
        let mut admission = Admission::default();
        let at = |steps: u32, dirty| Pressure { at: STEP * steps, ..pressure(dirty) };
        admission.admit(at(0, RING / 10 * 9));
        assert!(!admission.admit(at(1, RING / 2)));
        assert!(admission.admit(at(2, TARGET / 5)), "small for a moment");
        assert!(!admission.admit(at(3, RING / 2)), "and held all the same");
        assert!(admission.admit(at(40, TARGET / 5)), "small for long");
        assert!(admission.admit(at(41, RING / 2)));
    }
}
