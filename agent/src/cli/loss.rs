//! Commands for logs that are lost: the receipt of a rollback, and letting go of what is in quarantine.

use super::agent_commands::at;
use super::output::Output;
use crate::api::loss::{LossReceipt, RollbackRequest};
use crate::control::client::Client;
use crate::error::Result;
use crate::units::{format_ms, format_size};
use cache::QuarantinedLog;
use std::fmt::Write as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// Ranges that the table shows; the receipt's file has more.
const RANGES_SHOWN: usize = 10;

pub async fn roll_back(client: &Client, name: &str, accept_loss: bool, out: Output) -> Result<()> {
    let request = RollbackRequest { accept_loss };
    let receipt: LossReceipt = client.post(&at(name, "/rollback")?, &request).await?;
    out.print(&receipt, receipt_text)
}

pub async fn discard(log: Uuid, run_dir: &Path, out: Output) -> Result<()> {
    let client = Client::new(run_dir);
    let discarded: QuarantinedLog = client.delete(&format!("/v1/cache/quarantine/{log}")).await?;
    out.print(&discarded, |log| {
        format!("discarded log {} of {} ({})", log.log_id, log.name, format_size(log.bytes))
    })
}

fn receipt_text(receipt: &LossReceipt) -> String {
    let mut text = String::new();
    let mut row = |key: &str, value: String| {
        let _ = writeln!(text, "{:<19}{value}", format!("{key}:"));
    };
    row("LOSS RECEIPT", format!("disk {} ({})", receipt.name, receipt.uuid));
    row("store", format!("{} ({})", receipt.store, receipt.store_uuid));
    let since = receipt.committed_at.map_or("time not noted".to_owned(), ago);
    row("rolled back to", format!("LSN {}, committed {since}", receipt.committed_lsn));
    row("why", receipt.reason.clone());
    row("log given up", receipt.log_id.map_or("none named".to_owned(), |log| log.to_string()));
    row("lost", window(receipt));
    if receipt.ranges.segments > 0 {
        row(
            "surveyed",
            format!(
                "{} segments of the log, {} of them not to their end",
                receipt.ranges.segments, receipt.ranges.unreadable
            ),
        );
    }
    for range in receipt.ranges.listed.iter().take(RANGES_SHOWN) {
        row("lost bytes", format!("{} at {}", format_size(range.length), range.offset));
    }
    let more =
        receipt.ranges.listed.len().saturating_sub(RANGES_SHOWN) as u64 + receipt.ranges.more;
    if more > 0 {
        row("lost bytes", format!("and {more} more ranges"));
    }
    let paths = |paths: &[std::path::PathBuf]| {
        paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    };
    row("cache", format!("{} ({})", paths(&receipt.cache.paths), receipt.cache.uuid));
    if let Some(former) = &receipt.former_cache {
        row("former cache", format!("{} ({})", paths(&former.paths), former.uuid));
    }
    if receipt.quarantined {
        row("damaged log", "kept in the cache: see 'ballast cache status'".to_owned());
    }
    row("snapshot", receipt.snapshot.clone());
    row("receipt kept in", receipt.file.display().to_string());
    let _ = write!(
        text,
        "The disk is detached: 'ballast vdi attach {}' serves it again.",
        receipt.name
    );
    text
}

fn window(receipt: &LossReceipt) -> String {
    let lost = &receipt.lost;
    let Some(to) = lost.to_lsn else {
        return format!(
            "unknown: from LSN {} on; nothing local knows how far the disk was",
            lost.from_lsn
        );
    };
    let what = if to < lost.from_lsn {
        "nothing that is known of".to_owned()
    } else {
        format!("LSNs {} to {to} at least", lost.from_lsn)
    };
    let flushed = lost.flushed_lsn.map_or(String::new(), |lsn| format!(", flushed up to {lsn}"));
    let noted = lost.noted_at.map_or(String::new(), |at| format!(", as noted {}", ago(at)));
    format!("{what}{flushed}{noted} (known from: {})", lost.known_from.join("; "))
}

fn ago(at: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis() as u64);
    format!("{} ago (UNIX time {})", format_ms(now.saturating_sub(at)), at / 1000)
}
