//! Frees what commits and deletions leave behind.
//!
//! Single blocks go to the allocator at once. Subtrees are queued and walked in the background, a
//! thousand nodes of memory at most, so that discarding or deleting a huge disk returns at once. A
//! crash before a subtree was walked leaks it until the garbage collector's next cycle.

use crate::alloc::Allocator;
use crate::eras::{Eras, Stay};
use crate::error::{Result, StoreErrorKind};
use crate::format::pointer::Pointer;
use crate::io::Io;
use crate::root::{Garbage, GarbageSink, Subtree};
use crate::tree::Reader;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::sync::watch;

/// Takes garbage, frees it in the background, and keeps the allocator's pool at a good level.
#[derive(Debug)]
pub(crate) struct Reclaimer {
    allocator: Arc<Allocator>,
    queue: Mutex<VecDeque<(Subtree, Stay)>>,
    /// Subtrees queued or being walked.
    outstanding: watch::Sender<usize>,
    eras: Arc<Eras>,
}

impl GarbageSink for Reclaimer {
    fn discard(&self, garbage: Garbage, since: Stay) {
        if !garbage.blocks.is_empty() {
            self.allocator.free(garbage.blocks);
        }
        let count = garbage.subtrees.len();
        if count > 0 {
            let subtrees = garbage.subtrees.into_iter().map(|subtree| (subtree, since.clone()));
            self.queue.lock().extend(subtrees);
            self.outstanding.send_modify(|n| *n += count);
        }
    }

    fn stay(&self) -> Stay {
        self.eras.stay()
    }
}

impl Reclaimer {
    pub(crate) fn new(allocator: Arc<Allocator>) -> Arc<Self> {
        let (queue, outstanding) = (Mutex::default(), watch::channel(0).0);
        Arc::new(Self { allocator, queue, outstanding, eras: Arc::default() })
    }

    /// Resolves when no subtree waits or is being walked.
    pub(crate) async fn idle(&self) {
        // An error means that the sender is gone, which it is not while `self` lives.
        let _ = self.outstanding.subscribe().wait_for(|n| *n == 0).await;
    }

    /// Works until `stop` turns true or the store closes.
    pub(crate) async fn run(self: Arc<Self>, reader: Reader, mut stop: watch::Receiver<bool>) {
        let mut queued = self.outstanding.subscribe();
        loop {
            let next = self.queue.lock().pop_front();
            let outcome = match next {
                Some((subtree, _since)) => {
                    let outcome = self.walk(&reader, subtree, &stop).await;
                    self.outstanding.send_modify(|n| *n -= 1);
                    outcome
                }
                None => tokio::select! {
                    biased;
                    () = turned(&mut stop, |stop| *stop) => return,
                    () = reader.io.closed() => return,
                    () = turned(&mut queued, |n| *n > 0) => Ok(()),
                    () = self.allocator.wants_housekeeping() => {
                        self.allocator.housekeep(&reader.io).await
                    }
                },
            };
            match outcome {
                Err(error) if error.kind == StoreErrorKind::Closing => return,
                Err(error) => tracing::warn!(%error, "blocks leak until they are collected"),
                Ok(()) => {}
            }
            if *stop.borrow() {
                return;
            }
        }
    }

    /// Frees a subtree's exclusively owned blocks, depth first.
    async fn walk(
        &self,
        reader: &Reader,
        subtree: Subtree,
        stop: &watch::Receiver<bool>,
    ) -> Result<()> {
        let exclusive = |p: &Pointer| p.is_exclusive(subtree.last_snapshot);
        let mut stack = vec![(vec![subtree.pointer], subtree.level)];
        while let Some((pointers, level)) = stack.pop() {
            if *stop.borrow() {
                return Ok(());
            }
            let nodes = match reader.read_nodes(&pointers).await {
                Ok(nodes) => nodes,
                Err(error) if error.kind == StoreErrorKind::Corrupt => {
                    tracing::warn!(%error, "a damaged node was cut off; what is below it leaks");
                    continue;
                }
                Err(error) => return Err(error),
            };
            let mut freed: Vec<_> = pointers.iter().map(|p| p.gba).collect();
            for node in nodes {
                let children: Vec<Pointer> = node.children().map(|(_, p)| p).collect();
                if level == 1 {
                    freed.extend(children.iter().filter(|p| exclusive(p)).map(|p| p.gba));
                } else if level == 2 {
                    stack.push((children.into_iter().filter(exclusive).collect(), 1));
                } else {
                    let singles = children.into_iter().filter(exclusive);
                    stack.extend(singles.map(|child| (vec![child], level - 1)));
                }
            }
            self.allocator.free(freed);
            if self.allocator.is_overfull() {
                self.allocator.housekeep(&reader.io).await?;
            }
        }
        Ok(())
    }

    /// Who may still read or free what.
    pub(crate) fn eras(&self) -> &Eras {
        &self.eras
    }

    /// The allocator that takes what is freed.
    pub(crate) fn allocator(&self) -> &Arc<Allocator> {
        &self.allocator
    }

    /// Last act of an orderly close.
    pub(crate) async fn release_claims(&self, io: &Io) -> Result<()> {
        self.allocator.release_all(io).await
    }
}

/// Resolves when a watched value fulfils `condition`, or can no longer change.
async fn turned<T>(receiver: &mut watch::Receiver<T>, condition: impl FnMut(&T) -> bool) {
    let _ = receiver.wait_for(condition).await;
}
