//! What the client needs of a disk, whatever drives it.

use std::time::Duration;

use anyhow::Result;
use bench::front_end::Request;

/// What a wait ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The request in this slot completed; `ok` is whether with success.
    Completed { slot: usize, ok: bool },
    /// Nothing happened in time.
    TimedOut,
    /// The server is gone and no completion is left to take.
    Disconnected,
}

/// A disk with slots for requests in flight.
pub trait BlockPort {
    /// Size in sectors.
    fn sectors(&self) -> u64;

    /// Slots; each takes one request of at most `workload::SECTORS_MAX` sectors.
    fn slots(&self) -> usize;

    /// Data buffer of a free slot.
    fn buffer(&mut self, slot: usize) -> &mut [u8];

    /// Queues a request in a free slot.
    ///
    /// # Errors
    /// When the driver refuses it.
    fn submit(&mut self, slot: usize, request: &Request) -> Result<()>;

    /// Makes what was queued visible to the server.
    ///
    /// # Errors
    /// When the notification fails.
    fn kick(&mut self) -> Result<()>;

    /// The next completion, or why there is none.
    ///
    /// # Errors
    /// When the server breaks the protocol.
    fn next(&mut self, timeout: Duration) -> Result<Event>;

    /// Switches the server's write cache; false when this port cannot.
    ///
    /// # Errors
    /// When the server refuses.
    fn set_write_cache(&mut self, on: bool) -> Result<bool>;
}
