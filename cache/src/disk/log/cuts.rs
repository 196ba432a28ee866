//! The cadence of a disk's schedule: a snapshot behind every write, or behind every batch, in the very record of what it is behind.
//!
//! It costs 16 bytes of that record's header: no request, no answer, no flush and no LSN. It is there if and only if what it is
//! behind is there, and durable with it. What it is called, the LSN of the entry before it, says what is in it: all up to that, and
//! nothing else. So a write that was split is in it whole, since it stands behind the last part; what is in it of another write that
//! waits for room for its rest is what a crash would leave of it.
//!
//! With a rule, [`Log::room`] keeps a cut's bytes free beside each entry (INV-LOG-4).

use super::Log;
use crate::format::record::{CUT_LEN, ENTRIES_MAX, push_cut};
use crate::format::summary;
use crate::pending::LogCut;
use blockstore::io::now_ms;
use blockstore::schedule::{Behind, Cadence};

/// Where the log stands with its cadence.
#[derive(Debug, Default)]
pub(super) struct Cuts {
    rule: Option<Cadence>,
    /// Something was staged for a guest since the last cut.
    due: bool,
    /// A write is being staged, and not all of it is: no cut of a batch comes in between.
    inside: bool,
}

impl Cuts {
    /// Bytes to be kept free beside each entry.
    pub(super) fn reserve(&self) -> usize {
        if self.rule.is_some() { CUT_LEN } else { 0 }
    }

    /// What was staged is in a snapshot that somebody asked for.
    pub(super) fn note_snapshot(&mut self) {
        self.due = false;
    }

    /// A guest's write or zeroing has got its entry.
    pub(super) fn note_change(&mut self) {
        self.due = true;
    }
}

impl Log {
    /// From here on snapshots are cut as this says.
    pub fn set_cadence(&mut self, rule: Option<Cadence>) {
        if self.cuts.rule != rule {
            // What was staged under another rule goes out under that.
            self.send_batch();
            (self.cuts.rule, self.cuts.due) = (rule, false);
        }
    }

    /// A part of a guest's request was staged, and the next one follows at once.
    pub fn inside_request(&mut self) {
        self.cuts.inside = true;
    }

    /// A guest's request has all of its entries, or as many as there is room for now.
    pub fn after_request(&mut self, is_whole: bool) {
        self.cuts.inside = false;
        if is_whole {
            self.cut(Behind::Write);
        }
    }

    /// The batch that gathers is about to go out.
    pub(super) fn cut_behind_batch(&mut self) {
        if !self.cuts.inside {
            self.cut(Behind::Batch);
        }
    }

    fn cut(&mut self, behind: Behind) {
        let Some(cadence) = self.cuts.rule.filter(|rule| rule.behind == behind) else { return };
        let Some(open) = self.open.as_mut().filter(|_| self.cuts.due) else { return };
        let Some(gathering) = &open.gathering else { return };
        // What was staged in part before there was the rule may have left none.
        let entries = open.entries.len() + CUT_LEN;
        let summary = summary::blocks_for(entries);
        if entries - gathering.entries_from > ENTRIES_MAX
            || open.position + summary > self.geometry.segment_blocks()
        {
            return;
        }
        self.cuts.due = false;
        let time_ms = now_ms();
        push_cut(&mut open.entries, time_ms, cadence);
        open.cuts.push(LogCut { lsn: self.staged_lsn, time_ms, cadence });
    }
}
