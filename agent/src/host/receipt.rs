//! Loss receipts as files of the run directory: `receipts/DISK-TIME.json`, written whole or not at all, and never removed.

use crate::api::loss::LossReceipt;
use crate::error::{Failure, Kind, Result};
use crate::names::percent_escape;
use crate::run_dir::replace;
use std::path::{Path, PathBuf};

const FOLDER: &str = "receipts";
/// Bytes of a disk's name in a file's name.
const NAME_MAX: usize = 150;

/// Where the receipt of a rollback at that time goes.
#[must_use]
pub fn path(run_dir: &Path, disk: &str, at: u64) -> PathBuf {
    let mut name = percent_escape(disk);
    name.truncate(NAME_MAX);
    run_dir.join(FOLDER).join(format!("{name}-{at}.json"))
}

/// Writes it durably to its file, in the place of an earlier state of it.
///
/// # Errors
/// The file that failed.
pub fn write(receipt: &LossReceipt) -> Result<()> {
    let path = &receipt.file;
    let text = serde_json::to_vec_pretty(receipt).unwrap_or_default();
    replace(path, &text).map_err(|error| {
        let words = format!(
            "cannot keep the loss receipt {}: {error}; make room, then try again",
            path.display()
        );
        Failure::new(Kind::Failed, words)
    })
}
