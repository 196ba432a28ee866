//! Life of one iSCSI session as a state machine without I/O or clock: connect, log in, prepare the LUN,
//! serve, and after a loss the same again with a growing pause. Time is an input (since any origin).
//!
//! Invariants: the connection is dropped before another is made; `Reinstated` is issued once per
//! login and never without one, since it allows the outcome of cut-off writes to be told.

use std::time::Duration;

/// Limits of each phase.
#[derive(Clone, Debug)]
pub struct Timing {
    /// For the TCP connection.
    pub connect_max: Duration,
    /// For the login phase.
    pub login_max: Duration,
    /// For the commands that make a LUN ready after a login.
    pub prepare_max: Duration,
    /// For the commands and the logout at the end.
    pub logout_max: Duration,
    /// Between two NOP-Outs.
    pub nop_interval: Duration,
    /// Unanswered NOP-Outs in a row after which the connection counts as dead.
    pub nops_missed_max: u32,
    /// Longest pause between two attempts.
    pub backoff_max: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            connect_max: Duration::from_secs(5),
            login_max: Duration::from_secs(5),
            prepare_max: Duration::from_secs(10),
            logout_max: Duration::from_secs(2),
            nop_interval: Duration::from_secs(1),
            nops_missed_max: 3,
            backoff_max: Duration::from_secs(5),
        }
    }
}

/// First pause after a failed attempt; doubles up to [`Timing::backoff_max`].
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// A session that served this long was a good one: the next loss is retried without a pause.
const SETTLED: Duration = Duration::from_secs(5);

/// Where the session stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// No connection; the next attempt starts at this time.
    Backoff {
        until: Duration,
    },
    Connecting {
        deadline: Duration,
    },
    LoggingIn {
        deadline: Duration,
    },
    Preparing {
        deadline: Duration,
    },
    /// Serves commands.
    Up {
        since: Duration,
        nop_at: Duration,
        unanswered: u32,
    },
    /// Releases what it holds and logs out.
    LoggingOut {
        deadline: Duration,
    },
    /// The end.
    Closed,
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time passed.
    Tick,
    /// The TCP connection stands.
    Connected,
    /// The target accepted the login.
    LoggedIn,
    /// The LUN is ready and is the one expected.
    Prepared,
    /// The target answered something, be it a NOP.
    Answered,
    /// The attempt or the session failed.
    Broken,
    /// The owner wants to end.
    Close,
    /// The logout is done.
    LoggedOut,
}

/// What the driver must do, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Connect,
    LogIn,
    /// A login with the fixed ISID succeeded: commands of earlier sessions can no longer land.
    Reinstated,
    Prepare,
    SendNop,
    LogOut,
    /// Close the connection. `served`: writes that completed on it may be lost.
    Drop {
        served: bool,
        reason: Option<Expiry>,
    },
}

/// Which limit ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    Connect,
    Login,
    Prepare,
    Nops,
}

impl Expiry {
    /// For messages.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Connect => "the portal did not accept a connection in time",
            Self::Login => "the target did not answer the login in time",
            Self::Prepare => "the LUN did not answer in time after the login",
            Self::Nops => "the target stopped answering",
        }
    }
}

/// The state machine.
#[derive(Debug)]
pub struct Session {
    timing: Timing,
    state: State,
    /// Attempts that failed in a row.
    failures: u32,
}

impl Session {
    /// A session that connects at the first tick.
    pub fn new(timing: Timing) -> Self {
        Self { timing, state: State::Backoff { until: Duration::ZERO }, failures: 0 }
    }

    /// Where it stands.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// True while commands may be sent.
    pub fn is_up(&self) -> bool {
        matches!(self.state, State::Up { .. })
    }

    /// The time of the next [`Event::Tick`] that will do something.
    pub fn next_tick(&self) -> Option<Duration> {
        match self.state {
            State::Backoff { until } => Some(until),
            State::Connecting { deadline }
            | State::LoggingIn { deadline }
            | State::Preparing { deadline }
            | State::LoggingOut { deadline } => Some(deadline),
            State::Up { nop_at, .. } => Some(nop_at),
            State::Closed => None,
        }
    }

