//! A safe owner for one libiscsi context: one TCP connection, one session, one thread.
//!
//! libiscsi's own reconnect stays off: it logs in under a new ISID and so lets old writes land after
//! newer ones. Its timers are not used either. Buffers and tasks belong to the context until libiscsi
//! cannot touch them any more: a write may end (with an error) while parts of it still wait to be
//! sent, so its buffers are kept until the send queue has run empty.

use super::ffi;
use super::outcome::{CHECK_CONDITION, Ending};
use super::scsi::{Cdb, Sense};
use crate::buf::AlignedBuf;
use bytes::Bytes;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_int, c_void};
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::{self, NonNull};

/// A callback that was made.
struct Ended {
    /// Address of the context.
    context: usize,
    token: usize,
    status: c_int,
    /// What libiscsi says of a failure; later failures overwrite it.
    error: String,
}

thread_local! {
    /// In order; drained after each `iscsi_service`.
    static ENDED: RefCell<Vec<Ended>> = const { RefCell::new(Vec::new()) };
}

const CONNECT: usize = 1;
const LOGIN: usize = 2;
const LOGOUT: usize = 3;
const NOP: usize = 4;
/// Tokens from here on are command ids.
const FIRST_COMMAND: usize = 16;

const STATUS_REDIRECT: c_int = 0x101;
/// Statuses above a byte are libiscsi's own: cancelled, error, timeout.
const STATUS_SCSI_MAX: c_int = 0xff;

/// Write tasks kept for the send queue at most, before no more are accepted.
const RETIRED_MAX: usize = 128;

/// Who logs in where.
#[derive(Clone)]
pub struct Login {
    /// `address:port`; numeric, so that no name is looked up here.
    pub portal: CString,
    pub target: CString,
    pub lun: u16,
    pub initiator: CString,
    /// 24 and 16 bits of the ISID (type "random", RFC 7143 11.12.5).
    pub isid: (u32, u16),
    /// CHAP user and secret.
    pub chap: Option<(CString, CString)>,
    /// The kernel gives a connection up when sent data stays unacknowledged for this long.
    pub tcp_user_timeout_ms: i32,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Login({:?} as {:?} to {:?})", self.portal, self.initiator, self.target)
    }
}

/// Data that goes with a command.
#[derive(Debug)]
pub enum Payload {
    None,
    /// Sent to the target, piece after piece.
    Out(Vec<Bytes>),
    /// Filled by the target.
    In(AlignedBuf),
}

/// News from the connection.
#[derive(Debug)]
pub enum Notice {
    Connected(Result<(), String>),
    LoggedIn(Result<(), String>),
    LoggedOut,
    /// A NOP was answered.
    Nop,
    Command {
        id: usize,
        ending: Ending,
        /// The buffer given with [`Payload::In`].
        data: Option<AlignedBuf>,
        /// Bytes that the target did not send or take.
        missing: usize,
    },
}

/// One connection to a target.
pub struct Context {
    raw: NonNull<ffi::IscsiContext>,
    lun: c_int,
    tasks: HashMap<usize, Task>,
    /// Ended writes whose buffers may still be in the send queue.
    retired: Vec<Task>,
}

struct Task {
    raw: NonNull<ffi::ScsiTask>,
    payload: Payload,
    /// Read and, for a moment, changed by libiscsi while the task is under way.
    _pieces: Box<[libc::iovec]>,
}

impl Drop for Task {
    fn drop(&mut self) {
        // SAFETY: created by scsi_create_task, freed once; the owner has seen to it that libiscsi
        // holds no pointer to it any more.
        unsafe { ffi::scsi_free_scsi_task(self.raw.as_ptr()) }
    }
}

extern "C" fn ended(
    context: *mut ffi::IscsiContext,
    status: c_int,
    _data: *mut c_void,
    token: *mut c_void,
) {
    let token = token.addr();
    let error = match token {
        CONNECT | LOGIN if status != 0 => error_text(context),
        _ => String::new(),
    };
    // During the thread's end nobody is interested any more.
    let ended = Ended { context: context.addr(), token, status, error };
    let _ = ENDED.try_with(|all| all.borrow_mut().push(ended));
}

