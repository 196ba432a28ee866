//! `cache replace`: gives a cache a new leg while no agent uses it.

use super::output::Output;
use crate::error::Result;
use crate::units::format_size;
use cache::local::{Local, Replaced};
use std::io::IsTerminal;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Copies the leg at `good` to `new`. Progress goes to standard error: on a terminal as it moves, else every tenth.
///
/// # Errors
/// As [`Local::replace`].
pub async fn run(good: &Path, new: &Path, out: Output) -> Result<()> {
    let shown = AtomicU64::new(0);
    let terminal = std::io::stderr().is_terminal();
    let step = if terminal { 1 } else { 10 };
    let progress = |done: u64, all: u64| {
        let percent = (done as f64 / all.max(1) as f64 * 100.0) as u64;
        let before = shown.fetch_max(percent, Ordering::Relaxed);
        if out.json || percent / step == before / step {
            return;
        }
        let (done, all) = (format_size(done), format_size(all));
        if terminal {
            eprint!("\rcopying: {percent} % ({done} of {all})  ");
        } else {
            eprintln!("copying: {percent} % ({done} of {all})");
        }
        if terminal && percent == 100 {
            eprintln!();
        }
    };
    let replaced = Local::replace(good, new, &progress).await?;
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
