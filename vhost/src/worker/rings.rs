//! The queues of a session as the worker sees them: a ring each, its eventfds, and who waits for it to stop.

use super::control::{Reply, StartRing};
use super::uring::{Token, Uring};
use crate::dirty::DirtyLog;
use crate::memory::GuestMap;
use crate::request::Chain;
use crate::ring::SplitRing;
use crossbeam_channel::Sender;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

/// One queue.
#[derive(Debug, Default)]
pub(super) struct Queue {
    running: Option<Running>,
    /// Tells the polls of one eventfd after another apart.
    arming: u32,
}

#[derive(Debug)]
struct Running {
    ring: SplitRing,
    kick: File,
    call: Option<File>,
    enabled: bool,
    /// The guest broke the ring: nothing more is taken from it.
    broken: bool,
    /// The memory table leaves the ring out for now: front ends take regions away and give them back in other cuts.
    unmapped: bool,
    /// Requests taken and not given back.
    in_flight: u16,
    /// Who waits for `in_flight` to become 0.
    stopping: Option<Sender<Reply>>,
}

impl Running {
    /// Requests may be taken from it now. As many are under way as the ring has entries at most, whatever the guest does.
    fn takes(&self) -> bool {
        self.enabled && !self.broken && self.stopping.is_none() && self.in_flight < self.ring.size()
    }
}

/// All queues of the disk.
#[derive(Debug)]
pub(super) struct Queues {
    queues: Vec<Queue>,
    /// Interrupts sent.
    pub interrupts: u64,
}

impl Queues {
    pub(super) fn new(count: u16) -> Self {
        let queues = std::iter::repeat_with(Queue::default).take(usize::from(count)).collect();
        Self { queues, interrupts: 0 }
    }

    /// Number of queues, running or not.
    pub(super) fn len(&self) -> u16 {
        self.queues.len() as u16
    }

    fn running(&mut self, queue: u16) -> Option<&mut Running> {
        self.queues.get_mut(usize::from(queue))?.running.as_mut()
    }

    /// Starts to serve a ring.
    pub(super) fn start(
        &mut self,
        start: StartRing,
        map: &Arc<GuestMap>,
        log: Option<&Arc<DirtyLog>>,
        uring: &mut Uring,
    ) -> std::io::Result<()> {
        let mut ring =
            SplitRing::new(start.layout, Arc::clone(map), start.event_idx, start.next_avail)?;
        ring.set_log(log.cloned());
        if let Some(region) = &start.inflight {
            ring.track(region, start.queue);
        }
        let queue = &mut self.queues[usize::from(start.queue)];
        queue.arming = queue.arming.wrapping_add(1);
        let token = Token::Kick { queue: start.queue, arming: queue.arming };
        uring.poll(start.kick.as_raw_fd(), token);
        // The process before this one may have died between publishing completions and telling the guest.
        self.interrupts += signal(start.call.as_ref());
        queue.running = Some(Running {
            ring,
            kick: start.kick,
            call: start.call,
            enabled: start.enabled,
            broken: false,
            unmapped: false,
            in_flight: 0,
            stopping: None,
        });
        Ok(())
    }

    /// Stops taking requests from a ring; `reply` gets its index once none is under way.
    pub(super) fn stop(&mut self, queue: u16, reply: Sender<Reply>) {
        match self.running(queue) {
            Some(running) => running.stopping = Some(reply),
            None => drop(reply.send(Ok(None))),
        }
    }

    /// Forgets every ring without waiting.
    pub(super) fn abandon(&mut self, uring: &mut Uring) {
        for (index, queue) in (0u16..).zip(&mut self.queues) {
            if let Some(running) = queue.running.take() {
                uring.stop_poll(Token::Kick { queue: index, arming: queue.arming });
                consume(&running.kick);
            }
        }
    }

    /// The kick eventfd's poll ended: starts another one, unless the ring is gone.
    pub(super) fn rearm(&mut self, index: u16, arming: u32, uring: &mut Uring) {
        let Some(queue) = self.queues.get_mut(usize::from(index)) else { return };
        if let (Some(running), true) = (&queue.running, queue.arming == arming) {
            uring.poll(running.kick.as_raw_fd(), Token::Kick { queue: index, arming });
        }
    }

    /// Replaces the interrupt eventfd and signals the new one: an interrupt may have been due meanwhile.
    pub(super) fn set_call(&mut self, queue: u16, call: Option<File>) {
        let mut sent = 0;
        if let Some(running) = self.running(queue) {
            running.call = call;
            sent = signal(running.call.as_ref());
        }
        self.interrupts += sent;
    }

