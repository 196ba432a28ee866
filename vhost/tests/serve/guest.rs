//! A front end and its guest's driver, with full control over what lies in the rings. The front-end half is the `vhost`
//! crate's; rings and requests are laid out here, from the specification.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::eventfd::EventFd;

pub const MEMORY: u64 = 16 << 20;
/// Guest addresses from here on are the test's own.
pub const DATA: u64 = 1 << 20;
pub const RING: u16 = 32;
/// Room for each queue's rings, headers and status bytes.
const QUEUE_AREA: u64 = 0x8000;
const TABLE: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x4000;
const STATUSES: u64 = 0x6000;
const WATCHDOG: Duration = Duration::from_secs(60);

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;

pub mod feature {
    pub const FLUSH: u64 = 1 << 9;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const LOG_ALL: u64 = 1 << 26;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const USUAL: u64 = FLUSH | CONFIG_WCE | MQ | DISCARD | WRITE_ZEROES | VERSION_1 | PROTOCOL;
}

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;

/// A memory region as the front end has it.
pub struct Memory {
    file: File,
    pub map: Arc<GuestMemoryMmap>,
    base: u64,
}

impl Memory {
    pub fn new(base: u64, size: u64) -> Self {
        // SAFETY: a plain system call with a literal name.
        let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(size).unwrap();
        let place = (
            GuestAddress(base),
            size as usize,
            Some(FileOffset::new(file.try_clone().unwrap(), 0)),
        );
        let map = Arc::new(GuestMemoryMmap::from_ranges_with_files([place]).unwrap());
        Self { file, map, base }
    }

    /// Takes all of it away from everyone who has it mapped.
    pub fn shorten(&self) {
        self.file.set_len(0).unwrap();
    }

    /// Address in this process, which is what the front end calls a user address.
    pub fn user(&self, guest: u64) -> u64 {
        self.map.get_host_address(GuestAddress(guest)).unwrap() as u64
    }

    pub fn info(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.base,
            memory_size: self.map.iter().next().unwrap().len(),
            userspace_addr: self.user(self.base),
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }
}

pub struct Queue {
    index: usize,
    area: u64,
    event_idx: bool,
    pub kick: EventFd,
    pub call: EventFd,
    avail: u16,
    used: u16,
    free: Vec<u16>,
    memory: Arc<GuestMemoryMmap>,
}

