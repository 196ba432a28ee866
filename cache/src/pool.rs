//! The segment pool: which segments are free, and who gives way when they run short.
//!
//! Segments are handed out with a sequence number and a nonce never used before. Clean segments of all disks are
//! evicted oldest first (INV-POOL-1: those of one disk in order of their sequence, so that no older copy of a block can
//! outlive a newer one). Locked only when a segment changes hands.
//!
//! INV-POOL-2: every segment is free or has an owner, never both. INV-POOL-3 (rule L10): each disk can always have its
//! floor of dirty segments; what it takes beyond must leave the others theirs, so no disk takes the whole ring.

mod filling;

pub use filling::Next;

use crate::disk::plan::SegmentId;
use crate::format::Geometry;
use crate::link::Grant;
use filling::Filling;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use tokio::sync::mpsc::UnboundedSender;
use uuid::Uuid;

/// What the pool asks of the task that looks after a disk. At most one message per segment is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolMessage {
    /// Give this clean segment back.
    Evict(SegmentId),
    /// A segment is free and it is your turn: ask again.
    YourTurn,
}

/// See the module.
#[derive(Debug)]
pub struct Pool {
    geometry: Geometry,
    inner: Mutex<Inner>,
    /// Something was heard of a disk that was awaited; one waits for it.
    joined: tokio::sync::Notify,
}

#[derive(Debug)]
struct Inner {
    free: VecDeque<SegmentId>,
    next_seq: u64,
    clean: BTreeMap<u64, (SegmentId, Uuid)>,
    evicting: u32,
    /// By segment; none for free ones.
    owners: Vec<Option<Uuid>>,
    /// Segments that each disk owns and that are not in `clean`; kept in step by [`Self::dirtied`] and [`Self::cleaned`].
    dirty: BTreeMap<Uuid, u32>,
    /// Owners whose segments are out of use: logs in quarantine.
    quarantined: BTreeSet<Uuid>,
    waiting: VecDeque<Uuid>,
    tasks: BTreeMap<Uuid, UnboundedSender<PoolMessage>>,
    /// A leg of the cache is being filled.
    filling: Option<Filling>,
}

/// Segments by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolCounts {
    /// All of them.
    pub segments: u32,
    /// Ready to be handed out.
    pub free: u32,
    /// Committed; read cache until evicted.
    pub clean: u32,
    /// Out of use: segments of logs in quarantine.
    pub quarantined: u32,
    /// Disks that hold segments.
    pub disks: u32,
}

impl PoolCounts {
    /// Segments that are neither free nor clean, nor out of use.
    #[must_use]
    pub fn used(&self) -> u32 {
        let usable = self.segments.saturating_sub(self.quarantined);
        usable.saturating_sub(self.free).saturating_sub(self.clean)
    }

    /// Share of the segments that hold uncommitted records, 0 to 1; the two that each disk has at hand do not count.
    #[must_use]
    pub fn fill(&self) -> f64 {
        let dirty = self.used().saturating_sub(2 * self.disks);
        f64::from(dirty) / f64::from(self.segments.saturating_sub(self.quarantined).max(1))
    }
}

impl Pool {
    /// A pool in which `free` can be handed out, with sequence numbers from `next_seq` on.
    #[must_use]
    pub fn new(geometry: Geometry, free: Vec<SegmentId>, next_seq: u64) -> Self {
        let inner = Inner {
            free: free.into(),
            next_seq,
            clean: BTreeMap::new(),
            evicting: 0,
            owners: vec![None; geometry.segments as usize],
            dirty: BTreeMap::new(),
            quarantined: BTreeSet::new(),
            waiting: VecDeque::new(),
            tasks: BTreeMap::new(),
            filling: None,
        };
        Self { geometry, inner: Mutex::new(inner), joined: tokio::sync::Notify::new() }
    }

