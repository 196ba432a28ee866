//! A leg of the cache is replaced while disks are served: the task that does it, and what status says of it.
//!
//! How it is safe: `local/joining.rs`, `pool/filling.rs`.

use super::Cache;
use crate::error::CacheError;
use crate::leg_filler::LegFiller;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// How long a leg that is just being made a member may take for that when the cache is closed.
const FINISH_WITHIN: Duration = Duration::from_secs(2);

/// How far the replacement of a leg is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReplacementState {
    /// The new leg is being filled.
    Copying,
    /// It is a member.
    Done,
    /// It was given up; the cache is as it was.
    Failed,
}

/// The replacement of a leg, for status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replacement {
    /// Tells it from others in this life of the cache.
    pub id: u64,
    /// The new leg.
    pub path: PathBuf,
    /// How far it is.
    pub state: ReplacementState,
    /// Bytes that are on the new leg.
    pub bytes_done: u64,
    /// Bytes that shall be there.
    pub bytes_all: u64,
    /// Why it failed, or what it waits for.
    pub why: Option<String>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Replacing {
    /// Replacements so far.
    count: u64,
    /// One is on its way whose task was not started yet.
    preparing: bool,
    last: Option<Replacement>,
    filler: Option<Arc<LegFiller>>,
    task: Option<JoinHandle<()>>,
}

impl Cache {
    /// Begins to fill a new leg at `path`, at `rate` bytes a second (zero: as fast as it goes). Returns when all disks
    /// were told; [`Self::replacement`] says how it goes on.
    ///
    /// # Errors
    /// The cache has all its legs; what is at `path` may not be overwritten, is too small, in use, or the cache itself: nothing
    /// was changed. Or the device fails.
    pub async fn replace_leg(
        self: &Arc<Self>,
        path: &Path,
        rate: u64,
    ) -> Result<Replacement, CacheError> {
        let id = {
            let mut replacing = self.replacing.lock();
            if replacing.preparing || replacing.filler.is_some() {
                let why = "another new leg is being filled".into();
                return Err(CacheError::NewLeg { path: path.into(), why });
            }
            replacing.preparing = true;
            replacing.count += 1;
            replacing.count
        };
        let begun = self.begin_filling(id, path, rate).await;
        let mut replacing = self.replacing.lock();
        replacing.preparing = false;
        let filler = begun?;
        tracing::info!(path = %path.display(), "filling a new leg of the cache");
        let (bytes_done, bytes_all) = filler.progress();
        let state = ReplacementState::Copying;
        let path = path.into();
        let begun = Replacement { id, path, state, bytes_done, bytes_all, why: None };
        replacing.last = Some(begun.clone());
        replacing.filler = Some(Arc::clone(&filler));
        let cache = Arc::clone(self);
        replacing.task = Some(tokio::spawn(async move {
            let filled = filler.run().await;
            cache.replaced(filled);
        }));
        Ok(begun)
    }

    async fn begin_filling(
        &self,
        id: u64,
        path: &Path,
        rate: u64,
    ) -> Result<Arc<LegFiller>, CacheError> {
        let (local, pool) = (&self.ground.local, &self.ground.pool);
        if local.superblock().await.membership.free_place().is_none() {
            let why = "both legs of the cache are there and in step".into();
            return Err(CacheError::NewLeg { path: path.into(), why });
        }
        let device = local.open_new_leg(path).await?;
        local.blank_new_leg(&device).await?;
        let _no_log_opens = self.ground.logs_opening.write().await;
        pool.begin_filling(id, self.handles.lock().keys().copied());
        let joins = local.begin_joining(id, path, device).await;
        let given_up = joins.inspect_err(|_| pool.end_filling())?;
        let (local, pool) = (Arc::clone(local), Arc::clone(pool));
        let logs_opening = Arc::clone(&self.ground.logs_opening);
        Ok(Arc::new(LegFiller::new(local, pool, logs_opening, (id, given_up), rate)))
    }

    fn replaced(&self, filled: Result<(), CacheError>) {
        let mut replacing = self.replacing.lock();
        let Replacing { last: Some(last), filler, .. } = &mut *replacing else { return };
        *filler = None;
        match filled {
            Ok(()) => {
                tracing::info!(path = %last.path.display(), "the cache is mirrored again");
                last.state = ReplacementState::Done;
                last.bytes_done = last.bytes_all;
            }
            Err(error) => {
                last.state = ReplacementState::Failed;
                last.why = Some(match error {
                    CacheError::NewLeg { why, .. } => why,
                    other => other.to_string(),
                });
            }
        }
    }

    /// How far the last replacement of a leg is; none if there was none since the cache was opened.
    #[must_use]
    pub fn replacement(&self) -> Option<Replacement> {
        let replacing = self.replacing.lock();
        let mut last = replacing.last.clone()?;
        if let Some(filler) = &replacing.filler {
            (last.bytes_done, last.bytes_all) = filler.progress();
            last.why = filler.waits_for().map(|vdis| {
                let name = |vdi| self.handle(vdi).map_or(vdi.to_string(), |h| h.name.clone());
                let names: Vec<_> = vdis.into_iter().map(name).collect();
                format!("waiting for the worker of {}", names.join(", "))
            });
        }
        Some(last)
    }

    /// Gives up the new leg that is being filled. False if there is none.
    pub async fn cancel_replacement(&self) -> bool {
        let filling = {
            let replacing = self.replacing.lock();
            replacing.last.as_ref().filter(|_| replacing.filler.is_some()).map(|last| last.id)
        };
        let Some(id) = filling else { return false };
        self.ground.local.cancel_joining(id, "it was cancelled").await;
        self.end_task(false).await;
        true
    }

    /// The cache is being closed: a leg that is not a member yet is left unfinished.
    pub(super) async fn stop_replacing(&self) {
        self.cancel_replacement().await;
        self.end_task(true).await;
    }

    /// Waits a little for the task.
    async fn end_task(&self, by_force: bool) {
        let Some(mut task) = self.replacing.lock().task.take() else { return };
        if tokio::time::timeout(FINISH_WITHIN, &mut task).await.is_ok() {
            return;
        }
        if by_force {
            task.abort();
        } else {
            self.replacing.lock().task.get_or_insert(task);
        }
    }
}
