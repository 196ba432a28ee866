//! The session thread: owns the libiscsi context, carries out what [`Session`] says, and moves commands
//! between their [`Queue`] and the wire. The epoch rises before any answer is given that came after a
//! lost session.

use super::context::{Context, Login, Notice, Payload};
use super::link::{Request, Shared};
use super::outcome::{Ending, Failure};
use super::prepare::{Facts, Preparation, Progress};
use super::queue::Queue;
use super::reinstate::{Rival, Stage};
use super::session::{Action, Event, Session, State, Timing};
use crate::buf::AlignedBuf;
use crate::device::DeviceErrorKind;
use bytes::Bytes;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// For what is under way when the device is closed.
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// Id of the commands of a [`Preparation`]; callers' commands come after it.
const PREPARATION: usize = 16;

/// What the thread works with.
#[derive(Debug)]
pub struct Config {
    pub login: Login,
    /// Reservation key, in exclusive mode.
    pub reserve: Option<u64>,
    pub timing: Timing,
    /// How long a command waits for a session before it fails.
    pub wait_max: Duration,
    /// How long a command may be under way before the session is given up.
    pub command_max: Duration,
}

/// The thread's state.
pub struct Worker {
    config: Config,
    requests: mpsc::Receiver<Request>,
    shared: Arc<Shared>,
    /// Told once: the first session's facts, or why there is none.
    opened: Option<oneshot::Sender<Result<Facts, Failure>>>,
    start: Instant,
    session: Session,
    context: Option<Context>,
    /// A second login that is to end the first session and then to take its place.
    rival: Option<Rival>,
    /// Told at the next login whether the target reinstated the session.
    proof: Option<oneshot::Sender<Result<bool, String>>>,
    /// How far the login of a rival had got that became the session.
    adopted: Option<Stage>,
    preparation: Option<Preparation>,
    facts: Option<Facts>,
    queue: Queue,
    /// Why there is no session.
    down: Failure,
    closing_since: Option<Duration>,
}

impl Worker {
    /// A worker that has not begun to connect.
    pub fn new(
        config: Config,
        requests: mpsc::Receiver<Request>,
        shared: Arc<Shared>,
        opened: oneshot::Sender<Result<Facts, Failure>>,
    ) -> Self {
        Self {
            session: Session::new(config.timing.clone()),
            queue: Queue::new(PREPARATION + 1, config.command_max),
            config,
            requests,
            shared,
            opened: Some(opened),
            start: Instant::now(),
            context: None,
            rival: None,
            proof: None,
            adopted: None,
            preparation: None,
            facts: None,
            down: Failure::new(DeviceErrorKind::Unreachable, "not connected yet"),
            closing_since: None,
        }
    }

    /// Runs until the device is dropped or the first session cannot be had.
    pub fn run(mut self) {
        while *self.session.state() != State::Closed {
            self.receive();
            self.handle(Event::Tick);
            self.watch_deadlines();
            self.close_when_idle();
            self.submit();
            self.sleep_and_service();
        }
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn receive(&mut self) {
        while self.queue.has_room()
            && let Ok(request) = self.requests.try_recv()
        {
            let now = self.now();
            match request {
                Request::Command(command) => self.queue.push(now, command),
                Request::Proof(reply) => {
                    self.rival = Rival::start(&self.config.login, reply, now);
                }
            }
        }
    }

    /// Feeds the session and does what it says, which may lead to more events.
    fn handle(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for action in self.session.handle(self.now(), event) {
                match self.perform(action) {
                    Ok(follow_up) => events.extend(follow_up),
                    Err(message) => {
                        self.down = Failure::new(DeviceErrorKind::Unreachable, message);
                        events.push_back(Event::Broken);
                    }
                }
            }
        }
    }

    /// Carries an action out; what follows from it at once is returned.
    fn perform(&mut self, action: Action) -> Result<Option<Event>, String> {
        match action {
            Action::Connect if self.rival.is_some() => return self.adopt_rival().map(Some),
            Action::Connect => {
                let mut context = Context::new(&self.config.login)?;
                context.connect(&self.config.login)?;
                self.context = Some(context);
            }
            Action::LogIn => match self.adopted.take() {
                None => self.connected()?.log_in()?,
                Some(Stage::LoggedIn) => return Ok(Some(Event::LoggedIn)),
                Some(_) => {}
            },
            Action::Reinstated => self.reinstated(),
            Action::Prepare => {
                self.preparation = Some(Preparation::start(self.config.reserve));
                self.send_preparation()?;
            }
            Action::SendNop => self.connected()?.nop()?,
            Action::LogOut => match self.config.reserve {
                Some(key) => {
                    self.preparation = Some(Preparation::farewell(key));
                    self.send_preparation()?;
                }
                None => self.connected()?.log_out()?,
            },
            Action::Drop { served, reason } => {
                if let Some(expiry) = reason {
                    self.down = Failure::new(DeviceErrorKind::Unreachable, expiry.describe());
                }
                self.drop_connection(served);
            }
        }
        Ok(None)
    }

