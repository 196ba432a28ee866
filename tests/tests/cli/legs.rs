//! Caches that are not this machine's, and legs of a mirrored cache that are none: refused with both named, and nothing
//! written to either.

use super::{CONFLICT, Good, ballast};
use std::path::{Path, PathBuf};

/// A healthy mirrored cache that no agent uses: its legs.
fn legs(good: &mut Good) -> (PathBuf, PathBuf) {
    let (first, second) = (good.cache(), good.rig.dir().join("second.img"));
    good.rig.shut_down().unwrap();
    ballast(["cache", "replace", first.to_str().unwrap(), second.to_str().unwrap()]).done();
    (first, second)
}

#[track_caller]
fn refused(good: &mut Good, first: &Path, second: &Path, words: &[&str]) {
    refused_with(good, first, second, &[], words);
}

/// As [`refused`], for an agent that gets `more` arguments.
#[track_caller]
fn refused_with(good: &mut Good, first: &Path, second: &Path, more: &[&str], words: &[&str]) {
    let store = good.store();
    let store_file = store.trim_start_matches("file:").to_owned();
    let content = || [first, second, Path::new(&store_file)].map(|path| std::fs::read(path).ok());
    let before = content();
    let run = good.rig.dir().join("other");
    let mut arguments = vec!["agent", "--store", &store, "--run-dir", run.to_str().unwrap()];
    for leg in [first, second] {
        arguments.extend(["--cache", leg.to_str().unwrap()]);
    }
    arguments.extend_from_slice(more);
    let said = ballast(arguments);
    said.refused(said.code.filter(|code| *code != 0).unwrap_or(CONFLICT), words);
    assert!(content() == before, "something was written: {said:#?}");
}

#[test]
fn legs_that_are_no_pair_are_refused_and_left_alone() {
    let mut good = Good::start();
    let (first, second) = legs(&mut good);
    let dir = good.rig.dir().to_owned();
    let (a, b) = (first.to_str().unwrap().to_owned(), second.to_str().unwrap().to_owned());
    // The same file, by whatever name.
    refused(&mut good, &first, &first, &[&a, "same file"]);
    let (link, hard) = (dir.join("link"), dir.join("hard"));
    std::os::unix::fs::symlink(&first, &link).unwrap();
    std::fs::hard_link(&first, &hard).unwrap();
    for other in [&link, &hard] {
        refused(&mut good, &first, other, &[&a, other.to_str().unwrap(), "same file"]);
    }
    std::fs::remove_file(&hard).unwrap();
    // A copy of the same leg.
    let copy = dir.join("copy.img");
    std::fs::copy(&first, &copy).unwrap();
    refused(&mut good, &first, &copy, &[&a, copy.to_str().unwrap(), "copy"]);
    // A leg of another cache.
    let other = super::Scratch::new();
    let foreign = PathBuf::from(other.path("cache"));
    made(&other, &foreign);
    refused(&mut good, &first, &foreign, &[&a, foreign.to_str().unwrap(), "cannot be mirrored"]);
    // A leg smaller than its twin.
    let whole = std::fs::read(&second).unwrap();
    let short = std::fs::File::options().write(true).open(&second).unwrap();
    short.set_len(whole.len() as u64 - (1 << 20)).unwrap();
    let bytes = (whole.len() - (1 << 20)).to_string();
    refused(&mut good, &first, &second, &[&a, &b, &bytes, "full length"]);
    std::fs::write(&second, &whole).unwrap();
    // The pair is a pair still.
    good.rig.config().arguments = vec!["--cache".into(), b];
    good.rig.start().unwrap();
    good.client.reconnect(&mut good.rig).unwrap();
    good.works().unwrap();
    good.ask(&["cache", "drain"]).done();
    drop(good.client);
    good.rig.shut_down().unwrap();
    good.rig.check_store().unwrap();
}

#[test]
fn a_cache_of_another_machine_is_refused_until_it_is_adopted() {
    let mut good = Good::start();
    let (first, second) = legs(&mut good);
    let dir = good.rig.dir().to_owned();
    let other = dir.join("machine-id");
    std::fs::write(&other, "00000000000000000000000000000001\n").unwrap();
    let (a, b) = (first.to_str().unwrap().to_owned(), second.to_str().unwrap().to_owned());
    let there = ["--machine-id-file", other.to_str().unwrap()];
    let words = [&a, "belongs to the host on machine", "cache adopt"];
    refused_with(&mut good, &first, &second, &there, &words);
    // One leg alone: refused before it goes on without its twin.
    let words = ["belongs to the host on machine", "Nothing was changed"];
    refused_with(
        &mut good,
        &first,
        &dir.join("absent"),
        &[&there[..], &["--degraded"]].concat(),
        &words,
    );
    // Adopted, the disk is served there, with its identity; here no more.
    let adopt = |id: &[&str]| {
        let adopted = ballast([&["--json", "cache", "adopt", &a, &b], id].concat()).json();
        assert_eq!(adopted["vdis"].as_array().map(Vec::len), Some(1), "{adopted}");
        adopted["host"].clone()
    };
    let host = adopt(&there);
    refused(&mut good, &first, &second, &["belongs to the host on machine"]);
    good.rig.config().arguments = vec!["--cache".into(), b.clone()];
    good.rig.config().arguments.extend(there.map(String::from));
    good.rig.start().unwrap();
    good.client.reconnect(&mut good.rig).unwrap();
    good.works().unwrap();
    assert_eq!(good.ask(&["--json", "status"]).json()["agent"]["host_uuid"], host);
    good.ask(&["cache", "drain"]).done();
    let in_use = ballast(["cache", "adopt", &a, &b]);
    in_use.refused(CONFLICT, &["another process holds it"]);
    drop(good.client);
    good.rig.shut_down().unwrap();
    good.rig.check_store().unwrap();
}

/// Lets an agent make a cache, and ends it.
fn made(scratch: &super::Scratch, cache: &Path) {
    let config = bench::agent::AgentConfig {
        binary: bench::agent::find_binary().unwrap(),
        store: scratch.store(),
        cache: cache.to_owned(),
        cache_bytes: 64 << 20,
        dir: scratch.dir.path().to_owned(),
        arguments: Vec::new(),
        environment: Vec::new(),
        core: None,
    };
    let mut agent = bench::agent::Agent::start(&config).unwrap();
    agent.process_mut().terminate(std::time::Duration::from_secs(60)).unwrap();
}
