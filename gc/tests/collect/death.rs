//! Death at every device operation of a workload that collects beside its commits.

use crate::world::{
    Content, MIB, World, apply, cycle, cycle_in, head_of, host, list, open, open_to_unmap, read,
    settle, unmap, with_snapshot, write,
};
use blockstore::device::sim::SimDevice;
use blockstore::types::{Lba, Lsn};
use blockstore::{AttachOptions, Batch, Change, FormatOptions, Store, StoreErrorKind, WhenOffline};
use gc::{CheckOptions, check};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// After these LSNs there is a snapshot.
const CUTS: [u64; 4] = [3, 5, 8, 11];

#[derive(Default)]
struct History {
    /// The disk after each commit that was submitted; the LSN is the index + 1.
    submitted: Vec<Content>,
    acknowledged: u64,
    /// Snapshots that may be gone.
    deleted: Vec<u64>,
}

fn changes(lsn: u64) -> Vec<Change> {
    match lsn % 5 {
        0 => vec![Change::Zero { lba: Lba(0), blocks: 300 }],
        _ => (0..60).map(|n| write(n * 7 + lsn % 4, lsn)).collect(),
    }
}

/// What goes on beside the commits.
#[derive(Clone, Copy)]
struct Beside {
    unmaps: bool,
    /// Bytes of memory for marks.
    memory: u64,
}

const COLLECTS: Beside = Beside { unmaps: false, memory: gc::MEMORY_DEFAULT };
const UNMAPS: Beside = Beside { unmaps: true, ..COLLECTS };
/// With memory for the bits of one extent: reclaim bitmaps are written while other extents are still to be marked.
const IN_WINDOWS: Beside = Beside { memory: 0, ..COLLECTS };

async fn workload(sim: &SimDevice, history: &RefCell<History>, beside: Beside) {
    let Beside { unmaps, memory } = beside;
    let store = if unmaps { open_to_unmap(sim).await } else { open(sim).await };
    store.create_vdi("d", 16 * MIB).await.expect("create");
    let vdi = World::attach(&store, "d").await;
    for lsn in 1..=12u64 {
        let mut content = history.borrow().submitted.last().cloned().unwrap_or_default();
        apply(&mut content, &changes(lsn), lsn);
        history.borrow_mut().submitted.push(content);
        let batch = match CUTS.contains(&lsn) {
            true => with_snapshot(lsn, changes(lsn)),
            false => Batch::new(Lsn(lsn), changes(lsn)),
        };
        let commit = vdi.commit(batch);
        if lsn.is_multiple_of(3) {
            let (committed, collected) = tokio::join!(commit, cycle_in(&store, memory));
            committed.expect("commit");
            collected.expect("cycle");
        } else if unmaps && lsn % 3 == 1 {
            let (committed, unmapped) = tokio::join!(commit, unmap(&store));
            committed.expect("commit");
            unmapped.expect("a pass");
        } else {
            commit.await.expect("commit");
        }
        history.borrow_mut().acknowledged = lsn;
        if lsn == 6 {
            let policy = WhenOffline::default();
            store.clone_vdi("c", "d", Lsn(5), policy).await.expect("clone");
            history.borrow_mut().deleted.push(3);
            store.delete_snapshots("d", vec![Lsn(3)]).await.expect("delete");
        }
        if lsn == 10 {
            history.borrow_mut().deleted.push(8);
            store.delete_snapshots("d", vec![Lsn(8)]).await.expect("delete");
        }
    }
    store.close().await.expect("close");
}

