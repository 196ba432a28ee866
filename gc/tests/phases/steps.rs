//! What hosts do beside collection: commits, snapshots, clones, claims; death, return, and what lands late.

use crate::collecting;
use crate::rules::Rules;
use crate::scopes::Scope;
use crate::state::*;

/// What a commit does to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A new node over the same data.
    Rewrite,
    /// A new node, and the data is discarded.
    Drop,
    /// A new node, and it is a snapshot, too.
    Cut,
}

/// One step. `main.rs` says which function of the code each stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Begin { host: Index, slot: Index, block: Gba, kind: Kind },
    Written(Index),
    HeadLands(Index),
    HeadIsRefused(Index),
    Learn { host: Index, is_read: bool },
    ReaderEnds(Index),
    Claim(Index),
    CutAlone(Index),
    Discard(Index),
    DeleteSnapshot(Index),
    CloneFrom { host: Index, source: Index, tree: Tree },
    Enter { host: Index, slot: Index },
    LookAgain(Index),
    Activate(Index),
    Lead(Index),
    Acknowledge(Index),
    LeadOn(Index),
    EndQuarantine(Index),
    Withdraw(Index),
    Turn(Index),
    Settle(Index),
    Apply { host: Index, extent: Index },
    ClaimExtent { host: Index, extent: Index },
    Crash(Index),
    Restart(Index),
    Evict(Index),
    LateNode(Index),
    LateHead(Index),
    LatePage(Index),
}

/// Steps of disks that are possible.
pub fn possible(state: &State, rules: &Rules, scope: &Scope, steps: &mut Vec<Step>) {
    for host in 0..HOSTS {
        if state.host(host).up {
            commits(state, scope, host, steps);
            clones(state, rules, scope, host, steps);
            if state.territory(host) & !state.allocated != 0 {
                steps.push(Step::Claim(host));
            }
            if state.left.crashes > 0 {
                steps.push(Step::Crash(host));
            }
            continue;
        }
        if state.left.restarts > 0 {
            steps.push(Step::Restart(host));
        }
        if state.left.evictions > 0 {
            steps.push(Step::Evict(host));
        }
    }
    for slot in 0..SLOTS {
        snapshots(state, slot, steps);
    }
    for (late, host) in state.late.iter().zip(0..) {
        steps.extend(late.node.map(|_| Step::LateNode(host)));
        steps.extend(late.head.map(|_| Step::LateHead(host)));
        steps.extend(late.page.map(|_| Step::LatePage(host)));
    }
}

fn commits(state: &State, scope: &Scope, host: Index, steps: &mut Vec<Step>) {
    let own = state.host(host);
    if own.reader.is_some() {
        steps.push(Step::ReaderEnds(host));
    }
    if let Some(commit) = &own.commit {
        let is_base = state.registry[commit.slot as usize].sequence == commit.base;
        match commit.stage {
            Stage::Writing => steps.push(Step::Written(host)),
            Stage::Heading if is_base => steps.push(Step::HeadLands(host)),
            Stage::Heading => steps.push(Step::HeadIsRefused(host)),
            Stage::Landed => {
                steps.push(Step::Learn { host, is_read: false });
                if own.reader.is_none() && state.left.readers > 0 {
                    steps.push(Step::Learn { host, is_read: true });
                }
            }
        }
        return;
    }
    if state.left.commits == 0 {
        return;
    }
    for slot in 0..SLOTS {
        let Some(head) = state.head(slot).filter(|head| head.owner == host && !head.creating)
        else {
            continue;
        };
        let Some(tree) = head.tree else { continue };
        for block in each(own.pool) {
            let mut begin = |kind| steps.push(Step::Begin { host, slot, block, kind });
            begin(Kind::Rewrite);
            if scope.drops && tree.children != 0 {
                begin(Kind::Drop);
            }
            if state.left.cuts > 0 && head.snapshot.is_none() {
                begin(Kind::Cut);
            }
        }
    }
}

/// Changes of heads for which nothing is allocated.
fn snapshots(state: &State, slot: Index, steps: &mut Vec<Step>) {
    let Some(head) = state.head(slot).filter(|head| !head.creating) else { return };
    let owner = state.host(head.owner);
    if !owner.up || owner.commit.is_some_and(|commit| commit.slot == slot) {
        return;
    }
    if state.left.deletions > 0 {
        if head.snapshot.is_some() {
            steps.push(Step::DeleteSnapshot(slot));
        }
        if head.tree.is_some() {
            steps.push(Step::Discard(slot));
        }
    }
    if state.left.cuts > 0 && head.snapshot.is_none() && head.tree.is_some() {
        steps.push(Step::CutAlone(slot));
    }
}

