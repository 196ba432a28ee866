//! What is left of a pass that did not come to its end, and who goes on with it.

use super::*;
use serde_json::json;
use std::path::Path;
use uuid::Uuid;

/// A pass that has come to the turn of a disk.
fn at(disk: Option<u128>) -> Saved {
    let mut saved = serde_json::to_value(Saved::default()).unwrap();
    let position = disk.map(|disk| json!({ "disk": Uuid::from_u128(disk), "tree": null }));
    saved["position"] = json!(position);
    serde_json::from_value(saved).unwrap()
}

fn read(run_dir: &Path) -> Note {
    Note::read(run_dir, Uuid::from_u128(1))
}

/// A pass is under way that this agent began at one place, and that has come to another.
fn running(run_dir: &Path, from: Option<u128>, now: Option<u128>) -> State {
    let progress = Arc::new(ScrubProgress::from(at(now)));
    let (from, stop) = (at(from).position, Arc::new(Notify::new()));
    let running = Running { id: 7, began: 5, resumed: false, from, progress, stop };
    State { running: Some(running), note: Some(read(run_dir)), ..State::default() }
}

fn failed() -> Result<(), String> {
    Err("the agent failed inside".into())
}

#[test]
fn a_pass_that_fails_goes_on_where_it_was_once_it_is_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut state = running(dir.path(), None, Some(3));
    state.end(7, failed(), false, dir.path());
    let left = Begun { at: 5, saved: at(Some(3)) };
    assert_eq!(read(dir.path()).begun.as_ref(), Some(&left), "the next agent has it, too");
    assert!(read(dir.path()).last.is_some_and(|last| last.failure.is_some() && !last.stopped));
    assert_eq!(state.due(false, false), None, "not at once");
    assert_eq!(state.due(false, true), Some(Some(left.clone())));
    assert_eq!(state.due(true, false), Some(Some(left)), "an agent that starts");
    // People may give it up.
    assert!(state.stop(dir.path()) && !state.stop(dir.path()));
    assert_eq!(read(dir.path()).begun, None);
    assert_eq!((state.due(true, false), state.due(false, true)), (None, Some(None)));
}

#[test]
fn what_is_over_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for (from, now) in [(None, Some(3)), (Some(2), Some(3))] {
        let mut state = running(dir.path(), from, now);
        state.end(7, Ok(()), false, dir.path());
        assert_eq!(read(dir.path()).begun, None, "it came to its end");
        let mut state = running(dir.path(), from, now);
        assert!(state.stop(dir.path()));
        assert_eq!(read(dir.path()).begun, None, "people gave it up");
        let mut state = running(dir.path(), from, now);
        state.end(6, failed(), false, dir.path());
        assert!(state.running.is_some(), "that was another one");
    }
    // Twice at the same place: then anew.
    for same in [None, Some(3)] {
        let mut state = running(dir.path(), same, same);
        state.end(7, failed(), false, dir.path());
        assert_eq!(read(dir.path()).begun, None);
        assert_eq!(state.due(false, true), Some(None));
    }
}
