//! What `status`, `vdi list`, `vdi info` and `cache status` show. Nothing here waits for the store, except the list.

use super::Host;
use super::served::Served;
use crate::api::{AgentStatus, CacheStatus, Status, StoreStatus, Vdi, VdiInfo, VdiState};
use crate::error::Result;

impl Host {
    /// Everything, from what is known without asking the store.
    pub fn status(&self) -> Status {
        let disks: Vec<_> = self.served.lock().values().cloned().collect();
        let mut vdis: Vec<_> = disks.iter().map(|disk| self.describe(disk)).collect();
        vdis.sort_by(|a, b| a.vdi.name.cmp(&b.vdi.name));
        Status {
            agent: AgentStatus {
                pid: std::process::id(),
                version: env!("CARGO_PKG_VERSION").into(),
                uptime_ms: self.started.elapsed().as_millis() as u64,
                host_uuid: self.identity.host,
                host_name: self.name.clone(),
            },
            store: self.store_status(),
            cache: self.cache_status(),
            vdis,
        }
    }

    fn store_status(&self) -> StoreStatus {
        let store = &self.parts.store;
        let health = store.health();
        StoreStatus {
            url: store.url().to_owned(),
            uuid: store.uuid(),
            reachable: health.reachable,
            down_since: (!health.reachable).then_some(health.since_ms),
            last_error: health.last_error,
            waiting_for_space: health.waiting_for_space,
            single_host: store.superblock().single_host,
            capacity: store.superblock().device_size,
        }
    }

    /// The ring.
    pub fn cache_status(&self) -> CacheStatus {
        let status = self.parts.cache.status();
        CacheStatus {
            paths: vec![self.parts.config.cache.clone()],
            uuid: self.identity.cache,
            capacity: status.capacity,
            segment_size: status.segment_size,
            segments: status.segments.into(),
            dirty_bytes: status.dirty_bytes,
            clean_bytes: status.clean_bytes,
            free_bytes: status.free_bytes,
            fill: status.fill,
        }
    }

    /// A disk of this host.
    pub(super) fn describe(&self, disk: &Served) -> VdiInfo {
        let view = disk.view();
        let log = self.parts.cache.vdi_status(disk.uuid).unwrap_or_default();
        let stats = disk.stats().unwrap_or_default();
        let (state, own_error) = if stats.worker_failed {
            let words =
                "its worker failed inside (the agent's log has the details): restart the agent";
            (VdiState::Failed, Some(words.to_owned()))
        } else if view.state == VdiState::Running && log.state == cache::Phase::Failed {
            (VdiState::Failed, None)
        } else {
            (view.state, view.error)
        };
        VdiInfo {
            vdi: Vdi {
                name: disk.name.clone(),
                uuid: disk.uuid,
                size: view.size,
                attached: true,
                socket: disk.socket.clone(),
                committed_lsn: log.committed_lsn,
                state,
                owner: Some(self.name.clone()),
            },
            last_lsn: log.last_lsn,
            flushed_lsn: log.flushed_lsn,
            dirty_bytes: log.dirty_bytes,
            oldest_dirty_ms: log.oldest_dirty_ms,
            last_error: own_error.or(log.last_error),
            front_end_connected: stats.connected,
        }
    }

    /// A disk of the store as the store knows it, or as this host does if it serves it.
    pub(super) fn describe_stored(&self, found: &blockstore::VdiInfo) -> VdiInfo {
        if let Some(disk) = self.find_served(&found.uuid.to_string()) {
            let mut info = self.describe(&disk);
            info.vdi.committed_lsn = info.vdi.committed_lsn.max(found.committed_lsn.0);
            return info;
        }
        let owner = found.owner.as_ref();
        VdiInfo {
            vdi: Vdi {
                name: found.name.clone(),
                uuid: found.uuid,
                size: found.size_bytes,
                attached: false,
                socket: None,
                committed_lsn: found.committed_lsn.0,
                state: owner.map_or(VdiState::Detached, |_| VdiState::Elsewhere),
                owner: owner.map(|o| o.host_name.clone().unwrap_or_else(|| o.host.to_string())),
            },
            last_lsn: found.committed_lsn.0,
            flushed_lsn: found.committed_lsn.0,
            dirty_bytes: 0,
            oldest_dirty_ms: None,
            last_error: None,
            front_end_connected: false,
        }
    }

    /// All disks of the store.
    pub async fn list(&self) -> Result<Vec<Vdi>> {
        let found = self.parts.store.list_vdis().await?;
        let mut list: Vec<_> = found.iter().map(|found| self.describe_stored(found).vdi).collect();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(list)
    }

    /// One disk. One that this host serves is shown even while the store is down.
    pub async fn info(&self, name: &str) -> Result<VdiInfo> {
        match self.find_served(name) {
            Some(disk) => Ok(self.describe(&disk)),
            None => Ok(self.describe_stored(&self.parts.store.lookup_vdi(name).await?)),
        }
    }
}
