//! What is said to a LUN after each login, before any other command: is it ready, whose is it, is it
//! still the same one. And the farewell before a logout. Pure: one command out, one ending in.
//!
//! In exclusive mode the reservation is taken anew after every login, since some targets forget
//! registrations with the session, and no write may pass before it stands.

use super::outcome::{Class, Ending, Failure, Verdict, judge};
use super::scsi::{self, Capacity, Cdb, ReserveAction};
use crate::device::DeviceErrorKind;

/// Commands that were not executed (UNIT ATTENTION, BUSY) may be repeated this often.
const REPEATS_MAX: u32 = 20;

/// What a LUN says of itself; compared after each login.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    pub capacity: Capacity,
    /// Designators of the logical unit (VPD page 83); empty if it has none.
    pub identity: Vec<u8>,
}

impl Facts {
    /// Whether `now` may be the LUN that was opened as `self`, perhaps grown.
    pub fn is_same_lun(&self, now: &Self) -> bool {
        self.identity == now.identity
            && self.capacity.block_len == now.capacity.block_len
            && self.capacity.blocks <= now.capacity.blocks
    }
}

/// A command to send.
#[derive(Debug, PartialEq, Eq)]
pub struct Order {
    pub cdb: Cdb,
    /// Data to send.
    pub out: Vec<u8>,
    /// Bytes to receive at most.
    pub in_len: usize,
}

/// What follows from an ending.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// Send [`Preparation::order`].
    Next,
    /// The LUN is ready.
    Ready(Facts),
    /// The reservation is given back.
    Released,
    Failed(Failure),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Ready,
    Register,
    Reserve,
    Holder,
    Preempt,
    Capacity,
    Identity(Capacity),
    /// The reservation was refused for this reason: take the registration back.
    Withdraw(Failure),
    Release,
    Unregister,
}

/// The sequence under way.
#[derive(Debug)]
pub struct Preparation {
    step: Step,
    /// Reservation key of this host, in exclusive mode.
    key: Option<u64>,
    repeats: u32,
}

impl Preparation {
    /// After a login; with a key the LUN is reserved.
    pub fn start(key: Option<u64>) -> Self {
        Self { step: Step::Ready, key, repeats: 0 }
    }

    /// Before a logout, where a reservation is held.
    pub fn farewell(key: u64) -> Self {
        Self { step: Step::Release, key: Some(key), repeats: 0 }
    }

    /// The command of the present step.
    pub fn order(&self) -> Order {
        let key = self.key.unwrap_or(0);
        let ask = |cdb, in_len| Order { cdb, out: vec![], in_len };
        let reserve = |action, key, action_key| Order {
            cdb: scsi::reserve_out(action),
            out: scsi::reserve_list(key, action_key),
            in_len: 0,
        };
        match self.step {
            Step::Ready => ask(scsi::test_unit_ready(), 0),
            Step::Register => reserve(ReserveAction::RegisterAndIgnore, 0, key),
            Step::Reserve => reserve(ReserveAction::Reserve, key, 0),
            Step::Holder => ask(scsi::read_reservation(), scsi::RESERVATION_LEN),
            Step::Preempt => reserve(ReserveAction::Preempt, key, key),
            Step::Capacity => ask(scsi::read_capacity16(), scsi::CAPACITY_LEN),
            Step::Identity(_) => ask(scsi::inquiry_vpd(0x83), scsi::VPD_LEN),
            Step::Release => reserve(ReserveAction::Release, key, 0),
            Step::Withdraw(_) | Step::Unregister => {
                reserve(ReserveAction::RegisterAndIgnore, key, 0)
            }
        }
    }

    /// Takes in how the present step's command ended, and the data that came.
    pub fn feed(&mut self, ending: Ending, data: &[u8]) -> Progress {
        let verdict = judge(Class::Query, ending);
        match verdict {
            Verdict::Again | Verdict::AgainLater | Verdict::Reset => {
                self.repeats += 1;
                if self.repeats > REPEATS_MAX {
                    return self.fail(DeviceErrorKind::Unreachable, "the LUN stays busy");
                }
                Progress::Next
            }
            Verdict::Done | Verdict::Miscompare => self.advance(data),
            Verdict::Failed(failure) => self.refused(failure),
            Verdict::SessionBroken => {
                self.fail(DeviceErrorKind::Unreachable, "the session broke after the login")
            }
        }
    }

