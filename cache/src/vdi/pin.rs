//! Pinning: what is held of a disk stays held.
//!
//! The pool evicts the clean segments of a pinned disk last (`Pin`): never while the store is away, and with the store only if
//! hardly anything is free. So writers never wait for good because of pins: what is pinned is limited when it
//! is pinned, and should the disk grow beyond that, pins give way while the store answers.
//!
//! Segments leave in the order of their age, so what was overwritten is given back by evicting the oldest one with all that
//! is in it, one at a time while the store answers; what of it was still live is noted here, and hydrated again. INV-PIN-1: whatever is lost of a pinned disk this
//! way is asked for again as long as it is pinned; a restart in between is made good by the operator's `vdi hydrate`,
//! which status asks for.

use super::hydrate::Hydration;
use super::task::VdiTask;
use crate::flusher::Named;
use crate::pool::Pin;
use blockstore::types::{BLOCK_SIZE, Lba};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use tokio::sync::oneshot;

/// Of the ring, so much may be needed by what is pinned.
const SHARE_MAX: f64 = 0.75;
/// A disk that is overwritten needs more segments than it has live blocks.
const OVERHEAD: f64 = 1.1;
/// Ranges that are remembered one by one; more are fetched as a whole disk.
const RANGES_MAX: usize = 65_536;

/// Why a disk cannot be pinned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    /// It needs too much of the cache.
    #[error(
        "it may need {wanted} bytes of the cache, and {room} bytes can still be pinned: use a larger cache or unpin another disk; if it is mostly empty, 'vdi hydrate' it first, so that it is known how much it needs"
    )]
    TooLarge { wanted: u64, room: u64 },
    /// Something else, in words.
    #[error("{0}")]
    Failed(String),
}

/// What was evicted of a pinned disk and is to be fetched again.
#[derive(Debug, Default)]
pub(super) struct Lost {
    /// start → end
    ranges: BTreeMap<u64, u64>,
    /// There were too many of them.
    all: bool,
}

impl Lost {
    /// A segment that names these blocks is evicted.
    pub fn note(&mut self, named: &Named) {
        let blocks = named.lbas.iter().map(|lba| (lba.0, lba.0 + 1));
        let zeros = named.zeros.iter().map(|(lba, blocks)| (lba.0, lba.0 + u64::from(*blocks)));
        for (start, end) in blocks.chain(zeros) {
            match self.ranges.range_mut(..=start).next_back() {
                Some((_, last)) if *last >= start => *last = end.max(*last),
                _ => drop(self.ranges.insert(start, end)),
            }
        }
        if self.ranges.len() > RANGES_MAX {
            self.ranges.clear();
            self.all = true;
        }
    }

    fn is_empty(&self) -> bool {
        self.ranges.is_empty() && !self.all
    }

    /// What to fetch: none for all of the disk. Forgets it.
    fn take(&mut self) -> Option<Vec<(Lba, u64)>> {
        let ranges = std::mem::take(&mut self.ranges);
        if std::mem::take(&mut self.all) {
            return None;
        }
        let mut sorted: Vec<(Lba, u64)> = Vec::new();
        for (start, end) in ranges {
            match sorted.last_mut() {
                // A range may have grown into the next.
                Some((lba, blocks)) if lba.0 + *blocks >= start => {
                    *blocks = end.max(lba.0 + *blocks) - lba.0;
                }
                _ => sorted.push((Lba(start), end - start)),
            }
        }
        Some(sorted)
    }
}

impl VdiTask {
    /// Durable before it takes effect.
    pub(super) async fn pin(&mut self, on: bool) -> Result<(), PinError> {
        if on && !self.p.record.policy.pinned {
            let wanted = self.pin_bytes();
            let room = self.p.ground.pool.room_for_pins(self.p.vdi, SHARE_MAX);
            if wanted > room {
                return Err(PinError::TooLarge { wanted, room });
            }
        }
        let before = std::mem::replace(&mut self.p.record.policy.pinned, on);
        if let Err(error) = self.write_slot().await {
            self.p.record.policy.pinned = before;
            return Err(PinError::Failed(error.to_string()));
        }
        self.p.status.lock().pinned = on;
        self.tick_pin();
        if !on {
            self.lost = Lost::default();
            self.p.ground.pool.set_pin(self.p.vdi, None);
        }
        Ok(())
    }

    /// Bytes of the ring that the disk needs to be held as a whole, as far as it is known to be empty.
    fn pin_bytes(&self) -> u64 {
        let blocks = self.p.record.size_bytes.div_ceil(BLOCK_SIZE as u64);
        let zeros = self.p.progress.zero_blocks.load(Ordering::Relaxed);
        let bytes = blocks.saturating_sub(zeros) * BLOCK_SIZE as u64;
        (bytes as f64 * OVERHEAD) as u64
    }

    /// Tells the pool how firmly to hold on, and has what gave way come back.
    pub(super) fn tick_pin(&mut self) {
        if !self.p.record.policy.pinned {
            return;
        }
        let store_answers = self.pressure().store_answers;
        let pin = if store_answers { Pin::Soft } else { Pin::Firm };
        let pool = &self.p.ground.pool;
        pool.note_pin_bytes(self.p.vdi, self.pin_bytes());
        pool.set_pin(self.p.vdi, Some(pin));
        let busy = self.hydration.as_ref().is_some_and(Hydration::is_running);
        if !store_answers || self.released || busy {
            return;
        }
        if self.lost.is_empty() {
            // One after the other: should the store go away now, no more than that is missing.
            return pool.trim(self.p.vdi);
        }
        let ranges = self.lost.take();
        // How it goes is in the status; what is lost meanwhile is noted anew. It was there, so it fits.
        self.hydrate_within(u64::MAX, ranges, oneshot::channel().0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_is_asked_for_in_ranges() {
        let mut lost = Lost::default();
        assert!(lost.is_empty());
        let lbas = [5, 6, 7, 100, 3, 4].map(Lba).to_vec();
        lost.note(&Named { lbas, zeros: vec![(Lba(101), 10)] });
        assert_eq!(lost.take(), Some(vec![(Lba(3), 5), (Lba(100), 11)]));
        assert!(lost.is_empty());
        let lbas = (0..200_000).map(|n| Lba(n * 2)).collect();
        lost.note(&Named { lbas, zeros: Vec::new() });
        assert_eq!(lost.take(), None, "all of it");
        assert!(lost.is_empty());
    }
}
