//! What may happen to one of two legs: it fails, also in the middle of being put out; its copies rot; it is absent at a
//! start; it comes back as it was when it was left behind. All of it hits one leg at a time, the victim: what is lost on
//! both is lost. The other leg may be the next victim once a recovery has made both equal.

use super::Rig;
use blockstore::crc::crc32c;
use blockstore::device::sim::SimDevice;
use blockstore::device::{BlockDevice, Device, DeviceError};
use blockstore::types::BLOCK_SIZE;
use bytes::Bytes;
use cache::CacheError;
use cache::disk::plan::SegmentId;
use cache::format::LegSet;
use cache::local::Local;
use rand::Rng;
use rand::rngs::SmallRng;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

/// What happened to the legs so far.
#[derive(Debug)]
pub(super) struct Faults {
    /// The leg that everything happens to, if there are two.
    pub(super) victim: Option<u8>,
    /// The disk said that it failed, and was not told yet that it is out: joining as what.
    reported: Option<Option<u64>>,
    /// It failed in this life of the host.
    pub(super) failed: bool,
    /// It was put out, durably.
    pub(super) out: bool,
    /// Copies may rot in this seed: then the other leg stays whole for good.
    pub(super) rots: bool,
}

impl Faults {
    pub(super) fn new(rng: &mut SmallRng, legs: usize) -> Self {
        let victim = (legs > 1).then(|| rng.random_range(0..legs as u8));
        let rots = rng.random_bool(0.5);
        Self { victim, reported: None, failed: false, out: false, rots }
    }
}

/// The legs as they are named when the cache is opened.
pub(super) fn named(sims: &[SimDevice]) -> Vec<(PathBuf, Device)> {
    (0..).zip(sims).map(|(n, sim)| (format!("sim{n}").into(), sim.device())).collect::<Vec<_>>()
}

/// Runs `future` for so many polls at most, then drops it: the host died.
pub(super) async fn cut_short<F: Future>(future: F, polls: u32) -> Option<F::Output> {
    let (mut future, mut left) = (pin!(future), polls);
    std::future::poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending if left == 0 => Poll::Ready(None),
        Poll::Pending => {
            left -= 1;
            context.waker().wake_by_ref();
            Poll::Pending
        }
    })
    .await
}

impl Rig {
    /// The result of a local I/O as the disk is told it. Only a leg that was made to fail may.
    pub(super) fn result(&self, leg: u8, result: Result<(), DeviceError>) -> Result<(), i32> {
        result.map_err(|error| {
            assert!(self.faults.failed && self.faults.victim == Some(leg), "{error}");
            libc::EIO
        })
    }

    /// The victim fails from now on.
    pub(super) fn lose_leg(&mut self) {
        let Some(victim) = self.faults.victim else { return };
        self.faults.failed = true;
        self.sims[usize::from(victim)].set_reachable(false);
    }

    /// The disk noticed.
    pub(super) fn leg_failed(&mut self, leg: u8, joining: Option<u64>) {
        assert_eq!(Some(leg), self.faults.victim, "only the victim fails");
        let before = self.faults.reported.replace(joining);
        assert!(before.is_none_or(|before| before != joining), "a leg is reported once");
    }

    /// The asynchronous side puts a failed leg out; now and then the host dies before that is finished.
    pub(super) async fn put_out(&mut self) {
        let Some(victim) = self.faults.victim else { return };
        let reported = std::mem::take(&mut self.faults.reported);
        if let Some(joining) = reported
            && self.rng.random_bool(0.2)
        {
            let polls = self.rng.random_range(0..12);
            let local = Arc::clone(&self.local);
            let put_out = self.replacing.beside(local.leg_failed(victim, joining, "it failed"));
            if cut_short(put_out, polls).await.is_none() {
                // Nothing was acknowledged without the victim: with it, everything acknowledged must still be there.
                Box::pin(self.crash()).await;
                return;
            }
        } else if let Some(joining) = reported {
            let local = Arc::clone(&self.local);
            self.replacing.beside(local.leg_failed(victim, joining, "it failed")).await;
        }
        let members = self.local.members();
        let stale = reported.is_some_and(|joining| joining != Some(self.replacing.attempts()));
        assert!(reported.is_none() || stale || members.len() == 1, "one is out, the other is left");
        // A repair that failed puts it out, too.
        if !self.faults.out && members.len() == 1 {
            assert!(!members.contains(victim));
            self.faults.out = true;
        }
        self.listen();
    }

