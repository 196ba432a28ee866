//! Goal: a host gets into the store though its entry in the host table, or the head of a disk of its own, changes while it does.
//! Method: what an incarnation that died left behind goes away again; two open at the same moment.

use crate::device::sim::{Fault, OpKind, SimDevice};
use crate::testing::{HOST, MIB, format, host, open, sim, store_with_disk};
use crate::types::BLOCK_SIZE;
use crate::{OpenOptions, Store, StoreError, StoreErrorKind};
use std::sync::Arc;
use uuid::Uuid;

/// An incarnation died between its entry in the host table and the flush of it. The next one reads that entry, then the target
/// restarts and has the one before.
#[tokio::test(start_paused = true)]
async fn an_entry_that_went_back_while_it_is_changed_is_read_again() {
    let (mut went_back, mut changed) = (0, 0);
    for seed in 0..40 {
        let first = sim(64 * MIB, seed);
        format(&first).await;
        drop(open(&first).await);
        let before = first.counts();
        let second = first.connect();
        second.inject(OpKind::Flush, 0, Fault::Unreachable);
        let died = tokio::spawn({
            let second = second.clone();
            async move { Store::open(second.device(), host(HOST)).await }
        });
        while second.counts().flushes == 0 {
            tokio::task::yield_now().await;
        }
        second.kill_host();
        died.abort();
        assert_eq!(first.counts(), before);

        let third = first.connect();
        third.inject(OpKind::CompareAndWrite, 0, Fault::Unreachable);
        let opening = tokio::spawn({
            let third = third.clone();
            async move { Store::open(third.device(), host(HOST)).await }
        });
        while third.counts().compare_and_writes == 0 {
            tokio::task::yield_now().await;
        }
        let place = Store::open(first.connect().device(), OpenOptions::read_only()).await;
        let place = place.expect("open").superblock().geometry.host_slot(0).byte_offset();
        let entry = || first.peek(place, BLOCK_SIZE);
        let found = entry();
        third.lose_session();
        let is_back = found != entry();
        went_back += u32::from(is_back);
        changed += u32::from(!is_back);
        let store = opening.await.expect("runs").expect("opens, whatever the earlier one left");
        store.heartbeat().await.expect("it is entered");
    }
    assert!(went_back > 5 && changed > 5, "went back in {went_back} of 40");
}

/// Opens the store as two hosts at the same moment, or as one host twice.
async fn open_both(sim: &SimDevice, hosts: [Uuid; 2]) -> [Result<Arc<Store>, StoreError>; 2] {
    let open = |uuid, at: &str| {
        let (session, address) = (sim.connect(), at.to_owned());
        let options = OpenOptions { host_address: address, ..host(uuid) };
        async move { Store::open(session.device(), options).await }
    };
    let (a, b) = tokio::join!(open(hosts[0], "one"), open(hosts[1], "two"));
    [a, b]
}

#[tokio::test(start_paused = true)]
async fn of_two_hosts_that_open_at_once_one_is_told_of_the_other() {
    for seed in 0..10 {
        let sim = sim(64 * MIB, seed);
        format(&sim).await;
        let refused = match open_both(&sim, [HOST, Uuid::from_u128(7)]).await {
            [Ok(_), Err(error)] | [Err(error), Ok(_)] => error,
            both => panic!("one of two hosts: {both:?}"),
        };
        assert_eq!(refused.kind, StoreErrorKind::InUse);
        assert!(refused.to_string().contains("stop the agent there"), "{refused}");
    }
}

#[tokio::test(start_paused = true)]
async fn of_two_incarnations_that_open_at_once_the_later_counts() {
    for seed in 0..10 {
        let sim = sim(64 * MIB, seed);
        drop(store_with_disk(&sim, 16 * MIB).await);
        let mut alive = 0;
        for store in open_both(&sim, [HOST, HOST]).await {
            let Ok(store) = store else { continue };
            alive += u32::from(store.heartbeat().await.is_ok());
        }
        assert_eq!(alive, 1);
    }
}
