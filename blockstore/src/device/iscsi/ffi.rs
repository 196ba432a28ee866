//! Hand-written bindings of the few libiscsi functions that the session thread uses (API version
//! 20170105, library 1.19). `tests` compares the struct layout with the installed C headers.

use std::ffi::{c_char, c_int, c_uchar, c_void};

/// Opaque: one TCP connection and one iSCSI session. Not thread-safe.
#[repr(C)]
pub struct IscsiContext {
    _opaque: [u8; 0],
    _not_send: std::marker::PhantomData<*mut u8>,
}

/// Called by libiscsi, from inside `iscsi_service` or `iscsi_destroy_context` only.
pub type CommandCallback = extern "C" fn(
    context: *mut IscsiContext,
    status: c_int,
    command_data: *mut c_void,
    private_data: *mut c_void,
);

/// `struct scsi_sense`: filled by libiscsi from sense data that may be absent, so never read by us.
#[repr(C)]
pub struct ScsiSense {
    pub error_type: c_uchar,
    pub key: c_int,
    pub ascq: c_int,
    /// Bit fields and pointers of the sense-key specific part.
    pub specific: u32,
}

/// `struct scsi_data`.
#[repr(C)]
pub struct ScsiData {
    pub size: c_int,
    pub data: *mut c_uchar,
}

/// The head of `struct scsi_task`; only ever used behind a pointer that libiscsi allocated.
#[repr(C)]
pub struct ScsiTask {
    pub status: c_int,
    pub cdb_size: c_int,
    pub xfer_dir: c_int,
    pub expxferlen: c_int,
    pub cdb: [c_uchar; 16],
    pub residual_status: c_int,
    pub residual: usize,
    pub sense: ScsiSense,
    pub datain: ScsiData,
}

pub const XFER_NONE: c_int = 0;
pub const XFER_READ: c_int = 1;
pub const XFER_WRITE: c_int = 2;

pub const RESIDUAL_UNDERFLOW: c_int = 1;

/// `ISCSI_SESSION_NORMAL`.
pub const SESSION_NORMAL: c_int = 2;
/// `ISCSI_HEADER_DIGEST_NONE_CRC32C`: the target chooses, without being preferred.
pub const HEADER_DIGEST_NONE_CRC32C: c_int = 1;

pub type LogFunction = extern "C" fn(level: c_int, message: *const c_char);

