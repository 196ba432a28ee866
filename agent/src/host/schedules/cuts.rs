//! The snapshots of a cadence: cut by the disk's worker, made by its commits, learnt of here, and thinned like the others.
//!
//! More may be made than can be deleted: a commit makes as many as the rule keeps, and the next one may. So that what waits to be deleted
//! has a bound, the worker is told to cut less: behind batches, then nothing, until thinning has caught up.

use super::super::Host;
use super::Disk;
use blockstore::schedule::Cadence;
use cache::{Cache, MadeCuts, Pressed};
use uuid::Uuid;

/// With so many beyond what the rule keeps, and as many as that, only batches are cut behind.
const COARSE_FROM: usize = 8192;
/// With so many, and twice as many as the rule keeps, nothing is cut any more.
const STOPPED_FROM: usize = 32_768;

impl Disk {
    /// Takes note of what commits have made.
    pub(super) fn learn_made(&mut self, cache: &Cache, vdi: Uuid) {
        self.made(cache.take_made_cuts(vdi));
    }

    pub(super) fn made(&mut self, made: MadeCuts) {
        self.count_taken += made.cuts.len() as u64;
        self.cut.extend(made.cuts.into_iter().map(|(lsn, time_ms)| (lsn.0, time_ms)));
        if made.incomplete {
            self.list_again();
        }
    }

    /// What is to be told about how much to cut, if that is news; what is not as usual is told again and again, since whoever is told may
    /// be new.
    pub(super) fn press(&mut self, rule: Option<Cadence>) -> Option<Pressed> {
        let rule = rule?;
        let next = pressed(self.pressed.unwrap_or_default(), self.surplus_cuts(rule), rule.keep);
        let is_news = self.pressed.replace(next) != Some(next);
        (is_news || next != Pressed::Not).then_some(next)
    }

    fn surplus_cuts(&self, rule: Cadence) -> usize {
        self.cut.len().saturating_sub(self.held.len() + rule.keep as usize)
    }

    /// What people should know of it.
    pub(super) fn pressure(&self) -> Option<String> {
        let less = match self.pressed? {
            Pressed::Not => return None,
            Pressed::Coarse => "are taken behind batches only, not behind each write,",
            Pressed::Stopped => "behind writes are not taken",
        };
        Some(format!(
            "of the {} snapshots behind writes more wait to be deleted than can be in time: others {less} until that is done; keep fewer, \
             or take them at intervals",
            self.cut.len()
        ))
    }
}

/// With so many beyond what is kept. It is eased later than it begins.
fn pressed(now: Pressed, surplus: usize, keep: u32) -> Pressed {
    let coarse = keep as usize + COARSE_FROM;
    let stopped = 2 * keep as usize + STOPPED_FROM;
    match now {
        _ if surplus > stopped => Pressed::Stopped,
        Pressed::Stopped if surplus > coarse => Pressed::Stopped,
        _ if surplus > coarse => Pressed::Coarse,
        Pressed::Coarse | Pressed::Stopped if surplus > coarse / 2 => Pressed::Coarse,
        _ => Pressed::Not,
    }
}

impl Host {
    /// Tells the cache how much to cut of this disk.
    pub(super) fn tell_pressed(&self, vdi: Uuid, pressed: Pressed) {
        let parts = std::sync::Arc::clone(&self.parts);
        self.spawn(async move {
            // A disk that has gone cuts nothing.
            let _ = parts.cache.press_cuts(vdi, pressed).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn less_is_cut_while_thinning_is_behind_and_eased_with_a_margin() {
        let mut now = Pressed::Not;
        let mut at = |surplus| {
            now = pressed(now, surplus, 1000);
            now
        };
        assert_eq!(at(9_192), Pressed::Not);
        assert_eq!(at(9_193), Pressed::Coarse);
        assert_eq!(at(4_597), Pressed::Coarse, "not to and fro");
        assert_eq!(at(34_768), Pressed::Coarse);
        assert_eq!(at(34_769), Pressed::Stopped);
        assert_eq!(at(9_193), Pressed::Stopped);
        assert_eq!(at(9_192), Pressed::Coarse);
        assert_eq!(at(4_596), Pressed::Not);
        assert_eq!(at(1_000_000), Pressed::Stopped, "at once");
    }
}
