//! A disk: session, memory, ring and slots together.
//!
//! Memory layout: the ring, then per slot a control area (header, range segment, indirect table,
//! status byte), then per slot a page-aligned data buffer.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::memory::SharedMemory;
use super::request::{Completion, Config, Request, Status};
use super::ring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, Layout, SplitRing};
use super::session::{Session, feature};

/// Byte offsets inside a slot's control area.
const HEADER_AT: usize = 0;
const SEGMENT_AT: usize = 16;
const STATUS_AT: usize = 32;
const TABLE_AT: usize = 48;

/// Descriptors of a request without an indirect table: header, data or range, status.
const DIRECT_CHAIN: u16 = 3;

/// How to drive the disk.
#[derive(Debug, Clone)]
pub struct Options {
    /// Entries of the virtqueue; a power of two.
    pub queue_size: u16,
    /// Requests in flight at most.
    pub slots: usize,
    /// Data buffer of each slot, in bytes.
    pub slot_bytes: usize,
    /// Data descriptors that a request is cut into at most (only with indirect descriptors).
    pub segments: usize,
    /// Feature bits to accept when offered.
    pub features: u64,
    /// Busy-poll for completions instead of sleeping on the call event.
    pub poll: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queue_size: 256,
            slots: 32,
            slot_bytes: 4096,
            segments: 1,
            features: feature::ALL & !feature::MQ,
            poll: false,
        }
    }
}

/// Why [`Disk::wait`] came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// There is at least one completion to take.
    Completions,
    /// The time was up.
    TimedOut,
    /// The back end closed the connection, and no completion is left in the ring.
    Disconnected,
}

/// A virtual disk, driven as a guest would.
#[derive(Debug)]
pub struct Disk {
    session: Session,
    config: Config,
    ring: SplitRing,
    kick: EventFd,
    call: EventFd,
    control_at: usize,
    control_bytes: usize,
    data_at: usize,
    in_flight: Vec<bool>,
    count_in_flight: usize,
    /// Reused between requests.
    chain: Chain,
    options: Options,
    memory: SharedMemory,
}

