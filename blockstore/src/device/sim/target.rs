//! The state that all sessions share, and what each action does to it. Synchronous: the caller holds
//! the lock and does the waiting.
//!
//! Every action is registered here before it takes effect. When a session ends, what it has in
//! flight is settled at once, so that nothing of it lands later; a dropped future's action stays
//! registered as an orphan and lands at some later moment of the same session.

use super::faults::FaultPlan;
use super::media::{Extent, Media};
use super::reach::ReachState;
use super::{Fault, OpCounts, OpKind, Reach, SimOptions, TRACE_LEN_MAX, TraceEntry};
use crate::buf::AlignedBuf;
use crate::device::{CawOutcome, DeviceErrorKind};
use bytes::Bytes;
use parking_lot::Mutex;
use rand::Rng;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// Why an action failed: the device's name and the range are added by the session.
pub(super) type Failure = (DeviceErrorKind, &'static str);

pub(super) const CUT_OFF: Failure = (
    DeviceErrorKind::Unreachable,
    "the session was lost while this was in flight; whether it was carried out is unknown",
);
pub(super) const NO_ANSWER: Failure =
    (DeviceErrorKind::Unreachable, "the simulated target does not answer");

pub(super) struct Target {
    pub(super) options: SimOptions,
    pub(super) state: Mutex<State>,
}

pub(super) struct State {
    pub(super) media: Media,
    pub(super) sessions: Vec<Session>,
    in_flight: BTreeMap<u64, InFlight>,
    next_id: u64,
    pub(super) full: bool,
    /// Bytes that fail operations of a kind, and how.
    pub(super) bad: Vec<(Range<u64>, OpKind, Fault)>,
    /// Blocks of which replies had a flipped bit, in the order of the replies.
    pub(super) garbled: Vec<u64>,
}

pub(super) struct Session {
    pub(super) epoch: u64,
    /// Rises when whatever is in flight is cut off.
    pub(super) incarnation: u64,
    pub(super) reach: Arc<ReachState>,
    pub(super) plan: FaultPlan,
    pub(super) counts: OpCounts,
    pub(super) trace: VecDeque<TraceEntry>,
    /// Operations that still pass before the host dies.
    pub(super) life: Option<u64>,
}

struct InFlight {
    session: usize,
    action: Action,
    orphan: bool,
}

/// An operation as the target sees it.
#[derive(Clone)]
pub(super) enum Action {
    Read { offset: u64, len: usize },
    Write { offset: u64, data: Bytes },
    Flush,
    CompareAndWrite { offset: u64, expected: Bytes, new: Bytes },
    Discard { offset: u64, len: u64 },
}

/// What a successful action returns.
pub(super) enum Reply {
    Done,
    Data(AlignedBuf),
    Compared(CawOutcome),
}

/// The fate of an operation, drawn when it begins.
#[derive(Clone, Copy)]
pub(super) enum Fate {
    Succeed,
    Fail(Fault),
    /// The host dies during this operation.
    Die,
}

impl Action {
    pub(super) fn kind(&self) -> OpKind {
        match self {
            Self::Read { .. } => OpKind::Read,
            Self::Write { .. } => OpKind::Write,
            Self::Flush => OpKind::Flush,
            Self::CompareAndWrite { .. } => OpKind::CompareAndWrite,
            Self::Discard { .. } => OpKind::Discard,
        }
    }

    /// Offset and length in bytes.
    pub(super) fn range(&self) -> (u64, u64) {
        match self {
            Self::Read { offset, len } => (*offset, *len as u64),
            Self::Write { offset, data } => (*offset, data.len() as u64),
            Self::Flush => (0, 0),
            Self::CompareAndWrite { offset, new, .. } => (*offset, new.len() as u64),
            Self::Discard { offset, len } => (*offset, *len),
        }
    }

    /// The same write elsewhere; other actions stay as they are.
    fn misdirected(self, by: u64, capacity: u64) -> Self {
        match self {
            Self::Write { offset, data } => {
                let places = (capacity - data.len() as u64) / 4096 + 1;
                let place = (offset / 4096).wrapping_add(by / 4096) % places;
                Self::Write { offset: place * 4096, data }
            }
            other => other,
        }
    }
}

impl Target {
    pub(super) fn new(options: SimOptions) -> Self {
        let media = Media::new(options.logical_block as usize, options.seed);
        Self::holding(options, media)
    }

    /// A copy of what is there now, without sessions; nothing in flight reaches it.
    pub(super) fn fork(&self, seed: u64) -> Self {
        let options = SimOptions { seed, ..self.options.clone() };
        let media = self.state.lock().media.fork(seed);
        Self::holding(options, media)
    }

    fn holding(options: SimOptions, media: Media) -> Self {
        let state = State {
            media,
            sessions: Vec::new(),
            in_flight: BTreeMap::new(),
            next_id: 0,
            full: false,
            bad: Vec::new(),
            garbled: Vec::new(),
        };
        Self { options, state: Mutex::new(state) }
    }
}

impl Session {
    pub(super) fn new(reach: Arc<ReachState>) -> Self {
        Self {
            epoch: 0,
            incarnation: 0,
            reach,
            plan: FaultPlan::default(),
            counts: OpCounts::default(),
            trace: VecDeque::new(),
            life: None,
        }
    }

    pub(super) fn record(&mut self, entry: TraceEntry) {
        if self.trace.len() == TRACE_LEN_MAX {
            self.trace.pop_front();
        }
        self.trace.push_back(entry);
    }
}

impl State {
    /// Counts an operation and draws its fate.
    pub(super) fn begin(&mut self, session: usize, action: &Action) -> Fate {
        let session = &mut self.sessions[session];
        session.counts.note(action);
        match &mut session.life {
            Some(0) => return Fate::Die,
            Some(left) => *left -= 1,
            None => {}
        }
        let (kind, (offset, len)) = (action.kind(), action.range());
        let touches = |bad: &Range<u64>| offset < bad.end && bad.start < offset + len;
        if let Some((.., fault)) = self.bad.iter().find(|(bad, of, _)| *of == kind && touches(bad))
        {
            return Fate::Fail(*fault);
        }
        session.plan.next(kind, &mut self.media.rng).map_or(Fate::Succeed, Fate::Fail)
    }

    /// Puts an action in flight and returns its id, unless the target is out of reach.
    pub(super) fn register(&mut self, session: usize, action: Action) -> Option<u64> {
        if self.sessions[session].reach.get() != Reach::Up {
            return None;
        }
        let id = self.next_id;
        self.next_id += 1;
        self.in_flight.insert(id, InFlight { session, action, orphan: false });
        Some(id)
    }

    /// The action's future is gone: if it had no effect yet, it will land later.
    pub(super) fn abandon(&mut self, id: u64) {
        if let Some(flight) = self.in_flight.get_mut(&id) {
            flight.orphan = true;
        }
    }

    /// Lets an action in flight meet its fate.
    pub(super) fn carry_out(
        &mut self,
        id: u64,
        fate: Fate,
        options: &SimOptions,
    ) -> Result<Reply, Failure> {
        let Some(InFlight { session, action, .. }) = self.in_flight.remove(&id) else {
            return Err(CUT_OFF);
        };
        self.land_an_orphan();
        match fate {
            Fate::Succeed => self.apply(action),
            Fate::Fail(fault) => self.apply_fault(session, action, fault, options),
            Fate::Die => {
                self.apply_unknown(&action);
                self.end_session(session, Reach::Dead);
                Err((DeviceErrorKind::Unreachable, "the simulated host died during this"))
            }
        }
    }

    /// Cuts a session off: what it has in flight lands in part or never, and never later.
    pub(super) fn end_session(&mut self, session: usize, then: Reach) {
        self.settle(session);
        let session = &mut self.sessions[session];
        session.epoch += 1;
        session.incarnation += 1;
        if session.reach.get() != Reach::Dead {
            session.reach.set(then);
        }
    }

    /// Loss of the volatile cache; every session is cut off.
    pub(super) fn lose_cache(&mut self, hosts_die: bool) {
        for session in 0..self.sessions.len() {
            let now = self.sessions[session].reach.get();
            self.end_session(session, if hosts_die { Reach::Dead } else { now });
        }
        self.media.crash();
    }

    fn settle(&mut self, session: usize) {
        let ids: Vec<u64> = self
            .in_flight
            .iter()
            .filter(|(_, flight)| flight.session == session)
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            if let Some(flight) = self.in_flight.remove(&id) {
                self.apply_unknown(&flight.action);
            }
        }
    }

    /// Sometimes an action whose future was dropped takes effect.
    fn land_an_orphan(&mut self) {
        let orphans = self.in_flight.iter().filter(|(_, flight)| flight.orphan);
        let ids: Vec<u64> = orphans.map(|(id, _)| *id).collect();
        if ids.is_empty() || self.media.rng.random() {
            return;
        }
        let chosen = ids[self.media.rng.random_range(0..ids.len())];
        if let Some(flight) = self.in_flight.remove(&chosen) {
            // Nobody waits for its result.
            let _ = self.apply(flight.action);
        }
    }

    fn apply(&mut self, action: Action) -> Result<Reply, Failure> {
        match action {
            Action::Read { offset, len } => {
                let mut buf = AlignedBuf::zeroed(len);
                self.media.read(offset, &mut buf);
                Ok(Reply::Data(buf))
            }
            Action::Write { offset, data } => {
                self.refuse_new(offset, data.len())?;
                self.media.write(offset, &data, &Extent::All);
                Ok(Reply::Done)
            }
            Action::Flush => {
                self.media.flush();
                Ok(Reply::Done)
            }
            Action::CompareAndWrite { offset, expected, new } => {
                let mut found = vec![0; expected.len()];
                self.media.read(offset, &mut found);
                if found != expected {
                    return Ok(Reply::Compared(CawOutcome::Miscompare));
                }
                self.refuse_new(offset, new.len())?;
                self.media.write(offset, &new, &Extent::All);
                Ok(Reply::Compared(CawOutcome::Written))
            }
            Action::Discard { offset, len } => {
                self.discard(offset, len);
                Ok(Reply::Done)
            }
        }
    }

    /// What a full target says of blocks that were never written.
    fn refuse_new(&self, offset: u64, len: usize) -> Result<(), Failure> {
        if self.full && self.media.has_hole(offset, len as u64) {
            return Err((DeviceErrorKind::NoSpace, "the simulated target is full"));
        }
        Ok(())
    }

    /// A discarded block reads as zeros, as before, or as garbage.
    fn discard(&mut self, offset: u64, len: u64) {
        const BLOCK: u64 = crate::types::BLOCK_SIZE as u64;
        // A device may ignore a part of a long discard, and the image stays small.
        for block in 0..(len / BLOCK).min(4096) {
            let fill = match self.media.rng.random_range(0..3) {
                0 => 0,
                1 => continue,
                _ => 0xdb,
            };
            let content = Bytes::from(vec![fill; BLOCK as usize]);
            self.media.write(offset + block * BLOCK, &content, &Extent::All);
        }
    }

    /// Carries out all, nothing or some of an operation whose outcome nobody will learn.
    fn apply_unknown(&mut self, action: &Action) {
        if let Action::Write { offset, data } = action {
            let extent = self.media.random_extent(data.len());
            self.media.write(*offset, data, &extent);
        } else if self.media.rng.random() {
            // Its result is lost with the session.
            let _ = self.apply(action.clone());
        }
    }

    fn apply_fault(
        &mut self,
        session: usize,
        action: Action,
        fault: Fault,
        options: &SimOptions,
    ) -> Result<Reply, Failure> {
        let is_write = matches!(action, Action::Write { .. });
        match fault {
            Fault::Io => {
                self.apply_failed(session, &action);
                Err((DeviceErrorKind::Io, "simulated media error"))
            }
            Fault::NoSpace => {
                self.apply_failed(session, &action);
                Err((DeviceErrorKind::NoSpace, "simulated lack of space"))
            }
            Fault::Unreachable => {
                self.end_session(session, Reach::Up);
                Err((DeviceErrorKind::Unreachable, "simulated outage; nothing was done"))
            }
            Fault::Unknown => {
                self.apply_unknown(&action);
                self.end_session(session, Reach::Up);
                Err(CUT_OFF)
            }
            Fault::UnknownApplied => {
                // Its result is lost with the session.
                let _ = self.apply(action);
                self.end_session(session, Reach::Up);
                Err(CUT_OFF)
            }
            Fault::Misdirected(by) => self.apply(action.misdirected(by, options.capacity)),
            Fault::Lost if is_write => Ok(Reply::Done),
            Fault::Lost => self.apply(action),
            Fault::Garbled => {
                let (offset, _) = action.range();
                let mut reply = self.apply(action)?;
                if let Reply::Data(buf) = &mut reply
                    && !buf.is_empty()
                {
                    let at = self.media.rng.random_range(0..buf.len());
                    buf[at] ^= 1 << self.media.rng.random_range(0..8);
                    self.garbled.push((offset + at as u64) / crate::types::BLOCK_SIZE as u64);
                }
                Ok(reply)
            }
        }
    }

    /// Side effects of an operation that the target reports as failed.
    fn apply_failed(&mut self, session: usize, action: &Action) {
        match action {
            Action::Write { .. } => self.apply_unknown(action),
            Action::Flush => {
                self.media.fail_flush();
                self.sessions[session].epoch += 1;
            }
            Action::Read { .. } | Action::CompareAndWrite { .. } | Action::Discard { .. } => {}
        }
    }
}
