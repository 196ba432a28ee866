//! Goal: a wrong set of legs is refused with both sides named, and nothing is written; the right one opens in any order.
//! Method: real files. Which superblock counts is tested in `choose.rs`, what happens while legs fail in tests/log_crash.

use super::opening::may_create;
use super::{Local, Mode, Terms};
use crate::error::CacheError;
use crate::format::LegSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const SIZE: u64 = 16 << 20;
const SERVE: Mode = Mode::Serve { create_size: None };

/// Somewhere in the segments.
const PLACE: u64 = 5 << 20;

struct Rig {
    dir: TempDir,
}

impl Rig {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn make(&self, names: &[&str]) -> Local {
        let paths: Vec<_> = names.iter().map(|name| self.path(name)).collect();
        let mode = Mode::Serve { create_size: Some(SIZE) };
        Local::open_legs(&paths, mode, &Terms::default()).await.unwrap()
    }

    async fn open(&self, names: &[&str], degraded: bool) -> Result<Local, CacheError> {
        let paths: Vec<_> = names.iter().map(|name| self.path(name)).collect();
        Local::open_legs(&paths, SERVE, &Terms { degraded, machine: None }).await
    }

    /// The error of opening these legs, which must name all that `named` says and change no file.
    async fn refused(&self, names: &[&str], named: &[&str]) -> CacheError {
        let before: Vec<_> = names.iter().map(|name| bytes(&self.path(name))).collect();
        let error = self.open(names, false).await.expect_err("refused");
        for part in named {
            assert!(error.to_string().contains(part), "{part} is not in: {error}");
        }
        let after: Vec<_> = names.iter().map(|name| bytes(&self.path(name))).collect();
        assert!(before == after, "nothing is written: {error}");
        error
    }
}

async fn replace(rig: &Rig, good: &str, new: &str) -> Result<(), CacheError> {
    Local::replace(&rig.path(good), &rig.path(new), &|_, _| ()).await.map(drop)
}

#[tokio::test]
async fn a_leg_is_replaced_and_a_single_cache_gets_its_second() {
    let rig = Rig::new();
    drop(rig.make(&["a", "b"]).await);
    drop(rig.make(&["single"]).await);
    drop(rig.make(&["other"]).await);
    std::fs::copy(rig.path("b"), rig.path("stale")).unwrap();
    for (good, new) in [("a", "fresh"), ("a", "stale"), ("single", "second")] {
        // What is written alone is on both afterwards.
        let local = rig.open(&[good], true).await.unwrap();
        let data = blockstore::buf::AlignedBuf::copy_of(&[good.len() as u8 + 7; 4096]);
        local.write(PLACE, data).await.unwrap();
        local.flush().await.unwrap();
        let before = local.superblock().await.membership.events;
        drop(local);
        replace(&rig, good, new).await.unwrap();
        for names in [[good, new], [new, good]] {
            let local = rig.open(&names, false).await.unwrap();
            assert_eq!(local.members(), LegSet::first(2));
            let superblock = local.superblock().await;
            assert!(superblock.membership.events > before);
        }
        let (a, b) = (bytes(&rig.path(good)), bytes(&rig.path(new)));
        assert!(a[8192..] == b[8192..] && a[PLACE as usize] == good.len() as u8 + 7);
        // The leg that was replaced is no part of the cache any more.
        rig.refused(&[good], &["--degraded"]).await;
    }
    // Whatever has other data is not overwritten, and a good leg must know that it is alone.
    for (good, new) in [("other", "single"), ("a", "stale"), ("other", "other")] {
        let before = (bytes(&rig.path(good)), bytes(&rig.path(new)));
        let error = replace(&rig, good, new).await.unwrap_err();
        assert!(before == (bytes(&rig.path(good)), bytes(&rig.path(new))), "{error}");
    }
    std::fs::write(rig.path("text"), "not a cache").unwrap();
    assert!(replace(&rig, "other", "text").await.is_err());
    assert_eq!(bytes(&rig.path("text")), b"not a cache");
}

