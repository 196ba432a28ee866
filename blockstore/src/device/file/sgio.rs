//! COMPARE AND WRITE to a SCSI disk that the kernel attached (iSCSI, Fibre Channel, multipath), by
//! the SG_IO ioctl: SBC-4 section 5.4 for the command, SPC-5 section 4.4 for sense data.
//!
//! The command is atomic in the disk, so it excludes all hosts. Whether a disk knows it is found out by
//! replacing its last block with itself. The encoding and the decoding are tested on bytes; the
//! ioctl was tested in a Linux 6.1 guest with LIO behind tcm_loop, with blocks of 512 and 4096 bytes.

use crate::buf::AlignedBuf;
use crate::device::{CawOutcome, DeviceErrorKind};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

const SG_IO: libc::c_ulong = 0x2285;
const SG_DXFER_TO_DEV: i32 = -2;
const COMPARE_AND_WRITE: u8 = 0x89;
const TIMEOUT_MS: u32 = 30_000;
const SENSE_LEN: usize = 64;
/// Unit attentions and busy answers in a row that are answered by trying again.
const RETRIES_MAX: u32 = 8;
/// Miscompares in a row after which a disk counts as one without the command.
const PROBES_MAX: u32 = 16;

/// Result of a try to use the command.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Done(CawOutcome),
    /// The disk does not know the command, or not with this length.
    IllegalRequest,
    /// Nothing was done; `reset` if the disk lost its volatile cache before.
    TryAgain {
        reset: bool,
    },
    Failed(ScsiError),
}

/// A SCSI command that failed for good.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ScsiError {
    pub(super) kind: DeviceErrorKind,
    pub(super) message: String,
}

/// `struct sg_io_hdr` of `<scsi/sg.h>`.
#[repr(C)]
struct SgIoHdr {
    interface_id: i32,
    dxfer_direction: i32,
    cmd_len: u8,
    mx_sb_len: u8,
    iovec_count: u16,
    dxfer_len: u32,
    dxferp: *mut libc::c_void,
    cmdp: *const u8,
    sbp: *mut u8,
    timeout: u32,
    flags: u32,
    pack_id: i32,
    usr_ptr: *mut libc::c_void,
    status: u8,
    masked_status: u8,
    msg_status: u8,
    sb_len_wr: u8,
    host_status: u16,
    driver_status: u16,
    resid: i32,
    duration: u32,
    info: u32,
}

const _: () = assert!(size_of::<SgIoHdr>() == 88);

/// What the disk and the path to it said of one command.
#[derive(Debug)]
struct Completion {
    status: u8,
    host_status: u16,
    sense: Vec<u8>,
}

/// Tries the command by replacing the last block of a disk of `capacity` bytes with itself. It is a block
/// that the hosts of a store hardly ever change, unlike those at the beginning.
///
/// # Errors
/// `Unreachable` and the like if the disk did not answer, so that nothing is known.
pub(super) fn probe(file: &File, capacity: u64, block: u32) -> Result<bool, ScsiError> {
    let ignored = AtomicU64::new(0);
    let mut content = AlignedBuf::zeroed(block as usize);
    let offset = capacity - u64::from(block);
    // Another host may change the block between the read and the command.
    for _ in 0..PROBES_MAX {
        file.read_exact_at(&mut content, offset).map_err(io_failed)?;
        match run(file, offset, &content, &content, &ignored)? {
            Some(CawOutcome::Written) => return Ok(true),
            Some(CawOutcome::Miscompare) => {}
            None => return Ok(false),
        }
    }
    // Not once equal: more likely a disk that compares something else than a busy one.
    Ok(false)
}

/// Replaces one logical block if it holds `expected`. Blocks the thread.
pub(super) fn compare_and_write(
    file: &File,
    offset: u64,
    expected: &[u8],
    new: &[u8],
    epoch: &AtomicU64,
) -> Result<CawOutcome, ScsiError> {
    run(file, offset, expected, new, epoch)?.ok_or_else(|| ScsiError {
        kind: DeviceErrorKind::Unsupported,
        message: "the disk no longer accepts COMPARE AND WRITE, which it did when it was opened"
            .to_owned(),
    })
}

