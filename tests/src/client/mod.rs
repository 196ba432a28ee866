//! A client that can tell what a disk did wrong.
//!
//! Goal: name every lost, torn, stale, misdirected or reordered sector that a disk returns, under any
//! mix of requests and after any crash, from nothing but what the client itself sent and got.
//!
//! * [`stamp`]: every sector written says which disk, which place, which write it belongs to.
//! * [`oracle`]: keeps, per sector, the values still legal; judges reads in flight and whole images
//!   after a crash (there must be one cut of the client's own order that explains every sector).
//! * [`workload`]: a seeded stream of requests: sizes, places, kinds, depth.
//! * [`port`]: what the client needs of a disk; [`ring_port`] is our own front end, [`driver_port`]
//!   the independent `virtio-driver`.
//! * [`on_agent`] puts a client on a disk of an agent that tests start and kill.
//! * [`runner`]: drives a port by a workload and tells the oracle what happens.
//!
//! Oracle, stamps and workload are pure: no clock, no I/O, one seed.

#[cfg(test)]
mod tests;

pub mod driver_port;
pub mod on_agent;
pub mod oracle;
pub mod port;
pub mod ring_port;
pub mod runner;
pub mod stamp;
pub mod workload;

pub use oracle::{Cut, Loss, Oracle, Violation};
pub use port::{BlockPort, Event};
pub use runner::{End, Runner};
pub use stamp::{Found, Identity};
pub use workload::{Mix, Workload};

/// Bytes of a sector, the unit of every check.
pub const SECTOR: usize = 512;

/// Sectors of a 4 KiB block.
pub const BLOCK_SECTORS: u64 = 8;
