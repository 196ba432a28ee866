//! The rules, each of which can be taken out.

/// What holds the protocol together.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// G1: what is allocated for a head that is not durable is touched by the acknowledgement.
    pub touch_in_flight: bool,
    /// G1: so is what is in the pool.
    pub touch_pool: bool,
    /// G1: what is claimed after it is touched.
    pub touch_claimed: bool,
    /// G1: what is freed after it is touched.
    pub touch_freed: bool,
    /// G1: a host that did not acknowledge before the marking is left out.
    pub leave_out: bool,
    /// G2: only the process that noted the touches of a cycle applies it.
    pub own_incarnation: bool,
    /// G2: only pages of the cycle that was done last count.
    pub page_epoch: bool,
    /// G2: only pages that were made for the extent as its record is.
    pub page_extent: bool,
    /// G2: only when the cycle is done.
    pub done_only: bool,
    /// G2: a page is applied once.
    pub once: bool,
    /// G3: the registry is read again after the marking.
    pub second_reading: bool,
    /// G3: and again, until no disk was made or buried since the reading before.
    pub readings_until_still: bool,
    /// G3: a disk that is being made is a root.
    pub creating_is_root: bool,
    /// G3: a clone looks at its source again before it is one.
    pub look_again: bool,
    /// G4: what is freed during the marking is not used until its end.
    pub quarantine: bool,
    /// G4: nodes are told apart by their pointers; otherwise one bit stands for a block.
    pub pointers: bool,
    /// G4: a node that does not match its pointer ends the cycle.
    pub checksum: bool,
    /// A host that does not answer is left out, and one that withdraws is left to itself. Otherwise the cycle waits, or ends.
    pub partial: bool,
    /// G5: a host that is short of space takes its quarantine back.
    pub withdraw: bool,
    /// G5: any host may begin the next cycle; otherwise only the last leader.
    pub any_leader: bool,
    /// C2: a host that comes back raises its heads first.
    pub raise_heads: bool,
    /// C3: what a commit replaces is freed when its head is known to have landed.
    pub free_after: bool,
    /// C4: a cut, and a clone, own nothing of what was before.
    pub births: bool,
    /// C5, H1: nothing that a former incarnation wrote lands after its host came back, heads excepted.
    pub reinstate: bool,
    /// H3: a clone is made of a snapshot that was committed.
    pub clone_committed: bool,
    /// What older trees are read for is waited for by a block's owner.
    pub own_stays: bool,
    /// And by all who had a part in the cycle.
    pub all_stays: bool,
}

impl Rules {
    /// All of them, in the form for many hosts.
    pub const ALL: Self = Self {
        touch_in_flight: true,
        touch_pool: true,
        touch_claimed: true,
        touch_freed: true,
        leave_out: true,
        own_incarnation: true,
        page_epoch: true,
        page_extent: true,
        done_only: true,
        once: true,
        second_reading: true,
        readings_until_still: true,
        creating_is_root: true,
        look_again: true,
        quarantine: true,
        pointers: true,
        checksum: true,
        partial: true,
        withdraw: true,
        any_leader: true,
        raise_heads: true,
        free_after: true,
        births: true,
        reinstate: true,
        clone_committed: true,
        own_stays: true,
        all_stays: true,
    };

    /// With marks of one bit per block, as `gc/src/reach.rs` has them: then every host has to acknowledge, and one that
    /// withdraws ends the cycle for all.
    pub const BITS: Self = Self { pointers: false, partial: false, ..Self::ALL };
}
