//! Failing requests that have waited too long, when the cache's asynchronous side says that the disk's policy wants it.
//!
//! Only requests of which the log has nothing fail here: writes without an LSN, and reads whose local I/O is over. So no
//! order and no durability is touched: what was staged goes on as always, and so do flushes. A read that failed leaves
//! nothing behind: fetches that were not sent are taken back, and the answers of those that were find no request; the
//! blocks that they bring may still be kept as fills.

use super::Worker;
use super::io::Fetch;
use super::read;
use crate::request::{Kind, STATUS_IOERR};
use std::time::{Duration, Instant};

impl Worker {
    /// Fails reads and writes that have waited at least so long.
    pub(super) fn fail_waiting(&mut self, reads: Option<Duration>, writes: Option<Duration>) {
        let now = Instant::now();
        let mut expired = std::mem::take(&mut self.ended);
        if let Some(longer_than) = writes {
            self.stalled.take_expired(&mut self.slots, longer_than, now, &mut expired);
        }
        if let Some(longer_than) = reads {
            self.take_expired_reads(longer_than, now, &mut expired);
        }
        if !expired.is_empty() {
            tracing::warn!(
                disk = self.options.name,
                requests = expired.len(),
                "the store is away: requests that had waited for it too long fail, as this disk's policy says"
            );
        }
        for index in expired.drain(..) {
            self.counters.failed_by_policy += 1;
            self.answer(index, STATUS_IOERR);
        }
        self.ended = expired;
    }

    fn take_expired_reads(&mut self, longer_than: Duration, now: Instant, expired: &mut Vec<u32>) {
        let in_use: Vec<u32> = self.slots.in_use().collect();
        let before = expired.len();
        for index in in_use {
            let slot = self.slots.at(index);
            let waits_for_store =
                slot.request.kind == Kind::Read && read::waits_for_store_only(&slot.read);
            if waits_for_store && !slot.orphan && slot.has_waited(longer_than, now) {
                read::abandon(slot);
                expired.push(index);
            }
        }
        // Before their slots are used again.
        let slots = &self.slots;
        let gone = |fetch: &Fetch| expired[before..].iter().any(|&i| slots.tag(i) == fetch.tag);
        self.waiting.retain(|fetch| !gone(fetch));
    }
}
