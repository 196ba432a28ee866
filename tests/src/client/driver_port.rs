//! The crate `virtio-driver` as a port: an implementation that shares no line with ours.
//!
//! It cannot see the death of its server (only silence), switch the write cache, or use indirect
//! descriptors.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bench::front_end::{Request, SharedMemory};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};

use super::SECTOR;
use super::port::{BlockPort, Event};
use super::workload::SECTORS_MAX;

const SLOT_BYTES: usize = SECTORS_MAX as usize * SECTOR;

/// A port on `virtio_driver::VirtioBlkQueue`. Fields are dropped in this order: the queue lies in the
/// transport's memory.
pub struct DriverPort {
    queue: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    called: Arc<EventFd>,
    _transport: Box<VirtioBlkTransport>,
    memory: SharedMemory,
    sectors: u64,
    slots: usize,
    done: VecDeque<(usize, bool)>,
}

impl std::fmt::Debug for DriverPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DriverPort").field("sectors", &self.sectors).finish_non_exhaustive()
    }
}

impl DriverPort {
    /// Connects with `slots` requests in flight at most.
    ///
    /// # Errors
    /// When the server lacks REPLY_ACK, CONFIG or CONFIGURE_MEM_SLOTS, or cannot be reached.
    pub fn connect(socket: &Path, slots: usize) -> Result<Self> {
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::FLUSH.bits()
            | VirtioBlkFeatureFlags::DISCARD.bits()
            | VirtioBlkFeatureFlags::WRITE_ZEROES.bits();
        let path = socket.to_str().context("the socket's path is not UTF-8")?;
        let transport = VhostUser::new(path, features)
            .with_context(|| format!("virtio-driver on {}", socket.display()))?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        // Three descriptors each at most: header, data or range, status.
        let queue_size = (slots * 3).next_power_of_two() as u16;
        let mut queues = VirtioBlkQueue::setup_queues(transport.as_mut(), 1, queue_size)
            .context("set the queue up")?;
        let mut queue = queues.pop().context("no queue was set up")?;
        queue.set_used_notif_enabled(true);
        let memory = SharedMemory::new(slots * SLOT_BYTES)?;
        let base = memory.user_address(0) as usize;
        transport
            .map_mem_region(base, memory.len(), memory.raw_fd(), 0)
            .context("share the data buffers")?;
        let sectors = transport.get_config().context("read the configuration")?.capacity;
        Ok(Self {
            queue,
            notifier: transport.get_submission_notifier(0),
            called: transport.get_completion_fd(0),
            _transport: transport,
            memory,
            sectors: sectors.into(),
            slots,
            done: VecDeque::new(),
        })
    }

    fn collect(&mut self) {
        let done = self.queue.completions().map(|one| (one.context, one.ret == 0));
        self.done.extend(done);
    }
}

impl BlockPort for DriverPort {
    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn slots(&self) -> usize {
        self.slots
    }

    fn buffer(&mut self, slot: usize) -> &mut [u8] {
        self.memory.slice_mut(slot * SLOT_BYTES, SLOT_BYTES)
    }

    fn submit(&mut self, slot: usize, request: &Request) -> Result<()> {
        let at = |sector: u64| sector * SECTOR as u64;
        let (len, _) = request.data();
        let buffer = self.memory.pointer(slot * SLOT_BYTES, len).as_ptr();
        match *request {
            // SAFETY: the buffer lies in memory that is mapped as long as the queue lives, and the
            // slot's owner does not touch it before the completion.
            Request::Read { sector, .. } => unsafe {
                self.queue.read_raw(at(sector), buffer, len, slot)
            },
            // SAFETY: as for reads.
            Request::Write { sector, .. } => unsafe {
                self.queue.write_raw(at(sector), buffer, len, slot)
            },
            Request::Flush => self.queue.flush(slot),
            Request::Discard { sector, sectors } => {
                self.queue.discard(at(sector), at(sectors.into()), slot)
            }
            Request::WriteZeroes { sector, sectors, unmap } => {
                self.queue.write_zeroes(at(sector), at(sectors.into()), unmap, slot)
            }
            Request::GetId => bail!("virtio-driver does not know GET_ID"),
        }
        .with_context(|| format!("queue {request:?}"))
    }

    fn kick(&mut self) -> Result<()> {
        if self.queue.avail_notif_needed() {
            self.notifier.notify().context("kick the back end")?;
        }
        Ok(())
    }

    fn next(&mut self, timeout: Duration) -> Result<Event> {
        let deadline = Instant::now() + timeout;
        loop {
            if self.done.is_empty() {
                self.collect();
            }
            if let Some((slot, ok)) = self.done.pop_front() {
                return Ok(Event::Completed { slot, ok });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Event::TimedOut);
            }
            let mut watched = [PollFd::new(self.called.as_fd(), PollFlags::POLLIN)];
            let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let woken = poll(&mut watched, wait).context("wait for the back end")?;
            if woken > 0 {
                self.called.read().context("read the call event")?;
            }
        }
    }

    fn set_write_cache(&mut self, _on: bool) -> Result<bool> {
        Ok(false)
    }
}