/// None: the disk does not know the command.
fn run(
    file: &File,
    offset: u64,
    expected: &[u8],
    new: &[u8],
    epoch: &AtomicU64,
) -> Result<Option<CawOutcome>, ScsiError> {
    let cdb = encode(offset / new.len() as u64);
    let mut data = AlignedBuf::zeroed(expected.len() + new.len());
    data[..expected.len()].copy_from_slice(expected);
    data[expected.len()..].copy_from_slice(new);
    for _ in 0..RETRIES_MAX {
        match decode(&send(file, &cdb, &mut data).map_err(io_failed)?) {
            Answer::Done(outcome) => return Ok(Some(outcome)),
            Answer::IllegalRequest => return Ok(None),
            Answer::Failed(e) => return Err(e),
            Answer::TryAgain { reset } => {
                epoch.fetch_add(u64::from(reset), Ordering::SeqCst);
            }
        }
    }
    let message = format!("the disk was busy or reset {RETRIES_MAX} times in a row");
    Err(ScsiError { kind: DeviceErrorKind::Unreachable, message })
}

fn io_failed(error: io::Error) -> ScsiError {
    let kind = super::errno::kind_of(&error, true);
    ScsiError { kind, message: format!("{error}{}", super::errno::advice(kind, true)) }
}

/// The command for one block at logical block address `lba`.
fn encode(lba: u64) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = COMPARE_AND_WRITE;
    cdb[2..10].copy_from_slice(&lba.to_be_bytes());
    cdb[13] = 1;
    cdb
}

