//! Putting a disk's log together from its segments: what lives, what is dead, what is corrupt. Pure.

use super::scan::Found;
use crate::disk::plan::SegmentId;
use crate::format::Geometry;
use crate::format::legs::LegSet;
use crate::format::record::{Entries, Kind, WHOLE};
use crate::format::segment::SegmentHeader;
use crate::format::slot::SlotVdi;
use crate::index::{Index, Patch, PatchSource, apply_zero};
use crate::pending::{LogCut, PendingSnapshots};
use blockstore::sabotage::{self, Bug};
use blockstore::types::{Lba, Lsn};

/// A segment that goes on being part of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Live {
    /// As it was found on any leg.
    pub header: SegmentHeader,
    /// Last LSN.
    pub last_lsn: Lsn,
    /// Blocks in use.
    pub used_blocks: u32,
    /// How many snapshots a cadence has cut in it.
    pub cuts: u32,
    /// For a segment without summary: the entries that its summary must list before the disk is served.
    pub unsealed: Option<Vec<u8>>,
}

/// The log of one disk, put together.
#[derive(Debug)]
pub struct Recovered {
    /// Everything held locally.
    pub index: Index,
    /// Last LSN of the log.
    pub last_lsn: Lsn,
    /// Snapshots in it that the store does not have.
    pub snapshots: PendingSnapshots,
    /// In order of their sequence.
    pub live: Vec<Live>,
    /// Segments that hold nothing of the log: to be wiped before the disk is served.
    pub dead: Vec<SegmentId>,
    /// Legs that were members when reading it began: any of it may have been found on one of them alone.
    pub legs: LegSet,
}

/// Why a log cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssembleError {
    /// The store's image is older than the log says it was.
    #[error(
        "the store's image is at LSN {store}, but the log knows it was at {log}: the store was rolled back, or is another one"
    )]
    StoreRolledBack { store: Lsn, log: Lsn },
    /// The store's image is newer than all the log holds.
    #[error(
        "the store's image is at LSN {store}, beyond the log's last LSN {log}: this cache is older than the store's last commit"
    )]
    LogRolledBack { store: Lsn, log: Lsn },
    /// Records that were durable are gone or damaged.
    #[error(
        "records from LSN {from} on are missing or damaged, although everything up to LSN {flushed} was written durably"
    )]
    Corrupt { from: Lsn, flushed: Lsn },
    /// Segments contradict each other.
    #[error("segment {segment} holds LSNs from {first} on, but its predecessor ends at {end}")]
    Overlap { segment: u32, first: Lsn, end: Lsn },
    /// A checked structure holds entries that make no sense.
    #[error("segment {segment} holds an entry that makes no sense")]
    Entry { segment: u32 },
}

/// Takes a disk's segments one by one, in order of their sequence.
#[derive(Debug)]
pub struct Assembler {
    geometry: Geometry,
    slot: SlotVdi,
    committed: Lsn,
    /// Everything up to here was durable at some time.
    flushed: Lsn,
    /// LSN that the next segment must start with; none before the first.
    next: Option<Lsn>,
    /// The log ended: what follows is dead.
    ended: bool,
    recovered: Recovered,
}

impl Assembler {
    /// For the disk of `slot`, whose image in the store is at LSN `store`.
    pub fn new(geometry: Geometry, slot: SlotVdi, store: Lsn) -> Result<Self, AssembleError> {
        if store < slot.committed {
            return Err(AssembleError::StoreRolledBack { store, log: slot.committed });
        }
        Ok(Self {
            geometry,
            committed: store,
            flushed: store.max(slot.durable),
            next: None,
            ended: false,
            recovered: Recovered {
                index: Index::default(),
                last_lsn: store,
                snapshots: PendingSnapshots::default(),
                live: Vec::new(),
                dead: Vec::new(),
                legs: LegSet::NONE,
            },
            slot,
        })
    }

