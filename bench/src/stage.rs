//! An agent on a synthetic store.
//!
//! Extents belong to the host that claimed them, and only that host collects them. So the agent is started once on the empty
//! store, to learn which host it is, and ended; the store is filled in that host's name; then the agent is started again.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use tempfile::TempDir;
use uuid::Uuid;

use crate::agent::{Agent, AgentConfig};
use crate::control::Control;
use crate::suite::Settings;
use crate::synthetic::{self, Shape};

/// No cycle begins by itself.
pub const NO_CYCLES: [&str; 4] = ["--gc-every", "0s", "--gc-free-below", "0"];
/// A cycle reads as fast as it can.
pub const NO_LIMIT: [&str; 2] = ["--gc-rate", "0"];

/// Patience with the agent's end.
const END: Duration = Duration::from_secs(60);

/// A running agent with its files, which go with it.
#[derive(Debug)]
pub struct Stage {
    /// The agent.
    pub agent: Agent,
    /// From the agent's start until it has listed the store's disks.
    pub started: Duration,
    /// The store's file.
    pub image: PathBuf,
    dir: TempDir,
}

impl Stage {
    /// Makes the store and starts the agent, with these arguments and those of the settings, on `core` or on all.
    ///
    /// # Errors
    /// When there is no agent to measure, or it fails, or the file system has no room for the metadata.
    pub fn new(
        settings: &Settings,
        shape: &Shape,
        cache_bytes: u64,
        core: Option<usize>,
        arguments: &[&str],
    ) -> Result<Self> {
        let binary = settings.ballast.as_ref().context("no `ballast` binary to measure")?;
        let dir = tempfile::tempdir_in(&settings.dir).context("make a directory")?;
        let image = dir.path().join("store.img");
        let own = arguments.iter().map(|&argument| argument.to_owned());
        let config = AgentConfig {
            binary: binary.clone(),
            store: format!("file:{}", image.display()),
            cache: dir.path().join("cache.img"),
            cache_bytes,
            dir: dir.path().to_owned(),
            arguments: own.chain(settings.agent_arguments.iter().cloned()).collect(),
            environment: Vec::new(),
            core,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        runtime.block_on(synthetic::format(&image, shape)).context("format a synthetic store")?;
        let mut agent = Agent::start(&config)?;
        agent.process_mut().terminate(END)?;
        config.wait_for_release()?;
        let info = config.command(&["--json", "store", "info", &config.store])?;
        let info: Value = serde_json::from_str(&info).context("understand `store info`")?;
        let host = info["hosts"][0]["uuid"].as_str().context("no host in `store info`")?;
        let host = Uuid::try_parse(host).context("understand the host's identity")?;
        runtime
            .block_on(synthetic::build(&image, shape, host))
            .context("fill a synthetic store")?;
        drop(runtime);
        config.wait_for_release()?;
        let begun = Instant::now();
        let agent = Agent::start(&config)?;
        Control::connect(&config.run_dir())?.get("/v1/vdis")?;
        Ok(Self { agent, started: begun.elapsed(), image, dir })
    }

    /// The agent, and its files, which are to outlive it.
    #[must_use]
    pub fn into_parts(self) -> (Agent, TempDir) {
        (self.agent, self.dir)
    }

    /// A connection to the agent.
    ///
    /// # Errors
    /// When it does not listen.
    pub fn control(&self) -> Result<Control> {
        Control::connect(&self.agent.config().run_dir())
    }
}
