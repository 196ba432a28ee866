//! Commands of callers: waiting for a session, under way, or withheld after a loss. No I/O, time is an
//! input; every command is answered exactly once.
//!
//! When a session is lost, commands that it left open part ways: reads are queued again for the next one; a
//! flush fails at once; a write, compare-and-write or discard is *withheld*: its caller hears `Unreachable`
//! only after a login under the same ISID has made the target drop the old session and everything it
//! still had in flight. So no caller can overwrite or reuse a block that an old write may yet reach.
//!
//! Bounds: [`DEPTH_MAX`] commands under way, [`WAITING_MAX`] waiting, the rest in the channel. As many may be
//! withheld as were under way, since nothing new is sent before they are told.

use super::link::{Command, Reply};
use super::outcome::{Class, Ending, Failure, Verdict, judge};
use crate::buf::AlignedBuf;
use crate::device::DeviceErrorKind;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Commands under way at a target at most.
pub const DEPTH_MAX: usize = 64;
/// Fewest commands under way, however small the target's command window is.
const DEPTH_MIN: usize = 2;
/// Commands taken from the channel that wait for their turn or for a session.
const WAITING_MAX: usize = 128;
/// A read is given up after this many sessions were lost under it.
const ATTEMPTS_MAX: u32 = 5;
/// Pause after the target said that it is busy.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// The commands of one device.
#[derive(Debug)]
pub struct Queue {
    waiting: VecDeque<Waiting>,
    running: HashMap<usize, Running>,
    /// Cut-off commands that may still land, until the next login.
    withheld: Vec<Command>,
    next_id: usize,
    depth: usize,
    busy_until: Duration,
    /// How long a command may be under way, or be put off by a busy target.
    command_max: Duration,
}

#[derive(Debug)]
struct Waiting {
    command: Command,
    since: Duration,
    first_sent: Option<Duration>,
    /// Sessions lost under it.
    losses: u32,
}

#[derive(Debug)]
struct Running {
    command: Command,
    first_sent: Duration,
    losses: u32,
    deadline: Duration,
}

impl Queue {
    /// An empty queue that gives out ids from `first_id`.
    pub fn new(first_id: usize, command_max: Duration) -> Self {
        Self {
            waiting: VecDeque::new(),
            running: HashMap::new(),
            withheld: Vec::new(),
            next_id: first_id,
            depth: DEPTH_MAX,
            busy_until: Duration::ZERO,
            command_max,
        }
    }

    /// Whether another command may be pushed.
    pub fn has_room(&self) -> bool {
        self.waiting.len() < WAITING_MAX
    }