async fn judge(sim: &SimDevice, history: &History, when: &str) {
    let store = open(sim).await;
    let Ok(info) = store.lookup_vdi("d").await else {
        assert!(history.submitted.is_empty(), "{when}: the disk is gone");
        return;
    };
    let lsn = info.committed_lsn.0;
    assert!(
        (history.acknowledged..=history.submitted.len() as u64).contains(&lsn),
        "{when}: LSN {lsn}, acknowledged {}",
        history.acknowledged
    );
    let at = |lsn: u64| {
        lsn.checked_sub(1).map_or(Content::new(), |n| history.submitted[n as usize].clone())
    };
    let vdi = store.attach(info.uuid, AttachOptions { log_id: info.uuid }).await.expect("attach");
    let mut content = at(lsn);
    let mut expected: BTreeMap<u64, Content> = BTreeMap::new();
    let mut next = lsn;
    // As it was left; after a cycle; after commits that use what it gave back.
    for round in 0..3 {
        let report = check(&store, CheckOptions { data: true }).await.expect("check");
        assert!(report.is_sound(), "{when}, round {round}: {report:#?}");
        let head = head_of(&store, info.uuid).await;
        assert_eq!(read(&store, &head).await, content, "{when}, round {round}");
        let found = list(&store, "d").await;
        for cut in CUTS.into_iter().filter(|cut| *cut <= lsn && !history.deleted.contains(cut)) {
            assert!(found.iter().any(|(lsn, _)| *lsn == cut), "{when}: snapshot {cut} is gone");
        }
        for (cut, as_head) in found {
            let snapshot = read(&store, &as_head(&head)).await;
            assert_eq!(snapshot, at(cut), "{when}, round {round}: snapshot {cut}");
            expected.insert(cut, snapshot);
        }
        if let Ok(clone) = store.lookup_vdi("c").await {
            let clone = read(&store, &head_of(&store, clone.uuid).await).await;
            assert_eq!(clone, at(5), "{when}, round {round}: the clone");
        }
        if round == 0 {
            store.reclaimed().await;
            cycle(&store).await.expect("cycle");
            settle().await;
            let report = check(&store, CheckOptions::default()).await.expect("check");
            let (data, metadata) = store.pooled();
            assert_eq!(report.blocks_leaked, data + metadata, "{when}: garbage is left");
        } else if round == 1 {
            for _ in 0..3 {
                next += 1;
                let more: Vec<Change> = (0..700).map(|n| write(2000 + n, next)).collect();
                apply(&mut content, &more, next);
                vdi.commit(Batch::new(Lsn(next), more)).await.expect("commit");
            }
        }
    }
    store.close().await.expect("close");
}

async fn until_death(sim: &SimDevice, work: impl Future<Output = ()>) -> bool {
    tokio::select! {
        biased;
        () = sim.died() => true,
        () = work => false,
    }
}

/// One death, after operation `n`; false if the workload ended before it.
async fn die_at(n: u64, seed: u64, power_loss: bool, beside: Beside) -> bool {
    let sim = SimDevice::new(32 * MIB, seed + n);
    Store::format(sim.device(), FormatOptions::default()).await.expect("format");
    let session = sim.connect();
    session.crash_after(n);
    let history = RefCell::new(History::default());
    let died = until_death(&session, workload(&session, &history, beside)).await;
    let end = |session: &SimDevice| {
        if power_loss { session.crash() } else { session.kill_host() }
    };
    end(&session);
    let second = sim.connect();
    second.crash_after(n % 29);
    until_death(&second, async {
        if let Err(error) = Store::open(second.device(), host()).await {
            assert_ne!(error.kind, StoreErrorKind::Damaged, "{error}");
        }
    })
    .await;
    end(&second);
    judge(&sim.connect(), &history.into_inner(), &format!("death after operation {n}")).await;
    died
}

fn die_everywhere(seed: u64, power_loss: bool, beside: Beside) {
    for n in 0.. {
        // One each: what a death leaves running ends with it.
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        if !runtime.expect("a runtime").block_on(die_at(n, seed, power_loss, beside)) {
            assert!(n > 150, "the workload has {n} operations");
            return;
        }
    }
}

#[test]
fn power_loss_at_every_operation() {
    die_everywhere(10_000, true, COLLECTS);
}

#[test]
fn death_of_the_process_at_every_operation() {
    die_everywhere(20_000, false, COLLECTS);
}

#[test]
fn power_loss_at_every_operation_of_windows() {
    die_everywhere(30_000, true, IN_WINDOWS);
}

#[test]
fn power_loss_at_every_operation_of_one_that_unmaps() {
    die_everywhere(30_000, true, UNMAPS);
}

#[test]
fn death_of_the_process_at_every_operation_of_one_that_unmaps() {
    die_everywhere(40_000, false, UNMAPS);
}
