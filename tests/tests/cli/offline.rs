//! `store check`, `store dump` and `store repair` on stores that are whole, damaged, in use, or none at all.

use super::{CONFLICT, FAILED, Good, NOT_FOUND, PROBLEMS, Said, Scratch, USAGE, ballast, line};
use blockstore::format::head::Head;
use blockstore::format::superblock::Superblock;
use blockstore::types::Gba;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// The copy ends the first extent: 256 MiB have 64 of 4 MiB.
const SECOND_SUPERBLOCK: u64 = (4 << 20) - 4096;

/// It ended by itself, with words or with what it shows.
#[track_caller]
fn in_words(said: &Said, codes: &[i32]) {
    assert!(said.code.is_some_and(|code| codes.contains(&code)), "{said:#?}");
    for bad in ["panicked", "RUST_BACKTRACE", "memory allocation"] {
        assert!(!said.stderr.contains(bad), "{said:#?}");
    }
    assert!(!said.stdout.is_empty() || !said.stderr.is_empty());
}

/// What the check and the repair must say, and that nothing is changed by anything.
#[track_caller]
fn is_judged(scratch: &Scratch, code: i32, words: &[&str]) {
    let (store, before) = (scratch.store(), scratch.content("store"));
    ballast(["store", "check", &store]).refused(code, words);
    ballast(["store", "check", "--data", &store, "--json"]).refused(code, &[]);
    ballast(["store", "repair", &store, "--yes"]).refused(code, words);
    ballast(["store", "repair", &store, "--dry-run"]).refused(code, words);
    for what in [
        "superblock",
        "gc",
        "hosts",
        "extents",
        "heads",
        "vdi x",
        "snapshots x",
        "0",
        "1",
        "77",
        "1023",
        "0xffffffffffffffff",
        "--offset 5000000",
    ] {
        for json in ["", "--json"] {
            let said = line(&format!("store dump {store} {what} {json}"));
            in_words(&said, &[0, FAILED, USAGE, NOT_FOUND, PROBLEMS]);
        }
    }
    assert!(scratch.content("store") == before, "the device was changed");
}

#[test]
fn what_is_no_whole_store_is_judged_with_words_and_left_alone() {
    let scratch = Scratch::new();
    let whole = scratch.content("store");
    let with = |content: &[u8]| std::fs::write(scratch.path("store"), content).unwrap();

    with(b"");
    is_judged(&scratch, FAILED, &["/store"]);
    // Bytes without any order, from a small generator.
    let mut word = 88_172_645_463_325_252_u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word.to_le_bytes()
    })
    .take(1 << 20)
    .flatten()
    .collect();
    with(&noise);
    is_judged(&scratch, NOT_FOUND, &["no Ballast store"]);
    for (at, magic, what) in [
        (0x438, &b"\x53\xef"[..], "ext4"),
        (0, b"QFI\xfb\0\0\0\x03", "qcow2"),
        (0x218, b"LVM2 001", "LVM"),
    ] {
        let mut image = vec![0; 8 << 20];
        image[at..at + magic.len()].copy_from_slice(magic);
        with(&image);
        is_judged(&scratch, NOT_FOUND, &["no Ballast store", what]);
    }
    // Cut within the tables, within the first extent, and later.
    for keep in [4096, 64 << 10, 2 << 20, 100 << 20] {
        with(&whole[..keep]);
        is_judged(&scratch, USAGE, &["cut short"]);
    }
    // Checksums that are right, of a store that is far larger than the device.
    let mut large = whole.clone();
    let head = Head::<Superblock>::decode(&large[..4096], Gba(0)).unwrap();
    let mut record = head.record.clone();
    record.device_size = 1 << 60;
    record.geometry.extent_count = record.geometry.extent_slots;
    for at in [0, SECOND_SUPERBLOCK] {
        let head = Head { record: record.clone(), ..head.clone() };
        let block = head.encode_block(Gba(at / 4096));
        large[at as usize..][..4096].copy_from_slice(&block);
    }
    with(&large);
    is_judged(&scratch, USAGE, &["cut short or this is another device"]);
    // Both superblocks rotten: the rest can be looked at.
    let mut rotten = whole;
    rotten[100] ^= 1;
    rotten[SECOND_SUPERBLOCK as usize + 100] ^= 1;
    with(&rotten);
    is_judged(&scratch, FAILED, &["both superblocks are damaged"]);
    let said = line(&format!("store dump {}", scratch.store()));
    assert_eq!(said.code, Some(PROBLEMS));
    assert_eq!(said.stdout.matches("DAMAGED: checksum is").count(), 2, "{said:#?}");
}