    /// True if nothing waits or is under way that anyone still cares for.
    pub fn is_idle(&mut self) -> bool {
        self.waiting.retain(|waiting| !waiting.command.reply.is_closed());
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Commands under way.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Takes a command in.
    pub fn push(&mut self, now: Duration, command: Command) {
        self.waiting.push_back(Waiting { command, since: now, first_sent: None, losses: 0 });
    }

    /// The next command to send, from now on under way. Only while a session is up.
    pub fn next(&mut self, now: Duration) -> Option<(usize, &Command)> {
        if self.running.len() >= self.depth || now < self.busy_until {
            return None;
        }
        let Waiting { command, first_sent, losses, .. } = loop {
            let waiting = self.waiting.pop_front()?;
            // Nobody waits for the answer to this question any more.
            if !(waiting.command.class.is_repeatable() && waiting.command.reply.is_closed()) {
                break waiting;
            }
        };
        let id = self.next_id;
        self.next_id += 1;
        let first_sent = first_sent.unwrap_or(now);
        let deadline = now + self.command_max;
        let running = Running { command, first_sent, losses, deadline };
        Some((id, &self.running.entry(id).insert_entry(running).into_mut().command))
    }

    /// When something in here wants attention next; `up`: a session is there to send on.
    pub fn next_tick(&self, now: Duration, up: bool) -> Option<Duration> {
        if self.waiting.is_empty() {
            return None;
        }
        let busy = up && self.busy_until > now;
        Some(if busy { self.busy_until } else { now + Duration::from_millis(100) })
    }

    /// Since when the target owes an answer, if that is too long.
    pub fn overdue(&self, now: Duration) -> Option<Duration> {
        let overdue = self.running.values().find(|running| now >= running.deadline)?;
        Some(now.saturating_sub(overdue.first_sent))
    }

    /// Fails what has waited for a session for `patience`.
    pub fn expire(&mut self, now: Duration, patience: Duration, failure: &Failure) {
        let expired = |waiting: &Waiting| now.saturating_sub(waiting.since) >= patience;
        let (expired, waiting) = self.waiting.drain(..).partition::<VecDeque<_>, _>(expired);
        self.waiting = waiting;
        for waiting in expired {
            answer(waiting.command, Err(failure.clone()));
        }
    }

    /// The session is lost; the epoch has risen already. Nothing that was under way will be answered.
    pub fn cut_off(&mut self, now: Duration, why: &str) {
        self.depth = DEPTH_MAX;
        let mut cut_off: Vec<_> = self.running.drain().collect();
        // From the last to the first, as each goes to the front.
        cut_off.sort_unstable_by_key(|(id, _)| std::cmp::Reverse(*id));
        for (_, Running { command, first_sent, losses, .. }) in cut_off {
            let losses = losses + 1;
            if command.class.alters_medium() {
                self.withheld.push(command);
            } else if command.class.is_repeatable() && losses < ATTEMPTS_MAX {
                let first_sent = Some(first_sent);
                self.waiting.push_front(Waiting { command, since: now, first_sent, losses });
            } else {
                answer(command, Err(unreachable(format!("the session was lost ({why})"))));
            }
        }
    }

    /// A login under the same ISID succeeded: the target dropped what earlier sessions left in flight.
    pub fn tell_withheld(&mut self, why: &str) {
        for command in self.withheld.drain(..) {
            let message = format!(
                "the session was lost ({why}) before the target answered; the outcome is unknown, but \
                 the command can no longer take effect"
            );
            answer(command, Err(unreachable(message)));
        }
    }

    /// A command ended. Raises `epoch` before it is told that the target was reset. False: nobody knows how it
    /// ended, and the session must be given up.
    pub fn ended(
        &mut self,
        now: Duration,
        id: usize,
        ending: Ending,
        data: Option<AlignedBuf>,
        missing: usize,
        epoch: &AtomicU64,
    ) -> bool {
        let Some(running) = self.running.remove(&id) else { return true };
        let class = running.command.class;
        match judge(class, ending) {
            Verdict::Done if class == Class::Read && missing > 0 => {
                let message = format!("the target left out {missing} bytes of the data");
                answer(running.command, Err(Failure::new(DeviceErrorKind::Io, message)));
            }
            Verdict::Done => {
                answer(running.command, Ok(Reply { data, missing, miscompare: false }));
            }
            Verdict::Miscompare => {
                answer(running.command, Ok(Reply { miscompare: true, ..Reply::default() }));
            }
            Verdict::Again => self.again(now, running),
            Verdict::AgainLater => {
                self.busy_until = now + BUSY_PAUSE;
                self.depth = (self.depth / 2).max(DEPTH_MIN);
                self.again(now, running);
            }
            Verdict::Reset => {
                epoch.fetch_add(1, Ordering::AcqRel);
                if class.is_repeatable() {
                    self.again(now, running);
                } else {
                    let message = "the target was reset and may have lost writes that were not \
                                   flushed; the command was not carried out";
                    answer(running.command, Err(unreachable(message.to_owned())));
                }
            }
            Verdict::Failed(failure) => {
                if class == Class::Flush {
                    // What it did not write may never be written, and the next flush may succeed all the same (rule C1).
                    epoch.fetch_add(1, Ordering::AcqRel);
                }
                answer(running.command, Err(failure));
            }
            Verdict::SessionBroken => {
                self.running.insert(id, running);
                return false;
            }
        }
        true
    }

    /// Keeps the number of commands below the target's window, so that a NOP always finds room. `blocked`:
    /// PDUs that could not be sent for want of it.
    pub fn follow_window(&mut self, blocked: Option<usize>) {
        if let Some(blocked) = blocked {
            let sent = self.running.len().saturating_sub(blocked);
            self.depth = sent.saturating_sub(1).clamp(DEPTH_MIN, DEPTH_MAX);
        }
    }

    /// The session is alive: try one more command at a time.
    pub fn widen(&mut self) {
        self.depth = (self.depth + 1).min(DEPTH_MAX);
    }

    /// Queues a command again that the target did not carry out.
    fn again(&mut self, now: Duration, running: Running) {
        let Running { command, first_sent, losses, .. } = running;
        if now.saturating_sub(first_sent) >= self.command_max {
            let message = "the target keeps answering that it is busy";
            return answer(command, Err(unreachable(message.to_owned())));
        }
        let first_sent = Some(first_sent);
        self.waiting.push_front(Waiting { command, since: now, first_sent, losses });
    }
}

fn unreachable(message: String) -> Failure {
    Failure::new(DeviceErrorKind::Unreachable, message)
}

fn answer(command: Command, outcome: Result<Reply, Failure>) {
    // A caller that went away does not care.
    let _ = command.reply.send(outcome);
}

#[cfg(test)]
mod tests {
    use super::super::link::Pending;
    use super::super::outcome::{BUSY, CHECK_CONDITION, GOOD};
    use super::super::scsi::{self, Sense};
    use super::*;
    use tokio::sync::oneshot;

