//! The `ballast` agent as a child process, driven by its command line alone.
//!
//! Paths live in one directory: the control socket and the disks' sockets in `run`, the agent's log
//! in `agent.log`. Killing the agent keeps all of them, so that it can be started again.

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use serde_json::Value;

use crate::process::Process;

/// How long the agent may take to answer after its start.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a command may take before it counts as hung.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(300);

/// What the agent is started with.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// The `ballast` binary.
    pub binary: PathBuf,
    /// URL of the store.
    pub store: String,
    /// Cache device; a file that the agent creates if need be.
    pub cache: PathBuf,
    /// Its size in bytes.
    pub cache_bytes: u64,
    /// Directory for sockets and log.
    pub dir: PathBuf,
    /// More arguments of `ballast agent`.
    pub arguments: Vec<String>,
    /// Environment of the agent and of commands (secrets of a target).
    pub environment: Vec<(String, String)>,
    /// Core for all its threads.
    pub core: Option<usize>,
}

impl AgentConfig {
    /// The run directory.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// Runs `ballast` with `arguments` (no daemon needed) and returns what it prints.
    ///
    /// # Errors
    /// When the command fails; the message carries its error output.
    pub fn command(&self, arguments: &[&str]) -> Result<String> {
        let what = format!("ballast {}", arguments.join(" "));
        let mut out = tempfile::tempfile().context("make a file for the output")?;
        let mut err = tempfile::tempfile().context("make a file for the errors")?;
        let mut child = Command::new(&self.binary)
            .args(arguments)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(out.try_clone().context("share the output file")?)
            .stderr(err.try_clone().context("share the error file")?)
            .spawn()
            .with_context(|| format!("run {}", self.binary.display()))?;
        let deadline = Instant::now() + COMMAND_TIMEOUT;
        let status = loop {
            if let Some(status) = child.try_wait().context("look after the command")? {
                break status;
            }
            if Instant::now() > deadline {
                child.kill().context("end a hung command")?;
                child.wait().context("reap a hung command")?;
                bail!("{what} did not end within {COMMAND_TIMEOUT:?}");
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        let text = read_back(&mut out)?;
        ensure!(status.success(), "{what} ended with {status}:\n{text}{}", read_back(&mut err)?);
        Ok(text)
    }

    /// Formats the store, `bytes` large.
    ///
    /// # Errors
    /// When `store format` fails.
    pub fn format_store(&self, bytes: u64) -> Result<()> {
        let size = format!("{}MiB", bytes >> 20);
        self.command(&["store", "format", &self.store, "--size", &size])?;
        Ok(())
    }

    /// Waits until the kernel has let go of a killed agent's files: io_uring keeps them, and the locks
    /// on them, until its last request is done, which is a moment after the process was reaped.
    ///
    /// # Errors
    /// When a file stays locked: somebody else uses it.
    pub fn wait_for_release(&self) -> Result<()> {
        let store = self.store.strip_prefix("file:").map(PathBuf::from);
        let deadline = Instant::now() + START_TIMEOUT;
        for path in [Some(self.cache.clone()), store].into_iter().flatten() {
            while is_locked(&path)? {
                ensure!(Instant::now() < deadline, "{} stays locked", path.display());
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }

    /// The arguments of the daemon.
    #[must_use]
    pub fn agent_arguments(&self) -> Vec<String> {
        let mut out = vec![
            "agent".to_owned(),
            "--store".to_owned(),
            self.store.clone(),
            "--cache".to_owned(),
            self.cache.display().to_string(),
            "--cache-size".to_owned(),
            format!("{}MiB", self.cache_bytes >> 20),
            "--run-dir".to_owned(),
            self.run_dir().display().to_string(),
        ];
        out.extend(self.arguments.iter().cloned());
        out
    }
}

/// State of one disk as `vdi info` tells it.
#[derive(Debug, Clone, serde::Deserialize)]
pub struct VdiInfo {
    /// Last LSN given to a write.
    pub last_lsn: u64,
    /// Everything up to here is durable in the local log.
    pub flushed_lsn: u64,
    /// Everything up to here is in the store.
    pub committed_lsn: u64,
    /// Acknowledged and not yet in the store.
    pub dirty_bytes: u64,
}

/// A running agent. Dropping it kills it with SIGKILL.
#[derive(Debug)]
pub struct Agent {
    config: AgentConfig,
    process: Process,
}

impl Agent {
    /// Starts the agent without waiting for it.
    ///
    /// # Errors
    /// When the binary cannot be started.
    pub fn spawn(config: &AgentConfig) -> Result<Self> {
        std::fs::create_dir_all(config.run_dir()).context("create the run directory")?;
        let mut command = Command::new(&config.binary);
        command
            .args(config.agent_arguments())
            .envs(config.environment.iter().map(|(name, value)| (name, value)));
        let log = config.dir.join("agent.log");
        let process = Process::spawn("ballast agent", command, config.core, &log)?;
        Ok(Self { config: config.clone(), process })
    }

    /// Starts the agent and waits until it answers on its control socket.
    ///
    /// # Errors
    /// When it ends or does not answer; the message carries the end of its log.
    pub fn start(config: &AgentConfig) -> Result<Self> {
        let mut agent = Self::spawn(config)?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// Waits until the agent answers `status`.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn wait_ready(&mut self) -> Result<()> {
        let Self { config, process } = self;
        let run_dir = config.run_dir();
        let socket = run_dir.join("control.sock");
        let run_dir = run_dir.display().to_string();
        process.wait_until("it answers", START_TIMEOUT, || {
            socket.exists() && config.command(&["--run-dir", &run_dir, "--json", "status"]).is_ok()
        })
    }

    /// What it was started with.
    #[must_use]
    pub fn config(&self) -> &AgentConfig {
        &self.config
    }

    /// The process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// The process, to end it.
    pub fn process_mut(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Sends a command to the agent and parses its JSON answer (`null` when it prints nothing).
    ///
    /// # Errors
    /// When the command fails or prints something else.
    pub fn control(&self, arguments: &[&str]) -> Result<Value> {
        let run_dir = self.config.run_dir().display().to_string();
        let mut all = vec!["--run-dir", run_dir.as_str(), "--json"];
        all.extend(arguments);
        let text = self.config.command(&all)?;
        if text.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&text)
            .with_context(|| format!("ballast {} printed: {text}", arguments.join(" ")))
    }

    /// Creates a disk.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn create(&self, name: &str, bytes: u64) -> Result<()> {
        let size = format!("{}MiB", bytes >> 20);
        self.control(&["vdi", "create", name, "--size", &size])?;
        Ok(())
    }

    /// Attaches a disk and returns its vhost-user socket.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn attach(&self, name: &str) -> Result<PathBuf> {
        let answer = self.control(&["vdi", "attach", name])?;
        let socket = answer["socket"].as_str().context("`vdi attach` names no socket")?;
        Ok(PathBuf::from(socket))
    }

    /// Returns when everything acknowledged so far is committed to the store.
    ///
    /// # Errors
    /// When the agent cannot be asked.
    pub fn drain(&self) -> Result<()> {
        self.control(&["cache", "drain"])?;
        Ok(())
    }

    /// State of a disk.
    ///
    /// # Errors
    /// When the agent does not know it.
    pub fn info(&self, name: &str) -> Result<VdiInfo> {
        let answer = self.control(&["vdi", "info", name])?;
        serde_json::from_value(answer).context("understand `vdi info`")
    }

    /// Bytes of the cache as `status` tells: (dirty, clean, capacity).
    ///
    /// # Errors
    /// When the agent cannot be asked.
    pub fn cache_bytes(&self) -> Result<(u64, u64, u64)> {
        let answer = self.control(&["status"])?;
        let field = |name: &str| {
            answer["cache"][name].as_u64().with_context(|| format!("no cache.{name} in `status`"))
        };
        Ok((field("dirty_bytes")?, field("clean_bytes")?, field("capacity")?))
    }
}

/// Whether anybody holds a lock on any part of the file.
fn is_locked(path: &Path) -> Result<bool> {
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("open {}", path.display())),
    };
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock))
        .with_context(|| format!("ask for locks on {}", path.display()))?;
    Ok(lock.l_type != libc::F_UNLCK as i16)
}

fn read_back(file: &mut File) -> Result<String> {
    file.rewind().context("go back to the start of the output")?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).context("read the output")?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The binary beside the running program's (`target/PROFILE/ballast`), or `BALLAST_BIN`.
///
/// # Errors
/// When there is none; the message says how to build it.
pub fn find_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("BALLAST_BIN") {
        return Ok(PathBuf::from(path));
    }
    let own = std::env::current_exe().context("find the own program")?;
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("ballast"))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "no `ballast` binary near {}: run `cargo build -p agent` first, or set BALLAST_BIN",
                own.display()
            )
        })
}
