//! A running guest: boot, wait for what its job reports, talk to it, see it off.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::accelerator;
use super::console::Console;
use super::image::GuestImage;
use super::job;
use super::process::{OwnedProcess, check_interrupted};
use super::qemu::{Accelerator, Machine, QEMU, QemuVersion};
use super::qmp::Qmp;

/// Longest single wait on the console before signals and the watchdog are looked at again.
const WAIT_SLICE: Duration = Duration::from_millis(100);

/// In the guest's folder.
const AGENT_SOCKET: &str = "agent.sock";

/// What to boot and what to run in it.
#[derive(Clone, Debug)]
pub struct GuestOptions {
    /// vhost-user sockets; the job's `disk N` names the N-th of them.
    pub disks: Vec<PathBuf>,
    /// Shell script, run with `set -eu`. Its exit status decides whether the guest passed.
    pub job: String,
    /// More files for the guest: absolute path (in `/` or `/tmp`) and content.
    pub files: Vec<(String, Vec<u8>)>,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// Queues of each disk; the back end must offer as many.
    pub queues: u16,
    /// Delay before QEMU connects to a lost back end again; `None`: never.
    pub reconnect: Option<Duration>,
    /// The watchdog: a guest that runs longer than this is ended and has failed.
    pub time_limit: Duration,
    /// Instead of a boot, take a guest over from another QEMU that connects to this socket. All else must be the same.
    pub incoming: Option<PathBuf>,
    /// Whether the guest has a port for its guest agent, which the job starts by `guest_agent`; see [`Guest::agent_socket`].
    pub guest_agent: bool,
    /// How to run processors; `None`: KVM if it works on this machine, else emulation.
    pub accelerator: Option<Accelerator>,
}

impl Default for GuestOptions {
    fn default() -> GuestOptions {
        GuestOptions {
            disks: Vec::new(),
            job: String::new(),
            files: Vec::new(),
            memory_mib: 384,
            cpus: 1,
            queues: 1,
            reconnect: Some(Duration::from_millis(200)),
            time_limit: Duration::from_secs(300),
            incoming: None,
            guest_agent: false,
            accelerator: None,
        }
    }
}

/// What a guest that ended by itself left behind.
#[derive(Clone, Debug)]
pub struct GuestReport {
    /// Every result line, in order.
    pub results: Vec<(String, String)>,
    /// From the start of QEMU to its end.
    pub wall: Duration,
}

impl GuestReport {
    /// Key to last value.
    pub fn last(&self) -> BTreeMap<&str, &str> {
        self.results.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
    }
}

/// A guest under QEMU. Dropping it ends QEMU at once, as pulling the plug would.
#[derive(Debug)]
pub struct Guest {
    qemu: OwnedProcess,
    stdin: ChildStdin,
    console: Console,
    folder: PathBuf,
    started: Instant,
    deadline: Instant,
    /// Results before this position were handed out by `wait_for`.
    position: usize,
}

impl Guest {
    /// Starts a guest; its initramfs and logs (`job.log`, `console.log`, `qemu.log`) go to
    /// `folder`, which is created.
    ///
    /// Errors: no image or no QEMU on this machine. That the guest fails later shows in
    /// [`Guest::wait_for`] and [`Guest::finish`].
    pub fn boot(folder: &Path, options: &GuestOptions) -> Result<Guest> {
        let image = GuestImage::find()?;
        let accelerator = match options.accelerator {
            Some(accelerator) => accelerator,
            None => accelerator::best(&image)?,
        };
        Guest::boot_image(folder, options, &image, accelerator)
    }