fn send(file: &File, cdb: &[u8; 16], data: &mut AlignedBuf) -> io::Result<Completion> {
    let mut sense = [0_u8; SENSE_LEN];
    let mut header = SgIoHdr {
        interface_id: i32::from(b'S'),
        dxfer_direction: SG_DXFER_TO_DEV,
        cmd_len: cdb.len() as u8,
        mx_sb_len: SENSE_LEN as u8,
        iovec_count: 0,
        dxfer_len: data.len() as u32,
        dxferp: data.as_mut_ptr().cast(),
        cmdp: cdb.as_ptr(),
        sbp: sense.as_mut_ptr(),
        timeout: TIMEOUT_MS,
        flags: 0,
        pack_id: 0,
        usr_ptr: std::ptr::null_mut(),
        status: 0,
        masked_status: 0,
        msg_status: 0,
        sb_len_wr: 0,
        host_status: 0,
        driver_status: 0,
        resid: 0,
        duration: 0,
        info: 0,
    };
    // SAFETY: the header points to a command, a data and a sense buffer of the stated lengths, which
    // outlive this synchronous call.
    if unsafe { libc::ioctl(file.as_raw_fd(), SG_IO, &mut header) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let sense = sense[..usize::from(header.sb_len_wr).min(SENSE_LEN)].to_vec();
    Ok(Completion { status: header.status, host_status: header.host_status, sense })
}

/// Sense key, additional sense code and its qualifier; None if the bytes are no sense data.
fn parse_sense(sense: &[u8]) -> Option<(u8, u8, u8)> {
    let at = |index: usize| sense.get(index).copied();
    match at(0)? & 0x7f {
        // Fixed format; its tail may be cut off.
        0x70 | 0x71 => Some((at(2)? & 0xf, at(12).unwrap_or(0), at(13).unwrap_or(0))),
        // Descriptor format.
        0x72 | 0x73 => Some((at(1)? & 0xf, at(2)?, at(3)?)),
        _ => None,
    }
}

fn decode(completion: &Completion) -> Answer {
    let fail = |kind, message: String| Answer::Failed(ScsiError { kind, message });
    if completion.host_status != 0 {
        let message = format!(
            "the path to the disk failed (host status {:#x}); whether the block was written is unknown",
            completion.host_status
        );
        return fail(DeviceErrorKind::Unreachable, message);
    }
    match completion.status {
        0x00 => return Answer::Done(CawOutcome::Written),
        // Busy, task set full.
        0x08 | 0x28 => return Answer::TryAgain { reset: false },
        0x18 => {
            let message = "another host holds a SCSI reservation".to_owned();
            return fail(DeviceErrorKind::Reserved, message);
        }
        // Check condition.
        0x02 => {}
        other => {
            return fail(DeviceErrorKind::Unreachable, format!("the disk's status is {other:#x}"));
        }
    }
    let Some((key, asc, ascq)) = parse_sense(&completion.sense) else {
        let message = "the disk refused and does not say why".to_owned();
        return fail(DeviceErrorKind::Io, message);
    };
    let text = format!("sense key {key:#x}, code {asc:02x}/{ascq:02x}");
    match (key, asc) {
        (0x0e, _) => Answer::Done(CawOutcome::Miscompare),
        // LBA out of range.
        (0x05, 0x21) => {
            fail(DeviceErrorKind::OutOfRange, format!("beyond the disk's end ({text})"))
        }
        (0x05, _) => Answer::IllegalRequest,
        // Unit attention: 29h is power on or reset.
        (0x06, asc) => Answer::TryAgain { reset: asc == 0x29 },
        (0x02, _) => fail(DeviceErrorKind::Unreachable, format!("the disk is not ready ({text})")),
        (0x0b, _) => fail(DeviceErrorKind::Unreachable, format!("the disk aborted it ({text})")),
        // Space allocation failed write protect.
        (0x07, 0x27) if ascq == 0x07 => {
            fail(DeviceErrorKind::NoSpace, format!("the array is full ({text}): extend it"))
        }
        (0x07, _) => {
            fail(DeviceErrorKind::Unsupported, format!("the disk is write protected ({text})"))
        }
        _ => fail(DeviceErrorKind::Io, format!("the disk reports an error ({text})")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_condition(sense: &[u8]) -> Answer {
        decode(&Completion { status: 2, host_status: 0, sense: sense.to_vec() })
    }

    fn fixed(key: u8, asc: u8, ascq: u8) -> Vec<u8> {
        let mut sense = vec![0; 18];
        (sense[0], sense[2], sense[7], sense[12], sense[13]) = (0x70, key, 10, asc, ascq);
        sense
    }

    #[test]
    fn the_command_has_opcode_address_and_a_length_of_one() {
        assert_eq!(
            encode(0x0102_0304_0506_0708),
            [0x89, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 1, 0, 0]
        );
    }

    #[test]
    fn outcomes_are_told_apart() {
        let good = Completion { status: 0, host_status: 0, sense: Vec::new() };
        assert_eq!(decode(&good), Answer::Done(CawOutcome::Written));
        let miscompare = Answer::Done(CawOutcome::Miscompare);
        assert_eq!(check_condition(&fixed(0x0e, 0x1d, 0)), miscompare);
        // The same in descriptor format, and as a deferred-error response code with reserved bits.
        assert_eq!(check_condition(&[0x72, 0x0e, 0x1d, 0, 0, 0, 0, 0]), miscompare);
        assert_eq!(check_condition(&[0xf0, 0, 0x0e]), miscompare);
        assert_eq!(check_condition(&fixed(0x05, 0x20, 0)), Answer::IllegalRequest);
        assert_eq!(check_condition(&fixed(0x05, 0x24, 0)), Answer::IllegalRequest);
        assert_eq!(check_condition(&fixed(0x06, 0x29, 0)), Answer::TryAgain { reset: true });
        assert_eq!(check_condition(&fixed(0x06, 0x2a, 9)), Answer::TryAgain { reset: false });
    }

    #[test]
    fn failures_are_sorted() {
        let kind = |answer: Answer| match answer {
            Answer::Failed(e) => e.kind,
            other => panic!("{other:?} instead of a failure"),
        };
        let status = |status| decode(&Completion { status, host_status: 0, sense: Vec::new() });
        assert_eq!(status(0x08), Answer::TryAgain { reset: false });
        assert_eq!(kind(status(0x18)), DeviceErrorKind::Reserved);
        assert_eq!(kind(status(0x40)), DeviceErrorKind::Unreachable);
        let timeout = Completion { status: 0, host_status: 3, sense: Vec::new() };
        assert_eq!(kind(decode(&timeout)), DeviceErrorKind::Unreachable);
        assert_eq!(kind(check_condition(&fixed(0x02, 0x04, 0x01))), DeviceErrorKind::Unreachable);
        assert_eq!(kind(check_condition(&fixed(0x0b, 0x47, 0))), DeviceErrorKind::Unreachable);
        assert_eq!(kind(check_condition(&fixed(0x03, 0x11, 0))), DeviceErrorKind::Io);
        assert_eq!(kind(check_condition(&fixed(0x05, 0x21, 0))), DeviceErrorKind::OutOfRange);
        assert_eq!(kind(check_condition(&fixed(0x07, 0x27, 0x07))), DeviceErrorKind::NoSpace);
        assert_eq!(kind(check_condition(&fixed(0x07, 0x27, 0))), DeviceErrorKind::Unsupported);
        assert_eq!(kind(check_condition(&[])), DeviceErrorKind::Io);
        assert_eq!(kind(check_condition(&[0x70])), DeviceErrorKind::Io);
        assert_eq!(kind(check_condition(&[0xff; 64])), DeviceErrorKind::Io);
    }

    #[test]
    fn something_that_is_no_scsi_disk_is_an_error_not_a_yes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        assert!(!matches!(probe(&file, 4096, 512), Ok(true)));
    }
}
