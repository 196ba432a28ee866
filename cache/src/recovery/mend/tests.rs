//! Goal: a leg that cannot be read while the legs are made equal does not stay a member without what the other has, and what
//! only a leg had that is lost meanwhile is no part of the log (rule L5).
//! Method: a segment whose end only one leg has; the other, or it, refuses reads, hangs or is lost during the settling.

use super::super::tests::{slot, two_records};
use super::super::{Recovered, recover, settle};
use crate::error::CacheError;
use crate::format::record::{Kind, RecordHeader, WHOLE, push_descriptor};
use crate::format::segment::SegmentHeader;
use crate::local::Local;
use blockstore::crc::crc32c;
use blockstore::device::sim::{FaultRates, Reach, SimDevice};
use blockstore::types::{BLOCK_SIZE, Lba, Lsn};
use bytes::Bytes;
use std::time::Duration;

/// Legs, the second of which alone has the records of an unsealed segment.
struct Pair {
    local: Local,
    sims: [SimDevice; 2],
    header: SegmentHeader,
}

impl Pair {
    async fn new() -> Self {
        let sims = [1, 2].map(|seed| SimDevice::new(16 << 20, seed));
        let named = || sims.iter().map(|sim| ("/leg".into(), sim.device())).collect::<Vec<_>>();
        Local::make_legs(named()).await.unwrap();
        let local = Local::on_devices(named(), false).await.unwrap();
        let (header, mut segment) = two_records();
        let header = SegmentHeader { cache: local.cache_uuid(), ..header };
        header.encode_into(&mut segment[..BLOCK_SIZE]);
        let offset = local.geometry.segment_offset(header.segment);
        sims[1].device().write(offset, vec![Bytes::from(segment)]).await.unwrap();
        Self { local, sims, header }
    }

    async fn recover(&self) -> Recovered {
        let recovered = self.recover_any().await;
        assert_eq!(recovered.last_lsn, Lsn(2));
        recovered
    }

    async fn recover_any(&self) -> Recovered {
        let (record, headers) = (slot(0), [self.header.clone()]);
        recover(&self.local, &record, Lsn(0), &headers).await.unwrap()
    }

    /// A leg fails, or hangs from now on.
    async fn lose(&self, leg: u8, hangs: bool) {
        let sim = &self.sims[usize::from(leg)];
        if hangs {
            sim.set_reach(Reach::Hanging);
            return;
        }
        sim.set_rates(FaultRates { flush_io: 1.0, ..NO_READS });
        self.local.flush().await.unwrap();
        assert!(!self.is_member(leg), "it is gone");
    }

    /// Where the legs differ in this segment.
    fn differ(&self) -> Option<u64> {
        let geometry = &self.local.geometry;
        let from = geometry.segment_offset(self.header.segment);
        let blocks = (from..from + geometry.segment_size).step_by(BLOCK_SIZE);
        let block = |leg: usize, at| self.sims[leg].peek_durable(at, BLOCK_SIZE);
        blocks.into_iter().find(|at| block(0, *at) != block(1, *at))
    }

    fn is_member(&self, leg: u8) -> bool {
        self.local.members().contains(leg)
    }
}

const NO_READS: FaultRates = FaultRates {
    read_io: 1.0,
    read_garbled: 0.0,
    write_io: 0.0,
    write_no_space: 0.0,
    flush_io: 0.0,
    unreachable: 0.0,
    unknown: 0.0,
};

#[tokio::test(start_paused = true)]
async fn a_leg_that_cannot_be_read_is_given_all_that_the_other_has() {
    let pair = Pair::new().await;
    let recovered = pair.recover().await;
    pair.sims[0].set_rates(NO_READS);
    settle(&pair.local, &recovered).await.unwrap();
    assert!(pair.is_member(0), "it takes writes");
    assert_eq!(pair.differ(), None);
    // The same for what is sealed: header and summary are gone from the leg, which cannot be read either.
    let from = pair.local.geometry.segment_offset(pair.header.segment);
    let end = from + pair.local.geometry.segment_size - BLOCK_SIZE as u64;
    for at in [from, end] {
        pair.sims[0].misplace(at, &[0; BLOCK_SIZE]);
    }
    assert_eq!(pair.differ(), Some(from));
    settle(&pair.local, &pair.recover().await).await.unwrap();
    assert!(pair.is_member(0));
    assert_eq!(pair.differ(), None);
}

#[tokio::test(start_paused = true)]
async fn a_leg_that_hangs_meanwhile_has_all_or_is_out() {
    let mut counted = 0;
    for seconds in (1..70).step_by(3) {
        let pair = Pair::new().await;
        let recovered = pair.recover().await;
        pair.sims[0].set_reach(Reach::Hanging);
        let sim = pair.sims[0].clone();
        let healer = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            sim.set_reach(Reach::Up);
        });
        settle(&pair.local, &recovered).await.unwrap();
        healer.await.unwrap();
        if pair.is_member(0) {
            counted += 1;
            assert_eq!(pair.differ(), None, "it hung for {seconds} s");
        }
    }
    assert!((1..20).contains(&counted), "in {counted} cases it came back in time");
}

