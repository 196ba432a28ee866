//! Child processes under measurement: pinned, never leaked, their CPU time and memory read from
//! `/proc`.

use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

/// A running program. Dropping it kills it with SIGKILL and reaps it; so does the death of the
/// thread that started it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` with all its threads on `core` (or anywhere), its output appended to `log`.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(
        name: &str,
        mut command: Command,
        core: Option<usize>,
        log: &Path,
    ) -> Result<Self> {
        let out = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("open the log {}", log.display()))?;
        let err = out.try_clone().context("share the log")?;
        let cores = core.map(one_core).transpose()?;
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        // SAFETY: between fork and exec only two system calls are made, both async-signal-safe, and
        // nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                if let Some(cores) = &cores {
                    sched_setaffinity(Pid::from_raw(0), cores)?;
                }
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                Ok(())
            });
        }
        let child = command.spawn().with_context(|| format!("start {name} ({command:?})"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// The process's id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `ready` says so.
    ///
    /// # Errors
    /// When the program ends first or `timeout` is over; the message carries the end of its log.
    pub fn wait_until(
        &mut self,
        what: &str,
        timeout: Duration,
        mut ready: impl FnMut() -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + timeout;
        while !ready() {
            if let Some(status) = self.child.try_wait().context("look after the child")? {
                let signal = status.signal().map(|s| format!(" by signal {s}")).unwrap_or_default();
                bail!("{} ended ({status}{signal}) before {what}:\n{}", self.name, self.log_tail());
            }
            if Instant::now() > deadline {
                bail!("{}: no {what} within {timeout:?}:\n{}", self.name, self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// The last lines of the program's output.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// CPU time of all threads so far, user and system.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn cpu(&self) -> Result<Duration> {
        let path = format!("/proc/{}/stat", self.pid());
        let stat = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        Ok(ticks_to_time(cpu_ticks(&stat).with_context(|| format!("understand {path}"))?))
    }

    /// The value in KiB of a line of `/proc/PID/status` such as `RssAnon`, in bytes.
    ///
    /// # Errors
    /// When the process is gone or the line is missing.
    pub fn memory(&self, field: &str) -> Result<u64> {
        let path = format!("/proc/{}/status", self.pid());
        let status = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        status
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
            .and_then(|value| value.trim().strip_suffix(" kB")?.parse::<u64>().ok())
            .map(|kib| kib * 1024)
            .with_context(|| format!("no {field} in {path}"))
    }

    /// Asks the program to end (SIGTERM) and waits for it.
    ///
    /// # Errors
    /// When it does not end within `timeout`, or not with success.
    pub fn terminate(&mut self, timeout: Duration) -> Result<()> {
        signal::kill(Pid::from_raw(self.pid() as i32), Signal::SIGTERM)
            .with_context(|| format!("ask {} to end", self.name))?;
        let deadline = Instant::now() + timeout;
        loop {
            match self.child.try_wait().context("look after the child")? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("{} ended with {status}:\n{}", self.name, self.log_tail()),
                None if Instant::now() > deadline => {
                    bail!("{} ignores SIGTERM for {timeout:?}:\n{}", self.name, self.log_tail())
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Whether the program still runs.
    ///
    /// # Errors
    /// When its state cannot be read.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait().context("look after the child")?.is_none())
    }

    /// Kills the program at once, as a crash would, and reaps it. Its status tells whether it had
    /// ended by itself before.
    ///
    /// # Errors
    /// When it cannot be reaped.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill().context("kill the child")?;
        self.child.wait().context("reap the child")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// CPU time that the whole machine has spent so far on anything but idling, time that its host took
/// away from it included.
///
/// # Errors
/// When `/proc/stat` cannot be read.
pub fn machine_cpu() -> Result<Duration> {
    let stat = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    Ok(ticks_to_time(busy_ticks(&stat).context("understand /proc/stat")?))
}

/// CPU time of this process so far.
///
/// # Errors
/// When the kernel does not tell.
pub fn own_cpu() -> Result<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat").context("read /proc/self/stat")?;
    Ok(ticks_to_time(cpu_ticks(&stat).context("understand /proc/self/stat")?))
}

/// Ticks of the first line of `/proc/stat` other than idle and waiting for I/O.
fn busy_ticks(stat: &str) -> Option<u64> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line.split_ascii_whitespace().map_while(|n| n.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guest time is counted in user already.
    let busy = [0, 1, 2, 5, 6, 7].iter().filter_map(|&at| ticks.get(at)).sum();
    (ticks.len() >= 8).then_some(busy)
}

fn ticks_to_time(ticks: u64) -> Duration {
    // SAFETY: a query without side effects.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Duration::from_secs_f64(ticks as f64 / per_second as f64)
}

/// Pins the calling thread, and those it starts from now on, to `core`.
///
/// # Errors
/// When the machine has no such core.
pub fn pin_self(core: usize) -> Result<()> {
    sched_setaffinity(Pid::from_raw(0), &one_core(core)?)
        .with_context(|| format!("pin the client to core {core}: the measurements need two cores"))
}

/// Lets the calling thread, and those it starts from now on, run on every core.
///
/// # Errors
/// When the kernel refuses.
pub fn unpin_self() -> Result<()> {
    let mut set = CpuSet::new();
    for core in 0..CpuSet::count() {
        set.set(core).context("name all cores")?;
    }
    sched_setaffinity(Pid::from_raw(0), &set).context("run on all cores")
}

fn one_core(core: usize) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    set.set(core).with_context(|| format!("no core {core}"))?;
    Ok(set)
}

/// User plus system ticks in the text of `/proc/PID/stat`. The second field, the name, may hold
/// spaces and brackets, so fields are counted from its closing bracket.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let rest = &stat[stat.rfind(')')? + 1..];
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_found_behind_a_hostile_name() {
        let stat = "7 (a) b ( c) S 1 7 7 0 -1 4194304 90 0 0 0 30 12 0 0 20 0 1 0 5 6 7";
        assert_eq!(cpu_ticks(stat), Some(42));
        assert_eq!(cpu_ticks("7 a"), None);
    }

    #[test]
    fn busy_time_leaves_idling_out() {
        let stat = "cpu  10 20 30 4000 500 1 2 3 0 0\ncpu0 1 1 1 1\n";
        assert_eq!(busy_ticks(stat), Some(66));
        assert_eq!(busy_ticks("cpu  1 2"), None);
        assert!(machine_cpu().unwrap() >= own_cpu().unwrap());
    }

    #[test]
    fn a_process_is_pinned_measured_and_reaped() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sleep");
        command.arg("60");
        let log = dir.path().join("log");
        let mut process = Process::spawn("sleep", command, Some(0), &log).unwrap();
        process
            .wait_until("exec", Duration::from_secs(10), || true)
            .expect("a sleeping process is alive");
        assert!(process.cpu().unwrap() < Duration::from_secs(5));
        assert!(process.memory("VmRSS").unwrap() > 0);
        let pid = process.pid();
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "reaped");
    }
}
