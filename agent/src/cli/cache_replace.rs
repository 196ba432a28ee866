//! `cache replace`: gives the cache a new leg, through the agent that uses it, or while none does.
//!
//! The agent fills a leg by itself: a command that is interrupted leaves it going on.

use super::output::Output;
use crate::api::{CacheStatus, ReplaceRequest, Replacement};
use crate::control::client::Client;
use crate::error::{Failure, Kind, Result};
use crate::units::format_size;
use cache::ReplacementState;
use cache::local::{Local, Replaced};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The agent's resource.
const RESOURCE: &str = "/v1/cache/replace";
/// How often the agent is asked how far it is.
const LOOK: Duration = Duration::from_millis(200);

/// Copies the leg at `good` to `new`. Progress goes to standard error: on a terminal as it moves, else every tenth.
///
/// # Errors
/// As [`Local::replace`].
pub async fn offline(good: &Path, new: &Path, out: Output) -> Result<()> {
    let progress = Progress::new(out);
    let show = |done, all| progress.show(done, all);
    let replaced = Local::replace(good, new, &show).await?;
    out.print(&replaced, |Replaced { good, new, bytes }| {
        format!(
            "{} and {} are one cache now: {} copied\n\
             start the agent with --cache {} --cache {}",
            good.display(),
            new.display(),
            format_size(*bytes),
            good.display(),
            new.display()
        )
    })
}

/// Has the agent fill `new`, or looks on if it does so already, until it is in step.
///
/// # Errors
/// The agent's; the new leg was given up.
pub async fn online(new: &Path, rate: u64, run_dir: &Path, out: Output) -> Result<()> {
    let path = std::path::absolute(new)
        .map_err(|error| Failure::caused(Kind::Usage, format!("{}", new.display()), &error))?;
    let client = Client::new(run_dir);
    let before: Option<Replacement> = client.get::<CacheStatus>("/v1/cache").await?.replacement;
    let begun = match before {
        Some(under_way) if is_copying(&under_way) && under_way.path == path => under_way,
        _ => client.post(RESOURCE, &ReplaceRequest { path, rate }).await?,
    };
    let progress = Progress::new(out);
    let mut now = begun.clone();
    while is_copying(&now) && now.id == begun.id {
        progress.show(now.bytes_done, now.bytes_all);
        tokio::time::sleep(LOOK).await;
        now = client.get(RESOURCE).await?;
    }
    if now.id != begun.id || now.state != ReplacementState::Done {
        let why = now.why.unwrap_or_else(|| "another replacement was begun meanwhile".into());
        let words = format!(
            "{} did not become a leg of the cache: {why}; the disks go on as before",
            begun.path.display()
        );
        return Err(Failure::new(Kind::Failed, words));
    }
    progress.show(now.bytes_all, now.bytes_all);
    let legs = client.get::<CacheStatus>("/v1/cache").await?.legs;
    let legs: Vec<PathBuf> = legs.into_iter().filter(|l| l.member).map(|l| l.path).collect();
    out.print(&now, |now| {
        let paths: Vec<_> = legs.iter().map(|leg| format!("--cache {}", leg.display())).collect();
        format!(
            "{} is in step: the cache is mirrored again\nfrom now on start the agent with {}",
            now.path.display(),
            paths.join(" ")
        )
    })
}

/// Has the agent give up the leg that it fills.
///
/// # Errors
/// The agent's; there is none.
pub async fn cancel(run_dir: &Path, out: Output) -> Result<()> {
    let cancelled: Replacement = Client::new(run_dir).delete(RESOURCE).await?;
    out.print(&cancelled, |cancelled| {
        format!("{} is given up; the disks go on as before", cancelled.path.display())
    })
}

fn is_copying(replacement: &Replacement) -> bool {
    replacement.state == ReplacementState::Copying
}

/// Tells people how far it is.
struct Progress {
    quiet: bool,
    terminal: bool,
    shown: AtomicU64,
}

impl Progress {
    fn new(out: Output) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { quiet: out.json, terminal, shown: AtomicU64::new(0) }
    }

    fn show(&self, done: u64, all: u64) {
        let step = if self.terminal { 1 } else { 10 };
        let percent = (done as f64 / all.max(1) as f64 * 100.0) as u64;
        let before = self.shown.fetch_max(percent, Ordering::Relaxed);
        if self.quiet || percent <= before || percent / step == before / step {
            return;
        }
        let (done, all) = (format_size(done), format_size(all));
        if self.terminal {
            eprint!("\rcopying: {percent} % ({done} of {all})  ");
        } else {
            eprintln!("copying: {percent} % ({done} of {all})");
        }
        if self.terminal && percent == 100 {
            eprintln!();
        }
    }
}