    /// Takes in what happened and says what to do.
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        match (&mut self.state, event) {
            (State::Closed, _) => vec![],
            (_, Event::Tick) => self.tick(now),
            (State::Connecting { .. }, Event::Connected) => {
                self.state = State::LoggingIn { deadline: now + self.timing.login_max };
                vec![Action::LogIn]
            }
            (State::LoggingIn { .. }, Event::LoggedIn) => {
                self.state = State::Preparing { deadline: now + self.timing.prepare_max };
                vec![Action::Reinstated, Action::Prepare]
            }
            (State::Preparing { .. }, Event::Prepared) => {
                let nop_at = now + self.timing.nop_interval;
                self.state = State::Up { since: now, nop_at, unanswered: 0 };
                vec![]
            }
            (State::Up { unanswered, .. }, Event::Answered) => {
                *unanswered = 0;
                vec![]
            }
            (State::Up { .. }, Event::Close) => {
                self.state = State::LoggingOut { deadline: now + self.timing.logout_max };
                vec![Action::LogOut]
            }
            (State::LoggingOut { .. }, Event::Close) => vec![],
            (State::LoggingOut { .. }, Event::LoggedOut | Event::Broken) => self.close(),
            (_, Event::Close) => self.close(),
            (State::Backoff { .. }, Event::Broken) => vec![],
            (_, Event::Broken) => self.lose(now, None),
            // Late news of a step that is over.
            (_, Event::Connected | Event::LoggedIn | Event::Prepared) => vec![],
            (_, Event::Answered | Event::LoggedOut) => vec![],
        }
    }

    fn tick(&mut self, now: Duration) -> Vec<Action> {
        match &mut self.state {
            State::Backoff { until } if now >= *until => {
                self.state = State::Connecting { deadline: now + self.timing.connect_max };
                vec![Action::Connect]
            }
            State::Connecting { deadline } if now >= *deadline => {
                self.lose(now, Some(Expiry::Connect))
            }
            State::LoggingIn { deadline } if now >= *deadline => {
                self.lose(now, Some(Expiry::Login))
            }
            State::Preparing { deadline } if now >= *deadline => {
                self.lose(now, Some(Expiry::Prepare))
            }
            State::LoggingOut { deadline } if now >= *deadline => self.close(),
            State::Up { nop_at, unanswered, .. } if now >= *nop_at => {
                if *unanswered >= self.timing.nops_missed_max {
                    return self.lose(now, Some(Expiry::Nops));
                }
                *unanswered += 1;
                *nop_at = now + self.timing.nop_interval;
                vec![Action::SendNop]
            }
            _ => vec![],
        }
    }

    fn lose(&mut self, now: Duration, reason: Option<Expiry>) -> Vec<Action> {
        let served = self.is_up();
        if let State::Up { since, .. } = self.state
            && now.saturating_sub(since) >= SETTLED
        {
            self.failures = 0;
        }
        let pause = match self.failures {
            0 if served => Duration::ZERO,
            n => BACKOFF_FIRST.saturating_mul(1 << n.min(10)).min(self.timing.backoff_max),
        };
        self.failures += 1;
        self.state = State::Backoff { until: now + pause };
        vec![Action::Drop { served, reason }]
    }

    fn close(&mut self) -> Vec<Action> {
        self.state = State::Closed;
        vec![Action::Drop { served: false, reason: None }]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn up_at(ms: u64) -> Session {
        let mut session = Session::new(Timing::default());
        let now = at(ms);
        assert_eq!(session.handle(now, Event::Tick), [Action::Connect]);
        assert_eq!(session.handle(now, Event::Connected), [Action::LogIn]);
        assert_eq!(session.handle(now, Event::LoggedIn), [Action::Reinstated, Action::Prepare]);
        assert!(!session.is_up());
        assert_eq!(session.handle(now, Event::Prepared), []);
        assert!(session.is_up());
        session
    }

    #[test]
    fn three_unanswered_nops_end_the_session_and_any_answer_saves_it() {
        let mut session = up_at(0);
        for ms in [1000, 2000, 3000] {
            assert_eq!(session.handle(at(ms), Event::Tick), [Action::SendNop]);
        }
        session.handle(at(3500), Event::Answered);
        for ms in [4000, 5000, 6000] {
            assert_eq!(session.handle(at(ms), Event::Tick), [Action::SendNop]);
        }
        assert_eq!(
            session.handle(at(7000), Event::Tick),
            [Action::Drop { served: true, reason: Some(Expiry::Nops) }]
        );
        assert_eq!(session.next_tick(), Some(at(7000)), "a settled session is retried at once");
    }

    #[test]
    fn every_step_has_a_limit() {
        let mut session = Session::new(Timing::default());
        session.handle(at(0), Event::Tick);
        assert_eq!(session.handle(at(4999), Event::Tick), []);
        assert_eq!(
            session.handle(at(5000), Event::Tick),
            [Action::Drop { served: false, reason: Some(Expiry::Connect) }]
        );
        session.handle(at(6000), Event::Tick);
        session.handle(at(6000), Event::Connected);
        assert_eq!(
            session.handle(at(11_000), Event::Tick),
            [Action::Drop { served: false, reason: Some(Expiry::Login) }]
        );
        session.handle(at(12_000), Event::Tick);
        session.handle(at(12_000), Event::Connected);
        session.handle(at(12_000), Event::LoggedIn);
        assert_eq!(
            session.handle(at(22_000), Event::Tick),
            [Action::Drop { served: false, reason: Some(Expiry::Prepare) }]
        );
    }

    #[test]
    fn the_pause_grows_to_its_cap_and_a_flapping_session_pauses_too() {
        let mut session = Session::new(Timing::default());
        let mut now = at(0);
        let mut pauses = vec![];
        for _ in 0..9 {
            assert_eq!(session.handle(now, Event::Tick), [Action::Connect]);
            session.handle(now, Event::Broken);
            let next = session.next_tick().expect("a time for the next attempt");
            pauses.push((next - now).as_millis());
            now = next;
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);

        let mut session = up_at(0);
        session.handle(at(10), Event::Broken);
        assert_eq!(session.next_tick(), Some(at(10)), "the first loss is retried at once");
        session.handle(at(10), Event::Tick);
        session.handle(at(10), Event::Connected);
        session.handle(at(10), Event::LoggedIn);
        session.handle(at(10), Event::Prepared);
        session.handle(at(20), Event::Broken);
        assert_eq!(session.next_tick(), Some(at(220)), "two hosts with one name must not spin");
    }

    #[test]
    fn closing_logs_out_and_gives_up_in_time() {
        let mut session = up_at(0);
        assert_eq!(session.handle(at(1), Event::Close), [Action::LogOut]);
        assert_eq!(session.handle(at(2), Event::Close), []);
        assert_eq!(
            session.handle(at(2001), Event::Tick),
            [Action::Drop { served: false, reason: None }]
        );
        assert_eq!(session.state(), &State::Closed);

        let mut session = Session::new(Timing::default());
        session.handle(at(0), Event::Tick);
        assert_eq!(
            session.handle(at(1), Event::Close),
            [Action::Drop { served: false, reason: None }]
        );
        assert_eq!(session.handle(at(2), Event::Tick), []);
    }

    proptest! {
        /// Goal: no order of events, however late or odd, opens a second connection, tells of a
        /// reinstatement without a login, or leaves the machine without a next step.
        #[test]
        fn any_order_of_events_keeps_the_invariants(
            events in proptest::collection::vec((0..8_u8, 0..3000_u64), 1..200)
        ) {
            let mut session = Session::new(Timing::default());
            let (mut now, mut connected, mut logging_in) = (Duration::ZERO, false, false);
            for (event, pause) in events {
                now += at(pause);
                let event = [
                    Event::Tick, Event::Connected, Event::LoggedIn, Event::Prepared,
                    Event::Answered, Event::Broken, Event::LoggedOut, Event::Tick,
                ][usize::from(event)];
                for action in session.handle(now, event) {
                    match action {
                        Action::Connect => {
                            prop_assert!(!connected);
                            connected = true;
                        }
                        Action::LogIn => logging_in = true,
                        Action::Reinstated => {
                            prop_assert!(logging_in && event == Event::LoggedIn);
                            logging_in = false;
                        }
                        Action::Drop { .. } => {
                            prop_assert!(connected);
                            (connected, logging_in) = (false, false);
                        }
                        Action::Prepare | Action::SendNop | Action::LogOut => {
                            prop_assert!(connected);
                        }
                    }
                }
                prop_assert!(session.next_tick().is_some());
                prop_assert!(session.is_up() <= connected);
            }
        }
    }
}
