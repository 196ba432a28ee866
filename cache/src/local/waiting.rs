//! How long a leg is waited for: while another member answers, [`Local::leg_timeout`], and then it is treated as one that
//! failed. The last leg is waited for however long it takes.
//!
//! An operation that is given up goes on in a task of its own, which keeps its buffers and the leg's device until the device
//! has answered: what it still does lands on a leg that is no member, and while the device is held nobody can fill it anew.

use super::{Leg, Local};
use crate::error::CacheError;
use crate::format::legs::LegSet;
use blockstore::buf::AlignedBuf;
use blockstore::device::{DeviceError, DeviceErrorKind};
use blockstore::types::BLOCK_SIZE;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::{Instant, sleep_until, timeout};

/// What a cache waits for a leg unless it is told otherwise.
pub const LEG_TIMEOUT: Duration = Duration::from_secs(10);

type Running<T> = FuturesUnordered<BoxFuture<'static, (u8, Result<T, DeviceError>)>>;

impl Local {
    /// For so long an operation on one leg is waited for while another leg answers.
    #[must_use]
    pub fn leg_timeout(&self) -> Duration {
        Duration::from_millis(self.leg_timeout_ms.load(Ordering::Relaxed))
    }

    /// Sets [`Self::leg_timeout`], before disks are attached.
    pub fn set_leg_timeout(&self, timeout: Duration) {
        self.leg_timeout_ms.store(timeout.as_millis() as u64, Ordering::Relaxed);
    }

    /// Does the same on several legs at once. Once it succeeded on a member, or if `answered`, what it was to do was done
    /// elsewhere, legs that take too long count as failed.
    pub(super) async fn on_legs<T, F>(
        &self,
        legs: LegSet,
        answered: bool,
        operation: impl Fn(Arc<Leg>) -> F,
    ) -> Vec<(u8, Result<T, DeviceError>)>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, DeviceError>> + Send + 'static,
    {
        let members = self.members();
        let legs = self.legs_in(legs);
        let mut running: Running<T> = FuturesUnordered::new();
        for leg in &legs {
            let (number, done) = (leg.number, operation(Arc::clone(leg)));
            running.push(Box::pin(async move { (number, done.await) }));
        }
        let mut until = Instant::now() + self.leg_timeout();
        let (mut results, mut answered) = (Vec::with_capacity(legs.len()), answered);
        while !running.is_empty() {
            let next = tokio::select! {
                biased;
                next = running.next() => next,
                () = sleep_until(until), if answered => None,
            };
            let Some((number, result)) = next else { break };
            if !answered && result.is_ok() && members.contains(number) {
                answered = true;
                if until < Instant::now() {
                    // Both hung: the other may come back as well.
                    until = Instant::now() + self.leg_timeout();
                }
            }
            results.push((number, result));
        }
        if !running.is_empty() {
            let late: Vec<_> =
                legs.iter().filter(|leg| results.iter().all(|(n, _)| *n != leg.number)).collect();
            results.extend(late.iter().map(|leg| (leg.number, Err(self.too_slow(leg)))));
            tokio::spawn(async move { while running.next().await.is_some() {} });
        }
        results.sort_by_key(|(number, _)| *number);
        results
    }

    /// Does something on one leg, for which the leg's timeout counts.
    pub(super) async fn in_time<T, F>(&self, leg: &Arc<Leg>, operation: F) -> Result<T, DeviceError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, DeviceError>> + Send + 'static,
    {
        let mut operation = Box::pin(operation);
        match timeout(self.leg_timeout(), &mut operation).await {
            Ok(result) => result,
            Err(_) => {
                tokio::spawn(operation);
                Err(self.too_slow(leg))
            }
        }
    }

    /// Reads bytes of the first member whose copy `is_good`, and rewrites those that were not. If none is, the bytes are
    /// returned all the same. A member that takes too long is put out if another has a good copy.
    pub async fn read_good(
        &self,
        offset: u64,
        len: usize,
        is_good: impl Fn(&[u8]) -> bool,
    ) -> Result<AlignedBuf, CacheError> {
        self.read_from_any(offset, len, is_good, true).await
    }

    /// As [`Self::read_good`], and nothing is rewritten: for what may be used for something else while it is read, as those do who are
    /// not in the way of its eviction. A copy that is not good may be another disk's by then.
    pub async fn look(
        &self,
        offset: u64,
        len: usize,
        is_good: impl Fn(&[u8]) -> bool,
    ) -> Result<AlignedBuf, CacheError> {
        self.read_from_any(offset, len, is_good, false).await
    }

