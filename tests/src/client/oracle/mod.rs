//! Which values are still legal, per sector, and whether what a disk returned is among them.
//!
//! The client numbers its mutating requests (writes, zeroes, discards) in the order in which it put
//! them into the ring. Ballast gives log sequence numbers in that order and publishes completions in
//! it, so two questions have exact answers:
//!
//! * A read may return, for each sector, the value of the last request acknowledged before the read
//!   was submitted, or of any request submitted since.
//! * After a crash there is one cut N so that every sector holds its value after requests 1 to N,
//!   where N is at least the last request that had to survive: the last acknowledged one when only
//!   the agent died, the last flushed one when the host lost power. The shared store's image at any
//!   instant has such a cut too, at or after the last drain.
//!
//! Discards zero the whole 4 KiB blocks inside their range and leave the edges alone; zeroes are exact.
//!
//! A request over several blocks may take several log records, so the request at the cut itself may
//! be applied to some of its 4 KiB blocks only ([`Cut::split`]); no block may be applied in part.
//!
//! What a crash took away is dead: it must never show again.

mod cut;
mod history;
mod verdict;

#[cfg(test)]
mod tests;

pub use cut::Cut;
pub use verdict::{Kind, Violation};

use std::ops::Range;

use history::History;

use super::stamp::{Identity, Sequence};
use super::{BLOCK_SECTORS, SECTOR};

/// What a crash may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Only the agent died: whatever was acknowledged is still there.
    AgentDied,
    /// The host lost power: what was flushed, or acknowledged in write-through, is still there.
    PowerLost,
}

/// Kind of a mutating request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// Stamped data.
    Write,
    /// Exact zeroes.
    Zero,
    /// Zeroes for the whole blocks inside.
    Discard,
}

/// One mutating request, for ever.
#[derive(Debug, Clone)]
struct Request {
    kind: Mutation,
    sectors: Range<u64>,
    /// Time (in events) of its completion.
    acknowledged: Option<u64>,
    /// A crash took it away.
    dead: bool,
}

impl Request {
    /// A discard of less than a block changes nothing, so it has no place in the order: its
    /// completion may come at any time and says nothing of earlier requests.
    fn is_void(&self) -> bool {
        effect(self.kind, &self.sectors).is_empty()
    }
}

/// A read that was submitted: what it covers and when.
#[derive(Debug, Clone)]
pub struct ReadTicket {
    sectors: Range<u64>,
    submitted: u64,
}

/// A flush that was submitted: the last request it covers.
#[derive(Debug, Clone, Copy)]
pub struct FlushTicket {
    covers: Sequence,
}

/// Everything the client knows of one disk.
#[derive(Debug)]
pub struct Oracle {
    identity: Identity,
    sectors: Vec<History>,
    requests: Vec<Request>,
    /// Index of the first request that is neither acknowledged nor dead.
    first_open: usize,
    clock: u64,
    in_order: bool,
    write_through: bool,
    acknowledged: Sequence,
    flushed: Sequence,
    committed: Sequence,
}

impl Oracle {
    /// A disk of `sectors` zero sectors. With `in_order`, completions of mutating requests must come
    /// in the order of submission (rule L1).
    #[must_use]
    pub fn new(identity: Identity, sectors: u64, in_order: bool) -> Self {
        Self {
            identity,
            sectors: vec![History::default(); sectors as usize],
            requests: Vec::new(),
            first_open: 0,
            clock: 0,
            in_order,
            write_through: false,
            acknowledged: 0,
            flushed: 0,
            committed: 0,
        }
    }

    /// Whose stamps the disk must hold.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Sectors of the disk.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// Last request submitted.
    #[must_use]
    pub fn submitted(&self) -> Sequence {
        self.requests.len() as Sequence
    }

    /// Last request acknowledged.
    #[must_use]
    pub fn acknowledged(&self) -> Sequence {
        self.acknowledged
    }

    /// Last request that survives a loss of power.
    #[must_use]
    pub fn flushed(&self) -> Sequence {
        self.flushed
    }

    /// Last request known to be in the store.
    #[must_use]
    pub fn committed(&self) -> Sequence {
        self.committed
    }

    /// From now on completions mean durability, or no longer do.
    pub fn set_write_through(&mut self, on: bool) {
        self.write_through = on;
    }

    /// Notes a mutating request that is about to enter the ring; gives its number.
    ///
    /// # Panics
    /// When the range is empty or outside of the disk: the caller's workload is wrong then.
    pub fn submit(&mut self, kind: Mutation, sectors: Range<u64>) -> Sequence {
        assert!(!sectors.is_empty() && sectors.end <= self.sectors(), "{sectors:?}");
        self.clock += 1;
        let sequence = self.submitted() + 1;
        for sector in effect(kind, &sectors) {
            self.sectors[sector as usize].push(sequence, kind != Mutation::Write);
        }
        self.requests.push(Request { kind, sectors, acknowledged: None, dead: false });
        sequence
    }

    /// Notes the successful completion of request `sequence`.
    ///
    /// # Errors
    /// When an earlier one has not completed although completions are to come in order.
    ///
    /// # Panics
    /// When it was not in flight.
    pub fn acknowledge(&mut self, sequence: Sequence) -> Result<(), Violation> {
        self.clock += 1;
        let now = self.clock;
        self.advance_first_open();
        let request = &mut self.requests[sequence as usize - 1];
        assert!(request.acknowledged.is_none() && !request.dead, "request {sequence} ended twice");
        request.acknowledged = Some(now);
        if request.is_void() {
            return Ok(());
        }
        let first_open = self.first_open as Sequence + 1;
        self.advance_first_open();
        self.acknowledged = self.acknowledged.max(sequence);
        if self.write_through {
            self.flushed = self.flushed.max(sequence);
        }
        if first_open < sequence && self.in_order {
            let (early, late) = (self.describe(sequence), self.describe(first_open));
            return Err(Violation::order(&early, &late));
        }
        Ok(())
    }

