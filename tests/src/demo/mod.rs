//! The demo: what Ballast promises, shown on real parts in about a minute.
//!
//! A store on an iSCSI LUN, an agent with a cache, a real Linux guest that makes a file system and
//! fsyncs files on its disk. In the middle of that the agent is killed with -9 and started again, then
//! the store is cut off for a while; a second guest at last checks every file. [`story`] is the sequence, [`report`] what is printed.
//!
//! Leaves nothing behind. When it fails, the logs stay and the last lines say where.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::guest::process;

mod report;
mod story;

/// Longest path of the demo's folder for which its sockets still fit into a socket address (108
/// bytes).
const FOLDER_BYTES_MAX: usize = 64;

/// Runs the demo. `SAN=iscsi` (default) or `SAN=file` in the environment chooses the store; with a file the
/// outage is a drill.
pub fn main() -> ExitCode {
    match process::unwind_on_signals().and_then(|()| run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if process::check_interrupted().is_err() => {
            eprintln!(
                "\ndemo: interrupted; everything it started has ended and its files are removed"
            );
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("\ndemo: failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let san = std::env::var("SAN").unwrap_or_else(|_| "iscsi".into()).parse()?;
    let parent = parent_folder();
    std::fs::create_dir_all(&parent)
        .with_context(|| format!("cannot create {}", parent.display()))?;
    let folder = tempfile::Builder::new()
        .prefix("demo-")
        .tempdir_in(&parent)
        .with_context(|| format!("cannot create a folder in {}", parent.display()))?;
    let outcome = story::tell(folder.path(), san);
    if outcome.is_err() && process::check_interrupted().is_ok() {
        let kept = folder.keep();
        remove_big_files(&kept);
        return outcome.with_context(|| format!("the logs are in {}", kept.display()));
    }
    outcome
}

/// `.run` in the checkout, or the system's temporary folder if that path is too long for sockets.
fn parent_folder() -> PathBuf {
    let own = crate::guest::image::repository().join(".run");
    if own.as_os_str().len() <= FOLDER_BYTES_MAX { own } else { std::env::temp_dir() }
}

/// Removes disk images and initramfs files: what is left is logs.
fn remove_big_files(folder: &Path) {
    const LOG_BYTES_MAX: u64 = 1 << 20;
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => remove_big_files(&entry.path()),
            Ok(metadata) if metadata.len() > LOG_BYTES_MAX => {
                let _ = std::fs::remove_file(entry.path());
            }
            _ => {}
        }
    }
}
