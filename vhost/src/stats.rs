//! Counters of a served disk.

use crate::front_ends::FrontEnds;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Counts since the disk's worker was started, and its present state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Read requests.
    pub reads: u64,
    /// Bytes asked for by read requests.
    pub read_bytes: u64,
    /// Write requests.
    pub writes: u64,
    /// Bytes of write requests.
    pub written_bytes: u64,
    /// FLUSH requests.
    pub flushes: u64,
    /// DISCARD and WRITE_ZEROES requests.
    pub zeroings: u64,
    /// Requests refused as malformed, out of range or unknown.
    pub refused: u64,
    /// Requests that ended with an I/O error although they were valid.
    pub failed: u64,
    /// Requests that the disk's policy failed because they had waited too long for a store that is away; not in `failed`.
    pub failed_by_policy: u64,
    /// Requests under way.
    pub in_flight: u64,
    /// Writes and zeroings that wait for space in the log.
    pub stalled: u64,
    /// Reads, in pieces, that wait for the store.
    pub fetching: u64,
    /// Interrupts sent.
    pub interrupts: u64,
    /// Front ends served so far.
    pub sessions: u64,
    /// A front end is connected.
    pub connected: bool,
    /// Writes complete only when durable (write cache off).
    pub write_through: bool,
    /// The worker has panicked: the disk is not served any more.
    pub worker_failed: bool,
}

/// The same, shared between the threads of a server. Each counter has one writer.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    counters: [AtomicU64; COUNTERS],
    /// Bytes of the disk.
    pub size: AtomicU64,
    pub sessions: AtomicU64,
    pub front_ends: FrontEnds,
    /// The driver's choice of the write cache; outlives sessions, because a guest that goes on after its front end
    /// reconnected does not state it again.
    pub writeback: AtomicBool,
    pub write_through: AtomicBool,
    pub worker_failed: AtomicBool,
}

const COUNTERS: usize = 13;

/// The worker's own counters; published once per turn of its loop.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub flushes: u64,
    pub zeroings: u64,
    pub refused: u64,
    pub failed: u64,
    pub failed_by_policy: u64,
    pub in_flight: u64,
    pub stalled: u64,
    pub fetching: u64,
    pub interrupts: u64,
}

impl Counters {
    fn list(&self) -> [u64; COUNTERS] {
        [
            self.reads,
            self.read_bytes,
            self.writes,
            self.written_bytes,
            self.flushes,
            self.zeroings,
            self.refused,
            self.failed,
            self.failed_by_policy,
            self.in_flight,
            self.stalled,
            self.fetching,
            self.interrupts,
        ]
    }
}

impl Shared {
    /// Makes the worker's counters visible.
    pub(crate) fn publish(&self, counters: &Counters) {
        for (shared, own) in self.counters.iter().zip(counters.list()) {
            shared.store(own, Ordering::Relaxed);
        }
    }

    /// A snapshot.
    pub(crate) fn stats(&self) -> Stats {
        let [
            reads,
            read_bytes,
            writes,
            written_bytes,
            flushes,
            zeroings,
            refused,
            failed,
            failed_by_policy,
            in_flight,
            stalled,
            fetching,
            interrupts,
        ] = std::array::from_fn(|n| self.counters[n].load(Ordering::Relaxed));
        Stats {
            reads,
            read_bytes,
            writes,
            written_bytes,
            flushes,
            zeroings,
            refused,
            failed,
            failed_by_policy,
            in_flight,
            stalled,
            fetching,
            interrupts,
            sessions: self.sessions.load(Ordering::Relaxed),
            connected: self.front_ends.count() > 0,
            write_through: self.write_through.load(Ordering::Relaxed),
            worker_failed: self.worker_failed.load(Ordering::Relaxed),
        }
    }
}
