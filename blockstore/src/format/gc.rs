//! GC record: which cycle runs, in which phase, led by whom.

use crate::format::head::{BODY_SIZE, Body, Damage, Record, RecordKind};
use crate::format::{optional_uuid, uuid_bytes};
use crate::types::Generation;
use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawGc {
    epoch: U64,
    phase: U32,
    reserved_a: U32,
    leader: [u8; 16],
    leader_generation: U64,
    progress_ms: U64,
    reserved: [u8; 412],
}

const _: () = assert!(size_of::<RawGc>() == BODY_SIZE);

/// How far a cycle is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum GcPhase {
    /// No cycle ever ran.
    Idle = 0,
    /// Hosts are asked to acknowledge.
    Prepare = 1,
    /// The leader marks.
    Mark = 2,
    /// The leader writes reclaim bitmaps.
    Sweep = 3,
    /// Owners may apply the reclaim bitmaps.
    Done = 4,
}

/// The garbage collector's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GcRecord {
    /// Number of the cycle.
    pub epoch: u64,
    /// How far it is.
    pub phase: GcPhase,
    /// Who leads it.
    pub leader: Option<Uuid>,
    /// The leader's generation.
    pub leader_generation: Generation,
    /// When the leader last made progress, milliseconds since 1970.
    pub progress_ms: u64,
}

impl GcRecord {
    /// Before the first cycle.
    #[must_use]
    pub const fn initial() -> Self {
        Self {
            epoch: 0,
            phase: GcPhase::Idle,
            leader: None,
            leader_generation: Generation(0),
            progress_ms: 0,
        }
    }
}

impl Record for GcRecord {
    const KIND: RecordKind = RecordKind::Gc;

    fn encode_body(&self) -> Body {
        let raw = RawGc {
            epoch: U64::new(self.epoch),
            phase: U32::new(self.phase as u32),
            reserved_a: U32::ZERO,
            leader: uuid_bytes(self.leader),
            leader_generation: U64::new(self.leader_generation.0),
            progress_ms: U64::new(self.progress_ms),
            reserved: [0; 412],
        };
        zerocopy::transmute!(raw)
    }

    fn decode_body(body: &Body) -> Result<Self, Damage> {
        let raw: RawGc = zerocopy::transmute!(*body);
        let phase = match raw.phase.get() {
            0 => GcPhase::Idle,
            1 => GcPhase::Prepare,
            2 => GcPhase::Mark,
            3 => GcPhase::Sweep,
            4 => GcPhase::Done,
            _ => return Err(Damage::Field("phase")),
        };
        Ok(Self {
            epoch: raw.epoch.get(),
            phase,
            leader: optional_uuid(raw.leader),
            leader_generation: Generation(raw.leader_generation.get()),
            progress_ms: raw.progress_ms.get(),
        })
    }
}