    fn advance(&mut self, data: &[u8]) -> Progress {
        let next = match std::mem::replace(&mut self.step, Step::Ready) {
            Step::Ready if self.key.is_some() => Step::Register,
            Step::Ready | Step::Reserve | Step::Preempt => Step::Capacity,
            Step::Register => Step::Reserve,
            Step::Holder => return self.held_by(scsi::parse_reservation(data)),
            Step::Capacity => match Capacity::parse(data) {
                Some(capacity) => Step::Identity(capacity),
                None => {
                    return self
                        .fail(DeviceErrorKind::Io, "the answer to READ CAPACITY is invalid");
                }
            },
            Step::Identity(capacity) => {
                return Progress::Ready(Facts { capacity, identity: scsi::parse_identity(data) });
            }
            Step::Withdraw(failure) => return Progress::Failed(failure),
            Step::Release => Step::Unregister,
            Step::Unregister => return Progress::Released,
        };
        self.step = next;
        Progress::Next
    }

    fn refused(&mut self, failure: Failure) -> Progress {
        let step = std::mem::replace(&mut self.step, Step::Ready);
        match step {
            Step::Reserve | Step::Preempt if failure.kind == DeviceErrorKind::Reserved => {
                self.step = Step::Holder;
                Progress::Next
            }
            Step::Register | Step::Reserve if failure.kind == DeviceErrorKind::Unsupported => self
                .fail(
                    DeviceErrorKind::Unsupported,
                    "the target has no persistent reservations, so this LUN cannot be held \
                     exclusively; use a target that has them, or one with COMPARE AND WRITE",
                ),
            // Designators are optional.
            Step::Identity(capacity) => Progress::Ready(Facts { capacity, identity: Vec::new() }),
            Step::Withdraw(earlier) => Progress::Failed(earlier),
            Step::Release => {
                self.step = Step::Unregister;
                Progress::Next
            }
            Step::Unregister => Progress::Released,
            _ => Progress::Failed(failure),
        }
    }

    fn held_by(&mut self, holder: Option<u64>) -> Progress {
        self.repeats += 1;
        self.step = match holder {
            _ if self.repeats > REPEATS_MAX => Step::Withdraw(Failure::new(
                DeviceErrorKind::Reserved,
                "the SCSI reservation of this LUN keeps changing hands; find the other host",
            )),
            // Given back meanwhile.
            None => Step::Reserve,
            // This host's, under an earlier session name.
            Some(key) if Some(key) == self.key => Step::Preempt,
            Some(key) => Step::Withdraw(Failure::new(
                DeviceErrorKind::Reserved,
                format!(
                    "another host holds this LUN with reservation key {key:#018x}: stop the agent \
                     there; if that host is gone for good, clear its reservation on the target"
                ),
            )),
        };
        Progress::Next
    }

    fn fail(&self, kind: DeviceErrorKind, message: &str) -> Progress {
        Progress::Failed(Failure::new(kind, message))
    }
}

#[cfg(test)]
mod tests {
    use super::super::outcome::{CHECK_CONDITION, GOOD, RESERVATION_CONFLICT};
    use super::*;
    use crate::device::iscsi::scsi::Sense;

    const OK: Ending = Ending::Status(GOOD, None);
    const KEY: u64 = 0x42;

    fn sense(key: u8, code: u16) -> Ending {
        Ending::Status(CHECK_CONDITION, Some(Sense { key, code }))
    }

    fn capacity() -> Vec<u8> {
        let mut answer = vec![0; 32];
        answer[7] = 255;
        answer[10] = 0x10;
        answer
    }

    fn holder(key: u64) -> Vec<u8> {
        let mut answer = vec![0; 24];
        answer[7] = 16;
        answer[8..16].copy_from_slice(&key.to_be_bytes());
        answer
    }

