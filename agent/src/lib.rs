//! `ballast`: the daemon that gives every VM on this host virtual disks, and the commands to control it.
//!
//! ```text
//! cli/       grammar, tables; store commands work on devices, the others ask the daemon
//! control/   HTTP over a UNIX socket: server in the daemon, client in the commands
//! daemon     start, signals, stop
//! host/      wires store, cache and vhost servers together: attach, detach, drain, status
//! guest_agent/ speaks to QEMU's guest agent: freeze, thaw
//! metrics      the status in Prometheus' words
//! config, run_dir, names, units, notify, error, api: what the names say
//! ```
//!
//! Start reading in `daemon`, then `host`.

mod api;
mod cli;
mod config;
mod control;
mod daemon;
mod error;
#[cfg(fuzzing)]
pub mod fuzzing;
mod guest_agent;
mod host;
mod machine;
mod metrics;
mod names;
mod notify;
mod run_dir;
mod units;

/// Carries out the command line of this process.
#[must_use]
pub fn run() -> std::process::ExitCode {
    cli::run()
}
