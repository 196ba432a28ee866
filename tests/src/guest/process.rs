//! Child processes that end with the rig, and the one flag that says "stop".
//!
//! A child runs in a process group of its own, so that Ctrl-C at a terminal reaches the rig first, which then takes its
//! children down in order. It carries a parent-death signal: were the rig killed with -9, the kernel kills the child.
//! The kernel ties that signal to the *thread* that spawned the child, so spawn from the thread that owns the rig.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::Pid;

/// How often waits look at their condition.
pub const POLL: Duration = Duration::from_millis(20);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Makes SIGINT, SIGTERM and SIGHUP end this process in good order: every wait of a rig returns an error from then on,
/// so that the owners of processes and files unwind. Call first in `main`, before any other thread exists.
pub fn unwind_on_signals() -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("cannot block SIGINT, SIGTERM and SIGHUP")?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            while signals.wait().is_ok() {
                INTERRUPTED.store(true, Ordering::SeqCst);
            }
        })
        .context("cannot start the thread that waits for signals")?;
    Ok(())
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

    /// Sends SIGTERM and waits for the end. Errors: the process ignores it for `patience`, or ended by a signal or with
    /// a status other than 0.
    pub fn terminate(&mut self, patience: Duration) -> Result<()> {
        if self.try_wait()?.is_none() {
            nix::sys::signal::kill(Pid::from_raw(self.pid() as i32), Signal::SIGTERM)
                .with_context(|| format!("cannot send SIGTERM to {}", self.name))?;
        }
        let status = self.wait(patience)?;
        if let Some(signal) = status.signal() {
            bail!("{} did not end by itself: killed by signal {signal}", self.name);
        }
        if !status.success() {
            bail!("{} ended with {status} after SIGTERM", self.name);
        }
        Ok(())
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
    // SAFETY: the closure runs in the child between fork and exec. It calls only prctl, sigprocmask, getppid and raise,
    // all async-signal-safe, and neither allocates nor takes locks.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            // The rig may have blocked signals for its own thread; a child starts with none blocked.
            SigSet::empty().thread_set_mask()?;
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
    fn terminate_reports_a_process_that_did_not_end_by_itself() {
        let error = sleeper().terminate(Duration::from_secs(60)).expect_err("sleep has no handler");
        assert!(error.to_string().contains("signal 15"), "{error}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = OwnedProcess::spawn("agent", &mut Command::new("/nowhere/ballast"))
            .expect_err("nothing there");
        assert!(format!("{error:#}").contains("/nowhere/ballast"), "{error:#}");
    }
}
