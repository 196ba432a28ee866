//! Scrubs by themselves and on request: one pass at a time, over all that the store holds.
//!
//! How far it is is noted in the run directory now and then, so that the next agent goes on there. While the store is away a pass waits;
//! it ends with the agent, or when it is told to.

mod note;
#[cfg(test)]
mod tests;

use super::{AbortOnDrop, Host};
use crate::api::scrub::{ScrubEnded, ScrubRunning, ScrubStatus, ScrubSummary};
use crate::error::{Failure, Kind, Result};
use blockstore::Store;
use blockstore::types::BLOCK_SIZE;
use gc::schedule::ScrubSituation;
use gc::scrub::{Position, Saved};
use gc::{ScrubOptions, ScrubProgress, Scrubbed, scrub};
use note::{Begun, Note};
use parking_lot::Mutex;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::Notify;

/// How often it is asked whether a pass is due.
const TICK: Duration = Duration::from_secs(1);
/// How often it is noted how far it is.
const NOTE_EVERY: Duration = Duration::from_secs(2);

/// What is known of scrubs.
#[derive(Debug, Default)]
pub(super) struct Scrubbing {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: Option<Running>,
    ids: u64,
    /// Read when the store is there for the first time.
    note: Option<Note>,
    noted: Option<Instant>,
}

#[derive(Debug)]
struct Running {
    id: u64,
    /// Milliseconds since 1970.
    began: u64,
    resumed: bool,
    /// Where this agent began it.
    from: Option<Position>,
    progress: Arc<ScrubProgress>,
    stop: Arc<Notify>,
}

impl Running {
    fn begun(&self) -> Begun {
        Begun { at: self.began, saved: self.progress.kept() }
    }

    /// What the next pass goes on with, if this one failed: unless it fails each time at the same place, of which something that is noted
    /// may be the cause.
    fn left(&self) -> Option<Begun> {
        let left = self.begun();
        (left.saved.position != self.from).then_some(left)
    }
}

impl Host {
    /// Begins a pass, unless one is under way, and tells of it.
    ///
    /// # Errors
    /// The store is away.
    pub fn scrub_now(self: &Arc<Self>) -> Result<ScrubStatus> {
        let store = self.parts.store.get()?;
        if !store.health().reachable {
            let words = "the store does not answer: nothing can be verified; 'ballast status' tells since when";
            return Err(Failure::new(Kind::Unavailable, words));
        }
        let left = {
            let mut state = self.scrubbing.state.lock();
            let idle = state.running.is_none();
            state.note(&self.parts.run_dir, &store).begun.clone().filter(|_| idle)
        };
        self.begin_scrub(store, left);
        Ok(self.scrub_status())
    }

    /// Ends the pass that is under way, or gives up one that failed and would go on; the next begins anew.
    ///
    /// # Errors
    /// There is none.
    pub fn stop_scrub(&self) -> Result<ScrubStatus> {
        if !self.scrubbing.state.lock().stop(&self.parts.run_dir) {
            return Err(Failure::new(Kind::NotFound, "no scrub is under way"));
        }
        Ok(self.scrub_status())
    }

    /// What it does and did.
    #[must_use]
    pub fn scrub_status(&self) -> ScrubStatus {
        let config = &self.parts.config;
        let state = self.scrubbing.state.lock();
        let running = state.running.as_ref().map(|running| {
            let Saved { position, scrubbed, .. } = running.progress.saved();
            ScrubRunning {
                id: running.id,
                since: running.began,
                resumed: running.resumed,
                vdi: position.as_ref().map(|at| at.disk),
                snapshot: position.as_ref().and_then(|at| at.snapshot()),
                offset: position.map_or(0, |at| at.block() * BLOCK_SIZE as u64),
                waiting: running.progress.waiting(),
                so_far: scrubbed,
            }
        });
        let wait = config.scrub.wait(&self.scrub_situation(&state)).filter(|_| running.is_none());
        let (space, _) = self.store_space();
        let note = state.note.as_ref();
        let last = note.and_then(|note| note.last.clone());
        let completed = note.and_then(|note| note.completed.clone());
        ScrubStatus {
            running,
            completed: completed.filter(|completed| Some(completed) != last.as_ref()),
            last,
            every: config.scrub.every.map(|every| every.as_millis() as u64),
            next: wait.map(|wait| now_ms() + wait.as_millis() as u64),
            rate: config.scrub_rate,
            used: space.map(|space| space.blocks.saturating_sub(space.free) * BLOCK_SIZE as u64),
        }
    }

