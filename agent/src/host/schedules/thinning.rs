//! Deletes the snapshots that no rule of a schedule keeps any more, and asks the store which there are.
//!
//! In the background of everything: one request to the store at a time for all disks, of a bounded number of snapshots, and
//! a pause after each that is longer than it took. A store that is away is waited for quietly.

use super::super::Host;
use super::super::served::Served;
use super::{Disk, Listing};
use crate::api::VdiState;
use crate::error::{Failure, Kind, Result};
use blockstore::Store;
use blockstore::schedule::{is_automatic, is_cut};
use blockstore::snapshots::Page;
use blockstore::types::Lsn;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// How often it is looked for something to do.
const TICK: Duration = Duration::from_secs(1);
/// Most snapshots of one request.
const BATCH_MAX: usize = 256;
/// As many of a cadence, which lie side by side: few leaves of the list are read for them.
const CUTS_MAX: usize = 2048;
/// The pause after a request is so many times as long as that took.
const PAUSE_FACTOR: u32 = 4;
/// Pause after one that failed, for its disk.
const FAILED_PAUSE: Duration = Duration::from_secs(10);
/// How often snapshots on which clones hang are looked at.
const HELD_PAUSE: Duration = Duration::from_secs(60);
/// Snapshots of a page of the store's list.
const PAGE: usize = 4096;

/// Thins, for as long as the host lives.
pub(in crate::host) async fn by_itself(host: Weak<Host>) {
    loop {
        let Some(present) = host.upgrade() else { return };
        let began = Instant::now();
        let worked = present.thin_one().await;
        let schedules = Arc::clone(&present.schedules);
        drop(present);
        // Looking for it takes long, too, if there is much to look through.
        tokio::time::sleep(began.elapsed() * PAUSE_FACTOR).await;
        if worked {
            continue;
        }
        tokio::select! {
            () = tokio::time::sleep(TICK) => {}
            () = schedules.surplus.notified() => {}
        }
    }
}

impl Host {
    /// Lists or thins the snapshots of the disk that has waited longest. False: there is nothing to do.
    async fn thin_one(&self) -> bool {
        let Some(store) = self.parts.store.opened().filter(|store| store.health().reachable) else {
            // Nobody waits for the list of a store that is away.
            return false;
        };
        let Some((served, surplus)) = self.next_to_thin() else { return false };
        let result = match surplus {
            None => self.list_schedule(&store, &served).await,
            Some(surplus) => self.thin(&store, &served, surplus).await,
        };
        let mut disks = self.schedules.disks.lock();
        let Some(disk) = disks.get_mut(&served.uuid).filter(|disk| disk.is_of(&served)) else {
            return true;
        };
        disk.thinned_at = Instant::now();
        match result {
            Ok(()) => disk.thin_failure = None,
            Err(failure) => {
                if disk.listing == Listing::Untried {
                    disk.listing = Listing::Failed;
                }
                disk.thin_after = Instant::now() + FAILED_PAUSE;
                tracing::debug!(vdi = %served.name, "schedule: {failure}");
                // A store that is away says so itself, and is waited for.
                if failure.kind != Kind::Unavailable {
                    disk.thin_failure = Some(format!("old snapshots cannot be deleted: {failure}"));
                }
            }
        }
        true
    }

    /// A disk, and what to delete of it; none: its list is to be read.
    fn next_to_thin(&self) -> Option<(Arc<Served>, Option<Vec<Lsn>>)> {
        let now = Instant::now();
        let mut disks = self.schedules.disks.lock();
        let mut waiting: Vec<&mut Disk> =
            disks.values_mut().filter(|disk| disk.thin_after <= now).collect();
        waiting.sort_by_key(|disk| disk.thinned_at);
        waiting.into_iter().find_map(|disk| {
            let served = disk.served.upgrade()?;
            let drilled = served.drill.until_ms().is_some();
            if drilled || !served.is_joined() || served.view().state != VdiState::Running {
                return None;
            }
            if disk.listing != Listing::Done {
                return Some((served, None));
            }
            let status = self.parts.cache.vdi_status(served.uuid)?;
            if disk.held_until <= now {
                disk.held.clear();
            }
            disk.learn_made(&self.parts.cache, served.uuid);
            let spared = self.schedules.sparing.of(served.uuid);
            // What is in the log only cannot be deleted yet.
            let may_go = |lsn: &u64| {
                *lsn <= status.committed_lsn && !disk.held.contains(lsn) && !spared.contains(lsn)
            };
            let schedule = status.policy.schedule;
            let taken = schedule.surplus(&disk.taken).into_iter().filter(may_go).take(BATCH_MAX);
            let cut = schedule.surplus_cuts(&disk.cut).filter(may_go).take(CUTS_MAX);
            let surplus: Vec<Lsn> = taken.chain(cut).map(Lsn).collect();
            if surplus.is_empty() {
                disk.thin_failure = None;
                return None;
            }
            Some((served, Some(surplus)))
        })
    }

    async fn thin(&self, store: &Arc<Store>, served: &Arc<Served>, lsns: Vec<Lsn>) -> Result<()> {
        let thinned = store.thin_snapshots(served.uuid, lsns.clone()).await?;
        let mut disks = self.schedules.disks.lock();
        let Some(disk) = disks.get_mut(&served.uuid).filter(|disk| disk.is_of(served)) else {
            return Ok(());
        };
        disk.count_deleted += thinned.deleted.len() as u64;
        if disk.held.is_empty() {
            disk.held_until = Instant::now() + HELD_PAUSE;
        }
        disk.held.extend(thinned.held.iter().map(|lsn| lsn.0));
        // What was neither deleted nor is held is no longer the schedule's.
        for lsn in lsns.iter().filter(|lsn| !thinned.held.contains(lsn)) {
            disk.taken.remove(&lsn.0);
            disk.cut.remove(&lsn.0);
        }
        Ok(())
    }

    /// Learns which snapshots the store has. One that goes from the log to the store meanwhile was known from the log.
    async fn list_schedule(&self, store: &Arc<Store>, served: &Arc<Served>) -> Result<()> {
        {
            let mut disks = self.schedules.disks.lock();
            let disk = disks.get_mut(&served.uuid).filter(|disk| disk.is_of(served));
            let Some(disk) = disk else { return Ok(()) };
            disk.begin_listing();
        }
        let vdi = served.uuid.to_string();
        let (mut taken, mut cut) = (Vec::new(), Vec::new());
        let mut page = Page { newest_first: true, beyond: None, limit: PAGE };
        loop {
            let list = store.snapshots(&vdi, page).await.map_err(Failure::from)?;
            let Some(last) = list.last() else { break };
            page.beyond = Some(last.lsn);
            let ours = list.iter().filter(|snapshot| is_automatic(snapshot.label.as_str()));
            for snapshot in ours {
                let of = if is_cut(snapshot.label.as_str()) { &mut cut } else { &mut taken };
                of.push((snapshot.lsn.0, snapshot.time_ms));
            }
        }
        let mut disks = self.schedules.disks.lock();
        if let Some(disk) = disks.get_mut(&served.uuid).filter(|disk| disk.is_of(served)) {
            disk.listed(taken, cut);
        }
        drop(disks);
        self.schedules.changed.notify_one();
        Ok(())
    }
}
