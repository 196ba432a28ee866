//! Garbage collection by itself and on request: one cycle at a time, of the store that this host has open.
//!
//! After each cycle, and now and then, the store's device is told of free blocks.
//!
//! A cycle that fails (the store went away, the space in quarantine was needed) leaves nothing half done: the next begins anew.

use super::watermarks::{Crossing, Watermarks, percent_used};
use super::{AbortOnDrop, Host};
use crate::api::gc::{GcEnded, GcPhase, GcRunning, GcStatus, UnmapStatus};
use crate::error::{Failure, Kind, Result};
use crate::units::format_size;
use blockstore::types::BLOCK_SIZE;
use blockstore::{Health, Space, Store, UnmapOptions};
use gc::schedule::{Schedule, Situation};
use gc::{CollectOptions, Collected, Progress, collect};
use parking_lot::Mutex;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

/// How often it is asked whether a cycle is due.
const TICK: Duration = Duration::from_secs(1);
/// How often the store's bitmaps, 32 MiB per TiB, are read to see how much is free: per so many blocks (1 TiB), at least.
const LOOK: Duration = Duration::from_secs(60);
const LOOK_BLOCKS: u64 = 1 << 28;
/// How often the device is told of what was freed without a cycle.
const UNMAP_EVERY: Duration = Duration::from_secs(600);

/// What is known of collection since the agent's start.
#[derive(Debug, Default)]
pub(super) struct Collecting {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: Option<Running>,
    last: Option<GcEnded>,
    began: Option<Instant>,
    /// What the last one gave back, in blocks.
    fruit: Option<u64>,
    ids: u64,
    cycles: u64,
    reclaimed: u64,
    space: Option<(Instant, Space)>,
    /// The device is being told of free blocks.
    unmapping: bool,
    /// When that began last; at first, when it might have.
    unmapped: Option<Instant>,
    /// A cycle has ended since.
    unmap_due: bool,
    watermarks: Watermarks,
}

/// What begins by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Next {
    unmapping: bool,
    cycle: bool,
}

#[derive(Debug)]
struct Running {
    id: u64,
    since_ms: u64,
    began: Instant,
    progress: Arc<Progress>,
}

impl Host {
    /// Begins a cycle, unless one is under way, and tells of it.
    ///
    /// # Errors
    /// The store is away.
    pub fn collect_now(self: &Arc<Self>) -> Result<GcStatus> {
        let store = self.parts.store.get()?;
        if !store.health().reachable {
            let words = "the store does not answer: nothing can be collected; 'ballast status' tells since when";
            return Err(Failure::new(Kind::Unavailable, words));
        }
        self.begin_cycle(store);
        Ok(self.gc_status())
    }

    /// What collection does and did.
    #[must_use]
    pub fn gc_status(&self) -> GcStatus {
        let config = &self.parts.config;
        let state = self.collecting.state.lock();
        let running = state.running.as_ref().map(|running| GcRunning {
            id: running.id,
            phase: match running.progress.is_sweeping() {
                true => GcPhase::Sweeping,
                false => GcPhase::Marking,
            },
            since: running.since_ms,
            pass: running.progress.pass().0,
            passes: running.progress.pass().1,
            nodes: running.progress.nodes(),
            reachable: bytes(running.progress.reached()),
        });
        GcStatus {
            running,
            last: state.last.clone(),
            cycles: state.cycles,
            reclaimed: bytes(state.reclaimed),
            free_below: config.gc.free_below,
            every: config.gc.every.map(|every| every.as_millis() as u64),
            rate: config.gc_rate,
            unmap: self.unmap_status_of(state.unmapping),
            memory: config.gc_memory as u64,
            capacity: state.space.map(|(_, space)| bytes(space.blocks)),
            free: state.space.map(|(_, space)| bytes(space.free)),
            quarantine: self.parts.store.opened().map_or(0, |store| bytes(store.quarantined())),
            computing_sizes: self.sizing.is_computing(),
            used_for: self.sizing.last(),
        }
    }

    /// How much room the store had when it was looked at last, in blocks, and the highest mark that it is over.
    pub(super) fn store_space(&self) -> (Option<Space>, Option<u8>) {
        let state = self.collecting.state.lock();
        let mark = state.watermarks.highest(&self.parts.config.warn_used);
        (state.space.map(|(_, space)| space), mark)
    }

