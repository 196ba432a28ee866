//! Outage drills: a disk is cut off from the store on purpose, to see what its guest can do without.
//!
//! The switch stands between the cache and the store: while it is open, commits and reads of what is not held locally
//! wait, as they do in an outage. What had begun before goes on to its end. Each drill ends by itself; an agent that
//! restarts has forgotten it. Nothing is at stake: the log takes what is written, as always.

use async_trait::async_trait;
use blockstore::Policy;
use blockstore::types::{Lba, Lsn};
use bytes::Bytes;
use cache::backing::{Backing, BackingError, Batch};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use tokio::time::Instant;

/// The longest drill.
pub const TIME_MAX: Duration = Duration::from_secs(24 * 3600);

/// A disk's switch. Closed, that is connected, unless a drill is under way.
#[derive(Debug)]
pub struct Switch {
    drill: watch::Sender<Option<Drill>>,
}

/// A drill under way.
#[derive(Clone, Copy, Debug)]
struct Drill {
    ends: Instant,
    /// The same, in milliseconds of UNIX time.
    until_ms: u64,
}

impl Switch {
    /// Connected.
    #[must_use]
    pub fn new() -> Self {
        Self { drill: watch::Sender::new(None) }
    }

    /// Cuts the disk off for `time`; a drill under way ends then, too. Returns the end in milliseconds of UNIX time.
    pub fn cut(&self, time: Duration) -> u64 {
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis());
        let until_ms = now_ms as u64 + time.as_millis() as u64;
        self.drill.send_replace(Some(Drill { ends: Instant::now() + time, until_ms }));
        until_ms
    }

    /// Connects it again. False: it was connected.
    pub fn restore(&self) -> bool {
        let was = self.until_ms().is_some();
        self.drill.send_replace(None);
        was
    }

    /// When the drill under way ends.
    #[must_use]
    pub fn until_ms(&self) -> Option<u64> {
        let drill = *self.drill.borrow();
        drill.filter(|drill| drill.ends > Instant::now()).map(|drill| drill.until_ms)
    }

    /// Returns when no drill is under way.
    pub async fn connected(&self) {
        let mut changes = self.drill.subscribe();
        loop {
            let drill = *changes.borrow_and_update();
            let Some(drill) = drill.filter(|drill| drill.ends > Instant::now()) else { return };
            tokio::select! {
                // The sender lives in `self`.
                _ = changes.changed() => {}
                () = tokio::time::sleep_until(drill.ends) => {}
            }
        }
    }
}

/// A disk in the store behind its switch.
#[derive(Debug)]
pub struct Switched<B> {
    behind: Arc<B>,
    switch: Arc<Switch>,
}

impl<B> Switched<B> {
    /// Puts the switch in between.
    #[must_use]
    pub fn new(behind: Arc<B>, switch: Arc<Switch>) -> Self {
        Self { behind, switch }
    }
}

#[async_trait]
impl<B: Backing> Backing for Switched<B> {
    fn committed(&self) -> Lsn {
        self.behind.committed()
    }

    async fn read(&self, lba: Lba, blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
        self.switch.connected().await;
        self.behind.read(lba, blocks).await
    }

    async fn stored(&self, lba: Lba, blocks: u32) -> Result<Vec<bool>, BackingError> {
        self.switch.connected().await;
        self.behind.stored(lba, blocks).await
    }

    async fn commit(&self, batch: Batch) -> Result<(), BackingError> {
        self.switch.connected().await;
        self.behind.commit(batch).await
    }

    fn policy(&self) -> Policy {
        self.behind.policy()
    }

    /// A drill is no outage: it must not fail a guest's requests.
    fn away_since_ms(&self) -> Option<u64> {
        self.behind.away_since_ms()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers everything at once.
    #[derive(Debug)]
    struct Prompt;

    #[async_trait]
    impl Backing for Prompt {
        fn committed(&self) -> Lsn {
            Lsn(7)
        }

        async fn read(&self, _lba: Lba, _blocks: u32) -> Result<Vec<Option<Bytes>>, BackingError> {
            Ok(Vec::new())
        }

        async fn commit(&self, _batch: Batch) -> Result<(), BackingError> {
            Ok(())
        }
    }

    const HOUR: Duration = Duration::from_secs(3600);

    fn parts() -> (Arc<Switch>, Switched<Prompt>) {
        let switch = Arc::new(Switch::new());
        (Arc::clone(&switch), Switched::new(Arc::new(Prompt), switch))
    }

    #[tokio::test(start_paused = true)]
    async fn a_drill_holds_reads_and_commits_and_ends_by_itself() {
        let (switch, disk) = parts();
        disk.read(Lba(0), 1).await.unwrap();
        switch.cut(HOUR);
        assert!(switch.until_ms().is_some());
        assert_eq!(disk.committed(), Lsn(7));
        let early = Duration::from_secs(3599);
        assert!(tokio::time::timeout(early, disk.read(Lba(0), 1)).await.is_err());
        let commit = disk.commit(Batch::new(Lsn(8), Vec::new()));
        tokio::time::timeout(HOUR, commit).await.unwrap().unwrap();
        assert_eq!(switch.until_ms(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_drill_ends_by_command_and_can_be_made_longer() {
        let (switch, disk) = parts();
        switch.cut(Duration::from_secs(1));
        switch.cut(HOUR);
        let read = disk.read(Lba(0), 1);
        tokio::pin!(read);
        assert!(tokio::time::timeout(Duration::from_secs(5), &mut read).await.is_err());
        assert!(switch.restore());
        tokio::time::timeout(Duration::from_secs(1), read).await.unwrap().unwrap();
        assert!(!switch.restore(), "none was under way");
    }
}
