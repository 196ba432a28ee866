//! What a head that is not the expected one means (rule C2). Pure.

use crate::format::vdi::VdiHead;

/// What to do after a head's compare-and-write did not simply succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The head is the one that was being written: done, once flushed.
    Landed,
    /// The head is still the old one: issue the identical command again.
    Reissue,
    /// The head is a later one of our own (an earlier incarnation's command arrived late): go on from
    /// there.
    Adopt,
    /// The head is an older one of our own: someone restored the store from a copy. Refuse.
    RolledBack,
    /// Somebody else has the disk. Refuse, and keep the log: it becomes a fork.
    NotOwner,
}

/// A head with the sequence number of its record.
pub type Sequenced<'a> = (u64, &'a VdiHead);

/// Judges the head `found` after trying to replace `expected` by `new`.
///
/// ```text
/// found                                                    decision    cause
/// same sequence and content as `new`                       Landed      the answer got lost
/// same sequence and content as `expected`                  Reissue     the command got lost
/// other owner, attachment or log                           NotOwner    takeover, detach, rollback
/// ours, sequence above `expected`                          Adopt       late command of our own
/// ours, sequence at or below `expected`, other content     RolledBack  the device went back in time
/// ```
#[must_use]
pub fn decide(found: Sequenced<'_>, expected: Sequenced<'_>, new: Sequenced<'_>) -> Decision {
    if found == new {
        Decision::Landed
    } else if found == expected {
        Decision::Reissue
    } else if !same_attachment(found.1, expected.1) {
        Decision::NotOwner
    } else if found.0 > expected.0 {
        Decision::Adopt
    } else {
        Decision::RolledBack
    }
}

fn same_attachment(a: &VdiHead, b: &VdiHead) -> bool {
    a.uuid == b.uuid
        && a.state == b.state
        && a.owner.is_some()
        && a.owner == b.owner
        && a.attachment == b.attachment
        && a.log_id == b.log_id
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::pointer::Pointer;
    use crate::format::vdi::{Owner, SnapshotIndex, VdiState};
    use crate::types::{Birth, Gba, Generation, Lsn};
    use uuid::Uuid;

    fn head() -> VdiHead {
        VdiHead {
            uuid: Uuid::from_u128(1),
            state: VdiState::Active,
            owner: Some(Owner { host: Uuid::from_u128(2), generation: Generation(3) }),
            attachment: Generation(4),
            attached_ms: 0,
            root: Pointer::SPARSE,
            height: 2,
            size_bytes: 1 << 24,
            committed: Lsn(10),
            log_id: Some(Uuid::from_u128(5)),
            birth: Birth(6),
            last_snapshot_birth: Birth(0),
            snapshots: SnapshotIndex::default(),
            origin: None,
            meta: Pointer::SPARSE,
            created_ms: 0,
            committed_ms: 0,
            last_log: None,
        }
    }

    /// Every combination of: who has it, how the sequence compares, whether the content differs.
    #[test]
    fn the_table_is_complete() {
        let expected = head();
        let mut new = head();
        new.committed = Lsn(20);
        new.root.gba = Gba(99);
        type Change = fn(&mut VdiHead);
        let identity: [(&str, Change); 7] = [
            ("ours", |_| {}),
            ("another disk", |h| h.uuid = Uuid::from_u128(77)),
            ("deleted", |h| h.state = VdiState::Tombstone),
            ("detached", |h| h.owner = None),
            ("taken over", |h| {
                h.owner = Some(Owner { host: Uuid::from_u128(9), ..h.owner.unwrap() })
            }),
            ("attached again", |h| h.attachment = Generation(5)),
            ("other log", |h| h.log_id = None),
        ];
        for (who, change) in identity {
            for sequence in 1..=8u64 {
                for content in [&expected, &new, &{
                    let mut other = head();
                    other.committed = Lsn(15);
                    other
                }] {
                    let mut found = content.clone();
                    change(&mut found);
                    let decision = decide((sequence, &found), (5, &expected), (6, &new));
                    let wanted = if who != "ours" {
                        Decision::NotOwner
                    } else if sequence == 6 && found == new {
                        Decision::Landed
                    } else if sequence == 5 && found == expected {
                        Decision::Reissue
                    } else if sequence > 5 {
                        Decision::Adopt
                    } else {
                        Decision::RolledBack
                    };
                    assert_eq!(decision, wanted, "{who}, sequence {sequence}, {found:?}");
                }
            }
        }
    }
}
