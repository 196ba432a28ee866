//! What a guest asks for, and what the model knows of it.

use super::{Open, Worker};
use crate::model::PER_BLOCK;
use crate::reading::Reading;
use blockstore::types::SECTOR_SIZE;
use cache::disk::{Staged, Tag};
use rand::Rng;
use rand::rngs::SmallRng;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// Requests that a guest has under way at once.
pub(super) const DEPTH: usize = 24;

/// What a guest asks for.
#[derive(Clone, Debug)]
pub enum Request {
    Write { sector: u64, sectors: u64, stamp: u32 },
    Zero { sector: u64, sectors: u64, discard: bool },
    Flush,
    Read { sector: u64, sectors: u64 },
}

/// How a guest behaves.
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    /// Longest pause between bursts, milliseconds.
    pub think_ms: u64,
    /// Requests in a burst at most.
    pub burst: u32,
    /// Of 100 requests: writes, zeroings, flushes; the rest reads.
    pub mix: [u32; 3],
    /// Sectors in a large write at most.
    pub large: u64,
    /// Of 20 writes and reads: those that are large, and those of less than a block. The others are of one block.
    pub larges: u32,
    pub parts: u32,
}

impl Worker {
    /// The whole disk is read before anything else happens.
    pub fn verify_all(&mut self) {
        let sectors = self.model.lock().sectors();
        let mut sector = 0;
        while sector < sectors {
            let len = self.rng.random_range(1..=256.min(sectors - sector));
            self.verify.push_back(Request::Read { sector, sectors: len });
            sector += len;
        }
    }

    /// The machine was stopped: what nobody works on any more ends here, unanswered.
    fn end_session(&mut self) {
        self.stalled.clear();
        self.verify.clear();
        self.fetches.clear();
        self.reads.retain(|_, reading| reading.has_pins());
        self.reads.values_mut().for_each(Reading::end_session);
    }

    pub(super) fn guest(&mut self) -> bool {
        if self.exit.as_ref().is_some_and(|exit| exit.guest_is_gone()) {
            self.end_session();
        }
        let bytes = self.attached.disk.size_bytes();
        if bytes > self.model.lock().sectors() * SECTOR_SIZE as u64 {
            self.model.lock().grow(bytes);
        }
        if Instant::now() < self.next_burst {
            return false;
        }
        let mut any = false;
        for _ in 0..self.rng.random_range(1..=self.habits.burst) {
            if !self.wants() || self.under_way() >= DEPTH {
                break;
            }
            any = true;
            let request = match self.verify.pop_front() {
                Some(read) => read,
                None => {
                    self.budget -= 1;
                    self.imagine()
                }
            };
            self.submit(request);
        }
        let think = match self.rng.random_range(0..1000) {
            0 => self.rng.random_range(0..5000),
            1..300 => self.rng.random_range(0..=self.habits.think_ms),
            _ => 0,
        };
        self.next_burst = Instant::now() + Duration::from_millis(think);
        any
    }

    fn imagine(&mut self) -> Request {
        let total = self.model.lock().sectors();
        let rng = &mut self.rng;
        let Habits { larges, parts, .. } = self.habits;
        let length = |rng: &mut SmallRng, large: u64| match rng.random_range(0..20) {
            kind if kind < larges => rng.random_range(1..=large),
            kind if kind < larges + parts => rng.random_range(1..PER_BLOCK),
            _ => PER_BLOCK,
        };
        let place = |rng: &mut SmallRng, len: u64| {
            let at = rng.random_range(0..=total - len);
            if len == PER_BLOCK { at / PER_BLOCK * PER_BLOCK } else { at }
        };
        let [writes, zeros, flushes] = self.habits.mix;
        let kind = rng.random_range(0..100);
        if kind < writes {
            let sectors = length(rng, self.habits.large.min(total));
            let sector = place(rng, sectors);
            Request::Write { sector, sectors, stamp: self.model.lock().stamp() }
        } else if kind < writes + zeros {
            let sectors = rng.random_range(1..=200.min(total));
            let sector = rng.random_range(0..=total - sectors);
            Request::Zero { sector, sectors, discard: rng.random() }
        } else if kind < writes + zeros + flushes {
            Request::Flush
        } else {
            let sectors = length(rng, 128.min(total));
            Request::Read { sector: place(rng, sectors), sectors }
        }
    }