impl Disk {
    /// Connects to the vhost-user socket at `path` and starts the queue.
    ///
    /// # Errors
    /// When the back end refuses, hangs, or the options do not fit together.
    pub fn connect(path: &Path, options: &Options) -> Result<Self> {
        ensure!(options.slots > 0 && options.segments > 0, "no slots or no segments");
        let mut session = Session::connect(path, options.features)?;
        let indirect = session.features() & feature::INDIRECT_DESC != 0;
        let per_slot = if indirect { 1 } else { usize::from(DIRECT_CHAIN) };
        ensure!(
            options.slots * per_slot <= usize::from(options.queue_size),
            "{} requests of {per_slot} descriptors do not fit a ring of {}",
            options.slots,
            options.queue_size
        );
        let config = session.config()?;

        let layout = Layout::new(0, options.queue_size);
        let control_at = layout.end.next_multiple_of(64);
        let table = (options.segments + 2) * Descriptor::BYTES;
        let control_bytes = (TABLE_AT + table).next_multiple_of(64);
        let data_at = (control_at + control_bytes * options.slots).next_multiple_of(4096);
        let memory = SharedMemory::new(data_at + options.slot_bytes * options.slots)?;

        let event_idx = session.features() & feature::EVENT_IDX != 0;
        let mut ring = SplitRing::new(layout, options.queue_size, event_idx);
        if options.poll {
            ring.disarm(&memory);
        }
        let kick = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).context("create the kick event")?;
        let call = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).context("create the call event")?;
        session.start(&memory, &ring, &kick, &call)?;
        Ok(Self {
            session,
            config,
            ring,
            kick,
            call,
            control_at,
            control_bytes,
            data_at,
            in_flight: vec![false; options.slots],
            count_in_flight: 0,
            chain: Chain::default(),
            options: options.clone(),
            memory,
        })
    }

    /// The configuration read at connect.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The negotiated feature bits (`feature`).
    #[must_use]
    pub fn features(&self) -> u64 {
        self.session.features()
    }

    /// The connection, for messages outside of the data path.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// How the disk is driven.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Requests submitted and not completed.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.count_in_flight
    }

    /// Whether `slot` holds a request that has not completed.
    #[must_use]
    pub fn is_busy(&self, slot: usize) -> bool {
        self.in_flight[slot]
    }

    /// The data buffer of a free slot.
    ///
    /// # Panics
    /// When the slot is in flight: the buffer then belongs to the device.
    pub fn buffer(&mut self, slot: usize) -> &mut [u8] {
        assert!(!self.in_flight[slot], "slot {slot} is in flight");
        self.memory
            .slice_mut(self.data_at + slot * self.options.slot_bytes, self.options.slot_bytes)
    }

    /// Queues `request` in `slot`; the device sees it at the next [`Self::kick`].
    ///
    /// # Errors
    /// When the slot is busy or its buffer too small.
    pub fn submit(&mut self, slot: usize, request: &Request) -> Result<()> {
        ensure!(!self.in_flight[slot], "slot {slot} is in flight already");
        let (bytes, from_device) = request.data();
        ensure!(
            bytes <= self.options.slot_bytes,
            "{bytes} bytes do not fit a slot of {}",
            self.options.slot_bytes
        );
        let control = self.control_at + slot * self.control_bytes;
        self.memory.write(control + HEADER_AT, &request.header());
        self.memory.write(control + STATUS_AT, &[0xff]);
        let mut chain = std::mem::take(&mut self.chain);
        chain.entries.clear();
        chain.add(self.memory.guest_address(control + HEADER_AT), 16, 0);
        if let Some(segment) = request.segment() {
            self.memory.write(control + SEGMENT_AT, &segment);
            chain.add(self.memory.guest_address(control + SEGMENT_AT), 16, 0);
        }
        let flags = if from_device { DESC_WRITE } else { 0 };
        let data_at = self.data_at + slot * self.options.slot_bytes;
        for (offset, len) in self.pieces(bytes) {
            chain.add(self.memory.guest_address(data_at + offset), len as u32, flags);
        }
        chain.add(self.memory.guest_address(control + STATUS_AT), 1, DESC_WRITE);

        let head = self.place(slot, control, &chain);
        self.chain = chain;
        self.ring.push(&self.memory, head);
        self.in_flight[slot] = true;
        self.count_in_flight += 1;
        Ok(())
    }

    /// Publishes what was submitted and notifies the device if it asked for that.
    ///
    /// # Errors
    /// When the kick event cannot be written.
    pub fn kick(&mut self) -> Result<()> {
        if self.ring.publish(&self.memory) {
            self.kick.write(1).context("kick the back end")?;
        }
        Ok(())
    }

    /// Takes one completion, if there is one.
    ///
    /// # Errors
    /// When the back end names a descriptor that holds no request of ours.
    pub fn take(&mut self) -> Result<Option<Completion>> {
        let Some((head, written)) = self.ring.pop(&self.memory) else { return Ok(None) };
        let slot = head as usize / self.heads_per_slot();
        if slot >= self.in_flight.len() || !self.in_flight[slot] {
            bail!("the back end completed descriptor {head}, which holds no request");
        }
        self.in_flight[slot] = false;
        self.count_in_flight -= 1;
        let status = self.control_at + slot * self.control_bytes + STATUS_AT;
        Ok(Some(Completion { slot, status: Status::from(self.memory.read_byte(status)), written }))
    }

    /// Waits until a completion can be taken, the back end is gone, or `timeout` is over.
    ///
    /// # Errors
    /// When the wait itself fails.
    pub fn wait(&mut self, timeout: Duration) -> Result<Wake> {
        if self.options.poll { self.wait_polling(timeout) } else { self.wait_for_event(timeout) }
    }

    /// Submits one request in slot 0 and waits for it: for tests and set-up.
    ///
    /// # Errors
    /// When it fails, the back end goes away, or `timeout` is over.
    pub fn execute(&mut self, request: &Request, timeout: Duration) -> Result<()> {
        ensure!(self.count_in_flight == 0, "other requests are in flight");
        self.submit(0, request)?;
        self.kick()?;
        match self.wait(timeout)? {
            Wake::Completions => {}
            other => bail!("no answer to {request:?}: {other:?}"),
        }
        let done = self.take()?.context("woken without a completion")?;
        ensure!(done.status == Status::Ok, "{request:?} ended with {:?}", done.status);
        Ok(())
    }

    /// Stops the queue in an orderly way; every request has completed afterwards.
    ///
    /// # Errors
    /// When the back end does not answer.
    pub fn stop(&mut self) -> Result<()> {
        self.session.stop()
    }

    fn wait_for_event(&mut self, timeout: Duration) -> Result<Wake> {
        let deadline = Instant::now() + timeout;
        loop {
            if !self.ring.arm(&self.memory) {
                return Ok(Wake::Completions);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            // SAFETY: the event's descriptor lives as long as `self`, which this call borrows.
            let call = unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
            // A hang-up is reported whether asked for or not.
            let mut watched = [
                PollFd::new(call, PollFlags::POLLIN),
                PollFd::new(self.session.as_fd(), PollFlags::empty()),
            ];
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut watched, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("wait for the back end"),
            }
            let called = watched[0].any().unwrap_or(false);
            let gone = watched[1].any().unwrap_or(false);
            if called {
                let _ = self.call.read();
            }
            if self.ring.has_used(&self.memory) {
                return Ok(Wake::Completions);
            }
            if gone {
                return Ok(Wake::Disconnected);
            }
            if left.is_zero() {
                return Ok(Wake::TimedOut);
            }
        }
    }

    fn wait_polling(&mut self, timeout: Duration) -> Result<Wake> {
        let deadline = Instant::now() + timeout;
        loop {
            for _ in 0..1000 {
                if self.ring.has_used(&self.memory) {
                    return Ok(Wake::Completions);
                }
                std::hint::spin_loop();
            }
            if self.is_disconnected()? {
                return Ok(if self.ring.has_used(&self.memory) {
                    Wake::Completions
                } else {
                    Wake::Disconnected
                });
            }
            if Instant::now() >= deadline {
                return Ok(Wake::TimedOut);
            }
        }
    }

    fn is_disconnected(&self) -> Result<bool> {
        let mut watched = [PollFd::new(self.session.as_fd(), PollFlags::empty())];
        match poll(&mut watched, PollTimeout::ZERO) {
            Ok(_) | Err(Errno::EINTR) => Ok(watched[0].any().unwrap_or(false)),
            Err(errno) => Err(errno).context("watch the connection"),
        }
    }

    fn indirect(&self) -> bool {
        self.session.features() & feature::INDIRECT_DESC != 0
    }

    fn heads_per_slot(&self) -> usize {
        if self.indirect() { 1 } else { usize::from(DIRECT_CHAIN) }
    }

    /// The data buffer's pieces, as (offset, length): one, or up to `segments` when an indirect
    /// table has room for them. The first piece is the odd one.
    fn pieces(&self, bytes: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let sectors = bytes / 512;
        let count =
            if self.indirect() { self.options.segments.clamp(1, sectors.max(1)) } else { 1 };
        let each = sectors / count * 512;
        let first = bytes - each * (count - 1);
        (0..count).filter(move |_| bytes > 0).map(move |piece| match piece {
            0 => (0, first),
            n => (first + (n - 1) * each, each),
        })
    }

    /// Writes the chain into the ring or into the slot's indirect table; gives its head.
    fn place(&self, slot: usize, control: usize, chain: &Chain) -> u16 {
        if self.indirect() {
            for (index, descriptor) in chain.linked(0).enumerate() {
                let at = control + TABLE_AT + index * Descriptor::BYTES;
                self.memory.write(at, &descriptor.encode());
            }
            let table = Descriptor {
                address: self.memory.guest_address(control + TABLE_AT),
                len: (chain.entries.len() * Descriptor::BYTES) as u32,
                flags: DESC_INDIRECT,
                next: 0,
            };
            self.ring.set_descriptor(&self.memory, slot as u16, &table);
            slot as u16
        } else {
            let first = slot as u16 * DIRECT_CHAIN;
            for (index, descriptor) in chain.linked(first).enumerate() {
                self.ring.set_descriptor(&self.memory, first + index as u16, &descriptor);
            }
            first
        }
    }
}

/// A chain under construction.
#[derive(Debug, Default)]
struct Chain {
    entries: Vec<(u64, u32, u16)>,
}

impl Chain {
    fn add(&mut self, address: u64, len: u32, flags: u16) {
        self.entries.push((address, len, flags));
    }

    /// The descriptors, linked, as they stand from index `first` on.
    fn linked(&self, first: u16) -> impl Iterator<Item = Descriptor> + '_ {
        let last = self.entries.len() - 1;
        self.entries.iter().enumerate().map(move |(index, &(address, len, flags))| Descriptor {
            address,
            len,
            flags: if index < last { flags | DESC_NEXT } else { flags },
            next: if index < last { first + index as u16 + 1 } else { 0 },
        })
    }
}
