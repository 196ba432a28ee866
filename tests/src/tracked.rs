//! A front end that outlives its back end: it keeps its guest's memory, its ring and the inflight region, goes on
//! submitting while nobody serves it, and reconnects by either convention that front ends have. Its guest checks that
//! every request is completed exactly once and without error, and that every block holds what was written to it last.
//!
//! Each slot has blocks of its own and one request under way, so the content of a block is never in doubt: a request
//! that is served again after its completion, when the slot has gone on, shows as an old stamp.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bench::front_end::SharedMemory;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Entries of the ring.
const RING: u16 = 64;
/// Requests under way at most; each takes three descriptors.
pub const SLOTS: usize = 16;
/// Blocks that belong to each slot.
const BLOCKS_PER_SLOT: usize = 24;
const BLOCK: usize = 4096;
const SECTORS_PER_BLOCK: u64 = 8;

/// Places in the shared memory.
const AVAILABLE: usize = 0x1000;
const USED: usize = 0x2000;
const HEADERS: usize = 0x3000;
const STATUSES: usize = 0x4000;
const DATA: usize = 0x5000;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const TYPE_READ: u32 = 0;
const TYPE_WRITE: u32 = 1;
const TYPE_FLUSH: u32 = 4;
/// FLUSH, VERSION_1 and vhost-user's protocol features: no event index, so that every kick is sent.
const FEATURES: u64 = 1 << 9 | 1 << 30 | 1 << 32;

/// How long nothing may be completed while somebody serves.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a front end says in SET_VRING_BASE when it reconnects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Convention {
    /// QEMU.
    UsedIndex,
    /// cloud-hypervisor.
    AvailableIndex,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Write { block: usize, stamp: u64 },
    Read { block: usize },
    Flush,
}

/// See the module.
pub struct Tracked {
    memory: SharedMemory,
    kick: EventFd,
    call: EventFd,
    connection: Option<(Frontend, UnixStream)>,
    inflight: Option<(VhostUserInflight, File)>,
    available: u16,
    used: u16,
    slots: [Option<Request>; SLOTS],
    /// What each block must hold: the stamp written to it last.
    content: Vec<u64>,
    last_stamp: u64,
    random: u64,
    /// Requests completed.
    pub completed: u64,
}

