//! How long a thread's turns on a processor are.
//!
//! Threads that answer somebody share processors with others that compute for long: commits, collection. Under EEVDF (Linux 6.12 and
//! later) a thread may ask for shorter turns than the others have. It gets no more of the processor by that, but when it is woken it
//! does not wait for the end of a longer turn, unless it had more than its share just before.

use std::io;
use std::time::Duration;

/// Asks for turns of this length for the calling thread, and for those that it starts; the kernel makes 0.1 ms to 100 ms of it. Takes
/// no privilege. Former kernels know only one length, and say nothing. A thread with a real-time policy keeps what it was given.
///
/// # Errors
/// The system call's: a sandbox may forbid it. Nothing has changed then.
pub fn take_turns_of(length: Duration) -> io::Result<()> {
    let mut attributes = attributes()?;
    if ![libc::SCHED_OTHER, libc::SCHED_BATCH].contains(&attributes.sched_policy.cast_signed()) {
        return Ok(());
    }
    attributes.sched_runtime = u64::try_from(length.as_nanos()).unwrap_or(u64::MAX);
    // SAFETY: the structure is as long as it says, and only read.
    let set = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How the calling thread is scheduled.
fn attributes() -> io::Result<libc::sched_attr> {
    // SAFETY: integers, for which zero is a value.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>();
    // SAFETY: the kernel writes at most `size` bytes to a structure that is as long.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    if got == 0 { Ok(attributes) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_a_length_and_leaves_the_rest() {
        // A thread of its own: the others of the test keep theirs.
        let turns = || -> io::Result<()> {
            let before = attributes()?;
            take_turns_of(Duration::from_micros(300))?;
            let after = attributes()?;
            assert_eq!(
                (after.sched_policy, after.sched_nice),
                (before.sched_policy, before.sched_nice)
            );
            // 0: a kernel that knows one length only.
            assert!([0, 300_000].contains(&after.sched_runtime), "{}", after.sched_runtime);
            Ok(())
        };
        std::thread::spawn(turns).join().expect("no panic").expect("no sandbox forbids it");
    }
}
