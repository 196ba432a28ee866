//! The steps of collection: leader, acknowledgement, marking, sweep, and what owners apply.

use crate::rules::Rules;
use crate::scopes::Scope;
use crate::state::*;
use crate::steps::Step;

/// Steps of collection that are possible.
pub fn possible(state: &State, rules: &Rules, scope: &Scope, steps: &mut Vec<Step>) {
    let record = state.record;
    for host in (0..HOSTS).filter(|host| state.host(*host).up) {
        let own = state.host(host);
        if own.lead.is_some() {
            steps.push(Step::LeadOn(host));
        } else if state.left.cycles > 0
            && scope.leaders.contains(&host)
            && (rules.any_leader || record.epoch == 0 || record.leader == host)
        {
            steps.push(Step::Lead(host));
        }
        let asks = matches!(record.phase, Phase::Prepare | Phase::Mark);
        if asks && own.acknowledged < record.epoch {
            steps.push(Step::Acknowledge(host));
        }
        if let Some(cycle) = &own.cycle {
            of_cycle(state, rules, host, cycle, steps);
        }
        for extent in 0..EXTENTS {
            if may_apply(state, rules, host, extent) {
                steps.push(Step::Apply { host, extent });
            }
            if state.extents[extent as usize].owner.is_none() {
                steps.push(Step::ClaimExtent { host, extent });
            }
        }
    }
}

fn of_cycle(state: &State, rules: &Rules, host: Index, cycle: &Cycle, steps: &mut Vec<Step>) {
    let (record, own) = (state.record, state.host(host));
    let is_present = cycle.epoch == record.epoch;
    if !is_present || record.phase >= Phase::Sweep && cycle.quarantine.is_some() {
        steps.push(Step::EndQuarantine(host));
    }
    let needs = own.pool == 0 && cycle.quarantine.is_some_and(|kept| kept != 0);
    if needs && rules.withdraw {
        steps.push(Step::Withdraw(host));
    }
    if is_present && record.phase == Phase::Done && cycle.quarantine.is_none() {
        if !cycle.turned {
            steps.push(Step::Turn(host));
        } else if own.settled != cycle.epoch && !has_old_stay(own) {
            steps.push(Step::Settle(host));
        }
    }
}

fn has_old_stay(host: &Host) -> bool {
    let reader = host.reader.map(|reader| reader.stay);
    let commit = host.commit.filter(|commit| commit.stage != Stage::Writing);
    reader.into_iter().chain(commit.map(|commit| commit.stay)).any(|stay| stay.old)
}

/// Takes one of these steps.
pub fn take(state: &mut State, rules: &Rules, step: Step) {
    match step {
        Step::Lead(host) => lead(state, rules, host),
        Step::Acknowledge(host) => acknowledge(state, rules, host),
        Step::LeadOn(host) => lead_on(state, rules, host),
        Step::EndQuarantine(host) => {
            let epoch = state.record.epoch;
            let own = state.host_mut(host);
            if own.cycle.is_some_and(|cycle| cycle.epoch == epoch) {
                own.end_quarantine();
            } else {
                own.give_up();
            }
        }
        Step::Withdraw(host) => {
            let own = state.host_mut(host);
            own.withdrawn = own.cycle.map_or(0, |cycle| cycle.epoch);
            own.give_up();
        }
        Step::Turn(host) => turn(state.host_mut(host)),
        Step::Settle(host) => {
            let own = state.host_mut(host);
            own.settled = own.cycle.map_or(0, |cycle| cycle.epoch);
        }
        Step::Apply { host, extent } => apply(state, host, extent),
        Step::ClaimExtent { host, extent } => claim_extent(state, rules, host, extent),
        _ => unreachable!("no step of collection: {step:?}"),
    }
}

/// From here on the host notes what it touches, and says so in its record.
fn acknowledge(state: &mut State, rules: &Rules, host: Index) {
    let epoch = state.record.epoch;
    let own = state.host_mut(host);
    own.give_up();
    let mut touched = 0;
    if rules.touch_pool {
        touched |= own.pool;
    }
    if let Some(commit) = own.commit.filter(|_| rules.touch_in_flight) {
        touched |= bit(commit.tree.node);
    }
    own.acknowledged = epoch;
    own.cycle = Some(Cycle { epoch, touched, quarantine: Some(0), turned: false });
}