fn clones(state: &State, rules: &Rules, scope: &Scope, host: Index, steps: &mut Vec<Step>) {
    let own = state.host(host);
    let Some(cloning) = &own.cloning else {
        if state.left.clones == 0 || !scope.cloners.contains(&host) {
            return;
        }
        for source in 0..SLOTS {
            let head = state.head(source).filter(|head| !head.creating);
            let committed = head.and_then(|head| head.snapshot);
            let in_log =
                own.commit.filter(|commit| commit.slot == source && !rules.clone_committed);
            let in_log = in_log.and_then(|commit| commit.next.snapshot);
            for tree in committed.into_iter().chain(in_log) {
                steps.push(Step::CloneFrom { host, source, tree });
            }
        }
        return;
    };
    match cloning.slot {
        None => {
            let free = (0..SLOTS).filter(|slot| state.head(*slot).is_none());
            steps.extend(free.map(|slot| Step::Enter { host, slot }));
        }
        Some(_) if !cloning.looked => steps.push(Step::LookAgain(host)),
        Some(_) => steps.push(Step::Activate(host)),
    }
}

/// Takes any step.
pub fn take(state: &mut State, rules: &Rules, step: Step) {
    match step {
        Step::Begin { host, slot, block, kind } => begin(state, rules, host, slot, block, kind),
        Step::Written(host) => written(state, rules, host),
        Step::HeadLands(host) => head_lands(state, host),
        Step::HeadIsRefused(host) => {
            if let Some(commit) = state.host_mut(host).commit.take() {
                state.free(host, bit(commit.tree.node), rules.touch_freed, rules.quarantine);
            }
        }
        Step::Learn { host, is_read } => learn(state, rules, host, is_read),
        Step::ReaderEnds(host) => {
            if let Some(reader) = state.host_mut(host).reader.take() {
                state.free(host, reader.garbage, rules.touch_freed, rules.quarantine);
            }
        }
        Step::Claim(host) => claim(state, rules, host),
        Step::CutAlone(slot) => {
            state.left.cuts -= 1;
            change(state, slot, |head| {
                head.snapshot = head.tree;
                if rules.births {
                    head.own = 0;
                }
            });
        }
        Step::DeleteSnapshot(slot) => {
            state.left.deletions -= 1;
            change(state, slot, |head| head.snapshot = None);
        }
        Step::Discard(slot) => discard(state, rules, slot),
        Step::CloneFrom { host, source, tree } => {
            state.left.clones -= 1;
            state.host_mut(host).cloning =
                Some(Cloning { source, tree, slot: None, looked: false });
        }
        Step::Enter { host, slot } => enter(state, rules, host, slot),
        Step::LookAgain(host) => look_again(state, rules, host),
        Step::Activate(host) => {
            let slot = state.host_mut(host).cloning.take().and_then(|cloning| cloning.slot);
            slot.into_iter().for_each(|slot| change(state, slot, |head| head.creating = false));
        }
        Step::Crash(host) => crash(state, host),
        Step::Restart(host) => restart(state, rules, host),
        Step::Evict(host) => evict(state, host),
        Step::LateNode(host) => {
            if let Some(tree) = state.late[host as usize].node.take() {
                state.nodes[tree.node as usize] = tree.children;
            }
        }
        Step::LateHead(host) => {
            if let Some((slot, base, head)) = state.late[host as usize].head.take() {
                state.swap(slot, base, Some(head));
            }
        }
        Step::LatePage(host) => {
            if let Some((extent, page)) = state.late[host as usize].page.take() {
                state.pages[extent as usize] = Some(page);
            }
        }
        _ => collecting::take(state, rules, step),
    }
}

/// A compare-and-write that nobody can have come before.
fn change(state: &mut State, slot: Index, with: impl FnOnce(&mut Head)) {
    let place = state.registry[slot as usize];
    if let Some(mut head) = place.head {
        with(&mut head);
        state.swap(slot, place.sequence, Some(head));
    }
}

fn begin(state: &mut State, rules: &Rules, host: Index, slot: Index, block: Gba, kind: Kind) {
    let place = state.registry[slot as usize];
    let Some((head, old)) = place.head.and_then(|head| Some((head, head.tree?))) else { return };
    let kept = if kind == Kind::Drop { 0 } else { old.children };
    let tree = Tree { node: block, children: kept };
    let garbage = old.blocks() & !kept & head.own;
    let mut next = Head { tree: Some(tree), own: head.own & !garbage | bit(block), ..head };
    if kind == Kind::Cut {
        state.left.cuts -= 1;
        next.snapshot = Some(tree);
        if rules.births {
            next.own = 0;
        }
    }
    state.left.commits -= 1;
    let own = state.host_mut(host);
    own.pool &= !bit(block);
    let (base, before) = (place.sequence, head.tree);
    let (stage, stay) = (Stage::Writing, Stay::default());
    own.commit = Some(Commit { slot, base, before, tree, next, stage, stay, garbage });
}

fn written(state: &mut State, rules: &Rules, host: Index) {
    let Some(commit) = &mut state.host_mut(host).commit else { return };
    commit.stage = Stage::Heading;
    let tree = commit.tree;
    let early = if rules.free_after { 0 } else { std::mem::take(&mut commit.garbage) };
    state.nodes[tree.node as usize] = tree.children;
    state.free(host, early, rules.touch_freed, rules.quarantine);
}

fn head_lands(state: &mut State, host: Index) {
    let Some(commit) = &mut state.host_mut(host).commit else { return };
    commit.stage = Stage::Landed;
    let (slot, base, next) = (commit.slot, commit.base, commit.next);
    state.swap(slot, base, Some(next));
}