    /// For `status`.
    pub(super) fn scrub_summary(&self) -> ScrubSummary {
        let state = self.scrubbing.state.lock();
        let note = state.note.as_ref();
        let last = note.and_then(|note| note.last.as_ref()).map(|last| &last.scrubbed);
        let completed = note.and_then(|note| note.completed.as_ref());
        let whole = completed.map(|completed| &completed.scrubbed);
        let now = state.running.as_ref().map(|running| running.progress.saved().scrubbed);
        let shown = now.as_ref().or(last);
        ScrubSummary {
            running: state.running.is_some(),
            waiting: state.running.as_ref().is_some_and(|r| r.progress.waiting().is_some()),
            verified_bytes: shown.map_or(0, verified_bytes),
            damaged: [now.as_ref(), last, whole]
                .into_iter()
                .flatten()
                .map(Scrubbed::damaged)
                .max()
                .unwrap_or(0),
            unverified: shown.map_or(0, |scrubbed| scrubbed.unverified),
            last_completed: completed.map(|completed| completed.at),
        }
    }

    /// Notes how far it is, for the next agent.
    pub(super) fn keep_scrub(&self) {
        let mut state = self.scrubbing.state.lock();
        if state.running.is_some() {
            state.keep(&self.parts.run_dir);
        }
    }

    fn scrub_situation(&self, state: &State) -> ScrubSituation {
        let last = state.note.as_ref().and_then(|note| note.last.as_ref());
        let since = |ms: u64| Duration::from_millis(now_ms().saturating_sub(ms));
        ScrubSituation {
            since_start: self.started.elapsed(),
            since_begun: last.map(|last| since(last.began)),
            since_failed: last
                .filter(|last| last.failure.is_some() && !last.stopped)
                .map(|last| since(last.at)),
        }
    }

    /// Begins a pass, or goes on with one that was begun.
    fn begin_scrub(self: &Arc<Self>, store: Arc<Store>, begun: Option<Begun>) {
        let (saved, began) = begun.map_or((Saved::default(), None), |b| (b.saved, Some(b.at)));
        let progress = Arc::new(ScrubProgress::from(saved));
        let stop = Arc::new(Notify::new());
        let id = {
            let mut state = self.scrubbing.state.lock();
            if state.running.is_some() {
                return;
            }
            state.note(&self.parts.run_dir, &store);
            state.ids += 1;
            let (id, resumed) = (state.ids, began.is_some());
            let (progress, stop) = (Arc::clone(&progress), Arc::clone(&stop));
            let began = began.unwrap_or_else(now_ms);
            let from = progress.kept().position;
            state.running = Some(Running { id, began, resumed, from, progress, stop });
            state.keep(&self.parts.run_dir);
            id
        };
        tracing::info!(id, resumed = began.is_some(), "a scrub begins");
        let host = Arc::downgrade(self);
        let options =
            ScrubOptions { rate: Some(self.parts.config.scrub_rate).filter(|rate| *rate > 0) };
        self.spawn(async move {
            let read = Arc::clone(&store);
            let pass = async move { scrub(&read, options, &progress).await };
            // A task of its own, so that a panic in it is one failed pass.
            let mut pass = AbortOnDrop(tokio::spawn(pass));
            let outcome = tokio::select! {
                biased;
                // Whoever said so has noted its end.
                () = stop.notified() => return,
                outcome = &mut pass.0 => outcome,
            };
            let outcome = match outcome {
                Ok(Ok(_)) => Ok(()),
                // The agent stops: the next one goes on. A read that panicked says `Closing`, too.
                Ok(Err(_)) if store.is_closing() => return,
                Ok(Err(error)) => Err(error.to_string()),
                Err(panic) => Err(format!("the agent failed inside: {panic}")),
            };
            if let Some(host) = host.upgrade() {
                host.scrubbing.state.lock().end(id, outcome, false, &host.parts.run_dir);
            }
        });
    }
}

