//! How full the store is: a warning when it rises over a mark, and a word when it falls back.

use blockstore::Space;

/// Percent of the store that are to be free again below a mark before it counts as fallen back: figures that swing around a mark
/// are told once.
const FALL_BACK: f64 = 1.0;

/// The marks that used space is over.
#[derive(Debug, Default)]
pub(super) struct Watermarks {
    /// How many of the marks, from the lowest on.
    over: usize,
}

/// What is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Crossing {
    /// This mark, in percent, was passed on the way up.
    Rose(u8),
    /// On the way down.
    Fell(u8),
}

impl Watermarks {
    /// Notes what is used. `marks` are percentages, rising.
    pub(super) fn note(&mut self, marks: &[u8], space: Space) -> Vec<Crossing> {
        let used = percent_used(space);
        let mut crossings = Vec::new();
        while let Some(mark) = marks.get(self.over).filter(|mark| used >= f64::from(**mark)) {
            crossings.push(Crossing::Rose(*mark));
            self.over += 1;
        }
        while let Some(mark) = self.highest(marks).filter(|m| used < f64::from(*m) - FALL_BACK) {
            crossings.push(Crossing::Fell(mark));
            self.over -= 1;
        }
        crossings
    }

    /// The highest mark that used space is over.
    pub(super) fn highest(&self, marks: &[u8]) -> Option<u8> {
        self.over.checked_sub(1).and_then(|at| marks.get(at)).copied()
    }
}

/// How much of the store is used, 0 to 100.
pub(super) fn percent_used(space: Space) -> f64 {
    (space.blocks.saturating_sub(space.free)) as f64 * 100.0 / space.blocks.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use Crossing::{Fell, Rose};

    #[test]
    fn each_mark_is_told_once_up_and_once_down() {
        let marks = [80, 90, 95];
        let mut watermarks = Watermarks::default();
        let mut note =
            |used: u64| watermarks.note(&marks, Space { blocks: 1000, free: 1000 - used });
        assert_eq!(note(0), []);
        assert_eq!(note(799), []);
        assert_eq!(note(800), [Rose(80)]);
        assert_eq!(note(801), []);
        assert_eq!(note(795), [], "it swings around the mark");
        assert_eq!(note(805), []);
        assert_eq!(note(960), [Rose(90), Rose(95)]);
        assert_eq!(note(893), [Fell(95)]);
        assert_eq!(note(889), [Fell(90)]);
        assert_eq!(note(900), [Rose(90)]);
        assert_eq!(note(100), [Fell(90), Fell(80)]);
        assert_eq!(watermarks.highest(&marks), None);
    }

    #[test]
    fn no_marks_and_no_space_are_no_trouble() {
        let mut watermarks = Watermarks::default();
        assert_eq!(watermarks.note(&[], Space { blocks: 10, free: 0 }), []);
        assert_eq!(watermarks.note(&[1], Space { blocks: 0, free: 0 }), []);
        assert_eq!(watermarks.note(&[100], Space { blocks: 10, free: 0 }), [Rose(100)]);
        assert_eq!(watermarks.highest(&[100]), Some(100));
    }
}
