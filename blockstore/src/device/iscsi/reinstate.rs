//! Proof that a target reinstates sessions: a second login under the same initiator name and ISID must
//! end the first session. Without that, a write of a lost session could land after a newer one.
//!
//! The second connection, the rival, runs beside the first in the session's thread and takes its place
//! when the proof is done, for each login may take its time (one second at some targets).

use super::context::{Context, Login, Notice};
use std::time::Duration;
use tokio::sync::oneshot;

/// For the first session to end.
const PROOF_MAX: Duration = Duration::from_secs(5);

/// A second login under way.
#[derive(Debug)]
pub struct Rival {
    pub context: Context,
    /// Told whether the target reinstates.
    pub reply: oneshot::Sender<Result<bool, String>>,
    /// How far the login has got.
    pub stage: Stage,
    deadline: Duration,
}

/// How far a login has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Connecting,
    LoggingIn,
    LoggedIn,
}

impl Rival {
    /// Begins to connect. The error, if any, has been told to `reply`.
    pub fn start(
        login: &Login,
        reply: oneshot::Sender<Result<bool, String>>,
        now: Duration,
    ) -> Option<Self> {
        let connected = Context::new(login).and_then(|mut context| {
            context.connect(login)?;
            Ok(context)
        });
        match connected {
            Ok(context) => {
                let deadline = now + PROOF_MAX;
                Some(Self { context, reply, stage: Stage::Connecting, deadline })
            }
            Err(message) => {
                let _ = reply.send(Err(message));
                None
            }
        }
    }

    /// Goes on with the login while the first session lives. Gives itself up, and says so, when it fails
    /// or when the first session has lived too long.
    pub fn service(mut self, revents: i16, now: Duration) -> Option<Self> {
        match self.advance(revents) {
            Err(message) => {
                let _ = self.reply.send(Err(message));
                None
            }
            Ok(()) if now >= self.deadline => {
                let verdict = match self.stage {
                    Stage::LoggedIn => Ok(false),
                    _ => Err("the second login was not answered".to_owned()),
                };
                let _ = self.reply.send(verdict);
                None
            }
            Ok(()) => Some(self),
        }
    }

    fn advance(&mut self, revents: i16) -> Result<(), String> {
        let serviced = self.context.service(revents);
        for notice in self.context.notices() {
            match notice {
                Notice::Connected(connected) => {
                    connected?;
                    self.context.log_in()?;
                    self.stage = Stage::LoggingIn;
                }
                Notice::LoggedIn(logged_in) => {
                    logged_in?;
                    self.stage = Stage::LoggedIn;
                }
                _ => {}
            }
        }
        serviced
    }
}