    fn submit(&mut self, request: Request) {
        self.orders.requests.fetch_add(1, Ordering::Relaxed);
        let tag = self.next;
        self.next += 1;
        if self.rng.random_range(0..500) == 0 {
            self.switches += 1;
            self.through = self.through.is_none().then_some(self.switches);
            self.attached.disk.set_write_through(self.through.is_some());
        }
        match request {
            Request::Read { sector, sectors } => {
                let model = self.model.lock();
                let sure = if self.written_through { model.acked } else { model.last_lsn() };
                let before = model.at(sure, sector..sector + sectors);
                let reading = Reading::new(tag, sector, sectors, before, sure);
                drop(model);
                self.reads.insert(tag, reading);
                self.plan_read(tag);
            }
            Request::Flush => {
                let lsn = self.model.lock().last_lsn();
                self.open
                    .insert(tag, Open { lsn, flush: true, since: Instant::now(), through: None });
                self.attached.disk.flush(tag);
            }
            other if self.stalled.is_empty() => self.stage(tag, other),
            other => self.stalled.push_back((tag, other)),
        }
    }

    /// Stages a change, or lets the rest of it wait for space.
    pub(super) fn stage(&mut self, tag: Tag, request: Request) {
        match request {
            Request::Write { sector, sectors, stamp } => {
                let before = self.attached.disk.staged_lsn().0;
                let mut model = self.model.lock();
                let mut parts = Vec::new();
                let len = sectors as usize * SECTOR_SIZE;
                let staged = self.attached.disk.write(tag, sector, len, &mut |at, into| {
                    let first = sector + (at / SECTOR_SIZE) as u64;
                    parts.push(first..first + (into.len() / SECTOR_SIZE) as u64);
                    for (at, out) in (first..).zip(into.chunks_exact_mut(SECTOR_SIZE)) {
                        model.fill_sector(stamp, at, out);
                    }
                });
                // Snapshots that waited for room came first.
                let staged_now = self.attached.disk.staged_lsn().0 - before;
                (parts.len() as u64..staged_now).for_each(|_| model.push_cut());
                for part in parts {
                    model.push(part, stamp);
                }
                drop(model);
                match staged {
                    Staged::Part(bytes) => {
                        let done = (bytes / SECTOR_SIZE) as u64;
                        let (sector, sectors) = (sector + done, sectors - done);
                        self.stalled.push_front((tag, Request::Write { sector, sectors, stamp }));
                    }
                    staged => self.staged(tag, staged, true),
                }
            }
            Request::Zero { sector, sectors, discard } => {
                let before = self.attached.disk.staged_lsn().0;
                let staged = self.attached.disk.zero(tag, sector, sectors, discard);
                let staged_now = self.attached.disk.staged_lsn().0 - before;
                let (from, to) = if discard {
                    (sector.next_multiple_of(PER_BLOCK), (sector + sectors) / PER_BLOCK * PER_BLOCK)
                } else {
                    (sector, sector + sectors)
                };
                let own = u64::from(staged == Staged::All && from < to);
                (own..staged_now).for_each(|_| self.model.lock().push_cut());
                match staged {
                    Staged::Part(_) => self.stalled.push_front((tag, request)),
                    staged => {
                        if staged == Staged::All && from < to {
                            self.model.lock().push(from..to, 0);
                        }
                        self.staged(tag, staged, from < to);
                    }
                }
            }
            Request::Flush | Request::Read { .. } => unreachable!("only changes are staged"),
        }
    }

    fn staged(&mut self, tag: Tag, staged: Staged, changes: bool) {
        let last = self.model.lock().last_lsn();
        assert_eq!(last, self.attached.disk.staged_lsn().0, "INV-LOG-1: one LSN for each part");
        // A discard of less than a block changes nothing and takes no LSN.
        let lsn = if changes { last } else { 0 };
        if staged == Staged::Failed {
            self.log_failed = true;
            self.excuse(self.excuses.write_errors, "a write failed");
        } else {
            let since = Instant::now();
            self.open.insert(tag, Open { lsn, flush: false, since, through: self.through });
        }
    }

    /// What was given an LSN, and not to a guest's change, is a snapshot.
    pub(super) fn note_cuts(&mut self) {
        let mut model = self.model.lock();
        (model.last_lsn()..self.attached.disk.staged_lsn().0).for_each(|_| model.push_cut());
    }
}
