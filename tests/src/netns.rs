//! Two network namespaces with a cable between them that can be pulled.
//!
//! The namespaces have no names: file descriptors and the processes in them keep them alive, so that whatever ends a test,
//! kill -9 included, takes namespaces, cable and addresses with it. [`Namespace::enter`] puts the calling thread into a
//! namespace for the length of a closure; what it starts there stays there. UNIX sockets are reached from
//! everywhere.
//!
//! Needs root, `ip` (iproute2), and a kernel with veth.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns, unshare};

const OWN: &str = "/proc/thread-self/ns/net";
/// The cable's ends; names are private to their namespaces.
const NEAR: &str = "near";
const FAR: &str = "far";

/// A network namespace that lives as long as this or any process in it.
#[derive(Debug)]
pub struct Namespace {
    file: File,
}

impl Namespace {
    /// A new one, with its loopback device up.
    ///
    /// # Errors
    /// Without the right to.
    pub fn new() -> Result<Self> {
        // In a thread of its own: it stays in the new namespace until it ends.
        let made = std::thread::spawn(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace (root?)")?;
            File::open(OWN).with_context(|| format!("cannot open {OWN}"))
        });
        let Ok(file) = made.join() else { bail!("the thread that makes a namespace panicked") };
        let namespace = Self { file: file? };
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Runs `inside` with the calling thread in this namespace.
    ///
    /// # Errors
    /// Those of `inside`, and when the namespace cannot be entered.
    ///
    /// # Panics
    /// When there is no way back: everything after would happen in the wrong place.
    pub fn enter<T>(&self, inside: impl FnOnce() -> Result<T>) -> Result<T> {
        let home = Home(File::open(OWN).with_context(|| format!("cannot open {OWN}"))?);
        setns(&self.file, CloneFlags::CLONE_NEWNET).context("cannot enter a namespace")?;
        let result = inside();
        drop(home);
        result
    }

    /// A path that names it for other programs while this process lives.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    fn ip(&self, arguments: &[&str]) -> Result<()> {
        self.enter(|| {
            let output = Command::new("ip").args(arguments).output().context("cannot run ip")?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "ip {} failed: {}", arguments.join(" "), said.trim());
            Ok(())
        })
    }
}

/// Goes back when dropped, by a panic too.
struct Home(File);

impl Drop for Home {
    fn drop(&mut self) {
        setns(&self.0, CloneFlags::CLONE_NEWNET).expect("the way back to the first namespace");
    }
}

/// A host's namespace and a SAN's, and the cable between them.
#[derive(Debug)]
pub struct Network {
    /// Where the agent runs.
    pub host: Namespace,
    /// Where the target runs.
    pub san: Namespace,
}

impl Network {
    /// The target's address on the cable.
    pub const SAN_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

    /// Two namespaces, cabled up.
    ///
    /// # Errors
    /// When the kernel or `ip` refuses; the message carries its words.
    pub fn new() -> Result<Self> {
        let network = Self { host: Namespace::new()?, san: Namespace::new()? };
        network.host.ip(&["link", "add", NEAR, "type", "veth", "peer", "name", FAR])?;
        network.host.ip(&["link", "set", FAR, "netns", &network.san.path()])?;
        network.host.ip(&["address", "add", "10.77.0.1/24", "dev", NEAR])?;
        network.san.ip(&["address", "add", "10.77.0.2/24", "dev", FAR])?;
        network.host.ip(&["link", "set", NEAR, "up"])?;
        network.san.ip(&["link", "set", FAR, "up"])?;
        Ok(network)
    }

    /// Pulls the cable: what either side sends is lost without a word.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn cut(&self) -> Result<()> {
        self.san.ip(&["link", "set", FAR, "down"])
    }

    /// Plugs it in again.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn restore(&self) -> Result<()> {
        self.san.ip(&["link", "set", FAR, "up"])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::time::Duration;

    #[test]
    fn a_cable_carries_is_cut_and_carries_again() {
        let network = Network::new().expect("namespaces");
        let bind = || Ok(TcpListener::bind((Network::SAN_ADDRESS, 0))?);
        let listener = network.san.enter(bind).expect("a listener");
        let address = listener.local_addr().expect("its address");
        let connect = |patience| {
            let dial = |to: SocketAddr| Ok(TcpStream::connect_timeout(&to, patience)?);
            network.host.enter(|| dial(address))
        };
        connect(Duration::from_secs(20)).expect("a connection");
        // The first namespace knows nothing of it.
        assert!(TcpStream::connect_timeout(&address, Duration::from_millis(200)).is_err());
        network.cut().expect("cut");
        assert!(connect(Duration::from_millis(300)).is_err());
        network.restore().expect("restore");
        connect(Duration::from_secs(20)).expect("a connection again");
    }
}