    /// Notes a flush about to enter the ring.
    #[must_use]
    pub fn submit_flush(&self) -> FlushTicket {
        FlushTicket { covers: self.acknowledged }
    }

    /// Notes the flush's completion.
    pub fn acknowledge_flush(&mut self, ticket: FlushTicket) {
        self.flushed = self.flushed.max(ticket.covers);
    }

    /// Notes a read about to enter the ring.
    #[must_use]
    pub fn submit_read(&mut self, sectors: Range<u64>) -> ReadTicket {
        self.clock += 1;
        ReadTicket { sectors, submitted: self.clock }
    }

    /// Judges what a read returned.
    ///
    /// # Errors
    /// The first sector whose value was not legal.
    pub fn check_read(&self, ticket: &ReadTicket, data: &[u8]) -> Result<(), Violation> {
        assert_eq!(data.len() as u64, (ticket.sectors.end - ticket.sectors.start) * SECTOR as u64);
        for (sector, bytes) in ticket.sectors.clone().zip(data.chunks_exact(SECTOR)) {
            let found = self.identity.read(sector, bytes);
            let history = &self.sectors[sector as usize];
            let done_before = |sequence: Sequence| {
                sequence == 0
                    || self.requests[sequence as usize - 1]
                        .acknowledged
                        .is_some_and(|when| when < ticket.submitted)
            };
            let floor = history.last_where(done_before);
            if !history.values_from(floor).any(|value| value.matches(found)) {
                return Err(self.judge(sector, found, floor));
            }
        }
        Ok(())
    }

    /// Notes that everything up to `sequence` is in the store, and forgets what cannot matter any
    /// more. Not while reads are in flight: what they may return is forgotten too.
    pub fn set_committed(&mut self, sequence: Sequence) {
        self.committed = self.committed.max(sequence);
        for history in &mut self.sectors {
            history.forget_before(self.committed);
        }
    }

    /// Judges an image of the whole disk as the store holds it: it must be the disk at one cut at or
    /// after the last drain.
    ///
    /// # Errors
    /// What is wrong, at most a handful of sectors.
    pub fn check_store(&self, image: &[u8]) -> Result<Cut, Vec<Violation>> {
        self.find_cut(image, self.committed)
    }

    /// Judges an image read back with nothing in flight: every sector holds the last value written.
    ///
    /// # Errors
    /// What is wrong, at most a handful of sectors.
    pub fn check_current(&self, image: &[u8]) -> Result<(), Vec<Violation>> {
        self.find_cut(image, self.submitted()).map(|_| ())
    }

    /// Judges the image read back after a crash and carries on from it: requests after the cut are
    /// dead from now on, those before it have survived a crash and will survive the next.
    ///
    /// # Errors
    /// What is wrong, at most a handful of sectors; the oracle is unchanged then.
    pub fn recover(&mut self, image: &[u8], loss: Loss) -> Result<Cut, Vec<Violation>> {
        let floor = match loss {
            Loss::AgentDied => self.acknowledged,
            Loss::PowerLost => self.flushed.max(self.committed),
        };
        let cut = self.find_cut(image, floor)?;
        self.adopt(&cut, image);
        Ok(cut)
    }

    fn advance_first_open(&mut self) {
        let settled = |request: &&Request| {
            request.dead || request.acknowledged.is_some() || request.is_void()
        };
        self.first_open += self.requests[self.first_open..].iter().take_while(settled).count();
    }

    fn adopt(&mut self, cut: &Cut, image: &[u8]) {
        self.clock += 1;
        for (sector, history) in self.sectors.iter_mut().enumerate() {
            history.truncate_after(cut.last);
            if cut.split && history.last_sequence() == cut.last {
                let bytes = &image[sector * SECTOR..(sector + 1) * SECTOR];
                history.drop_last_unless(self.identity.read(sector as u64, bytes));
            }
        }
        for (index, request) in self.requests.iter_mut().enumerate() {
            if index as Sequence + 1 > cut.last {
                request.dead = true;
            } else if request.acknowledged.is_none() && !request.dead {
                request.acknowledged = Some(self.clock);
            }
        }
        self.advance_first_open();
        self.acknowledged = cut.last;
        self.flushed = cut.last;
        self.committed = self.committed.min(cut.last);
    }

    fn describe(&self, sequence: Sequence) -> String {
        match sequence.checked_sub(1).and_then(|index| self.requests.get(index as usize)) {
            None => format!("request {sequence} (never sent)"),
            Some(request) => format!(
                "request {sequence} ({:?} of sectors {}..{}, {})",
                request.kind,
                request.sectors.start,
                request.sectors.end,
                match (request.dead, request.acknowledged) {
                    (true, _) => "lost in a crash before",
                    (false, Some(_)) => "acknowledged",
                    (false, None) => "in flight",
                }
            ),
        }
    }
}

/// Sectors whose value a request changes.
fn effect(kind: Mutation, sectors: &Range<u64>) -> Range<u64> {
    if kind != Mutation::Discard {
        return sectors.clone();
    }
    let start = sectors.start.next_multiple_of(BLOCK_SECTORS);
    let end = sectors.end / BLOCK_SECTORS * BLOCK_SECTORS;
    start..end.max(start)
}
