//! An agent that tests start, crash and restart, with its store and cache in a scratch directory.
//!
//! Nothing outlives the rig: the agent is killed and reaped on drop (and by the kernel when the test's
//! thread dies), the directory is removed. Errors carry the end of the agent's log.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bench::agent::{Agent, AgentConfig, VdiInfo, find_binary};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// How long a restarted agent may take until a disk's socket accepts.
const SOCKET_TIMEOUT: Duration = Duration::from_secs(60);

/// Garbage is collected all the time, whatever is tested.
pub const COLLECTING: [&str; 4] = ["--gc-every", "5s", "--gc-rate", "0"];

/// How long an orderly shutdown may take.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(60);

/// Where the store lies.
#[derive(Debug, Clone)]
pub struct StoreSpec {
    /// URL; `None` for a file in the rig's directory.
    pub url: Option<String>,
    /// Size to format it with.
    pub bytes: u64,
    /// Environment that its secrets are passed in.
    pub environment: Vec<(String, String)>,
}

impl StoreSpec {
    /// A file of `bytes` in the rig's directory.
    #[must_use]
    pub fn file(bytes: u64) -> Self {
        Self { url: None, bytes, environment: Vec::new() }
    }

    /// A store elsewhere.
    #[must_use]
    pub fn url(url: impl Into<String>, bytes: u64) -> Self {
        Self { url: Some(url.into()), bytes, environment: Vec::new() }
    }
}

/// A scratch directory with a formatted store, and an agent that runs or not.
#[derive(Debug)]
pub struct AgentRig {
    config: AgentConfig,
    agent: Option<Agent>,
    killer: Option<JoinHandle<()>>,
    // Last, so that it is removed after the agent is gone.
    dir: TempDir,
}