unsafe extern "C" {
    pub fn iscsi_create_context(initiator_name: *const c_char) -> *mut IscsiContext;
    pub fn iscsi_destroy_context(iscsi: *mut IscsiContext) -> c_int;
    pub fn iscsi_get_error(iscsi: *mut IscsiContext) -> *const c_char;
    pub fn iscsi_set_log_level(iscsi: *mut IscsiContext, level: c_int);
    pub fn iscsi_set_log_fn(iscsi: *mut IscsiContext, function: Option<LogFunction>);

    pub fn iscsi_set_noautoreconnect(iscsi: *mut IscsiContext, state: c_int);
    pub fn iscsi_set_isid_random(iscsi: *mut IscsiContext, rnd: u32, qualifier: u32) -> c_int;
    pub fn iscsi_set_targetname(iscsi: *mut IscsiContext, name: *const c_char) -> c_int;
    pub fn iscsi_set_session_type(iscsi: *mut IscsiContext, session_type: c_int) -> c_int;
    pub fn iscsi_set_header_digest(iscsi: *mut IscsiContext, header_digest: c_int) -> c_int;
    pub fn iscsi_set_initiator_username_pwd(
        iscsi: *mut IscsiContext,
        user: *const c_char,
        password: *const c_char,
    ) -> c_int;
    pub fn iscsi_set_tcp_user_timeout(iscsi: *mut IscsiContext, timeout_ms: c_int);
    pub fn iscsi_set_tcp_keepidle(iscsi: *mut IscsiContext, seconds: c_int);
    pub fn iscsi_set_tcp_keepcnt(iscsi: *mut IscsiContext, count: c_int);
    pub fn iscsi_set_tcp_keepintvl(iscsi: *mut IscsiContext, seconds: c_int);

    pub fn iscsi_connect_async(
        iscsi: *mut IscsiContext,
        portal: *const c_char,
        callback: CommandCallback,
        private_data: *mut c_void,
    ) -> c_int;
    pub fn iscsi_login_async(
        iscsi: *mut IscsiContext,
        callback: CommandCallback,
        private_data: *mut c_void,
    ) -> c_int;
    pub fn iscsi_logout_async(
        iscsi: *mut IscsiContext,
        callback: CommandCallback,
        private_data: *mut c_void,
    ) -> c_int;
    pub fn iscsi_get_target_address(iscsi: *mut IscsiContext) -> *const c_char;
    pub fn iscsi_nop_out_async(
        iscsi: *mut IscsiContext,
        callback: CommandCallback,
        data: *mut c_uchar,
        len: c_int,
        private_data: *mut c_void,
    ) -> c_int;

    pub fn iscsi_get_fd(iscsi: *mut IscsiContext) -> c_int;
    pub fn iscsi_which_events(iscsi: *mut IscsiContext) -> c_int;
    pub fn iscsi_service(iscsi: *mut IscsiContext, revents: c_int) -> c_int;
    pub fn iscsi_out_queue_length(iscsi: *mut IscsiContext) -> c_int;

    pub fn scsi_create_task(
        cdb_size: c_int,
        cdb: *mut c_uchar,
        xfer_dir: c_int,
        expxferlen: c_int,
    ) -> *mut ScsiTask;
    pub fn scsi_free_scsi_task(task: *mut ScsiTask);
    pub fn scsi_task_set_iov_out(task: *mut ScsiTask, iov: *mut libc::iovec, niov: c_int);
    pub fn scsi_task_set_iov_in(task: *mut ScsiTask, iov: *mut libc::iovec, niov: c_int);
    /// `data` is only for callers without iovecs: null here.
    pub fn iscsi_scsi_command_async(
        iscsi: *mut IscsiContext,
        lun: c_int,
        task: *mut ScsiTask,
        callback: CommandCallback,
        data: *mut c_void,
        private_data: *mut c_void,
    ) -> c_int;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;
    use std::process::Command;

    /// Goal: the hand-written layout is that of the installed headers. Method: a C program prints
    /// the compiler's offsets.
    #[test]
    fn the_layout_is_that_of_the_c_headers() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let source = dir.path().join("layout.c");
        let program = dir.path().join("layout");
        std::fs::write(
            &source,
            "#include <stdio.h>\n#include <stddef.h>\n#include <iscsi/iscsi.h>\n\
             #include <iscsi/scsi-lowlevel.h>\n\
             #define P(f) printf(\"%zu \", offsetof(struct scsi_task, f))\n\
             int main(void) { P(status); P(cdb_size); P(xfer_dir); P(expxferlen); P(cdb);\n\
             P(residual_status); P(residual); P(sense); P(datain.size); P(datain.data);\n\
             printf(\"%zu %d %d %d\", sizeof(struct scsi_iovec), SCSI_XFER_WRITE,\n\
             SCSI_RESIDUAL_UNDERFLOW, ISCSI_SESSION_NORMAL); return 0; }\n",
        )
        .expect("write the C source");
        let compiled = Command::new("cc").arg("-o").arg(&program).arg(&source).status();
        assert!(compiled.expect("a C compiler, as for linking").success());
        let output = Command::new(&program).output().expect("run the C program");
        let found = String::from_utf8(output.stdout).expect("text");
        let ours = [
            offset_of!(ScsiTask, status),
            offset_of!(ScsiTask, cdb_size),
            offset_of!(ScsiTask, xfer_dir),
            offset_of!(ScsiTask, expxferlen),
            offset_of!(ScsiTask, cdb),
            offset_of!(ScsiTask, residual_status),
            offset_of!(ScsiTask, residual),
            offset_of!(ScsiTask, sense),
            offset_of!(ScsiTask, datain) + offset_of!(ScsiData, size),
            offset_of!(ScsiTask, datain) + offset_of!(ScsiData, data),
            size_of::<libc::iovec>(),
            XFER_WRITE as usize,
            RESIDUAL_UNDERFLOW as usize,
            SESSION_NORMAL as usize,
        ];
        let ours: Vec<String> = ours.iter().map(ToString::to_string).collect();
        assert_eq!(found, ours.join(" "));
    }
}