impl State {
    /// What is noted of this store.
    fn note(&mut self, run_dir: &std::path::Path, store: &Store) -> &mut Note {
        self.note.get_or_insert_with(|| Note::read(run_dir, store.uuid()))
    }

    /// Notes how far the pass is.
    fn keep(&mut self, run_dir: &std::path::Path) {
        let begun = self.running.as_ref().map(Running::begun);
        if let Some(note) = &mut self.note {
            note.begun = begun;
            note.write(run_dir);
            self.noted = Some(Instant::now());
        }
    }

    /// Gives a pass up; false if there is none.
    fn stop(&mut self, run_dir: &std::path::Path) -> bool {
        if let Some(running) = &self.running {
            running.stop.notify_one();
            let id = running.id;
            self.end(id, Err("it was told to stop".into()), true, run_dir);
            return true;
        }
        let left = self.note.as_mut().and_then(|note| note.begun.take());
        if left.is_some() {
            self.keep(run_dir);
        }
        left.is_some()
    }

    /// What a pass goes on with that begins by itself: at an agent's start whatever was left, later what failed, once it is tried again.
    fn due(&self, first: bool, is_due: bool) -> Option<Option<Begun>> {
        let left = self.note.as_ref().and_then(|note| note.begun.clone());
        (is_due || first && left.is_some()).then_some(left)
    }

    fn end(
        &mut self,
        id: u64,
        outcome: Result<(), String>,
        stopped: bool,
        run_dir: &std::path::Path,
    ) {
        let Some(running) = self.running.take_if(|running| running.id == id) else { return };
        let scrubbed = running.progress.saved().scrubbed;
        let (damaged, unverified) = (scrubbed.damaged(), scrubbed.unverified);
        let (verified, at) = (verified_bytes(&scrubbed), now_ms());
        match &outcome {
            Ok(()) if damaged == 0 => {
                tracing::info!(id, verified, unverified, "a scrub has ended: no damage was found");
            }
            Ok(()) => tracing::error!(
                id,
                verified,
                unverified,
                "a scrub has ended: damage in {damaged} places; 'ballast scrub status' lists it"
            ),
            Err(why) => {
                tracing::warn!(id, verified, damaged, "a scrub did not come to its end: {why}")
            }
        }
        let left = running.left().filter(|_| outcome.is_err() && !stopped);
        if let Some(note) = &mut self.note {
            let (began, failure) = (running.began, outcome.err());
            let ended = ScrubEnded { id, began, at, failure, stopped, scrubbed };
            if ended.failure.is_none() {
                note.completed = Some(ended.clone());
            }
            note.last = Some(ended);
            note.begun = left;
            note.write(run_dir);
        }
    }
}

/// Begins passes when they are due, and goes on with one that an agent before had begun, for as long as the host lives.
pub(super) async fn by_itself(host: Weak<Host>) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut first = true;
    loop {
        tick.tick().await;
        let Some(host) = host.upgrade() else { return };
        let Some(store) = host.parts.store.opened().filter(|store| store.health().reachable) else {
            continue;
        };
        let begun = {
            let mut state = host.scrubbing.state.lock();
            state.note(&host.parts.run_dir, &store);
            let first = std::mem::take(&mut first);
            if state.running.is_some() {
                if state.noted.is_none_or(|noted| noted.elapsed() >= NOTE_EVERY) {
                    state.keep(&host.parts.run_dir);
                }
                continue;
            }
            let is_due = host.parts.config.scrub.is_due(&host.scrub_situation(&state));
            match state.due(first, is_due) {
                Some(begun) => begun,
                None => continue,
            }
        };
        host.begin_scrub(store, begun);
    }
}

/// Bytes that are what they should be.
fn verified_bytes(scrubbed: &Scrubbed) -> u64 {
    (scrubbed.data_blocks + scrubbed.metadata_blocks) * BLOCK_SIZE as u64
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