/// libiscsi's last error.
fn error_text(context: *mut ffi::IscsiContext) -> String {
    // SAFETY: every caller, libiscsi included, passes a live context; the text is a NUL-terminated
    // array inside it.
    let text = unsafe { CStr::from_ptr(ffi::iscsi_get_error(context)) };
    text.to_string_lossy().trim().to_owned()
}

impl Context {
    /// A context that is not connected yet.
    pub fn new(login: &Login) -> Result<Self, String> {
        // SAFETY: a NUL-terminated name; libiscsi copies it.
        let raw = unsafe { ffi::iscsi_create_context(login.initiator.as_ptr()) };
        let raw = NonNull::new(raw).ok_or("libiscsi could not create a context")?;
        let context =
            Self { raw, lun: c_int::from(login.lun), tasks: HashMap::new(), retired: Vec::new() };
        let iscsi = raw.as_ptr();
        // SAFETY: a live context that is not logged in; every string is NUL-terminated and copied.
        let failed = unsafe {
            // Logging uses static buffers that threads would share.
            ffi::iscsi_set_log_fn(iscsi, None);
            ffi::iscsi_set_log_level(iscsi, 0);
            ffi::iscsi_set_noautoreconnect(iscsi, 1);
            ffi::iscsi_set_tcp_user_timeout(iscsi, login.tcp_user_timeout_ms);
            ffi::iscsi_set_tcp_keepidle(iscsi, 2);
            ffi::iscsi_set_tcp_keepcnt(iscsi, 3);
            ffi::iscsi_set_tcp_keepintvl(iscsi, 1);
            let mut failed = 0;
            failed |= ffi::iscsi_set_session_type(iscsi, ffi::SESSION_NORMAL);
            failed |= ffi::iscsi_set_header_digest(iscsi, ffi::HEADER_DIGEST_NONE_CRC32C);
            failed |= ffi::iscsi_set_isid_random(iscsi, login.isid.0, u32::from(login.isid.1));
            failed |= ffi::iscsi_set_targetname(iscsi, login.target.as_ptr());
            if let Some((user, secret)) = &login.chap {
                failed |=
                    ffi::iscsi_set_initiator_username_pwd(iscsi, user.as_ptr(), secret.as_ptr());
            }
            failed
        };
        if failed != 0 { Err(context.error()) } else { Ok(context) }
    }

    /// Starts the TCP connection; [`Notice::Connected`] follows.
    pub fn connect(&mut self, login: &Login) -> Result<(), String> {
        // SAFETY: live context, NUL-terminated portal, a callback that takes any token.
        let failed = unsafe {
            ffi::iscsi_connect_async(self.ptr(), login.portal.as_ptr(), ended, token(CONNECT))
        };
        self.check(failed)
    }

    /// Starts the login; [`Notice::LoggedIn`] follows.
    pub fn log_in(&mut self) -> Result<(), String> {
        // SAFETY: live context, a callback that takes any token.
        let failed = unsafe { ffi::iscsi_login_async(self.ptr(), ended, token(LOGIN)) };
        self.check(failed)
    }

    /// Starts the logout; [`Notice::LoggedOut`] follows.
    pub fn log_out(&mut self) -> Result<(), String> {
        // SAFETY: live context, a callback that takes any token.
        let failed = unsafe { ffi::iscsi_logout_async(self.ptr(), ended, token(LOGOUT)) };
        self.check(failed)
    }

    /// Sends a NOP-Out; [`Notice::Nop`] follows.
    pub fn nop(&mut self) -> Result<(), String> {
        // SAFETY: live context, no data, a callback that takes any token.
        let failed =
            unsafe { ffi::iscsi_nop_out_async(self.ptr(), ended, ptr::null_mut(), 0, token(NOP)) };
        self.check(failed)
    }

