//! The cadence of a disk's schedule: the task's half. The worker has the snapshots cut; here it is known which of them are in sealed
//! segments, and so durable, and which of those the store has been given.
//!
//! Nobody waits for one of them, so all that is kept of them is bounded: in the log those that their rule keeps, of those that were
//! made so many that who thins them may be away for a while.

use super::task::VdiTask;
use crate::link::{SealedSegment, ToDisk};
use crate::pending::LogCut;
use blockstore::schedule::{Behind, Cadence};
use blockstore::types::Lsn;

/// Made snapshots that are remembered until they are asked for.
const MADE_MAX: usize = 1 << 17;

/// Snapshots of a cadence that commits have made since this was last asked.
#[derive(Clone, Debug, Default)]
pub struct MadeCuts {
    /// LSN and time, milliseconds since 1970, in the order of their LSNs.
    pub cuts: Vec<(Lsn, u64)>,
    /// There may be others: the store knows.
    pub incomplete: bool,
}

/// How much less is cut than the schedule says, because those that are made cannot be thinned as fast.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressed {
    /// As it says.
    #[default]
    Not,
    /// Behind batches, not behind each write.
    Coarse,
    /// Nothing.
    Stopped,
}

impl Pressed {
    fn of(self, rule: Cadence) -> Option<Cadence> {
        match self {
            Self::Not => Some(rule),
            Self::Coarse => Some(Cadence { behind: Behind::Batch, ..rule }),
            Self::Stopped => None,
        }
    }
}

impl MadeCuts {
    fn add(&mut self, made: &[LogCut]) {
        if self.cuts.len() + made.len() > MADE_MAX {
            (self.cuts, self.incomplete) = (Vec::new(), true);
            return;
        }
        self.cuts.extend(made.iter().map(|cut| (cut.lsn, cut.time_ms)));
    }
}

impl VdiTask {
    /// Tells the worker what to cut from here on.
    pub(super) fn send_cadence(&self) {
        let rule = self.p.record.policy.chosen.schedule.cadence();
        self.p.sender.send(ToDisk::Cadence(rule.and_then(|rule| self.pressed.of(rule))));
    }

    /// Those who thin what was made are behind, or are not any more.
    pub(super) fn press(&mut self, pressed: Pressed) {
        if std::mem::replace(&mut self.pressed, pressed) != pressed {
            self.send_cadence();
        }
    }

    /// A segment was sealed: what is in it is durable.
    pub(super) fn learn_cuts(&self, sealed: &SealedSegment) {
        if sealed.cuts.is_empty() {
            return;
        }
        let mut pending = self.p.desk.pending();
        for cut in &sealed.cuts {
            pending.push_cut(*cut);
        }
    }

    /// A commit has made these.
    pub(super) fn made_cuts(&self, made: &[LogCut]) {
        if !made.is_empty() {
            self.p.made.lock().add(made);
        }
    }

    /// What became of a commit is not known.
    pub(super) fn made_unknown(&self) {
        self.p.made.lock().incomplete = true;
    }
}
