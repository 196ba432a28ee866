//! Asking the device: waiting while it is away, and telling that from blocks which it does not give.
//!
//! After each error something else is asked for, until the device gives it: blocks that are then not given again, and again, are
//! bad. Whoever asks for a sector at which the target drops the session takes the session from guests as well. So it is asked for a few
//! times in a pass, whoever comes by it, and of a run of such sectors only the first ones are. And each block of a bad region that was tried
//! as long as the first one of it would keep a pass for days.

use super::looking::{BATCH, Looking, Whose};
use blockstore::format::pointer::Pointer;
use blockstore::sabotage::{self, Bug};
use blockstore::types::{BLOCK_SIZE, Birth, Gba};
use blockstore::{Result, StoreError, StoreErrorKind};
use bytes::Bytes;
use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::time::Duration;
use tokio::time::Instant;
use uuid::Uuid;

/// Between two tries while the store does not answer.
const AWAY_MIN: Duration = Duration::from_millis(500);
const AWAY_MAX: Duration = Duration::from_secs(10);
/// How often what the device does not give is asked for while it gives other things.
const STRIKES: u32 = 3;
const STRIKE_PAUSE: Duration = Duration::from_millis(50);
/// So many blocks behind a bad one, one is believed to be bad at its first error by itself.
const NEAR: u64 = 16;
/// Blocks in a row that do not answer, behind which no other is asked for by itself.
const SILENT_RUN: u32 = 8;
/// Blocks that are remembered as not answering; with more, those before are forgotten.
const SILENT_MAX: usize = 4096;
/// Searches of one list of snapshots that got no answer, after which it is not searched any more.
const SILENT_SEARCHES: usize = 16;

/// Why a block was not had.
#[derive(Debug)]
pub(super) enum Bad {
    /// It is not what its pointer says.
    Mismatch(StoreError),
    /// The device reports an error for it, each time.
    Unreadable(StoreError),
    /// The device does not answer for it, though it does for others.
    NoAnswer(StoreError),
}

impl Bad {
    pub(super) fn error(&self) -> &StoreError {
        match self {
            Self::Mismatch(error) | Self::Unreadable(error) | Self::NoAnswer(error) => error,
        }
    }
}

/// True of what the device, or its absence, is the cause.
fn is_of_device(error: &StoreError) -> bool {
    matches!(error.kind, StoreErrorKind::Unreachable | StoreErrorKind::Device)
}

/// What did not answer in this run, while the device answered for other things. It is not asked for again.
#[derive(Debug, Default)]
pub(super) struct Silent {
    /// Writes, and what was said.
    blocks: HashMap<(Gba, Birth), String>,
    /// Slots of the registry.
    pub(super) records: HashSet<u32>,
    /// Searches of disks' lists of snapshots.
    searches: HashMap<Uuid, HashSet<Whose>>,
}

impl Silent {
    fn block(&self, pointer: Pointer) -> Option<StoreError> {
        let words = self.blocks.get(&(pointer.gba, pointer.birth))?;
        let object = format!("block {}", pointer.gba);
        Some(StoreError::new(StoreErrorKind::Unreachable, object, words))
    }

    fn add_block(&mut self, pointer: Pointer, words: String) {
        if self.blocks.len() >= SILENT_MAX {
            self.blocks.clear();
        }
        self.blocks.insert((pointer.gba, pointer.birth), words);
    }

    /// Why this is not to be looked for in a disk's list.
    pub(super) fn search(&self, vdi: Uuid, whose: Whose) -> Option<StoreError> {
        let searches = self.searches.get(&vdi)?;
        if searches.len() < SILENT_SEARCHES && !searches.contains(&whose) {
            return None;
        }
        let object = format!("the list of snapshots of VDI {vdi}");
        let words = "the device did not answer for a block of it earlier in this scrub";
        Some(StoreError::new(StoreErrorKind::Unreachable, object, words))
    }

    pub(super) fn add_search(&mut self, vdi: Uuid, whose: Whose) {
        self.searches.entry(vdi).or_default().insert(whose);
    }
}

/// Where a pass is among blocks that are bad.
#[derive(Debug, Default)]
pub(super) struct Region {
    /// The last one that was.
    last: Option<Gba>,
    /// Those in a row up to it that did not answer.
    silent: u32,
}