    /// Sends a command; [`Notice::Command`] with this id follows. Ids may not repeat.
    pub fn submit(&mut self, id: usize, cdb: &Cdb, payload: Payload) -> Result<(), String> {
        assert!(id >= FIRST_COMMAND && !self.tasks.contains_key(&id), "command id {id} is taken");
        let task = Task::new(cdb, payload)?;
        let raw = task.raw;
        self.tasks.insert(id, task);
        // SAFETY: the task and its buffers live in `tasks` or `retired` until libiscsi is done.
        let failed = unsafe {
            ffi::iscsi_scsi_command_async(
                self.ptr(),
                self.lun,
                raw.as_ptr(),
                ended,
                ptr::null_mut(),
                token(id),
            )
        };
        if failed != 0 {
            self.tasks.remove(&id);
        }
        self.check(failed)
    }

    /// The socket, once connecting has begun.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: live context.
        let fd: RawFd = unsafe { ffi::iscsi_get_fd(self.ptr()) };
        // SAFETY: libiscsi keeps the descriptor open while connected, and `self` is borrowed.
        (fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// Poll events to wait for.
    pub fn events(&self) -> i16 {
        // SAFETY: live context.
        (unsafe { ffi::iscsi_which_events(self.ptr()) }) as i16
    }

    /// Lets libiscsi send and receive. An error means that the connection is of no more use.
    pub fn service(&mut self, revents: i16) -> Result<(), String> {
        // SAFETY: live context; callbacks only note what happened.
        let failed = unsafe { ffi::iscsi_service(self.ptr(), c_int::from(revents)) };
        self.check(failed).map_err(|error| {
            // What libiscsi says when it may not reconnect, which hides why it wanted to.
            match error.is_empty() || error.contains("an not reconnect") {
                true => "the target closed the connection".to_owned(),
                false => error,
            }
        })
    }

    /// What happened since the last call.
    pub fn notices(&mut self) -> Vec<Notice> {
        if !self.retired.is_empty() && self.is_drained() {
            self.retired.clear();
        }
        let own = self.ptr().addr();
        let ended: Vec<Ended> =
            ENDED.with_borrow_mut(|all| all.extract_if(.., |e| e.context == own).collect());
        ended.into_iter().filter_map(|ended| self.notice(ended)).collect()
    }

    /// PDUs that wait for the target to open its command window, if that is what they wait for.
    pub fn window_blocked(&self) -> Option<usize> {
        let queued = self.queued();
        (queued > 0 && self.events() & libc::POLLOUT == 0).then_some(queued)
    }

    /// True if no more commands should be submitted until the send queue has run empty.
    pub fn is_congested(&self) -> bool {
        self.retired.len() >= RETIRED_MAX
    }

    fn notice(&mut self, ended: Ended) -> Option<Notice> {
        let Ended { token, status, error, .. } = ended;
        match token {
            CONNECT if status == 0 => Some(Notice::Connected(Ok(()))),
            CONNECT => Some(Notice::Connected(Err(error))),
            LOGIN if status == 0 => Some(Notice::LoggedIn(Ok(()))),
            LOGIN if status == STATUS_REDIRECT => Some(Notice::LoggedIn(Err(self.redirected()))),
            LOGIN => Some(Notice::LoggedIn(Err(error))),
            LOGOUT => Some(Notice::LoggedOut),
            NOP => (status == 0).then_some(Notice::Nop),
            id => self.command_ended(id, status),
        }
    }

    fn command_ended(&mut self, id: usize, status: c_int) -> Option<Notice> {
        // A command that was given up and ends now is of no interest.
        let mut task = self.tasks.remove(&id)?;
        let (ending, missing) = task.ending(status);
        let data = match std::mem::replace(&mut task.payload, Payload::None) {
            Payload::In(buf) => Some(buf),
            payload @ Payload::Out(_) => {
                task.payload = payload;
                if !self.is_drained() {
                    self.retired.push(task);
                }
                None
            }
            Payload::None => None,
        };
        Some(Notice::Command { id, ending, data, missing })
    }

    /// A portal of another group would not reinstate the session of this one, so old writes could
    /// land late: never followed.
    fn redirected(&self) -> String {
        // SAFETY: live context; a NUL-terminated array inside it.
        let address = unsafe { CStr::from_ptr(ffi::iscsi_get_target_address(self.ptr())) };
        format!(
            "the portal redirects to {}, which is not followed: put that portal into the URL",
            address.to_string_lossy()
        )
    }

    fn is_drained(&self) -> bool {
        self.queued() == 0 && self.events() & libc::POLLOUT == 0
    }

    fn queued(&self) -> usize {
        // SAFETY: live context.
        usize::try_from(unsafe { ffi::iscsi_out_queue_length(self.ptr()) }).unwrap_or(0)
    }

    fn check(&self, failed: c_int) -> Result<(), String> {
        if failed == 0 { Ok(()) } else { Err(self.error()) }
    }

    fn error(&self) -> String {
        error_text(self.ptr())
    }

    fn ptr(&self) -> *mut ffi::IscsiContext {
        self.raw.as_ptr()
    }
}

impl Drop for Context {
    /// Closes the connection. Tasks and buffers are freed after it, as libiscsi then forgot them.
    fn drop(&mut self) {
        // SAFETY: live context, destroyed once.
        unsafe { ffi::iscsi_destroy_context(self.ptr()) };
        let own = self.ptr().addr();
        let _ = ENDED.try_with(|all| all.borrow_mut().retain(|ended| ended.context != own));
    }
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Context({} commands)", self.tasks.len())
    }
}