fn lead(state: &mut State, rules: &Rules, host: Index) {
    state.left.cycles -= 1;
    let epoch = state.record.epoch + 1;
    state.record = Record { epoch, phase: Phase::Prepare, leader: host };
    acknowledge(state, rules, host);
    state.host_mut(host).lead = Some(Lead {
        epoch,
        task: Task::Ask,
        extents: [None; 2],
        round: 0,
        seen: [(0, 0); 3],
        others: false,
        frontier: Vec::new(),
        known: Vec::new(),
        marks: 0,
    });
}

fn lead_on(state: &mut State, rules: &Rules, host: Index) {
    let Some(mut lead) = state.host_mut(host).lead.take() else { return };
    let is_ours = state.record.epoch == lead.epoch;
    let goes_on = match lead.task {
        Task::Ask if !is_ours => false,
        Task::Ask => ask(state, rules, &mut lead),
        Task::Read(slot) => {
            read_slot(state, rules, &mut lead, slot);
            true
        }
        Task::Nodes => read_node(state, rules, &mut lead),
        Task::Publish => is_ours && publish(state, rules, &mut lead),
        Task::Sweep(extent) => {
            if let Some(page) = page(&lead, extent) {
                state.pages[extent as usize] = Some(page);
            }
            lead.task = if extent + 1 < EXTENTS { Task::Sweep(extent + 1) } else { Task::Finish };
            true
        }
        Task::Finish => {
            if is_ours {
                state.record.phase = Phase::Done;
                return;
            }
            false
        }
    };
    let own = state.host_mut(host);
    if goes_on {
        own.lead = Some(lead);
    } else if own.cycle.is_some_and(|cycle| cycle.epoch == lead.epoch) {
        own.give_up();
    }
}

/// Who has acknowledged by now has a part in the cycle.
fn ask(state: &mut State, rules: &Rules, lead: &mut Lead) -> bool {
    let has_part = |host: &Host| host.takes_part(lead.epoch);
    if !rules.partial && !state.hosts.iter().all(has_part) {
        // It waits.
        return true;
    }
    for (number, extent) in state.extents.iter().enumerate() {
        let is_swept = extent.owner.is_none_or(|owner| has_part(state.host(owner)));
        lead.extents[number] = (is_swept || !rules.leave_out).then_some(extent.sequence);
    }
    (state.record.phase, lead.task) = (Phase::Mark, Task::Read(0));
    true
}

fn read_slot(state: &State, rules: &Rules, lead: &mut Lead, slot: Index) {
    let place = state.registry[slot as usize];
    let (sequence, identity) = lead.seen[slot as usize];
    lead.others |= identity != place.identity;
    if lead.round == 0 || sequence != place.sequence {
        let root = place.head.filter(|head| !head.creating || rules.creating_is_root);
        for tree in root.iter().flat_map(Head::trees) {
            reach(rules, lead, tree);
        }
    }
    lead.seen[slot as usize] = (place.sequence, place.identity);
    lead.task = if slot + 1 < SLOTS { Task::Read(slot + 1) } else { Task::Nodes };
    next_round(rules, lead);
}

fn reach(rules: &Rules, lead: &mut Lead, tree: Tree) {
    let is_known = match rules.pointers {
        true => lead.known.contains(&tree),
        false => lead.marks & bit(tree.node) != 0,
    };
    if is_known {
        return;
    }
    lead.marks |= bit(tree.node);
    lead.frontier.push(tree);
    lead.frontier.sort_unstable();
    if rules.pointers {
        lead.known.push(tree);
        lead.known.sort_unstable();
    }
}

fn read_node(state: &State, rules: &Rules, lead: &mut Lead) -> bool {
    let tree = lead.frontier.remove(0);
    let children = state.nodes[tree.node as usize];
    if rules.checksum && children != tree.children {
        return false;
    }
    lead.marks |= children;
    next_round(rules, lead);
    true
}

/// When all was read that was found.
fn next_round(rules: &Rules, lead: &mut Lead) {
    if lead.task != Task::Nodes || !lead.frontier.is_empty() {
        return;
    }
    let again = match lead.round {
        0 => rules.second_reading,
        _ => rules.readings_until_still && lead.others,
    };
    lead.task = if again { Task::Read(0) } else { Task::Publish };
    lead.others = false;
    lead.round += u8::from(again);
}