#[tokio::test]
async fn a_copy_that_was_cut_short_leaves_the_good_leg_or_both() {
    let rig = Rig::new();
    drop(rig.make(&["a", "b"]).await);
    drop(rig.open(&["a"], true).await.unwrap());
    let alone = bytes(&rig.path("a"));
    replace(&rig, "a", "b").await.unwrap();
    let copied = bytes(&rig.path("b"));
    // The good leg names the new one, which is not finished: not without the operator's word, and then with everything.
    let mut unfinished = copied.clone();
    unfinished[..8192].fill(0);
    unfinished[..27].copy_from_slice(b"BLSTNEW cache being created");
    std::fs::write(rig.path("b"), &unfinished).unwrap();
    rig.refused(&["a"], &["--degraded"]).await;
    rig.refused(&["a", "b"], &["--degraded"]).await;
    let local = rig.open(&["a", "b"], true).await.unwrap();
    assert_eq!(local.members(), LegSet::FIRST);
    drop(local);
    replace(&rig, "a", "b").await.unwrap();
    assert_eq!(rig.open(&["a", "b"], false).await.unwrap().members(), LegSet::first(2));
    // Served alone each, they hold different things: none overwrites the other.
    drop(rig.open(&["b"], true).await.unwrap());
    let error = replace(&rig, "a", "b").await.unwrap_err();
    assert!(error.to_string().contains("--degraded"), "{error}");
    drop(rig.open(&["a"], true).await.unwrap());
    let before = bytes(&rig.path("b"));
    let error = replace(&rig, "a", "b").await.unwrap_err();
    assert!(error.to_string().contains("wipe") && before == bytes(&rig.path("b")), "{error}");
    // Neither knows: the copy has no superblock, and the good leg is the cache.
    std::fs::write(rig.path("a"), &alone).unwrap();
    let mut unfinished = copied;
    unfinished[..8192].fill(0);
    std::fs::write(rig.path("b"), &unfinished).unwrap();
    let local = rig.open(&["a", "b"], false).await.unwrap();
    assert_eq!(local.members(), LegSet::FIRST);
}

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_default()
}

#[tokio::test]
async fn legs_open_in_any_order_and_one_leg_opens_as_ever() {
    let rig = Rig::new();
    let cache = rig.make(&["a", "b"]).await.cache_uuid();
    for names in [["a", "b"], ["b", "a"]] {
        let local = rig.open(&names, false).await.unwrap();
        assert_eq!((local.cache_uuid(), local.members()), (cache, LegSet::first(2)));
        assert_eq!(local.worker_files().unwrap().len(), 2);
        assert!(local.leg_states().iter().all(|leg| leg.member && leg.why.is_none()));
    }
    rig.make(&["single"]).await;
    assert_eq!(rig.open(&["single"], false).await.unwrap().members(), LegSet::FIRST);
}

#[tokio::test]
async fn a_creation_that_was_cut_short_between_the_legs_is_begun_anew() {
    let rig = Rig::new();
    let first = rig.make(&["a", "b"]).await.cache_uuid();
    std::fs::remove_file(rig.path("b")).unwrap();
    let second = rig.make(&["a", "b"]).await;
    assert_ne!(first, second.cache_uuid());
    assert_eq!(second.members().len(), 2);
    // Once it was used, it is not begun anew.
    second.rewrite_superblock(|s| s.store = Some(s.cache)).await.unwrap();
    drop(second);
    std::fs::remove_file(rig.path("b")).unwrap();
    let paths = [rig.path("a"), rig.path("b")];
    let mode = Mode::Serve { create_size: Some(SIZE) };
    let error = Local::open_legs(&paths, mode, &Terms::default()).await.unwrap_err();
    assert!(matches!(error, CacheError::LegMissing { .. }), "{error}");
    assert!(!rig.path("b").exists(), "no file is left behind");
}

#[tokio::test]
async fn wrong_sets_of_legs_are_refused_by_name_and_nothing_is_written() {
    let rig = Rig::new();
    drop(rig.make(&["a", "b"]).await);
    drop(rig.make(&["other", "twin"]).await);
    drop(rig.make(&["single"]).await);
    std::os::unix::fs::symlink(rig.path("a"), rig.path("link")).unwrap();
    std::fs::hard_link(rig.path("a"), rig.path("hard")).unwrap();
    std::fs::copy(rig.path("a"), rig.path("clone")).unwrap();
    for same in ["a", "link", "hard"] {
        let error = rig.refused(&["a", same], &["/a", same, "different ones"]).await;
        assert!(matches!(error, CacheError::SameLeg { .. }), "{error}");
    }
    let error = rig.refused(&["a", "clone"], &["/a", "/clone", "copy"]).await;
    assert!(matches!(error, CacheError::ClonedLeg { .. }), "{error}");
    let error = rig.refused(&["a", "other"], &["/a", "/other", "legs of one cache"]).await;
    assert!(matches!(error, CacheError::OtherCache { .. }), "{error}");
    let error = rig.refused(&["single", "absent"], &["/single", "1 leg(s)", "2 were"]).await;
    assert!(matches!(error, CacheError::LegCount { .. }), "{error}");
    rig.refused(&["a"], &["/a", "--degraded", "not given"]).await;
    rig.refused(&["b", "absent"], &["/b", "/absent", "--degraded"]).await;
    File::options().write(true).open(rig.path("b")).unwrap().set_len(SIZE - 4096).unwrap();
    let error = rig.refused(&["a", "b"], &["/a", "/b", "same size"]).await;
    assert!(matches!(error, CacheError::SmallerLeg { .. }), "{error}");
}