impl Queue {
    fn at(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.area + offset)
    }

    pub fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = self.area + TABLE + 16 * u64::from(index);
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes the chain that starts at `head` available and kicks.
    pub fn expose(&mut self, head: u16) {
        self.memory.write_obj(head, self.at(AVAIL + 4 + 2 * u64::from(self.avail % RING))).unwrap();
        self.set_avail(self.avail.wrapping_add(1));
    }

    /// Sets the available index to anything and kicks.
    pub fn set_avail(&mut self, index: u16) {
        self.avail = index;
        self.memory.store(index, self.at(AVAIL + 2), Ordering::SeqCst).unwrap();
        let wanted: u16 =
            self.memory.load(self.at(USED + 4 + 8 * u64::from(RING)), Ordering::SeqCst).unwrap();
        if !self.event_idx || wanted == index.wrapping_sub(1) {
            self.kick.write(1).unwrap();
        }
    }

    pub fn used_index(&self) -> u16 {
        self.memory.load(self.at(USED + 2), Ordering::Acquire).unwrap()
    }

    /// Puts a request into the ring: `buffers` are (guest address, length, writable). Returns its head, which also
    /// names its status byte.
    pub fn submit(&mut self, kind: u32, sector: u64, buffers: &[(u64, u32, bool)]) -> u16 {
        let count = buffers.len() + 2;
        assert!(self.free.len() >= count, "ring full");
        let ids = self.free.split_off(self.free.len() - count);
        let head = ids[0];
        let header = self.area + HEADERS + 16 * u64::from(head);
        let status = self.status_address(head);
        self.memory.write_obj(kind, GuestAddress(header)).unwrap();
        self.memory.write_obj(sector, GuestAddress(header + 8)).unwrap();
        self.memory.write_obj(0xffu8, GuestAddress(status)).unwrap();
        let first = std::iter::once((header, 16, false));
        let all = first.chain(buffers.iter().copied()).chain([(status, 1, true)]);
        for (place, (address, len, writable)) in all.enumerate() {
            let next = ids.get(place + 1).copied();
            let flags = if writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            self.descriptor(ids[place], address, len, flags, next.unwrap_or(0));
        }
        self.expose(head);
        head
    }

    /// Where the used ring lies.
    pub fn used_ring(&self) -> u64 {
        self.area + USED
    }

    pub fn status_address(&self, head: u16) -> u64 {
        self.area + STATUSES + u64::from(head)
    }

    pub fn status(&self, head: u16) -> u8 {
        self.memory.read_obj(GuestAddress(self.status_address(head))).unwrap()
    }

    /// The next chain given back: head, bytes written, status. Waits for it, by interrupt.
    pub fn next_used(&mut self) -> (u16, u32, u8) {
        let give_up = Instant::now() + WATCHDOG;
        loop {
            if let Some(used) = self.try_used() {
                return used;
            }
            // Ask for an interrupt at the next completion, then look again.
            self.memory
                .store(self.used, self.at(AVAIL + 4 + 2 * u64::from(RING)), Ordering::SeqCst)
                .unwrap();
            if self.used_index() != self.used {
                continue;
            }
            let mut fd =
                libc::pollfd { fd: self.call.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd.
            let ready = unsafe { libc::poll(&raw mut fd, 1, 100) };
            if ready > 0 {
                self.call.read().unwrap();
            } else {
                assert!(Instant::now() < give_up, "no completion on queue {}", self.index);
                assert_eq!(
                    self.used_index(),
                    self.used,
                    "a completion came without the interrupt that was asked for"
                );
            }
        }
    }

    pub fn try_used(&mut self) -> Option<(u16, u32, u8)> {
        if self.used_index() == self.used {
            return None;
        }
        let element = USED + 4 + 8 * u64::from(self.used % RING);
        let head: u32 = self.memory.read_obj(self.at(element)).unwrap();
        let written: u32 = self.memory.read_obj(self.at(element + 4)).unwrap();
        self.used = self.used.wrapping_add(1);
        let head = head as u16;
        self.reclaim(head);
        Some((head, written, self.status(head)))
    }

    /// Takes note of `count` completions whose chains are not ours to follow; their descriptors stay lost.
    pub fn forget_used(&mut self, count: u16) {
        self.used = self.used.wrapping_add(count);
        self.free.retain(|&id| id > 3);
    }

    fn reclaim(&mut self, head: u16) {
        let mut id = head;
        loop {
            assert!(!self.free.contains(&id), "descriptor {id} given back twice");
            self.free.push(id);
            let at = self.area + TABLE + 16 * u64::from(id);
            let flags: u16 = self.memory.read_obj(GuestAddress(at + 12)).unwrap();
            if flags & NEXT == 0 {
                return;
            }
            id = self.memory.read_obj(GuestAddress(at + 14)).unwrap();
        }
    }
}

pub struct Guest {
    pub front_end: Frontend,
    pub memory: Memory,
    pub queues: Vec<Queue>,
    pub features: u64,
    socket: UnixStream,
}

impl Guest {
    /// Connects, negotiates and starts `queues` rings.
    pub fn connect(path: &Path, queues: usize, features: u64) -> Self {
        let mut guest = Self::negotiate(path, features).expect("connect");
        for index in 0..queues {
            guest.add_queue(index);
            guest.start_queue(index, 0);
        }
        guest
    }

    pub fn simple(path: &Path) -> Self {
        Self::connect(path, 1, feature::USUAL | feature::EVENT_IDX)
    }

    /// Everything up to the memory table.
    pub fn negotiate(path: &Path, features: u64) -> vhost::Result<Self> {
        let socket = UnixStream::connect(path).expect("connect");
        let second = socket.try_clone().expect("dup");
        let mut front_end = Frontend::from_stream(socket, 8);
        front_end.set_owner()?;
        let offered = front_end.get_features()?;
        let accepted = offered & features;
        let protocol = front_end.get_protocol_features()?;
        let wanted = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::BACKEND_REQ;
        front_end.set_protocol_features(protocol & wanted)?;
        front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        front_end.set_features(accepted)?;
        let memory = Memory::new(0, MEMORY);
        front_end.set_mem_table(&[memory.info()])?;
        Ok(Self { front_end, memory, queues: vec![], features: accepted, socket: second })
    }

