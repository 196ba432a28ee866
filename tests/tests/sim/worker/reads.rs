//! Reads: from the legs, with a bad copy mended, and from the store.

use super::{Finished, Worker};
use crate::reading::Arrived;
use blockstore::buf::AlignedBuf;
use blockstore::types::{BLOCK_SIZE, Lba};
use bytes::Bytes;
use cache::format::LegSet;
use cache::link::FromDisk;
use futures_util::future::FutureExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// What the store is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Fetch {
    pub read: u64,
    pub block: u32,
    pub blocks: u32,
    pub whole: bool,
    pub ticket: u64,
}

impl Worker {
    /// What the store was asked for has come, or not.
    pub(super) fn fetched(&mut self, id: u64, blocks: Option<Vec<Option<Bytes>>>, keep: bool) {
        let Some(fetch) = self.fetches.remove(&id) else { return };
        if let (Some(blocks), true) = (&blocks, fetch.whole && keep)
            && let Some(reading) = self.reads.get(&fetch.read)
        {
            for (lba, block) in (reading.lba(fetch.block)..).zip(blocks) {
                if let Some(block) = block {
                    self.attached.disk.fill(Lba(lba), block, fetch.ticket);
                }
            }
        }
        if let Some(reading) = self.reads.get_mut(&fetch.read) {
            reading.fetched(&fetch, blocks);
            self.advance_read(fetch.read);
        }
    }

    /// A block was read: a bad copy of it is rewritten first.
    pub(super) fn read_or_repair(&mut self, arrived: Arrived) {
        let bad = arrived.bad.and(self.attached.disk.readable_legs()).iter().next();
        let (Some(data), Some(number)) = (&arrived.data, bad) else {
            return self.arrived(arrived);
        };
        let (leg, data) = (Arc::clone(&self.legs[usize::from(number)]), AlignedBuf::copy_of(data));
        let patience = self.attached.leg_timeout;
        let io = async move {
            let write = timeout(patience, leg.write(arrived.offset, vec![data.freeze()])).await;
            let result = write.map_or(Err(libc::ETIMEDOUT), |done| done.map_err(|_| libc::EIO));
            Finished::Repaired { arrived, leg: number, result }
        };
        self.ios.push(io.boxed_local());
    }

    pub(super) fn arrived(&mut self, arrived: Arrived) {
        let id = arrived.read;
        if let Some(reading) = self.reads.get_mut(&id) {
            reading.arrived(arrived, &mut self.attached.disk);
            self.advance_read(id);
        }
    }

    pub(super) fn plan_read(&mut self, id: u64) {
        let Some(mut reading) = self.reads.remove(&id) else { return };
        let wanted = reading.plan(&mut self.attached.disk);
        for local in wanted.local {
            let readable = self.attached.disk.readable_legs();
            let legs = readable.iter().map(|leg| (leg, Arc::clone(&self.legs[usize::from(leg)])));
            let legs: Vec<_> = legs.collect();
            let patience = if legs.len() > 1 { self.attached.leg_timeout } else { Duration::MAX };
            let io = async move {
                let (mut data, mut bad, mut slow) = (None, LegSet::NONE, LegSet::NONE);
                // Twice from the first leg, as a worker does that read into guest memory first.
                for (number, leg) in legs.iter().take(1).chain(&legs) {
                    if slow.contains(*number) {
                        continue;
                    }
                    let read = leg.read(local.offset, BLOCK_SIZE);
                    let Ok(read) = timeout(patience, read).await else {
                        slow = slow.with(*number);
                        continue;
                    };
                    data =
                        read.ok().filter(|d: &AlignedBuf| blockstore::crc::crc32c(d) == local.crc);
                    if data.is_some() {
                        bad = bad.minus(LegSet::NONE.with(*number));
                        break;
                    }
                    bad = bad.with(*number);
                }
                Finished::Block { arrived: local.with(data, bad), slow }
            };
            self.ios.push(io.boxed_local());
        }
        for (block, blocks, whole) in wanted.missing {
            let fetch = self.next;
            self.next += 1;
            let ticket = reading.ticket;
            self.fetches.insert(fetch, Fetch { read: id, block, blocks, whole, ticket });
            let lba = Lba(reading.lba(block));
            self.attached.ask(FromDisk::Fetch { id: fetch, lba, blocks });
        }
        self.reads.insert(id, reading);
        self.advance_read(id);
    }

    fn advance_read(&mut self, id: u64) {
        let Some(reading) = self.reads.get_mut(&id) else { return };
        reading.unpin(&mut self.attached.disk);
        if reading.is_abandoned() {
            self.reads.remove(&id);
            return;
        }
        if !reading.is_complete() {
            return;
        }
        if reading.again() {
            return self.plan_read(id);
        }
        let Some(reading) = self.reads.remove(&id) else { return };
        match reading.bytes() {
            Some(bytes) => {
                let model = self.model.lock();
                let checked =
                    model.check_read(reading.sector, &bytes, &reading.before, reading.since);
                if let Err(words) = checked {
                    panic!("{words}");
                }
            }
            None => self.excuse(self.excuses.read_errors, "a read failed"),
        }
    }
}
