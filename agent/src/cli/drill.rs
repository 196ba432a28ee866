//! `outage drill`: cuts a disk off, looks on, restores it, drains it, reports.
//!
//! The daemon ends a drill by itself: a command that is interrupted leaves one that ends at its time.

use super::agent_commands::at;
use super::output::Output;
use super::tables;
use crate::api::{
    Done, DrainRequest, Drained, DrillBegun, DrillReport, DrillRequest, VdiInfo, VdiState,
};
use crate::control::client::Client;
use crate::error::Result;
use crate::units::format_ms;
use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};

/// How often the disk is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How often a terminal is told.
const TELL: Duration = Duration::from_secs(5);

pub async fn begin(
    name: &str,
    time: Duration,
    wait: bool,
    run_dir: &Path,
    out: Output,
) -> Result<()> {
    let client = Client::new(run_dir);
    let before: VdiInfo = client.get(&at(name, "")?).await?;
    let request = DrillRequest { time_ms: time.as_millis() as u64 };
    let begun: DrillBegun = client.post(&at(name, "/drill")?, &request).await?;
    if !wait {
        return out.print(&begun, |begun| {
            format!(
                "{0} is cut off from the store for {1}; 'ballast outage end {0}' ends it earlier",
                begun.name,
                format_ms(request.time_ms)
            )
        });
    }
    let report = look_on(&client, &before, &begun, out).await?;
    out.print(&report, tables::drill_report)
}

pub async fn end(name: &str, run_dir: &Path, out: Output) -> Result<()> {
    let done: Done = Client::new(run_dir).delete(&at(name, "/drill")?).await?;
    out.print(&done, |done| format!("{} is connected to the store again", done.name))
}

/// Until the drill is over, then until the disk is drained.
async fn look_on(
    client: &Client,
    before: &VdiInfo,
    begun: &DrillBegun,
    out: Output,
) -> Result<DrillReport> {
    let started = Instant::now();
    let (mut told, talks) = (started, !out.json && std::io::stderr().is_terminal());
    let mut report = empty_report(begun);
    let path = at(&begun.uuid.to_string(), "")?;
    let mut last = before.clone();
    loop {
        let now: VdiInfo = client.get(&path).await?;
        if now.drill_until.is_none() || now.vdi.state != VdiState::Running {
            break;
        }
        report.waiting_reads_max = report.waiting_reads_max.max(now.waiting.reads);
        report.waiting_writes_max = report.waiting_writes_max.max(now.waiting.writes);
        report.dirty_bytes_max = report.dirty_bytes_max.max(now.dirty_bytes);
        report.runway_ms = now.outlook.runway_ms;
        if talks && told.elapsed() >= TELL {
            told = Instant::now();
            eprint!("{}", tables::drill_progress(&now));
        }
        last = now;
        tokio::time::sleep(LOOK).await;
    }
    report.seconds = started.elapsed().as_secs_f64();
    let (from, to) = (&before.totals, &last.totals);
    report.writes = to.writes.saturating_sub(from.writes);
    report.written_bytes = to.written_bytes.saturating_sub(from.written_bytes);
    report.flushes = to.flushes.saturating_sub(from.flushes);
    report.reads = to.reads.saturating_sub(from.reads);
    report.missed_bytes = to.fetched_bytes.saturating_sub(from.fetched_bytes);
    let request = DrainRequest { vdi: Some(begun.uuid.to_string()) };
    let drained: Drained = client.post("/v1/cache/drain", &request).await?;
    report.drain_seconds = drained.seconds;
    Ok(report)
}

fn empty_report(begun: &DrillBegun) -> DrillReport {
    DrillReport {
        name: begun.name.clone(),
        uuid: begun.uuid,
        seconds: 0.0,
        writes: 0,
        written_bytes: 0,
        flushes: 0,
        reads: 0,
        missed_bytes: 0,
        waiting_reads_max: 0,
        waiting_writes_max: 0,
        dirty_bytes_max: 0,
        runway_ms: None,
        drain_seconds: 0.0,
    }
}
