//! `scrub run`, `scrub status` and `scrub stop`.
//!
//! The agent scrubs by itself: a command that is interrupted leaves the pass going on.

use super::output::{Output, counted, fields};
use crate::api::scrub::{ScrubEnded, ScrubRunning, ScrubStatus};
use crate::control::client::Client;
use crate::error::{Failure, Kind, Result};
use crate::units::{format_ms, format_size};
use blockstore::types::BLOCK_SIZE;
use clap::Subcommand;
use gc::Scrubbed;
use gc::scrub::Damage;
use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

/// The agent's resource.
const RESOURCE: &str = "/v1/scrub";
/// How often the agent is asked how far it is.
const LOOK: Duration = Duration::from_millis(200);

#[derive(Debug, Subcommand)]
pub enum ScrubCommand {
    /// Begin to verify everything in the store now
    Run {
        /// Return when it has ended; exit code 5 if anything is damaged
        #[arg(long)]
        wait: bool,
    },
    /// Show what a scrub does, what the last one found, and when the next begins by itself
    Status,
    /// End the scrub that is under way; the next begins anew
    Stop,
}

/// Carries the command out.
///
/// # Errors
/// The agent's; with `--wait`, [`Kind::ProblemsFound`] with an empty message if anything is damaged, [`Kind::Failed`] if the pass did not come to
/// its end.
pub async fn run(command: ScrubCommand, run_dir: &Path, out: Output) -> Result<()> {
    let client = Client::new(run_dir);
    match command {
        ScrubCommand::Status => {
            let status: ScrubStatus = client.get(RESOURCE).await?;
            out.print(&status, table)
        }
        ScrubCommand::Stop => {
            let status: ScrubStatus = client.delete(RESOURCE).await?;
            out.print(&status, |status| status.last.as_ref().map(outcome).unwrap_or_default())
        }
        ScrubCommand::Run { wait } => {
            let mut status: ScrubStatus = client.post(RESOURCE, &()).await?;
            let id = status.running.as_ref().map(|running| running.id);
            if !wait {
                return out.print(&status, |_| {
                    "a scrub is under way; 'ballast scrub status' shows how far it is".into()
                });
            }
            status = look_on(&client, status, id, out).await?;
            let ended = status.last.as_ref().filter(|ended| Some(ended.id) >= id);
            if let Some(failure) = ended.and_then(|ended| ended.failure.as_ref()) {
                let words = format!("not all was verified: {failure}");
                return Err(Failure::new(Kind::Failed, words));
            }
            out.print(&status, |status| match &status.last {
                Some(ended) => with_damage(outcome(ended), &ended.scrubbed),
                None => String::new(),
            })?;
            match status.last.filter(|ended| ended.scrubbed.damaged() > 0) {
                Some(_) => Err(Failure::new(Kind::ProblemsFound, "")),
                None => Ok(()),
            }
        }
    }
}

/// Until the pass has ended. How far it is goes to standard error, if that is a terminal.
async fn look_on(
    client: &Client,
    mut status: ScrubStatus,
    id: Option<u64>,
    out: Output,
) -> Result<ScrubStatus> {
    let terminal = std::io::stderr().is_terminal() && !out.json;
    while let Some(running) = status.running.as_ref().filter(|running| Some(running.id) == id) {
        if terminal {
            eprint!("\r\x1b[K{}", doing(running, status.used));
        }
        tokio::time::sleep(LOOK).await;
        status = client.get(RESOURCE).await?;
    }
    if terminal {
        eprint!("\r\x1b[K");
    }
    Ok(status)
}

fn verified(scrubbed: &Scrubbed) -> u64 {
    (scrubbed.data_blocks + scrubbed.metadata_blocks) * BLOCK_SIZE as u64
}

fn doing(running: &ScrubRunning, used: Option<u64>) -> String {
    let mut words = format!("{} verified", format_size(verified(&running.so_far)));
    if let Some(used) = used {
        words.push_str(&format!(", {} are in use", format_size(used)));
    }
    let damaged = running.so_far.damaged();
    if damaged > 0 {
        words.push_str(&format!("; damage in {}", counted(damaged, "place")));
    }
    if let Some(why) = &running.waiting {
        words.push_str(&format!("; waits for the store: {why}"));
    }
    words
}

