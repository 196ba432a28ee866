//! What is said to a guest agent to freeze a guest, and to thaw it.
//!
//! ```text
//! prepare   in step? thawed so far?            nothing is owed yet
//! freeze    freeze, more than no file systems  from the first byte on a thaw is owed
//! thaw      still frozen? thaw, thawed?        until the guest agent itself says that it is thawed
//! ```
//!
//! The guest agent does one thing after the other. So a freeze that was not answered in time is done before a thaw that is sent after it, and a
//! guest that is said to be thawed, on a connection that is in step, has no freeze of ours before it any more.

use super::Times;
use super::wire::{Command, Connection, Trouble};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A guest that is spoken to.
#[derive(Debug)]
pub struct Guest {
    socket: PathBuf,
    times: Times,
    connection: Option<Connection>,
    /// File systems that it froze.
    frozen: u64,
    /// Whether it was still frozen when that was asked for the first time after the freeze.
    held: Option<bool>,
    /// Why what was done meanwhile may not have been done under the freeze.
    spoiled: Option<String>,
}

impl Guest {
    /// The guest behind `socket`; nothing is said yet.
    #[must_use]
    pub fn new(socket: &Path, times: Times) -> Self {
        Self {
            socket: socket.to_owned(),
            times,
            connection: None,
            frozen: 0,
            held: None,
            spoiled: None,
        }
    }

    /// Connects. True: it is frozen already, by somebody else.
    pub async fn prepare(&mut self) -> Result<bool, Trouble> {
        self.connection = None;
        let mut connection = Connection::open(&self.socket, self.times.answer).await?;
        let frozen = is_frozen(&mut connection, self.times.answer).await?;
        self.connection = Some(connection);
        Ok(frozen)
    }

    /// Freezes the file systems and returns how many these are; 0: nothing is frozen. Whatever comes of it, a thaw is owed.
    pub async fn freeze(&mut self) -> Result<u64, Trouble> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(Connection::open(&self.socket, self.times.answer).await?),
        };
        let answer = connection.ask(Command::Freeze, self.times.freeze).await?;
        self.frozen = number(Command::Freeze, &answer)?;
        Ok(self.frozen)
    }

    /// One attempt to thaw, on the connection that there is or a new one. Done only if the guest agent says that it is thawed.
    pub async fn thaw(&mut self) -> Result<(), Trouble> {
        // On one that is out of step, or was left in the middle of an answer, nothing can be said any more.
        let mut connection = match self.connection.take().filter(Connection::is_in_step) {
            Some(connection) => connection,
            None => Connection::open(&self.socket, self.times.answer).await?,
        };
        let before = is_frozen(&mut connection, self.times.answer).await?;
        self.held.get_or_insert(before);
        match connection.ask(Command::Thaw, self.times.thaw).await {
            // What it would say of file systems that were thawed by an attempt whose answer was lost says nothing.
            Ok(_) if !before => {}
            Ok(answer) => {
                let thawed = number(Command::Thaw, &answer)?;
                if thawed < self.frozen {
                    let words =
                        format!("only {thawed} of {} file systems were still frozen", self.frozen);
                    self.spoiled = Some(words);
                }
            }
            // Windows says so when it had ended the freeze by itself, and is thawed all the same.
            Err(Trouble::Refused { why, .. }) => self.spoiled = Some(why),
            Err(trouble) => return Err(trouble),
        }
        if is_frozen(&mut connection, self.times.answer).await? {
            let why = "it is still frozen afterwards".into();
            let why = self.spoiled.clone().unwrap_or(why);
            return Err(Trouble::Refused { asked: Command::Thaw.name(), why });
        }
        Ok(())
    }

    /// After the thaw: why the freeze may have ended before it; none: it lasted.
    #[must_use]
    pub fn why_not_held(&self) -> Option<String> {
        match self.held {
            Some(true) => self.spoiled.clone(),
            Some(false) => Some("something else had thawed the guest before".into()),
            None => Some("the guest was gone before it could be asked".into()),
        }
    }
}

async fn is_frozen(connection: &mut Connection, patience: Duration) -> Result<bool, Trouble> {
    let state = connection.ask(Command::Status, patience).await?;
    match state.as_str() {
        Some("frozen") => Ok(true),
        Some("thawed") => Ok(false),
        _ => Err(Trouble::Garbled {
            asked: Command::Status.name(),
            why: "it is neither 'frozen' nor 'thawed'".into(),
        }),
    }
}

fn number(command: Command, answer: &serde_json::Value) -> Result<u64, Trouble> {
    answer.as_u64().ok_or_else(|| Trouble::Garbled {
        asked: command.name(),
        why: "it is no number of file systems".into(),
    })
}
