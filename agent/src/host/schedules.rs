//! Schedules of snapshots: what is known of them, disk by disk, and what people ask of them.
//!
//! `taking` takes what is due, `thinning` deletes what no rule keeps any more; what is due and what is kept is decided by
//! `blockstore::schedule`. Both know the disk's scheduled snapshots from here: those of the log when the disk comes up, those of the store
//! when that could be asked, and what was taken since. What a cadence has cut is known apart, once commits have made it (`cuts`).
//! Whatever is wrong with that list costs nobody a snapshot: what is
//! deleted is looked at once more, label and clones, by the store that deletes it.

mod cuts;
mod sparing;
pub(super) mod taking;
#[cfg(test)]
mod tests;
pub(super) mod thinning;

pub(super) use sparing::Spared;

use super::Host;
use super::served::Served;
use crate::api::schedule::{CadenceStatus, Cutting, RuleStatus, ScheduleRequest, ScheduleStatus};
use crate::error::{Failure, Kind, Result};
use crate::units::format_ms;
use blockstore::schedule::{Now, Plan, Rule, Taken, is_automatic, is_cut};
use blockstore::{PolicyChange, Schedule};
use cache::{LogCut, PendingSnapshot, Pressed};
use parking_lot::Mutex;
use sparing::Sparing;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::Notify;
use uuid::Uuid;

/// A snapshot that is not durable in the log after so long is worth a word.
const LONG: Duration = Duration::from_secs(30);

/// What is known of all disks of this host that have a schedule.
#[derive(Debug, Default)]
pub(super) struct Schedules {
    /// Held for moments only.
    disks: Mutex<BTreeMap<Uuid, Disk>>,
    /// Something may be due earlier than was known.
    changed: Notify,
    /// There may be something to delete.
    surplus: Notify,
    sparing: Arc<Sparing>,
}

/// One disk with a schedule, from its attachment or the agent's start on.
#[derive(Debug)]
struct Disk {
    served: Weak<Served>,
    since: Instant,
    /// None before it is known what is due.
    plan: Option<Plan>,
    /// Its snapshots of rules with slots, in the log or in the store, as far as they are known.
    taken: Taken,
    /// Those of a cadence, in the store.
    cut: Taken,
    /// What the cache was last told about how much to cut.
    pressed: Option<Pressed>,
    listing: Listing,
    /// There may be snapshots in the store that nobody has told of since the store was last asked.
    list_again: bool,
    /// The log may hold snapshots that nobody has told of.
    unsure: bool,
    /// A snapshot was asked for then and is not durable yet.
    asked: Option<Instant>,
    /// Nothing is asked for before, after a failure.
    take_after: Instant,
    /// Clones hung on these when they were last looked at.
    held: BTreeSet<u64>,
    /// When those are looked at again.
    held_until: Instant,
    thinned_at: Instant,
    thin_after: Instant,
    take_failure: Option<String>,
    thin_failure: Option<String>,
    count_taken: u64,
    count_deleted: u64,
}

/// Whether the store was asked which snapshots there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listing {
    Untried,
    Failed,
    Done,
}

/// Counters of a disk's schedule, and its trouble, for `status`.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts {
    pub taken: u64,
    pub deleted: u64,
    pub trouble: Option<String>,
}

impl Disk {
    fn new(served: &Arc<Served>) -> Self {
        let now = Instant::now();
        Self {
            served: Arc::downgrade(served),
            since: now,
            plan: None,
            taken: Taken::new(),
            cut: Taken::new(),
            pressed: None,
            listing: Listing::Untried,
            list_again: false,
            unsure: true,
            asked: None,
            take_after: now,
            held: BTreeSet::new(),
            held_until: now,
            thinned_at: now,
            thin_after: now,
            take_failure: None,
            thin_failure: None,
            count_taken: 0,
            count_deleted: 0,
        }
    }

    fn is_of(&self, served: &Arc<Served>) -> bool {
        std::ptr::eq(self.served.as_ptr(), Arc::as_ptr(served))
    }

    fn learn(&mut self, pending: Vec<PendingSnapshot>) {
        for found in pending.into_iter().filter(|found| is_automatic(found.label.as_str())) {
            let of = if is_cut(found.label.as_str()) { &mut self.cut } else { &mut self.taken };
            of.insert(found.lsn.0, found.time_ms);
        }
    }

    /// The store is asked which snapshots there are: of what happens from now on the answer may know nothing.
    fn begin_listing(&mut self) {
        self.list_again = false;
    }

    /// The store has answered.
    fn listed(&mut self, taken: Vec<(u64, u64)>, cut: Vec<(u64, u64)>) {
        self.taken.extend(taken);
        self.cut.extend(cut);
        self.listing = if self.list_again { Listing::Failed } else { Listing::Done };
    }

    /// There may be snapshots in the store that nobody has told of.
    fn list_again(&mut self) {
        self.list_again = true;
        if self.listing == Listing::Done {
            self.listing = Listing::Failed;
        }
    }

    fn trouble(&self) -> Option<String> {
        let waiting = self.asked.map(|asked| asked.elapsed()).filter(|waiting| *waiting > LONG);
        let late = waiting.map(|waiting| {
            let waiting = format_ms(waiting.as_millis() as u64);
            format!("a snapshot has waited for {waiting} to be durable in the log, which may have no room")
        });
        let take = self.take_failure.clone().or(late);
        let both = take.into_iter().chain(self.thin_failure.clone()).chain(self.pressure());
        let both: Vec<String> = both.collect();
        (!both.is_empty()).then(|| both.join("; "))
    }
}

