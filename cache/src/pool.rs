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
    /// Disks whose logs were found and that have not said yet which of their segments are clean.
    coming_up: BTreeSet<Uuid>,
    /// Disks whose clean segments are not to be evicted.
    pins: BTreeMap<Uuid, Pin>,
    /// Bytes of the ring that each of them may need.
    pin_bytes: BTreeMap<Uuid, u64>,
    tasks: BTreeMap<Uuid, UnboundedSender<PoolMessage>>,
    /// A leg of the cache is being filled.
    filling: Option<Filling>,
}

/// Segments that a pinned disk may have beside half as much again as it needs.
const TRIM_SLACK: u64 = 8;

/// How firmly the clean segments of a disk are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// They give way only if hardly anything is free: the store answers, and what is live in them comes back.
    Soft,
    /// They do not give way: the store is away.
    Firm,
}

/// The segments that are left are needed by others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom;

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
    /// Of the clean ones, those of pinned disks.
    pub pinned: u32,
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

    /// Share of the segments that hold uncommitted records, 0 to 1; the two that each disk has at hand do not count, and
    /// neither do those that pinned disks keep clean.
    #[must_use]
    pub fn fill(&self) -> f64 {
        let dirty = self.used().saturating_sub(2 * self.disks);
        let for_writes = self.segments.saturating_sub(self.quarantined + self.pinned);
        f64::from(dirty) / f64::from(for_writes.max(1))
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
            coming_up: BTreeSet::new(),
            pins: BTreeMap::new(),
            pin_bytes: BTreeMap::new(),
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
        inner.coming_up.insert(vdi);
    }

    /// A disk has offered what is clean of the log that was found.
    pub fn came_up(&self, vdi: Uuid) {
        let mut inner = self.inner.lock();
        if inner.coming_up.remove(&vdi) {
            self.relieve(&mut inner);
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
        inner.pins.remove(&vdi);
        inner.pin_bytes.remove(&vdi);
        inner.waiting.retain(|waiting| *waiting != vdi);
        inner.withdraw(vdi);
        inner.forget_awaited(vdi);
        self.joined.notify_one();
        Self::next_turn(&inner);
    }

    /// Pins the clean segments of a disk, or no longer does.
    pub fn set_pin(&self, vdi: Uuid, pin: Option<Pin>) {
        let mut inner = self.inner.lock();
        let before = match pin {
            Some(pin) => inner.pins.insert(vdi, pin),
            None => {
                inner.pin_bytes.remove(&vdi);
                inner.pins.remove(&vdi)
            }
        };
        if before != pin {
            self.relieve(&mut inner);
        }
    }

    /// Asks for the oldest clean segment of a pinned disk that has far more of them than it needs: what was overwritten is
    /// given back before an outage needs the room.
    pub fn trim(&self, vdi: Uuid) {
        let mut inner = self.inner.lock();
        let needed = inner.pin_bytes.get(&vdi).copied().unwrap_or(0);
        let of_disk = inner.clean.iter().filter(|(_, (_, owner))| *owner == vdi);
        let (mut held, mut oldest) = (0, None);
        for (&seq, _) in of_disk {
            held += self.geometry.segment_size;
            oldest = oldest.or(Some(seq));
        }
        let most = needed + needed / 2 + TRIM_SLACK * self.geometry.segment_size;
        if held > most
            && let Some(seq) = oldest
        {
            self.ask_for(&mut inner, seq);
        }
    }

    /// Notes how many bytes of the ring a pinned disk may need.
    pub fn note_pin_bytes(&self, vdi: Uuid, bytes: u64) {
        self.inner.lock().pin_bytes.insert(vdi, bytes);
    }

    /// Bytes that a disk can have pinned, if all pinned disks together may need this share of the ring.
    #[must_use]
    pub fn room_for_pins(&self, vdi: Uuid, share: f64) -> u64 {
        let inner = self.inner.lock();
        let ring = u64::from(self.geometry.segments) * self.geometry.segment_size;
        let others = inner.pin_bytes.iter().filter(|(other, _)| **other != vdi);
        ((ring as f64 * share) as u64).saturating_sub(others.map(|(_, bytes)| bytes).sum())
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

    /// Hands out up to two segments for a disk that is being attached. A new one cannot do without; any other takes
    /// what there is.
    pub fn grant_two(&self, vdi: Uuid, is_new: bool) -> Vec<Grant> {
        let mut inner = self.inner.lock();
        let mut grants = Vec::new();
        for _ in 0..2 {
            if let Some(id) = inner.take_free() {
                grants.push(self.make_grant(&mut inner, vdi, id));
            }
        }
        self.relieve_to(&mut inner, if is_new { 2 } else { 0 });
        grants
    }

    /// Segments that a disk which is about to come into being can begin with: what is beyond leaves the others their floors, and
    /// the disk itself two to write to.
    #[must_use]
    pub fn room_for_new(&self) -> u32 {
        self.room_beside(&self.inner.lock())
    }

    /// Hands out a segment for what a disk begins with that is about to come into being. None: one is on its way, ask again.
    ///
    /// # Errors
    /// [`NoRoom`]: there are no more than the others may need.
    pub fn grant_to_new(&self, vdi: Uuid) -> Result<Option<Grant>, NoRoom> {
        let mut inner = self.inner.lock();
        if self.room_beside(&inner) == 0 {
            return Err(NoRoom);
        }
        // Who waits for a segment to write to comes first.
        let first = inner.waiting.is_empty();
        let granted = if first { inner.take_free() } else { None };
        let grant = granted.map(|id| self.make_grant(&mut inner, vdi, id));
        self.relieve_to(&mut inner, 1);
        Ok(grant)
    }

    fn room_beside(&self, inner: &Inner) -> u32 {
        let floor = self.floor(inner.tasks.len() + 1);
        let dirty = |vdi: &Uuid| inner.dirty.get(vdi).copied().unwrap_or(0);
        let kept: u32 = inner.tasks.keys().map(|disk| floor.saturating_sub(dirty(disk))).sum();
        let clean = inner.clean.len() as u32 - inner.pinned();
        let available = inner.free.len() as u32 + clean + inner.evicting;
        available.saturating_sub(kept + 2)
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
            pinned: inner.pinned(),
            disks: inner.tasks.len() as u32,
        }
    }

    /// Segments are plentiful: fetched blocks may take one.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.inner.lock().free.len() as u32 >= self.low_water() / 2
    }

    /// Bytes of blocks that a disk can have as read cache beside what is dirty now and what is kept at hand for writers.
    #[must_use]
    pub fn room_for_reading(&self, vdi: Uuid) -> u64 {
        let inner = self.inner.lock();
        let others = |owner: &Uuid| *owner != vdi && inner.pins.contains_key(owner);
        let kept = inner.clean.values().filter(|(_, owner)| others(owner)).count() as u32;
        let free = inner.free.len() as u32 + inner.clean.len() as u32 + inner.evicting - kept;
        let segments = free.saturating_sub(self.low_water() + 2 * inner.tasks.len() as u32);
        // Headers and summaries take less than a sixty-fourth of a segment.
        u64::from(segments) * (self.geometry.segment_size / 64 * 63)
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
        let clean = inner.clean.len() as u32 - inner.pinned();
        let available = inner.free.len() as u32 + clean + inner.evicting;
        kept == 0 || available > kept
    }

    /// Asks for the oldest clean segments until enough are free or on their way. As long as disks come up, no more than
    /// writers wait for: the oldest may be one that was not offered yet.
    fn relieve(&self, inner: &mut Inner) {
        self.relieve_to(inner, 0);
    }

    /// As [`Self::relieve`], at least until there are so many.
    fn relieve_to(&self, inner: &mut Inner, least: u32) {
        let at_hand = if inner.is_coming_up() { least } else { least.max(self.low_water()) };
        let wanted = at_hand + inner.waiting.len() as u32;
        while (inner.free.len() as u32) + inner.evicting < wanted {
            let Some(seq) = self.next_victim(inner) else { break };
            self.ask_for(inner, seq);
        }
    }

    /// Asks for a clean segment.
    fn ask_for(&self, inner: &mut Inner, seq: u64) {
        let Some((id, vdi)) = inner.clean.remove(&seq) else { return };
        inner.dirtied(vdi);
        if let Some(task) = inner.tasks.get(&vdi)
            && task.send(PoolMessage::Evict(id)).is_ok()
        {
            inner.evicting += 1;
        }
    }

    /// The clean segment that is evicted next: the oldest of a disk that is not pinned. If there is none, and hardly
    /// anything is free, the oldest of one that is not firmly pinned.
    fn next_victim(&self, inner: &Inner) -> Option<u64> {
        let oldest = |may_go: &dyn Fn(Option<Pin>) -> bool| {
            let mut clean = inner.clean.iter();
            clean.find(|(_, (_, vdi))| may_go(inner.pins.get(vdi).copied())).map(|(seq, _)| *seq)
        };
        if inner.pins.is_empty() {
            return inner.clean.first_key_value().map(|(seq, _)| *seq);
        }
        let coming = inner.free.len() as u32 + inner.evicting;
        let wait_in_vain = coming < self.low_water() / 2 + inner.waiting.len() as u32;
        oldest(&|pin| pin.is_none())
            .or_else(|| oldest(&|pin| pin == Some(Pin::Soft)).filter(|_| wait_in_vain))
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
    /// Some disk has not offered its clean segments yet.
    fn is_coming_up(&self) -> bool {
        let comes = |vdi: &Uuid| self.dirty.contains_key(vdi) && !self.quarantined.contains(vdi);
        self.coming_up.iter().any(comes)
    }

    /// Clean segments of pinned disks.
    fn pinned(&self) -> u32 {
        if self.pins.is_empty() {
            return 0;
        }
        self.clean.values().filter(|(_, vdi)| self.pins.contains_key(vdi)).count() as u32
    }

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

    /// The segments that A's task was asked for.
    fn asked(messages: &mut UnboundedReceiver<PoolMessage>) -> Vec<PoolMessage> {
        std::iter::from_fn(|| messages.try_recv().ok())
            .filter(|message| matches!(message, PoolMessage::Evict(_)))
            .collect()
    }

    #[test]
    fn pinned_segments_go_last_and_never_while_the_store_is_away() {
        let (pool, mut messages) = pool_of(64);
        pool.set_pin(A, Some(Pin::Firm));
        for vdi in [A, B] {
            for _ in 0..20 {
                let grant = pool.grant(vdi).unwrap();
                pool.offer_clean(vdi, grant.id, grant.seq);
            }
        }
        // Writers take what is free, then what is clean of the other disk, younger as it is.
        let mut granted = 0;
        while pool.grant(A).is_some() {
            granted += 1;
            for message in asked(&mut messages[1]) {
                let PoolMessage::Evict(id) = message else { unreachable!() };
                pool.release(id, true);
            }
        }
        assert!(granted >= 64 - 20 - 8, "all but the pinned ones and the other's floor: {granted}");
        assert!(asked(&mut messages[0]).is_empty());
        assert_eq!(pool.counts().pinned, 20);
        // Nothing is left but those: with the store away the writer waits, with the store some give way.
        pool.unregister(B);
        while pool.grant(A).is_some() {}
        assert!(asked(&mut messages[0]).is_empty());
        pool.set_pin(A, Some(Pin::Soft));
        let given = asked(&mut messages[0]).len();
        assert!((1..=3).contains(&given), "{given}");
        pool.set_pin(A, None);
        assert!(!asked(&mut messages[0]).is_empty(), "as of any other disk");
    }

    #[test]
    fn no_disk_loses_its_read_cache_because_it_came_up_first() {
        let (pool, mut messages) = pool_of(64);
        let grants: Vec<_> = std::iter::from_fn(|| pool.grant_two(A, false).pop()).collect();
        let (old, young) = grants.split_at(30);
        let found = |part: &[Grant]| part.iter().map(|grant| grant.id).collect::<Vec<_>>();
        let counted = pool.counts();
        assert_eq!((counted.free, counted.clean), (0, 0));
        // As after a restart: B has the older half.
        let restarted = Pool::new(pool.geometry, Vec::new(), 1000);
        restarted.adopt(B, found(old).into_iter());
        restarted.adopt(A, found(young).into_iter());
        for (vdi, n) in [(A, 0), (B, 1)] {
            let (task, receiver) = unbounded_channel();
            restarted.register(vdi, task);
            messages[n] = receiver;
        }
        young.iter().for_each(|grant| restarted.offer_clean(A, grant.id, grant.seq));
        restarted.came_up(A);
        assert!(asked(&mut messages[0]).is_empty(), "B has not said what is clean");
        old.iter().for_each(|grant| restarted.offer_clean(B, grant.id, grant.seq));
        restarted.came_up(B);
        assert!(asked(&mut messages[0]).is_empty());
        assert_eq!(asked(&mut messages[1]).len() as u32, restarted.low_water());
    }

    #[test]
    fn a_new_disk_begins_with_what_the_others_can_spare() {
        let (pool, _messages) = pool_of(64);
        let new = Uuid::from_u128(3);
        for _ in 0..20 {
            pool.grant(A).unwrap();
        }
        // A has more than its floor of five; B is left its own, and the new disk two.
        assert_eq!(pool.room_for_new(), 64 - 20 - 5 - 2);
        let granted = std::iter::from_fn(|| pool.grant_to_new(new).ok().flatten()).count();
        assert_eq!((granted, pool.grant_to_new(new)), (37, Err(NoRoom)));
        assert_eq!(pool.owned(new).len(), 37);
    }

    #[test]
    fn every_segment_is_free_or_owned() {
        let (pool, _messages) = pool_of(16);
        let grants = pool.grant_two(A, false);
        assert_eq!(pool.owned(A), grants.iter().map(|grant| grant.id).collect::<Vec<_>>());
        grants.iter().for_each(|grant| pool.release(grant.id, false));
        assert!(pool.owned(A).is_empty());
        assert_eq!(pool.counts().free, 16);
    }
}
