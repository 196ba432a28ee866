//! `vdi hydrate`: has the daemon fetch a disk into its cache, and looks on if asked to.

use super::agent_commands::at;
use super::output::Output;
use crate::api::{HydrateRequest, Hydrating, VdiInfo};
use crate::control::client::Client;
use crate::error::{Failure, Kind, Result};
use crate::units::format_size;
use cache::HydrateStatus;
use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};

/// How often the daemon is asked how far it is.
const PERIOD: Duration = Duration::from_millis(250);
/// Between two lines of progress.
const LINE_PERIOD: Duration = Duration::from_secs(1);

/// Begins, and with `wait` returns when it is over.
///
/// # Errors
/// It cannot begin, or ended before everything was fetched.
pub async fn run(
    name: &str,
    boot_trace: bool,
    wait: bool,
    run_dir: &Path,
    out: Output,
) -> Result<()> {
    let client = Client::new(run_dir);
    let request = HydrateRequest { boot_trace };
    let mut hydrating: Hydrating = client.post(&at(name, "/hydrate")?, &request).await?;
    if wait {
        hydrating.progress = look_on(&client, name, out).await?;
    }
    out.print(&hydrating, |hydrating| line(&hydrating.name, &hydrating.progress))
}

async fn look_on(client: &Client, name: &str, out: Output) -> Result<HydrateStatus> {
    let show = !out.json && std::io::stderr().is_terminal();
    let mut shown = Instant::now();
    loop {
        let info: VdiInfo = client.get(&at(name, "")?).await?;
        let progress = info.hydrate.unwrap_or_default();
        if let Some(error) = &progress.error {
            let words = format!("disk '{}' was not hydrated to the end: {error}", info.vdi.name);
            return Err(Failure::new(Kind::Failed, words));
        }
        if !progress.running {
            return Ok(progress);
        }
        if show && shown.elapsed() >= LINE_PERIOD {
            shown = Instant::now();
            eprintln!("{}", line(&info.vdi.name, &progress));
        }
        tokio::time::sleep(PERIOD).await;
    }
}

/// How far it is, in a line.
pub fn line(name: &str, progress: &HydrateStatus) -> String {
    let (done, total) = (progress.done_bytes, progress.total_bytes.unwrap_or(0));
    let waits =
        progress.waits_for.as_ref().map(|what| format!(", waits for {what}")).unwrap_or_default();
    match (progress.running, total) {
        (false, 0) => format!("{name}: all of it was there"),
        (false, total) => format!("{name}: {} fetched", format_size(total)),
        (true, total) => {
            format!("{name}: {} of {} fetched{waits}", format_size(done), format_size(total))
        }
    }
}
