//! One connection with a guest agent.
//!
//! The line to the guest outlives its users: what a former one asked for may be answered to the next. So a connection begins with
//! `guest-sync-delimited`: all that comes before a 0xFF and our own number behind it is for somebody else. From then on there is
//! one command under way at a time, and the next line is its answer. A connection on which an answer did not come, or made no sense, is
//! out of step: it answers nothing any more, and whoever goes on opens another one.
//!
//! Source: the guest agent's own description, QEMU's `qga/qapi-schema.json`.

use serde::Deserialize;
use serde_json::{Value, json};
use std::fmt;
use std::io::{Error, ErrorKind};
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// The longest answer that is read; those to our commands have some dozen bytes.
pub const ANSWER_BYTES_MAX: usize = 64 << 10;
/// Ends what a former user left half said, and begins the answer that brings both sides into step.
const SENTINEL: u8 = 0xff;

/// What we ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Are file systems frozen?
    Status,
    /// Freeze all of them.
    Freeze,
    /// Thaw them.
    Thaw,
}

impl Command {
    /// As the guest agent calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Status => "guest-fsfreeze-status",
            Self::Freeze => "guest-fsfreeze-freeze",
            Self::Thaw => "guest-fsfreeze-thaw",
        }
    }
}

/// Why there is no answer to go on with.
#[derive(Debug)]
pub enum Trouble {
    /// Nobody listens at the socket: there is no virtual machine behind it now.
    Absent(Error),
    /// The socket cannot be used, or the connection ended.
    Broken(Error),
    /// There was no answer in time.
    Silent {
        /// What was asked for.
        asked: &'static str,
        /// How long was waited.
        waited: Duration,
    },
    /// The answer is not one to what was asked for.
    Garbled {
        /// What was asked for.
        asked: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The guest agent said no. The connection is still in step.
    Refused {
        /// What was asked for.
        asked: &'static str,
        /// The guest agent's words.
        why: String,
    },
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent(error) => write!(f, "nobody listens there ({error})"),
            Self::Broken(error) => write!(f, "the connection failed ({error})"),
            Self::Silent { asked, waited } => write!(f, "no answer to {asked} within {waited:?}"),
            Self::Garbled { asked, why } => {
                write!(f, "the answer to {asked} makes no sense ({why})")
            }
            Self::Refused { asked, why } => write!(f, "{asked} was refused: {why}"),
        }
    }
}

impl std::error::Error for Trouble {}

/// An answer: one of both, and perhaps more that does not concern us.
#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "return")]
    returned: Option<Value>,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    desc: String,
}

/// See the module.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<UnixStream>,
    /// False from the first byte of a command to the last of its answer, and for good if that never comes.
    in_step: bool,
}

impl Connection {
    /// Connects and gets into step, in `patience` at most.
    pub async fn open(socket: &Path, patience: Duration) -> Result<Self, Trouble> {
        const ASKED: &str = "guest-sync-delimited";
        let opening = async {
            let stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
                ErrorKind::NotFound | ErrorKind::ConnectionRefused => Trouble::Absent(error),
                _ => Trouble::Broken(error),
            })?;
            let mut connection = Self { stream: BufReader::new(stream), in_step: false };
            // Any number that a former user is not likely to have taken; 53 bits survive every reader of JSON.
            let number = uuid::Uuid::new_v4().as_u128() as u64 >> 11;
            let command = json!({ "execute": ASKED, "arguments": { "id": number } });
            connection.send(&[SENTINEL], &command).await?;
            loop {
                connection.skip_to_sentinel().await?;
                let line = connection.line(ASKED).await?;
                // An answer that was cut off may stand before ours in the same line.
                let last = line.rsplit(|byte| *byte == SENTINEL).next().unwrap_or_default();
                // Another number, or no JSON: something that is not for us.
                let answer: Option<Answer> = serde_json::from_slice(last).ok();
                if answer.and_then(|answer| answer.returned) == Some(number.into()) {
                    connection.in_step = true;
                    return Ok(connection);
                }
            }
        };
        let silent = Trouble::Silent { asked: ASKED, waited: patience };
        timeout(patience, opening).await.unwrap_or(Err(silent))
    }

    /// Says `command` and returns what the guest agent returns, in `patience` at most.
    pub async fn ask(&mut self, command: Command, patience: Duration) -> Result<Value, Trouble> {
        let asked = command.name();
        if !std::mem::take(&mut self.in_step) {
            return Err(Trouble::Broken(Error::other("an earlier answer is missing")));
        }
        let exchange = async {
            self.send(&[], &json!({ "execute": asked })).await?;
            let line = self.line(asked).await?;
            let garbled = |why: String| Trouble::Garbled { asked, why: printable(&why) };
            match serde_json::from_slice(&line).map_err(|error| garbled(error.to_string()))? {
                Answer { error: Some(refusal), .. } => {
                    Ok(Err(Trouble::Refused { asked, why: printable(&refusal.desc) }))
                }
                Answer { returned: Some(value), .. } => Ok(Ok(value)),
                Answer { .. } => Err(garbled("it has neither a result nor an error".into())),
            }
        };
        let silent = Trouble::Silent { asked, waited: patience };
        let answer = timeout(patience, exchange).await.unwrap_or(Err(silent))?;
        self.in_step = true;
        answer
    }

    /// Whether the next line is the answer to the next command.
    #[must_use]
    pub fn is_in_step(&self) -> bool {
        self.in_step
    }

    async fn send(&mut self, before: &[u8], command: &Value) -> Result<(), Trouble> {
        let mut bytes = before.to_vec();
        bytes.extend_from_slice(command.to_string().as_bytes());
        bytes.push(b'\n');
        self.stream.write_all(&bytes).await.map_err(Trouble::Broken)
    }

    async fn skip_to_sentinel(&mut self) -> Result<(), Trouble> {
        loop {
            let bytes = self.stream.fill_buf().await.map_err(Trouble::Broken)?;
            if bytes.is_empty() {
                return Err(Trouble::Broken(ErrorKind::UnexpectedEof.into()));
            }
            let at = bytes.iter().position(|byte| *byte == SENTINEL);
            let read = at.map_or(bytes.len(), |at| at + 1);
            self.stream.consume(read);
            if at.is_some() {
                return Ok(());
            }
        }
    }

    /// The next line, if it is no longer than an answer may be.
    async fn line(&mut self, asked: &'static str) -> Result<Vec<u8>, Trouble> {
        let mut line = Vec::new();
        let mut limited = (&mut self.stream).take(ANSWER_BYTES_MAX as u64);
        limited.read_until(b'\n', &mut line).await.map_err(Trouble::Broken)?;
        match line.last() {
            Some(b'\n') => Ok(line),
            _ if line.len() == ANSWER_BYTES_MAX => {
                let why = format!("it is longer than {ANSWER_BYTES_MAX} bytes");
                Err(Trouble::Garbled { asked, why })
            }
            _ => Err(Trouble::Broken(ErrorKind::UnexpectedEof.into())),
        }
    }
}

/// The guest's words, fit for a terminal and a log.
fn printable(words: &str) -> String {
    let words: String =
        words.chars().take(300).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if words.is_empty() { "it does not say why".into() } else { words }
}