    /// Notes who owns segments that were found in use.
    pub fn adopt(&self, vdi: Uuid, ids: impl Iterator<Item = SegmentId>) {
        let mut inner = self.inner.lock();
        for id in ids {
            inner.owners[id.0 as usize] = Some(vdi);
            inner.dirtied(vdi);
        }
    }

    /// Takes all segments of a disk out of use; they belong to `log` from now on.
    pub fn quarantine(&self, vdi: Uuid, log: Uuid) {
        let mut inner = self.inner.lock();
        for owner in inner.owners.iter_mut().filter(|owner| **owner == Some(vdi)) {
            *owner = Some(log);
        }
        if let Some(count) = inner.dirty.remove(&vdi) {
            inner.dirty.insert(log, count);
        }
        inner.quarantined.insert(log);
    }

    /// The segments of a log in quarantine are free: the slot that kept it is durably gone.
    pub fn unquarantine(&self, log: Uuid) {
        for id in self.owned(log) {
            self.release(id, false);
        }
        self.inner.lock().quarantined.remove(&log);
    }

    /// Segments that a disk owns.
    #[must_use]
    pub fn owned(&self, vdi: Uuid) -> Vec<SegmentId> {
        let inner = self.inner.lock();
        let owned = inner.owners.iter().zip(0..).filter(|(owner, _)| **owner == Some(vdi));
        owned.map(|(_, id)| SegmentId(id)).collect()
    }

    /// Makes a disk's task known.
    pub fn register(&self, vdi: Uuid, task: UnboundedSender<PoolMessage>) {
        self.inner.lock().tasks.insert(vdi, task);
    }

    /// Forgets a disk and its claims on segments.
    pub fn unregister(&self, vdi: Uuid) {
        let mut inner = self.inner.lock();
        inner.tasks.remove(&vdi);
        inner.waiting.retain(|waiting| *waiting != vdi);
        inner.withdraw(vdi);
        inner.forget_awaited(vdi);
        self.joined.notify_one();
        Self::next_turn(&inner);
    }

    /// Takes back the offer of all clean segments of a disk.
    pub fn withdraw(&self, vdi: Uuid) {
        self.inner.lock().withdraw(vdi);
    }

    /// Hands out a segment, or queues the disk for the next one that becomes free. A disk that has its share is not
    /// queued: it asks again later.
    pub fn grant(&self, vdi: Uuid) -> Option<Grant> {
        let mut inner = self.inner.lock();
        if !self.may_have(&inner, vdi) {
            inner.waiting.retain(|waiting| *waiting != vdi);
            self.relieve(&mut inner);
            Self::next_turn(&inner);
            return None;
        }
        let first = inner.waiting.front().is_none_or(|front| *front == vdi);
        let granted = if first { inner.take_free() } else { None };
        match granted {
            Some(id) => {
                inner.waiting.retain(|waiting| *waiting != vdi);
                let grant = self.make_grant(&mut inner, vdi, id);
                self.relieve(&mut inner);
                Some(grant)
            }
            None => {
                if !inner.waiting.contains(&vdi) {
                    inner.waiting.push_back(vdi);
                }
                self.relieve(&mut inner);
                Self::next_turn(&inner);
                None
            }
        }
    }

    /// The disk does not want a segment for now: whoever is behind it in the queue is next.
    pub fn leave_queue(&self, vdi: Uuid) {
        let mut inner = self.inner.lock();
        inner.waiting.retain(|waiting| *waiting != vdi);
        Self::next_turn(&inner);
    }

    /// Hands out up to two segments for a disk that is being attached.
    pub fn grant_two(&self, vdi: Uuid) -> Vec<Grant> {
        let mut inner = self.inner.lock();
        let mut grants = Vec::new();
        for _ in 0..2 {
            if let Some(id) = inner.take_free() {
                grants.push(self.make_grant(&mut inner, vdi, id));
            }
        }
        self.relieve(&mut inner);
        grants
    }

