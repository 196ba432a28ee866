//! Goal: the phases of collection lose nothing, whatever two hosts do, in whatever order, and wherever they die; everything comes back
//! (P6); and each rule (G1 to G5, those of C and H that concern collection) is needed.
//! Method: a small store, hosts, leader and late writes as a state machine; every schedule within a scope is tried (stateright, breadth
//! first). With all rules nothing is ever lost, and from every state two undisturbed cycles leave no garbage. With a rule taken out
//! the shortest schedule that loses something is found. `cargo test -p gc --test phases -- --nocapture` prints states and schedules.
//!
//! One host runs today. What the code does for it is the model's first form, marks of one bit per block ([`rules::Rules::BITS`]), with the other
//! host idle. What the model leaves out, and what many hosts need beyond the code: docs/garbage-collection.md, "the model".
//!
//! Read [`state`], then [`steps`] and [`collecting`], each function beside what it stands for:
//!
//! | step | in the code (`blockstore/src`, if nothing else is said) |
//! |---|---|
//! | `Begin` | `alloc/mod.rs`: `Allocator::allocate`, `note_in_flight`; `commit/publish.rs`: `prepare`, `build_image` |
//! | `Written` | `commit/publish.rs`: `barrier` |
//! | `HeadLands`, `HeadIsRefused` | `slot.rs`: `Records::swap`; `commit/publish.rs`: `swap_head`, `judge` |
//! | `Learn` | `commit/publish.rs`: `publish` from `settle` on; `root.rs`: `Root::retire` |
//! | `ReaderEnds` | `root.rs`: `Drop for Root`; `tree/reclaim.rs`: `discard`, `walk`; `alloc/mod.rs`: `Allocator::free` |
//! | `Claim` | `alloc/mod.rs`: `refill_now`; `alloc/pages/claim.rs`: `claim`; `alloc/pages.rs`: `take_up` |
//! | `CutAlone`, `DeleteSnapshot` | `commit/publish.rs`: a batch with a cut and no changes; `snapshots/change.rs`, `store/snapshots.rs`: `change_snapshots` |
//! | `Discard` | `commit/plan.rs`: a batch that zeroes the whole disk |
//! | `CloneFrom`, `Enter` | `store/snapshots.rs`: `clone_now`; `store/registry/creating.rs`: `enrol`, `take_place` |
//! | `LookAgain`, `Activate` | `store/registry/creating.rs`: `enrol`, from `refuse_lost_source` on |
//! | `Lead`, `Acknowledge` | `store/collecting.rs`: `begin_collection_now`; `alloc/cycle.rs`: `begin_cycle` |
//! | `LeadOn`, asking | `store/collecting.rs`: `begin_collection_now`, from the record's *mark* on |
//! | `LeadOn`, reading | `gc/src/collect.rs`: `collect`; `store/collecting.rs`: `roots`; `gc/src/reach.rs`: `mark` |
//! | `LeadOn`, to *sweep*, pages, *done* | `store/collecting.rs`: `sweep`, `note_window`, `reclaim_pages`, `go_to` |
//! | `EndQuarantine` | `alloc/cycle.rs`: `end_quarantine`, `end_cycle` |
//! | `Withdraw` | `alloc/cycle.rs`: `withdraw`; that the cycle ends with it: `check_cycle` |
//! | `Turn`, `Settle` | `store/collecting.rs`: `apply`; `eras.rs`: `turn`, `over` |
//! | `Apply` | `alloc/cycle.rs`: `apply`, `untouched`; `alloc/pages/apply.rs` |
//! | `ClaimExtent` | `alloc/pages/unused.rs`: `claim_extent`, of extents that hold nothing; with a page to apply: many hosts only |
//! | `Crash` | nothing of it; `Late*`: the device, see `device/sim/` |
//! | `Restart` | `store/open.rs`: `join`, `take_up_vdis`; that late writes die: `device/iscsi/reinstate.rs` |
//! | `Evict` | many hosts only |

mod collecting;
mod properties;
mod rules;
mod scopes;
mod state;
mod steps;
mod whole;
mod without;

use rules::Rules;
use scopes::Scope;
use state::State;
use stateright::{Checker, HasDiscoveries, Model, Property};
use steps::Step;

const SAFE: &str = "nothing reachable is freed or used anew";
const HEALS: &str = "two undisturbed cycles give everything back";
const COLLECTS: &str = "a cycle gives blocks back";
const ROOM: &str = "a full host goes on while a cycle hangs";

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    All,
    Safe,
    Room,
}

#[derive(Clone, Debug)]
struct Phases {
    rules: Rules,
    scope: Scope,
    question: Question,
}

impl Model for Phases {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        self.scope.initial.clone()
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        steps::possible(state, &self.rules, &self.scope, steps);
        collecting::possible(state, &self.rules, &self.scope, steps);
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        let mut next = state.clone();
        steps::take(&mut next, &self.rules, step);
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let safe = Property::always(SAFE, |_, state: &State| state.damage().is_none());
        let heals = Property::always(HEALS, |model: &Self, state| state.heals(&model.rules));
        let collects = Property::sometimes(COLLECTS, |_, state: &State| state.gave_back());
        let room = Property::sometimes(ROOM, |_, state: &State| state.is_room_made());
        match self.question {
            Question::All => vec![safe, heals, collects],
            Question::Safe => vec![safe],
            Question::Room => vec![room],
        }
    }
}

/// Tries every schedule within a scope.
fn explore(
    name: &str,
    rules: Rules,
    scope: Scope,
    question: Question,
) -> impl Checker<Phases> + use<> {
    let model = Phases { rules, scope, question };
    let started = std::time::Instant::now();
    let checker =
        model.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    println!(
        "{name}: {} states, {} steps, longest schedule {}, {:.1} s",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        started.elapsed().as_secs_f64()
    );
    checker
}
