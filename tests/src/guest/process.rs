//! Child processes that end with the rig, and the one flag that says "stop".
//!
//! A child runs in a process group of its own, so that Ctrl-C at a terminal reaches the rig, which
//! then takes its children down in order. It carries a parent-death signal: were the rig killed
//! with -9, the kernel kills the child. The kernel ties that signal to the *thread* that spawned
//! the child, so spawn from the thread that owns the rig.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// How often waits look at their condition.
pub const POLL: Duration = Duration::from_millis(20);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Makes SIGINT, SIGTERM and SIGHUP end this process in good order: every wait of a rig returns an
/// error from then on, so that the owners of processes and files unwind. (A handler, not a blocked
/// signal: a child would inherit the block.)
pub fn unwind_on_signals() -> Result<()> {
    let action =
        SigAction::new(SigHandler::Handler(note_signal), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("cannot handle {signal}"))?;
    }
    Ok(())
}

extern "C" fn note_signal(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// Fails once a signal asked this process to end. Every wait of a rig calls it.
pub fn check_interrupted() -> Result<()> {
    if INTERRUPTED.load(Ordering::SeqCst) {
        bail!("interrupted by a signal");
    }
    Ok(())
}

/// A child process that is killed and reaped when its owner goes.
#[derive(Debug)]
pub struct OwnedProcess {
    name: String,
    child: Child,
}

impl OwnedProcess {
    /// Starts `command`; `name` is what errors call it.
    pub fn spawn(name: &str, command: &mut Command) -> Result<OwnedProcess> {
        prepare(command);
        let child = command.spawn().with_context(|| {
            format!("cannot start {name} ({})", command.get_program().display())
        })?;
        Ok(OwnedProcess { name: name.to_owned(), child })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The child's pipes, as far as the command asked for them.
    pub fn child_mut(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The exit status if the process has ended.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("cannot wait for {}", self.name))
    }

    /// Ends the process with SIGKILL and reaps it. Returns its exit status.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        // An error here means that it has ended already: wait() then tells how.
        let _ = self.child.kill();
        self.child.wait().with_context(|| format!("cannot reap {}", self.name))
    }

    /// Waits for the end. Errors: still running after `patience`.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            check_interrupted()?;
            if Instant::now() >= deadline {
                bail!("{} is still running after {} s", self.name, patience.as_secs());
            }
            std::thread::sleep(POLL);
        }
    }
}

impl Drop for OwnedProcess {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

fn prepare(command: &mut Command) {
    let parent = nix::unistd::getpid();
    command.process_group(0);
    // SAFETY: the closure runs in the child between fork and exec. It calls only prctl, getppid and
    // raise, all async-signal-safe, and neither allocates nor takes locks.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            // The parent may have died before the signal was set up.
            if nix::unistd::getppid() != parent {
                nix::sys::signal::raise(Signal::SIGKILL)?;
            }
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use nix::unistd::Pid;

    use super::*;

    fn sleeper() -> OwnedProcess {
        OwnedProcess::spawn("sleeper", Command::new("sleep").arg("600")).expect("spawn")
    }

    fn exists(pid: u32) -> bool {
        nix::sys::signal::kill(Pid::from_raw(pid as i32), None).is_ok()
    }

    #[test]
    fn dropping_the_owner_ends_the_process() {
        let process = sleeper();
        let pid = process.pid();
        assert!(exists(pid));
        drop(process);
        assert!(!exists(pid));
    }

    #[test]
    fn waiting_for_a_process_that_stays_ends_with_its_name() {
        let error = sleeper().wait(Duration::from_millis(50)).expect_err("it sleeps on");
        assert!(error.to_string().contains("sleeper is still running"), "{error}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = OwnedProcess::spawn("agent", &mut Command::new("/nowhere/ballast"))
            .expect_err("nothing there");
        assert!(format!("{error:#}").contains("/nowhere/ballast"), "{error:#}");
    }
}
