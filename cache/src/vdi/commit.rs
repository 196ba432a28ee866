//! Commits of a disk: when one starts, what is drafted for it and the next, and what follows it (rules L2, C3).

use super::task::{RETRY_AFTER, VdiTask};
use crate::backing::BackingError;
use crate::flusher::{self, Asked, Committed, Drafted, FlushError, Situation};
use blockstore::types::{BLOCK_SIZE, Lsn};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// What the local device refused is tried again after twice as long each time, up to this: each attempt reads the batch anew.
const RETRY_LOCAL_AFTER_MAX: Duration = Duration::from_secs(60);

/// A batch on its way to the store.
#[derive(Debug)]
pub(super) struct CommitUnderWay {
    pub(super) task: JoinHandle<Result<Committed, FlushError>>,
    pub(super) started: Instant,
    /// Bytes of log in it.
    bytes: u64,
}

/// A batch being read and coalesced; it ends with whoever waits for it. What it reads it mends, and that must not be another disk's
/// by then.
#[derive(Debug)]
pub(super) struct Drafting {
    task: Draft,
    /// Where it ends.
    lsn: Lsn,
    /// Bytes of log in it.
    bytes: u64,
}

#[derive(Debug)]
struct Draft(JoinHandle<Result<Drafted, FlushError>>);

impl Drop for Draft {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Drafting {
    /// Where it ends.
    pub(super) fn lsn(&self) -> Lsn {
        self.lsn
    }
}

impl VdiTask {
    fn is_urgent(&self) -> bool {
        self.through.is_some()
            || !self.waiters.is_empty()
            || self.starving
            || self.released
            || self.admission.is_held()
    }

    pub(super) fn start_commit(&mut self) {
        let joined = self.p.backing.is_joined();
        let ready = joined && !self.join_unnoted;
        if !ready || self.commit.is_some() || Instant::now() < self.not_before {
            return;
        }
        let committed = self.p.record.committed;
        let situation = Situation {
            oldest: self.p.segments.oldest_dirty(committed).map(|since| since.elapsed()),
            fill: self.fill(),
            urgent: self.is_urgent(),
        };
        if !flusher::should_start(&self.p.options, situation) {
            return;
        }
        let Some(ready) = self.drafting.take().or_else(|| self.start_draft(committed)) else {
            return;
        };
        let (vdi, backing) = (self.p.vdi, Arc::clone(&self.p.backing));
        let Drafting { task: mut draft, lsn, bytes } = ready;
        self.sent = self.sent.max(lsn);
        let task = tokio::spawn(async move {
            let drafted = (&mut draft.0).await.unwrap_or_else(|error| {
                Err(BackingError::Failed(format!("coalescing a batch: {error}")).into())
            })?;
            flusher::commit(vdi, &*backing, drafted).await
        });
        self.commit = Some(CommitUnderWay { task, started: Instant::now(), bytes });
        // While this one is on its way to the store, the next is read and coalesced.
        if situation.urgent || situation.fill >= self.p.options.start_fill {
            self.drafting = self.start_draft(lsn);
        }
    }

    /// Starts reading and coalescing what comes after `after`; none if nothing does.
    fn start_draft(&self, after: Lsn) -> Option<Drafting> {
        let batch = self.p.segments.batch(after, self.p.options.batch_bytes);
        let lsn = batch.last()?.last_lsn;
        let bytes = batch.iter().map(|s| u64::from(s.used_blocks) * BLOCK_SIZE as u64).sum();
        let (local, vdi) = (Arc::clone(&self.p.ground.local), self.p.vdi);
        // What is in memory only may be lost yet.
        let is_durable = self.through.is_none();
        let newer = if is_durable { self.p.segments.cuts_after(lsn) } else { 0 };
        let asked = Asked { cuts: self.p.record.cuts.clone(), newer };
        let draft = async move { flusher::draft(&local, vdi, after, batch, asked).await };
        let task = Draft(tokio::spawn(draft));
        Some(Drafting { task, lsn, bytes })
    }

    pub(super) async fn committed(&mut self, result: Result<Committed, FlushError>) {
        let Some(CommitUnderWay { started, bytes, .. }) = self.commit.take() else { return };
        let Committed { lsn, made } = match result {
            Ok(committed) => committed,
            Err(error) if self.is_final_without_legs(&error) => {
                let after = self.p.record.committed;
                let why = format!(
                    "what was acknowledged after LSN {after} cannot be brought to the store ({error})"
                );
                return self.give_up(&why);
            }
            Err(error) => return self.commit_failed(&error),
        };
        self.failure = None;
        self.retry_after = RETRY_AFTER;
        let before = self.p.segments.dirty_count(self.p.record.committed);
        self.p.record.reached(lsn);
        self.made_cuts(&made);
        let after = self.p.segments.dirty_count(lsn);
        self.admission.committed((before - after) as u64);
        if self.through.is_some() {
            self.committed_without_legs();
        } else {
            self.checkpoint_due = true;
            self.checkpoint().await;
        }
        self.feed();
        {
            let mut status = self.p.status.lock();
            status.commits += 1;
            status.replayed_bytes += bytes;
        }
        let pause =
            flusher::pause_after(&self.p.options, started.elapsed(), self.fill(), self.is_urgent());
        self.not_before = Instant::now() + pause;
    }

    fn commit_failed(&mut self, error: &FlushError) {
        // The next batch continued this one.
        self.drafting = None;
        self.made_unknown();
        let why = error.to_string();
        let closing = matches!(error, FlushError::Backing(BackingError::Closing));
        if !closing {
            tracing::error!(vdi = %self.p.record.name, error = %why, "replay to the store failed; the log is kept");
        }
        self.fail_waiters(&why);
        self.note_error(&why);
        self.failure = Some(why);
        // The log stays as it is; what was transient after all gets another chance.
        self.not_before = Instant::now() + self.retry_after;
        self.retry_after = match error {
            FlushError::Backing(_) => RETRY_AFTER,
            FlushError::Local(_) | FlushError::Batch(_) => {
                (self.retry_after * 2).min(RETRY_LOCAL_AFTER_MAX)
            }
        };
    }
}

/// The result of the commit under way; never if there is none.
pub(super) async fn joined(commit: &mut Option<CommitUnderWay>) -> Result<Committed, FlushError> {
    match commit {
        Some(commit) => match (&mut commit.task).await {
            Ok(result) => result,
            Err(error) => Err(BackingError::Failed(format!("the commit ended: {error}")).into()),
        },
        None => std::future::pending().await,
    }
}