    fn note_space(&self, space: Space) {
        let marks = &self.parts.config.warn_used;
        let crossings = {
            let mut state = self.collecting.state.lock();
            state.space = Some((Instant::now(), space));
            state.watermarks.note(marks, space)
        };
        let (used, free) = (percent_used(space), format_size(bytes(space.free)));
        for crossing in crossings {
            match crossing {
                Crossing::Rose(mark) => tracing::warn!(
                    "the store is {used:.1} % full, over the mark of {mark} %: {free} are free; 'ballast vdi tree --sizes' shows what \
                     deletions free, 'ballast gc run' gives back what nothing holds"
                ),
                Crossing::Fell(mark) => tracing::info!(
                    "the store is {used:.1} % full, below the mark of {mark} % again: {free} are free"
                ),
            }
        }
    }

    /// What the device was told of free blocks.
    #[must_use]
    pub fn unmap_status(&self) -> UnmapStatus {
        let running = self.collecting.state.lock().unmapping;
        self.unmap_status_of(running)
    }

    fn unmap_status_of(&self, running: bool) -> UnmapStatus {
        let config = &self.parts.config;
        let opened = self.parts.store.opened();
        let done = opened.map(|store| store.unmapped());
        let supported = done.as_ref().filter(|_| config.gc_unmap).map(|done| !done.unsupported);
        let done = done.unwrap_or_default();
        UnmapStatus {
            wanted: config.gc_unmap,
            supported,
            running,
            bytes: bytes(done.blocks),
            runs: done.runs,
            failures: done.failures,
            last_failure: done.last_failure,
            extents_left_out: done.extents_left_out,
            last_left_out: done.last_left_out,
            rate: config.gc_unmap_rate,
        }
    }

    fn begin_unmapping(self: &Arc<Self>, store: Arc<Store>) {
        let host = Arc::downgrade(self);
        let rate = Some(self.parts.config.gc_unmap_rate).filter(|rate| *rate > 0);
        self.spawn(async move {
            // A task of its own, so that a panic in it is one failed pass.
            let options = UnmapOptions { rate, run_min: None };
            let pass = async move { store.unmap(options).await };
            let mut pass = AbortOnDrop(tokio::spawn(pass));
            match (&mut pass.0).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::warn!("unmapping free blocks: {error}"),
                Err(panic) => tracing::error!("unmapping free blocks: {panic}"),
            }
            if let Some(host) = host.upgrade() {
                host.collecting.state.lock().unmapping = false;
            }
        });
    }

    fn begin_cycle(self: &Arc<Self>, store: Arc<Store>) {
        let progress = Arc::new(Progress::default());
        {
            let mut state = self.collecting.state.lock();
            if state.running.is_some() {
                return;
            }
            state.ids += 1;
            let (id, began) = (state.ids, Instant::now());
            state.began = Some(began);
            let progress = Arc::clone(&progress);
            state.running = Some(Running { id, since_ms: now_ms(), began, progress });
        }
        let host = Arc::downgrade(self);
        let sizing = Arc::clone(&self.sizing);
        let options = CollectOptions {
            rate: Some(self.parts.config.gc_rate).filter(|rate| *rate > 0),
            memory: self.parts.config.gc_memory as u64,
            ..CollectOptions::default()
        };
        self.spawn(async move {
            // Sizes that are being computed can be computed again.
            let ground = sizing.give_way().await;
            let of_cycle = Arc::clone(&store);
            let cycle = async move { collect(&of_cycle, options, &progress).await };
            // A task of its own, so that a panic in it is one failed cycle.
            let mut cycle = AbortOnDrop(tokio::spawn(cycle));
            let outcome = match (&mut cycle.0).await {
                Ok(outcome) => outcome.map_err(|error| error.to_string()),
                Err(panic) => Err(format!("the agent failed inside: {panic}")),
            };
            drop(ground);
            let space = store.space().await.ok();
            let Some(host) = host.upgrade() else { return };
            host.collecting.end(outcome);
            if let Some(space) = space {
                host.note_space(space);
            }
        });
    }
}

impl Collecting {
    fn end(&self, outcome: Result<Collected, String>) {
        let mut state = self.state.lock();
        let Some(running) = state.running.take() else { return };
        let mut ended = GcEnded {
            id: running.id,
            at: now_ms(),
            took: running.began.elapsed().as_millis() as u64,
            failure: None,
            epoch: None,
            vdis: 0,
            passes: running.progress.pass().0,
            nodes: running.progress.nodes(),
            reachable: bytes(running.progress.reached()),
            reclaimed_data: 0,
            reclaimed_metadata: 0,
            extents_left_out: 0,
            last_left_out: None,
        };
        state.fruit = None;
        match outcome {
            Ok(collected) => {
                let blocks = collected.reclaimed.data + collected.reclaimed.metadata;
                state.cycles += 1;
                state.reclaimed += blocks;
                state.fruit = Some(blocks);
                (ended.epoch, ended.vdis) = (Some(collected.epoch), collected.vdis);
                ended.reclaimed_data = bytes(collected.reclaimed.data);
                ended.reclaimed_metadata = bytes(collected.reclaimed.metadata);
                ended.extents_left_out = collected.extents_left_out;
                ended.last_left_out = collected.last_left_out;
            }
            Err(error) => {
                tracing::warn!("garbage collection: {error}");
                ended.failure = Some(error);
            }
        }
        state.last = Some(ended);
        state.unmap_due = true;
    }