    /// After a crash: both legs are there again, or the victim is absent. The one that was left behind is never used.
    pub(super) async fn open_again(&mut self) {
        self.sims = self.sims.iter().map(SimDevice::connect).collect();
        self.faults.reported = None;
        self.faults.failed = false;
        let devices = named(&self.sims);
        let both = || devices.clone();
        let amid_replacement = self.replacing.was_cut_short();
        let Some(victim) = self.faults.victim else {
            self.local = Arc::new(Local::on_devices(both(), false).await.unwrap());
            return;
        };
        let all = LegSet::first(2);
        let survivor = all.minus(LegSet::NONE.with(victim));
        let only = |leg: u8| vec![both().swap_remove(usize::from(leg))];
        if !self.faults.out && self.rng.random_bool(0.1) {
            for leg in all.iter() {
                // The one that is absent might be the one that went on alone.
                let refused = Local::on_devices(only(leg), false).await;
                let knows = refused.is_ok() && survivor.contains(leg);
                assert!(
                    knows || matches!(refused, Err(CacheError::LegMissing { .. })),
                    "{refused:?}"
                );
            }
        }
        let absent = self.rng.random_bool(0.1);
        let local = if absent {
            let leg = survivor.iter().next().unwrap();
            let local = Local::on_devices(only(leg), true).await.unwrap();
            self.faults.out = true;
            local
        } else if amid_replacement {
            self.open_amid_replacement(both(), survivor).await
        } else {
            let mut legs = both();
            if self.rng.random_bool(0.5) {
                legs.reverse();
            }
            Local::on_devices(legs, false).await.unwrap()
        };
        let members = local.members();
        if self.faults.out {
            assert_eq!(members, survivor, "the leg that was left behind is no member");
            let stale = Local::on_devices(only(victim), false).await;
            let unfinished = matches!(stale, Err(CacheError::Unfinished { .. }));
            let refused = unfinished && self.replacing.left_unfinished();
            assert!(refused || matches!(stale, Err(CacheError::LegMissing { .. })), "{stale:?}");
        } else {
            assert!(members == all || members == survivor, "put out, or not, but nothing else");
            self.faults.out = members == survivor;
        }
        self.local = Arc::new(local);
    }

    /// A recovery is finished: whatever the victim lacked it has now, so that the other leg may be the one to go.
    pub(super) fn recovered(&mut self) {
        if !self.faults.out && !self.faults.rots && self.rng.random_bool(0.5) {
            self.faults.victim = self.faults.victim.map(|victim| 1 - victim);
        }
    }

    /// Some copies on the victim rot: blocks of segments, headers and summaries too.
    pub(super) async fn rot(&mut self) {
        let Some(victim) = self.faults.victim.filter(|_| !self.faults.failed) else { return };
        if !self.faults.rots {
            return;
        }
        let geometry = self.local.geometry;
        for _ in 0..self.rng.random_range(0..4) {
            let id = SegmentId(self.rng.random_range(0..geometry.segments.min(8)));
            let blocks = geometry.segment_blocks();
            let block = match self.rng.random_range(0..4) {
                0 => 0,
                1 => blocks - 1,
                _ => self.rng.random_range(0..blocks.min(64)),
            };
            let offset = geometry.segment_offset(id) + u64::from(block) * BLOCK_SIZE as u64;
            let junk = Bytes::from(vec![self.rng.random::<u8>(); BLOCK_SIZE]);
            self.sims[usize::from(victim)].write(offset, vec![junk]).await.unwrap();
        }
    }

    /// The block at `offset`, from whichever leg has it.
    pub(super) fn block_at(&self, offset: u64, crc: u32) -> Vec<u8> {
        let legs = self.disk.readable_legs();
        let copies = legs.iter().map(|leg| self.sims[usize::from(leg)].peek(offset, BLOCK_SIZE));
        let good = copies.into_iter().find(|bytes| crc32c(bytes) == crc);
        good.unwrap_or_else(|| panic!("no leg of {legs:?} has the block at {offset}"))
    }
}
