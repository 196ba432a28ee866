//! Attempts at one operation of the device: which errors end them, and what is noted of the others.

use super::{Io, Lacking, OnRefusal, Patience, SpaceWaiter};
use crate::device::{DeviceError, DeviceErrorKind};
use crate::error::{Result, StoreError, StoreErrorKind};
use std::future::Future;
use std::time::Duration;
use tokio::time::Instant;

const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// How often a read is tried again after the device reported a lasting error.
const READ_ATTEMPTS: u32 = 3;
/// So long who does not wait for space on the device tries again all the same: some are extended, by themselves, when they are full.
const FULL_PATIENCE: Duration = Duration::from_secs(1);

/// Which errors end a series of attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errors {
    /// Lasting I/O errors do, after a few tries, or at once if the [`Io`] gives up: another copy of the block may exist elsewhere.
    LastingAreFinal,
    /// Those that no repetition can cure do, and a lack of space on the device that lasts for a moment.
    FullIsFinal,
    /// Only those that no repetition can cure do: what was acknowledged must get through.
    AllAreRetried,
}

/// A series of attempts at one thing, with growing pauses.
#[derive(Debug)]
pub struct Attempts<'a> {
    io: &'a Io,
    started: Instant,
    backoff: Duration,
    lasting: u32,
    /// Since when each attempt was refused for lack of space on the device. Others see that it is waited for.
    full: Option<(Instant, SpaceWaiter)>,
}

impl<'a> Attempts<'a> {
    pub(super) fn new(io: &'a Io) -> Self {
        Self { io, started: Instant::now(), backoff: BACKOFF_MIN, lasting: 0, full: None }
    }

    /// Runs an operation once. `None`: it failed, a pause was made, try again. Its effect is unknown.
    ///
    /// # Errors
    /// `Closing`, `Unreachable` when patience ended, or the device's error if it is final.
    pub async fn once<T>(
        &mut self,
        operation: impl Future<Output = Result<T, DeviceError>>,
        errors: Errors,
    ) -> Result<Option<T>> {
        let outcome = tokio::select! {
            biased;
            () = self.io.closed() => return Err(self.io.closing_error()),
            outcome = self.within_patience(operation) => outcome?,
        };
        let error = match outcome {
            Ok(value) => {
                self.io.note_success();
                self.full = None;
                return Ok(Some(value));
            }
            Err(error) => error,
        };
        let gives_up = self.io.on_refusal == OnRefusal::End;
        let retry = match error.kind {
            DeviceErrorKind::NoSpace if errors == Errors::FullIsFinal => {
                self.full_for() + self.backoff <= FULL_PATIENCE
            }
            _ if errors != Errors::LastingAreFinal => {
                error.is_transient() || error.kind == DeviceErrorKind::Io
            }
            DeviceErrorKind::Io | DeviceErrorKind::NoSpace if gives_up => false,
            DeviceErrorKind::Io => self.lasting + 1 < READ_ATTEMPTS,
            _ => error.is_transient(),
        };
        if !retry {
            return Err(error.into());
        }
        if error.kind == DeviceErrorKind::Io {
            self.lasting += 1;
        }
        let lacks_space = error.kind == DeviceErrorKind::NoSpace;
        self.io.note_failure(&error, lacks_space);
        self.note_full(lacks_space);
        self.pause(error).await?;
        Ok(None)
    }

    /// How long the device has had no space, as far as these attempts tell.
    fn full_for(&self) -> Duration {
        self.full.as_ref().map_or(Duration::ZERO, |(since, _)| since.elapsed())
    }

    /// It had none, or said something else.
    fn note_full(&mut self, lacks_space: bool) {
        let since = self.full.take().filter(|_| lacks_space);
        let begins = || (Instant::now(), self.io.waiting_for(Lacking::OnDevice));
        self.full = since.or_else(|| lacks_space.then(begins));
    }

    /// The device refused every one of several things of which any would have done: notes that, as of an operation that is retried,
    /// and waits before the next attempt.
    ///
    /// # Errors
    /// `Closing`, or `error` when patience ended.
    pub(crate) async fn refused(&mut self, error: StoreError) -> Result<()> {
        let lacks_space = error.kind == StoreErrorKind::NoSpace;
        self.io.note_failure(&error, lacks_space);
        self.note_full(lacks_space);
        self.pause(error).await
    }

    /// Waits before the next attempt.
    async fn pause(&mut self, error: impl Into<StoreError>) -> Result<()> {
        if let Patience::Limited(limit) = self.io.patience
            && self.started.elapsed() + self.backoff > limit
        {
            return Err(error.into());
        }
        tokio::select! {
            biased;
            () = self.io.closed() => return Err(self.io.closing_error()),
            () = tokio::time::sleep(self.backoff) => {}
        }
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
        Ok(())
    }

    async fn within_patience<T>(&self, operation: impl Future<Output = T>) -> Result<T> {
        let Patience::Limited(limit) = self.io.patience else { return Ok(operation.await) };
        let bounded = tokio::time::timeout_at(self.started + limit, operation);
        bounded.await.map_err(|_| self.io.no_answer(limit))
    }
}
