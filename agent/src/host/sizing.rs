//! Sizes on request: one computing at a time, below the rate of garbage collection, and given up when a cycle is to begin.
//!
//! A walk and a cycle stand on the same ground, the quarantine of what is freed meanwhile, so there is one of them at a time. The
//! cycle goes first: guests may wait for what it frees. Whoever asked for sizes and goes away ends the walk.

use super::{AbortOnDrop, Host};
use crate::api::sizes::{PinnedBy, SizesReport, SizesRequest, UsedFor};
use crate::error::{Failure, Kind, Result};
use blockstore::VdiInfo;
use gc::sizes::DiskSizes;
use gc::{Progress, SizeOptions, Sizes};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};
use tokio::sync::{OwnedMutexGuard, watch};
use uuid::Uuid;

/// Snapshots that are remembered as those that hold most.
const LARGEST: usize = 10;

/// Who walks over the store's maps.
#[derive(Debug, Default)]
pub(super) struct Sizing {
    /// Held by a walk, or by a cycle.
    ground: Arc<tokio::sync::Mutex<()>>,
    /// Cycles that are under way, or are to begin.
    cycles: watch::Sender<usize>,
    walking: AtomicBool,
    last: Mutex<Option<UsedFor>>,
}

/// The ground is a walk's until this is dropped.
struct WalkGround {
    sizing: Arc<Sizing>,
    _ground: OwnedMutexGuard<()>,
}

impl Drop for WalkGround {
    fn drop(&mut self) {
        self.sizing.walking.store(false, Ordering::Relaxed);
    }
}

/// The ground is a cycle's until this is dropped.
pub(super) struct CycleGround<'a> {
    sizing: &'a Sizing,
    _ground: Option<OwnedMutexGuard<()>>,
}

impl Drop for CycleGround<'_> {
    fn drop(&mut self) {
        self.sizing.cycles.send_modify(|cycles| *cycles -= 1);
    }
}

impl Sizing {
    /// The ground for a walk, if nobody has it.
    fn try_walk(self: &Arc<Self>) -> Option<WalkGround> {
        let ground = Arc::clone(&self.ground).try_lock_owned().ok()?;
        self.walking.store(true, Ordering::Relaxed);
        Some(WalkGround { sizing: Arc::clone(self), _ground: ground })
    }

    /// Ends a walk that is under way, and keeps others from beginning.
    pub(super) async fn give_way(&self) -> CycleGround<'_> {
        self.cycles.send_modify(|cycles| *cycles += 1);
        // From here on it is counted down again, also if this is cut off.
        let mut ground = CycleGround { sizing: self, _ground: None };
        ground._ground = Some(Arc::clone(&self.ground).lock_owned().await);
        ground
    }

    /// Sizes are being computed.
    pub(super) fn is_computing(&self) -> bool {
        self.walking.load(Ordering::Relaxed)
    }

    /// What was found last.
    pub(super) fn last(&self) -> Option<UsedFor> {
        self.last.lock().clone()
    }
}

impl Host {
    /// Computes the sizes of all disks and snapshots.
    ///
    /// # Errors
    /// The store is away; sizes are being computed, or garbage is collected; a map is damaged; the store's.
    pub async fn sizes(&self, request: SizesRequest) -> Result<SizesReport> {
        let store = self.parts.store.get()?;
        if !store.health().reachable {
            let words = "the store does not answer: no sizes can be computed; 'ballast status' tells since when";
            return Err(Failure::new(Kind::Unavailable, words));
        }
        let mut cycles = self.sizing.cycles.subscribe();
        let given_way = || {
            let words = "sizes were not computed: garbage is being collected, which goes first; ask again when \
                         'ballast gc status' says idle";
            Failure::new(Kind::Conflict, words)
        };
        let Some(ground) = self.sizing.try_walk() else {
            if *cycles.borrow() > 0 {
                return Err(given_way());
            }
            let words = "sizes are being computed already: ask again when that has ended";
            return Err(Failure::new(Kind::Conflict, words));
        };
        let rate = Some(self.parts.config.gc_rate).filter(|rate| *rate > 0);
        let (at, began, walked) = (now_ms(), Instant::now(), Arc::clone(&store));
        // A task of its own, so that a panic in it is one failed request. It ends with whoever asked.
        let mut walk = AbortOnDrop(tokio::spawn(async move {
            let _ground = ground;
            gc::sizes(&walked, SizeOptions { rate }, &Progress::default()).await
        }));
        let outcome = tokio::select! {
            biased;
            _ = cycles.wait_for(|cycles| *cycles > 0) => return Err(given_way()),
            outcome = &mut walk.0 => outcome,
        };
        let sizes = match outcome {
            Ok(sizes) => sizes?,
            Err(panic) => {
                let words = format!("sizes were not computed, the agent failed inside: {panic}");
                return Err(Failure::new(Kind::Failed, words));
            }
        };
        let took = began.elapsed().as_millis() as u64;
        // Names are for people: without them UUIDs do.
        let disks = store.list_vdis().await.unwrap_or_default();
        *self.sizing.last.lock() = Some(used_for(at, &sizes, &disks));
        Ok(report(at, took, sizes, &request))
    }
}

