//! The project's own front end as a port: event index, indirect descriptors, death of the server.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use bench::front_end::{Disk, Options, Request, Status, Wake};

use super::SECTOR;
use super::port::{BlockPort, Event};
use super::workload::SECTORS_MAX;

/// A port on [`bench::front_end::Disk`].
#[derive(Debug)]
pub struct RingPort {
    disk: Disk,
}

impl RingPort {
    /// Connects with `slots` requests in flight at most, each cut into up to `segments` buffers.
    ///
    /// # Errors
    /// When the server cannot be reached or refuses.
    pub fn connect(socket: &Path, slots: usize, segments: usize) -> Result<Self> {
        let options = Options {
            slots,
            segments,
            slot_bytes: SECTORS_MAX as usize * SECTOR,
            ..Options::default()
        };
        Self::connect_with(socket, &options)
    }

    /// Connects with options of the caller's choice; slots must hold the longest request.
    ///
    /// # Errors
    /// As for [`Self::connect`].
    pub fn connect_with(socket: &Path, options: &Options) -> Result<Self> {
        Ok(Self { disk: Disk::connect(socket, options)? })
    }

    /// The disk beneath.
    pub fn disk(&mut self) -> &mut Disk {
        &mut self.disk
    }
}

impl BlockPort for RingPort {
    fn sectors(&self) -> u64 {
        self.disk.config().capacity_sectors
    }

    fn slots(&self) -> usize {
        self.disk.options().slots
    }

    fn buffer(&mut self, slot: usize) -> &mut [u8] {
        self.disk.buffer(slot)
    }

    fn submit(&mut self, slot: usize, request: &Request) -> Result<()> {
        self.disk.submit(slot, request)
    }

    fn kick(&mut self) -> Result<()> {
        self.disk.kick()
    }

    fn next(&mut self, timeout: Duration) -> Result<Event> {
        loop {
            if let Some(done) = self.disk.take()? {
                return Ok(Event::Completed { slot: done.slot, ok: done.status == Status::Ok });
            }
            match self.disk.wait(timeout)? {
                Wake::Completions => {}
                Wake::TimedOut => return Ok(Event::TimedOut),
                Wake::Disconnected => return Ok(Event::Disconnected),
            }
        }
    }

    fn set_write_cache(&mut self, on: bool) -> Result<bool> {
        self.disk.session().set_write_cache(on)?;
        Ok(true)
    }
}
