//! Goal: a leg that cannot be read while the legs are made equal does not stay a member without what the other has (rule L5).
//! Method: a segment whose end only one leg has; the other refuses reads, or hangs for a while, during the settling.

use super::super::tests::{slot, two_records};
use super::super::{Recovered, recover, settle};
use crate::format::segment::SegmentHeader;
use crate::local::Local;
use blockstore::device::sim::{FaultRates, Reach, SimDevice};
use blockstore::types::{BLOCK_SIZE, Lsn};
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
        let (record, headers) = (slot(0), [self.header.clone()]);
        let recovered = recover(&self.local, &record, Lsn(0), &headers).await.unwrap();
        assert_eq!(recovered.last_lsn, Lsn(2));
        recovered
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
        pair.sims[1].set_rates(FaultRates { flush_io: 1.0, ..NO_READS });
        pair.local.flush().await.unwrap();
        assert!(!pair.is_member(1), "it is gone");
        settle(&pair.local, &pair.recover().await).await.unwrap();
        let durable = pair.sims[0].peek_durable(offset, BLOCK_SIZE);
        let found = SegmentHeader::decode(&durable, pair.local.cache_uuid(), pair.header.segment);
        assert_eq!(found.as_ref(), Ok(&pair.header), "what the next start finds");
        assert_eq!(pair.recover().await.last_lsn, Lsn(2));
    }
}
