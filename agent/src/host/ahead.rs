//! What is done for a disk ahead of an outage: hydrating and pinning it.

use super::Host;
use crate::api::{HydrateRequest, Hydrating, Pinned};
use crate::error::{Failure, Kind, Result};
use cache::{HydrateError, PinError};

impl Host {
    /// Begins to fetch a disk into the local cache; returns once it is known what is to be fetched.
    pub async fn hydrate(&self, name: &str, request: HydrateRequest) -> Result<Hydrating> {
        let disk = self.served_or_reason(name).await?;
        let what = format!("disk '{}' cannot be hydrated", disk.name);
        self.parts.refuse_while_down(&what)?;
        let ranges = if request.boot_trace {
            let status = self.parts.cache.vdi_status(disk.uuid).unwrap_or_default();
            let trace = status.boot_trace;
            if trace.is_empty() {
                let words = format!(
                    "{what}: no boot of it was recorded yet; it is when a virtual machine starts from it"
                );
                return Err(Failure::new(Kind::Conflict, words));
            }
            Some(trace)
        } else {
            None
        };
        let progress = self.parts.cache.hydrate(disk.uuid, ranges).await.map_err(|error| {
            let kind = match error {
                HydrateError::Running | HydrateError::TooLarge { .. } => Kind::Conflict,
                HydrateError::Failed(_) => Kind::Failed,
            };
            Failure::new(kind, format!("{what}: {error}"))
        })?;
        Ok(Hydrating { name: disk.name.clone(), uuid: disk.uuid, progress })
    }

    /// Pins a disk, or no longer does.
    pub async fn pin(&self, name: &str, on: bool) -> Result<Pinned> {
        let disk = self.served_or_reason(name).await?;
        self.parts.cache.pin(disk.uuid, on).await.map_err(|error| {
            let kind = match error {
                PinError::TooLarge { .. } => Kind::Conflict,
                PinError::Failed(_) => Kind::Failed,
            };
            Failure::new(kind, format!("disk '{}' cannot be pinned: {error}", disk.name))
        })?;
        let missing = self.describe(&disk).readiness.missing;
        Ok(Pinned { name: disk.name.clone(), uuid: disk.uuid, pinned: on, missing })
    }
}