    /// A segment is free again: nothing on the device or in memory refers to it, and the local checkpoint that says so
    /// is durable (rule L2).
    pub fn release(&self, id: SegmentId, was_evicted: bool) {
        let mut inner = self.inner.lock();
        let owner = inner.owners[id.0 as usize].take().expect("a segment is freed once");
        inner.cleaned(owner);
        if was_evicted {
            inner.evicting = inner.evicting.saturating_sub(1);
        }
        inner.free.push_back(id);
        Self::next_turn(&inner);
    }

    /// A segment that was to be evicted cannot be, for now: others are asked for in its place.
    pub fn eviction_failed(&self) {
        let mut inner = self.inner.lock();
        inner.evicting = inner.evicting.saturating_sub(1);
        self.relieve(&mut inner);
    }

    /// A segment is clean: it may be evicted when space is short.
    pub fn offer_clean(&self, vdi: Uuid, id: SegmentId, seq: u64) {
        let mut inner = self.inner.lock();
        if inner.clean.insert(seq, (id, vdi)).is_none() {
            inner.cleaned(vdi);
        }
        self.relieve(&mut inner);
    }

    /// The lowest sequence number not given out yet.
    pub fn next_seq(&self) -> u64 {
        self.inner.lock().next_seq
    }

    /// Segments by state.
    #[must_use]
    pub fn counts(&self) -> PoolCounts {
        let inner = self.inner.lock();
        PoolCounts {
            segments: self.geometry.segments,
            free: inner.free.len() as u32,
            clean: inner.clean.len() as u32 + inner.evicting,
            quarantined: inner.quarantined.iter().filter_map(|log| inner.dirty.get(log)).sum(),
            disks: inner.tasks.len() as u32,
        }
    }

    /// Free segments that the pool tries to have at hand, so that writers need not wait for an eviction.
    fn low_water(&self) -> u32 {
        (self.geometry.segments / 16).clamp(2, 64)
    }

    fn make_grant(&self, inner: &mut Inner, vdi: Uuid, id: SegmentId) -> Grant {
        inner.owners[id.0 as usize] = Some(vdi);
        inner.dirtied(vdi);
        let seq = inner.next_seq;
        inner.next_seq += 1;
        let roomy = inner.free.len() as u32 >= self.low_water() / 2;
        Grant { id, seq, nonce: random_u64(), roomy }
    }

    /// Dirty segments that each of so many disks can have whatever the others do.
    fn floor(&self, disks: usize) -> u32 {
        (self.geometry.segments / (4 * disks.max(1) as u32)).clamp(2, 64)
    }

    /// Whether one more segment for this disk leaves the others their floors.
    fn may_have(&self, inner: &Inner, vdi: Uuid) -> bool {
        let floor = self.floor(inner.tasks.len());
        let dirty = |vdi: &Uuid| inner.dirty.get(vdi).copied().unwrap_or(0);
        if !inner.tasks.contains_key(&vdi) || dirty(&vdi) < floor {
            return true;
        }
        let others = inner.tasks.keys().filter(|other| **other != vdi);
        let kept: u32 = others.map(|other| floor.saturating_sub(dirty(other))).sum();
        let available = inner.free.len() as u32 + inner.clean.len() as u32 + inner.evicting;
        kept == 0 || available > kept
    }

    /// Asks for the oldest clean segments until enough are free or on their way.
    fn relieve(&self, inner: &mut Inner) {
        let wanted = self.low_water() + inner.waiting.len() as u32;
        while (inner.free.len() as u32) + inner.evicting < wanted {
            let Some((_, (id, vdi))) = inner.clean.pop_first() else { break };
            inner.dirtied(vdi);
            if let Some(task) = inner.tasks.get(&vdi)
                && task.send(PoolMessage::Evict(id)).is_ok()
            {
                inner.evicting += 1;
            }
        }
    }

