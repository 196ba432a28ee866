//! Deliberate bugs, one at a time, to show that the tests would find them.
//!
//! Compiled out without the feature `sabotage`; with it, a bug is there only on a thread that asked for it. The places that
//! have one are found by its name.

/// A bug that a careless change might bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A flush is answered at once.
    AckBeforeFlush,
    /// Records that overtook others are acknowledged.
    AckAcrossGap,
    /// A summary is written before the records that it vouches for are flushed.
    SummaryBeforeFlush,
    /// Recovery believes records whose payload does not match its checksums.
    IgnorePayloadCrc,
    /// Recovery looks at summaries only: a segment without one counts as empty.
    SkipScan,
    /// Recovery takes a segment that cannot be read for an empty one.
    ErrorEndsLog,
    /// Records that a recovery cut off are neither wiped nor known by their epoch.
    KeepDeadRecords,
    /// After a restart, segments are numbered from the start again.
    ReuseSequence,
    /// The flusher leaves out the last of several patches of a block.
    ForgetPatch,
    /// The flusher leaves out a segment.
    SkipSegment,
    /// Segments count as clean before they are committed.
    ReclaimEarly,
    /// Segments are used again before the slot on the cache device says what is committed, and that they are dead.
    ReuseBeforeSlot,
    /// Any commit retires all patches.
    RetireAllPatches,
    /// A fetched block is kept although the index changed since.
    StaleFill,
    /// A segment is given up while it is being read.
    IgnorePins,
    /// A head is published before the blocks that it names are flushed.
    HeadBeforeBarrier,
    /// A flush counts although the device may have lost what it was to cover.
    BarrierIgnoresEpoch,
    /// What a commit replaces is free before the head is written.
    FreeBeforeHead,
    /// What a commit replaced is free while older versions are read.
    ReuseUnderReaders,
    /// Blocks are given out though the bitmap on the device does not say so.
    ClaimUnwritten,
    /// Blocks of the store are not checked.
    IgnoreBlockCrc,
    /// A compare-and-write of unknown outcome is taken to have landed.
    AssumeLanded,
    /// What one leg of a mirrored cache has written or flushed counts, whatever the other did.
    OneLegIsEnough,
    /// A leg that failed is left out, and the other does not note it before it goes on.
    LegOutUnnoted,
    /// The leg that was left behind counts, and the other with it.
    UseStaleLeg,
    /// The end of the log is not made equal on both legs.
    SkipTailMend,
    /// A store that comes later is not compared with the log: it is where the slot says.
    ColdTrustsSlot,
    /// With no leg left, disks go on and nobody notes that their logs may be behind.
    LogBehindUnnoted,
    /// What was fetched ahead of need is kept although the index changed since.
    StaleKeep,
    /// A snapshot does not raise the birth below which the disk frees nothing.
    CutKeepsBirth,
    /// That birth falls when a snapshot is deleted.
    BirthFalls,
    /// A snapshot is acknowledged before its record is flushed.
    AckSnapshotEarly,
    /// A block that is written in part after a snapshot becomes whole over the store's, not over what came before the snapshot.
    ForgetEarlierPart,
    /// Collection takes what was allocated for a head that is not durable yet.
    CollectInFlight,
    /// Collection takes what was claimed or freed since it began.
    CollectTouched,
    /// Collection takes what older versions of a disk are still being read from.
    CollectUnderReaders,
    /// Blocks are given out while the device is being told that they are free.
    GiveOutUnmapping,
    /// A clone owns what it shares with its source.
    CloneOwnsShared,
    /// A clone that is made without the store takes over what its source's log has beyond the snapshot.
    CloneBeyondSnapshot,
    /// One that waits for the store reads what its source holds, though that was written after the snapshot.
    LendBeyondSnapshot,
    /// It is made in the store as often as that is asked for.
    CloneTwice,
    /// A scrub calls damaged what does not match a pointer that it read before, without a second look.
    ScrubBelievesFirstLook,
    /// It takes what lies beside something else of its neighbour for read.
    ScrubSkipsBeside,
    /// It notes a tree as done when it begins with it.
    ScrubNotesAhead,
    /// It does not go on once the store was away.
    ScrubStaysAway,
    /// A commit of several snapshots gives each the label of the one before it.
    LabelOfNeighbour,
    /// Of snapshots that reach the store, the log's list forgets all but the labels.
    PendingLabelsShift,
    /// Snapshots that are held are deleted.
    DeleteHeld,
    /// It is made there under a name that another disk has.
    CloneTakesName,
    /// The cache does not note that it has another name in the store.
    RenameUnnoted,
    /// One that is given up leaves the cache before its slot says so.
    GiveUpUnnoted,
    /// One that is given up keeps its segments.
    GiveUpKeepsSegments,
    /// A disk that was detached leaves the cache before its slot says so.
    DetachUnnoted,
    /// A disk that was rolled back to a snapshot owns what that holds.
    RollbackOwnsSnapshot,
    /// A rollback to a snapshot takes no LSN of its own.
    RollbackWithoutLsn,
}

