//! The shared store (see docs/architecture.md and docs/on-disk-format.md).

pub mod buf;
pub mod crc;
pub mod device;
pub mod types;
