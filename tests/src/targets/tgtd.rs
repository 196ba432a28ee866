//! tgtd: UNMAP (if thin), reservations, no COMPARE AND WRITE. Reinstates sessions only with CHAP.

use super::{
    START_MAX, START_POLL, await_listener, backing_file, find_daemon, free_address, send_signal,
    spawn,
};
use crate::guest::OwnedProcess;
use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// With the port behind it: target names are unique in the world.
const TARGET: &str = "iqn.2026-01.org.ballast.tgtd:disk";
const USER: &str = "tester";
const SECRET: &str = "tgtd-secret-123";
/// Names the control sockets by a path of our own: nothing is left in /run.
const SOCKET_VARIABLE: &str = "TGT_IPC_SOCKET";
/// Suffix of that path.
const CONTROL: &str = "1";

/// How the target is set up.
#[derive(Clone, Debug)]
pub struct TgtOptions {
    /// Require CHAP; see [`TgtTarget::chap_file`].
    pub chap: bool,
    /// Offer UNMAP.
    pub thin: bool,
    /// Bytes of a logical block.
    pub block_size: u32,
}

impl Default for TgtOptions {
    fn default() -> Self {
        Self { chap: true, thin: true, block_size: 4096 }
    }
}

/// A running tgtd with one LUN.
#[derive(Debug)]
pub struct TgtTarget {
    dir: PathBuf,
    address: SocketAddr,
    options: TgtOptions,
    process: OwnedProcess,
}

impl TgtTarget {
    /// Starts a target whose files are in `dir`, with a LUN of `size` bytes.
    pub fn start(dir: &Path, size: u64, options: TgtOptions) -> Result<Self> {
        Self::start_at(dir, size, free_address()?, options)
    }

    /// The same at an address of the caller's choice, such as one in a namespace that the calling thread is in.
    pub fn start_at(
        dir: &Path,
        size: u64,
        address: SocketAddr,
        options: TgtOptions,
    ) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        backing_file(dir, size)?;
        std::fs::write(dir.join("chap"), format!("{USER}:{SECRET}\n"))?;
        let process = launch(dir, address, &options)?;
        Ok(Self { dir: dir.to_owned(), address, options, process })
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
        let target = name(self.address);
        match self.options.chap {
            true => {
                let file = self.chap_file();
                format!("iscsi://{USER}@{address}/{target}/1?chap-secret-file={}", file.display())
            }
            false => format!("iscsi://{address}/{target}/1"),
        }
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

    /// Kills the target (it ignores SIGTERM).
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill().map(drop)
    }

    /// Kills the target if it still runs, and starts it again at the same address.
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.process = launch(&self.dir, self.address, &self.options)?;
        Ok(())
    }
}

fn launch(dir: &Path, address: SocketAddr, options: &TgtOptions) -> Result<OwnedProcess> {
    let log = dir.join("tgtd.log");
    let mut command = Command::new(find_daemon("tgtd", "tgt")?);
    command.env(SOCKET_VARIABLE, dir.join("control"));
    command.args(["-D", "-C", CONTROL, "-t", "2", "--iscsi", &format!("portal={address}")]);
    let mut process = spawn("tgtd", &mut command, &log)?;
    await_listener(&mut process, address, &log)?;
    await_control(dir)?;
    set_up(dir, address, options)?;
    Ok(process)
}

/// Waits until the daemon takes commands, which it does only some time after it listens at its portal.
fn await_control(dir: &Path) -> Result<()> {
    let end = Instant::now() + START_MAX;
    loop {
        match admin(dir, &["--mode", "target", "--op", "show"]) {
            Err(_) if Instant::now() < end => std::thread::sleep(START_POLL),
            outcome => return outcome,
        }
    }
}

fn name(address: SocketAddr) -> String {
    format!("{TARGET}-{}", address.port())
}

fn set_up(dir: &Path, address: SocketAddr, options: &TgtOptions) -> Result<()> {
    let image = dir.join("lun.img").display().to_string();
    let block_size = options.block_size.to_string();
    let admin = |arguments: &[&str]| admin(dir, arguments);
    let target = ["--mode", "target", "--tid", "1"];
    let with = |more: &[&str]| admin(&[&target[..], more].concat());
    with(&["--op", "new", "-T", &name(address)])?;
    admin(&[
        "--mode",
        "logicalunit",
        "--op",
        "new",
        "--tid",
        "1",
        "--lun",
        "1",
        "--bstype",
        "rdwr",
        "--backing-store",
        &image,
        "--blocksize",
        &block_size,
    ])?;
    if options.thin {
        admin(&[
            "--mode",
            "logicalunit",
            "--op",
            "update",
            "--tid",
            "1",
            "--lun",
            "1",
            "--params",
            "thin_provisioning=1",
        ])?;
    }
    for (name, value) in [
        ("MaxRecvDataSegmentLength", "262144"),
        ("MaxXmitDataSegmentLength", "262144"),
        ("FirstBurstLength", "262144"),
        ("MaxBurstLength", "1048576"),
        ("InitialR2T", "No"),
    ] {
        with(&["--op", "update", "--name", name, "--value", value])?;
    }
    if options.chap {
        let account = ["--mode", "account", "--user", USER];
        admin(&[&account[..], &["--op", "new", "--password", SECRET]].concat())?;
        admin(&[&account[..], &["--op", "bind", "--tid", "1"]].concat())?;
    }
    // Last, so that nobody logs in to half a target.
    with(&["--op", "bind", "-I", "ALL"])
}

fn admin(dir: &Path, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new(find_daemon("tgtadm", "tgt")?);
    command.env(SOCKET_VARIABLE, dir.join("control"));
    command.args(["-C", CONTROL, "--lld", "iscsi"]).args(arguments);
    let output = command.output().context("cannot run tgtadm")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("tgtadm {} failed: {}", arguments.join(" "), said.trim());
    }
    Ok(())
}