/// What was asked for of it.
fn report(at: u64, took: u64, sizes: Sizes, request: &SizesRequest) -> SizesReport {
    let Sizes { store, mut disks, nodes } = sizes;
    let range = request.first_lsn.unwrap_or(0)..=request.last_lsn.unwrap_or(u64::MAX);
    for disk in &mut disks {
        let asked = request.snapshots_of == Some(disk.uuid);
        disk.snapshots
            .retain(|snapshot| snapshot.cloned || (asked && range.contains(&snapshot.lsn.0)));
    }
    SizesReport { at, took, nodes, store, disks }
}

fn used_for(at: u64, sizes: &Sizes, disks: &[VdiInfo]) -> UsedFor {
    let names: HashMap<Uuid, &str> =
        disks.iter().map(|disk| (disk.uuid, disk.name.as_str())).collect();
    let of_disk = |disk: &DiskSizes| {
        let vdi = names.get(&disk.uuid).map_or(disk.uuid.to_string(), |name| (*name).to_owned());
        let pinned = disk.snapshots.iter().map(|snapshot| PinnedBy {
            vdi: vdi.clone(),
            uuid: disk.uuid,
            lsn: snapshot.lsn.0,
            cloned: snapshot.cloned,
            frees: snapshot.sizes.exclusive.total(),
        });
        let mut largest: Vec<PinnedBy> = Vec::new();
        keep_largest(&mut largest, pinned);
        largest
    };
    let mut largest = Vec::new();
    keep_largest(&mut largest, sizes.disks.iter().flat_map(of_disk));
    UsedFor { at, store: sizes.store, largest }
}

/// Adds to those that hold most, of which there are at most [`LARGEST`].
fn keep_largest(largest: &mut Vec<PinnedBy>, more: impl Iterator<Item = PinnedBy>) {
    for snapshot in more.filter(|snapshot| snapshot.frees > 0) {
        let place = largest.partition_point(|other| other.frees >= snapshot.frees);
        if place < LARGEST {
            largest.insert(place, snapshot);
            largest.truncate(LARGEST);
        }
    }
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_cycle_ends_a_walk_and_keeps_others_away_until_its_end() {
        let sizing = Arc::new(Sizing::default());
        let mut cycles = sizing.cycles.subscribe();
        let ground = sizing.try_walk().expect("nobody has it");
        let cycle = tokio::spawn({
            let sizing = Arc::clone(&sizing);
            async move { drop(sizing.give_way().await) }
        });
        cycles.wait_for(|cycles| *cycles == 1).await.expect("told to end");
        assert!(!cycle.is_finished(), "it waits until the walk is over");
        drop(ground);
        cycle.await.expect("the ground");
        assert_eq!(*cycles.borrow(), 0);
        // One that is cut off while it waits leaves nothing behind.
        let ground = sizing.try_walk().expect("nobody has it");
        assert!(
            tokio::time::timeout(std::time::Duration::from_secs(1), sizing.give_way())
                .await
                .is_err()
        );
        drop(ground);
        assert_eq!(*cycles.borrow(), 0);
        assert!(!sizing.is_computing() && sizing.try_walk().is_some() && !sizing.is_computing());
    }

    #[test]
    fn the_largest_are_kept_in_order() {
        let pinned = |lsn: u64, frees| PinnedBy {
            vdi: "a".into(),
            uuid: Uuid::nil(),
            lsn,
            cloned: false,
            frees,
        };
        let mut largest = Vec::new();
        keep_largest(&mut largest, (0..100).map(|lsn| pinned(lsn, lsn * 7 % 100)));
        let frees: Vec<u64> = largest.iter().map(|pinned| pinned.frees).collect();
        assert_eq!(frees, [99, 98, 97, 96, 95, 94, 93, 92, 91, 90]);
    }
}
