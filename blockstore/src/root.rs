//! Versions of a disk's tree, and when the blocks that a commit replaced may be used again.
//!
//! Each commit makes a new [`Root`]. A reader holds the root it started from. A root keeps its
//! successor alive, and holds the garbage of the step to it: the blocks that it can reach and its
//! successor cannot. So a root is dropped only when no reader of it *or of an older one* is left,
//! and only then is its garbage handed to the sink. A root gets a successor only after the head that
//! names the successor is durable (rule C3).

use crate::eras::Stay;
use crate::format::pointer::Pointer;
use crate::format::vdi::VdiHead;
use crate::sabotage::{self, Bug};
use crate::types::{Birth, Gba};
use parking_lot::Mutex;
use std::fmt;
use std::sync::Arc;

/// What a step from one root to the next leaves behind.
#[derive(Debug, Default)]
pub struct Garbage {
    /// Single blocks, exclusively owned.
    pub blocks: Vec<Gba>,
    /// Whole subtrees that were cut off.
    pub subtrees: Vec<Subtree>,
}

impl Garbage {
    /// True if there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.subtrees.is_empty()
    }
}

/// A subtree that was cut off; what it owns exclusively may be freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subtree {
    /// Its top node.
    pub pointer: Pointer,
    /// The top node's level, 1 for a leaf.
    pub level: u8,
    /// What was born at or before this is not ours to free.
    pub last_snapshot: Birth,
}

/// Takes garbage that nobody can reach any more. Must not block.
pub trait GarbageSink: Send + Sync + fmt::Debug {
    /// Frees it, or queues it for that, in the era in which it was cut off.
    fn discard(&self, garbage: Garbage, since: Stay);

    /// To be taken before a head is changed, and given to [`discard`](Self::discard) with what that cuts off.
    fn stay(&self) -> Stay;
}

/// One version of a disk's tree.
#[derive(Debug)]
pub struct Root {
    /// The head that names it, as committed.
    pub head: VdiHead,
    link: Mutex<Link>,
    sink: Arc<dyn GarbageSink>,
}

#[derive(Debug, Default)]
struct Link {
    next: Option<Arc<Root>>,
    garbage: Garbage,
    /// Since before the next one's head was written.
    since: Option<Stay>,
}

impl Root {
    /// The present version.
    #[must_use]
    pub fn new(head: VdiHead, sink: Arc<dyn GarbageSink>) -> Arc<Self> {
        Arc::new(Self { head, link: Mutex::default(), sink })
    }

    /// Sets what comes after, whose head was written under `since`. Once per root.
    pub fn retire(&self, next: Arc<Self>, mut garbage: Garbage, since: Stay) {
        if sabotage::on(Bug::ReuseUnderReaders) {
            self.sink.discard(std::mem::take(&mut garbage), since.clone());
        }
        let mut link = self.link.lock();
        assert!(link.next.is_none(), "a root has one successor");
        *link = Link { next: Some(next), garbage, since: Some(since) };
    }

    fn unlink(&mut self) -> Link {
        std::mem::take(self.link.get_mut())
    }
}

impl Drop for Root {
    /// Walks the chain in a loop: a reader may have held back thousands of versions.
    fn drop(&mut self) {
        let mut link = self.unlink();
        loop {
            if let Some(since) = link.since {
                self.sink.discard(link.garbage, since);
            }
            let Some(next) = link.next else { return };
            let Some(mut next) = Arc::into_inner(next) else { return };
            link = next.unlink();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eras::Eras;
    use crate::format::vdi::{SnapshotIndex, VdiState};
    use crate::types::{Generation, Lsn};
    use uuid::Uuid;

    #[derive(Debug, Default)]
    struct Sink(Mutex<Vec<Gba>>, Arc<Eras>);

    impl GarbageSink for Sink {
        fn discard(&self, garbage: Garbage, _: Stay) {
            self.0.lock().extend(garbage.blocks);
        }

        fn stay(&self) -> Stay {
            self.1.stay()
        }
    }

    fn head() -> VdiHead {
        VdiHead {
            uuid: Uuid::from_u128(1),
            state: VdiState::Active,
            owner: None,
            attachment: Generation(0),
            attached_ms: 0,
            root: Pointer::SPARSE,
            height: 1,
            size_bytes: 4096,
            committed: Lsn(0),
            log_id: None,
            birth: Birth(0),
            last_snapshot_birth: Birth(0),
            snapshots: SnapshotIndex::default(),
            origin: None,
            meta: Pointer::SPARSE,
            created_ms: 0,
            committed_ms: 0,
            last_log: None,
        }
    }

    fn step(from: &Arc<Root>, sink: &Arc<Sink>, gba: u64) -> Arc<Root> {
        let next = Root::new(head(), sink.clone());
        let garbage = Garbage { blocks: vec![Gba(gba)], subtrees: vec![] };
        from.retire(next.clone(), garbage, sink.stay());
        next
    }

    #[test]
    fn garbage_waits_for_the_readers_of_all_older_roots() {
        let sink = Arc::new(Sink::default());
        let first = Root::new(head(), sink.clone());
        let reader = first.clone();
        let second = step(&first, &sink, 1);
        drop(first);
        let third = step(&second, &sink, 2);
        drop(second);
        // Nobody reads the second root, but the reader of the first may still need block 2.
        assert!(sink.0.lock().is_empty());
        drop(reader);
        assert_eq!(*sink.0.lock(), [Gba(1), Gba(2)]);
        drop(third);
        assert_eq!(sink.0.lock().len(), 2);
    }

    #[test]
    fn a_long_chain_is_dropped_without_recursion() {
        let sink = Arc::new(Sink::default());
        let first = Root::new(head(), sink.clone());
        let mut last = first.clone();
        for n in 0..200_000 {
            last = step(&last, &sink, n);
        }
        drop(last);
        assert!(sink.0.lock().is_empty());
        drop(first);
        assert_eq!(sink.0.lock().len(), 200_000);
    }
}
