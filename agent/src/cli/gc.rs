//! `gc run` and `gc status`.
//!
//! The agent collects by itself: a command that is interrupted leaves the cycle going on.

use super::output::{Output, fields};
use super::sizes::pinned;
use crate::api::gc::{GcEnded, GcPhase, GcRunning, GcStatus, UnmapStatus};
use crate::control::client::Client;
use crate::error::{Failure, Kind, Result};
use crate::units::{format_ms, format_size};
use clap::Subcommand;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

/// The agent's resource.
const RESOURCE: &str = "/v1/gc";
/// How often the agent is asked how far it is.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Debug, Subcommand)]
pub enum GcCommand {
    /// Begin a cycle of garbage collection now
    Run {
        /// Return when it has ended
        #[arg(long)]
        wait: bool,
    },
    /// Show what garbage collection does, did, and when it begins by itself; and what space is used for, as of when sizes
    /// were computed last
    Status,
}

/// Carries the command out.
///
/// # Errors
/// The agent's; with `--wait`, that the cycle came to nothing.
pub async fn run(command: GcCommand, run_dir: &Path, out: Output) -> Result<()> {
    let client = Client::new(run_dir);
    match command {
        GcCommand::Status => {
            let status: GcStatus = client.get(RESOURCE).await?;
            out.print(&status, table)
        }
        GcCommand::Run { wait } => {
            let mut status: GcStatus = client.post(RESOURCE, &()).await?;
            let id = status.running.as_ref().map(|running| running.id);
            if wait {
                status = look_on(&client, status, id, out).await?;
                let ended = status.last.as_ref().filter(|ended| Some(ended.id) >= id);
                if let Some(failure) = ended.and_then(|ended| ended.failure.as_ref()) {
                    let words = format!("garbage was not collected: {failure}");
                    return Err(Failure::new(Kind::Failed, words));
                }
            }
            out.print(&status, |status| match (&status.running, &status.last) {
                (None, Some(ended)) => outcome(ended),
                _ => "garbage is being collected; 'ballast gc status' shows how far it is".into(),
            })
        }
    }
}

/// Until the cycle has ended. How far it is goes to standard error, if that is a terminal.
async fn look_on(
    client: &Client,
    mut status: GcStatus,
    id: Option<u64>,
    out: Output,
) -> Result<GcStatus> {
    let terminal = std::io::stderr().is_terminal() && !out.json;
    while let Some(running) = status.running.as_ref().filter(|running| Some(running.id) == id) {
        if terminal {
            let reached = format_size(running.reachable);
            eprint!("\r\x1b[K{}: {} nodes, {reached} in use", doing(running), running.nodes);
        }
        tokio::time::sleep(LOOK).await;
        status = client.get(RESOURCE).await?;
    }
    if terminal {
        eprint!("\r\x1b[K");
    }
    Ok(status)
}

/// The phase; which pass it is, if there are several.
fn doing(running: &GcRunning) -> String {
    let phase = running.phase.as_str();
    match (running.phase, running.passes) {
        (GcPhase::Marking, 2..) => format!("{phase}, pass {} of {}", running.pass, running.passes),
        _ => phase.to_owned(),
    }
}

fn outcome(ended: &GcEnded) -> String {
    match &ended.failure {
        Some(failure) => format!("came to nothing after {}: {failure}", format_ms(ended.took)),
        None => {
            let mut words = format!(
                "gave back {} of data and {} of maps in {}; {} are in use",
                format_size(ended.reclaimed_data),
                format_size(ended.reclaimed_metadata),
                format_ms(ended.took),
                format_size(ended.reachable),
            );
            add_left_out(&mut words, ended.extents_left_out, ended.last_left_out.as_deref());
            words
        }
    }
}

fn add_left_out(words: &mut String, extents: u64, last: Option<&str>) {
    if let (1.., Some(why)) = (extents, last) {
        words.push_str(&format!("; {extents} extents left out, last: {why}"));
    }
}

fn unmapped(unmap: &UnmapStatus) -> String {
    let mut words = match (unmap.wanted, unmap.supported) {
        (false, _) => return "no: [gc] unmap is false".into(),
        (true, Some(false)) => {
            "no: the device has neither UNMAP nor a way to punch holes; free space stays taken there"
                .to_owned()
        }
        (true, _) => format!("{} since the start", format_size(unmap.bytes)),
    };
    if unmap.running {
        words.push_str(", going on");
    }
    if let Some(failure) = &unmap.last_failure {
        words.push_str(&format!("; failed {} times, last: {failure}", unmap.failures));
    }
    add_left_out(&mut words, unmap.extents_left_out, unmap.last_left_out.as_deref());
    words
}

fn table(status: &GcStatus) -> String {
    let idle = if status.computing_sizes { "computing sizes" } else { "idle" };
    let now = status.running.as_ref().map_or(idle.into(), |running| {
        let (doing, nodes) = (doing(running), running.nodes);
        format!("{doing}: {nodes} nodes, {} in use", format_size(running.reachable))
    });
    let space = match (status.free, status.capacity) {
        (Some(free), Some(capacity)) => {
            format!("{} of {} free", format_size(free), format_size(capacity))
        }
        _ => "not looked at yet".into(),
    };
    let mut when = Vec::new();
    if status.free_below > 0 {
        when.push(format!("when less than {} % are free", status.free_below));
    }
    if let Some(every) = status.every {
        when.push(format!("every {}", format_ms(every)));
    }
    let mut lines = vec![
        ("now", now),
        ("last cycle", status.last.as_ref().map_or("none since the start".into(), outcome)),
        (
            "since the start",
            format!("{} cycles gave back {}", status.cycles, format_size(status.reclaimed)),
        ),
        ("space", space),
        ("unmapped", unmapped(&status.unmap)),
        ("quarantine", format!("{}, until marking ends", format_size(status.quarantine))),
        ("begins", if when.is_empty() { "only when told".into() } else { when.join(", or ") }),
    ];
    lines.extend(pinned(status.used_for.as_ref()));
    fields(&lines)
}
