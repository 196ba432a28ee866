//! Who waits until all that was acknowledged is in the store, and the sealing that this takes.

use super::task::VdiTask;
use crate::error::CacheError;
use crate::link::ToDisk;
use blockstore::types::Lsn;
use tokio::sync::oneshot;

/// See the module.
pub(super) struct Waiter {
    /// Known once the worker has sealed everything.
    pub(super) lsn: Option<Lsn>,
    pub(super) roll: u64,
    reply: oneshot::Sender<Result<Lsn, CacheError>>,
}

impl VdiTask {
    /// Asks the worker to seal what it has; returns the number that its answer will carry.
    pub(super) fn roll(&mut self) -> u64 {
        let id = self.next_roll;
        self.next_roll += 1;
        self.roll_under_way = Some(id);
        self.p.sender.send(ToDisk::Roll { id });
        id
    }

    pub(super) fn drain(&mut self, reply: oneshot::Sender<Result<Lsn, CacheError>>) {
        let commits = self.failure.clone().map(|why| CacheError::Flush { vdi: self.p.vdi, why });
        if let Err(error) = self.log_is_sound().and(commits.map_or(Ok(()), Err)) {
            let _ = reply.send(Err(error));
            return;
        }
        let (roll, lsn) =
            if self.released { (0, Some(self.last_staged)) } else { (self.roll(), None) };
        // Those who do not wait any more.
        self.waiters.retain(|waiter| !waiter.reply.is_closed());
        self.waiters.push(Waiter { lsn, roll, reply });
        self.answer_waiters();
    }

    pub(super) fn answer_waiters(&mut self) {
        if self.keeps_origin() {
            // Whatever its LSN, the store has nothing of it.
            return;
        }
        let committed = self.p.record.committed;
        let (done, waiting) = std::mem::take(&mut self.waiters)
            .into_iter()
            .partition(|waiter| waiter.lsn.is_some_and(|lsn| lsn <= committed));
        self.waiters = waiting;
        for waiter in done {
            let _: Result<_, _> = waiter.reply.send(Ok(committed));
        }
    }

    pub(super) fn fail_waiters(&mut self, why: &str) {
        for waiter in self.waiters.drain(..) {
            let error = CacheError::Flush { vdi: self.p.vdi, why: why.into() };
            let _ = waiter.reply.send(Err(error));
        }
    }
}