    async fn read_from_any(
        &self,
        offset: u64,
        len: usize,
        is_good: impl Fn(&[u8]) -> bool,
        mends: bool,
    ) -> Result<AlignedBuf, CacheError> {
        let (mut bad, mut damaged, mut failed) = (Vec::new(), None, None);
        let (mut late, mut slow) = (Running::new(), Vec::new());
        let members = self.legs_in(self.members());
        let is_last = members.len() < 2;
        let mut members = members.into_iter();
        loop {
            let (number, result) = match members.next() {
                Some(leg) => {
                    let number = leg.number;
                    let mut read: BoxFuture<'static, _> =
                        Box::pin(async move { (number, leg.device.read(offset, len).await) });
                    let answer = match is_last {
                        true => Ok(read.as_mut().await),
                        false => timeout(self.leg_timeout(), &mut read).await,
                    };
                    let Ok(answer) = answer else {
                        slow.push(number);
                        late.push(read);
                        continue;
                    };
                    answer
                }
                // None of those that answered has it.
                None => match late.next().await {
                    Some(answer) => answer,
                    None => break,
                },
            };
            slow.retain(|leg| *leg != number);
            match result {
                Ok(bytes) if is_good(&bytes) => {
                    if !late.is_empty() {
                        tokio::spawn(async move { while late.next().await.is_some() {} });
                    }
                    for leg in slow {
                        self.leg_silent(leg, None).await;
                    }
                    for leg in bad.into_iter().filter(|_| mends) {
                        self.repair(leg, offset, AlignedBuf::copy_of(&bytes)).await?;
                    }
                    return Ok(bytes);
                }
                Ok(bytes) => damaged = Some(bytes),
                Err(error) => failed = Some(error),
            }
            bad.push(number);
        }
        match (damaged, failed) {
            (Some(bytes), _) => Ok(bytes),
            (None, Some(error)) => Err(error.into()),
            (None, None) => Err(self.no_leg_left("nothing can be read".into())),
        }
    }

    /// A leg has not answered for too long. It is put out, or given up if it was joining as `joining`, as if it had failed;
    /// but only if another leg answers now. Otherwise nothing is changed: whoever waits for it says so again.
    pub async fn leg_silent(&self, leg: u8, joining: Option<u64>) {
        let this = LegSet::NONE.with(leg);
        {
            let mut mirror = self.mirror.lock();
            let joins = mirror.joining.as_ref().filter(|now| now.leg.number == leg);
            let is_meant = match joins {
                Some(joins) => joining == Some(joins.id()),
                None => mirror.members.contains(leg),
            };
            if self.read_only || !is_meant || mirror.suspected.contains(leg) {
                return;
            }
            mirror.suspected = mirror.suspected.with(leg);
        }
        if self.another_answers(leg).await {
            let why = format!("no answer for more than {:?}", self.leg_timeout());
            if let Err(error) = self.put_out(this, &why).await {
                tracing::warn!(leg, %error, "a leg of the cache that does not answer cannot be put out");
            }
        }
        let mut mirror = self.mirror.lock();
        mirror.suspected = mirror.suspected.minus(this);
    }

    /// A member other than this leg can be read: either place of its superblock, of which one may be a bad sector.
    async fn another_answers(&self, leg: u8) -> bool {
        for other in self.legs_in(self.members().minus(LegSet::NONE.with(leg))) {
            let device = Arc::clone(&other);
            let read = async move {
                match device.device.read(0, BLOCK_SIZE).await {
                    Err(_) => device.device.read(BLOCK_SIZE as u64, BLOCK_SIZE).await,
                    read => read,
                }
            };
            if self.in_time(&other, read).await.is_ok() {
                return true;
            }
        }
        false
    }

