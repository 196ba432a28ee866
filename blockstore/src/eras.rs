//! Eras: who may still read, or has yet to free, what was reachable before a moment.
//!
//! A step from one root of a tree to the next takes a [`Stay`] before the new root can be seen by anyone, and keeps it until
//! no reader of the old one is left and what the step replaced was freed. So when all stays of an era are over, nothing that
//! was cut off in it is read by this host, or freed by it later: only then may collection take back what it found unreachable
//! at the era's end. What gives room for a block waits for no stay, so a full store cannot keep one from ending; but for an extent that
//! changes from data to metadata or back: that waits for a cycle's step 4, and so for stays, ten minutes at most.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::Notify;

/// The present era and those that are not over.
#[derive(Debug, Default)]
pub struct Eras {
    counts: Mutex<Counts>,
    ended: Notify,
}

#[derive(Debug, Default)]
struct Counts {
    now: u64,
    /// Stays by era; none for those that are over.
    stays: BTreeMap<u64, usize>,
}

/// Keeps the era in which it began from being over.
#[derive(Debug)]
pub struct Stay {
    eras: Arc<Eras>,
    era: u64,
}

impl Eras {
    /// Begins a stay in the present era.
    #[must_use]
    pub fn stay(self: &Arc<Self>) -> Stay {
        let mut counts = self.counts.lock();
        let era = counts.now;
        *counts.stays.entry(era).or_default() += 1;
        Stay { eras: Arc::clone(self), era }
    }

    /// Ends the present era; its number, for [`over`](Self::over).
    pub fn turn(&self) -> u64 {
        let mut counts = self.counts.lock();
        counts.now += 1;
        counts.now - 1
    }

    /// Resolves when no stay is left that began in this era or before.
    pub async fn over(&self, era: u64) {
        loop {
            let ended = self.ended.notified();
            if self.counts.lock().stays.range(..=era).next().is_none() {
                return;
            }
            ended.await;
        }
    }
}

impl Clone for Stay {
    /// Another in the same era.
    fn clone(&self) -> Self {
        *self.eras.counts.lock().stays.entry(self.era).or_default() += 1;
        Self { eras: Arc::clone(&self.eras), era: self.era }
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        let mut counts = self.eras.counts.lock();
        if let Some(count) = counts.stays.get_mut(&self.era) {
            *count -= 1;
            if *count == 0 {
                counts.stays.remove(&self.era);
                self.eras.ended.notify_waiters();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    async fn is_over(eras: &Eras, era: u64) -> bool {
        tokio::time::timeout(Duration::from_millis(1), eras.over(era)).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn an_era_is_over_when_its_last_stay_and_all_older_ones_are() {
        let eras = Arc::new(Eras::default());
        let oldest = eras.stay();
        let first = eras.turn();
        let stay = eras.stay();
        let copy = stay.clone();
        let second = eras.turn();
        let later = eras.stay();
        drop(stay);
        assert!(!is_over(&eras, first).await && !is_over(&eras, second).await);
        drop(copy);
        assert!(!is_over(&eras, second).await, "an older stay counts too");
        drop(oldest);
        assert!(is_over(&eras, second).await, "a later one does not");
        drop(later);
    }
}
