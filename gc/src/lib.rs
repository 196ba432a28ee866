//! Reachability over the blockstore: collecting what no root reaches, and checking.
//!
//! [`collect`] runs a cycle of garbage collection: `reach.rs` marks what disks and snapshots reach, and the store's own
//! half, [`blockstore::Collection`], gives the rest back. [`check`] walks the same trees looking for damage: `mark.rs` sets
//! one bit per reachable block, and compares with what the allocator's bitmaps say. It writes nothing. [`repair()`] writes what the
//! check found to have one right answer. [`sizes()`] computes what each disk and snapshot holds, and what a deletion would free. [`scrub()`] verifies all that can be reached, slowly, beside everything else.
//! [`dump()`] shows any block in words; `pointing.rs` finds who points at it.
//!
//! Where to start reading: docs/garbage-collection.md, then `collect.rs`; for the check, `check.rs`.

pub mod bits;
pub mod check;
pub mod collect;
pub mod dump;
mod fetch;
pub mod mark;
mod marks;
pub mod pointing;
mod reach;
pub mod repair;
pub mod schedule;
pub mod scrub;
pub mod sizes;

pub use check::{CheckOptions, Report, check, check_with};
pub use collect::{CollectOptions, Collected, MEMORY_DEFAULT, Progress, collect};
pub use dump::{Dump, Dumped, What, dump};
pub use repair::{Findings, Repaired, examine, repair};
pub use scrub::{ScrubOptions, ScrubProgress, Scrubbed, scrub};
pub use sizes::{SizeOptions, Sizes, sizes};
