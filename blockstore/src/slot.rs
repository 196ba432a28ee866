//! Reading and changing lockable records.
//!
//! With compare-and-write a record has one place and changes by one atomic command. In single-host
//! mode (rule C5) it has two, written in turn, and the newest valid one counts: a crash during a
//! write leaves the other.
//!
//! A change whose outcome is unknown is resolved by reading the record: it holds the new bytes
//! (landed), the old ones (issue the identical change again), or something else (lost to another
//! writer; the caller judges what that means, once it is durable).

use crate::device::CawOutcome;
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::format::head::{Damage, HEAD_SIZE, Head, Record, is_unused};
use crate::io::{Errors, Io};
use crate::sabotage::{self, Bug};
use crate::types::{BLOCK_SIZE, Gba};
use bytes::Bytes;
use uuid::Uuid;

/// How often a device may say "miscompare" about bytes that a read shows to be as expected.
const CONTRADICTIONS_MAX: u32 = 5;

/// How often a record that seems damaged is read.
const READ_TRIES: u32 = 3;

/// Where a record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Its block, or the first of its pair.
    pub first: Gba,
    /// Two blocks are reserved for it. (An extent's record has one.)
    pub paired: bool,
}

/// What a record's place holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content<T> {
    /// Never used.
    Unused,
    /// A record.
    Valid(Head<T>),
    /// Something that fails the checks.
    Damaged(Damage),
}

/// A record as it was read, with the bytes that a compare-and-write must find.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View<T> {
    /// Where it lies.
    pub slot: Slot,
    /// What is there.
    pub content: Content<T>,
    /// One logical block, compared by the device. In single-host mode the newest copy's block.
    raw: Bytes,
}

impl<T: Record> View<T> {
    /// What is known of a record that the device lastingly does not read. It cannot be changed.
    pub(crate) fn unreadable(slot: Slot) -> Self {
        Self { slot, content: Content::Damaged(Damage::Unreadable), raw: Bytes::new() }
    }

    /// True for [`unreadable`](Self::unreadable).
    #[must_use]
    pub fn is_unreadable(&self) -> bool {
        matches!(self.content, Content::Damaged(Damage::Unreadable))
    }

    /// The record, if there is one.
    #[must_use]
    pub fn record(&self) -> Option<&T> {
        match &self.content {
            Content::Valid(head) => Some(&head.record),
            _ => None,
        }
    }

    /// Sequence number; 0 for a place that was never used.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        match &self.content {
            Content::Valid(head) => head.sequence,
            _ => 0,
        }
    }
}

/// What became of a change.
#[derive(Clone, Debug)]
pub enum Swap<T> {
    /// The change is durable.
    Done(View<T>),
    /// Someone else changed the record; this is what it holds now.
    Lost(View<T>),
}

impl<T: Record> Swap<T> {
    /// The record after a change that nobody else can have competed with.
    ///
    /// # Errors
    /// `InUse` if somebody did.
    pub fn done(self, what: impl FnOnce() -> String) -> Result<View<T>> {
        match self {
            Self::Done(view) => Ok(view),
            Self::Lost(_) => Err(StoreError::new(
                StoreErrorKind::InUse,
                what(),
                "another host changed it at the same moment; look again, then retry",
            )),
        }
    }
}

/// Access to the records of one store.
#[derive(Clone, Debug)]
pub struct Records {
    /// The store they belong to.
    pub store: Uuid,
    /// Alternating slots instead of compare-and-write.
    pub single_host: bool,
    /// Bytes that compare-and-write covers.
    pub logical_block: usize,
}

impl Records {
    /// Reads a record. One that seems damaged is read again: the fault may be on the way.
    ///
    /// # Errors
    /// Only the device's; damage is content.
    pub async fn read<T: Record>(&self, io: &Io, slot: Slot) -> Result<View<T>> {
        let blocks = if self.uses_pair(slot) { 2 } else { 1 };
        let mut tries = READ_TRIES;
        loop {
            let buf = io.read(slot.first, blocks).await?;
            let (view, all_whole) = self.view(slot, &buf);
            tries -= 1;
            if all_whole || tries == 0 {
                return Ok(view);
            }
        }
    }

    /// Reads a run of equal slots that lie one after the other, `first` being the first of them.
    ///
    /// # Errors
    /// Only the device's.
    pub async fn read_run<T: Record>(
        &self,
        io: &Io,
        first: Slot,
        count: u64,
    ) -> Result<Vec<View<T>>> {
        let stride = if first.paired { 2 } else { 1 };
        let buf = io.read(first.first, count * stride).await?;
        let bytes = stride as usize * BLOCK_SIZE;
        let mut views = Vec::with_capacity(count as usize);
        for (chunk, index) in buf.chunks_exact(bytes).zip(0..) {
            let slot = Slot { first: first.first.plus(index * stride), ..first };
            views.push(match self.view(slot, chunk) {
                (view, true) => view,
                (_, false) => self.read(io, slot).await?,
            });
        }
        Ok(views)
    }

