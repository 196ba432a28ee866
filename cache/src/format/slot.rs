//! A VDI slot: what the cache device knows of one attached virtual disk.
//!
//! The local checkpoint of rule L2 lives here: a segment may be reused only after the slot that covers it is
//! durable. Two copies are written in turn; the one with the higher sequence counts.

use super::{FormatError, VERSION, open_block_up_to, seal_block};
use crate::disk::trace::{RANGE_BLOCKS_MAX, RANGES_MAX, Ranges};
use crate::pending::PendingSnapshot;
use blockstore::format::snapshot::LABEL_MAX;
use blockstore::format::vdi::Origin;
use blockstore::schedule::RULES_MAX;
use blockstore::types::{BLOCK_SIZE, Lba, Lsn};
use blockstore::{Policy, Schedule, SnapshotLabel, WhenOffline};
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const MAGIC: [u8; 8] = *b"BLSTVDIS";
const WHAT: &str = "VDI slot";
/// Version of a slot that former versions must refuse: its disk is not in the store yet, or its log may hold cuts.
const VERSION_NEWEST: u32 = 2;
const NAME_MAX: usize = 255;
/// States of a slot that is not free.
const ATTACHED: u32 = 1;
const QUARANTINED: u32 = 2;
/// Snapshots of what the log was that a slot can ask for.
pub const CUTS_MAX: usize = 4;
const TAIL: usize = BLOCK_SIZE
    - 384
    - 8 * RANGES_MAX
    - 16
    - 8 * RULES_MAX
    - size_of::<[RawCut; CUTS_MAX]>()
    - 32
    - 16;
/// The disk is pinned.
const FLAG_PINNED: u32 = 1;
/// The disk's log may hold cuts.
const FLAG_CUTS: u32 = 2;
/// Bits of a range of the boot trace that say how long it is; the first block is above them.
const RANGE_BITS: u32 = 24;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    crc: U32,
    version: U32,
    sequence: U64,
    slot: U32,
    state: U32,
    vdi: [u8; 16],
    log_id: [u8; 16],
    size_bytes: U64,
    committed: U64,
    evicted_below: U64,
    sequence_seen: U64,
    first_lsn: U64,
    epoch: U32,
    name_len: U16,
    reserved0: U16,
    when_offline: U32,
    flags: U32,
    name: [u8; 256],
    trace_len: U32,
    reserved2: U32,
    trace: [U64; RANGES_MAX],
    durable: U64,
    /// One more than where the log ended when it was opened without the store; zero: it was not.
    alone_from: U64,
    schedule: [U64; RULES_MAX],
    cuts: [RawCut; CUTS_MAX],
    /// Of a disk that is not in the store yet: what it is a clone of. Zeros: it is there.
    origin_vdi: [u8; 16],
    origin_lsn: U64,
    origin_ms: U64,
    reserved: [u8; TAIL],
    /// One more than what was flushed when the log was left behind; zero: it was not.
    behind_flushed: U64,
    behind_staged: U64,
}
const _: () = assert!(size_of::<Raw>() == BLOCK_SIZE);

/// A [`PendingSnapshot`]; none if its LSN is zero.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawCut {
    lsn: U64,
    time_ms: U64,
    /// Zeros behind it: labels have none.
    label: [u8; LABEL_MAX],
}

/// A validated slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VdiSlot {
    /// Rises with every rewrite of this slot, over all disks that ever used it.
    pub sequence: u64,
    /// Own place in the table.
    pub slot: u32,
    /// The disk, or none if the slot is free or holds a log in quarantine.
    pub vdi: Option<SlotVdi>,
    /// A damaged log that was given up: its segments are kept, and it is never opened again.
    pub quarantined: Option<SlotVdi>,
}

/// The snapshot as which a clone begins that the store does not know of yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CloneOrigin {
    /// Of which disk, and its point in the guest's write order.
    pub snapshot: Origin,
    /// When it was asked for, milliseconds since 1970: what another log of the disk may have at that LSN is not it.
    pub time_ms: u64,
}

