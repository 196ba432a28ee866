//! The state machine of one attached virtual disk: log, index, flushed and acknowledged LSNs.
//!
//! No I/O, clock or threads of its own. The driver (the worker in `vhost`, or a simulator) calls it like this:
//!
//! ```text
//! loop {
//!     for each finished local I/O:      disk.io_done(op, result)
//!     for each message from the link:   Fetched → driver; else disk.on_message(message)
//!     for each guest request:           disk.write / zero / flush / read
//!     disk.poll(&mut actions)           → submit Write and Flush actions, send Send actions over the link
//!     for (tag, ok) in disk.completions() → publish to the guest
//!     wait
//! }
//! ```
//!
//! Requests are staged into the open segment at once (the guest's data is copied, checksummed and given its LSN),
//! and `poll` decides when a batch of them goes out: group commit. Completions come in LSN order (rule L1).

pub mod plan;

use crate::image::SegmentImage;
use crate::link::{FromDisk, ToDisk};
use blockstore::types::Lba;
use plan::ReadPlan;
use std::sync::Arc;

/// The driver's name for a guest request; returned with its completion.
pub type Tag = u64;

/// Identifies a local I/O between its action and its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OpId(pub u64);

/// What the driver must do. Writes and flushes may be carried out concurrently and finish in any order.
#[derive(Debug)]
pub enum Action {
    /// Write `len` bytes of `image` from byte `start` to byte `offset` of the cache device (O_DIRECT; all three are
    /// multiples of 4096), then call `io_done`.
    Write { op: OpId, leg: u8, offset: u64, image: Arc<SegmentImage>, start: usize, len: usize },
    /// fdatasync the leg, then call `io_done`.
    Flush { op: OpId, leg: u8 },
    /// Send over the link.
    Send(FromDisk),
}

/// Whether a request was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Staged {
    /// All of it; its tag will be completed.
    All,
    /// The first `n` bytes (a multiple of 512; possibly 0): no log space for the rest now. Call again for the rest
    /// (same tag) after a later `poll`/message; the tag is completed with the last part. Later requests need not wait.
    Part(usize),
    /// The disk's log has failed: answer with an I/O error.
    Failed,
}

/// What becomes of a block whose bytes did not match its checksum, even when read again into private memory (L9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadBlock {
    /// The local copy was forgotten; plan the read again, the store has the block.
    Refetch,
    /// The only copy is bad: fail the request with an I/O error (and say so in the log).
    Lost,
}

/// One attached virtual disk.
#[derive(Debug)]
pub struct Disk {}

#[expect(unused_variables, clippy::todo, reason = "contract first; the bodies are being written")]
impl Disk {
    /// Bytes the guest sees.
    pub fn size_bytes(&self) -> u64 { todo!() }
    /// Stages a guest write of `len` bytes (multiple of 512) at `sector`. `copy(offset, dst)` must fill
    /// `dst` with the request's bytes from `offset` on; it is called once for each byte.
    pub fn write(&mut self, tag: Tag, sector: u64, len: usize, copy: &mut dyn FnMut(usize, &mut [u8])) -> Staged { todo!() }
    /// Stages WRITE_ZEROES or DISCARD of `sectors` sectors: both read as zeros afterwards. Partial blocks of a
    /// discard (`discard` true) are left alone, those of a zeroing are zeroed.
    pub fn zero(&mut self, tag: Tag, sector: u64, sectors: u64, discard: bool) -> Staged { todo!() }
    /// Completes `tag` when everything staged before is durable in the log.
    pub fn flush(&mut self, tag: Tag) { todo!() }
    /// Write-through (guest switched the write cache off): writes complete when durable.
    pub fn set_write_through(&mut self, on: bool) { todo!() }
    /// Plans a read of `sectors` sectors at `sector` into `plan` (cleared first) and pins what it names.
    pub fn read(&mut self, sector: u64, sectors: u64, plan: &mut ReadPlan) { todo!() }
    /// Gives back the pins of a plan whose local I/O is finished.
    pub fn release(&mut self, plan: &mut ReadPlan) { todo!() }
    /// The block that `lba` was planned at device byte `offset` is bad there.
    pub fn bad_block(&mut self, lba: Lba, offset: u64) -> BadBlock { todo!() }
    /// Offers a fetched, verified block for keeping; `planned` is the value of [`Self::fill_ticket`] from when the read
    /// was planned, so that a block overwritten since is not kept.
    pub fn fill(&mut self, lba: Lba, data: &[u8], planned: u64) { todo!() }
    /// See [`Self::fill`].
    pub fn fill_ticket(&self) -> u64 { todo!() }
    /// A local I/O finished; `Err` carries the errno.
    pub fn io_done(&mut self, op: OpId, result: Result<(), i32>) { todo!() }
    /// A message from the link (not `Fetched`).
    pub fn on_message(&mut self, message: ToDisk) { todo!() }
    /// Collects what to do now.
    pub fn poll(&mut self, actions: &mut Vec<Action>) { todo!() }
    /// Finished requests, in the order to publish them; `false` means I/O error.
    pub fn completions(&mut self) -> std::vec::Drain<'_, (Tag, bool)> { todo!() }
    /// No local I/O is under way and none is wanted.
    pub fn is_quiet(&self) -> bool { todo!() }
}

/// A disk as the cache hands it to a driver, and gets it back.
#[derive(Debug)]
pub struct AttachedDisk {
    /// The state machine.
    pub disk: Disk,
    /// The way to the asynchronous side.
    pub link: crate::link::Link,
    /// The cache device, one file per leg, opened with O_DIRECT where the file system allows.
    pub legs: Vec<Arc<std::fs::File>>,
}
