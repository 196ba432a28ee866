//! A segment that is handed out in parts, so that a writer that is slowed down is slowed down evenly. Pure.
//!
//! Held back whole, a segment is a wait of up to two seconds and then room for hundreds of writes at once, which is no slowing down
//! for a guest that waits for each of its writes. So the segment is given at once, and the worker is told, again and again, how far it
//! may fill it: in equal parts over the time that was to be waited for.

use std::time::Duration;

/// A part is not smaller: the header of each batch takes a block.
const PART_BLOCKS_MIN: u32 = 16;
/// Parts do not follow faster: each is a message.
const PAUSE_MIN: Duration = Duration::from_millis(10);

/// The state of the segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ration {
    seq: u64,
    /// When it was given, on any clock.
    from: Duration,
    pause: Duration,
    part_blocks: u32,
    parts: u32,
}

impl Ration {
    /// Of the segment with this sequence number and so many blocks, given at `from` to a disk that had to wait `wait` for it.
    pub fn new(seq: u64, segment_blocks: u32, from: Duration, wait: Duration) -> Self {
        let most = (segment_blocks / PART_BLOCKS_MIN).max(1);
        let fastest = (wait.as_millis() / PAUSE_MIN.as_millis()).try_into().unwrap_or(u32::MAX);
        let parts = most.min(fastest).max(1);
        Self { seq, from, pause: wait / parts, part_blocks: segment_blocks / parts, parts }
    }

    /// Sequence number of the segment.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Blocks of the segment that may be filled now; none: all of them, it is over.
    pub fn blocks(&self, at: Duration) -> Option<u32> {
        let parts = self.parts_at(at);
        (parts < self.parts).then_some(parts * self.part_blocks)
    }

    /// How long until there is more.
    pub fn next_in(&self, at: Duration) -> Duration {
        (self.from + self.pause * (self.parts_at(at) + 1)).saturating_sub(at)
    }

    fn parts_at(&self, at: Duration) -> u32 {
        let passed = at.saturating_sub(self.from).as_nanos();
        let parts = passed.checked_div(self.pause.as_nanos()).unwrap_or(u128::MAX);
        u32::try_from(parts).unwrap_or(u32::MAX).min(self.parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Duration = Duration::from_secs(100);

    #[test]
    fn a_segment_is_given_in_equal_parts_and_whole_after_the_wait() {
        for (segment_blocks, wait_ms, parts) in
            [(256, 2000, 16), (256, 40, 4), (4096, 2000, 200), (256, 3, 1)]
        {
            let wait = Duration::from_millis(wait_ms);
            let ration = Ration::new(7, segment_blocks, AT, wait);
            let (mut at, mut before, mut seen) = (AT, 0, 0);
            while let Some(blocks) = ration.blocks(at) {
                assert_eq!(blocks - before, if seen == 0 { 0 } else { segment_blocks / parts });
                (before, seen) = (blocks, seen + 1);
                let pause = ration.next_in(at);
                assert!(!pause.is_zero() && pause <= (wait / parts).max(PAUSE_MIN), "{pause:?}");
                at += pause;
            }
            assert_eq!((seen, at), (parts, AT + wait), "of {segment_blocks} blocks over {wait:?}");
        }
    }

    #[test]
    fn who_comes_late_gets_what_is_due() {
        let ration = Ration::new(7, 256, AT, Duration::from_secs(2));
        assert_eq!(ration.blocks(AT + Duration::from_secs(1)), Some(128));
        assert_eq!(ration.blocks(AT + Duration::from_secs(3)), None);
        assert_eq!(ration.next_in(AT + Duration::from_secs(9)), Duration::ZERO);
    }
}