impl AgentRig {
    /// Formats a store and prepares, but does not start, an agent with a cache of `cache_bytes`.
    ///
    /// # Errors
    /// When there is no `ballast` binary or the store cannot be formatted.
    pub fn new(store: &StoreSpec, cache_bytes: u64) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("ballast-rig-")
            .tempdir()
            .context("make a scratch directory")?;
        let url = match &store.url {
            Some(url) => url.clone(),
            None => format!("file:{}", dir.path().join("store.img").display()),
        };
        let config = AgentConfig {
            binary: find_binary()?,
            store: url,
            cache: dir.path().join("cache.img"),
            cache_bytes,
            dir: dir.path().to_owned(),
            arguments: COLLECTING.map(str::to_owned).to_vec(),
            environment: store.environment.clone(),
            core: None,
        };
        config.format_store(store.bytes)?;
        Ok(Self { config, agent: None, killer: None, dir })
    }

    /// The scratch directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What the agent is started with; changes take effect at the next start.
    pub fn config(&mut self) -> &mut AgentConfig {
        &mut self.config
    }

    /// Starts the agent and waits until it answers.
    ///
    /// # Errors
    /// When it runs already, ends, or does not answer.
    pub fn start(&mut self) -> Result<()> {
        ensure!(self.agent.is_none(), "the agent runs already");
        self.agent = Some(Agent::start(&self.config)?);
        Ok(())
    }

    /// Starts the agent and does not wait for anything: it recovers now.
    ///
    /// # Errors
    /// When it runs already or cannot be started.
    pub fn spawn(&mut self) -> Result<()> {
        ensure!(self.agent.is_none(), "the agent runs already");
        self.agent = Some(Agent::spawn(&self.config)?);
        Ok(())
    }

    /// The running agent.
    ///
    /// # Errors
    /// When there is none.
    pub fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("no agent runs")
    }

    /// Kills the agent with SIGKILL and reaps it.
    ///
    /// # Errors
    /// When none runs, or it had died by itself before.
    pub fn kill(&mut self) -> Result<()> {
        let mut agent = self.agent.take().context("no agent runs")?;
        // SIGKILL comes from us alone; any other end was the agent's own.
        let status = agent.process_mut().kill()?;
        let killed = status.signal() == Some(Signal::SIGKILL as i32);
        ensure!(killed, "the agent ended by itself ({status}):\n{}", self.log_tail());
        self.config.wait_for_release()
    }

    /// Has the agent killed with SIGKILL in `delay`, by another thread; [`Self::reap`] must follow.
    ///
    /// # Errors
    /// When no agent runs or a kill is under way.
    pub fn kill_in(&mut self, delay: Duration) -> Result<()> {
        ensure!(self.killer.is_none(), "a kill is under way");
        let pid = Pid::from_raw(self.agent()?.process().pid() as i32);
        self.killer = Some(std::thread::spawn(move || {
            std::thread::sleep(delay);
            // The pid is ours until the rig reaps it, which it does after joining this thread.
            let _ = kill(pid, Signal::SIGKILL);
        }));
        Ok(())
    }

    /// Waits for the kill that [`Self::kill_in`] began.
    ///
    /// # Errors
    /// When none was begun, or the agent had ended by itself before.
    pub fn reap(&mut self) -> Result<()> {
        self.join_killer()?;
        self.kill()
    }

    fn join_killer(&mut self) -> Result<()> {
        let killer = self.killer.take().context("no kill was begun")?;
        if killer.join().is_err() {
            bail!("the killing thread panicked");
        }
        Ok(())
    }

    /// Sends SIGTERM and waits for nothing.
    ///
    /// # Errors
    /// When no agent runs.
    pub fn ask_to_stop(&self) -> Result<()> {
        let pid = Pid::from_raw(self.agent()?.process().pid() as i32);
        kill(pid, Signal::SIGTERM).context("ask the agent to stop")
    }

    /// Waits for the kill that [`Self::kill_in`] began, where the agent, asked to stop, may have ended
    /// in order before it.
    ///
    /// # Errors
    /// When none was begun, or the agent ended with neither success nor by the kill.
    pub fn reap_stopping(&mut self) -> Result<()> {
        self.join_killer()?;
        let mut agent = self.agent.take().context("no agent runs")?;
        let status = agent.process_mut().kill()?;
        let fine = status.success() || status.signal() == Some(Signal::SIGKILL as i32);
        ensure!(fine, "the agent ended badly ({status}):\n{}", self.log_tail());
        self.config.wait_for_release()
    }

    /// Ends the agent by SIGTERM.
    ///
    /// # Errors
    /// When it does not end in time or not with success.
    pub fn shut_down(&mut self) -> Result<()> {
        let mut agent = self.agent.take().context("no agent runs")?;
        agent.process_mut().terminate(SHUTDOWN_TIMEOUT)
    }

    /// State of a disk.
    ///
    /// # Errors
    /// When the agent does not know it.
    pub fn info(&self, name: &str) -> Result<VdiInfo> {
        self.agent()?.info(name)
    }

    /// Runs `connect` until it succeeds: a restarted agent may still be about to listen.
    ///
    /// # Errors
    /// The last failure, with the agent's log, when the time is up or the agent has died.
    pub fn connect<T>(&mut self, mut connect: impl FnMut() -> Result<T>) -> Result<T> {
        let deadline = Instant::now() + SOCKET_TIMEOUT;
        loop {
            let error = match connect() {
                Ok(connected) => return Ok(connected),
                Err(error) => error,
            };
            let agent = self.agent.as_mut().context("no agent runs")?;
            if !agent.process_mut().is_running()? || Instant::now() > deadline {
                return Err(error.context(format!("agent's log:\n{}", self.log_tail())));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Writes the committed image of a disk, as the store alone holds it, to a file.
    ///
    /// # Errors
    /// When `store export` fails.
    pub fn export(&self, name: &str) -> Result<PathBuf> {
        let out = self.dir.path().join(format!("{name}.export"));
        let _ = std::fs::remove_file(&out);
        let path = out.display().to_string();
        self.config.command(&["store", "export", &self.config.store, name, &path])?;
        Ok(out)
    }

    /// `store check`, with no agent running.
    ///
    /// # Errors
    /// When it finds anything.
    pub fn check_store(&self) -> Result<()> {
        ensure!(self.agent.is_none(), "the agent runs");
        self.config.command(&["store", "check", &self.config.store])?;
        Ok(())
    }

    /// The end of the agent's log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = std::fs::read(self.dir.path().join("agent.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for AgentRig {
    fn drop(&mut self) {
        if let Some(killer) = self.killer.take() {
            let _ = killer.join();
        }
        self.agent = None;
    }
}
