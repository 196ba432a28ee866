//! Takes the snapshots that schedules want, in the log, with the store there or away.
//!
//! Of one disk one at a time: while it waits, for room in a full log or for a device, nothing else of that schedule is asked for, so
//! that whatever was missed is made up for by one snapshot.

use super::super::Host;
use super::super::served::Served;
use super::{Disk, Listing};
use crate::api::VdiState;
use crate::error::Result;
use blockstore::SnapshotLabel;
use blockstore::schedule::{Now, Plan, label, wanting};
use cache::{SnapshotTaken, VdiStatus};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// How often it is looked which disks there are.
const TICK: Duration = Duration::from_secs(1);
/// So long the store's list of snapshots is waited for before it is decided what is due without it.
const LIST_WAIT: Duration = Duration::from_secs(5);
/// Pause after one that failed.
const PAUSE: Duration = Duration::from_secs(5);

/// Takes what is due, for as long as the host lives.
pub(in crate::host) async fn by_itself(host: Weak<Host>) {
    loop {
        let Some(present) = host.upgrade() else { return };
        let wait = present.take_what_is_due();
        let schedules = Arc::clone(&present.schedules);
        drop(present);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = schedules.changed.notified() => {}
        }
    }
}

impl Host {
    /// Asks for all snapshots that are due; returns how long there is nothing to do if nothing changes.
    pub(super) fn take_what_is_due(&self) -> Duration {
        let served: Vec<_> = self.served.lock().values().cloned().collect();
        let store_answers = self.parts.store.health().reachable;
        let now = self.now();
        let (mut wait, mut wanted, mut pressed) = (TICK, Vec::new(), Vec::new());
        let mut disks = self.schedules.disks.lock();
        disks.retain(|_, disk| served.iter().any(|served| disk.is_of(served)));
        for served in served {
            let status = self.parts.cache.vdi_status(served.uuid);
            let Some(status) = status.filter(|_| served.view().state == VdiState::Running) else {
                // What recovery finds in its log is learnt when it is back.
                disks.entry(served.uuid).and_modify(|disk| disk.unsure = true);
                continue;
            };
            if status.policy.schedule.is_none() {
                disks.remove(&served.uuid);
                continue;
            }
            let disk = disks.entry(served.uuid).or_insert_with(|| Disk::new(&served));
            if std::mem::take(&mut disk.unsure) {
                disk.learn(self.parts.cache.pending_snapshots(served.uuid));
            }
            disk.learn_made(&self.parts.cache, served.uuid);
            let told = disk.press(status.policy.schedule.cadence());
            pressed.extend(told.map(|told| (served.uuid, told)));
            wait = wait.min(disk.plan(&status, store_answers, now));
            if let Some(label) = disk.take(&status, now) {
                wanted.push((served, label));
            }
        }
        drop(disks);
        for (vdi, told) in pressed {
            self.tell_pressed(vdi, told);
        }
        for (served, label) in wanted {
            self.ask(served, label);
        }
        wait
    }

    fn ask(&self, served: Arc<Served>, label: SnapshotLabel) {
        let parts = Arc::clone(&self.parts);
        let schedules = Arc::clone(&self.schedules);
        self.spawn(async move {
            let result = served.snapshot(&parts, label).await;
            let mut disks = schedules.disks.lock();
            if let Some(disk) = disks.get_mut(&served.uuid).filter(|disk| disk.is_of(&served)) {
                disk.answered(&served, result);
            }
            drop(disks);
            // What became due meanwhile.
            schedules.changed.notify_one();
            schedules.surplus.notify_one();
        });
    }
}

impl Disk {
    /// Sees to it that there is a plan, and returns how long nothing is due by it.
    pub(super) fn plan(&mut self, status: &VdiStatus, store_answers: bool, now: Now) -> Duration {
        let schedule = status.policy.schedule;
        if self.plan.as_ref().is_none_or(|plan| plan.schedule() != schedule) {
            let may_be_listed = store_answers && self.since.elapsed() < LIST_WAIT;
            if self.listing == Listing::Untried && may_be_listed {
                return Duration::from_millis(50);
            }
            let newest = self.taken.last_key_value().map(|(_, time)| *time);
            self.plan = Some(Plan::new(schedule, newest, now));
        }
        let wait = self.plan.as_ref().and_then(|plan| plan.wait_ms(now)).map(Duration::from_millis);
        match wait {
            _ if self.asked.is_some() => TICK,
            Some(wait) => wait.max(self.take_after.saturating_duration_since(Instant::now())),
            None => TICK,
        }
    }

    /// The label of a snapshot that is to be taken now, if one is.
    pub(super) fn take(&mut self, status: &VdiStatus, now: Now) -> Option<SnapshotLabel> {
        if self.asked.is_some() || self.take_after > Instant::now() {
            return None;
        }
        let plan = self.plan.as_mut()?;
        let due = plan.due(now);
        let Some(longest) = wanting(&due, &self.taken, status.last_lsn).last().copied() else {
            plan.skipped(now);
            if !due.is_empty() {
                // The last one is there, whatever its taking said.
                self.take_failure = None;
            }
            return None;
        };
        plan.taken(now, status.snapshots_pending as usize);
        self.asked = Some(Instant::now());
        Some(label(longest, now.wall_ms))
    }

    pub(super) fn answered(&mut self, served: &Served, result: Result<SnapshotTaken>) {
        self.asked = None;
        match result {
            Ok(taken) => {
                self.taken.insert(taken.lsn.0, taken.time_ms);
                self.count_taken += 1;
                if self.take_failure.take().is_some() {
                    // One that failed may be in the store by now, and nobody was told.
                    self.unsure = true;
                    self.list_again();
                    tracing::info!(vdi = %served.name, "its schedule takes snapshots again");
                }
            }
            Err(failure) => {
                // It is due as before, and may have been taken all the same.
                (self.plan, self.unsure) = (None, true);
                self.take_after = Instant::now() + PAUSE;
                let words = format!("no snapshot could be taken: {failure}");
                if self.take_failure.is_none() {
                    tracing::warn!(vdi = %served.name, "schedule: {words}");
                }
                self.take_failure = Some(words);
            }
        }
    }
}
