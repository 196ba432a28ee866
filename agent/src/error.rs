//! The one error type of the daemon, its control API and the command line.
//!
//! A [`Failure`] is a kind, which decides the exit code and the HTTP status, and one message that names what failed,
//! on which object, and what to do next. It crosses the control socket unchanged, so that a command prints what
//! the daemon found.

use serde::{Deserialize, Serialize};
use std::error::Error;
use std::fmt;
use std::process::ExitCode;

/// What sort of failure it is: stable names for scripts, exit codes for shells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It was tried and failed.
    Failed,
    /// The request makes no sense as given: unknown flag, bad size, bad name, bad configuration.
    Usage,
    /// There is no such disk, store or cache.
    NotFound,
    /// No agent answers on the control socket.
    AgentUnreachable,
    /// A check ran to its end and found problems.
    ProblemsFound,
    /// The present state forbids it: the name is taken, the disk is attached, another agent holds it.
    Conflict,
    /// The store cannot be reached, or the agent is starting or stopping: the same request may succeed later.
    Unavailable,
    /// A guest was told to freeze its file systems and has not said that they are thawed again.
    GuestFrozen,
}

impl Kind {
    /// Exit code of a command that ends with this kind of failure.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::AgentUnreachable => 4,
            Self::ProblemsFound => 5,
            Self::Conflict => 6,
            Self::Unavailable => 7,
            Self::GuestFrozen => 8,
        }
    }

    /// HTTP status of a control request that ends with this kind of failure.
    #[must_use]
    pub const fn http_status(self) -> u16 {
        match self {
            Self::Failed | Self::ProblemsFound | Self::GuestFrozen => 500,
            Self::Usage => 400,
            Self::NotFound => 404,
            Self::Conflict => 409,
            Self::AgentUnreachable | Self::Unavailable => 503,
        }
    }
}

/// The exit codes, for `--help` and for the runbook.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  it was tried and failed
  2  the command, a flag, a size, a name or the configuration makes no sense as given
  3  no such disk, store or cache
  4  no agent answers on the control socket
  5  a check found problems
  6  the present state forbids it (name taken, disk attached, held by another agent)
  7  the store cannot be reached, or the agent is starting or stopping: try again later
  8  a guest that was frozen for a snapshot may still be frozen: the message says what to do

With --json, stdout carries exactly one JSON document when the command succeeds or a check ran to its end, and
nothing otherwise ('snap stream': one per snapshot, each a line, whatever becomes of others); errors go to stderr as {\"error\": {\"kind\": …, \"message\": …}}.";

/// A failure with its kind and one message.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// What to branch on.
    pub kind: Kind,
    /// What failed, on which object, and what to do next.
    pub message: String,
}

/// Shorthand for results of this crate.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// A failure of `kind`.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// A failure of `kind` whose message ends with the whole chain of `cause`.
    pub fn caused(kind: Kind, message: impl fmt::Display, cause: &(dyn Error + 'static)) -> Self {
        Self::new(kind, format!("{message}: {}", chain(cause)))
    }

    /// The same with something put in front: what was being done, on which object.
    #[must_use]
    pub fn within(mut self, doing: impl fmt::Display) -> Self {
        self.message = format!("{doing}: {}", self.message);
        self
    }

    /// The process's exit code.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.kind.exit_code())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Failure {}

/// An error and its sources in one line. A source that its parent already quotes is not repeated.
#[must_use]
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let part = source.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        next = source.source();
    }
    text
}

/// The body of a failed request, and of an error with `--json`.
#[derive(Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The failure.
    pub error: Failure,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer failed")]
    struct Outer(#[source] Middle);
    #[derive(Debug, thiserror::Error)]
    #[error("middle failed: {0}")]
    struct Middle(#[source] std::io::Error);

    #[test]
    fn a_chain_names_each_cause_once() {
        let error = Outer(Middle(std::io::Error::other("disk on fire")));
        assert_eq!(chain(&error), "outer failed: middle failed: disk on fire");
    }

    #[test]
    fn exit_codes_are_distinct_and_documented() {
        let kinds = [
            Kind::Failed,
            Kind::Usage,
            Kind::NotFound,
            Kind::AgentUnreachable,
            Kind::ProblemsFound,
            Kind::Conflict,
            Kind::Unavailable,
            Kind::GuestFrozen,
        ];
        for (i, kind) in kinds.into_iter().enumerate() {
            assert_eq!(usize::from(kind.exit_code()), i + 1);
            assert!(EXIT_CODES.contains(&format!("\n  {}  ", i + 1)));
            let name = serde_json::to_string(&kind).unwrap().replace('"', "`");
            let row = format!("| {} | {name} |", i + 1);
            assert!(include_str!("../../docs/operations.md").contains(&row), "{row}");
        }
    }

    #[test]
    fn failures_cross_the_wire_unchanged() {
        let body = ErrorBody { error: Failure::new(Kind::NotFound, "no disk 'x'") };
        let json = serde_json::to_string(&body).unwrap();
        assert_eq!(json, r#"{"error":{"kind":"not_found","message":"no disk 'x'"}}"#);
        let back: ErrorBody = serde_json::from_str(&json).unwrap();
        assert_eq!(back.error.kind, Kind::NotFound);
    }
}
