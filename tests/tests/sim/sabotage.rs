//! The simulator bites: each of a list of deliberate bugs is found within the seeds of an ordinary run, most within a hundred. With a bug, anything may happen
//! to the code under test; any panic of a run counts as found, and so does a run that does not end.
//!
//! `SIM_BUG=Name` tries one of them.

use crate::{variable, words_of, world};
use blockstore::sabotage::{ALL, Bug, set};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

/// Seeds within which a bug must be found.
const SEEDS_MAX: u64 = 1000;
/// Requests per seed.
const REQUESTS: u64 = 10_000;

/// The first seed that finds the bug, with what it says. It must be clean without the bug.
fn hunt(bug: Bug) -> Option<(u64, String)> {
    let requests = variable("SIM_REQUESTS", REQUESTS);
    let run = |seed: u64, bug: Option<Bug>| {
        set(bug);
        let outcome = catch_unwind(AssertUnwindSafe(|| world::run(seed, requests)));
        set(None);
        outcome.err().map(|panic| words_of(&*panic))
    };
    (1..=SEEDS_MAX).find_map(|seed| {
        let words = run(seed, Some(bug))?;
        run(seed, None).is_none().then_some((seed, words))
    })
}

#[test]
fn every_deliberate_bug_is_found() {
    let wanted = std::env::var("SIM_BUG").ok();
    let bugs =
        ALL.into_iter().filter(|bug| wanted.as_ref().is_none_or(|w| *w == format!("{bug:?}")));
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
                    let found = hunt(bug);
                    let took = began.elapsed().as_secs_f64();
                    match found {
                        Some((seed, words)) => {
                            let words: String = words.chars().take(140).collect();
                            eprintln!("{bug:?}: seed {seed}, {took:.1} s: {words}");
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
    assert!(missed.is_empty(), "not found within {SEEDS_MAX} seeds: {missed:?}");
}