    /// Judges the bytes of a slot: one block, or two if it is paired. The flag says that no copy is
    /// damaged.
    fn view<T: Record>(&self, slot: Slot, bytes: &[u8]) -> (View<T>, bool) {
        let copy = |index: usize| {
            let block = &bytes[index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE];
            let raw = Bytes::copy_from_slice(&block[..self.logical_block]);
            let content = self.judge(block, slot.first.plus(index as u64));
            View { slot, content, raw }
        };
        let whole = |view: &View<T>| !matches!(view.content, Content::Damaged(_));
        let a = copy(0);
        let a_whole = whole(&a);
        if !self.uses_pair(slot) {
            return (a, a_whole);
        }
        let b = copy(1);
        let b_whole = whole(&b);
        (newest(a, b), a_whole && b_whole)
    }

    fn judge<T: Record>(&self, block: &[u8], address: Gba) -> Content<T> {
        if is_unused(block) {
            return Content::Unused;
        }
        match Head::decode(block, address).and_then(|head: Head<T>| head.of_store(self.store)) {
            Ok(head) => Content::Valid(head),
            Err(damage) => Content::Damaged(damage),
        }
    }

    fn uses_pair(&self, slot: Slot) -> bool {
        self.single_host && slot.paired
    }

    /// Changes a record durably, if it still is what `current` shows.
    ///
    /// # Errors
    /// The device's final errors, `Closing`, and `Damaged` for a record that fails its checks. The
    /// outcome is then unknown.
    pub async fn swap<T: Record>(&self, io: &Io, current: &View<T>, record: T) -> Result<Swap<T>> {
        if let Content::Damaged(damage) = &current.content {
            return Err(damaged(io, current.slot, damage));
        }
        let next = Head { store: self.store, sequence: current.sequence() + 1, record };
        if self.uses_pair(current.slot) {
            self.write_turn(io, current, next).await
        } else if self.single_host {
            self.write_in_place(io, current, next).await
        } else {
            self.compare_and_write(io, current, next).await
        }
    }

    /// Changes several records, each as by [`swap`](Self::swap), with one flush for all of them while nothing goes wrong. The
    /// outcomes are in the order of the changes.
    pub async fn swap_all<T: Record>(
        &self,
        io: &Io,
        changes: &[(View<T>, T)],
    ) -> Vec<Result<Swap<T>>> {
        if !self.single_host
            && let Some(done) = self.compare_and_write_all(io, changes).await
        {
            return done.into_iter().map(|view| Ok(Swap::Done(view))).collect();
        }
        // One by one: each finds out what became of its own, and writes it over itself if it landed.
        let mut outcomes = Vec::with_capacity(changes.len());
        for (current, record) in changes {
            outcomes.push(self.swap(io, current, record.clone()).await);
        }
        outcomes
    }

    /// The records after their changes; none if one of these was not carried out at the first attempt, or the flush failed.
    async fn compare_and_write_all<T: Record>(
        &self,
        io: &Io,
        changes: &[(View<T>, T)],
    ) -> Option<Vec<View<T>>> {
        let mut attempts = io.attempts();
        let epoch = io.device().epoch();
        let mut done = Vec::with_capacity(changes.len());
        for (current, record) in changes {
            if matches!(current.content, Content::Damaged(_)) {
                return None;
            }
            let sequence = current.sequence() + 1;
            let next = Head { store: self.store, sequence, record: record.clone() };
            let new = self.bytes_of(current.slot, &next);
            let (offset, expected) = (current.slot.first.byte_offset(), current.raw.clone());
            let operation = io.device().compare_and_write(offset, expected, new.clone());
            match attempts.once(operation, io.errors_of_changes()).await {
                Ok(Some(CawOutcome::Written)) => {}
                _ => return None,
            }
            done.push(View { slot: current.slot, content: Content::Valid(next), raw: new });
        }
        io.flush_since(epoch, &mut attempts).await.ok().filter(|kept| *kept).map(|_| done)
    }

    /// What a compare-and-write puts in place.
    fn bytes_of<T: Record>(&self, slot: Slot, head: &Head<T>) -> Bytes {
        let mut block = vec![0; self.logical_block];
        block[..HEAD_SIZE].copy_from_slice(&head.encode(slot.first));
        Bytes::from(block)
    }

    /// Makes records durable that were read: they may be in a volatile cache only, of an operation that ended with an error, or
    /// be what a failed flush left behind, which no later flush covers. Each is written over itself. False: one is not what was
    /// read any more.
    ///
    /// # Errors
    /// The device's final errors, `Closing`.
    pub async fn seal<T: Record>(&self, io: &Io, views: &[View<T>]) -> Result<bool> {
        let mut attempts = io.attempts();
        loop {
            let epoch = io.device().epoch();
            for view in views {
                // Without compare-and-write it might go over what came since: it is flushed only.
                if self.single_host || !matches!(view.content, Content::Valid(_)) {
                    continue;
                }
                loop {
                    let (offset, raw) = (view.slot.first.byte_offset(), view.raw.clone());
                    let again = io.device().compare_and_write(offset, raw.clone(), raw);
                    match attempts.once(again, Errors::AllAreRetried).await? {
                        Some(CawOutcome::Written) => break,
                        Some(CawOutcome::Miscompare) => return Ok(false),
                        None => {}
                    }
                }
            }
            if io.flush_since(epoch, &mut attempts).await? {
                return Ok(true);
            }
        }
    }

