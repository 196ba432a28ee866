//! A simulated shared device: in memory, deterministic from a seed, with a volatile write cache and
//! every fault that the store promises to survive.
//!
//! One *target* holds the data; each [`SimDevice`] is one host's *session* with it. Clones of a
//! `SimDevice` share the session (a test keeps one as its remote control), [`SimDevice::connect`]
//! opens another one, for a second host or after a crash.
//!
//! * Writes and compare-and-writes are seen by reads at once and become durable by a flush of any
//!   session. [`SimDevice::crash`] and [`SimDevice::lose_session`] settle what is left of the others.
//! * Operations in flight together are carried out in an order drawn from the seed. A write whose
//!   future was dropped goes on by itself and may land much later, as on a real device.
//! * Nothing sleeps; delays are `yield_now`. On a current-thread runtime a run repeats exactly.

mod faults;
mod media;
mod ops;
mod reach;
mod target;
#[cfg(test)]
mod tests;

pub use faults::{Fault, FaultRates};
pub use ops::{OpCounts, OpKind, SimOptions, TRACE_LEN_MAX, TraceEntry};

use super::{BlockDevice, CawOutcome, Device, DeviceError, DeviceErrorKind, DeviceInfo};
use crate::buf::AlignedBuf;
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use rand::Rng;
use reach::ReachState;
use std::fmt;
use std::sync::Arc;
use target::{Action, CUT_OFF, Failure, NO_ANSWER, Reply, Session, Target};

/// What a session gets from its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Answers.
    Up,
    /// Every operation fails at once with `Unreachable`.
    Failing,
    /// Operations wait until this changes.
    Hanging,
    /// This host died: operations fail with `Unreachable` for good.
    Dead,
}

/// One host's session with a simulated device. Cloning shares the session.
#[derive(Clone)]
pub struct SimDevice {
    target: Arc<Target>,
    session: usize,
    reach: Arc<ReachState>,
    info: Arc<DeviceInfo>,
}

impl SimDevice {
    /// A device of `capacity` bytes (a multiple of 4096), all zero, and a first session with it.
    #[must_use]
    pub fn new(capacity: u64, seed: u64) -> Self {
        Self::with_options(SimOptions::new(capacity, seed))
    }

    /// As [`new`](Self::new) with every option.
    ///
    /// # Panics
    /// If the capacity or the logical block is none a device can have.
    #[must_use]
    pub fn with_options(options: SimOptions) -> Self {
        assert!(options.capacity.is_multiple_of(4096), "capacity must be whole blocks");
        assert!(matches!(options.logical_block, 512 | 4096), "logical block must be 512 or 4096");
        Self::open_session(Arc::new(Target::new(options)))
    }

    fn open_session(target: Arc<Target>) -> Self {
        let reach = Arc::new(ReachState::new(Reach::Up));
        let session = {
            let mut state = target.state.lock();
            state.sessions.push(Session::new(Arc::clone(&reach)));
            state.sessions.len() - 1
        };
        let options = &target.options;
        let info = Arc::new(DeviceInfo {
            url: format!("sim:{}#{session}", options.seed),
            capacity: options.capacity,
            logical_block: options.logical_block,
            compare_and_write: options.compare_and_write,
            discard: options.discard,
            discard_granularity: options.discard_granularity,
            discard_alignment: 0,
        });
        Self { target, session, reach, info }
    }

    /// A new session with the same target: another host, or this one after its crash. No faults
    /// are planned in it.
    #[must_use]
    pub fn connect(&self) -> Self {
        Self::open_session(Arc::clone(&self.target))
    }

    /// An independent device with a copy of all that this one holds now, unflushed writes included: shows what a power
    /// loss at this moment would leave, without having one.
    #[must_use]
    pub fn fork(&self, seed: u64) -> Self {
        Self::open_session(Arc::new(self.target.fork(seed)))
    }

    /// This session as the store takes it.
    #[must_use]
    pub fn device(&self) -> Device {
        Arc::new(self.clone())
    }

    /// Power loss of the target and of every host: unflushed writes are independently kept, lost,
    /// torn or reordered, and all sessions are dead. Go on with [`connect`](Self::connect).
    pub fn crash(&self) {
        self.target.state.lock().lose_cache(true);
    }

    /// Death of this host alone (`kill -9`): what it had in flight lands or does not, the target
    /// keeps its cache, later operations of this session fail.
    pub fn kill_host(&self) {
        self.target.state.lock().end_session(self.session, Reach::Dead);
    }

    /// Restart of the target under living hosts: unflushed writes may be lost, torn or reordered,
    /// operations in flight fail with unknown outcome, and every session's epoch rises.
    pub fn lose_session(&self) {
        self.target.state.lock().lose_cache(false);
    }

    /// Cuts this session off from the target, or heals it. [`Reach::Failing`] ends the session (epoch
    /// +1, operations in flight fail with unknown outcome), [`Reach::Hanging`] only delays.
    pub fn set_reach(&self, reach: Reach) {
        let mut state = self.target.state.lock();
        let now = self.reach.get();
        if now == Reach::Dead || now == reach {
            return;
        }
        if matches!(reach, Reach::Failing | Reach::Dead) {
            state.end_session(self.session, reach);
        } else {
            self.reach.set(reach);
        }
    }