    #[test]
    fn a_shared_lun_is_asked_three_questions_and_attentions_are_repeated() {
        let mut lun = Preparation::start(None);
        assert_eq!(lun.feed(sense(6, 0x2900), &[]), Progress::Next);
        assert_eq!(lun.order().cdb, scsi::test_unit_ready());
        assert_eq!(lun.feed(OK, &[]), Progress::Next);
        assert_eq!(lun.feed(OK, &capacity()), Progress::Next);
        assert_eq!(lun.order().cdb, scsi::inquiry_vpd(0x83));
        let Progress::Ready(facts) = lun.feed(sense(5, 0x2400), &[]) else { panic!("not ready") };
        assert_eq!(facts.capacity, Capacity { blocks: 256, block_len: 4096 });
        assert!(facts.identity.is_empty());
    }

    #[test]
    fn endless_attentions_fail() {
        let mut lun = Preparation::start(None);
        let endings = (0..50).map(|_| lun.feed(sense(6, 0x2900), &[]));
        assert!(endings.into_iter().any(|progress| matches!(progress, Progress::Failed(_))));
    }

    #[test]
    fn an_exclusive_lun_is_registered_and_reserved_before_anything_else() {
        let mut lun = Preparation::start(Some(KEY));
        lun.feed(OK, &[]);
        assert_eq!(lun.order().cdb, scsi::reserve_out(ReserveAction::RegisterAndIgnore));
        assert_eq!(lun.order().out, scsi::reserve_list(0, KEY));
        lun.feed(OK, &[]);
        assert_eq!(lun.order().cdb, scsi::reserve_out(ReserveAction::Reserve));
        lun.feed(OK, &[]);
        assert_eq!(lun.order().cdb, scsi::read_capacity16());
    }

    #[test]
    fn a_foreign_holder_is_named_after_the_registration_was_taken_back() {
        let mut lun = Preparation::start(Some(KEY));
        lun.feed(OK, &[]);
        lun.feed(OK, &[]);
        lun.feed(Ending::Status(RESERVATION_CONFLICT, None), &[]);
        assert_eq!(lun.order().cdb, scsi::read_reservation());
        lun.feed(OK, &holder(0x99));
        assert_eq!(lun.order().out, scsi::reserve_list(KEY, 0));
        let Progress::Failed(failure) = lun.feed(OK, &[]) else { panic!("not refused") };
        assert_eq!(failure.kind, DeviceErrorKind::Reserved);
        assert!(failure.message.contains("0x0000000000000099"), "{}", failure.message);
    }

    #[test]
    fn an_earlier_reservation_of_this_host_is_taken_over() {
        let mut lun = Preparation::start(Some(KEY));
        lun.feed(OK, &[]);
        lun.feed(OK, &[]);
        lun.feed(Ending::Status(RESERVATION_CONFLICT, None), &[]);
        lun.feed(OK, &holder(KEY));
        assert_eq!(lun.order().cdb, scsi::reserve_out(ReserveAction::Preempt));
        lun.feed(OK, &[]);
        assert_eq!(lun.order().cdb, scsi::read_capacity16());
    }

    #[test]
    fn a_target_without_reservations_is_refused_with_words() {
        let mut lun = Preparation::start(Some(KEY));
        lun.feed(OK, &[]);
        let Progress::Failed(failure) = lun.feed(sense(5, 0x2000), &[]) else { panic!("accepted") };
        assert_eq!(failure.kind, DeviceErrorKind::Unsupported);
    }

    #[test]
    fn the_farewell_releases_then_unregisters_whatever_the_target_says() {
        let mut lun = Preparation::farewell(KEY);
        assert_eq!(lun.order().cdb, scsi::reserve_out(ReserveAction::Release));
        assert_eq!(lun.feed(Ending::Status(RESERVATION_CONFLICT, None), &[]), Progress::Next);
        assert_eq!(lun.order().out, scsi::reserve_list(KEY, 0));
        assert_eq!(lun.feed(sense(5, 0x2600), &[]), Progress::Released);
    }

    #[test]
    fn a_grown_lun_is_the_same_and_a_shrunk_or_other_one_is_not() {
        let facts = |blocks, identity: &[u8]| Facts {
            capacity: Capacity { blocks, block_len: 4096 },
            identity: identity.to_vec(),
        };
        assert!(facts(10, b"a").is_same_lun(&facts(10, b"a")));
        assert!(facts(10, b"a").is_same_lun(&facts(11, b"a")));
        assert!(!facts(10, b"a").is_same_lun(&facts(9, b"a")));
        assert!(!facts(10, b"a").is_same_lun(&facts(10, b"b")));
    }
}