fn learn(state: &mut State, rules: &Rules, host: Index, is_read: bool) {
    let Some(commit) = state.host_mut(host).commit.take() else { return };
    let Commit { slot, before: tree, garbage, stay, .. } = commit;
    if is_read {
        state.left.readers -= 1;
        state.host_mut(host).reader = Some(Reader { slot, tree, garbage, stay });
    } else {
        retire(state, rules, host, slot, garbage);
    }
}

/// What a commit cut off is free when no older tree of its disk is read any more.
fn retire(state: &mut State, rules: &Rules, host: Index, slot: Index, garbage: Blocks) {
    let reader = state.host_mut(host).reader.as_mut();
    match reader.filter(|reader| reader.slot == slot) {
        Some(reader) => reader.garbage |= garbage,
        None => state.free(host, garbage, rules.touch_freed, rules.quarantine),
    }
}

fn claim(state: &mut State, rules: &Rules, host: Index) {
    let clear = state.territory(host) & !state.allocated;
    let generation = state.host(host).generation;
    for (extent, blocks) in state.extents.iter_mut().zip(EXTENT_BLOCKS) {
        if clear & blocks != 0 && extent.generation != generation {
            (extent.generation, extent.sequence) = (generation, extent.sequence + 1);
        }
    }
    state.allocated |= clear;
    let own = state.host_mut(host);
    own.pool |= clear;
    if let Some(cycle) = own.cycle.as_mut().filter(|_| rules.touch_claimed) {
        cycle.touched |= clear;
    }
}

/// The whole disk is zeroed: no block is needed for that.
fn discard(state: &mut State, rules: &Rules, slot: Index) {
    state.left.deletions -= 1;
    let Some(head) = state.head(slot).copied() else { return };
    let garbage = head.tree.map_or(0, Tree::blocks) & head.own;
    change(state, slot, |head| (head.tree, head.own) = (None, 0));
    retire(state, rules, head.owner, slot, garbage);
}

fn enter(state: &mut State, rules: &Rules, host: Index, slot: Index) {
    let Some(cloning) = &mut state.host_mut(host).cloning else { return };
    cloning.slot = Some(slot);
    let tree = cloning.tree;
    let own = if rules.births { 0 } else { tree.blocks() };
    let head = Head { owner: host, creating: true, tree: Some(tree), own, snapshot: None };
    let sequence = state.registry[slot as usize].sequence;
    state.swap(slot, sequence, Some(head));
}

fn look_again(state: &mut State, rules: &Rules, host: Index) {
    let own = state.host(host);
    let Some(Cloning { source, tree, slot: Some(slot), .. }) = own.cloning else { return };
    let there = state.head(source).is_some_and(|head| head.snapshot == Some(tree));
    let in_log = own.commit.is_some_and(|commit| commit.next.snapshot == Some(tree));
    if there || !rules.look_again || in_log && !rules.clone_committed {
        state.host_mut(host).cloning =
            Some(Cloning { source, tree, slot: Some(slot), looked: true });
    } else {
        let sequence = state.registry[slot as usize].sequence;
        state.swap(slot, sequence, None);
        state.host_mut(host).cloning = None;
    }
}

fn crash(state: &mut State, host: Index) {
    state.left.crashes -= 1;
    let own = state.host_mut(host);
    let mut late = Late::default();
    match own.commit.take() {
        Some(commit) if commit.stage == Stage::Writing => late.node = Some(commit.tree),
        Some(commit) if commit.stage == Stage::Heading => {
            late.head = Some((commit.slot, commit.base, commit.next));
        }
        _ => {}
    }
    if let Some(lead) = own.lead.take()
        && let Task::Sweep(extent) = lead.task
    {
        late.page = collecting::page(&lead, extent).map(|page| (extent, page));
    }
    (own.up, own.pool, own.reader, own.cloning, own.cycle) = (false, 0, None, None, None);
    state.late[host as usize] = late;
}

fn restart(state: &mut State, rules: &Rules, host: Index) {
    state.left.restarts -= 1;
    let own = state.host_mut(host);
    (own.up, own.generation) = (true, own.generation + 1);
    let late = &mut state.late[host as usize];
    if rules.reinstate {
        (late.node, late.page) = (None, None);
    }
    for slot in 0..SLOTS {
        let place = state.registry[slot as usize];
        let Some(head) = place.head.filter(|head| head.owner == host && rules.raise_heads) else {
            continue;
        };
        state.swap(slot, place.sequence, Some(head).filter(|head| !head.creating));
    }
}

/// The operator says that it is dead, and it is fenced: its disks go to the other host, its extents to nobody.
fn evict(state: &mut State, host: Index) {
    state.left.evictions -= 1;
    state.late[host as usize] = Late::default();
    for slot in 0..SLOTS {
        if state.head(slot).is_some_and(|head| head.owner == host) {
            change(state, slot, |head| head.owner = 1 - host);
        }
    }
    for extent in state.extents.iter_mut().filter(|extent| extent.owner == Some(host)) {
        (extent.owner, extent.sequence) = (None, extent.sequence + 1);
    }
}
