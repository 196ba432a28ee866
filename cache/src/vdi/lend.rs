//! What a clone that the store does not know of reads of its parent's read cache (decision 0024): the clone's side asks, the parent's
//! task has its worker say where the blocks lie, as they were at the snapshot, reads them, and gives the places back.
//!
//! The worker keeps those places from being used for anything else meanwhile. One that is gone cannot: what is read then counts for
//! nothing, and is asked for again. So nothing is mended on the way.

use super::Attached;
use super::task::VdiTask;
use crate::error::CacheError;
use crate::format::slot::CloneOrigin;
use crate::link::{Place, ToDisk};
use crate::local::Local;
use blockstore::crc::crc32c;
use blockstore::types::{BLOCK_SIZE, Lba};
use bytes::Bytes;
use hashbrown::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

/// A parent that is not served is asked again after so long.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// How often what cannot be read is read.
const ATTEMPTS: u32 = 3;

/// Blocks of a snapshot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// The snapshot.
    pub of: CloneOrigin,
    /// The first.
    pub lba: Lba,
    /// How many.
    pub blocks: u32,
}

/// What a disk holds of what was wanted.
#[derive(Debug)]
pub(crate) enum Loan {
    /// All of it.
    Blocks(Vec<Bytes>),
    /// Not all of it, or not as it was at the snapshot.
    NotHeld,
    /// All of it, but it could not be read.
    Unreadable,
}

/// Whom a clone asks.
#[derive(Debug)]
pub(super) struct Lender {
    among: Weak<Attached>,
    of: CloneOrigin,
}

impl Lender {
    /// Reads blocks of the snapshot; waits for ever if they are not held.
    pub async fn read(&self, lba: Lba, blocks: u32) -> Vec<Option<Bytes>> {
        let parent = self.of.snapshot.vdi;
        let mut left = ATTEMPTS;
        while let Some(attached) = self.among.upgrade() {
            let handle = attached.lock().get(&parent).cloned();
            drop(attached);
            if let Some(handle) = handle {
                match handle.lend(parent, Wanted { of: self.of, lba, blocks }).await {
                    Ok(Loan::Blocks(lent)) => return lent.into_iter().map(Some).collect(),
                    Ok(Loan::Unreadable) if left > 1 => left -= 1,
                    Ok(Loan::NotHeld | Loan::Unreadable) => break,
                    // It is not served, or its worker was replaced.
                    Err(_) => {}
                }
            }
            tokio::time::sleep(ASK_AGAIN_AFTER).await;
        }
        std::future::pending().await
    }
}

/// What is lent, and to whom.
#[derive(Debug, Default)]
pub(super) struct Loans {
    next: u64,
    /// The worker was asked where it lies.
    asked: HashMap<u64, oneshot::Sender<Loan>>,
    /// The worker was asked for its holes.
    holes: HashMap<u64, oneshot::Sender<Vec<(Lba, u64)>>>,
    reading: JoinSet<()>,
    /// That of the worker which keeps what is being read.
    is_gone: Arc<AtomicBool>,
}

impl Loans {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// What it was to answer, it will not, and what it kept for readers, it does not any more.
    pub fn worker_is_gone(&mut self) {
        self.is_gone.store(true, Ordering::Release);
        self.is_gone = Arc::default();
        self.asked.clear();
        self.holes.clear();
    }

    pub fn tell_holes(&mut self, id: u64, holes: Vec<(Lba, u64)>) {
        if let Some(reply) = self.holes.remove(&id) {
            let _ = reply.send(holes);
        }
    }

    /// Nobody waits for what is read any more when this returns.
    pub async fn end(&mut self) {
        self.worker_is_gone();
        self.reading.shutdown().await;
    }
}

impl VdiTask {
    /// Of a clone that waits for the store.
    pub(super) fn lender(&self) -> Option<Lender> {
        let alone = !self.p.backing.is_joined() && self.through.is_none();
        let of = self.p.record.origin.filter(|_| alone)?;
        Some(Lender { among: Weak::clone(&self.p.ground.attached), of })
    }

