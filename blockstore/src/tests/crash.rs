//! Goal: after a crash at any moment the image is exactly that of one committed LSN, at or after the
//! last acknowledged one (P2), and the store goes on (C3, C5).
//!
//! Method: a fixed workload runs on a session that dies after n operations, for every n until the
//! workload ends unharmed. Then power is lost (unflushed writes are kept, lost, torn or reordered) or
//! only the process has died. The store is opened, again with a death on the way, and judged.

use crate::device::sim::{SimDevice, SimOptions};
use crate::testing::{
    HOST, LOG, MIB, Model, attach, batch, check_blocks, cut_batch, format, host, open, snapshots,
    write, zero,
};
use crate::{AttachOptions, Change, Store, StoreErrorKind};
use std::cell::RefCell;
use uuid::Uuid;

/// What the workload has done so far.
#[derive(Default)]
struct History {
    /// Model after each commit that was submitted; the LSN is the index + 1.
    submitted: Vec<Model>,
    acknowledged: usize,
}

/// Overwrites, discards of every kind, a second disk that comes and goes, a resize.
fn changes(lsn: u64) -> Vec<Change> {
    match lsn % 6 {
        0 => vec![zero(0, 4096)],
        3 => vec![write(2, lsn), zero(5, 600), write(900, lsn), write(4095, lsn)],
        _ => {
            let first = lsn * 37 % 300;
            let mut all: Vec<Change> = (first..first + 12).map(|lba| write(lba, lsn)).collect();
            all.extend((1..8).map(|n| write(500 * n + lsn % 3, lsn)));
            all
        }
    }
}

async fn workload(sim: &SimDevice, history: &RefCell<History>) {
    let store = open(sim).await;
    if let Err(error) = store.create_vdi("d", 16 * MIB).await {
        assert_eq!(error.kind, StoreErrorKind::AlreadyExists, "{error}");
    }
    let vdi = attach(&store, "d").await;
    for lsn in 1..=14u64 {
        let mut model = history.borrow().submitted.last().cloned().unwrap_or_default();
        model.apply(&changes(lsn), lsn);
        history.borrow_mut().submitted.push(model);
        // Some commits end with a snapshot, some go on after one.
        let parts = match lsn {
            4 | 9 => continue,
            5 | 10 => vec![(lsn - 1, changes(lsn - 1)), (lsn, changes(lsn))],
            7 => vec![(lsn, changes(lsn)), (lsn, Vec::new())],
            _ => vec![(lsn, changes(lsn))],
        };
        vdi.commit(cut_batch(parts)).await.expect("commit");
        history.borrow_mut().acknowledged = lsn as usize;
        if lsn == 5 {
            store.create_vdi("short-lived", MIB).await.expect("create");
        }
        if lsn == 8 {
            store.delete_vdi("short-lived").await.expect("delete");
        }
    }
    store.close().await.expect("close");
}

/// Judges what is left.
async fn judge(sim: &SimDevice, history: &History, when: &str) {
    let store = open(sim).await;
    let exists = store.lookup_vdi("d").await;
    let Ok(info) = exists else {
        assert_eq!(history.submitted.len(), 0, "{when}: the disk is gone");
        return;
    };
    let lsn = info.committed_lsn.0 as usize;
    assert!(
        (history.acknowledged..=history.submitted.len()).contains(&lsn),
        "{when}: LSN {lsn} is there, acknowledged were {}, submitted {}",
        history.acknowledged,
        history.submitted.len()
    );
    let mut model = lsn.checked_sub(1).map_or(Model::default(), |n| history.submitted[n].clone());
    model.check(&store, "d").await;
    check_blocks(&store).await;
    check_snapshots(&store, history, lsn as u64, when).await;

    // The store goes on, without harm to what was there.
    let vdi = store.attach(info.uuid, AttachOptions { log_id: LOG }).await.expect("attach");
    for next in lsn as u64 + 1..lsn as u64 + 4 {
        let more: Vec<Change> = (0..40).map(|n| write(n * 50 + next % 2, next)).collect();
        model.apply(&more, next);
        vdi.commit(batch(next, more)).await.expect("commit");
    }
    model.check(&store, "d").await;
    check_blocks(&store).await;
    check_snapshots(&store, history, lsn as u64, when).await;
    store.close().await.expect("close");
}

