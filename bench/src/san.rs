//! A shared device that can be frozen: istgt on loopback, stopped by a signal.
//!
//! With it frozen the flusher gets nowhere, so a ring fills up to the brim, as in an outage.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::process::Process;

const NODE_BASE: &str = "iqn.2026-01.org.ballast.bench";

/// A running target with one LUN.
#[derive(Debug)]
pub struct FreezableSan {
    process: Process,
    address: SocketAddr,
}

impl FreezableSan {
    /// Serves `image`, a file of `bytes`, with the target's own files in `dir`, on `core`.
    ///
    /// # Errors
    /// When istgt is missing or does not come up.
    pub fn start(image: &Path, bytes: u64, dir: &Path, core: usize) -> Result<Self> {
        let (address, control) = free_addresses()?;
        std::fs::write(dir.join("auth.conf"), "").context("write istgt's auth.conf")?;
        let config = dir.join("istgt.conf");
        std::fs::write(&config, configuration(image, bytes, dir, address, control))
            .context("write istgt.conf")?;
        let mut command = Command::new(find_istgt()?);
        command.arg("-D").arg("-c").arg(&config);
        let log = dir.join("istgt.log");
        let mut process = Process::spawn("istgt", command, Some(core), &log)?;
        process.wait_until("it listens", Duration::from_secs(20), || {
            TcpStream::connect(address).is_ok()
        })?;
        Ok(Self { process, address })
    }

    /// URL of the LUN.
    #[must_use]
    pub fn url(&self) -> String {
        format!("iscsi://{}/{NODE_BASE}:disk/0", self.address)
    }

    /// From now on nothing is answered; connections stay.
    ///
    /// # Errors
    /// When the signal cannot be sent.
    pub fn freeze(&self) -> Result<()> {
        kill(Pid::from_raw(self.process.pid() as i32), Signal::SIGSTOP).context("freeze istgt")
    }

    /// It goes on where it was.
    ///
    /// # Errors
    /// When the signal cannot be sent.
    pub fn thaw(&self) -> Result<()> {
        kill(Pid::from_raw(self.process.pid() as i32), Signal::SIGCONT).context("thaw istgt")
    }
}

fn find_istgt() -> Result<PathBuf> {
    ["/usr/sbin/istgt", "/usr/local/sbin/istgt", "/usr/bin/istgt"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.is_file())
        .context("istgt is missing: apt-get install istgt")
}

/// Two loopback addresses that nobody listens on now, below the ports that the kernel gives to
/// clients.
fn free_addresses() -> Result<(SocketAddr, SocketAddr)> {
    let first = 30_000 + (std::process::id() % 1000) as u16;
    let mut free = (first..first + 1000)
        .map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
        .filter(|address| TcpListener::bind(address).is_ok());
    free.next().zip(free.next()).context("no free loopback ports")
}

fn configuration(
    image: &Path,
    bytes: u64,
    dir: &Path,
    address: SocketAddr,
    control: SocketAddr,
) -> String {
    let (dir, image, mib) = (dir.display(), image.display(), bytes >> 20);
    format!(
        "[Global]
  NodeBase \"{NODE_BASE}\"
  PidFile {dir}/istgt.pid
  AuthFile {dir}/auth.conf
  LogFacility \"local7\"
  DiscoveryAuthMethod Auto
  MaxSessions 16
  MaxConnections 4
  MaxR2T 32
  FirstBurstLength 262144
  MaxBurstLength 1048576
  MaxRecvDataSegmentLength 262144
  InitialR2T Yes
  ImmediateData Yes
[UnitControl]
  AuthMethod Auto
  AuthGroup None
  Portal UC1 {control}
  Netmask 127.0.0.1
[PortalGroup1]
  Portal DA1 {address}
[InitiatorGroup1]
  InitiatorName \"ALL\"
  Netmask 127.0.0.1
[LogicalUnit1]
  TargetName disk
  Mapping PortalGroup1 InitiatorGroup1
  AuthMethod None
  AuthGroup None
  UnitType Disk
  BlockLength 4096
  QueueDepth 32
  LUN0 Storage {image} {mib}MB
"
    )
}