    /// The next segment of the log, by sequence.
    pub fn push(&mut self, header: &SegmentHeader, found: &Found) -> Result<(), AssembleError> {
        self.flushed = self.flushed.max(found.flushed);
        if found.sealed {
            // A summary is written only after a flush that covers its segment (INV-LOG-3).
            self.flushed = self.flushed.max(found.last_lsn);
        }
        let older_epoch = header.epoch < self.slot.epoch && !sabotage::on(Bug::KeepDeadRecords);
        if older_epoch
            && found.first_lsn >= self.slot.first_lsn
            && found.last_lsn >= found.first_lsn
        {
            self.recovered.dead.push(header.segment);
            return Ok(());
        }
        if self.next.is_none() && found.first_lsn > self.committed.plus(1) {
            // The oldest uncommitted records are missing.
            self.ended = true;
        }
        if !self.ended
            && let Some(next) = self.next
        {
            if found.first_lsn < next {
                let (first, end) = (found.first_lsn, Lsn(next.0 - 1));
                return Err(AssembleError::Overlap { segment: header.segment.0, first, end });
            }
            if found.first_lsn > next {
                if found.first_lsn.0 - 1 <= self.committed.0 {
                    self.restart();
                } else {
                    self.ended = true;
                }
            }
        }
        if self.ended {
            self.recovered.dead.push(header.segment);
            return Ok(());
        }
        if found.entries.is_empty() {
            // Opened, but nothing in it survived: what follows must still continue at the same LSN.
            self.next = Some(found.first_lsn);
            self.recovered.last_lsn = Lsn(found.first_lsn.0.saturating_sub(1));
            self.recovered.dead.push(header.segment);
            return Ok(());
        }
        let cuts = self.replay(header.segment, found)?;
        self.next = Some(found.last_lsn.plus(1));
        self.recovered.last_lsn = found.last_lsn;
        self.recovered.live.push(Live {
            header: header.clone(),
            last_lsn: found.last_lsn,
            used_blocks: found.used_blocks,
            cuts,
            unsealed: (!found.sealed).then(|| found.entries.clone()),
        });
        Ok(())
    }

    /// All segments were seen.
    pub fn finish(mut self) -> Result<Recovered, AssembleError> {
        if self.recovered.live.is_empty() && self.next.is_none() && !self.ended {
            // No segment at all: everything was committed, evicted or never written.
            self.recovered.last_lsn = self.committed;
        }
        let last = self.recovered.last_lsn;
        // Only what is not committed can be lost; the store has the rest.
        if self.flushed > self.committed && last < self.flushed {
            return Err(AssembleError::Corrupt { from: last.plus(1), flushed: self.flushed });
        }
        if last < self.committed {
            return Err(AssembleError::LogRolledBack { store: self.committed, log: last });
        }
        self.recovered.index.committed(self.committed);
        Ok(self.recovered)
    }

    /// Committed segments are missing in between: what is older may be outdated, so none of it is kept.
    fn restart(&mut self) {
        self.recovered.index = Index::default();
        self.recovered.dead.extend(self.recovered.live.drain(..).map(|live| live.header.segment));
    }

    /// Returns how many snapshots a cadence has cut in it.
    fn replay(&mut self, segment: SegmentId, found: &Found) -> Result<u32, AssembleError> {
        let first_slot = self.geometry.first_block(segment);
        let index = &mut self.recovered.index;
        let mut lsn = Lsn(found.first_lsn.0 - 1);
        let mut cuts = 0;
        for entry in Entries::new(&found.entries, self.geometry.segment_blocks()) {
            let entry = entry.map_err(|_| AssembleError::Entry { segment: segment.0 })?;
            lsn = lsn.plus(entry.lsns());
            if let Some(cadence) = entry.cadence() {
                cuts += 1;
                let pending = &mut self.recovered.snapshots;
                let is_new = pending.cuts().back().is_none_or(|last| last.lsn < lsn);
                if lsn > self.committed && is_new {
                    pending.push_cut(LogCut { lsn, time_ms: entry.time_ms(), cadence });
                }
                continue;
            }
            let masks = (entry.first_mask, entry.last_mask);
            if entry.kind == Kind::Zero {
                apply_zero(index, entry.lba, u64::from(entry.blocks), masks, lsn);
                continue;
            }
            if entry.kind == Kind::Snapshot {
                if lsn > self.committed {
                    self.recovered.snapshots.push(lsn, entry.time_ms(), &entry.label());
                }
                continue;
            }
            if entry.kind == Kind::Hole {
                index.hole(entry.lba, u64::from(entry.blocks));
                continue;
            }
            for n in 0..entry.blocks {
                let lba = Lba(entry.lba.0 + u64::from(n));
                let (slot, crc) = (first_slot + u32::from(entry.payload) + n, entry.crc(n));
                match (entry.kind, entry.mask(n)) {
                    (Kind::Fill, _) => {
                        index.fill(lba, slot, crc);
                    }
                    (_, WHOLE) => index.insert(lba, slot, crc),
                    (_, sectors) => {
                        let source = PatchSource::At { slot, crc };
                        index.patch(lba, lsn, Patch { source, sectors });
                    }
                }
            }
        }
        Ok(cuts)
    }
}