/// Exactly the snapshots up to `lsn` are there, each as the disk was then (P5).
async fn check_snapshots(store: &Store, history: &History, lsn: u64, when: &str) {
    let found = snapshots(store, "d").await;
    let lsns: Vec<u64> = found.iter().map(|snapshot| snapshot.lsn.0).collect();
    let expected: Vec<u64> = [4, 7, 9].into_iter().filter(|cut| *cut <= lsn).collect();
    assert_eq!(lsns, expected, "{when}, at LSN {lsn}");
    let disk = store.scan_vdis().await.expect("registry")[0].1.record().cloned().expect("disk");
    for snapshot in &found {
        let model = &history.submitted[snapshot.lsn.0 as usize - 1];
        model.check_snapshot(store, &disk, snapshot).await;
    }
}

/// Runs `work` until it ends or the session's host dies; true if it died.
async fn until_death(sim: &SimDevice, work: impl Future<Output = ()>) -> bool {
    tokio::select! {
        biased;
        () = sim.died() => true,
        () = work => false,
    }
}

async fn crash_everywhere(options: SimOptions, power_loss: bool, step: u64) {
    for n in (0..).step_by(step as usize) {
        let options = SimOptions { seed: options.seed + n, ..options.clone() };
        let sim = SimDevice::with_options(options);
        format(&sim).await;
        let session = sim.connect();
        session.crash_after(n);
        let history = RefCell::new(History::default());
        let died = until_death(&session, workload(&session, &history)).await;
        let end = |session: &SimDevice| {
            if power_loss { session.crash() } else { session.kill_host() }
        };
        end(&session);
        // A second death while the store is being opened.
        let second = sim.connect();
        second.crash_after(n % 23);
        until_death(&second, async { drop(open(&second).await) }).await;
        end(&second);
        let when = format!("death after operation {n}");
        judge(&sim.connect(), &history.into_inner(), &when).await;
        if !died {
            assert!(n > 100, "the workload has {n} operations");
            return;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn power_loss_at_every_operation() {
    crash_everywhere(SimOptions::new(64 * MIB, 1000), true, 1).await;
}

#[tokio::test(start_paused = true)]
async fn death_of_the_process_at_every_operation() {
    crash_everywhere(SimOptions::new(64 * MIB, 2000), false, 1).await;
}

#[tokio::test(start_paused = true)]
async fn power_loss_without_compare_and_write() {
    let options = SimOptions { compare_and_write: false, ..SimOptions::new(64 * MIB, 3000) };
    crash_everywhere(options, true, 1).await;
}

#[tokio::test(start_paused = true)]
async fn power_loss_with_4k_logical_blocks() {
    let options = SimOptions { logical_block: 4096, ..SimOptions::new(64 * MIB, 4000) };
    crash_everywhere(options, true, 3).await;
}

/// A store that was taken over while its owner was dead: the owner may not write any more.
#[tokio::test(start_paused = true)]
async fn a_returning_host_does_not_disturb_its_successor() {
    let sim = SimDevice::new(64 * MIB, 5000);
    format(&sim).await;
    let first = open(&sim).await;
    let session = sim.connect();
    let options = crate::OpenOptions { take_over_host: Some(HOST), ..host(Uuid::from_u128(2)) };
    let second = Store::open(session.device(), options).await.expect("open");
    second.create_vdi("x", MIB).await.expect("create");
    drop(first);
    let error = Store::open(sim.connect().device(), host(HOST)).await.expect_err("in use");
    assert_eq!(error.kind, StoreErrorKind::InUse);
}
