//! What the end of one SCSI command means: a pure function from (class, status, sense) to a verdict.
//!
//! The line that matters most is between "was not executed" (UNIT ATTENTION, BUSY, TASK SET FULL: may be
//! sent again), "was executed or ended" (the caller hears it at once) and "nobody knows" (the session
//! is given up, and a command that alters the medium is reported only after the next login).

use super::scsi::{self, Sense};
use crate::device::DeviceErrorKind;

/// What a command does, as far as its fate after a lost session depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// READ.
    Read,
    /// INQUIRY and other questions.
    Query,
    /// WRITE.
    Write,
    /// SYNCHRONIZE CACHE.
    Flush,
    /// COMPARE AND WRITE.
    CompareAndWrite,
    /// UNMAP.
    Discard,
}

impl Class {
    /// If cut off, this command may land later: its outcome is withheld until the next login.
    pub fn alters_medium(self) -> bool {
        matches!(self, Self::Write | Self::CompareAndWrite | Self::Discard)
    }

    /// May be sent again after a session loss without the caller's knowledge.
    pub fn is_repeatable(self) -> bool {
        matches!(self, Self::Read | Self::Query)
    }
}

/// How a command ended: the SCSI status, or what took its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// A SCSI status byte from the target, with sense data if it sent any.
    Status(u8, Option<Sense>),
    /// Cut off: cancelled, rejected or timed out by the initiator. The outcome is unknown.
    CutOff,
}

pub const GOOD: u8 = 0;
pub const CHECK_CONDITION: u8 = 2;
pub const CONDITION_MET: u8 = 4;
pub const BUSY: u8 = 8;
pub const RESERVATION_CONFLICT: u8 = 0x18;
pub const TASK_SET_FULL: u8 = 0x28;
pub const TASK_ABORTED: u8 = 0x40;

/// What to do with a command that ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Carried out.
    Done,
    /// A compare-and-write that found something else.
    Miscompare,
    /// Not executed; send it again at once.
    Again,
    /// Not executed; send it again in a while, the target is busy.
    AgainLater,
    /// Not executed, and the target was reset: writes that completed may be lost.
    Reset,
    /// Ended with an error.
    Failed(Failure),
    /// Nobody knows: the session must be given up.
    SessionBroken,
}

/// The part of a `DeviceError` that is known where the command ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub kind: DeviceErrorKind,
    pub message: String,
}