    /// Single-host mode: the slot of the pair that is not the newest.
    async fn write_turn<T: Record>(
        &self,
        io: &Io,
        current: &View<T>,
        next: Head<T>,
    ) -> Result<Swap<T>> {
        let address = current.slot.first.plus(next.sequence % 2);
        self.write_block(io, current.slot, address, next).await
    }

    /// Single-host mode, records without a pair: the head is one sector, which devices write whole.
    async fn write_in_place<T: Record>(
        &self,
        io: &Io,
        current: &View<T>,
        next: Head<T>,
    ) -> Result<Swap<T>> {
        self.write_block(io, current.slot, current.slot.first, next).await
    }

    async fn write_block<T: Record>(
        &self,
        io: &Io,
        slot: Slot,
        address: Gba,
        next: Head<T>,
    ) -> Result<Swap<T>> {
        let block = Bytes::copy_from_slice(&next.encode_block(address));
        io.write_durable(&[(address, vec![block.clone()])]).await?;
        let raw = block.slice(..self.logical_block);
        Ok(Swap::Done(View { slot, content: Content::Valid(next), raw }))
    }

    async fn compare_and_write<T: Record>(
        &self,
        io: &Io,
        current: &View<T>,
        next: Head<T>,
    ) -> Result<Swap<T>> {
        let offset = current.slot.first.byte_offset();
        let mut new = self.bytes_of(current.slot, &next);
        let (mut was, mut expected) = (current.raw.clone(), current.raw.clone());
        let mut contradictions = 0;
        let mut attempts = io.attempts();
        // What is there instead. It may be in a volatile cache only, and is believed once it is durable.
        let mut other = None;
        loop {
            let epoch = io.device().epoch();
            let operation = io.device().compare_and_write(offset, expected.clone(), new.clone());
            let outcome = attempts.once(operation, io.errors_of_changes()).await?;
            let written = outcome == Some(CawOutcome::Written);
            let assumed = outcome.is_none() && sabotage::on(Bug::AssumeLanded);
            if assumed || (written && io.flush_since(epoch, &mut attempts).await?) {
                if let Some(found) = other {
                    return Ok(Swap::Lost(found));
                }
                let content = Content::Valid(next);
                return Ok(Swap::Done(View { slot: current.slot, content, raw: new }));
            }
            // Refused, unknown, or perhaps lost again with the device's cache: look.
            let found: View<T> = self.read(io, current.slot).await?;
            if let Content::Damaged(damage) = &found.content {
                return Err(damaged(io, current.slot, damage));
            }
            // By their heads, which checksums cover: what follows may have been read wrongly.
            let is = &found.raw[..HEAD_SIZE];
            expected = found.raw.clone();
            if *is == new[..HEAD_SIZE] || *is == was[..HEAD_SIZE] {
                // If it landed, then maybe only in a volatile cache: the same bytes are written over themselves.
                contradictions += u32::from(outcome.is_some() && !written);
            } else {
                (new, was) = (found.raw.clone(), found.raw.clone());
                other = Some(found);
            }
            if contradictions > CONTRADICTIONS_MAX {
                return Err(StoreError::new(
                    StoreErrorKind::Device,
                    format!("{}, block {}", io.url(), current.slot.first),
                    "the device refuses a compare-and-write whose expected bytes it holds; its \
                     compare-and-write does not work",
                ));
            }
        }
    }
}

/// Of two alternating copies the one that counts. One of a newer version is never passed over for an older one that can be
/// read: the record would go back.
fn newest<T: Record>(a: View<T>, b: View<T>) -> View<T> {
    match (&a.content, &b.content) {
        (Content::Damaged(Damage::Newer(_)), _) => a,
        (_, Content::Damaged(Damage::Newer(_))) => b,
        (Content::Valid(x), Content::Valid(y)) => {
            if x.sequence > y.sequence {
                a
            } else {
                b
            }
        }
        (Content::Valid(_), _) => a,
        (_, Content::Valid(_)) => b,
        (Content::Damaged(_), _) => a,
        (_, Content::Damaged(_)) => b,
        (Content::Unused, Content::Unused) => a,
    }
}

/// The error for a record that fails its checks.
#[must_use]
pub fn damaged(io: &Io, slot: Slot, damage: &Damage) -> StoreError {
    StoreError::new(
        StoreErrorKind::Damaged,
        format!("{}, record at block {}", io.url(), slot.first),
        format!("{damage}; run 'ballast store check' on it"),
    )
}