    pub(super) fn set_enabled(&mut self, queue: u16, enabled: bool) {
        if let Some(running) = self.running(queue) {
            running.enabled = enabled;
        }
    }

    /// Moves all rings to another snapshot of the guest's memory. A ring that does not lie in it rests, on the former
    /// snapshot, until one comes that it lies in.
    pub(super) fn remap(&mut self, map: &Arc<GuestMap>) {
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let Some(running) = &mut queue.running else { continue };
            let moved = running.ring.remap(Arc::clone(map));
            running.unmapped = moved.is_err();
            if let Err(error) = moved {
                tracing::info!(queue = index, %error, "the new memory table leaves out a running ring: it rests");
            }
        }
    }

    /// Marks what is written to the rings from now on in `log`, or nowhere.
    pub(super) fn set_log(&mut self, log: Option<&Arc<DirtyLog>>) {
        for running in self.queues.iter_mut().filter_map(|queue| queue.running.as_mut()) {
            running.ring.set_log(log.cloned());
        }
    }

    /// Takes the next chain from a queue, with the memory that it lies in.
    pub(super) fn pop(&mut self, queue: u16) -> Option<(Chain, Arc<GuestMap>)> {
        let running = self.running(queue)?;
        if !running.takes() {
            return None;
        }
        match running.ring.pop() {
            Ok(chain) => {
                let chain = chain?;
                running.in_flight += 1;
                Some((chain, Arc::clone(running.ring.map())))
            }
            Err(error) => {
                tracing::warn!(queue, %error, "the guest broke a ring: nothing more is taken from it");
                running.broken = true;
                None
            }
        }
    }

    /// Gives a chain back.
    pub(super) fn push(&mut self, queue: u16, head: u16, written: u32) {
        if let Some(running) = self.running(queue) {
            running.ring.push_used(head, written);
            running.in_flight -= 1;
        }
    }

    /// Shows the guest what was given back, interrupts it where it wants that, and ends rings that were to stop.
    pub(super) fn publish(&mut self, uring: &mut Uring) {
        for (index, queue) in (0u16..).zip(&mut self.queues) {
            let Some(running) = &mut queue.running else { continue };
            if running.ring.publish() {
                self.interrupts += signal(running.call.as_ref());
            }
            if running.in_flight == 0 && running.stopping.is_some() {
                uring.stop_poll(Token::Kick { queue: index, arming: queue.arming });
                consume(&running.kick);
                let base = running.ring.next_avail();
                let waiting = running.stopping.take();
                queue.running = None;
                waiting.map(|reply| reply.send(Ok(Some(base))));
            }
        }
    }

    /// Queues that take requests, if there are any.
    fn taking(&mut self) -> impl Iterator<Item = &mut Running> {
        let running = self.queues.iter_mut().filter_map(|queue| queue.running.as_mut());
        running.filter(|running| running.takes())
    }

    /// Asks the guest to kick; true if requests came meanwhile that can be taken at once.
    pub(super) fn want_kicks(&mut self) -> bool {
        let mut more = false;
        // Each of them is asked, whatever the others say.
        for running in self.taking() {
            more |= running.ring.want_kicks();
        }
        more
    }

    /// There are requests that can be taken.
    pub(super) fn has_requests(&mut self) -> bool {
        self.taking().any(|running| running.ring.has_more())
    }

    /// Tells the guest that kicks are not needed for now.
    pub(super) fn refuse_kicks(&mut self) {
        for running in self.queues.iter_mut().filter_map(|queue| queue.running.as_mut()) {
            running.ring.refuse_kicks();
        }
    }
}

/// Adds one to an eventfd; 1 if there is one. Fails only if its counter is full, and then it is signalled anyway.
fn signal(call: Option<&File>) -> u64 {
    call.map_or(0, |mut call| {
        let _ = call.write(&1u64.to_ne_bytes());
        1
    })
}

/// Empties a kick eventfd, as a front end expects of one that was polled: a counter left above zero looks to it like a
/// kick that nobody served.
fn consume(mut kick: &File) {
    let mut poll = [nix::poll::PollFd::new(kick.as_fd(), nix::poll::PollFlags::POLLIN)];
    if nix::poll::poll(&mut poll, nix::poll::PollTimeout::ZERO) == Ok(1) {
        let _ = kick.read(&mut [0; 8]);
    }
}