    /// It is time to look at the store's space.
    fn wants_look(&self) -> bool {
        self.state.lock().space.is_none_or(|(at, space)| {
            at.elapsed() >= LOOK * (space.blocks / LOOK_BLOCKS).clamp(1, 1440) as u32
        })
    }

    /// What begins now. Unmapping goes first, since it alone gives a thin device space again: cycles that follow each other
    /// while somebody waits for that would never let it begin.
    fn next(&self, schedule: &Schedule, unmaps: bool, health: &Health, now: Instant) -> Next {
        let unmapping = unmaps && self.begins_unmapping(now);
        Next { unmapping, cycle: self.is_due(schedule, health, now) }
    }

    /// True, and a pass is under way from then on, if the device is to be told of free blocks now. Not beside a cycle: it would leave
    /// out extents that the pass takes up.
    fn begins_unmapping(&self, now: Instant) -> bool {
        let mut state = self.state.lock();
        let since = now - *state.unmapped.get_or_insert(now);
        if state.unmapping || state.running.is_some() || !(state.unmap_due || since >= UNMAP_EVERY)
        {
            return false;
        }
        (state.unmapping, state.unmap_due, state.unmapped) = (true, false, Some(now));
        true
    }

    fn is_due(&self, schedule: &Schedule, health: &Health, now: Instant) -> bool {
        let state = self.state.lock();
        // What a pass finds may do for those who wait for the device, and a cycle would take extents out of its way.
        let of_device = health.waiting_for_device_space > 0 && !state.unmapping;
        let waiting = health.waiting_for_space > 0 || of_device;
        // A store that was not looked at yet is not known to be low.
        let space = state.space.map_or(Space { blocks: 1, free: 1 }, |(_, space)| space);
        let situation = Situation {
            since_last: state.began.map(|began| now.saturating_duration_since(began)),
            reclaimed: state.fruit,
            blocks: space.blocks,
            free: space.free,
            waiting,
        };
        state.running.is_none() && schedule.is_due(&situation)
    }
}

/// Begins cycles when they are due, for as long as the host lives.
pub(super) async fn by_itself(host: Weak<Host>) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let Some(host) = host.upgrade() else { return };
        let Some(store) = host.parts.store.opened() else { continue };
        let health = store.health();
        if !health.reachable {
            continue;
        }
        let collecting = &host.collecting;
        if collecting.wants_look()
            && let Ok(space) = store.space().await
        {
            host.note_space(space);
        }
        let config = &host.parts.config;
        let next = collecting.next(&config.gc, config.gc_unmap, &health, Instant::now());
        if next.unmapping {
            host.begin_unmapping(Arc::clone(&store));
        }
        if next.cycle {
            host.begin_cycle(store);
        }
    }
}

fn bytes(blocks: u64) -> u64 {
    blocks * BLOCK_SIZE as u64
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cycles follow each other closely while somebody waits for space on the device; what gives it space comes between them.
    #[test]
    fn unmapping_comes_between_the_cycles_that_a_full_device_calls_for() {
        let collecting = Collecting::default();
        let schedule = Schedule { free_below: 20, every: None };
        let full = Health { waiting_for_device_space: 1, ..Health::default() };
        let mut now = Instant::now();
        let next = |now| collecting.next(&schedule, true, &full, now);
        assert_eq!(next(now), Next { unmapping: false, cycle: true });
        for _ in 0..3 {
            let running =
                Running { id: 1, since_ms: 0, began: now, progress: Arc::new(Progress::default()) };
            {
                let mut state = collecting.state.lock();
                (state.began, state.running) = (Some(now), Some(running));
            }
            now += Duration::from_secs(600);
            assert_eq!(next(now), Next { unmapping: false, cycle: false }, "one is under way");
            collecting.end(Err("it took long".into()));
            assert_eq!(next(now), Next { unmapping: true, cycle: false });
            assert_eq!(next(now), Next { unmapping: false, cycle: false }, "the pass is under way");
            collecting.state.lock().unmapping = false;
            assert_eq!(next(now), Next { unmapping: false, cycle: true });
        }
    }
}