impl Task {
    fn new(cdb: &Cdb, mut payload: Payload) -> Result<Self, String> {
        let piece =
            |base: *mut u8, len| libc::iovec { iov_base: base.cast::<c_void>(), iov_len: len };
        let (direction, mut pieces) = match &mut payload {
            Payload::None => (ffi::XFER_NONE, Box::default()),
            Payload::In(buf) => (ffi::XFER_READ, Box::from([piece(buf.as_mut_ptr(), buf.len())])),
            Payload::Out(data) => {
                let filled = data.iter().filter(|bytes| !bytes.is_empty());
                let pieces: Box<[libc::iovec]> =
                    filled.map(|bytes| piece(bytes.as_ptr().cast_mut(), bytes.len())).collect();
                (ffi::XFER_WRITE, pieces)
            }
        };
        let len: usize = pieces.iter().map(|piece| piece.iov_len).sum();
        let len = c_int::try_from(len).map_err(|_| "a command is longer than 2 GiB")?;
        let count = c_int::try_from(pieces.len()).map_err(|_| "a command has too many pieces")?;
        let block = cdb.as_bytes();
        // SAFETY: the block is copied, and has at most 16 bytes.
        let raw = unsafe {
            ffi::scsi_create_task(block.len() as c_int, block.as_ptr().cast_mut(), direction, len)
        };
        let raw = NonNull::new(raw).ok_or("libiscsi is out of memory")?;
        // SAFETY: a new task; the vector and what it points to live as long as the task, and data
        // to be sent is only read through it.
        unsafe {
            match direction {
                ffi::XFER_READ => {
                    ffi::scsi_task_set_iov_in(raw.as_ptr(), pieces.as_mut_ptr(), count);
                }
                ffi::XFER_WRITE => {
                    ffi::scsi_task_set_iov_out(raw.as_ptr(), pieces.as_mut_ptr(), count);
                }
                _ => {}
            }
        }
        Ok(Self { raw, payload, _pieces: pieces })
    }

    /// How it ended, and the bytes not transferred.
    fn ending(&self, status: c_int) -> (Ending, usize) {
        if !(0..=STATUS_SCSI_MAX).contains(&status) {
            return (Ending::CutOff, 0);
        }
        // SAFETY: a live task that libiscsi has finished with.
        let task = unsafe { self.raw.as_ref() };
        let sense = if status == c_int::from(CHECK_CONDITION) && !task.datain.data.is_null() {
            let len = usize::try_from(task.datain.size).unwrap_or(0);
            // SAFETY: libiscsi allocated `size` bytes at `data` for the response's data segment.
            Sense::parse(unsafe { std::slice::from_raw_parts(task.datain.data, len) })
        } else {
            None
        };
        let missing =
            if task.residual_status == ffi::RESIDUAL_UNDERFLOW { task.residual } else { 0 };
        (Ending::Status(status as u8, sense), missing)
    }
}

fn token(token: usize) -> *mut c_void {
    ptr::without_provenance_mut(token)
}