    const OK: Ending = Ending::Status(GOOD, None);
    const NOW: Duration = Duration::from_secs(100);

    fn queue() -> Queue {
        Queue::new(17, Duration::from_secs(30))
    }

    fn push(queue: &mut Queue, class: Class) -> Pending {
        let (reply, pending) = oneshot::channel();
        let cdb = scsi::test_unit_ready();
        queue.push(NOW, Command { class, cdb, out: vec![], in_len: 0, reply });
        pending
    }

    fn send(queue: &mut Queue) -> usize {
        queue.next(NOW).expect("a command to send").0
    }

    fn ended(queue: &mut Queue, id: usize, ending: Ending) -> (bool, u64) {
        let epoch = AtomicU64::new(0);
        let known = queue.ended(NOW, id, ending, None, 0, &epoch);
        (known, epoch.into_inner())
    }

    fn kind(pending: &mut Pending) -> Option<DeviceErrorKind> {
        pending.try_recv().ok().and_then(Result::err).map(|failure| failure.kind)
    }

    #[test]
    fn a_loss_withholds_what_alters_and_repeats_what_asks() {
        let mut queue = queue();
        let classes = [
            Class::Write,
            Class::CompareAndWrite,
            Class::Discard,
            Class::Flush,
            Class::Read,
            Class::Query,
        ];
        let mut pending = classes.map(|class| push(&mut queue, class));
        for _ in classes {
            send(&mut queue);
        }
        queue.cut_off(NOW, "cable pulled");
        let told = pending.each_mut().map(kind);
        let unreachable = Some(DeviceErrorKind::Unreachable);
        assert_eq!(told, [None, None, None, unreachable, None, None]);
        queue.tell_withheld("cable pulled");
        let told = pending.each_mut().map(kind);
        assert_eq!(told, [unreachable, unreachable, unreachable, None, None, None]);
        let (id, command) = queue.next(NOW).expect("the read again");
        assert_eq!(command.class, Class::Read, "in the order they were sent");
        assert_eq!(ended(&mut queue, id, OK), (true, 0));
        assert!(pending[4].try_recv().is_ok_and(|outcome| outcome.is_ok()));
        assert_eq!(queue.next(NOW).expect("the query again").1.class, Class::Query);
        assert!(queue.next(NOW).is_none());
    }

    #[test]
    fn a_write_that_was_never_sent_may_fail_at_once() {
        let mut queue = queue();
        let mut pending = push(&mut queue, Class::Write);
        queue.cut_off(NOW, "x");
        let failure = unreachable("no session".to_owned());
        queue.expire(NOW + Duration::from_secs(4), Duration::from_secs(5), &failure);
        assert_eq!(kind(&mut pending), None);
        queue.expire(NOW + Duration::from_secs(5), Duration::from_secs(5), &failure);
        assert_eq!(kind(&mut pending), Some(DeviceErrorKind::Unreachable));
    }