    pub(super) fn boot_image(
        folder: &Path,
        options: &GuestOptions,
        image: &GuestImage,
        accelerator: Accelerator,
    ) -> Result<Guest> {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let initrd = folder.join("initrd");
        write_initrd(&initrd, image, options)?;
        let guest_agent = options.guest_agent.then(|| folder.join(AGENT_SOCKET));
        let machine = Machine {
            version: QemuVersion::detect()?,
            accelerator,
            image,
            initrd: &initrd,
            console_log: &folder.join("console.log"),
            memory_mib: options.memory_mib,
            cpus: options.cpus,
            queues: options.queues,
            reconnect: options.reconnect,
            disks: &options.disks,
            monitor: &folder.join("qmp.sock"),
            incoming: options.incoming.as_deref(),
            guest_agent: guest_agent.as_deref(),
        };
        let mut command = Command::new(QEMU);
        command.args(machine.arguments()?).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(create(&folder.join("qemu.log"))?);
        let mut qemu = OwnedProcess::spawn("QEMU", &mut command)?;
        let child = qemu.child_mut();
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("QEMU was started without pipes");
        };
        let started = Instant::now();
        Ok(Guest {
            qemu,
            stdin,
            console: Console::read(stdout, create(&folder.join("job.log"))?),
            folder: folder.to_owned(),
            started,
            deadline: started + options.time_limit,
            position: 0,
        })
    }

    /// QEMU's monitor.
    pub fn monitor(&self) -> Result<Qmp> {
        Qmp::connect(&self.folder.join("qmp.sock"))
    }

    /// Where the guest agent is spoken to, one client at a time.
    pub fn agent_socket(&self) -> PathBuf {
        self.folder.join(AGENT_SOCKET)
    }

    /// Process id of QEMU.
    pub fn pid(&self) -> u32 {
        self.qemu.pid()
    }

    /// Waits for the job's next result with this key (results handed out before do not count) and
    /// returns its value. Errors: the guest ended without it, or the watchdog ended the guest.
    pub fn wait_for(&mut self, key: &str) -> Result<String> {
        match self.wait_until(key, self.deadline)? {
            Some(value) => Ok(value),
            None => Err(self.watchdog(&format!("result '{key}'"))),
        }
    }

    /// As [`Guest::wait_for`], but gives up after `patience` with `None` and lets the guest run on.
    pub fn wait_for_at_most(&mut self, key: &str, patience: Duration) -> Result<Option<String>> {
        self.wait_until(key, self.deadline.min(Instant::now() + patience))
    }

    fn wait_until(&mut self, key: &str, until: Instant) -> Result<Option<String>> {
        loop {
            if let Some((position, value)) = self.console.wait_for(key, self.position, WAIT_SLICE) {
                self.position = position;
                return Ok(Some(value));
            }
            check_interrupted()?;
            if self.console.is_closed() {
                return Err(self.failure(&format!("ended without the result '{key}'")));
            }
            if Instant::now() >= until {
                return Ok(None);
            }
        }
    }

    /// Results reported up to now count as handed out: what is waited for next is reported after
    /// this call.
    pub fn skip_reported(&mut self) {
        self.position = self.console.results().len();
    }

    /// Says one word to the job, which waits for it by `await WORD`.
    pub fn say(&mut self, word: &str) -> Result<()> {
        writeln!(self.stdin, "{word}")
            .map_err(|error| self.failure(&format!("does not listen ({error})")))
    }

    /// Results so far.
    pub fn results(&self) -> Vec<(String, String)> {
        self.console.results()
    }

    /// Waits until the guest has switched itself off. Errors: the job failed, the guest crashed, or
    /// the watchdog ended it.
    pub fn finish(mut self) -> Result<GuestReport> {
        while !self.console.is_closed() {
            check_interrupted()?;
            if Instant::now() >= self.deadline {
                return Err(self.watchdog("its end"));
            }
            std::thread::sleep(super::process::POLL);
        }
        self.console.join();
        let rest =
            self.deadline.saturating_duration_since(Instant::now()).max(Duration::from_secs(5));
        self.qemu.wait(rest)?;
        let report = GuestReport { results: self.console.results(), wall: self.started.elapsed() };
        match report.last().get("exit") {
            Some(&"0") => Ok(report),
            Some(status) => {
                Err(self.failure(&format!("ran a job that ended with exit status {status}")))
            }
            None => Err(self.failure("ended before its job did")),
        }
    }

    /// Ends the guest at once, as pulling the plug would, and returns the results it had reported.
    pub fn pull_the_plug(mut self) -> Result<Vec<(String, String)>> {
        self.qemu.kill()?;
        self.console.join();
        Ok(self.console.results())
    }

    fn watchdog(&mut self, awaited: &str) -> anyhow::Error {
        let _ = self.qemu.kill();
        let seconds = self.started.elapsed().as_secs();
        self.failure(&format!("was ended by the watchdog after {seconds} s, waiting for {awaited}"))
    }

    fn failure(&self, what: &str) -> anyhow::Error {
        let mut text = format!("guest in {} {what}", self.folder.display());
        for name in ["console.log", "qemu.log"] {
            let content = std::fs::read(self.folder.join(name)).unwrap_or_default();
            let content = String::from_utf8_lossy(&content);
            let lines: Vec<&str> = content.lines().collect();
            let tail = lines[lines.len().saturating_sub(15)..].join("\n");
            text.push_str(&format!("\n--- end of {name}\n{tail}"));
        }
        text.push_str(&format!("\n--- end of job.log\n{}", self.console.tail()));
        anyhow!(text)
    }
}

fn write_initrd(path: &Path, image: &GuestImage, options: &GuestOptions) -> Result<()> {
    let base = std::fs::read(&image.initrd)
        .with_context(|| format!("cannot read {}", image.initrd.display()))?;
    let mut files = vec![("/job", options.job.as_bytes())];
    files.extend(options.files.iter().map(|(name, content)| (name.as_str(), content.as_slice())));
    std::fs::write(path, job::append(base, &job::archive(&files)))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn create(path: &Path) -> Result<File> {
    File::create(path).with_context(|| format!("cannot create {}", path.display()))
}
