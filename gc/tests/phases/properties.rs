//! What is to hold in every state.

use crate::collecting;
use crate::rules::Rules;
use crate::scopes::Scope;
use crate::state::*;
use crate::steps::{self, Step};

impl State {
    /// What of it is lost, or could be overwritten.
    pub fn damage(&self) -> Option<String> {
        self.lost_root().or_else(|| self.lost_flight()).or_else(|| self.lost_read())
    }

    /// A block that a root reaches is free, or used for something else.
    fn lost_root(&self) -> Option<String> {
        for (slot, place) in (0..).zip(&self.registry) {
            let Some(head) = &place.head else { continue };
            let looked = |host: &Host| {
                host.cloning.is_some_and(|cloning| cloning.slot == Some(slot) && cloning.looked)
            };
            if head.creating && !self.hosts.iter().any(looked) {
                // It may come to nothing.
                continue;
            }
            for tree in head.trees() {
                if let Some(what) = self.lost(tree) {
                    return Some(format!("disk {slot}: {what}"));
                }
            }
        }
        None
    }

    /// The same of what is written for a head.
    fn lost_flight(&self) -> Option<String> {
        for (number, host) in self.hosts.iter().enumerate() {
            if host.holds_free() & !self.allocated != 0 {
                return Some(format!("host {number} may use what the bitmap says is free"));
            }
            let Some(commit) = &host.commit else { continue };
            let node = Tree { node: commit.tree.node, children: 0 };
            if let Some(what) = self.taken(node) {
                return Some(format!("in flight on host {number}: {what}"));
            }
            if commit.stage != Stage::Writing && self.lost(commit.tree).is_some() {
                return Some(format!("the commit of host {number} is damaged"));
            }
        }
        None
    }

    /// The same of what is still read.
    fn lost_read(&self) -> Option<String> {
        for (number, host) in self.hosts.iter().enumerate() {
            let reader = host.reader.map(|reader| (reader.stay, reader.tree));
            let commit = host.commit.map(|commit| (commit.stay, commit.before));
            for (stay, tree) in reader.into_iter().chain(commit) {
                if let Some(tree) = tree.filter(|_| !stay.outdated)
                    && let Some(what) = self.lost(tree)
                {
                    return Some(format!("read by host {number}: {what}"));
                }
            }
        }
        None
    }

    fn lost(&self, tree: Tree) -> Option<String> {
        if self.nodes[tree.node as usize] != tree.children {
            return Some(format!("node {} was overwritten", tree.node));
        }
        self.taken(tree)
    }

    fn taken(&self, tree: Tree) -> Option<String> {
        let blocks = tree.blocks();
        if blocks & !self.allocated != 0 {
            return Some(format!("{tree:?} has free blocks"));
        }
        for (number, host) in self.hosts.iter().enumerate() {
            if blocks & host.holds_free() != 0 {
                return Some(format!("{tree:?} has blocks that host {number} may use"));
            }
            let commit = host.commit.filter(|commit| commit.tree.node != tree.node);
            if commit.is_some_and(|commit| blocks & bit(commit.tree.node) != 0) {
                return Some(format!("{tree:?} has a block that host {number} uses anew"));
            }
        }
        None
    }

    /// Blocks that are allocated, and of use to nobody.
    fn leaked(&self) -> Blocks {
        let heads = self.registry.iter().filter_map(|place| place.head);
        let reached = heads.flat_map(|head| head.trees().collect::<Vec<_>>());
        let used = reached.fold(0, |all, tree| all | tree.blocks());
        self.allocated & !self.hosts.iter().fold(used, |all, host| all | host.holds_free())
    }

    /// P6: from here, hosts that come back, finish what they do and collect twice give all back that nothing reaches.
    pub fn heals(&self, rules: &Rules) -> bool {
        let mut state = self.clone();
        for host in 0..HOSTS {
            state.come_to_rest(host, rules);
        }
        for _ in 0..2 {
            if !state.collect(rules) {
                return false;
            }
        }
        state.damage().is_none() && state.leaked() == 0
    }

    fn come_to_rest(&mut self, host: Index, rules: &Rules) {
        if !self.host(host).up {
            self.left.restarts = 1;
            steps::take(self, rules, Step::Restart(host));
        }
        self.late[host as usize] = Late::default();
        let own = self.host_mut(host);
        own.cloning = own.cloning.filter(|cloning| cloning.slot.is_some());
        if let Some(commit) = self.host(host).commit {
            let place = &self.registry[commit.slot as usize];
            let is_base = place.sequence == commit.base;
            if commit.stage == Stage::Writing {
                steps::take(self, rules, Step::Written(host));
            }
            match commit.stage {
                Stage::Landed => {}
                _ if is_base => steps::take(self, rules, Step::HeadLands(host)),
                _ => steps::take(self, rules, Step::HeadIsRefused(host)),
            }
            steps::take(self, rules, Step::Learn { host, is_read: false });
        }
        steps::take(self, rules, Step::ReaderEnds(host));
        if self.host(host).cloning.is_some() {
            steps::take(self, rules, Step::LookAgain(host));
            steps::take(self, rules, Step::Activate(host));
        }
    }

    /// A cycle that nothing disturbs. False if it comes to nothing.
    fn collect(&mut self, rules: &Rules) -> bool {
        // Leaders of before find out.
        for host in 0..HOSTS {
            self.host_mut(host).lead = None;
        }
        self.left.cycles = 1;
        collecting::take(self, rules, Step::Lead(0));
        collecting::take(self, rules, Step::Acknowledge(1));
        while self.host(0).lead.is_some() {
            collecting::take(self, rules, Step::LeadOn(0));
        }
        if self.record.phase != Phase::Done {
            return false;
        }
        for host in 0..HOSTS {
            collecting::take(self, rules, Step::EndQuarantine(host));
            collecting::take(self, rules, Step::Turn(host));
        }
        let mut options = Vec::new();
        loop {
            let scope = Scope::of(Vec::new());
            options.clear();
            collecting::possible(self, rules, &scope, &mut options);
            let next = options.iter().find(|step| {
                matches!(step, Step::Apply { .. } | Step::Settle(_) | Step::ClaimExtent { .. })
            });
            let Some(step) = next else { return true };
            collecting::take(self, rules, *step);
        }
    }
}

/// What is to be possible.
impl State {
    pub fn gave_back(&self) -> bool {
        self.extents.iter().any(|extent| extent.swept > 0) && self.allocated != 0xff
    }

    /// All commits have their block, and the cycle still hangs.
    pub fn is_room_made(&self) -> bool {
        self.left.commits == 0 && self.record.phase == Phase::Mark
    }
}
