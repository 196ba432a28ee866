//! Ballast as a server of the comparison: an agent with one attached disk.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use crate::agent::{Agent, AgentConfig};
use crate::process::Process;
use crate::server::Server;

/// Name of the one disk.
pub const DISK_NAME: &str = "bench";

/// A running agent and its disk's socket.
#[derive(Debug)]
pub struct Ballast {
    agent: Agent,
    socket: PathBuf,
}

impl Ballast {
    /// Starts an agent on a formatted store, creates the disk, attaches it.
    ///
    /// # Errors
    /// When a step fails.
    pub fn create(config: &AgentConfig, disk_bytes: u64) -> Result<Self> {
        let agent = Agent::start(config)?;
        agent.create(DISK_NAME, disk_bytes)?;
        Self::attach(agent, DISK_NAME)
    }

    /// Attaches a disk that is there.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn attach(agent: Agent, name: &str) -> Result<Self> {
        let socket = agent.attach(name)?;
        Ok(Self { agent, socket })
    }

    /// The agent.
    #[must_use]
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The agent, to kill it.
    pub fn agent_mut(&mut self) -> &mut Agent {
        &mut self.agent
    }
}

impl Server for Ballast {
    fn name(&self) -> &'static str {
        "Ballast"
    }

    fn socket(&self) -> &Path {
        &self.socket
    }

    fn process(&self) -> &Process {
        self.agent.process()
    }

    /// Drains the ring, then waits until the agent's threads are idle, so that its background work
    /// is not charged to the other server.
    fn settle(&mut self) -> Result<()> {
        self.agent.drain()?;
        let mut before = self.process().cpu()?;
        for _ in 0..50 {
            std::thread::sleep(Duration::from_millis(100));
            let now = self.process().cpu()?;
            if now - before <= Duration::from_millis(10) {
                break;
            }
            before = now;
        }
        Ok(())
    }
}