/// The rules, with the snapshots that are known and what is planned.
fn rules(schedule: Schedule, taken: &Taken, plan: Option<&Plan>) -> Vec<RuleStatus> {
    let plan = plan.filter(|plan| plan.schedule() == schedule);
    let due: BTreeMap<Rule, u64> = plan.into_iter().flat_map(Plan::times).collect();
    let rule = |rule: Rule| RuleStatus {
        every_ms: rule.every_ms,
        keep: rule.keep,
        kept: rule.kept(taken).count() as u64,
        last: rule.kept(taken).next().and_then(|lsn| taken.get(&lsn).copied()),
        next: due.get(&rule).copied(),
    };
    schedule.rules().map(rule).collect()
}

impl Schedules {
    pub fn counts(&self, vdi: Uuid) -> Counts {
        let disks = self.disks.lock();
        disks.get(&vdi).map_or_else(Counts::default, |disk| Counts {
            taken: disk.count_taken,
            deleted: disk.count_deleted,
            trouble: disk.trouble(),
        })
    }

    /// A disk was deleted, which may have been a clone.
    pub fn release_held(&self) {
        self.disks.lock().values_mut().for_each(|disk| disk.held.clear());
        self.surplus.notify_one();
    }

    /// People deleted these, or made them theirs.
    pub fn forget(&self, vdi: Uuid, lsns: impl IntoIterator<Item = u64>) {
        let mut disks = self.disks.lock();
        let Some(disk) = disks.get_mut(&vdi) else { return };
        for lsn in lsns {
            disk.taken.remove(&lsn);
            disk.cut.remove(&lsn);
            disk.held.remove(&lsn);
        }
    }

    /// Somebody wants to use this snapshot of a cadence, which is about to be in the store: it is not deleted before the request is over.
    pub fn spare(&self, vdi: Uuid, cut: &LogCut) -> Spared {
        let spared = self.sparing.spare(vdi, cut.lsn.0);
        if let Some(disk) = self.disks.lock().get_mut(&vdi) {
            disk.cut.insert(cut.lsn.0, cut.time_ms);
        }
        spared
    }

    /// As [`spare`](Self::spare), for those of these that a request was about lately.
    pub fn spare_again(&self, vdi: Uuid, lsns: impl IntoIterator<Item = u64>) -> Vec<Spared> {
        lsns.into_iter().filter_map(|lsn| self.sparing.spare_again(vdi, lsn)).collect()
    }
}

impl From<Pressed> for Cutting {
    fn from(pressed: Pressed) -> Self {
        match pressed {
            Pressed::Not => Self::AsItSays,
            Pressed::Coarse => Self::BehindBatches,
            Pressed::Stopped => Self::Stopped,
        }
    }
}

impl Host {
    /// Sets a disk's schedule, or ends it. What an ended one took stays.
    pub async fn set_schedule(
        &self,
        name: &str,
        request: ScheduleRequest,
    ) -> Result<ScheduleStatus> {
        let schedule: Schedule =
            request.schedule.parse().map_err(|words| Failure::new(Kind::Usage, words))?;
        let change = PolicyChange { schedule: Some(schedule), ..PolicyChange::default() };
        let (_, uuid, _) = self.change_policy(name, change).await?;
        // With a plan already, so that the answer tells when the next ones are due.
        self.take_what_is_due();
        self.schedules.changed.notify_one();
        self.schedules.surplus.notify_one();
        self.schedule(&uuid.to_string()).await
    }

    /// A disk's schedule and how it goes.
    pub async fn schedule(&self, name: &str) -> Result<ScheduleStatus> {
        let served = self.find_served(name);
        let (name, uuid, schedule) = match &served {
            Some(disk) => {
                let status = self.parts.cache.vdi_status(disk.uuid);
                let schedule = status.map(|status| status.policy.schedule).unwrap_or_default();
                (disk.name.clone(), disk.uuid, schedule)
            }
            None => {
                let info = self.parts.store.get()?.lookup_vdi(name).await?;
                (info.name, info.uuid, info.schedule)
            }
        };
        let in_log = self.parts.cache.vdi_status(uuid).map_or(0, |status| status.cuts_pending);
        let disks = self.schedules.disks.lock();
        let known = disks.get(&uuid).filter(|_| served.is_some());
        let unknown = Taken::new();
        let taken = known.map_or(&unknown, |disk| &disk.taken);
        let cut = known.map_or(&unknown, |disk| &disk.cut);
        let mut surplus = schedule.surplus(taken);
        surplus.extend(schedule.surplus_cuts(cut));
        let listed = known.is_some_and(|disk| disk.listing == Listing::Done);
        let held = |lsn: &&u64| known.is_some_and(|disk| disk.held.contains(lsn));
        Ok(ScheduleStatus {
            name,
            uuid,
            schedule: (!schedule.is_none()).then(|| schedule.to_string()),
            attached: served.is_some(),
            rules: rules(schedule, taken, known.and_then(|disk| disk.plan.as_ref())),
            cadence: schedule.cadence().map(|cadence| CadenceStatus {
                behind: cadence.behind.name().to_owned(),
                keep: cadence.keep,
                kept: (cut.len() as u64).min(u64::from(cadence.keep)),
                in_log,
                last: cut.last_key_value().map(|(_, time)| *time),
                cutting: known.and_then(|disk| disk.pressed).unwrap_or_default().into(),
            }),
            surplus: listed.then_some(surplus.len() as u64),
            held_by_clones: surplus.iter().filter(held).count() as u64,
            listed,
            taken: known.map_or(0, |disk| disk.count_taken),
            deleted: known.map_or(0, |disk| disk.count_deleted),
            trouble: known.and_then(Disk::trouble),
        })
    }

    /// By both clocks.
    fn now(&self) -> Now {
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Now {
            wall_ms: wall.map_or(0, |since| since.as_millis() as u64),
            mono_ms: self.started.elapsed().as_millis() as u64,
        }
    }
}
