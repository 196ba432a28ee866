//! What each record says, field by field.

use crate::format::extent::{ExtentHeader, ExtentRecord};
use crate::format::gc::GcRecord;
use crate::format::host::HostRecord;
use crate::format::pointer::Pointer;
use crate::format::snapshot::Snapshot;
use crate::format::superblock::Superblock;
use crate::format::vdi::{GIVEN_UP, VdiHead};
use uuid::Uuid;

/// Names and values, in order.
pub(super) type Fields = Vec<(&'static str, String)>;

/// A record that can be put into words.
pub(super) trait Say {
    /// Appends what it says.
    fn say(&self, to: &mut Fields);
}

fn who(uuid: Option<Uuid>) -> String {
    uuid.map_or_else(|| "nobody".into(), |uuid| uuid.to_string())
}

fn yes(flag: bool) -> String {
    if flag { "yes" } else { "no" }.into()
}

/// A time, as it is on disk.
pub(super) fn time(ms: u64) -> String {
    if ms == 0 { "not noted".into() } else { format!("{ms} ms since 1970") }
}

/// A pointer in words.
pub(super) fn pointer_words(pointer: &Pointer) -> String {
    if pointer.is_sparse() {
        return "nothing".into();
    }
    let shared = if pointer.read_only { ", read-only" } else { "" };
    format!("block {}, birth {}, crc {:08x}{shared}", pointer.gba, pointer.birth, pointer.crc)
}

/// A snapshot in words.
pub(super) fn snapshot_words(snapshot: &Snapshot) -> String {
    format!(
        "LSN {} '{}', {} bytes, birth {}, height {}, {}, root: {}",
        snapshot.lsn,
        snapshot.label,
        snapshot.size_bytes,
        snapshot.birth,
        snapshot.height,
        time(snapshot.time_ms),
        pointer_words(&snapshot.root)
    )
}

impl Say for Superblock {
    fn say(&self, to: &mut Fields) {
        let g = &self.geometry;
        let table = |start: u64, places: u32| format!("from block {start} on, {places} places");
        to.extend([
            ("format version", self.format_version.to_string()),
            ("label", self.label.clone()),
            ("single host", yes(self.single_host)),
            ("incompatible features", format!("{:#x}", self.features_incompatible)),
            ("compatible features", format!("{:#x}", self.features_compatible)),
            ("formatted", time(self.created_ms)),
            ("bytes of the device", self.device_size.to_string()),
            ("extents", format!("{} of {} bytes", g.extent_count, g.extent_size())),
            ("GC record", format!("from block {} on", g.gc_start)),
            ("host table", table(g.host_start, g.host_slots)),
            ("VDI registry", table(g.vdi_start, g.vdi_slots)),
            ("extent catalogue", table(g.extent_start, g.extent_slots)),
        ]);
    }
}

impl Say for GcRecord {
    fn say(&self, to: &mut Fields) {
        to.extend([
            ("epoch", self.epoch.to_string()),
            ("phase", format!("{:?}", self.phase).to_lowercase()),
            ("leader", who(self.leader)),
            ("leader's generation", self.leader_generation.to_string()),
            ("last progress", time(self.progress_ms)),
        ]);
    }
}

impl Say for HostRecord {
    fn say(&self, to: &mut Fields) {
        to.extend([
            ("host", self.uuid.to_string()),
            ("name", self.name.clone()),
            ("address", self.address.clone()),
            ("state", format!("{:?}", self.state).to_lowercase()),
            ("generation", self.generation.to_string()),
            ("up since", time(self.up_since_ms)),
            ("heartbeat", time(self.heartbeat_ms)),
            ("GC epoch acknowledged", self.gc_epoch_acknowledged.to_string()),
        ]);
    }
}

impl Say for ExtentRecord {
    fn say(&self, to: &mut Fields) {
        to.extend([
            ("type", format!("{:?}", self.kind).to_lowercase()),
            ("ready", yes(self.ready)),
            ("owner", who(self.owner)),
            ("owner's generation", self.owner_generation.to_string()),
            ("sweep epoch", self.sweep_epoch.to_string()),
        ]);
    }
}

impl Say for ExtentHeader {
    fn say(&self, to: &mut Fields) {
        to.extend([
            ("extent", self.extent.to_string()),
            ("type", format!("{:?}", self.kind).to_lowercase()),
            ("blocks", self.extent_blocks.to_string()),
            ("first block of its own", self.first_block.to_string()),
            ("bitmap pages", self.bmap_pages.to_string()),
        ]);
    }
}

impl Say for VdiHead {
    fn say(&self, to: &mut Fields) {
        let owner = self.owner.map_or_else(
            || "nobody".into(),
            |owner| format!("{}, generation {}", owner.host, owner.generation),
        );
        let last_log = match self.last_log {
            Some(GIVEN_UP) => "given up, by a rollback".into(),
            None => "not noted".into(),
            Some(log) => log.to_string(),
        };
        let s = &self.snapshots;
        to.extend([
            ("disk", self.uuid.to_string()),
            ("state", format!("{:?}", self.state).to_lowercase()),
            ("size", format!("{} bytes", self.size_bytes)),
            ("owner", owner),
            ("attachment", self.attachment.to_string()),
            ("attached since", time(self.attached_ms)),
            ("committed LSN", self.committed.to_string()),
            ("committed", time(self.committed_ms)),
            ("log", self.log_id.map_or_else(|| "none".into(), |log| log.to_string())),
            ("last log", last_log),
            ("birth", self.birth.to_string()),
            ("birth of the last snapshot", self.last_snapshot_birth.to_string()),
            ("height", self.height.to_string()),
            ("root", pointer_words(&self.root)),
            ("name block", pointer_words(&self.meta)),
            ("snapshots", format!("{}, {} ever made, {} levels", s.live, s.made, s.height)),
            ("list of snapshots", pointer_words(&s.root)),
            ("created", time(self.created_ms)),
        ]);
        if let Some(origin) = &self.origin {
            to.push(("cloned from", format!("disk {}, LSN {}", origin.vdi, origin.lsn)));
        }
    }
}