/// All of them.
pub const ALL: [Bug; 55] = [
    Bug::AckBeforeFlush,
    Bug::AckAcrossGap,
    Bug::SummaryBeforeFlush,
    Bug::IgnorePayloadCrc,
    Bug::SkipScan,
    Bug::ErrorEndsLog,
    Bug::KeepDeadRecords,
    Bug::ReuseSequence,
    Bug::ForgetPatch,
    Bug::SkipSegment,
    Bug::ReclaimEarly,
    Bug::ReuseBeforeSlot,
    Bug::RetireAllPatches,
    Bug::StaleFill,
    Bug::IgnorePins,
    Bug::HeadBeforeBarrier,
    Bug::BarrierIgnoresEpoch,
    Bug::FreeBeforeHead,
    Bug::ReuseUnderReaders,
    Bug::ClaimUnwritten,
    Bug::IgnoreBlockCrc,
    Bug::AssumeLanded,
    Bug::OneLegIsEnough,
    Bug::LegOutUnnoted,
    Bug::UseStaleLeg,
    Bug::SkipTailMend,
    Bug::ColdTrustsSlot,
    Bug::LogBehindUnnoted,
    Bug::StaleKeep,
    Bug::CutKeepsBirth,
    Bug::BirthFalls,
    Bug::AckSnapshotEarly,
    Bug::ForgetEarlierPart,
    Bug::CollectInFlight,
    Bug::CollectTouched,
    Bug::CollectUnderReaders,
    Bug::GiveOutUnmapping,
    Bug::CloneOwnsShared,
    Bug::CloneBeyondSnapshot,
    Bug::LendBeyondSnapshot,
    Bug::CloneTwice,
    Bug::ScrubBelievesFirstLook,
    Bug::ScrubSkipsBeside,
    Bug::ScrubNotesAhead,
    Bug::ScrubStaysAway,
    Bug::LabelOfNeighbour,
    Bug::PendingLabelsShift,
    Bug::DeleteHeld,
    Bug::CloneTakesName,
    Bug::RenameUnnoted,
    Bug::GiveUpUnnoted,
    Bug::GiveUpKeepsSegments,
    Bug::DetachUnnoted,
    Bug::RollbackOwnsSnapshot,
    Bug::RollbackWithoutLsn,
];

/// Whether this thread has the bug.
#[cfg(not(feature = "sabotage"))]
#[inline]
#[must_use]
pub const fn on(_: Bug) -> bool {
    false
}

#[cfg(feature = "sabotage")]
pub use active::{on, set};

#[cfg(feature = "sabotage")]
mod active {
    use super::Bug;
    use std::cell::Cell;

    thread_local! {
        static ACTIVE: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// Gives this thread a bug, or cures it.
    pub fn set(bug: Option<Bug>) {
        ACTIVE.set(bug);
    }

    /// Whether this thread has the bug.
    #[must_use]
    pub fn on(bug: Bug) -> bool {
        ACTIVE.get() == Some(bug)
    }
}
