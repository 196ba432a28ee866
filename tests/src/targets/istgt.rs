//! istgt: COMPARE AND WRITE, persistent reservations, no UNMAP. Takes one second for each login.

use super::{await_listener, backing_file, find_daemon, free_address, send_signal, spawn};
use crate::guest::OwnedProcess;
use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const NODE_BASE: &str = "iqn.2026-01.org.ballast.istgt";
/// With the port behind it: target names are unique in the world.
const TARGET: &str = "disk";
const USER: &str = "tester";
/// Some initiators want 12 to 16 characters.
const SECRET: &str = "istgt-secret-1";

/// A running istgt with one LUN of 4096-byte blocks.
#[derive(Debug)]
pub struct IstgtTarget {
    dir: PathBuf,
    address: SocketAddr,
    chap: bool,
    process: OwnedProcess,
}

impl IstgtTarget {
    /// Starts a target whose files are in `dir`, with a LUN of `size` bytes.
    pub fn start(dir: &Path, size: u64) -> Result<Self> {
        Self::start_with(dir, size, false)
    }

    /// The same with CHAP required; see [`chap_file`](Self::chap_file).
    pub fn start_with(dir: &Path, size: u64, chap: bool) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let image = backing_file(dir, size)?;
        let address = free_address()?;
        let auth = dir.join("auth.conf");
        std::fs::write(&auth, format!("[AuthGroup1]\n  Auth \"{USER}\" \"{SECRET}\"\n"))?;
        std::fs::set_permissions(&auth, std::fs::Permissions::from_mode(0o600))?;
        std::fs::write(dir.join("chap"), format!("{USER}:{SECRET}\n"))?;
        let config = config(dir, &image, size, address, free_address()?, chap);
        std::fs::write(dir.join("istgt.conf"), config).context("cannot write istgt.conf")?;
        let process = launch(dir, address)?;
        Ok(Self { dir: dir.to_owned(), address, chap, process })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The LUN's URL.
    pub fn url(&self) -> String {
        self.url_through(self.address)
    }

    /// The LUN's URL by way of a relay.
    pub fn url_through(&self, address: SocketAddr) -> String {
        let port = self.address.port();
        let query = match self.chap {
            true => format!("?chap-secret-file={}", self.chap_file().display()),
            false => String::new(),
        };
        format!("iscsi://{address}/{NODE_BASE}:{TARGET}-{port}/0{query}")
    }

    /// `USER:SECRET` in a file.
    pub fn chap_file(&self) -> PathBuf {
        self.dir.join("chap")
    }

    /// The file behind the LUN.
    pub fn image(&self) -> PathBuf {
        self.dir.join("lun.img")
    }

    /// Freezes the target: connections stay, nothing is answered.
    pub fn stop(&self) -> Result<()> {
        send_signal(&self.process, Signal::SIGSTOP)
    }

    /// Ends a freeze.
    pub fn cont(&self) -> Result<()> {
        send_signal(&self.process, Signal::SIGCONT)
    }

    /// Kills the target.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill().map(drop)
    }

    /// Kills the target if it still runs, and starts it again at the same address.
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.process = launch(&self.dir, self.address)?;
        Ok(())
    }
}

fn launch(dir: &Path, address: SocketAddr) -> Result<OwnedProcess> {
    let log = dir.join("istgt.log");
    let mut command = Command::new(find_daemon("istgt", "istgt")?);
    command.arg("-D").arg("-c").arg(dir.join("istgt.conf"));
    let mut process = spawn("istgt", &mut command, &log)?;
    await_listener(&mut process, address, &log)?;
    Ok(process)
}

fn config(
    dir: &Path,
    image: &Path,
    size: u64,
    address: SocketAddr,
    control: SocketAddr,
    chap: bool,
) -> String {
    let (dir, image, mib) = (dir.display(), image.display(), size >> 20);
    let port = address.port();
    let (method, group) = if chap { ("CHAP", "AuthGroup1") } else { ("None", "None") };
    format!(
        r#"[Global]
  NodeBase "{NODE_BASE}"
  PidFile {dir}/istgt.pid
  AuthFile {dir}/auth.conf
  LogFacility "local7"
  Timeout 30
  NopInInterval 20
  DiscoveryAuthMethod Auto
  MaxSessions 16
  MaxConnections 4
  MaxR2T 32
  MaxOutstandingR2T 16
  DefaultTime2Wait 2
  DefaultTime2Retain 60
  FirstBurstLength 262144
  MaxBurstLength 1048576
  MaxRecvDataSegmentLength 262144
  InitialR2T Yes
  ImmediateData Yes
  DataPDUInOrder Yes
  DataSequenceInOrder Yes
  ErrorRecoveryLevel 0
[UnitControl]
  AuthMethod Auto
  AuthGroup None
  Portal UC1 {control}
  Netmask 127.0.0.1
[PortalGroup1]
  Portal DA1 {address}
[InitiatorGroup1]
  InitiatorName "ALL"
  Netmask 127.0.0.1
[LogicalUnit1]
  TargetName {TARGET}-{port}
  Mapping PortalGroup1 InitiatorGroup1
  AuthMethod {method}
  AuthGroup {group}
  UseDigest Auto
  UnitType Disk
  BlockLength 4096
  QueueDepth 32
  LUN0 Storage {image} {mib}MB
"#
    )
}