/// An attached disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotVdi {
    /// The disk in the store.
    pub uuid: Uuid,
    /// The log: binds segments, slot and the store's head together.
    pub log_id: u128,
    /// For messages while the store is away.
    pub name: String,
    /// Bytes the guest sees.
    pub size_bytes: u64,
    /// The store's image reached at least this LSN.
    pub committed: Lsn,
    /// Segments of this disk with a lower sequence number are dead (evicted in this order).
    pub evicted_below: u64,
    /// A segment sequence number above all that this disk used when the slot was written.
    pub sequence_seen: u64,
    /// Counts recoveries of the log.
    pub epoch: u32,
    /// First LSN of this epoch: records of an older epoch at or beyond it are dead (rule L3).
    pub first_lsn: Lsn,
    /// Everything up to here was durable in the log, on every leg, when the slot was written: a log that ends below is
    /// damaged. Zero says nothing.
    pub durable: Lsn,
    /// Where the log ended when it was opened without the store for the first time since it was compared with it. A store
    /// that is further has been written from another log, wherever this one ends by now (rule L6).
    pub alone_from: Option<Lsn>,
    /// How it is to be served.
    pub policy: DiskPolicy,
    /// In this epoch the store took the place of the log, or was about to.
    pub left_behind: Option<LeftBehind>,
    /// What the guest read when it last booted; empty if that is not known.
    pub boot_trace: Ranges,
    /// Snapshots that were asked for after the log had gone on (at most [`CUTS_MAX`], in the order of their LSNs): the commit
    /// that covers them makes them. All of them are durable parts of the log that the store did not have then.
    pub cuts: Vec<PendingSnapshot>,
    /// The disk is a clone that was made without the store, which does not know of it yet: it begins as this snapshot. What its
    /// log holds of that is kept until the store has both.
    pub origin: Option<CloneOrigin>,
    /// The log may hold entries of a schedule's cadence ([`Kind::Cut`](super::record::Kind::Cut)), whatever the schedule is by now.
    pub has_cuts: bool,
}

/// No leg took the log's records any more: from then on the store may be ahead of what the log says (rule L6). A log of
/// which this is known is never opened without the store. With it, it is opened empty if the store has all of it, and
/// as usual if it has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeftBehind {
    /// The log's epoch then: a log that was opened since is another matter.
    pub epoch: u32,
    /// Everything up to here had been promised to survive. If neither the log nor the store reaches it, something is lost.
    pub flushed: Lsn,
    /// The last LSN given out then.
    pub staged: Lsn,
}

/// What an operator chose for a disk on this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskPolicy {
    /// What the store notes, too. Here is what counts while the disk is attached: it must be known, and can be changed,
    /// while the store is away.
    pub chosen: Policy,
    /// What is held of it is not evicted while anything else could be.
    pub pinned: bool,
}

impl SlotVdi {
    /// Its log holds entries of a cadence, or may get some.
    pub fn may_have_cuts(&self) -> bool {
        self.has_cuts || self.policy.chosen.schedule.cadence().is_some()
    }

    /// Of the slot that it is in.
    fn version(&self) -> u32 {
        if self.may_have_cuts() || self.origin.is_some() { VERSION_NEWEST } else { VERSION }
    }

    /// The store's image has reached `committed`, and so has made the snapshots up to there.
    pub fn reached(&mut self, committed: Lsn) {
        self.committed = committed;
        self.cuts.retain(|cut| cut.lsn > committed);
    }
}

impl VdiSlot {
    /// The same place, one write later, holding this.
    #[must_use]
    pub fn next(&self, vdi: Option<SlotVdi>) -> Self {
        Self { sequence: self.sequence + 1, slot: self.slot, vdi, quarantined: None }
    }

    /// The same place, one write later: the disk's log is in quarantine.
    #[must_use]
    pub fn next_quarantined(&self) -> Self {
        Self { quarantined: self.vdi.clone(), ..self.next(None) }
    }

