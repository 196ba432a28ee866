//! The simulator bites: each of a list of deliberate bugs is found within the first hundred seeds of an ordinary run, but for
//! those in [`RARE`] and [`OF_SOME`]. With a bug, anything may happen to the code under test; any panic of a run counts as found, and so does
//! a run that does not end.
//!
//! `SIM_BUG=Name,Name` tries some of them, `SIM_FIRST_SEED=F` begins there. `SIM_COUNT=1` tries all those seeds and tells how
//! many find the bug.

use crate::{variable, words_of, world};
use blockstore::sabotage::{ALL, Bug, set};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

/// Seeds within which a bug must be found.
const SEEDS_MAX: u64 = 100;
/// Bugs that take more, and how many seeds they may take. `StaleFill`: a block must be changed, committed and forgotten while one
/// late reply to a read of it is under way, and then be read once more before anything else happens to it. `SkipTailMend`: the
/// end of the log must differ between the legs, and the one that has more be lost before anything covers that end.
const RARE: [(Bug, u64); 2] = [(Bug::StaleFill, 1000), (Bug::SkipTailMend, 200)];
/// Those that only some seeds can find: of these so many as there are among so many seeds.
const OF_SOME: [(Bug, u64, Seeds); 18] = [
    (Bug::CloneOwnsShared, 400, world::serves_clones),
    (Bug::CloneBeyondSnapshot, 400, world::serves_clones),
    (Bug::LendBeyondSnapshot, 400, world::serves_clones),
    (Bug::CloneTwice, 400, world::serves_clones),
    (Bug::CloneTakesName, 400, takes_names),
    (Bug::RenameUnnoted, 400, takes_names),
    (Bug::GiveUpUnnoted, 400, gives_up),
    (Bug::GiveUpKeepsSegments, 400, gives_up),
    (Bug::DetachUnnoted, 400, detaches),
    (Bug::RollbackOwnsSnapshot, 400, rolls_back),
    (Bug::RollbackWithoutLsn, 400, rolls_back),
    (Bug::ScrubBelievesFirstLook, 400, world::is_scrubbed),
    (Bug::ScrubSkipsBeside, 400, world::is_scrubbed),
    (Bug::ScrubNotesAhead, 400, world::is_scrubbed),
    (Bug::ScrubStaysAway, 400, world::is_scrubbed),
    (Bug::LabelOfNeighbour, 400, world::has_labels),
    (Bug::PendingLabelsShift, 400, world::has_labels),
    (Bug::DeleteHeld, 400, world::shows_snapshots),
];
/// Requests per seed.
const REQUESTS: u64 = 10_000;

/// What the seeds say of a bug.
#[derive(Debug, Default)]
struct Found {
    /// The first seed that finds it and is clean without it, and its words.
    first: Option<(u64, String)>,
    /// Seeds that find it, of those that were run.
    seeds: u32,
}

/// Those seeds.
type Seeds = fn(u64) -> bool;

/// Seeds within which this bug must be found.
fn seeds_max(bug: Bug) -> u64 {
    let of_some = OF_SOME.iter().map(|(bug, seeds, _)| (bug, seeds));
    let mut others = RARE.iter().map(|(bug, seeds)| (bug, seeds)).chain(of_some);
    others.find(|(other, _)| **other == bug).map_or(SEEDS_MAX, |(_, seeds)| *seeds)
}

fn takes_names(seed: u64) -> bool {
    world::parts_of(seed).takes_names
}

fn gives_up(seed: u64) -> bool {
    world::parts_of(seed).gives_up
}

fn detaches(seed: u64) -> bool {
    world::parts_of(seed).detaches
}

fn rolls_back(seed: u64) -> bool {
    world::parts_of(seed).rolls_back
}

/// This seed may find this bug.
fn applies(bug: Bug, seed: u64) -> bool {
    let mut of_some = OF_SOME.iter();
    of_some.find(|(other, ..)| *other == bug).is_none_or(|(.., seeds)| seeds(seed))
}

fn hunt(bug: Bug, count: bool) -> Found {
    let requests = variable("SIM_REQUESTS", REQUESTS);
    let run = |seed: u64, bug: Option<Bug>| {
        set(bug);
        let outcome = catch_unwind(AssertUnwindSafe(|| world::run(seed, requests)));
        set(None);
        outcome.err().map(|panic| words_of(&*panic))
    };
    let mut found = Found::default();
    let seeds = variable("SIM_FIRST_SEED", 1)..=seeds_max(bug);
    for seed in seeds.filter(|seed| applies(bug, *seed)) {
        let Some(words) = run(seed, Some(bug)) else { continue };
        found.seeds += 1;
        if found.first.is_none() && run(seed, None).is_none() {
            found.first = Some((seed, words));
        }
        if found.first.is_some() && !count {
            break;
        }
    }
    found
}

#[test]
fn every_deliberate_bug_is_found() {
    let wanted = std::env::var("SIM_BUG").ok();
    let is_wanted = |bug: &Bug| {
        let name = format!("{bug:?}");
        wanted.as_ref().is_none_or(|wanted| wanted.split(',').any(|w| w == name))
    };
    let count = variable("SIM_COUNT", 0) > 0;
    let bugs = ALL.into_iter().filter(is_wanted);
    let bugs = Mutex::new(bugs);
    let missed = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::panic::set_hook(Box::new(|_| {}));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let next = bugs.lock().expect("no one panics with it").next();
                    let Some(bug) = next else { return };
                    let began = std::time::Instant::now();
                    let Found { first, seeds } = hunt(bug, count);
                    let took = began.elapsed().as_secs_f64();
                    match first {
                        Some((seed, words)) => {
                            let words: String = words.chars().take(140).collect();
                            let of = if count {
                                format!(", {seeds} of {}", seeds_max(bug))
                            } else {
                                String::new()
                            };
                            eprintln!("{bug:?}: seed {seed}{of}, {took:.1} s: {words}");
                        }
                        None => {
                            eprintln!("{bug:?}: NOT FOUND, {took:.1} s");
                            missed.lock().expect("no one panics with it").push(bug);
                        }
                    }
                }
            });
        }
    });
    let _ = std::panic::take_hook();
    let missed = missed.into_inner().expect("all threads are done");
    assert!(missed.is_empty(), "not found in time: {missed:?}");
}