impl Tracked {
    /// A guest that is not connected yet. `seed` decides what it asks for.
    pub fn new(seed: u64) -> Result<Self> {
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).context("create an eventfd");
        Ok(Self {
            memory: SharedMemory::new(DATA + SLOTS * BLOCK)?,
            kick: event()?,
            call: event()?,
            connection: None,
            inflight: None,
            available: 0,
            used: 0,
            slots: [None; SLOTS],
            content: vec![0; SLOTS * BLOCKS_PER_SLOT],
            last_stamp: 0,
            random: seed | 1,
            completed: 0,
        })
    }

    /// Connects, for the first time or again.
    pub fn connect(&mut self, socket: &Path, convention: Convention) -> Result<()> {
        self.connection = None;
        let stream = UnixStream::connect(socket).context("connect")?;
        let second = stream.try_clone().context("duplicate the connection")?;
        let mut front_end = Frontend::from_stream(stream, 1);
        front_end.set_owner().context("own the session")?;
        let offered = front_end.get_features().context("features")?;
        ensure!(offered & FEATURES == FEATURES, "the back end offers {offered:#x} only");
        let wanted = VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        let offered = front_end.get_protocol_features().context("protocol features")?;
        ensure!(offered.contains(wanted), "the back end offers {offered:?} only");
        front_end.set_protocol_features(wanted).context("protocol features")?;
        front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front_end.set_features(FEATURES).context("features")?;
        if self.inflight.is_none() {
            let wanted = VhostUserInflight::new(0, 0, 1, RING);
            self.inflight = Some(front_end.get_inflight_fd(&wanted).context("inflight region")?);
        }
        let Some((region, file)) = &self.inflight else { unreachable!("set above") };
        front_end.set_inflight_fd(region, file.as_raw_fd()).context("inflight region")?;
        let memory = &self.memory;
        front_end
            .set_mem_table(&[VhostUserMemoryRegionInfo {
                guest_phys_addr: memory.guest_address(0),
                memory_size: memory.len() as u64,
                userspace_addr: memory.user_address(0),
                mmap_offset: 0,
                mmap_handle: memory.raw_fd(),
            }])
            .context("memory")?;
        let config = VringConfigData {
            queue_max_size: RING,
            queue_size: RING,
            flags: 0,
            desc_table_addr: memory.user_address(0),
            used_ring_addr: memory.user_address(USED),
            avail_ring_addr: memory.user_address(AVAILABLE),
            log_addr: None,
        };
        let base = match convention {
            Convention::UsedIndex => self.word(USED + 2).load(Ordering::Acquire),
            Convention::AvailableIndex => self.available,
        };
        front_end.set_vring_num(0, RING).context("ring size")?;
        front_end.set_vring_base(0, base).context("ring base")?;
        front_end.set_vring_addr(0, &config).context("ring addresses")?;
        front_end.set_vring_call(0, &self.call).context("ring call")?;
        front_end.set_vring_kick(0, &self.kick).context("ring kick")?;
        front_end.set_vring_enable(0, true).context("ring enable")?;
        self.connection = Some((front_end, second));
        Ok(())
    }

    /// Fills every free slot with a request, whether or not anybody serves, and kicks once.
    pub fn submit_all(&mut self) -> Result<()> {
        for slot in 0..SLOTS {
            if self.slots[slot].is_none() {
                let request = self.choose(slot);
                self.submit(slot, request);
            }
        }
        self.kick.write(1).context("kick")
    }

    /// Goes on until `count` more requests are completed, with every slot busy all the time.
    pub fn run(&mut self, count: u64) -> Result<()> {
        let goal = self.completed + count;
        let mut last = Instant::now();
        while self.completed < goal {
            self.submit_all()?;
            if self.take_completions()? {
                last = Instant::now();
                continue;
            }
            ensure!(last.elapsed() < PATIENCE, "nothing was completed for a minute");
            self.wait(Duration::from_millis(20))?;
        }
        Ok(())
    }

    /// Goes on until the back end has closed the connection.
    pub fn run_until_cut_off(&mut self) -> Result<()> {
        let give_up = Instant::now() + PATIENCE;
        while self.is_connected()? {
            ensure!(Instant::now() < give_up, "the back end did not end");
            self.submit_all()?;
            self.take_completions()?;
            self.wait(Duration::from_millis(1))?;
        }
        self.take_completions()?;
        Ok(())
    }

    /// Waits for everything under way, then reads every block back.
    pub fn verify_all(&mut self) -> Result<()> {
        self.settle()?;
        for block in 0..BLOCKS_PER_SLOT {
            for slot in 0..SLOTS {
                self.submit(slot, Request::Read { block: slot * BLOCKS_PER_SLOT + block });
            }
            self.kick.write(1).context("kick")?;
            self.settle()?;
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        let give_up = Instant::now() + PATIENCE;
        while self.slots.iter().any(Option::is_some) {
            ensure!(Instant::now() < give_up, "requests were lost: {:?}", self.slots);
            self.take_completions()?;
            self.wait(Duration::from_millis(20))?;
        }
        Ok(())
    }

    fn choose(&mut self, slot: usize) -> Request {
        // xorshift64
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let block = slot * BLOCKS_PER_SLOT + (self.random >> 8) as usize % BLOCKS_PER_SLOT;
        match self.random % 16 {
            0..10 => {
                self.last_stamp += 1;
                Request::Write { block, stamp: self.last_stamp }
            }
            10..15 => Request::Read { block },
            _ => Request::Flush,
        }
    }

    fn submit(&mut self, slot: usize, request: Request) {
        let data = DATA + slot * BLOCK;
        let (kind, block, writable) = match request {
            Request::Write { block, stamp } => {
                self.memory.write(data, &stamped(block, stamp));
                (TYPE_WRITE, block, false)
            }
            Request::Read { block } => {
                self.memory.write(data, &[0xee; BLOCK]);
                (TYPE_READ, block, true)
            }
            Request::Flush => (TYPE_FLUSH, 0, false),
        };
        let sector = if kind == TYPE_FLUSH { 0 } else { block as u64 * SECTORS_PER_BLOCK };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write(HEADERS + 16 * slot, &header);
        self.memory.write(STATUSES + slot, &[0xff]);
        let first = 3 * slot as u16;
        let status = first + 2;
        let after_header = if kind == TYPE_FLUSH { status } else { first + 1 };
        self.describe(first, HEADERS + 16 * slot, 16, DESC_NEXT, after_header);
        let flags = DESC_NEXT | if writable { DESC_WRITE } else { 0 };
        self.describe(first + 1, data, BLOCK as u32, flags, status);
        self.describe(status, STATUSES + slot, 1, DESC_WRITE, 0);
        let entry = AVAILABLE + 4 + 2 * usize::from(self.available % RING);
        self.memory.write(entry, &first.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.word(AVAILABLE + 2).store(self.available, Ordering::SeqCst);
        self.slots[slot] = Some(request);
    }

    fn describe(&self, index: u16, offset: usize, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.memory.guest_address(offset).to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write(16 * usize::from(index), &bytes);
    }

    /// Takes and checks what was completed; true if anything was.
    fn take_completions(&mut self) -> Result<bool> {
        let mut any = false;
        while self.word(USED + 2).load(Ordering::Acquire) != self.used {
            let at = USED + 4 + 8 * usize::from(self.used % RING);
            let mut head = [0; 4];
            head.copy_from_slice(self.memory.slice(at, 4));
            let head = u32::from_le_bytes(head) as usize;
            self.used = self.used.wrapping_add(1);
            let slot = head / 3;
            let request = self.slots.get_mut(slot).filter(|_| head.is_multiple_of(3));
            let Some(request) = request.and_then(Option::take) else {
                bail!("chain {head} was completed and is not under way");
            };
            let status = self.memory.read_byte(STATUSES + slot);
            ensure!(status == 0, "{request:?} ended with status {status}");
            match request {
                Request::Write { block, stamp } => self.content[block] = stamp,
                Request::Read { block } => self.check(slot, block)?,
                Request::Flush => {}
            }
            self.completed += 1;
            any = true;
        }
        Ok(any)
    }

    fn check(&self, slot: usize, block: usize) -> Result<()> {
        let expected = stamped(block, self.content[block]);
        let found = self.memory.slice(DATA + slot * BLOCK, BLOCK);
        ensure!(
            found == expected,
            "block {block} must hold stamp {} and holds {:02x?}…",
            self.content[block],
            &found[..16]
        );
        Ok(())
    }

    /// Waits for an interrupt or the connection's end.
    fn wait(&self, most: Duration) -> Result<()> {
        let milliseconds = u16::try_from(most.as_millis()).unwrap_or(u16::MAX);
        // SAFETY: the descriptor is open for as long as `self.call` lives.
        let call = unsafe { BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
        let mut polled = [PollFd::new(call, PollFlags::POLLIN)];
        if poll(&mut polled, PollTimeout::from(milliseconds)).context("poll")? > 0 {
            let _ = self.call.read();
        }
        Ok(())
    }

    /// The connection is open as far as this end can tell.
    fn is_connected(&mut self) -> Result<bool> {
        let Some((_, stream)) = &mut self.connection else { return Ok(false) };
        let mut polled = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        if poll(&mut polled, PollTimeout::ZERO).context("poll")? == 0 {
            return Ok(true);
        }
        // Nothing is ever sent unasked: what can be read is the end.
        Ok(stream.read(&mut [0; 1]).is_ok_and(|bytes| bytes > 0))
    }

    fn word(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: inside the mapping, which lives as long as `self.memory`, and even; both sides access ring indexes
        // atomically.
        unsafe { AtomicU16::from_ptr(self.memory.pointer(offset, 2).cast().as_ptr()) }
    }
}

impl std::fmt::Debug for Tracked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracked").field("completed", &self.completed).finish_non_exhaustive()
    }
}

/// The content of a block; stamp 0 is a block that was never written.
fn stamped(block: usize, stamp: u64) -> Vec<u8> {
    if stamp == 0 {
        return vec![0; BLOCK];
    }
    let mut pair = (block as u64).to_le_bytes().to_vec();
    pair.extend(stamp.to_le_bytes());
    pair.repeat(BLOCK / 16)
}
