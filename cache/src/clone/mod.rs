//! What a disk was at an LSN that the store does not have yet, as the log of another disk: a clone that is made while the store
//! is away (decision 0024).
//!
//! The clone will begin, in the store, as the snapshot at that LSN. What the store had before is not touched; what the parent's
//! log holds between that and the snapshot is copied, so that the clone hangs on no segment of its parent's: `content.rs`
//! finds out what that is, `writing.rs` writes it.
//!
//! * INV-CLONE-1 Whole blocks become *fills*: they say what the store will have, take no LSN and are never committed. Zeros, and
//!   sectors over blocks that only the store has, become records; committing them once more over the snapshot changes nothing.
//! * INV-CLONE-2 All of it is flushed, in sealed segments, before the slot that makes it a log is written. A crash before that
//!   leaves segments that belong to nobody.
//! * INV-CLONE-3 Until the slot says that the store has the disk, no segment of it turns clean (`vdi/slot.rs`).

mod content;
mod writing;

pub(crate) use content::Content;
pub(crate) use writing::{CLONE_EPOCH, write};
