//! Which segments a leg that is being filled still lacks, and the pins that keep their copying safe.
//!
//! A segment is *lacking* until it was copied whole, or granted to a disk whose worker writes to the new leg from the segment's
//! first block on. The copier takes one lacking segment at a time and pins it: while it is pinned it is granted to nobody
//! (INV-FILL-1), so that the copier's bytes, which were read a moment ago, cannot land over a new owner's records. A segment
//! that is not lacking is never copied: its owner may be writing to it.
//!
//! INV-FILL-2: nothing is copied, and the leg is not complete, while a disk is *awaited*: while it is not known which of its
//! segments are sealed and which it writes to both legs.

use super::{Inner, Pool};
use crate::disk::plan::SegmentId;
use std::collections::BTreeSet;
use uuid::Uuid;

/// See the module.
#[derive(Debug)]
pub(super) struct Filling {
    /// Tells one leg from the next.
    id: u64,
    lacking: BTreeSet<SegmentId>,
    awaited: BTreeSet<Uuid>,
    pinned: Option<SegmentId>,
}

/// What the copier has to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Copy this segment: it is pinned until [`Pool::filled`].
    Copy(SegmentId),
    /// Write zeros to this one, which nobody owns: it is pinned as well.
    Blank(SegmentId),
    /// Disks are awaited.
    Wait,
    /// Nothing is lacking.
    Done,
}

impl Pool {
    /// A new leg is to be filled: it lacks everything, and these disks have to say what they write to it.
    pub fn begin_filling(&self, id: u64, disks: impl Iterator<Item = Uuid>) {
        let lacking = (0..self.geometry.segments).map(SegmentId).collect();
        let filling = Filling { id, lacking, awaited: disks.collect(), pinned: None };
        self.inner.lock().filling = Some(filling);
    }

    /// The leg holds everything, or is given up.
    pub fn end_filling(&self) {
        let mut inner = self.inner.lock();
        inner.filling = None;
        self.joined.notify_one();
        Self::next_turn(&inner);
    }

    /// A disk is about to be opened, perhaps once more: it has to say what it writes to the new leg, if there is one.
    pub fn await_disk(&self, vdi: Uuid) {
        if let Some(filling) = &mut self.inner.lock().filling {
            filling.awaited.insert(vdi);
        }
    }

    /// Disks that have not said yet what they write to the new leg.
    #[must_use]
    pub fn awaited(&self) -> Vec<Uuid> {
        let inner = self.inner.lock();
        inner.filling.as_ref().map_or_else(Vec::new, |f| f.awaited.iter().copied().collect())
    }

    /// Of all segments of the disk, these are sealed and may lack on the new leg; the others it writes there itself. Without
    /// a list nobody writes to any. Ignored if it is about another leg than the one that is filled.
    pub fn disk_joined(&self, vdi: Uuid, id: Option<u64>, sealed: Option<&[SegmentId]>) {
        let mut inner = self.inner.lock();
        let Inner { filling: Some(filling), owners, .. } = &mut *inner else { return };
        if id.is_some_and(|id| id != filling.id) {
            return;
        }
        filling.awaited.remove(&vdi);
        self.joined.notify_one();
        let owned = owners.iter().zip(0..).filter(|(owner, _)| **owner == Some(vdi));
        for segment in owned.map(|(_, id)| SegmentId(id)) {
            match sealed.is_none_or(|sealed| sealed.contains(&segment)) {
                true => filling.lacking.insert(segment),
                false => filling.lacking.remove(&segment),
            };
        }
    }

    /// Takes and pins the next segment to fill. One at a time.
    #[must_use]
    pub fn next_to_fill(&self) -> Next {
        let mut inner = self.inner.lock();
        let Inner { filling: Some(filling), owners, .. } = &mut *inner else { return Next::Done };
        debug_assert!(filling.pinned.is_none(), "one at a time");
        if !filling.awaited.is_empty() {
            return Next::Wait;
        }
        let Some(id) = filling.lacking.pop_first() else { return Next::Done };
        filling.pinned = Some(id);
        match owners[id.0 as usize] {
            Some(_) => Next::Copy(id),
            None => Next::Blank(id),
        }
    }

    /// Nothing is lacking, and no disk is awaited. Pins nothing.
    #[must_use]
    pub fn is_filled(&self) -> bool {
        let inner = self.inner.lock();
        let whole =
            |f: &Filling| f.lacking.is_empty() && f.awaited.is_empty() && f.pinned.is_none();
        inner.filling.as_ref().is_none_or(whole)
    }

    /// Resolves when a disk that was awaited has said what it has to, or may have.
    pub async fn disk_said_something(&self) {
        self.joined.notified().await;
    }