impl Failure {
    pub fn new(kind: DeviceErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// Judges the end of a command of `class`.
pub fn judge(class: Class, ending: Ending) -> Verdict {
    let Ending::Status(status, sense) = ending else { return Verdict::SessionBroken };
    match status {
        GOOD | CONDITION_MET => Verdict::Done,
        BUSY | TASK_SET_FULL => Verdict::AgainLater,
        RESERVATION_CONFLICT => failed(
            DeviceErrorKind::Reserved,
            "another initiator holds a SCSI reservation of this LUN; if its host is gone for \
             good, clear the reservation on the target, else stop that host first",
        ),
        TASK_ABORTED => {
            failed(DeviceErrorKind::Unreachable, "the target aborted the command; try again")
        }
        CHECK_CONDITION => match sense {
            Some(sense) => judge_sense(class, sense),
            None => failed(
                DeviceErrorKind::Io,
                "the target answered CHECK CONDITION without sense data; see the target's log",
            ),
        },
        other => failed(
            DeviceErrorKind::Io,
            format!("the target answered with the unknown SCSI status {other:#04x}"),
        ),
    }
}

fn judge_sense(class: Class, sense: Sense) -> Verdict {
    match (sense.key, sense.code) {
        // Recovered error, no sense: carried out.
        (0 | 1, _) => Verdict::Done,
        (scsi::KEY_MISCOMPARE, _) if class == Class::CompareAndWrite => Verdict::Miscompare,
        // Power on, reset, or bus device reset occurred.
        (scsi::KEY_UNIT_ATTENTION, code) if code >> 8 == 0x29 => Verdict::Reset,
        // Commands cleared by another initiator, by power loss, by the device server.
        (scsi::KEY_UNIT_ATTENTION, code) if code >> 8 == 0x2f => Verdict::Reset,
        (scsi::KEY_UNIT_ATTENTION, _) => Verdict::Again,
        (scsi::KEY_NOT_READY, _) => failed(
            DeviceErrorKind::Unreachable,
            format!("the LUN is not ready ({sense}); see the target's state"),
        ),
        (scsi::KEY_ABORTED_COMMAND, _) => failed(
            DeviceErrorKind::Unreachable,
            format!("the target aborted the command ({sense}); try again"),
        ),
        // Space allocation failed write protect.
        (scsi::KEY_DATA_PROTECT, 0x2707) => failed(
            DeviceErrorKind::NoSpace,
            format!("the target is out of space for this thin LUN ({sense}); enlarge its pool"),
        ),
        (scsi::KEY_DATA_PROTECT, _) => failed(
            DeviceErrorKind::Io,
            format!("the LUN is write-protected ({sense}); export it read-write"),
        ),
        // Logical block address out of range.
        (scsi::KEY_ILLEGAL_REQUEST, 0x2100) => {
            failed(DeviceErrorKind::OutOfRange, format!("beyond the end of the LUN ({sense})"))
        }
        // Logical unit not supported: a target that restarts shows its LUNs late.
        (scsi::KEY_ILLEGAL_REQUEST, 0x2500) => failed(
            DeviceErrorKind::Unreachable,
            format!("the target has no such LUN ({sense}); check its number and the target's ACL"),
        ),
        (scsi::KEY_ILLEGAL_REQUEST, _) => failed(
            DeviceErrorKind::Unsupported,
            format!("the target does not support this command ({sense})"),
        ),
        _ => failed(
            DeviceErrorKind::Io,
            format!(
                "the target reports an error ({sense}); see its log and the health of its disks"
            ),
        ),
    }
}

fn failed(kind: DeviceErrorKind, message: impl Into<String>) -> Verdict {
    Verdict::Failed(Failure::new(kind, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(class: Class, key: u8, code: u16) -> Verdict {
        judge(class, Ending::Status(CHECK_CONDITION, Some(Sense { key, code })))
    }

    fn kind(verdict: Verdict) -> Option<DeviceErrorKind> {
        match verdict {
            Verdict::Failed(failure) => Some(failure.kind),
            _ => None,
        }
    }

    /// Goal: every class gets the same word on whether a command was executed. Method: the table.
    #[test]
    fn each_ending_has_its_verdict() {
        use DeviceErrorKind as Kind;
        for class in [Class::Read, Class::Query, Class::Write, Class::Flush, Class::Discard] {
            assert_eq!(judge(class, Ending::Status(GOOD, None)), Verdict::Done);
            assert_eq!(judge(class, Ending::CutOff), Verdict::SessionBroken);
            assert_eq!(judge(class, Ending::Status(BUSY, None)), Verdict::AgainLater);
            assert_eq!(judge(class, Ending::Status(TASK_SET_FULL, None)), Verdict::AgainLater);
            assert_eq!(check(class, 6, 0x2900), Verdict::Reset);
            assert_eq!(check(class, 6, 0x2f00), Verdict::Reset);
            assert_eq!(check(class, 6, 0x2a09), Verdict::Again);
            assert_eq!(kind(check(class, 2, 0x0401)), Some(Kind::Unreachable));
            assert_eq!(kind(check(class, 3, 0x1100)), Some(Kind::Io));
            assert_eq!(kind(check(class, 5, 0x2000)), Some(Kind::Unsupported));
            assert_eq!(kind(check(class, 5, 0x2100)), Some(Kind::OutOfRange));
            assert_eq!(kind(check(class, 7, 0x2707)), Some(Kind::NoSpace));
            assert_eq!(kind(check(class, 11, 0)), Some(Kind::Unreachable));
            assert_eq!(kind(check(class, 14, 0x1d00)), Some(Kind::Io));
            let conflict = judge(class, Ending::Status(RESERVATION_CONFLICT, None));
            assert_eq!(kind(conflict), Some(Kind::Reserved));
            assert_eq!(kind(judge(class, Ending::Status(CHECK_CONDITION, None))), Some(Kind::Io));
            assert_eq!(kind(judge(class, Ending::Status(0x7e, None))), Some(Kind::Io));
        }
        assert_eq!(check(Class::CompareAndWrite, 14, 0x1d00), Verdict::Miscompare);
    }
}
