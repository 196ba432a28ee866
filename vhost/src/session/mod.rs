//! One front end's connection: the vhost-user protocol on one side, the worker on the other.
//!
//! The session gathers what the front end says about memory and rings and hands the worker finished descriptions. A
//! ring starts when its kick eventfd is known (and its addresses, and memory), and stops with GET_VRING_BASE, which is
//! answered when the ring's last request is finished (INV-VH-5). Each change of state is awaited before the message is
//! acknowledged, so that what a front end was told is true.
//!
//! Until its first ring starts, and from when its last one has stopped, a session keeps what it is told to itself: the
//! worker serves another front end then, or none (`front_ends`).
//!
//! Any message that is malformed or cannot be carried out ends the connection; the disk is then free for the next.

mod channel;

use crate::config::{self, Geometry, MEM_SLOTS_MAX, WRITEBACK_OFFSET, feature};
use crate::dirty::DirtyLog;
use crate::front_ends::FrontEndId;
use crate::memory::{MemoryTable, Region, RegionPlace};
use crate::ring::{InflightRegion, Layout};
use crate::stats::Shared;
use crate::worker::{DriverFeatures, Handle, Reply, Request, StartRing, gone};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
};

/// How often a session that waits for the worker looks whether its front end is still there.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long a front end whose rings start waits for another to let go of the disk.
const CLAIM_PATIENCE: Duration = Duration::from_secs(5);

/// What all sessions of a disk share.
#[derive(Clone, Debug)]
pub(crate) struct SessionContext {
    pub worker: Handle,
    pub shared: Arc<Shared>,
    pub queues: u16,
    pub queue_size_max: u16,
    pub read_only: bool,
}

/// What the front end said about one queue.
#[derive(Debug, Default)]
struct QueueSetup {
    size: u16,
    /// Descriptor table, available ring, used ring: addresses in the front end's process.
    addresses: Option<(u64, u64, u64)>,
    base: u16,
    kick: Option<File>,
    call: Option<File>,
    enabled: bool,
    running: bool,
}

struct Session {
    context: SessionContext,
    id: FrontEndId,
    /// A second handle to the connection, to see it end while a message is being handled.
    peer: UnixStream,
    features: u64,
    memory: MemoryTable,
    queues: Vec<QueueSetup>,
    /// Used by rings that start from now on.
    inflight: Option<Arc<InflightRegion>>,
    /// Where pages that we write are marked while LOG_ALL is on.
    log: Option<Arc<DirtyLog>>,
    /// A ring of this connection was started before.
    started: bool,
}

/// Serves front end `id` until it leaves or is cut off. Blocks.
pub(crate) fn serve(stream: UnixStream, context: SessionContext, id: FrontEndId, path: &Path) {
    let (worker, shared) = (context.worker.clone(), Arc::clone(&context.shared));
    match Session::new(&stream, context, id) {
        Ok(session) => {
            tracing::info!(socket = %path.display(), "front end connected");
            let session = Arc::new(Mutex::new(session));
            let peer = stream.try_clone();
            let mut handler = BackendReqHandler::from_stream(stream, session);
            let end = loop {
                if let Some(channel) = peer.as_ref().ok().and_then(channel::peek) {
                    shared.front_ends.set_channel(id, channel);
                }
                if let Err(error) = handler.handle_request() {
                    break error;
                }
            };
            match end {
                Error::Disconnected | Error::SocketBroken(_) => {
                    tracing::info!(socket = %path.display(), "front end disconnected");
                }
                error => {
                    tracing::warn!(socket = %path.display(), %error, "session ended");
                }
            }
        }
        Err(error) => {
            tracing::warn!(socket = %path.display(), %error, "front end could not be served");
        }
    }
    if shared.front_ends.serves(id) {
        // An error means that the worker has ended, and its rings with it.
        let _ = worker.call(Request::EndSession);
    }
    shared.front_ends.leave(id);
}