    fn too_slow(&self, leg: &Leg) -> DeviceError {
        DeviceError {
            kind: DeviceErrorKind::Io,
            device: leg.path.display().to_string(),
            operation: "I/O",
            offset: 0,
            len: 0,
            message: format!(
                "no answer within {:?}, while the other leg of the cache answers",
                self.leg_timeout()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    //! Goal: a leg that hangs costs whoever uses the cache one timeout, is out durably before anything counts without it, and
    //! the last leg is never put out. Method: simulated devices that stop answering, a simulated clock.

    use super::*;
    use blockstore::device::BlockDevice;
    use blockstore::device::sim::{FaultRates, Reach, SimDevice};

    const PLACE: u64 = 5 << 20;

    async fn pair() -> (Arc<Local>, [SimDevice; 2]) {
        let sims = [1, 2].map(|seed| SimDevice::new(16 << 20, seed));
        let named = || sims.iter().map(|sim| ("/leg".into(), sim.device())).collect::<Vec<_>>();
        Local::make_legs(named()).await.unwrap();
        (Arc::new(Local::on_devices(named(), false).await.unwrap()), sims)
    }

    fn block(byte: u8) -> AlignedBuf {
        AlignedBuf::copy_of(&[byte; BLOCK_SIZE])
    }

    /// What a start finds on the other leg alone, without the operator's word.
    async fn knows_that_it_is_alone(sim: &SimDevice) -> bool {
        Local::on_devices(vec![("/leg".into(), sim.device())], false).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_leg_that_hangs_is_out_after_the_timeout_whatever_is_done() {
        for what in ["write", "flush", "slot", "superblock", "read", "read each", "told"] {
            let (local, sims) = pair().await;
            local.write(PLACE, block(1)).await.unwrap();
            local.flush().await.unwrap();
            sims[0].set_reach(Reach::Hanging);
            let began = Instant::now();
            match what {
                "write" => local.write(PLACE, block(2)).await.unwrap(),
                "flush" => local.flush().await.unwrap(),
                "slot" => {
                    let mut slot = local.read_slots().await.unwrap().remove(0);
                    slot.sequence += 1;
                    local.write_slot(&slot).await.unwrap();
                }
                "superblock" => local.rewrite_superblock(|s| s.store = None).await.unwrap(),
                "read" => {
                    let bytes = local.read(PLACE, BLOCK_SIZE).await.unwrap();
                    assert_eq!(bytes[0], 1);
                }
                "read each" => {
                    let copies = local.read_each(PLACE, BLOCK_SIZE).await.unwrap();
                    assert_eq!((copies.len(), copies[0].0, copies[0].1[0]), (1, 1, 1));
                    local.write(PLACE, block(2)).await.unwrap();
                }
                _ => local.leg_silent(0, None).await,
            }
            assert!(began.elapsed() < LEG_TIMEOUT * 3, "{what}: {:?}", began.elapsed());
            assert_eq!(local.members(), LegSet::NONE.with(1), "{what}");
            assert!(
                knows_that_it_is_alone(&sims[1]).await,
                "{what}: it is written on the other leg"
            );
            // From then on nobody waits for it.
            let began = Instant::now();
            local.write(PLACE, block(3)).await.unwrap();
            local.flush().await.unwrap();
            assert_eq!(local.read(PLACE, BLOCK_SIZE).await.unwrap()[0], 3);
            assert!(began.elapsed() < LEG_TIMEOUT);
            // What it was asked lands after all, and changes nothing.
            sims[0].set_reach(Reach::Up);
            tokio::time::sleep(LEG_TIMEOUT).await;
            assert_eq!(local.members(), LegSet::NONE.with(1));
            let state = local.leg_states();
            let out = state.iter().find(|leg| !leg.member).and_then(|leg| leg.why.clone());
            assert!(out.is_some_and(|why| why.contains("no answer")), "{what}: {state:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_only_looks_rewrites_nothing() {
        let (local, sims) = pair().await;
        local.write(PLACE, block(1)).await.unwrap();
        local.flush().await.unwrap();
        // It is another disk's by now, and the other leg will have it, too.
        sims[0].write(PLACE, vec![block(2).freeze()]).await.unwrap();
        let is_old = |bytes: &[u8]| bytes[0] == 1;
        assert_eq!(local.look(PLACE, BLOCK_SIZE, is_old).await.unwrap()[0], 1);
        assert_eq!(sims[0].read(PLACE, BLOCK_SIZE).await.unwrap()[0], 2);
        assert_eq!(local.read_good(PLACE, BLOCK_SIZE, is_old).await.unwrap()[0], 1);
        assert_eq!(sims[0].read(PLACE, BLOCK_SIZE).await.unwrap()[0], 1, "it is mended");
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_leg_and_both_are_waited_for() {
        for single in [false, true] {
            let (local, sims) = pair().await;
            if single {
                local.leg_failed(0, None, "for the test").await;
                assert_eq!(local.members(), LegSet::NONE.with(1));
            }
            let members = local.members();
            sims.iter().for_each(|sim| sim.set_reach(Reach::Hanging));
            let back = tokio::spawn(async move {
                tokio::time::sleep(LEG_TIMEOUT * 100).await;
                sims.iter().for_each(|sim| sim.set_reach(Reach::Up));
            });
            local.leg_silent(1, None).await;
            assert_eq!(local.members(), members, "nobody knows that the other answers");
            local.write(PLACE, block(2)).await.unwrap();
            local.flush().await.unwrap();
            assert_eq!(local.read(PLACE, BLOCK_SIZE).await.unwrap()[0], 2);
            assert_eq!(local.members(), members);
            back.await.unwrap();
        }
    }

    /// Neither may then say that it went on without the other as often as that one.
    #[tokio::test(start_paused = true)]
    async fn a_leg_that_could_not_be_put_out_goes_on_when_the_other_fails() {
        let (local, sims) = pair().await;
        sims[0].set_rates(FaultRates { flush_io: 1.0, ..FaultRates::default() });
        for _ in 0..3 {
            // It is written on the other leg, and nobody knows whether durably.
            local.leg_silent(1, None).await;
            assert_eq!(local.members().len(), 2);
        }
        local.flush().await.unwrap();
        assert_eq!(local.members(), LegSet::NONE.with(1));
        drop(local);
        sims[0].set_rates(FaultRates::default());
        let named = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
        let local = Local::on_devices(named, false).await.unwrap();
        assert_eq!(local.members(), LegSet::NONE.with(1));
    }

    /// The one of which only attempts are known does not win by their number over the one that was served, nor the other way round.
    #[tokio::test(start_paused = true)]
    async fn a_leg_that_served_alone_is_never_left_behind_by_attempts_to_put_it_out() {
        for tried_both in [false, true] {
            let (local, sims) = pair().await;
            let named = |which: &[usize]| -> Vec<_> {
                which.iter().map(|n| (format!("/leg{n}").into(), sims[*n].device())).collect()
            };
            for round in 0..4 {
                // Each lands on one leg, and nobody knows whether durably.
                let out = if tried_both { round % 2 } else { 1 };
                sims[1 - out].set_rates(FaultRates { flush_io: 1.0, ..FaultRates::default() });
                local.leg_silent(out as u8, None).await;
                sims[1 - out].set_rates(FaultRates::default());
                let states = local.leg_states();
                assert!(states.len() == 2 && states.iter().all(|leg| leg.member), "{states:?}");
            }
            drop(local);
            // The first leg is not there, and the guests write on.
            let alone = Local::on_devices(named(&[1]), !tried_both).await.unwrap();
            assert_eq!(alone.members(), LegSet::NONE.with(1));
            drop(alone);
            let refused = Local::on_devices(named(&[0, 1]), true).await.unwrap_err();
            assert!(matches!(refused, CacheError::SplitLegs { .. }), "{refused}");
        }
    }

    /// An attempt that failed on the one leg, one on the other, which knows of the first, and then the first once more, which holds.
    #[tokio::test(start_paused = true)]
    async fn a_leg_that_was_put_out_never_wins_over_the_one_that_went_on() {
        let (local, sims) = pair().await;
        let named = |which: &[usize]| -> Vec<_> {
            which.iter().map(|n| (format!("/leg{n}").into(), sims[*n].device())).collect()
        };
        for out in [1_u8, 0] {
            let other = &sims[1 - usize::from(out)];
            other.set_rates(FaultRates { flush_io: 1.0, ..FaultRates::default() });
            local.leg_silent(out, None).await;
            other.set_rates(FaultRates::default());
        }
        local.leg_failed(1, None, "for the test").await;
        assert_eq!(local.members(), LegSet::FIRST);
        drop(local);
        for _ in 0..3 {
            drop(Local::on_devices(named(&[1]), true).await.unwrap());
        }
        let refused = Local::on_devices(named(&[0, 1]), true).await.unwrap_err();
        assert!(matches!(refused, CacheError::SplitLegs { .. }), "{refused}");
    }

    /// What a leg may have of an attempt that failed does not stay beside what holds.
    #[tokio::test(start_paused = true)]
    async fn after_an_attempt_that_failed_both_copies_are_written_anew() {
        let (local, sims) = pair().await;
        sims[0].set_rates(FaultRates { flush_io: 1.0, ..FaultRates::default() });
        local.leg_silent(1, None).await;
        sims[0].set_rates(FaultRates::default());
        local.rewrite_superblock(|s| s.store = Some(s.cache)).await.unwrap();
        drop(local);
        let named = sims.iter().map(|sim| ("/leg".into(), sim.device())).collect();
        let local = Local::on_devices(named, false).await.unwrap();
        assert_eq!(local.members().len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cache_is_not_opened_without_a_leg_that_hangs_unless_that_is_said() {
        let (local, sims) = pair().await;
        drop(local);
        sims[0].set_reach(Reach::Hanging);
        let named = || sims.iter().map(|sim| ("/leg".into(), sim.device())).collect::<Vec<_>>();
        let error = Local::on_devices(named(), false).await.unwrap_err();
        assert!(matches!(&error, CacheError::LegMissing { why, .. } if why.contains("no answer")));
        let local = Local::on_devices(named(), true).await.unwrap();
        assert_eq!(local.members(), LegSet::NONE.with(1));
    }
}
