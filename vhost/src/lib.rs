//! vhost-user-blk server: gives one virtual disk to one guest at a time.
//!
//! ```text
//! front end (QEMU, cloud-hypervisor, …)
//!    │ UNIX socket: vhost-user messages          │ shared memory: virtqueues, data; eventfds
//!    ▼                                           ▼
//! listener thread ── session thread ──────────► worker thread ◄── cache::link (asynchronous side)
//!   server.rs          session/      messages    worker/   one io_uring, owns cache::disk::Disk
//! ```
//!
//! * [`server`]: socket, threads, start and stop. Start reading there.
//! * `session`: the vhost-user protocol of one connection; knows features, memory table and ring addresses, and
//!   hands finished descriptions of them to the worker.
//! * [`request`]: one descriptor chain → one validated request. Pure; the fuzz target's entry.
//! * `ring`: split virtqueues on memory that the guest may change at any time.
//! * `front_ends`: who is connected, whom of them the worker serves, how they are told of a change.
//! * `dirty`: the log of written pages for live migration.
//! * `worker`: serves the rings. The only owner of the disk's state, so a request takes no lock.
//!
//! Invariants
//! * INV-VH-1: memory outside the regions of the front end's table is never touched on a guest's behalf; every
//!   address is checked against the table once, when the request is parsed, and the table's mappings live until the
//!   last request that uses them has ended.
//! * INV-VH-2: whatever the guest writes into its rings costs at most its own disk; never a panic, never another disk.
//!   Memory that a front end pulls away under us turns to zeros for that guest (`sigbus`).
//! * INV-VH-3: a request is completed at most once, and only in the session that it came from.
//! * INV-VH-4: every block that leaves the local cache was compared with its checksum first.
//! * INV-VH-5: the answer to GET_VRING_BASE is sent when no request of that ring is under way any more.

mod config;
mod dirty;
mod error;
mod front_ends;
#[cfg(fuzzing)]
pub mod fuzzing;
mod memory;
pub mod request;
mod ring;
pub mod server;
mod session;
mod sigbus;
mod socket;
mod stats;
mod worker;

pub use error::{NotServed, ServerError};
pub use server::{DiskServer, Listening, ServerOptions};
pub use stats::Stats;
