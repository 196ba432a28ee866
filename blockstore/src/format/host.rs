//! Host record: who uses the store.

use crate::format::head::{BODY_SIZE, Body, Damage, Record, RecordKind};
use crate::format::{fill_text, text};
use crate::types::Generation;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHost {
    uuid: [u8; 16],
    state: U32,
    name_len: U16,
    address_len: U16,
    generation: U64,
    up_since_ms: U64,
    heartbeat_ms: U64,
    gc_epoch_acknowledged: U64,
    name: [u8; 128],
    address: [u8; 128],
    reserved: [u8; 148],
}

const _: () = {
    assert!(size_of::<RawHost>() == BODY_SIZE);
    assert!(std::mem::offset_of!(RawHost, name) == 56);
};

/// Whether a host uses the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u32)]
pub enum HostState {
    /// It reached the store and has not said goodbye since.
    Up = 1,
    /// It closed the store in an orderly way, or the operator said that it is gone.
    Down = 2,
    /// The operator took its extents away; it must not write.
    Evicted = 3,
}

/// A host that uses or used the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostRecord {
    /// Identity, kept in the host's own state directory.
    pub uuid: Uuid,
    /// Whether it uses the store now.
    pub state: HostState,
    /// Rises each time the host reaches the store anew.
    pub generation: Generation,
    /// Milliseconds since 1970.
    pub up_since_ms: u64,
    /// Milliseconds since 1970, by the host's own clock; for people only.
    pub heartbeat_ms: u64,
    /// The last GC cycle the host took note of.
    pub gc_epoch_acknowledged: u64,
    /// For people; at most 128 bytes are kept.
    pub name: String,
    /// For people; at most 128 bytes are kept.
    pub address: String,
}

impl Record for HostRecord {
    const KIND: RecordKind = RecordKind::Host;

    fn encode_body(&self) -> Body {
        let (mut name, mut address) = ([0; 128], [0; 128]);
        let name_len = fill_text(&mut name, &self.name);
        let address_len = fill_text(&mut address, &self.address);
        let raw = RawHost {
            uuid: self.uuid.into_bytes(),
            state: U32::new(self.state as u32),
            name_len: U16::new(name_len),
            address_len: U16::new(address_len),
            generation: U64::new(self.generation.0),
            up_since_ms: U64::new(self.up_since_ms),
            heartbeat_ms: U64::new(self.heartbeat_ms),
            gc_epoch_acknowledged: U64::new(self.gc_epoch_acknowledged),
            name,
            address,
            reserved: [0; 148],
        };
        zerocopy::transmute!(raw)
    }

    fn decode_body(body: &Body) -> Result<Self, Damage> {
        let raw: RawHost = zerocopy::transmute!(*body);
        let state = match raw.state.get() {
            1 => HostState::Up,
            2 => HostState::Down,
            3 => HostState::Evicted,
            _ => return Err(Damage::Field("state")),
        };
        let uuid = Uuid::from_bytes(raw.uuid);
        if uuid.is_nil() {
            return Err(Damage::Field("uuid"));
        }
        Ok(Self {
            uuid,
            state,
            generation: Generation(raw.generation.get()),
            up_since_ms: raw.up_since_ms.get(),
            heartbeat_ms: raw.heartbeat_ms.get(),
            gc_epoch_acknowledged: raw.gc_epoch_acknowledged.get(),
            name: text(&raw.name, raw.name_len.get().into(), "name")?,
            address: text(&raw.address, raw.address_len.get().into(), "address")?,
        })
    }
}
