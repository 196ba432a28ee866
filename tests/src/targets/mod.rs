//! Real iSCSI targets on loopback, and a relay that misbehaves on demand.
//!
//! [`IstgtTarget`] has COMPARE AND WRITE and persistent reservations; [`TgtTarget`] has UNMAP and lacks
//! COMPARE AND WRITE; [`TcpRelay`] stands between an initiator and a target and delays, caps, holds, drops or
//! cuts what passes.
//!
//! Each target is one foreground process with its own port, control socket, log and backing file, all in a
//! directory that the caller gives. It ends with its owner. Start a rig from the thread that owns it (see
//! [`crate::guest::process`]).

mod istgt;
mod relay;
mod tgtd;

pub use istgt::IstgtTarget;
pub use relay::TcpRelay;
pub use tgtd::{TgtOptions, TgtTarget};

use crate::guest::OwnedProcess;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// Until a target that was started listens.
const START_MAX: Duration = Duration::from_secs(20);
/// Between two looks at whether it does.
const START_POLL: Duration = Duration::from_millis(10);

/// A loopback address that nobody listens on, from below the ports that the kernel gives to clients, one
/// of which could otherwise take it before the target does.
fn free_address() -> Result<SocketAddr> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let ports = 20_000..30_000_u16;
    let seed = (std::process::id() % u32::from(ports.end - ports.start)) as u16;
    for _ in ports.clone() {
        // Processes with neighbouring ids go apart.
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let offset = seed.wrapping_mul(37).wrapping_add(step) % (ports.end - ports.start);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, ports.start + offset));
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    bail!("all loopback ports from {} to {} are taken", ports.start, ports.end)
}

/// The path of a daemon, or words on how to get it.
fn find_daemon(name: &str, package: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.push("/usr/sbin".into());
    let found = dirs.into_iter().map(|dir| dir.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("{name} is missing: apt-get install {package}"))
}

/// A sparse backing file of `size` bytes, if it is not there yet.
fn backing_file(dir: &Path, size: u64) -> Result<PathBuf> {
    let path = dir.join("lun.img");
    let file = File::options().create(true).write(true).truncate(false).open(&path);
    let file = file.with_context(|| format!("cannot create {}", path.display()))?;
    file.set_len(size).with_context(|| format!("cannot size {}", path.display()))?;
    Ok(path)
}

/// Starts a daemon with its output in `log`.
fn spawn(name: &str, command: &mut Command, log: &Path) -> Result<OwnedProcess> {
    let file = File::options().create(true).append(true).open(log);
    let file = file.with_context(|| format!("cannot write {}", log.display()))?;
    command.stdin(std::process::Stdio::null()).stdout(file.try_clone()?).stderr(file);
    OwnedProcess::spawn(name, command)
}

/// Waits until `process` accepts connections at `address`.
fn await_listener(process: &mut OwnedProcess, address: SocketAddr, log: &Path) -> Result<()> {
    let end = Instant::now() + START_MAX;
    while TcpStream::connect(address).is_err() {
        if let Some(status) = process.try_wait()? {
            let said = std::fs::read_to_string(log).unwrap_or_default();
            bail!("the target ended at its start ({status}); it said:\n{said}");
        }
        if Instant::now() >= end {
            bail!("the target does not listen at {address} after {} s", START_MAX.as_secs());
        }
        std::thread::sleep(START_POLL);
    }
    Ok(())
}

fn send_signal(process: &OwnedProcess, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(process.pid()).context("a process id")?);
    kill(pid, signal).with_context(|| format!("cannot send {signal} to process {pid}"))
}