    /// The target dropped what earlier sessions left in flight: tell how those commands ended.
    fn reinstated(&mut self) {
        if let Some(proof) = self.proof.take() {
            let _ = proof.send(Ok(true));
        }
        self.queue.tell_withheld(&self.down.message);
    }

    /// The first session ended while the rival logged in, as it should: go on with the rival.
    fn adopt_rival(&mut self) -> Result<Event, String> {
        let rival = self.rival.take().ok_or("there is no second login")?;
        if rival.stage == Stage::Connecting {
            let _ = rival.reply.send(Err(self.down.message.clone()));
            return Err("the session was lost during the proof of reinstatement".to_owned());
        }
        self.context = Some(rival.context);
        self.proof = Some(rival.reply);
        self.adopted = Some(rival.stage);
        Ok(Event::Connected)
    }

    fn connected(&mut self) -> Result<&mut Context, String> {
        self.context.as_mut().ok_or_else(|| "there is no connection".to_owned())
    }

    fn send_preparation(&mut self) -> Result<(), String> {
        let Some(order) = self.preparation.as_ref().map(Preparation::order) else { return Ok(()) };
        let payload = payload(vec![Bytes::from(order.out)], order.in_len);
        self.connected()?.submit(PREPARATION, &order.cdb, payload)
    }

    fn drop_connection(&mut self, served: bool) {
        self.context = None;
        self.preparation = None;
        self.adopted = None;
        if let Some(proof) = self.proof.take() {
            let _ = proof.send(Err(self.down.message.clone()));
        }
        if served {
            // Before anyone can see an answer that depends on it.
            self.shared.epoch.fetch_add(1, Ordering::AcqRel);
            tracing::warn!(
                target = ?self.config.login.target,
                reason = self.down.message,
                commands = self.queue.running(),
                "iSCSI session ended"
            );
        }
        if let Some(opened) = self.opened.take() {
            // A device that never opened is not retried: whoever opens it decides.
            let _ = opened.send(Err(self.down.clone()));
            self.session.handle(self.now(), Event::Close);
        }
        self.queue.cut_off(self.now(), &self.down.message);
    }

    /// Fails what waited too long for a session, and gives a session up that lets a command wait.
    fn watch_deadlines(&mut self) {
        let now = self.now();
        if let Some(silence) = self.queue.overdue(now) {
            self.broken(format!("a command got no answer for {} s", silence.as_secs()));
        }
        if self.session.is_up() {
            return;
        }
        if self.down.kind == DeviceErrorKind::Unreachable {
            let message = format!("no session with the target: {}", self.down.message);
            let failure = Failure::new(DeviceErrorKind::Unreachable, message);
            self.queue.expire(now, self.config.wait_max, &failure);
        } else {
            self.queue.expire(now, Duration::ZERO, &self.down);
        }
    }

    fn close_when_idle(&mut self) {
        if !self.shared.closing.load(Ordering::Acquire) {
            return;
        }
        let since = *self.closing_since.get_or_insert(self.start.elapsed());
        self.requests.close();
        let idle = self.queue.is_idle();
        if idle || !self.session.is_up() || self.now().saturating_sub(since) >= DRAIN_MAX {
            self.handle(Event::Close);
        }
    }

    fn submit(&mut self) {
        let now = self.now();
        while self.session.is_up()
            && let Some(context) = self.context.as_mut()
            && !context.is_congested()
            && let Some((id, command)) = self.queue.next(now)
        {
            let payload = payload(command.out.clone(), command.in_len);
            if let Err(message) = context.submit(id, &command.cdb, payload) {
                self.broken(message);
            }
        }
    }