#[tokio::test]
async fn a_leg_that_was_left_behind_is_never_a_member_again() {
    let rig = Rig::new();
    drop(rig.make(&["a", "b"]).await);
    let both = bytes(&rig.path("b"));
    // The operator's word, once: from then on the leg knows that it is alone.
    let alone = rig.open(&["b"], true).await.unwrap();
    assert_eq!(alone.members(), LegSet::NONE.with(1));
    drop(alone);
    drop(rig.open(&["b"], false).await.unwrap());
    for names in [["a", "b"], ["b", "a"]] {
        let local = rig.open(&names, false).await.unwrap();
        assert_eq!(local.members(), LegSet::NONE.with(1));
        let states = local.leg_states();
        let stale = states.iter().find(|leg| !leg.member).unwrap();
        assert!(stale.path.ends_with("a") && stale.why.as_ref().unwrap().contains("left behind"));
    }
    // Should the newer copy of its superblock rot, the older one says the same.
    let mut file = bytes(&rig.path("b"));
    for copy in [0, 4096] {
        let kept = file[copy..copy + 4096].to_vec();
        file[copy..copy + 4096].fill(0xa5);
        std::fs::write(rig.path("b"), &file).unwrap();
        let local = rig.open(&["a", "b"], false).await.unwrap();
        assert_eq!(local.members(), LegSet::NONE.with(1));
        file[copy..copy + 4096].copy_from_slice(&kept);
    }
    std::fs::write(rig.path("b"), &file).unwrap();
    // A crash between the two copies left one as it was: after the next start both say the same again.
    for copy in [0, 4096] {
        let mut torn = file.clone();
        torn[copy..copy + 4096].copy_from_slice(&both[copy..copy + 4096]);
        for rotten in [0, 4096] {
            std::fs::write(rig.path("b"), &torn).unwrap();
            drop(rig.open(&["a", "b"], false).await.unwrap());
            let mut after = bytes(&rig.path("b"));
            after[rotten..rotten + 4096].fill(0xa5);
            std::fs::write(rig.path("b"), &after).unwrap();
            let local = rig.open(&["a", "b"], false).await.unwrap();
            assert_eq!(local.members(), LegSet::NONE.with(1), "{copy} is old, {rotten} rots");
        }
    }
    std::fs::write(rig.path("b"), &file).unwrap();
    // The other one goes on alone too: now both claim to be the cache.
    drop(rig.open(&["a"], true).await.unwrap());
    let error = rig.refused(&["a", "b"], &["/a", "/b", "without the other"]).await;
    assert!(matches!(error, CacheError::SplitLegs { .. }), "{error}");
}

/// One that was put out at an earlier time, and was started alone since, does not count for more by the number of its starts.
#[tokio::test]
async fn a_leg_that_was_mirrored_again_is_not_overwritten_by_an_older_one() {
    let rig = Rig::new();
    drop(rig.make(&["a", "b"]).await);
    drop(rig.open(&["a"], true).await.unwrap());
    replace(&rig, "a", "h").await.unwrap();
    for _ in 0..6 {
        drop(rig.open(&["b"], true).await.unwrap());
    }
    let before = bytes(&rig.path("a"));
    let error = replace(&rig, "b", "a").await.unwrap_err();
    assert!(error.to_string().contains("wipe") && before == bytes(&rig.path("a")), "{error}");
    for names in [["a", "b"], ["b", "a"]] {
        let error = rig.refused(&names, &["/a", "/b", "without the other"]).await;
        assert!(matches!(error, CacheError::SplitLegs { .. }), "{error}");
    }
    assert_eq!(rig.open(&["a", "h"], false).await.unwrap().members(), LegSet::first(2));
}

/// A start that may create a cache opens the one that is there, though not all of its first MiB can be read.
#[tokio::test]
async fn what_cannot_be_read_is_not_new() {
    let rig = Rig::new();
    // A directory can be opened, and not be read.
    assert!(!may_create(&[rig.dir.path().into()]).await.unwrap());
}
