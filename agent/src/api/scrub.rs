//! Scrub: what it verifies, found, and will do.

use gc::Scrubbed;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Answer of `scrub run`, `scrub status` and `scrub stop`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// The pass that runs now.
    pub running: Option<ScrubRunning>,
    /// The last one that ended, well or not, also before the agent's start if its run directory knows.
    pub last: Option<ScrubEnded>,
    /// The last one that came to its end, if that is another.
    #[serde(default)]
    pub completed: Option<ScrubEnded>,
    /// A pass begins so long after the one before began, milliseconds; none: only when told.
    pub every: Option<u64>,
    /// When that is, milliseconds since 1970; none: a pass runs, or only when told.
    pub next: Option<u64>,
    /// Most bytes read in a second; 0: as many as it can.
    pub rate: u64,
    /// Bytes of the store that are in use, when it was looked at last: what a pass will read, about.
    pub used: Option<u64>,
}

/// A pass under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ScrubRunning {
    /// Counts the passes of this agent, from 1.
    pub id: u64,
    /// When the pass began, milliseconds since 1970; perhaps by an agent before this one.
    pub since: u64,
    /// An agent before this one began it.
    pub resumed: bool,
    /// The disk that it is at.
    pub vdi: Option<Uuid>,
    /// The snapshot of it; none: the disk as it is.
    pub snapshot: Option<u64>,
    /// Bytes of that which are done.
    pub offset: u64,
    /// Why it does not go on just now; none: it does.
    pub waiting: Option<String>,
    /// What it has done and found so far.
    #[serde(flatten)]
    pub so_far: Scrubbed,
}

/// A pass that ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubEnded {
    /// As in [`ScrubRunning`].
    pub id: u64,
    /// When it began, milliseconds since 1970.
    pub began: u64,
    /// When it ended.
    pub at: u64,
    /// Why it did not come to its end; none: it did.
    pub failure: Option<String>,
    /// It was told to stop.
    pub stopped: bool,
    /// What it did and found.
    #[serde(flatten)]
    pub scrubbed: Scrubbed,
}

/// What `status` shows of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubSummary {
    /// A pass is under way.
    pub running: bool,
    /// It waits for the store.
    pub waiting: bool,
    /// Bytes that it has verified so far; without one, what the last one had.
    pub verified_bytes: u64,
    /// Damage that it has found so far, or that was found before and not looked at again to the end, if that was more.
    pub damaged: u64,
    /// Blocks of which it could not be found out.
    pub unverified: u64,
    /// When the last one that came to its end did, milliseconds since 1970.
    pub last_completed: Option<u64>,
}
