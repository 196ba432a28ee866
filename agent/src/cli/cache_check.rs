//! `cache check`: verifies a cache that no agent uses.

use super::output::Output;
use super::tables;
use crate::config::DeviceArgs;
use crate::error::{Failure, Kind, Result};
use crate::host::store::{Access, open_device};
use crate::run_dir::recall;
use std::path::{Path, PathBuf};

/// Checks the cache at `path`, or the one that the last agent in `run_dir` used.
///
/// # Errors
/// [`Kind::ProblemsFound`] with an empty message, as the report says it all; [`Kind::Conflict`] while an agent uses it.
pub async fn run(path: Option<PathBuf>, run_dir: &Path, out: Output) -> Result<()> {
    let path = match path {
        Some(path) => path,
        None => remembered(run_dir)?,
    };
    let _held = keep_agents_out(&path).await?;
    let report = cache::check(&path).await?;
    out.print(&report, tables::cache_report)?;
    if report.problems.is_empty() {
        return Ok(());
    }
    Err(Failure::new(Kind::ProblemsFound, ""))
}

fn remembered(run_dir: &Path) -> Result<PathBuf> {
    let cache = recall(run_dir).and_then(|remembered| remembered.caches.into_iter().next());
    cache.ok_or_else(|| {
        let run_dir = run_dir.display();
        Failure::new(
            Kind::Usage,
            format!(
                "no agent has run in {run_dir}: name the cache's file or device, or give --run-dir"
            ),
        )
    })
}

/// Takes the cache's lock: what an agent changes while it is looked at would seem damaged. One that this user may only read
/// is checked without.
async fn keep_agents_out(path: &Path) -> Result<Option<blockstore::device::Device>> {
    let url = format!("file:{}", path.display());
    match open_device(&url, &DeviceArgs::default(), Access::Exclusive, None).await {
        Ok(device) => Ok(Some(device)),
        Err(failure) if failure.kind == Kind::Conflict => Err(Failure::new(
            Kind::Conflict,
            format!("cache {} is in use: stop its agent first, then check it", path.display()),
        )),
        Err(_) => Ok(None),
    }
}