fn publish(state: &mut State, rules: &Rules, lead: &mut Lead) -> bool {
    if !rules.partial && !state.hosts.iter().all(|host| host.takes_part(lead.epoch)) {
        return false;
    }
    (state.record.phase, lead.task) = (Phase::Sweep, Task::Sweep(0));
    true
}

/// The reclaim page of an extent, if it is to have one.
pub fn page(lead: &Lead, extent: Index) -> Option<Page> {
    let sequence = lead.extents[extent as usize]?;
    let found = EXTENT_BLOCKS[extent as usize] & !lead.marks;
    Some(Page { epoch: lead.epoch, sequence, found })
}

/// Whoever reads, or has yet to free, what was cut off before now is waited for.
fn turn(host: &mut Host) {
    let reader = host.reader.as_mut().map(|reader| &mut reader.stay);
    let commit = host.commit.as_mut().filter(|commit| commit.stage != Stage::Writing);
    for stay in reader.into_iter().chain(commit.map(|commit| &mut commit.stay)) {
        stay.old = true;
    }
    let is_over = !has_old_stay(host);
    if let Some(cycle) = &mut host.cycle {
        cycle.turned = true;
        if is_over {
            host.settled = cycle.epoch;
        }
    }
}

fn may_apply(state: &State, rules: &Rules, host: Index, number: Index) -> bool {
    let (record, own) = (state.record, state.host(host));
    let extent = state.extents[number as usize];
    if extent.owner != Some(host) {
        return false;
    }
    let noted = own.cycle.filter(|cycle| cycle.epoch == record.epoch);
    if noted.is_none() && rules.own_incarnation {
        return false;
    }
    let stays = noted.is_none() || own.settled == record.epoch || !rules.own_stays;
    stays && others_settled(state, rules, host) && counts(state, rules, number)
}

fn others_settled(state: &State, rules: &Rules, host: Index) -> bool {
    let other = state.host(1 - host);
    let epoch = state.record.epoch;
    !rules.all_stays || !other.takes_part(epoch) || other.settled == epoch
}

/// Rule G2.
fn counts(state: &State, rules: &Rules, number: Index) -> bool {
    let extent = state.extents[number as usize];
    let done = if rules.done_only { Phase::Done } else { Phase::Sweep };
    let Some(page) = state.pages[number as usize] else { return false };
    state.record.phase >= done
        && (page.epoch == state.record.epoch || !rules.page_epoch)
        && (page.sequence == extent.sequence || !rules.page_extent)
        && (extent.swept < page.epoch || !rules.once)
}

fn apply(state: &mut State, host: Index, number: Index) {
    let epoch = state.record.epoch;
    let noted = state.host(host).cycle.filter(|cycle| cycle.epoch == epoch);
    clear(state, number, noted.map_or(0, |cycle| cycle.touched));
    outdate(state, host);
}

fn clear(state: &mut State, number: Index, touched: Blocks) {
    let Some(page) = state.pages[number as usize] else { return };
    state.allocated &= !(page.found & !touched);
    let extent = &mut state.extents[number as usize];
    (extent.swept, extent.sequence) = (page.epoch, extent.sequence + 1);
}

/// A host that had no part in this finds out by checksums that what it reads is gone.
fn outdate(state: &mut State, by: Index) {
    let epoch = state.record.epoch;
    let other = state.host_mut(1 - by);
    if other.takes_part(epoch) {
        return;
    }
    if let Some(reader) = &mut other.reader {
        reader.stay.outdated = true;
    }
    if let Some(commit) = &mut other.commit {
        commit.stay.outdated = true;
    }
}

/// The next owner of an extent applies its page before it allocates.
fn claim_extent(state: &mut State, rules: &Rules, host: Index, number: Index) {
    let (epoch, own) = (state.record.epoch, state.host(host));
    let settled = !rules.own_stays || !own.takes_part(epoch) || own.settled == epoch;
    if settled && others_settled(state, rules, host) && counts(state, rules, number) {
        let touched = own.cycle.map_or(0, |cycle| cycle.touched);
        clear(state, number, touched);
        outdate(state, host);
    }
    let generation = state.host(host).generation;
    let extent = &mut state.extents[number as usize];
    (extent.owner, extent.generation) = (Some(host), generation);
    extent.sequence += 1;
}
