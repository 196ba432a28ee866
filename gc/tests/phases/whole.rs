//! All schedules of each scope, with all rules: nothing is lost, and everything comes back.

use crate::rules::Rules;
use crate::scopes::{self, Scope};
use crate::{COLLECTS, Question, ROOM, explore};
use stateright::Checker;

/// With marks of both kinds.
fn whole(name: &str, scope: fn() -> Scope) {
    explore(&format!("{name}, a bit per block"), Rules::BITS, scope(), Question::All)
        .assert_properties();
    explore(&format!("{name}, pointers"), Rules::ALL, scope(), Question::All).assert_properties();
}

#[test]
fn commits() {
    whole("commits", scopes::commits);
}

#[test]
fn snapshots() {
    whole("snapshots", scopes::snapshots);
}

#[test]
fn claims() {
    whole("claims", scopes::claims);
}

#[test]
fn crashes() {
    whole("crashes", scopes::crashes);
}

#[test]
fn late_writes() {
    whole("late writes", scopes::late_writes);
}

#[test]
fn clones() {
    whole("clones", scopes::clones);
}

#[test]
fn clones_in_use() {
    whole("clones in use", scopes::clones_in_use);
}

#[test]
fn early_clones() {
    whole("early clones", scopes::early_clones);
}

#[test]
fn evictions() {
    whole("evictions", scopes::evictions);
}

/// G5: nobody waits for a leader that is dead.
#[test]
fn a_dead_leader_holds_nothing_up() {
    let full = scopes::full_beside_a_dead_leader;
    explore("room", Rules::ALL, full(), Question::Room).assert_any_discovery(ROOM);
    explore("next", Rules::ALL, scopes::after_a_dead_leader(), Question::All)
        .assert_any_discovery(COLLECTS);
    let rules = Rules { withdraw: false, ..Rules::ALL };
    assert!(
        explore("room, none taken back", rules, full(), Question::Room).discovery(ROOM).is_none()
    );
    let rules = Rules { any_leader: false, ..Rules::ALL };
    let checker =
        explore("next, none allowed", rules, scopes::after_a_dead_leader(), Question::All);
    assert!(checker.discovery(COLLECTS).is_none());
}