fn at(ms: u64) -> String {
    // The last year that a date is written for.
    let time = UNIX_EPOCH + Duration::from_millis(ms.min(253_370_764_800_000));
    humantime::format_rfc3339_seconds(time).to_string()
}

fn outcome(ended: &ScrubEnded) -> String {
    let Scrubbed { data_blocks, metadata_blocks, replaced, unverified, .. } = &ended.scrubbed;
    let bytes = |blocks: u64| format_size(blocks * BLOCK_SIZE as u64);
    let mut words = match &ended.failure {
        Some(failure) => format!("ended at {}, not at its end: {failure}; ", at(ended.at)),
        None => format!("ended at {}; ", at(ended.at)),
    };
    words.push_str(&format!(
        "verified {} of data and {} of maps and lists in {}; ",
        bytes(*data_blocks),
        bytes(*metadata_blocks),
        format_ms(ended.at.saturating_sub(ended.began))
    ));
    words.push_str(&match ended.scrubbed.damaged() {
        0 => "no damage".to_owned(),
        damaged => format!("damage in {}", counted(damaged, "place")),
    });
    if *replaced > 0 {
        words.push_str(&format!("; {replaced} blocks were replaced meanwhile"));
    }
    if *unverified > 0 {
        let last = ended.scrubbed.unverified_last.as_deref().unwrap_or_default();
        words.push_str(&format!("; {unverified} could not be verified, the last: {last}"));
    }
    words
}

/// The list, below some words.
fn with_damage(mut words: String, scrubbed: &Scrubbed) -> String {
    for damage in &scrubbed.damage {
        words.push_str("\n  ");
        words.push_str(&line(damage));
    }
    if scrubbed.damage_not_listed > 0 {
        words.push_str(&format!("\n  and {} more places", scrubbed.damage_not_listed));
    }
    words
}

fn line(damage: &Damage) -> String {
    let mut words = damage.part.as_str().to_owned();
    if let Some(vdi) = damage.vdi {
        let name = damage.name.clone().unwrap_or_else(|| vdi.to_string());
        let snapshot = damage.snapshot.map_or(String::new(), |lsn| format!("@{lsn}"));
        words.push_str(&format!(" of '{name}{snapshot}'"));
    }
    if let (Some(offset), Some(bytes)) = (damage.offset, damage.bytes) {
        words.push_str(&format!(", {bytes} bytes from offset {offset} on"));
    }
    format!("{words}: {}; {}", damage.what, damage.advice)
}

fn table(status: &ScrubStatus) -> String {
    let now = status.running.as_ref().map_or("idle".into(), |running| {
        let begun = if running.resumed { "begun by an agent before, " } else { "" };
        format!("since {}, {begun}{}", at(running.since), doing(running, status.used))
    });
    let begins = match (status.every, status.next) {
        (None, _) => "only when told".into(),
        (Some(every), None) => format!("{} after this one began", format_ms(every)),
        (Some(every), Some(next)) => format!("at {}, every {}", at(next), format_ms(every)),
    };
    let rate = match status.rate {
        0 => "as fast as the device can".into(),
        rate => format!("{} a second", format_size(rate)),
    };
    let mut lines = vec![("now", now)];
    if let Some(Some(vdi)) = status.running.as_ref().map(|running| running.vdi) {
        let running = status.running.as_ref();
        let snapshot = running.and_then(|r| r.snapshot).map_or(String::new(), |l| format!("@{l}"));
        let offset = running.map_or(0, |running| running.offset);
        lines.push(("at", format!("disk {vdi}{snapshot}, {}", format_size(offset))));
    }
    let last = status.last.as_ref();
    lines.extend([
        ("last", last.map_or("none that is known of".into(), outcome)),
        ("begins", begins),
        ("rate", rate),
    ]);
    let shown = fields(&lines);
    let found = status.running.as_ref().map(|running| &running.so_far);
    let before = [last, status.completed.as_ref()].into_iter().flatten().map(|last| &last.scrubbed);
    let found = found.into_iter().chain(before).find(|found| found.damaged() > 0);
    found.map_or(shown.clone(), |found| with_damage(shown.trim_end().to_owned(), found))
}
