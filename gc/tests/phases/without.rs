//! Each rule taken out: there is a schedule that loses something, and the checker finds it.

use crate::rules::Rules;
use crate::scopes::{self, Scope};
use crate::{Question, SAFE, explore};
use stateright::Checker;

/// The shortest schedule that loses something.
fn loses(rule: &str, rules: Rules, scope: fn() -> Scope) {
    let checker = explore(&format!("without {rule}"), rules, scope(), Question::Safe);
    let Some(path) = checker.discovery(SAFE) else { panic!("nothing is lost without {rule}") };
    let damage = path.last_state().damage().unwrap_or_default();
    println!("    {damage}, after {:?}", path.into_actions());
}

/// Other rules do for it within these bounds.
fn is_safe(rule: &str, rules: Rules, scope: fn() -> Scope) {
    let checker = explore(&format!("without {rule}"), rules, scope(), Question::Safe);
    checker.assert_no_discovery(SAFE);
}

const BITS: Rules = Rules::BITS;
const ALL: Rules = Rules::ALL;

#[test]
fn g1_what_a_host_touches_is_its_own() {
    loses("in flight", Rules { touch_in_flight: false, ..BITS }, scopes::commits);
    loses("in the pool", Rules { touch_pool: false, ..BITS }, scopes::commits);
    loses("claimed", Rules { touch_claimed: false, ..BITS }, scopes::claims);
    loses("freed", Rules { touch_freed: false, ..BITS }, scopes::commits);
    loses(
        "an acknowledgement before the marking",
        Rules { leave_out: false, ..ALL },
        scopes::commits,
    );
}

#[test]
fn g2_applied_once_by_the_right_hands() {
    loses("own incarnation", Rules { own_incarnation: false, ..BITS }, scopes::crashes);
    loses("the page's epoch", Rules { page_epoch: false, ..BITS }, scopes::crashes);
    loses("the extent's sequence", Rules { page_extent: false, ..ALL }, scopes::evictions);
    for scope in [scopes::late_writes, scopes::evictions] {
        is_safe("the sweep epoch", Rules { once: false, ..ALL }, scope);
        is_safe("waiting for done", Rules { done_only: false, ..ALL }, scope);
    }
}

#[test]
fn g3_roots_are_read_again() {
    loses("the second reading", Rules { second_reading: false, ..BITS }, scopes::clones);
    loses("a third reading", Rules { readings_until_still: false, ..BITS }, scopes::clones);
    loses("disks in creation", Rules { creating_is_root: false, ..BITS }, scopes::clones);
    loses("a look at the source", Rules { look_again: false, ..BITS }, scopes::clones);
}

#[test]
fn g4_a_bit_stands_for_one_content() {
    loses("the quarantine", Rules { quarantine: false, ..BITS }, scopes::clones_in_use);
    loses("all hosts' part", Rules { partial: true, ..BITS }, scopes::clones_in_use);
    is_safe("quarantine, with pointers", Rules { quarantine: false, ..ALL }, scopes::clones_in_use);
    // A second reading sees most of what a node that is not what it was leads to.
    let once = Rules { second_reading: false, ..ALL };
    is_safe("a second reading where nobody clones", once, scopes::commits);
    loses("checksums, nor a second reading", Rules { checksum: false, ..once }, scopes::commits);
}

#[test]
fn c_heads_births_and_late_writes() {
    loses("raising heads (C2)", Rules { raise_heads: false, ..BITS }, scopes::crashes);
    loses("freeing afterwards (C3)", Rules { free_after: false, ..BITS }, scopes::commits);
    loses("births (C4)", Rules { births: false, ..BITS }, scopes::snapshots);
    loses("reinstatement (C5, H1)", Rules { reinstate: false, ..BITS }, scopes::late_writes);
    loses(
        "a committed source (H3)",
        Rules { clone_committed: false, ..BITS },
        scopes::early_clones,
    );
}

#[test]
fn g_who_still_reads_is_waited_for() {
    loses("own stays", Rules { own_stays: false, ..BITS }, scopes::commits);
    loses("other hosts' stays", Rules { all_stays: false, ..BITS }, scopes::commits);
}
