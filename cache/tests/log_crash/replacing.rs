//! A leg that was put out is replaced while the guest goes on: by a blank device, or by itself as it was left behind. The
//! copy goes on between any two steps of guest and disk, and is cut short by crashes and by failures of the new leg. Once it
//! is a member, either leg may be the next to go.

use super::{Rig, VDI};
use blockstore::device::sim::SimDevice;
use cache::CacheError;
use cache::format::LegSet;
use cache::leg_filler::LegFiller;
use cache::local::Local;
use rand::Rng;
use std::future::Future;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

type Filling = Pin<Box<dyn Future<Output = Result<(), CacheError>>>>;

/// A replacement under way, and what the last one left.
#[derive(Default)]
pub(super) struct Replacing {
    filling: Option<Filling>,
    ended: Option<Result<(), CacheError>>,
    attempts: u64,
    /// Of a hundred turns, in how many it goes on.
    pace: u32,
    /// A crash came while it was under way.
    cut_short: bool,
    /// The victim's device was blanked, and did not become a member.
    unfinished: bool,
}

impl Replacing {
    /// The host died.
    pub(super) fn stop(&mut self) {
        self.cut_short = self.filling.take().is_some() || self.ended.take().is_some();
    }

    /// Whether the last crash came amid a replacement; asked once.
    pub(super) fn was_cut_short(&mut self) -> bool {
        std::mem::take(&mut self.cut_short)
    }

    pub(super) fn attempts(&self) -> u64 {
        self.attempts
    }

    pub(super) fn left_unfinished(&self) -> bool {
        self.unfinished
    }

    fn go_on(&mut self, context: &mut Context<'_>) {
        if let Some(filling) = &mut self.filling
            && let Poll::Ready(result) = filling.as_mut().poll(context)
        {
            self.filling = None;
            self.ended = Some(result);
        }
    }

    /// Runs `future`, which may wait for something that the replacement holds.
    pub(super) async fn beside<F: Future>(&mut self, future: F) -> F::Output {
        let mut future = pin!(future);
        std::future::poll_fn(|context| {
            let polled = future.as_mut().poll(context);
            if polled.is_pending() {
                self.go_on(context);
            }
            polled
        })
        .await
    }
}

impl Rig {
    /// Begins to replace the leg that is out.
    pub(super) async fn replace(&mut self) {
        let Some(victim) = self.faults.victim else { return };
        let busy = self.replacing.filling.is_some() || self.replacing.ended.is_some();
        if !self.faults.out || busy || self.rng.random_bool(0.5) {
            return;
        }
        let place = &mut self.sims[usize::from(victim)];
        *place = match self.rng.random_bool(0.5) {
            true => SimDevice::new(16 << 20, self.rng.random()),
            false => place.connect(),
        };
        let device = place.device();
        self.faults.failed = false;
        self.replacing.unfinished = true;
        self.replacing.attempts += 1;
        self.replacing.pace = [2, 10, 50][self.rng.random_range(0..3)];
        let (local, pool) = (Arc::clone(&self.local), Arc::clone(&self.pool));
        local.blank_new_leg(&device).await.unwrap();
        let id = self.replacing.attempts;
        pool.begin_filling(id, std::iter::once(VDI));
        let given_up = local.begin_joining(id, "/dev/null".as_ref(), device).await.unwrap();
        let filler = LegFiller::new(local, pool, Arc::default(), (id, given_up), 0);
        self.replacing.filling = Some(Box::pin(async move { filler.run().await }));
    }

    /// A turn of the replacement; what it leads to.
    pub(super) fn replace_on(&mut self) {
        if self.rng.random_range(0..100) < self.replacing.pace {
            self.replacing.go_on(&mut Context::from_waker(Waker::noop()));
        }
        let Some(result) = self.replacing.ended.take() else { return };
        let members = self.local.members();
        match result {
            Ok(()) => {
                assert_eq!(members, LegSet::first(2));
                self.replaced();
            }
            Err(error) => {
                assert!(self.faults.failed, "only a leg that fails is given up: {error}");
                assert_eq!(members.len(), 1);
            }
        }
        self.feed();
    }

    /// The new leg has everything: either of them may be the next to go.
    fn replaced(&mut self) {
        self.faults.out = false;
        self.replacing.unfinished = false;
        if !self.faults.rots && self.rng.random_bool(0.5) {
            self.faults.victim = self.faults.victim.map(|victim| 1 - victim);
        }
    }

    /// The leg that has everything opens, with the new one or without, whenever the host died. Between the two superblocks it
    /// takes the operator's word.
    pub(super) async fn open_amid_replacement(
        &mut self,
        both: Vec<(PathBuf, blockstore::device::Device)>,
        survivor: LegSet,
    ) -> Local {
        let local = match Local::on_devices(both.clone(), false).await {
            Err(CacheError::LegMissing { .. }) => Local::on_devices(both, true).await.unwrap(),
            opened => opened.unwrap(),
        };
        if local.members() == LegSet::first(2) {
            self.replaced();
        } else {
            assert_eq!(local.members(), survivor);
        }
        local
    }
}