    /// Nothing is in it.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.vdi.is_none() && self.quarantined.is_none()
    }

    /// The block that stands for it. Names longer than 255 bytes are cut (they are for messages only).
    #[must_use]
    pub fn encode(&self) -> [u8; BLOCK_SIZE] {
        let mut raw = Raw::new_zeroed_slot();
        raw.magic = MAGIC;
        let versions = [&self.vdi, &self.quarantined].into_iter().flatten().map(SlotVdi::version);
        raw.version = versions.max().unwrap_or(VERSION).into();
        raw.sequence = self.sequence.into();
        raw.slot = self.slot.into();
        let kept = self.vdi.as_ref().map(|vdi| (ATTACHED, vdi));
        if let Some((state, vdi)) = kept.or(self.quarantined.as_ref().map(|vdi| (QUARANTINED, vdi)))
        {
            raw.state = state.into();
            raw.vdi = vdi.uuid.into_bytes();
            raw.log_id = vdi.log_id.to_le_bytes();
            raw.size_bytes = vdi.size_bytes.into();
            raw.committed = vdi.committed.0.into();
            raw.evicted_below = vdi.evicted_below.into();
            raw.sequence_seen = vdi.sequence_seen.into();
            raw.epoch = vdi.epoch.into();
            raw.first_lsn = vdi.first_lsn.0.into();
            raw.durable = vdi.durable.0.into();
            raw.alone_from = vdi.alone_from.map_or(0, |lsn| lsn.0.saturating_add(1)).into();
            raw.when_offline = vdi.policy.chosen.when_offline.to_bits().into();
            raw.schedule = vdi.policy.chosen.schedule.to_bits().map(U64::new);
            if let Some(behind) = &vdi.left_behind {
                raw.behind_flushed = behind.flushed.0.saturating_add(1).into();
                raw.behind_staged = behind.staged.0.into();
            }
            let pinned = if vdi.policy.pinned { FLAG_PINNED } else { 0 };
            let cuts = if vdi.may_have_cuts() { FLAG_CUTS } else { 0 };
            raw.flags = (pinned | cuts).into();
            raw.trace_len = (vdi.boot_trace.len().min(RANGES_MAX) as u32).into();
            for (to, (lba, blocks)) in raw.trace.iter_mut().zip(&vdi.boot_trace) {
                *to = (lba.0 << RANGE_BITS | blocks & RANGE_BLOCKS_MAX).into();
            }
            for (to, cut) in raw.cuts.iter_mut().zip(&vdi.cuts) {
                *to = RawCut::of(cut);
            }
            if let Some(origin) = &vdi.origin {
                raw.origin_vdi = origin.snapshot.vdi.into_bytes();
                raw.origin_lsn = origin.snapshot.lsn.0.into();
                raw.origin_ms = origin.time_ms.into();
            }
            let len = fitting(&vdi.name);
            raw.name[..len].copy_from_slice(&vdi.name.as_bytes()[..len]);
            raw.name_len = (len as u16).into();
        }
        let mut block = [0u8; BLOCK_SIZE];
        block.copy_from_slice(raw.as_bytes());
        seal_block(&mut block);
        block
    }

    /// Reads and checks a block that should be a copy of slot `slot`.
    pub fn decode(block: &[u8], slot: u32) -> Result<Self, FormatError> {
        open_block_up_to(block, MAGIC, WHAT, VERSION_NEWEST)?;
        let raw = Raw::ref_from_bytes(block).map_err(|_| FormatError::Absent(WHAT))?;
        if raw.slot.get() != slot {
            return Err(FormatError::Invalid {
                what: WHAT,
                why: "it was written for another place",
            });
        }
        let state = raw.state.get();
        let kept = match state {
            0 => None,
            ATTACHED | QUARANTINED => {
                let len = usize::from(raw.name_len.get());
                if len > NAME_MAX {
                    return Err(FormatError::Invalid { what: WHAT, why: "its name is too long" });
                }
                let mut name = String::from_utf8_lossy(&raw.name[..len]).into_owned();
                // What stands for bytes that are no text may be longer than they.
                name.truncate(fitting(&name));
                Some(SlotVdi {
                    uuid: Uuid::from_bytes(raw.vdi),
                    log_id: u128::from_le_bytes(raw.log_id),
                    name,
                    size_bytes: raw.size_bytes.get(),
                    committed: Lsn(raw.committed.get()),
                    evicted_below: raw.evicted_below.get(),
                    sequence_seen: raw.sequence_seen.get(),
                    epoch: raw.epoch.get(),
                    first_lsn: Lsn(raw.first_lsn.get()),
                    durable: Lsn(raw.durable.get()),
                    alone_from: raw.alone_from.get().checked_sub(1).map(Lsn),
                    policy: DiskPolicy {
                        chosen: Policy {
                            when_offline: WhenOffline::from_bits(raw.when_offline.get()),
                            schedule: Schedule::from_bits(raw.schedule.map(U64::get)),
                        },
                        pinned: raw.flags.get() & FLAG_PINNED != 0,
                    },
                    left_behind: raw.behind_flushed.get().checked_sub(1).map(|flushed| {
                        LeftBehind {
                            epoch: raw.epoch.get(),
                            flushed: Lsn(flushed),
                            staged: Lsn(raw.behind_staged.get()),
                        }
                    }),
                    boot_trace: decode_trace(raw),
                    cuts: decode_cuts(raw),
                    origin: (raw.origin_vdi != [0; 16]).then(|| CloneOrigin {
                        snapshot: Origin {
                            vdi: Uuid::from_bytes(raw.origin_vdi),
                            lsn: Lsn(raw.origin_lsn.get()),
                        },
                        time_ms: raw.origin_ms.get(),
                    }),
                    has_cuts: raw.flags.get() & FLAG_CUTS != 0,
                })
            }
            _ => return Err(FormatError::Invalid { what: WHAT, why: "its state is unknown" }),
        };
        let kept = kept.map(|vdi: SlotVdi| SlotVdi { has_cuts: vdi.may_have_cuts(), ..vdi });
        let (vdi, quarantined) = if state == QUARANTINED { (None, kept) } else { (kept, None) };
        Ok(Self { sequence: raw.sequence.get(), slot, vdi, quarantined })
    }
}

