//! Reachability over the blockstore: collecting what no root reaches, and checking.
//!
//! [`collect`] runs a cycle of garbage collection: `reach.rs` marks what disks and snapshots reach, and the store's own
//! half, [`blockstore::Collection`], gives the rest back. [`check`] walks the same trees looking for damage: `mark.rs` sets
//! one bit per reachable block, and compares with what the allocator's bitmaps say. It writes nothing.
//!
//! Where to start reading: docs/garbage-collection.md, then `collect.rs`; for the check, `check.rs`.

pub mod bits;
pub mod check;
pub mod collect;
pub mod mark;
mod reach;
pub mod schedule;

pub use check::{CheckOptions, Report, check};
pub use collect::{CollectOptions, Collected, Progress, collect};
