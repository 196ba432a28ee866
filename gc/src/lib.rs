//! Reachability over the blockstore: mark and check.
//!
//! [`mark`] walks the trees of all disks and sets one bit per reachable block; [`check`] compares
//! that with what the allocator's bitmaps say and reports every disagreement. Works on the store's
//! format alone and writes nothing.
//!
//! Where to start reading: `check.rs`, then `mark.rs`.

pub mod bits;
pub mod check;
pub mod mark;

pub use check::{CheckOptions, Report, check};
