//! The vhost-user connection: handshake, memory, ring set-up, configuration (message order as QEMU's).

use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::memory::SharedMemory;
use super::request::Config;
use super::ring::SplitRing;

/// Feature bits of virtio and virtio-blk that this driver knows.
pub mod feature {
    /// Most segments of a request are told in the configuration.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The device is read-only.
    pub const RO: u64 = 1 << 5;
    /// Logical block size is told.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// The flush command exists.
    pub const FLUSH: u64 = 1 << 9;
    /// Physical block size is told.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// The driver may switch the write cache.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// Several queues.
    pub const MQ: u64 = 1 << 12;
    /// Discard exists.
    pub const DISCARD: u64 = 1 << 13;
    /// Write-zeroes exists.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// Descriptor tables outside of the ring.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications by event index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// vhost-user protocol features.
    pub const PROTOCOL: u64 = 1 << 30;
    /// Virtio 1.0 and later.
    pub const VERSION_1: u64 = 1 << 32;
    /// Everything above.
    pub const ALL: u64 = SEG_MAX
        | RO
        | BLK_SIZE
        | FLUSH
        | TOPOLOGY
        | CONFIG_WCE
        | MQ
        | DISCARD
        | WRITE_ZEROES
        | INDIRECT_DESC
        | EVENT_IDX
        | PROTOCOL
        | VERSION_1;
}

/// How long a group of messages may wait for its answers before the back end counts as hung.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Closes the connection when its holder does not get done in time: the protocol library waits for
/// answers without end.
struct Watchdog {
    done: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    fn new(socket: &UnixStream) -> Result<Self> {
        let socket = socket.try_clone().context("share the connection with its watchdog")?;
        let (done, wait) = channel();
        let thread = std::thread::spawn(move || {
            if wait.recv_timeout(ANSWER_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
                let _ = socket.shutdown(Shutdown::Both);
            }
        });
        Ok(Self { done: Some(done), thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.done = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One connection to a back end, negotiated.
pub struct Session {
    front_end: Frontend,
    socket: UnixStream,
    features: u64,
    protocol: VhostUserProtocolFeatures,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("features", &format_args!("{:#x}", self.features))
            .field("protocol", &self.protocol)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Connects to `path` and negotiates: of what is offered, everything in `wanted` is accepted.
    ///
    /// # Errors
    /// When nobody listens, the back end hangs, or it lacks what a block device needs.
    pub fn connect(path: &Path, wanted: u64) -> Result<Self> {
        let socket = UnixStream::connect(path)
            .with_context(|| format!("connect to the vhost-user socket {}", path.display()))?;
        let watched = socket.try_clone().context("keep a handle of the connection")?;
        let _watchdog = Watchdog::new(&watched)?;
        let mut front_end = Frontend::from_stream(socket, 1);

        let offered = front_end.get_features().context("ask for the features")?;
        if offered & feature::PROTOCOL == 0 {
            bail!("{} offers no protocol features; no block device needs less", path.display());
        }
        let offered_protocol =
            front_end.get_protocol_features().context("ask for the protocol features")?;
        let protocol = offered_protocol
            & (VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK);
        if !protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            bail!("{} cannot tell its disk's size (no CONFIG)", path.display());
        }
        front_end.set_protocol_features(protocol).context("set the protocol features")?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if protocol.contains(VhostUserProtocolFeatures::MQ) {
            front_end.get_queue_num().context("ask for the number of queues")?;
        }
        front_end.set_owner().context("own the session")?;
        let features = offered & (wanted | feature::PROTOCOL | feature::VERSION_1);
        Ok(Self { front_end, socket: watched, features, protocol })
    }

    /// The negotiated features.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The negotiated protocol features.
    #[must_use]
    pub fn protocol(&self) -> VhostUserProtocolFeatures {
        self.protocol
    }

    /// The device's configuration as of now.
    ///
    /// # Errors
    /// When the back end does not answer or answers too little.
    pub fn config(&mut self) -> Result<Config> {
        let _watchdog = Watchdog::new(&self.socket)?;
        let blank = [0u8; Config::BYTES];
        let (_, bytes) = self
            .front_end
            .get_config(0, Config::BYTES as u32, VhostUserConfigFlags::empty(), &blank)
            .context("read the disk's configuration")?;
        Config::decode(&bytes)
    }

    /// Switches the write cache: off means every write is durable when it completes.
    ///
    /// # Errors
    /// When the back end did not offer the switch or refuses it.
    pub fn set_write_cache(&mut self, on: bool) -> Result<()> {
        if self.features & feature::CONFIG_WCE == 0 {
            bail!("the back end did not offer to switch its write cache (CONFIG_WCE)");
        }
        let _watchdog = Watchdog::new(&self.socket)?;
        self.front_end
            .set_config(Config::WRITE_CACHE_OFFSET, VhostUserConfigFlags::empty(), &[u8::from(on)])
            .context("switch the write cache")
    }

    /// Starts the session's one ring: features, memory, addresses, eventfds, enable.
    ///
    /// # Errors
    /// When the back end refuses a step; the message names the step.
    pub fn start(
        &mut self,
        memory: &SharedMemory,
        ring: &SplitRing,
        kick: &EventFd,
        call: &EventFd,
    ) -> Result<()> {
        let _watchdog = Watchdog::new(&self.socket)?;
        let layout = ring.layout();
        let front_end = &mut self.front_end;
        front_end.set_features(self.features).context("set the features")?;
        front_end
            .set_mem_table(&[VhostUserMemoryRegionInfo {
                guest_phys_addr: memory.guest_address(0),
                memory_size: memory.len() as u64,
                userspace_addr: memory.user_address(0),
                mmap_offset: 0,
                mmap_handle: memory.raw_fd(),
            }])
            .context("share the memory")?;
        front_end.set_vring_num(0, ring.size()).context("set the ring's size")?;
        front_end.set_vring_base(0, 0).context("set the ring's base")?;
        front_end
            .set_vring_addr(
                0,
                &VringConfigData {
                    queue_max_size: ring.size(),
                    queue_size: ring.size(),
                    flags: 0,
                    desc_table_addr: memory.user_address(layout.descriptors),
                    used_ring_addr: memory.user_address(layout.used),
                    avail_ring_addr: memory.user_address(layout.available),
                    log_addr: None,
                },
            )
            .context("set the ring's addresses")?;
        front_end.set_vring_call(0, call).context("pass the call event")?;
        front_end.set_vring_kick(0, kick).context("pass the kick event")?;
        front_end.set_vring_enable(0, true).context("enable the ring")
    }

    /// Stops the ring: the back end finishes what it has taken and lets go of the memory's use.
    ///
    /// # Errors
    /// When the back end does not answer.
    pub fn stop(&mut self) -> Result<()> {
        let _watchdog = Watchdog::new(&self.socket)?;
        self.front_end.get_vring_base(0).context("stop the ring")?;
        Ok(())
    }
}

impl AsFd for Session {
    /// The connection, to watch for the back end's death.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