    /// Short for [`set_reach`](Self::set_reach) with `Up` or `Failing`.
    pub fn set_reachable(&self, reachable: bool) {
        self.set_reach(if reachable { Reach::Up } else { Reach::Failing });
    }

    /// Lets `operations` more of this session pass; the one after them has an unknown outcome, and
    /// it and all later ones fail with `Unreachable`: the host is dead. Call [`crash`](Self::crash) (power loss) or
    /// just [`connect`](Self::connect) (the process died) to go on.
    pub fn crash_after(&self, operations: u64) {
        self.target.state.lock().sessions[self.session].life = Some(operations);
    }

    /// True once this session's host died.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.reach.get() == Reach::Dead
    }

    /// Completes when the host has died, so that a test can `select!` on it.
    pub async fn died(&self) {
        self.reach.wait_for(|reach| reach == Reach::Dead).await;
    }

    /// Plans one fault: for the next operation of this kind, or after `skip` of them.
    pub fn inject(&self, kind: OpKind, skip: u64, fault: Fault) {
        self.target.state.lock().sessions[self.session].plan.once.push((kind, skip, fault));
    }

    /// Sets the rates of faults that come by themselves. Zero them to heal the session.
    pub fn set_rates(&self, rates: FaultRates) {
        self.target.state.lock().sessions[self.session].plan.rates = rates;
    }

    /// A full thin-provisioned target: writes and compare-and-writes to blocks never written before fail with
    /// `NoSpace`.
    pub fn set_full(&self, full: bool) {
        self.target.state.lock().full = full;
    }

    /// Bad sectors: operations of these kinds that touch the range fail with [`Fault::Io`] from now on, others on it do not.
    pub fn set_bad(&self, offset: u64, len: u64, kinds: &[OpKind]) {
        self.set_faulty(offset, len, kinds, Fault::Io);
    }

    /// Sectors at which the target drops the session: as [`set_bad`](Self::set_bad), with [`Fault::Unreachable`].
    pub fn set_dropping(&self, offset: u64, len: u64, kinds: &[OpKind]) {
        self.set_faulty(offset, len, kinds, Fault::Unreachable);
    }

    fn set_faulty(&self, offset: u64, len: u64, kinds: &[OpKind], fault: Fault) {
        let range = offset..offset + len;
        let mut state = self.target.state.lock();
        state.bad.retain(|(bad, ..)| *bad != range);
        state.bad.extend(kinds.iter().map(|kind| (range.clone(), *kind, fault)));
    }

    /// Bit rot: flips the bits of `mask` in the byte at `offset`, for good.
    ///
    /// # Panics
    /// If the offset lies outside the device.
    pub fn corrupt(&self, offset: u64, mask: u8) {
        assert!(offset < self.info.capacity, "offset {offset} lies outside the device");
        self.target.state.lock().media.corrupt(offset, mask);
    }

    /// A write that went astray: the block at `offset` holds `content` instead of its own, for good.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn misplace(&self, offset: u64, content: &[u8; 4096]) {
        assert!(offset.is_multiple_of(4096) && offset < self.info.capacity, "no block at {offset}");
        self.target.state.lock().media.put(offset / 4096, content);
    }

    /// What the device shows at the moment, without an operation.
    ///
    /// # Panics
    /// If the range lies outside the device.
    #[must_use]
    pub fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        assert!(offset + len as u64 <= self.info.capacity, "range lies outside the device");
        let mut buf = vec![0; len];
        self.target.state.lock().media.read(offset, &mut buf);
        buf
    }

    /// What would be left at this range if everything unflushed were lost now.
    ///
    /// # Panics
    /// If the range lies outside the device.
    #[must_use]
    pub fn peek_durable(&self, offset: u64, len: usize) -> Vec<u8> {
        assert!(offset + len as u64 <= self.info.capacity, "range lies outside the device");
        let mut buf = vec![0; len];
        self.target.state.lock().media.read_durable(offset, &mut buf);
        buf
    }

    /// Numbers of all blocks that were ever written, in order.
    #[must_use]
    pub fn written_blocks(&self) -> Vec<u64> {
        self.target.state.lock().media.written_blocks()
    }

    /// Blocks of which a reply to any session had a flipped bit ([`Fault::Garbled`]), in the order of the replies.
    #[must_use]
    pub fn garbled(&self) -> Vec<u64> {
        self.target.state.lock().garbled.clone()
    }

    /// Bytes.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.info.capacity
    }

    /// Faults come by themselves.
    #[must_use]
    pub fn is_faulty(&self) -> bool {
        self.target.state.lock().sessions[self.session].plan.rates != FaultRates::default()
    }

    /// Writes that a crash may undo.
    #[must_use]
    pub fn unflushed_count(&self) -> usize {
        self.target.state.lock().media.unflushed_count()
    }

    /// Operations that this session has begun.
    #[must_use]
    pub fn counts(&self) -> OpCounts {
        self.target.state.lock().sessions[self.session].counts
    }

    /// The last [`TRACE_LEN_MAX`] finished operations of this session, oldest first.
    #[must_use]
    pub fn trace(&self) -> Vec<TraceEntry> {
        self.target.state.lock().sessions[self.session].trace.iter().copied().collect()
    }

    async fn run(&self, action: Action) -> Result<Reply, DeviceError> {
        let (kind, (offset, len)) = (action.kind(), action.range());
        let result = self.attempt(action).await;
        let error = result.as_ref().err().map(|(error, _)| *error);
        let entry = TraceEntry { kind, offset, len, error };
        self.target.state.lock().sessions[self.session].record(entry);
        result.map_err(|(error, message)| self.info.error(error, kind.name(), offset, len, message))
    }

    async fn attempt(&self, action: Action) -> Result<Reply, Failure> {
        let kind = action.kind();
        let fate = self.target.state.lock().begin(self.session, &action);
        let flight = self.take_off(action).await?;
        flight.delay().await;
        if kind == OpKind::Discard {
            flight.linger().await;
        }
        let reply = {
            let mut state = self.target.state.lock();
            state.carry_out(flight.id, fate, &self.target.options)?
        };
        flight.delay().await;
        let incarnation = self.target.state.lock().sessions[self.session].incarnation;
        if incarnation == flight.incarnation { Ok(reply) } else { Err(CUT_OFF) }
    }

    /// Waits until the target can be reached and puts the action in flight.
    async fn take_off(&self, action: Action) -> Result<Flight<'_>, Failure> {
        loop {
            if self.wait_while_hanging().await != Reach::Up {
                return Err(NO_ANSWER);
            }
            let mut state = self.target.state.lock();
            if let Some(id) = state.register(self.session, action.clone()) {
                let incarnation = state.sessions[self.session].incarnation;
                return Ok(Flight { device: self, id, incarnation });
            }
        }
    }

    async fn wait_while_hanging(&self) -> Reach {
        self.reach.wait_for(|reach| reach != Reach::Hanging).await
    }
}

