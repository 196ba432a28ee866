//! Brings disks back whose worker died.
//!
//! A worker that panics costs its disk a pause: the log is recovered as at a start, and the front end reconnects. One
//! that dies again and again is left down, since whatever kills it comes back with the guest's request.

use super::Host;
use super::served::{Served, Way};
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::task::{AbortHandle, JoinSet};
use uuid::Uuid;

/// How often workers are looked at.
const PERIOD: Duration = Duration::from_millis(250);
/// A worker may die so often within [`WINDOW`].
const DEATHS_MAX: usize = 5;
const WINDOW: Duration = Duration::from_secs(600);

/// Watches all disks for as long as the host lives.
pub async fn workers(host: Weak<Host>) {
    let mut deaths: BTreeMap<Uuid, Deaths> = BTreeMap::new();
    let mut of_snapshots: BTreeMap<(Uuid, u64), Deaths> = BTreeMap::new();
    // One that waits for a transition of its disk holds up no other disk.
    let (mut revivals, mut under_way) = (JoinSet::new(), BTreeMap::<Uuid, AbortHandle>::new());
    let mut tick = tokio::time::interval(PERIOD);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let Some(host) = host.upgrade() else { return };
        let disks: Vec<_> = host.served.lock().values().cloned().collect();
        deaths.retain(|uuid, _| disks.iter().any(|disk| disk.uuid == *uuid));
        while revivals.try_join_next().is_some() {}
        under_way.retain(|_, revival| !revival.is_finished());
        for disk in disks.into_iter().filter(|disk| has_died(disk)) {
            if under_way.contains_key(&disk.uuid) {
                continue;
            }
            if deaths.entry(disk.uuid).or_default().may_come_back(Instant::now()) {
                tracing::warn!(vdi = %disk.name, "its worker died: bringing the disk back");
                let parts = Arc::clone(&host.parts);
                let uuid = disk.uuid;
                let revival = revivals.spawn(async move {
                    // Its state tells how it went.
                    let _ = disk.bring_up(&parts, None, Way::Again).await;
                });
                under_way.insert(uuid, revival);
            }
        }
        for snapshot in host.dead_snapshots() {
            if of_snapshots.entry(snapshot).or_default().may_come_back(Instant::now()) {
                host.revive_snapshot(snapshot).await;
            }
        }
    }
}

fn has_died(disk: &Served) -> bool {
    disk.stats().is_some_and(|stats| stats.worker_failed)
}

/// When a disk's worker died lately.
#[derive(Debug, Default)]
struct Deaths {
    at: Vec<Instant>,
}

impl Deaths {
    /// Notes a death; false once there were too many.
    fn may_come_back(&mut self, now: Instant) -> bool {
        self.at.retain(|death| now.duration_since(*death) < WINDOW);
        if self.at.len() >= DEATHS_MAX {
            return false;
        }
        self.at.push(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_dies_again_and_again_stays_down_for_a_while() {
        let (mut deaths, start) = (Deaths::default(), Instant::now());
        assert!((0..DEATHS_MAX as u32).all(|n| deaths.may_come_back(start + PERIOD * n)));
        assert!(!deaths.may_come_back(start + PERIOD * 10));
        assert!(deaths.may_come_back(start + WINDOW + PERIOD));
    }
}