    fn sleep_and_service(&mut self) {
        let timeout = self.sleep_max();
        let rival = self.rival.as_ref().map(|rival| &rival.context);
        let mut fds = vec![PollFd::new(self.shared.wake_fd().as_fd(), PollFlags::POLLIN)];
        fds.extend(self.context.as_ref().and_then(poll_fd));
        let rival_at = fds.len();
        fds.extend(rival.and_then(poll_fd));
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::from(1000_u16));
        // An interrupted or failed poll is a short sleep; libiscsi finds out what happened.
        let _ = poll(&mut fds, timeout);
        let revents =
            |at: usize| fds.get(at).and_then(PollFd::revents).unwrap_or(PollFlags::empty());
        let woken = !revents(0).is_empty();
        let own = if rival_at > 1 { revents(1).bits() } else { 0 };
        let rivals = revents(rival_at).bits();
        drop(fds);
        if woken {
            let _ = self.shared.wake_fd().read();
        }
        self.service(own);
        let now = self.now();
        self.rival = self.rival.take().and_then(|rival| rival.service(rivals, now));
    }

    fn sleep_max(&self) -> Duration {
        let now = self.now();
        let mut until = now + Duration::from_secs(1);
        until = until.min(self.session.next_tick().unwrap_or(until));
        let up = self.session.is_up();
        until = until.min(self.queue.next_tick(now, up).unwrap_or(until));
        // Rounded up, as poll counts in milliseconds.
        until.saturating_sub(now) + Duration::from_millis(1)
    }

    fn service(&mut self, revents: i16) {
        let Some(context) = self.context.as_mut() else { return };
        let serviced = context.service(revents);
        let notices = context.notices();
        let blocked = context.window_blocked();
        self.queue.follow_window(blocked);
        for notice in notices {
            self.notice(notice);
        }
        if let Err(message) = serviced
            && self.context.is_some()
        {
            self.broken(message);
        }
    }

    fn broken(&mut self, message: String) {
        self.down = Failure::new(DeviceErrorKind::Unreachable, message);
        self.handle(Event::Broken);
    }

    fn notice(&mut self, notice: Notice) {
        // A session dropped by an earlier notice of the same batch has no say any more.
        if self.context.is_none() {
            return;
        }
        match notice {
            Notice::Connected(Ok(())) => self.handle(Event::Connected),
            Notice::LoggedIn(Ok(())) => self.handle(Event::LoggedIn),
            Notice::Connected(Err(message)) => self.broken(message),
            Notice::LoggedIn(Err(message)) => {
                self.down = login_failure(&message, self.config.login.chap.is_some());
                self.handle(Event::Broken);
            }
            Notice::LoggedOut => self.handle(Event::LoggedOut),
            Notice::Nop => {
                self.queue.widen();
                self.handle(Event::Answered);
            }
            Notice::Command { id: PREPARATION, ending, data, missing } => {
                self.prepared(ending, data.as_deref().unwrap_or(&[]), missing);
            }
            Notice::Command { id, ending, data, missing } => {
                let (now, epoch) = (self.now(), &self.shared.epoch);
                match self.queue.ended(now, id, ending, data, missing, epoch) {
                    true => self.handle(Event::Answered),
                    false => self.broken("the connection broke or a command was rejected".into()),
                }
            }
        }
    }

    fn prepared(&mut self, ending: Ending, data: &[u8], missing: usize) {
        let Some(preparation) = self.preparation.as_mut() else { return };
        let data = &data[..data.len().saturating_sub(missing)];
        let sent = match preparation.feed(ending, data) {
            Progress::Next => self.send_preparation(),
            Progress::Ready(facts) => {
                self.ready(facts);
                Ok(())
            }
            Progress::Released => {
                self.preparation = None;
                self.connected().and_then(Context::log_out)
            }
            Progress::Failed(failure) => {
                self.down = failure;
                self.handle(Event::Broken);
                Ok(())
            }
        };
        if let Err(message) = sent {
            self.broken(message);
        }
    }

    fn ready(&mut self, facts: Facts) {
        self.preparation = None;
        match &self.facts {
            Some(opened) if !opened.is_same_lun(&facts) => {
                self.down = Failure::new(
                    DeviceErrorKind::Io,
                    "behind this URL is now another LUN than the one that was opened (its \
                     identity changed or it shrank); check the target's configuration",
                );
                return self.handle(Event::Broken);
            }
            Some(_) => {
                tracing::info!(target = ?self.config.login.target, "iSCSI session is up again");
            }
            None => self.facts = Some(facts.clone()),
        }
        self.handle(Event::Prepared);
        if let Some(opened) = self.opened.take() {
            let _ = opened.send(Ok(facts));
        }
    }
}

fn poll_fd(context: &Context) -> Option<PollFd<'_>> {
    Some(PollFd::new(context.fd()?, PollFlags::from_bits_truncate(context.events())))
}

fn payload(out: Vec<Bytes>, in_len: usize) -> Payload {
    if in_len > 0 {
        Payload::In(AlignedBuf::zeroed(in_len))
    } else if out.iter().any(|bytes| !bytes.is_empty()) {
        Payload::Out(out)
    } else {
        Payload::None
    }
}

/// Says what to do about a refused login. libiscsi ends its text with the status in parentheses.
fn login_failure(message: &str, with_chap: bool) -> Failure {
    let status = message.rsplit_once('(').and_then(|(_, code)| code.strip_suffix(')'));
    let advice = match status.and_then(|code| code.parse::<u16>().ok()) {
        Some(0x0201) if with_chap => "the CHAP user or secret is wrong",
        Some(0x0201) => "the target wants CHAP: give user and secret",
        Some(0x0202) => "the target does not admit this initiator name: add it to the target's ACL",
        Some(0x0203) => "the portal has no target of this name: check the IQN",
        Some(0x0301 | 0x0302) => "the target has no room for another session now",
        _ => "see the target's log",
    };
    Failure::new(DeviceErrorKind::Unreachable, format!("{message}; {advice}"))
}
