//! Goal: of one disk one snapshot at a time is asked for; one that fails is tried again, and people hear of it until it works.
//! Method: a disk's state by itself; times are those of the machine, and only long ones count.

use super::*;
use blockstore::Policy;
use blockstore::types::Lsn;
use cache::{SnapshotTaken, VdiStatus};
use std::path::Path;

fn served() -> Arc<Served> {
    Arc::new(Served::new(Path::new("/nowhere"), Uuid::from_u128(7), "db", 1 << 20))
}

fn status(schedule: &str, last_lsn: u64) -> VdiStatus {
    let policy = Policy { schedule: schedule.parse().unwrap(), ..Policy::default() };
    VdiStatus { policy, last_lsn, ..VdiStatus::default() }
}

fn at(ms: u64) -> Now {
    Now { wall_ms: 3_600_000_000 + ms, mono_ms: ms }
}

#[test]
fn one_at_a_time_and_what_fails_is_said_and_tried_again() {
    let served = served();
    let mut disk = Disk::new(&served);
    let status = status("every 1s keep 2, every 1h keep 2", 5);
    // The store's list is waited for, but not if the store is away.
    disk.plan(&status, true, at(0));
    assert!(disk.take(&status, at(0)).is_none());
    disk.plan(&status, false, at(0));
    let label = disk.take(&status, at(0)).expect("due at once");
    assert!(label.as_str().starts_with("auto 1h 1970-02-11T16:00:00.000Z"), "{label}");
    assert!(disk.take(&status, at(5000)).is_none(), "one is under way");
    disk.answered(&served, Err(Failure::new(Kind::Failed, "no log")));
    assert!(disk.trouble().expect("trouble").contains("no snapshot could be taken: no log"));
    assert!(disk.unsure, "it may have been taken");
    disk.plan(&status, false, at(5000));
    assert!(disk.take(&status, at(5000)).is_none(), "not at once");
    disk.take_after = Instant::now();
    assert!(disk.take(&status, at(5000)).is_some(), "due as before");
    disk.answered(&served, Ok(SnapshotTaken { lsn: Lsn(6), time_ms: at(5000).wall_ms }));
    assert_eq!((disk.trouble(), disk.count_taken), (None, 1));
    // Nothing was written since.
    let unchanged = VdiStatus { last_lsn: 6, ..status.clone() };
    assert!(disk.take(&unchanged, at(6000)).is_none());
    let written = VdiStatus { last_lsn: 7, ..status };
    assert!(disk.take(&written, at(6500)).is_none(), "not before the next slot");
    let label = disk.take(&written, at(7000)).expect("due");
    assert!(label.as_str().starts_with("auto 1s "), "{label}");
}

#[test]
fn what_waits_for_a_full_log_is_trouble_after_a_while() {
    let mut disk = Disk::new(&served());
    disk.asked = Some(Instant::now());
    assert_eq!(disk.trouble(), None);
    let Some(long_ago) = Instant::now().checked_sub(2 * LONG) else { return };
    disk.asked = Some(long_ago);
    assert!(disk.trouble().expect("trouble").contains("which may have no room"));
}

/// What happens while the store is asked may be missing in its answer.
#[test]
fn the_store_is_asked_again_if_something_went_untold_meanwhile() {
    let served = served();
    let untold = || cache::MadeCuts { incomplete: true, ..cache::MadeCuts::default() };
    let mut disk = Disk::new(&served);
    disk.begin_listing();
    disk.listed(vec![(3, 9)], vec![(4, 9)]);
    assert_eq!(disk.listing, Listing::Done);
    assert_eq!((disk.taken.len(), disk.cut.len()), (1, 1));
    // Between two listings.
    disk.made(untold());
    assert_eq!(disk.listing, Listing::Failed);
    // While it is asked.
    disk.begin_listing();
    disk.made(untold());
    disk.listed(vec![], vec![]);
    assert_eq!(disk.listing, Listing::Failed, "that one may not have it");
    disk.begin_listing();
    disk.listed(vec![], vec![]);
    assert_eq!(disk.listing, Listing::Done);
    // The same for a snapshot of which it was not known whether it was taken.
    disk.take_failure = Some("no log".into());
    disk.begin_listing();
    disk.answered(&served, Ok(SnapshotTaken { lsn: Lsn(6), time_ms: 1 }));
    disk.listed(vec![], vec![]);
    assert_eq!(disk.listing, Listing::Failed);
    // Before the first one there is nothing to be told of twice.
    let mut fresh = Disk::new(&served);
    fresh.made(untold());
    assert_eq!(fresh.listing, Listing::Untried);
    fresh.begin_listing();
    fresh.listed(vec![], vec![]);
    assert_eq!(fresh.listing, Listing::Done);
}

#[test]
fn other_peoples_snapshots_are_not_learnt_of() {
    let mut disk = Disk::new(&served());
    let found = |lsn, label: &str| PendingSnapshot {
        lsn: Lsn(lsn),
        time_ms: 9,
        label: blockstore::SnapshotLabel::new(label).unwrap(),
    };
    let auto = "auto 1s 2026-11-22T08:00:00.000Z";
    disk.learn(vec![found(3, ""), found(4, auto), found(5, "auto"), found(6, "mine")]);
    assert_eq!(disk.taken, Taken::from([(4, 9)]));
}