/// A crash tore what was written: the first leg has the records, and their header is on the second alone, where it was read
/// when the cache was opened. Then that leg is lost.
#[tokio::test(start_paused = true)]
async fn a_header_that_only_a_leg_had_which_is_lost_is_written_to_the_one_that_is_left() {
    for rots in [false, true] {
        let pair = Pair::new().await;
        let geometry = pair.local.geometry;
        let offset = geometry.segment_offset(pair.header.segment);
        let records =
            pair.sims[1].peek(offset, geometry.segment_size as usize).split_off(BLOCK_SIZE);
        let first = pair.sims[0].device();
        first.write(offset + BLOCK_SIZE as u64, vec![Bytes::from(records)]).await.unwrap();
        first.flush().await.unwrap();
        if rots {
            // Of an earlier life of the segment.
            let former = SegmentHeader { seq: 1, ..pair.header.clone() };
            let mut block = [0; BLOCK_SIZE];
            former.encode_into(&mut block);
            pair.sims[0].misplace(offset, &block);
        }
        assert_eq!(pair.local.read_headers().await.unwrap(), std::slice::from_ref(&pair.header));
        pair.lose(1, false).await;
        settle(&pair.local, &pair.recover().await).await.unwrap();
        let durable = pair.sims[0].peek_durable(offset, BLOCK_SIZE);
        let found = SegmentHeader::decode(&durable, pair.local.cache_uuid(), pair.header.segment);
        assert_eq!(found.as_ref(), Ok(&pair.header), "what the next start finds");
        assert_eq!(pair.recover().await.last_lsn, Lsn(2));
    }
}

/// The leg that alone has the records is lost after they were read from it: nobody may vouch for them, or reads of what they
/// wrote fail for ever, and so does the commit of their segment.
#[tokio::test(start_paused = true)]
async fn records_that_only_a_leg_had_which_is_lost_are_no_part_of_the_log() {
    for hangs in [false, true] {
        let pair = Pair::new().await;
        let recovered = pair.recover().await;
        pair.lose(1, hangs).await;
        let settled = settle(&pair.local, &recovered).await;
        assert!(matches!(settled, Err(CacheError::LogChanged { segment: 0, .. })), "{settled:?}");
        assert!(!pair.is_member(1), "hangs: {hangs}");
        let again = pair.recover_any().await;
        assert_eq!((again.last_lsn, again.live.len()), (Lsn(0), 0));
        settle(&pair.local, &again).await.unwrap();
        let segment = pair.header.segment;
        let geometry = &pair.local.geometry;
        let end = geometry.segment_offset(segment) + geometry.segment_size - BLOCK_SIZE as u64;
        let last = pair.sims[0].peek_durable(end, BLOCK_SIZE);
        assert!(last.iter().all(|byte| *byte == 0), "no summary says that there was anything");
    }
}

/// Records on both legs, and the summary on the one that is lost after it was read: the other gets a summary of its own.
#[tokio::test(start_paused = true)]
async fn a_summary_that_only_a_leg_had_which_is_lost_is_written_anew() {
    for hangs in [false, true] {
        let pair = Pair::new().await;
        settle(&pair.local, &pair.recover().await).await.unwrap();
        assert_eq!(pair.differ(), None);
        let geometry = &pair.local.geometry;
        let from = geometry.segment_offset(pair.header.segment);
        let end = from + geometry.segment_size - BLOCK_SIZE as u64;
        let summary = pair.sims[0].peek_durable(end, BLOCK_SIZE);
        pair.sims[0].misplace(end, &[0; BLOCK_SIZE]);
        let recovered = pair.recover().await;
        assert!(recovered.live[0].unsealed.is_none());
        pair.lose(1, hangs).await;
        let settled = settle(&pair.local, &recovered).await;
        assert!(matches!(settled, Err(CacheError::LogChanged { segment: 0, .. })), "{settled:?}");
        settle(&pair.local, &pair.recover().await).await.unwrap();
        let found = pair.sims[0].peek_durable(end, BLOCK_SIZE);
        assert_eq!((pair.is_member(1), found == summary), (false, true), "hangs: {hangs}");
    }
}

/// What was fetched and kept takes no LSN: that its record is gone does not show in where the log ends.
#[tokio::test(start_paused = true)]
async fn a_record_without_lsn_that_only_a_leg_had_which_is_lost_is_no_part_of_the_log() {
    let pair = Pair::new().await;
    settle(&pair.local, &pair.recover().await).await.unwrap();
    let geometry = &pair.local.geometry;
    let from = geometry.segment_offset(pair.header.segment);
    let end = from + geometry.segment_size - BLOCK_SIZE as u64;
    pair.sims.iter().for_each(|sim| sim.misplace(end, &[0; BLOCK_SIZE]));
    let mut entries = Vec::new();
    push_descriptor(&mut entries, Kind::Fill, Lba(9), 1, 6, (WHOLE, WHOLE));
    entries.extend(crc32c(&[0; BLOCK_SIZE]).to_le_bytes());
    let record = RecordHeader {
        seq: pair.header.seq,
        first_lsn: Lsn(3),
        flushed: Lsn(2),
        position: 5,
        payload_blocks: 1,
        epoch: pair.header.epoch,
        entries_len: entries.len() as u16,
        time_ms: 0,
    };
    let mut block = [0; BLOCK_SIZE];
    record.encode_into(&mut block, &entries, pair.header.nonce);
    pair.sims[1].misplace(from + 5 * BLOCK_SIZE as u64, &block);
    let recovered = pair.recover().await;
    assert_eq!(recovered.live[0].used_blocks, 7);
    pair.lose(1, false).await;
    let settled = settle(&pair.local, &recovered).await;
    assert!(matches!(settled, Err(CacheError::LogChanged { segment: 0, .. })), "{settled:?}");
    let again = pair.recover().await;
    assert_eq!(again.live[0].used_blocks, 5);
    settle(&pair.local, &again).await.unwrap();
}