impl Looking<'_> {
    /// Asks for blocks of which one at least is given by every device that gives anything.
    async fn probe(&self) -> Result<()> {
        let geometry = &self.store.store().superblock().geometry;
        let [superblock, copy] = geometry.superblocks();
        let mut outcome = Ok(());
        for block in [geometry.vdi_slot(0), copy, superblock] {
            match self.store.try_read(block).await {
                Err(error) if is_of_device(&error) => outcome = Err(error),
                // Given; or the store closes, which is what the next one learns who asks for something.
                _ => return Ok(()),
            }
        }
        outcome
    }

    /// Waits until the device gives something; true if it does at once.
    async fn gives(&self) -> bool {
        let (mut pause, mut at_once) = (AWAY_MIN, true);
        while let Err(error) = self.probe().await {
            at_once = false;
            self.progress.wait_for(Some(error.to_string()));
            if sabotage::on(Bug::ScrubStaysAway) {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(AWAY_MAX);
        }
        self.progress.wait_for(None);
        at_once
    }

    /// As [`gives`](Self::gives), after an error.
    async fn gives_after(&self, error: &StoreError) -> bool {
        if error.kind == StoreErrorKind::Unreachable {
            self.progress.wait_for(Some(error.to_string()));
        }
        self.gives().await
    }

    /// Waits while the store is away. `Unreachable` is an error of what was asked for, then, for which the device does not answer.
    pub(super) async fn patiently<T, F>(&self, mut operation: impl FnMut() -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let mut strikes = 0;
        loop {
            let error = match operation().await {
                Err(error) if is_of_device(&error) => error,
                outcome => return outcome,
            };
            let at_once = self.gives_after(&error).await;
            match error.kind {
                StoreErrorKind::Device if at_once => return Err(error),
                // The device gave nothing: that says nothing of what was asked for.
                StoreErrorKind::Device => {}
                _ => strikes += 1,
            }
            if strikes == STRIKES {
                return Err(error);
            }
            tokio::time::sleep(AWAY_MIN).await;
        }
    }

    /// As [`patiently`](Self::patiently), and asks again for what the device does not give: that may have been a fault on the way.
    pub(super) async fn tried_again<T, F>(&self, mut operation: impl FnMut() -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let mut strike = 1;
        loop {
            match self.patiently(&mut operation).await {
                Err(error) if error.kind == StoreErrorKind::Device && strike < STRIKES => {
                    tokio::time::sleep(STRIKE_PAUSE * strike).await;
                    strike += 1;
                }
                outcome => return outcome,
            }
        }
    }

    /// Waits while the device gives nothing, if only errors.
    pub(super) async fn until_it_gives(&self) {
        self.gives().await;
    }

    /// Reads blocks, at most [`BATCH`], and judges each.
    pub(super) async fn read(&mut self, pointers: &[Pointer]) -> Result<Vec<Result<Bytes, Bad>>> {
        debug_assert!(pointers.len() <= BATCH, "{} blocks at once", pointers.len());
        if pointers.len() > 1 {
            let known = {
                let silent = self.silent.lock();
                pointers.iter().any(|pointer| silent.block(*pointer).is_some())
            };
            if !known && let Ok(read) = self.ask(pointers, STRIKES).await? {
                return Ok(read);
            }
        }
        let mut single = Vec::with_capacity(pointers.len());
        for pointer in pointers {
            single.push(self.read_one(*pointer).await?);
        }
        Ok(single)
    }

    async fn read_one(&mut self, pointer: Pointer) -> Result<Result<Bytes, Bad>> {
        let known = self.silent.lock().block(pointer);
        if let Some(error) = known {
            return Ok(Err(Bad::NoAnswer(error)));
        }
        let behind = self.region.last.and_then(|last| pointer.gba.0.checked_sub(last.0));
        let near = behind.is_some_and(|blocks| (1..=NEAR).contains(&blocks));
        let error = if near && self.region.silent >= SILENT_RUN {
            let words = "the device does not answer for the blocks before it, and was not asked";
            let object = format!("block {}", pointer.gba);
            StoreError::new(StoreErrorKind::Unreachable, object, words)
        } else {
            match self.ask(&[pointer], if near { 1 } else { STRIKES }).await? {
                Ok(mut read) => return Ok(read.remove(0)),
                Err(error) => error,
            }
        };
        self.region.last = Some(pointer.gba);
        if error.kind == StoreErrorKind::Device {
            self.region.silent = 0;
            return Ok(Err(Bad::Unreadable(error)));
        }
        self.region.silent = if near { self.region.silent + 1 } else { 1 };
        self.silent.lock().add_block(pointer, error.message.clone());
        Ok(Err(Bad::NoAnswer(error)))
    }

    /// Asks for blocks so often; the error inside is one of these blocks.
    async fn ask(
        &mut self,
        pointers: &[Pointer],
        mut often: u32,
    ) -> Result<Result<Vec<Result<Bytes, Bad>>, StoreError>> {
        let mut strikes = 0;
        loop {
            self.pace.before(pointers.len()).await;
            let began = Instant::now();
            let judged = self.reader.judge_blocks(pointers).await;
            if self.rate.is_some() {
                // A device that is slow has others to serve.
                self.pace.rest(began.elapsed());
            }
            let error = match judged {
                Ok(judged) => {
                    self.region.silent = 0;
                    let bytes = (pointers.len() * BLOCK_SIZE) as u64;
                    self.progress.note(|so_far| so_far.read_bytes += bytes);
                    return Ok(Ok(judged.into_iter().map(|j| j.map_err(Bad::Mismatch)).collect()));
                }
                Err(error) => error,
            };
            if !is_of_device(&error) {
                return Err(error);
            }
            let at_once = self.gives_after(&error).await;
            if !at_once {
                // That was an outage, and says nothing of what lies near a bad block.
                often = STRIKES;
            }
            // A block may be what the device was away for.
            strikes += u32::from(at_once || error.kind == StoreErrorKind::Unreachable);
            if strikes >= often {
                return Ok(Err(error));
            }
            tokio::time::sleep(AWAY_MIN).await;
        }
    }
}
