//! QEMU's guest agent: has a guest freeze its file systems, and thaw them again.
//!
//! ```text
//! wire      one connection: brought into step, one command and one answer at a time, answers of bounded size
//! freezing  what is said in which order, from the first word to the last attempt to thaw
//! ```
//!
//! Nothing here trusts the guest: its agent may be silent, late, wrong or hostile. Every step has a time, every answer a greatest
//! size, and what cannot be understood ends the connection. What must hold is only that a guest that may have been told to freeze is told
//! to thaw until it says that it is thawed; who remembers that is `host/quiesce`.

pub mod freezing;
#[cfg(test)]
pub mod peer;
pub mod wire;
#[cfg(test)]
mod wire_tests;

use std::time::Duration;

/// How long each step may take.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// To connect and to be in step; then for the answer about the state.
    pub answer: Duration,
    /// For the answer to the freeze: the guest writes everything out before it.
    pub freeze: Duration,
    /// For thawing, all attempts together, before the caller is told that it did not succeed.
    pub thaw: Duration,
}

impl Default for Times {
    fn default() -> Self {
        let [answer, freeze, thaw] = [5, 10, 10].map(Duration::from_secs);
        Self { answer, freeze, thaw }
    }
}