    /// The pinned segment is whole on the new leg.
    pub fn filled(&self) {
        let mut inner = self.inner.lock();
        if let Some(filling) = &mut inner.filling {
            filling.pinned = None;
        }
        Self::next_turn(&inner);
    }

    /// Segments that the new leg lacks, the pinned one included.
    #[must_use]
    pub fn lacking(&self) -> u32 {
        let inner = self.inner.lock();
        let count =
            |filling: &Filling| filling.lacking.len() + usize::from(filling.pinned.is_some());
        inner.filling.as_ref().map_or(0, count) as u32
    }
}

impl Inner {
    /// Place in the queue of the first free segment that can be granted.
    pub(super) fn grantable(&self) -> Option<usize> {
        let pinned = self.filling.as_ref().and_then(|filling| filling.pinned);
        self.free.iter().position(|id| Some(*id) != pinned)
    }

    /// Takes a free segment to grant it.
    pub(super) fn take_free(&mut self) -> Option<SegmentId> {
        let at = self.grantable()?;
        let id = self.free.remove(at)?;
        if let Some(filling) = &mut self.filling {
            // Its owner writes to the new leg, too; if it does not yet, it will say so when it has joined.
            filling.lacking.remove(&id);
        }
        Some(id)
    }

    /// A disk is gone.
    pub(super) fn forget_awaited(&mut self, vdi: Uuid) {
        if let Some(filling) = &mut self.filling {
            filling.awaited.remove(&vdi);
        }
    }
}

#[cfg(test)]
mod tests {
    //! Goal: INV-FILL-1 and 2. Method: a small pool, by hand; whole disks in `cache/tests.rs` and tests/log_crash.

    use super::*;
    use crate::format::Geometry;

    const A: Uuid = Uuid::from_u128(1);
    const B: Uuid = Uuid::from_u128(2);

    fn pool() -> Pool {
        let geometry = Geometry { segments: 8, ..Geometry::for_size(1 << 30).unwrap() };
        Pool::new(geometry, (0..8).map(SegmentId).collect(), 1)
    }

    fn fill_all(pool: &Pool) -> Vec<Next> {
        let step = || Some(pool.next_to_fill()).filter(|next| *next != Next::Done);
        std::iter::from_fn(step).inspect(|_| pool.filled()).collect()
    }

    #[test]
    fn a_pinned_segment_is_granted_to_nobody() {
        let pool = pool();
        pool.begin_filling(1, std::iter::empty());
        assert_eq!(pool.next_to_fill(), Next::Blank(SegmentId(0)));
        let granted: Vec<_> =
            std::iter::from_fn(|| pool.grant(A)).map(|grant| grant.id.0).collect();
        assert_eq!(granted, [1, 2, 3, 4, 5, 6, 7]);
        pool.filled();
        assert_eq!(pool.grant(A).unwrap().id, SegmentId(0));
        assert_eq!(pool.next_to_fill(), Next::Done, "who got them writes them to both legs");
    }

    #[test]
    fn what_was_released_while_it_was_copied_waits_for_the_copy() {
        let pool = pool();
        let all: Vec<_> = std::iter::from_fn(|| pool.grant(A)).map(|grant| grant.id).collect();
        pool.begin_filling(1, [A].into_iter());
        pool.disk_joined(A, Some(1), Some(&all[2..4]));
        assert_eq!(pool.next_to_fill(), Next::Copy(all[2]));
        pool.release(all[2], false);
        assert_eq!(pool.grant(A), None);
        pool.filled();
        assert_eq!(pool.grant(A).unwrap().id, all[2]);
        assert_eq!(fill_all(&pool), [Next::Copy(all[3])]);
    }

    #[test]
    fn nothing_is_copied_while_a_disk_is_awaited() {
        let pool = pool();
        let grants = pool.grant_two(A, false);
        pool.begin_filling(7, [A, B].into_iter());
        pool.disk_joined(A, Some(6), Some(&[]));
        assert_eq!(pool.next_to_fill(), Next::Wait, "that was another leg");
        pool.disk_joined(A, Some(7), Some(&[grants[0].id]));
        assert_eq!(pool.next_to_fill(), Next::Wait);
        pool.unregister(B);
        let filled = fill_all(&pool);
        assert!(filled.contains(&Next::Copy(grants[0].id)));
        assert!(!filled.contains(&Next::Copy(grants[1].id)), "the disk writes it to both");
        assert_eq!((filled.len(), pool.lacking()), (7, 0));
        // Its log is opened anew: nothing is known of what its former worker wrote.
        pool.await_disk(A);
        assert_eq!(pool.next_to_fill(), Next::Wait);
        pool.disk_joined(A, None, None);
        let again = fill_all(&pool);
        assert_eq!(again, [Next::Copy(grants[0].id), Next::Copy(grants[1].id)]);
    }
}
