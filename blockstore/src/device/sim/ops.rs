//! Vocabulary of the simulated device: its options, the kinds of operations, and their records.

use super::super::DeviceErrorKind;
use super::target::Action;

/// Entries that a session's trace holds; the oldest are forgotten.
pub const TRACE_LEN_MAX: usize = 65_536;

/// What a simulated device is to be like.
#[derive(Clone, Debug)]
pub struct SimOptions {
    /// Bytes; a multiple of 4096.
    pub capacity: u64,
    /// Seed of every choice the device makes.
    pub seed: u64,
    /// 512 or 4096: what compare-and-write covers, and the unit at which writes tear.
    pub logical_block: u32,
    /// False makes a device for a single host.
    pub compare_and_write: bool,
    /// False makes discards fail with `Unsupported`.
    pub discard: bool,
    /// Bytes; what the device says of itself, it discards single blocks all the same.
    pub discard_granularity: u64,
    /// A discard yields up to this often more than other operations: targets take long over one.
    pub discard_yields_max: u32,
    /// An operation yields up to this often before it takes effect, and again before it returns.
    pub yields_max: u32,
}

impl SimOptions {
    /// A device of 512-byte sectors that can do everything.
    #[must_use]
    pub fn new(capacity: u64, seed: u64) -> Self {
        Self {
            capacity,
            seed,
            logical_block: 512,
            compare_and_write: true,
            discard: true,
            discard_granularity: 4096,
            discard_yields_max: 64,
            yields_max: 2,
        }
    }
}

/// The operations of a device, for counters, traces and faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpKind {
    /// [`BlockDevice::read`]
    Read,
    /// [`BlockDevice::write`]
    Write,
    /// [`BlockDevice::flush`]
    Flush,
    /// [`BlockDevice::compare_and_write`]
    CompareAndWrite,
    /// [`BlockDevice::discard`]
    Discard,
}

impl OpKind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::CompareAndWrite => "compare-and-write",
            Self::Discard => "discard",
        }
    }
}

/// One finished operation of a session. An operation whose future was dropped leaves no entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceEntry {
    /// What was asked for.
    pub kind: OpKind,
    /// Bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// None: success (a miscompare included).
    pub error: Option<DeviceErrorKind>,
}

/// How many operations of each kind a session has begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpCounts {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Compare-and-writes.
    pub compare_and_writes: u64,
    /// Discards.
    pub discards: u64,
    /// Bytes of all writes.
    pub bytes_written: u64,
    /// Bytes of all reads.
    pub bytes_read: u64,
}

impl OpCounts {
    /// Operations of all kinds.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.reads + self.writes + self.flushes + self.compare_and_writes + self.discards
    }
}

impl OpCounts {
    pub(super) fn note(&mut self, action: &Action) {
        match action {
            Action::Read { len, .. } => {
                self.reads += 1;
                self.bytes_read += *len as u64;
            }
            Action::Write { data, .. } => {
                self.writes += 1;
                self.bytes_written += data.len() as u64;
            }
            Action::Flush => self.flushes += 1,
            Action::CompareAndWrite { .. } => self.compare_and_writes += 1,
            Action::Discard { .. } => self.discards += 1,
        }
    }
}
