//! Schedules of snapshots, as they cross the control socket.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Body of `vdi schedule` that sets one.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleRequest {
    /// Rules such as `every 10s keep 6, every 1h keep 24`, or `none`.
    pub schedule: String,
}

/// Answer of `vdi schedule`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ScheduleStatus {
    /// The disk.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// The rules, as they are written; none: nothing is taken.
    pub schedule: Option<String>,
    /// Attached to this host: only then snapshots are taken and thinned.
    pub attached: bool,
    /// The rules with intervals one by one, the shortest first.
    pub rules: Vec<RuleStatus>,
    /// The rule of snapshots behind every write, or every batch.
    pub cadence: Option<CadenceStatus>,
    /// Snapshots that no rule keeps any more and that are still there; none while it is not known which there are.
    pub surplus: Option<u64>,
    /// Those of them on which clones hang: they are kept as long.
    pub held_by_clones: u64,
    /// The store was asked which snapshots there are; else only those of this host's log, and what came since, are known.
    pub listed: bool,
    /// Snapshots that were taken since the disk was attached, or the agent started.
    pub taken: u64,
    /// Snapshots that were deleted since then.
    pub deleted: u64,
    /// Why it does not go on as it should, in words; none: it does.
    pub trouble: Option<String>,
}

/// One rule of a schedule.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RuleStatus {
    /// Its interval, milliseconds.
    pub every_ms: u64,
    /// How many it keeps at most.
    pub keep: u32,
    /// How many it keeps now.
    pub kept: u64,
    /// When the last of them was taken, in milliseconds of UNIX time.
    pub last: Option<u64>,
    /// When the next one is due, if something was written until then, in milliseconds of UNIX time.
    pub next: Option<u64>,
}

/// The rule of snapshots behind every write, or every batch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CadenceStatus {
    /// `write` or `batch`.
    pub behind: String,
    /// How many it keeps at most.
    pub keep: u32,
    /// How many the store has of those.
    pub kept: u64,
    /// How many are durable in the log, will be kept as it is now, and are not in the store yet.
    pub in_log: u64,
    /// When the newest in the store was taken, in milliseconds of UNIX time.
    pub last: Option<u64>,
    /// Less may be taken than the rule says, while too many wait to be deleted.
    pub cutting: Cutting,
}

/// How much is taken of what a rule says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cutting {
    /// All of it.
    #[default]
    AsItSays,
    /// Behind batches only.
    BehindBatches,
    /// None.
    Stopped,
}
