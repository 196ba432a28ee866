//! Goal: whatever an operator gets wrong ends in one clear error that names the object and what to do, with the promised
//! exit code, and harms nothing: the agent that runs goes on, stores and caches stay as they are.
//! Method: the real binary, beside a healthy agent whose disk is under a verifying client; after each misdeed the
//! client goes on, the agent is stopped in good order, and store and cache are checked.

mod control;
mod devices;
mod full_disk;
mod legs;
mod lifecycle;
mod loss;
mod offline;
mod usage;

use std::ffi::OsStr;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bench::agent::find_binary;
use serde_json::Value;
use tests::agent_rig::{AgentRig, StoreSpec};
use tests::client::End;
use tests::client::Mix;
use tests::client::on_agent::{Client, DiskSpec, FrontEnd};

const MIB: u64 = 1 << 20;

/// No command that is refused takes this long; one that does hangs.
const PATIENCE: Duration = Duration::from_secs(90);

/// Exit codes of the contract.
const FAILED: i32 = 1;
const USAGE: i32 = 2;
const NOT_FOUND: i32 = 3;
const NO_AGENT: i32 = 4;
const PROBLEMS: i32 = 5;
const CONFLICT: i32 = 6;
const UNAVAILABLE: i32 = 7;

/// What a command left behind.
#[derive(Debug)]
struct Said {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Said {
    /// The command was refused: right exit code, nothing on stdout, one last line that has all the `words`.
    #[track_caller]
    fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert_eq!(self.stdout, "", "{self:#?}");
        let line = self.stderr.lines().last().unwrap_or_default();
        let line = if line.contains("try '--help'") {
            self.stderr.lines().next().unwrap_or_default()
        } else {
            line
        };
        for word in words {
            assert!(line.contains(word), "'{word}' is not in: {line}\n{self:#?}");
        }
        for bad in ["panicked", "RUST_BACKTRACE", "Os {", "Error("] {
            assert!(!self.stderr.contains(bad), "'{bad}' is in {self:#?}");
        }
    }

    /// The command succeeded; its output.
    #[track_caller]
    fn done(&self) -> &str {
        assert_eq!(self.code, Some(0), "{self:#?}");
        &self.stdout
    }

    /// The command succeeded; its output as JSON.
    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(self.done()).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }
}

/// Runs `ballast` to its end.
fn ballast<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Said {
    let mut command = Command::new(find_binary().expect("the program is built"));
    command.args(arguments).env_remove("BALLAST_RUN_DIR").env_remove("BALLAST_LOG");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    finish(command.spawn().expect("the program starts"))
}

/// Starts a command for the agent of a run directory.
fn spawn(run_dir: &str, arguments: &[&str]) -> std::process::Child {
    Command::new(find_binary().expect("the program is built"))
        .args(["--run-dir", run_dir])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Splits at spaces: for arguments without any.
fn line(text: &str) -> Said {
    ballast(text.split_whitespace())
}

fn finish(mut child: Child) -> Said {
    let out = read_all(child.stdout.take());
    let err = read_all(child.stderr.take());
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let said = Said {
        code: status.and_then(|status| status.code()),
        stdout: out.join().unwrap(),
        stderr: err.join().unwrap(),
    };
    assert!(status.is_some(), "the command hangs: {said:#?}");
    said
}

fn read_all(from: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut from) = from {
            let _ = from.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// A healthy agent with one disk, and a client on it that verifies.
struct Good {
    rig: AgentRig,
    client: Client,
    mutations: u64,
}

impl Good {
    /// Starts all of it and puts data on the disk.
    fn start() -> Self {
        let mut rig = AgentRig::new(&StoreSpec::file(512 * MIB), 64 * MIB).unwrap();
        rig.start().unwrap();
        let spec = DiskSpec {
            disk: 1,
            bytes: 32 * MIB,
            seed: 1,
            mix: Mix::default(),
            front_end: FrontEnd::Own,
            switch_write_cache: false,
        };
        let client = Client::create(&mut rig, &spec).unwrap();
        let mut good = Self { rig, client, mutations: 0 };
        good.works().unwrap();
        good
    }

    /// More load on the disk; all of it is read back.
    fn works(&mut self) -> Result<()> {
        self.mutations += 300;
        let goal = self.mutations;
        let end = self.client.runner.run(|counts| counts.mutations >= goal)?;
        ensure!(end == End::Stopped, "the good agent went away:\n{}", self.rig.log_tail());
        self.client.runner.verify()
    }

    /// The agent's run directory.
    fn run_dir(&mut self) -> String {
        self.rig.config().run_dir().display().to_string()
    }

    /// A command for this agent.
    fn ask(&mut self, arguments: &[&str]) -> Said {
        let run_dir = self.run_dir();
        ballast(["--run-dir", &run_dir].iter().chain(arguments))
    }

    /// `agent` with these flags, which is to be refused.
    fn second_agent(&mut self, store: &str, cache: &Path, run_dir: &Path) -> Said {
        let (cache, run_dir) = (cache.to_str().unwrap(), run_dir.to_str().unwrap());
        ballast([
            "agent",
            "--store",
            store,
            "--cache",
            cache,
            "--cache-size",
            "32MiB",
            "--run-dir",
            run_dir,
        ])
    }

    fn store(&mut self) -> String {
        self.rig.config().store.clone()
    }

    fn cache(&mut self) -> std::path::PathBuf {
        self.rig.config().cache.clone()
    }

    /// The agent goes on, stops in good order, and has left a sound store and cache.
    fn assert_unharmed(mut self) {
        self.works().unwrap();
        let cache = self.cache();
        drop(self.client);
        self.rig.shut_down().unwrap();
        self.rig.check_store().unwrap();
        ballast([OsStr::new("cache"), "check".as_ref(), cache.as_os_str()]).done();
    }
}

/// A formatted store of its own, in a directory that goes away.
struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    fn new() -> Self {
        let scratch = Self { dir: tempfile::tempdir().unwrap() };
        ballast(["store", "format", &scratch.store(), "--size", "256MiB"]).done();
        scratch
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn store(&self) -> String {
        format!("file:{}", self.path("store"))
    }

    /// `agent` on this store and `cache`, which is to be refused.
    fn agent(&self, cache: &str, more: &[&str]) -> Said {
        let (store, cache, run) = (self.store(), self.path(cache), self.path("run"));
        let fixed = ["agent", "--store", &store, "--cache", &cache, "--run-dir", &run];
        ballast(fixed.iter().chain(more))
    }

    /// Everything that a misdeed must leave as it was.
    fn content(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }
}