/// An operation on its way. Dropped before it took effect, it lands later or never.
struct Flight<'a> {
    device: &'a SimDevice,
    id: u64,
    incarnation: u64,
}

impl Flight<'_> {
    /// Yields a seeded number of times, and for as long as the target hangs.
    async fn delay(&self) {
        self.yield_up_to(self.device.target.options.yields_max).await;
    }

    /// What a discard takes longer.
    async fn linger(&self) {
        self.yield_up_to(self.device.target.options.discard_yields_max).await;
    }

    async fn yield_up_to(&self, yields_max: u32) {
        let target = &self.device.target;
        let yields = target.state.lock().media.rng.random_range(0..=yields_max);
        for _ in 0..yields {
            tokio::task::yield_now().await;
        }
        self.device.wait_while_hanging().await;
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.device.target.state.lock().abandon(self.id);
    }
}

impl fmt::Debug for SimDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDevice").field("info", &self.info).finish_non_exhaustive()
    }
}

#[async_trait]
impl BlockDevice for SimDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    async fn read(&self, offset: u64, len: usize) -> Result<AlignedBuf, DeviceError> {
        self.info.check_range("read", offset, len as u64)?;
        match self.run(Action::Read { offset, len }).await? {
            Reply::Data(buf) => Ok(buf),
            Reply::Done | Reply::Compared(_) => unreachable!("a read replies with data"),
        }
    }

    async fn write(&self, offset: u64, mut data: Vec<Bytes>) -> Result<(), DeviceError> {
        self.info.check_write(offset, &data)?;
        let data = if data.len() == 1 {
            data.remove(0)
        } else {
            let mut whole = BytesMut::new();
            data.iter().for_each(|piece| whole.extend_from_slice(piece));
            whole.freeze()
        };
        self.run(Action::Write { offset, data }).await.map(|_| ())
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        self.run(Action::Flush).await.map(|_| ())
    }

    async fn compare_and_write(
        &self,
        offset: u64,
        expected: Bytes,
        new: Bytes,
    ) -> Result<CawOutcome, DeviceError> {
        self.info.check_caw(offset, &expected, &new)?;
        match self.run(Action::CompareAndWrite { offset, expected, new }).await? {
            Reply::Compared(outcome) => Ok(outcome),
            Reply::Done | Reply::Data(_) => {
                unreachable!("a compare-and-write replies with its outcome")
            }
        }
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), DeviceError> {
        self.info.check_discard(offset, len)?;
        if !self.info.discard {
            let message = "the simulated target has no discard";
            return Err(self.info.error(
                DeviceErrorKind::Unsupported,
                "discard",
                offset,
                len,
                message,
            ));
        }
        self.run(Action::Discard { offset, len }).await.map(|_| ())
    }

    fn epoch(&self) -> u64 {
        self.target.state.lock().sessions[self.session].epoch
    }
}