    fn has_worker(&self) -> bool {
        !self.released && self.log_failure.is_none()
    }

    pub(super) fn lend(&mut self, wanted: &Wanted, reply: oneshot::Sender<Loan>) {
        while self.loans.reading.try_join_next().is_some() {}
        let Wanted { of, lba, blocks } = *wanted;
        // Another log of this disk may have another one at that LSN; and what the store has gone beyond may have come back from it.
        let is_it = self.p.desk.pending().time_of(of.snapshot.lsn) == Some(of.time_ms);
        if !is_it || self.through.is_some() {
            let _ = reply.send(Loan::NotHeld);
            return;
        }
        let id = self.loans.number();
        let lend = ToDisk::Lend { id, lba, blocks, lsn: of.snapshot.lsn };
        // Whoever asks sees that there is no answer if there is no worker.
        if self.has_worker() && self.p.sender.send(lend) {
            self.loans.asked.insert(id, reply);
        }
    }

    /// The worker has said where it lies.
    pub(super) fn lent(&mut self, id: u64, places: Option<Vec<Place>>) {
        let Some(reply) = self.loans.asked.remove(&id) else {
            self.p.sender.send(ToDisk::GiveBack { id });
            return;
        };
        let Some(places) = places else {
            let _ = reply.send(Loan::NotHeld);
            return;
        };
        let (local, sender) = (Arc::clone(&self.p.ground.local), self.p.sender.clone());
        let (is_gone, name) = (Arc::clone(&self.loans.is_gone), self.p.record.name.clone());
        self.loans.reading.spawn(async move {
            let read = read(&local, &places).await;
            let was_kept = !is_gone.load(Ordering::Acquire);
            sender.send(ToDisk::GiveBack { id });
            let loan = read.map_or_else(
                |error| {
                    if was_kept {
                        tracing::warn!(vdi = %name, %error, "what is held for a clone cannot be read");
                    }
                    Loan::Unreadable
                },
                Loan::Blocks,
            );
            if was_kept {
                let _ = reply.send(loan);
            }
        });
    }

    /// Tells what the worker says; nothing if there is none.
    pub(super) fn ask_holes(&mut self, reply: oneshot::Sender<Vec<(Lba, u64)>>) {
        let id = self.loans.number();
        if self.has_worker() && self.p.sender.send(ToDisk::TellHoles { id }) {
            self.loans.holes.insert(id, reply);
        }
    }
}

/// Blocks, each checked; neighbours on the device are read together.
async fn read(local: &Local, places: &[Place]) -> Result<Vec<Bytes>, CacheError> {
    const BLOCK: u64 = BLOCK_SIZE as u64;
    let mut blocks = Vec::with_capacity(places.len());
    for run in places.chunk_by(|a, b| a.offset + BLOCK == b.offset) {
        let bytes = local.look(run[0].offset, run.len() * BLOCK_SIZE, |_| true).await?.freeze();
        for (n, place) in run.iter().enumerate() {
            let block = bytes.slice(n * BLOCK_SIZE..(n + 1) * BLOCK_SIZE);
            let is_good = crc32c(&block) == place.crc;
            blocks.push(if is_good { block } else { read_block(local, place).await? });
        }
    }
    Ok(blocks)
}

/// From whichever leg has it.
async fn read_block(local: &Local, place: &Place) -> Result<Bytes, CacheError> {
    let is_good = |bytes: &[u8]| crc32c(bytes) == place.crc;
    let bytes = local.look(place.offset, BLOCK_SIZE, is_good).await?;
    if is_good(&bytes) {
        return Ok(bytes.freeze());
    }
    Err(CacheError::LogChanged {
        path: local.path.clone(),
        segment: local.geometry.segment_of(local.geometry.block_at(place.offset)).0,
    })
}
