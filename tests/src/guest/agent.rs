//! The `ballast` program as rigs and the demo run it: its command line with `--json`, and the daemon as a child.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use super::process::{OwnedProcess, POLL, check_interrupted};

/// A daemon that does not answer `status` after this time has failed to start.
const START_LIMIT: Duration = Duration::from_secs(60);

/// The program.
#[derive(Clone, Debug)]
pub struct Ballast {
    /// Its path.
    pub program: PathBuf,
}

impl Ballast {
    /// `$BALLAST_BIN`, or the one that cargo built beside the running program. Errors: neither is there.
    pub fn find() -> Result<Ballast> {
        if let Some(program) = std::env::var_os("BALLAST_BIN") {
            return Ok(Ballast { program: program.into() });
        }
        let own = std::env::current_exe().context("cannot tell where this program is")?;
        // Test programs are one folder deeper (`deps/`) than binaries.
        let beside = own.ancestors().skip(1).take(2).map(|folder| folder.join("ballast"));
        let program = beside.into_iter().find(|path| path.is_file()).ok_or_else(|| {
            let own = own.display();
            anyhow!("there is no program 'ballast' beside {own}: build it first (cargo build -p agent --bins)")
        })?;
        Ok(Ballast { program })
    }

    /// Runs a subcommand with `--json` and returns what it printed. Errors carry what it said on stderr.
    pub fn run(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = Command::new(&self.program);
        let output = command.args(arguments).arg("--json").stdin(Stdio::null()).output();
        let output = output.with_context(|| format!("cannot run {}", self.program.display()))?;
        parse(&format!("ballast {}", arguments.join(" ")), &output)
    }

    /// `store format URL --size SIZE`, with the default extent size.
    pub fn format_store(&self, url: &str, size: Option<&str>) -> Result<Value> {
        let mut arguments = vec!["store", "format", url];
        arguments.extend(size.iter().flat_map(|size| ["--size", size]));
        self.run(&arguments)
    }
}

fn parse(what: &str, output: &Output) -> Result<Value> {
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("'{what}' failed ({}): {}", output.status, said.trim());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text)
        .with_context(|| format!("'{what}' printed no JSON but: {}", text.trim()))
}

/// How to start the daemon.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// URL of the store.
    pub store: String,
    /// The cache's file.
    pub cache: PathBuf,
    /// Size of the cache if it does not exist yet, such as `512MiB`.
    pub cache_size: String,
    /// Folder of sockets.
    pub run_dir: PathBuf,
    /// File that the log is appended to, over restarts.
    pub log: PathBuf,
}

/// A running daemon. Dropping it is a kill -9.
#[derive(Debug)]
pub struct Agent {
    ballast: Ballast,
    options: AgentOptions,
    process: OwnedProcess,
}

impl Agent {
    /// Starts the daemon and waits until it answers. Errors: it ends or stays silent; the message has its last log lines.
    pub fn start(ballast: &Ballast, options: &AgentOptions) -> Result<Agent> {
        std::fs::create_dir_all(&options.run_dir)
            .with_context(|| format!("cannot create {}", options.run_dir.display()))?;
        let log = File::options().create(true).append(true).open(&options.log);
        let log = log.with_context(|| format!("cannot open {}", options.log.display()))?;
        let mut command = Command::new(&ballast.program);
        command.args(["agent", "--store", &options.store, "--cache"]).arg(&options.cache);
        command.args(["--cache-size", &options.cache_size, "--run-dir"]).arg(&options.run_dir);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let process = OwnedProcess::spawn("the agent", &mut command)?;
        let mut agent = Agent { ballast: ballast.clone(), options: options.clone(), process };
        agent.wait_until_ready()?;
        Ok(agent)
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        let control = self.options.run_dir.join("control.sock");
        loop {
            if let Some(status) = self.process.try_wait()? {
                bail!("the agent ended with {status} at its start\n{}", self.log_tail());
            }
            // A socket file may be left over from a killed agent: only an answer counts.
            let answer =
                if control.exists() { self.call(&["status"]) } else { Err(anyhow!("no socket")) };
            let Err(error) = answer else { return Ok(()) };
            check_interrupted()?;
            if Instant::now() >= deadline {
                let seconds = START_LIMIT.as_secs();
                bail!("the agent is not ready after {seconds} s ({error:#})\n{}", self.log_tail());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Runs a subcommand against this daemon.
    pub fn call(&self, arguments: &[&str]) -> Result<Value> {
        let run_dir = self.options.run_dir.to_string_lossy();
        let mut all = vec!["--run-dir", run_dir.as_ref()];
        all.extend(arguments);
        self.ballast.run(&all)
    }

    /// Creates a disk and attaches it. Returns its vhost-user socket.
    pub fn create_disk(&self, name: &str, size: &str) -> Result<PathBuf> {
        self.call(&["vdi", "create", name, "--size", size])?;
        let attached = self.call(&["vdi", "attach", name])?;
        Ok(text(&attached, "socket")?.into())
    }

    /// Process id of the daemon.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// kill -9.
    pub fn kill(mut self) -> Result<()> {
        if let Some(status) = self.process.try_wait()? {
            bail!("the agent had ended by itself with {status}\n{}", self.log_tail());
        }
        self.process.kill().map(|_| ())
    }

    /// SIGTERM; waits for the end in good order.
    pub fn terminate(mut self, patience: Duration) -> Result<()> {
        self.process.terminate(patience).with_context(|| self.log_tail())
    }

    /// The last lines of the daemon's log.
    pub fn log_tail(&self) -> String {
        let log = std::fs::read(&self.options.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(20)..].join("\n");
        format!("--- end of {}\n{tail}", self.options.log.display())
    }
}

/// A text in a JSON object. Errors: it is not there, or no text.
pub fn text<'a>(object: &'a Value, key: &str) -> Result<&'a str> {
    object[key].as_str().ok_or_else(|| anyhow!("there is no text '{key}' in {object}"))
}

/// A number in a JSON object. Errors: it is not there, or no number.
pub fn number(object: &Value, key: &str) -> Result<u64> {
    object[key].as_u64().ok_or_else(|| anyhow!("there is no number '{key}' in {object}"))
}

/// The path as an argument of a command line. Errors: it is not UTF-8.
pub fn argument(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| anyhow!("the path {} is not UTF-8", path.display()))
}