/// A store with a disk that was written, its agent gone in good order; path and URL.
fn written() -> (Good, String) {
    let mut good = Good::start();
    good.rig.agent().unwrap().drain().unwrap();
    let url = good.store();
    (good, url)
}

#[test]
fn a_store_is_shown_while_it_is_used_and_not_repaired() {
    let (mut good, url) = written();
    let name = good.ask(&["vdi", "list", "--json"]).json()[0]["name"].as_str().unwrap().to_owned();
    let shown = ballast(["store", "dump", &url, "vdi", &name, "--json"]).json();
    let root = shown["blocks"]
        .as_array()
        .unwrap()
        .iter()
        .find(|block| block["holds"].as_str().unwrap().starts_with("a node of level"));
    let root = root.expect("the root")["block"].as_u64().unwrap().to_string();
    let again = ballast(["store", "dump", &url, &root, "--who"]);
    assert!([Some(0), Some(PROBLEMS)].contains(&again.code), "{again:#?}");
    for what in ["superblock", "gc", "hosts", "extents", "heads"] {
        ballast(["store", "dump", &url, what]).done();
    }
    ballast(["store", "dump", &url, "vdi", "nobody"]).refused(NOT_FOUND, &["nobody"]);
    ballast(["store", "dump", &url, "nonsense"]).refused(USAGE, &["nonsense", "superblock"]);
    for how in ["--yes", "--dry-run"] {
        ballast(["store", "repair", &url, how])
            .refused(CONFLICT, &["in use by host", "SIGTERM", "--no-host-runs"]);
    }
    good.assert_unharmed();
}

#[test]
fn a_damaged_store_is_repaired_when_told_to() {
    let (mut good, url) = written();
    let path = url.strip_prefix("file:").unwrap().to_owned();
    drop(good.client);
    good.rig.shut_down().unwrap();
    // Of 512 MiB the first extent has 8.
    let copy = (8 << 20) - 4096;
    let store = File::options().read(true).write(true).open(&path).unwrap();
    store.write_all_at(&[0xff; 16], copy + 60).unwrap();
    let before = std::fs::read(&path).unwrap();
    ballast(["store", "repair", &url]).refused(USAGE, &["--yes", "--dry-run"]);
    let looked = ballast(["store", "repair", &url, "--dry-run", "--json"]);
    assert_eq!(looked.code, Some(PROBLEMS), "{looked:#?}");
    let looked: serde_json::Value = serde_json::from_str(&looked.stdout).unwrap();
    assert_eq!(looked["repairs"].as_array().unwrap().len(), 1, "{looked:#}");
    assert!(std::fs::read(&path).unwrap() == before, "a dry run changed something");
    let done = ballast(["store", "repair", &url, "--yes"]);
    assert!(done.done().contains("write the superblock at block 2047 anew"), "{done:#?}");
    ballast(["store", "check", "--data", &url]).done();
    let nothing = ballast(["store", "repair", &url, "--yes", "--json"]).json();
    assert_eq!(
        (nothing["repaired"].as_bool(), nothing["blocks_written"].as_u64()),
        (Some(false), Some(0))
    );
    // Agents are let in again.
    good.rig.start().unwrap();
    good.rig.shut_down().unwrap();
    good.rig.check_store().unwrap();
}