/// Bytes of a name that fit: no character is cut.
fn fitting(name: &str) -> usize {
    let most = name.len().min(NAME_MAX);
    (0..=most).rev().find(|at| name.is_char_boundary(*at)).unwrap_or(0)
}

/// The boot trace; one that makes no sense is none.
fn decode_trace(raw: &Raw) -> Ranges {
    let len = (raw.trace_len.get() as usize).min(RANGES_MAX);
    let ranges = raw.trace[..len].iter().map(|range| {
        let range = range.get();
        (Lba(range >> RANGE_BITS), range & RANGE_BLOCKS_MAX)
    });
    let ranges: Ranges = ranges.collect();
    let in_order = ranges.windows(2).all(|pair| pair[0].0.0 + pair[0].1 <= pair[1].0.0);
    if in_order && ranges.iter().all(|(_, blocks)| *blocks > 0) { ranges } else { Ranges::new() }
}

/// The snapshots that it asks for. A label that makes no sense is none.
fn decode_cuts(raw: &Raw) -> Vec<PendingSnapshot> {
    let asked = raw.cuts.iter().filter(|cut| cut.lsn.get() > 0);
    let mut cuts: Vec<PendingSnapshot> = asked.map(RawCut::decode).collect();
    cuts.sort_unstable_by_key(|cut| cut.lsn);
    cuts.dedup_by_key(|cut| cut.lsn);
    cuts
}

impl RawCut {
    fn of(cut: &PendingSnapshot) -> Self {
        let mut label = [0; LABEL_MAX];
        let text = cut.label.as_str().as_bytes();
        label[..text.len()].copy_from_slice(text);
        Self { lsn: cut.lsn.0.into(), time_ms: cut.time_ms.into(), label }
    }

    fn decode(&self) -> PendingSnapshot {
        let len = self.label.iter().position(|&byte| byte == 0).unwrap_or(LABEL_MAX);
        let label = std::str::from_utf8(&self.label[..len]).ok();
        let label = label.and_then(|label| SnapshotLabel::new(label).ok()).unwrap_or_default();
        PendingSnapshot { lsn: Lsn(self.lsn.get()), time_ms: self.time_ms.get(), label }
    }
}

impl Raw {
    fn new_zeroed_slot() -> Self {
        zerocopy::FromZeros::new_zeroed()
    }
}