    #[test]
    fn a_read_that_ends_every_session_is_given_up() {
        let mut queue = queue();
        let mut pending = push(&mut queue, Class::Read);
        for _ in 0..ATTEMPTS_MAX {
            assert_eq!(kind(&mut pending), None);
            send(&mut queue);
            queue.cut_off(NOW, "x");
        }
        assert_eq!(kind(&mut pending), Some(DeviceErrorKind::Unreachable));
        assert!(queue.is_idle());
    }

    #[test]
    fn an_unknown_ending_keeps_the_command_for_the_loss_that_follows() {
        let mut queue = queue();
        let mut pending = push(&mut queue, Class::Write);
        let id = send(&mut queue);
        assert_eq!(ended(&mut queue, id, Ending::CutOff), (false, 0));
        assert_eq!(kind(&mut pending), None);
        queue.cut_off(NOW, "x");
        assert_eq!(kind(&mut pending), None);
        queue.tell_withheld("x");
        assert_eq!(kind(&mut pending), Some(DeviceErrorKind::Unreachable));
    }

    #[test]
    fn a_reset_raises_the_epoch() {
        let mut queue = queue();
        let reset = Ending::Status(CHECK_CONDITION, Some(Sense { key: 6, code: 0x2900 }));
        let mut pending = push(&mut queue, Class::Flush);
        let id = send(&mut queue);
        assert_eq!(ended(&mut queue, id, reset), (true, 1));
        assert_eq!(kind(&mut pending), Some(DeviceErrorKind::Unreachable));
    }

    /// Of two flushes under way together one may be told of the loss, and the other succeed.
    #[test]
    fn a_failed_flush_raises_the_epoch_and_other_failures_do_not() {
        let failed = Ending::Status(CHECK_CONDITION, Some(Sense { key: 3, code: 0x0c00 }));
        for (class, rises) in [(Class::Flush, 1), (Class::Write, 0), (Class::Read, 0)] {
            let mut queue = queue();
            let mut pending = push(&mut queue, class);
            let id = send(&mut queue);
            assert_eq!(ended(&mut queue, id, failed), (true, rises), "{class:?}");
            assert_eq!(kind(&mut pending), Some(DeviceErrorKind::Io));
        }
    }

    #[test]
    fn a_busy_target_gets_a_pause_and_fewer_commands() {
        let mut queue = queue();
        let pending = push(&mut queue, Class::Write);
        let id = send(&mut queue);
        assert_eq!(ended(&mut queue, id, Ending::Status(BUSY, None)), (true, 0));
        assert!(queue.next(NOW).is_none());
        assert_eq!(queue.next_tick(NOW, true), Some(NOW + BUSY_PAUSE));
        assert!(queue.next(NOW + BUSY_PAUSE).is_some());
        assert_eq!(queue.depth, DEPTH_MAX / 2);
        drop(pending);
    }

    #[test]
    fn depth_stays_below_the_window_and_grows_again() {
        let mut queue = queue();
        let pending: Vec<_> = (0..100).map(|_| push(&mut queue, Class::Write)).collect();
        while queue.next(NOW).is_some() {}
        assert_eq!(queue.running(), DEPTH_MAX);
        queue.follow_window(Some(32));
        assert_eq!(queue.depth, 31);
        queue.widen();
        assert_eq!(queue.depth, 32);
        queue.follow_window(Some(1000));
        assert_eq!(queue.depth, DEPTH_MIN);
        assert_eq!(queue.overdue(NOW), None);
        assert_eq!(queue.overdue(NOW + queue.command_max), Some(queue.command_max));
        drop(pending);
    }

    #[test]
    fn questions_that_nobody_asks_any_more_are_not_sent_and_writes_are() {
        let mut queue = queue();
        drop(push(&mut queue, Class::Read));
        drop(push(&mut queue, Class::Write));
        assert_eq!(queue.next(NOW).expect("the write").1.class, Class::Write);
        assert!(queue.next(NOW).is_none());
    }
}
