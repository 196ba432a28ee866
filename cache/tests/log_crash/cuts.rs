//! The cadence of a schedule in the rig: rules come and go while the guest writes. Behind every write the model knows where a cut must
//! be; behind a batch it believes the disk, and recovery must say the same.

use super::Rig;
use blockstore::schedule::{Behind, Cadence};
use blockstore::types::Lsn;
use cache::LogCut;
use cache::flusher::Asked;
use cache::link::SealedSegment;
use cache::recovery::Recovered;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// What the rig knows of the cuts in its disk's log.
#[derive(Debug)]
pub struct Cuts {
    /// Apart from the rig's: without a rule it takes the course that it took before there were any.
    rng: SmallRng,
    rule: Option<Cadence>,
    /// By LSN.
    all: BTreeMap<u64, Cadence>,
}

impl Cuts {
    pub fn new(seed: u64) -> Self {
        let rng = SmallRng::seed_from_u64(seed ^ 0x00c0_dece);
        Self { rng, rule: None, all: BTreeMap::new() }
    }

    pub fn in_range(&self, lsns: RangeInclusive<u64>) -> Vec<(u64, Cadence)> {
        self.all.range(lsns).map(|(lsn, rule)| (*lsn, *rule)).collect()
    }
}

fn plain(cuts: &[LogCut]) -> Vec<(u64, Cadence)> {
    cuts.iter().map(|cut| (cut.lsn.0, cut.cadence)).collect()
}

impl Rig {
    /// Another rule now and then.
    pub fn change_cadence(&mut self) {
        if !self.cuts.rng.random_bool(0.01) {
            return;
        }
        let behind = if self.cuts.rng.random_bool(0.7) { Behind::Write } else { Behind::Batch };
        let keep = match behind {
            Behind::Write if self.cuts.rng.random_bool(0.5) => self.cuts.rng.random_range(1..60),
            // Recovery then tells of all that are not in the store.
            _ => 100_000,
        };
        let rule = Cadence { behind, keep };
        self.cuts.rule = self.cuts.rng.random_bool(0.7).then_some(rule);
        self.disk.set_cadence(self.cuts.rule);
        self.staged_snapshots(0);
    }

    /// A request of the guest was staged whole, up to here.
    pub fn staged_whole(&mut self, lsn: u64) {
        if let Some(rule) = self.cuts.rule.filter(|rule| rule.behind == Behind::Write) {
            self.cuts.all.insert(lsn, rule);
        }
    }

    /// A segment tells of the cuts in it.
    pub fn check_sealed_cuts(&mut self, sealed: &SealedSegment) {
        let told = plain(&sealed.cuts);
        let batches = told.iter().filter(|(_, rule)| rule.behind == Behind::Batch);
        self.cuts.all.extend(batches.copied());
        if sealed.first_lsn <= sealed.last_lsn {
            let expected = self.cuts.in_range(sealed.first_lsn.0..=sealed.last_lsn.0);
            assert_eq!(told, expected, "P5: what a segment says of its cuts");
        }
    }

    /// What a batch up to `lsn` is drafted with.
    pub fn asked(&self, lsn: u64) -> Asked {
        let newer = self.sealed.iter().filter(|sealed| sealed.first_lsn.0 > lsn);
        Asked { cuts: Vec::new(), newer: newer.map(|sealed| sealed.cuts.len() as u64).sum() }
    }

    /// Those that a batch must have: those which their rule keeps beside all that is sealed.
    pub fn kept_cuts(&self, lsns: RangeInclusive<u64>) -> Vec<u64> {
        let newer = self.asked(*lsns.end()).newer;
        let newest_first = self.cuts.in_range(lsns).into_iter().rev();
        let kept =
            (newer..).zip(newest_first).filter(|(newer, (_, rule))| *newer < u64::from(rule.keep));
        kept.map(|(_, (lsn, _))| lsn).collect()
    }

    /// What recovery says of cuts is what the log holds of them.
    pub fn check_recovered_cuts(&mut self, recovered: &Recovered) {
        let (last, store) = (recovered.last_lsn.0, self.store.image.lock().unwrap().1);
        self.cuts.all.retain(|lsn, _| *lsn <= last);
        let found: Vec<LogCut> = recovered.snapshots.cuts().iter().copied().collect();
        let found = plain(&found);
        // Of a segment that was not sealed nobody has told yet.
        let unsealed = found.iter().filter(|(_, rule)| rule.behind == Behind::Batch);
        self.cuts.all.extend(unsealed.copied());
        let pending = self.cuts.in_range(store + 1..=u64::MAX);
        let kept =
            |(n, (_, rule)): &(usize, (u64, Cadence))| pending.len() - n <= rule.keep as usize;
        let first = pending.iter().copied().enumerate().skip_while(|cut| !kept(cut));
        let expected: Vec<_> = first.map(|(_, cut)| cut).collect();
        // A rule that kept few may have been followed by one that keeps many: then more of the older ones are known.
        let more = found.len().saturating_sub(expected.len());
        assert_eq!(found[more..], expected, "cuts that the store does not have");
        assert!(pending.ends_with(&found), "{found:?} of {pending:?}");
        for live in &recovered.live {
            let range = live.header.first_lsn.0..=live.last_lsn.0;
            let count = if range.is_empty() { 0 } else { self.cuts.in_range(range).len() };
            let all_known = live.last_lsn.0 <= store || found.len() == pending.len();
            assert!(!all_known || live.cuts as usize == count, "of a segment");
        }
        self.cuts.rule = None;
    }

    /// As a sealed segment would have told.
    pub fn cuts_of(&self, first: Lsn, last: Lsn) -> Vec<LogCut> {
        if first > last {
            return Vec::new();
        }
        let cuts = self.cuts.in_range(first.0..=last.0).into_iter();
        cuts.map(|(lsn, cadence)| LogCut { lsn: Lsn(lsn), time_ms: 0, cadence }).collect()
    }
}