    pub fn add_queue(&mut self, index: usize) {
        self.queues.push(Queue {
            index,
            area: index as u64 * QUEUE_AREA,
            event_idx: self.features & feature::EVENT_IDX != 0,
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            avail: 0,
            used: 0,
            free: (0..RING).rev().collect(),
            memory: Arc::clone(&self.memory.map),
        });
    }

    /// Tells the back end about a ring, which goes on at available index `base`.
    pub fn start_queue(&mut self, index: usize, base: u16) {
        let queue = &self.queues[index];
        let config = VringConfigData {
            queue_max_size: RING,
            queue_size: RING,
            flags: 0,
            desc_table_addr: self.memory.user(queue.area + TABLE),
            used_ring_addr: self.memory.user(queue.area + USED),
            avail_ring_addr: self.memory.user(queue.area + AVAIL),
            log_addr: None,
        };
        self.front_end.set_vring_num(index, RING).unwrap();
        self.front_end.set_vring_base(index, base).unwrap();
        self.front_end.set_vring_addr(index, &config).unwrap();
        self.front_end.set_vring_call(index, &queue.call).unwrap();
        self.front_end.set_vring_kick(index, &queue.kick).unwrap();
        self.front_end.set_vring_enable(index, true).unwrap();
    }

    /// Reconnects with an inflight region kept from before.
    pub fn reconnect_tracked(
        self,
        path: &Path,
        region: &VhostUserInflight,
        file: &File,
        base: u16,
    ) -> Self {
        let mut guest = self.reconnect(path, &[]);
        guest.front_end.set_inflight_fd(region, file.as_raw_fd()).unwrap();
        guest.start_queue(0, base);
        guest
    }

    /// Brings this guest's memory and rings to a new connection of the same disk, as a front end that reconnects does.
    pub fn reconnect(mut self, path: &Path, bases: &[u16]) -> Self {
        // The server may have cut the connection before.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        let fresh = Self::negotiate(path, self.features).expect("reconnect");
        self.front_end = fresh.front_end;
        self.socket = fresh.socket;
        self.front_end.set_mem_table(&[self.memory.info()]).unwrap();
        for (index, base) in bases.iter().enumerate() {
            self.start_queue(index, *base);
        }
        self
    }

    /// The connection is open as far as this end can tell.
    pub fn is_connected(&self) -> bool {
        let mut fd = libc::pollfd { fd: self.socket.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&raw mut fd, 1, 0) == 0 }
    }

    pub fn config(&mut self, offset: u32, size: u32) -> Vec<u8> {
        let blank = vec![0; size as usize];
        let flags = VhostUserConfigFlags::WRITABLE;
        self.front_end.get_config(offset, size, flags, &blank).unwrap().1
    }

    pub fn set_write_cache(&mut self, on: bool) {
        let flags = VhostUserConfigFlags::WRITABLE;
        self.front_end.set_config(32, flags, &[u8::from(on)]).unwrap();
    }

    pub fn poke(&self, address: u64, bytes: &[u8]) {
        self.memory.map.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn peek(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.map.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Submits one request on queue 0 and waits for it; returns its status.
    pub fn request(&mut self, kind: u32, sector: u64, buffers: &[(u64, u32, bool)]) -> u8 {
        let head = self.queues[0].submit(kind, sector, buffers);
        let (done, _, status) = self.queues[0].next_used();
        assert_eq!(done, head);
        status
    }

    pub fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.poke(DATA, bytes);
        self.request(1, sector, &[(DATA, bytes.len() as u32, false)])
    }

    pub fn read(&mut self, sector: u64, len: usize) -> Result<Vec<u8>, u8> {
        self.poke(DATA, &vec![0xee; len]);
        match self.request(0, sector, &[(DATA, len as u32, true)]) {
            OK => Ok(self.peek(DATA, len)),
            status => Err(status),
        }
    }

    pub fn flush(&mut self) -> u8 {
        self.request(4, 0, &[])
    }

    /// DISCARD (11) or WRITE_ZEROES (13) of one range.
    pub fn zero(&mut self, kind: u32, sector: u64, sectors: u32) -> u8 {
        let mut range = sector.to_le_bytes().to_vec();
        range.extend(sectors.to_le_bytes());
        range.extend([0; 4]);
        self.poke(DATA, &range);
        self.request(kind, 0, &[(DATA, 16, false)])
    }
}