impl Session {
    fn new(stream: &UnixStream, context: SessionContext, id: FrontEndId) -> io::Result<Self> {
        let queue = || QueueSetup { size: context.queue_size_max, ..QueueSetup::default() };
        let queues = std::iter::repeat_with(queue).take(usize::from(context.queues)).collect();
        Ok(Self {
            peer: stream.try_clone()?,
            features: 0,
            memory: MemoryTable::default(),
            queues,
            inflight: None,
            log: None,
            started: false,
            id,
            context,
        })
    }

    fn queue(&mut self, index: u32) -> Result<&mut QueueSetup> {
        usize::try_from(index)
            .ok()
            .and_then(|index| self.queues.get_mut(index))
            .ok_or(Error::InvalidParam)
    }

    /// Asks the worker and waits, as long as the front end is there.
    fn ask(&self, request: Request) -> Result<Option<u16>> {
        self.wait(&self.context.worker.send(request)).map_err(Error::ReqHandlerError)
    }

    fn wait(&self, answer: &Receiver<Reply>) -> Reply {
        loop {
            match answer.recv_timeout(LOOK_EVERY) {
                Ok(reply) => return reply,
                Err(RecvTimeoutError::Disconnected) => return Err(gone()),
                Err(RecvTimeoutError::Timeout) if hung_up(&self.peer) => {
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// The worker serves this session.
    fn is_served(&self) -> bool {
        self.context.shared.front_ends.serves(self.id)
    }

    /// Makes the worker serve this session: tells it what was kept back until now.
    fn claim(&mut self) -> Result<()> {
        if self.is_served() {
            return Ok(());
        }
        if !self.context.shared.front_ends.claim(self.id, CLAIM_PATIENCE) {
            return Err(Error::InvalidOperation("the disk is in use by another front end"));
        }
        let map = self.memory.snapshot().map_err(handler)?;
        self.ask(Request::Memory(Arc::new(map)))?;
        self.tell_features()
    }

    /// Tells the worker what was negotiated.
    fn tell_features(&self) -> Result<()> {
        self.ask(Request::Features(DriverFeatures {
            discard: self.features & feature::DISCARD != 0,
            write_zeroes: self.features & feature::WRITE_ZEROES != 0,
        }))?;
        self.tell_log()?;
        self.apply_write_cache()
    }

    /// Tells the worker where to mark the pages that it writes, if anywhere.
    fn tell_log(&self) -> Result<()> {
        let on = self.features & feature::LOG_ALL != 0;
        self.ask(Request::Log(self.log.clone().filter(|_| on))).map(|_| ())
    }

    /// Starts a queue if everything about it is known.
    fn try_start(&mut self, index: u32) -> Result<()> {
        let negotiated = self.features & feature::PROTOCOL_FEATURES != 0;
        let event_idx = self.features & feature::EVENT_IDX != 0;
        if self.memory.len() == 0 {
            return Ok(());
        }
        let queue = self.queue(index)?;
        let (false, Some(addresses), Some(_)) = (queue.running, queue.addresses, &queue.kick)
        else {
            return Ok(());
        };
        let (size, next_avail) = (queue.size, queue.base);
        // Without protocol features there is no message to enable a ring (vhost-user, "Ring states").
        let enabled = queue.enabled || !negotiated;
        let call = queue.call.as_ref().map(File::try_clone).transpose().map_err(handler)?;
        let layout = self.layout(size, addresses)?;
        self.claim()?;
        let Some(kick) = self.queue(index)?.kick.take() else { return Ok(()) };
        let queue = index as u16;
        let inflight = self.inflight.clone();
        let start =
            StartRing { queue, layout, next_avail, event_idx, kick, call, enabled, inflight };
        self.ask(Request::Start(start))?;
        self.queue(index)?.running = true;
        if !std::mem::replace(&mut self.started, true) {
            // The disk may have grown while this front end was served by nobody.
            self.context.shared.front_ends.config_may_have_changed(self.id);
        }
        Ok(())
    }

    fn layout(&self, size: u16, addresses: (u64, u64, u64)) -> Result<Layout> {
        let map = self.memory.snapshot().map_err(handler)?;
        let translate = |address| map.translate(address).ok_or(Error::InvalidParam);
        Ok(Layout {
            size,
            descriptors: translate(addresses.0)?,
            available: translate(addresses.1)?,
            used: translate(addresses.2)?,
        })
    }

    /// Stops a queue and remembers where it was. Returns when none of its requests is under way.
    fn stop(&mut self, index: u32) -> Result<()> {
        if self.queue(index)?.running {
            let base = self.ask(Request::Stop { queue: index as u16 })?;
            let queue = self.queue(index)?;
            queue.running = false;
            queue.base = base.unwrap_or(queue.base);
        }
        Ok(())
    }

    /// Hands the memory table to the worker, then starts what waited for memory.
    fn use_memory(&mut self) -> Result<()> {
        let map = self.memory.snapshot().map_err(handler)?;
        if self.is_served() {
            self.ask(Request::Memory(Arc::new(map)))?;
        }
        (0..u32::from(self.context.queues)).try_for_each(|index| self.try_start(index))
    }

    fn check_inflight(&self, region: &VhostUserInflight) -> Result<(u16, u16)> {
        let (queues, size) = (region.num_queues, region.queue_size);
        if queues > self.context.queues || size > self.context.queue_size_max {
            return Err(Error::InvalidParam);
        }
        Ok((queues, size))
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            capacity: self.context.shared.size.load(Ordering::Relaxed) / 512,
            queues: self.context.queues,
            writeback: self.context.shared.writeback.load(Ordering::Relaxed),
        }
    }

    /// Without a driver that flushes, writes must be durable when they complete.
    fn apply_write_cache(&self) -> Result<()> {
        let writeback = self.context.shared.writeback.load(Ordering::Relaxed);
        let flushes = self.features & feature::FLUSH != 0;
        let switchable = self.features & feature::CONFIG_WCE != 0;
        let write_through = !flushes || switchable && !writeback;
        self.ask(Request::WriteThrough(write_through)).map(|_| ())
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("RESET_DEVICE was not offered"))
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(config::device_features(self.context.read_only))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !config::device_features(self.context.read_only) != 0 {
            return Err(Error::FeatureMismatch);
        }
        self.features = features;
        if self.is_served() { self.tell_features() } else { Ok(()) }
    }

    fn set_mem_table(
        &mut self,
        places: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let regions = places.iter().zip(files).map(|(place, file)| {
            // Copied out one by one: the message is packed.
            let place = RegionPlace {
                guest: place.guest_phys_addr,
                size: place.memory_size,
                user: place.user_addr,
                file_offset: place.mmap_offset,
            };
            Region::map(place, file).map_err(handler)
        });
        let regions = regions.collect::<Result<Vec<_>>>()?;
        self.memory.replace(regions);
        self.use_memory()?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let most = self.context.queue_size_max;
        let queue = self.queue(index)?;
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        if queue.running || !size.is_power_of_two() || size > most {
            return Err(Error::InvalidParam);
        }
        queue.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = Some((descriptor, available, used));
        let queue = self.queue(index)?;
        if queue.running {
            // Sent again when dirty logging is switched. We mark the used ring by its guest address, in every case.
            return if queue.addresses == addresses { Ok(()) } else { Err(Error::InvalidParam) };
        }
        queue.addresses = addresses;
        self.try_start(index)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let queue = self.queue(index)?;
        if queue.running {
            return Err(Error::InvalidOperation("SET_VRING_BASE on a running ring"));
        }
        queue.base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.stop(index)?;
        let queue = self.queue(index)?;
        queue.kick = None;
        let base = u32::from(queue.base);
        if self.is_served() && !self.queues.iter().any(|queue| queue.running) {
            self.ask(Request::EndSession)?;
            self.context.shared.front_ends.release(self.id);
        }
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, kick: Option<File>) -> Result<()> {
        let kick = kick.ok_or(Error::InvalidOperation("rings without a kick eventfd"))?;
        check_eventfd(&kick)?;
        self.stop(index.into())?;
        self.queue(index.into())?.kick = Some(kick);
        self.try_start(index.into())
    }

    fn set_vring_call(&mut self, index: u8, call: Option<File>) -> Result<()> {
        call.as_ref().map(check_eventfd).transpose()?;
        let queue = self.queue(index.into())?;
        queue.call = call;
        if queue.running {
            let call = queue.call.as_ref().map(File::try_clone).transpose().map_err(handler)?;
            self.ask(Request::Call { queue: index.into(), call })?;
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _err: Option<File>) -> Result<()> {
        self.queue(index.into()).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(config::protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !config::protocol_features().bits() != 0 {
            return Err(Error::FeatureMismatch);
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.context.queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enabled: bool) -> Result<()> {
        let queue = self.queue(index)?;
        queue.enabled = enabled;
        if queue.running {
            self.ask(Request::Enable { queue: index as u16, enabled })?;
        }
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(config::read_config(self.geometry(), offset, size))
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        // The write cache switch is the only field that a driver may write.
        let byte = WRITEBACK_OFFSET.checked_sub(offset).and_then(|at| bytes.get(at as usize));
        let writeback = match byte {
            Some(0) => false,
            Some(1) => true,
            _ => return Err(Error::InvalidParam),
        };
        if !self.is_served() && self.context.shared.front_ends.count() > 1 {
            return Err(Error::InvalidOperation("the disk is in use by another front end"));
        }
        self.context.shared.writeback.store(writeback, Ordering::Relaxed);
        if let Some(region) = &self.inflight {
            region.set_write_cache(writeback);
        }
        if self.is_served() { self.apply_write_cache() } else { Ok(()) }
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("a disk has no display"))
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("SHARED_OBJECT was not offered"))
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = self.check_inflight(wanted)?;
        let (region, file) = InflightRegion::create(queues, size).map_err(handler)?;
        region.set_write_cache(self.context.shared.writeback.load(Ordering::Relaxed));
        self.inflight = Some(Arc::new(region));
        let len = InflightRegion::len(queues, size) as u64;
        Ok((VhostUserInflight::new(len, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, size) = self.check_inflight(given)?;
        let (offset, len) = (given.mmap_offset, given.mmap_size);
        let region = InflightRegion::map(file, offset, len, queues, size).map_err(handler)?;
        if let Some(on) = region.write_cache() {
            self.context.shared.writeback.store(on, Ordering::Relaxed);
            if self.is_served() {
                self.apply_write_cache()?;
            }
        }
        self.inflight = Some(Arc::new(region));
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MEM_SLOTS_MAX)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        if self.memory.len() as u64 >= MEM_SLOTS_MAX {
            return Err(Error::InvalidParam);
        }
        let place = RegionPlace {
            guest: region.guest_phys_addr,
            size: region.memory_size,
            user: region.user_addr,
            file_offset: region.mmap_offset,
        };
        self.memory.add(Region::map(place, file).map_err(handler)?);
        self.use_memory()?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        if !self.memory.remove(region.guest_phys_addr, region.memory_size) {
            return Err(Error::InvalidParam);
        }
        self.use_memory()
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("DEVICE_STATE was not offered"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("DEVICE_STATE was not offered"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("SHMEM was not offered"))
    }

    fn set_log_base(&mut self, place: &VhostUserLog, file: File) -> Result<()> {
        let (offset, len) = (place.mmap_offset, place.mmap_size);
        self.log = Some(Arc::new(DirtyLog::map(file, offset, len).map_err(handler)?));
        // The front end reads the former log once more when this is acknowledged, and never again.
        if self.is_served() { self.tell_log() } else { Ok(()) }
    }
}

/// The front end closed its end, or the server shut the connection down.
pub(crate) fn hung_up(peer: &UnixStream) -> bool {
    let flags = PollFlags::POLLHUP | PollFlags::POLLERR;
    let mut polled = [PollFd::new(peer.as_fd(), flags)];
    poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Anything but an eventfd could block us, or wake us without end.
fn check_eventfd(file: &File) -> Result<()> {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    let target = std::fs::read_link(link).map_err(handler)?;
    if target.as_os_str() == "anon_inode:[eventfd]" {
        return Ok(());
    }
    Err(Error::InvalidOperation("a kick or call file descriptor that is no eventfd"))
}

fn handler(error: io::Error) -> Error {
    Error::ReqHandlerError(error)
}