    fn next_turn(inner: &Inner) {
        if inner.grantable().is_some()
            && let Some(task) = inner.waiting.front().and_then(|vdi| inner.tasks.get(vdi))
        {
            // A task that is gone unregisters itself and so leaves the queue.
            let _ = task.send(PoolMessage::YourTurn);
        }
    }
}

impl Inner {
    fn withdraw(&mut self, vdi: Uuid) {
        let before = self.clean.len();
        self.clean.retain(|_, (_, owner)| *owner != vdi);
        for _ in self.clean.len()..before {
            self.dirtied(vdi);
        }
    }

    /// A disk has one more segment that is not clean.
    fn dirtied(&mut self, vdi: Uuid) {
        *self.dirty.entry(vdi).or_default() += 1;
    }

    /// A disk has one segment less that is not clean.
    fn cleaned(&mut self, vdi: Uuid) {
        if let Some(count) = self.dirty.get_mut(&vdi) {
            *count -= 1;
            if *count == 0 {
                self.dirty.remove(&vdi);
            }
        } else {
            debug_assert!(false, "a disk without dirty segments has one less");
        }
    }
}

/// Sixty-four random bits from the kernel.
pub(crate) fn random_u64() -> u64 {
    let mut bytes = [0u8; 8];
    getrandom::fill(&mut bytes).expect("the kernel's random number source works");
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    const A: Uuid = Uuid::from_u128(1);
    const B: Uuid = Uuid::from_u128(2);

    fn pool_of(segments: u32) -> (Pool, Vec<UnboundedReceiver<PoolMessage>>) {
        let geometry = Geometry { segments, ..Geometry::for_size(1 << 30).unwrap() };
        let pool = Pool::new(geometry, (0..segments).map(SegmentId).collect(), 1);
        let register = |vdi| {
            let (task, messages) = unbounded_channel();
            pool.register(vdi, task);
            messages
        };
        let messages = vec![register(A), register(B)];
        (pool, messages)
    }

    #[test]
    fn a_greedy_disk_leaves_the_other_its_floor() {
        let (pool, _messages) = pool_of(64);
        let greedy = std::iter::from_fn(|| pool.grant(A)).count();
        assert_eq!(greedy, 64 - 8, "an eighth of the ring each is sure");
        let late = std::iter::from_fn(|| pool.grant(B)).count();
        assert_eq!(late, 8);
    }

    #[test]
    fn a_disk_alone_may_take_the_whole_ring() {
        let (pool, _messages) = pool_of(64);
        pool.unregister(B);
        assert_eq!(std::iter::from_fn(|| pool.grant(A)).count(), 64);
    }

    #[test]
    fn clean_segments_count_for_nobody() {
        let (pool, _messages) = pool_of(64);
        let grants: Vec<_> = std::iter::from_fn(|| pool.grant(A)).collect();
        for grant in &grants[..20] {
            pool.offer_clean(A, grant.id, grant.seq);
        }
        // The other's floor is met by what can be evicted, so what is free may be taken.
        assert_eq!(std::iter::from_fn(|| pool.grant(A)).count(), 8);
    }

    #[test]
    fn a_disk_with_its_share_does_not_stand_in_the_queue() {
        let (pool, mut messages) = pool_of(16);
        while pool.grant(A).is_some() {}
        while pool.grant(B).is_some() {}
        let mut held = pool.owned(B);
        pool.release(held.pop().unwrap(), false);
        assert_eq!(messages[1].try_recv(), Ok(PoolMessage::YourTurn), "B waits, A does not");
    }

    #[test]
    fn every_segment_is_free_or_owned() {
        let (pool, _messages) = pool_of(16);
        let grants = pool.grant_two(A);
        assert_eq!(pool.owned(A), grants.iter().map(|grant| grant.id).collect::<Vec<_>>());
        grants.iter().for_each(|grant| pool.release(grant.id, false));
        assert!(pool.owned(A).is_empty());
        assert_eq!(pool.counts().free, 16);
    }
}
